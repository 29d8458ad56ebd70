"""What a request carries through the engine: which adapter, and how long its prompt is."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from .rows import VectorKey


@dataclass(frozen=True, slots=True)
class RequestSpec:
    """One request's adapter and pooled length, fixed when the request is admitted.

    Attributes:
        name: The adapter's name, for messages only. Never a key: two folders may share it.
        path: Absolute path of the adapter folder.
        digest: Content digest of the folder (see `adapter.reading.digest_of`); the key of
            every pool.
        prompt_length: P, the number of leading tokens that are pooled; at least 1. Preemption,
            beams and appended tokens never change it.
        prompt_digest: Digest of the first P tokens; the vectors depend on it and `digest` alone.
        pools: Whose states generate the vectors: the pooled token's ("last"), those of all P
            ("all"), or nobody's, as the vectors are static ("none").
        is_pinned: Whether the request keeps this content when its name is given another: the beams
            of one search must all have one adapter's vectors.
        nbytes: What the adapter takes of the device's memory for adapters.
        scope: Which tokens it scales, as its config says: all ("sequence"), or those from the
            pooled one on ("answer").
    """

    name: str
    path: str
    digest: str
    prompt_length: int
    prompt_digest: str
    pools: str = "last"
    is_pinned: bool = False
    nbytes: int = 0
    scope: str = "sequence"

    @property
    def vector_key(self) -> VectorKey:
        """What the vectors depend on."""
        return (self.digest, "" if self.is_static else self.prompt_digest)

    @property
    def is_static(self) -> bool:
        """Whether the vectors are the same for all prompts, and made without one."""
        return self.pools == "none"

    @property
    def pooled_end(self) -> int:
        """Where the tokens end that one step has to compute to generate the vectors."""
        return 0 if self.is_static else self.prompt_length

    @property
    def first_scaled(self) -> int:
        """The first token that the adapter scales: its KV, and all KV after it, depend on it."""
        return self.prompt_length - 1 if self.scope == "answer" else 0

    def to_wire(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_wire(cls, value: dict[str, Any]) -> RequestSpec:
        """Inverse of `to_wire`."""
        return cls(**value)


def cache_key(spec: RequestSpec) -> str:
    """Key for the prefix cache: the adapter's content and the whole pooled prompt, if any.

    It is hashed with the block of the first token that is scaled and so, through the chain of block
    hashes, with all blocks from there on: KV computed under one adapter and prompt is found by no
    other. Blocks before that one are the backbone's own, and anybody's.
    """
    if spec.is_static and spec.scope == "sequence":
        return f"pedro:{spec.digest}"
    return f"pedro:{spec.digest}:{spec.prompt_length}:{spec.prompt_digest}"
