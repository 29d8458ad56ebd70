"""Base, PEDRO and LoRA servers in turns under vLLM's own client: ``vllm-pedro bench serving``.

python benchmarks/bench_serving.py --tenants 8 --concurrency 4 16
"""

import sys

from vllm_pedro.cli import main

if __name__ == "__main__":
    sys.exit(main(["bench", "serving", *sys.argv[1:]]))
