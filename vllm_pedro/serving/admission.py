"""Who may start in a step: a prompt that does not fit holds nobody up, nor waits for ever.

A prompt whose vectors have to be generated needs its first P tokens in one step. vLLM's waiting
loop stops at a request that gets no tokens, so such a prompt is passed over before that, and those
behind it start. After `PATIENCE` steps it is its turn: no other prompt starts before it, and
running rows leave it the tokens it needs, for one step.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

PATIENCE = 4
"""Steps in which a prompt is passed over before tokens are reserved for it, and between attempts:
what else it lacks, KV blocks for example, may take longer, and running rows have to get on."""


@dataclass(slots=True)
class Turn:
    """The prompt whose turn it is.

    Attributes:
        request_id: Its request.
        tokens: What it needs in this step, at most.
        priority: Its request's; lower goes first.
    """

    request_id: str
    tokens: int
    priority: int


class Admission:
    """A step's tokens, and the prompts that were passed over.

    Args:
        max_tokens: Most tokens of a step.
        max_inputs: Most tokens and places for drafts of a step.
        draft_places: Places for drafts of each row.
    """

    def __init__(self, max_tokens: int, max_inputs: int, draft_places: int = 0) -> None:
        self._max_tokens = max_tokens
        self._max_inputs = max_inputs
        self._draft_places = draft_places
        self._passed_over: dict[str, int] = {}
        self._tokens = max_tokens
        self._inputs = max_inputs
        self.turn: Turn | None = None

    def begin_step(self, waiting: Iterable[Turn]) -> None:
        """Nothing of the step is taken yet.

        Args:
            waiting: The requests of `candidates` that still wait and could run.
        """
        self._tokens, self._inputs = self._max_tokens, self._max_inputs
        self.turn = max(waiting, key=lambda turn: self._passed_over[turn.request_id], default=None)
        if self.turn is not None:
            # One attempt: it may fail for want of KV blocks, which running rows free by getting on.
            self._passed_over[self.turn.request_id] += 1

    def candidates(self) -> list[str]:
        """Requests for which this step's tokens may be reserved."""
        return [i for i, count in self._passed_over.items() if count % PATIENCE == 0]

    @property
    def left(self) -> int:
        """Tokens that one more row may take."""
        return max(0, min(self._tokens, self._inputs - self._draft_places))

    def take(self, tokens: int) -> None:
        """A row takes these."""
        if tokens:
            self._tokens -= tokens
            self._inputs -= tokens + self._draft_places

    def portion(self, tokens: int, is_divisible: bool) -> int:
        """How many of these tokens a running row may take: all, unless some are reserved.

        Args:
            tokens: What it would take.
            is_divisible: Whether it may take a part: tokens of a prompt.
        """
        if self.turn is None:
            return tokens
        free = max(0, self.left - self.turn.tokens - self._draft_places)
        return tokens if tokens <= free else free if is_divisible else 0

    def is_before_turn(self, request_id: str, priority: int) -> bool:
        """Whether a request would start before the one whose turn it is."""
        turn = self.turn
        return turn is not None and turn.request_id != request_id and priority >= turn.priority

    def pass_over(self, request_id: str) -> None:
        """A prompt does not fit this step."""
        self._passed_over[request_id] = self._passed_over.get(request_id, 0) + 1

    def started(self, request_id: str) -> None:
        """The prompt is in the step."""
        if self.turn is not None and self.turn.request_id == request_id:
            self.turn = None

    def forget(self, request_id: str) -> None:
        """The request runs, or is gone."""
        self._passed_over.pop(request_id, None)
