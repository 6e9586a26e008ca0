"""Hugging Face's layouts, both ways, against transformers itself; GGUF against its own package's reader."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import kernels
from gptfast import cli, hf
from gptfast.config import PRESETS, GPTConfig
from gptfast.errors import UserError
from gptfast.hf import __main__ as command
from gptfast.hf import gguf as gguf_file
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer, CharTokenizer
from gptfast.tokenizer_json import GPT2_PATTERN

transformers = pytest.importorskip("transformers")

OPS = kernels.load("reference")
GPT2 = GPTConfig(block_size=64, vocab_size=101, n_layer=2, n_head=4, n_embd=64)
LLAMA = dataclasses.replace(
    GPT2, n_kv_head=2, bias=False, norm="rmsnorm", norm_weight=True, position="rope", activation="swiglu",
    mlp_width=96, tied=False,
)  # fmt: skip
NANOCHAT = dataclasses.replace(
    LLAMA, norm_weight=False, activation="relu2", qk_norm=True, softcap=15.0, embedding_norm=True, rope_sign=-1
)
OURS = {
    "gpt2": GPT2,
    "gpt2 by tanh, without biases, untied": dataclasses.replace(GPT2, activation="gelu_tanh", bias=False, tied=False),
    "gpt2 with ReLU² and its own width and eps": dataclasses.replace(
        GPT2, activation="relu2", mlp_width=80, norm_eps=1e-3
    ),
    "llama": LLAMA,
    "llama with biases, tied, base and eps": dataclasses.replace(
        LLAMA, bias=True, tied=True, rope_base=500.0, norm_eps=1e-2
    ),
    "llama with ReLU² and no norm weight": dataclasses.replace(LLAMA, activation="relu2", norm_weight=False),
    "qwen3": dataclasses.replace(LLAMA, qk_norm=True),
    "qwen3 with weights, size of heads and eps": dataclasses.replace(
        LLAMA, qk_norm=True, qk_norm_weight=True, head_size=24, norm_eps=1e-2
    ),
    "qwen3 by a gain": dataclasses.replace(LLAMA, qk_norm=True, qk_gain=1.5),
    "nanochat": NANOCHAT,
    "nanochat turned, without softcap": dataclasses.replace(
        NANOCHAT, rope_sign=1, softcap=None, norm_eps=1e-2, n_kv_head=None
    ),
    "modern": dataclasses.replace(PRESETS["modern"], **{
        field: getattr(GPT2, field) for field in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd")
    }),
}  # fmt: skip
ours = pytest.mark.parametrize("config", OURS.values(), ids=OURS.keys())

SIZES = dict(vocab_size=101, num_hidden_layers=2, hidden_size=64, num_attention_heads=4, max_position_embeddings=64)
THEIRS: dict[str, Any] = {
    "gpt2 gelu_new": ("GPT2", dict(n_layer=2, n_head=4, n_embd=64, vocab_size=101, n_positions=64)),
    "gpt2 gelu": ("GPT2", dict(n_layer=2, n_head=4, n_embd=64, vocab_size=101, n_positions=64,
                               activation_function="gelu", n_inner=80, layer_norm_epsilon=1e-3)),
    "llama": ("Llama", dict(**SIZES, intermediate_size=96, num_key_value_heads=2, rms_norm_eps=1e-2,
                            rope_parameters={"rope_type": "default", "rope_theta": 500.0})),
    "llama tied with biases": ("Llama", dict(**SIZES, intermediate_size=96, num_key_value_heads=4, attention_bias=True,
                                             mlp_bias=True, tie_word_embeddings=True)),
    "qwen3": ("Qwen3", dict(**SIZES, intermediate_size=96, num_key_value_heads=2, head_dim=32, rms_norm_eps=1e-2,
                            rope_parameters={"rope_type": "default", "rope_theta": 1e6})),
    "llama with heads of its own size": ("Llama", dict(**SIZES, intermediate_size=96, num_key_value_heads=2,
                                                       head_dim=24)),
    "nanochat, another eps": ("NanoChat", dict(**SIZES, intermediate_size=256, num_key_value_heads=2,
                                               rms_norm_eps=1e-2)),
    "nanochat": ("NanoChat", dict(**SIZES, intermediate_size=256, num_key_value_heads=2)),
}  # fmt: skip
theirs = pytest.mark.parametrize(("kind", "settings"), THEIRS.values(), ids=THEIRS.keys())


def shaken(model: nn.Module) -> Any:
    """Weights large enough that attention looks somewhere, and every part matters."""
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model.eval()


def make(config: GPTConfig) -> GPT:
    return shaken(GPT(config, OPS))


def make_theirs(kind: str, **settings: Any) -> Any:
    config = getattr(transformers, f"{kind}Config")(bos_token_id=0, eos_token_id=0, pad_token_id=0, **settings)
    name = "GPT2LMHeadModel" if kind == "GPT2" else f"{kind}ForCausalLM"
    return shaken(getattr(transformers, name)(config))


def read_by_transformers(folder: Path) -> Any:
    return transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


def gguf_read_by_transformers(path: Path, config: Any) -> Any:
    """The tensors as from_pretrained(gguf_file=...) finds them; it reads some of a small model's sizes as defaults."""
    from transformers.modeling_gguf_pytorch_utils import load_gguf_checkpoint

    model = transformers.AutoModelForCausalLM.from_config(config).eval()
    tensors = load_gguf_checkpoint(str(path), return_tensors=True, model_to_load=model)["tensors"]
    missing, unexpected = model.load_state_dict(tensors, strict=False)
    assert missing in ([], ["lm_head.weight"]) and not unexpected
    model.tie_weights()
    return model


def greedy(model: GPT, tokens: Tensor, count: int) -> Tensor:
    for _ in range(count):
        tokens = torch.cat([tokens, model.logits(tokens, last_only=True).argmax(-1)], dim=1)
    return tokens


def difference(a: Tensor, b: Tensor) -> float:
    assert b.std() > 0.5  # of a size at which a mistake would show
    return (a - b).abs().max().item()


# ---- in --------------------------------------------------------------------------------------------------------------
@theirs
@torch.no_grad()
def test_logits_of_an_imported_model_are_transformers(kind: str, settings: dict, tmp_path: Path) -> None:
    original = make_theirs(kind, **settings)
    original.save_pretrained(tmp_path)
    tokens = torch.randint(101, (3, 64))
    assert difference(hf.load(tmp_path, OPS).logits(tokens), original(tokens).logits) < 1e-4


@torch.no_grad()
def test_weights_in_several_files_of_bfloat16(tmp_path: Path) -> None:
    make_theirs("Llama", **THEIRS["llama"][1]).to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="50KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 2
    tokens = torch.randint(101, (3, 64))
    assert difference(hf.load(tmp_path, OPS).logits(tokens), read_by_transformers(tmp_path)(tokens).logits) < 1e-4


def damaged(settings: dict[str, Any], folder: Path) -> Path:
    make_theirs("Llama", **SIZES, intermediate_size=96).save_pretrained(folder)
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | settings))
    return folder


REFUSED = [
    ({"model_type": "mamba"}, "model_type 'mamba'; gptfast reads gpt2, llama"),
    ({"hidden_size": None}, "lacks hidden_size"),
    ({"rope_parameters": {"rope_type": "llama3", "factor": 8.0}}, "scales its rotary positions (llama3)"),
    ({"head_dim": 32}, "do not fit its config: transformer.h.0."),
    ({"attention_bias": True}, "attention_bias=True and mlp_bias=False; gptfast has biases in all"),
    ({"hidden_act": "gelu"}, "hidden_act=gelu; gptfast has silu, relu"),
    ({"hidden_act": "relu"}, "gated by ReLU"),
    ({"model_type": "qwen3"}, "lack model.layers.0.self_attn.q_norm.weight"),
    ({"num_hidden_layers": 1}, "has weights that a llama has not: model.layers.1"),
    ({"intermediate_size": 95}, "do not fit its config: transformer.h.0."),
]


@pytest.mark.parametrize(("settings", "message"), REFUSED)
def test_what_is_not_a_gpt_of_ours_is_refused(settings: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as refusal:
        hf.load(damaged(settings, tmp_path), OPS)
    assert message in str(refusal.value)


def test_a_folder_that_is_none_and_files_that_are_damaged(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"holds no model; give a folder with a checkpoint of ours, config\.json"):
        hf.load(tmp_path, OPS)
    weights = damaged({}, tmp_path) / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    with pytest.raises(UserError, match="damaged"):
        hf.load(tmp_path, OPS)
    weights.unlink()
    with pytest.raises(UserError, match=r"holds no model\.safetensors"):
        hf.load(tmp_path, OPS)
    (tmp_path / "config.json").write_text("[]")
    with pytest.raises(UserError, match="no JSON object"):
        hf.load(tmp_path, OPS)


def test_names_on_the_hub(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The hub's client is asked for the right repository, and its failure is one line."""
    asked = []

    def fetch(repository: str, allow_patterns: list[str]) -> str:
        asked.append(repository)
        if repository.startswith("nobody"):
            raise ConnectionError("no network")
        return str(tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert hf.find("gpt2-xl") == hf.find("someone/llama") == hf.find(tmp_path) == tmp_path
    assert asked == ["openai-community/gpt2-xl", "someone/llama"]
    with pytest.raises(UserError, match=r"cannot get nobody/gpt.*ConnectionError"):
        hf.find("nobody/gpt")
    with pytest.raises(UserError, match="gpt3: no such folder; give one with a model, gpt2, gpt2-medium"):
        hf.find("gpt3")


# ---- out -------------------------------------------------------------------------------------------------------------
@ours
@torch.no_grad()
def test_transformers_reads_an_export(config: GPTConfig, tmp_path: Path) -> None:
    """Without remote code: the same logits, the same 50 tokens; and back again."""
    model = make(config)
    hf.save(model, tmp_path)
    exported = read_by_transformers(tmp_path)
    tokens = torch.randint(config.vocab_size, (3, config.block_size))
    expected = model.logits(tokens)
    assert difference(exported(tokens).logits, expected) < 1e-4
    prompt = tokens[:, :8]
    every = torch.ones_like(prompt)
    drawn = exported.generate(prompt, attention_mask=every, do_sample=False, max_new_tokens=50, pad_token_id=0)
    assert torch.equal(drawn, greedy(model, prompt, 50))
    assert difference(hf.load(tmp_path, OPS).logits(tokens), expected) < 1e-4


def test_the_stored_dtype(tmp_path: Path) -> None:
    model = make(LLAMA)
    hf.save(model, tmp_path, dtype=torch.bfloat16)
    exported = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
    assert exported.dtype == torch.bfloat16
    assert torch.equal(exported.lm_head.weight, model.lm_head.weight.to(torch.bfloat16))


NOT_EXPRESSIBLE = [
    (dataclasses.replace(OURS["modern"], softcap=15.0), "auto", "nearest layout, qwen3, cannot express softcap=15.0;"),
    (dataclasses.replace(LLAMA, token_shift=True), "llama", "cannot express token_shift=True"),
    (LLAMA, "gpt2", "gpt2 layout cannot express position=rope, norm=rmsnorm, activation=swiglu, n_kv_head=2"),
    (GPT2, "llama", "llama layout cannot express position=learned, norm=layernorm, activation=gelu;"),
    (LLAMA, "qwen3", "qwen3 layout cannot express qk_norm=False;"),
    (LLAMA, "nanochat", "cannot express embedding_norm=False, norm_weight=True, activation=swiglu, qk_norm=False;"),
    (dataclasses.replace(NANOCHAT, qk_gain=1.2), "nanochat", "the nanochat layout cannot express qk_gain=1.2;"),
    (dataclasses.replace(GPT2, window_pattern="S", window=8, backout=True), "gpt2", "window=8, backout=True;"),
    (GPT2, "opt", "no layout named 'opt' here; choose one of gpt2"),
]


@pytest.mark.parametrize(("config", "layout", "message"), NOT_EXPRESSIBLE)
def test_what_a_layout_cannot_express_is_refused(config: GPTConfig, layout: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as refusal:
        hf.save(make(config), tmp_path / "out", layout=layout)
    assert message in str(refusal.value)
    assert not (tmp_path / "out").exists()


def test_an_export_where_no_file_can_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot write to .*; choose another folder"):
        hf.save(make(GPT2), tmp_path / "file")


# ---- tokenizers ------------------------------------------------------------------------------------------------------
TEXT = "Hello, world! It's 2024 — naïve café, 東京…\n\n  two  spaces\t<|bos|> end"


def trained(vocab_size: int = 300) -> BPETokenizer:
    """Ranks of the most common pairs of a text, with two special tokens."""
    from tokenizers import Tokenizer, models, pre_tokenizers, trainers

    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    made.train_from_iterator([TEXT * 3], trainers.BpeTrainer(vocab_size=vocab_size, initial_alphabet=alphabet))
    byte_of = {letter: byte for byte, letter in gguf_file.BYTE_LETTERS.items()}
    vocab = made.get_vocab()
    ranks = {bytes(byte_of[letter] for letter in token): rank for token, rank in vocab.items()}
    return BPETokenizer.from_ranks(ranks, {"<|bos|>": len(ranks), "<|end|>": len(ranks) + 1}, GPT2_PATTERN)


@pytest.mark.parametrize("tokenizer", [trained(), CharTokenizer.from_text(TEXT)], ids=["bpe", "characters"])
def test_an_exported_tokenizer_gives_the_same_ids(tokenizer: Any, tmp_path: Path) -> None:
    config = dataclasses.replace(GPT2, vocab_size=tokenizer.vocab_size)
    hf.save(make(config), tmp_path, tokenizer)
    exported = transformers.AutoTokenizer.from_pretrained(tmp_path)
    ids = exported.encode(TEXT, add_special_tokens=False, split_special_tokens=True)
    assert ids == tokenizer.encode(TEXT)
    assert exported.decode(ids) == TEXT
    assert hf.load_tokenizer(tmp_path).encode(TEXT) == ids
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["bos_token_id"] == settings["eos_token_id"] == tokenizer.bos
    assert read_by_transformers(tmp_path).generation_config.eos_token_id == tokenizer.bos


# ---- GGUF ------------------------------------------------------------------------------------------------------------
GGUF = {
    "gpt2": dataclasses.replace(GPT2, activation="gelu_tanh"),
    "llama": LLAMA,
    "llama tied with biases": dataclasses.replace(LLAMA, bias=True, tied=True, rope_base=500.0, norm_eps=1e-2),
    "qwen3": OURS["qwen3"],
}
KINDS = {"gpt2": "gpt2", "llama": "llama", "llama tied with biases": "llama", "qwen3": "qwen3"}


def turned_back(name: str, w: Tensor, config: GPTConfig) -> Tensor:
    """Llama's queries and keys from neighbouring pairs to halves."""
    heads = {"attn_q": config.n_head, "attn_k": config.kv_heads}.get(name.split(".")[-2])
    return w if heads is None else w.view(heads, -1, 2, *w.shape[1:]).transpose(1, 2).reshape(w.shape)


@pytest.mark.parametrize("kind", GGUF)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_gguf_file_reads_back_tensor_by_tensor(kind: str, dtype: torch.dtype, tmp_path: Path) -> None:
    import gguf

    config, arch = GGUF[kind], KINDS[kind]
    model = make(config)
    reader = gguf.GGUFReader(gguf_file.write(model, tmp_path / "model.gguf", dtype=dtype))
    value = {name: field.contents() for name, field in reader.fields.items()}
    assert value["general.architecture"] == arch and value[f"{arch}.block_count"] == 2
    assert value[f"{arch}.attention.head_count"] == 4 and value[f"{arch}.context_length"] == 64
    assert value[f"{arch}.feed_forward_length"] == config.hidden_width

    weights = model.state_dict()
    rows = [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]
    places = {
        "token_embd": "transformer.wte", "position_embd": "transformer.wpe", "output_norm": "transformer.ln_f",
        "output": "lm_head", "attn_norm": "ln_1", "ffn_norm": "ln_2", "attn_qkv": "attn.c_attn",
        "attn_output": "attn.c_proj", "ffn_up": "mlp.c_fc", "ffn_gate": "mlp.c_gate", "ffn_down": "mlp.c_proj",
    }  # fmt: skip
    for tensor in reader.tensors:
        *block, part, what = tensor.name.split(".")
        prefix = f"transformer.h.{block[1]}." if block else ""
        stored = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).copy())
        if part in ("attn_q", "attn_k", "attn_v"):
            fused = weights[f"{prefix}attn.c_attn.{what}"].split(rows)
            expected = fused[("attn_q", "attn_k", "attn_v").index(part)]
            stored = turned_back(tensor.name, stored, config) if arch == "llama" else stored
        elif part in ("attn_q_norm", "attn_k_norm"):
            expected = torch.ones(config.head_dim)
        else:
            expected = weights[f"{prefix}{places[part]}.{what}"]
        is_matrix = expected.ndim == 2 and part != "position_embd"
        assert torch.equal(stored, expected.to(dtype if is_matrix else torch.float32).float()), tensor.name
        assert tensor.tensor_type.name == gguf_file.KINDS[dtype if is_matrix else torch.float32]
    names = {tensor.name for tensor in reader.tensors}
    assert ("output.weight" in names) == (not config.tied)
    assert sum(int(tensor.n_elements) for tensor in reader.tensors) == model.num_params(False) + (
        4 * config.head_dim if arch == "qwen3" else 0
    )


@torch.no_grad()
@pytest.mark.parametrize("kind", ["gpt2", "llama", "qwen3"])
def test_transformers_reads_the_gguf_file(kind: str, tmp_path: Path) -> None:
    """A second reader, with the names and the turned heads as llama.cpp has them, gives the same logits."""
    model = make(GGUF[kind])
    hf.save(model, tmp_path)
    config = transformers.AutoConfig.from_pretrained(tmp_path)
    path = gguf_file.write(model, tmp_path / "model.gguf")
    tokens = torch.randint(101, (3, 64))
    exported = gguf_read_by_transformers(path, config)
    assert difference(exported(tokens).logits, model.logits(tokens)) < 1e-4


def test_rotation_of_neighbours_is_that_of_halves() -> None:
    """What llama.cpp computes with the turned rows: interleaved rotation gives the same attention scores."""
    x, w = torch.randn(1, 5, 64), torch.randn(32, 64)
    angle = torch.randn(5, 4)

    def scores(w: Tensor, interleaved: bool) -> Tensor:
        q = (x @ w.t()).view(1, 5, 4, 8)
        q, k = OPS.rotary(q, q.flip(1), angle.cos(), angle.sin(), interleaved=interleaved)
        return torch.einsum("bthd,bshd->bhts", q, k)

    turned = gguf_file.neighbours_from_halves(w, 4)
    assert not torch.equal(turned, w)
    torch.testing.assert_close(scores(turned, True), scores(w, False))


def test_the_tokenizer_in_a_gguf_file(tmp_path: Path) -> None:
    import gguf

    tokenizer = trained()
    config = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size + 6)
    reader = gguf.GGUFReader(gguf_file.write(make(config), tmp_path / "model.gguf", tokenizer))
    value = {name.removeprefix("tokenizer.ggml."): field.contents() for name, field in reader.fields.items()}
    assert (value["model"], value["pre"], value["bos_token_id"]) == ("gpt2", "gpt-2", tokenizer.bos)
    assert len(value["tokens"]) == config.vocab_size == len(value["token_type"])
    assert value["token_type"] == [1] * len(tokenizer.ranks) + [3] * 2 + [5] * 6

    from tokenizers import Tokenizer, models, pre_tokenizers

    vocab = {token: i for i, token in enumerate(value["tokens"])}
    rebuilt = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in value["merges"]]))
    rebuilt.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    assert rebuilt.encode(TEXT).ids == tokenizer.encode(TEXT)


def test_characters_in_a_gguf_file(tmp_path: Path) -> None:
    import gguf

    tokenizer = CharTokenizer.from_text("to be\n")
    config = dataclasses.replace(LLAMA, vocab_size=tokenizer.vocab_size)
    reader = gguf.GGUFReader(gguf_file.write(make(config), tmp_path / "model.gguf", tokenizer))
    assert reader.fields["tokenizer.ggml.tokens"].contents() == ["Ċ", "Ġ", "b", "e", "o", "t"]
    assert reader.fields["tokenizer.ggml.merges"].contents() == ["ÿ ÿ"]


GGUF_REFUSED = [
    (GPT2, None, "has only GPT-2's GELU, by tanh"),
    (OURS["modern"], None, "llama.cpp's qwen3 has no ReLU²; export to a folder for transformers, which has it"),
    (dataclasses.replace(OURS["qwen3"], softcap=15.0), None, "cannot express"),
    (LLAMA, CharTokenizer.from_text("é"), "ASCII characters"),
    (LLAMA, trained(), "has 302 tokens, the model 101"),
]


@pytest.mark.parametrize(("config", "tokenizer", "message"), GGUF_REFUSED)
def test_what_llama_cpp_has_not_is_refused(config: GPTConfig, tokenizer: Any, message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as refusal:
        gguf_file.write(make(config), tmp_path / "model.gguf", tokenizer)
    assert message in str(refusal.value)
    assert not any(tmp_path.iterdir())


def test_llama_cpp_does_not_know_our_split(tmp_path: Path) -> None:
    ranks = {bytes([byte]): byte for byte in range(256)}
    model = make(dataclasses.replace(LLAMA, vocab_size=256))
    with pytest.raises(UserError, match="does not know how this tokenizer splits text"):
        gguf_file.write(model, tmp_path / "model.gguf", BPETokenizer.from_ranks(ranks, {}))


# ---- the command line ------------------------------------------------------------------------------------------------
@torch.no_grad()
def test_import_and_export_by_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """transformers' folder -> our checkpoint -> a folder and a GGUF file; the function stays what it was."""
    original = make_theirs("GPT2", **(THEIRS["gpt2 gelu_new"][1] | {"vocab_size": 302}))
    original.save_pretrained(tmp_path / "theirs")
    trained().save(tmp_path / "theirs")
    run = lambda *arguments: cli.run(command.main, list(map(str, arguments)))
    assert run("import", tmp_path / "theirs", f"--out_dir={tmp_path / 'out'}") == 0
    assert run("export", tmp_path / "out", f"--to={tmp_path / 'again'}") == 0
    assert run("export", tmp_path / "out", f"--to={tmp_path / 'model.gguf'}") == 0
    printed = capsys.readouterr().out
    assert f"{original.num_parameters():,} parameters" in printed and "model.gguf" in printed
    tokens = torch.randint(302, (2, 64))
    expected = original(tokens).logits
    assert difference(hf.load(tmp_path / "out", OPS).logits(tokens), expected) < 1e-4
    assert difference(read_by_transformers(tmp_path / "again")(tokens).logits, expected) < 1e-4
    assert hf.load_tokenizer(tmp_path / "out").encode(TEXT) == trained().encode(TEXT)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["imprt"], "unknown command imprt; did you mean import?"),
        (["import", "gpt2"], "say what to import and where to"),
        (["export", "out"], "say where to"),
        (["export", "nowhere", "--to=x"], "nowhere: no such folder"),
        (["export", "out", "--layout=opt", "--to=x"], "--layout=opt: expected"),
    ],
)
def test_commands_that_cannot_be(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.run(command.main, arguments) == 2
    assert message in capsys.readouterr().err
