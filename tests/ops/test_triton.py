"""The Triton kernels without a GPU: Triton's interpreter runs them on the CPU."""

import importlib.util
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

# In a process of its own: the interpreter is chosen when Triton is imported. It cuts float32 off to
# bfloat16, where a GPU rounds to the nearest, so that conversion is put right first.
ROUND = """
import torch
from triton.runtime import interpreter
import triton.language as tl
original = interpreter._convert_float
def convert(data, source, target, mode):
    if source == tl.float32 and target == tl.bfloat16:
        rounded = torch.from_numpy(data.copy()).to(torch.bfloat16).view(torch.int16)
        return rounded.numpy().view("uint16")
    return original(data, source, target, mode)
interpreter._convert_float = convert
"""

INTERPRETED = """
from vllm_pedro.ops import samples, triton_kernels
print(samples.check(triton_kernels, widths=samples.WIDTHS[1:3]))
"""


def run(code):
    done = subprocess.run(
        [sys.executable, "-c", ROUND + code],
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def test_the_kernels_equal_the_reference_over_the_whole_table():
    assert int(run(INTERPRETED)) > 500


NOT_READ = """
import torch
from vllm_pedro.ops import samples, triton_kernels
s = samples.scale_sample("some rows", samples.WIDTHS[1], torch.bfloat16)
base = s.token_slots[: len(s.qkv)] == 0
s.qkv[base] = torch.nan
s.vectors[0] = 7.0
triton_kernels.scale_qkv_(s.qkv, s.vectors, s.token_slots, s.ranges["all"], s.step)
assert bool(s.qkv[base].isnan().all()) and bool(s.qkv[~base].isfinite().all())
print("ok")
"""


def test_rows_without_an_adapter_are_not_read():
    assert run(NOT_READ).strip() == "ok"
