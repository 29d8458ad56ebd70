"""Operators on one device: equality with the reference, bytes a second, time on the host.

OMP_NUM_THREADS=1 python benchmarks/gpu_operators.py bandwidth cpu SmolLM2-135M
python benchmarks/gpu_operators.py check cuda Llama-3-8B
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_pedro import ops
from vllm_pedro.ops import reference, samples

FIELDS = (
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
)
SHAPES = {
    "Llama-3-70B": (8192, 28672, 80, 64, 8, 128256),
    "Llama-3-8B": (4096, 14336, 32, 32, 8, 128256),
    "SmolLM2-135M": (576, 1536, 30, 9, 3, 49152),
    "small": (128, 256, 3, 4, 2, 512),
}
MODELS = {name: dict(zip(FIELDS, shape, strict=True)) for name, shape in SHAPES.items()}


@dataclasses.dataclass(frozen=True)
class Plan:
    """Where operators run, and a layer of which model, of `MODELS`, they are for."""

    device: str
    model: str

    @property
    def small(self) -> bool:
        return self.model == "small"

    @property
    def sequences(self) -> tuple[int, ...]:
        return (1, 4) if self.small else (1, 32, 256)

    @property
    def widths(self) -> tuple[int, int, int]:
        """Hidden size, which is Q's too, K's and V's width, and Up's."""
        d, f, _, heads, kv_heads, _ = SHAPES[self.model]
        return d, d // heads * kv_heads, f


def implementations(plan: Plan) -> dict[str, Any]:
    """What is registered for the device; on a GPU Triton beside it, where that is native code."""
    if plan.device == "cpu":
        return {ops.backends.cpu: ops}
    from vllm_pedro.ops import triton_kernels

    found = {ops.backends.cuda: ops}
    return found if "Triton" in ops.backends.cuda else {**found, "Triton": triton_kernels}


def check_operators(plan: Plan) -> Iterator[dict[str, Any]]:
    """Compare each implementation with the reference over the tests' table."""
    widths = samples.WIDTHS[1:3] if plan.small else samples.WIDTHS
    for name, implementation in implementations(plan).items():
        row: dict[str, Any] = {"implementation": name}
        try:
            row["equal"] = samples.check(implementation, plan.device, widths)
        except Exception as error:
            row["wrong"] = f"{type(error).__name__}: {error}"
        yield row


def seconds_of(call: Callable[[], Any], plan: Plan) -> float:
    """Time of one call: on a GPU the median of a CUDA graph's replays, on a CPU the lowest of many
    rounds of plain calls, as others' work only adds to it."""
    if plan.device == "cuda":
        from triton.testing import do_bench_cudagraph

        return 1e-3 * do_bench_cudagraph(call, return_mode="median")
    call()
    return min(timeit.repeat(call, number=20, repeat=3 if plan.small else 60)) / 20


def host_seconds_of(call: Callable[[], Any], plan: Plan) -> float | None:
    """Median time that a call keeps the host, the device's queue never full; None on a CPU."""
    if plan.device == "cpu":
        return None
    return statistics.median(timeit.repeat(call, torch.cuda.synchronize, number=50, repeat=9)) / 50


def copy_bandwidth(plan: Plan) -> float:
    """Bytes a second read and written by a copy that no cache holds."""
    size = (1 << 24) if plan.device == "cpu" else (1 << 30)
    source = torch.empty(size, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), plan)


def scale_cases(
    plan: Plan, tokens: int, backend: str, implementation: Any
) -> Iterator[tuple[str, Any, int]]:
    """Name, call and bytes that have to be moved, each of `tokens` rows with its own tenant."""
    d, kv, f = plan.widths
    place: dict[str, Any] = {"device": plan.device, "dtype": torch.bfloat16}
    # Zeros, because the calls scale the same values again and again: nothing may become denormal.
    vectors = torch.zeros(tokens + 1, d + 2 * kv + 2 * f, **place)
    slots = torch.arange(1, tokens + 1, device=plan.device)
    step = torch.tensor([0, tokens, 0], dtype=torch.int32)
    qkv, gate_up = torch.randn(tokens, d + 2 * kv, **place), torch.randn(tokens, 2 * f, **place)
    ranges = (0, 0, d, d + kv, d + kv, kv)
    up = d + 2 * kv + f

    def scale(by: Any) -> Callable[[], None]:
        return lambda: by.scale_columns_(qkv, vectors, slots, ranges, step)

    def separate_activation() -> torch.Tensor:
        implementation.scale_columns_(gate_up, vectors, slots, (f, up, f), step)
        return torch.nn.functional.silu(gate_up[:, :f]) * gate_up[:, f:]

    qv, ff, where = 2 * tokens * (d + kv), 2 * tokens * f, f"{plan.model}, {tokens} tokens"
    yield f"scale_columns_: {backend}, {where}", scale(implementation), 3 * qv
    yield f"scale_columns_: gather and multiply, {where}", scale(reference), 3 * qv
    yield f"scale_columns_ of Up, then silu and mul in torch, {where}", separate_activation, 4 * ff


def generator_cases(
    plan: Plan, backend: str, implementation: Any
) -> Iterator[tuple[str, Any, int]]:
    """Name, call and bytes of `generate_vectors`, r = 12 and columns for q, v, up."""
    d, kv, f = plan.widths
    for lengths in ((), (32,), (512,) * 4):
        sample = samples.generate_sample((d, d + kv + f, 12), torch.bfloat16, lengths, plan.device)
        moved = 2 * sum(lengths) * d + len(lengths) * sample.record_bytes
        name = f"generate_vectors: {backend}, {plan.model}, prompts {list(lengths)}"
        yield name, (lambda s=sample: implementation.generate_vectors(*s.args())), moved


def compiled_cases(plan: Plan, tokens: int, layers: int = 8) -> Iterator[tuple[str, Any, int]]:
    """A layer's elementwise work, several times in one compiled graph, in each form.

    The projections are inputs; what uses Q and K stands for the rotary embedding, and a product,
    which no compiler fuses into, for what takes V. Q, V and Up are scaled; "base" scales nothing.
    """
    d, kv, f = plan.widths
    packed, width = d + 2 * kv, d + 2 * kv + f
    place: dict[str, Any] = {"device": plan.device, "dtype": torch.bfloat16}
    inputs = [
        (
            torch.randn(tokens, packed, **place),
            torch.randn(tokens, 2 * f, **place),
            torch.rand(tokens + 1, width, **place).sub(0.5),
        )
        for _ in range(layers)
    ]
    slots = torch.arange(1, tokens + 1, device=plan.device)
    angle, reader = torch.randn(tokens, d + kv, **place), torch.randn(kv, 1, **place)
    one = torch.ones((), **place)

    def silu_and_mul(x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.silu(x[:, :f]) * x[:, f:]

    def use(qkv: torch.Tensor, v: torch.Tensor | None = None) -> Any:
        return qkv[:, : d + kv] * angle, torch.mm(qkv[:, d + kv :] if v is None else v, reader)

    def base(qkv: torch.Tensor, gate_up: torch.Tensor, by: torch.Tensor) -> Any:
        return use(qkv), silu_and_mul(gate_up)

    def before(qkv: torch.Tensor, gate_up: torch.Tensor, by: torch.Tensor) -> Any:
        up = ops.scaled(gate_up[:, f:], by, slots, slice(packed, width))
        gate_up = torch.cat((gate_up[:, :f], up), dim=-1)
        return use(ops.scaled(qkv, by, slots, slice(0, packed))), silu_and_mul(gate_up)

    def after(qkv: torch.Tensor, gate_up: torch.Tensor, by: torch.Tensor) -> Any:
        qkv = ops.scaled(qkv, by, slots, slice(0, packed))
        act = ops.scaled(silu_and_mul(gate_up), by, slots, slice(packed, width))
        return use(qkv, qkv[:, d + kv :] * one), act

    for name, layer in {
        "base": base,
        "gather and multiply, Up before the activation": before,
        "gather and multiply, Up after it, V apart": after,
    }.items():
        graph = torch.compile(
            lambda given, layer=layer: [layer(*each) for each in given],
            dynamic=False,
            fullgraph=True,
        )
        where = f"{layers} layers in a graph, {plan.model}, {tokens} tokens"
        yield f"{name}, {where}", (lambda graph=graph: graph(inputs)), 0


def measure_bandwidth(plan: Plan) -> Iterator[dict[str, Any]]:
    """Microseconds, share of a copy's bytes a second and host time of each case, one by one."""
    copy = copy_bandwidth(plan)
    yield {"operator": "copy", "GB/s": copy / 1e9}
    cases: list[tuple[str, Any, int]] = []
    for name, implementation in implementations(plan).items():
        backend = name.split(" (")[0]
        for tokens in plan.sequences:
            cases += scale_cases(plan, tokens, backend, implementation)
        cases += generator_cases(plan, backend, implementation)
    if not plan.small:  # compiling takes longer than all the rest
        torch._dynamo.config.recompile_limit = 64
        for tokens in plan.sequences:
            cases += compiled_cases(plan, tokens)
    for name, call, moved in {case[0]: case for case in cases}.values():
        try:
            seconds, host = seconds_of(call, plan), host_seconds_of(call, plan)
        except Exception as error:  # a form that cannot be captured must not hide the others
            yield {"operator": name, "wrong": f"{type(error).__name__}: {error}"}
            continue
        row = {"operator": name, "us": 1e6 * seconds}
        row["host us"] = None if host is None else 1e6 * host
        if moved:
            row |= {"GB/s": moved / seconds / 1e9, "of copy": moved / seconds / copy}
        yield row


if __name__ == "__main__":
    task = {"check": check_operators, "bandwidth": measure_bandwidth}[sys.argv[1]]
    for found in task(Plan(*sys.argv[2:4])):
        print(json.dumps(found), flush=True)
