"""Values that options may have; imported by parsers, which wait for nothing heavy."""

from __future__ import annotations

from typing import Any, Final

METRICS: Final = ("accuracy", "f1-em", "exact-match", "final-number", "loss")
"""What `evaluate` can compute."""

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
"""A backbone's dtypes; `auto`: bfloat16 on GPUs that have it, else float32."""

STARTS: Final = ("data", "random")
"""What W_down starts from: the training prompts' pooled states (`training.start`), or nothing."""

RECIPES: Final[dict[str, dict[str, Any]]] = {
    "conditioned": {
        "start": "data",
        "activation": ["gelu"],
        "learning_rate": "5e-3",
        "fan_in_learning_rates": True,
        "coefficient_range": "4",
    },
    "plain": {
        "start": "random",
        "activation": ["rational"],
        "learning_rate": "1e-4",
        "fan_in_learning_rates": False,
        "coefficient_range": "0",
    },
}
"""What `train` does where nothing else is asked for, the default first; `plain` is the paper's."""

PROMPT_LENGTHS: Final = ("whole", "first_turn")
"""What is pooled of a chat: all messages before the last one, or those up to the first user's."""
