"""Tokenizers: exact round trips, the same ids in every library, and errors that name the character or the file."""

from __future__ import annotations

import base64
import json
import math
import pickle
import random
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import tiktoken
import tokenizers
import torch
from hypothesis import given
from hypothesis import strategies as st

from gptfast.errors import UserError
from gptfast.tokenizer import (
    BPETokenizer,
    CharTokenizer,
    find_bpe,
    from_json,
    load_bpe,
    load_tokenizer,
)
from gptfast.tokenizer_json import GPT2_PATTERN, halves
from train.tokenizer import train_bpe


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
    with pytest.raises(UserError, match="not a tokenizer" if description is not None else "the model has no tokenizer"):
        from_json(description)


# ---- the tokenizer of a folder


def test_a_folder_gives_the_tokenizer_of_its_meta_json(tmp_path: Path) -> None:
    (tmp_path / "meta.json").write_text(json.dumps({"vocab_size": 3, "tokenizer": CharTokenizer("xyz").to_json()}))
    assert load_tokenizer(tmp_path) == CharTokenizer("xyz")


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{",
        "[1]",
        '{"tokenizer": 3}',
        '{"vocab_size": 3}',
        '{"vocab_size": 1, "tokenizer": 3}',
        '{"vocab_size": 1, "tokenizer": null}',
        "\udcff",
    ],
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


# ---- ranks of one's own

BYTES = {bytes([i]): i for i in range(256)}
SPECIAL = ("<|bos|>", "<|user_start|>", "<|output_end|>")


@pytest.fixture(scope="session")
def trained(text: str) -> BPETokenizer:
    return train_bpe([text, "naïve 😀 déjà vu " * 50, "x = 1234567\r\n\t\ty = [0, 1]\n" * 50], 700)


@pytest.fixture(scope="session")
def saved(trained: BPETokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tokenizer")
    trained.save(folder)
    return folder


def random_strings(count: int) -> list[str]:
    """Strings of any characters but halves of surrogate pairs, of ASCII, of what splits words, of special tokens."""
    draw = random.Random(7)
    anything = [chr(i) for i in range(0x110000) if not 0xD800 <= i < 0xE000]
    alphabets: list[list[str]] = [
        anything,
        anything[:0x3000],
        [chr(i) for i in (9, 10, 13, *range(32, 127))],
        list("a b\n\r\t's\u017fSK\u212a1２Ⅷ½ß\u0301\u0085\x0b\u2028\u200b\u3000é😀가\0"),
        [*SPECIAL, "<|endoftext|>", "<|", "|>", " ", "the", "\n"],
    ]
    return ["".join(draw.choices(draw.choice(alphabets), k=draw.randint(0, 30))) for _ in range(count)]


def test_10000_random_strings_are_the_same_tokens_everywhere_and_come_back(trained: BPETokenizer, saved: Path) -> None:
    """Ours, tiktoken from the rank file, tokenizers from tokenizer.json, transformers from the folder."""
    from tiktoken.load import load_tiktoken_bpe
    from transformers import AutoTokenizer

    encoding = json.loads((saved / "encoding.json").read_text())
    ranks = load_tiktoken_bpe(str(saved / "ranks.tiktoken"))
    specials = encoding["special_tokens"]
    by_tiktoken = tiktoken.Encoding(
        "x", pat_str=encoding["pattern"], mergeable_ranks=ranks, special_tokens=specials, explicit_n_vocab=700
    )
    by_tokenizers = tokenizers.Tokenizer.from_file(str(saved / "tokenizer.json"))
    by_tokenizers.encode_special_tokens = True  # as plain text
    by_transformers = AutoTokenizer.from_pretrained(saved)
    assert by_transformers.bos_token_id == trained.bos == specials["<|bos|>"] and len(by_transformers) == 700
    strings = random_strings(10_000)
    expected = [trained.encode(string) for string in strings]
    assert [trained.decode(ids) for ids in expected] == strings
    assert max(map(max, filter(None, expected))) < 700 - 9  # the special tokens are the last, and come out of no text
    assert by_tiktoken.encode_ordinary_batch(strings) == expected
    assert [found.ids for found in by_tokenizers.encode_batch(strings)] == expected
    assert by_tokenizers.decode_batch(expected[:1000], skip_special_tokens=False) == strings[:1000]
    assert by_transformers(strings, split_special_tokens=True)["input_ids"] == expected


def test_a_special_token_is_only_what_its_id_says(trained: BPETokenizer) -> None:
    specials = trained.special_tokens
    assert sorted(specials.values()) == list(range(691, 700)) and trained.vocab_size == 700
    assert trained.decode([specials["<|user_start|>"], *trained.encode("hi")]) == "<|user_start|>hi"
    assert trained.encode_document("hi") == [specials["<|bos|>"], *trained.encode("hi")]
    with pytest.raises(UserError, match="no token to begin a document"):
        BPETokenizer.from_ranks(BYTES, {}).encode_document("hi")


def test_json_and_folder_make_an_equal_tokenizer(trained: BPETokenizer, saved: Path, text: str, tmp_path: Path) -> None:
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (tmp_path / name).write_bytes((saved / name).read_bytes())  # as a folder of someone else's
    described = from_json(json.loads(json.dumps(trained.to_json())))
    for other in (described, load_bpe(saved), find_bpe(str(saved)), load_bpe(tmp_path)):
        assert other.fingerprint == trained.fingerprint and other.vocab_size == 700
        assert other.encode(text) == trained.encode(text)
    assert trained.merges() == load_bpe(tmp_path).merges() and len(trained.merges()) == 700 - 9 - 256


def test_fingerprints_tell_tokenizers_apart() -> None:
    ranks = {**BYTES, b"ab": 256, b"bc": 257}
    swapped = {**BYTES, b"ab": 257, b"bc": 256}
    prints = [
        BPETokenizer.from_ranks(ranks, {"<|bos|>": 258}).fingerprint,
        BPETokenizer.from_ranks(swapped, {"<|bos|>": 258}).fingerprint,
        BPETokenizer.from_ranks(ranks, {"<|end|>": 258}).fingerprint,
        BPETokenizer.from_ranks(ranks, {"<|bos|>": 258}, GPT2_PATTERN).fingerprint,
        CharTokenizer("ab").fingerprint,
        CharTokenizer("ba").fingerprint,
    ]
    assert len(set(prints)) == len(prints) and all(len(bytes.fromhex(each)) == 32 for each in prints)


def test_token_bytes_make_bits_per_byte(trained: BPETokenizer) -> None:
    """A model that holds every byte for equally likely, on text tokenized by bytes, pays 8 bits for each."""
    for string in ("naïve 😀 text", "the quick\n"):
        assert int(trained.token_bytes()[trained.encode(string)].sum()) == len(string.encode())
    assert trained.token_bytes()[-9:].tolist() == [0] * 9
    assert CharTokenizer("aé😀").token_bytes().tolist() == [1, 2, 4]
    by_bytes = BPETokenizer.from_ranks(BYTES, {"<|bos|>": 256})
    ids = by_bytes.encode_document("naïve")
    nats = torch.full((len(ids),), math.log(256))
    size_bytes = by_bytes.token_bytes()[ids]
    assert nats[size_bytes > 0].sum() / size_bytes.sum() / math.log(2) == pytest.approx(8)


def test_ids_past_65535_survive_the_tensor() -> None:
    wide = BPETokenizer.from_ranks({**BYTES, b"th": 70_000}, {"<|bos|>": 70_001})
    assert wide.vocab_size == 70_002 and wide.encode_tensor("the").tolist() == [70_000, ord("e")]
    assert wide.encode_tensor("the").dtype == torch.int32
    with pytest.raises(UserError, match="no token of this id"):
        wide.decode([60_000])


def test_halves_of_surrogate_pairs_become_replacement_characters(trained: BPETokenizer) -> None:
    assert trained.decode(trained.encode("a\ud83db")) == "a\ufffdb"


@pytest.mark.parametrize(
    "ranks, specials",
    [({b"a": 0}, {}), (BYTES, {"<|bos|>": 255}), ({**BYTES, b"ab": 0}, {}), ({**BYTES, b"ab": -1}, {})],
)
def test_what_are_no_ranks_is_refused(ranks: dict[bytes, int], specials: dict[str, int]) -> None:
    with pytest.raises(UserError, match="not the ranks of a byte-level BPE"):
        BPETokenizer.from_ranks(ranks, specials)


def test_ranks_that_no_merge_makes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not come of a merge"):
        BPETokenizer.from_ranks({**BYTES, b"abc": 256}, {}).save(tmp_path)
    with pytest.raises(UserError, match="gaps"):
        BPETokenizer.from_ranks(BYTES, {"<|bos|>": 300}).save(tmp_path)
    with pytest.raises(UserError, match="cannot split text by"):
        BPETokenizer.from_ranks(BYTES, {}, "(")


@pytest.mark.parametrize("name", ["ranks.tiktoken", "encoding.json"])
def test_every_damaged_line_of_a_saved_tokenizer_is_found(saved: Path, tmp_path: Path, name: str) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    lines = (saved / name).read_text().splitlines()
    for number in range(0, len(lines), 17):
        kept = [*lines[:number], lines[number][1:], *lines[number + 1 :]]
        (tmp_path / name).write_text("\n".join(kept))
        try:
            load_bpe(tmp_path)
        except UserError:
            continue
        assert json.loads("\n".join(kept)) == json.loads("\n".join(lines))  # only white space was lost
    (tmp_path / name).write_text("{}")
    with pytest.raises(UserError, match=r"cannot read the ranks|not a tokenizer"):
        load_bpe(tmp_path)


def test_exchanged_ranks_are_found(saved: Path, tmp_path: Path) -> None:
    for file in saved.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    rows = [line.split() for line in (saved / "ranks.tiktoken").read_text().splitlines()]
    rows[300][0], rows[301][0] = rows[301][0], rows[300][0]
    (tmp_path / "ranks.tiktoken").write_text("".join(f"{token} {rank}\n" for token, rank in rows))
    with pytest.raises(UserError, match=r"ranks\.tiktoken does not fit encoding\.json"):
        load_bpe(tmp_path)


def test_damaged_json_of_a_tokenizer_is_refused(trained: BPETokenizer) -> None:
    whole = trained.to_json()
    for name, value in (("tokens", "a=b"), ("tokens", 5), ("special_tokens", {"<|bos|>": "1"}), ("pattern", None)):
        with pytest.raises(UserError, match=r"damaged|not a tokenizer"):
            from_json({**whole, name: value})


def test_a_folder_whose_ranks_were_exchanged_is_refused(tmp_path: Path) -> None:
    tokenizer = CharTokenizer("abc")
    meta: dict[str, Any] = {"vocab_size": 3, "tokenizer": tokenizer.to_json(), "fingerprint": tokenizer.fingerprint}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    assert load_tokenizer(tmp_path) == tokenizer
    (tmp_path / "meta.json").write_text(json.dumps(meta | {"fingerprint": "0" * 64}))
    with pytest.raises(UserError, match="another tokenizer"):
        load_tokenizer(tmp_path)


def test_a_name_is_a_folder_or_tiktokens(tmp_path: Path, small_bpe: tiktoken.Encoding) -> None:
    assert find_bpe("gpt2").vocab_size == 258
    with pytest.raises(UserError, match=r"no tokenizer x+: no such folder"):
        find_bpe("x" * 5000)
    with pytest.raises(UserError, match="no tokenizer gtp2: no such folder, and tiktoken knows gpt2"):
        find_bpe("gtp2")
    with pytest.raises(UserError, match="no tokenizer in"):
        find_bpe(str(tmp_path))


# ---- tokenizer.json of others


@pytest.fixture
def gpt2_like(text: str) -> tokenizers.Tokenizer:
    """Laid out as GPT-2's: the ByteLevel step splits by itself, and the special token has the last id."""
    made = tokenizers.Tokenizer(tokenizers.models.BPE())
    made.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = tokenizers.pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [text], tokenizers.trainers.BpeTrainer(vocab_size=400, initial_alphabet=alphabet, show_progress=False)
    )
    made.add_special_tokens([tokenizers.AddedToken("<|endoftext|>", special=True, normalized=False)])
    return made


def test_a_gpt2_folder_is_read(gpt2_like: tokenizers.Tokenizer, tmp_path: Path) -> None:
    gpt2_like.save(str(tmp_path / "tokenizer.json"))
    tokenizer = load_bpe(tmp_path)
    assert tokenizer.vocab_size == 401 and tokenizer.bos == 400 and tokenizer.pattern == GPT2_PATTERN
    strings = [string for string in random_strings(2000) if "<|endoftext|>" not in string]
    assert [tokenizer.encode(string) for string in strings] == [found.ids for found in gpt2_like.encode_batch(strings)]


def test_gpt2s_pattern_is_tiktokens() -> None:
    assert import_module("tiktoken_ext.openai_public").r50k_pat_str == GPT2_PATTERN


@pytest.mark.parametrize(
    "change, said",
    [
        (lambda c: c["model"].update(type="WordPiece"), "holds a WordPiece"),
        (lambda c: c.update(normalizer={"type": "NFKC"}), "normalizes text by NFKC"),
        (lambda c: c["pre_tokenizer"].update(add_prefix_space=True), "puts a blank before a text"),
        (lambda c: c.update(pre_tokenizer={"type": "Whitespace"}), "splits text by Whitespace"),
        (lambda c: c["pre_tokenizer"].update(use_regex=False), "splits text by ByteLevel"),
        (lambda c: c["model"]["merges"].reverse(), "merges in another order"),
        (lambda c: c["model"]["vocab"].update({"\u4e2d": 999}), "not of bytes' letters"),
        (lambda c: c["model"].pop("vocab"), "damaged"),
        (lambda c: c.update(model=[]), "damaged"),
        (lambda c: c.clear(), "damaged"),
    ],
)
def test_a_tokenizer_json_that_is_another_kind_is_refused(
    gpt2_like: tokenizers.Tokenizer, tmp_path: Path, change: Callable[[Any], object], said: str
) -> None:
    content = json.loads(gpt2_like.to_str())
    change(content)
    (tmp_path / "tokenizer.json").write_text(json.dumps(content))
    with pytest.raises(UserError, match=said) as error:
        load_bpe(tmp_path)
    assert "tokenizer.json" in str(error.value)


def test_a_tokenizer_json_that_is_cut_is_refused(gpt2_like: tokenizers.Tokenizer, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.json").write_text(gpt2_like.to_str()[:5000])
    with pytest.raises(UserError, match=r"cannot read .*tokenizer\.json"):
        load_bpe(tmp_path)


def test_the_rank_file_is_base64_and_rank(saved: Path) -> None:
    first, *_, last = (saved / "ranks.tiktoken").read_text().splitlines()
    assert base64.b64decode(first.split()[0]) == b"!" and first.split()[1] == "0" and last.split()[1] == "690"


def test_halves_are_those_of_merging_in_order_and_a_long_token_takes_no_time() -> None:
    draw = random.Random(0)
    ranks = {bytes([byte]): byte for byte in range(256)}
    while len(ranks) < 700:
        left, right = (draw.choice(list(ranks)[97:100] + list(ranks)[256:]) for _ in range(2))
        ranks.setdefault(left + right, len(ranks))

    def slow(token: bytes) -> tuple[bytes, ...]:
        parts = [bytes([byte]) for byte in token]
        while len(parts) > 2:
            rank, place = min((ranks.get(parts[i] + parts[i + 1], 10**6), i) for i in range(len(parts) - 1))
            if rank >= ranks[token]:
                return ()
            parts[place : place + 2] = [parts[place] + parts[place + 1]]
        return tuple(parts)

    outcomes = set()
    for token in [token for token in ranks if len(token) > 1]:
        try:
            found: tuple[bytes, ...] = halves(token, ranks)
        except UserError:
            found = ()
        assert found == slow(token)
        outcomes.add(bool(found))
    assert outcomes == {True, False}
    doubled = {bytes([byte]): byte for byte in range(256)} | {b"a" * 2**i: 255 + i for i in range(1, 19)}
    assert halves(b"a" * 2**18, doubled) == (b"a" * 2**17, b"a" * 2**17)
