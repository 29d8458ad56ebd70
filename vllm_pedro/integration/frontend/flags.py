"""`vllm serve --enable-pedro ...`: flags that vLLM's command line learns.

They travel in the parsed arguments, which reach every API server process before plugins load there:
engine options in `additional_config`, modules and root in `lora_modules`.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...adapter import repository_of
from ...architectures import EXPERTS_UP, MODULES
from ...config import CONFIG_NAME, PedroConfig
from ...errors import PedroError
from ..options import CONFIG_KEY, ENABLE_KEYWORD, OPTION_NAMES, PedroOptions
from .folders import check_name
from .prompt_length import WHOLE, WORDS, PooledPromptHeaders


@dataclass(frozen=True, slots=True)
class PedroModulePath:
    """One of `--pedro-modules`.

    Attributes:
        name: Its model name.
        path: Its folder, or a repository of the hub.
        base_model_name: The name among those of the base model that `/v1/models` gives as parent.
    """

    name: str
    path: str
    base_model_name: str | None = None


class AdapterModules(list[Any]):
    """The value of `lora_modules`: LoRA's modules, and beside them what PEDRO was given."""

    pedro: list[PedroModulePath]
    root: Path | None
    prompt_length: str

    def __init__(
        self,
        lora: Iterable[Any] = (),
        pedro: Sequence[PedroModulePath] = (),
        root: Path | None = None,
        prompt_length: str = WHOLE,
    ) -> None:
        super().__init__(lora)
        self.pedro = list(pedro)
        self.root = root
        self.prompt_length = prompt_length


def parse_modules(items: Iterable[str]) -> list[PedroModulePath]:
    """Parse `name=path`, a JSON object with the keys `name`, `path` and, if need be,
    `base_model_name`, or a JSON list of such objects.

    Raises:
        PedroError: Says which item is wrong and how.
    """
    found: list[PedroModulePath] = []
    for item in items:
        if item.lstrip().startswith(("{", "[")):
            found += _parse_json(item)
        else:
            name, equals, path = item.partition("=")
            if not equals:
                raise PedroError(f"{item!r}: expected name=path, or JSON")
            found.append(PedroModulePath(name, path))
    for module in found:
        check_name(module.name)
        if not module.path:
            raise PedroError(f"{module.name}: the path is empty")
    names = [module.name for module in found]
    if len(set(names)) < len(names):
        twice = sorted({name for name in names if names.count(name) > 1})
        raise PedroError(f"names given twice: {', '.join(twice)}")
    return found


def _parse_json(item: str) -> list[PedroModulePath]:
    try:
        values = json.loads(item)
    except ValueError as error:
        raise PedroError(f"{item!r}: invalid JSON: {error}") from None
    found = []
    for value in values if isinstance(values, list) else [values]:
        known = ("name", "path", "base_model_name")
        if (
            not isinstance(value, dict)
            or not {"name", "path"} <= set(value) <= set(known)
            or not all(
                isinstance(v, str) for k, v in value.items() if v is not None or k != known[2]
            )
        ):
            raise PedroError(
                f"{value!r}: expected an object with the strings name and path, and optionally "
                "base_model_name"
            )
        found.append(PedroModulePath(**value))
    return found


class _ModulesAction(argparse.Action):
    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        before = getattr(namespace, self.dest, None) or []
        try:
            parsed = parse_modules(values)
            twice = {m.name for m in before} & {m.name for m in parsed}
            if twice:
                raise PedroError(f"names given twice: {', '.join(sorted(twice))}")
        except PedroError as error:
            parser.error(f"{option_string or '--pedro-modules'}: {error}")
        setattr(namespace, self.dest, [*before, *parsed])


def _positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def _size(text: str) -> int:
    from vllm.utils.argparse_utils import human_readable_int

    value = human_readable_int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {value}")
    return value


def add_flags(parser: Any) -> Any:
    """Add PEDRO's flags to vLLM's parser."""
    defaults = PedroOptions()
    group = parser.add_argument_group(
        "PedroConfig",
        "PEDRO adapters: --enable-pedro, --pedro-modules, --max-pedros, --max-cpu-pedros, "
        "--pedro-memory-bytes, --max-pedro-rank, --pedro-target-modules, --pedro-root, "
        "--pedro-prompt-length.",
    )
    group.add_argument(
        "--enable-pedro",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="Serve PEDRO adapters.",
    )
    group.add_argument(
        "--pedro-modules",
        default=argparse.SUPPRESS,  # so that what was given can be told
        nargs="+",
        action=_ModulesAction,
        metavar="NAME=PATH",
        help="Adapters and the model names they are served under: name=path, name=org/repo or "
        "name=org/repo@revision of the Hugging Face hub, or JSON as "
        '--lora-modules takes it: {"name": "...", "path": "...", "base_model_name": "..."}, or a '
        "list of such objects.",
    )
    group.add_argument(
        "--max-pedros",
        default=argparse.SUPPRESS,
        type=_positive,
        metavar="N",
        help="Most different adapters prefilled in one step, not those that decode in one batch. "
        "(default: as many as the device's memory for adapters holds)",
    )
    group.add_argument(
        "--max-cpu-pedros",
        default=argparse.SUPPRESS,
        type=_positive,
        metavar="N",
        help="Adapters in host memory. (default: 4 * max-pedros, or four times what the device's "
        "memory for adapters holds of the largest; on the CPU what that memory holds)",
    )
    group.add_argument(
        "--pedro-memory-bytes",
        default=argparse.SUPPRESS,
        type=_size,
        metavar="BYTES",
        help="The device's memory for adapters, also as 512M or 4G. (default: a twentieth of the "
        "device's memory, and enough for 8 adapters of the highest rank, or max-pedros)",
    )
    group.add_argument(
        "--max-pedro-rank",
        default=argparse.SUPPRESS,
        type=_positive,
        metavar="R",
        help=f"Highest r of an adapter. (default: {defaults.max_pedro_rank})",
    )
    group.add_argument(
        "--pedro-target-modules",
        default=argparse.SUPPRESS,
        nargs="+",
        choices=MODULES,
        metavar="NAME",
        help=f"Projections that can be scaled, of {', '.join(MODULES)}; fewer make the "
        "vector store smaller and decoding faster. (default: those of --pedro-modules where no "
        f"others can be loaded at run time, else all but {EXPERTS_UP})",
    )
    group.add_argument(
        "--pedro-root",
        default=argparse.SUPPRESS,
        metavar="DIR",
        help="With VLLM_ALLOW_RUNTIME_LORA_UPDATING: the only directory that adapters can be "
        "loaded from at run time, links resolved; a model name that is not known is looked up in "
        "it. (default: anywhere, and no names are looked up)",
    )
    group.add_argument(
        "--pedro-prompt-length",
        default=argparse.SUPPRESS,
        choices=WORDS,
        help="What chats pool where the request's pedro_prompt_length does not say: the whole "
        "prompt of each turn, or the first turn's prompt in every turn, whose vectors and KV "
        f"blocks later turns then share. (default: {WHOLE})",
    )
    return parser


def apply_flags(args: Any) -> None:
    """Put what the flags said where each process of the server finds it; harmless to repeat.

    Raises:
        ValueError: Flags that do not go together, or a root that is not a directory.
    """
    if isinstance(getattr(args, "lora_modules", None), AdapterModules):
        return
    names = (*OPTION_NAMES, "pedro_modules", "pedro_root", "pedro_prompt_length")
    given = {name: getattr(args, name, None) for name in names}
    if not getattr(args, ENABLE_KEYWORD, False):
        unused = [f"--{n.replace('_', '-')}" for n, value in given.items() if value is not None]
        if unused:
            raise ValueError(f"{', '.join(unused)}: add --enable-pedro")
        return
    from vllm import envs

    if envs.VLLM_USE_RUST_FRONTEND:
        raise ValueError(
            "PEDRO does not run with vLLM's Rust front end, which has no plugins: unset "
            "VLLM_USE_RUST_FRONTEND"
        )
    if getattr(args, "grpc", False) and given["pedro_modules"]:
        raise ValueError("--pedro-modules is for the HTTP server; --grpc has no adapters by name")
    lora = list(getattr(args, "lora_modules", None) or [])
    pedro = given["pedro_modules"] or []
    twice = {module.name for module in lora} & {module.name for module in pedro}
    if twice:
        raise ValueError(
            f"names in --pedro-modules and in --lora-modules: {', '.join(sorted(twice))}"
        )
    # Whole folders are checked once the model's shape is known; a slip in a path need not wait.
    missing = [
        m
        for m in pedro
        if repository_of(m.path) is None
        and not os.path.isfile(Path(m.path).expanduser() / CONFIG_NAME)
    ]
    if missing:
        shown = ", ".join(f"{module.name}={module.path}" for module in missing[:10])
        more = f" and {len(missing) - 10} more" if len(missing) > 10 else ""
        raise ValueError(f"--pedro-modules: no {CONFIG_NAME} in {shown}{more}")
    others = envs.VLLM_ALLOW_RUNTIME_LORA_UPDATING or envs.VLLM_SERVER_DEV_MODE  # its own route
    if given["pedro_target_modules"] is None and not others:
        given["pedro_target_modules"] = _target_modules_of(pedro)
    options = PedroOptions.from_keywords({name: given[name] for name in OPTION_NAMES})
    args.additional_config = {
        **(getattr(args, "additional_config", None) or {}),
        CONFIG_KEY: options.to_config(),
    }
    root = None
    if given["pedro_root"] is not None:
        root = Path(os.path.realpath(os.path.expanduser(given["pedro_root"])))
        if not root.is_dir():
            raise ValueError(f"--pedro-root {given['pedro_root']}: not a directory")
    args.lora_modules = AdapterModules(lora, pedro, root, given["pedro_prompt_length"] or WHOLE)
    if hasattr(args, "middleware"):
        headers = PooledPromptHeaders
        args.middleware = [*args.middleware, f"{headers.__module__}.{headers.__qualname__}"]


def _target_modules_of(modules: Sequence[PedroModulePath]) -> list[str] | None:
    """What the adapters of a server that loads no others scale: less for each step to read.

    Returns:
        None where they do not say, in part or all: those of the hub, for example, which come later.
    """
    found: set[str] = set()
    for module in modules:
        try:
            config = PedroConfig.from_pretrained(Path(module.path).expanduser())
        except PedroError:  # reported with all others, once the model's shape is known
            return None
        found.update(config.target_modules)
    return sorted(found) or None


def add_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `EngineArgs`."""

    def wrapped(parser: Any) -> Any:
        return add_flags(original(parser))

    return wrapped


def from_cli_args(original: Callable[..., Any]) -> Callable[..., Any]:
    """Patch of `EngineArgs`."""

    def wrapped(cls: Any, args: Any) -> Any:
        apply_flags(args)
        return original(cls, args)

    return wrapped
