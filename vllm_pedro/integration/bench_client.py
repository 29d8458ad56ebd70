"""vLLM's own benchmark client, as it is: `python -m vllm_pedro.integration.bench_client ...`.

The same as `vllm bench serve ...`, also where vLLM came as the CPU wheel, whose `vllm` command
does not start by itself.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence

from .serve import name_the_distribution


def main(argv: Sequence[str]) -> None:
    """Run `vllm bench serve` with these arguments in this process."""
    name_the_distribution()
    from vllm.entrypoints.cli.main import main as vllm_main

    # vLLM reads sys.argv in several places.
    sys.argv = ["vllm", "bench", "serve", *argv]
    vllm_main()


if __name__ == "__main__":
    main(sys.argv[1:])
