"""Trains a byte-level BPE tokenizer, or compares how well tokenizers compress.

    python -m train.tokenizer train --source=folder --vocab_size=32768     .parquet, .jsonl or .txt; hf:user/name
    python -m train.tokenizer eval --tokenizer=tokenizer --source=folder   bytes per token beside gpt2 and cl100k_base

Text is split by GPT-4's pattern, with numbers of at most 2 digits; within the pieces the most frequent pair of tokens
is merged, again and again, until the vocabulary is full; on ties, the pair with the smaller ids. The special tokens
have the last ids, and no text is ever encoded into one. `train` writes a folder that train.prepare takes as
--tokenizer=FOLDER, and that tiktoken, tokenizers and transformers read (see gptfast/tokenizer.py).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

from gptfast import cli
from gptfast.aside import folder_aside
from gptfast.blanks import shortened
from gptfast.chat.conversation import SPECIAL_TOKENS
from gptfast.errors import UserError, remedy
from gptfast.tokenizer import ENCODING, GPT4_PATTERN, BPETokenizer, find_bpe
from gptfast.tokenizer_json import BYTE_LETTERS
from train.documents import Documents

SMALLEST_VOCAB = 256 + len(SPECIAL_TOKENS)
BASELINES = ("gpt2", "cl100k_base")

# Texts of kinds that tokenizers treat differently, for `eval`.
SAMPLES = {
    "english": "The river had risen in the night, and by morning the lower field was a lake with hedges. We counted "
    'twenty-three sheep on the bank, all of them wet, none of them impressed. "It\'ll go down," said my aunt, who had '
    "seen it go down before, and she put the kettle on.\n",
    "korean": "밤사이 강물이 불어나 아침에는 아래쪽 밭이 호수가 되었다. 우리는 둑 위에서 양 스물세 마리를 세었는데, "
    "모두 젖어 있었지만 놀란 양은 한 마리도 없었다.\n",
    "code": "def count_words(path: str) -> dict[str, int]:\n    counts: dict[str, int] = {}\n"
    "    with open(path) as file:\n        for line in file:\n            for word in line.split():\n"
    "                counts[word] = counts.get(word, 0) + 1\n    return counts\n",
    "math": r"Let $f(x) = \sum_{n=0}^{\infty} \frac{x^n}{n!}$. Then $f'(x) = f(x)$ and $f(0) = 1$, so $f(x) = e^x$; "
    "for x = 0.125 the first 4 terms give 1.1331380, and e^0.125 is 1.1331485.\n",
}


@dataclass(frozen=True)
class TokenizerConfig:
    command: str = ""  # train or eval
    source: str = ""  # text: a file, a folder or hf:user/name; eval does without
    subset: str = ""  # of a data set on the hub
    split: str = "train"  # of a data set on the hub
    column: str = "text"  # that holds the documents
    tokenizer: str = "tokenizer"  # folder that train writes and eval reads; eval also takes tiktoken's names
    vocab_size: int = 32768  # ids in all, the 9 special tokens included
    max_chars: int = 2_000_000_000  # text to read at most
    doc_cap: int = 0  # characters of each document to read at most; 0: all

    def __post_init__(self) -> None:
        if self.vocab_size < SMALLEST_VOCAB:
            raise UserError(f"--vocab_size={self.vocab_size}: the bytes and special tokens alone are {SMALLEST_VOCAB}")
        if self.max_chars < 1 or self.doc_cap < 0:
            raise UserError("--max_chars must be at least 1, and --doc_cap must not be negative")


def main(argv: list[str]) -> None:
    config = cli.parse(TokenizerConfig, argv, positional="command")
    if config.command == "train":
        train(config)
    elif config.command == "eval":
        evaluate(config)
    else:
        raise UserError(f"{config.command or 'nothing'} to do: python -m train.tokenizer train, or eval")


def train(config: TokenizerConfig) -> BPETokenizer:
    """Trains on `config.source` and writes the folder `config.tokenizer`; prints the result."""
    folder = Path(config.tokenizer)
    if not config.source:
        raise UserError("--source: name a file, a folder or hf:user/name to train on")
    if folder.exists():
        raise UserError(f"--tokenizer={folder}: it is there already; choose another folder, or remove it")
    started = time.perf_counter()
    text = Text(config, for_training=True)
    try:
        with folder_aside(folder, first=ENCODING) as building:  # created before the training, so that it fails early
            tokenizer = train_bpe(text, config.vocab_size)
            seconds = time.perf_counter() - started
            tokenizer.save(building)
    except OSError as error:
        reason = error.strerror or error
        fix = remedy(error, "choose another folder")
        raise UserError(f"--tokenizer={folder}: cannot write there ({reason}); {fix}") from None
    print(f"read {text.characters:,} characters, {text.bytes:,} bytes; {text.bytes / 1e6 / seconds:.2f} MB/s")
    print(f"wrote {folder}: {tokenizer.vocab_size:,} tokens, the longest {max(map(len, tokenizer.ranks))} bytes")
    return tokenizer


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Trains a tokenizer of `vocab_size` ids on `texts`. Raises UserError if they are too short for that many."""
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers, trainers

    trained = Tokenizer(models.BPE())
    trained.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(GPT4_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(SPECIAL_TOKENS),
        min_frequency=2,
        initial_alphabet=list(BYTE_LETTERS.values()),
        show_progress=sys.stderr.isatty(),
    )
    trained.train_from_iterator(texts, trainer)
    byte_of = {letter: byte for byte, letter in BYTE_LETTERS.items()}
    ranks = {bytes([byte_of[letter] for letter in token]): rank for token, rank in trained.get_vocab().items()}
    size = len(ranks) + len(SPECIAL_TOKENS)
    if size < vocab_size:
        raise UserError(f"the text gives {size:,} tokens, not {vocab_size:,}; use --vocab_size={size}, or more text")
    return BPETokenizer.from_ranks(ranks, {name: len(ranks) + i for i, name in enumerate(SPECIAL_TOKENS)})


class Text:
    """The documents that the flags name, counted as they are read, with a progress bar.

    For training, a run of thousands of blanks, or of letters without a blank, is cut: the time to merge within a piece
    grows with the square of its length, and it teaches nothing that its parts do not.
    """

    def __init__(self, config: TokenizerConfig, *, for_training: bool = False) -> None:
        self.parts: Callable[[str], Iterable[str]] = shortened if for_training else lambda text: (text,)
        self.documents = Documents.find(config.source, subset=config.subset, split=config.split, column=config.column)
        self.max_chars, self.doc_cap = config.max_chars, config.doc_cap
        self.characters = self.bytes = 0

    def __iter__(self) -> Iterator[str]:
        from tqdm import tqdm

        self.characters = self.bytes = 0
        total = self.documents.count()
        with tqdm(total=total, unit=" documents", unit_scale=True, desc="reading", mininterval=1) as bar:
            for texts, _ in self.documents.read():
                for text in filter(None, texts):
                    text = text[: min(self.doc_cap or len(text), self.max_chars - self.characters)]
                    self.characters += len(text)
                    self.bytes += len(text.encode("utf-8", "replace"))
                    yield from self.parts(text)
                    if self.characters >= self.max_chars:
                        return
                bar.update(len(texts))


def evaluate(config: TokenizerConfig) -> None:
    """Prints bytes per token on a few texts for ours and known tokenizers; n/a where ranks cannot be had."""
    texts = dict(SAMPLES)
    if config.source:
        texts[Path(config.source).name] = "".join(Text(config))
    names = [config.tokenizer, *(name for name in BASELINES if name != config.tokenizer)]
    tokenizers = {name: find_bpe(name) if name == config.tokenizer else _known(name) for name in names}
    print(f"{'':12}{'':>12}" + "".join(f"{Path(name).name:>24}" for name in names))
    print(f"{'text':12}{'bytes':>12}" + f"{'tokens':>12}{'bytes/token':>12}" * len(names))
    for title, text in texts.items():
        size_bytes = len(text.encode("utf-8", "replace"))
        cells = [_cell(tokenizer, text, size_bytes) for tokenizer in tokenizers.values()]
        print(f"{title[:12]:12}{size_bytes:12,}" + "".join(cells))


def _cell(tokenizer: BPETokenizer | None, text: str, size_bytes: int) -> str:
    if tokenizer is None:
        return f"{'n/a':>12}{'n/a':>12}"
    tokens = len(tokenizer.encode(text))
    return f"{tokens:12,}{size_bytes / max(tokens, 1):12.3f}"


def _known(name: str) -> BPETokenizer | None:
    """Returns tiktoken's encoding of this name, or None where its ranks are neither cached nor downloadable."""
    try:
        return BPETokenizer(name)
    except UserError:
        return None


if __name__ == "__main__":
    sys.exit(cli.run(main))
