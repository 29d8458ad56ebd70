"""The schedule fuzzer: a fixed sample that has to pass, and proof that it would notice."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import schedule_fuzz
from runners import current_runner
from schedule_fuzz import ADAPTERS, Workshop, format_report, run

pytestmark = pytest.mark.engine


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("fuzz")


@pytest.mark.both_runners
def test_sample(folder):
    if current_runner() == "v1":
        report = run(folder, cases=100)
    else:
        # Seconds a case in Triton's interpreter: the first few of two engines, of a seed in which
        # these meet everything that is looked for.
        report, second = (run(folder, cases=6, seed=434, first=first) for first in (0, 10))
        report.failures += second.failures
        report.events += second.events
        report.near_ties += second.near_ties
        report.checked_tokens += second.checked_tokens
        assert second.settings["async_scheduling"]["True"]
        assert second.settings["operators"]["triton"]
        assert second.settings["speculative_config"]
        assert "speculative_config" not in report.settings
        assert report.events["adapter folders taken away"]
        assert report.events["cache resets under way"]
    assert not report.failures, format_report(report)
    assert not report.blind_spots, format_report(report)
    assert report.near_ties < report.checked_tokens / 100


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_larger_sample(folder):
    report = run(folder, cases=1000, seed=1)
    assert not report.failures, format_report(report)
    assert not report.blind_spots, format_report(report)


def test_a_sample_of_architectures(folder):
    """Experts and layers of different widths: the first cases of engines that draw them."""
    for first, name in ((10, "Qwen2MoeForCausalLM"), (40, "Gemma4ForCausalLM")):
        assert schedule_fuzz.draw_kind(25, first // 10) == (name, None)
        report = run(folder, cases=5, seed=25, first=first, mixed=True)
        assert not report.failures, format_report(report)
        assert report.checked_tokens > 100


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_a_larger_sample_of_architectures_and_ranks(folder):
    report = run(folder, cases=300, seed=25, mixed=True)
    assert not report.failures, format_report(report)
    assert set(report.settings["ranks"]) == {"None", "tensor", "pipeline"}
    assert set(report.settings["architecture"]) == set(schedule_fuzz.MIXED)


def test_the_command_chooses_the_runner(tmp_path):
    """Before vLLM is imported, after which it is too late."""
    command = [sys.executable, schedule_fuzz.__file__, "--runner", "v2", "--cases", "1"]
    done = subprocess.run(
        [*command, "--seed", "434", "--json", str(tmp_path / "report.json")],
        capture_output=True, text=True, check=False, timeout=300,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    report = json.loads((tmp_path / "report.json").read_text())
    assert report["cases"] == 1
    assert report["settings"]["async_scheduling"]


def test_a_case_is_drawn_from_its_number_alone():
    settings = schedule_fuzz.draw_settings(3, 4)
    families = schedule_fuzz.draw_families(3, 4)
    draws = [schedule_fuzz.draw_case(3, 41, settings, families) for _ in range(2)]
    assert draws[0] == draws[1] != schedule_fuzz.draw_case(3, 42, settings, families)


def test_adapters_depend_on_the_pooled_prompt(folder):
    """Else vectors of the wrong prompt would go unnoticed."""
    judge = Workshop(folder).judge
    for name, config in ADAPTERS.items():
        if config["r"] == 0:
            continue
        changed = 0
        for family in range(3):
            for text in schedule_fuzz.draw_families(9, family)[:2]:
                right, wrong = (judge.logits(name, text[:60], p)[39:].argmax(-1) for p in (40, 39))
                changed += bool((right != wrong).any())
        assert changed >= 4, f"{name}: another pooled token changed {changed} of 6 answers"


def without_prompt_in_key(patch):
    patch.setattr("vllm_pedro.integration.block_keys.cache_key", lambda spec: spec.digest)


def without_hit_limit(patch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_pedro.integration.scheduler import PedroSchedulerMixin

    patch.setattr(
        PedroSchedulerMixin, "_get_local_prefix_cache_hit", Scheduler._get_local_prefix_cache_hit
    )


def without_whole_prompts(patch):
    from vllm.v1.core.sched.scheduler import Scheduler

    from vllm_pedro.integration.scheduler import PedroSchedulerMixin

    for name in ("_reserve_prefill_lookahead", "_ec_transfer_pending"):
        patch.setattr(PedroSchedulerMixin, name, getattr(Scheduler, name))


def with_vectors_shared_by_adapter_alone(patch):
    from vllm_pedro.serving.spec import RequestSpec

    patch.setattr(RequestSpec, "vector_key", property(lambda self: (self.digest, "")))


def with_rows_never_returned(patch):
    from vllm_pedro.serving.rows import VectorRows

    patch.setattr(VectorRows, "free", lambda self, request_id: None)


@pytest.mark.parametrize(
    "mutate",
    [
        without_prompt_in_key,
        without_hit_limit,
        without_whole_prompts,
        with_vectors_shared_by_adapter_alone,
        with_rows_never_returned,
    ],
    ids=lambda function: function.__name__,
)
def test_a_missing_protection_is_noticed(mutate, folder, monkeypatch):
    mutate(monkeypatch)
    # Adapters load in threads, so that the case which notices is not the same each time.
    report = run(folder, cases=250, stop_at_failure=True)
    assert report.failures, format_report(report)
