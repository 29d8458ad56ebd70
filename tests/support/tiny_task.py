"""A model, a tokenizer and data that are small enough to train on in a test."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}<eos>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a byte, three special tokens, and a <bos> before every text."""
    special = ["<pad>", "<bos>", "<eos>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {token: number for number, token in enumerate(special + alphabet)}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", vocabulary["<bos>"])]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        chat_template=CHAT_TEMPLATE,
    )


def make_backbone(seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """A random Llama of two small layers whose answers depend on everything before them."""
    settings: dict[str, Any] = {
        "vocab_size": 260,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,  # the least that vLLM serves on the CPU
        "max_position_embeddings": 128,
        "initializer_range": 0.15,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(seed)
    return LlamaForCausalLM(LlamaConfig(**(settings | changes)))


def make_folder(folder: Path, seed: int = 0) -> Path:
    """Save such a model with its tokenizer."""
    make_backbone(seed).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def make_rows(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows of a task: are these two letters the same?"""
    generator = random.Random(seed)
    rows = []
    for _ in range(number):
        first = generator.choice("abcd")
        second = first if generator.random() < 0.5 else generator.choice("abcd")
        answer = " yes" if first == second else " no"
        rows.append(
            {"prompt": f"{first}{second}{'!' * generator.randrange(3)}:", "completion": answer}
        )
    return rows


def make_prompts(number: int, seed: int = 0) -> list[dict[str, str]]:
    """Rows without completions."""
    draw = random.Random(seed)
    return [
        {"prompt": "".join(draw.choice("abcdefgh") for _ in range(draw.randrange(3, 9))) + ":"}
        for _ in range(number)
    ]


def write_rows(path: Path, rows: list[Any]) -> Path:
    """Write a JSONL file."""
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path
