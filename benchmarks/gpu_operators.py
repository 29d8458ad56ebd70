"""Operators on one device: equality with the reference, bytes a second, time on the host.

OMP_NUM_THREADS=1 python benchmarks/gpu_operators.py bandwidth cpu SmolLM2-135M
python benchmarks/gpu_operators.py check cuda Llama-3-8B
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from vllm_pedro import ops
from vllm_pedro.ops import reference, samples

MODELS: dict[str, dict[str, int]] = {
    "Llama-3-8B": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "vocab_size": 128256,
    },
    "SmolLM2-135M": {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
    },
    "small": {
        "hidden_size": 128,
        "intermediate_size": 256,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 512,
    },
}


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
    rounds of plain calls."""
    if plan.device == "cuda":
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(3):
                call()
        torch.cuda.synchronize()
        graph, inner = torch.cuda.CUDAGraph(), 20
        with torch.cuda.graph(graph):
            for _ in range(inner):
                call()
        times = []
        for _ in range(9):
            start, end = torch.cuda.Event(True), torch.cuda.Event(True)
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) * 1e-3 / inner)
        return statistics.median(times)
    call()
    rounds = 3 if plan.small else 60
    return min(_host_seconds(call, 20) for _ in range(rounds))  # others' work only adds to it


def _host_seconds(call: Callable[[], Any], rounds: int) -> float:
    begin = time.perf_counter()
    for _ in range(rounds):
        call()
    return (time.perf_counter() - begin) / rounds


def host_seconds_of(call: Callable[[], Any], plan: Plan) -> float | None:
    """Median time that a call keeps the host, the device's queue never full; None on a CPU."""
    if plan.device == "cpu":
        return None
    times = []
    for _ in range(9):
        torch.cuda.synchronize()
        times.append(_host_seconds(call, 50))
    return statistics.median(times)


def copy_bandwidth(plan: Plan) -> float:
    """Bytes a second read and written by a copy that no cache holds."""
    size = (1 << 24) if plan.device == "cpu" else (1 << 30)
    source = torch.empty(size, dtype=torch.uint8, device=plan.device)
    target = torch.empty_like(source)
    return 2 * size / seconds_of(lambda: target.copy_(source), plan)


def operator_cases(
    tokens: int, plan: Plan, backend: str, implementation: Any
) -> Iterator[tuple[str, Any, int]]:
    """Name, call and bytes that have to be moved, each of `tokens` rows with its own tenant."""
    shape = MODELS[plan.model]
    d, f = shape["hidden_size"], shape["intermediate_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    dtype, item = torch.bfloat16, 2
    backend = backend.split(" (")[0]
    # Ones, because the calls scale the same values again and again: nothing may become denormal.
    vectors = torch.ones(tokens + 1, d + 2 * kv + 2 * f, device=plan.device, dtype=dtype)
    slots = torch.arange(1, tokens + 1, device=plan.device)
    step = torch.tensor([0, tokens, 0], dtype=torch.int32)
    qkv = torch.randn(tokens, d + 2 * kv, device=plan.device).to(dtype)
    gate_up = torch.randn(tokens, 2 * f, device=plan.device).to(dtype)
    ranges = (0, 0, d, d + kv, d + kv, kv)
    up = d + 2 * kv + f
    qv, ff = item * tokens * (d + kv), item * tokens * f
    where = f"{plan.model}, {tokens} tokens"

    def scale() -> None:
        implementation.scale_columns_(qkv, vectors, slots, ranges, step)

    def gather() -> None:
        reference.scale_columns_(qkv, vectors, slots, ranges, step)

    def separate_activation() -> torch.Tensor:
        implementation.scale_columns_(gate_up, vectors, slots, (f, up, f), step)
        return torch.nn.functional.silu(gate_up[:, :f]) * gate_up[:, f:]

    yield f"scale_columns_: {backend}, {where}", scale, 3 * qv
    yield f"scale_columns_: gather and multiply, {where}", gather, 3 * qv
    yield f"scale_columns_ of Up, then silu and mul in torch, {where}", separate_activation, 4 * ff


def generator_cases(
    plan: Plan, backend: str, implementation: Any
) -> Iterator[tuple[str, Any, int]]:
    """Name, call and bytes of `generate_vectors`, r = 12 and columns for q, v, up."""
    shape = MODELS[plan.model]
    d = shape["hidden_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    size = (d, d + kv + shape["intermediate_size"], 12)
    for lengths in ((), (32,), (512,) * 4):
        sample = samples.generate_sample(size, torch.bfloat16, lengths, plan.device)
        moved = 2 * sum(lengths) * d + len(lengths) * sample.record_bytes
        name = f"generate_vectors: {backend.split(' (')[0]}, {plan.model}, prompts {list(lengths)}"
        yield name, (lambda s=sample: implementation.generate_vectors(*s.args())), moved


def compiled_layers(tokens: int, plan: Plan, layers: int = 8) -> dict[str, Callable[[], Any]]:
    """A layer's elementwise work, several times in one compiled graph, in each form.

    The projections are inputs; what uses Q and K stands for the rotary embedding, and a product,
    which no compiler fuses into, for what takes V. Q, V and Up are scaled; "base" scales nothing.
    """
    shape = MODELS[plan.model]
    d, f = shape["hidden_size"], shape["intermediate_size"]
    kv = d // shape["num_attention_heads"] * shape["num_key_value_heads"]
    packed, width = d + 2 * kv, d + 2 * kv + f
    dtype = torch.bfloat16
    vectors = [
        torch.rand(tokens + 1, width, device=plan.device).add(0.5).to(dtype) for _ in range(layers)
    ]
    slots = torch.arange(1, tokens + 1, device=plan.device)
    qkvs = [torch.randn(tokens, packed, device=plan.device).to(dtype) for _ in range(layers)]
    gate_ups = [torch.randn(tokens, 2 * f, device=plan.device).to(dtype) for _ in range(layers)]
    angle = torch.randn(tokens, d + kv, device=plan.device).to(dtype)
    reader = torch.randn(kv, 1, device=plan.device).to(dtype)
    one = torch.ones((), device=plan.device, dtype=dtype)

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

    def many(layer: Callable[..., Any]) -> Callable[[], Any]:
        graph = torch.compile(
            lambda q, g, v: [layer(*each) for each in zip(q, g, v, strict=True)],
            dynamic=False,
            fullgraph=True,
        )
        return lambda: graph(qkvs, gate_ups, vectors)

    forms = {
        "base": base,
        "gather and multiply, Up before the activation": before,
        "gather and multiply, Up after it, V apart": after,
    }
    return {f"{name}, {layers} layers in a graph": many(form) for name, form in forms.items()}


def measure_bandwidth(plan: Plan) -> Iterator[dict[str, Any]]:
    """Microseconds, share of a copy's bytes a second and host time of each case, one by one."""
    copy = copy_bandwidth(plan)
    yield {"operator": "copy", "GB/s": copy / 1e9}
    cases: list[tuple[str, Any, int]] = []
    for name, implementation in implementations(plan).items():
        for tokens in plan.sequences:
            cases += operator_cases(tokens, plan, name, implementation)
        cases += generator_cases(plan, name, implementation)
    if not plan.small:  # compiling takes longer than all the rest
        torch._dynamo.config.recompile_limit = 64
        for tokens in plan.sequences:
            forms = compiled_layers(tokens, plan)
            cases += [(f"{n}, {plan.model}, {tokens} tokens", c, 0) for n, c in forms.items()]
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
        print("RESULT " + json.dumps(found), flush=True)
