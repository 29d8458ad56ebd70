"""Values that options may have; imported by parsers, which wait for nothing heavy."""

from __future__ import annotations

from typing import Final

METRICS: Final = ("accuracy", "f1-em", "exact-match", "loss")
"""What `evaluate` can compute."""

DTYPES: Final = ("auto", "float32", "bfloat16", "float16")
"""A backbone's dtypes; `auto`: bfloat16 on GPUs that have it, else float32."""

PROMPT_LENGTHS: Final = ("whole", "first_turn")
"""What is pooled of a chat: all messages before the last one, or those up to the first user's."""
