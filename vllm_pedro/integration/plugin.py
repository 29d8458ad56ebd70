"""The ``vllm.general_plugins`` entry point: vLLM calls :func:`register` in each process."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from .._import_hook import when_imported
from ..versions import check_vllm_version
from . import cli, keywords, metrics, wire
from .options import options_of, tokens_for_any_prompt
from .patches import become, extend, wrap

logger = logging.getLogger("vllm.vllm_pedro")


def register() -> None:
    """Make PEDRO available to vLLM; nothing changes for an engine that does not switch it on.

    Raises:
        RuntimeError: This vLLM is outside the supported window.
    """
    import vllm

    check_vllm_version(vllm.__version__)
    _share_vllm_logging()
    # Each only once its module is imported: a process gets no module that it would not have loaded.
    for module, install in (
        ("vllm.engine.arg_utils", keywords.install),
        ("vllm.engine.arg_utils", _install_engine_config),
        ("vllm.engine.arg_utils", cli.install),
        ("vllm.v1.engine.input_processor", _install_input_processor),
        ("vllm.v1.engine.core", _install_engine_core),
        ("vllm.entrypoints.generate.beam_search.utils", _install_beam_search),
        ("vllm.entrypoints.generate.beam_search.online", _install_server_beam_search),
        ("vllm.entrypoints.openai.models.serving", _install_server_models),
        ("vllm.entrypoints.serve.engine.serving", _install_server_check),
        ("vllm.v1.engine.async_llm", _install_generate),
        ("vllm.v1.metrics.loggers", metrics.install),
        ("vllm.v1.worker.worker_base", _install_workers),
        ("vllm.v1.worker.gpu_model_runner", _install_gpu_runner),
        ("vllm.v1.worker.cpu_model_runner", _install_cpu_runner),
        ("vllm.v1.worker.gpu.model_runner", _install_gpu_runner_v2),
        ("vllm.v1.worker.gpu.model_states", _install_model_state),
    ):
        when_imported(module, install)


def _share_vllm_logging() -> None:
    """Show this package's log lines as vLLM's are shown, at vLLM's level."""
    theirs, ours = logging.getLogger("vllm"), logging.getLogger("vllm_pedro")
    if theirs.handlers and not ours.handlers:
        for handler in theirs.handlers:
            ours.addHandler(handler)
        ours.setLevel(theirs.level)
        ours.propagate = theirs.propagate


def _install_engine_config() -> None:
    """Check a switched-on engine's configuration, size its budget, give it PEDRO's scheduler.

    Upstream: there is no hook between the arguments and the finished configuration.
    Can go when: a general plugin may validate and amend ``VllmConfig``.
    """
    from vllm.engine.arg_utils import EngineArgs

    def create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
            config = original(self, *args, **kwargs)
            options = options_of(config)
            if options is not None:
                from .checks import check_engine
                from .scheduler import scheduler_path

                check_engine(config, options)
                scheduler = config.scheduler_config
                if scheduler.scheduler_cls is not None:
                    raise ValueError(
                        "PEDRO brings its own scheduler class and cannot be combined with "
                        f"scheduler_cls={scheduler.scheduler_cls!r}"
                    )
                scheduler.scheduler_cls = scheduler_path(bool(scheduler.async_scheduling))
                _advise_on_budget(config)
            return config

        return wrapped

    def default_budget(original: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(self: Any, usage_context: Any, model_config: Any, *args: Any) -> Any:
            chosen = self.max_num_batched_tokens
            original(self, usage_context, model_config, *args)
            if chosen is None and options_of(self) is not None:
                # One step must take a whole prompt; 32k tokens bound the profiling run's memory.
                longest = min(model_config.max_model_len, 32_768)
                drafts = (self.speculative_config or {}).get("num_speculative_tokens") or 0
                self.max_num_batched_tokens = max(
                    self.max_num_batched_tokens,
                    tokens_for_any_prompt(longest, self.max_num_seqs, drafts),
                )

        return wrapped

    wrap(EngineArgs, "create_engine_config", create_engine_config)
    wrap(EngineArgs, "_set_default_max_num_seqs_and_batched_tokens_args", default_budget)


def _advise_on_budget(config: Any) -> None:
    """Say so where long prompts will hold up running rows, as the user has set the budget."""
    scheduler, longest = config.scheduler_config, min(config.model_config.max_model_len, 32_768)
    budget, drafts = scheduler.max_num_batched_tokens, config.num_speculative_tokens
    needed = tokens_for_any_prompt(longest, scheduler.max_num_seqs, drafts)
    if budget < needed:
        logger.warning(
            "PEDRO: max_num_batched_tokens=%d takes no prompt of %d tokens beside %d other rows: "
            "long prompts with an adapter wait some steps, and then hold up running rows for one, "
            "or are refused. %d would take them all.",
            budget,
            longest,
            scheduler.max_num_seqs - 1,
            needed,
        )


def _install_input_processor() -> None:
    """Let a switched-on engine's input processor understand requests for PEDRO adapters.

    Upstream: ``InputProcessor`` is created by name in ``LLMEngine`` and ``AsyncLLM``.
    Can go when: its class can be configured.
    """
    from vllm.v1.engine.input_processor import InputProcessor

    from .processor import PedroInputProcessorMixin, RefusedRequestError
    from .request import PedroRequest

    def init(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(self: Any, vllm_config: Any, *args: Any, **kwargs: Any) -> None:
            original(self, vllm_config, *args, **kwargs)
            if options_of(vllm_config) is not None:
                become(self, PedroInputProcessorMixin)
                self.enable_pedro()

        return __init__

    def validate_lora(original: Callable[..., None]) -> Callable[..., None]:
        def _validate_lora(self: Any, lora_request: Any) -> None:
            if isinstance(lora_request, PedroRequest):
                raise RefusedRequestError(
                    f"got {lora_request!r}, but PEDRO is not enabled: start the engine with "
                    "enable_pedro=True (--enable-pedro)"
                )
            original(self, lora_request)

        return _validate_lora

    wrap(InputProcessor, "__init__", init)
    wrap(InputProcessor, "_validate_lora", validate_lora)


def _install_engine_core() -> None:
    """Take a PEDRO request out of ``lora_request`` before the scheduler and LoRA code see it.

    Else it counts towards ``max_loras``, the LoRA manager tries to load it, and its name and path
    enter the block hashes. From here on the request's spec travels in its sampling parameters.
    Upstream: requests have one adapter field, of LoRA's type.
    Can go when: vLLM knows other kinds of adapters.
    """
    from vllm.v1.engine.core import EngineCore

    def preprocess(original: Callable[..., Any]) -> Callable[..., Any]:
        def preprocess_add_request(self: Any, request: Any) -> Any:
            if wire.spec_of(request.sampling_params) is not None:
                request.lora_request = None
            return original(self, request)

        return preprocess_add_request

    wrap(EngineCore, "preprocess_add_request", preprocess)
    wire.add_core_methods(EngineCore)


def _install_beam_search() -> None:
    """Let beams carry the length of the original prompt.

    vLLM's beam search sends prompt and tokens so far as a new prompt at every step.
    Upstream: a beam knows its original prompt, but requests have no field for its length.
    Can go when: beam search runs inside the engine.
    """
    from vllm.entrypoints.generate.beam_search.utils import BeamSearchInstance

    from .processor import is_pedro
    from .request import PedroRequest

    def init(original: Callable[..., None]) -> Callable[..., None]:
        def __init__(
            self: Any, prompt: Any, lora_request: Any = None, *args: Any, **kwargs: Any
        ) -> None:
            if is_pedro(lora_request) and getattr(lora_request, "prompt_length", None) is None:
                decoder = prompt if prompt["type"] != "enc_dec" else prompt["decoder_prompt"]
                fields = {
                    f: getattr(lora_request, f)
                    for f in lora_request.__struct_fields__
                    if f != "prompt_length"
                }
                length = len(decoder["prompt_token_ids"])
                lora_request = PedroRequest(**fields, prompt_length=length)
            original(self, prompt, lora_request, *args, **kwargs)

        return __init__

    wrap(BeamSearchInstance, "__init__", init)


# Imported only when vLLM has imported what they wrap.
def _install_server_beam_search() -> None:
    from .frontend import install_beam_search

    install_beam_search()


def _install_server_models() -> None:
    from .models import install_models

    install_models()


def _install_server_check() -> None:
    from .models import install_model_check

    install_model_check()


def _install_generate() -> None:
    from .frontend import install_generate

    install_generate()


def _install_workers() -> None:
    """Give workers the methods that a front end calls when adapters come and go.

    Upstream: ``worker_extension_cls`` adds methods too, but there is one for all plugins.
    Can go when: a plugin may register methods for ``collective_rpc``.
    """
    from vllm.v1.worker.worker_base import WorkerBase

    wire.add_worker_methods(WorkerBase)


def _install_gpu_runner() -> None:
    """Turn a switched-on worker's model runner into PEDRO's before it loads the model.

    Upstream: runners are created by name in the workers.
    Can go when: the runner's class can be configured.
    """
    from vllm.v1.worker.gpu_model_runner import GPUModelRunner

    wrap(GPUModelRunner, "load_model", _load_as_pedro)


def _install_cpu_runner() -> None:
    """The same for the CPU's runner, which has its own ``load_model``."""
    from vllm.v1.worker.cpu_model_runner import CPUModelRunner

    wrap(CPUModelRunner, "load_model", _load_as_pedro)


def _install_gpu_runner_v2() -> None:
    """The same for the V2 runner, whose module shares nothing with V1's."""
    from vllm.v1.worker.gpu.model_runner import GPUModelRunner

    from .runner_v2 import PedroRunnerV2Mixin

    wrap(GPUModelRunner, "load_model", lambda original: _load_as(PedroRunnerV2Mixin, original))


def _install_model_state() -> None:
    """Let the V2 runner create PEDRO's subclass of the model's ``ModelState``.

    The class of an instance cannot be changed later: ``ModelState`` derives from ``ABC``.
    Upstream: the class is resolved by name from the model.
    Can go when: the class can be configured, or a plugin may extend it.
    """
    from vllm.v1.worker.gpu import model_states

    from .runner_v2 import PedroModelStateMixin

    def resolve(original: Callable[..., type]) -> Callable[..., type]:
        def resolve_model_state_cls(vllm_config: Any, model: Any) -> type:
            cls = original(vllm_config, model)
            return cls if options_of(vllm_config) is None else extend(cls, PedroModelStateMixin)

        return resolve_model_state_cls

    wrap(model_states, "resolve_model_state_cls", resolve)


def _load_as_pedro(original: Callable[..., None]) -> Callable[..., None]:
    from .runner_v1 import PedroRunnerV1Mixin

    return _load_as(PedroRunnerV1Mixin, original)


def _load_as(mixin: type, original: Callable[..., None]) -> Callable[..., None]:
    def load_model(self: Any, *args: Any, **kwargs: Any) -> None:
        if options_of(self.vllm_config) is None or isinstance(self, mixin):
            return original(self, *args, **kwargs)
        become(self, mixin)
        return self.load_model(*args, **kwargs)

    return load_model
