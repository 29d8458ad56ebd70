"""Options that commands share, and the config that some of them make."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

from ..architectures import MODULES
from ..config import ACTIVATIONS, POOLINGS, SCOPES, PedroConfig
from ..errors import PedroError
from ..files import shorten
from ..training.choices import PROMPT_LENGTHS


def add_adapter_options(
    parser: argparse._ActionsContainer, activation: str | None = "rational"
) -> None:
    """The options that make a `PedroConfig`; without an `activation` the recipe has it."""
    defaults = PedroConfig()
    parser.add_argument(
        "--r", type=int, default=defaults.r, help="inner width; 0: static vectors (%(default)s)"
    )
    parser.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=defaults.target_modules,
        help=f"of {', '.join(MODULES)} ({' '.join(defaults.target_modules)})",
    )
    parser.add_argument(
        "--pooling", choices=POOLINGS, default=defaults.pooling, help="(%(default)s)"
    )
    parser.add_argument(
        "--input-norm", choices=("none", "rms"), default="rms", help="(%(default)s)"
    )
    parser.add_argument(
        "--down-bias", action="store_true", help="give the generators a bias b_down after W_down"
    )
    parser.add_argument(
        "--scope",
        choices=SCOPES,
        default=defaults.scope,
        help="tokens that are scaled: all, or from the prompt's last one on (%(default)s)",
    )
    parser.add_argument(
        "--activation",
        nargs="+",
        choices=ACTIVATIONS,
        default=None if activation is None else [activation],
        metavar="NAME",
        help=f"of {', '.join(ACTIVATIONS)}; one, or one for each layer "
        f"({activation or 'the recipe has it'})",
    )


def refuse_adapter_options(argv: Sequence[str]) -> None:
    """Refuse `add_adapter_options`'s options where an adapter is there that says it all.

    Raises:
        PedroError: names the options.
    """
    parser = argparse.ArgumentParser()
    add_adapter_options(parser)
    known = parser._option_string_actions
    given = [word.partition("=")[0] for word in argv]
    found = [name for name in given if name in known and name not in ("-h", "--help")]
    if found:
        raise PedroError(f"--adapter: its config holds; {shorten(found)} cannot be given")


def config_of(args: argparse.Namespace, inference_mode: bool = False) -> PedroConfig:
    """The config that `add_adapter_options` and `--model` ask for."""
    return PedroConfig(
        base_model_name_or_path=getattr(args, "base_model_name", None) or args.model,
        r=args.r,
        target_modules=args.target_modules,
        pooling=args.pooling,
        input_norm=None if args.input_norm == "none" else args.input_norm,
        down_bias=args.down_bias,
        scope=args.scope,
        activation=args.activation[0] if len(args.activation) == 1 else args.activation,
        inference_mode=inference_mode,
    )


def _json_object(text: str) -> dict[str, Any]:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"invalid JSON: {error}") from None
    if not isinstance(value, dict):
        raise argparse.ArgumentTypeError(f"expected a JSON object, found {text}")
    return value


def add_chat_options(parser: Any) -> None:
    """How chats are rendered and what is pooled of them, as a server has it."""
    parser.add_argument(
        "--chat-template-kwargs",
        metavar="JSON",
        type=_json_object,
        help="what the chat template is given, e.g. '{\"enable_thinking\": false}', as requests to "
        "a server give it; rows have the last word",
    )
    parser.add_argument(
        "--prompt-length",
        choices=PROMPT_LENGTHS,
        default=PROMPT_LENGTHS[0],
        help="what is pooled of rows with 'messages': all before the last one, or the first turn's "
        "prompt alone, as a server with --pedro-prompt-length first_turn does (%(default)s)",
    )
