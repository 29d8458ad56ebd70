"""Adapters in repositories of the Hugging Face hub: into its cache, no more than their two files.

Token (`HF_TOKEN`), endpoint (`HF_ENDPOINT`), cache (`HF_HOME`) and `HF_HUB_OFFLINE` are
huggingface_hub's own. Where the hub does not answer, what is in the cache counts.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, Final, NamedTuple

from ..backbone import BackboneShape
from ..config import (
    CONFIG_NAME,
    MAX_CONFIG_BYTES,
    PEFT_TYPE,
    PedroConfig,
    peft_type_of,
    read_config_bytes,
)
from ..errors import AdapterError, PedroError, first_line
from ..files import parse_json_object, replace_file
from .header import FLOAT_DTYPES, MAX_HEADER_BYTES
from .names import WEIGHTS_NAME
from .shapes import expected_shapes

CARD_NAME: Final = "README.md"
UPLOADED: Final = (CARD_NAME, CONFIG_NAME, WEIGHTS_NAME, "training.json")
"""What `push` uploads of a folder."""

_REPOSITORY = re.compile(
    r"(?!.*\.\.)(?P<id>\w[\w.-]*/\w[\w.-]*)(?:@(?P<revision>\w[\w./-]*))?", re.ASCII
)


class Repository(NamedTuple):
    """A repository of the hub at a revision: a branch, a tag or a commit."""

    id: str
    revision: str

    def __str__(self) -> str:
        return self.id if self.revision == "main" else f"{self.id}@{self.revision}"


def may_be_repository(path: str) -> bool:
    """Whether a path could name a repository, as far as can be told without the disk."""
    return _REPOSITORY.fullmatch(path) is not None


def repository_of(path: str) -> Repository | None:
    """What `org/name` or `org/name@revision` means, as vLLM's LoRA decides it.

    Returns:
        None for a folder's path: something is there, or it has another form.
    """
    match = _REPOSITORY.fullmatch(path)
    if match is None or os.path.exists(path):
        return None
    return Repository(match["id"], match["revision"] or "main")


def fetch_config(repository: Repository) -> Path:
    """Download the config alone.

    Returns:
        The folder of the revision's commit in the cache.

    Raises:
        AdapterError: Says why it cannot be had.
    """
    return _fetch(repository, CONFIG_NAME, MAX_CONFIG_BYTES).parent


def fetch_adapter(
    repository: Repository,
    shape: BackboneShape,
    check: Callable[[PedroConfig, str], None] | None = None,
) -> Path:
    """Download an adapter's config, and its weights if the config allows and they are no larger.

    Args:
        repository: Where they are.
        shape: The backbone, which bounds the weights' size.
        check: Called with the config and a name for messages; raises for an unwanted one.

    Returns:
        The folder of the revision's commit in the cache, with both files.

    Raises:
        AdapterError: Says why it cannot be had; see `load_adapter` for the config.
    """
    folder = fetch_config(repository)
    source = f"{repository}: {CONFIG_NAME}"
    data = read_config_bytes(folder / CONFIG_NAME)
    config = PedroConfig.from_dict(parse_json_object(data, source), source)
    if check is not None:
        check(config, str(repository))
    values = sum(map(math.prod, expected_shapes(config, shape).values()))
    most = values * max(FLOAT_DTYPES.values()) + MAX_HEADER_BYTES
    # Of the config's commit, whatever the branch is by now.
    return _fetch(repository._replace(revision=folder.name), WEIGHTS_NAME, most).parent


def local_config(
    path: str | os.PathLike[str], subfolder: str | None = None, revision: str | None = None
) -> Path | None:
    """The folder of a PEDRO adapter's config, here or, once fetched, in the hub's cache.

    Returns:
        None: there is nothing, or an adapter of another kind.
    """
    repository = repository_of(os.fspath(path))
    if repository is None:
        folder = Path(path, subfolder or "")
    else:
        try:
            folder = fetch_config(repository._replace(revision=revision or repository.revision))
        except AdapterError:
            return None
    return folder if peft_type_of(folder) == PEFT_TYPE else None


def write_card(folder: str | os.PathLike[str], base_model: str | None) -> None:
    """Write README.md, the hub's model card, into an adapter's folder that has none."""
    file = Path(folder, CARD_NAME)
    if file.exists():
        return
    lines = ["library_name: peft", "pipeline_tag: text-generation", "tags:", "- pedro"]
    if base_model is not None:
        # Quoted: it may be a path of any kind.
        lines = [f"base_model: {json.dumps(base_model)}", *lines]
    text = "\n".join(["---", *lines, "---", "", "# PEDRO adapter", ""])
    replace_file(file, text.encode())


def push(folder: str | os.PathLike[str], repo_id: str, **how: Any) -> str:
    """Upload an adapter's folder to the hub, and nothing else that is in it.

    Args:
        folder: the folder.
        repo_id: the repository, e.g. "me/my-adapter", made if it is not there.
        **how: `private`, `token`, and for the upload `commit_message` and `revision`.

    Returns:
        The commit's address.

    Raises:
        PedroError: the hub refuses it, or cannot be reached.
    """
    from huggingface_hub import HfApi
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    api = HfApi(token=how.pop("token", None))
    try:
        api.create_repo(repo_id, private=how.pop("private", None), exist_ok=True)
        found = api.upload_folder(
            repo_id=repo_id, folder_path=Path(folder), allow_patterns=list(UPLOADED), **how
        )
    except (OSError, HfHubHTTPError, HFValidationError) as error:
        raise PedroError(f"{repo_id}: cannot push to the hub: {first_line(error)}") from error
    return str(found)


def _fetch(repository: Repository, name: str, most: int) -> Path:
    """One file into the cache, unless it has more bytes than `most`."""
    from huggingface_hub import constants, errors, hf_hub_download

    def get(revision: str, dry_run: bool) -> object:
        return hf_hub_download(repository.id, name, revision=revision, dry_run=dry_run)

    try:
        found = get(repository.revision, dry_run=True)
        size = found.file_size  # type: ignore[attr-defined]
        if size is None or size > most:
            raise AdapterError(
                f"{repository}: {name}: expected at most {most} bytes for this backbone and "
                f"config, found {'a file of unknown size' if size is None else size}"
            )
        return Path(str(get(repository.revision, dry_run=False)))
    except errors.GatedRepoError:
        reason = "access to the repository is restricted, and the token (HF_TOKEN) has none"
    except errors.RepositoryNotFoundError:
        reason = (
            f"neither a folder here nor a repository of {constants.ENDPOINT}, "
            "unless a private one, which needs a token (HF_TOKEN)"
        )
    except errors.RevisionNotFoundError:
        reason = "the repository has no such revision"
    except errors.RemoteEntryNotFoundError:
        reason = f"the repository has no {name}"
    except errors.LocalEntryNotFoundError:
        why = "HF_HUB_OFFLINE is set" if constants.HF_HUB_OFFLINE else "it does not answer"
        reason = (
            f"no such folder; of a repository {name} is not in the cache, and "
            f"{constants.ENDPOINT} cannot be asked: {why}"
        )
    except AdapterError:
        raise
    except Exception as error:
        # Of the network, of the disk, or an answer that is no hub's.
        reason = f"{name} cannot be downloaded: {first_line(error)}"
    raise AdapterError(f"{repository}: {reason}")
