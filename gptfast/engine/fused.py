"""A step of a model over a cache in five launches a layer: what decoding does where kernels are launched.

    x = embedding
    per layer: qkv = linear(norm(x)); a = append_attention(qkv, cache); x += linear(a)
               h = activation(linear(norm(x))); x += linear(h)
    logits = linear(norm(x))

Each line is one launch of decode_linear or append_attention, which do what stands around the product.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from gptfast.engine.cache import KVCache
from gptfast.engine.weights import Int8Linear
from gptfast.model import GPT, Linear, Norm
from kernels.decode_linear import MOST_ROWS

LAUNCHED = ("triton", "interpret", "columns")
OPS_OF_A_STEP = ("decode_embedding", "decode_linear", "append_attention")
MATRICES = ("c_attn", "c_proj", "c_fc", "c_gate", "lm_head")
LARGEST_HEAD = 256  # numbers of a head for which attention has kernels


def fits(model: GPT) -> bool:
    """Whether a step of `model` can go by few launches: where kernels are launched, for a block as above.

    Its matrices must be as `converted` leaves them for kernels: in the dtype of the activations, or in int8.
    """
    ops, config = model.ops.chosen, model.config
    launched = all(ops.get(name, ("", ""))[0] in LAUNCHED for name in OPS_OF_A_STEP)
    between = config.value_embeddings or config.residual_scalars or config.smear or config.backout
    shifts = config.token_shift and config.block_shift
    if not launched or between or shifts or config.qk_gain != 1.0 or config.head_dim > LARGEST_HEAD:
        return False
    matrices = [m for name, m in model.named_modules() if name.split(".")[-1] in MATRICES]
    return all(isinstance(m, Int8Linear) or (type(m) is Linear and m.weight.dtype == model.dtype) for m in matrices)


class FusedStep:
    """`model` over `cache`, tokens (slots, T) -> logits (slots, T, V), as model.logits(tokens, cache=cache)."""

    def __init__(self, model: GPT, cache: KVCache) -> None:
        self.model, self.cache = model, cache
        most = cache.slots * model.config.kv_heads * MOST_ROWS  # blocks of queries that share a key head
        self.counts = torch.zeros(most, dtype=torch.int32, device=cache.lengths.device)

    def __call__(self, tokens: Tensor) -> Tensor:
        model, cache, config = self.model, self.cache, self.model.config
        (B, T), linear = tokens.shape, model.ops.decode_linear
        if B * T > MOST_ROWS:
            return model.logits(tokens, cache=cache)
        x = self._embedded(tokens)
        heads = B, T, config.n_head + 2 * config.kv_heads, config.head_dim
        blocks: Any = model.transformer["h"]
        for layer, block in enumerate(blocks):
            mlp, attention = block.mlp, block.attn
            qkv = linear(x, **_matrix(attention.c_attn), **_norm(block.ln_1))
            out = self._attended(layer, attention, qkv.view(heads))
            x = linear(out.view(B * T, -1), **_matrix(attention.c_proj), residual=x)
            gate = _matrix(mlp.c_gate, "gate") if config.activation == "swiglu" else {}
            h = linear(x, **_matrix(mlp.c_fc), **_norm(block.ln_2), **gate, activation=config.activation)
            x = linear(h, **_matrix(mlp.c_proj), residual=x)
        norm: Any = model.transformer["ln_f"]
        dtype = None if config.softcap is None else torch.float32
        logits = linear(x, **_matrix(model.lm_head), **_norm(norm), softcap=config.softcap, dtype=dtype)
        return logits.view(B, T, -1)

    def _embedded(self, tokens: Tensor) -> Tensor:
        """The stream (B * T, C) that the first block reads."""
        model, cache = self.model, self.cache
        parts: Any = model.transformer
        positions = (parts["wpe"].weight, cache.lengths) if model.config.position == "learned" else (None, None)
        x = model.ops.decode_embedding(parts["wte"].weight, tokens, *positions, model.dtype)
        if model.config.embedding_norm:
            x = model.ops.rmsnorm(x, None, model.config.qk_epsilon)
        if model.config.token_shift:
            cache.place(tokens.shape[1])
            x = parts["shift"](x.view(1, -1, x.shape[-1]), cache)
        return x.view(-1, x.shape[-1])

    def _attended(self, layer: int, attention: nn.Module, qkv: Tensor) -> Tensor:
        """The layer's new keys and values into the cache; attention (B, T, H, D) to all of it."""
        model, cache, config = self.model, self.cache, self.model.config
        rotation = (model.cos, model.sin) if config.position == "rope" else (None, None)
        scales = (cache.k_scale[layer], cache.v_scale[layer]) if cache.k_scale[layer].numel() else (None, None)
        return model.ops.append_attention(
            qkv, cache.k[layer], cache.v[layer], cache.lengths, cache.table_of(layer), *scales,
            *rotation, attention.q_norm, attention.k_norm, self.counts, config.qk_norm, config.qk_epsilon,
            config.windows[layer],
        )  # fmt: skip


def step_of(model: GPT, cache: KVCache) -> Callable[[Tensor], Tensor]:
    """The quickest way from tokens (slots, T) to logits (slots, T, V) of `model` over `cache`."""
    return FusedStep(model, cache) if fits(model) else lambda tokens: model.logits(tokens, cache=cache)


def _matrix(linear: Any, name: str = "weight") -> dict[str, Tensor | None]:
    """A layer's matrix as decode_linear takes it, with its bias, and its scales if it is in int8."""
    bias, scale = ("bias", "scale") if name == "weight" else (f"{name}_bias", f"{name}_scale")
    return {name: linear.weight, bias: linear.bias, scale: linear.scale if isinstance(linear, Int8Linear) else None}


def _norm(norm: Norm) -> dict[str, Any]:
    """A norm as decode_linear takes it."""
    kind = "layernorm" if norm.layernorm else "rmsnorm"
    return dict(norm=kind, norm_weight=norm.weight, norm_bias=norm.bias, eps=norm.epsilon)
