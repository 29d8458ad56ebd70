"""The script that a GPU machine runs, in its small size on the CPU."""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import gpu_check
import measure
import pytest

from vllm_pedro.bench.main import make_parser
from vllm_pedro.bench.offline import plan

ROOT = Path(__file__).resolve().parents[1]
COMMAND = [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")]
ENVIRONMENT = {**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}


def check(*arguments: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *map(str, arguments)],
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.mark.engine
@pytest.mark.timeout(1200)
def test_parts_run_on_a_cpu_and_are_gone_on_with(tmp_path):
    """What failed is run again, what is done is not."""
    parts = ["--small", "--out", tmp_path, "--parts", "operators", "profile"]
    assert check(*parts, "--minutes", "0.0001").returncode == 1
    page = (tmp_path / "results.md").read_text()
    assert page.count("stopped: no time left") >= 2
    first = check(*parts[:-1])
    assert first.returncode == 0
    assert "operators: done, " in first.stdout
    again = check(*parts)
    assert again.returncode == 0, (tmp_path / "profile.txt").read_text()
    assert "operators: done before" in again.stdout
    page = check("--render", tmp_path).stdout
    assert '"equal": 237' in page
    assert "| vllm_pedro::scale_columns_ " in page
    assert "no time left" not in page


def test_the_page_has_the_reports_of_benchmarks(tmp_path):
    about = {"card": "C", "versions": {"torch": "1"}, "operators": "native", "revision": "r"}
    row = {"part": "decode", "failed": [], "seconds": 1.0, "time": "now", "about": about}
    (tmp_path / "results.jsonl").write_text(json.dumps(row) + "\n")
    (tmp_path / "decode").mkdir()
    (tmp_path / "decode" / "report.md").write_text("## Conditions\n\n- one\n\n## Memory\n")
    text = gpu_check.render(tmp_path)
    assert "## decode\n\nC, torch 1; operators: native; revision r; now, 1.0 s. Nothing" in text
    assert text.count("\n### ") == 2


@pytest.mark.parametrize("small", [False, True])
@pytest.mark.parametrize("part", gpu_check.PARTS)
def test_commands_of_a_part_are_commands_of_the_project(part, small, tmp_path):
    args = argparse.Namespace(small=small, out=tmp_path, minutes=8.0)
    for command in gpu_check.commands(part, args, tmp_path):
        if command[:3] == ["-m", "vllm_pedro.cli", "bench"]:
            comparisons = plan(make_parser().parse_args(command[3:]))
            assert all(comparison.cases for comparison in comparisons)
        elif Path(command[0]).name == "measure.py":
            measure.make_parser().parse_args(command[1:])
        elif command[0] != "-m":
            source = Path(command[0]).read_text()
            assert all(f'"{word}"' in source for word in command if word.startswith("--"))


def test_time_that_is_up_ends_a_command(tmp_path):
    """Kindly: what it has started in sessions of their own is for it to end."""
    code = "import signal, sys, time\nsignal.signal(signal.SIGTERM, lambda *_: sys.exit('ended'))\n"
    with open(tmp_path / "log", "w") as log:
        command = ["-c", code + "time.sleep(60)"]
        why = gpu_check.run_until(time.monotonic() + 5, command, log)
    assert why == "stopped: no time left"
    assert (tmp_path / "log").read_text() == "ended\n"


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--out", "x"], "no GPU was found; --small runs on a CPU"),
        (["--small"], "--out DIR is needed"),
        (["--small", "--out", "x", "--parts", "decoding"], "invalid choice: 'decoding'"),
    ],
)
def test_what_is_missing_is_named(arguments, message, tmp_path):
    done = subprocess.run(
        [*COMMAND, *arguments],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert message in done.stderr
    assert not list(tmp_path.iterdir())
