"""What the tests of commands share."""

from __future__ import annotations

import pytest
from commands import Run
from tiny_fixtures import dev_file, folder, one_thread, tiny_adapter, train_file

from vllm_pedro import cli

__all__ = ["dev_file", "folder", "one_thread", "tiny_adapter", "train_file"]


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command; its exit status, what it printed and what it complained of."""

    def call(*argv: object) -> tuple[int, str, str]:
        status = cli.main([str(part) for part in argv])
        captured = capsys.readouterr()
        return status, captured.out, captured.err

    return call
