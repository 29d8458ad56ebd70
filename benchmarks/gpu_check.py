"""Everything that has to be seen on a GPU: what PEDRO costs beside base and LoRA; what is right.

    python benchmarks/gpu_check.py --out results            # an NVIDIA GPU; start it again to go on
    python benchmarks/gpu_check.py --out results --parts decode first --minutes 4
    python benchmarks/gpu_check.py --render results         # one page of what is there
    python benchmarks/gpu_check.py --out results --small    # a rehearsal that runs on a CPU

Each part is one or more commands of this project. The first three run side by side, the others
alone. What a part prints goes to `PART.txt`, what `vllm-pedro bench` finds
to a folder of its own, how it ended to `results.jsonl`, all of it to `results.md`. Parts that ended
well on this card and revision are skipped. A part that fails or runs out of time costs the others
nothing. Exit status 1: something failed or was wrong.

Measured is the shape of Llama-3-8B with dummy weights in bfloat16; adapters of r = 12, LoRA of
r = 8, on q, v and up.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import entry_points
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from gpu_operators import MODELS

import vllm_pedro
from vllm_pedro.bench.results import now, versions
from vllm_pedro.demo import ADAPTERS, TENANTS
from vllm_pedro.ops import backends

ROOT = Path(vllm_pedro.__file__).resolve().parent.parent
HERE = Path(__file__).resolve().parent
TOGETHER = ("operators", "exactness", "fuzz")
ALONE = ("decode", "first", "running", "lora", "many", "profile", "bandwidth", "model", "serve")
PARTS = (*TOGETHER, *ALONE)


def commands(part: str, args: argparse.Namespace, folder: Path) -> list[list[str]]:
    """What a part runs; `folder` has the models."""
    model = folder / "model"
    small, shape = args.small, "small" if args.small else "Llama-3-8B"
    operators = [str(HERE / "gpu_operators.py")]
    fuzzer = [str(HERE.parent / "stress" / "schedule_fuzz.py"), "--seed", "11", "--cases", "100000"]
    fuzzer += ["--minutes", "0.03" if small else str(args.minutes / 10)]
    soak = [str(HERE.parent / "stress" / "soak.py"), "--minutes", "0.1" if small else "1"]
    soak += ["--clients", "3" if small else "32", "--max-growth", "100"]
    soak += ["--model", str(folder / "served")]
    served = [str(HERE / "measure.py"), "served", "--limit", "4" if small else "40"]
    served += ["--data", str(ROOT / "examples/demo_data/brief/train.jsonl")]
    served += ["--scores", "exact-match", "--adapter"]
    profile = [str(HERE / "measure.py"), "profile", "--model", str(model)]
    profile += ["--llm", llm_options(small, kv_cache_memory_bytes=(1 if small else 40) << 27)]
    profile += ["--mode", "eager" if small else "compiled", "--prompt-tokens", "16"]
    profile += ["--repeats", "1" if small else "7", "--rows"]

    def bench(name: str, *words: str, lora: bool = False, **llm: Any) -> list[str]:
        command = ["-m", "vllm_pedro.cli", "bench", "offline", "--output", str(args.out / name)]
        kinds = ("base", "pedro", "lora") if lora else ("base", "pedro")
        command += ["--engines", *(f"{kind}-{'eager' if small else 'compiled'}" for kind in kinds)]
        command += ["--model", str(model), "--no-plots", "--dtype", "bfloat16"]
        command += ["--llm", llm_options(small, **llm), "--minutes", str(args.minutes / 2)]
        command += ["--repeats", "1" if small else "16"]
        command += ["--kv-cache-mib", "128" if small else "5120"]
        command += ["--prompt-tokens", "32", "--output-tokens", "16" if small else "128"]
        return [*command, *words]

    rows = ["1", "4"] if small else ["1", "32", "256"]
    some, many = (["1", "4"], ["2"]) if small else (["1", "8", "32"], ["64", "128", "256"])
    more = {"max_loras": int(many[-1]), "max_cpu_loras": 320}
    return {
        "operators": [[*operators, "check", "cpu" if small else "cuda", shape]],
        "exactness": [["-m", "vllm_pedro.cli", "verify"]],
        # Eager, and with CUDA graphs.
        "fuzz": [
            [*fuzzer, "--runner", runner, *mode]
            for runner in (("v1",) if small else ("v2", "v1"))
            for mode in (([],) if small else ([], ["--compiled"]))
        ],
        "model": [[*served, str(ADAPTERS / tenant)] for tenant in TENANTS[: 1 if small else None]],
        "serve": [soak],
        "decode": [
            bench(part, "--workloads", "decode", "overhead", "--rows", *rows, "--tenants", *some),
            bench(f"{part} by many", "--workloads", "decode", "--rows", rows[-1],
                  "--tenants", *many),
        ],
        "first": [
            bench(part, "--workloads", "break-even", "prefill", "tenants", "--rows", rows[-2])
            + (["--prompts", "16", "64", "--tenants", "6"] if small else
               ["--prompts", "32", "128", "512", "2000", "--tenants", "32", "256", "1000"]),
        ],
        "running": [bench(part, "--workloads", "mixed", "--rows", rows[-2], "--tenants", rows[-2])],
        "lora": [
            bench(part, "--workloads", "decode", "--rows", *rows, "--tenants", *some, lora=True),
            bench(f"{part} by many", "--workloads", "decode", "--rows", rows[-1],
                  "--tenants", *many, lora=True, **more),
        ],
        "many": [
            bench(part, "--workloads", "decode", "--rows", "8" if small else "1024",
                  "--tenants", *some, "--kv-cache-mib", "128" if small else "20480"),
        ],
        "profile": [[*profile, number] for number in (rows[-1:] if small else rows)],
        "bandwidth": [[*operators, "bandwidth", "cpu" if small else "cuda", shape]],
    }[part]  # fmt: skip


def llm_options(small: bool, **more: Any) -> str:
    """Keywords of all engines that are measured; PEDRO's as a server has them by default."""
    found = {"load_format": "dummy", "skip_tokenizer_init": True, "max_pedros": None}
    if not small:
        found["compilation_config"] = {"cudagraph_capture_sizes": [2**n for n in range(11)]}
    return json.dumps(found | more)


def write_models(small: bool, folder: Path) -> Path:
    """`model`, a configuration alone, for what is measured; `served`, a small one with random
    weights and a tokenizer, for what is checked."""
    from tokenizers import Tokenizer, models
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
    from transformers.utils import logging

    logging.disable_progress_bar()
    torch.manual_seed(0)
    shapes = {"model": MODELS["small" if small else "Llama-3-8B"]}
    shapes["served"] = MODELS["small"] | {"vocab_size": MODELS["SmolLM2-135M"]["vocab_size"]}
    for name, shape in shapes.items():
        config = LlamaConfig(
            **shape,
            max_position_embeddings=40960,
            initializer_range=0.15,
            tie_word_embeddings=False,
        )
        config.architectures = ["LlamaForCausalLM"]
        (config if name == "model" else LlamaForCausalLM(config)).save_pretrained(folder / name)
    words = {f"w{i}": i for i in range(config.vocab_size)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w1")
    fast.save_pretrained(folder / "served")
    return folder


def about(small: bool) -> dict[str, Any]:
    """Card, versions and revision."""
    card = "CPU"
    if not small:
        memory = torch.cuda.get_device_properties(0).total_memory / 2**30
        card = f"{torch.cuda.get_device_name()} ({memory:.0f} GiB)"
    operators = backends.cpu if small else backends.cuda
    return {"card": card, "versions": versions(), "operators": operators, "revision": revision()}


def revision() -> str:
    """Git's name of what is measured, if there is one, and a digest of the sources."""
    digest = hashlib.sha256()
    for file in sorted(p for d in ("vllm_pedro", "csrc") for p in (ROOT / d).rglob("*.*")):
        if file.suffix in (".py", ".cpp", ".cu", ".h", ".cuh"):
            digest.update(file.read_bytes())
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    head = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    return f"{head or 'without git'}, sources {digest.hexdigest()[:10]}"


def prepare_environment(folder: Path, small: bool) -> None:
    """What the processes need to find this project, and the plugin in it."""
    paths = [str(ROOT), str(HERE)]
    if not any(e.name == "vllm_pedro" for e in entry_points(group="vllm.general_plugins")):
        # A copy that was not installed: vLLM finds plugins by their distribution.
        info = folder / "plugin" / "vllm_pedro-0.dist-info"
        info.mkdir(parents=True)
        (info / "METADATA").write_text("Metadata-Version: 2.1\nName: vllm_pedro\nVersion: 0\n")
        (info / "entry_points.txt").write_text(
            "[vllm.general_plugins]\nvllm_pedro = vllm_pedro.integration.plugin:register\n"
        )
        paths.append(str(info.parent))
    os.environ["PYTHONPATH"] = os.pathsep.join([*paths, os.environ.get("PYTHONPATH", "")])
    for name in ("HF_HUB_OFFLINE", "VLLM_NO_USAGE_STATS"):
        os.environ.setdefault(name, "1")
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "ERROR")
    os.environ.setdefault("TRITON_F32_DEFAULT", "ieee")  # what is compared is float32
    if find_spec("flashinfer") is None:
        os.environ.setdefault("VLLM_USE_FLASHINFER_SAMPLER", "0")
    if small:  # threads that wait must not spin
        os.environ["CUDA_VISIBLE_DEVICES"] = ""
        os.environ.setdefault("OMP_NUM_THREADS", "1")
        os.environ.setdefault("OMP_WAIT_POLICY", "passive")
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", "nobind")


class Run:
    """One start: what it is about, and what it writes."""

    def __init__(self, args: argparse.Namespace, folder: Path) -> None:
        self.args, self.folder, self.about = args, folder, about(args.small)
        self.file = args.out / "results.jsonl"
        args.out.mkdir(parents=True, exist_ok=True)

    def done(self, part: str) -> bool:
        """Whether it ended well on this card and revision."""
        return any(
            row["part"] == part and not row["failed"] and row["about"] == self.about
            for row in read(self.file)
        )

    def run(self, part: str) -> bool:
        """Run a part's commands; whether all ended well."""
        begin, failed = time.monotonic(), []
        deadline = begin + 60 * self.args.minutes
        with open(self.args.out / f"{part}.txt", "w") as output:
            for command in commands(part, self.args, self.folder):
                shown = " ".join(Path(w).name if w.startswith("/") else w for w in command)
                print(f"$ python {shown}", file=output, flush=True)
                if why := run_until(deadline, command, output):
                    print(why, file=output, flush=True)
                    failed.append(f"{shown}: {why}")
        seconds = round(time.monotonic() - begin, 1)
        row = {"part": part, "failed": failed, "seconds": seconds, "time": now()}
        with open(self.file, "a") as file:
            file.write(json.dumps(row | {"about": self.about}) + "\n")
        print(f"{part}: {'; '.join(failed) or 'done'}, {seconds:.0f} s", flush=True)
        return not failed


def run_until(deadline: float, command: list[str], output: Any) -> str:
    """Run a script until a time of `time.monotonic`, then end it and what it has started; why it
    did not end well."""
    process = subprocess.Popen(
        [sys.executable, *command],
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        status = process.wait(max(0.1, deadline - time.monotonic()))
        return f"exit status {status}" if status else ""
    except subprocess.TimeoutExpired:
        process.terminate()  # so that it ends its servers, which are no part of its group
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
        return "stopped: no time left"
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def read(file: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []


def render(folder: Path) -> str:
    """Write `results.md`: the last outcome of each part, and what it printed or reported."""
    last = {row["part"]: row for row in read(folder / "results.jsonl")}
    text = "# Results\n"
    for part in [p for p in PARTS if p in last]:
        row = last[part]
        found = ", ".join(f"{key} {value}" for key, value in row["about"]["versions"].items())
        text += f"\n## {part}\n\n{row['about']['card']}, {found}; operators: "
        text += f"{row['about']['operators']}; revision {row['about']['revision']}; {row['time']}, "
        text += f"{row['seconds']} s. " + ("; ".join(row["failed"]) or "Nothing failed.") + "\n"
        reports = sorted(folder.glob(f"{part}*/report.md"))
        for report in reports:
            text += "\n" + report.read_text().replace("\n## ", "\n### ").replace("## ", "### ", 1)
        if not reports or row["failed"]:
            text += f"\n```\n{(folder / f'{part}.txt').read_text().strip()[-20_000:]}\n```\n"
    (folder / "results.md").write_text(text)
    return text


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add, which = parser.add_argument, f"of {', '.join(PARTS)}; default all"
    add("--out", type=Path, metavar="DIR", help="where results are and go")
    add("--parts", nargs="+", choices=PARTS, default=PARTS, metavar="PART", help=which)
    add("--minutes", type=float, default=8.0, help="for each part (%(default)s)")
    add("--small", action="store_true", help="a rehearsal that runs on a CPU")
    add("--render", type=Path, metavar="DIR", help="only write the page again")
    args = parser.parse_args()
    if args.render:
        print(render(args.render))
        return 0
    if args.out is None:
        parser.error("--out DIR is needed")
    if not args.small and not torch.cuda.is_available():
        parser.error("no GPU was found; --small runs on a CPU")
    with tempfile.TemporaryDirectory() as folder:
        prepare_environment(Path(folder), args.small)
        run = Run(args, write_models(args.small, Path(folder)))
        todo = []
        for part in args.parts:
            if run.done(part):
                print(f"{part}: done before", flush=True)
            else:
                todo.append(part)
        with ThreadPoolExecutor(2 if args.small else 6) as jobs:
            good = list(jobs.map(run.run, [p for p in TOGETHER if p in todo]))
        good += [run.run(part) for part in ALONE if part in todo]
    render(args.out)
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main())
