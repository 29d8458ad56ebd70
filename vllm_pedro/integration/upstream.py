"""The functions of vLLM that are wrapped, overridden or relied upon, as they were when read.

`tests/integration/test_upstream.py` fails when one differs: then read the new one, adapt what
depends on it, and write the new digest here. `vllm-pedro verify` says it to users.
"""

from __future__ import annotations

import hashlib
import importlib
import inspect
from typing import Any, Final

_TEXTS: Final = {
    "0.32": """
model_hosting_container_standards.sagemaker.lora.transforms.inject_to_body:InjectToBodyApiTransform
    transform_request 595cdde17e5b
vllm.compilation.backends
    split_graph e6f3aa52de16
vllm.config.compilation:CompilationConfig
    is_attention_compiled_piecewise 21fb10f29d12
vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:OffloadingConnectorScheduler
    _build_store_jobs 91e3ed502d4d
    _calc_num_offloadable_tokens 014ed11f8bd2
    get_num_new_matched_tokens 35f88263c324
vllm.distributed.kv_transfer.kv_connector.v1.offloading_connector:OffloadingConnector
    _max_loadable_tokens 8625ed2fb371
vllm.distributed.kv_transfer.kv_connector.v1.multi_connector:MultiConnector
    get_num_new_matched_tokens e3177bfe78c5
    update_state_after_alloc c71dc673f85c
vllm.engine.arg_utils:EngineArgs
    _set_default_max_num_seqs_and_batched_tokens_args 058d17be96fe
    add_cli_args 0b7444570415
    create_engine_config b9b94288f46d
    from_cli_args 51a013f61829
vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin
    beam_search e2e6d1893a8f
vllm.entrypoints.generate.beam_search.utils:BeamSearchInstance
    __init__ a5587f260df0
vllm.entrypoints.openai.chat_completion.serving:OpenAIServingChat
    render_chat_request 642ed68ae31d
vllm.entrypoints.pooling.base.serving:PoolingBaseServing
    _check_model 5ae1f2c98001
vllm.entrypoints.openai.models.serving:OpenAIServingModels
    __init__ 0218cc457c0b
    _check_load_lora_adapter_request e610e5af04aa
    _check_unload_lora_adapter_request 1d3df3f3b438
    init_static_loras 0b9b928c7109
    load_lora_adapter 10dfa2a6fcf1
    resolve_lora b9ef864b9ccd
    show_available_models 8ec3d280b359
    unload_lora_adapter 9d3e23adf519
vllm.entrypoints.serve.engine.serving:BaseServing
    _check_model 5a2f4707ffb7
    _get_active_default_mm_loras 40fb43533f2d
vllm.entrypoints.serve
    register_vllm_dev_api_routers 4c2ada0a8004
vllm.lora.request:LoRARequest
    __eq__ bba566415278
vllm.model_executor.layers.fused_moe.experts.cpu_moe:CPUUnquantizedExperts
    apply babf24f200ec
    process_weights_after_loading 7233c2501b8a
vllm.model_executor.layers.fused_moe.experts.triton_moe:TritonExperts
    activation 7a8794d03f69
    apply 148cb752a4a4
vllm.v1.core.block_pool:BlockPool
    _build_block_stored_event 724a892fa09d
vllm.v1.core.block_pool
    generate_block_hash_extra_keys fabb6e4b928a
vllm.v1.core.encoder_cache_manager:EncoderCacheManager
    can_allocate 384e5996b7c2
    check_and_update_cache c4b356d622b6
    free f3d7c766c940
vllm.v1.core.encoder_cache_manager
    compute_mm_encoder_budget 9a5999cff80c
vllm.v1.core.kv_cache_utils
    generate_block_hash_extra_keys fabb6e4b928a
vllm.v1.core.sched.output:NewRequestData
    from_request e6258e939d81
vllm.v1.core.sched.scheduler:Scheduler
    _ec_transfer_pending e7bc8efbef3f
    _free_request 1b386dca84e6
    _get_local_prefix_cache_hit 3495ddb7de46
    _preempt_request 4113f5de8a84
    _reserve_prefill_lookahead c214e49d7610
    _try_schedule_encoder_inputs 5b35ef24b51e
    add_request fa2b51cd04a9
    make_stats 8963d2ab6518
    reset_prefix_cache 8e03dcc540a2
    schedule da4f2cf2fc39
    update_from_output 85b29db96051
vllm.v1.cudagraph_dispatcher:CudagraphDispatcher
    dispatch 56eabe7548de
vllm.v1.engine.async_llm:AsyncLLM
    encode d11895748016
    generate 5bd0ee90459b
vllm.v1.engine.core:EngineCore
    collective_rpc f0d85bf03430
    preprocess_add_request a8b386db3f85
vllm.v1.engine.core_client:AsyncMPClient
    call_utility_all_async 477aad87bf49
vllm.v1.engine.input_processor:InputProcessor
    __init__ 5137c92ffb92
    _get_mm_identifier 7760d3e998f7
    _validate_lora 14d8474923a7
    process_inputs e22b5f772979
vllm.v1.engine.output_processor:OutputProcessor
    add_request 8e0315ddb4d6
    process_outputs 9e116796002e
vllm.v1.engine.output_processor:RequestState
    make_request_output 353cb96c5dea
vllm.v1.metrics.loggers:PrometheusStatLogger
    record a506cbde7928
vllm.v1.metrics.loggers:StatLoggerManager
    __init__ 6e75cf036af8
vllm.v1.metrics.stats:LoRARequestStates
    request_waiting cd5c761944f1
    update_scheduler_stats 09c74cedb96f
vllm.v1.request:Request
    update_block_hashes fbb2f6a93ec8
vllm.v1.simple_kv_offload.manager:SimpleCPUOffloadScheduler
    _prepare_lazy_store_specs b4e8394597a4
    _queue_finished_eager_store b14a21afa195
    _select_eager_blocks_to_store 06219e33b06a
    get_num_new_matched_tokens 60c7e743a759
    update_state_after_alloc f7543190de8e
vllm.v1.worker.cpu_model_runner:CPUModelRunner
    load_model 270bdfc6670d
vllm.v1.worker.gpu.cudagraph_utils:CudaGraphManager
    dispatch 16099f992970
vllm.v1.worker.gpu.dp_utils
    dispatch_cg_and_sync_dp 7b73eb8cd9b2
vllm.v1.worker.gpu.model_runner:GPUModelRunner
    add_requests 8321187d017e
    execute_model e1535583ba75
    finish_requests d78030bf2a44
    gather_batch_req_state 18da780f3c3f
    initialize_kv_cache 6869df8fbc3d
    load_model 53fc8c4d88ef
    pool 77e4b07f468c
    sample_tokens de7f3c7b008b
vllm.v1.worker.gpu.model_states.default:DefaultModelState
    add_request 289c2c00c244
    prepare_dummy_inputs a5a7f1e25853
    remove_request 1c8d210d292b
vllm.v1.worker.gpu.model_states
    resolve_model_state_cls c330e5807024
vllm.v1.worker.gpu_model_runner:GPUModelRunner
    _determine_batch_execution_and_padding 8a0228128517
    _dummy_run 47b96b71fc65
    _pool f9bd05c26def
    _prepare_inputs c31a77c123a0
    _update_states 326599f31b27
    execute_model e058bf791a29
    load_model 9508e8f41530
    sample_tokens 047e6a4738de
""",
    "0.33": """
vllm.distributed.kv_transfer.kv_connector.v1.offloading.scheduler:OffloadingConnectorScheduler
    _build_store_jobs 907bff1c4fe7
    get_num_new_matched_tokens 2d73566cc8e0
vllm.engine.arg_utils:EngineArgs
    add_cli_args 28ea69a1405b
    create_engine_config 1f9166220749
vllm.entrypoints.generate.beam_search.online:BeamSearchOnlineMixin
    beam_search 9944b62f623c
vllm.entrypoints.generate.beam_search.utils:BeamSearchInstance
    __init__ e30babc0de63
vllm.entrypoints.openai.models.serving:OpenAIServingModels
    load_lora_adapter a29620dc71ad
vllm.v1.core.block_pool:BlockPool
    _build_block_stored_event 7c411cf76e41
vllm.v1.core.sched.scheduler:Scheduler
    _free_request a2e0937699dc
    _get_local_prefix_cache_hit 8e6f6ae6a7ab
    _preempt_request 8d67cc4e8568
    schedule fa34c8a13c0a
    update_from_output 8067d98a98b6
vllm.v1.engine.async_llm:AsyncLLM
    encode 8ebc0778654f
    generate f8205b7b520c
vllm.v1.engine.output_processor:OutputProcessor
    process_outputs 06811284749d
vllm.v1.engine.output_processor:RequestState
    make_request_output 9c555c51b1a2
vllm.v1.simple_kv_offload.manager:SimpleCPUOffloadScheduler
    get_num_new_matched_tokens 7918397805c1
vllm.v1.worker.gpu.dp_utils
    dispatch_cg_and_sync_dp d8a28dfab9d8
vllm.v1.worker.gpu.model_runner:GPUModelRunner
    execute_model 7a1168866a75
    initialize_kv_cache bb3b354975f1
    load_model ab5f3d285f7a
    sample_tokens 82f16d6b90bd
""",
}


def _parse(text: str) -> dict[str, str]:
    found, owner = {}, ""
    for line in text.strip().splitlines():
        if line.startswith(" "):
            name, digest = line.split()
            found[f"{owner}{'.' if ':' in owner else ':'}{name}"] = digest
        else:
            owner = line
    return found


READ: Final = {minor: _parse(text) for minor, text in _TEXTS.items()}
"""By minor version: target, as `Patch` names it, and SHA-256 of its source, shortened. Of later
versions only what differs from the first; for those, only the source was read."""


def known_digests(version: str) -> dict[str, str] | None:
    """Target -> digest for a version of vLLM; None for one that was not read."""
    minor = ".".join(version.split(".")[:2])
    first = next(iter(READ.values()))
    return {**first, **READ[minor]} if minor in READ else None


def digest_of(target: str) -> str | None:
    """The digest of the installed function, without this package's wrapper; None: it is gone."""
    module, _, path = target.partition(":")
    try:
        function: Any = importlib.import_module(module)
        for name in path.split("."):
            function = getattr(function, name)
    except (ImportError, AttributeError):
        return None
    function = inspect.unwrap(getattr(function, "_vllm_pedro_original", function))
    return hashlib.sha256(inspect.getsource(function).encode()).hexdigest()[:12]


def changed(version: str) -> list[str]:
    """Targets that are not as they were read, in the installed vLLM of this version.

    Raises:
        KeyError: This version was not read.
    """
    known = known_digests(version)
    if known is None:
        raise KeyError(version)
    return [target for target, digest in known.items() if digest_of(target) != digest]
