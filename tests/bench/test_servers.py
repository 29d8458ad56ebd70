"""Servers in processes of their own."""

from __future__ import annotations

import sys
import time
from pathlib import Path

import pytest

from vllm_pedro.bench import servers
from vllm_pedro.errors import PedroError


def test_a_server_that_does_not_start_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = tmp_path / "python"
    fake.write_text("#!/bin/sh\necho 'ValueError: no room' >&2\nexit 3\n")
    fake.chmod(0o700)
    monkeypatch.setattr(servers.sys, "executable", str(fake))
    with (
        pytest.raises(PedroError, match="ended with 3:\nValueError: no room"),
        servers.serve("model", [], tmp_path / "log"),
    ):
        pass


def test_a_server_and_all_its_processes_end(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The server has a child that ignores SIGTERM."""
    child = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(60)"
    fake = tmp_path / "python"
    fake.write_text(
        f"#!{sys.executable}\n"
        "import http.server, subprocess, sys\n"
        f"subprocess.Popen([sys.executable, '-c', {child!r}])\n"
        "class Handler(http.server.BaseHTTPRequestHandler):\n"
        "    def do_GET(self):\n"
        "        self.send_response(200); self.end_headers()\n"
        "    def log_message(self, *a): pass\n"
        "port = int(sys.argv[sys.argv.index('--port') + 1])\n"
        "http.server.HTTPServer(('127.0.0.1', port), Handler).serve_forever()\n"
    )
    fake.chmod(0o700)
    monkeypatch.setattr(servers.sys, "executable", str(fake))
    monkeypatch.setattr(servers, "STOP_SECONDS", 2.0)
    with servers.serve("model", [], tmp_path / "log") as server:
        pids = server.pids()
        assert len(pids) == 2
        assert server.peak_bytes() >= server.resident_bytes() > 2**22
    assert server.pids() == []
    assert server.peak_bytes() == 0
    end = time.monotonic() + 20
    while any(_is_running(pid) for pid in pids):
        assert time.monotonic() < end
        time.sleep(0.1)


def _is_running(pid: int) -> bool:
    try:
        state = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return False
    return state != "Z"
