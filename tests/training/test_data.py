"""Rows, tokens and batches."""

from __future__ import annotations

import csv
import gzip
import io
import json
from pathlib import Path
from typing import Any

import pytest
from tiny_task import make_tokenizer, write_rows

from vllm_pedro.training.collator import CompletionCollator, PackedCollator
from vllm_pedro.training.data import (
    DataError,
    Example,
    Row,
    answers_of,
    encode,
    held_out_split,
    load_dataset,
    prompt_tokens,
    read_rows,
)

GOOD = {"prompt": "a", "completion": "b"}
ASK = {"role": "user", "content": "q"}
TOKENIZER = make_tokenizer()


def say(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def call(arguments: str) -> dict[str, Any]:
    return {"type": "function", "function": {"name": "f", "arguments": arguments}}


def chat(answer: Any, **more: Any) -> str:
    return json.dumps({"messages": [ASK, answer], **more})


def read_lines(folder: Path, *lines: str) -> list[Row]:
    path = folder / "rows.jsonl"
    path.write_bytes("\n".join(lines).encode("utf-8", "surrogatepass"))
    return read_rows(path)


def test_rows_of_both_kinds_with_blank_lines_between(tmp_path: Path) -> None:
    chat = {"messages": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}
    rows = read_lines(tmp_path, json.dumps(GOOD | {"answers": ["x", "y"]}), "", json.dumps(chat))
    assert [row.prompt for row in rows] == ["a", chat["messages"][:1]]
    assert [row.completion for row in rows] == ["b", "a"]
    assert [row.answers for row in rows] == [["x", "y"], ["a"]]
    assert rows[1].source == f"{tmp_path / 'rows.jsonl'}, line 3"


def test_gzip_byte_order_mark_and_limit(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl.gz"
    path.write_bytes(gzip.compress(b"\xef\xbb\xbf" + (json.dumps(GOOD) + "\n").encode() * 5))
    assert len(read_rows(path)) == 5
    assert len(read_rows(path, limit=2)) == 2


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{", "invalid JSON"),
        ("[1]", "a JSON object, found list"),
        ("{}", "'prompt' and 'completion', or 'messages', found the keys none"),
        ('{"text": "x"}', "found the keys 'text'"),
        ('{"prompt": "x"}', "'completion': expected text, found no such key"),
        ('{"prompt": "x", "completion": 3}', "'completion': expected text, found int"),
        ('{"prompt": "", "completion": "x"}', "'prompt': expected text, found an empty string"),
        ('{"prompt": "x", "completion": ""}', "'completion': expected text, found an empty"),
        ('{"prompt": "x", "completion": "y", "messages": []}', "or 'messages', found the keys"),
        ('{"messages": []}', "a list of two or more"),
        ('{"messages": ["x", "y"]}', "message 1: expected an object, found str"),
        ('{"messages": [{"role": "user"}, {}]}', "message 1: 'content': expected text"),
        (
            '{"messages": [{"role": "user", "content": "x"}, {"role": "user", "content": "y"}]}',
            "expected role 'assistant' and some content or tool calls, found role 'user'",
        ),
        ("\ud800", "expected UTF-8"),
        ('{"prompt": "a\\ud800b", "completion": "c"}', "half of a surrogate pair"),
        ('{"prompt": "x", "prompt": "y", "completion": "z"}', "duplicate keys 'prompt'"),
        ('[{"prompt": "x"}]', "jq -c '.[]'"),
        ('{"prompt": "x", "completion": "y", "tools": [{}]}', "'tools' belongs to a chat"),
        (chat({"role": "assistant"}), "'content': expected text, or 'tool_calls', found no such"),
        (chat(say([{"type": "image_url", "image_url": {}}])), "'content': expected parts of the t"),
        (chat(say("x") | {"weight": 0}), "message 2: 'weight' is not supported"),
        (chat(say("x") | {"tool_calls": [{"name": "f"}]}), "'tool_calls': expected {"),
        (chat(say(None) | {"tool_calls": [call("{")]}), "'arguments': invalid JSON"),
        (chat(say(None) | {"tool_calls": [call("[1]")]}), "'arguments': expected an object"),
        (chat(say("x"), tools=[{"name": "f"}]), "'tools': expected {"),
        (chat(say("x"), chat_template_kwargs={"tokenize": True}), "'tokenize' cannot be given"),
        (chat(say("x"), chat_template_kwargs=[1]), "expected an object, found list"),
        (
            json.dumps({"prompt": [ASK], "completion": [say("x"), say("y")]}),
            "'completion': expected one message, found 2",
        ),
    ],
)
def test_a_bad_row_is_named_by_file_and_line(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(DataError) as caught:
        read_lines(tmp_path, json.dumps(GOOD), line)
    assert str(caught.value).startswith(f"{tmp_path / 'rows.jsonl'}, line 2: ")
    assert said in str(caught.value)


def test_tables_are_read_as_lines_are(tmp_path: Path) -> None:
    rows = [{"prompt": "a, b", "completion": "1"}, {"prompt": "c\n", "completion": "02"}]
    for name, mark in (("rows.csv", ","), ("rows.tsv", "\t")):
        with open(tmp_path / name, "w", newline="", encoding="utf-8-sig") as file:
            writer = csv.DictWriter(file, ["prompt", "completion"], delimiter=mark)
            writer.writeheader()
            writer.writerows(rows)
        found = read_rows(tmp_path / name)
        assert [(r.prompt, r.completion) for r in found] == [tuple(r.values()) for r in rows]
    (tmp_path / "bad.csv").write_text("prompt,completion\na,b,c\n")
    with pytest.raises(DataError, match=r"bad.csv, line 2: expected 2 columns"):
        read_rows(tmp_path / "bad.csv")


def test_parquet_and_folders_of_datasets(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="datasets is not installed")
    pyarrow = pytest.importorskip("pyarrow")
    parquet = pytest.importorskip("pyarrow.parquet")
    rows = [{"messages": [ASK, say("x")], "tools": "[]"}, {"messages": [ASK, say("y")]}]
    table = pyarrow.Table.from_pylist(rows)
    parquet.write_table(table, tmp_path / "rows.parquet")
    data = datasets.Dataset(table, fingerprint="rows")
    data.save_to_disk(str(tmp_path / "folder"))
    datasets.DatasetDict(train=data).save_to_disk(str(tmp_path / "splits"))
    for name in ("rows.parquet", "folder", "splits/train"):
        found = read_rows(tmp_path / name)
        assert [row.completion for row in found] == ["x", "y"]
        assert found[1].source.endswith("row 2")
    for name, said in (("splits", "found 'train'; name one"), ("splits/..", "as a data set")):
        with pytest.raises(DataError, match=said):
            read_rows(tmp_path / name)


def test_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    text = io.TextIOWrapper(io.BytesIO((json.dumps(GOOD) + "\n").encode()))
    monkeypatch.setattr("sys.stdin", text)
    (row,) = read_rows("-")
    assert (row.source, row.prompt) == ("-, line 1", "a")


def test_files_that_are_none(tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("\n\n")
    (tmp_path / "not.gz").write_text("{}")
    for name, said in (
        ("empty.jsonl", "at least one row"),
        ("missing.jsonl", "No such file"),
        ("not.gz", "gzipped"),
    ):
        with pytest.raises(DataError, match=said):
            read_rows(tmp_path / name)


# ---- tokens


def test_prompt_tokens_are_those_of_serving() -> None:
    row = Row("here", "ab", " yes")
    example = encode(TOKENIZER, row)
    assert example.prompt == TOKENIZER("ab")["input_ids"] == prompt_tokens(TOKENIZER, row)
    assert example.prompt[0] == TOKENIZER.bos_token_id
    # No second <bos> between prompt and completion.
    assert example.completion == [*TOKENIZER(" yes")["input_ids"][1:], TOKENIZER.eos_token_id]


def test_tokens_that_would_merge_over_the_border_are_tokenised_apart() -> None:
    class Merging:
        """Words of at most three letters, from the left."""

        eos_token_id = 0

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
            parts = [text[i : i + 3] for i in range(0, len(text), 3)]
            return {"input_ids": [int.from_bytes(part.encode(), "big") for part in parts]}

    tokenizer = Merging()
    example = encode(tokenizer, Row("here", "ab", "cdef"))
    assert example.prompt == tokenizer("ab")["input_ids"]
    assert example.completion == [*tokenizer("cdef")["input_ids"], 0]
    together = encode(tokenizer, Row("here", "abc", "defg"))
    assert together.completion == [*tokenizer("abcdefg")["input_ids"][1:], 0]


def test_chat_tokens_are_those_of_the_template() -> None:
    messages = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "q"},
    ]
    example = encode(TOKENIZER, Row("here", messages, "answer"))
    text = TOKENIZER.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert example.prompt == TOKENIZER(text, add_special_tokens=False)["input_ids"]
    # The template's line break after <eos> is never generated, so it is not learnt.
    assert TOKENIZER.decode(example.completion) == "answer<eos>"


TOOLS = [{"type": "function", "function": {"name": "f"}}]
TOOL_TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}<|{{ m.role }}|>"
    "{% if m.reasoning_content %}({{ m.reasoning_content }}){% endif %}{{ m.content }}"
    "{% for c in m.tool_calls %}{{ c.function.name }}{{ c.function.arguments | tojson }}"
    "{% endfor %}"
    "<eos>\n{% endfor %}{% if add_generation_prompt %}<|assistant|>"
    "{% if mode %}{{ mode }}{% endif %}{% endif %}"
)


def test_tool_calls_and_reasoning_are_learnt_as_the_template_writes_them(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    tool = {"role": "tool", "tool_call_id": "1", "content": [{"type": "text", "text": "r"}, "s"]}
    rows = read_lines(
        tmp_path,
        chat(say(None) | {"tool_calls": [call('{"x": 1}')]}, tools=TOOLS),
        chat(say("x") | {"reasoning_content": "hm"}),
        json.dumps({"messages": [ASK, say(None) | {"tool_calls": [call("")]}, tool, say("z")]}),
        json.dumps({"prompt": [ASK], "completion": [say(["x", "y"])]}),
    )
    found = [tokenizer.decode(encode(tokenizer, row).completion) for row in rows]
    assert found == ['f{"x": 1}<eos>', "(hm)x<eos>", "z<eos>", "x\ny<eos>"]
    assert answers_of(tokenizer, rows[0]) == ['f{"x": 1}']
    prompts = [tokenizer.decode(prompt_tokens(tokenizer, row)) for row in rows]
    tools = '[{"type": "function", "function": {"name": "f", "description": null, "parameters": nul'
    assert prompts[0].startswith(tools)
    assert prompts[2] == "<|user|>q<eos>\n<|assistant|>f{}<eos>\n<|tool|>r\ns<eos>\n<|assistant|>"


def test_options_of_the_template(tmp_path: Path) -> None:
    """A row has the last word, as a request to a server has."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = TOOL_TEMPLATE
    path = write_rows(
        tmp_path / "rows.jsonl",
        [
            {"messages": [ASK, say("x")]},
            {"messages": [ASK, say("x")], "chat_template_kwargs": {"mode": "[b]"}},
        ],
    )
    rows = read_rows(path, options={"mode": "[a]", "other": 1})
    ends = [tokenizer.decode(prompt_tokens(tokenizer, row))[-3:] for row in rows]
    assert ends == ["[a]", "[b]"]
    with pytest.raises(DataError, match="'tools' cannot be given"):
        read_rows(path, options={"tools": []})


def test_all_turns_are_rows_of_their_own(tmp_path: Path) -> None:
    messages = [ASK, say("one"), ASK, say(None) | {"tool_calls": [call("{}")]}, ASK, say("two")]
    path = write_rows(tmp_path / "rows.jsonl", [{"messages": messages}])
    assert [row.completion for row in read_rows(path)] == ["two"]
    rows = read_rows(path, all_turns=True)
    assert [len(row.prompt) for row in rows] == [1, 3, 5]
    assert [row.completion for row in rows] == ["one", "", "two"]
    assert [row.source.rpartition(": ")[2] for row in rows[:2]] == ["message 2", "message 4"]
    assert rows[1].answer is not None


def test_a_turn_ends_with_the_models_own_end() -> None:
    """What a template writes after it is never generated, and dilutes the loss."""
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}!\n<eos>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    end = tokenizer.convert_tokens_to_ids("!")
    row = Row("here", [ASK], "OK")
    assert tokenizer.decode(encode(tokenizer, row).completion) == "OK!\n<eos>"
    row = Row("here", [ASK], "OK", end_tokens=[end])
    assert tokenizer.decode(encode(tokenizer, row).completion) == "OK!"
    # A text's completion is what it is.
    row = Row("here", "a", "b!c", end_tokens=[end])
    assert tokenizer.decode(encode(tokenizer, row).completion) == "b!c<eos>"


def test_tokens_that_would_merge_after_the_generation_prompt() -> None:
    """The text tells prompt and completion apart where the tokens do not."""

    class Pairs:
        """Two letters a token, from the left."""

        eos_token_id = None
        chat_template = "given"

        def get_chat_template(self, **how: Any) -> str:
            return self.chat_template

        def apply_chat_template(self, chat: Any, **how: Any) -> str:
            texts = [m["content"] for m in chat if isinstance(m["content"], str)]
            return ":".join(texts + [""] * how.get("add_generation_prompt", False))

        def __call__(self, text: str, add_special_tokens: bool = True) -> dict[str, Any]:
            return {"input_ids": [hash(text[i : i + 2]) for i in range(0, len(text), 2)]}

    tokenizer = Pairs()
    example = encode(tokenizer, Row("here", [{"role": "user", "content": "ab"}], "cde"))
    assert example.prompt == tokenizer("ab:")["input_ids"]
    assert example.completion == tokenizer("cde")["input_ids"]


def test_a_chat_can_be_pooled_as_in_its_first_turn(tmp_path: Path) -> None:
    chat = [
        {"role": "system", "content": "s"},
        {"role": "user", "content": "first"},
        {"role": "assistant", "content": "a"},
        {"role": "user", "content": "second"},
    ]
    first = encode(TOKENIZER, Row("here", chat[:2], "a"))
    assert first.prompt_length == len(first.prompt)
    later = encode(TOKENIZER, Row("here", chat, "answer", pools_first_turn=True))
    assert later.prompt_length == len(first.prompt) < len(later.prompt)
    assert later.prompt[: later.prompt_length] == first.prompt
    whole = encode(TOKENIZER, Row("here", chat, "answer"))
    assert (whole.prompt, whole.completion) == (later.prompt, later.completion)
    assert whole.prompt_length == len(whole.prompt)
    # Where a later turn is not written as the first was, all of it is pooled.
    numbered = make_tokenizer()
    numbered.chat_template = (
        "{{ (messages | selectattr('role', 'eq', 'user') | list | length) }}"
        + str(TOKENIZER.chat_template)
    )
    again = encode(numbered, Row("here", chat, "answer", pools_first_turn=True))
    assert again.prompt_length == len(again.prompt)
    for packed in (False, True):
        collate = PackedCollator() if packed else CompletionCollator(0)
        lengths = collate([later, first])["prompt_lengths"].tolist()
        assert lengths == [later.prompt_length, len(first.prompt)]
    path = tmp_path / "chats.jsonl"
    answer = {"role": "assistant", "content": "x"}
    path.write_text(json.dumps({"messages": [*chat, answer]}))
    for prompt_length, example in (("first_turn", later), ("whole", whole)):
        data = load_dataset(path, TOKENIZER, prompt_length=prompt_length)
        assert data[0].prompt_length == example.prompt_length


def test_templates_that_do_not_do() -> None:
    row = Row("here", [{"role": "user", "content": "q"}], "a")
    plain = make_tokenizer()
    plain.chat_template = None
    odd = make_tokenizer()
    odd.chat_template = "{{ messages | length }}{{ messages[-1]['content'] }}"
    raising = make_tokenizer()
    raising.chat_template = "{{ raise_exception('no users') }}"
    for tokenizer, said in (
        (plain, "no chat template"),
        (odd, "cannot be told apart"),
        (raising, "refuses it: no users"),
    ):
        with pytest.raises(DataError, match=f"^here.*{said}"):
            encode(tokenizer, row)


def test_long_rows_are_left_out_and_counted(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "rows.jsonl", [GOOD, {"prompt": "a" * 50, "completion": "b"}])
    data = load_dataset(path, TOKENIZER, max_length=20)
    assert (len(data), data.too_long) == (1, 1)
    with pytest.raises(DataError, match="all 2 rows have more than 3 tokens; the shortest has 4"):
        load_dataset(path, TOKENIZER, max_length=3)


def test_held_out_split() -> None:
    kept, held = held_out_split(10, 0.3, seed=1)
    assert sorted(kept + held) == list(range(10))
    assert len(held) == 3
    assert held_out_split(10, 0.3, seed=1) == (kept, held)
    assert held_out_split(10, 0.3, seed=2) != (kept, held)
    with pytest.raises(DataError, match="leaves one part empty"):
        held_out_split(3, 0.1, seed=0)


# ---- batches

EXAMPLES = [Example([5, 6, 7], [8, 2]), Example([9], [10, 11, 2])]


def test_padded_batch() -> None:
    batch = {name: tensor.tolist() for name, tensor in CompletionCollator(0)(EXAMPLES).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 2, 0], [0, 0, 9, 10, 11, 2]],
        "attention_mask": [[1, 1, 1, 1, 1, 0], [0, 0, 1, 1, 1, 1]],
        "position_ids": [[0, 1, 2, 3, 4, 4], [0, 0, 0, 1, 2, 3]],
        "labels": [[-100, -100, -100, 8, 2, -100], [-100, -100, -100, 10, 11, 2]],
        "prompt_lengths": [3, 1],
    }


def test_packed_batch() -> None:
    batch = {name: tensor.tolist() for name, tensor in PackedCollator()(EXAMPLES).items()}
    assert batch == {
        "input_ids": [[5, 6, 7, 8, 2, 9, 10, 11, 2]],
        "position_ids": [[0, 1, 2, 3, 4, 0, 1, 2, 3]],
        "labels": [[-100, -100, -100, 8, 2, -100, 10, 11, 2]],
        "prompt_lengths": [3, 1],
    }
