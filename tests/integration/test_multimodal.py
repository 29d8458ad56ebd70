"""Runs `multimodal.py`, the tests of models that see, where their code can be imported."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from runners import current_runner
from vision import install_torchvision

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]


def test_models_that_see(tmp_path):
    """In a process of its own, as transformers looks for torchvision once."""
    place = install_torchvision(tmp_path)
    before = os.environ.get("PYTHONPATH")
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, [before, place]))}
    command = [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-rs"]
    command += ["--runner", current_runner(), str(Path(__file__).with_name("multimodal.py"))]
    found = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=1800, check=False
    )
    assert found.returncode == 0, found.stdout[-8000:] + found.stderr[-2000:]
