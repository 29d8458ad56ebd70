"""Adapters in shared memory: who frees them, and when."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from vllm_pedro import BackboneShape, PedroConfig
from vllm_pedro.adapter import init_adapter, load_adapter
from vllm_pedro.adapter.memory import hold_tensors, release
from vllm_pedro.backbone import TARGET_MODULES

SHAPE = BackboneShape(2, 16, dict.fromkeys(TARGET_MODULES, 16))

HOLD = """
import sys
from pathlib import Path
from vllm_pedro.adapter import load_adapter
from vllm_pedro.adapter.memory import hold_tensors
adapter = load_adapter(sys.argv[1])
print(hold_tensors(adapter.config, adapter.tensors), flush=True)
sys.stdin.read()
"""


@pytest.fixture
def holder():
    """A process that holds an adapter, and its folder."""
    adapter = init_adapter(PedroConfig(r=2), SHAPE)
    path = hold_tensors(adapter.config, adapter.tensors)
    with subprocess.Popen(
        [sys.executable, "-c", HOLD, path],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        yield process, Path(process.stdout.readline().strip())
        process.kill()
    release(path)


@pytest.mark.parametrize("sign", [signal.SIGKILL, None])
def test_what_a_process_holds_goes_with_it(holder, sign, monkeypatch):
    process, folder = holder
    adapter = load_adapter(folder)

    def hold_in_a_new_process():
        monkeypatch.setattr("vllm_pedro.adapter.memory._places", {})
        release(hold_tensors(adapter.config, adapter.tensors))

    hold_in_a_new_process()
    assert folder.is_dir()
    if sign is None:
        process.communicate()  # ends
        assert not folder.parent.exists()
    else:
        process.send_signal(sign)
        process.wait()
        assert folder.is_dir()
        hold_in_a_new_process()
        assert not folder.parent.exists()
