"""The `vllm.general_plugins` entry point, and every function of vLLM that is patched."""

from __future__ import annotations

import functools
import importlib
import logging
from collections.abc import Callable

from . import wire
from .import_hook import when_imported
from .patches import Patch
from .versions import check_vllm_version

VLLM = "https://github.com/vllm-project/vllm"

_ARGUMENTS = {
    "upstream": f"{VLLM}/pull/42318",
    "until": "plugins may add engine arguments of their own",
}
_CONFIG = {
    "upstream": f"{VLLM}/pull/42318",
    "until": "a general plugin may check and amend `VllmConfig`",
}
_RUNNER = {
    "why": "workers create runners by name",
    "upstream": f"{VLLM}/pull/10372",
    "until": "a general plugin may choose the runner's class, as it may the scheduler's",
}
_ADAPTERS = {
    "upstream": f"{VLLM}/issues/32302",
    "until": "vLLM knows other kinds of adapters than LoRA's",
}
_BEAMS = {
    "why": "beams are sent as new prompts, without the length of the first one",
    "upstream": f"{VLLM}/issues/8306",
    "until": "beam search runs inside the engine",
}
_KEYS = {
    "why": "a salt is hashed with a request's first block only, where here the key may be due in a "
    "later one; and it is the user's",
    "upstream": f"{VLLM}/issues/13161",
    "until": "a request may bring a key for any of its blocks",
}

PATCHES = (
    Patch(
        "vllm.engine.arg_utils:EngineArgs.__init__",
        "frontend.keywords:with_keywords",
        why="keywords are read before plugins are loaded",
        **_ARGUMENTS,
    ),
    Patch(
        "vllm.engine.arg_utils:AsyncEngineArgs.__init__",
        "frontend.keywords:with_keywords",
        why="as above; the class has a constructor of its own",
        **_ARGUMENTS,
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.add_cli_args",
        "frontend.flags:add_cli_args",
        why="plugins are loaded while the parser is built, but have no place for arguments",
        **_ARGUMENTS,
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.from_cli_args",
        "frontend.flags:from_cli_args",
        why="what the flags said has to reach each process of the server",
        **_ARGUMENTS,
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs.create_engine_config",
        "frontend.engine_config:create_engine_config",
        why="check the configuration, choose the scheduler: there is no hook in between",
        **_CONFIG,
    ),
    Patch(
        "vllm.engine.arg_utils:EngineArgs._set_default_max_num_seqs_and_batched_tokens_args",
        "frontend.engine_config:default_budget",
        why="the default budget must take a whole prompt",
        **_CONFIG,
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor.__init__",
        "frontend.processor:init",
        why="engines create the class by name, and it knows LoRA's adapters alone",
        **_ADAPTERS,
    ),
    Patch(
        "vllm.v1.engine.input_processor:InputProcessor._validate_lora",
        "frontend.processor:validate_lora",
        why="an engine without PEDRO has to say how to switch it on",
        **_ADAPTERS,
    ),
    Patch(
        "vllm.v1.engine.core:EngineCore.preprocess_add_request",
        "wire:preprocess_add_request",
        why="a request has one adapter field, which counts towards `max_loras` and is loaded",
        **_ADAPTERS,
    ),
    Patch(
        "vllm.v1.core.kv_cache_utils:generate_block_hash_extra_keys",
        "block_keys:with_pedro_key",
        **_KEYS,
    ),
    Patch(
        "vllm.v1.core.block_pool:generate_block_hash_extra_keys",
        "block_keys:with_pedro_key",
        **_KEYS,
    ),
    Patch(
        "vllm.v1.core.block_pool:BlockPool._build_block_stored_event",
        "block_keys:with_adapter_name",
        why="events take the name from `lora_request`, which an engine with PEDRO clears",
        **_ADAPTERS,
    ),
    Patch(
        "vllm.entrypoints.generate.beam_search.utils:BeamSearchInstance.__init__",
        "frontend.readmission:beam_search_instance",
        **_BEAMS,
    ),
    Patch(
        "vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin.beam_search",
        "frontend.readmission:beam_search",
        **_BEAMS,
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.generate",
        "frontend.readmission:generate",
        why="a request whose adapter fails to load ends as a 500; what a name stands for is read "
        "at the last moment",
        upstream=f"{VLLM}/pull/37148",
        until="requests can fail with a client's error, and be put back into the queue",
    ),
    Patch(
        "vllm.v1.engine.async_llm:AsyncLLM.encode",
        "frontend.readmission:generate",
        why="as above, for pooling requests",
        upstream=f"{VLLM}/pull/37148",
        until="requests can fail with a client's error, and be put back into the queue",
    ),
    Patch(
        "vllm.v1.engine.output_processor:RequestState.make_request_output",
        "wire:make_request_output",
        why="a pooling request that ends without a result stops the front end for all",
        upstream=f"{VLLM}/pull/37148",
        until="the engine core can say why a pooling request failed",
    ),
    Patch(
        "vllm.entrypoints.openai.models.serving:OpenAIServingModels.__init__",
        "frontend.models:init",
        why="the class is created by name; resolvers must give a LoRA that is loaded at once",
        upstream=f"{VLLM}/pull/10546",
        until="vLLM knows other kinds of adapters than LoRA's",
    ),
    Patch(
        "vllm.entrypoints.serve.engine.serving:BaseServing._check_model",
        "frontend.models:check_model",
        why="an adapter must be read before a stream's status is sent",
        upstream=f"{VLLM}/pull/10546",
        until="adapters are checked before a stream begins",
    ),
    Patch(
        "vllm.entrypoints.pooling.base.serving:PoolingBaseServing._check_model",
        "frontend.models:check_pooling_model",
        why="as above; pooling routes have a check of their own",
        upstream=f"{VLLM}/pull/10546",
        until="adapters are checked before a request is processed",
    ),
    Patch(
        "vllm.entrypoints.serve:register_vllm_dev_api_routers",
        "frontend.tensors:dev_routes",
        why="a development route that takes an adapter's tensors",
        upstream=f"{VLLM}/issues/28218",
        until="plugins may add routes",
    ),
    Patch(
        "vllm.entrypoints.serve.engine.serving:BaseServing._get_active_default_mm_loras",
        "frontend.models:default_loras",
        why="a chat for the base model is answered by the adapter that is called `text`",
        upstream=f"{VLLM}/pull/19126",
        until="adapters of modalities are told from those with a modality's name",
    ),
    Patch(
        "model_hosting_container_standards.sagemaker.lora.transforms.inject_to_body:"
        "InjectToBodyApiTransform.transform_request",
        "frontend.models:keep_model",
        why="`/invocations` drops the model that a request names, and the plain model answers",
        upstream=f"{VLLM}/pull/27892",
        until="the name in a request's body counts where there is no header",
    ),
    Patch(
        "vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat.render_chat_request",
        "frontend.prompt_length:render_chat_request",
        why="only here the turns of a chat are known, and the tokens they became",
        upstream=f"{VLLM}/issues/32302",
        until="a plugin may amend a request between rendering and the engine",
    ),
    Patch(
        "vllm.v1.metrics.loggers:StatLoggerManager.__init__",
        "frontend.metrics:init",
        why="a plugin's stat logger is made before vLLM's, which drops all metrics named `vllm:`",
        upstream=f"{VLLM}/pull/22456",
        until="plugins may add metrics, and scheduler statistics carry theirs",
    ),
    Patch(
        "vllm.v1.worker.gpu_model_runner:GPUModelRunner.load_model",
        "worker.switch_on:v1",
        **_RUNNER,
    ),
    Patch(
        "vllm.v1.worker.cpu_model_runner:CPUModelRunner.load_model",
        "worker.switch_on:v1",
        **_RUNNER,
    ),
    Patch(
        "vllm.v1.worker.gpu.model_runner:GPUModelRunner.load_model",
        "worker.switch_on:v2",
        **_RUNNER,
    ),
    Patch(
        "vllm.v1.worker.gpu.model_states:resolve_model_state_cls",
        "worker.switch_on:model_state",
        why="the class is found by name; an instance of it cannot change class later, because "
        "`ModelState` derives from `ABC`",
        upstream=f"{VLLM}/pull/10372",
        until="the class can be configured",
    ),
)
"""Functions that are replaced by one that calls them; each only once its module is imported."""

METHODS: dict[str, Callable[[type], None]] = {
    "vllm.v1.engine.core:EngineCore": wire.add_core_methods,
    "vllm.v1.worker.worker_base:WorkerBase": wire.add_worker_methods,
}
"""Classes that get methods for a front end to call. `worker_extension_cls` adds methods too, but
there is one for all plugins, and none for engine cores."""


def teach_keywords() -> None:
    """Apply the patches that are due before vLLM loads plugins."""
    for patch in PATCHES:
        if patch.by == "frontend.keywords:with_keywords":
            patch.apply()


def register() -> None:
    """Make PEDRO available to vLLM; nothing changes for an engine that does not switch it on.

    Called by vLLM in each process. A process gets no module that it would not have loaded.

    Raises:
        RuntimeError: This vLLM is outside the supported window.
    """
    import vllm

    check_vllm_version(vllm.__version__)
    _share_vllm_logging()
    for patch in PATCHES:
        when_imported(patch.module, patch.apply)
    for name in METHODS:
        when_imported(name.partition(":")[0], functools.partial(_add_methods, name))


def _add_methods(name: str) -> None:
    module, _, cls = name.partition(":")
    METHODS[name](getattr(importlib.import_module(module), cls))


def _share_vllm_logging() -> None:
    """Show this package's log lines as vLLM's are shown, at vLLM's level."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_pedro")
    if theirs.handlers and not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate
