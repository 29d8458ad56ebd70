"""What a message shows of an error that came from elsewhere."""

from __future__ import annotations

import pytest

from vllm_pedro.errors import AdapterError, first_line


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (ValueError("one\ntwo"), "one"),
        (ValueError("\n  one  \ntwo"), "one  "),
        (OSError(2, "No such file"), "[Errno 2] No such file"),
        (AdapterError(), "AdapterError"),
        (KeyError(), "KeyError"),
        (RuntimeError(" \n "), "RuntimeError"),
    ],
)
def test_the_first_line_of_an_error(error: Exception, line: str) -> None:
    assert first_line(error) == line
