"""The command ``vllm-pedro``. Nothing heavy is imported before a subcommand needs it."""

from __future__ import annotations

import argparse
import importlib
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .backbone import TARGET_MODULES, BackboneShape
from .config import ACTIVATIONS, CONFIG_NAME, POOLINGS, PedroConfig
from .errors import PedroError
from .training import cli as training_cli

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PretrainedConfig

    from .adapter import Adapter

PROGRAM = "vllm-pedro"

# Their arguments belong to another parser, which answers --help too.
HANDED_ON = {
    "bench": "vllm_pedro.bench.main",
    "demo": "vllm_pedro.demo",
    "serve": "vllm_pedro.integration.serve",
}


def make_parser() -> argparse.ArgumentParser:
    """The parser of all subcommands."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="PEDRO adapters: make them, look at them, serve them with vLLM.",
        allow_abbrev=False,
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    commands.add_parser(
        "bench", help="measure base, PEDRO and LoRA side by side (--quick)", add_help=False
    )
    commands.add_parser("demo", help="see adapters at work on a small model", add_help=False)
    commands.add_parser(
        "serve",
        help="an OpenAI-compatible server: 'vllm serve' with its arguments and PEDRO's",
        add_help=False,
    )

    fetch = commands.add_parser(
        "fetch-model",
        help="download the small model that the demo uses",
        description="Download and convert SmolLM2-135M-Instruct (93 MB; 270 MB on disk) unless it "
        "is in the cache. Prints its folder as the last line.",
    )
    fetch.add_argument("--cache", metavar="FOLDER", help="in place of $VLLM_PEDRO_CACHE")
    fetch.add_argument("--verify", action="store_true", help="check the contents of every file")
    fetch.add_argument("--quiet", action="store_true", help="print only the folder")
    fetch.set_defaults(run=run_fetch_model)

    inspect = commands.add_parser(
        "inspect",
        help="check an adapter and show what is in it",
        description="Read and check an adapter folder; show its config, size and tensors.",
    )
    inspect.add_argument("adapter", metavar="ADAPTER", nargs="?", help="an adapter folder")
    inspect.add_argument("--model", metavar="FOLDER", help="check too that it fits this model")
    inspect.add_argument(
        "--backends",
        action="store_true",
        help="show what runs PEDRO's operators here: native code, Triton or plain PyTorch",
    )
    training_cli.add_inspect_options(inspect)
    inspect.set_defaults(run=run_inspect)

    training_cli.add_parsers(commands)

    defaults = PedroConfig()
    init = commands.add_parser(
        "init",
        help="write a fresh adapter for a model",
        description="Write a fresh adapter, which leaves the model's answers as they are.",
    )
    init.add_argument("--model", metavar="FOLDER", required=True, help="a model's folder")
    init.add_argument("--output", metavar="FOLDER", required=True, help="where to write it")
    init.add_argument(
        "--r", type=int, default=defaults.r, help="inner width; 0: static vectors (%(default)s)"
    )
    init.add_argument(
        "--target-modules",
        nargs="+",
        metavar="NAME",
        default=defaults.target_modules,
        help=f"of {', '.join(TARGET_MODULES)} ({' '.join(defaults.target_modules)})",
    )
    init.add_argument("--pooling", choices=POOLINGS, default=defaults.pooling, help="(%(default)s)")
    init.add_argument(
        "--input-norm",
        choices=("none", "rms"),
        default=defaults.input_norm or "none",
        help="(%(default)s)",
    )
    init.add_argument(
        "--activation",
        nargs="+",
        choices=ACTIVATIONS,
        default=[defaults.activation],
        metavar="NAME",
        help=f"of {', '.join(ACTIVATIONS)}; one, or one for each layer ({defaults.activation})",
    )
    init.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    init.add_argument(
        "--scale",
        type=float,
        help="standard deviation of the vectors' weights: makes a random adapter, for trying out",
    )
    init.add_argument("--force", action="store_true", help="replace the adapter that is there")
    init.set_defaults(run=run_init)
    return parser


def run_fetch_model(args: argparse.Namespace) -> int:
    from .fetch import fetch_model

    print(fetch_model(args.cache, progress=not args.quiet, verify=args.verify))
    return 0


def run_inspect(args: argparse.Namespace) -> int:
    from .adapter import load_adapter

    if args.backends:
        print(describe_backends())
    if args.adapter is None:
        if not args.backends:
            raise PedroError("inspect needs an adapter folder, or --backends")
        return 0
    shape = None
    if args.model is not None:
        shape = BackboneShape.from_hf_config(_model_config(args.model))
    adapter = load_adapter(args.adapter, shape)
    print(describe(adapter))
    training_cli.inspect_more(adapter, args)
    return 0


def describe_backends() -> str:
    """What runs the operators here, and on what."""
    import torch

    from .ops import backends

    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    lines = [
        f"operators on the CPU   {backends.cpu}",
        f"operators on CUDA      {backends.cuda if devices else 'no device found'}",
        f"torch                  {torch.__version__}",
        *(f"device                 {name}" for name in devices),
    ]
    if backends.note:
        lines.append(f"native library         {backends.note}")
    return "\n".join(lines)


def run_init(args: argparse.Namespace) -> int:
    from .adapter import init_adapter, save_adapter

    output = Path(args.output)
    if (output / CONFIG_NAME).exists() and not args.force:
        raise PedroError(f"{output} holds an adapter already; --force replaces it")
    config = PedroConfig(
        base_model_name_or_path=args.model,
        r=args.r,
        target_modules=args.target_modules,
        pooling=args.pooling,
        input_norm=None if args.input_norm == "none" else args.input_norm,
        activation=args.activation[0] if len(args.activation) == 1 else args.activation,
        inference_mode=True,
    )
    shape = BackboneShape.from_hf_config(_model_config(args.model))
    adapter = init_adapter(config, shape, args.seed, args.scale)
    try:
        save_adapter(output, config, adapter.tensors)
    except OSError as error:
        raise PedroError(f"cannot write {output}: {error}") from error
    print(f"{output}: {config.num_parameters(shape):,} parameters")
    return 0


def _model_config(model: str) -> PretrainedConfig:
    """A model folder's config; only folders, since nothing is downloaded here."""
    from transformers import AutoConfig

    if not Path(model, "config.json").is_file():
        raise PedroError(f"{model}: expected a model's folder with a config.json")
    try:
        return AutoConfig.from_pretrained(model, local_files_only=True)
    except (OSError, ValueError, KeyError) as error:
        first = str(error).strip().splitlines()[0]
        raise PedroError(f"{model}: cannot read its config.json: {first}") from error


def describe(adapter: Adapter) -> str:
    """An adapter in words and numbers: config, size, and its tensors by kind."""
    generators = (".down_proj.weight", ".up_proj.weight")
    sizes = {name: tensor.numel() for name, tensor in adapter.tensors.items()}
    paper = sum(size for name, size in sizes.items() if name.endswith(generators))
    facts = {
        "folder": adapter.path,
        "digest": adapter.digest,
        **adapter.config.to_dict(),
        "layers": adapter.num_layers,
        "parameters": f"{sum(sizes.values()):,} ({paper:,} without biases and coefficients)",
    }
    lines = []
    for name, value in facts.items():
        text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
        lines.append(f"{name:<24} {text}")

    lines.append("")
    columns = "".join(f"{name:>11}" for name in ("mean", "std", "min", "max"))
    lines.append(f"{'tensors':<24} {'number':>6}  {'shape':<14}{columns}")
    kinds: dict[str, list[Tensor]] = {}
    for name, tensor in adapter.tensors.items():
        kinds.setdefault(name.split(".vector_generator.")[-1], []).append(tensor)
    for kind, tensors in kinds.items():
        # Each kind has one shape, which loading has checked.
        lines.append(f"{kind:<24} {len(tensors):>6}  {list(tensors[0].shape)!s:<14}{_row(tensors)}")
    return "\n".join(lines)


def _row(tensors: list[Tensor]) -> str:
    import torch

    values = torch.stack(tensors).double()
    statistics = (values.mean(), values.std(correction=0), values.min(), values.max())
    return "".join(f"{float(value):>11.4g}" for value in statistics)


def hand_on(command: str, argv: Sequence[str]) -> int:
    """Run a subcommand that reads its own arguments."""
    run: Callable[[Sequence[str]], int | None] = importlib.import_module(HANDED_ON[command]).main
    try:
        return run(argv) or 0
    except ModuleNotFoundError as error:
        if error.name != "vllm":
            raise
        raise PedroError(
            f"{command} needs vLLM: pip install 'vllm-pedro[cuda]' on NVIDIA, "
            "'vllm-pedro[cpu]' elsewhere"
        ) from error


def main(argv: Sequence[str] | None = None) -> int:
    """The entry point. Returns the exit status: 2 for what the user can put right."""
    argv = sys.argv[1:] if argv is None else argv
    try:
        if argv and argv[0] in HANDED_ON:
            return hand_on(argv[0], argv[1:])
        if argv and argv[0] == "train":
            return training_cli.main_train(make_parser(), argv)
        args = make_parser().parse_args(argv)
        return int(args.run(args))
    except PedroError as error:
        # One line, whatever is in a message that came from elsewhere.
        print(f"{PROGRAM}: error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        return 130


if __name__ == "__main__":
    sys.exit(main())
