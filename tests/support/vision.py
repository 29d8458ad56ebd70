"""Small random models that see: with tokenizer, processor and chat template."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from architectures import COMMON
from safetensors.torch import load_file, save_file
from tiny_task import make_tokenizer

TORCHVISION = "torchvision==0.28.0"
"""That of the torch that vLLM's CPU build takes."""

META = {"format": "pt"}
TEXT = COMMON | {"vocab_size": 272, "max_position_embeddings": 512}
VISION: dict[str, Any] = {
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 3,  # as many as the language model has, which could be mistaken
    "num_attention_heads": 2,
    "patch_size": 8,
    "initializer_range": 0.15,
}
CHAT_TEMPLATE = (
    "{{% for m in messages %}}<|{{{{ m['role'] }}}}|>{{% if m['content'] is string %}}"
    "{{{{ m['content'] }}}}{{% else %}}{{% for part in m['content'] %}}"
    "{{% if part['type'] == 'text' %}}{{{{ part['text'] }}}}{{% else %}}{image}{{% endif %}}"
    "{{% endfor %}}{{% endif %}}<eos>\n{{% endfor %}}"
    "{{% if add_generation_prompt %}}<|assistant|>{{% endif %}}"
)


def _tokenizer(placeholder: str, **special: str) -> Any:
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast(
        tokenizer_object=make_tokenizer().backend_tokenizer,
        pad_token="<pad>",
        bos_token="<bos>",
        eos_token="<eos>",
        extra_special_tokens=special,
        chat_template=CHAT_TEMPLATE.format(image=placeholder),
    )


def _save(model_class: Any, config: Any, processor: Any, folder: Path) -> Path:
    torch.manual_seed(0)
    model = model_class(config).float()
    with torch.no_grad():
        for key, parameter in model.named_parameters():
            if key.endswith("bias") or "mm_input_projection" in key:  # they begin as zero
                parameter.normal_(0.0, 0.3)
            elif "norm" in key:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        # What stands for images is never generated: transformers would look for theirs.
        model.get_output_embeddings().weight[len(make_tokenizer()) :] = 0.0
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return folder


def make_mistral3(folder: Path) -> Path:
    """Pixtral's tower, a patch merger, Mistral. An image of 32 x 32 pixels takes 6 tokens."""
    import transformers

    tokenizer = _tokenizer(
        "[IMG]", image_token="[IMG]", image_break_token="[IMG_BREAK]", image_end_token="[IMG_END]"
    )
    config = transformers.Mistral3Config(
        vision_config=transformers.PixtralVisionConfig(**VISION, image_size=64, head_dim=32),
        text_config=transformers.MistralConfig(**TEXT, sliding_window=None),
        image_token_index=tokenizer.convert_tokens_to_ids("[IMG]"),
        spatial_merge_size=2,
        vision_feature_layer=-1,
    )
    processor = transformers.PixtralProcessor(
        transformers.PixtralImageProcessor(size={"longest_edge": 64}, patch_size=8),
        tokenizer,
        patch_size=8,
        spatial_merge_size=2,
        chat_template=tokenizer.chat_template,
    )
    return _save(transformers.Mistral3ForConditionalGeneration, config, processor, folder)


def make_gemma3(folder: Path) -> Path:
    """SigLIP's tower, Gemma 3. An image takes 4 tokens, and 4 around them."""
    import transformers

    tokens = {
        "image_token": "<image_soft_token>",
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
    }
    tokenizer = _tokenizer(tokens["boi_token"], **tokens)
    tokenizer.add_tokens(["\n" * number for number in range(1, 5)])  # vLLM looks for them
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    config = transformers.Gemma3Config(
        vision_config=transformers.SiglipVisionConfig(**VISION, image_size=32),
        text_config=transformers.Gemma3TextConfig(
            **TEXT, sliding_window=64, query_pre_attn_scalar=32
        ),
        mm_tokens_per_image=4,
        boi_token_index=ids["boi_token"],
        eoi_token_index=ids["eoi_token"],
        image_token_index=ids["image_token"],
    )
    processor = transformers.Gemma3Processor(
        transformers.Gemma3ImageProcessor(size={"height": 32, "width": 32}),
        tokenizer,
        image_seq_length=4,
        chat_template=tokenizer.chat_template,
    )
    _save(transformers.Gemma3ForConditionalGeneration, config, processor, folder)
    # As the published ones name them; vLLM does not read what transformers 5 saves.
    weights = load_file(folder / "model.safetensors")
    names = {name: name.replace("vision_tower.", "vision_tower.vision_model.") for name in weights}
    save_file({names[n]: t for n, t in weights.items()}, folder / "model.safetensors", META)
    return folder


def make_qwen2_5_vl(folder: Path) -> Path:
    """Positions in three dimensions. An image of 32 x 32 pixels takes 4 tokens."""
    import transformers

    tokens = {
        "image_token": "<|image_pad|>",
        "video_token": "<|video_pad|>",
        "vision_bos_token": "<|vision_start|>",
        "vision_eos_token": "<|vision_end|>",
    }
    tokenizer = _tokenizer("<|vision_start|><|image_pad|><|vision_end|>", **tokens)
    ids = {name: tokenizer.convert_tokens_to_ids(token) for name, token in tokens.items()}
    rope = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [4, 6, 6]}
    tower = {"hidden_size": 64, "num_heads": 2, "depth": 3, "intermediate_size": 64}
    tower |= {"patch_size": 8, "window_size": 32, "fullatt_block_indexes": [1]}
    config = transformers.Qwen2_5_VLConfig(
        vision_config=tower | {"out_hidden_size": 128, "initializer_range": 0.15},
        text_config=TEXT | {"rope_parameters": rope, "hidden_size": 128},
        image_token_id=ids["image_token"],
        video_token_id=ids["video_token"],
        vision_start_token_id=ids["vision_bos_token"],
        vision_end_token_id=ids["vision_eos_token"],
    )
    sizes = {"patch_size": 8, "size": {"shortest_edge": 256, "longest_edge": 64 * 64}}
    processor = transformers.Qwen2_5_VLProcessor(
        transformers.Qwen2VLImageProcessor(**sizes),
        tokenizer,
        transformers.Qwen2VLVideoProcessor(**sizes),
        chat_template=tokenizer.chat_template,
    )
    return _save(transformers.Qwen2_5_VLForConditionalGeneration, config, processor, folder)


def make_image(seed: int = 0, width: int = 32, height: int = 32) -> Any:
    """Four random colours. Images of one size have the same tokens."""
    from PIL import Image

    random = torch.Generator().manual_seed(seed)
    colours = torch.randint(0, 256, (2, 2, 3), generator=random, dtype=torch.uint8)
    return Image.fromarray(colours.numpy()).resize((width, height), Image.Resampling.NEAREST)


def install_torchvision(folder: Path) -> str:
    """Where torchvision is, for PYTHONPATH; the empty string where it is installed.

    vLLM's models that see import it. Package indexes have a build for CUDA, whose operators do not
    load beside a CPU build of torch; nothing here runs one, but two have to be declared.
    """
    if importlib.util.find_spec("torchvision") is not None:
        return ""
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder)]
    done = subprocess.run([*pip, TORCHVISION], capture_output=True, text=True, check=False)
    if done.returncode:
        why = (done.stderr.strip() or "?").splitlines()[-1]
        pytest.skip(f"pip cannot install {TORCHVISION}: {why}")
    with (folder / "torchvision" / "extension.py").open("a") as extension:
        extension.write(
            '\nfor name in ("nms", "qnms"):\n'
            '    torch.library.define(f"torchvision::{name}",\n'
            '        "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")\n'
        )
    return str(folder)
