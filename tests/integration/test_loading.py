"""Adapters are read beside the batch: a disk that is slow, or hangs, holds up nobody else."""

from __future__ import annotations

import threading
import time

import pytest
from scenarios import Queue, tokens

from vllm_pedro.serving.adapters import AdapterReader
from vllm_pedro.serving.loading import AdapterLoader

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


@pytest.fixture
def slow(monkeypatch):
    """Folders whose reads wait until the event is set."""
    folders: dict[str, threading.Event] = {}
    original = AdapterReader.read

    def read(self, spec):
        if spec.path in folders:
            folders[spec.path].wait()
        return original(self, spec)

    monkeypatch.setattr(AdapterReader, "read", read)
    yield folders
    for event in folders.values():
        event.set()


def busy_queue(llm, oracle, adapters):
    """Two rows decode, one of them with an adapter."""
    queue = Queue(llm, oracle)
    queue.load(adapters["other"])
    queue.add("base row", tokens(10), max_tokens=16)
    queue.add("row", tokens(11, 1), adapters["other"], max_tokens=16)
    queue.step(2)
    return queue


def test_others_start_and_decode_while_an_adapter_is_read(
    scheduling, tiny_engine, tiny_oracle, tiny_adapters, slow
):
    slow[str(tiny_adapters["last"])] = event = threading.Event()
    with tiny_engine(max_pedros=None, max_num_seqs=8, **scheduling) as llm:
        queue = busy_queue(llm, tiny_oracle, tiny_adapters)
        came = queue.step_number
        queue.add("slow", tokens(20, 2), tiny_adapters["last"])
        queue.add("slow too", tokens(9, 3), tiny_adapters["last"])
        queue.add("base", tokens(20, 4))
        queue.add("warm", tokens(20, 5), tiny_adapters["other"])
        queue.add("cold", tokens(20, 6), tiny_adapters["mean"])
        others = {"base row", "row", "base", "warm", "cold"}
        end = time.monotonic() + 120
        while not all(n in queue.outputs and queue.outputs[n].finished for n in others):
            queue.step()
            assert time.monotonic() < end
        assert {"slow", "slow too"}.isdisjoint(queue.first)
        # Asynchronous scheduling shows a step's tokens one step later.
        assert max(queue.first[name] - came for name in ("base", "warm")) <= 2
        event.set()
        queue.finish()
    assert queue.first["slow"] == queue.first["slow too"]


def test_what_is_read_on_its_way_to_the_scheduler_takes_no_step_more(
    scheduling, tiny_engine, tiny_oracle, tiny_adapters, monkeypatch
):
    monkeypatch.setattr("vllm_pedro.integration.scheduler.SETTLE_SECONDS", 10.0)
    with tiny_engine(max_pedros=None, max_num_seqs=8, **scheduling) as llm:
        queue = busy_queue(llm, tiny_oracle, tiny_adapters)
        came = queue.step_number
        queue.add("cold", tokens(20, 6), tiny_adapters["mean"])
        core = llm.llm_engine.engine_core.engine_core
        core.scheduler.pedro_bank.loader.settle(10)
        queue.add("base", tokens(20, 4))
        queue.finish()
        assert queue.first["cold"] - came == queue.first["base"] - came <= 2
        # Nothing runs: the step waits for them, and none begins alone.
        for name in ("last", "max"):
            queue.add(f"{name}, idle", tokens(20, 7), tiny_adapters[name])
        queue.finish()
        assert queue.first["last, idle"] == queue.first["max, idle"]


def test_a_read_that_hangs_ends_its_requests_only(
    scheduling, tiny_engine, tiny_oracle, tiny_adapters, slow, monkeypatch
):
    folder = tiny_adapters["last"]
    slow[str(folder)] = event = threading.Event()
    with tiny_engine(max_pedros=None, max_num_seqs=8, **scheduling) as llm:
        queue = busy_queue(llm, tiny_oracle, tiny_adapters)
        loader = llm.llm_engine.engine_core.engine_core.model_executor.driver_worker.worker
        monkeypatch.setattr(loader.model_runner.pedro.bank.loader, "limit", 0.3)
        for i in range(AdapterLoader.THREADS):
            queue.add(f"hangs {i}", tokens(20, i), folder)
        queue.add("base", tokens(20, 4))
        while queue.engine.has_unfinished_requests():
            queue.step()
        for i in range(AdapterLoader.THREADS):
            output = queue.outputs.pop(f"hangs {i}").outputs[0]
            assert queue.adapters.pop(f"hangs {i}") is folder
            assert (output.finish_reason, list(output.token_ids)) == ("error", [])
            assert "took more than 0.3 s: the disk or file server" in output.stop_reason
        event.set()
        queue.add("again", tokens(20, 8), folder)
        queue.finish()


def test_what_is_aborted_while_its_adapter_is_read_leaves_nothing(
    scheduling, tiny_engine, tiny_oracle, tiny_adapters, slow
):
    slow[str(tiny_adapters["last"])] = event = threading.Event()
    with tiny_engine(max_pedros=None, **scheduling) as llm:
        queue = Queue(llm, tiny_oracle)
        queue.add("gone", tokens(20), tiny_adapters["last"])
        queue.step(3)
        queue.engine.abort_request(["gone"])
        assert not queue.engine.has_unfinished_requests()
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        assert not scheduler._pedro_prefetches._wanted
        del queue.adapters["gone"]
        event.set()
        queue.add("next", tokens(20), tiny_adapters["last"])
        queue.finish()
