"""Configs: presets are the published sizes, JSON brings one back, and what cannot be built is refused by name."""

from __future__ import annotations

import dataclasses
import json

import pytest

from gptfast.config import PRESETS, GPTConfig, of_depth, preset
from gptfast.errors import UserError

# Radford et al. 2019, table 2; nanoGPT's train_shakespeare_char and its CPU command
SIZES = {
    "gpt2": (12, 12, 768, 1024, 50257),
    "gpt2-medium": (24, 16, 1024, 1024, 50257),
    "gpt2-large": (36, 20, 1280, 1024, 50257),
    "gpt2-xl": (48, 25, 1600, 1024, 50257),
    "char": (6, 6, 384, 256, 65),
    "char-cpu": (4, 4, 128, 64, 65),
    "char-modern-cpu": (4, 4, 128, 64, 65),
    "modern": (12, 12, 768, 1024, 50304),
}


def test_presets_are_the_published_sizes() -> None:
    found = {name: (c.n_layer, c.n_head, c.n_embd, c.block_size, c.vocab_size) for name, c in PRESETS.items()}
    assert found == SIZES


def test_gpt2_has_biases_and_nanogpt_none() -> None:
    assert all(PRESETS[name].bias for name in SIZES if name.startswith("gpt2"))
    assert not any(PRESETS[name].bias for name in SIZES if not name.startswith("gpt2"))
    assert PRESETS["char"].dropout == 0.2 and PRESETS["char-cpu"].dropout == 0.0


@pytest.mark.parametrize("name", ["modern", "char-modern-cpu"])
def test_modern_presets(name: str) -> None:
    config = PRESETS[name]
    assert (config.norm, config.position, config.activation) == ("rmsnorm", "rope", "relu2")
    assert config.qk_norm and not config.tied


@pytest.mark.parametrize("name", SIZES)
def test_json_brings_a_config_back(name: str) -> None:
    text = json.dumps(dataclasses.asdict(PRESETS[name]))
    assert GPTConfig(**json.loads(text)) == PRESETS[name]


def test_a_config_is_frozen() -> None:
    with pytest.raises(dataclasses.FrozenInstanceError):
        GPTConfig().n_layer = 3  # type: ignore[misc]


def test_key_value_heads_default_to_the_query_heads() -> None:
    assert GPTConfig(n_head=8).kv_heads == 8
    assert GPTConfig(n_head=8, n_kv_head=2).kv_heads == 2
    assert dataclasses.replace(GPTConfig(n_head=12), n_head=6).kv_heads == 6


def test_what_is_none_has_a_value_by_the_rest() -> None:
    assert GPTConfig(n_embd=768).hidden_width == 3072 and GPTConfig(mlp_width=2048).hidden_width == 2048
    assert [GPTConfig(norm=norm).epsilon for norm in ("layernorm", "rmsnorm")] == [1e-5, 1e-6]
    assert GPTConfig(norm="rmsnorm", norm_eps=1e-3).epsilon == 1e-3


def test_a_config_of_an_older_checkpoint_is_what_it_was() -> None:
    """Fields that came later default to what the model did before them."""
    later = {"norm_weight", "norm_eps", "rope_base", "mlp_width"}
    older = {name: value for name, value in dataclasses.asdict(PRESETS["modern"]).items() if name not in later}
    config = GPTConfig(**older)
    assert config == PRESETS["modern"] and config.rope_base == 10000.0 and not config.norm_weight


REFUSED = [
    ({"block_size": 0}, "block_size is 0"),
    ({"vocab_size": -1}, "vocab_size is -1"),
    ({"n_layer": 0}, "n_layer is 0"),
    ({"n_head": 0}, "n_head is 0"),
    ({"n_embd": 0}, "n_embd is 0"),
    ({"n_embd": 100, "n_head": 12}, "n_embd is 100, which 12 heads do not divide"),
    ({"n_head": 12, "n_kv_head": 5}, "n_kv_head is 5; it must divide n_head, which is 12"),
    ({"n_kv_head": 0}, "n_kv_head is 0"),
    ({"dropout": 1.0}, "dropout is 1.0"),
    ({"dropout": -0.1}, "dropout is -0.1"),
    ({"norm": "batchnorm"}, "norm is 'batchnorm'; choose one of layernorm, rmsnorm"),
    ({"position": "alibi"}, "position is 'alibi'"),
    ({"activation": "swish"}, "activation is 'swish'"),
    ({"position": "rope", "n_embd": 9, "n_head": 3}, "even head size"),
    ({"softcap": 0.0}, "softcap is 0.0"),
    ({"mlp_width": 0}, "mlp_width is 0"),
    ({"norm_eps": 0.0}, "norm_eps is 0.0; it must be positive"),
    ({"rope_base": -1.0}, "rope_base is -1.0"),
]


@pytest.mark.parametrize(("fields", "message"), REFUSED)
def test_what_cannot_be_built_is_refused_by_name(fields: dict, message: str) -> None:
    with pytest.raises(UserError, match=r"^[^\n]+$") as refusal:
        GPTConfig(**fields)
    assert message in str(refusal.value)


def test_an_unknown_preset_is_refused_with_the_names() -> None:
    assert preset("gpt2") is PRESETS["gpt2"]
    with pytest.raises(UserError, match=r"--models=gpt3 is unknown; did you mean gpt2\?; or a depth, as d12"):
        preset("gpt3", "--models")
    for name in ("d0", "d012", "d100", "d-1", "D12", "d"):
        with pytest.raises(UserError, match="is unknown"):
            preset(name)


def test_a_depth_is_nanochats_model_of_it() -> None:
    found = preset("d12")
    assert (found.n_layer, found.n_embd, found.n_head, found.value_embeddings) == (12, 768, 6, True)
    assert found == of_depth(12) and of_depth(3).n_embd == 256 and of_depth(3, head_dim=64).n_embd == 192
