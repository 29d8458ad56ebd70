import pytest
import torch

from vllm_pedro.ops import scale_, scaled
from vllm_pedro.serving.plan import Segment, StepPlan

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
PLANS = {
    "no adapters": StepPlan([], [], 9),
    "decode": StepPlan([Segment(i, 1, 1 + i % 3) for i in range(9)], [], 9),
    "decode, some base": StepPlan([Segment(0, 1, 2), Segment(4, 1, 1)], [], 6),
    "prompts": StepPlan([Segment(1, 7, 3)], [], 9),
    "prompts and decode": StepPlan([Segment(0, 1, 1), Segment(3, 5, 2)], [], 9),
}


def sample(plan, dtype):
    random = torch.Generator().manual_seed(0)
    vectors = torch.rand(4, 24, generator=random).add(0.5).to(dtype)
    vectors[0] = 1.0
    slots = torch.zeros(12, dtype=torch.int64)
    for s in plan.segments:
        slots[s.start : s.start + s.length] = s.slot
    x = torch.randn(9, 16, generator=random).to(dtype)
    return x, vectors, slots


def reference(x, vectors, slots, columns, offset):
    y = x.clone()
    for t in range(len(x)):
        for j in range(columns.stop - columns.start):
            y[t, offset + j] = x[t, offset + j] * vectors[slots[t], columns.start + j]
    return y


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize(("columns", "offset"), [(slice(4, 20), 0), (slice(16, 24), 8)])
def test_both_forms_equal_the_definition_bitwise(name, dtype, columns, offset):
    plan = PLANS[name]
    x, vectors, slots = sample(plan, dtype)
    want = reference(x, vectors, slots, columns, offset)
    end = offset + columns.stop - columns.start
    assert torch.equal(scaled(x[:, offset:end], vectors, slots, columns), want[:, offset:end])
    scale_(x, vectors, slots, columns, plan, offset)
    assert torch.equal(x, want)


@pytest.mark.parametrize("name", PLANS)
def test_rows_without_an_adapter_are_not_touched(name):
    plan = PLANS[name]
    x, vectors, slots = sample(plan, torch.float32)
    x[3] = torch.nan
    before = x.clone()
    scale_(x, vectors, slots, slice(0, 16), plan)
    base = slots[:9] == 0
    assert x[base].numpy().tobytes() == before[base].numpy().tobytes()


def test_compiled_form_equals_the_eager_one():
    plan = PLANS["decode"]
    x, vectors, slots = sample(plan, torch.bfloat16)
    compiled = torch.compile(scaled, backend="aot_eager", fullgraph=True)
    want = scaled(x, vectors, slots, slice(4, 20))
    assert torch.equal(compiled(x, vectors, slots, slice(4, 20)), want)
