"""The experiments' script on a tiny model: every method trains, and no run is repeated."""

from __future__ import annotations

import json
import runpy
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from tiny_task import make_folder, make_rows, write_rows

from vllm_pedro.training.evaluate import METRICS

FOLDER = Path(__file__).parents[2] / "benchmarks" / "experiments"
script = runpy.run_path(str(FOLDER / "run.py"))
small_form = script["small_form"]


@pytest.fixture(scope="module")
def experiment(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Table 1's methods on a tiny model and a tiny task, in a small and a full form."""
    root = tmp_path_factory.mktemp("experiment")
    write_rows(root / "train.jsonl", make_rows(32))
    write_rows(root / "dev.jsonl", make_rows(6, seed=1))
    task = {"name": "toy", "train": "train.jsonl", "dev": "dev.jsonl"}
    config = json.loads((FOLDER / "table1.json").read_text())
    config |= {
        "model": str(make_folder(root / "model")),
        "seeds": [0],
        "max_steps": 10_000,
        "batch_size": 4,
        "small": {"max_steps": 3, "dev_rows": 4},
        "tasks": [task | {"metric": "accuracy", "score": "accuracy"}],
    }
    (root / "config.json").write_text(json.dumps(config))
    return root


def run(root: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(FOLDER / "run.py"), str(root / "config.json")]
    done = subprocess.run(
        [*command, "--data", str(root), "--small", *options],
        capture_output=True,
        text=True,
        check=False,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return done


def results(root: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (root / "config.small.jsonl").read_text().splitlines()]


def test_all_methods_by_two_processes(experiment: Path) -> None:
    methods = [m["name"] for m in json.loads((experiment / "config.json").read_text())["methods"]]
    with ThreadPoolExecutor() as pool:
        list(pool.map(lambda _: run(experiment), range(2)))
    found = results(experiment)
    assert sorted(r["method"] for r in found) == sorted(methods)  # each by one of them
    table = run(experiment).stdout
    for result in found:
        assert result["rows"] == 4
        assert 0 <= result["accuracy"] <= 1
        assert result["train_loss"] > 0
        assert result["trainable_parameters"] > 0
        if result["method"].startswith("PEDRO"):
            assert 0 < result["prompt_share"] < 1
            assert result["swapped_loss"] > 0
    lines = table.splitlines()
    assert [line.split("|")[1].strip() for line in lines[2:]] == methods
    score = next(r["accuracy"] for r in found if r["method"] == "(IA)3")
    cells = next(line for line in lines if "(IA)3" in line).split("|")
    assert f"{100 * score:.1f}" in [cell.strip() for cell in cells]
    assert results(experiment) == found  # not run again


def test_a_difference_is_told_from_noise() -> None:
    """By the paired t-test: of 0.1, 0.2, 0.3 the mean is 0.2, its standard error 0.1 / sqrt(3)."""

    def runs(method: str, *losses: float) -> list[dict[str, Any]]:
        return [
            {"task": "toy", "method": method, "seed": seed, "dev_loss": loss}
            for seed, loss in enumerate(losses)
        ]

    names = ("mine", "close", "far", "once", "never")
    config = {"tasks": [{"name": "toy"}], "methods": [{"name": name} for name in names]}
    found = [
        *runs("mine", 1.0, 2.0, 3.0),
        *runs("close", 1.1, 2.2, 3.3),
        *runs("far", 2.1, 3.2, 4.3),
        *runs("once", 0.5),
    ]
    text = script["differences"](config, found, "mine", "dev_loss")
    cells = [line.split("|")[2].strip() for line in text.splitlines()[2:]]
    half = 4.303 * 0.1 / 3**0.5
    assert cells == [
        "-",
        f"+0.200 ± {half:.3f} (3)",
        f"+1.200 ± {half:.3f} * (3)",
        "-0.500 (1)",
        "-",
    ]


def test_small_form_goes_before_the_full_one() -> None:
    config = {
        "max_steps": 300,
        "batch_size": 16,
        "tasks": [
            {"name": "a", "small": {"max_steps": 20, "dev_rows": 5}},
            {"name": "b"},
            {"name": "c", "metric": "loss"},
        ],
        "small": {"max_steps": 60, "tasks": ["a", "c"]},
    }
    small = small_form(config)
    assert small["max_steps"] == 60
    assert small["batch_size"] == 16
    assert [task["name"] for task in small["tasks"]] == ["a", "c"]
    # A task's own goes before the config's.
    assert (small | small["tasks"][0])["max_steps"] == 20
    assert (small | small["tasks"][1])["max_steps"] == 60
    assert config["max_steps"] == 300
    assert len(config["tasks"]) == 3


@pytest.mark.parametrize(
    "name",
    [
        *("table1", "table4", "table5", "figure3", "learning_rates"),
        *("controlled", "controlled_rates", "metamath"),
    ],
)
def test_configs_are_whole(name: str) -> None:
    """Every task, method and seed of a config is there once, in its small form too."""
    config = json.loads((FOLDER / f"{name}.json").read_text())
    for form in (config, small_form(config)):
        for key in ("tasks", "methods"):
            names = [entry["name"] for entry in form[key]]
            assert names
            assert len(set(names)) == len(names)
        assert form["seeds"]
        for task in form["tasks"]:
            settings = form | task
            assert settings["max_steps"] > 0
            assert settings["metric"] in METRICS
