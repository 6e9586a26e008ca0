"""Token files: which of a folder are of a split, and ids that no vocabulary has."""

from __future__ import annotations

import json
import struct
from pathlib import Path

import pytest
import torch

from gptfast.data import header, load_tokens, of_split
from gptfast.errors import UserError


def test_files_are_of_the_split_that_ends_their_name(tmp_path: Path) -> None:
    """A data set's own name may hold the other split's."""
    for name in ("retrieval", "medieval", "constrained", "val-set", "train_val"):
        folder = tmp_path / name
        folder.mkdir()
        (folder / f"{name}_train.bin").write_bytes(struct.pack("<3H", 1, 1, 1))
        (folder / f"{name}_val.bin").write_bytes(struct.pack("<2H", 2, 2))
        assert torch.unique(load_tokens(folder / "train.bin")).tolist() == [1]
        assert torch.unique(load_tokens(folder / "val.bin")).tolist() == [2]
    taken = ("train.bin", "train-00000.bin", "fineweb_train_000001.bin", "a.train.1.bin", "x-train_2.bin")
    assert all(of_split(name, "train") and not of_split(name, "val") for name in taken)
    assert not any(of_split(name, "train") for name in ("constrain.bin", "train_x.bin", "trained.bin", "train.bin.old"))
    assert not any(of_split(name, "val") for name in ("éval.bin", "cheval.bin", "ночval.bin"))


def test_ids_past_2_to_the_31_are_not_taken_for_negative(tmp_path: Path) -> None:
    content = header(3, 100_000, "0" * 64) + struct.pack("<3I", 5, 2**32 - 1, 6)
    (tmp_path / "train.bin").write_bytes(content)
    meta = {"vocab_size": 100_000, "tokenizer": {}, "fingerprint": "0" * 64}
    (tmp_path / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError, match="has token id 4294967295, but vocab_size is 100000"):
        load_tokens(tmp_path / "train.bin", 100_000)
