"""What the tests of distillation share."""

from __future__ import annotations

from pathlib import Path

import pytest
from engines import write_random_adapter
from tiny_fixtures import folder, one_thread, run
from tiny_task import make_prompts, write_rows

from vllm_pedro.backbone import BackboneShape
from vllm_pedro.bench.adapters import write_lora

__all__ = ["folder", "one_thread", "run"]


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
