"""The Triton kernels without a GPU: Triton's interpreter runs them on the CPU."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

ROOT = Path(__file__).resolve().parents[2]

# In a process of its own: the interpreter is chosen when Triton is imported. Where it differs from
# a GPU it is put right first, as for vLLM's V2 runner.
MENDED = """
import sitecustomize
sitecustomize.mend_interpreter()
sitecustomize.hurry_interpreter()
"""

INTERPRETED = """
from vllm_pedro.ops import samples, triton_kernels
print(samples.check(triton_kernels, widths=samples.WIDTHS[1:3]))
"""


def run(code, folder, **environment):
    path = [str(ROOT), str(ROOT / folder), os.environ.get("PYTHONPATH", "")]
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(path), **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return done.stdout


def interpret(code):
    return run(MENDED + code, "tests/support/v2_on_cpu", TRITON_INTERPRET="1")


def test_the_kernels_equal_the_reference_over_the_whole_table():
    assert int(interpret(INTERPRETED)) > 200


NOT_READ = """
import torch
from vllm_pedro.ops import samples, triton_kernels
s = samples.scale_sample("some rows", samples.WIDTHS[1], torch.bfloat16)
base = s.token_rows[: len(s.x)] == 0
s.x[base] = torch.nan
s.vectors[0] = 7.0
triton_kernels.scale_columns_(s.x, s.vectors, s.token_rows, s.ranges["all"], s.counts)
assert bool(s.x[base].isnan().all()) and bool(s.x[~base].isfinite().all())
print("ok")
"""


def test_rows_without_an_adapter_are_not_read():
    assert interpret(NOT_READ).strip() == "ok"


# Compiled for a GPU, and launched on none: the calls take Triton's own way to the kernels that they
# need, with tensors of the same dtypes, strides and alignment as serving's.
WARMED = """
import torch
from gpu_compile import compile_only
from vllm_pedro import ops
from vllm_pedro.ops import triton_kernels

ops._generate_vectors = triton_kernels.generate_vectors
for d, width, rank in ((576, 4032, 32), (4096, 18432, 8), (100, 130, 5)):
    for dtype in (torch.bfloat16, torch.float32):
        buffer = torch.empty(600, d, dtype=dtype)
        vectors = torch.empty(513, width, dtype=dtype)
        arena = torch.empty(1 << 20, dtype=torch.uint8)
        prompts = torch.empty(512, 4, dtype=torch.int32)
        with compile_only(90) as compiled:
            ops.warm_up(d, width, dtype, "cpu")
            names = [name for name, _ in compiled]
            assert names == ["_pool_kernel", "_latent_kernel", "_columns_kernel"], names
            for count in range(1, 513):
                hidden = buffer[: count + 40] if count % 2 else torch.empty(count, d, dtype=dtype)
                step = torch.tensor([count, count, count % (rank + 1)], dtype=torch.int32)
                layer = torch.tensor([count % 80], dtype=torch.int32)
                ops.generate_vectors(hidden, vectors, arena, prompts, layer, step)
            assert len(compiled) == 3, [name for name, _ in compiled]
print("ok")
"""


def test_after_the_warm_up_no_number_of_prompts_is_compiled_for():
    out = run(WARMED, "benchmarks", TRITON_INTERPRET="0", TRITON_DEFAULT_FP_FUSION="1")
    assert out.strip() == "ok"
