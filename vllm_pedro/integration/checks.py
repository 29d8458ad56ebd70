"""What an engine with PEDRO refuses at start-up, because it could not be served exactly."""

from __future__ import annotations

from typing import Any

from ..backbone import ARCHITECTURES


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
        "mixture-of-experts": model.is_moe,
        "hybrid (Mamba or linear attention)": model.is_hybrid,
        "attention-free": model.is_attention_free,
        "multi-head latent attention": model.use_mla,
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
    for name in (
        "tensor_parallel_size",
        "pipeline_parallel_size",
        "data_parallel_size",
        "prefill_context_parallel_size",
        "decode_context_parallel_size",
    ):
        if getattr(parallel, name) > 1:
            found.append(f"{name}={getattr(parallel, name)} is not supported yet (use 1)")
    if parallel.use_ubatching:
        found.append("dual-batch overlap splits a batch in two (turn enable_dbo off)")
    if model.enable_prompt_embeds:
        found.append("prompt embeddings have no token ids to key the cache (enable_prompt_embeds)")
    if config.kv_transfer_config is not None:
        found.append("KV transfer can load cache past the pooled token (unset kv_transfer_config)")
    if config.ec_transfer_config is not None:
        found.append("encoder caches are for multimodal models (unset ec_transfer_config)")
    if getattr(config.compilation_config.pass_config, "enable_sp", False):
        found.append("sequence parallelism splits the residual stream (pass_config.enable_sp)")
    if config.cache_config.kv_sharing_fast_prefill:
        found.append("kv_sharing_fast_prefill skips prompt tokens in some layers")
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in ("ngram", "ngram_gpu"):
        found.append(
            f"speculative decoding by {speculative.method!r} is not supported yet (use 'ngram')"
        )
    return found
