"""`vllm-pedro verify`: what it says where all is well, and where it is not."""

from __future__ import annotations

import subprocess
import sys

import pytest

from vllm_pedro.integration import upstream, verify, versions

PROGRAM = """
from vllm_pedro.cli import main
from vllm_pedro.errors import PedroError
from vllm_pedro.integration import verify
from vllm_pedro.model import reference

print("STATUS", main(["verify"]))
original = reference.reference_score
# A reference that pools another prompt: as if the engine had.
reference.reference_score = lambda model, prompt, tokens: original(model, prompt, tokens, 3)
try:
    verify.check_engine()
except PedroError as error:
    print("FOUND", error)
"""


@pytest.mark.engine
def test_all_is_well_here_and_a_fault_is_found():
    run = subprocess.run(
        [sys.executable, "-c", PROGRAM], capture_output=True, text=True, timeout=300, check=False
    )
    assert run.returncode == 0, run.stderr[-3000:]
    lines = run.stdout.splitlines()
    assert [line.split("ok")[0].strip() for line in lines[:4]] == [
        "versions",
        "vLLM's functions",
        "operators",
        "engine",
    ]
    assert "12 rows of 8 tokens equal plain transformers" in lines[3]
    assert lines[4] == "STATUS 0"
    assert lines[5].startswith("FOUND token ")


@pytest.fixture
def fast(monkeypatch):
    """Without the checks that compute."""
    for name in ("check_operators", "check_engine"):
        monkeypatch.setattr(verify, name, lambda: "done")


def test_a_function_that_changed_is_wrong(fast, monkeypatch, capsys):
    monkeypatch.setitem(
        upstream.READ["0.32"], "vllm.v1.engine.core:EngineCore.collective_rpc", "other"
    )
    assert verify.main([]) == 1
    assert "WRONG     PedroError: 1 of " in capsys.readouterr().out


def test_another_vllm_is_untested(fast, monkeypatch, capsys):
    pyproject = versions.supported_vllm()
    monkeypatch.setattr("vllm.__version__", "0.33.0")
    assert verify.main([]) == 3
    shown = capsys.readouterr().out
    assert "untested  vLLM 0.33.0, torch " in shown
    assert f"the supported vLLM is {pyproject}" in shown
    assert "\nengine" not in shown
    # Its functions are 0.32's here, which are not those of 0.33's that were read.
    assert f"Its source: {len(upstream.READ['0.33'])} of " in shown
    monkeypatch.setattr("vllm.__version__", "0.34.0")
    assert verify.main([]) == 3
    assert "were never compared" in capsys.readouterr().out
