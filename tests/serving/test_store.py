import numpy as np
import pytest
import torch

from vllm_pedro.backbone import BackboneShape
from vllm_pedro.bench.adapters import store_columns
from vllm_pedro.places import widths_of
from vllm_pedro.serving.plan import IDENTITY_ROW, StepPlan, plan_step
from vllm_pedro.serving.store import VectorStore

SHAPE = BackboneShape(2, 8, {"q_proj": 8, "k_proj": 4, "v_proj": 4, "gate_proj": 16, "up_proj": 16})
ALL = ("q_proj", "k_proj", "v_proj", "gate_proj", "up_proj")


def plan(slots, lengths=None):
    """A step whose rows read these slots; one token each unless `lengths` says otherwise."""
    lengths = lengths or [1] * len(slots)
    names = [str(i) for i in range(len(slots))]
    return plan_step(names, slots, lengths, [0] * len(slots), {})


def store(modules=ALL, dtype=torch.float32):
    return VectorStore(store_columns(SHAPE, modules), 3, 10, dtype, torch.device("cpu"))


def test_columns_lie_as_vllm_packs_them():
    s = store()
    assert [widths_of([codes]) for codes in s.columns.layers] == [SHAPE.widths] * 2
    assert all((np.diff(codes) > 0).all() for codes in s.columns.layers)
    assert s.columns.ranges(("up_proj", "v_proj")) == (((12, 4), (32, 16)),) * 2


def test_fewer_modules_make_a_smaller_store():
    small = store(("up_proj", "v_proj"))
    assert small.columns.ranges(("v_proj",)) == (((0, 4),),) * 2
    assert small.columns.ranges(("up_proj",)) == (((4, 16),),) * 2
    assert small.nbytes == 2 * 4 * 20 * 4 < store().nbytes


def test_k_comes_along_where_q_and_v_are_scaled():
    assert store(("q_proj", "v_proj")).columns.widths() == [8 + 4 + 4] * 2


def test_all_rows_start_as_the_identity():
    s = store()
    assert all(not v.any() for v in s.vectors)
    assert bool((s.token_rows == IDENTITY_ROW).all())


def test_tokens_of_the_last_step_do_not_linger():
    s = store()
    s.load_plan(plan([0, 3], [2, 6]))
    assert s.token_rows.tolist() == [0, 0, 3, 3, 3, 3, 3, 3, 0, 0]
    s.load_plan(plan([2, 1], [1, 2]))
    assert s.token_rows.tolist() == [2, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    s.load_plan(plan([3, 0, 1]))
    assert s.token_rows.tolist() == [3, 0, 1, 0, 0, 0, 0, 0, 0, 0]
    s.load_plan(plan([0] * 9))
    assert s.token_rows.tolist() == [0] * 10


def test_the_operators_are_told_what_there_is_to_do():
    s = store()
    s.load_plan(plan([0, 2, 1], [1, 3, 2]), [(1, 3, 2, 0), (4, 2, 1, 1)], 5)
    assert s.counts.tolist() == [2, 2, 5]
    assert s.prefills.tolist() == [[1, 3, 2, 0], [4, 2, 1, 1], [0, 0, 0, 0]]
    s.load_plan(plan([0, 2, 0]))
    assert s.counts.tolist() == [0, 1, 0]
    s.load_plan(plan([0, 0]))
    assert s.counts.tolist() == [0, 0, 0]
    s.load_plan(plan([1]), [(0, 1, 1, 0)])
    s.load_dummy()
    assert s.counts.tolist() == [0, 0, 0]
    assert not s.token_rows.any()


def test_on_a_device_a_dummy_run_launches_what_a_captured_graph_needs():
    s = VectorStore(store_columns(SHAPE, ALL), 3, 10, torch.float32, torch.device("meta"))
    s.load_dummy()
    assert s.counts.tolist() == [0, 1, 0]
    s.load_plan(StepPlan())
    assert s.counts.tolist() == [0, 0, 0]


def test_addresses_stay_fixed():
    s = store()
    tensors = (s.token_rows, s.prefills, s.counts, *s.vectors)
    before = [t.data_ptr() for t in tensors]
    s.load_plan(plan([1], [4]), [(0, 4, 1, 0)])
    s.load_dummy()
    assert [t.data_ptr() for t in (s.token_rows, s.prefills, s.counts, *s.vectors)] == before


def test_a_step_that_is_too_long_is_a_defect():
    with pytest.raises(RuntimeError, match="11 tokens exceeds the 10"):
        store().load_plan(plan([1], [11]))
