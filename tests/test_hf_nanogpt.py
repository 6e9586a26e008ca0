"""nanoGPT's ckpt.pt: read to the last bit of a logit that its own model gives, and refused where it is another file."""

from __future__ import annotations

import math
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

import kernels
from gptfast import cli, hf, sample
from gptfast.errors import UserError
from gptfast.hf import __main__ as command
from gptfast.tokenizer import CharTokenizer
from train.prepare import prepare

OPS = kernels.load("reference")
ARGS: dict[str, Any] = dict(n_layer=2, n_head=2, n_embd=16, block_size=12, bias=True, vocab_size=11, dropout=0.0)
TEXT = "hello world, hello\n"  # of 11 characters


# ---- nanoGPT's model, in plain torch -----------------------------------------------------------------------------


class Norm(nn.Module):
    def __init__(self, size: int, bias: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.bias = nn.Parameter(torch.zeros(size)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class Attention(nn.Module):
    def __init__(self, args: dict[str, Any], has_mask: bool) -> None:
        super().__init__()
        width = args["n_embd"]
        self.heads = args["n_head"]
        self.c_attn = nn.Linear(width, 3 * width, bias=args["bias"])
        self.c_proj = nn.Linear(width, width, bias=args["bias"])
        if has_mask:  # where torch has no fused attention
            size = args["block_size"]
            self.register_buffer("bias", torch.tril(torch.ones(size, size)).view(1, 1, size, size))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(2, (self.heads, -1)).transpose(1, 2) for part in self.c_attn(x).chunk(3, dim=2))
        scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[3])
        hidden = torch.ones(x.shape[1], x.shape[1]).triu(1).bool()
        y = scores.masked_fill(hidden, float("-inf")).softmax(-1) @ v
        return self.c_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, args: dict[str, Any]) -> None:
        super().__init__()
        width = args["n_embd"]
        self.c_fc = nn.Linear(width, 4 * width, bias=args["bias"])
        self.c_proj = nn.Linear(4 * width, width, bias=args["bias"])

    def forward(self, x: Tensor) -> Tensor:
        h = self.c_fc(x)
        return self.c_proj(h * 0.5 * (1 + torch.erf(h / math.sqrt(2))))


class Block(nn.Module):
    def __init__(self, args: dict[str, Any], has_mask: bool) -> None:
        super().__init__()
        self.ln_1, self.ln_2 = (Norm(args["n_embd"], args["bias"]) for _ in range(2))
        self.attn, self.mlp = Attention(args, has_mask), MLP(args)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class NanoGPT(nn.Module):
    def __init__(self, args: dict[str, Any], has_mask: bool = False) -> None:
        super().__init__()
        torch.manual_seed(0)
        width = args["n_embd"]
        parts: dict[str, nn.Module] = {
            "wte": nn.Embedding(args["vocab_size"], width), "wpe": nn.Embedding(args["block_size"], width),
            "h": nn.ModuleList([Block(args, has_mask) for _ in range(args["n_layer"])]),
            "ln_f": Norm(width, args["bias"]),
        }  # fmt: skip
        self.transformer = nn.ModuleDict(parts)
        self.lm_head = nn.Linear(width, args["vocab_size"], bias=False)
        parts["wte"].weight = self.lm_head.weight
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.add_(0.2 * torch.randn_like(parameter))

    def forward(self, tokens: Tensor) -> Tensor:
        parts: Any = self.transformer
        x = parts["wte"](tokens) + parts["wpe"](torch.arange(tokens.shape[1]))
        for block in parts["h"]:
            x = block(x)
        return self.lm_head(parts["ln_f"](x))


def saved(folder: Path, made: NanoGPT | None = None, **changes: Any) -> Path:
    """ckpt.pt as nanoGPT's train.py saves it, after a step of AdamW; `changes` are of what the file holds."""
    model = NanoGPT(ARGS) if made is None else made
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-9)
    model(torch.tensor([[1, 2]])).sum().backward()
    optimizer.step()
    content = {
        "model": model.state_dict(), "optimizer": optimizer.state_dict(), "model_args": ARGS, "iter_num": 5,
        "best_val_loss": torch.tensor(1.5), "config": {"out_dir": "out", "learning_rate": 1e-3, "compile": True},
    }  # fmt: skip
    folder.mkdir(exist_ok=True)
    torch.save(content | changes, folder / "ckpt.pt")
    return folder


# ---- what is read --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", ["plain", "compiled", "masks", "two tables", "no bias stated"])
@torch.no_grad()
def test_the_logits_are_nanogpts(bias: bool, kind: str, tmp_path: Path) -> None:
    args = ARGS | {"bias": bias}
    model, tokens = NanoGPT(args, has_mask=kind == "masks"), torch.randint(11, (3, 12))
    with torch.enable_grad():
        saved(tmp_path, model, model_args=args)
    weights = model.state_dict()
    if kind == "compiled":
        saved_weights = {f"_orig_mod.{name}": w for name, w in weights.items()}
    elif kind == "two tables":
        saved_weights = weights | {"lm_head.weight": weights["lm_head.weight"].clone()}
    else:
        saved_weights = weights
    if kind == "no bias stated":
        args = {name: value for name, value in args.items() if name != "bias"}
    torch.save({"model": saved_weights, "model_args": args}, tmp_path / "ckpt.pt")
    for source in (tmp_path, tmp_path / "ckpt.pt"):
        loaded = hf.load(source, OPS)
        torch.testing.assert_close(loaded.logits(tokens), model(tokens), rtol=1e-5, atol=1e-5)
    assert loaded.config.tied == (kind != "two tables") and loaded.config.bias == bias
    assert hf.why_not(tmp_path) == ""


def test_through_the_commands(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """A model of characters: its tokenizer is named, left out, or asked for in a line that says how."""
    (tmp_path / "text.txt").write_text(TEXT * 20)
    prepare("chars", tmp_path, tmp_path / "text.txt")
    source, out = str(saved(tmp_path / "ng")), str(tmp_path / "out")
    assert cli.run(command.main, ["import", source, f"--out_dir={out}"]) == 2
    said = capsys.readouterr().err
    assert "has 11 tokens, and their list is in its data set's meta.pkl" in said and said.count("\n") == 1
    assert f"import {source}/ckpt.pt --out_dir=DIR --tokenizer=data/shakespeare_char" in said
    assert cli.run(command.main, ["import", source, f"--out_dir={out}", f"--tokenizer={tmp_path / 'chars'}"]) == 0
    tokenizer = hf.load_tokenizer(out)
    assert isinstance(tokenizer, CharTokenizer) and tokenizer.chars == "".join(sorted(set(TEXT)))
    flags = [f"--out_dir={out}", "--start=hello", "--num_samples=1", "--max_new_tokens=5", "--device=cpu"]
    assert cli.run(sample.main, [*flags, "--kernels=reference"]) == 0
    assert "\nhello" in capsys.readouterr().out
    assert cli.run(command.main, ["import", source, f"--out_dir={out}", f"--tokenizer={tmp_path / 'none'}"]) == 2
    assert "no tokenizer" in capsys.readouterr().err
    (tmp_path / "long.txt").write_text("abcdefghijklmnopqrstuvwxyz" * 20)
    prepare("long", tmp_path, tmp_path / "long.txt")
    assert cli.run(command.main, ["import", source, f"--out_dir={out}", f"--tokenizer={tmp_path / 'long'}"]) == 2
    assert "it has 26 tokens, and the model 11; give the one" in capsys.readouterr().err


def test_a_model_without_tokenizer_is_exported_and_says_what_it_lacks(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    source, out = str(saved(tmp_path / "ng")), str(tmp_path / "out")
    assert cli.run(command.main, ["import", source, f"--out_dir={out}", "--tokenizer=False"]) == 0
    assert cli.run(command.main, ["export", out, f"--to={tmp_path / 'exported'}"]) == 0
    assert f"{out} was imported without a tokenizer: only its weights are exported" in capsys.readouterr().out
    assert hf.load(tmp_path / "exported", OPS).config.activation == "gelu"
    assert cli.run(sample.main, [f"--out_dir={out}", "--device=cpu", "--kernels=reference"]) == 2
    said = capsys.readouterr().err
    assert "the model has no tokenizer, which text needs; import it again with one: python -m gptfast.hf import" in said
    (tmp_path / "text.txt").write_text(TEXT * 20)
    prepare("chars", tmp_path, tmp_path / "text.txt")
    again = ["import", out, f"--out_dir={tmp_path / 'new'}", f"--tokenizer={tmp_path / 'chars'}"]
    assert cli.run(command.main, again) == 0 and hf.load_tokenizer(tmp_path / "new").decode([0]) == "\n"


def test_gpt2s_vocabulary_is_gpt2s_tokenizer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(hf.nanogpt, "BPETokenizer", asked.append)
    for size in (50257, 50304):
        args = ARGS | {"vocab_size": size, "n_embd": 2}
        hf.load_tokenizer(saved(tmp_path, NanoGPT(args), model_args=args))
    assert asked == ["gpt2", "gpt2"]


# ---- what is refused -----------------------------------------------------------------------------------------------


class Bait:
    def __reduce__(self) -> tuple:
        return Path.touch, (Path("opened"),)


def test_nothing_runs_and_strange_files_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = NanoGPT(ARGS).state_dict()
    table = weights["transformer.wte.weight"]
    huge = torch.zeros(1).expand(10**6, 10**6)
    strange: list[tuple[str, dict[str, Any]]] = [
        ("holds more than tensors, which could run code and is not read", {"config": Bait()}),
        ("holds no state dict", {"model": weights | {"x": 1}}),
        ("its model_args say n_kv_head of the model", {"model_args": ARGS | {"n_kv_head": 1}}),
        ("is not as gptfast writes it (KeyError: 'n_head')", {"model_args": {"n_layer": 2}}),
        ("is not as gptfast writes it (AttributeError", {"model_args": [1]}),
        ("n_embd is 15, which 2 heads do not divide", {"model_args": ARGS | {"n_embd": 15}}),
        ("do not fit its config", {"model_args": ARGS | {"n_layer": 3}}),
        ("do not fit its config", {"model_args": ARGS | {"n_layer": 10**9}}),
        ("do not fit its config", {"model_args": ARGS | {"block_size": 10**9}}),
        ("there is no transformer.ln_f.bias", {"model": {n: w for n, w in weights.items() if "ln_f.b" not in n}}),
        ("KeyError: 'lm_head.weight'", {"model": {}}),
        ("does not hold as many", {"model": weights | {"lm_head.weight": huge, "transformer.wte.weight": huge}}),
        ("does not hold as many", {"model": weights | {"transformer.wpe.weight": torch.ones(12, device="meta")}}),
        ("does not hold as many", {"model": weights | {"lm_head.weight": table.detach().to_sparse()}}),
    ]  # fmt: skip
    for said, changes in strange:
        with pytest.raises(UserError) as error:
            hf.load(saved(tmp_path / "ng", **changes), OPS)
        assert said in str(error.value) and "\n" not in str(error.value)
    (tmp_path / "ng" / "ckpt.pt").write_bytes(pickle.dumps(Bait(), protocol=2))
    with pytest.raises(UserError, match="damaged, or holds more than tensors"):
        hf.load(tmp_path / "ng", OPS)
    assert not Path("opened").exists()
    torch.save(weights, tmp_path / "ng" / "ckpt.pt")
    with pytest.raises(UserError, match=r"holds no model with its model_args; give the ckpt\.pt"):
        hf.load(tmp_path / "ng", OPS)
    with pytest.raises(UserError, match=r"^ng/other\.pt: no such file; give nanoGPT's ckpt\.pt"):
        hf.load("ng/other.pt", OPS)
    (tmp_path / "empty").mkdir()
    with pytest.raises(UserError, match=r"empty holds no model; give a folder with .* nanoGPT's ckpt\.pt"):
        hf.load("empty", OPS)
