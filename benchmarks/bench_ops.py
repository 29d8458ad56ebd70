"""Every operator of the serving path beside its reference and vLLM's LoRA, time and bytes a second.

    python benchmarks/bench_ops.py                                  # a table in Markdown
    python benchmarks/bench_ops.py --shapes 135M --batches 1 64 --json ops.json
    pytest benchmarks/bench_ops.py --benchmark-sort=name            # pytest-benchmark's own table

Shapes are those of one decoder layer of SmolLM2-135M, Llama-3-8B and Llama-3-70B; a share of the
rows has an adapter, each a tenant of its own (up to 64). Bytes are those that have to be moved:
each input once, each output once, vectors only for rows with an adapter, weights once for each
adapter in use. The bandwidth of a copy is measured in the same run.

LoRA is vLLM's shrink and expand (r = 8): on the CPU its plain torch kernels, which take as long for
rows without an adapter. Operators that this build does not have are left out.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

import vllm_pedro.ops as ops

# Query, key and value, FFN width, hidden size.
SHAPES = {
    "135M": (576, 192, 1536, 576),
    "8B": (4096, 1024, 14336, 4096),
    "70B": (8192, 1024, 28672, 8192),
}
BATCHES = (1, 8, 64, 512)
SHARES = (0, 50, 100)
TENANTS = 64
LORA_RANK = 8
PEDRO_RANK = 12
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"


def _chosen(name: str, default: Sequence[Any]) -> list[Any]:
    """Parameters come through the environment: pytest knows no options of ours."""
    text = os.environ.get(f"BENCH_OPS_{name}")
    return list(default) if not text else [type(default[0])(word) for word in text.split()]


@dataclass(frozen=True)
class Setting:
    """One layer's inputs."""

    shape: str
    batch: int
    share: int
    dtype: torch.dtype

    def __post_init__(self) -> None:
        torch.manual_seed(0)

    @property
    def sizes(self) -> tuple[int, int, int, int]:
        return SHAPES[self.shape]

    @property
    def rows(self) -> int:
        """Rows with an adapter."""
        return self.batch * self.share // 100

    @property
    def tenants(self) -> int:
        """Adapters in use."""
        return min(TENANTS, self.rows)

    def tensor(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.randn(shape, device=DEVICE).to(dtype or self.dtype)

    def vectors(self) -> Tensor:
        """Vectors of q, k, v, gate and up; row 0 is all ones."""
        q, kv, f, _ = self.sizes
        vectors = torch.rand(self.batch + 1, q + 2 * kv + 2 * f, device=DEVICE) - 0.5
        # Signs only: an operator that works in place runs thousands of times over the same values,
        # which must neither leave the range of 16 bits nor fade into denormals.
        vectors = torch.where(vectors < 0, -1.0, 1.0)
        vectors[0] = 1
        return vectors.to(self.dtype)

    def token_rows(self) -> Tensor:
        """Adapters and base rows are mixed evenly."""
        slots = torch.arange(1, self.batch + 1, device=DEVICE)
        if self.share < 100:
            keep = torch.arange(self.batch, device=DEVICE) * self.share % 100 < self.share
            chosen = torch.nonzero(keep).flatten()[: self.rows]
            mask = torch.zeros(self.batch, dtype=torch.bool, device=DEVICE)
            mask[chosen] = True
            slots = slots * mask
        return slots

    def step(self, prompts: int = 0) -> Tensor:
        return torch.tensor([prompts, self.rows, PEDRO_RANK], dtype=torch.int32)

    def lora(self, size_in: int, size_out: int) -> tuple[Tensor, Tensor, Tensor]:
        """A, B and the index of each row's adapter, -1 for none."""
        count = max(1, self.tenants)
        a = self.tensor(count, 1, LORA_RANK, size_in)
        b = self.tensor(count, 1, size_out, LORA_RANK)
        slots = self.token_rows()
        return a, b, torch.where(slots > 0, (slots - 1) % count, -1)


@dataclass(frozen=True)
class Work:
    """What is timed, and the bytes it has to move."""

    run: Callable[[], object]
    bytes: int


Maker = Callable[[Setting], "Work | None"]


def _reference(name: str) -> Callable[..., Any] | None:
    try:
        from vllm_pedro.ops import reference
    except ImportError:
        return None
    return getattr(reference, name, None)


def _op(name: str, kind: str) -> Callable[..., Any] | None:
    if kind == "reference":
        return _reference(name)
    return getattr(ops, name, None) if kind == "ours" else None


def _copy(s: Setting, kind: str) -> Work | None:
    """The bandwidth of this machine, at the size of one batch's gate_up."""
    if kind != "torch" or s.share != 100:
        return None
    source = s.tensor(s.batch, 2 * s.sizes[2])
    target = torch.empty_like(source)
    return Work(lambda: target.copy_(source), 2 * source.nbytes)


def _scale_columns(s: Setting, kind: str) -> Work | None:
    q, kv, _, d = s.sizes
    qkv, moved = s.tensor(s.batch, q + 2 * kv), 3 * s.rows * (q + kv) * s.dtype.itemsize
    if kind == "LoRA":
        x = s.tensor(s.batch, d)
        parts = [_lora_work(s, x, qkv, d, size, at) for size, at in ((q, 0), (kv, q + kv))]
        return Work(lambda: [run() for run, _ in parts], sum(size for _, size in parts))
    op = _op("scale_columns_", kind)
    if op is None:
        return None
    vectors, slots, step = s.vectors(), s.token_rows(), s.step()
    ranges = [0, 0, q, q + kv, q + kv, kv]
    return Work(lambda: op(qkv, vectors, slots, ranges, step), moved)


def _scaled(s: Setting, kind: str) -> Work | None:
    """Gather and multiply, as the compiler is given it; here uncompiled."""
    op = _op("scaled", kind)
    if kind != "ours" or op is None:
        return None
    q, kv, _, _ = s.sizes
    x, vectors, slots = s.tensor(s.batch, q + 2 * kv), s.vectors(), s.token_rows()
    columns = slice(0, q + 2 * kv)
    moved = (2 * s.batch + s.rows) * x.shape[1] * s.dtype.itemsize
    return Work(lambda: op(x, vectors, slots, columns), moved)


def _generate_vectors(s: Setting, kind: str) -> Work | None:
    """All five modules' vectors of one-token prompts; last pooling reads no more of longer ones."""
    op = _op("generate_vectors", kind)
    layout_of = getattr(ops, "BlobLayout", None)
    if op is None or layout_of is None or not s.rows:
        return None
    q, kv, f, d = s.sizes
    width = q + 2 * kv + 2 * f
    layout = layout_of(1, d, PEDRO_RANK, width, str(s.dtype).removeprefix("torch."))
    blob = np.zeros(layout.nbytes, np.uint8)
    layout.begin(blob, [(0, width)], ["rational"], (6, 5), "last", False)
    views = layout.views(blob)
    views.numerator[:, :7] = 0.1
    views.denominator[:, :5] = 0.1
    for part in (views.down, views.up, views.bias):
        values = torch.randn(part.shape).mul_(0.02).to(s.dtype)
        part[...] = (values.view(torch.uint16) if part.dtype == np.uint16 else values).numpy()
    units = -(-layout.nbytes // 256) * 16
    arena = np.zeros((s.tenants, 16 * units), np.uint8)
    arena[:, : layout.nbytes] = blob
    adapters = torch.from_numpy(arena.reshape(-1)).to(DEVICE)
    hidden = s.tensor(s.batch, d)
    vectors = s.vectors()
    rows = sorted(range(s.rows), key=lambda i: i % s.tenants)
    table = [(i, 1, i + 1, i % s.tenants * units) for i in rows]
    prompts = torch.tensor(table, dtype=torch.int32)
    layer, step = torch.zeros(1, dtype=torch.int32), s.step(len(table))
    moved = s.tenants * layout.nbytes + s.rows * (d + width) * s.dtype.itemsize
    return Work(lambda: op(hidden, vectors, adapters, prompts, layer, step), moved)


def _lora_work(
    s: Setting, x: Tensor, y: Tensor, size_in: int, size_out: int, column: int
) -> tuple[Callable[[], object], int]:
    """vLLM's shrink and expand onto some columns of ``y``."""
    a, b, index = s.lora(size_in, size_out)
    buffer = torch.zeros(s.batch, LORA_RANK, device=DEVICE)
    moved = (s.batch * size_in + 2 * s.rows * size_out) * s.dtype.itemsize
    moved += s.tenants * LORA_RANK * (size_in + size_out) * s.dtype.itemsize
    if DEVICE == "cpu":
        from vllm.lora.ops.torch_ops import bgmv_expand_slice, bgmv_shrink

        def run() -> None:
            bgmv_shrink(x, a, buffer, index, 1.0)
            bgmv_expand_slice(buffer, b, y, index, column, size_out)

        return run, moved
    from vllm.lora.ops.triton_ops import LoRAKernelMeta, lora_expand, lora_shrink

    meta = LoRAKernelMeta.make(max(1, s.tenants), s.batch, device=DEVICE)
    meta.prepare_tensors(index)
    arguments = meta.meta_args(s.batch)
    buffers = buffer[None]

    def run_on_gpu() -> None:
        lora_shrink(x, [a], buffers, *arguments, 1.0)
        lora_expand(buffers, [b], y, *arguments, offset_start=column, add_inputs=True)

    return run_on_gpu, moved


OPERATORS: dict[str, Callable[[Setting, str], Work | None]] = {
    "copy": _copy,
    "scale_columns_": _scale_columns,
    "scaled": _scaled,
    "generate_vectors": _generate_vectors,
}
KINDS = ("torch", "ours", "reference", "LoRA")


@pytest.mark.parametrize("kind", _chosen("KINDS", KINDS))
@pytest.mark.parametrize("share", _chosen("SHARES", SHARES))
@pytest.mark.parametrize("batch", _chosen("BATCHES", BATCHES))
@pytest.mark.parametrize("shape", _chosen("SHAPES", list(SHAPES)))
@pytest.mark.parametrize("operator", _chosen("OPERATORS", list(OPERATORS)))
@torch.inference_mode()
def test_operator(
    benchmark: Any, operator: str, shape: str, batch: int, share: int, kind: str
) -> None:
    """Not a test: what pytest-benchmark times."""
    dtype = getattr(torch, os.environ.get("BENCH_OPS_DTYPE", "bfloat16"))
    setting = Setting(shape, batch, share, dtype)
    work = OPERATORS[operator](setting, kind)
    if work is None:
        pytest.skip("nothing to time")

    def run() -> None:
        work.run()
        if DEVICE == "cuda":
            torch.cuda.synchronize()

    run()
    benchmark.group = f"{operator}, {shape}, batch {batch}, {share} % of rows"
    benchmark(run)
    benchmark.extra_info.update(
        operator=operator, shape=shape, batch=batch, share=share, kind=kind, bytes=work.bytes
    )


# The table ---------------------------------------------------------------------------------------


def rows_of(report: dict[str, Any]) -> Iterator[tuple[str, ...]]:
    """Rows of the table: time with its spread, bytes a second, and ratios to reference and LoRA."""
    timed = {}
    for entry in report["benchmarks"]:
        info = entry["extra_info"]
        key = (info["operator"], info["shape"], info["batch"], info["share"])
        timed.setdefault(key, {})[info["kind"]] = (entry["stats"], info["bytes"])
    for (operator, shape, batch, share), kinds in timed.items():
        for kind, (stats, moved) in kinds.items():
            median = stats["median"]
            ratios = [
                f"{kinds[other][0]['median'] / median:.2f}"
                if other in kinds and other != kind
                else ""
                for other in ("torch", "reference", "LoRA")
            ]
            spread = f"{1e6 * median:.1f} ({1e6 * stats['q1']:.1f}-{1e6 * stats['q3']:.1f})"
            speed = f"{moved / median / 1e9:.2f}" if moved else ""
            where = (operator, shape, f"{batch}", f"{share} %", kind)
            yield (*where, spread, speed, *ratios)


def main() -> int:
    from vllm_pedro.bench.results import load_average, machine, versions
    from vllm_pedro.bench.tables import table

    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--operators", nargs="+", choices=OPERATORS)
    parser.add_argument("--shapes", nargs="+", choices=SHAPES)
    parser.add_argument("--batches", nargs="+", type=int, metavar="N")
    parser.add_argument("--shares", nargs="+", type=int, metavar="PERCENT")
    parser.add_argument("--kinds", nargs="+", choices=KINDS)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--seconds", type=float, default=0.2, help="for each timing (%(default)s)")
    parser.add_argument("--json", type=Path, default=Path("bench-ops.json"))
    args = parser.parse_args()
    for name in ("operators", "shapes", "batches", "shares", "kinds"):
        if getattr(args, name):
            os.environ[f"BENCH_OPS_{name.upper()}"] = " ".join(map(str, getattr(args, name)))
    os.environ["BENCH_OPS_DTYPE"] = args.dtype
    before = load_average()
    words = [__file__, "-q", "--no-header", "--benchmark-disable-gc", "-p", "no:cacheprovider"]
    words += ["-o", "addopts=", f"--benchmark-max-time={args.seconds}", "--benchmark-min-rounds=5"]
    status = pytest.main([*words, f"--benchmark-json={args.json}", "--benchmark-quiet"])
    if status not in (0, 5):
        return int(status)
    report = json.loads(args.json.read_text())
    backends = getattr(ops, "backends", "plain torch")
    print(f"\n{machine()}\n{versions()}\noperators: {backends}; threads {torch.get_num_threads()}")
    print(f"dtype {args.dtype}; load average before {before}, after {load_average()}\n")
    headers = ("operator", "shape", "batch", "rows with adapter", "what", "µs: median (quartiles)")
    headers += ("GB/s", "torch ÷ this", "reference ÷ this", "LoRA ÷ this")
    print(table(headers, list(rows_of(report)), left=5))
    return 0


if __name__ == "__main__":
    sys.exit(main())
