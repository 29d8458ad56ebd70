"""The progress line of a training."""

from __future__ import annotations

import sys
import time
from typing import Any

from transformers import TrainerCallback


class Progress(TrainerCallback):
    """A bar with loss, time left and tokens a second; plain lines where nobody watches a terminal.

    Args:
        trainer: the trainer, whose tokens are counted.
    """

    def __init__(self, trainer: Any) -> None:
        self._trainer = trainer
        self._bar: Any = None
        self._began = 0.0
        self._tokens_at_begin = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._began = time.monotonic()
        self._first_step = state.global_step
        self._tokens_at_begin = self._trainer.tokens_seen
        if state.is_world_process_zero and sys.stderr.isatty():
            from tqdm import tqdm

            self._bar = tqdm(
                total=state.max_steps, initial=state.global_step, unit="step", dynamic_ncols=True
            )

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.update(state.global_step - self._bar.n)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if not state.is_world_process_zero or not logs:
            return
        if "eval_loss" in logs:
            self._say(f"step {state.global_step}: dev loss {logs['eval_loss']:.4f}")
            return
        if "loss" not in logs:
            return
        seconds = time.monotonic() - self._began
        rate = (self._trainer.tokens_seen - self._tokens_at_begin) / max(seconds, 1e-9)
        loss, norm = float(logs["loss"]), float(logs.get("grad_norm", 0.0))
        if self._bar is not None:
            self._bar.set_postfix_str(f"loss {loss:.4f}, {rate:,.0f} tokens/s")
            return
        done = max(state.global_step - self._first_step, 1)
        left = seconds / done * (state.max_steps - state.global_step)
        self._say(
            f"step {state.global_step}/{state.max_steps}: loss {loss:.4f}, gradient norm "
            f"{norm:.3g}, {rate:,.0f} tokens/s, {clock(left)} left"
        )

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self._bar is not None:
            self._bar.close()
            self._bar = None

    def _say(self, text: str) -> None:
        if self._bar is not None:
            self._bar.write(text, file=sys.stderr)
        else:
            print(text, file=sys.stderr, flush=True)


def clock(seconds: float) -> str:
    """Minutes and seconds, with hours where there are any."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02d}:{rest:02d}" if hours else f"{minutes}:{rest:02d}"
