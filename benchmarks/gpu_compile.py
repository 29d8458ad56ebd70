"""Compile all GPU code without a GPU, as a user's machine would, and list what each kernel takes.

1. native: the package is built into a wheel through setup.py, against the CUDA builds of torch that
   it serves, with the compiler of NVIDIA's wheels; warnings in our sources are errors, and so are
   symbols that torch's libraries do not have;
2. Triton: the operators are called as serving calls them, for each GPU architecture, dtype and
   several models' sizes, and each kernel is compiled where a GPU would be launched on.

    python benchmarks/gpu_compile.py                          # both
    python benchmarks/gpu_compile.py --only triton --quick    # a few kernels, for tests
    python benchmarks/gpu_compile.py --triton 3.6.0 --triton 3.7.1 --table build/gpu_compile.md

Needs Linux on x86-64, gcc, and pip that reaches its index for torch, NVIDIA's compiler (1.2 GB of
wheels, kept in build/gpu_compile) and for other versions of Triton than the installed one.

Exit status 1: something did not compile, had a warning, or keeps values in local memory.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import importlib.util
import itertools
import json
import os
import platform
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Iterable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from vllm_pedro.bench import tables

ROOT = Path(__file__).resolve().parent.parent
CACHE = ROOT / "build" / "gpu_compile"
TORCHES = ("2.11.0", "2.13.0")
ARCHITECTURES = (80, 90, 100)
MODELS = ("SmolLM2-135M", "Llama-3-8B", "Llama-3-70B")
RANK = 32

CONSTANTS = {
    "_pool_kernel": ("dtype", "d"),
    "_latent_kernel": ("d",),
    "_columns_kernel": ("dtype",),
    "_scale_kernel": ("dtype",),
}
"""What each Triton kernel is compiled for, besides the divisibility of sizes."""


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
    """What one build or one version of Triton gave; `notes` are figures for the report."""

    title: str
    uses: list[Use] = dataclasses.field(default_factory=list)
    problems: list[str] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)

    def look_for_local_memory(self) -> None:
        """Add a problem for each kernel that keeps values there."""
        self.problems += [
            f"{use.kernel}, sm_{use.arch}: {use.local} bytes a thread in local memory"
            for use in self.uses
            if use.local
        ]


def run(command: list[str], **options: Any) -> str:
    """Output of a program, stdout and stderr."""
    done = subprocess.run(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, **options
    )
    if done.returncode:
        raise FailedError(f"{' '.join(command[:6])} ...:\n{done.stdout[-6000:]}")
    return done.stdout


def install(requirements: list[str], cache: Path, target: Path) -> None:
    """Unpack wheels into a folder, without what they need; `cache` keeps them."""
    pip, wheels = [sys.executable, "-m", "pip", "--quiet"], str(cache / "wheels")
    run([*pip, "download", "--no-deps", "--only-binary=:all:", "--dest", wheels, *requirements])
    there = ["--no-index", "--find-links", wheels]
    run([*pip, "install", "--no-deps", *there, "--target", str(target), *requirements])


def cuobjdump_of(site: str | Path | None = None) -> str:
    """The program in Triton's wheel, installed here or in a folder."""
    if site is None:
        spec = importlib.util.find_spec("triton")
        if spec is None or spec.origin is None:
            raise FailedError("Triton is not installed; --triton VERSION fetches one")
        site = Path(spec.origin).parent.parent
    return f"{site}/triton/backends/nvidia/bin/cuobjdump"


def resource_usage(cuobjdump: str, file: Path) -> Iterator[Use]:
    """All kernels of an object, a library or a cubin."""
    arch, name = 0, ""
    for line in run([cuobjdump, "--dump-resource-usage", str(file)]).splitlines():
        if match := re.search(r"arch = sm_(\d+)", line):
            arch = int(match[1])
        elif match := re.search(r"Function (\S+):", line):
            name = match[1]
        elif "REG:" in line:
            value = {key: int(number) for key, number in re.findall(r"([A-Z]+):(\d+)", line)}
            local = value["STACK"] + value["LOCAL"]
            yield Use(name, arch, value["REG"], local, value["SHARED"])


def readable(names: Iterable[str]) -> dict[str, str]:
    """C++ kernels' names as people write them, without what all of them have."""
    names = sorted(set(names))
    result = {}
    for name, text in zip(names, run(["c++filt", *names]).splitlines(), strict=True):
        text = re.sub(r"\(.*", "", text).removeprefix("void ").replace("vllm_pedro::", "")
        text = text.replace("__nv_bfloat16", "bfloat16").replace("__half", "float16")
        result[name] = re.sub(r"\bfloat\b", "float32", text)
    return result


def copy_source(target: Path) -> None:
    """What an sdist would have, so that the build leaves nothing in the checkout."""
    target.mkdir(parents=True)
    for name in ("setup.py", "pyproject.toml", "MANIFEST.in", "LICENSE"):
        shutil.copy(ROOT / name, target)
    skip = shutil.ignore_patterns("*.so", "*.note", "__pycache__", "demo_adapters")
    for name in ("csrc", "vllm_pedro"):
        shutil.copytree(ROOT / name, target / name, ignore=skip)


def native(torch: str, cache: Path, work: Path) -> Result:
    """Build the package's wheel beside a CUDA torch and list its library's kernels."""
    begin = time.monotonic()
    site = work / "site-packages"
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    # A build for CPUs has a local version, such as 2.13.0+cpu, and is not meant.
    install([f"torch==={torch}", *project["optional-dependencies"]["nvcc"]], cache, site)
    text = (site / "torch" / "version.py").read_text(encoding="utf-8")
    cuda = re.search(r"^cuda\b[^=]*= '([\d.]+)'", text, re.MULTILINE)
    if cuda is None:
        raise FailedError(f"pip brought a torch {torch} without CUDA")
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
    built = time.monotonic()
    (wheel,) = (work / "out").iterdir()
    if not wheel.name.endswith(f"-py3-none-linux_{platform.machine()}.whl"):
        raise FailedError(f"the wheel is tagged as what it is not: {wheel.name}")
    shutil.unpack_archive(wheel, work, "zip")
    library = work / "vllm_pedro" / "_C.so"
    if (note := library.with_suffix(".note")).exists():
        raise FailedError(note.read_text())
    nvcc = re.search(r"V(\d+\.\d+\.\d+)", run([str(home / "bin" / "nvcc"), "--version"]))
    uses = list(resource_usage(cuobjdump_of(), library))
    names = readable(use.kernel for use in uses)
    uses = [dataclasses.replace(use, kernel=names[use.kernel]) for use in uses]
    missing = set(ARCHITECTURES) - {use.arch for use in uses}
    return Result(
        f"torch {torch}",
        uses,
        [f"no kernels for sm_{arch}" for arch in missing],
        [
            f"torch {torch} for CUDA {cuda[1]}, nvcc {nvcc[1] if nvcc else '?'}",
            f"wheel {wheel.name}, library {library.stat().st_size / 1e6:.1f} MB",
            f"built in {built - fetched:.0f} s, after {fetched - begin:.0f} s of fetching",
        ],
    )


@contextlib.contextmanager
def compile_only(arch: int) -> Iterator[list[tuple[str, Any]]]:
    """Calls of Triton kernels compile for an architecture and launch nothing.

    The kernels are those which a GPU would be given for the same arguments; tensors on the CPU have
    the dtypes, strides and alignment that Triton compiles for.

    Yields:
        A list that grows by (name, compiled kernel) with every kernel that is compiled anew.
    """
    from triton.backends.compiler import GPUTarget
    from triton.runtime.driver import driver
    from triton.runtime.jit import JITFunction

    from vllm_pedro.ops import triton_kernels

    compiled: list[tuple[str, Any]] = []
    original = JITFunction.run
    seen: set[int] = set()

    def compile_it(self: Any, *args: Any, grid: Any, warmup: bool, **kwargs: Any) -> Any:
        kernel = original(self, *args, grid=grid, warmup=True, **kwargs)
        if id(kernel) not in seen:
            seen.add(id(kernel))
            compiled.append((self.fn.__name__, kernel))
        return kernel

    def forget() -> None:
        """What this package's kernels were compiled to."""
        for function in vars(triton_kernels).values():
            if hasattr(function, "device_caches"):
                function.device_caches.clear()

    # Stands for the driver of a GPU that is not there.
    nowhere = SimpleNamespace(
        get_current_target=lambda: GPUTarget("cuda", arch, 32),
        get_current_device=lambda: 0,
        get_current_stream=lambda device: 0,
    )
    driver.set_active(nowhere)
    forget()
    JITFunction.run = compile_it
    try:
        yield compiled
    finally:
        JITFunction.run = original
        forget()


def call_as_serving_does(model: str, dtype: Any, count: int = 3) -> Iterator[dict[str, str]]:
    """Call each operator for a step of `count` prompts with a model's sizes; nothing is read or
    written if nothing is launched.

    Yields:
        After each call, what kernels it compiled are for.
    """
    import torch
    from gpu_operators import Plan

    from vllm_pedro.ops import triton_kernels

    d, kv, f = Plan("cpu", model).widths
    qkv, gate_up = d + 2 * kv, 2 * f
    constants = {"dtype": str(dtype).removeprefix("torch."), "d": f"d = {d}"}
    # Addresses and strides count, not contents: pages that are not touched take no memory.
    hidden = torch.empty(count, d, dtype=dtype)
    vectors = torch.empty(count + 1, qkv + gate_up, dtype=dtype)
    arena = torch.empty(1 << 20, dtype=torch.uint8)
    prompts = torch.empty(count, 4, dtype=torch.int32)
    slots = torch.empty(count, dtype=torch.int64)
    layer = torch.zeros(1, dtype=torch.int32)
    step = torch.tensor([count, count, RANK], dtype=torch.int32)
    triton_kernels.generate_vectors(hidden, vectors, arena, prompts, layer, step)
    yield constants
    for begin, width in ((0, qkv), (qkv, gate_up)):
        packed = torch.empty(count, width, dtype=dtype)
        triton_kernels.scale_columns_(packed, vectors, slots, (0, begin, width), step)
    yield constants


def compile_all(quick: bool, cuobjdump: str) -> Iterator[Use]:
    """Compile with the Triton that this process imports; ptxas's logs go to standard output."""
    import torch

    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    models, archs = MODELS, ARCHITECTURES
    if quick:
        dtypes, models, archs = (torch.bfloat16,), MODELS[:1], (90,)
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        for arch in archs:
            with compile_only(arch) as compiled:
                for model, dtype in itertools.product(models, dtypes):
                    for constants in call_as_serving_does(model, dtype):
                        for name, kernel in compiled:
                            cubin.write_bytes(kernel.asm["cubin"])
                            (use,) = resource_usage(cuobjdump, cubin)
                            words = [constants[c] for c in CONSTANTS[name]]
                            words.append(f"{kernel.metadata.num_warps} warps")
                            full, shared = f"{name} ({', '.join(words)})", kernel.metadata.shared
                            yield dataclasses.replace(use, kernel=full, arch=arch, shared=shared)
                        compiled.clear()


def with_triton(version: str, quick: bool, cache: Path, work: Path) -> Result:
    """Compile all kernels with one version of Triton, in a process of its own; "installed" is the
    one that is there."""
    folder = None if version == "installed" else work
    if folder:
        install([f"triton=={version}"], cache, folder)
    environment = {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(str, filter(None, (folder, ROOT)))),
        "TRITON_CACHE_DIR": str(work / "cache"),  # empty, so that everything is compiled
        "TRITON_DUMP_PTXAS_LOG": "1",
        "TRITON_DEFAULT_FP_FUSION": "1",  # the default, of which 3.9 warns otherwise
        "CUDA_VISIBLE_DEVICES": "",
    }
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, __file__, "--worker", cuobjdump_of(folder)]
    begin = time.monotonic()
    output = run([*command, *(["--quick"] if quick else [])], env=environment)
    seconds = time.monotonic() - begin
    (answer,) = re.findall(r"^RESULT (.*)", output, re.MULTILINE)
    found = json.loads(answer)
    compiled = [Use(**use) for use in found["uses"]]
    uses: dict[tuple[str, int], Use] = {}
    # Two variants may differ in divisibility alone: the worse one.
    for use in sorted(compiled, key=lambda use: (use.local, use.registers, use.shared)):
        uses[use.kernel, use.arch] = use
    said = output.replace(answer, "")
    problems = [line for line in said.splitlines() if "warning" in line.lower()]
    stores = re.findall(r"(\d+) bytes spill stores", said)
    problems += [f"ptxas: {n} bytes spill stores" for n in stores if n != "0"]
    if len(stores) != len(compiled):
        problems.append(f"{len(compiled)} kernels, but {len(stores)} logs of ptxas")
    note = f"{len(compiled)} kernels compiled in {seconds:.0f} s"
    return Result(f"Triton {found['version']}", list(uses.values()), problems, [note])


def table(uses: list[Use]) -> str:
    """One line for each kernel, one column for each architecture."""
    archs = sorted({use.arch for use in uses})
    cells = {(use.kernel, use.arch): str(use) for use in uses}
    rows = [
        [f"`{name}`", *(cells.get((name, arch), "-") for arch in archs)]
        for name in sorted({use.kernel for use in uses})
    ]
    return tables.table(["kernel", *(f"sm_{arch}" for arch in archs)], rows)


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
        if not result.uses:
            continue
        local = sum(1 for use in result.uses if use.local)
        most = max(result.uses, key=lambda use: use.registers)
        lines.append(
            f"- {len(result.uses)} entries, {local} with local memory; most registers: "
            f"{most.registers}, `{most.kernel}` on sm_{most.arch}"
        )
        # Kernels of the same names came before: only the lines that are not the same.
        names = {use.kernel for use in result.uses}
        like = next((r for r in shown if names & {use.kernel for use in r.uses}), None)
        if like is None:
            shown.append(result)
            lines += ["", table(result.uses)]
            continue
        changed = {use.kernel for use in set(result.uses) - set(like.uses)}
        lines.append(
            f"- {len(names) - len(changed)} of {len(names)} lines are those of {like.title}"
            + (", the others:" if changed else "")
        )
        if changed:
            lines += ["", table([use for use in result.uses if use.kernel in changed])]
    return "\n".join(lines) + "\n"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--only", choices=("native", "triton"), help="one of the two parts")
    for name, default in (("torch", TORCHES), ("triton", ("installed",))):
        about = f"with this one; may be repeated ({', '.join(default)})"
        add(f"--{name}", action="append", metavar="VERSION", help=about)
    add("--cache", type=Path, default=CACHE, help="for wheels, and for work (build/gpu_compile)")
    add("--quick", action="store_true", help="Triton: one dtype, model and GPU")
    add("--table", type=Path, metavar="FILE", help="write the report here too")
    add("--worker", metavar="CUOBJDUMP", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.worker:
        uses = [dataclasses.asdict(use) for use in compile_all(args.quick, args.worker)]
        import triton

        print("RESULT " + json.dumps({"version": triton.__version__, "uses": uses}))
        return 0
    args.cache.mkdir(parents=True, exist_ok=True)
    jobs = []
    if args.only != "triton":
        jobs += [("torch", native, [version]) for version in args.torch or TORCHES]
    if args.only != "native":
        versions = args.triton or ["installed"]
        jobs += [("Triton", with_triton, [version, args.quick]) for version in versions]
    results = []
    for name, job, given in jobs:
        with tempfile.TemporaryDirectory(dir=args.cache, prefix="work-") as folder:
            try:
                result = job(*given, cache=args.cache, work=Path(folder))
                result.look_for_local_memory()
            except FailedError as error:
                result = Result(f"{name} {given[0]}", problems=[str(error)])
        results.append(result)
    given = sys.argv[1:] if argv is None else argv
    # Where wheels lie on this machine, and what is written, are nobody's concern.
    shown = re.sub(r" ?--cache[ =]\S+", "", " ".join(["", *given]))
    text = report(results, f"python benchmarks/gpu_compile.py{shown}")
    print(text)
    if args.table:
        args.table.write_text(text, encoding="utf-8")
    return 1 if any(result.problems or not result.uses for result in results) else 0


if __name__ == "__main__":
    sys.exit(main())
