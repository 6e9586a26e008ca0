"""Training BPE: the merges of a naive trainer, and a command that says what it did and what is missing."""

from __future__ import annotations

import json
import random
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest
import tiktoken
import tokenizers

from gptfast import cli
from gptfast.errors import UserError
from gptfast.tokenizer import GPT4_PATTERN, load_bpe
from train import tokenizer as page
from train.tokenizer import main, train_bpe

WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2" / "valid.txt"
LETTERS = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())  # of the bytes in the order of their ids


def cut(text: str) -> list[bytes]:
    """The pieces of text within which pairs are merged."""
    split = tokenizers.pre_tokenizers.Split(tokenizers.Regex(GPT4_PATTERN), behavior="isolated")
    return [piece.encode() for piece, _ in split.pre_tokenize_str(text)]


def naive_merges(text: str, count: int, byte_ids: dict[int, int]) -> list[tuple[bytes, bytes]]:
    """Byte pair encoding by its definition: merge the most frequent pair (of those, the smallest ids), and again."""
    token_of = {i: bytes([byte]) for byte, i in byte_ids.items()}
    words = [(tuple(byte_ids[byte] for byte in word), n) for word, n in Counter(cut(text)).items()]
    pairs: Counter[tuple[int, int]] = Counter()
    for word, n in words:
        for pair in pairwise(word):
            pairs[pair] += n
    merges = []
    for new in range(256, 256 + count):
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append((token_of[best[0]], token_of[best[1]]))
        token_of[new] = b"".join(merges[-1])
        for i, (word, n) in enumerate(words):
            if best[0] in word and (after := merged(word, best, new)) != word:
                pairs.subtract({pair: n * times for pair, times in Counter(pairwise(word)).items()})
                pairs.update({pair: n * times for pair, times in Counter(pairwise(after)).items()})
                words[i] = after, n
    return merges


def merged(word: tuple[int, ...], pair: tuple[int, int], new: int) -> tuple[int, ...]:
    """The word with every occurrence of the pair, from the left, replaced."""
    out: list[int] = []
    for token in word:
        if out and (out[-1], token) == pair:
            out[-1] = new
        else:
            out.append(token)
    return tuple(out)


def generated(size: int) -> str:
    """Text with words as frequent as Zipf has them, numbers, punctuation, code and other scripts."""
    draw = random.Random(11)
    letters = "etaoinshrdlu" * 3 + "cmfwypvbgkqjxzéüßжя가나😀"
    words = ["".join(draw.choices(letters, k=draw.randint(1, 9))) for _ in range(4000)]
    weights = [1 / (i + 1) for i in range(len(words))]
    ends = [" ", " ", " ", ", ", ".\n", "'s ", "\n\n", "\t", " = ", "(", ")\r\n"]
    pieces = [
        draw.choice([word, word, word, word.capitalize(), str(draw.randint(0, 99_999))]) + draw.choice(ends)
        for word in draw.choices(words, weights, k=size // 5)
    ]
    return "".join(pieces)[:size]


@pytest.mark.parametrize("source", ["generated", "wikitext-2"])
def test_merges_are_those_of_the_definition(source: str) -> None:
    if source == "wikitext-2" and not WIKITEXT.exists():
        pytest.skip(f"needs {WIKITEXT}")
    text = generated(200_000) if source == "generated" else WIKITEXT.read_text("utf-8")[:200_000]
    found = train_bpe([text], 256 + 150 + 9)
    byte_ids = {token[0]: rank for token, rank in found.ranks.items() if len(token) == 1}
    assert sorted(byte_ids.values()) == list(range(256))
    expected = naive_merges(text, 150, byte_ids)
    assert found.merges() == expected

    ranks = {pair: rank for rank, pair in enumerate(expected, 256)}  # and the merges are applied as they were learnt
    for word in cut(text[-20_000:]):
        parts = [bytes([byte]) for byte in word]
        while learnt := [pair for pair in pairwise(parts) if pair in ranks]:
            pair = min(learnt, key=ranks.__getitem__)
            place = list(pairwise(parts)).index(pair)
            parts[place : place + 2] = [pair[0] + pair[1]]
        assert [found.ranks[part] for part in parts] == found.encode(word.decode())


def test_training_is_the_same_however_the_text_is_handed_over() -> None:
    words = generated(20_000).split("\n\n")
    parted = train_bpe((f"{word}\n\n" for word in words), 400)
    assert parted.fingerprint == train_bpe((f"{word}\n\n" for word in words), 400).fingerprint
    assert parted.vocab_size == 400 and [*parted.special_tokens] == list(page.SPECIAL_TOKENS)


# ---- the command


@pytest.fixture
def source(tmp_path: Path) -> Path:
    path = tmp_path / "text.jsonl"
    text = generated(30_000)
    path.write_text("".join(json.dumps({"text": text[i : i + 300]}) + "\n" for i in range(0, len(text), 300)))
    return path


def run(*arguments: object) -> int:
    return cli.run(main, list(map(str, arguments)))


def test_train_writes_a_folder_and_eval_a_table(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def offline(name: str) -> None:
        raise ConnectionError("no network")

    monkeypatch.setattr(tiktoken, "get_encoding", offline)
    folder = tmp_path / "tokenizer"
    assert run("train", f"--source={source}", "--vocab_size=600", f"--tokenizer={folder}") == 0
    said = capsys.readouterr()
    assert "read 30,000 characters" in said.out and "MB/s" in said.out and "600 tokens" in said.out
    assert "100/100" in said.err  # documents read
    tokenizer = load_bpe(folder)
    assert tokenizer.vocab_size == 600

    assert run("eval", f"--source={source}", f"--tokenizer={folder}") == 0
    table = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert table[0] == ["tokenizer", "gpt2", "cl100k_base"]
    rows = {row[0]: row[1:] for row in table[2:]}
    assert set(rows) == {*page.SAMPLES, "text.jsonl"} and all(row[3:] == ["n/a"] * 4 for row in rows.values())
    text = generated(30_000)
    size_bytes, tokens, ratio = (float(cell.replace(",", "")) for cell in rows["text.jsonl"][:3])
    assert size_bytes == len(text.encode()) and ratio == pytest.approx(size_bytes / tokens, abs=1e-3)
    assert float(rows["english"][2]) > float(rows["korean"][2])  # it has seen Latin letters


def test_max_chars_and_doc_cap_bound_what_is_read(source: Path, tmp_path: Path) -> None:
    text = page.Text(page.TokenizerConfig(source=str(source), doc_cap=100))
    assert {len(each) for each in text} == {100} and text.characters == 10_000
    text = page.Text(page.TokenizerConfig(source=str(source), max_chars=450))
    assert [len(each) for each in text] == [300, 150]


@pytest.mark.parametrize(
    "arguments, said",
    [
        ([], "nothing to do"),
        (["trian"], "trian to do: python -m train.tokenizer train, or eval"),
        (["train"], "--source: name a file"),
        (["train", "--source=missing"], "cannot read missing"),
        (["train", "--source={source}", "--vocab_size=264"], "the bytes and special tokens alone are 265"),
        (["train", "--source={source}", "--vocab_size=50000"], "not 50,000; use --vocab_size="),
        (["train", "--source={source}", "--column=body"], "no column body; set --column to one of text"),
        (["train", "--source={source}", "--max_chars=0"], "--max_chars"),
        (["train", "--source={source}", "--tokenizer={source}"], "it is there already"),
        (["eval", "--tokenizer=missing"], "no tokenizer missing: no such folder"),
    ],
)
def test_a_mistake_is_one_line(
    source: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch,
    arguments: list[str], said: str,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    before = sorted(tmp_path.iterdir())
    assert run(*(argument.format(source=source) for argument in arguments)) == 2
    assert capsys.readouterr().err.splitlines()[-1].startswith("error: ")
    with pytest.raises(UserError, match=said):
        main([argument.format(source=source) for argument in arguments])
    assert sorted(tmp_path.iterdir()) == before
