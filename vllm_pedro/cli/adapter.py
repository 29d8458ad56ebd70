"""The commands `vllm-pedro init` and `inspect`. Parsers are built without torch."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..backbone import BackboneShape
from ..config import CONFIG_NAME
from ..errors import PedroError
from .options import add_adapter_options, add_chat_options, config_of

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapter import Adapter


def add_parsers(commands: Any) -> None:
    """Add the subcommands of this module."""
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
    add_inspect_options(inspect)
    inspect.set_defaults(run=run_inspect)

    init = commands.add_parser(
        "init",
        help="write a fresh adapter for a model",
        description="Write a fresh adapter, which leaves the model's answers as they are.",
    )
    init.add_argument("--model", metavar="FOLDER", required=True, help="a model's folder")
    init.add_argument("--output", metavar="FOLDER", required=True, help="where to write it")
    add_adapter_options(init)
    init.add_argument("--seed", type=int, default=0, help="(%(default)s)")
    init.add_argument(
        "--scale",
        type=float,
        help="standard deviation of the vectors' weights: makes a random adapter, for trying out",
    )
    init.add_argument("--force", action="store_true", help="replace the adapter that is there")
    init.set_defaults(run=run_init)


def add_inspect_options(parser: argparse.ArgumentParser) -> None:
    """The options of `vllm-pedro inspect` that look into what was learnt."""
    parser.add_argument("--layers", action="store_true", help="show statistics of each layer")
    parser.add_argument(
        "--data",
        metavar="FILE",
        help="show how the vectors differ over the prompts of this file; needs --model",
    )
    add_chat_options(parser)
    parser.add_argument("--limit", type=int, metavar="N", default=50, help="prompts (%(default)s)")
    parser.add_argument(
        "--plot",
        metavar="FILE.png",
        help="draw the activation functions, and with --data the vectors' spread",
    )


def run_inspect(args: argparse.Namespace) -> int:
    from ..adapter import load_adapter

    if args.backends:
        print(describe_backends())
    if args.adapter is None:
        if not args.backends:
            raise PedroError("inspect needs an adapter folder, or --backends")
        return 0
    shape = None
    if args.model is not None:
        shape = BackboneShape.from_pretrained(args.model)
    if args.data is not None and args.model is None:
        raise PedroError("--data needs --model: the vectors are made from the model's states")
    adapter = load_adapter(args.adapter, shape)
    if not (args.layers or args.data or args.plot):
        print(describe(adapter))
        return 0
    inspect_more(adapter, args)
    return 0


def inspect_more(adapter: Adapter, args: argparse.Namespace) -> None:
    """What `inspect` prints and draws when asked for more than the files' contents.

    Raises:
        PedroError: unusable data.
    """
    from ..training import inspection

    spread = None
    if args.data is not None:
        from ..training.run import load_rows

        model, rows = load_rows(
            args.model,
            args.adapter,
            args.data,
            args.limit,
            args.prompt_length,
            args.chat_template_kwargs,
        )
        prompts = [row.prompt[: row.prompt_length] for row in rows]
        vectors = inspection.vectors_of_prompts(model, prompts)
        spread = inspection.spread_over_prompts(vectors)
        # First, because it is what an adapter is for.
        if len(rows) > 1:
            use = inspection.prompt_use(model, rows, vectors)
            print(inspection.describe_use(use) + "\n")
    print(describe(adapter))
    if args.layers:
        print("\n" + inspection.describe_layers(adapter))
    if spread is not None:
        print("\n" + inspection.describe_spread(spread, len(prompts)))
    if args.plot is not None:
        inspection.plot(adapter, args.plot, spread)
        print(f"\ndrawn: {args.plot}")


def describe_backends() -> str:
    """What runs the operators here, and on what."""
    import torch

    from ..ops import backends

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
    from ..adapter import init_adapter, save_adapter

    output = Path(args.output)
    if (output / CONFIG_NAME).exists() and not args.force:
        raise PedroError(f"{output} holds an adapter already; --force replaces it")
    if args.scale is not None and not args.scale >= 0:
        raise PedroError(f"--scale: expected 0 or more, found {args.scale:g}")
    config = config_of(args, inference_mode=True)
    shape = BackboneShape.from_pretrained(args.model)
    adapter = init_adapter(config, shape, args.seed, args.scale)
    try:
        save_adapter(output, config, adapter.tensors)
    except OSError as error:
        raise PedroError(f"cannot write {output}: {error}") from error
    print(f"{output}: {config.num_parameters(shape):,} parameters")
    return 0


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
