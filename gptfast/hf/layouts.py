"""Hugging Face's model layouts: converts config.json and tensors to ours and back.

    gpt2      GPT-2: learned positions, LayerNorm with biases, two-layer MLP
    llama     Llama: rotary positions, RMSNorm with a weight, gated MLP, grouped key/value heads
    qwen3     Llama's, with a weighted RMS norm of queries and keys, and heads of any size
    nanochat  nanochat of 2025: RMSNorm without a weight, also of the embedding, ReLU², normalized queries and keys,
              softcapped logits; later nanochat has its own files (nanochat.py)

The same function can have several descriptions. relu(x)² is a gated MLP with a ReLU gate and twice the same matrix, so
our model with ReLU² is also a Llama. nanochat rotates by minus the angle, which equals plus the angle with the two
halves of every head swapped. A gain of queries and keys is the weight of Qwen3's norm.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.errors import UserError

Weights = dict[str, Tensor]
Settings = Mapping[str, Any]  # config.json


@dataclass(frozen=True)
class Layout:
    """One of transformers' architectures."""

    name: str  # model_type in config.json
    architecture: str  # transformers' class
    config: Callable[[Settings], GPTConfig]  # from their settings; raises UserError for settings that our model lacks
    take: Callable[[GPTConfig, Weights], Weights]  # their tensors under our names; removes those that it converts
    needs: Callable[[GPTConfig], dict[str, tuple]]  # field -> values that the layout can express
    settings: Callable[[GPTConfig], dict[str, Any]]  # our config as config.json
    give: Callable[[GPTConfig, Weights], Weights]  # our tensors under their names

    def misfits(self, config: GPTConfig) -> list[str]:
        """Returns the fields of `config` that this layout cannot express, as 'field=value'."""
        values = {field: getattr(config, field) for field in self.needs(config)}
        return [f"{field}={values[field]}" for field, fits in self.needs(config).items() if values[field] not in fits]


def layout_of(settings: Settings) -> Layout:
    """Returns the layout that config.json names. Raises UserError for an unknown one."""
    name = settings.get("model_type")
    if name not in LAYOUTS:
        raise UserError(f"config.json says model_type {name!r}; gptfast reads {', '.join(LAYOUTS)}")
    return LAYOUTS[name]


def fitting(config: GPTConfig) -> list[str]:
    """Returns the names of the layouts that can express `config`."""
    return [name for name, layout in LAYOUTS.items() if not layout.misfits(config)]


def instead(config: GPTConfig, more: Sequence[str] = ()) -> str:
    """Returns the fix for a model that a layout cannot express: a layout, or one of `more`, that can."""
    names = [*fitting(config), *more]
    if names:
        return f"--layout={' and --layout='.join(names)} can, into a folder"
    return "train a model without, or keep it as a gptfast checkpoint"


def layout_for(
    config: GPTConfig, name: str = "auto", among: Collection[str] | None = None, more: Sequence[str] = ()
) -> Layout:
    """Returns the layout for exporting `config`: the named one, or the first that fits, of all or of `among`.

    Raises UserError if none fits, with the fields that prevent it, of the nearest, and what can (`instead`).
    """
    names = [known for known in LAYOUTS if among is None or known in among]
    if name != "auto" and name not in names:
        raise UserError(f"no layout named {name!r} here; choose one of {', '.join(names)}")
    tried = [LAYOUTS[known] for known in (names if name == "auto" else [name])]
    fits = [layout for layout in tried if not layout.misfits(config)]
    if not fits:
        nearest = min(tried, key=lambda layout: len(layout.misfits(config)))
        which = f"the nearest layout, {nearest.name}," if len(tried) > 1 else f"the {nearest.name} layout"
        raise UserError(f"{which} cannot express {', '.join(nearest.misfits(config))}; {instead(config, more)}")
    return fits[0]


# ---- reading config.json ---------------------------------------------------------------------------------------------


def _setting(settings: Settings, key: str) -> Any:
    if settings.get(key) is None:
        raise UserError(f"config.json lacks {key}; give a folder written by save_pretrained")
    return settings[key]


def _only(settings: Settings, **allowed: Any) -> None:
    """Raises UserError for a setting that our model cannot reproduce; a missing setting is allowed."""
    for key, value in allowed.items():
        if settings.get(key, value) not in (None, value):
            raise UserError(f"config.json says {key}={settings[key]}; gptfast has only {key}={value}")


def _one_of(settings: Settings, key: str, default: str, known: Mapping[str, Any]) -> Any:
    value = settings.get(key) or default
    if value not in known:
        raise UserError(f"config.json says {key}={value}; gptfast has {', '.join(known)}")
    return known[value]


def _rope_base(settings: Settings) -> float:
    """Returns the rotary base: transformers 4 has rope_theta and rope_scaling, transformers 5 rope_parameters."""
    rope = settings.get("rope_parameters") or settings.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise UserError(f"config.json scales its rotary positions ({kind}); gptfast has only unscaled ones")
    return float(rope.get("rope_theta") or settings.get("rope_theta") or 10000.0)


# Fields that no layout of transformers has, at their neutral values; each layout below overrides those that it has.
_WITHOUT: dict[str, tuple] = {
    "token_shift": (False,), "embedding_norm": (False,), "window": (None,), "value_embeddings": (False,),
    "residual_scalars": (False,), "smear": (False,), "backout": (False,), "rope_sign": (1,), "qk_gain": (1.0,),
}  # fmt: skip


# ---- GPT-2 -----------------------------------------------------------------------------------------------------------

_GPT2_ACTIVATIONS = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu2": "relu2"
}  # fmt: skip
_CONV1D = ("attn.c_attn.weight", "attn.c_proj.weight", "mlp.c_fc.weight", "mlp.c_proj.weight")  # kept as (in, out)
_MASKS = (".attn.bias", ".attn.masked_bias")  # causal masks, not parameters


def _gpt2_config(settings: Settings) -> GPTConfig:
    _only(settings, scale_attn_weights=True, scale_attn_by_inverse_layer_idx=False, add_cross_attention=False)
    return GPTConfig(
        block_size=_setting(settings, "n_positions"),
        vocab_size=_setting(settings, "vocab_size"),
        n_layer=_setting(settings, "n_layer"),
        n_head=_setting(settings, "n_head"),
        n_embd=_setting(settings, "n_embd"),
        norm_eps=settings.get("layer_norm_epsilon"),
        activation=_one_of(settings, "activation_function", "gelu_new", _GPT2_ACTIVATIONS),
        mlp_width=settings.get("n_inner"),
        tied=settings.get("tie_word_embeddings", True),
    )


def _take_gpt2(config: GPTConfig, theirs: Weights) -> Weights:
    ours = {}
    for name in list(theirs):
        w = theirs.pop(name)
        full = name if name.startswith(("transformer.", "lm_head.")) else f"transformer.{name}"
        if not full.endswith(_MASKS):
            ours[full] = w.t() if full.endswith(_CONV1D) else w
    if config.tied:
        ours["lm_head.weight"] = ours["transformer.wte.weight"]
    return ours


def _gpt2_needs(config: GPTConfig) -> dict[str, tuple]:
    return _WITHOUT | {
        "position": ("learned",), "norm": ("layernorm",), "activation": tuple(_GPT2_ACTIVATIONS.values()),
        "n_kv_head": (None, config.n_head), "qk_norm": (False,),
        "head_size": (None, config.n_embd // config.n_head), "softcap": (None,),
    }  # fmt: skip


def _gpt2_settings(config: GPTConfig) -> dict[str, Any]:
    activation = next(theirs for theirs, ours in _GPT2_ACTIVATIONS.items() if ours == config.activation)
    return {
        "n_positions": config.block_size, "n_layer": config.n_layer, "n_head": config.n_head, "n_embd": config.n_embd,
        "n_inner": config.hidden_width, "activation_function": activation, "layer_norm_epsilon": config.epsilon,
        "resid_pdrop": config.dropout, "embd_pdrop": config.dropout, "attn_pdrop": config.dropout,
    }  # fmt: skip


def _give_gpt2(config: GPTConfig, ours: Weights) -> Weights:
    theirs = {name: w.t() if name.endswith(_CONV1D) else w for name, w in ours.items()}
    if not config.bias:  # GPT-2 has all biases; for a model without they are 0
        for name in list(theirs):
            part = name.removesuffix(".weight")
            if part.endswith(("ln_1", "ln_2", "ln_f", "c_attn", "c_proj", "c_fc")):
                theirs[f"{part}.bias"] = theirs[name].new_zeros(theirs[name].shape[-1])
    if config.tied:
        del theirs["lm_head.weight"]
    return theirs


# ---- Llama and its kin -----------------------------------------------------------------------------------------------

_TOP = {"transformer.wte": "model.embed_tokens", "transformer.ln_f": "model.norm", "lm_head": "lm_head"}
_BLOCK = {
    "ln_1": "input_layernorm", "ln_2": "post_attention_layernorm", "attn.c_proj": "self_attn.o_proj",
    "mlp.c_gate": "mlp.gate_proj", "mlp.c_fc": "mlp.up_proj", "mlp.c_proj": "mlp.down_proj",
}  # fmt: skip
_QKV = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
_QK_NORMS = {"attn.q_norm": "self_attn.q_norm.weight", "attn.k_norm": "self_attn.k_norm.weight"}
_GATES = {"silu": "swiglu", "relu": "relu2"}  # of a gated MLP; relu: only where gate and up are one matrix


def _blocks(config: GPTConfig) -> list[tuple[str, str]]:
    """Returns the prefix of each block, ours and theirs."""
    return [(f"transformer.h.{i}.", f"model.layers.{i}.") for i in range(config.n_layer)]


def _qkv_rows(config: GPTConfig) -> list[int]:
    return [heads * config.head_dim for heads in (config.n_head, config.kv_heads, config.kv_heads)]


def _llama_config(settings: Settings) -> GPTConfig:
    n_head, n_embd = _setting(settings, "num_attention_heads"), _setting(settings, "hidden_size")
    bias = bool(settings.get("attention_bias"))
    _only(settings, partial_rotary_factor=1.0, use_sliding_window=False)
    qk_norm = settings["model_type"] == "qwen3"
    if bias != bool(settings.get("mlp_bias")):  # Qwen3 has no MLP bias, without a setting for it
        raise UserError(
            f"config.json says attention_bias={bias} and mlp_bias={bool(settings.get('mlp_bias'))}; gptfast has biases "
            "in all linear layers or in none; run the model through transformers"
        )
    head_dim = settings.get("head_dim")
    return GPTConfig(
        block_size=_setting(settings, "max_position_embeddings"),
        vocab_size=_setting(settings, "vocab_size"),
        n_layer=_setting(settings, "num_hidden_layers"),
        n_head=n_head,
        n_kv_head=settings.get("num_key_value_heads") or n_head,
        n_embd=n_embd,
        head_size=None if head_dim in (None, n_embd / n_head) else _setting(settings, "head_dim"),
        bias=bias,
        norm="rmsnorm",
        norm_weight=True,
        norm_eps=settings.get("rms_norm_eps"),
        position="rope",
        rope_base=_rope_base(settings),
        activation=_one_of(settings, "hidden_act", "silu", _GATES),
        mlp_width=_setting(settings, "intermediate_size"),
        qk_norm=qk_norm,
        qk_norm_weight=qk_norm,
        tied=settings.get("tie_word_embeddings", False),
    )


def _take_llama(config: GPTConfig, theirs: Weights) -> Weights:
    if config.tied:
        theirs["lm_head.weight"] = theirs["model.embed_tokens.weight"]
    ours = {f"{mine}.weight": theirs.pop(f"{name}.weight") for mine, name in _TOP.items()}
    for mine, block in _blocks(config):
        for kind in ("weight", "bias") if config.bias else ("weight",):
            ours[f"{mine}attn.c_attn.{kind}"] = torch.cat([theirs.pop(f"{block}{name}.{kind}") for name in _QKV])
        if config.qk_norm:
            ours |= {mine + part: theirs.pop(block + name) for part, name in _QK_NORMS.items()}
        if config.activation == "relu2":
            for kind in ("weight", "bias") if config.bias else ("weight",):
                gate = theirs.pop(f"{block}mlp.gate_proj.{kind}")
                if not torch.equal(gate, theirs[f"{block}mlp.up_proj.{kind}"]):
                    raise UserError("its MLP is gated by ReLU; gptfast has only the case of ReLU², gate_proj = up_proj")
        for part, name in _BLOCK.items():
            for kind in ("weight", "bias"):
                if f"{block}{name}.{kind}" in theirs:
                    ours[f"{mine}{part}.{kind}"] = theirs.pop(f"{block}{name}.{kind}")
        theirs.pop(f"{block}self_attn.rotary_emb.inv_freq", None)  # a table, in old files
    return ours


def _llama_needs(config: GPTConfig) -> dict[str, tuple]:
    return _WITHOUT | {
        "position": ("rope",), "norm": ("rmsnorm",), "activation": tuple(_GATES.values()), "qk_norm": (False,),
        "softcap": (None,),
    }  # fmt: skip


def _qwen3_needs(config: GPTConfig) -> dict[str, tuple]:
    return _llama_needs(config) | {"qk_norm": (True,), "bias": (False,), "qk_gain": (config.qk_gain,)}


def _llama_settings(config: GPTConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.block_size, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.kv_heads, "hidden_size": config.n_embd,
        "head_dim": config.head_dim, "intermediate_size": config.hidden_width, "rms_norm_eps": config.epsilon,
        "hidden_act": next(gate for gate, ours in _GATES.items() if ours == config.activation),
        "attention_bias": config.bias, "mlp_bias": config.bias, "attention_dropout": config.dropout,
        "rope_theta": config.rope_base, "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }  # fmt: skip


def _give_llama(config: GPTConfig, ours: Weights) -> Weights:
    ones = torch.ones(config.n_embd)
    theirs = {f"{name}.weight": ours.get(f"{mine}.weight", ones) for mine, name in _TOP.items()}
    if config.tied:
        del theirs["lm_head.weight"]
    for mine, block in _blocks(config):
        for kind in ("weight", "bias") if config.bias else ("weight",):
            parts = ours[f"{mine}attn.c_attn.{kind}"].split(_qkv_rows(config))
            theirs |= {f"{block}{name}.{kind}": part for name, part in zip(_QKV, parts, strict=True)}
            for part, name in _BLOCK.items():
                source = "mlp.c_fc" if part == "mlp.c_gate" and config.activation == "relu2" else part
                if f"{mine}{source}.{kind}" in ours:
                    theirs[f"{block}{name}.{kind}"] = ours[f"{mine}{source}.{kind}"]
        for norm in ("input_layernorm", "post_attention_layernorm"):
            theirs.setdefault(f"{block}{norm}.weight", ones)
        if config.qk_norm:
            ones_of_a_head, gain = torch.ones(config.head_dim), config.qk_gain
            theirs |= {block + name: ours.get(mine + part, ones_of_a_head) * gain for part, name in _QK_NORMS.items()}
    return theirs


# ---- nanochat, as transformers keeps it ------------------------------------------------------------------------------


def _nanochat_config(settings: Settings) -> GPTConfig:
    n_head, n_embd = _setting(settings, "num_attention_heads"), _setting(settings, "hidden_size")
    _only(
        settings, head_dim=n_embd // n_head, attention_bias=False, hidden_act="relu2", tie_word_embeddings=False,
    )  # fmt: skip
    return GPTConfig(
        block_size=_setting(settings, "max_position_embeddings"),
        vocab_size=_setting(settings, "vocab_size"),
        n_layer=_setting(settings, "num_hidden_layers"),
        n_head=n_head,
        n_kv_head=settings.get("num_key_value_heads") or n_head,
        n_embd=n_embd,
        bias=False,
        norm="rmsnorm",
        norm_eps=settings.get("rms_norm_eps"),
        position="rope",
        rope_base=_rope_base(settings),
        activation="relu2",
        mlp_width=_setting(settings, "intermediate_size"),
        qk_norm=True,
        tied=False,
        softcap=settings.get("final_logit_softcapping", 15.0),
        embedding_norm=True,
        rope_sign=-1,
    )


_NANOCHAT_BLOCK = {"attn.c_proj": "self_attn.o_proj", "mlp.c_fc": "mlp.fc1", "mlp.c_proj": "mlp.fc2"}


def _take_nanochat(config: GPTConfig, theirs: Weights) -> Weights:
    ours = {
        "transformer.wte.weight": theirs.pop("model.embed_tokens.weight"),
        "lm_head.weight": theirs.pop("lm_head.weight"),
    }
    for mine, block in _blocks(config):
        ours[f"{mine}attn.c_attn.weight"] = torch.cat([theirs.pop(f"{block}{name}.weight") for name in _QKV])
        for part, name in _NANOCHAT_BLOCK.items():
            ours[f"{mine}{part}.weight"] = theirs.pop(f"{block}{name}.weight")
    return ours


def _nanochat_needs(config: GPTConfig) -> dict[str, tuple]:
    return _WITHOUT | {
        "position": ("rope",), "norm": ("rmsnorm",), "norm_weight": (False,), "bias": (False,), "tied": (False,),
        "activation": ("relu2",), "qk_norm": (True,), "qk_norm_weight": (False,), "embedding_norm": (True,),
        "rope_sign": (1, -1), "head_size": (None, config.n_embd // config.n_head),
    }  # fmt: skip


def _nanochat_settings(config: GPTConfig) -> dict[str, Any]:
    return {
        "max_position_embeddings": config.block_size, "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head, "num_key_value_heads": config.kv_heads, "hidden_size": config.n_embd,
        "intermediate_size": config.hidden_width, "rms_norm_eps": config.epsilon, "hidden_act": "relu2",
        "attention_bias": False, "attention_dropout": config.dropout, "final_logit_softcapping": config.softcap,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_base},
    }  # fmt: skip


def _give_nanochat(config: GPTConfig, ours: Weights) -> Weights:
    theirs = {
        "model.embed_tokens.weight": ours["transformer.wte.weight"], "lm_head.weight": ours["lm_head.weight"],
    }  # fmt: skip
    for mine, block in _blocks(config):
        q, k, v = ours[f"{mine}attn.c_attn.weight"].split(_qkv_rows(config))
        if config.rope_sign == 1:
            q, k = halves_swapped(q, config), halves_swapped(k, config)
        theirs |= {f"{block}{name}.weight": part for name, part in zip(_QKV, (q, k, v), strict=True)}
        theirs |= {f"{block}{name}.weight": ours[f"{mine}{part}.weight"] for part, name in _NANOCHAT_BLOCK.items()}
    return theirs


def halves_swapped(w: Tensor, config: GPTConfig) -> Tensor:
    """Returns rows (heads · D, C) with the two halves of every head swapped."""
    return w.view(-1, 2, config.head_dim // 2, config.n_embd).flip(1).reshape(w.shape)


LAYOUTS = {
    layout.name: layout
    for layout in (
        Layout("gpt2", "GPT2LMHeadModel", _gpt2_config, _take_gpt2, _gpt2_needs, _gpt2_settings, _give_gpt2),
        Layout("llama", "LlamaForCausalLM", _llama_config, _take_llama, _llama_needs, _llama_settings, _give_llama),
        Layout("qwen3", "Qwen3ForCausalLM", _llama_config, _take_llama, _qwen3_needs, _llama_settings, _give_llama),
        Layout(
            "nanochat",
            "NanoChatForCausalLM",
            _nanochat_config,
            _take_nanochat,
            _nanochat_needs,
            _nanochat_settings,
            _give_nanochat,
        ),
    )
}
