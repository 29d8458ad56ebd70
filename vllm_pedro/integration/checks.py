"""What an engine with PEDRO refuses at start-up, because it could not be served exactly."""

from __future__ import annotations

from typing import Any

from ..architectures import ARCHITECTURES, EXPERTS_UP, MULTIMODAL, architecture_of
from .offloading import reasons_against
from .options import options_of

SPECULATION = ("ngram", "ngram_gpu", "draft_model", "eagle", "eagle3", "medusa", "mtp")
"""Methods that were run. What proposes has no adapter; it changes how many drafts are accepted."""

UNTRIED = {
    "suffix": "needs arctic-inference, with which it was not run",
    "mlp_speculator": "is in neither of vLLM's runners",
    "custom_class": "is code of its own, which is not known to be exact",
    "extract_hidden_states": "writes hidden states, which was not run",
    "dflash": "drafts in parallel, which was not run",
    "dspark": "drafts in parallel, which was not run",
}
"""vLLM 0.32's others, and why they are refused."""


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
    is_pooling = model.runner_type == "pooling"
    if model.runner_type not in ("generate", "pooling"):
        found.append(f"runner {model.runner_type!r} has no prompts (use 'generate' or 'pooling')")
    if is_pooling and model.attn_type == "encoder_only":
        found.append("attention that looks ahead is not supported yet (is_causal, CLS pooling)")
    kinds = {
        "encoder-decoder": model.is_encoder_decoder,
        "attention-free": model.is_attention_free,
    }
    for kind, is_kind in kinds.items():
        if is_kind:
            found.append(f"{kind} models are not supported")
    architecture = model.architecture
    is_known = architecture in (*ARCHITECTURES, *MULTIMODAL)
    if is_pooling:  # its class may be called after its head
        is_known = architecture_of(model.hf_text_config) is not None
    if not is_known:
        found.append(
            f"architecture {architecture} is not among those whose projections are known "
            f"({', '.join((*ARCHITECTURES, *MULTIMODAL))})"
        )
    elif architecture in MULTIMODAL and architecture_of(model.hf_text_config) is None:
        found.append(
            f"the language model in {architecture} is a {model.hf_text_config.model_type}, which "
            "is not among those whose projections are known"
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
    if transfer is not None:
        offloads = config.cache_config.kv_offloading_size is not None
        option = "kv_offloading_size" if offloads else "kv_transfer_config"
        found += reasons_against(transfer, option)
    if config.ec_transfer_config is not None:
        found.append("images encoded elsewhere are not supported (unset ec_transfer_config)")
    if getattr(config.compilation_config.pass_config, "enable_sp", False):
        found.append("sequence parallelism splits the residual stream (pass_config.enable_sp)")
    if config.cache_config.kv_sharing_fast_prefill:
        found.append("kv_sharing_fast_prefill skips prompt tokens in some layers")
    speculative = config.speculative_config
    if speculative is not None and speculative.method not in SPECULATION:
        why = UNTRIED.get(speculative.method, "is not supported yet")
        found.append(
            f"speculative decoding by {speculative.method!r} {why} (use one of "
            f"{', '.join(SPECULATION)})"
        )
    if model.is_multimodal_model:
        if is_pooling:
            found.append("images have not run in pooling models (use runner='generate')")
        if speculative is not None and "ngram" not in speculative.method:
            found.append(
                f"speculative decoding by {speculative.method!r} has not run with images (use "
                "ngram)"
            )
    return found
