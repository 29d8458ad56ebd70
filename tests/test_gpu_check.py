"""The script that a GPU machine runs, in its small size on the CPU: all of it, engines too."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


@pytest.mark.engine
def test_the_small_size_runs_on_a_cpu_and_finds_nothing_wrong(tmp_path):
    output, table = tmp_path / "result.json", tmp_path / "result.md"
    done = subprocess.run(
        [
            sys.executable,
            str(ROOT / "benchmarks" / "gpu_check.py"),
            *("--small", "--budget", "560", "--json", str(output), "--table", str(table)),
        ],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    result = json.loads(output.read_text())
    assert done.returncode == 0, f"{result['failures']}\n{done.stderr[-2000:]}"
    assert result["failures"] == []
    assert result["operators"]["registered"] > 500
    assert result["bandwidth"]["copy GB/s"] > 0.1
    for outcome in result["exactness"].values():
        assert outcome["rows"] > 20
        assert outcome["wrong"] == []
    assert {n.partition(", ")[2] for n in result["speed"]} == {"base", "PEDRO", "LoRA"}
    for outcome in result["speed"].values():
        assert all(row["decode tokens/s"] > 0 for row in outcome["rows"])
    text = table.read_text()
    assert "| small, PEDRO | 4 | 4 |" in text
    assert "scale_qkv_ of Up" in text


def test_a_machine_without_a_gpu_is_told_so():
    done = subprocess.run(
        [sys.executable, str(ROOT / "benchmarks" / "gpu_check.py")],
        env={**os.environ, "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 2
    assert "no GPU was found; --small runs on a CPU" in done.stderr
