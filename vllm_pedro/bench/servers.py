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
from typing import Final

from ..errors import PedroError

HOST: Final = "127.0.0.1"
GROUP_SECONDS: Final = 10.0  # for the processes that a server started, once it has ended itself
TAIL: Final = 40  # lines of a server's log in an error

# As a user's shell has it, whatever this process was set to.
USUAL: Final = {
    "VLLM_ENABLE_V1_MULTIPROCESSING": "1",
    "VLLM_LOGGING_LEVEL": "INFO",
    "VLLM_NO_USAGE_STATS": "1",
    "HF_HUB_OFFLINE": "1",
}

# Threads that wait must not spin where other work runs on the same cores.
SHARED: Final = {"OMP_WAIT_POLICY": "passive", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}


@dataclass(frozen=True)
class Server:
    """A running server.

    Attributes:
        port: Where it listens.
        pid: The process that was started, the leader of a group of its own.
        log: What all of its processes print.
        seconds: How long it took to answer.
    """

    port: int
    pid: int
    log: Path
    seconds: float

    @property
    def url(self) -> str:
        """Without a path, e.g. `http://127.0.0.1:8000`."""
        return f"http://{HOST}:{self.port}"

    def pids(self) -> list[int]:
        """Its processes."""
        import psutil

        try:
            return [self.pid, *(p.pid for p in psutil.Process(self.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def resident_bytes(self) -> dict[int, int]:
        """Resident memory of its processes by process id."""
        import psutil

        found = {}
        for pid in self.pids():
            with contextlib.suppress(psutil.NoSuchProcess):
                found[pid] = int(psutil.Process(pid).memory_info().rss)
        return found

    def peak_bytes(self) -> int:
        """Highest resident sets of its processes, added up; shared pages count more than once."""
        return sum(map(peak_bytes, self.pids()))


def peak_bytes(pid: int) -> int:
    """A process's highest resident set (Linux; psutil does not have it); 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    return 0


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def serve(
    model: Path | str,
    flags: Sequence[str],
    log: Path,
    timeout: float = 900,
    shares_cores: bool = True,
    **environment: str,
) -> Iterator[Server]:
    """`vllm-pedro serve MODEL FLAGS`, until the block ends; then all its processes end.

    Args:
        model: The model's folder.
        flags: Of `vllm serve`, but for host and port.
        log: A file for what it prints.
        timeout: Seconds until it has to answer.
        shares_cores: Whether other work runs on its cores.
        **environment: Variables of its process.

    Raises:
        PedroError: It ended, or does not answer in time; with the end of its log.
    """
    port = free_port()
    command = [sys.executable, "-m", "vllm_pedro.cli", "serve", str(model)]
    command += ["--host", HOST, "--port", str(port), *flags]
    start = time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **USUAL, **(SHARED if shares_cores else {}), **environment},
            start_new_session=True,
        )
    try:
        while not _answers(port):
            if process.poll() is not None:
                raise PedroError(f"the server ended with {process.returncode}:\n{_tail(log)}")
            if time.monotonic() - start > timeout:
                raise PedroError(f"the server does not answer:\n{_tail(log)}")
            time.sleep(0.25)
        yield Server(port, process.pid, log, time.monotonic() - start)
    finally:
        _stop(process)


def _answers(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://{HOST}:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: first kindly, then not."""
    for sign, seconds in ((signal.SIGTERM, 30), (signal.SIGKILL, 10)):
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, sign)
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(seconds)
            if _group_ends(process.pid):
                return


def _group_ends(group: int) -> bool:
    end = time.monotonic() + GROUP_SECONDS
    while time.monotonic() < end:
        try:
            os.killpg(group, 0)
        except ProcessLookupError:
            return True
        time.sleep(0.1)
    return False


def _tail(log: Path) -> str:
    found = log.read_text(errors="replace").strip().splitlines()
    return "\n".join(found[-TAIL:]) or "its log is empty"
