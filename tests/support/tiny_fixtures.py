"""Fixtures of the tests that train: a tiny model, its data, and the command line."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from commands import Run
from tiny_task import make_folder, make_rows, write_rows

from vllm_pedro import cli
from vllm_pedro.adapter import init_adapter, save_adapter
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.config import PedroConfig


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """Models this small only lose by threads; and results must not depend on their number."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="session")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with its tokenizer."""
    return make_folder(tmp_path_factory.mktemp("tiny-text"))


@pytest.fixture(scope="session")
def train_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "train.jsonl", make_rows(64))


@pytest.fixture(scope="session")
def dev_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "dev.jsonl", make_rows(24, seed=1))


@pytest.fixture
def tiny_adapter(folder: Path, tmp_path: Path) -> Path:
    shape = BackboneShape.from_pretrained(folder)
    config = PedroConfig(r=4, input_norm="rms", activation=["rational", "relu"])
    made = init_adapter(config, shape, seed=2, scale=0.2)
    save_adapter(tmp_path / "made", config, made.tensors)
    return tmp_path / "made"


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; its exit status, what it printed and what it complained of."""

    def call(*argv: object) -> tuple[int, str, str]:
        status = cli.main([str(part) for part in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
