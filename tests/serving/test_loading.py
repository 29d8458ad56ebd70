import threading
import time
from dataclasses import replace

import pytest
import torch
from banks import CPU, LIMITS, reader, write

from vllm_pedro.errors import AdapterError
from vllm_pedro.ops.layout import read_record
from vllm_pedro.serving.adapters import AdapterBank, AdapterReader
from vllm_pedro.serving.loading import AdapterLoader, Prefetches
from vllm_pedro.serving.spec import RequestSpec


class Disk:
    """A disk on which some folders do not answer until they are let go."""

    def __init__(self, limit=30.0):
        real = reader()
        self.hanging: dict[str, threading.Event] = {}
        self.reads: list[str] = []

        def read(path, *args, **keywords):
            self.reads.append(path)
            if path in self.hanging:
                self.hanging[path].wait()
            return real._load(path, *args, **keywords)

        self.reader = AdapterReader(LIMITS, real._columns, read)
        self.loader = AdapterLoader(self.reader, limit=limit)

    def hang(self, *specs):
        for spec in specs:
            self.hanging[spec.path] = threading.Event()

    def let_go(self):
        for event in self.hanging.values():
            event.set()


@pytest.fixture
def disk():
    disk = Disk()
    yield disk
    disk.let_go()


def until(condition, seconds=10.0):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.002)


def test_what_was_asked_for_is_read_once_and_reported_once(tmp_path, disk):
    specs = [write(tmp_path / str(i), seed=i) for i in range(6)]
    for spec in [*specs, *specs]:
        disk.loader.ask(spec)
    until(lambda: not disk.loader.is_busy)
    assert sorted(disk.reads) == sorted(spec.path for spec in specs)
    assert sorted(s.path for s, ok in disk.loader.finished() if ok) == sorted(disk.reads)
    assert disk.loader.finished() == []
    # As it is read in place.
    bank, own = (AdapterBank(2 * LIMITS.largest_blob, r, CPU) for r in (disk.reader, reader()))
    bank.loader = disk.loader
    bank.make_resident(specs[3], ())
    own.make_resident(specs[3], ())
    assert len(disk.reads) == 6
    for layer in range(LIMITS.shape.num_layers):
        records = [read_record(b.arena, b.place_of(specs[3].digest), layer) for b in (bank, own)]
        for one, other in zip(*records, strict=True):
            same = one.equal(other) if isinstance(one, torch.Tensor) else one == other
            assert same


def test_hints_are_followed_while_little_is_read(tmp_path, disk):
    written = (write(tmp_path / str(i), seed=i) for i in range(AdapterLoader.MAX_HINTS + 2))
    specs = [replace(spec, nbytes=LIMITS.largest_blob) for spec in written]
    bank = AdapterBank(4 * LIMITS.largest_blob, disk.reader, CPU)
    disk.hang(specs[0])
    for spec in [*specs[:3], *specs[:3]]:  # half of the arena
        bank.hint(spec)
    until(lambda: bank.is_at_hand(specs[1]))
    assert sorted(disk.reads) == [spec.path for spec in specs[:2]]
    assert not bank.is_at_hand(specs[0])
    assert bank.collect(()) == {specs[1].digest: True}
    assert bank.is_at_hand(specs[1])  # on the device
    bank.hint(specs[1])
    assert len(disk.reads) == 2
    disk.let_go()
    loader = AdapterLoader(disk.reader)
    for number in range(loader.MAX_HINTS):  # those that failed do not count
        loader.hint(replace(specs[0], path=str(tmp_path / f"gone {number}")), 1 << 40)
    until(lambda: not loader.is_busy)
    for spec in specs[1:]:
        loader.hint(spec, 1 << 40)
    until(lambda: not loader.is_busy)
    assert [loader.has(spec) for spec in specs[1:]] == [True] * loader.MAX_HINTS + [False]


def test_a_step_settles_for_reads_that_have_just_begun(tmp_path, disk):
    specs = [write(tmp_path / str(i), seed=i) for i in range(3)]
    for spec in specs[:2]:
        disk.loader.ask(spec)
    disk.loader.settle(10)
    assert all(disk.loader.has(spec) for spec in specs[:2])
    disk.hang(specs[2])
    disk.loader.ask(specs[2])
    start = time.monotonic()
    disk.loader.settle(0.1)
    disk.loader.settle(0.1)  # it began longer ago
    assert 0.05 < time.monotonic() - start < 0.19


def test_a_wait_ends_with_an_outcome(tmp_path, disk):
    disk.loader.wait(5)  # for nothing
    spec = write(tmp_path / "a")
    disk.hang(spec)
    disk.loader.ask(spec)
    start = time.monotonic()
    disk.loader.wait(0.05)
    assert disk.loader.finished() == []
    threading.Timer(0.1, disk.let_go).start()
    disk.loader.wait(20)
    assert 0.05 <= time.monotonic() - start < 10
    assert disk.loader.finished() == [(spec, True)]


def test_what_cannot_be_read_says_why_and_is_read_again_when_asked_again(tmp_path, disk):
    spec = write(tmp_path / "a")
    (tmp_path / "a").rename(tmp_path / "b")
    disk.loader.ask(spec)
    until(lambda: not disk.loader.is_busy)
    assert disk.loader.finished() == [(spec, False)]
    for _ in range(2):
        with pytest.raises(AdapterError, match="expected an adapter folder"):
            disk.loader.take(spec)
    assert len(disk.reads) == 1
    (tmp_path / "b").rename(tmp_path / "a")
    disk.loader.ask(spec)
    assert disk.loader.take(spec).path == spec.path


def test_the_same_content_in_a_folder_that_is_still_there_is_read_from_it(tmp_path, disk):
    gone, there = write(tmp_path / "a"), write(tmp_path / "b")
    assert gone.digest == there.digest
    (tmp_path / "a").rename(tmp_path / "c")
    disk.loader.ask(gone)
    until(lambda: not disk.loader.is_busy)
    assert disk.loader.take(there).path == there.path


def test_reads_that_hang_hold_up_no_others_and_fail(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(AdapterLoader, "SLOW", 0.05)
    hanging = [write(tmp_path / f"h{i}", seed=i) for i in range(2 * AdapterLoader.THREADS)]
    good = write(tmp_path / "good", seed=99)
    disk.hang(*hanging)
    for spec in [*hanging, good]:
        disk.loader.ask(spec)
    assert disk.loader.take(good).path == good.path
    disk.loader.limit = 0.2
    with pytest.raises(AdapterError, match=r"h0: .* more than 0.2 s: the disk .* does not answer"):
        disk.loader.take(hanging[0])
    disk.let_go()
    until(lambda: disk.loader._threads == 0)
    with pytest.raises(AdapterError, match="does not answer"):  # not what came too late
        disk.loader.take(hanging[0])
    disk.loader.ask(hanging[0])
    assert disk.loader.take(hanging[0]).path == hanging[0].path


def test_where_every_thread_hangs_further_loads_fail_at_once(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(AdapterLoader, "SLOW", 0.01)
    monkeypatch.setattr(AdapterLoader, "MAX_THREADS", 3)
    disk.loader.limit = 0.1
    specs = [write(tmp_path / str(i), seed=i) for i in range(5)]
    disk.hang(*specs)
    for spec in specs[:3]:
        disk.loader.ask(spec)
    for spec in specs[:3]:
        with pytest.raises(AdapterError, match="does not answer"):
            disk.loader.take(spec)
    with pytest.raises(AdapterError, match="as 3 reads of adapters hang"):
        disk.loader.take(specs[4])
    disk.let_go()
    until(lambda: disk.loader._threads == 0)
    disk.loader.ask(specs[4])
    assert disk.loader.take(specs[4]).path == specs[4].path


def test_outcomes_that_nobody_takes_are_dropped(tmp_path, disk, monkeypatch):
    monkeypatch.setattr(AdapterLoader, "MAX_OUTCOMES", 3)
    for i in range(8):
        disk.loader.ask(write(tmp_path / str(i), seed=i))
        until(lambda: not disk.loader.is_busy)
        disk.loader.finished()
    assert len(disk.loader._loads) <= 3


def spec(name, nbytes=10, prompt="prompt"):
    return RequestSpec(name, f"/{name}", name, 5, prompt, nbytes=nbytes)


def test_each_adapter_is_asked_for_once_and_its_requests_wait_for_it():
    asked = Prefetches(100)
    asked.want("1", spec("a"))
    asked.want("2", spec("a"))
    asked.want("3", spec("b"))
    assert [s.digest for s in asked.take()] == ["a", "b"]
    assert asked.take() == []
    assert not asked.is_due("1", spec("a"))
    asked.report({"a": True}, [])
    assert asked.is_due("1", spec("a"))
    assert asked.is_due("2", spec("a"))
    assert asked.is_due("new", spec("a"))
    assert not asked.is_due("3", spec("b"))


def test_a_request_that_nobody_announced_is_known_when_its_turn_comes():
    asked = Prefetches(100)
    assert not asked.is_due("1", spec("a"))
    assert [s.digest for s in asked.take()] == ["a"]


@pytest.mark.parametrize("limits", [{"max_bytes": 25}, {"max_bytes": 1000, "max_adapters": 2}])
def test_only_so_many_are_on_their_way_until_steps_read_them(limits):
    asked = Prefetches(**limits)
    for name in "abcd":
        asked.want(name, spec(name))
    assert [s.digest for s in asked.take()] == ["a", "b"]
    asked.report({"a": True, "b": True}, [])
    assert asked.take() == []
    asked.forget("b")
    assert [s.digest for s in asked.take()] == ["c"]


def test_one_that_is_larger_than_all_may_be_is_asked_for_alone():
    asked = Prefetches(25)
    asked.want("1", spec("a", 40))
    asked.want("2", spec("b"))
    assert [s.digest for s in asked.take()] == ["a"]
    asked.forget("1")
    assert [s.digest for s in asked.take()] == ["b"]


def test_one_that_was_put_out_is_asked_for_again_but_not_for_ever():
    asked = Prefetches(100)
    asked.want("1", spec("a"))
    attempts = 0
    while not asked.is_due("1", spec("a")):
        assert len(asked.take()) == 1
        asked.report({"a": True}, ["a"])
        attempts += 1
    assert attempts == Prefetches.MAX_ATTEMPTS + 1


def test_a_worker_that_does_not_answer_is_asked_again(monkeypatch):
    asked = Prefetches(100)
    asked.want("1", spec("a"))
    assert len(asked.take()) == 1
    assert not asked.is_due("1", spec("a"))
    assert not asked.take()
    monkeypatch.setattr(Prefetches, "PATIENCE", 0.0)
    assert not asked.is_due("1", spec("a"))
    assert len(asked.take()) == 1
    asked.report({spec("a").digest: True}, [])
    assert asked.is_due("1", spec("a"))


def test_what_failed_is_let_through_and_asked_for_again_for_who_comes_later():
    asked = Prefetches(100)
    asked.want("1", spec("a"))
    asked.take()
    asked.report({"a": False}, [])
    assert asked.is_due("1", spec("a"))
    asked.want("2", spec("a"))
    assert not asked.is_due("2", spec("a"))
    assert [s.digest for s in asked.take()] == ["a"]


def test_a_request_whose_name_got_other_content_waits_for_that():
    asked = Prefetches(100)
    asked.want("1", spec("a"))
    asked.take()
    asked.want("1", spec("b"))
    assert [s.digest for s in asked.take()] == ["b"]
    asked.report({"a": True}, [])
    assert not asked.is_due("1", spec("b"))
    asked.forget("1")
    assert not asked._wanted
    assert not asked._digests


def test_a_running_requests_adapter_is_asked_for_whatever_others_are():
    """Those that were asked for may wait for the place in the batch that it has."""
    asked = Prefetches(25)
    for name in "abc":
        asked.want(name, spec(name))
    first = [s.digest for s in asked.take()]
    assert "c" not in first
    assert not asked.is_due("c", spec("c"))
    assert asked.take() == []
    assert not asked.is_due("c", spec("c"), is_urgent=True)
    assert [s.digest for s in asked.take()] == ["c"]
    assert asked.take() == []
