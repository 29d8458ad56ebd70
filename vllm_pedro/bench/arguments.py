"""What the commands of `vllm-pedro bench` read from their arguments."""

from __future__ import annotations

import argparse
import os
from pathlib import Path

from ..errors import PedroError


def count(text: str) -> int:
    if not text.isascii() or not text.isdigit() or not 1 <= int(text) <= 1_000_000:
        raise argparse.ArgumentTypeError(f"expected a whole number above 0, found {text!r}")
    return int(text)


def positive(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = 0.0
    if not 0 < value < float("inf"):
        raise argparse.ArgumentTypeError(f"expected a number above 0, found {text!r}")
    return value


def find_model(model: str | None) -> str:
    """The model's folder; the demo's model if none is named."""
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    if model is not None:
        if not Path(model, "config.json").is_file():
            raise PedroError(f"{model}: expected a model's folder with a config.json")
        return model
    from ..fetch import fetch_model

    return str(fetch_model(progress=True))
