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
        needs_all_states: Whether the pooling reads every prompt token (mean, max), so that
            generating the vectors takes no cache hit.
        is_pinned: Whether the request keeps this content when its name is given another: the beams
            of one search must all have one adapter's vectors.
        nbytes: What the adapter takes of the device's memory for adapters.
    """

    name: str
    path: str
    digest: str
    prompt_length: int
    prompt_digest: str
    needs_all_states: bool = False
    is_pinned: bool = False
    nbytes: int = 0

    @property
    def vector_key(self) -> VectorKey:
        """What the vectors depend on."""
        return (self.digest, self.prompt_digest)

    def to_wire(self) -> dict[str, Any]:
        """The spec as plain JSON values."""
        return asdict(self)

    @classmethod
    def from_wire(cls, value: dict[str, Any]) -> RequestSpec:
        """Inverse of `to_wire`."""
        return cls(**value)


def cache_salt(salt: str | None, spec: RequestSpec) -> str:
    """Key for the prefix cache: the adapter's content and the whole pooled prompt.

    It salts a request's first block and so, through the chain of block hashes, all of its blocks;
    KV computed under one adapter and prompt is found by no other.
    """
    return f"{salt or ''}|pedro:{spec.digest}:{spec.prompt_length}:{spec.prompt_digest}"
