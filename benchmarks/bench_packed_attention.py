"""Attention of packed training rows: what transformers' SDPA costs beside what else there is.

A packed row holds several sequences; attention is causal within each. Forms, forward and backward,
in turns:

- `sdpa`: one row, block-diagonal mask, as PEDRO's packed training runs today;
- `padded`: the sequences as rows of a padded batch, causal, for comparison;
- `flex`: FlexAttention with a document mask, compiled;
- `xformers`: memory-efficient attention with BlockDiagonalCausalMask.

A form that this machine cannot run is listed with the reason. xformers is no dependency: install it
beside this package to have it measured.

    python benchmarks/bench_packed_attention.py --lengths 64 256 512 1024
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

Run = Callable[[Tensor, Tensor, Tensor], Tensor]


def block_mask(lengths: list[int], device: str) -> Tensor:
    """Bool `[1, 1, S, S]`: causal within each sequence."""
    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    same = documents[:, None] == documents[None, :]
    return (same & torch.ones_like(same).tril())[None, None].to(device)


def sdpa(lengths: list[int], device: str) -> Run:
    mask = block_mask(lengths, device)
    return lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def padded(lengths: list[int], device: str) -> Run:
    longest = max(lengths)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        rows = [
            torch.cat([F.pad(part, (0, 0, 0, longest - part.shape[2])) for part in parts])
            for parts in (x.split(lengths, dim=2) for x in (q, k, v))
        ]
        out = F.scaled_dot_product_attention(*rows, is_causal=True)
        return torch.cat([out[i : i + 1, :, :n] for i, n in enumerate(lengths)], dim=2)

    return run


def flex(lengths: list[int], device: str) -> Run:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    documents = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    documents = documents.to(device)

    def rule(batch: Tensor, head: Tensor, query: Tensor, key: Tensor) -> Tensor:
        return (documents[query] == documents[key]) & (query >= key)

    total = sum(lengths)
    mask = create_block_mask(rule, None, None, total, total, device=device)
    compiled: Any = torch.compile(flex_attention)
    return lambda q, k, v: compiled(q, k, v, block_mask=mask)


def xformers(lengths: list[int], device: str) -> Run:
    from xformers.ops import memory_efficient_attention
    from xformers.ops.fmha.attn_bias import BlockDiagonalCausalMask

    bias = BlockDiagonalCausalMask.from_seqlens(lengths, device=device)

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        flat = (x.transpose(1, 2) for x in (q, k, v))
        out: Tensor = memory_efficient_attention(*flat, attn_bias=bias)
        return out.transpose(1, 2)

    return run


FORMS: dict[str, Callable[[list[int], str], Run]] = {
    "sdpa": sdpa,
    "padded": padded,
    "flex": flex,
    "xformers": xformers,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 256, 512, 1024])
    parser.add_argument("--heads", type=int, default=9, help="K and V repeated (%(default)s)")
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repeats", type=int, default=7)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    shape = (1, args.heads, sum(args.lengths), args.head_dim)
    random = torch.Generator().manual_seed(0)
    q, k, v, gradient = (
        torch.randn(shape, generator=random).to(device, getattr(torch, args.dtype))
        for _ in range(4)
    )
    for x in (q, k, v):
        x.requires_grad_()
    expected = sdpa(args.lengths, device)(q, k, v).detach().float()
    runs: dict[str, Run] = {}
    missing: dict[str, str] = {}
    worst: dict[str, float] = {}

    def once(run: Run) -> float:
        for x in (q, k, v):
            x.grad = None
        if device == "cuda":
            torch.cuda.synchronize()
        began = time.perf_counter()
        run(q, k, v).backward(gradient)
        if device == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - began

    for name, make in FORMS.items():
        try:
            run = make(args.lengths, device)
            worst[name] = (run(q, k, v).detach().float() - expected).abs().max().item()
            once(run)
            runs[name] = run
        except Exception as error:
            missing[name] = f"{type(error).__name__}: {str(error).strip().splitlines()[0][:160]}"
    times: dict[str, list[float]] = {name: [] for name in runs}
    for repeat in range(args.repeats):
        for name in list(runs) if repeat % 2 else list(runs)[::-1]:
            times[name].append(once(runs[name]))
    report = {
        name: {
            "ms_median": 1e3 * statistics.median(each),
            "over_sdpa": [
                f(a / b for a, b in zip(each, times["sdpa"], strict=True))
                for f in (statistics.median, min, max)
            ],
            "largest_difference": worst[name],
        }
        for name, each in times.items()
    }
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{torch.get_num_threads()} threads"
    )
    settings = {"device": name, "dtype": args.dtype, "lengths": args.lengths, "heads": args.heads}
    print(json.dumps(settings | {"forms": report, "not_run": missing}, indent=1))


if __name__ == "__main__":
    main()
