"""The table of benchmarks/bench_ops.py from known timings, and the bytes it counts."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest
import torch

ROOT = Path(__file__).resolve().parent.parent.parent


@pytest.fixture(scope="module")
def bench_ops() -> ModuleType:
    spec = importlib.util.spec_from_file_location("bench_ops", ROOT / "benchmarks" / "bench_ops.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["bench_ops"] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def entry(kind: str, median: float, moved: int) -> dict[str, object]:
    info = {"operator": "op", "shape": "135M", "batch": 64, "share": 50}
    return {
        "stats": {"median": median, "q1": median / 2, "q3": 2 * median},
        "extra_info": {**info, "kind": kind, "bytes": moved},
    }


def test_known_timings_give_known_ratios(bench_ops: ModuleType) -> None:
    timed = (("ours", 2e-5, 40_000), ("reference", 6e-5, 40_000), ("LoRA", 1e-4, 80_000))
    report = {"benchmarks": [entry(*values) for values in timed]}
    ours, reference, lora = bench_ops.rows_of(report)
    assert ours[4:] == ("ours", "20.0 (10.0-40.0)", "2.00", "", "3.00", "5.00")
    assert reference[6:] == ("0.67", "", "", "1.67")
    assert lora[6:] == ("0.80", "", "0.60", "")


@pytest.mark.parametrize("share", [0, 50, 100])
@pytest.mark.parametrize("batch", [1, 8, 64])
def test_the_share_of_rows_is_as_asked(bench_ops: ModuleType, batch: int, share: int) -> None:
    setting = bench_ops.Setting("135M", batch, share, torch.bfloat16)
    slots = setting.token_rows()
    assert int((slots > 0).sum()) == batch * share // 100
    assert slots.max() <= batch
    _, _, index = setting.lora(8, 8)
    assert ((index >= 0) == (slots > 0)).all()


def test_every_operator_can_be_timed_somehow(bench_ops: ModuleType) -> None:
    setting = bench_ops.Setting("135M", 8, 100, torch.float32)
    for name, make in bench_ops.OPERATORS.items():
        works = {kind: make(setting, kind) for kind in bench_ops.KINDS}
        ran = [kind for kind, work in works.items() if work is not None]
        for kind in ran:
            works[kind].run()
            assert works[kind].bytes > 0
        if name in ("copy", "scaled", "scale_columns_"):
            assert ran, name
