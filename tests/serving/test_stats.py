"""Counting."""

from __future__ import annotations

from vllm_pedro.serving.stats import MAX_SECONDS, AdapterStats, merge_stats


def test_counts_are_taken_once():
    stats = AdapterStats()
    assert stats.take() == {}
    stats.hits["device"] += 2
    stats.loaded("host", 0.5)
    assert stats.take() == {
        "hits": {"device": 2},
        "loads": {"host": 1},
        "seconds": {"host": [0.5]},
    }
    assert stats.take() == {}


def test_durations_are_bounded_where_nobody_takes_them():
    stats = AdapterStats()
    for _ in range(MAX_SECONDS + 5):
        stats.loaded("host", 0.1)
    assert stats.loads["host"] == MAX_SECONDS + 5
    total: dict = {}
    merge_stats(total, stats.take())
    merge_stats(total, {"seconds": {"host": [1.0]}})
    assert len(total["seconds"]["host"]) == MAX_SECONDS


def test_merging_adds_counts_and_replaces_states():
    total: dict = {}
    merge_stats(total, {"hits": {"host": 1}, "resident": {"host": 3}})
    merge_stats(total, {"hits": {"host": 2, "device": 1}, "resident": {"host": 2}})
    assert total == {"hits": {"host": 3, "device": 1}, "resident": {"host": 2}}
