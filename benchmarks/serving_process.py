"""A server in a process of its own, started as a user starts it and stopped whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

# As a user's shell has it, whatever this process was set to.
USUAL = {"VLLM_ENABLE_V1_MULTIPROCESSING": "1", "VLLM_LOGGING_LEVEL": "INFO"}

# Threads that wait must not spin where other work runs on the same cores.
QUIET = {
    "OMP_WAIT_POLICY": "passive",
    "VLLM_CPU_OMP_THREADS_BIND": "nobind",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        url: Without a path, e.g. ``http://127.0.0.1:8000``.
        pid: The process that was started; the others are its descendants.
        log: What all of them print.
        seconds: How long it took to answer.
    """

    url: str
    pid: int
    log: Path
    seconds: float

    def resident_bytes(self) -> dict[int, int]:
        """Resident memory of the server's processes by process id."""
        parents: dict[int, int] = {}
        resident: dict[int, int] = {}
        for entry in Path("/proc").iterdir():
            if entry.name.isdigit():
                with contextlib.suppress(OSError, IndexError, ValueError):
                    fields = (entry / "stat").read_text().rpartition(")")[2].split()
                    parents[int(entry.name)] = int(fields[1])
                    resident[int(entry.name)] = int(fields[21]) * os.sysconf("SC_PAGE_SIZE")
        family, grown = {self.pid}, True
        while grown:
            children = {pid for pid, parent in parents.items() if parent in family} - family
            family |= children
            grown = bool(children)
        return {pid: resident[pid] for pid in family if pid in resident}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serve(
    model: Path | str,
    flags: Sequence[str],
    log: Path,
    timeout: float = 600,
    **environment: str,
) -> Iterator[Server]:
    """``vllm-pedro serve MODEL FLAGS``, until the block ends.

    Raises:
        RuntimeError: It ended, or did not answer in time; with the end of what it printed.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm_pedro.cli", "serve", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *flags]
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **USUAL, **QUIET, **environment},
            start_new_session=True,
        )
    try:
        url = f"http://127.0.0.1:{port}"
        while not _answers(url):
            if process.poll() is not None or time.monotonic() - start > timeout:
                said = log.read_text(errors="replace")[-6000:]
                raise RuntimeError(f"the server does not run:\n{said}")
            time.sleep(0.5)
        yield Server(url, process.pid, log, time.monotonic() - start)
    finally:
        _stop(process)


def _answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: first kindly, then not."""
    for number, patience in ((signal.SIGTERM, 15), (signal.SIGKILL, 15)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, number)
        deadline = time.monotonic() + patience
        while time.monotonic() < deadline:
            process.poll()
            try:
                os.killpg(process.pid, 0)
            except ProcessLookupError:
                return
            time.sleep(0.1)
