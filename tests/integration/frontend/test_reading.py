"""A front end reads folders beside its requests; one that hangs fails its own after a limit."""

from __future__ import annotations

import asyncio
import os
import threading

import pytest
from banks import LIMITS, write
from hub import fake_hub, use_hub

from vllm_pedro.adapter import load_adapter
from vllm_pedro.errors import AdapterError
from vllm_pedro.integration.frontend import registry
from vllm_pedro.integration.frontend.registry import (
    AdapterRegistry,
    locate_in_time,
    read_in_time,
)
from vllm_pedro.integration.request import PedroRequest


@pytest.fixture
def hanging(monkeypatch):
    """Reads wait until the event is set."""
    event, original = threading.Event(), registry.verify_adapter

    def verify(*args, **keywords):
        event.wait()
        return original(*args, **keywords)

    monkeypatch.setattr(registry, "verify_adapter", verify)
    yield event
    event.set()


def test_a_folder_is_read(tmp_path):
    spec = write(tmp_path / "a")
    known = asyncio.run(read_in_time(AdapterRegistry(LIMITS), spec.path))
    assert known.digest == spec.digest


def test_what_is_wrong_with_a_folder_is_said(tmp_path):
    with pytest.raises(AdapterError, match="expected an adapter folder"):
        asyncio.run(read_in_time(AdapterRegistry(LIMITS), str(tmp_path / "none")))


def test_a_read_that_hangs_fails_and_others_go_on(tmp_path, hanging, monkeypatch):
    monkeypatch.setattr(registry, "READ_SECONDS", 0.2)
    monkeypatch.setattr(registry, "_reads", threading.BoundedSemaphore(2))
    known, spec = AdapterRegistry(LIMITS), write(tmp_path / "a")

    async def ask():
        outcomes = await asyncio.gather(
            *(read_in_time(known, spec.path) for _ in range(3)), return_exceptions=True
        )
        hanging.set()
        while not registry._reads.acquire(blocking=False):
            await asyncio.sleep(0.01)
        registry._reads.release()
        monkeypatch.setattr(registry, "READ_SECONDS", 30)
        return outcomes, await read_in_time(known, spec.path)

    outcomes, found = asyncio.run(ask())
    reasons = sorted(str(outcome).partition(": ")[2] for outcome in outcomes)
    assert reasons[0].startswith("not read, as 64 reads of adapters")
    assert all("took more than 0.2 s: the disk or file server" in r for r in reasons[1:])
    assert found.digest == spec.digest


def test_a_folder_that_hangs_does_not_hold_up_who_asks(tmp_path, hanging, monkeypatch):
    """Where a request names a folder itself, and nobody has loaded it."""
    monkeypatch.setattr(registry, "READ_SECONDS", 0.2)
    known, spec = AdapterRegistry(LIMITS), write(tmp_path / "a")
    with pytest.raises(AdapterError, match=r"took more than 0\.2 s"):
        known.lookup(spec.path)
    hanging.set()
    assert known.lookup(spec.path).digest == spec.digest


def test_a_file_that_is_rewritten_with_its_old_time_is_read_again(tmp_path):
    known, old = AdapterRegistry(LIMITS), write(tmp_path / "a", seed=0)
    assert known.lookup(old.path).digest == old.digest
    files = [tmp_path / "a" / name for name in os.listdir(tmp_path / "a")]
    new = write(tmp_path / "b", seed=1)
    for file in files:
        before = file.stat()
        file.write_bytes((tmp_path / "b" / file.name).read_bytes())
        os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))
        assert file.stat().st_mtime_ns == before.st_mtime_ns
    assert known.lookup(old.path).digest == new.digest != old.digest


def test_requests_for_one_repository_fetch_it_once(tmp_path, monkeypatch):
    """However many come before it is there: no more than `MAX_READS` are under way at a time."""
    known, spec = AdapterRegistry(LIMITS), write(tmp_path / "a")
    request = PedroRequest("a", 1, "org/name")

    async def ask():
        many = (locate_in_time(known, request) for _ in range(2 * registry.MAX_READS))
        first = asyncio.create_task(locate_in_time(known, request))
        rest = asyncio.gather(*many)
        await asyncio.sleep(0.05)
        first.cancel()  # one who gives up takes it from nobody
        hub.goes_on.set()
        return await rest

    with fake_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        hub.commit("org/name", tmp_path / "a")
        hub.goes_on.clear()
        found = asyncio.run(ask())
        assert len(hub.downloads()) == 2
        for _ in range(2):  # what failed is tried again
            with pytest.raises(AdapterError, match="the repository has no such revision"):
                asyncio.run(locate_in_time(known, PedroRequest("a", 1, "org/name@v9")))
    assert {load_adapter(one.lora_path).digest for one in found} == {spec.digest}


def test_a_hub_that_hangs_fails_its_own_after_a_limit(tmp_path, monkeypatch):
    monkeypatch.setattr(registry, "FETCH_SECONDS", 0.3)
    known, spec = AdapterRegistry(LIMITS), write(tmp_path / "a")
    request = PedroRequest("a", 1, "org/name@v1")
    with fake_hub() as hub:
        use_hub(monkeypatch, hub.url, tmp_path / "cache")
        hub.commit("org/name", tmp_path / "a", "v1")
        hub.goes_on.clear()
        late = (
            r"^org/name@v1: downloading the adapter took more than 0\.3 s: the hub does not answer$"
        )
        with pytest.raises(AdapterError, match=late):
            known.locate(request.lora_path)
        with pytest.raises(AdapterError, match=late):
            asyncio.run(locate_in_time(known, request))
        hub.goes_on.set()
        monkeypatch.setattr(registry, "FETCH_SECONDS", 30)
        found = asyncio.run(locate_in_time(known, request))
        assert load_adapter(found.lora_path).digest == spec.digest
        hub.asked.clear()
        assert known.locate(request.lora_path) == found.lora_path
        assert not hub.asked  # once in a process
