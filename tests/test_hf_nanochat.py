"""nanochat's own checkpoints, in and out."""

from __future__ import annotations

import dataclasses
import json
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kernels
from gptfast import cli, hf
from gptfast.config import PRESETS, GPTConfig, nanochat
from gptfast.errors import UserError
from gptfast.hf import __main__ as command
from gptfast.hf import nanochat as files
from gptfast.hf.layouts import layout_for
from gptfast.model import GPT
from train.build import architecture_of
from train.presets import CPU, GPU

OPS = kernels.load("reference")
CONFIG = nanochat(block_size=600, vocab_size=70, n_layer=3, n_head=4, n_kv_head=2, n_embd=32)


def make(config: GPTConfig) -> GPT:
    """A GPT whose weights are large enough that every part matters."""
    torch.manual_seed(0)
    model = GPT(config, OPS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.2)
    return model


def saved(folder: Path, weights: Any = None, **settings: Any) -> Path:
    """A checkpoint of nanochat's, with other weights, or other settings of the model."""
    files.write(make(CONFIG), folder, step=7)
    if weights is not None:
        torch.save(weights, folder / "model_000007.pt")
    path = folder / "meta_000007.json"
    meta = json.loads(path.read_text())
    meta["model_config"] |= settings
    path.write_text(json.dumps(meta))
    return folder


def tensors(folder: Path) -> dict[str, Tensor]:
    return torch.load(folder / "model_000007.pt", weights_only=True)


def test_the_files_are_nanochats(tmp_path: Path) -> None:
    """Names and shapes of its state dict, written down; the vocabulary padded to a multiple of 64."""
    theirs = tensors(saved(tmp_path))
    expected = {
        "transformer.wte.weight": (128, 32), "lm_head.weight": (128, 32), "smear_gate.weight": (1, 24),
        "smear_lambda": (1,), "backout_lambda": (1,), "resid_lambdas": (3,), "x0_lambdas": (3,),
        "value_embeds.0.weight": (128, 16), "value_embeds.2.weight": (128, 16),
        "transformer.h.0.attn.ve_gate.weight": (2, 12), "transformer.h.2.attn.ve_gate.weight": (2, 12),
    }  # fmt: skip
    for i in range(3):
        block = f"transformer.h.{i}."
        expected |= {f"{block}attn.c_q.weight": (32, 32), f"{block}attn.c_proj.weight": (32, 32)}
        expected |= {f"{block}attn.{name}.weight": (16, 32) for name in ("c_k", "c_v")}
        expected |= {f"{block}mlp.c_fc.weight": (128, 32), f"{block}mlp.c_proj.weight": (32, 128)}
    assert {name: tuple(w.shape) for name, w in theirs.items()} == expected
    meta = json.loads((tmp_path / "meta_000007.json").read_text())
    assert meta["step"] == 7 and meta["model_config"] == {
        "sequence_len": 600, "vocab_size": 70, "n_layer": 3, "n_head": 4, "n_kv_head": 2, "n_embd": 32,
        "window_pattern": "SSSL",
    }  # fmt: skip


@torch.no_grad()
def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    """Bit for bit; the newest step of a folder, or the file that is named; a compiled model's names too."""
    model, tokens = make(CONFIG), torch.randint(70, (2, 300))
    files.write(model, tmp_path, step=7)
    files.write(make(dataclasses.replace(CONFIG, n_layer=1)), tmp_path, step=6)
    expected = model.logits(tokens)
    assert CONFIG.windows == (256, 256, None)
    loaded = hf.load(tmp_path, OPS)
    assert loaded.config == CONFIG and torch.equal(loaded.logits(tokens), expected)
    assert hf.load(tmp_path / "model_000006.pt", OPS).config.n_layer == 1
    saved(tmp_path, {f"_orig_mod.{name}": w for name, w in tensors(tmp_path).items()})
    assert torch.equal(hf.load(tmp_path, OPS).logits(tokens), expected)
    assert hf.why_not(tmp_path) == ""


@pytest.mark.parametrize(
    "without",
    [
        dict(value_embeddings=False, residual_scalars=False, smear=False, backout=False),
        dict(rope_sign=1, window_pattern="", window=None, mlp_width=128, head_size=8, initialization="gpt2"),
    ],
)
@torch.no_grad()
def test_a_model_without_some_parts_gets_weights_that_do_nothing(without: dict[str, Any], tmp_path: Path) -> None:
    model, tokens = make(dataclasses.replace(CONFIG, **without)), torch.randint(70, (2, 300))
    files.write(model, tmp_path)
    loaded = hf.load(tmp_path, OPS)
    assert loaded.config.value_embeddings and loaded.config.smear and loaded.config.rope_sign == -1
    torch.testing.assert_close(loaded.logits(tokens), model.logits(tokens), rtol=1e-5, atol=1e-5)


NOT_EXPRESSIBLE = [
    (dict(qk_gain=1.0), "qk_gain=1.0"),
    (dict(n_embd=16, value_embeddings=False, smear=False), "n_embd=16, n_head=4"),
    (dict(window=128), "window=128"),
    (dict(rope_base=10000.0, norm_eps=1e-6, softcap=None), "norm_eps=1e-06, rope_base=10000.0, softcap=None"),
    (dict(token_shift=True, embedding_norm=False), "token_shift=True, embedding_norm=False"),
    (dict(tied=True, mlp_width=64, head_size=6), "head_size=6, mlp_width=64, tied=True"),
]


@pytest.mark.parametrize(("changes", "named"), NOT_EXPRESSIBLE)
def test_the_field_that_stands_in_the_way_is_named(changes: dict[str, Any], named: str, tmp_path: Path) -> None:
    with pytest.raises(UserError) as refusal:
        files.write(make(dataclasses.replace(CONFIG, **changes)), tmp_path / "out")
    assert f"nanochat cannot express {named};" in str(refusal.value)
    assert not (tmp_path / "out").exists()


class Bait:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("opened"),)


def test_a_file_with_more_than_tensors_is_refused_and_nothing_runs(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = saved(tmp_path / "bait", {"resid_lambdas": Bait()})
    with pytest.raises(UserError, match="holds more than tensors, which could run code and is not read"):
        hf.load(folder, OPS)
    (folder / "model_000007.pt").write_bytes(pickle.dumps(Bait(), protocol=2))
    with pytest.raises(UserError, match="damaged, or holds more than tensors"):
        hf.load(folder, OPS)
    assert not Path("opened").exists()
    with pytest.raises(UserError, match="--tokenizer=False"):
        hf.load_tokenizer(folder)


def test_checkpoints_of_other_versions_and_strange_ones_are_refused(tmp_path: Path) -> None:
    theirs = tensors(saved(tmp_path))
    for name in ("smear_lambda", "x0_lambdas", "value_embeds.0.weight", "transformer.h.1.attn.c_k.weight"):
        with pytest.raises(UserError, match=f"has no {name}: it is of a nanochat with another architecture"):
            hf.load(saved(tmp_path, {n: w for n, w in theirs.items() if n != name}), OPS)
    with pytest.raises(UserError, match="has weights that nanochat at 92d63d4 has not: bigram"):
        hf.load(saved(tmp_path, theirs | {"bigram": torch.ones(2)}), OPS)
    with pytest.raises(UserError, match=r"do not fit its"):
        hf.load(saved(tmp_path, theirs | {"transformer.h.0.attn.ve_gate.weight": torch.ones(2, 32)}), OPS)
    with pytest.raises(UserError, match="says logit_cap of the model"):
        hf.load(saved(tmp_path, theirs, logit_cap=30), OPS)
    with pytest.raises(UserError, match="holds no state dict"):
        hf.load(saved(tmp_path / "list", [torch.ones(2)]), OPS)
    for strange in (dict(n_layer="3"), dict(sequence_len=None), dict(n_head=10**30), dict(window_pattern=["S"])):
        with pytest.raises(UserError, match=r"^[^\n]+$"):
            hf.load(saved(tmp_path, theirs, **strange), OPS)
    with pytest.raises(UserError, match="do not fit its meta: 1000000 layers"):
        hf.load(saved(tmp_path, theirs, n_layer=1_000_000), OPS)
    for size in (1, 64, 129, 192):  # of a vocabulary of 70 in tables of 128 rows
        with pytest.raises(UserError, match=rf"wte\.weight has 128 rows, and its meta says vocab_size {size}\)"):
            hf.load(saved(tmp_path, theirs, vocab_size=size), OPS)
    (tmp_path / "meta_000007.json").write_text("{}")
    with pytest.raises(UserError, match="KeyError: 'model_config'"):
        hf.load(tmp_path, OPS)
    (tmp_path / "meta_000007.json").unlink()
    with pytest.raises(UserError, match="nanochat keeps it beside the model"):
        hf.load(tmp_path, OPS)


@torch.no_grad()
def test_through_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Theirs to a checkpoint of ours, that to theirs, and what the other layouts say."""
    source, ours, again = (str(tmp_path / name) for name in ("theirs", "ours", "again"))
    saved(Path(source))
    assert cli.run(command.main, ["import", source, f"--out_dir={ours}", "--tokenizer=False"]) == 0
    export = ["export", ours, f"--to={again}", "--tokenizer=False"]
    assert cli.run(command.main, [*export, "--layout=nanochat_pt"]) == 0
    tokens = torch.randint(70, (1, 40))
    assert torch.equal(hf.load(again, OPS).logits(tokens), hf.load(source, OPS).logits(tokens))
    assert cli.run(command.main, [*export, "--layout=nanochat"]) == 2
    named = "window=256, value_embeddings=True, residual_scalars=True, smear=True, backout=True, qk_gain=1.2"
    assert f"the nanochat layout cannot express {named};" in capsys.readouterr().err
    assert cli.run(command.main, ["export", ours, f"--to={tmp_path / 'x.gguf'}", "--tokenizer=False"]) == 2
    said = capsys.readouterr().err
    assert "the nearest layout, qwen3, cannot express embedding_norm=True, window=256, value_embeddings=True" in said
    assert "; --layout=nanochat_pt can, into a folder" in said


def test_what_the_makefile_makes_is_exported_where_the_readme_says(tmp_path: Path) -> None:
    """`make chat`'s and a GPU's speedrun go to transformers; a CPU's speedrun does without its token shift."""
    small: dict[str, Any] = dict(n_layer=1, n_head=2, n_embd=32, block_size=8)
    modern = dataclasses.replace(PRESETS["modern"], **small, vocab_size=70)
    with pytest.raises(UserError, match=r"qk_gain=1\.0; --layout=qwen3 can, into a folder$"):
        files.write(make(modern), tmp_path)
    assert architecture_of(dataclasses.replace(GPU, **small), 70) == modern
    on_cpu = dataclasses.replace(CPU, **small)
    with pytest.raises(UserError, match=r"^the nearest layout, qwen3, cannot express token_shift=True; train a model"):
        hf.save(make(architecture_of(on_cpu, 70)), tmp_path)
    assert layout_for(architecture_of(dataclasses.replace(on_cpu, token_shift=False), 70)).name == "qwen3"
