"""Fails when a function of vLLM that is wrapped or overridden is no longer the one it was.

Then read the new one, adapt the patch or the override if need be, and write the new value here.
"""

from __future__ import annotations

import hashlib
import inspect

import pytest
from vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler import (
    OffloadingConnectorScheduler,
)
from vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector import OffloadingConnector
from vllm.engine.arg_utils import EngineArgs
from vllm.entrypoints.generate.beam_search.online import BeamSearchOnlineMixin
from vllm.entrypoints.generate.beam_search.utils import BeamSearchInstance
from vllm.entrypoints.openai.chat_completion.serving import OpenAIServingChat
from vllm.entrypoints.openai.models.serving import OpenAIServingModels
from vllm.entrypoints.serve.engine.serving import BaseServing
from vllm.lora.request import LoRARequest
from vllm.v1.core import block_pool, kv_cache_utils
from vllm.v1.core.sched.output import NewRequestData
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.async_llm import AsyncLLM
from vllm.v1.engine.core import EngineCore
from vllm.v1.engine.core_client import AsyncMPClient
from vllm.v1.engine.input_processor import InputProcessor
from vllm.v1.engine.output_processor import OutputProcessor
from vllm.v1.metrics.loggers import StatLoggerManager
from vllm.v1.request import Request
from vllm.v1.worker.cpu_model_runner import CPUModelRunner
from vllm.v1.worker.gpu import model_states
from vllm.v1.worker.gpu.cudagraph_utils import CudaGraphManager
from vllm.v1.worker.gpu.model_runner import GPUModelRunner as GPUModelRunnerV2
from vllm.v1.worker.gpu.model_states.default import DefaultModelState
from vllm.v1.worker.gpu_model_runner import GPUModelRunner

from vllm_pedro.integration.plugin import PATCHES

KNOWN = {
    # wrapped
    (EngineArgs, "create_engine_config"): "b9b94288f46d",
    (EngineArgs, "_set_default_max_num_seqs_and_batched_tokens_args"): "058d17be96fe",
    (InputProcessor, "__init__"): "5137c92ffb92",
    (InputProcessor, "_validate_lora"): "14d8474923a7",
    (EngineCore, "preprocess_add_request"): "a8b386db3f85",
    (BeamSearchInstance, "__init__"): "a5587f260df0",
    (GPUModelRunner, "load_model"): "9508e8f41530",
    (CPUModelRunner, "load_model"): "270bdfc6670d",
    (GPUModelRunnerV2, "load_model"): "53fc8c4d88ef",
    (model_states, "resolve_model_state_cls"): "c330e5807024",
    (kv_cache_utils, "generate_block_hash_extra_keys"): "fabb6e4b928a",
    (block_pool, "generate_block_hash_extra_keys"): "fabb6e4b928a",
    (EngineArgs, "add_cli_args"): "0b7444570415",
    (EngineArgs, "from_cli_args"): "51a013f61829",
    (BeamSearchOnlineMixin, "beam_search"): "e2e6d1893a8f",
    (OpenAIServingModels, "__init__"): "0218cc457c0b",
    (BaseServing, "_check_model"): "5a2f4707ffb7",
    (OpenAIServingChat, "render_chat_request"): "642ed68ae31d",
    (AsyncLLM, "generate"): "5bd0ee90459b",
    (StatLoggerManager, "__init__"): "6e75cf036af8",
    # relied upon: what limits loads and stores
    (OffloadingConnector, "_max_loadable_tokens"): "8625ed2fb371",
    (OffloadingConnectorScheduler, "get_num_new_matched_tokens"): "35f88263c324",
    (OffloadingConnectorScheduler, "_calc_num_offloadable_tokens"): "014ed11f8bd2",
    (OffloadingConnectorScheduler, "_build_store_jobs"): "91e3ed502d4d",
    # overridden
    (InputProcessor, "process_inputs"): "e22b5f772979",
    (Scheduler, "schedule"): "da4f2cf2fc39",
    (Scheduler, "add_request"): "fa2b51cd04a9",
    (Scheduler, "update_from_output"): "85b29db96051",
    (Scheduler, "make_stats"): "8963d2ab6518",
    (OpenAIServingModels, "init_static_loras"): "0b9b928c7109",
    (OpenAIServingModels, "show_available_models"): "8ec3d280b359",
    (OpenAIServingModels, "load_lora_adapter"): "10dfa2a6fcf1",
    (OpenAIServingModels, "unload_lora_adapter"): "9d3e23adf519",
    (OpenAIServingModels, "resolve_lora"): "b9ef864b9ccd",
    (Scheduler, "_get_local_prefix_cache_hit"): "3495ddb7de46",
    (Scheduler, "_reserve_prefill_lookahead"): "c214e49d7610",
    (Scheduler, "_ec_transfer_pending"): "e7bc8efbef3f",
    (GPUModelRunner, "_update_states"): "326599f31b27",
    (GPUModelRunner, "_prepare_inputs"): "c31a77c123a0",
    (GPUModelRunner, "_determine_batch_execution_and_padding"): "8a0228128517",
    (GPUModelRunner, "_dummy_run"): "47b96b71fc65",
    (GPUModelRunner, "execute_model"): "e058bf791a29",
    (GPUModelRunner, "sample_tokens"): "047e6a4738de",
    (GPUModelRunnerV2, "initialize_kv_cache"): "6869df8fbc3d",
    (GPUModelRunnerV2, "gather_batch_req_state"): "18da780f3c3f",
    (GPUModelRunnerV2, "finish_requests"): "d78030bf2a44",
    (GPUModelRunnerV2, "add_requests"): "8321187d017e",
    (GPUModelRunnerV2, "execute_model"): "e1535583ba75",
    (GPUModelRunnerV2, "sample_tokens"): "de7f3c7b008b",
    (DefaultModelState, "add_request"): "289c2c00c244",
    (DefaultModelState, "remove_request"): "1c8d210d292b",
    (DefaultModelState, "prepare_dummy_inputs"): "a5a7f1e25853",
    (CudaGraphManager, "dispatch"): "16099f992970",
    # relied on
    (OpenAIServingModels, "_check_load_lora_adapter_request"): "e610e5af04aa",
    (OpenAIServingModels, "_check_unload_lora_adapter_request"): "1d3df3f3b438",
    (OutputProcessor, "process_outputs"): "9e116796002e",
    (AsyncMPClient, "call_utility_async"): "56362d56455f",
    (Request, "update_block_hashes"): "fbb2f6a93ec8",
    (EngineCore, "collective_rpc"): "f0d85bf03430",
    (LoRARequest, "__eq__"): "bba566415278",
    (NewRequestData, "from_request"): "e6258e939d81",
}


def digest(owner: type, name: str) -> str:
    function = getattr(owner, name)
    function = getattr(function, "_vllm_pedro_original", function)
    return hashlib.sha256(inspect.getsource(inspect.unwrap(function)).encode()).hexdigest()[:12]


@pytest.mark.parametrize(("owner", "name"), KNOWN, ids=lambda v: getattr(v, "__name__", v))
def test_function_is_the_known_one(owner, name):
    assert digest(owner, name) == KNOWN[owner, name]


def test_every_patched_function_is_held():
    """But for the constructors that a dataclass writes itself."""
    known = {f"{o.__module__}:{o.__qualname__}.{n}" for o, n in KNOWN if isinstance(o, type)}
    known |= {f"{o.__name__}:{n}" for o, n in KNOWN if not isinstance(o, type)}
    for patch in PATCHES:
        assert patch.target in known or patch.target.endswith("EngineArgs.__init__")
