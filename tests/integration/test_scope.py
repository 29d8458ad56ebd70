"""Scope "answer" in an engine: prompts in chunks, and prefixes shared with everybody."""

from __future__ import annotations

import contextlib
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


@contextlib.contextmanager
def with_events(tiny_engine):
    """An engine, and what its scheduler publishes of stored blocks."""
    from vllm.config import KVEventsConfig

    config = KVEventsConfig(enable_kv_cache_events=True, publisher="null")
    stored: list = []
    with tiny_engine(block_size=BLOCK, enable_prefix_caching=True, kv_events_config=config) as llm:
        publisher = llm.llm_engine.engine_core.engine_core.scheduler.kv_event_publisher
        publish = publisher.publish

        def note(batch):
            stored.extend(event for event in batch.events if type(event).__name__ == "BlockStored")
            publish(batch)

        publisher.publish = note
        yield llm, stored


def test_events_name_the_blocks_by_what_they_are_of(tiny_engine, tiny_oracle, adapters) -> None:
    """What a router reads: blocks before the pooled one with a base row's hashes and no name."""
    found = []
    with with_events(tiny_engine) as (llm, stored):
        for case in (
            (None, DOCUMENT),
            ("answer", DOCUMENT),
            ("answer", DOCUMENT, 97),
            ("sequence", DOCUMENT),
        ):
            llm.reset_prefix_cache()
            stored.clear()
            (output,) = ask(llm, adapters, case)
            tiny_oracle.check(output, adapters[case[0]], *case[2:])
            assert [token for event in stored for token in event.token_ids] == DOCUMENT[:128]
            hashes = [key for event in stored for key in event.block_hashes]
            # Each event goes on where the one before it ends.
            parents = [event.parent_block_hash for event in stored]
            ends = [event.block_hashes[-1] for event in stored]
            assert parents == [None, *ends[:-1]]
            names = [event.lora_name for event in stored for _ in event.block_hashes]
            keys = [keys for event in stored for keys in event.extra_keys or [None] * 4]
            found.append((hashes, names, keys))
    base, answer, first, sequence = found
    assert base[1:] == ([None] * 4, [None] * 4)
    # Token 129 is pooled, and no block that holds it is full.
    assert answer == base
    # Token 96 is pooled, the first of the fourth block.
    assert first[0][:3] == base[0][:3]
    assert first[0][3] != base[0][3]
    assert first[1] == [None, None, None, "answer"]
    assert first[2][:3] == [None] * 3
    assert first[2][3][0] == "answer"
    assert first[2][3][1].startswith("pedro:")
    assert not {*sequence[0]} & {*base[0], *first[0]}
    assert sequence[1] == ["sequence"] * 4
    assert [keys[0] for keys in sequence[2]] == ["sequence"] * 4
    assert [len(keys) for keys in sequence[2]] == [2, 1, 1, 1]


def test_no_salt_of_a_user_is_an_adapters_key(tiny_engine, tiny_oracle, adapters) -> None:
    """Events publish keys: a plain request that brings one as its salt finds nothing, and leaves
    nothing for the adapter's requests to find.
    """
    from vllm import SamplingParams

    params = SamplingParams(temperature=0, max_tokens=4, detokenize=False)
    with with_events(tiny_engine) as (llm, stored):
        (output,) = ask(llm, adapters, ("sequence", DOCUMENT))
        (key,) = stored[0].extra_keys[0][1:]
        for salt in (key, f"|{key}", "sequence"):
            prompt = {"prompt_token_ids": DOCUMENT, "cache_salt": salt}
            (plain,) = llm.generate([prompt], params, use_tqdm=False)
            assert plain.num_cached_tokens == 0
            tiny_oracle.check(plain, None)
        (again,) = ask(llm, adapters, ("sequence", DOCUMENT))
        assert again.num_cached_tokens == 128
        assert again.outputs[0].token_ids == output.outputs[0].token_ids


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
