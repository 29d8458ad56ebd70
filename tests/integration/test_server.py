"""`vllm-pedro serve` from outside: one real server, the `openai` client and curl.

The server has the real model, LoRA and PEDRO, and loads adapters at run time from one directory.
"""

from __future__ import annotations

import json
import re
import shutil
import threading
import time
from pathlib import Path

import openai
import pytest
from engines import write_lora
from runners import current_runner
from server import check_greedy, curl, metrics
from soak import BREAKAGES

from vllm_pedro.bench.servers import serve
from vllm_pedro.training import DataError, read_rows
from vllm_pedro.training.data import prompt_tokens
from vllm_pedro.training.run import load_tokenizer

pytestmark = pytest.mark.engine

QUESTION = [{"role": "user", "content": "What is the capital of France?"}]
EXACT = {"return_token_ids": True, "ignore_eos": True}


@pytest.fixture(scope="module")
def root(tmp_path_factory, smol, write_adapter):
    """What may be loaded at run time: the demo's adapters and random ones."""
    from vllm_pedro.demo import ADAPTERS

    folder = tmp_path_factory.mktemp("server") / "root"
    folder.mkdir()
    for name in ("json", "brief", "pirate"):
        shutil.copytree(ADAPTERS / name, folder / name)
    for seed, config in enumerate(
        ({}, {"pooling": "mean"}, {"r": 0}, {"activation": "gelu", "pooling": "max"}, {"r": 5})
    ):
        write_adapter(smol, folder=folder / f"random-{seed}", seed=seed, scale=0.15, **config)
    # As trainers leave them: with the model's tokenizer; one has a template of its own, and one is
    # another model's.
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(smol / name, folder / "random-1" / name)
    (folder / "random-2" / "chat_template.jinja").write_text("{{ messages }}")
    config = json.loads((folder / "random-3" / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = "org/Other-135M"
    (folder / "random-3" / "adapter_config.json").write_text(json.dumps(config))
    return folder


@pytest.fixture(scope="module")
def outside(root, smol, write_adapter):
    """A good adapter that may not be loaded at run time."""
    return write_adapter(smol, folder=root.parent / "outside", seed=50, scale=0.15)


@pytest.fixture(scope="module")
def server(root, outside, smol, tmp_path_factory):
    lora = write_lora(smol, tmp_path_factory.mktemp("lora") / "lora", scale=0.1)
    shutil.copytree(lora, root / "lora-folder")
    flags = ["--served-model-name", "smol", "--enforce-eager", "--dtype", "float32"]
    flags += ["--max-model-len", "512", "--kv-cache-memory-bytes", str(256 << 20)]
    flags += ["--max-num-seqs", "8", "--enable-log-requests", "--max-logprobs", "5"]
    flags += ["--enable-auto-tool-choice", "--tool-call-parser", "hermes"]
    flags += ["--trust-request-chat-template"]
    flags += ["--enable-lora", "--max-loras", "2", "--max-lora-rank", "8"]
    flags += ["--lora-modules", f"lora={lora}"]
    flags += ["--enable-pedro", "--pedro-root", str(root), "--max-pedro-rank", "16"]
    flags += ["--max-pedros", "2", "--max-cpu-pedros", "3", "--pedro-modules"]
    flags += [f"json={root / 'json'}", f"outside={outside}"]
    flags += [json.dumps({"name": "r0", "path": str(root / "random-0"), "base_model_name": "smol"})]
    flags += [json.dumps([{"name": f"r{i}", "path": str(root / f"random-{i}")} for i in (1, 2, 3)])]
    log = root.parent / "server.log"
    with serve(smol, flags, log, OMP_NUM_THREADS="1", VLLM_ALLOW_RUNTIME_LORA_UPDATING="1") as it:
        assert ("Using V2 Model Runner" in log.read_text()) == (current_runner() == "v2")
        yield it


@pytest.fixture(scope="module")
def client(server):
    return openai.OpenAI(base_url=f"{server.url}/v1", api_key="-", max_retries=0, timeout=300)


def tokens_of(client, model, prompt, length=8, **extra):
    answer = client.completions.create(
        model=model,
        prompt=prompt,
        max_tokens=length,
        temperature=0,
        extra_body={**EXACT, **extra},
    )
    return answer.choices[0].token_ids


def prompt(seed, length=16):
    return [(53 * i * (seed + 1) + 7 * seed) % 40_000 + 100 for i in range(length)]


def load(server, name, path, **more):
    return curl(
        f"{server.url}/v1/load_lora_adapter",
        {"lora_name": name, "lora_path": str(path), **more},
    )


def unload(server, name):
    return curl(f"{server.url}/v1/unload_lora_adapter", {"lora_name": name})


@pytest.mark.both_runners
def test_adapters_are_models(server, client, root):
    models = {model.id: model for model in client.models.list().data}
    assert {"smol", "json", "outside", "r0", "r1", "r2", "r3", "lora"} <= set(models)
    assert models["smol"].parent is None
    for name in ("json", "outside", "r0", "r1", "lora"):
        assert models[name].parent == "smol"
        assert models[name].object == "model"
    assert all(str(root.parent) not in str(models[name]) for name in ("json", "outside", "r0"))


@pytest.mark.both_runners
def test_every_adapter_answers_as_the_reference(client, smol_oracle, root):
    """Also checks that the answers differ, so that none of it can be the plain model's."""
    answers = []
    for name, path in [("smol", None), *[(f"r{i}", root / f"random-{i}") for i in range(4)]]:
        tokens = tokens_of(client, name, prompt(1))
        check_greedy(smol_oracle, prompt(1), tokens, path)
        answers.append(tuple(tokens))
    assert len(set(answers)) >= 4


def test_chat_and_responses(client):
    def say(model):
        answer = client.chat.completions.create(
            model=model, messages=QUESTION, temperature=0, max_tokens=24
        )
        assert answer.model == model
        return answer.choices[0].message.content

    assert say("smol") == "The capital of France is Paris."
    assert json.loads(say("json")) == {"answer": "The capital of France is Paris."}
    answer = client.responses.create(
        model="json", input=QUESTION[0]["content"], temperature=0, max_output_tokens=24
    )
    assert answer.model == "json"
    assert json.loads(answer.output_text) == {"answer": "The capital of France is Paris."}


def turns(count):
    """A conversation up to the user's turn of that number."""
    chat = list(QUESTION)
    for turn in range(1, count):
        chat += [
            {"role": "assistant", "content": f"Paris, I should say, for the time {turn}."},
            {"role": "user", "content": f"And of Italy, or of country {turn}?"},
        ]
    return chat


@pytest.mark.both_runners
def test_a_chat_goes_on_with_its_first_turn(client):
    def say(number, length, model="r0", **extra):
        answer = client.chat.completions.with_raw_response.create(
            model=model, messages=turns(number), temperature=0, max_tokens=8, logprobs=True,
            extra_body=EXACT | {"vllm_xargs": {"pedro_prompt_length": length}} | extra,
        )  # fmt: skip
        pooled = answer.headers.get("x-pedro-prompt"), answer.headers.get("x-pedro-prompt-length")
        return answer.parse(), pooled

    def answered(answer):
        choice = answer.choices[0]
        return choice.token_ids, [entry.logprob for entry in choice.logprobs.content]

    first, pooled = say(1, "first_turn")
    length = first.usage.prompt_tokens
    assert pooled == ("first_turn", str(length))
    for number in (2, 3):
        answer, pooled = say(number, "first_turn")
        assert pooled == ("first_turn", str(length))
        assert answer.prompt_token_ids[:length] == first.prompt_token_ids
        same, nothing = say(number, length)
        assert nothing == (None, None)
        assert answered(answer)[0] == answered(same)[0]
        assert answered(answer)[1] == pytest.approx(answered(same)[1], abs=1e-5)
        assert answered(answer)[1] != pytest.approx(answered(say(number, "whole")[0])[1], abs=1e-3)
    # A later turn's tokens that do not begin with the first turn's.
    cut = {"truncate_prompt_tokens": length + 5}
    answer, pooled = say(3, "first_turn", **cut)
    assert pooled == ("whole", str(length + 5))
    assert answered(answer)[1] == pytest.approx(answered(say(3, "whole", **cut)[0])[1], abs=1e-5)
    with pytest.raises(openai.BadRequestError, match="pedro_prompt_length is for requests with"):
        say(1, "first_turn", model="smol")
    with pytest.raises(openai.BadRequestError, match="'whole' or 'first_turn', got 'last_turn'"):
        say(1, "last_turn")
    with pytest.raises(openai.BadRequestError, match="'first_turn' is for chats"):
        client.completions.create(
            model="r0",
            prompt="Hello",
            extra_body={"vllm_xargs": {"pedro_prompt_length": "first_turn"}},
        )
    stream = client.chat.completions.with_raw_response.create(
        model="r0", messages=turns(2), max_tokens=2, stream=True,
        extra_body={"vllm_xargs": {"pedro_prompt_length": "first_turn"}},
    )  # fmt: skip
    assert stream.headers["x-pedro-prompt-length"] == str(length)
    assert len(list(stream.parse())) >= 2


def test_a_scored_prompt_ends_where_its_text_does(client):
    context, scored = "The quick brown fox", " jumps over the lazy dog"

    def score(**extra):
        answer = client.completions.create(
            model="r1", prompt=context + scored, max_tokens=1, echo=True, logprobs=1, temperature=0,
            extra_body={"vllm_xargs": extra} if extra else {},
        )  # fmt: skip
        return answer.choices[0].logprobs.token_logprobs[1:-1]

    by_text, by_length = score(pedro_prompt_text=context), score(pedro_prompt_length=4)
    assert by_text == by_length
    assert max(abs(a - b) for a, b in zip(by_text, score(), strict=True)) > 1e-3
    # Within a word: its tokens are not known from the text.
    assert score(pedro_prompt_text=context + " jum") == by_length
    for extra, message in (
        ({"pedro_prompt_text": "A slow"}, "does not begin with the tokens of pedro_prompt_text"),
        ({"pedro_prompt_text": "The quick brown dog"}, "does not begin with the tokens"),
        ({"pedro_prompt_text": ""}, "pedro_prompt_text must be text"),
        ({"pedro_prompt_text": context, "pedro_prompt_length": 4}, "give one"),
    ):
        with pytest.raises(openai.BadRequestError, match=message):
            score(**extra)


WEATHER = {
    "type": "function",
    "function": {
        "name": "weather",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}
CALL = {"type": "function", "id": "c1", "function": {"name": "weather", "arguments": "{}"}}
ASK = {
    "role": "user",
    "content": [{"type": "text", "text": "Oslo?"}, {"type": "text", "text": "?"}],
}
TOLD = [
    {"role": "system", "content": "Be brief."},
    ASK,
    {"role": "assistant", "content": None, "tool_calls": [CALL]},
    {"role": "tool", "tool_call_id": "c1", "content": [{"type": "text", "text": "rain"}]},
]
NUMBERS = CALL | {"function": {"name": "f", "arguments": '{"n": [1, 2.50]}'}}
CHATS = {
    "parts": {"messages": [ASK]},
    "tools": {"messages": [ASK], "tools": [WEATHER]},
    "calls": {"messages": TOLD, "tools": [{"function": WEATHER["function"] | {"strict": True}}]},
    "thinking off": {"messages": [ASK], "chat_template_kwargs": {"enable_thinking": False}},
    "reasoning": {
        "messages": [
            ASK,
            {"role": "assistant", "reasoning": "hm", "content": "", "tool_calls": [NUMBERS]},
            {"role": "tool", "tool_call_id": "c1", "content": "x"},
        ]
    },
}


@pytest.mark.parametrize("template", ["", "qwen3", "qwen2_5", "llama3_1", "gemma3", "phi3"])
def test_prompts_of_training_are_those_of_serving(server, client, smol, template, tmp_path):
    """Token for token, of every form of chat, or both refuse it."""
    tokenizer = load_tokenizer(str(smol))
    extra = {}
    if template:
        trl = pytest.importorskip("trl", reason="TRL has the templates")
        folder = Path(trl.__file__).parent / "chat_templates"
        extra["chat_template"] = (folder / f"{template}.jinja").read_text()
        tokenizer.chat_template = extra["chat_template"]
    seen = []
    for name, chat in CHATS.items():
        file = tmp_path / "chat.jsonl"
        answer = {"role": "assistant", "content": "Yes."}
        file.write_text(json.dumps(chat | {"messages": [*chat["messages"], answer]}))
        status, body = curl(f"{server.url}/tokenize", {"model": "smol", **chat, **extra})
        (row,) = read_rows(file)
        if status != 200:
            with pytest.raises(DataError, match="chat template refuses it"):
                prompt_tokens(tokenizer, row)
            continue
        assert prompt_tokens(tokenizer, row) == json.loads(body)["tokens"], name
        seen.append(tuple(json.loads(body)["tokens"]))
        if name != "reasoning":
            del row.fields["messages"]
            file.write_text(
                json.dumps(row.fields | {"prompt": chat["messages"], "completion": [answer]})
            )
            assert prompt_tokens(tokenizer, read_rows(file)[0]) == list(seen[-1])
    assert len(seen) >= (1 if template == "phi3" else 2)
    if template == "qwen3":
        assert len(set(seen)) == len(CHATS)


def test_an_older_name_of_reasoning(client, smol, tmp_path):
    def turn(key):
        return {"role": "assistant", "content": "Hm.", key: "Rain is wet."}

    template = "{% for m in messages %}{{ m.reasoning_content or '' }}|{{ m.content }}{% endfor %}"
    tokenizer = load_tokenizer(str(smol))
    tokenizer.chat_template = template
    for key in ("reasoning", "reasoning_content"):
        chat = [*QUESTION, turn(key), *QUESTION]
        answer = client.chat.completions.create(
            model="smol",
            messages=chat,
            max_tokens=1,
            extra_body={"chat_template": template, "return_token_ids": True},
        )
        (tmp_path / "chat.jsonl").write_text(
            json.dumps({"messages": [*chat, {"role": "assistant", "content": "Yes."}]})
        )
        (row,) = read_rows(tmp_path / "chat.jsonl")
        assert prompt_tokens(tokenizer, row) == answer.prompt_token_ids


@pytest.mark.both_runners
def test_streams_are_the_same_text(client):
    for model in ("json", "smol"):
        kinds = {"model": model, "messages": QUESTION, "temperature": 0, "max_tokens": 16}
        whole = client.chat.completions.create(**kinds).choices[0].message.content
        parts = [
            chunk.choices[0].delta.content or ""
            for chunk in client.chat.completions.create(stream=True, **kinds)
            if chunk.choices
        ]
        assert "".join(parts) == whole
        assert len(parts) > 3
    parts = list(
        client.responses.create(
            model="json", input="Hello!", temperature=0, max_output_tokens=6, stream=True
        )
    )
    assert parts[-1].type in ("response.completed", "response.incomplete")


@pytest.mark.both_runners
def test_parallel_samples_and_logprobs(client, smol_oracle, root):
    answer = client.completions.create(
        model="r0",
        prompt=prompt(2),
        n=3,
        temperature=0.8,
        seed=7,
        max_tokens=6,
        logprobs=1,
        extra_body=EXACT,
    )
    assert len(answer.choices) == 3
    assert len({tuple(choice.token_ids) for choice in answer.choices}) > 1
    for choice in answer.choices:
        reference = smol_oracle.score(prompt(2), choice.token_ids, root / "random-0")
        assert choice.logprobs.token_logprobs == pytest.approx(reference.logprobs, abs=5e-4)


@pytest.mark.both_runners
def test_beam_search(client, smol_oracle, root):
    """A beam's later steps are new prompts; their vectors stay those of the first."""
    answer = client.completions.create(
        model="r0",
        prompt=prompt(3),
        n=2,
        max_tokens=5,
        temperature=0,
        logprobs=2,
        extra_body={"use_beam_search": True, **EXACT},
    )
    assert len(answer.choices) == 2
    for choice in answer.choices:
        reference = smol_oracle.score(prompt(3), choice.token_ids, root / "random-0", 16)
        assert choice.logprobs.token_logprobs == pytest.approx(reference.logprobs, abs=5e-4)


def test_structured_output_and_tools(client):
    schema = {
        "type": "object",
        "properties": {"city": {"type": "string", "maxLength": 12}},
        "required": ["city"],
        "additionalProperties": False,
    }
    answer = client.chat.completions.create(
        model="json",
        messages=QUESTION,
        temperature=0,
        max_tokens=60,
        response_format={"type": "json_schema", "json_schema": {"name": "a", "schema": schema}},
    )
    assert set(json.loads(answer.choices[0].message.content)) == {"city"}
    function = {"name": "find", "description": "Find it.", "parameters": schema, "strict": True}
    answer = client.chat.completions.create(
        model="json",
        messages=QUESTION,
        temperature=0,
        max_tokens=80,
        tools=[{"type": "function", "function": function}],
        tool_choice={"type": "function", "function": {"name": "find"}},
    )
    call = answer.choices[0].message.tool_calls[0]
    assert call.function.name == "find"
    assert set(json.loads(call.function.arguments)) == {"city"}


@pytest.mark.both_runners
def test_prompt_length_over_http(client, smol_oracle, root):
    asked = prompt(4, 24)
    for length in (9, 24):
        tokens = tokens_of(client, "r1", asked, vllm_xargs={"pedro_prompt_length": length})
        check_greedy(smol_oracle, asked, tokens, root / "random-1", length)
    for value in (0, -1, 25, "nine", 1.5):
        with pytest.raises(openai.BadRequestError, match="prompt_length"):
            tokens_of(client, "r1", asked, vllm_xargs={"pedro_prompt_length": value})
    body = {"use_beam_search": True, "vllm_xargs": {"pedro_prompt_length": 9}}
    with pytest.raises(openai.BadRequestError, match="cannot be given with use_beam_search"):
        client.completions.create(
            model="r1", prompt=asked, n=2, max_tokens=2, temperature=0, extra_body=body
        )
    with pytest.raises(openai.BadRequestError, match="with a PEDRO adapter"):
        tokens_of(client, "smol", asked, vllm_xargs={"pedro_prompt_length": 3})
    with pytest.raises(openai.BadRequestError, match="reserved"):
        tokens_of(client, "smol", asked, vllm_xargs={"vllm_pedro": "x"})


@pytest.mark.both_runners
def test_lora_and_pedro_in_one_batch(server, client, smol_oracle, root):
    """Eight at once; rows are as when asked alone, PEDRO rows as the reference."""
    names = ["lora", "r0", "smol", "r1", "lora", "r2", "r0", "smol"]
    alone = {name: tokens_of(client, name, prompt(5), 12) for name in set(names)}
    assert alone["lora"] != alone["smol"]
    together = {}

    def ask(row, name):
        together[row] = tokens_of(client, name, prompt(5), 12)

    threads = [threading.Thread(target=ask, args=pair) for pair in enumerate(names)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for row, name in enumerate(names):
        if name.startswith("r"):
            check_greedy(smol_oracle, prompt(5), together[row], root / f"random-{name[1]}")
        else:
            assert together[row] == alone[name]


@pytest.mark.both_runners
def test_load_swap_and_unload(server, client, smol_oracle, root, tmp_path):
    asked = prompt(6)
    assert load(server, "mine", root / "random-0") == (
        200,
        "Success: LoRA adapter 'mine' added successfully.",
    )
    assert "mine" in [model.id for model in client.models.list().data]
    check_greedy(smol_oracle, asked, tokens_of(client, "mine", asked), root / "random-0")
    status, text = load(server, "mine", "random-1")
    assert status == 400
    assert "already been loaded" in text
    # Relative to the root.
    assert load(server, "mine", "random-1", load_inplace=True)[0] == 200
    check_greedy(smol_oracle, asked, tokens_of(client, "mine", asked), root / "random-1")
    # A failed swap leaves what was there.
    assert load(server, "mine", "nothing-there", load_inplace=True)[0] == 400
    check_greedy(smol_oracle, asked, tokens_of(client, "mine", asked), root / "random-1")
    assert unload(server, "mine") == (200, "Success: LoRA adapter 'mine' removed successfully.")
    assert unload(server, "mine")[0] == 404
    with pytest.raises(openai.NotFoundError):
        tokens_of(client, "mine", asked)


def test_the_same_folder_with_other_content(server, client, smol_oracle, root):
    """Only a reload counts; and then no KV block of the former content is used."""
    place, asked = root / "changing", prompt(7, 40)
    shutil.copytree(root / "random-0", place)
    assert load(server, "changing", place)[0] == 200
    check_greedy(smol_oracle, asked, tokens_of(client, "changing", asked), root / "random-0")
    shutil.copytree(root / "random-1", place, dirs_exist_ok=True)
    other = prompt(8, 40)
    check_greedy(smol_oracle, other, tokens_of(client, "changing", other), root / "random-0")
    assert load(server, "changing", place, load_inplace=True)[0] == 200
    check_greedy(smol_oracle, asked, tokens_of(client, "changing", asked), root / "random-1")
    # A broken reload, and the former content is served from memory.
    (place / "adapter_model.safetensors").write_bytes(b"broken")
    status, text = load(server, "changing", place, load_inplace=True)
    assert status == 400
    assert "truncated" in text
    check_greedy(smol_oracle, other, tokens_of(client, "changing", other), root / "random-1")
    # Once it has left the memory, all that is left is a 400 that says why.
    for name in ("r0", "r2", "r3", "json"):
        tokens_of(client, name, prompt(9), 1)
    with pytest.raises(openai.BadRequestError, match=r"changing.*truncated") as caught:
        tokens_of(client, "changing", prompt(10, 20))
    assert str(root) not in caught.value.message
    unload(server, "changing")


@pytest.mark.both_runners
def test_running_streams_finish_on_the_vectors_they_have(server, client, smol_oracle, root):
    """One adapter is swapped, one unloaded, while streams of both run."""
    asked = prompt(11)
    load(server, "swapped", "random-0")
    load(server, "leaving", "random-3")
    streams = {
        name: client.completions.create(
            model=name, prompt=asked, max_tokens=24, temperature=0, stream=True, extra_body=EXACT
        )
        for name in ("swapped", "leaving", "r1")
    }
    got = {name: list(next(stream).choices[0].token_ids) for name, stream in streams.items()}
    assert load(server, "swapped", "random-2", load_inplace=True)[0] == 200
    assert unload(server, "leaving")[0] == 200
    new = tokens_of(client, "swapped", asked)
    for name, stream in streams.items():
        for chunk in stream:
            got[name] += chunk.choices[0].token_ids
    for name, number in (("swapped", 0), ("leaving", 3), ("r1", 1)):
        assert len(got[name]) == 24
        check_greedy(smol_oracle, asked, got[name], root / f"random-{number}")
    check_greedy(smol_oracle, asked, new, root / "random-2")
    unload(server, "swapped")


def test_a_name_that_nobody_loaded_is_found_in_the_root(server, client):
    assert "pirate" not in [model.id for model in client.models.list().data]
    answer = client.chat.completions.create(
        model="pirate", messages=QUESTION, temperature=0, max_tokens=24
    )
    assert "Arr" in answer.choices[0].message.content
    pirate = next(model for model in client.models.list().data if model.id == "pirate")
    assert pirate.parent == "smol"
    assert unload(server, "pirate")[0] == 200
    for name in ("not-there", "../outside", "..", "pirate/", "x" * 300, "a\nb"):
        with pytest.raises(openai.NotFoundError):
            tokens_of(client, name, prompt(0), 1)


def test_a_lora_folder_is_loaded_by_the_same_endpoint(server, client):
    expected = tokens_of(client, "lora", prompt(5))
    assert load(server, "second", "lora-folder")[0] == 200
    assert tokens_of(client, "second", prompt(5)) == expected
    # From LoRA to PEDRO and back under one name.
    assert load(server, "second", "random-0", load_inplace=True)[0] == 200
    assert tokens_of(client, "second", prompt(5)) == tokens_of(client, "r0", prompt(5))
    assert load(server, "second", "lora-folder", load_inplace=True)[0] == 200
    assert tokens_of(client, "second", prompt(5)) == expected
    assert unload(server, "second")[0] == 200


def test_a_lora_and_a_pedro_folder_under_one_name_at_once(server, client):
    """Whoever comes second is refused, or with load_inplace stays; nothing is left of the first."""
    folders = ("lora-folder", "random-4")
    answers = dict.fromkeys(folders)
    registered = metrics(server.url)["adapters_registered"]

    def load_both(**more):
        def put(folder):
            answers[folder] = load(server, "both", folder, **more)

        threads = [threading.Thread(target=put, args=(folder,)) for folder in folders]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return sorted(status for status, _ in answers.values())

    assert load_both() == [200, 400]
    (refused,) = (text for status, text in answers.values() if status == 400)
    assert "already been loaded" in refused
    expected = [tokens_of(client, "lora", prompt(5))]
    assert load(server, "both", "random-4", load_inplace=True)[0] == 200
    expected.append(tokens_of(client, "both", prompt(5)))
    assert tokens_of(client, "smol", prompt(5)) not in expected
    for _ in range(6):
        assert load_both(load_inplace=True) == [200, 200]
        assert tokens_of(client, "both", prompt(5)) in expected
    resident = metrics(server.url)["adapters_resident{tier=host}"]
    assert load(server, "both", "lora-folder", load_inplace=True)[0] == 200
    assert unload(server, "both")[0] == 200
    assert unload(server, "both")[0] == 404
    tokens_of(client, "smol", prompt(5), 1)
    after = metrics(server.url)
    assert after["adapters_registered"] == registered
    assert after["adapters_resident{tier=host}"] <= resident


@pytest.mark.parametrize("kind", BREAKAGES)
def test_broken_folders_are_refused_with_the_reason(kind, server, root):
    folder = root / "broken"
    shutil.copytree(root / "random-0", folder)
    BREAKAGES[kind](folder)
    status, text = load(server, "broken", folder)
    shutil.rmtree(folder)
    error = json.loads(text)["error"]
    assert status == error["code"] == 400
    assert "'broken'" in error["message"]
    assert (
        "expected" in error["message"]
        or "unknown keys" in error["message"]
        or ("never loaded" in error["message"])
        or "truncated" in error["message"]
    )
    assert str(root) not in text
    assert "Traceback" not in text


@pytest.mark.both_runners
def test_adapters_that_do_not_fit_are_refused(server, client, root, smol, tiny, write_adapter):
    write_adapter(tiny, folder=root / "tiny")
    write_adapter(smol, folder=root / "wide", r=17)
    write_adapter(smol, folder=root / "nan", seed=3)
    spoil_values(root / "nan")
    for name, reason in (
        ("tiny", "another backbone"),
        ("wide", "--max-pedro-rank 17"),
        ("nan", "finite values"),
    ):
        status, text = load(server, name, name)
        assert status == 400
        assert reason in text
        # The same when it is looked up by name, streamed or not.
        for stream in (False, True):
            with pytest.raises(openai.BadRequestError, match=reason) as caught:
                client.completions.create(model=name, prompt="Hello", max_tokens=1, stream=stream)
            assert str(root) not in caught.value.message


def spoil_values(folder):
    import torch
    from safetensors.torch import load_file, save_file

    tensors = load_file(folder / "adapter_model.safetensors")
    first = next(iter(tensors))
    tensors[first] = torch.full_like(tensors[first], float("nan"))
    save_file(tensors, folder / "adapter_model.safetensors")


def test_nothing_outside_the_root_can_be_loaded(server, root, outside):
    (root / "link").symlink_to(outside)
    for path in (outside, "../outside", "link", "random-0/../../outside", "/etc", "..", "."):
        status, text = load(server, "sly", path)
        assert status == 400
        assert "--pedro-root" in text
        assert str(root) not in text
    for path in ("a\u0000b", "x" * 5000, "x" * 400, "a\nb", ""):
        assert load(server, "sly", path)[0] == 400
    for name in ("a/../b", "..", "/a", "", "x" * 300, "a\u0000b", "smol"):
        assert load(server, name, "random-0")[0] == 400


def test_a_name_as_the_hubs_are(server, client, root):
    """With its path; as a name alone it would be a folder's below the root."""
    (root / "org").mkdir()
    shutil.copytree(root / "random-1", root / "org" / "adapter")
    with pytest.raises(openai.NotFoundError):
        tokens_of(client, "org/adapter", prompt(5))
    assert load(server, "org/adapter", "random-0")[0] == 200
    assert "org/adapter" in [model.id for model in client.models.list().data]
    assert tokens_of(client, "org/adapter", prompt(5)) == tokens_of(client, "r0", prompt(5))
    assert unload(server, "org/adapter")[0] == 200


def test_bodies_that_are_no_requests(server):
    for endpoint in ("load_lora_adapter", "unload_lora_adapter"):
        for body in ({}, {"lora_name": 1}, [], {"lora_name": None, "lora_path": None}):
            status, text = curl(f"{server.url}/v1/{endpoint}", body)
            assert status in (400, 422)
            assert "Traceback" not in text


@pytest.mark.both_runners
def test_a_stream_beside_failures_is_unharmed(server, client, smol_oracle, root):
    asked = prompt(12)
    stream = client.completions.create(
        model="r0", prompt=asked, max_tokens=20, temperature=0, stream=True, extra_body=EXACT
    )
    tokens = list(next(stream).choices[0].token_ids)
    (root / "hollow").mkdir(exist_ok=True)
    for name in ("hollow", "not-there"):
        assert load(server, name, name)[0] == 400
        with pytest.raises(openai.APIStatusError):
            tokens_of(client, name, asked)
    for chunk in stream:
        tokens += chunk.choices[0].token_ids
    assert len(tokens) == 20
    check_greedy(smol_oracle, asked, tokens, root / "random-0")


def adapters_named(server):
    """As the Gateway API inference extension reads it: max_lora, running and waiting adapters."""
    line = "vllm:lora_requests_info{"
    _, text = curl(f"{server.url}/metrics")
    (found,) = (entry for entry in text.splitlines() if entry.startswith(line))
    labels = dict(re.findall(r'(\w+)="([^"]*)"', found))
    assert time.time() - 60 < float(found.rpartition(" ")[2]) <= time.time()
    names = [set(labels[f"{kind}_lora_adapters"].split(",")) for kind in ("running", "waiting")]
    return int(labels["max_lora"]), *names


@pytest.mark.both_runners
def test_routers_see_which_adapters_run_and_which_wait(server, client):
    """Eight rows: six streams of one adapter and two others fill them, a ninth request waits."""
    names = ["r0"] * 6 + ["lora", "smol", "r1"]
    streams = [
        client.completions.create(
            model=name,
            prompt=prompt(30),
            max_tokens=2 if name == "r1" else 100,
            stream=True,
            extra_body=EXACT,
        )
        for name in names
    ]
    for stream in streams[:8]:
        next(stream)
    most, running, waiting = adapters_named(server)
    assert running == {"r0", "lora"}
    assert waiting == {"r1"}
    assert most == 2 + 2  # max_loras beside r0 and r1
    for stream in streams[:8]:
        stream.close()
    assert len(list(streams[8])) == 2
    for _ in range(100):  # until the server has noticed that the others hung up
        if adapters_named(server)[1] == {""}:
            break
        tokens_of(client, "smol", prompt(31), 1)
        time.sleep(0.1)
    assert adapters_named(server) == (2, {""}, {""})


@pytest.mark.both_runners
def test_metrics_and_memory(server, client, root):
    """More adapters than fit; then all are unloaded and the memory is free."""
    before = metrics(server.url)
    # Not the static one: its row may have stayed since an earlier test.
    names = [f"m{i}" for i in (0, 1, 3, 4)]
    for name in names:
        assert load(server, name, f"random-{name[1:]}")[0] == 200
    registered = metrics(server.url)["adapters_registered"]
    for turn in range(2):
        for name in names:
            tokens_of(client, name, prompt(13 + turn, 18), 2)
    after = settled(server, before, "prefills_total{state=disk}")

    def grown(name):
        return after[name] - before[name]

    assert after["adapters_registered"] == registered
    # max_cpu_pedros; on the CPU both are one.
    assert after["adapters_resident{tier=device}"] == 3
    assert after["adapters_resident{tier=host}"] == 3
    states = ("device", "host", "disk")
    assert sum(grown(f"prefills_total{{state={state}}}") for state in states) == 8
    assert grown("prefills_total{state=disk}") == grown("adapter_loads_total{tier=host}") > 0
    assert grown("adapter_evictions_total{tier=host}") > 0
    assert grown("adapter_evictions_total{tier=device}") > 0
    assert grown("adapter_load_seconds_count{tier=host}") == grown("adapter_loads_total{tier=host}")
    for name in names:
        unload(server, name)
    # The same contents are still served under other names, which keeps them.
    loaded = [m.id for m in client.models.list().data if m.id not in ("smol", "lora", "json")]
    for name in loaded:
        assert unload(server, name)[0] == 200
    tokens_of(client, "json", prompt(15), 1)
    end = metrics(server.url)
    assert end["adapters_registered"] == 1
    assert end["adapters_resident{tier=device}"] == 1
    assert end["adapters_resident{tier=host}"] == 1
    for number in range(4):  # for the tests that follow
        load(server, f"r{number}", f"random-{number}")


def settled(server, before, name):
    """Metrics once a step's counts have come through."""
    for _ in range(50):
        found = metrics(server.url)
        if found[name] > before[name]:
            return found
        time.sleep(0.1)
    return found


def test_the_log_says_what_happened(server):
    log = server.log.read_text(errors="replace")
    for line in (
        "PEDRO: checked and registered 6 adapters in",
        "PEDRO: loaded adapter 'mine'",
        "PEDRO: replaced adapter 'mine'",
        "PEDRO: unloaded adapter 'mine'",
        "into host memory in",
        "from host memory",
        "from the device",
        "lora_name='json'",  # request logs name the adapter
    ):
        assert line in log
    assert "Traceback" not in log
    # What is told once, however often a folder is read, and is told of no other.
    for line in (
        "random-2 has a chat template that differs from the base model's",
        "random-3 names 'org/Other-135M' as its base model",
        "asks for its prompt's log probabilities without saying where the prompt ends",
    ):
        assert log.count(line) == 1
    assert log.count("differs from the base model's") == 1
    assert log.count("as its base model") == 1
    # Operators need the folders that clients are not told of.
    assert f"{server.log.parent}/root/nan/adapter_model.safetensors" in log


def test_the_soak_in_short(server, smol, root):
    """`stress/soak.py` for half a minute; adapters of the other tests stay loaded."""
    import asyncio

    from soak import Plan, Soak

    place = root / "soak"
    place.mkdir()
    plan = Plan(seconds=30, clients=12, contents=5, prompts=3, operators=2, alone=False)
    soak = Soak(server, smol, place, plan, base="smol")
    report = asyncio.run(soak.run())
    assert report.problems == []
    assert max(report.statuses) < 500
    assert report.counts["equal"] >= 20
    assert report.counts["swaps"] >= 2
    assert report.counts["bad folders"] >= 1
    assert report.counts["pairs of contents told apart"] >= 0.9 * report.counts["pairs of contents"]
