"""The part of ``vllm-pedro bench`` that runs vLLM: one engine in a process of its own."""

from __future__ import annotations

import contextlib
import ctypes
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from multiprocessing.connection import Connection
from typing import Any

from .._import_hook import forget_hooks
from ..bench.driver import Progress, Timing, drive
from ..bench.engines import EngineSpec, Job
from ..bench.workloads import Request


def serve(pipe: Connection, spec: EngineSpec, log: str) -> None:
    """Start an engine, then run what comes down the pipe until it is told to close.

    The main function of the process that ``bench.engines.EngineProcess`` spawns. What vLLM prints
    goes to the file ``log``.
    """
    _end_with_parent()
    target = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
    os.dup2(target, 1)
    os.dup2(target, 2)
    # Core and worker in this process: its resident set is the engine's, and no other process is
    # left behind. Threads are not bound to cores, because several engines share them in turns.
    os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
    os.environ["VLLM_CPU_OMP_THREADS_BIND"] = "nobind"
    os.environ["OMP_NUM_THREADS"] = str(spec.threads)
    os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    engine = None
    try:
        engine = BenchEngine(spec)
        pipe.send(("ready", engine.facts))
        while True:
            command, value = pipe.recv()
            if command == "close":
                break
            if command == "peak":
                pipe.send(("peak", engine.peak_bytes()))
            else:
                pipe.send(("timings", engine.run(value, pipe)))
    except (EOFError, BrokenPipeError):
        pass  # the parent is gone
    except Exception as error:
        import traceback

        traceback.print_exc()
        sys.stderr.flush()
        text = str(error).strip()
        first = text.splitlines()[0] if text else ""
        pipe.send(("failed", f"{type(error).__name__}: {first}"))
    finally:
        pipe.close()
        if engine is not None:
            engine.shutdown()


def _end_with_parent() -> None:
    """An engine must not outlive a benchmark that was killed (Linux; elsewhere it ends when its
    run does)."""
    with contextlib.suppress(OSError, AttributeError):
        pr_set_pdeathsig = 1
        ctypes.CDLL(None).prctl(pr_set_pdeathsig, signal.SIGKILL)


class BenchEngine:
    """An ``LLM`` that is stepped by hand.

    Attributes:
        facts: ``import_s`` and ``engine_s`` (start-up), ``threads``, ``kv_blocks`` and
            ``kv_block_bytes``; with PEDRO ``sequence_bytes`` (vectors of one sequence),
            ``store_bytes`` and ``slot_bytes`` (the largest adapter on the device); with LoRA the
            last, too.
    """

    def __init__(self, spec: EngineSpec) -> None:
        started = time.perf_counter()
        import torch

        if spec.kind == "plain":
            os.environ["VLLM_PLUGINS"] = ""  # none is loaded
            forget_hooks()
        else:
            import vllm_pedro.integration.request

            self._pedro_request = vllm_pedro.integration.request.PedroRequest

        # isort: split
        import vllm
        from vllm import LLM

        imported = time.perf_counter()
        keywords: dict[str, Any] = {
            "distributed_executor_backend": "uni",
            "enforce_eager": not spec.compiled,
            "disable_log_stats": True,
            "use_tqdm_on_load": False,
            "seed": 0,
            **spec.settings,
        }
        if spec.kind == "pedro":
            from ..bench.adapters import MODULES, PEDRO_RANK

            keywords |= {
                "enable_pedro": True,
                "max_pedros": spec.slots,
                "max_cpu_pedros": max(spec.slots, spec.host_slots),
                "max_pedro_rank": PEDRO_RANK,
                "pedro_target_modules": list(MODULES),
            }
        elif spec.kind == "lora":
            from ..bench.adapters import LORA_RANK

            keywords |= {
                "enable_lora": True,
                "max_loras": spec.slots,
                "max_cpu_loras": max(spec.slots, spec.host_slots),
                "max_lora_rank": LORA_RANK,
            }
        self._spec = spec
        self._llm = LLM(**keywords)
        ready = time.perf_counter()
        if spec.kind == "plain" and "vllm_pedro.integration.patches" in sys.modules:
            raise RuntimeError("the engine that is to be vLLM alone has loaded the plugin")
        self._vocabulary = self._llm.llm_engine.model_config.get_vocab_size()
        self._prompts: list[list[int]] = []
        self._lora: list[Any] = []
        self._runs = 0
        self.facts: dict[str, Any] = {
            "import_s": imported - started,
            "engine_s": ready - imported,
            "vllm": vllm.__version__,
            "threads": torch.get_num_threads(),
            "compiled": not self._llm.llm_engine.model_config.enforce_eager,
            **self._memory(),
        }

    def run(self, job: Job, pipe: Connection) -> list[Timing]:
        """Run a workload and time it."""
        workload = job.workload
        # Made before the clock starts.
        self._prompts = [
            workload.prompt(index, self._vocabulary) for index in range(len(workload.requests))
        ]
        self._lora = [self._adapter(number, *pair) for number, pair in enumerate(job.adapters)]
        self._runs += 1
        self._llm.reset_prefix_cache()
        last = time.monotonic()

        def tell(tokens: int) -> None:
            nonlocal last
            if time.monotonic() - last > 0.5:
                last = time.monotonic()
                pipe.send(("progress", tokens))

        if workload.beam_width > 1:
            return self._beam_search(job)
        return drive(self, workload, tell=tell)

    def _adapter(self, number: int, name: str, folder: str) -> Any:
        if self._spec.kind == "pedro":
            return self._pedro_request(name, number + 1, folder)
        from vllm.lora.request import LoRARequest

        return LoRARequest(name, number + 1, folder)

    def add(self, index: int, request: Request) -> None:
        """Hand a request to vLLM."""
        from vllm import SamplingParams
        from vllm.sampling_params import RequestOutputKind

        params = SamplingParams(
            temperature=0.0,
            max_tokens=request.output_tokens,
            ignore_eos=True,
            detokenize=False,
            output_kind=RequestOutputKind.DELTA,
        )
        self._llm.llm_engine.add_request(
            f"{self._runs}-{index}",
            {"prompt_token_ids": self._prompts[index]},
            params,
            lora_request=None if request.tenant is None else self._lora[request.tenant],
        )

    def step(self) -> Sequence[Progress]:
        """One step of vLLM."""
        progress = []
        for output in self._llm.llm_engine.step():
            index = int(output.request_id.partition("-")[2])
            new = sum(len(c.token_ids) for c in output.outputs)
            progress.append(Progress(index, new, output.finished))
        return progress

    def _beam_search(self, job: Job) -> list[Timing]:
        """All requests at once. vLLM's beam search tells nothing before its end."""
        from vllm.sampling_params import BeamSearchParams

        workload = job.workload
        # One length for all is what beam_search takes; groups of a length run one after the other.
        groups: dict[int, list[int]] = {}
        for index, request in enumerate(workload.requests):
            groups.setdefault(request.output_tokens, []).append(index)
        timings = [Timing(r.tenant, r.prompt_tokens, 0.0) for r in workload.requests]
        start = time.perf_counter()
        for length, members in groups.items():
            tenants = [workload.requests[i].tenant for i in members]
            adapters = [None if t is None else self._lora[t] for t in tenants]
            self._llm.beam_search(
                [{"prompt_token_ids": self._prompts[i]} for i in members],
                BeamSearchParams(
                    beam_width=workload.beam_width, max_tokens=length, ignore_eos=True
                ),
                lora_request=adapters if any(adapters) else None,
            )
            end = time.perf_counter() - start
            for i in members:
                timings[i].tokens = [end] * length
        return timings

    def shutdown(self) -> None:
        """End vLLM's part of the process."""
        self._llm.llm_engine.engine_core.shutdown()

    def _memory(self) -> dict[str, Any]:
        return dict(self._llm.collective_rpc(_worker_memory)[0])

    def peak_bytes(self) -> dict[str, int]:
        """Highest memory use of this process so far."""
        import torch

        peak = {"host": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024}
        if torch.cuda.is_available():
            peak["device"] = torch.cuda.max_memory_allocated()
        return peak


def _worker_memory(worker: Any) -> dict[str, Any]:
    """What the worker has set aside for KV cache and adapters, in bytes."""
    runner = worker.model_runner
    blocks = worker.cache_config.num_gpu_blocks
    kv = sum(t.numel() * t.element_size() for t in _tensors(runner.kv_caches))
    facts: dict[str, Any] = {"kv_blocks": blocks}
    if blocks:
        facts["kv_block_bytes"] = kv // blocks
    pedro = getattr(runner, "pedro", None)
    if pedro is not None:
        rows = pedro.store.vectors[0].shape[0]
        facts["store_bytes"] = pedro.store.nbytes
        facts["sequence_bytes"] = pedro.store.nbytes // rows
        facts["slot_bytes"] = pedro.bank.reader.limits.largest_blob
    loras = [
        tensor
        for module in runner.get_model().modules()
        for name in ("lora_a_stacked", "lora_b_stacked")
        for tensor in _tensors(getattr(module, name, ()))
    ]
    if loras:
        slots = loras[0].shape[0]
        facts["slot_bytes"] = sum(t.numel() * t.element_size() for t in loras) // slots
    return facts


def _tensors(value: Any) -> list[Any]:
    """The tensors in nested tuples and lists."""
    if hasattr(value, "element_size"):
        return [value]
    return [t for item in value for t in _tensors(item)] if isinstance(value, list | tuple) else []
