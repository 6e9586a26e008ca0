"""Models and tokenizers of strangers: the right figures, through transformers where need be, and none of their code."""

from __future__ import annotations

import builtins
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F

import kernels
from gptfast import checkpoint, cli, hf
from gptfast.chat.conversation import SPECIAL_TOKENS
from gptfast.errors import UserError
from gptfast.hf import __main__ as command
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer
from train import evaluate

transformers = pytest.importorskip("transformers")
OPS = kernels.load("reference")
TEXT = "b, c (d)\n  x. It is (so) far, and no further; 12, 345!\n" * 12


def bloom_tokenizer(folder: Path) -> Any:
    """As BLOOM's is: its pattern covers neither punctuation nor line breaks, which must not be lost."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    split = pre_tokenizers.Split(Regex(r" ?[^(\s|[.,!?…。，、।۔،])]+"), "isolated")
    made.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(False, use_regex=False)])
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator(
        [TEXT], trainers.BpeTrainer(vocab_size=280, initial_alphabet=alphabet, show_progress=False)
    )
    transformers.PreTrainedTokenizerFast(tokenizer_object=made).save_pretrained(folder)
    return made


@torch.no_grad()
def test_a_bloom_is_evaluated_on_all_of_the_text(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    tokenizer = bloom_tokenizer(tmp_path)
    torch.manual_seed(0)
    config = transformers.BloomConfig(vocab_size=280, hidden_size=16, n_layer=1, n_head=2)
    model = transformers.BloomForCausalLM(config).eval()
    model.save_pretrained(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    ids = torch.tensor(tokenizer.encode(TEXT).ids)
    nats = 0.0
    for first in range(0, len(ids) - 1, 16):
        window = ids[first : first + 17]
        nats += float(F.cross_entropy(model(window[None, :-1]).logits[0], window[1:], reduction="sum"))
    size = len(TEXT.encode()) - len(tokenizer.decode(ids[:1].tolist()).encode())
    with pytest.raises(UserError, match="give --context"):
        evaluate.main([f"--models={tmp_path}", f"--text={tmp_path / 'text.txt'}", "--device=cpu"])
    out = tmp_path / "out"
    evaluate.main(
        [f"--models={tmp_path}", f"--text={tmp_path / 'text.txt'}", "--device=cpu", "--context=16", f"--out_dir={out}"]
    )
    row = json.loads((out / "evaluation.jsonl").read_text().splitlines()[-1])
    assert row["tokens"] == len(ids) - 1 and row["context"] == 16
    assert row["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-4)
    assert "runs through transformers" in capsys.readouterr().out


@pytest.mark.parametrize("part", ["model", "tokenizer", "player"])
def test_no_code_of_an_author_runs_whatever_is_answered(
    part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers would ask; with y on stdin it would import the file."""
    asked: list[str] = []
    monkeypatch.setattr(builtins, "input", lambda prompt="": (asked.append(prompt), "y")[1])
    code = f"open({str(tmp_path / 'ran')!r}, 'w')\nfrom transformers import *\nclass A(PretrainedConfig): pass\n"
    (tmp_path / "theirs.py").write_text(
        code + "class B(PreTrainedModel): pass\nclass C(PreTrainedTokenizerFast): pass\n"
    )
    references = {"AutoConfig": "theirs.A", "AutoModelForCausalLM": "theirs.B"}
    settings = {"model_type": "theirs", "auto_map": references, "max_position_embeddings": 8}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    theirs = {"auto_map": {"AutoTokenizer": ["theirs.C", "theirs.C"]}, "tokenizer_class": "C"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(theirs))
    with pytest.raises(UserError, match="gptfast runs no code that comes with a model") as error:
        if part == "player":
            specials = {name: 256 + i for i, name in enumerate(SPECIAL_TOKENS)}
            BPETokenizer.from_ranks({bytes([i]): i for i in range(256)}, specials).save(tmp_path)
            evaluate.open_player(str(tmp_path), OPS, torch.float32, "cpu")
        elif part == "model":
            evaluate.open_subject(str(tmp_path), OPS, torch.float32, "cpu")
        else:
            evaluate.TheirTokenizer("theirs", tmp_path)
    assert not asked and not (tmp_path / "ran").exists() and "\n" not in str(error.value)


@pytest.mark.parametrize("use", ["text", "core", "conversations"])
def test_weights_that_are_pickled_are_never_opened(use: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = transformers.BloomConfig(vocab_size=40, hidden_size=16, n_layer=1, n_head=2)
    config.save_pretrained(tmp_path)
    (tmp_path / "pytorch_model.bin").write_bytes(b"\x80\x04N.")
    monkeypatch.setattr(evaluate, "Chat", lambda tokenizer: None)
    monkeypatch.setattr(evaluate, "_tokenizer", lambda source, folder: None)
    with pytest.raises(UserError, match="reads weights from safetensors only"):
        if use == "text":
            evaluate.open_subject(str(tmp_path), OPS, torch.float32, "cpu", context=8)
        elif use == "core":
            evaluate.open_reader(str(tmp_path), OPS, torch.float32, "cpu", evaluate.Evaluate(context=8))
        else:
            evaluate.open_player(str(tmp_path), OPS, torch.float32, "cpu")


@pytest.mark.parametrize("begins", [None, 90])
def test_a_tokenizer_of_more_tokens_than_the_model_has_is_refused(begins: int | None) -> None:
    class Wide:
        bos = begins
        encode = staticmethod(lambda text: [*text.encode()])
        decode = staticmethod(lambda ids: bytes(ids).decode())

    with pytest.raises(UserError, match="m: its tokenizer has a token 98 where its model has 98 tokens"):
        evaluate.Fitting("m", Wide(), 98).encode("ab")
    assert evaluate.Fitting("m", Wide(), 99).encode("ab") == [97, 98]
    if begins is not None:
        with pytest.raises(UserError, match="has a token 90 where its model has 64"):
            evaluate.Fitting("m", Wide(), 64)


def test_a_model_is_imported_without_a_tokenizer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = transformers.GPT2Config(n_layer=1, n_head=2, n_embd=16, vocab_size=40, n_positions=8)
    transformers.GPT2LMHeadModel(config).save_pretrained(tmp_path / "theirs")
    arguments = ["import", str(tmp_path / "theirs"), f"--out_dir={tmp_path / 'out'}"]
    with pytest.raises(UserError, match=r"no tokenizer in .*--tokenizer=False"):
        command.main(arguments)
    assert not (tmp_path / "out").exists()
    command.main([*arguments, "--tokenizer=False"])
    assert isinstance(hf.load(tmp_path / "out", OPS), GPT)
    assert checkpoint.load(tmp_path / "out").meta["tokenizer"] is None
    with pytest.raises(UserError, match="the model has no tokenizer"):
        hf.load_tokenizer(tmp_path / "out")
    assert cli.run(command.main, ["export", str(tmp_path / "out"), f"--to={tmp_path / 'to'}", "--tokenizer=False"]) == 0


def test_weights_that_do_not_fit_are_not_drawn_at_random(tmp_path: Path) -> None:
    """transformers would say so in a table, and go on."""
    bloom_tokenizer(tmp_path)
    (tmp_path / "text.txt").write_text(TEXT)
    config = transformers.BloomConfig(vocab_size=280, hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    flags = [f"--models={tmp_path}", f"--text={tmp_path / 'text.txt'}", "--device=cpu", "--context=16"]
    for wrong in ({"vocab_size": 300}, {"n_layer": 2}):
        (tmp_path / "config.json").write_text(json.dumps(settings | wrong))
        with pytest.raises(UserError, match=r"cannot load it|its weights lack .*h\.1\."):
            evaluate.main(flags)


def test_a_setting_that_only_the_first_use_refuses_is_one_line(tmp_path: Path) -> None:
    config = transformers.BloomConfig(vocab_size=280, hidden_size=16, n_layer=1, n_head=2)
    transformers.BloomForCausalLM(config).save_pretrained(tmp_path)
    bloom_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"n_layer": -1}))
    with pytest.raises(UserError, match=r"transformers cannot (run|load) it"):
        evaluate.open_subject(str(tmp_path), OPS, torch.float32, "cpu", context=16)


@pytest.mark.parametrize(("longest", "context"), [(2**40, 0), (0, 16), (-1, 0), ("16", 0), (2**40, 16)])
def test_a_length_that_a_model_states_takes_no_memory(longest: Any, context: int, tmp_path: Path) -> None:
    sizes = dict(vocab_size=280, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    model = transformers.GPTNeoXForCausalLM(transformers.GPTNeoXConfig(**sizes))
    model.save_pretrained(tmp_path)
    bloom_tokenizer(tmp_path)
    settings = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(settings | {"max_position_embeddings": longest}))
    text = ["b, c (d) and so far"]
    try:
        subject = evaluate.open_subject(str(tmp_path), OPS, torch.float32, "cpu", context=context)
    except UserError:
        assert longest != 2**40
        return
    result = evaluate.measure(subject, text, "cpu", context=context)
    (ids,) = (torch.tensor([subject.tokenizer.encode(text[0])]),)
    with torch.no_grad():
        loss = F.cross_entropy(model.eval()(ids[:, :-1]).logits[0], ids[0, 1:])
    if not context:
        assert result.loss == pytest.approx(loss.item(), rel=1e-5)
