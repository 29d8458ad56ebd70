"""What an adapter's folder says beside its weights, and the engine does not do: told in the log.

Shapes decide whether an adapter can be served. Whether it was made for this model, and with its
tokenizer and chat template, they do not tell.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable
from pathlib import Path, PurePosixPath
from threading import Lock
from typing import Any

from ...errors import AdapterError
from ...files import open_regular

logger = logging.getLogger("vllm.vllm_pedro")

MOST_TOLD = 20
"""Lines of each kind in a process's log: tenants may be many."""

MAX_FILE_BYTES = 64 << 20


class FolderNotes:
    """Says each thing once.

    May be asked from several threads.

    Args:
        model_names: What the engine's model is called: paths, names of the hub, served names.
        get_tokenizer: Gives the model's tokenizer, or None where there is none.
    """

    def __init__(self, model_names: Iterable[str | None], get_tokenizer: Callable[[], Any]) -> None:
        self._names = [name for name in model_names if name]
        self._get_tokenizer = get_tokenizer
        self._told: dict[str, set[str]] = {}
        self._lock = Lock()

    def base_model(self, named: str | None, folder: str) -> None:
        """Warn of an adapter whose config names another model as its base.

        Args:
            named: The config's `base_model_name_or_path`.
            folder: The adapter's.
        """
        if not named or _short(named) in map(_short, self._names):
            return
        if self._is_new("base model", named):
            logger.warning(
                "PEDRO: %s names %r as its base model, and this engine's is %s. Its shapes fit, "
                "its answers may not",
                folder,
                named,
                self._names[0] if self._names else "another",
            )

    def files(self, folder: str) -> None:
        """Tell of a chat template or a tokenizer beside the weights that is not the model's.

        Requests use the model's. What cannot be read is passed over: none of it is needed.
        """
        tokenizer = None
        for kind, read, own in (
            ("chat template", _chat_template, lambda t: _text(t.chat_template)),
            ("tokenizer", _vocabulary, lambda t: _words(json.loads(t.backend_tokenizer.to_str()))),
        ):
            try:
                found = read(Path(folder))
                if found is None:
                    continue
                tokenizer = tokenizer or self._get_tokenizer()
                differs = tokenizer is not None and own(tokenizer) not in (None, found)
            except (AdapterError, AttributeError, KeyError, TypeError, ValueError, RecursionError):
                continue
            if differs and self._is_new(kind, folder):
                logger.info(
                    "PEDRO: %s has a %s that differs from the base model's, which requests use",
                    folder,
                    kind,
                )

    def _is_new(self, kind: str, what: str) -> bool:
        with self._lock:
            told = self._told.setdefault(kind, set())
            if what in told or len(told) >= MOST_TOLD:
                return False
            told.add(what)
            return True


def _short(name: str) -> str:
    """A model's name without its owner or folder; of the hub's cache, the repository's."""
    parts = PurePosixPath(name).parts
    cached = [part for part in parts if part.startswith("models--")]
    last = cached[-1].rpartition("--")[2] if cached else parts[-1] if parts else ""
    return last.lower()


def _read(path: Path) -> str | None:
    if not path.exists():
        return None
    with open_regular(path, "a text file") as file:
        data = file.read(MAX_FILE_BYTES + 1)
    return data.decode() if len(data) <= MAX_FILE_BYTES else None


def _text(template: Any) -> str | None:
    return template.strip() if isinstance(template, str) else None


def _chat_template(folder: Path) -> str | None:
    own = _read(folder / "chat_template.jinja")
    if own is None:
        config = json.loads(_read(folder / "tokenizer_config.json") or "{}")
        own = config.get("chat_template")
    return _text(own)


def _vocabulary(folder: Path) -> Any:
    text = _read(folder / "tokenizer.json")
    return None if text is None else _words(json.loads(text))


def _words(tokenizer: Any) -> Any:
    """What decides which tokens a text has, as far as libraries write it in one way."""
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in tokenizer["model"].get("merges", ())
    ]
    added = sorted((token["id"], token["content"]) for token in tokenizer["added_tokens"])
    return tokenizer["model"]["vocab"], merges, added
