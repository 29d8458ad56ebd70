"""Fixtures for tests that start an engine."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from engines import Oracle, make_tiny_model, start_engine, write_random_adapter

Engine = Callable[..., contextlib.AbstractContextManager[Any]]


@pytest.fixture(scope="session")
def engine() -> Engine:
    return start_engine


@pytest.fixture(scope="session")
def smol() -> Path:
    """The real model: SmolLM2-135M-Instruct."""
    from vllm_pedro.fetch import fetch_model

    return fetch_model(progress=False)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny"))


@pytest.fixture(scope="session")
def tiny_engine(tiny: Path) -> Engine:
    def start(**settings: Any) -> contextlib.AbstractContextManager[Any]:
        return start_engine(tiny, **{"skip_tokenizer_init": True, "block_size": 32, **settings})

    return start


@pytest.fixture(scope="session")
def write_adapter(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Write a random adapter for a model; the folder. Same arguments, same content."""

    def write(model: Path, folder: Path | None = None, **config: Any) -> Path:
        return write_random_adapter(model, folder or tmp_path_factory.mktemp("adapter"), **config)

    return write


@pytest.fixture(scope="session")
def smol_oracle(smol: Path) -> Oracle:
    return Oracle(smol)


@pytest.fixture(scope="session")
def tiny_oracle(tiny: Path) -> Oracle:
    return Oracle(tiny, keep=64)


@pytest.fixture(scope="session")
def tiny_adapters(tiny: Path, write_adapter: Callable[..., Path]) -> dict[str, Path]:
    """Adapters whose vectors depend on the prompt: each pooling, activation, and static vectors."""

    def write(seed: int, **config: Any) -> Path:
        return write_adapter(tiny, seed=seed, scale=0.2, down_scale=15.0, **config)

    return {
        "last": write(1),
        "other": write(2, r=8, target_modules=["v_proj", "k_proj", "gate_proj"]),
        "mean": write(3, pooling="mean", activation="gelu"),
        "max": write(4, pooling="max", activation="relu"),
        "static": write(5, r=0),
    }


@pytest.fixture
def late_reads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Engines whose worker is, as it were, in another process: it reads an adapter once a step asks
    for it, and not while its request comes in.
    """
    monkeypatch.setattr("vllm_pedro.integration.wire.bank_here", lambda core: None)


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`scheduling`: engine settings. V2 can schedule asynchronously on the CPU, V1 cannot."""
    if "scheduling" in metafunc.fixturenames:
        modes = [False, True] if metafunc.config.getoption("--runner") == "v2" else [False]
        settings = [{"async_scheduling": mode} for mode in modes]
        metafunc.parametrize("scheduling", settings, ids=["async" if m else "sync" for m in modes])
