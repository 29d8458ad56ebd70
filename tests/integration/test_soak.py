"""`stress/soak.py` as a user runs it. A short sample is in `test_server.py`."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

SOAK = Path(__file__).resolve().parents[2] / "stress" / "soak.py"

pytestmark = [pytest.mark.engine, pytest.mark.slow]


@pytest.mark.timeout(1800)
def test_ten_minutes_of_64_clients(tmp_path, smol):
    command = [sys.executable, str(SOAK), "--minutes", "10", "--clients", "64"]
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
