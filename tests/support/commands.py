"""What tests of the command line share."""

from __future__ import annotations

from collections.abc import Callable

import pytest

Run = Callable[..., tuple[int, str, str]]
"""Runs a command; its exit status, what it printed, and what it wrote to stderr."""


def error_line(capsys: pytest.CaptureFixture[str]) -> str:
    """The error printed, which must be one line and the only output."""
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.count("\n") == 1
    assert output.err.startswith("vllm-pedro: error: ")
    return output.err.strip()
