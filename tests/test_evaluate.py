"""Evaluation: figures worked out by hand, transformers' own loss, a uniform model, and the command line."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels
from gptfast import checkpoint, cli, hf
from gptfast.config import GPTConfig
from gptfast.errors import UserError
from gptfast.model import GPT, IGNORED
from gptfast.tokenizer import BPETokenizer, CharTokenizer, Tokenizer
from gptfast.tokenizer_json import GPT2_PATTERN
from train import evaluate
from train.evaluate import Evaluate, Subject, measure
from train.prepare import prepare

OPS = kernels.load("reference")
WIKITEXT = Path(__file__).parents[2] / "shared" / "data" / "wikitext-2" / "test.txt"
BYTES = BPETokenizer.from_ranks({bytes([i]): i for i in range(256)}, {"<|bos|>": 256}, GPT2_PATTERN)


def make(tokenizer: Tokenizer, **fields: Any) -> GPT:
    config = GPTConfig(**{"block_size": 32, "vocab_size": tokenizer.vocab_size, "n_layer": 2, "n_head": 2, "n_embd": 32}
                       | fields)  # fmt: skip
    model = GPT(config, OPS)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def subject(model: GPT, tokenizer: Tokenizer, name: str = "ours") -> Subject:
    nats = lambda x, y: evaluate.nats_per_row(model, x, y)
    return Subject(name, model.num_params(False), model.config.block_size, tokenizer, nats)


def fixed(probability: dict[int, float], tokenizer: Any, context: int) -> Subject:
    """A model that foresees each token with a probability of its own, whatever came before."""

    def nats(x: Tensor, y: Tensor) -> Tensor:
        return torch.tensor([[-math.log(probability[i]) if i >= 0 else 0.0 for i in row] for row in y.tolist()]).sum(1)

    return Subject("fixed", 0, context, tokenizer, nats)


# ---- figures ---------------------------------------------------------------------------------------------------------
def test_three_tokens_by_hand() -> None:
    """'a' begins; 'é' (2 bytes) of probability 1/2 and 'b', twice, of 1/8: 1 + 3 + 3 bits over 3 tokens and 4 bytes."""
    tokenizer = CharTokenizer("abé")
    result = measure(fixed({1: 1 / 8, 2: 1 / 2}, tokenizer, context=2), ["aébb"], "cpu")
    assert (result.tokens, result.bytes) == (3, 4)
    assert result.loss == pytest.approx(7 / 3 * math.log(2))
    assert result.perplexity == pytest.approx(2 ** (7 / 3))
    assert result.bits_per_byte == pytest.approx(7 / 4)
    # windows of 4 bits for 2 tokens and 3 bits for 1, about 7/3 a token: residuals -2/3 and 2/3
    assert result.loss_error == pytest.approx(math.log(2) * math.sqrt(2 * (4 / 9 + 4 / 9)) / 3)
    assert result.bits_per_byte_error == pytest.approx(math.sqrt(16 / 9) / 4)


@pytest.mark.parametrize("context", [1, 7, 64])
def test_a_uniform_model_of_bytes_needs_8_bits(context: int) -> None:
    uniform = fixed(dict.fromkeys(range(256), 1 / 256), BYTES, context)
    result = measure(uniform, ["Grüße\n", "東京 & more"], "cpu", batch=3)
    assert result.bits_per_byte == pytest.approx(8.0)
    assert result.tokens == result.bytes == len("Grüße\n東京 & more".encode())


@pytest.mark.parametrize("length", [2, 5, 6, 7, 40])
@pytest.mark.parametrize(("context", "stride"), [(5, 5), (5, 2), (5, 1), (1, 1), (64, 64)])
def test_every_token_is_predicted_once_from_those_before(length: int, context: int, stride: int) -> None:
    ids, counted = torch.arange(100, 100 + length), torch.ones(length, dtype=torch.bool)
    counted[3:4] = False
    count = evaluate.count_windows(length, context, stride)
    x, y = evaluate.windows(ids, counted, context, stride, range(count))
    assert sorted(y[y != IGNORED].tolist()) == [i for i in ids.tolist()[1:] if i != 103]
    assert torch.equal(y[y != IGNORED], x[y != IGNORED] + 1)
    if stride < context and count > 1:  # what counts has a context of its own
        assert (y[1:, : context - stride] == IGNORED).all()


def test_a_stride_gives_more_context_and_no_other_tokens() -> None:
    tokenizer = CharTokenizer("ab")
    seen = []

    def nats(x: Tensor, y: Tensor) -> Tensor:
        seen.append(int((y != IGNORED).nonzero()[:, 1].min()))
        return torch.zeros(len(x))

    reader = Subject("reader", 0, 8, tokenizer, nats)
    result = measure(reader, ["ab" * 20], "cpu", stride=2, batch=1)
    assert result.tokens == 39 and seen == [0] + [6] * (len(seen) - 1)


def test_documents_begin_with_the_token_that_says_so() -> None:
    ids, counted, size = evaluate.encode(BYTES, ["ab", "c"])
    assert ids.tolist() == [256, 97, 98, 256, 99] and counted.tolist() == [False, True, True, False, True]
    assert size == 3


@pytest.mark.parametrize("kind", ["gpt2", "llama"])
@torch.no_grad()
def test_perplexity_is_transformers(kind: str, tmp_path: Path, text: str) -> None:
    """The same random model and text, the loss that transformers itself returns for each window."""
    transformers = pytest.importorskip("transformers")
    llama = dict(position="rope", norm="rmsnorm", norm_weight=True, activation="swiglu", bias=False, n_kv_head=1)
    model = make(BYTES, **(llama if kind == "llama" else {}))
    hf.save(model, tmp_path, BYTES)
    theirs = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32).eval()
    document = text[: 32 * 40]
    result = measure(subject(model, BYTES), [document], "cpu")
    ids = torch.tensor([256, *BYTES.encode(document)])
    losses = []
    for i in range(0, len(document), 32):
        x, y = ids[i : i + 32][None], ids[i + 1 : i + 33][None]
        losses.append(theirs(x, labels=y, shift_labels=y).loss)
    assert result.tokens == len(document) == 32 * len(losses)
    assert result.perplexity == pytest.approx(torch.stack(losses).mean().exp().item(), rel=1e-5)
    assert abs(result.perplexity - 257) > 10  # not that of a model without an opinion: a mistake would show


@torch.no_grad()
def test_a_model_that_is_not_ours_runs_through_transformers(
    tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """The same Llama under a name that gptfast does not know gives the same figures."""
    transformers = pytest.importorskip("transformers")
    rope = dict(position="rope", norm="rmsnorm", norm_weight=True, activation="swiglu", bias=False)
    hf.save(make(BYTES, **rope), tmp_path / "llama", BYTES)
    llama = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "llama", dtype=torch.float32)
    names = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
             "num_key_value_heads", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings")  # fmt: skip
    settings = {name: getattr(llama.config, name) for name in names}
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**settings, sliding_window=None)).eval()
    mistral.load_state_dict(llama.state_dict())
    mistral.save_pretrained(tmp_path / "mistral")
    BYTES.save(tmp_path / "mistral")
    subjects = [evaluate.open_subject(str(tmp_path / name), OPS, torch.float32, "cpu") for name in ("llama", "mistral")]
    assert "model_type 'mistral'; gptfast reads gpt2, llama" in capsys.readouterr().out
    ours, theirs = (measure(each, [text[:2000]], "cpu") for each in subjects)
    assert dataclasses.replace(theirs, name=ours.name, loss=0, loss_error=0) == dataclasses.replace(
        ours, loss=0, loss_error=0
    )
    assert (theirs.loss, theirs.loss_error) == pytest.approx((ours.loss, ours.loss_error), rel=1e-5)


@torch.no_grad()
def test_another_tokenizer_gives_the_same_ids_through_transformers(tmp_path: Path) -> None:
    pytest.importorskip("transformers")
    BYTES.save(tmp_path)
    theirs = evaluate.TheirTokenizer("theirs", tmp_path)
    text = "Grüße, <|bos|> 東京"
    assert theirs.bos == BYTES.bos and theirs.encode(text) == BYTES.encode(text) and theirs.decode([71, 114]) == "Gr"


# ---- the command line ------------------------------------------------------------------------------------------------
def save_ours(model: nn.Module, tokenizer: Tokenizer, folder: Path) -> Path:
    meta = {"model": dataclasses.asdict(model.config), "tokenizer": tokenizer.to_json()}
    checkpoint.save(folder, step=1, model=model.state_dict(), optimizer={}, meta=meta)
    return folder


def test_models_side_by_side_on_a_data_set(tmp_path: Path, text: str, capsys: pytest.CaptureFixture[str]) -> None:
    """A checkpoint with characters and an exported model with bytes, on the validation split of a prepared data set."""
    (tmp_path / "text.txt").write_text(text)
    prepare("tiny", tmp_path / "data", tmp_path / "text.txt")
    by_character = CharTokenizer.from_text(text)
    out = save_ours(make(by_character), by_character, tmp_path / "out")
    hf.save(make(BYTES), tmp_path / "exported", BYTES)
    flags = [f"--models={out},{tmp_path / 'exported'}", "--dataset=tiny", f"--data_dir={tmp_path / 'data'}",
             "--device=cpu", "--dtype=float32", f"--out_dir={tmp_path / 'report'}"]  # fmt: skip
    assert cli.run(evaluate.main, flags) == 0
    printed = capsys.readouterr().out
    val = text[int(0.9 * len(text)) :]
    rows = [json.loads(line) for line in (tmp_path / "report" / "evaluation.jsonl").read_text().splitlines()]
    assert [row["tokens"] for row in rows] == [len(val) - 1, len(val)]
    assert [row["bytes"] for row in rows] == [len(val) - 1, len(val)]
    direct = measure(subject(hf.load(out, OPS), by_character), [val], "cpu")
    assert rows[0]["loss"] == pytest.approx(direct.loss) and rows[0]["context"] == 32
    markdown = (tmp_path / "report" / "evaluation.md").read_text()
    assert markdown in printed and markdown.count("\n") == 4 and "| bits per byte |" in markdown
    assert f"| {out} | 0.0M | 32 | {len(val) - 1:,} | {direct.loss:.4f} ± {direct.loss_error:.4f} |" in markdown


def test_presets_are_the_four_gpt2s() -> None:
    assert [evaluate.PRESETS[f"eval_gpt2{size}"].models for size in ("", "_medium", "_large", "_xl")] == [
        "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl"
    ]  # fmt: skip
    assert evaluate.PRESETS["eval_gpt2_all"].models.count(",") == 3


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--text=/nowhere/book.txt"], "--text=/nowhere/book.txt: cannot read it"),
        (["--text={empty}"], "the text is empty"),
        (["--text={short}", "--models={out}"], "has 1 token"),
        (["--text={book}", "--models=nowhere"], "nowhere: no such folder"),
        (["--text={book}", "--models={empty_dir}"], "holds no model; give a folder with a checkpoint"),
        (["--text={book}", "--models="], "--models is empty"),
        (["--text={book}", "--models={out}", "--context=64"], "takes 32 tokens at most"),
        (["--text={book}", "--models={out}", "--stride=33"], "must not be longer than the 32 tokens"),
        (["--stride=-1"], "--stride=-1: must not be negative"),
        (["--batch_size=0"], "--batch_size=0: must be at least 1"),
        (["--dataset=none", "--data_dir={empty_dir}"], "no data set in"),
    ],
)
def test_mistakes_are_one_line(
    flags: list[str], message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").touch()
    (tmp_path / "short").write_text("a")
    (tmp_path / "book").write_text("ab" * 50)
    (tmp_path / "empty_dir").mkdir()
    tokenizer = CharTokenizer("ab")
    places = {name: tmp_path / name for name in ("empty", "short", "book", "empty_dir")}
    places["out"] = save_ours(make(tokenizer), tokenizer, tmp_path / "out") if "{out}" in str(flags) else tmp_path
    arguments = [flag.format(**places) for flag in flags]
    assert cli.run(evaluate.main, [*arguments, "--device=cpu", "--dtype=float32"]) == 2
    error = capsys.readouterr().err.strip().splitlines()[-1]
    assert error.startswith("error: ") and message in error


@pytest.mark.skipif(not WIKITEXT.is_file(), reason="the text of WikiText-2 is not here")
def test_real_text_costs_a_random_model_about_the_log_of_its_vocabulary() -> None:
    document = WIKITEXT.read_text("utf-8")[:20_000]
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=256, vocab_size=257, n_layer=1, n_head=2, n_embd=32), OPS)
    result = measure(subject(model, BYTES), [document], "cpu")
    assert result.bytes == result.tokens == len(document.encode())
    assert result.bits_per_byte == pytest.approx(math.log2(257), abs=0.1)
    assert 0 < result.loss_error < 0.01
    assert Evaluate(text=str(WIKITEXT)).stride == 0


def test_a_text_that_a_character_model_cannot_read_is_refused() -> None:
    tokenizer = CharTokenizer("ab")
    with pytest.raises(UserError, match="character 'z'"):
        measure(subject(make(tokenizer), tokenizer), ["abz"], "cpu")
