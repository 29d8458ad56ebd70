"""What an engine with PEDRO refuses at start-up, because it could not be served exactly."""

from __future__ import annotations

from typing import Any

from ..architectures import ARCHITECTURES, EXPERTS_UP
from .offloading import CONNECTORS
from .options import options_of

SPECULATION = ("ngram", "ngram_gpu", "draft_model", "eagle")
"""Methods that were run. What proposes has no adapter; it changes how many drafts are accepted."""


def check_engine(vllm_config: Any) -> None:
    """Refuse configurations whose PEDRO rows would not be exact.

    Args:
        vllm_config: vLLM's finished configuration.

    Raises:
        ValueError: Names everything that stands in the way and what to change.
    """
    reasons = list(_reasons(vllm_config))
    if reasons:
        raise ValueError("PEDRO cannot be enabled for this engine: " + "; ".join(reasons))


def _reasons(config: Any) -> list[str]:
    model, parallel, found = config.model_config, config.parallel_config, []
    if model.runner_type != "generate":
        found.append(f"runner {model.runner_type!r} does not generate text (use runner='generate')")
    kinds = {
        "encoder-decoder": model.is_encoder_decoder,
        "attention-free": model.is_attention_free,
        "multimodal": model.is_multimodal_model,
    }
    for kind, is_kind in kinds.items():
        if is_kind:
            found.append(f"{kind} models are not supported")
    architecture = model.architecture
    if architecture not in ARCHITECTURES:
        found.append(
            f"architecture {architecture} is not among those whose projections are known "
            f"({', '.join(ARCHITECTURES)})"
        )
    options = options_of(config)
    scales_experts = options is not None and EXPERTS_UP in options.pedro_target_modules
    if scales_experts and config.device_config.device_type != "cpu":
        found.append(
            f"Up within experts has not run on a GPU (leave {EXPERTS_UP} out of "
            "pedro_target_modules)"
        )
    if model.is_hybrid and config.cache_config.mamba_cache_mode != "none":
        found.append(
            "prefix caching of a hybrid model splits prompts at block ends (turn "
            "enable_prefix_caching off)"
        )
    for name in (
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        if getattr(parallel, name) > 1:
            found.append(f"{name}={getattr(parallel, name)} is not supported yet (use 1)")
    if parallel.use_ubatching:
        found.append("dual-batch overlap splits a batch in two (turn enable_dbo off)")
    if model.enable_prompt_embeds:
        found.append("prompt embeddings have no token ids to key the cache (enable_prompt_embeds)")
    transfer = config.kv_transfer_config
    if transfer is not None and transfer.kv_connector not in CONNECTORS:
        offloads = config.cache_config.kv_offloading_size is not None
        found.append(
            f"KV connector {transfer.kv_connector} may load blocks of another adapter, or past the "
            f"pooled token (use {' or '.join(CONNECTORS)}, or unset "
            f"{'kv_offloading_size' if offloads else 'kv_transfer_config'})"
        )
    elif transfer is not None and transfer.kv_load_failure_policy != "fail":
        found.append("blocks that failed to load must end a request (kv_load_failure_policy: fail)")
    if config.ec_transfer_config is not None:
        found.append("encoder caches are for multimodal models (unset ec_transfer_config)")
    if getattr(config.compilation_config.pass_config, "enable_sp", False):
        found.append("sequence parallelism splits the residual stream (pass_config.enable_sp)")
    if config.cache_config.kv_sharing_fast_prefill:
        found.append("kv_sharing_fast_prefill skips prompt tokens in some layers")
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in SPECULATION:
        found.append(
            f"speculative decoding by {speculative.method!r} is not supported yet (use one of "
            f"{', '.join(SPECULATION)})"
        )
    return found
