"""Base, PEDRO and LoRA engines alive at once, in turns: ``vllm-pedro bench offline``.

python benchmarks/bench_offline.py --workloads decode prefill mixed
"""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_pedro.bench.adapters import write_adapters
from vllm_pedro.bench.workloads import fixed_lengths
from vllm_pedro.cli import main


def make_adapters(model: str, count: int, folder: Path) -> list[Path]:
    """Random adapters of the paper's size (r = 12 on q, v, up)."""
    return write_adapters(model, folder / "adapters", "pedro", count)


def prompts_of(batch: int, length: int, vocabulary: int) -> list[dict[str, list[int]]]:
    """Token-id prompts that differ from their first token on, so that nothing is cached."""
    workload = fixed_lengths(batch, length, 1)
    return [{"prompt_token_ids": workload.prompt(row, vocabulary)} for row in range(batch)]


if __name__ == "__main__":
    sys.exit(main(["bench", "offline", *sys.argv[1:]]))
