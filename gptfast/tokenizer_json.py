"""Reads byte-level BPE from Hugging Face's tokenizer.json, and verifies that tiktoken gives the same ids.

Any other kind of file is refused, never approximated. A file is checked twice: field by field, and by a probe text
whose ids must equal those of the library `tokenizers`.
"""

from __future__ import annotations

import heapq
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from gptfast import untrusted
from gptfast.blanks import Blanks
from gptfast.errors import UserError, to_install

MOST_TOKENS = 2**20  # of a vocabulary; each takes up to 1 kB of memory

# GPT-2's pattern (Radford et al., 2019), as tiktoken writes it.
GPT2_PATTERN = r"""'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"""

ELSEWHERE = "gptfast reads plain byte-level BPE, as of GPT-2, Llama 3 and Qwen; use transformers for others"

# Words, numbers, punctuation, all kinds of blanks, scripts, combining marks, and non-characters.
PROBE = """The quick brown fox, it's 12345 years old (b, c) [d] {e} <f>: HE'LL say "don't"!?  x=y+1;
\tdef f(a, b):\n\n\n        return a**2 // b  # 100% sure…\r\n\r\n   \n  ends here   \n\t\n
Zażółć gęślą jaźń; ÄÖÜ ß; cafe\u0301 and caf\u00e9; \u212b; naïve — “quotes” ‘s; 1.5e-10, 3,000,000 €
Привет, мир! 你好,世界。こんにちは。 안녕하세요 مرحبا بالعالم، ٣٤٥ नमस्ते। \U0001f600\U0001f468\u200d\U0001f469
https://example.org/a_b?c=d&e=%20#f  \u00a0\u2003\u3000 \x1c \x00 \ufeff ﬁ Ⅷ ½ ²  a\u0300b \u1112\u1161\u11ab tail  """


class Found(NamedTuple):
    """The content of a tokenizer.json."""

    ranks: dict[bytes, int]
    special_tokens: dict[str, int]
    pattern: str
    written: tuple[str, ...]  # the special tokens that text may be encoded into
    normalization: str  # NFC, or empty


def _byte_letters() -> dict[int, str]:
    """Returns the letter for each byte in Hugging Face's files: itself if printable, else a code point from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    unprinted = [byte for byte in range(256) if byte not in printed]
    return {byte: chr(byte) for byte in printed} | {byte: chr(256 + i) for i, byte in enumerate(unprinted)}


BYTE_LETTERS = _byte_letters()


def read(content: Mapping[str, Any], path: Path) -> Found:
    """Interprets `content`, the JSON of `path`. Raises UserError for anything that byte-level BPE cannot express."""
    try:
        model = content["model"]
        pattern = _pattern(content, path)
        if max(len(model["vocab"]), len(model["merges"])) > MOST_TOKENS:
            raise ValueError(f"it has more than {MOST_TOKENS:,} tokens")
        added = content.get("added_tokens") or []
        _require_plain_model(model, path)
        special_tokens = {token["content"]: token["id"] for token in added}
        ranks = _ranks(model, special_tokens, path)
        written = _written(added, path)
        normalization = "NFC" if content.get("normalizer") else ""
    except UserError:
        raise
    except untrusted.STRANGE as error:
        raise _damaged(path, error) from None
    return Found(ranks, special_tokens, pattern, written, normalization)


def prove(content: Mapping[str, Any], path: Path, encode: Callable[[str], list[int]]) -> None:
    """Checks `encode` against the library `tokenizers`: on each token of the file's merges, and on the PROBE.

    If tiktoken made a merge that the file does not list, the file's own merges could not build the resulting token; so
    it is enough that they build every token. Raises UserError where the two differ.
    """
    try:
        from tokenizers import Tokenizer
    except ImportError as error:
        raise UserError(f"reading {path} needs tokenizers: {to_install(error, 'tokenizers')}") from None
    try:
        theirs = Tokenizer.from_str(json.dumps(content))
    except BaseException as error:  # the library raises bare exceptions, and PanicException, which is no Exception
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise _damaged(path, error) from None
    model = theirs.model
    model.ignore_merges = False
    special = {token["content"] for token in content.get("added_tokens") or []}
    for token in content["model"]["vocab"]:
        if len(token) > 1 and token not in special and len(model.tokenize(token)) != 1:
            raise UserError(f"{path}: no merges lead to its token {token!r}, which tiktoken would make; {ELSEWHERE}")
    theirs = Tokenizer.from_str(json.dumps({**content, "truncation": None, "padding": None}))
    theirs.encode_special_tokens = True  # as text, which is how ours encodes special tokens
    written = [token["content"] for token in content.get("added_tokens") or [] if not token["special"]]
    for text in (PROBE, " ".join([f"a{name} b {name}c" for name in written]), "a", " ", "\n\n a  "):
        expected, ours = theirs.encode(text, add_special_tokens=False).ids, encode(text)
        if ours != expected:
            position = next((i for i, (a, b) in enumerate(zip(ours, expected, strict=False)) if a != b), len(ours))
            raise UserError(
                f"{path} encodes a probe otherwise than gptfast would, from token {position} on; {ELSEWHERE}"
            )


def halves(token: bytes, ranks: Mapping[bytes, int]) -> tuple[bytes, bytes]:
    """Returns the two tokens that merge into `token`: what remains after all merges of a lower rank.

    Raises UserError if more than two remain. Takes O(n log n) for n bytes, as an untrusted token may be long.
    """
    ends = list(range(1, len(token) + 1))  # end of the part that begins at each byte; 0 where none begins any more
    begins = list(range(-1, len(token)))  # begin of the part before the one that begins at each byte
    waiting = [
        (rank, i) for i in range(len(token) - 1) if (rank := ranks.get(token[i : i + 2])) is not None
    ]  # merges, by rank, then position
    heapq.heapify(waiting)
    count = len(token)
    while count > 2 and waiting:
        rank, i = heapq.heappop(waiting)
        middle = ends[i]
        if not middle or middle == len(token) or ranks.get(token[i : ends[middle]]) != rank:
            continue  # stale: one of the two has been merged since
        if rank >= ranks[token]:
            break
        end = ends[i] = ends[middle]
        ends[middle] = 0
        count -= 1
        if end < len(token):
            begins[end] = i
        for first, last in ((begins[i], end), (i, ends[end] if end < len(token) else 0)):
            if first >= 0 and last and (merged := ranks.get(token[first:last])) is not None:
                heapq.heappush(waiting, (merged, first))
    if count > 2:
        raise UserError(f"not the ranks of a BPE: token {token[:80]!r} does not come of a merge")
    return token[: ends[0]], token[ends[0] :]


def _pattern(content: Mapping[str, Any], path: Path) -> str:
    """Returns the splitting pattern; adds an alternative for characters that it may leave out."""
    normalizer, step = content.get("normalizer"), content.get("pre_tokenizer") or {}
    steps = (step["pretokenizers"] if step.get("type") == "Sequence" else [step]) or [{}]
    if content["model"].get("type", "BPE") != "BPE":
        raise UserError(f"{path} holds a {content['model']['type']}; {ELSEWHERE}")
    if normalizer and normalizer["type"] != "NFC":
        raise UserError(f"{path} normalizes text by {normalizer['type']}; {ELSEWHERE}")
    names = [entry.get("type", "nothing") for entry in steps]
    last = steps[-1]
    if names[-1] == "ByteLevel" and last.get("add_prefix_space"):
        raise UserError(f"{path} puts a blank before a text (add_prefix_space); {ELSEWHERE}")
    if names == ["ByteLevel"] and last.get("use_regex", True):
        return GPT2_PATTERN
    first = steps[0]
    if names != ["Split", "ByteLevel"] or last.get("use_regex", True):
        kinds = [
            f"{name} (use_regex)" if entry.get("use_regex", name == "ByteLevel") else name
            for name, entry in zip(names, steps, strict=True)
        ]
        raise UserError(f"{path} splits text by {', then '.join(kinds)}; {ELSEWHERE}")
    if first["behavior"] != "Isolated" or first.get("invert") or "Regex" not in first["pattern"]:
        raise UserError(f"{path} splits text by a Split of another kind ({first['behavior']}); {ELSEWHERE}")
    pattern = first["pattern"]["Regex"]
    # `tokenizers` keeps the text between matches as pieces of their own; tiktoken drops it.
    return pattern if Blanks.of(pattern) else rf"{pattern}|(?:(?!{pattern})[\s\S])+"


def _require_plain_model(model: Mapping[str, Any], path: Path) -> None:
    unlike = [
        name
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", "byte_fallback", "fuse_unk")
        if model.get(name)
    ]
    if unlike:
        raise UserError(f"{path} has a BPE with {', '.join(unlike)}; {ELSEWHERE}")


def _ranks(model: Mapping[str, Any], special_tokens: Mapping[str, int], path: Path) -> dict[bytes, int]:
    vocab = model["vocab"]
    merges = [merge.split(" ") if isinstance(merge, str) else merge for merge in model["merges"]]
    merged = [vocab[left + right] for left, right in merges]
    if merged != sorted(merged):
        raise UserError(f"{path} merges in another order than that of its ids, which tiktoken cannot; {ELSEWHERE}")
    byte_of = {letter: byte for byte, letter in BYTE_LETTERS.items()}
    ordinary = {token: rank for token, rank in vocab.items() if token not in special_tokens}
    strange = next((token for token in ordinary if not byte_of.keys() >= set(token)), None)
    if strange is not None:
        raise UserError(f"{path} has a token {strange[:40]!r} that is not of bytes' letters; {ELSEWHERE}")
    missing = [letter for letter in byte_of if letter not in ordinary]
    if missing:
        raise UserError(f"{path} has no token for {len(missing)} of the 256 bytes; {ELSEWHERE}")
    return {bytes([byte_of[letter] for letter in token]): rank for token, rank in ordinary.items()}


def _written(added: list[Mapping[str, Any]], path: Path) -> tuple[str, ...]:
    """Returns the added tokens that text may be encoded into, because they are not special."""
    written = tuple(token["content"] for token in added if not token["special"])
    for token in added:
        odd = [name for name in ("lstrip", "rstrip", "single_word") if token.get(name)]
        if odd and not token["special"]:
            raise UserError(f"{path} has the token {token['content']!r} with {', '.join(odd)}; {ELSEWHERE}")
    # `tokenizers` looks for them in two passes, and for special ones too, of which it then makes text.
    for a, b in ((a, token["content"]) for a in written for token in added if token["content"] != a):
        if a in b or b in a or _overlaps(a, b) or _overlaps(b, a):
            raise UserError(f"{path} has added tokens that overlap, {a!r} and {b!r}; {ELSEWHERE}")
    return written


def _overlaps(a: str, b: str) -> bool:
    """Returns whether an end of `a` is a beginning of `b`."""
    return any(a.endswith(b[:length]) for length in range(1, min(len(a), len(b))))


def _damaged(path: Path, error: BaseException) -> UserError:
    reason = (str(error).splitlines() or ["no reason given"])[0][:200]
    return UserError(f"{path} is damaged ({type(error).__name__}: {reason}); copy it again")
