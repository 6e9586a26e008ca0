"""Tokenizers: exact round trips, JSON that makes an equal one, and errors that name the character."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import pytest
import tiktoken
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptfast.cli import UserError
from gptfast.tokenizer import BPETokenizer, CharTokenizer, from_json, load_tokenizer


def test_ids_are_places_in_code_point_order() -> None:
    tokenizer = CharTokenizer.from_text("banana\nbread")
    assert tokenizer.chars == "\nabdenr"
    assert tokenizer.vocab_size == 7
    assert tokenizer.encode("\nabr") == [0, 1, 2, 6]


@given(st.text(st.characters(), min_size=1))
def test_any_text_round_trips_both_ways(text: str) -> None:
    tokenizer = from_json(json.loads(json.dumps(CharTokenizer.from_text(text).to_json())))
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_tensor(text).dtype == torch.uint16
    assert tokenizer.encode_tensor(text).tolist() == ids


def test_ids_past_int16_survive_the_tensor() -> None:
    chars = "".join(map(chr, [*range(0xD800), *range(0xE000, 0x10000)]))
    tokenizer = CharTokenizer(chars)
    assert tokenizer.vocab_size > 2**15
    assert tokenizer.encode_tensor(chars).tolist() == list(range(len(chars)))


@pytest.mark.parametrize("method", ["encode", "encode_tensor"])
@pytest.mark.parametrize("char, code", [("é", "U+00E9"), ("\U0001f600", "U+1F600"), ("\t", "U+0009")])
def test_an_unknown_character_is_named_with_its_place_and_a_fix(method: str, char: str, code: str) -> None:
    tokenizer = CharTokenizer.from_text("abc")
    with pytest.raises(UserError) as error:
        getattr(tokenizer, method)(f"ab{char}c{char}")
    message = str(error.value)
    assert repr(char) in message and code in message and "position 2" in message
    assert "replace it" in message and "'abc'" in message and "\n" not in message


def test_empty_text_has_no_tokens() -> None:
    tokenizer = CharTokenizer("ab")
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == "" and len(tokenizer.encode_tensor("")) == 0


@pytest.mark.parametrize("stray", [-1, 3, 50304])
def test_an_id_outside_the_vocabulary_is_an_error_not_another_character(stray: int) -> None:
    with pytest.raises(UserError, match=f"token id {stray} is outside the vocabulary of 3"):
        CharTokenizer("abc").decode([0, stray])


@pytest.mark.parametrize("chars", ["", "aa", "".join(map(chr, range(0x10000, 0x10000 + 65_537)))])
def test_impossible_vocabularies_are_refused(chars: str) -> None:
    with pytest.raises(UserError, match="characters"):
        CharTokenizer(chars)


@pytest.mark.parametrize(
    "description", [None, {}, {"kind": "pickle"}, {"kind": "char"}, {"kind": "char", "chars": [1]}]
)
def test_what_is_no_description_is_refused(description: object) -> None:
    with pytest.raises(UserError, match="not a tokenizer"):
        from_json(description)


# ---- the tokenizer of a folder


def test_a_folder_gives_the_tokenizer_of_its_meta_json(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 3, "tokenizer": CharTokenizer("xyz").to_json()}))
    assert load_tokenizer(tmp_path) == CharTokenizer("xyz")


@pytest.mark.parametrize(
    "content", ["", "{", "[1]", '{"tokenizer": 3}', '{"vocab_size": 3}', '{"vocab_size": 1, "tokenizer": 3}', "\udcff"]
)
def test_a_damaged_meta_json_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "meta.json").write_text(content, "utf-8", "surrogateescape")
    with pytest.raises(UserError, match=r"meta\.json|not a tokenizer") as error:
        load_tokenizer(tmp_path)
    assert "prepare the data again" in str(error.value)


@pytest.mark.parametrize("folder", ["missing", "."])
def test_a_folder_without_data_says_how_to_make_it(tmp_path: Path, folder: str) -> None:
    with pytest.raises(UserError, match=r"python -m train\.prepare"):
        load_tokenizer(tmp_path / folder)


def test_a_pickled_meta_is_never_opened(tmp_path: Path) -> None:
    class Payload:
        def __reduce__(self) -> tuple[object, tuple[Path]]:
            return Path.touch, (tmp_path / "ran",)

    (tmp_path / "train.bin").write_bytes(b"\0\0")
    (tmp_path / "meta.pkl").write_bytes(pickle.dumps(Payload()))
    with pytest.raises(UserError, match="pickled"):
        load_tokenizer(tmp_path)
    assert not (tmp_path / "ran").exists()


# ---- byte pair encoding


@pytest.fixture
def small_bpe(monkeypatch: pytest.MonkeyPatch) -> tiktoken.Encoding:
    """A real tiktoken encoding of the 256 bytes, one merge and one special token, where `gpt2` would be fetched."""
    ranks = {bytes([i]): i for i in range(256)} | {b"th": 256}
    encoding = tiktoken.Encoding("gpt2", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|end|>": 257})
    monkeypatch.setattr(tiktoken, "get_encoding", lambda name: encoding)
    return encoding


def test_bpe_has_the_same_interface(small_bpe: tiktoken.Encoding) -> None:
    tokenizer = from_json(json.loads(json.dumps(BPETokenizer("gpt2").to_json())))
    assert tokenizer.vocab_size == 258
    assert tokenizer.encode("the") == [256, ord("e")]
    assert tokenizer.decode(tokenizer.encode("the thé 😀")) == "the thé 😀"
    assert tokenizer.encode_tensor("the").tolist() == [256, ord("e")]
    with pytest.raises(UserError, match="token id 258 is outside"):
        tokenizer.decode([258])


def test_bpe_text_cannot_forge_a_special_token(small_bpe: tiktoken.Encoding) -> None:
    assert 257 not in BPETokenizer("gpt2").encode("<|end|>")


def test_a_folder_with_bare_token_files_is_gpt2(small_bpe: tiktoken.Encoding, tmp_path: Path) -> None:
    (tmp_path / "train.bin").write_bytes(b"\0\0")
    assert isinstance(load_tokenizer(tmp_path), BPETokenizer)


def test_bpe_without_cache_and_network_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("Name or service not known\nmore")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    with pytest.raises(UserError, match="connect to the network once") as error:
        BPETokenizer("gpt2")
    assert "gpt2" in str(error.value) and "Name or service" in str(error.value) and "\n" not in str(error.value)


def test_bpe_without_tiktoken_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "tiktoken", None)
    with pytest.raises(UserError, match="pip install tiktoken"):
        BPETokenizer("gpt2")
