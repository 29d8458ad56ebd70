"""A switched-on engine's configuration: checked, its budget sized, PEDRO's scheduler chosen."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any

from ... import __version__
from ...serving.adapters import AdapterLimits
from ..options import (
    CONFIG_KEY,
    GENERATORS,
    VERSION_KEY,
    PedroOptions,
    options_of,
    shape_of,
    tokens_for_any_prompt,
)

logger = logging.getLogger("vllm.vllm_pedro")


def create_engine_config(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `EngineArgs`."""

    def wrapped(self: Any, *args: Any, **kwargs: Any) -> Any:
        config = original(self, *args, **kwargs)
        options = options_of(config)
        if options is not None:
            from ..checks import check_engine
            from ..scheduler import scheduler_path

            check_engine(config)
            _fill_in_memory(config, options)
            # Hashed into the key of the compile cache: another version may trace another graph.
            config.additional_config = {**config.additional_config, VERSION_KEY: __version__}
            scheduler = config.scheduler_config
            if scheduler.scheduler_cls is not None:
                raise ValueError(
                    "PEDRO brings its own scheduler class and cannot be combined with "
                    f"scheduler_cls={scheduler.scheduler_cls!r}"
                )
            scheduler.scheduler_cls = scheduler_path(bool(scheduler.async_scheduling))
            split_at_generators(config.compilation_config)
            _advise_on_budget(config)
        return config

    return wrapped


def default_budget(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `EngineArgs`: one step takes a whole prompt beside every other row."""

    def wrapped(self: Any, usage_context: Any, model_config: Any, *args: Any) -> Any:
        chosen = self.max_num_batched_tokens
        original(self, usage_context, model_config, *args)
        if chosen is None and options_of(self) is not None:
            # 32k tokens bound the profiling run's memory.
            longest = min(model_config.max_model_len, 32_768)
            drafts = (self.speculative_config or {}).get("num_speculative_tokens") or 0
            self.max_num_batched_tokens = max(
                self.max_num_batched_tokens,
                tokens_for_any_prompt(longest, self.max_num_seqs, drafts),
            )

    return wrapped


CPU_MEMORY = 4 << 30
"""Most bytes of the default on the CPU, where a part of the memory may be of other processes."""


def _fill_in_memory(config: Any, options: PedroOptions) -> None:
    """Give `pedro_memory_bytes` its default, so that front ends, scheduler and workers agree."""
    if options.pedro_memory_bytes is not None:
        return
    from vllm.platforms import current_platform

    total = int(current_platform.get_device_total_memory())
    if current_platform.is_cpu():
        total = min(total, 20 * CPU_MEMORY)
    shape = shape_of(config)
    limits = AdapterLimits(shape, options.max_pedro_rank, options.pedro_target_modules)
    memory = options.default_memory(total, limits.largest_blob)
    config.additional_config = {
        **config.additional_config,
        CONFIG_KEY: replace(options, pedro_memory_bytes=memory).to_config(),
    }


def split_at_generators(compilation: Any) -> None:
    """Have the pieces of a compiled graph end at the generators, as they do at attention.

    Then steps that generate vectors replay piecewise CUDA graphs, and the generators run between
    them. Without CUDA graphs the split costs nothing but calls; where vLLM does not split at
    attention (fused quantisation, full graphs alone), it would not split here.
    """
    if compilation.is_attention_compiled_piecewise():
        compilation.splitting_ops = [*compilation.splitting_ops, GENERATORS]


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
