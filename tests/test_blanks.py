"""Long runs of blanks: cut at the same places as by the pattern, so that the ids are those of an engine that can."""

from __future__ import annotations

import random
import re
from importlib import import_module
from pathlib import Path

import pytest
import regex
import tokenizers

from gptfast import blanks
from gptfast.blanks import Blanks, shortened
from gptfast.errors import UserError
from gptfast.tokenizer import GPT4_PATTERN, BPETokenizer
from train.tokenizer import TokenizerConfig, train_bpe
from train.tokenizer import train as train_tokenizer

PATTERNS = [head + tail for head in blanks._HEADS for tail in blanks._TAILS]
CHARS = "    \n\n\r\t\u00a0\u2003\x1c\u3000aZ5.,!'/\u4e2d\u0301é\u0378s'"


def test_the_patterns_of_gpt_2_gpt_4_llama_3_and_ours_are_known() -> None:
    public = import_module("tiktoken_ext.openai_public")
    cl100k = (
        r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}++|\p{N}{1,3}+| ?[^\s\p{L}\p{N}]++[\r\n]*+"
        r"|\s++$|\s*[\r\n]|\s+(?!\S)|\s"
    )
    llama3 = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*"
        r"|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    for pattern in (GPT4_PATTERN, public.r50k_pat_str, cl100k, llama3):
        assert Blanks.of(pattern) is not None, pattern
    assert cl100k in Path(str(public.__file__)).read_text("utf-8")
    assert Blanks.of(r"\w+|\s+(?!\S)|\s+") is None


@pytest.mark.parametrize("pattern", PATTERNS)
def test_pieces_are_cut_as_the_pattern_cuts_the_whole(pattern: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(blanks, "LONG", 5)
    monkeypatch.setattr(blanks, "_RUN", re.compile(f"[{blanks._BLANK}]{{5,}}"))
    found, compiled, draws = Blanks.of(pattern), regex.compile(pattern.replace("$", r"\Z")), random.Random(0)
    assert found is not None
    cut = 0
    for _ in range(1500):
        text = "".join(draws.choice(CHARS) * draws.choice([1, 1, 2, 7]) for _ in range(draws.randrange(12)))
        pieces = list(found.pieces(text))
        cut += any(is_whole for _, is_whole in pieces)
        assert "".join(piece for piece, _ in pieces) == text
        ours = [each for piece, is_whole in pieces for each in ([piece] if is_whole else compiled.findall(piece))]
        assert ours == compiled.findall(text), text
    assert cut > 500


@pytest.fixture(scope="module")
def small() -> BPETokenizer:
    return train_bpe(["the cat sat\n    on the mat\n\n\n\t\t and     then        some \n"] * 20, 290)


@pytest.mark.parametrize("text", ["a" + " " * 1_000_000 + "b.", "!\n" + "\n \t" * 300_000, "\r\n" * 400_000 + "x"])
def test_a_million_blanks_are_encoded_and_come_back(small: BPETokenizer, text: str) -> None:
    assert small.decode(small.encode(text)) == text


def test_ids_around_runs_are_those_of_tokenizers(small: BPETokenizer, tmp_path: Path) -> None:
    small.save(tmp_path)
    theirs = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    draws = random.Random(1)
    for n in range(blanks.LONG - 3, blanks.LONG + 5):
        run = "".join(draws.choices(" \n\t", [50, 1, 1], k=n))
        for text in (f"a{run}b", f"cat.{run}", f"{run}!{run}5", f"\n{run}\n{run}'s"):
            assert small.encode(text) == theirs.encode(text, add_special_tokens=False).ids, text


def test_a_pattern_of_strangers_that_gives_up_is_an_error_of_one_line() -> None:
    stranger = BPETokenizer.from_ranks({bytes([i]): i for i in range(256)}, {}, r"\w+|\s+(?!\S)|[\s\S]")
    with pytest.raises(UserError, match="pattern cannot split a text of 1,500,001 characters"):
        stranger.encode(" " * 1_500_000 + "x")


def test_training_counts_a_run_in_parts(tmp_path: Path) -> None:
    assert [len(part) for part in shortened("a" + " " * (2 * blanks.LONG + 1) + "b")] == [
        blanks.LONG + 1, blanks.LONG, 2
    ]  # fmt: skip
    runs = ("=" * (blanks.LONG + 5), "我" * (2 * blanks.LONG), "ab" * blanks.LONG, "a b" * blanks.LONG)
    for run in runs:
        parts = list(shortened(f"a {run}\nb"))
        assert "".join(parts) == f"a {run}\nb" and len(parts) == (2 if " " not in run else 1)
    (tmp_path / "text.txt").write_text("the cat sat on the mat. " * 50 + " " * 300_000 + "the end\n" * 50, "utf-8")
    config = TokenizerConfig("train", str(tmp_path / "text.txt"), tokenizer=str(tmp_path / "made"), vocab_size=280)
    assert train_tokenizer(config).vocab_size == 280
