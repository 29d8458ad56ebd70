"""Names and folders that come from outside: what is let in, and what is told of them."""

from __future__ import annotations

import os
import unicodedata
from pathlib import Path

from ...adapter import WEIGHTS_NAME
from ...config import CONFIG_NAME
from ...errors import PedroError

MAX_NAME_LENGTH = 200
MAX_PATH_LENGTH = 4096
MAX_REASON_LENGTH = 600


def check_name(name: str, is_folder: bool = False) -> None:
    """Refuse what cannot be an adapter's model name.

    Args:
        name: As it came.
        is_folder: Whether the name is looked up as a folder's below the root; then it is one path
            component. Where a path is given beside it, it may have several, as those of the hub.

    Raises:
        PedroError: Says which rule it breaks.
    """
    shown = repr(name[:80])
    if not name or len(name) > MAX_NAME_LENGTH:
        raise PedroError(
            f"adapter name {shown}: expected 1 to {MAX_NAME_LENGTH} characters, found {len(name)}"
        )
    parts = name.split("/")
    if (len(parts) > 1 and is_folder) or "\\" in name or {"", ".", ".."} & {*parts}:
        raise PedroError(f"adapter name {shown}: path separators are not allowed")
    if name != name.strip() or any(unicodedata.category(c).startswith("C") for c in name):
        raise PedroError(
            f"adapter name {shown}: control characters and spaces at its ends are not allowed"
        )


def resolve_folder(path: str, root: Path | None) -> str:
    """The folder that a run-time request means, with all links and `..` resolved.

    Args:
        path: As it came. With a root, a relative path starts there.
        root: The only directory whose contents may be loaded, resolved; None: anything may.

    Raises:
        PedroError: It is outside the root, or so is a file in it. Nothing is told of what is there.
    """
    try:
        fits = len(os.fsencode(path)) <= MAX_PATH_LENGTH and "\0" not in path
    except UnicodeEncodeError:
        fits = False
    if not fits:
        raise PedroError("lora_path is not a valid path")
    if root is None:
        return os.path.realpath(os.path.expanduser(path))
    folder = os.path.realpath(os.path.join(root, path))
    places = [folder, *(os.path.join(folder, name) for name in (CONFIG_NAME, WEIGHTS_NAME))]
    for place in places:
        real = os.path.realpath(place)
        if root == Path(real) or root not in Path(real).parents:
            raise PedroError(
                "lora_path is not inside the directory that this server loads adapters from "
                "(--pedro-root)"
            )
    return folder


def public_reason(error: Exception, folder: str | None) -> str:
    """An error's message for somebody who must not learn where the server keeps its files.

    Args:
        error: What went wrong with the folder; the server's log has it whole.
        folder: The folder as it was passed on, which is how messages name it; None for an error
            that has to do with none.
    """
    text = str(error)
    if folder is None:
        return text
    for path in dict.fromkeys((folder, os.path.realpath(folder), os.path.abspath(folder))):
        text = text.replace(path + os.sep, "")
        text = text.replace(repr(path), "adapter folder").replace(path, "adapter folder")
    outside = os.path.dirname(os.path.realpath(folder))
    if len(outside) > 1 and outside in text:
        return "the adapter cannot be loaded; the server's log has the reason"
    if len(text) > MAX_REASON_LENGTH:
        text = text[:MAX_REASON_LENGTH] + " ..."
    return text
