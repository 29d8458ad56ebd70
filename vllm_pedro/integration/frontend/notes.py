"""What an adapter's folder says beside its weights, and the engine does not do: told in the log.

Shapes decide whether an adapter can be served. Whether it was made for this model, and with its
tokenizer and chat template, they do not tell.
"""

from __future__ import annotations

import hashlib
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

_UNREADABLE = (
    AdapterError,
    AttributeError,
    KeyError,
    OSError,
    RuntimeError,
    TypeError,
    ValueError,
)
"""Files of any content, on any disk, and tokenizers of any kind."""


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
        self._compared: dict[bytes, bool] = {}
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
        for kind, read, parse, own in (
            ("chat template", _chat_template, _text, lambda t: t.chat_template),
            ("tokenizer", _tokenizer, _words, lambda t: t.backend_tokenizer.to_str()),
        ):
            if len(self._told.get(kind, ())) >= MOST_TOLD:
                continue
            try:
                found = read(Path(folder))
                differs = found is not None and self._differs(kind, found, parse, own)
            except _UNREADABLE:
                continue
            if differs and self._is_new(kind, folder):
                logger.info(
                    "PEDRO: %s has a %s that differs from the base model's, which requests use",
                    folder,
                    kind,
                )

    def _differs(
        self, kind: str, found: str, parse: Callable[[Any], Any], own: Callable[[Any], Any]
    ) -> bool:
        """Whether a file's text says something else than the model's tokenizer.

        Each text is parsed once, as tenants' are mostly the same: a tokenizer's may have tens of
        megabytes, and nothing else of this process runs while it is parsed.
        """
        key = hashlib.sha256(f"{kind} {found}".encode()).digest()
        if key not in self._compared:
            tokenizer = self._get_tokenizer()
            if tokenizer is None:
                return False
            self._compared[key] = parse(own(tokenizer)) not in (None, parse(found))
        return self._compared[key]

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


def _tokenizer(folder: Path) -> str | None:
    return _read(folder / "tokenizer.json")


def _words(text: str) -> Any:
    """What decides which tokens a text has, as far as libraries write it in one way."""
    tokenizer = json.loads(text)
    merges = [
        merge if isinstance(merge, str) else " ".join(merge)
        for merge in tokenizer["model"].get("merges", ())
    ]
    added = sorted((token["id"], token["content"]) for token in tokenizer["added_tokens"])
    return tokenizer["model"]["vocab"], merges, added
