"""The tests marked ``both_runners``, once more on vLLM's V2 runner, in a process of their own.

V2 is a GPU's default. On the CPU it runs in Triton's interpreter, which has to be chosen before
vLLM is imported. ``python3 run.py test --runner v2`` runs them alone.
"""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = [pytest.mark.engine, pytest.mark.timeout(5400)]

ROOT = Path(__file__).resolve().parents[2]


def test_both_runners_do_the_same(request):
    if request.config.getoption("keyword") or request.config.getoption("file_or_dir"):
        pytest.skip("only part of the tests is asked for; --runner v2 runs them on V2")
    command = [sys.executable, "-m", "pytest", "--runner", "v2", "--durations=10", "-q"]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout[-20_000:])
    assert done.returncode == 0, "tests fail on the V2 runner, see above"
