"""What the tests of distillation share."""

from __future__ import annotations

from pathlib import Path

import pytest
from commands import Run
from engines import write_random_adapter
from tiny_fixtures import folder, one_thread
from tiny_task import make_prompts, write_rows

from vllm_pedro import cli
from vllm_pedro.backbone import BackboneShape
from vllm_pedro.bench.adapters import write_lora

__all__ = ["folder", "one_thread"]


@pytest.fixture(scope="session")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("prompts") / "prompts.jsonl", make_prompts(150))


@pytest.fixture(scope="session")
def pedro_teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("teachers") / "pedro"
    return write_random_adapter(folder, target, scale=0.1, down_scale=20.0, activation="gelu")


@pytest.fixture(scope="session")
def lora_teacher(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    shape = BackboneShape.from_pretrained(folder)
    return write_lora(tmp_path_factory.mktemp("teachers") / "lora", shape, 0, 0.15, 4)


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; its exit status, what it printed and what it complained of."""

    def call(*argv: object) -> tuple[int, str, str]:
        status = cli.main([str(part) for part in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
