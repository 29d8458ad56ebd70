"""The server for tests: see `vllm_pedro/bench/servers.py`, which starts it."""

from __future__ import annotations

import json
import subprocess
import urllib.request
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from engines import Oracle


def curl(url: str, body: Any = None) -> tuple[int, str]:
    """Ask as an operator's script does; status and text."""
    command = ["curl", "--silent", "--show-error", "--write-out", "\n%{http_code}", url]
    if body is not None:
        command += ["-H", "Content-Type: application/json", "--data", json.dumps(body)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=300, check=True)
    text, _, status = result.stdout.rpartition("\n")
    return int(status), text


def metrics(url: str) -> dict[str, float]:
    """PEDRO's metrics without their common labels, e.g. `adapter_loads_total{tier=host}`."""
    with urllib.request.urlopen(f"{url}/metrics", timeout=60) as answer:
        lines = answer.read().decode().splitlines()
    found = {}
    for line in lines:
        if line.startswith("vllm:pedro_"):
            name, _, value = line.rpartition(" ")
            family, _, labels = name.removeprefix("vllm:pedro_").rstrip("}").partition("{")
            pairs = dict(pair.split("=", 1) for pair in labels.split(","))
            pairs.pop("model_name")
            pairs.pop("engine")
            found[family + "".join(f"{{{k}={v.strip(chr(34))}}}" for k, v in pairs.items())] = (
                float(value)
            )
    return found


def check_greedy(
    oracle: Oracle,
    prompt: list[int],
    tokens: list[int],
    adapter: Path | None,
    prompt_length: int | None = None,
) -> bool:
    """Greedy tokens of an answer are the reference's; whether they met a near-tie.

    Raises:
        Mismatch: They are others.
    """
    answer = SimpleNamespace(
        prompt_token_ids=prompt,
        prompt_logprobs=None,
        outputs=[SimpleNamespace(token_ids=tokens)],
    )
    return oracle.check(answer, adapter, prompt_length)
