"""Tokenizer files of strangers: read so that the ids are those of `tokenizers`, or refused with what to do instead."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
import tokenizers
from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers, trainers

from gptfast.errors import UserError
from gptfast.tokenizer import from_json, load_bpe
from gptfast.tokenizer_json import BYTE_LETTERS, PROBE, prove

BLOOM = (
    r" ?[^(\s|[.,!?…。，、।۔،])]+"  # covers words and the blank before them, and neither punctuation nor line breaks
)
QWEN = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
TEXT = [PROBE, "b, c (d)\n  x. the cat sat on the mat; the cat, the mat!\n" * 20]


def splitting(*patterns: str, use_regex: bool = False) -> pre_tokenizers.PreTokenizer:
    splits = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=use_regex)
    return pre_tokenizers.Sequence([*splits, last])


def byte_level(pre_tokenizer: pre_tokenizers.PreTokenizer) -> tokenizers.Tokenizer:
    made = tokenizers.Tokenizer(models.BPE())
    made.pre_tokenizer, made.decoder = pre_tokenizer, decoders.ByteLevel()
    trainer = trainers.BpeTrainer(vocab_size=400, initial_alphabet=list(BYTE_LETTERS.values()), show_progress=False)
    made.train_from_iterator(TEXT, trainer)
    made.add_special_tokens([AddedToken("<|bos|>", special=True, normalized=False)])
    return made


def written(made: tokenizers.Tokenizer, folder: Path, **changes: Any) -> Path:
    (folder / "tokenizer.json").write_text(json.dumps(json.loads(made.to_str()) | changes), "utf-8")
    return folder


def thinking() -> tokenizers.Tokenizer:
    """Qwen's: text is composed first, and what the model thinks stands between tokens that text is encoded into."""
    made = byte_level(splitting(QWEN))
    made.normalizer = normalizers.NFC()
    made.add_tokens([AddedToken("<think>", special=False, normalized=False), AddedToken("</think>", normalized=False)])
    return made


@pytest.mark.parametrize("make", [lambda: byte_level(splitting(BLOOM)), thinking], ids=["bloom", "qwen"])
def test_ids_are_theirs_and_no_text_is_lost(make: Any, tmp_path: Path) -> None:
    theirs = make()
    read = load_bpe(written(theirs, tmp_path))
    read.save(tmp_path / "again")
    again = tokenizers.Tokenizer.from_file(str(tmp_path / "again" / "tokenizer.json"))
    described = from_json(json.loads(json.dumps(read.to_json())))
    assert load_bpe(tmp_path / "again").fingerprint == read.fingerprint == described.fingerprint
    draws = random.Random(0)
    for _ in range(300):
        text = "".join(draws.choices([*"b, c (d)\n x.!?\t5é", "e\u0301", "<think>", "</think>", "<think"], k=20))
        expected = theirs.encode(text, add_special_tokens=False).ids
        assert read.encode(text) == described.encode(text) == expected, text
        assert again.encode(text, add_special_tokens=False).ids == expected
        assert read.decode(read.encode(text)) == theirs.decode(expected, skip_special_tokens=False)
    assert read.decode(read.encode("b, c (d)\n  x")) == "b, c (d)\n  x"


def test_bytes_of_tokens_that_text_holds_are_counted(tmp_path: Path) -> None:
    read = load_bpe(written(thinking(), tmp_path))
    ids = read.encode("<think>cat</think>")
    assert read.special_tokens["<think>"] in ids
    assert int(read.token_bytes()[ids].sum()) == len("<think>cat</think>")
    assert int(read.token_bytes()[read.special_tokens["<|bos|>"]]) == 0


@pytest.mark.parametrize(
    "made, said",
    [
        (lambda: byte_level(splitting(BLOOM, use_regex=True)), "splits text by Split, then ByteLevel .use_regex"),
        (lambda: byte_level(splitting(r"\p{N}", QWEN)), "splits text by Split, then Split, then ByteLevel"),
        (
            lambda: byte_level(
                pre_tokenizers.Sequence(
                    [pre_tokenizers.ByteLevel(add_prefix_space=False), pre_tokenizers.Split(Regex("a"), "isolated")]
                )
            ),
            "splits text by ByteLevel .use_regex., then Split",
        ),
    ],
)
def test_what_tiktoken_cannot_split_is_refused(made: Any, said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said) as error:
        load_bpe(written(made(), tmp_path))
    assert "use transformers" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("names", [("<X>", "<X>b"), ("<X>", "X>b"), ("|>b",), ("bos",)], ids=" ".join)
def test_added_tokens_that_overlap_are_refused(names: tuple[str, ...], tmp_path: Path) -> None:
    """Which of them a text holds depends on the order in which they are looked for, special ones first."""
    made = byte_level(splitting(QWEN))
    made.add_tokens([AddedToken(name, special=False, normalized=name.startswith("X")) for name in names])
    with pytest.raises(UserError, match="added tokens that overlap"):
        load_bpe(written(made, tmp_path))


def test_a_text_that_nothing_splits_is_refused(tmp_path: Path) -> None:
    for nothing in (None, {"type": "Sequence", "pretokenizers": []}):
        with pytest.raises(UserError, match="splits text by nothing"):
            load_bpe(written(byte_level(splitting(QWEN)), tmp_path, pre_tokenizer=nothing))


def test_dropout_is_refused(tmp_path: Path) -> None:
    model = json.loads(byte_level(splitting(QWEN)).to_str())["model"]
    with pytest.raises(UserError, match="a BPE with dropout"):
        load_bpe(written(byte_level(splitting(QWEN)), tmp_path, model={**model, "dropout": 0.1}))


def test_a_token_that_no_merge_leads_to_is_refused(tmp_path: Path) -> None:
    made = byte_level(splitting(QWEN))
    model = json.loads(made.to_str())["model"]
    lost = model["merges"].pop(10)
    with pytest.raises(UserError, match=f"no merges lead to its token '{re.escape(''.join(lost))}'"):
        load_bpe(written(made, tmp_path, model=model))


def test_what_the_fields_do_not_tell_the_probe_finds(tmp_path: Path) -> None:
    made = byte_level(splitting(QWEN))
    content, ours = json.loads(made.to_str()), load_bpe(written(made, tmp_path))
    prove(content, tmp_path, ours.encode)
    with pytest.raises(UserError, match="encodes a probe otherwise than gptfast would, from token 0 on"):
        prove(content, tmp_path, lambda text: ours.encode(text.upper()))


@pytest.mark.parametrize("value", [[], [[]], {}, "1", None, True, 0.5, 10**40, -1])
def test_an_id_that_is_no_number_and_a_token_that_is_no_text_are_refused(value: Any, tmp_path: Path) -> None:
    made = json.loads(thinking().to_str())
    for change in (
        lambda content: content["model"]["vocab"].update({"\u00c9": value}),
        lambda content: content["added_tokens"][0].update(id=value),
        lambda content: content["added_tokens"][0].update(content=5 if isinstance(value, str) else value),
        lambda content: content["pre_tokenizer"].update(pretokenizers=value),
    ):
        content = json.loads(json.dumps(made))
        change(content)
        (tmp_path / "tokenizer.json").write_text(json.dumps(content))
        with pytest.raises(UserError, match=r"^[^\n]*tokenizer\.json[^\n]*$"):
            load_bpe(tmp_path)


def test_another_family_is_not_called_damaged(tmp_path: Path) -> None:
    vocab = {"<unk>": 0, "\u2581": 1, "a": 2, "\u2581a": 3}
    made = tokenizers.Tokenizer(models.BPE(vocab, [("\u2581", "a")], unk_token="<unk>", byte_fallback=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")])
    with pytest.raises(UserError, match="normalizes text by Sequence") as error:
        load_bpe(written(made, tmp_path))
    assert "damaged" not in str(error.value) and "transformers" in str(error.value)
