"""Scope "answer" in an engine: prompts in chunks, and prefixes shared with everybody."""

from __future__ import annotations

from dataclasses import replace

import pytest
from engines import Mismatch

from vllm_pedro import PedroRequest, load_adapter

pytestmark = [pytest.mark.engine, pytest.mark.both_runners]

BLOCK = 32
DOCUMENT = [(7 * i * i + 3 * i + 5) % 125 + 3 for i in range(130)]


@pytest.fixture(scope="module")
def adapters(tiny, write_adapter):
    return {
        "answer": write_adapter(tiny, seed=1, scale=0.2, down_scale=15.0, scope="answer"),
        "other": write_adapter(tiny, seed=2, scale=0.2, down_scale=15.0, scope="answer"),
        "sequence": write_adapter(tiny, seed=1, scale=0.2, down_scale=15.0),
        "static": write_adapter(tiny, seed=3, scale=0.2, r=0),
        "static answer": write_adapter(tiny, seed=4, scale=0.2, r=0, scope="answer"),
        None: None,
    }


@pytest.fixture(scope="module")
def start(tiny_engine):
    return lambda: tiny_engine(
        max_num_batched_tokens=40, block_size=BLOCK, enable_prefix_caching=True
    )


def ask(llm, adapters, *wanted):
    """Ask one after another: (adapter, prompt) or (adapter, prompt, P); the outputs."""
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, prompt_logprobs=None, detokenize=False)
    outputs = []
    for name, prompt, *length in wanted:
        request = None
        if name is not None:
            number = 1 + list(adapters).index(name)
            request = PedroRequest(
                name, number, str(adapters[name]), prompt_length=length[0] if length else None
            )
        outputs += llm.generate(
            [{"prompt_token_ids": prompt}], params, lora_request=request, use_tqdm=False
        )
    return outputs


def test_prefixes_are_everybodys_up_to_the_pooled_token(start, tiny_oracle, adapters) -> None:
    with start() as llm:
        wanted = [
            (None, DOCUMENT[:100]),
            ("answer", DOCUMENT[:97]),  # token 96 is pooled: three blocks lie before it
            ("other", DOCUMENT[:96]),  # token 95 is, in the third block
            ("answer", DOCUMENT[:130], 97),  # the vectors, and the fourth block, if it was filled
            ("answer", DOCUMENT[:110]),  # other vectors
            ("other", [*DOCUMENT[:64], *DOCUMENT[:66]]),
            (None, [*DOCUMENT[:64], *DOCUMENT[:66]]),  # what another tenant computed
        ]
        outputs = ask(llm, adapters, *wanted)
        for (name, _, *length), output in zip(wanted, outputs, strict=True):
            tiny_oracle.check(output, adapters[name], *length)
        assert [o.num_cached_tokens for o in outputs] == [0, 96, 64, 96, 96, 64, 128]


def test_blocks_from_the_pooled_token_on_are_found_again(start, tiny_oracle, adapters) -> None:
    with start() as llm:
        wanted = [("answer", DOCUMENT, 20), ("other", DOCUMENT, 20), (None, DOCUMENT)]
        outputs = ask(llm, adapters, *wanted, *wanted, ("answer", DOCUMENT, 21))
        for (name, _, *length), output in zip(wanted * 2, outputs[:6], strict=True):
            tiny_oracle.check(output, adapters[name], *length)
        tiny_oracle.check(outputs[6], adapters["answer"], 21)
        # The first block has the pooled token: nobody shares it.
        assert [o.num_cached_tokens for o in outputs] == [0, 0, 0, 128, 128, 128, 0]


def test_a_prompt_that_no_step_takes_whole_is_served(start, tiny_oracle, adapters) -> None:
    from vllm_pedro import PedroError

    with start() as llm:
        (output,) = ask(llm, adapters, ("answer", DOCUMENT))
        tiny_oracle.check(output, adapters["answer"])
        with pytest.raises(PedroError, match="longer than the 40 that one step takes"):
            ask(llm, adapters, ("sequence", DOCUMENT))


def without_adapter(key):
    return lambda spec: key(replace(spec, digest=""))


def without_prompt(key):
    return lambda spec: key(replace(spec, prompt_digest="", prompt_length=1))


@pytest.mark.parametrize(
    ("mutate", "first", "second"),
    [
        (without_adapter, ("answer", DOCUMENT, 20), ("other", DOCUMENT, 20)),
        (without_prompt, ("answer", DOCUMENT, 20), ("answer", DOCUMENT, 30)),
    ],
)
def test_the_key_is_needed(
    mutate, first, second, start, tiny_oracle, adapters, monkeypatch
) -> None:
    from vllm_pedro.integration import block_keys

    monkeypatch.setattr(block_keys, "cache_key", mutate(block_keys.cache_key))
    # Twice: without its vectors a request takes no hit past its pooled token.
    wanted = (first, second, second)
    with start() as llm:
        outputs = ask(llm, adapters, *wanted)
    with pytest.raises(Mismatch):  # noqa: PT012 (any of them)
        for (name, _, length), output in zip(wanted, outputs, strict=True):
            tiny_oracle.check(output, adapters[name], length)


@pytest.mark.parametrize(("pooled", "shared"), [(64, 32), (65, 64), (66, 64)])
def test_the_boundary_is_exact(pooled, shared, start, tiny_oracle, adapters) -> None:
    """Token 63 is the last of its block: if it is scaled, nobody else finds that block."""
    with start() as llm:
        first, second = ask(llm, adapters, ("answer", DOCUMENT, pooled), (None, DOCUMENT))
        tiny_oracle.check(first, adapters["answer"], pooled)
        tiny_oracle.check(second, None)
        assert second.num_cached_tokens == shared


def test_events_name_the_blocks_by_what_they_are_of(tiny_engine, tiny_oracle, adapters) -> None:
    """What a router reads: blocks before the pooled one with a base row's hashes and no key."""
    from vllm.config import KVEventsConfig

    events = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    stored = []
    with tiny_engine(block_size=BLOCK, enable_prefix_caching=True, kv_events_config=events) as llm:
        core = llm.llm_engine.engine_core.engine_core
        taken: list = []
        publish = core.scheduler.kv_event_publisher.publish

        def note(batch):
            taken.extend(batch.events)
            publish(batch)

        core.scheduler.kv_event_publisher.publish = note
        for case in ((None, DOCUMENT), ("answer", DOCUMENT), ("answer", DOCUMENT, 97)):
            llm.reset_prefix_cache()
            taken.clear()
            (output,) = ask(llm, adapters, case)
            tiny_oracle.check(output, adapters[case[0]], *case[2:])
            new = [event for event in taken if type(event).__name__ == "BlockStored"]
            assert [token for event in new for token in event.token_ids] == DOCUMENT[:128]
            hashes = [key for event in new for key in event.block_hashes]
            keys = [keys for event in new for keys in event.extra_keys or [None] * 4]
            stored.append((hashes, keys))
    (base, none), (whole, no_keys), (first, some) = stored
    assert not any(none)
    # Token 129 is pooled, and no block that holds it is full.
    assert (whole, no_keys) == (base, none)
    # Token 96 is pooled, the first of the fourth block.
    assert first[:3] == base[:3]
    assert first[3] != base[3]
    assert some[:3] == none[:3]
    assert str(some[3][0]).startswith("pedro:")


@pytest.mark.parametrize("name", ["static", "static answer"])
def test_static_vectors_need_no_prompt(name, start, tiny_oracle, adapters) -> None:
    """Any chunks, any cached blocks, and one row for all prompts of a tenant."""
    from vllm import SamplingParams

    with start() as llm:
        scheduler = llm.llm_engine.engine_core.engine_core.scheduler
        asked = [(name, DOCUMENT[:n]) for n in (1, 100, 130, 97)]
        first, *later = ask(llm, adapters, *asked)
        for output in (first, *later):
            tiny_oracle.check(output, adapters[name])
        assert [o.num_cached_tokens for o in later] == [0, 96, 96]
        # The vectors are gone, the blocks are not.
        rows = [("sequence", DOCUMENT[n : n + 9]) for n in range(8)]
        ask(llm, adapters, *rows)
        assert not scheduler._pedro_rows.has((load_adapter(adapters[name]).digest, ""))
        (again,) = ask(llm, adapters, (name, DOCUMENT[:130]))
        tiny_oracle.check(again, adapters[name])
        assert again.num_cached_tokens == 128
        params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
        prompts = [{"prompt_token_ids": DOCUMENT[i : i + 20]} for i in range(4)]
        request = PedroRequest(name, 9, str(adapters[name]))
        most = 0
        for i, prompt in enumerate(prompts):
            llm.llm_engine.add_request(str(i), prompt, params, lora_request=request)
        done = {}
        while llm.llm_engine.has_unfinished_requests():
            done |= {output.request_id: output for output in llm.llm_engine.step()}
            most = max(most, scheduler._pedro_rows.num_read)
        assert most == 1
        for i in range(4):
            tiny_oracle.check(done[str(i)], adapters[name])
