"""The soaks as a user runs them. A short sample of `soak.py` is in `test_server.py`."""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_pedro.bench.servers import serve

STRESS = Path(__file__).resolve().parents[2] / "stress"

pytestmark = pytest.mark.engine


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_ten_minutes_of_64_clients(tmp_path, smol):
    command = [sys.executable, str(STRESS / "soak.py"), "--minutes", "10", "--clients", "64"]
    command += ["--model", str(smol), "--json", str(tmp_path / "soak.json")]
    command += ["--log", str(tmp_path / "server.log")]
    result = subprocess.run(
        command,
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert figures["counts"]["equal"] > 500
    assert "Traceback" not in (tmp_path / "server.log").read_text(errors="replace")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_two_thousand_tenants_on_a_slow_disk(tmp_path, smol):
    command = [sys.executable, str(STRESS / "tenants_soak.py"), "--model", str(smol)]
    command += ["--json", str(tmp_path / "soak.json"), "--log", str(tmp_path / "server.log")]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stdout[-3000:] + result.stderr[-3000:]
    figures = json.loads((tmp_path / "soak.json").read_text())
    assert figures["counts"]["equal"] > 200


def test_tenants_on_a_slow_disk_in_short(tmp_path, smol):
    from tenants_soak import TenantsPlan, TenantsSoak, options

    root = tmp_path / "root"
    root.mkdir()
    plan = TenantsPlan(seconds=16, turns=1, tenants=100, contents=3, prompts=2, clients=3)
    flags, environment = options(smol, root, patience=3)
    with serve(smol, flags, tmp_path / "server.log", **environment) as server:
        soak = TenantsSoak(server, smol, root, plan)
        asyncio.run(soak.run_tenants())
    assert soak.report.problems == []
    assert soak.report.counts["equal"] >= 10
    assert soak.report.counts["streams equal"] >= 2
    assert soak.most["device"] < soak.most["host"]
