"""The native sources compile without a warning wherever a compiler is found."""

import importlib.util
import shutil
import subprocess
from pathlib import Path

import pytest

from vllm_pedro.ops import library

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def build():
    """The build script, for its flags and its search for compilers."""
    spec = importlib.util.spec_from_file_location("build_script", ROOT / "setup.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def compiles(command, target):
    done = subprocess.run(
        [*command, "-o", str(target)], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    assert done.stderr.strip() == ""
    assert target.stat().st_size > 10_000


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")
def test_the_cpu_sources_compile_without_warnings(build, tmp_path):
    include = ["-isystem", str(build.torch_folder() / "include")]
    for source in build.CSRC.glob("*.cpp"):
        command = ["c++", *build.CXX_FLAGS, *build.DEFINES, "-Werror", *include]
        compiles([*command, "-c", str(source)], tmp_path / f"{source.stem}.o")


def test_the_cuda_sources_compile_without_warnings(build, tmp_path):
    nvcc = build.find_nvcc()
    if nvcc is None:
        pytest.skip("no nvcc is installed")
    include = ["-isystem", str(build.torch_folder() / "include")]
    strict = ["-Werror=all-warnings", "-Xcompiler=-Werror"]
    for source in (build.CSRC / "cuda").glob("*.cu"):
        command = [nvcc, *build.NVCC_FLAGS, *build.DEFINES, *strict, *include]
        archs = build.gencode("80,90,100")
        compiles([*command, *archs, "-c", str(source)], tmp_path / f"{source.stem}.o")


def test_schemas_and_versions_are_those_of_the_sources(build):
    """Without the library Python defines the schemas, so both have to say the same."""
    text = " ".join((build.CSRC / "ops.cpp").read_text().replace('"\n      "', "").split())
    for name, schema in library.SCHEMAS.items():
        assert f'"{name}{schema}"' in text, name
    assert f"interface_version() {{ return {library.INTERFACE_VERSION}; }}" in text


def test_the_layout_is_that_of_the_header(build):
    from vllm_pedro.ops import layout

    text = (build.CSRC / "layout.h").read_text()
    for name, value in (
        ("kHeader", layout.HEADER),
        ("kNumerator", layout.NUMERATOR),
        ("kDenominator", layout.DENOMINATOR),
    ):
        assert f"{name} = {value};" in text
    for enum, names in (("Activation", layout.ACTIVATIONS), ("Pooling", layout.POOLINGS)):
        values = ", ".join(f"k{n.capitalize()} = {i}" for i, n in enumerate(names))
        assert f"enum {enum} {{ {values} }};" in text


@pytest.mark.parametrize("rank", [1, 2, 7, 32])
@pytest.mark.parametrize(("hidden", "width"), [(3, 2), (576, 4032), (1, 4), (4096, 30720)])
def test_the_rank_follows_from_the_row_s_size(hidden, width, rank):
    import torch

    made = library.reference.GeneratorLayout(hidden, width, rank)
    row = torch.empty(1, made.row, device="meta")
    assert library.reference.GeneratorLayout.of(row, hidden, width) == made


def test_a_build_without_a_compiler_says_so(build, tmp_path, monkeypatch):
    from setuptools import Distribution, Extension

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("CXX", "/nothing/here")
    monkeypatch.delenv("VLLM_PEDRO_NATIVE", raising=False)
    distribution = Distribution({"ext_modules": [Extension("vllm_pedro._C", sources=[])]})
    command = build.BuildNative(distribution)
    command.build_lib = command.build_temp = str(tmp_path)
    command.ensure_finalized()
    said = []
    monkeypatch.setattr(command, "warn", said.append)
    command.run()
    command.compiler = None  # `run` replaces the name by an object
    assert "the native operators are not built: cannot start a compiler" in said[0]
    assert command.get_outputs() == []
    monkeypatch.setenv("VLLM_PEDRO_NATIVE", "1")
    with pytest.raises(build.NotBuiltError, match="cannot start a compiler"):
        command.run()
