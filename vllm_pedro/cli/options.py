"""Options that `vllm-pedro init` and `train` share, and the config that they make."""

from __future__ import annotations

import argparse

from ..backbone import TARGET_MODULES
from ..config import ACTIVATIONS, POOLINGS, SCOPES, PedroConfig


def add_adapter_options(
    parser: argparse._ActionsContainer, input_norm: str, activation: str | None = "rational"
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
        help=f"of {', '.join(TARGET_MODULES)} ({' '.join(defaults.target_modules)})",
    )
    parser.add_argument(
        "--pooling", choices=POOLINGS, default=defaults.pooling, help="(%(default)s)"
    )
    parser.add_argument(
        "--input-norm", choices=("none", "rms"), default=input_norm, help="(%(default)s)"
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
