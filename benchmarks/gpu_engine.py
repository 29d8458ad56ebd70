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
import queue
import signal
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

GIB = 1 << 30
Q_V_UP = ("q_proj", "v_proj", "up_proj")


# In the core's process ---------------------------------------------------------------------------


class _Log:
    """What the clock has noted: of one run, whose requests' names begin with `<run>-`.

    steps: `(seconds, rows that got a token)`, seconds by the clock that all processes share.
    kernels: `(name, microseconds, calls)` over `profiled` steps.
    """

    def __init__(self, run: int = -1, rows: int = 0, profile: int = 0) -> None:
        self.run, self.profile = run, profile
        self.unseen = set(range(rows))
        self.steps: list[tuple[float, list[int]]] = []
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
        if self.profile and self.steady == 8:
            self.start_profiler()
        elif self.profile and self.steady == 8 + self.profile:
            self.stop_profiler()

    def start_profiler(self) -> None:
        import torch

        kinds = torch.profiler.ProfilerActivity
        on_gpu = torch.cuda.is_available()
        if on_gpu:  # the step that is already on its way belongs to what came before
            torch.cuda.synchronize()
        self.profiler = torch.profiler.profile(activities=[kinds.CUDA if on_gpu else kinds.CPU])
        self.profiler.__enter__()

    def stop_profiler(self) -> None:
        import torch

        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.profiler.__exit__(None, None, None)
        side = "device" if torch.cuda.is_available() else "cpu"
        for event in self.profiler.key_averages():
            if spent := getattr(event, f"self_{side}_time_total"):
                self.kernels.append((event.key, spent, event.count))


_log = _Log()


class Clock:
    """Mixed into vLLM's worker by `worker_extension_cls`; called by `LLM.collective_rpc`."""

    def clock_start(self, run: int, rows: int, profile: int) -> None:
        """Forget what was noted; profile so many steps once all rows have had a token."""
        from vllm.v1.core.sched.scheduler import Scheduler

        global _log
        _log = _Log(run, rows, profile)
        inner = Scheduler.update_from_output
        if hasattr(inner, "without_clock"):
            return

        def update_from_output(scheduler: Any, planned: Any, output: Any) -> Any:
            _log.note(output)
            return inner(scheduler, planned, output)

        update_from_output.without_clock = inner
        Scheduler.update_from_output = update_from_output

    def clock_read(self) -> dict[str, Any]:
        """What was noted since the start."""
        return {"steps": _log.steps, "kernels": _log.kernels}

    def clock_memory(self) -> dict[str, Any]:
        """KV blocks, and what PEDRO keeps on the device, in bytes."""
        facts = {"kv blocks": self.cache_config.num_gpu_blocks}
        facts["block tokens"] = self.cache_config.block_size
        if (pedro := getattr(self.model_runner, "pedro", None)) is not None:
            facts |= {"store bytes": pedro.store.nbytes, "adapters bytes": pedro.bank.nbytes}
        return facts


def decode_rate(steps: list[tuple[float, list[int]]], rows: int, tokens: int) -> dict[str, Any]:
    """Tokens a second, from the first token of all rows to the end of the first row.

    Args:
        steps: What the clock noted; rows from `rows` on arrived later and do not count.
        rows: How many rows decode together.
        tokens: How many each is to make.

    Returns:
        `tokens/s`, `step ms` (median), `steps`, and `gaps`: seconds between the tokens of
        a row, over all rows.
    """
    counts, last = [0] * rows, [0.0] * rows
    missing, window, made, gaps = rows, [], 0, []
    for moment, got in steps:
        ours = [row for row in got if row < rows]
        for row in ours:
            missing -= not counts[row]
            counts[row] += 1
        if not ours or missing:
            for row in ours:
                last[row] = moment
            continue
        if window:
            made += len(ours)
            gaps += [moment - last[row] for row in ours]
        for row in ours:
            last[row] = moment
        window.append(moment)
        if max(counts) >= tokens:
            break
    if len(window) < 4:
        raise RuntimeError(f"{rows} rows decoded together in {len(window)} steps only")
    between = [b - a for a, b in itertools.pairwise(window)]
    return {
        "tokens/s": made / (window[-1] - window[0]),
        "step ms": 1e3 * statistics.median(between),
        "steps": len(between),
        "gaps": gaps,
    }


# The process -------------------------------------------------------------------------------------


class Child:
    """An engine, and what it can be told to do."""

    def __init__(self, config: dict[str, Any]) -> None:
        if config["kind"] == "PEDRO":
            import vllm_pedro  # noqa: F401  (teaches LLM its keywords)
        from vllm import LLM

        started = time.perf_counter()
        self.config, self.runs = config, 0
        self.llm = LLM(**config["settings"])
        self.vocabulary = self.llm.llm_engine.model_config.get_vocab_size()
        self.facts = {"start s": time.perf_counter() - started}
        self.facts |= self.llm.collective_rpc("clock_memory")[0]

    def add(self, row: int, tenant: int, prompt: int, tokens: int) -> str:
        """Hand in a request with `prompt` tokens that no other request has had."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        adapter, kind = None, self.config["kind"]
        if kind != "base":
            if kind == "PEDRO":
                from vllm_pedro import PedroRequest as Request
            else:
                from vllm.lora.request import LoRARequest as Request
            path = f"{self.config['adapters']}/{kind.lower()}-{tenant:05d}"
            adapter = Request(f"t{tenant}", tenant + 1, path)
        name = f"{self.runs}-{row}"
        start = 7919 * (row + 1) + 97 * self.runs
        params = SamplingParams(
            temperature=0.0,
            max_tokens=tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self.llm.llm_engine.add_request(
            name,
            {"prompt_token_ids": [(start + 31 * t) % self.vocabulary for t in range(prompt)]},
            params,
            lora_request=adapter,
        )
        return name

    def run(
        self,
        tenants: list[int],
        prompt: int,
        tokens: int,
        seconds: float | None = None,
        arrivals: dict[str, Any] | None = None,
        profile: int = 0,
    ) -> tuple[float, dict[str, Any]]:
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
                while (
                    arrivals
                    and not done
                    and now > together + arrivals["every"] * (len(names) - len(tenants))
                ):
                    turn = arrivals["tenants"][len(names) % len(arrivals["tenants"])]
                    names.append(self.add(len(names), turn, arrivals["prompt"], 1))
        finally:  # after an error too: the next run must not find them
            engine.abort_request(names)
        return began, self.llm.collective_rpc("clock_read")[0]

    def decode(self, **case: Any) -> dict[str, Any]:
        """Steady decode."""
        _, log = self.run(**case)
        found = decode_rate(log["steps"], len(case["tenants"]), case["tokens"])
        gaps = sorted(found.pop("gaps"))
        found |= {"gap ms": 1e3 * statistics.median(gaps), "gap max ms": 1e3 * gaps[-1]}
        found["gap p99 ms"] = 1e3 * gaps[int(0.99 * (len(gaps) - 1))]
        if case.get("profile"):
            found["kernels"] = log["kernels"]
        return found

    def first(self, turns: list[list[int]], prompt: int) -> dict[str, Any]:
        """Milliseconds until all of a turn's prompts have had their first token; the median."""
        passed = []
        for tenants in turns:
            began, log = self.run(tenants, prompt, 1)
            passed.append(1e3 * (log["steps"][-1][0] - began))
        return {"ms": statistics.median(passed)}


def main() -> None:
    """Start an engine, then obey lines of JSON until there are no more."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what vLLM prints is for the log
    config = json.loads(sys.argv[1])

    def answer(found: dict[str, Any]) -> None:
        answers.write(json.dumps(found) + "\n")
        answers.flush()

    child = Child(config)
    answer(child.facts)
    for line in sys.stdin:
        command = json.loads(line)
        try:
            answer(getattr(child, command.pop("do"))(**command))
        except Exception as error:
            import traceback

            traceback.print_exc()
            answer({"error": f"{type(error).__name__}: {error}"})
    child.llm.llm_engine.engine_core.shutdown()


# The process that commands -----------------------------------------------------------------------


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


class Engine:
    """A running engine process. One that does not answer in time is ended."""

    def __init__(self, spec: Spec, settings: dict[str, Any], adapters: Path, log: Path) -> None:
        self.spec, self.log = spec, log
        mine: dict[str, Any] = {
            "max_num_seqs": spec.sequences,
            "max_num_batched_tokens": 2048,
            "enable_prefix_caching": False,
            "skip_tokenizer_init": True,
            "disable_log_stats": True,
            "distributed_executor_backend": "uni",  # core and worker in one process
            "worker_extension_cls": "gpu_engine.Clock",
            "seed": 0,
        }
        if spec.kv_gib:
            mine |= {
                "kv_cache_memory_bytes": int(spec.kv_gib * GIB),
                "gpu_memory_utilization": 0.05,
            }
        host = max(spec.slots, spec.host)
        if spec.kind == "PEDRO":
            mine |= {"enable_pedro": True, "max_pedros": spec.slots, "max_cpu_pedros": host}
            if spec.modules is not None:
                mine["pedro_target_modules"] = list(spec.modules)
        elif spec.kind == "LoRA":
            mine |= {"enable_lora": True, "max_lora_rank": 8}
            mine |= {"max_loras": spec.slots, "max_cpu_loras": host}
        environment = dict(os.environ)
        if spec.kind != "PEDRO":
            environment["VLLM_PLUGINS"] = ""  # vLLM alone
        if spec.tuned:
            environment["VLLM_TUNED_CONFIG_FOLDER"] = spec.tuned
        config = {"kind": spec.kind, "adapters": str(adapters), "settings": {**settings, **mine}}
        with open(log, "w") as output:
            self.process = subprocess.Popen(
                [sys.executable, __file__, json.dumps(config)],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=output,
                env=environment,
                text=True,
                start_new_session=True,
            )
        self.answers: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        for line in self.process.stdout or ():
            self.answers.put(line)
        self.answers.put(None)

    def answer(self, deadline: float) -> dict[str, Any]:
        """What the process answers before `deadline` (of `time.monotonic`)."""
        try:
            line = self.answers.get(timeout=max(deadline - time.monotonic(), 0.1))
        except queue.Empty:
            self.close()
            raise TimeoutError(f"{self.spec.name}: no answer in time") from None
        if line is None:
            self.close()
            said = self.log.read_text(errors="replace").strip().splitlines()[-12:]
            raise RuntimeError(f"{self.spec.name} ended:\n" + "\n".join(said))
        found = json.loads(line)
        if "error" in found:
            raise RuntimeError(f"{self.spec.name}: {found['error']}")
        return found

    def ask(self, do: str, deadline: float, **arguments: Any) -> dict[str, Any]:
        """Have a method of `Child` called."""
        if not self.runs:
            raise RuntimeError(f"{self.spec.name} has ended")
        with contextlib.suppress(BrokenPipeError):
            self.process.stdin.write(json.dumps({"do": do, **arguments}) + "\n")
            self.process.stdin.flush()
        return self.answer(deadline)

    @property
    def runs(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        """End the process and those that it started."""
        with contextlib.suppress(OSError):
            self.process.stdin.close()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(1)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()


class Pool:
    """Engines that stay loaded from one part to the next, as long as the card has room."""

    def __init__(
        self, settings: dict[str, Any], adapters: Path, logs: Path, weights_gib: float, room: float
    ) -> None:
        self.settings, self.adapters, self.logs = settings, adapters, logs
        self.weights_gib, self.room = weights_gib, room
        self.engines: dict[Spec, Engine] = {}

    def gib(self, spec: Spec) -> float:
        """What an engine takes of the card, roughly."""
        return self.weights_gib + spec.kv_gib + spec.extra_gib

    def groups(self, specs: list[Spec]) -> list[list[Spec]]:
        """Engines that fit on the card together, each group led by the first one, base."""
        found = [specs[:1]]
        for spec in specs[1:]:
            if sum(map(self.gib, [*found[-1], spec])) > self.room and len(found[-1]) > 1:
                found.append(specs[:1])
            found[-1].append(spec)
        return found

    def start(self, specs: list[Spec]) -> None:
        """Have these run; others are ended where they would be in the way."""
        wanted = {spec: self.engines.get(spec) for spec in specs}
        others = [spec for spec in self.engines if spec not in wanted]
        while others and sum(map(self.gib, [*wanted, *others])) > self.room:
            self.engines.pop(others.pop()).close()
        for number, spec in enumerate(specs):
            if wanted[spec] is None or not wanted[spec].runs:
                log = self.logs / f"{spec.name} {time.monotonic_ns()} {number}.txt"
                self.engines[spec] = Engine(spec, self.settings, self.adapters, log)
                self.engines[spec].facts = None

    def ready(self, specs: list[Spec], deadline: float) -> tuple[list[Engine], dict[str, str]]:
        """Those that came up, and why others did not, by name."""
        up, failed = [], {}
        for spec in specs:
            engine = self.engines[spec]
            try:
                if engine.facts is None:
                    engine.facts = engine.answer(deadline)
                up.append(engine)
            except (RuntimeError, TimeoutError) as error:
                failed[spec.name] = str(error)
                del self.engines[spec]
        return up, failed

    def close(self) -> None:
        """End all of them."""
        while self.engines:
            self.engines.popitem()[1].close()


if __name__ == "__main__":
    main()
