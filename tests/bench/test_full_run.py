"""benchmarks/full_run.sh: every command of it is one that the benchmark takes."""

from __future__ import annotations

import os
import shlex
import subprocess
from pathlib import Path

import pytest

from vllm_pedro.bench.main import make_parser

SCRIPT = Path(__file__).parents[2] / "benchmarks" / "full_run.sh"


@pytest.fixture
def recorder(tmp_path: Path) -> tuple[Path, Path]:
    """A stand-in for the interpreter that writes down what it is called with, and the notes."""
    notes, program = tmp_path / "calls", tmp_path / "python"
    program.write_text(f'#!/bin/sh\necho "$@" >> {shlex.quote(str(notes))}\n')
    program.chmod(0o755)
    return program, notes


def run(program: Path, *words: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHON": str(program), "TRACE": "t.csv", "BENCH": "--model M"}
    return subprocess.run(
        [str(SCRIPT), *words],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )


def test_all_groups(recorder: tuple[Path, Path], tmp_path: Path) -> None:
    program, notes = recorder
    done = run(program, str(tmp_path / "out"))
    assert done.returncode == 0, done.stderr
    calls = [line.split() for line in notes.read_text().splitlines()]
    folders, workloads = [], set()
    for call in calls:
        assert call[:3] == ["-m", "vllm_pedro.cli", "bench"]
        args = make_parser().parse_args(call[3:])
        assert args.model == "M"
        folders.append(args.output)
        workloads |= set(getattr(args, "workloads", {"trace"} if args.trace else ()))
    assert len(set(folders)) == len(folders) == 9
    assert workloads == {
        "decode",
        "prefill",
        "mixed",
        "paper",
        "beam",
        "tenants",
        "mixes",
        "concurrency",
        "break-even",
        "trace",
    }


def test_compiled(
    recorder: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    program, notes = recorder
    monkeypatch.setenv("MODE", "compiled")
    assert run(program, str(tmp_path / "out"), "beam").returncode == 0
    args = make_parser().parse_args(notes.read_text().split()[3:])
    assert args.engines == ["base-compiled", "pedro-compiled", "lora-compiled"]


def test_an_unknown_group_fails(recorder: tuple[Path, Path], tmp_path: Path) -> None:
    program, notes = recorder
    done = run(program, str(tmp_path / "out"), "many", "nothing")
    assert done.returncode == 1
    assert "failed: nothing" in done.stderr
    assert len(notes.read_text().splitlines()) == 1
