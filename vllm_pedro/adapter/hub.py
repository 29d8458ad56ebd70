"""Adapters in repositories of the Hugging Face hub: into its cache, no more than their two files.

Token (`HF_TOKEN`), endpoint (`HF_ENDPOINT`), cache (`HF_HOME`) and `HF_HUB_OFFLINE` are
huggingface_hub's own. Where the hub does not answer, what is in the cache counts.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from ..backbone import BackboneShape
from ..config import CONFIG_NAME, MAX_CONFIG_BYTES, PedroConfig, read_config_bytes
from ..errors import AdapterError, first_line
from ..files import parse_json_object
from .header import FLOAT_DTYPES, MAX_HEADER_BYTES
from .names import WEIGHTS_NAME
from .shapes import expected_shapes

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
