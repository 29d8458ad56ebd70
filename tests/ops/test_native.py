"""The native sources compile without a warning wherever a compiler is found; the build script."""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
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
    torch = build.torch_folder()
    nvcc = next(build.nvcc_candidates(torch, "13"), None)
    if nvcc is None:
        pytest.skip("no nvcc is installed (tests/ops/test_gpu_compile.py fetches one)")
    include = ["-isystem", str(torch / "include")]
    strict = ["-Werror=all-warnings", "-Xcompiler=-Werror"]
    for source in (build.CSRC / "cuda").glob("*.cu"):
        command = [nvcc, *build.NVCC_FLAGS, *build.DEFINES, *strict, *include]
        archs = build.gencode(build.ARCHITECTURES)
        compiles([*command, *archs, "-c", str(source)], tmp_path / f"{source.stem}.o")


def test_schemas_and_versions_are_those_of_the_sources(build):
    """Without the library Python defines the schemas, so both have to say the same."""
    text = " ".join((build.CSRC / "ops.cpp").read_text().replace('"\n      "', "").split())
    for name, schema in library.SCHEMAS.items():
        assert f'"{name}{schema}"' in text, name
    assert f"interface_version() {{ return {library.INTERFACE_VERSION}; }}" in text


def test_the_layout_is_that_of_the_header(build):
    from vllm_pedro import config
    from vllm_pedro.ops import layout

    assert sorted(layout.ACTIVATION_CODES) == sorted(config.ACTIVATIONS)
    text = (build.CSRC / "layout.h").read_text()
    known = {}
    for name, value in re.findall(r"constexpr int\d\d_t (\w+) = (.*);", text):
        known[name] = eval(value, {}, known)
    assert known == {
        "kUnit": layout.UNIT,
        "kMagic": layout.MAGIC,
        "kMaxRanges": layout.MAX_RANGES,
        "kMaxOrder": config.MAX_RATIONAL_DEGREE,
        "kBlobWords": layout.BLOB_WORDS,
        "kRecordWords": layout.RECORD_WORDS,
        "kRangesAt": layout.RANGES_AT,
        "kNumeratorAt": layout.NUMERATOR_AT,
        "kDenominatorAt": layout.DENOMINATOR_AT,
        "kWeightsAt": layout.WEIGHTS_AT,
    }
    enums = {
        name: re.findall(r"k(\w+) = (\d+)", values)
        for name, values in re.findall(r"enum (\w+) \{(.*?)\};", text, re.DOTALL)
    }
    for enum, prefix, names in (
        ("BlobField", "Blob", layout.BLOB_FIELDS),
        ("RecordField", "", layout.RECORD_FIELDS),
        ("Dtype", "", layout.DTYPES),
        ("Activation", "", layout.ACTIVATION_CODES),
        ("Pooling", "", config.POOLINGS),
    ):
        want = [(prefix + n.title().replace("_", ""), f"{i}") for i, n in enumerate(names)]
        assert enums[enum] == want


# The build script --------------------------------------------------------------------------------


@pytest.fixture
def command(build, tmp_path, monkeypatch):
    """The build in a folder of its own; what it warns of is in `said`."""
    from setuptools import Distribution, Extension

    monkeypatch.chdir(tmp_path)
    for name in ("CUDA_HOME", "CUDA_PATH", "CXXFLAGS", "VLLM_PEDRO_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    distribution = Distribution({"ext_modules": [Extension("vllm_pedro._C", sources=[])]})
    result = build.BuildNative(distribution)
    result.build_lib = result.build_temp = str(tmp_path)
    result.ensure_finalized()
    result.said = []
    monkeypatch.setattr(result, "warn", result.said.append)

    def again():
        result.compiler = None  # `run` replaces the name by an object
        result.said.clear()
        result.run()

    result.again = again
    return result


def note(command):
    return (Path(command.build_lib) / "vllm_pedro" / "_C.note").read_text()


def test_a_build_without_a_compiler_says_so(build, command, monkeypatch):
    monkeypatch.setenv("CXX", "/nothing/here")
    command.again()
    assert "native operators not built: cannot start a compiler" in command.said[0]
    assert note(command).startswith("not built: cannot start a compiler")
    assert [Path(path).name for path in command.get_outputs()] == ["_C.note"]
    monkeypatch.setenv("VLLM_PEDRO_NATIVE", "1")
    with pytest.raises(build.NotBuiltError, match="cannot start a compiler"):
        command.again()


def program(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)
    return str(path)


def fake_nvcc(home, version, otherwise="exit 1"):
    release = f"echo 'Cuda compilation tools, release {version}, V{version}.88'"
    return program(
        home / "bin" / "nvcc", f'if [ "$1" = --version ]; then {release}; else {otherwise}; fi'
    )


@pytest.fixture
def cuda_torch(tmp_path, monkeypatch, build):
    """A torch for CUDA 13.0 by its version file, with the installed one's headers and libraries."""
    folder = tmp_path / "site-packages" / "torch"
    folder.mkdir(parents=True)
    (folder / "version.py").write_text("cuda: Optional[str] = '13.0'\nhip = None\n")
    for name in ("include", "lib"):
        (folder / name).symlink_to(build.torch_folder() / name)
    monkeypatch.setattr(build, "torch_folder", lambda: folder)
    real = build.nvcc_candidates
    outside = ("/usr", "/opt")  # what this machine has does not count
    monkeypatch.setattr(
        build, "nvcc_candidates", lambda *a: (p for p in real(*a) if not p.startswith(outside))
    )
    monkeypatch.delenv("CUDA_HOME", raising=False)
    monkeypatch.delenv("CUDA_PATH", raising=False)
    return folder


def wheels(torch):
    """NVIDIA's wheels beside torch, as far as the build looks."""
    home = torch.parent / "nvidia" / "cu13"
    fake_nvcc(home, "13.0")
    (home / "lib").mkdir()
    (home / "lib" / "libcudart.so.13").touch()
    return home


def test_nvcc_is_found_in_the_wheels_beside_torch(build, cuda_torch):
    home = wheels(cuda_torch)
    found = build.find_cuda(cuda_torch)
    assert found == build.Cuda(str(home / "bin" / "nvcc"), home / "lib" / "libcudart.so.13")
    (home / "lib" / "libcudart.so.13").unlink()
    if not list(Path("/usr/local").glob("cuda/lib*/libcudart.so*")):
        with pytest.raises(build.NotBuiltError, match=r"no libcudart.so.13 was found beside"):
            build.find_cuda(cuda_torch)


def test_the_users_nvcc_comes_first_if_its_version_is_right(
    build, cuda_torch, tmp_path, monkeypatch
):
    home = wheels(cuda_torch)
    own = tmp_path / "toolkit"
    nvcc = fake_nvcc(own, "13.1")
    (own / "lib64").mkdir()
    (own / "lib64" / "libcudart.so.13.1.5").touch()
    (own / "lib64" / "libcudart.so").symlink_to("libcudart.so.13.1.5")
    monkeypatch.setenv("CUDA_HOME", str(own))
    # The runtime is the one that torch brings: it is the one that will be loaded.
    assert build.find_cuda(cuda_torch).nvcc == nvcc
    assert build.find_cuda(cuda_torch).runtime.parent == home / "lib"
    (home / "lib" / "libcudart.so.13").unlink()
    assert build.find_cuda(cuda_torch).runtime == own / "lib64" / "libcudart.so"
    fake_nvcc(own, "12.9")
    (home / "lib" / "libcudart.so.13").touch()
    assert build.find_cuda(cuda_torch).nvcc == str(home / "bin" / "nvcc")


def test_an_nvcc_of_another_cuda_is_not_used(build, cuda_torch, tmp_path, monkeypatch):
    with pytest.raises(build.NotBuiltError, match="no nvcc was found when it was built"):
        build.find_cuda(cuda_torch)
    old = fake_nvcc(tmp_path / "old", "12.4")
    program(tmp_path / "broken" / "nvcc", "exit 127")
    monkeypatch.setenv("PATH", f"{tmp_path}/broken:{tmp_path}/old/bin:{os.environ['PATH']}")
    with pytest.raises(build.NotBuiltError) as caught:
        build.find_cuda(cuda_torch)
    assert str(caught.value) == f"torch is built for CUDA 13.0, and nvcc was {old} of CUDA 12.4"


def test_a_torch_without_cuda_needs_no_nvcc(build, tmp_path):
    (tmp_path / "version.py").write_text("cuda: Optional[str] = None\n")
    with pytest.raises(build.NotBuiltError, match="beside a torch without CUDA"):
        build.find_cuda(tmp_path)


@pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")
def test_without_cuda_kernels_the_others_are_built_and_the_reason_kept(
    build, command, cuda_torch, tmp_path, monkeypatch
):
    """Through to what `inspect --backends` shows."""
    sources = tmp_path / "csrc"
    (sources / "cuda").mkdir(parents=True)
    (sources / "ops.cpp").write_text("int one() { return 1; }\n")
    (sources / "cuda" / "ops.cu").touch()
    monkeypatch.setattr(build, "CSRC", sources)
    command.again()
    assert note(command) == "without CUDA kernels: no nvcc was found when it was built\n"
    assert [Path(p).name for p in command.get_outputs()] == ["_C.so", "_C.note"]
    fake_nvcc(wheels(cuda_torch), "13.0", "echo 'ops.cu(3): error: no such thing' >&2; exit 2")
    command.again()
    assert "without CUDA kernels: nvcc failed: ops.cu(3): error: no such thing" in command.said[0]
    assert note(command).strip() in command.said[0]

    import torch

    monkeypatch.setattr(library, "NATIVE_LIBRARY", Path(command.build_lib) / "vllm_pedro/_C.so")
    assert library._build_note() == note(command).strip()
    monkeypatch.setattr(library, "_load_native", lambda: "")
    monkeypatch.setattr(library, "_native_has_cuda", lambda: False)
    monkeypatch.setattr(library, "_has", lambda name, key: True)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    if library.backends.cpu.startswith("native"):
        said = library._register().note
        assert said.startswith("without CUDA kernels: nvcc failed: ops.cu(3): error")
        assert said.endswith(" is used")
        monkeypatch.setattr(torch.version, "cuda", None)
        assert library._register().note == ""

    monkeypatch.setenv("VLLM_PEDRO_NATIVE", "1")
    with pytest.raises(build.NotBuiltError, match="no such thing"):
        command.again()


def test_wheels_are_for_any_python_and_for_the_platform_of_the_library(build, monkeypatch):
    from setuptools import Distribution, Extension

    distribution = Distribution(
        {"name": "x", "ext_modules": [Extension("vllm_pedro._C", sources=[])]}
    )
    distribution.cmdclass = {"build_ext": build.BuildNative}
    wheel = build.PlatformWheel(distribution)
    wheel.ensure_finalized()
    outputs = ["build/vllm_pedro/_C.so"]
    monkeypatch.setattr(build.BuildNative, "get_outputs", lambda self: outputs)
    python, abi, platform = wheel.get_tag()
    assert (python, abi) == ("py3", "none")
    assert platform.startswith("linux_")
    outputs[:] = ["build/vllm_pedro/_C.note"]
    assert wheel.get_tag() == ("py3", "none", "any")


def test_a_wheel_without_the_library_says_why(tmp_path):
    for name in ("setup.py", "pyproject.toml", "LICENSE"):
        shutil.copy(ROOT / name, tmp_path)
    (tmp_path / "vllm_pedro").mkdir()
    (tmp_path / "vllm_pedro" / "__init__.py").touch()
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pip",
            "wheel",
            "--no-build-isolation",
            "--no-deps",
            "-w",
            "out",
            ".",
        ],
        cwd=tmp_path,
        env={**os.environ, "VLLM_PEDRO_NATIVE": "0"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (wheel,) = (tmp_path / "out").iterdir()
    assert wheel.name.endswith("-py3-none-any.whl")
    with zipfile.ZipFile(wheel) as archive:
        text = archive.read("vllm_pedro/_C.note").decode()
    assert text == "not built: VLLM_PEDRO_NATIVE was 0\n"


def test_the_extra_brings_the_nvcc_of_torchs_cuda():
    extras = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    versions = {line.partition("==")[2] for line in extras["nvcc"]}
    assert versions == {"13.0.*"}
    assert any(line.startswith("nvidia-cuda-nvcc==") for line in extras["nvcc"])
