"""Training adapters with transformers' Trainer, and measuring them."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .chat import DataError as DataError
    from .collator import CompletionCollator as CompletionCollator
    from .collator import PackedCollator as PackedCollator
    from .data import load_dataset as load_dataset
    from .data import read_rows as read_rows
    from .start import condition as condition
    from .trainer import PedroTrainer as PedroTrainer
    from .trainer import PedroTrainingArguments as PedroTrainingArguments
    from .trainer import TrainingDiverged as TrainingDiverged

_EXPORTS = {
    "CompletionCollator": ".collator",
    "DataError": ".chat",
    "PackedCollator": ".collator",
    "PedroTrainer": ".trainer",
    "PedroTrainingArguments": ".trainer",
    "TrainingDiverged": ".trainer",
    "condition": ".start",
    "load_dataset": ".data",
    "read_rows": ".data",
}

__all__ = sorted(_EXPORTS)


def __getattr__(name: str) -> Any:
    """Import public names on first use, so that the command line starts without torch."""
    if name not in _EXPORTS:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(_EXPORTS[name], __name__), name)
    globals()[name] = value
    return value
