"""`benchmarks/gpu_compile.py`: GPU code compiles without a GPU, and what is wrong is reported."""

import importlib.util
import platform
import shutil

import gpu_compile
import pytest
from gpu_compile import Result, Use

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)

DUMP = """
Fatbin elf code:
================
arch = sm_80
Resource usage:
 Common:
  GLOBAL:28 CONSTANT[4]:224
 Function _ZN10vllm_pedro11pool_kernelI13__nv_bfloat16EEvPfPKT_PKfPKilNS_6LayoutE:
  REG:34 STACK:8 SHARED:32 LOCAL:4 CONSTANT[0]:424 TEXTURE:0 SURFACE:0 SAMPLER:0
arch = sm_90
 Function _ZN10vllm_pedro12scale_kernelIfLi4EEEvPT_PKS1_PKlllNS_6RangesE:
  REG:17 STACK:0 SHARED:0 LOCAL:0 CONSTANT[0]:464 TEXTURE:0 SURFACE:0 SAMPLER:0
"""


@needs_triton
def test_triton_kernels_compile_for_a_gpu(tmp_path, capsys):
    """Each kernel, for one dtype, model and GPU; the whole table takes minutes."""
    status = gpu_compile.main(["--only", "triton", "--quick", "--cache", str(tmp_path)])
    out = capsys.readouterr().out
    assert status == 0, out
    for name in gpu_compile.CONSTANTS:
        assert f"| `{name} (" in out
    assert "problem" not in out
    assert [path.name for path in tmp_path.iterdir()] == []


def test_the_library_builds_as_on_a_gpu_machine(capsys):
    """Through setup.py against the oldest torch with CUDA, warnings being errors."""
    if shutil.which("c++") is None or platform.machine() != "x86_64":
        pytest.skip("needs a C++ compiler on x86-64")
    status = gpu_compile.main(["--only", "native", "--torch", gpu_compile.TORCHES[0]])
    out = capsys.readouterr().out
    if "Triton is not installed" in out or "-m pip --quiet download" in out:
        pytest.skip(f"what it is built with cannot be had: {out.splitlines()[-1]}")
    assert status == 0, out
    assert "py3-none-linux_x86_64.whl" in out
    for name in ("scale_kernel<float16, 8>", "pool_kernel<bfloat16>", "latent_kernel"):
        assert f"| `{name}` " in out
    header = next(line for line in out.splitlines() if line.startswith("| kernel "))
    assert header.split()[3::2] == ["sm_75", "sm_80", "sm_90", "sm_100"]


def test_resource_usage_is_read(tmp_path):
    program = tmp_path / "cuobjdump"
    program.write_text(f"#!/bin/sh\ncat <<'END'{DUMP}END\n")
    program.chmod(0o755)
    uses = list(gpu_compile.resource_usage(str(program), tmp_path / "any"))
    assert [(use.arch, use.registers, use.local, use.shared) for use in uses] == [
        (80, 34, 12, 32),
        (90, 17, 0, 0),
    ]
    if shutil.which("c++filt"):
        names = gpu_compile.readable(use.kernel for use in uses)
        assert list(names.values()) == ["pool_kernel<bfloat16>", "scale_kernel<float32, 4>"]


def test_local_memory_is_a_problem():
    result = Result("torch 9", [Use("pool_kernel<float16>", 90, 32, 16, 0)])
    result.look_for_local_memory()
    assert result.problems == ["pool_kernel<float16>, sm_90: 16 bytes a thread in local memory"]


def test_the_report_has_a_line_for_each_kernel_and_says_what_is_wrong():
    uses = [Use("a", 80, 10, 0, 0), Use("a", 90, 12, 0, 64), Use("b", 90, 40, 8, 0)]
    text = gpu_compile.report(
        [
            Result("torch 1", uses, ["it broke"], ["a note"]),
            Result("torch 2", list(uses)),
            Result("torch 4", [uses[0], uses[1], Use("b", 90, 41, 0, 0)]),
            Result("torch 3", problems=["no wheel"]),
        ],
        "the command",
    )
    lines = [" ".join(line.split()) for line in text.splitlines()]
    assert "| `a` | 10 / 0 / 0 | 12 / 0 / 64 |" in lines
    assert "| `b` | - | 40 / 8 / 0 |" in lines
    assert "- **problem**: it broke" in text
    assert "- **problem**: no wheel" in text
    assert "3 entries, 1 with local memory; most registers: 40, `b` on sm_90" in text
    assert text.count("| `a`") == 1
    assert "2 of 2 lines are those of torch 1\n" in text
    assert "1 of 2 lines are those of torch 1, the others:" in text
    assert "| `b` | 41 / 0 / 0 |" in lines


@needs_triton
@pytest.mark.parametrize(
    ("found", "status"),
    [
        (Result("a", [Use("k", 80, 1, 0, 0)]), 0),
        (Result("a", [Use("k", 80, 1, 0, 0)], ["warning: x"]), 1),
        (Result("a"), 1),
    ],
)
def test_the_exit_status(found, status, tmp_path, monkeypatch):
    monkeypatch.setattr(gpu_compile, "with_triton", lambda *args, **kwargs: found)
    target = tmp_path / "table.md"
    arguments = ["--only", "triton", "--cache", str(tmp_path), "--table", str(target)]
    assert gpu_compile.main(arguments) == status
    text = target.read_text()
    assert "## a" in text
    assert str(tmp_path) not in text.splitlines()[2].replace(str(target), "")
