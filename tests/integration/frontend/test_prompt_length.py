"""Where a prompt ends, given as text."""

from __future__ import annotations

import pytest

from vllm_pedro.integration.frontend.prompt_length import (
    RefusedRequestError,
    given_prompt,
    length_of_text,
)


@pytest.fixture(scope="module")
def tokenizer(smol):
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(smol)


PROMPT = "The quick brown fox jumps over the lazy dog, héhé 🦊 fin"


@pytest.mark.parametrize("text", [PROMPT[:n] for n in range(1, len(PROMPT) + 1)])
def test_a_text_ends_where_its_last_whole_tokens_do(text, tokenizer):
    tokens = tokenizer.encode(PROMPT)
    first = len(tokenizer.encode("The"))
    if len(text) < 3:
        with pytest.raises(RefusedRequestError):
            length_of_text(text, tokens, tokenizer)
        return
    length = length_of_text(text, tokens, tokenizer)
    assert length >= first
    assert text.startswith(tokenizer.decode(tokens[:length]).rstrip("\ufffd"))
    assert len(tokenizer.decode(tokens[length:]).split()) <= len(PROMPT[len(text) :].split()) + 1


@pytest.mark.parametrize("text", ["A", "The quick brown dog", "The quick brown fo x", PROMPT + "."])
def test_another_text_is_refused(text, tokenizer):
    with pytest.raises(RefusedRequestError, match="does not begin with the tokens"):
        length_of_text(text, tokenizer.encode(PROMPT), tokenizer)


@pytest.mark.parametrize(
    ("extra", "found"),
    [
        (None, None), ({}, None), ({"pedro_prompt_length": 3}, 3),
        ({"pedro_prompt_length": "whole"}, "whole"), ({"pedro_prompt_text": "x"}, None),
    ],
)  # fmt: skip
def test_what_a_request_says(extra, found):
    assert given_prompt(extra) == found


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "3", "last_turn", [1], ["whole"]])
def test_what_it_must_not_say(value):
    with pytest.raises(RefusedRequestError, match="must be an integer of at least 1, or 'whole'"):
        given_prompt({"pedro_prompt_length": value})
