"""A server in a process of its own, started as a user starts it and stopped whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

from ..errors import PedroError

HOST: Final = "127.0.0.1"
STOP_SECONDS: Final = 30.0  # for a server and its processes to end kindly
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
        url: Without a path, e.g. `http://127.0.0.1:8000`.
        pid: The process that was started, the leader of a group of its own.
        log: What all of its processes print.
        seconds: How long it took to answer.
    """

    url: str
    pid: int
    log: Path
    seconds: float

    def pids(self) -> list[int]:
        """Its processes."""
        import psutil

        try:
            return [self.pid, *(p.pid for p in psutil.Process(self.pid).children(recursive=True))]
        except psutil.NoSuchProcess:
            return []

    def resident_bytes(self) -> int:
        """Resident memory of its processes; shared pages count more than once."""
        return sum(_memory(pid, "VmRSS") for pid in self.pids())

    def peak_bytes(self) -> int:
        """Highest resident sets of its processes, added up."""
        return sum(_memory(pid, "VmHWM") for pid in self.pids())


def _memory(pid: int, key: str) -> int:
    """Of a process by Linux (psutil does not have the peak); 0 if it is gone."""
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1]) * 1024
    return 0


@contextlib.contextmanager
def serve(
    model: Path | str,
    flags: Sequence[str],
    log: Path,
    timeout: float = 900,
    shares_cores: bool = True,
    port: int | None = None,
    **environment: str,
) -> Iterator[Server]:
    """`vllm-pedro serve MODEL FLAGS`, until the block ends; then all its processes end.

    Args:
        model: The model's folder.
        flags: Of `vllm serve`, but for host and port.
        log: A file for what it prints.
        timeout: Seconds until it has to answer.
        shares_cores: Whether other work runs on its cores.
        port: Where it listens; default one that nobody listens on.
        **environment: Variables of its process.

    Raises:
        PedroError: It ended, or does not answer in time; with the end of its log.
    """
    port = port or free_port()
    command = [sys.executable, "-m", "vllm_pedro.cli", "serve", str(model)]
    command += ["--host", HOST, "--port", str(port), *flags]
    url, start = f"http://{HOST}:{port}", time.monotonic()
    with open(log, "wb") as output:
        process = subprocess.Popen(
            command,
            stdout=output,
            stderr=subprocess.STDOUT,
            env={**os.environ, **USUAL, **(SHARED if shares_cores else {}), **environment},
            start_new_session=True,
        )
    try:
        while not _answers(url):
            ended = process.poll() is not None
            if ended or time.monotonic() - start > timeout:
                how = f"ended with {process.returncode}" if ended else "does not answer"
                lines = log.read_text(errors="replace").strip().splitlines()
                raise PedroError(
                    f"the server {how}:\n" + ("\n".join(lines[-TAIL:]) or "its log is empty")
                )
            time.sleep(0.25)
        yield Server(url, process.pid, log, time.monotonic() - start)
    finally:
        _stop(process)


def free_port() -> int:
    """A port that nobody listens on."""
    with socket.socket() as listener:
        listener.bind((HOST, 0))
        return int(listener.getsockname()[1])


def _answers(url: str) -> bool:
    with contextlib.suppress(OSError), urllib.request.urlopen(f"{url}/health", timeout=5):
        return True
    return False


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End the whole group: first kindly, then not."""
    for sign in (signal.SIGTERM, signal.SIGKILL):
        end = time.monotonic() + STOP_SECONDS
        with contextlib.suppress(ProcessLookupError):  # nothing is left of it
            os.killpg(process.pid, sign)
            while time.monotonic() < end:
                process.poll()  # so that it is no zombie
                os.killpg(process.pid, 0)
                time.sleep(0.1)
