"""Engines that are loaded at once, each in a process of its own, and a clock inside their cores.

`Pool` starts the processes; `Engine` hands one of them commands as JSON lines. Started as a script
this file is such a process. `Clock` goes into vLLM's worker, which lives in the process of the
engine's core, and notes there when each step's tokens are complete: a client that is kept waiting
by the machine takes several steps' outputs at once, and its own clock would tell of those.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import os
import signal
import statistics
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

Q_V_UP = ("q_proj", "v_proj", "up_proj")
Steps = list[tuple[float, list[int]]]
"""When, by the clock that all processes share, which rows got a token."""


# In the core's process ---------------------------------------------------------------------------


class _Log:
    """What the clock has noted: of one run, whose requests' names begin with `<run>-`.

    kernels: `(name, microseconds, calls)` over `profile` steps, once all rows have had a token.
    """

    def __init__(self, run: int = -1, rows: int = 0, profile: int = 0) -> None:
        self.run, self.profile = run, profile
        self.unseen = set(range(rows))
        self.steps: Steps = []
        self.kernels: list[tuple[str, float, int]] = []
        self.steady = 0
        self.profiler: Any = None

    def note(self, output: Any) -> None:
        """Called with the model's output of a step, as soon as it is complete."""
        now = time.perf_counter()
        sampled, rows = output.sampled_token_ids, []
        for name, index in output.req_id_to_index.items() if sampled else ():
            run, row = name.split("-")[:2]
            if int(run) == self.run and len(sampled[index]):
                rows.append(int(row))
        if not rows:
            return
        self.steps.append((now, rows))
        self.unseen.difference_update(rows)
        self.steady += not self.unseen
        if self.profile and self.steady in (8, 8 + self.profile):
            self.switch_profiler()

    def switch_profiler(self) -> None:
        """Start it, then stop it."""
        import torch

        on_gpu = torch.cuda.is_available()
        if on_gpu:  # the step that is already on its way belongs to what came before
            torch.cuda.synchronize()
        if self.profiler is None:
            kinds = torch.profiler.ProfilerActivity
            self.profiler = torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU])
            self.profiler.__enter__()
            return
        self.profiler.__exit__(None, None, None)
        for event in self.profiler.key_averages():
            if spent := event.self_device_time_total if on_gpu else event.self_cpu_time_total:
                self.kernels.append((event.key, spent, event.count))


_log = _Log()


class Clock:
    """Mixed into vLLM's worker by `worker_extension_cls`; called by `LLM.collective_rpc`."""

    def clock_start(self, *about: int) -> None:
        """Forget what was noted; begin a `_Log`."""
        from vllm.v1.core.sched.scheduler import Scheduler

        global _log
        _log = _Log(*about)
        inner = Scheduler.update_from_output
        if hasattr(inner, "without_clock"):
            return

        def update_from_output(scheduler: Any, planned: Any, output: Any) -> Any:
            _log.note(output)
            return inner(scheduler, planned, output)

        update_from_output.without_clock = inner
        Scheduler.update_from_output = update_from_output

    def clock_read(self) -> tuple[Steps, list[tuple[str, float, int]]]:
        """Steps and kernels since the start."""
        return _log.steps, _log.kernels

    def clock_memory(self) -> dict[str, Any]:
        """KV blocks, and what PEDRO keeps on the device, in bytes."""
        facts = {"kv blocks": self.cache_config.num_gpu_blocks}
        facts["block tokens"] = self.cache_config.block_size
        if (pedro := getattr(self.model_runner, "pedro", None)) is not None:
            facts |= {"store bytes": pedro.store.nbytes, "adapters bytes": pedro.bank.nbytes}
        return facts


def decode_rate(steps: Steps, rows: int, tokens: int) -> dict[str, Any]:
    """Tokens a second, a step's ms (median) and gaps between a row's tokens, over all rows, from
    the first token of all rows to the end of the first row, which makes `tokens`.

    Rows from `rows` on arrived later and do not count.
    """
    counts: Counter[int] = Counter()
    last: dict[int, float] = {}
    window, made, gaps = [], 0, []
    for moment, got in steps:
        ours = [row for row in got if row < rows]
        if not ours:
            continue
        if window:
            made += len(ours)
            gaps += [1e3 * (moment - last[row]) for row in ours]
        counts.update(ours)
        last |= dict.fromkeys(ours, moment)
        if len(last) == rows:
            window.append(moment)
        if max(counts.values()) >= tokens:
            break
    if len(window) < 4:
        raise RuntimeError(f"{rows} rows decoded together in {len(window)} steps only")
    between = [b - a for a, b in itertools.pairwise(window)]
    gaps.sort()
    return {
        "tokens/s": made / (window[-1] - window[0]),
        "step ms": 1e3 * statistics.median(between),
        "steps": len(between),
        "gap ms": statistics.median(gaps),
        "gap max ms": gaps[-1],
        "gap p99 ms": gaps[int(0.99 * (len(gaps) - 1))],
    }


# The process -------------------------------------------------------------------------------------


class Child:
    """An engine, and what it can be told to do."""

    def __init__(self, kind: str, adapters: str, settings: dict[str, Any]) -> None:
        if kind == "PEDRO":
            import vllm_pedro  # noqa: F401  (teaches LLM its keywords)
        from vllm import LLM

        started = time.perf_counter()
        self.kind, self.adapters, self.runs = kind, adapters, 0
        self.llm = LLM(**settings)
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self.facts = {"start s": time.perf_counter() - started}
        self.facts |= self.llm.collective_rpc("clock_memory")[0]

    def add(self, row: int, tenant: int, prompt: int, tokens: int) -> str:
        """Hand in a request with `prompt` tokens that no other request has had."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        adapter = None
        if self.kind != "base":
            if self.kind == "PEDRO":
                from vllm_pedro import PedroRequest as Request
            else:
                from vllm.lora.request import LoRARequest as Request
            path = f"{self.adapters}/{self.kind.lower()}-{tenant:05d}"
            adapter = Request(f"t{tenant}", tenant + 1, path)
        name, start = f"{self.runs}-{row}", 7919 * (row + 1) + 97 * self.runs
        ids = [(start + 31 * t) % self.vocabulary for t in range(prompt)]
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        given = {"prompt_token_ids": ids}
        self.llm.llm_engine.add_request(name, given, params, lora_request=adapter)
        return name

    def run(
        self,
        tenants: list[int],
        prompt: int,
        tokens: int,
        seconds: float | None = None,
        arrivals: dict[str, Any] | None = None,
        profile: int = 0,
    ) -> tuple[float, tuple[Steps, list[Any]]]:
        """Let rows decode together until one has all its tokens, or `seconds` are over.

        Args:
            tenants: Of each row; base ignores them.
            arrivals: `every` seconds another prompt of `prompt` tokens, for one token, by
                the `tenants` in turn, once all rows have had their first token.
            profile: Steps to profile.

        Returns:
            When the first was handed in, and what the clock noted.
        """
        engine = self.llm.llm_engine
        self.runs += 1
        self.llm.collective_rpc("clock_start", args=(self.runs, len(tenants), profile))
        began = time.perf_counter()
        names: list[str] = []
        try:
            for row, tenant in enumerate(tenants):
                names.append(self.add(row, tenant, prompt, tokens))
            unseen, together, done = set(names), None, False
            while engine.has_unfinished_requests() and (unseen or not done):
                for output in engine.step():
                    unseen.discard(output.request_id)
                    row = int(output.request_id.partition("-")[2])
                    done |= output.finished and row < len(tenants)
                now = time.perf_counter()
                if unseen:
                    continue
                together = together or now
                done |= seconds is not None and now - together > seconds
                while arrivals and not done:
                    count = len(names) - len(tenants)
                    if now <= together + arrivals["every"] * count:
                        break
                    turn = arrivals["tenants"][len(names) % len(arrivals["tenants"])]
                    names.append(self.add(len(names), turn, arrivals["prompt"], 1))
        finally:  # after an error too: the next run must not find them
            engine.abort_request(names)
        return began, self.llm.collective_rpc("clock_read")[0]

    def decode(self, **case: Any) -> dict[str, Any]:
        """Steady decode."""
        _, (steps, kernels) = self.run(**case)
        found = decode_rate(steps, len(case["tenants"]), case["tokens"])
        return found | ({"kernels": kernels} if kernels else {})

    def first(self, turns: list[list[int]], prompt: int) -> dict[str, Any]:
        """Milliseconds until all of a turn's prompts have had their first token; the median."""
        passed = []
        for tenants in turns:
            began, (steps, _) = self.run(tenants, prompt, 1)
            passed.append(1e3 * (steps[-1][0] - began))
        return {"ms": statistics.median(passed)}


def main() -> None:
    """Start an engine, then obey lines of JSON until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is for the log

    def answer(found: dict[str, Any]) -> None:
        print("RESULT " + json.dumps(found), file=answers, flush=True)

    child = Child(**json.loads(sys.argv[1]))
    answer(child.facts)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(getattr(child, command.pop("do"))(**command))
        except Exception as error:
            answer({"error": f"{type(error).__name__}: {error}"})
    child.llm.llm_engine.engine_core.shutdown()


# The process that commands -----------------------------------------------------------------------


class Script:
    """A Python script in a process group of its own, which prints results as JSON after `RESULT`.

    One that does not answer in time is ended.
    """

    def __init__(self, command: list[str], log: Path, environment: dict[str, str]) -> None:
        self.log = log
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env={**os.environ, **environment},
                text=True,
                start_new_session=True,
            )

    def rows(self, deadline: float) -> Iterator[dict[str, Any]]:
        """Its results, as they come, until it ends or `deadline` (of `time.monotonic`) is there.

        Raises:
            TimeoutError: It did not end before.
            RuntimeError: It failed; with the end of its log.
        """
        late = threading.Event()
        left = max(deadline - time.monotonic(), 0.1)
        timer = threading.Timer(left, lambda: (late.set(), self.close()))
        timer.start()
        try:
            for line in self.process.stdout:
                if line.startswith("RESULT "):
                    yield json.loads(line.removeprefix("RESULT "))
            status = self.process.wait()
        finally:
            timer.cancel()
        self.close()
        if late.is_set():
            raise TimeoutError("stopped: no time left")
        if status:
            said = self.log.read_text(errors="replace").strip()
            raise RuntimeError(f"exit status {status}: {said[-1500:]}")

    def close(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


@dataclass(frozen=True)
class Spec:
    """An engine.

    Attributes:
        kind: `base` (vLLM without the plugin), `PEDRO` or `LoRA`.
        slots: Adapters on the device at once.
        host: Adapters in host memory.
        modules: What the vector store has columns for; None for all five.
        sequences: Most at once.
        kv_gib: Size of the KV cache; 0 for what `gpu_memory_utilization` leaves.
        tuned: Folder of tuned LoRA kernel configurations; empty for vLLM's defaults.
        extra_gib: What it takes beside weights and KV cache, roughly.
    """

    name: str
    kind: str
    slots: int = 8
    host: int = 320
    modules: tuple[str, ...] | None = Q_V_UP
    sequences: int = 256
    kv_gib: float = 5.0
    tuned: str = ""
    extra_gib: float = 3.0

    def keywords(self) -> dict[str, Any]:
        """`LLM`'s, beside those that all engines have."""
        found: dict[str, Any] = {
            "max_num_seqs": self.sequences,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "distributed_executor_backend": "uni",  # core and worker in one process
            "worker_extension_cls": "gpu_engine.Clock",
            "seed": 0,
        }
        if self.kv_gib:
            found["kv_cache_memory_bytes"] = int(self.kv_gib * (1 << 30))
            found["gpu_memory_utilization"] = 0.05
        host = max(self.slots, self.host)
        if self.kind == "PEDRO":
            found |= {"enable_pedro": True, "max_pedros": self.slots, "max_cpu_pedros": host}
            if self.modules is not None:
                found["pedro_target_modules"] = list(self.modules)
        elif self.kind == "LoRA":
            found |= {"enable_lora": True, "max_loras": self.slots, "max_cpu_loras": host}
            found["max_lora_rank"] = 8
        return found


class Engine(Script):
    """A running engine process."""

    def __init__(self, spec: Spec, settings: dict[str, Any], adapters: Path, logs: Path) -> None:
        self.spec, self.is_up = spec, False
        environment = {"VLLM_TUNED_CONFIG_FOLDER": spec.tuned} if spec.tuned else {}
        if spec.kind != "PEDRO":
            environment["VLLM_PLUGINS"] = ""  # vLLM alone
        config = {"kind": spec.kind, "adapters": str(adapters)}
        config["settings"] = settings | spec.keywords()
        log = logs / f"{spec.name} {time.monotonic_ns()}.txt"
        super().__init__([__file__, json.dumps(config)], log, environment)

    def answer(self, deadline: float) -> dict[str, Any]:
        """What the process answers before `deadline`; first, when it has come up."""
        try:
            with contextlib.closing(self.rows(deadline)) as rows:
                found = next(rows, {"error": "it has ended"})
        except (RuntimeError, TimeoutError) as error:
            raise type(error)(f"{self.spec.name}: {error}") from None
        if "error" in found:
            raise RuntimeError(f"{self.spec.name}: {found['error']}")
        self.is_up = True
        return found

    def ask(self, do: str, deadline: float, **arguments: Any) -> dict[str, Any]:
        """Have a method of `Child` called."""
        with contextlib.suppress(OSError, ValueError):  # it has ended, which `answer` tells
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        return self.answer(deadline)


class Pool:
    """Engines that stay loaded from one part to the next, as long as the card has room.

    Attributes:
        weights_gib: Of each engine.
        room: GiB of the card for all of them.
    """

    def __init__(
        self, settings: dict[str, Any], adapters: Path, logs: Path, weights_gib: float, room: float
    ) -> None:
        self.start = lambda spec: Engine(spec, settings, adapters, logs)
        self.weights_gib, self.room = weights_gib, room
        self.engines: dict[Spec, Engine] = {}

    def fit(self, specs: Iterable[Spec]) -> bool:
        """Whether the card has room for them, roughly."""
        return sum(self.weights_gib + s.kv_gib + s.extra_gib for s in specs) <= self.room

    def groups(
        self, specs: list[Spec], deadline: float, meanwhile: Callable[[], Any]
    ) -> Iterator[tuple[list[Engine], list[dict[str, Any]]]]:
        """Engines that are on the card together, base first; and why others did not come up.

        Args:
            specs: The first is base, which is in each group.
            meanwhile: What to do while they start; others that are in their way are ended.
        """
        groups = [specs[:1]]
        for spec in specs[1:]:
            if len(groups[-1]) > 1 and not self.fit([*groups[-1], spec]):
                groups.append(specs[:1])
            groups[-1].append(spec)
        for group in groups:
            others = [spec for spec in self.engines if spec not in group]
            while others and not self.fit([*group, *others]):
                self.engines.pop(others.pop()).close()
            for spec in group:
                engine = self.engines.get(spec)
                if engine is None or engine.process.poll() is not None:
                    self.engines[spec] = self.start(spec)
            meanwhile()
            up, errors = [], []
            for spec in group:
                engine = self.engines[spec]
                try:
                    if not engine.is_up:
                        engine.answer(deadline)
                    up.append(engine)
                except (RuntimeError, TimeoutError) as error:
                    errors.append({"engine": spec.name, "error": str(error)})
                    self.engines.pop(spec).close()
            if not up or up[0].spec != specs[0]:
                raise RuntimeError(f"base did not come up: {errors}")
            yield up, errors

    def close(self) -> None:
        """End all of them."""
        while self.engines:
            self.engines.popitem()[1].close()


if __name__ == "__main__":
    main()
