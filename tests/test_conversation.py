"""Conversations: ids and masks written out by hand, the way back, what is refused, and transformers' own rendering."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gptfast import cli
from gptfast.chat import conversation
from gptfast.chat.conversation import SPECIAL_TOKENS, Chat, check, text_of
from gptfast.errors import UserError
from gptfast.tokenizer import BPETokenizer, CharTokenizer
from train import prepare
from train.tokenizer import train_bpe

TEXT = "Hello there, what is 12 * 7? It is 84. The word berry has 2 r. Be brief. " * 4 + "naïve 日本語 🙂 " * 4


def U(text: str) -> dict[str, Any]:
    return {"role": "user", "content": text}


def A(*parts: str | tuple[str, str]) -> dict[str, Any]:
    if len(parts) == 1 and isinstance(parts[0], str):
        return {"role": "assistant", "content": parts[0]}
    named = [("text", part) if isinstance(part, str) else part for part in parts]
    return {"role": "assistant", "content": [{"type": kind, "text": text} for kind, text in named]}


def S(text: str) -> dict[str, Any]:
    return {"role": "system", "content": text}


CALL, OUT = ("python", "12*7"), ("python_output", "84")
# messages, and what they become: $ for a special token and + for what is learnt stand first in each piece
GOLDEN: list[tuple[list[dict[str, Any]], list[str]]] = [
    (
        [U("Hi"), A("Hello")],
        ["$bos", "$user_start", "Hi", "$user_end", "$assistant_start", "+Hello", "+$assistant_end"],
    ),
    ([U("Hi")], ["$bos", "$user_start", "Hi", "$user_end"]),
    ([U(""), A("")], ["$bos", "$user_start", "$user_end", "$assistant_start", "+$assistant_end"]),
    (
        [S("Be brief."), U("Hi"), A("Hello")],
        ["$bos", "$user_start", "Be brief.\n\nHi", "$user_end", "$assistant_start", "+Hello", "+$assistant_end"],
    ),
    (
        [U("12*7?"), A("It is ", CALL, OUT, " 84.")],
        [
            "$bos", "$user_start", "12*7?", "$user_end", "$assistant_start", "+It is ", "+$python_start", "+12*7",
            "+$python_end", "$output_start", "84", "$output_end", "+ 84.", "+$assistant_end",
        ],
    ),
    (
        [U("a"), A("b"), U("c"), A("d")],
        [
            "$bos", "$user_start", "a", "$user_end", "$assistant_start", "+b", "+$assistant_end",
            "$user_start", "c", "$user_end", "$assistant_start", "+d", "+$assistant_end",
        ],
    ),
    (  # neighbouring texts are encoded each by itself
        [U("q"), A("wo", "rd")],
        ["$bos", "$user_start", "q", "$user_end", "$assistant_start", "+wo", "+rd", "+$assistant_end"],
    ),
    (  # special tokens in a text are text
        [U("<|assistant_end|>"), A("<|bos|>")],
        [
            "$bos", "$user_start", "<|assistant_end|>", "$user_end", "$assistant_start", "+<|bos|>", "+$assistant_end",
        ],
    ),
]  # fmt: skip
MORE: list[list[dict[str, Any]]] = [
    [U("日本語 🙂"), A("naïve ☃\u200b\u0301")],
    [U(" leading and trailing "), A("\n\n  \n")],
    [S(""), U("x"), A("y")],
    [S("s"), U("a"), A("b"), U("c")],
    [U("call twice"), A(CALL, OUT, CALL, OUT)],
    [U("only a call"), A(CALL)],
    [U("only output"), A(OUT)],
    [U("empty parts"), A(("python", ""), ("python_output", ""))],
    [U("no parts"), {"role": "assistant", "content": []}],
    [U("long " * 300), A("word " * 300)],
    [U("tabs\tand\r\nreturns"), A("{{ braces }} {% raw %} 'quotes' \"twice\" \\n")],
    [*([U("again"), A("and again")] * 12)],
]
ALL = [messages for messages, _ in GOLDEN] + MORE


@pytest.fixture(scope="module")
def tokenizer() -> BPETokenizer:
    return train_bpe([TEXT], 320)


@pytest.fixture(scope="module")
def chat(tokenizer: BPETokenizer) -> Chat:
    return Chat(tokenizer)


def test_there_are_twenty_conversations() -> None:
    assert len(ALL) == 20


@pytest.mark.parametrize(("messages", "pieces"), GOLDEN)
def test_ids_and_mask_are_as_written_out(chat: Chat, messages: list[dict[str, Any]], pieces: list[str]) -> None:
    ids: list[int] = []
    mask: list[int] = []
    for piece in pieces:
        text = piece.removeprefix("+")
        special = chat.tokenizer.special_tokens.get(f"<|{text[1:]}|>")
        new = [special] if text.startswith("$") and special is not None else chat.tokenizer.encode(text)
        ids += new
        mask += [int(piece.startswith("+"))] * len(new)
    assert chat.render(messages) == (ids, mask)


def test_the_number_of_supervised_tokens(chat: Chat) -> None:
    """The assistant's texts and calls, one token for each end of a turn, two for each call."""
    for messages in ALL:
        expected = 0
        for message in messages:
            if message["role"] == "assistant":
                content = message["content"]
                parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
                learnt = [part for part in parts if part["type"] != "python_output"]
                expected += 1 + sum(len(chat.tokenizer.encode(part["text"])) for part in learnt)
                expected += 2 * sum(part["type"] == "python" for part in learnt)
        assert sum(chat.render(messages).mask) == expected


def as_parsed(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """What may come back: the system message within the user's, neighbouring texts as one, no empty texts."""
    if messages[0]["role"] == "system":
        messages = [U(f"{messages[0]['content']}\n\n{messages[1]['content']}"), *messages[2:]]
    found = []
    for message in messages:
        content = message["content"]
        if not isinstance(content, str):
            joined: list[dict[str, str]] = []
            for part in content:
                if joined and part["type"] == joined[-1]["type"] == "text":
                    joined[-1] = {"type": "text", "text": joined[-1]["text"] + part["text"]}
                else:
                    joined.append(part)
            plain = not joined or (len(joined) == 1 and joined[0]["type"] == "text")
            content = "".join(part["text"] for part in joined) if plain else joined
        found.append({"role": message["role"], "content": content})
    return found


@pytest.mark.parametrize("messages", ALL)
def test_ids_lead_back_to_the_messages(chat: Chat, messages: list[dict[str, Any]]) -> None:
    assert chat.parse(chat.render(messages).ids) == as_parsed(messages)


def test_a_conversation_is_cut_to_so_many_tokens(chat: Chat) -> None:
    ids, mask = chat.render(MORE[9])
    assert len(ids) > 500 and chat.render(MORE[9], max_tokens=500) == (ids[:500], mask[:500])
    assert chat.parse(ids[: ids.index(chat.ids["<|assistant_start|>"]) + 2])[1]["role"] == "assistant"


def test_the_prompt_ends_where_the_answer_begins(chat: Chat) -> None:
    messages = GOLDEN[4][0]
    ids, mask = chat.render(messages)
    prompt = chat.prompt(messages)
    assert prompt == ids[: mask.index(1)] == chat.prompt(messages[:-1])


def test_what_an_answer_says() -> None:
    assert text_of(A("It is ", CALL, OUT, " 84.")["content"]) == "It is  84." and text_of("84") == "84"


@pytest.mark.parametrize(
    "messages",
    [m for m in ALL if m != GOLDEN[6][0] and m != GOLDEN[7][0]],
)
def test_transformers_renders_the_same(messages: list[dict[str, Any]], theirs: Any, chat: Chat) -> None:
    assert theirs.apply_chat_template(messages, tokenize=True, return_dict=False) == chat.render(messages).ids
    if messages[-1]["role"] == "user":
        prompt = theirs.apply_chat_template(messages, tokenize=True, return_dict=False, add_generation_prompt=True)
        assert prompt == chat.prompt(messages)


@pytest.fixture(scope="module")
def theirs(tokenizer: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Any:
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("tokenizer")
    tokenizer.save(folder)
    return transformers.AutoTokenizer.from_pretrained(folder)


def test_transformers_forges_no_turn(theirs: Any) -> None:
    """There a text that spells a special token would become it; the template refuses such a text."""
    with pytest.raises(Exception, match="spells a special token"):
        theirs.apply_chat_template(GOLDEN[7][0])
    with pytest.raises(Exception, match="take turns"):
        theirs.apply_chat_template([A("I begin")])


MALFORMED = {
    "not an empty one": [],
    "message 1 is no object": ["hi"],
    "message 1 is from 'assistant', not 'user'": [A("x")],
    "message 2 is from 'user', not 'assistant'": [U("x"), U("y")],
    "message 3 is from 'system'": [U("x"), A("y"), S("z")],
    "after the system message comes the user's": [S("x")],
    "message 2 is from 'assistant', not 'user'": [S("x"), A("y")],
    "message 1: the content of a user's message is a text": [{"role": "user", "content": None}],
    "message 2, part 1: expected type": [U("x"), {"role": "assistant", "content": [{"type": "image", "text": ""}]}],
    "message 2, part 2: expected type": [U("x"), {"role": "assistant", "content": [*A("a", "b")["content"][:1], "c"]}],
    "message 2: its content is neither": [U("x"), {"role": "assistant", "content": 3}],
    "message 1: the content of a system message is a text": [{"role": "system", "content": []}, U("x")],
}


@pytest.mark.parametrize(("reason", "messages"), MALFORMED.items())
def test_malformed_conversations_are_refused(reason: str, messages: list[Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=reason):
        check(messages)
    path = tmp_path / "chat.jsonl"
    path.write_text(json.dumps([U("a"), A("b")]) + "\n\n" + json.dumps({"messages": messages}) + "\n")
    with pytest.raises(UserError, match=rf"chat.jsonl, line 3: .*{reason}"):
        list(conversation.read(path))


def test_a_tokenizer_without_turns_is_refused() -> None:
    with pytest.raises(UserError, match=r"no <\|bos\|>.*train.tokenizer"):
        Chat(CharTokenizer("ab"))  # type: ignore[arg-type]


def test_prepare_checks_and_counts(
    chat: Chat, tokenizer: BPETokenizer, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_text("\n".join(json.dumps(messages) for messages in ALL))
    tokenizer.save(tmp_path / "tokenizer")
    assert cli.run(prepare.main, ["chat", f"--source={path}", f"--tokenizer={tmp_path / 'tokenizer'}"]) == 0
    rendered = [chat.render(messages) for messages in ALL]
    tokens, learnt = sum(len(ids) for ids, _ in rendered), sum(sum(mask) for _, mask in rendered)
    said = capsys.readouterr().out
    assert (
        f"20 conversations, {sum(map(len, ALL))} messages" in said and f"{tokens:,} tokens, {learnt:,} of them" in said
    )
    path.write_text('[{"role": "user"]')
    assert cli.run(prepare.main, ["chat", f"--source={path}"]) == 2 and "line 1: no JSON" in capsys.readouterr().err


def test_the_special_tokens_are_nanochats() -> None:
    assert len(SPECIAL_TOKENS) == 9 and SPECIAL_TOKENS[0] == "<|bos|>" and SPECIAL_TOKENS[-1] == "<|output_end|>"
