"""Build script: the package as pyproject.toml declares it, and its native operators if it can.

The operators are a plain shared library that torch loads, ``vllm_pedro/_C.so``: no Python ABI, and
of torch only its stable one. They need a C++ compiler and the headers of an installed torch, and
for their CUDA kernels nvcc and a CUDA build of torch. Where something is missing, or the compiler
fails, the package is installed without them, works on PyTorch alone, and says so
(``vllm-pedro inspect --backends``).

pip's isolated builds have no torch, and none is asked for: it would be downloaded for every build.
``pip install --no-build-isolation .`` builds the operators; ``run.py`` does that.

    VLLM_PEDRO_NATIVE=0         build without them
    VLLM_PEDRO_NATIVE=1         fail if they cannot be built
    VLLM_PEDRO_CUDA_ARCHS=80,90,100
"""

from __future__ import annotations

import importlib.util
import os
import re
import shutil
import subprocess
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

ROOT = Path(__file__).resolve().parent
CSRC = ROOT / "csrc"
ARCHITECTURES = "80,90,100"

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


class NotBuiltError(Exception):
    """The native operators cannot be built here, and why."""


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


def find_nvcc() -> str | None:
    """nvcc of CUDA_HOME or of the search path."""
    home = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
    return shutil.which("nvcc", path=f"{home}/bin") if home else shutil.which("nvcc")


def gencode(architectures: str) -> list[str]:
    """nvcc's options for these architectures, and PTX of the last for later ones."""
    names = [name.strip() for name in architectures.split(",") if name.strip()]
    flags = [f"-gencode=arch=compute_{n},code=sm_{n}" for n in names]
    return [*flags, f"-gencode=arch=compute_{names[-1]},code=compute_{names[-1]}"]


class BuildNative(build_ext):
    """Builds ``_C.so`` with the compilers alone; a failure leaves the package without it."""

    def get_ext_filename(self, fullname: str) -> str:
        return str(Path(*fullname.split("."))) + ".so"

    def build_extension(self, ext: Extension) -> None:
        wanted = os.environ.get("VLLM_PEDRO_NATIVE", "")
        target = Path(self.get_ext_fullpath(ext.name))
        target.unlink(missing_ok=True)
        if wanted == "0":
            return
        try:
            self.build_native(target)
        except NotBuiltError as reason:
            if wanted == "1":
                raise
            self.warn(f"the native operators are not built: {reason}")

    def copy_extensions_to_source(self) -> None:
        """For an editable installation; there may be nothing to copy."""
        for ext in self.extensions:
            built = Path(self.build_lib) / self.get_ext_filename(ext.name)
            kept = ROOT / self.get_ext_filename(ext.name)
            if built.is_file():
                # Not over the old file: a running engine has that one mapped and would crash.
                temporary = kept.with_suffix(".so.new")
                shutil.copyfile(built, temporary)
                os.replace(temporary, kept)
            else:
                kept.unlink(missing_ok=True)

    def get_outputs(self) -> list[str]:
        return [path for path in super().get_outputs() if Path(path).is_file()]

    def build_native(self, target: Path) -> None:
        torch = torch_folder()
        cxx = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
        if not cxx:
            raise NotBuiltError("no C++ compiler was found (c++, g++ or CXX)")
        work = Path(self.build_temp)
        work.mkdir(parents=True, exist_ok=True)
        target.parent.mkdir(parents=True, exist_ok=True)
        include = ["-isystem", str(torch / "include")]
        objects: list[str] = []
        jobs: list[tuple[list[str], subprocess.Popen[str]]] = []

        def compile_one(command: list[str], source: Path) -> None:
            objects.append(str(work / f"{source.stem}{source.suffix}.o"))
            full = [*command, "-c", str(source), "-o", objects[-1]]
            self.announce(" ".join(full), level=2)
            jobs.append(
                (
                    full,
                    subprocess.Popen(
                        full, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
                    ),
                )
            )

        try:
            for source in sorted(CSRC.glob("*.cpp")):
                compile_one([cxx, *CXX_FLAGS, *DEFINES, *include], source)
            link = ["-ltorch_cpu", "-lc10", "-ltorch"]
            cuda, nvcc = torch_cuda(torch), find_nvcc()
            if cuda and nvcc:
                archs = os.environ.get("VLLM_PEDRO_CUDA_ARCHS", ARCHITECTURES)
                for source in sorted((CSRC / "cuda").glob("*.cu")):
                    command = [nvcc, *NVCC_FLAGS, *DEFINES, *include, *gencode(archs)]
                    compile_one(command, source)
                link += [
                    "-ltorch_cuda",
                    f"-L{Path(nvcc).resolve().parent.parent}/lib64",
                    "-lcudart",
                ]
            elif cuda:
                self.warn(
                    f"torch is built for CUDA {cuda}, but no nvcc was found: CPU kernels only"
                )
        except OSError as error:
            raise NotBuiltError(f"cannot start a compiler: {error}") from error
        finally:
            failed = [(c, output) for c, job in jobs if (output := self.finish(job)) is not None]
        if failed:
            command, output = failed[0]
            raise NotBuiltError(f"{' '.join(command)}:\n{output[-3000:]}")
        command = [cxx, "-shared", *objects, "-o", str(target), f"-L{torch / 'lib'}", *link]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise NotBuiltError(f"{' '.join(command)}:\n{done.stderr[-3000:]}")

    @staticmethod
    def finish(job: subprocess.Popen[str]) -> str | None:
        """A compiler's output, if it failed."""
        output, _ = job.communicate()
        return output if job.returncode else None


if __name__ == "__main__":
    setup(
        # `sources` is for setuptools' own bookkeeping; BuildNative takes what lies in csrc.
        ext_modules=[Extension("vllm_pedro._C", sources=[])],
        cmdclass={"build_ext": BuildNative},
    )
