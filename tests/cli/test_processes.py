"""`vllm-pedro train` in several processes, as torchrun starts them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch

from vllm_pedro.adapter import load_adapter

ENTRY = "import sys; from vllm_pedro import cli; sys.exit(cli.main())"


def test_two_processes_give_one_result_and_one_record(
    folder: Path, train_file: Path, dev_file: Path, tmp_path: Path
) -> None:
    """The adapter is that of one process with twice the batch, up to rounding."""
    (tmp_path / "entry.py").write_text(ENTRY)
    found = {}
    for number, rows in ((2, 4), (1, 8)):
        output = tmp_path / str(number)
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={number}", "--", str(tmp_path / "entry.py"), "train"]
        command += ["--model", str(folder), "--train", str(train_file), "--dev", str(dev_file)]
        command += ["--output", str(output), "--max-steps", "4", "--eval-steps", "2", "--r", "4"]
        command += ["--per-device-train-batch-size", str(rows), "--use-cpu", "true"]
        environment = os.environ | {"OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
        assert done.returncode == 0, done.stderr
        (line,) = done.stdout.splitlines()
        record = json.loads(line)
        assert load_adapter(output).digest == record["digest"]
        assert json.loads((output / "training.json").read_text())["digest"] == record["digest"]
        assert done.stderr.count("trainable parameters beside") == 1
        assert record["steps"] == 4
        found[number] = load_adapter(output)
    for name, tensor in found[1].tensors.items():
        assert torch.allclose(tensor, found[2].tensors[name], atol=2e-3), name
