"""The script that a GPU machine runs, in its small size on the CPU: all of it, engines too."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import gpu_tables
import pytest

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


def rows(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "results.jsonl").read_text().splitlines()]


@pytest.mark.engine
def test_the_small_size_runs_on_a_cpu_and_finds_nothing_wrong(tmp_path):
    done = check("--small", "--out", tmp_path)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr[-2000:]}"
    start, *found = rows(tmp_path)
    assert start["card"] == "CPU"
    parts: dict[str, list[dict[str, Any]]] = {}
    for row in found:
        assert "error" not in row
        assert "wrong" not in row
        assert "skipped" not in row
        if "done" not in row:
            parts.setdefault(row["part"], []).append(row)
    assert set(parts) == {r["part"] for r in found if r.get("done")}

    (operators,) = parts["operators"]
    assert operators["equal"] > 200
    assert [row["rows"] > 20 for row in parts["exactness"]] == [True, True]
    assert parts["fuzz"][0]["cases"] > 0
    for part in ("decode", "lora", "many"):
        engines = {row["engine"] for row in parts[part]}
        assert "base" in engines
        assert len(engines) > 2
        assert all(row["tokens/s"] > 0 and row["over base"] > 0 for row in parts[part])
    assert {row["state"] for row in parts["first"]} == {"warm", "over", "cold"}
    assert all(row["ms"] > 0 for row in parts["first"])
    assert {row["arrivals a second"] for row in parts["running"]} == {0, 50}
    kernels = {row["engine"]: {k[0] for k in row["kernels"]} for row in parts["profile"]}
    assert "vllm_pedro::scale_columns_" in kernels["PEDRO"]
    assert "vllm_pedro::scale_columns_" not in kernels["base"]
    assert parts["bandwidth"][0]["GB/s"] > 0.1
    blocks = {row["engine"]: row["kv blocks"] for row in parts["memory"]}
    assert 0.9 < blocks["PEDRO"] / blocks["base"] < 1.1  # a CPU's are what the process leaves
    assert {row["adapter"] for row in parts["model"]} > {"none"}
    assert all(row["best"] > row["tokens"] / 2 for row in parts["model"])
    assert parts["serve"][0]["tenants"] > 0

    table = check("--render", tmp_path).stdout
    assert "## Decode, vLLM's LoRA; over base: tokens/s" in table
    assert "| scale_columns_ of Up, then silu and mul in torch, small, 4 tokens " in table


def test_a_run_that_was_killed_is_gone_on_with(tmp_path):
    """What was done stays and is not done again; what was not, is."""
    first = subprocess.Popen(
        [*COMMAND, "--small", "--out", str(tmp_path), "--parts", "operators", "bandwidth"],
        env=ENVIRONMENT,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert first.stdout is not None
    for line in first.stdout:
        if line.startswith("operators:"):
            break
    first.kill()
    first.wait()
    kept = rows(tmp_path)
    assert [row["part"] for row in kept if row.get("done")] == ["operators"]
    with open(tmp_path / "results.jsonl", "a") as file:
        file.write('{"start": 1, "part": "bandw')  # ended while it wrote

    again = check("--small", "--out", tmp_path, "--parts", "operators", "bandwidth")
    assert again.returncode == 0, again.stderr[-2000:]
    assert "operators: done before" in again.stdout
    found = gpu_tables.read(tmp_path / "results.jsonl")
    assert found[: len(kept)] == kept
    assert [row["part"] for row in found if row.get("done")] == ["operators", "bandwidth"]
    assert sum("equal" in row for row in found) == 1


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
