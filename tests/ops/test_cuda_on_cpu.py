"""The CUDA kernels' own source, compiled for the CPU, against the reference.

Each kernel and the code that launches it run as they are written; CUDA's words are defined by
`cuda_on_cpu.h`. Seen here: indices, barriers, the arithmetic, and that no access is wider than its
address is aligned. Not seen: nvcc's code, a GPU's memory model, its exponential, and speed.
"""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).resolve().parent
SOURCE = HERE.parents[1] / "csrc" / "cuda" / "ops.cu"

pytestmark = pytest.mark.skipif(shutil.which("c++") is None, reason="no C++ compiler is installed")

WITH_BARRIERS = ("pool_kernel", "latent_kernel")

RUN = """
import sys, torch
from vllm_pedro import ops
from vllm_pedro.ops import samples
torch.ops.load_library(sys.argv[1])
print(samples.check(torch.ops.pedro_on_cpu))
"""


def for_the_cpu(text):
    """The source with other headers, launches that call, and operators of another name."""

    def replace(pattern, by, number):
        nonlocal text
        text, found = re.subn(pattern, by, text)
        assert found == number, (pattern, found)

    replace(r"#include <cuda_\w+\.h>\n", "", 3)
    replace(r"#include <torch/csrc/(inductor|stable/(accelerator|macros)).*\n", "", 3)
    text = '#include "cuda_on_cpu.h"\n' + text
    replace(r"(?s)static cudaStream_t current_stream.*?\n}\n", "", 1)
    replace(r"  const (torch::stable::accelerator::DeviceGuard|cudaStream_t) .*\n", "", 4)
    replace(r"STD_CUDA_KERNEL_LAUNCH_CHECK\(\);", "", 2)
    replace(r"is_cuda\(\)", "is_cpu()", 5)

    def launch(match):
        name, grid, arguments = match.groups()
        barriers = str(name.split("<")[0] in WITH_BARRIERS).lower()
        return f"launch({grid}, kThreads, {barriers}, [&] {{ {name}({arguments}); }});"

    replace(r"(?s)(\w+_kernel(?:<[\w, ]+>)?)<<<(.*?), kThreads, 0, stream>>>\((.*?)\);", launch, 5)
    replace(r"STABLE_TORCH_LIBRARY_FRAGMENT\(vllm_pedro", "STABLE_TORCH_LIBRARY(pedro_on_cpu", 1)
    replace(
        r"STABLE_TORCH_LIBRARY_IMPL\(vllm_pedro, CUDA",
        "STABLE_TORCH_LIBRARY_IMPL(pedro_on_cpu, CPU",
        1,
    )
    replace(
        r"STABLE_TORCH_LIBRARY_IMPL\(vllm_pedro, Comp",
        "STABLE_TORCH_LIBRARY_IMPL(pedro_on_cpu, Comp",
        1,
    )
    from vllm_pedro.ops.library import SCHEMAS

    schemas = "".join(f'  m.def("{name}{schema}");\n' for name, schema in SCHEMAS.items())
    replace(r'  m.def\("_has_cuda_kernels\(\) -> bool"\);\n', schemas + r"\g<0>", 1)
    return text


@pytest.fixture(scope="module")
def library(tmp_path_factory):
    """The kernels as operators `pedro_on_cpu`, on the CPU."""
    folder = tmp_path_factory.mktemp("cuda_on_cpu")
    # In the place of the original, for the header that it includes.
    (folder / "cuda").mkdir()
    shutil.copy(SOURCE.parent.parent / "layout.h", folder)
    source = folder / "cuda" / "ops.cpp"
    source.write_text(for_the_cpu(SOURCE.read_text()))
    home = Path(torch.__file__).parent
    target = folder / "kernels.so"
    flags = ["-std=c++20", "-O2", "-fPIC", "-shared", "-Wall", "-Wno-unknown-pragmas"]
    # A misaligned access ends the process, as it does a GPU's kernel.
    flags += ["-fsanitize=alignment,bounds", "-fsanitize-undefined-trap-on-error"]
    flags += ["-DTORCH_TARGET_VERSION=0x020b000000000000ull", f"-I{HERE}"]
    libraries = [f"-L{home / 'lib'}", "-ltorch_cpu", "-lc10", "-ltorch"]
    command = ["c++", *flags, "-isystem", str(home / "include"), str(source), *libraries]
    done = subprocess.run(
        [*command, "-o", str(target)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return target


@pytest.mark.parametrize("order", ["forwards", "backwards"])
def test_the_cuda_kernels_equal_the_reference_over_the_whole_table(library, order):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    environment.pop("CUDA_ON_CPU_BACKWARDS", None)
    if order == "backwards":
        environment["CUDA_ON_CPU_BACKWARDS"] = "1"
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(library)],
        env=environment,
        cwd=HERE.parents[1],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, (done.returncode, done.stderr[-4000:])
    assert int(done.stdout) > 500
