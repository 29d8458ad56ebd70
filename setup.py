"""Build script: the package as pyproject.toml declares it, and its native operators if it can.

The operators are a plain shared library that torch loads, `vllm_pedro/_C.so`: no Python ABI, and
of torch only its stable one. They need a C++ compiler and the headers of an installed torch, and
for their CUDA kernels a CUDA build of torch and an nvcc of the same major version: of CUDA_HOME or
CUDA_PATH, of PATH, of /usr/local/cuda, or of NVIDIA's wheels beside torch (the extra `nvcc`).

Where something is missing, or a compiler fails, the package is installed without the kernels that
need it, and works. The reason is kept beside the library, in `_C.note`, for `vllm-pedro inspect
--backends`.

pip's isolated builds have no torch, and none is asked for: it would be downloaded for every build.
`pip install --no-build-isolation .` builds the operators; `run.py` does that.

    VLLM_PEDRO_NATIVE=0         build without them
    VLLM_PEDRO_NATIVE=1         fail if they cannot be built; beside a CUDA torch, with CUDA kernels
    VLLM_PEDRO_CUDA_ARCHS=75,80,90,100
    CXX, CXXFLAGS, NVCC_PREPEND_FLAGS
"""

from __future__ import annotations

import importlib.util
import os
import re
import shlex
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from setuptools import Extension, setup
from setuptools.command.bdist_wheel import bdist_wheel
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ARCHITECTURES = "75,80,90,100"
"""From the oldest GPUs that CUDA 13 knows; the last one as PTX too, for later ones."""

# Which of torch's stable interfaces is used: 2.11's.
DEFINES = ["-DTORCH_TARGET_VERSION=0x020b000000000000ull"]
CXX_FLAGS = [
    "-std=c++20",
    "-O3",
    "-fPIC",
    "-Wall",
    "-Wextra",
    # The kernels set no errno and trap nothing; without these, loops with branches stay scalar.
    "-fno-math-errno",
    "-fno-trapping-math",
]
NVCC_FLAGS = ["-std=c++20", "-O3", "-Xcompiler=-fPIC,-Wall,-Wextra", "-DUSE_CUDA"]
# A symbol that torch's libraries do not have fails the build, and not each user's first import.
LINK_FLAGS = ["-shared", "-Wl,--no-undefined"]


class NotBuiltError(Exception):
    """The native operators, or their CUDA kernels, cannot be built here, and why."""


def torch_folder() -> Path:
    """Where torch is installed, without importing it."""
    spec = importlib.util.find_spec("torch")
    if spec is None or not spec.origin:
        raise NotBuiltError("torch is not installed where the build runs (--no-build-isolation)")
    folder = Path(spec.origin).parent
    if not (folder / "include" / "torch" / "csrc" / "stable" / "ops.h").is_file():
        raise NotBuiltError(f"{folder} has no headers of torch's stable interface")
    return folder


def torch_cuda(torch: Path) -> str | None:
    """The CUDA version that torch was built for; None for a CPU build."""
    text = (torch / "version.py").read_text(encoding="utf-8")
    match = re.search(r"^cuda\b[^=]*=\s*'([\d.]+)'", text, re.MULTILINE)
    return match[1] if match else None


class Cuda(NamedTuple):
    """What CUDA kernels are built with.

    Attributes:
        nvcc: The compiler.
        runtime: libcudart, to link with.
    """

    nvcc: str
    runtime: Path


def find_cuda(torch: Path) -> Cuda:
    """The CUDA compiler and runtime that fit an installed torch.

    Raises:
        NotBuiltError: There are none.
    """
    wanted = torch_cuda(torch)
    if wanted is None:
        raise NotBuiltError("it was built beside a torch without CUDA")
    major = wanted.split(".")[0]
    others = []
    for nvcc in nvcc_candidates(torch, major):
        found = nvcc_version(nvcc)
        if found is None:
            continue
        if found.split(".")[0] == major:
            return Cuda(nvcc, find_runtime(torch, nvcc, major))
        others.append(f"{nvcc} of CUDA {found}")
    if others:
        raise NotBuiltError(f"torch is built for CUDA {wanted}, and nvcc was {', '.join(others)}")
    raise NotBuiltError("no nvcc was found when it was built")


def nvcc_candidates(torch: Path, major: str) -> Iterator[str]:
    """Where an nvcc may lie, the user's choice first; each existing file once."""
    folders = [Path(home) / "bin" for home in cuda_homes()]
    folders += [Path(folder) for folder in os.environ.get("PATH", os.defpath).split(os.pathsep)]
    folders += [Path("/usr/local/cuda/bin"), wheels_home(torch, major) / "bin"]
    found = (shutil.which("nvcc", path=str(folder)) for folder in folders)
    yield from dict.fromkeys(path for path in found if path)


def cuda_homes() -> list[str]:
    return [home for name in ("CUDA_HOME", "CUDA_PATH") if (home := os.environ.get(name))]


def wheels_home(torch: Path, major: str) -> Path:
    """Where NVIDIA's wheels install themselves, from CUDA 13 on."""
    return torch.parent / "nvidia" / f"cu{major}"


def nvcc_version(nvcc: str) -> str | None:
    """Such as 13.0; None where the program does not run."""
    try:
        done = subprocess.run([nvcc, "--version"], capture_output=True, text=True, check=False)
    except OSError:
        return None
    match = re.search(r"release (\d+\.\d+)", done.stdout)
    return match[1] if match else None


def find_runtime(torch: Path, nvcc: str, major: str) -> Path:
    """libcudart: the one that torch itself will have loaded, else that of the compiler.

    Raises:
        NotBuiltError: There is none. NVIDIA's wheels have it without the name that -lcudart needs.
    """
    homes = [wheels_home(torch, major), torch.parent / "nvidia" / "cuda_runtime"]
    homes += [Path(nvcc).resolve().parent.parent, *map(Path, cuda_homes()), Path("/usr/local/cuda")]
    for home in homes:
        for folder in ("lib64", "lib"):
            for name in (f"libcudart.so.{major}", "libcudart.so"):
                path = home / folder / name
                if path.is_file() and f".so.{major}" in path.resolve().name:
                    return path
    raise NotBuiltError(f"no libcudart.so.{major} was found beside {nvcc}")


def gencode(architectures: str) -> list[str]:
    """nvcc's options for these architectures, and PTX of the last for later ones."""
    names = [name.strip() for name in architectures.split(",") if name.strip()]
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


class Job:
    """A compiler at work on one source."""

    def __init__(self, command: list[str], source: Path, folder: Path) -> None:
        self.object = folder / f"{source.name}.o"
        self.command = [*command, "-c", str(source), "-o", str(self.object)]
        self.process = subprocess.Popen(
            self.command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )

    def failure(self) -> str:
        """Wait for the end. What went wrong, or nothing."""
        output, _ = self.process.communicate()
        return f"{shlex.join(self.command)}:\n{output[-3000:]}" if self.process.returncode else ""


def first_error(text: str) -> str:
    """The line of a compiler's output that says most."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return next((line for line in lines[1:] if "error" in line), lines[-1])[:300]


class BuildNative(build_ext):
    """Builds `_C.so` with the compilers alone; a failure leaves the package without it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        target = Path(self.get_ext_fullpath(ext.name))
        note = target.with_suffix(".note")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.unlink(missing_ok=True)
        note.unlink(missing_ok=True)
        text = self.build_or_say_why(target)
        if text:
            self.warn(f"native operators {text}")
            note.write_text(f"{' '.join(text.split())}\n", encoding="utf-8")

    def build_or_say_why(self, target: Path) -> str:
        """What could not be built, and why; empty where all was."""
        wanted = os.environ.get("VLLM_PEDRO_NATIVE", "")
        if wanted == "0":
            return "not built: VLLM_PEDRO_NATIVE was 0"
        try:
            without_cuda = self.build_native(target, all_or_nothing=wanted == "1")
        except NotBuiltError as reason:
            if wanted == "1":
                raise
            self.announce(str(reason), level=2)
            return f"not built: {first_error(str(reason))}"
        return f"without CUDA kernels: {without_cuda}" if without_cuda else ""

    def copy_extensions_to_source(self) -> None:
        """For an editable installation; there may be nothing to copy."""
        for ext in self.extensions:
            library = Path(self.get_ext_filename(ext.name))
            for name in (library, library.with_suffix(".note")):
                built, kept = Path(self.build_lib) / name, ROOT / name
                if built.is_file():
                    # Not over the old file: a running engine has that one mapped and would crash.
                    temporary = kept.with_name(f"{kept.name}.new")
                    shutil.copyfile(built, temporary)
                    os.replace(temporary, kept)
                else:
                    kept.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        libraries = [Path(path) for path in super().get_outputs()]
        files = [file for path in libraries for file in (path, path.with_suffix(".note"))]
        return [str(file) for file in files if file.is_file()]

    def build_native(self, target: Path, all_or_nothing: bool) -> str:
        """Compile and link the library.

        Args:
            target: The file to write.
            all_or_nothing: Whether CUDA kernels that a CUDA torch could use must not be missing.

        Returns:
            Why it has no CUDA kernels; empty where it has them.

        Raises:
            NotBuiltError: A compiler is missing or failed.
        """
        torch = torch_folder()
        cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if not cxx:
            raise NotBuiltError("no C++ compiler was found (c++, g++ or CXX)")
        cuda, without = None, ""
        try:
            cuda = find_cuda(torch)
        except NotBuiltError as reason:
            without = str(reason)
        work = Path(self.build_temp)
        work.mkdir(parents=True, exist_ok=True)
        include = ["-isystem", str(torch / "include")]
        flags = [*shlex.split(os.environ.get("CXXFLAGS", "")), *CXX_FLAGS, *DEFINES, *include]
        jobs: list[Job] = []
        cuda_jobs: list[Job] = []
        try:
            for source in sorted(CSRC.glob("*.cpp")):
                jobs.append(Job([cxx, *flags], source, work))
            for source in sorted((CSRC / "cuda").glob("*.cu")) if cuda else ():
                archs = gencode(os.environ.get("VLLM_PEDRO_CUDA_ARCHS") or ARCHITECTURES)
                command = [cuda.nvcc, "-ccbin", cxx, *NVCC_FLAGS, *DEFINES, *include, *archs]
                cuda_jobs.append(Job(command, source, work))
        except OSError as error:
            raise NotBuiltError(f"cannot start a compiler: {error}") from error
        finally:
            failures = [failure for job in jobs if (failure := job.failure())]
            cuda_failures = [failure for job in cuda_jobs if (failure := job.failure())]
        if cuda_failures:
            self.announce(cuda_failures[0], level=2)
            cuda, without = None, f"nvcc failed: {first_error(cuda_failures[0])}"
            if all_or_nothing:
                failures += cuda_failures
        if failures:
            raise NotBuiltError(failures[0])
        if all_or_nothing and without and torch_cuda(torch):
            raise NotBuiltError(without)
        objects = [str(job.object) for job in (*jobs, *(cuda_jobs if cuda else ()))]
        libraries = ["-ltorch_cpu", "-lc10", "-ltorch"]
        if cuda:
            libraries += ["-ltorch_cuda", str(cuda.runtime)]
        command = [cxx, *LINK_FLAGS, *objects, "-o", str(target), f"-L{torch / 'lib'}", *libraries]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotBuiltError(f"{shlex.join(command)}:\n{done.stderr[-3000:]}")
        return without


class PlatformWheel(bdist_wheel):
    """Tags the wheel as what it is: for any Python 3; for one platform if it has the library."""

    def get_tag(self) -> tuple[str, str, str]:
        platform = super().get_tag()[2]
        library = self.get_finalized_command("build_ext").get_outputs()
        native = any(path.endswith(".so") for path in library)
        return "py3", "none", platform if native else "any"


if __name__ == "__main__":
    setup(
        # `sources` is for setuptools' own bookkeeping; BuildNative takes what lies in csrc.
        ext_modules=[Extension("vllm_pedro._C", sources=[])],
        cmdclass={"build_ext": BuildNative, "bdist_wheel": PlatformWheel},
    )
