"""The GPT: one class whose config selects the GPT-2 or the modern architecture; `ops` has the hot operations.

Weights are kept in fp32. Activations have one explicit dtype: each layer casts its weight to the dtype of its input,
and there is no autocast. The model knows nothing of ranks; gptfast.parallel wraps it from outside.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any, NamedTuple, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from kernels import Ops
from kernels.op import traced

from .config import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig
from .errors import UserError

IGNORED = -1  # a target that does not count in the loss


class Cache(Protocol):
    """The interface of a cache: the keys, values and activations of earlier tokens, by row.

    A forward pass begins with `place`. Then all rows go through the model as one sequence, (1, B * T, ...).
    """

    def place(self, T: int) -> Tensor:
        """Reserves room for the next T tokens of every row; returns their positions (B, T) int64."""

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Stores k and v (1, B * T, G, D); returns causal attention of q (1, B * T, H, D) to all stored, like q."""

    def previous(self, place: int, x: Tensor, taps: int) -> Sequence[Tensor]:
        """Stores x (1, B * T, C), input number `place` of a shift or smear; returns it 1 ... `taps` tokens earlier."""


class Documents(NamedTuple):
    """Documents packed one after another into one sequence, (1, S), each of which attends to itself alone."""

    cu_seqlens: Tensor  # (N + 1,) int: the start of each, and the end of the last
    position: Tensor  # (S,) int64: position of each token in its document
    longest: int  # upper bound of a document's length

    @staticmethod
    def at(cu_seqlens: Tensor, S: int, longest: int) -> Documents:
        """Returns the documents that start at `cu_seqlens` in S tokens. On a CPU raises ValueError above `longest`."""
        index = torch.arange(S, device=cu_seqlens.device)
        position = index - cu_seqlens[torch.bucketize(index, cu_seqlens[1:], right=True)]
        if position.device.type == "cpu" and not traced() and S and position.max() >= longest:
            raise ValueError(f"cu_seqlens: a document of {int(position.max()) + 1} tokens, but block_size is {longest}")
        return Documents(cu_seqlens, position, longest)


class Linear(nn.Linear):
    """x @ weight^T + bias in x's dtype, whatever the dtype of the weight."""

    def forward(self, x: Tensor, with_bias: bool = True) -> Tensor:
        bias = self.bias if with_bias else None
        return F.linear(x, self.weight.to(x.dtype), None if bias is None else bias.to(x.dtype))


class Gate(nn.Linear):
    """sigmoid(x[..., :channels] @ weight^T) in x's dtype. It is so small that decoding does not quantize its weight."""

    def __init__(self, channels: int, gates: int) -> None:
        super().__init__(channels, gates, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return torch.sigmoid(F.linear(x[..., : self.in_features], self.weight.to(x.dtype)))


class Norm(nn.Module):
    """LayerNorm with an optional bias, or RMSNorm with an optional weight."""

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.ops = ops
        self.layernorm, self.epsilon = config.norm == "layernorm", config.epsilon
        weight, bias = self.layernorm or config.norm_weight, self.layernorm and config.bias
        self.register_parameter("weight", nn.Parameter(torch.ones(config.n_embd)) if weight else None)
        self.register_parameter("bias", nn.Parameter(torch.zeros(config.n_embd)) if bias else None)

    def forward(self, x: Tensor, update: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """Returns (norm(h), h) with h = x + update: the residual sum and its norm in one pass over memory."""
        ops = self.ops
        if self.layernorm:
            parameters = self.weight, self.bias, self.epsilon
            return (ops.layernorm(x, *parameters), x) if update is None else ops.add_layernorm(update, x, *parameters)
        parameters = self.weight, self.epsilon
        return (ops.rmsnorm(x, *parameters), x) if update is None else ops.add_rmsnorm(update, x, *parameters)


class Shift(nn.Module):
    """y[t] = x[t] + sum_i weight[i - 1] * x[t - i] for i = 1 ... taps, channel by channel.

    The token shift of RWKV (Peng et al., arXiv:2305.13048), a causal depthwise convolution that starts as the identity.
    """

    def __init__(self, config: GPTConfig, taps: int, place: int) -> None:
        super().__init__()
        self.weight, self.place = nn.Parameter(torch.zeros(taps, config.n_embd)), place

    def forward(self, x: Tensor, cache: Cache | None = None, documents: Documents | None = None) -> Tensor:
        taps, y = len(self.weight), x
        previous = shifted(x, taps) if cache is None else cache.previous(self.place, x, taps)
        for i, (before, w) in enumerate(zip(previous, self.weight.to(x.dtype), strict=True), 1):
            if documents is not None:
                before = before.masked_fill((documents.position < i)[:, None], 0.0)
            y = torch.addcmul(y, before, w)
        return y


def shifted(x: Tensor, taps: int) -> list[Tensor]:
    """Returns x (B, T, C) shifted right by 1 ... `taps` positions, with zeros at the start."""
    T = x.shape[1]
    return [F.pad(x, (0, 0, i, -i)) if i < T else torch.zeros_like(x) for i in range(1, taps + 1)]


class NoShift(nn.Module):
    """The identity, in place of a Shift."""

    def forward(self, x: Tensor, cache: Cache | None = None, documents: Documents | None = None) -> Tensor:
        return x


class Attention(nn.Module):
    """Causal self-attention over heads of a fused projection; q, k and v stay views of it unless they are changed.

    Where none of them is, as in GPT-2, attention takes the projection whole and makes its gradient whole.
    """

    def __init__(self, config: GPTConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.config, self.ops, self.layer, self.window = config, ops, layer, config.windows[layer]
        width = (config.n_head + 2 * config.kv_heads) * config.head_dim
        self.c_attn = Linear(config.n_embd, width, bias=config.bias)
        self.c_proj = Linear(config.attention_width, config.n_embd, bias=config.bias)
        for name in ("q_norm", "k_norm"):
            weight = nn.Parameter(torch.ones(config.head_dim)) if config.qk_norm_weight else None
            self.register_parameter(name, weight)
        self.ve_gate = Gate(VALUE_GATE_CHANNELS, config.kv_heads) if layer in config.value_layers else None

    def forward(
        self,
        x: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: Cache | None = None,
        documents: Documents | None = None,
        values: Tensor | None = None,
    ) -> Tensor:
        """Returns (B, T, C), like x. `values` (B, T, G · D): the tokens' value embeddings, in a layer that has them."""
        config, ops = self.config, self.ops
        B, T = x.shape[:2]
        H, G = config.n_head, config.kv_heads
        qkv = self.c_attn(x).view(B, T, H + 2 * G, config.head_dim)
        if cache is None and rotation is None and values is None and not config.qk_norm:
            return self._projected(self._attended((qkv,), documents, heads=H))
        q, k, v = qkv.split((H, G, G), dim=2)
        in_rotary = rotation is not None and not config.qk_norm_weight  # whose norm takes no weight
        if config.qk_norm and not in_rotary:
            q, k = ops.rmsnorm(q, self.q_norm, config.qk_epsilon), ops.rmsnorm(k, self.k_norm, config.qk_epsilon)
        if rotation is not None:
            normalized = config.qk_norm and in_rotary
            q, k = ops.rotary(q, k, *rotation, qk_norm=normalized, eps=config.qk_epsilon, scale=config.qk_gain)
        elif config.qk_gain != 1.0:
            q, k = q * config.qk_gain, k * config.qk_gain
        if values is not None:
            assert self.ve_gate is not None
            v = torch.addcmul(v, (3.0 * self.ve_gate(x))[..., None], values.view(B, T, G, config.head_dim))
        if cache is not None:
            return self._projected(cache.attend(self.layer, q, k, v))
        return self._projected(self._attended((q, k, v), documents))

    def _attended(self, operands: tuple[Tensor, ...], documents: Documents | None, heads: int | None = None) -> Tensor:
        """Returns (B, T, H, D): causal attention of q, k and v, or of the projection that holds them for `heads`."""
        cu_seqlens = None if documents is None else documents.cu_seqlens
        if documents is None:
            window = narrowed(self.window, operands[0].shape[1])
        else:  # a window that hides nothing; with it the reference computes and stores far less
            longest = documents.longest - 1
            window = longest if self.window is None else min(longest, self.window)
        return self.ops.attention(
            *operands, heads=heads, causal=True, window=window, cu_seqlens=cu_seqlens, dropout=self._dropout()
        )

    def _projected(self, out: Tensor) -> Tensor:
        """Returns (B, T, C) from attention's (B, T, H, D)."""
        out, dropout = self.c_proj(out.flatten(2)), self._dropout()
        return F.dropout(out, dropout) if dropout else out

    def _dropout(self) -> float:
        return self.config.dropout if self.training else 0.0


def narrowed(window: int | None, T: int) -> int | None:
    """Returns the window, or None where it hides nothing from T positions: attention without one may be faster."""
    return None if window is None or window >= T - 1 else window


class MLP(nn.Module):
    """Two linear layers with a wider hidden one; with swiglu, a third layer gates it (Shazeer, arXiv:2002.05202).

    An activation kernel also adds the first layer's bias, so that the bias gradient needs no pass of its own.
    """

    def __init__(self, config: GPTConfig, ops: Ops) -> None:
        super().__init__()
        self.dropout, self.ops, self.kind = config.dropout, ops, config.activation
        self.fuses_bias = ops.chosen["activation"][0] != "reference"
        self.c_fc = Linear(config.n_embd, config.hidden_width, bias=config.bias)
        if config.activation == "swiglu":
            self.c_gate = Linear(config.n_embd, config.hidden_width, bias=config.bias)
        self.c_proj = Linear(config.hidden_width, config.n_embd, bias=config.bias)

    def forward(self, x: Tensor) -> Tensor:
        gate, gate_bias = self._widen(self.c_gate, x) if self.kind == "swiglu" else (None, None)
        out = self.c_proj(self.ops.activation(*self._widen(self.c_fc, x), gate, gate_bias, self.kind))
        return F.dropout(out, self.dropout) if self.training and self.dropout else out

    def _widen(self, layer: nn.Module, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Returns the layer's product with x, and the bias if it is still to be added."""
        if self.fuses_bias and isinstance(layer, Linear):
            return layer(x, with_bias=False), layer.bias
        return layer(x), None


class Block(nn.Module):
    """Attention and MLP, each after a norm.

    The residual stream x and its last update are passed in and returned unsummed: the next norm adds them.
    """

    def __init__(self, config: GPTConfig, ops: Ops, layer: int) -> None:
        super().__init__()
        self.ln_1, self.attn = Norm(config, ops), Attention(config, ops, layer)
        self.ln_2, self.mlp = Norm(config, ops), MLP(config, ops)
        places = 2 * layer + 1, 2 * layer + 2
        shift = config.token_shift and config.block_shift
        self.shift_1, self.shift_2 = (Shift(config, 1, place) if shift else NoShift() for place in places)

    def forward(
        self,
        x: Tensor,
        update: Tensor | None,
        rotation: tuple[Tensor, Tensor] | None,
        cache: Cache | None = None,
        documents: Documents | None = None,
        values: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        y, x = self.ln_1(x, update)
        y, x = self.ln_2(x, self.attn(self.shift_1(y, cache, documents), rotation, cache, documents, values))
        return x, self.mlp(self.shift_2(y, cache, documents))


LARGEST_TABLE = 2**24  # rotary tables up to this size are accepted regardless of the weights


class GPT(nn.Module):
    """A decoder-only transformer. `dtype` is the dtype of the activations; the parameters are fp32.

    Parameters are named as in nanoGPT and Hugging Face's GPT-2: transformer.wte, transformer.h.0.attn.c_attn, lm_head.
    """

    def __init__(self, config: GPTConfig, ops: Ops, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config, self.ops, self.dtype = config, ops, dtype
        self.transformer = nn.ModuleDict({"wte": nn.Embedding(config.vocab_size, config.n_embd)})
        if config.position == "learned":
            self.transformer["wpe"] = nn.Embedding(config.block_size, config.n_embd)
        self.transformer["shift"] = Shift(config, 2, place=0) if config.token_shift else NoShift()
        self.transformer["h"] = nn.ModuleList(Block(config, ops, layer) for layer in range(config.n_layer))
        self.transformer["ln_f"] = Norm(config, ops)
        self.lm_head = Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer["wte"].weight = self.lm_head.weight
        width = config.kv_heads * config.head_dim
        tables = {str(layer): nn.Embedding(config.vocab_size, width) for layer in config.value_layers}
        self.value_embeds = nn.ModuleDict(tables)
        self.smear_gate = Gate(SMEAR_GATE_CHANNELS, 1) if config.smear else None
        self._scalars("resid_lambdas", config.n_layer, 1.0, there=config.residual_scalars)
        self._scalars("x0_lambdas", config.n_layer, 0.0, there=config.residual_scalars)
        self._scalars("smear_lambda", 1, 0.0, there=config.smear)
        self._scalars("backout_lambda", 1, 0.0, there=config.backout)
        self._set_rotation()
        self.init_weights()

    def _scalars(self, name: str, count: int, neutral: float, *, there: bool) -> None:
        """Registers a parameter (count,) with the value at which it has no effect, or None."""
        self.register_parameter(name, nn.Parameter(torch.full((count,), neutral)) if there else None)

    @torch.no_grad()
    def init_weights(self) -> None:
        """Initializes as GPT-2: N(0, 0.02), biases 0; projections into the residual stream smaller by sqrt(2L).

        Draws in nanoGPT's order, a tied head twice, so that equal seeds give equal weights. The config may ask for
        nanochat's initialization instead.
        """
        if self.config.initialization == "nanochat":
            self._init_as_nanochat()
            return
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Embedding)):
                module.weight.normal_(0.0, 0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                module.bias.zero_()
        for name, p in self.named_parameters():
            if name.endswith("c_proj.weight"):
                p.normal_(0.0, 0.02 / math.sqrt(2 * self.config.n_layer))

    def _init_as_nanochat(self) -> None:
        """Initializes as nanochat: embedding N(0, 0.8), head N(0, 0.001), projections into the residual stream 0, other
        matrices uniform with deviation 1 / sqrt(C), the MLP's first 0.4 of that; gates uniform up to 0.02; biases 0.

        The stream's factor falls from 1.15 in the first layer to 1.05 in the last, the embedding's from 0.2 to 0.05.
        """
        L, bound = self.config.n_layer, (3.0 / self.config.n_embd) ** 0.5
        for name, p in self.named_parameters():
            if name.endswith("_gate.weight") and not name.endswith("c_gate.weight"):
                p.uniform_(0.0, 0.02)
            elif name.endswith(("c_proj.weight", "bias")):
                p.zero_()
            elif name.endswith(("wte.weight", "wpe.weight")):
                p.normal_(0.0, 0.8)
            elif name.endswith("lm_head.weight"):
                p.normal_(0.0, 0.001)
            elif name.endswith(("c_fc.weight", "c_gate.weight")):
                p.uniform_(-0.4 * bound, 0.4 * bound)
            elif name.endswith("c_attn.weight") or name.startswith("value_embeds"):
                p.uniform_(-bound, bound)
            elif name == "resid_lambdas":
                p.copy_(torch.linspace(1.15, 1.05 if L > 1 else 1.15, L))
            elif name == "x0_lambdas":
                p.copy_(torch.linspace(0.20, 0.05 if L > 1 else 0.20, L))
            elif name == "backout_lambda":
                p.fill_(0.2)

    def _set_rotation(self) -> None:
        """Stores cos and sin (T, D/2) fp32 of RoPE's angles, position * base^(-2i / D); empty for learned positions."""
        rope, D = self.config.position == "rope", self.config.head_dim
        frequency = self.config.rope_base ** (torch.arange(0, D, 2, dtype=torch.float64) / -D)
        angle = torch.arange(self.config.block_size if rope else 0, dtype=torch.float64)[:, None] * frequency
        angle = angle * self.config.rope_sign
        device = self.lm_head.weight.device
        self.register_buffer("cos", angle.cos().to(device, torch.float32), persistent=False)
        self.register_buffer("sin", angle.sin().to(device, torch.float32), persistent=False)

    def forward(
        self, tokens: Tensor, targets: Tensor, cu_seqlens: Tensor | None = None, *, reduction: str = "mean"
    ) -> Tensor:
        """Returns the mean cross-entropy () fp32 of tokens (B, T) against targets (B, T) int64, ignoring targets of -1.

        `reduction`: mean, or sum over the targets that count. `cu_seqlens` as in `hidden`. Raises ValueError where
        targets have another shape.
        """
        for name, ids in (("tokens", tokens), ("targets", targets)):
            if not isinstance(ids, Tensor):
                raise ValueError(f"{name}: expected a tensor (B, T), got {ids!r:.80}")
        if targets.shape != tokens.shape:
            raise ValueError(
                f"targets: expected the shape of tokens, {tuple(tokens.shape)}, got {tuple(targets.shape)}"
            )
        x = self.hidden(tokens, cu_seqlens=cu_seqlens)
        weight = self.lm_head.weight.to(x.dtype)
        return self.ops.linear_cross_entropy(
            x.view(-1, x.shape[-1]), weight, targets.reshape(-1), ignore_index=IGNORED, softcap=self.config.softcap,
            reduction=reduction,
        )  # fmt: skip

    def logits(self, tokens: Tensor, last_only: bool = False, cache: Cache | None = None) -> Tensor:
        """Returns logits (B, T, V), or (B, 1, V) of the last position, for tokens (B, T) int64; `cache` as in `hidden`.

        They have the dtype of the activations; with a softcap, at least fp32.
        """
        x = self.hidden(tokens, cache)
        return self.logits_of(x[:, -1:] if last_only else x)

    def logits_of(self, x: Tensor) -> Tensor:
        """Returns the logits (..., V) of x (..., C), the output of `hidden`."""
        z, softcap = self.lm_head(x), self.config.softcap
        if softcap is None:
            return z
        return softcap * torch.tanh(z.to(torch.promote_types(z.dtype, torch.float32)) / softcap)

    def hidden(self, tokens: Tensor, cache: Cache | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
        """Returns the normalized residual stream (B, T, C), the head's input, for tokens (B, T) int64.

        With a cache, the tokens continue its rows; the cache checks its capacity, and its owner advances it.
        `cu_seqlens` (N + 1,) int32 holds the starts of N documents in tokens.flatten() and the end of the last: each is
        computed as if alone, with positions from 0; none may be longer than block_size. Raises ValueError if
        T > block_size.
        """
        if tokens.dim() != 2 or tokens.is_floating_point():
            raise ValueError(f"tokens: expected ids (B, T), got {tokens.dtype}{tuple(tokens.shape)}")
        B, T = tokens.shape
        if cache is None and T > self.config.block_size:
            raise ValueError(f"tokens: {T} positions, but block_size is {self.config.block_size}")
        positions: slice | Tensor = slice(T)
        documents = None
        if cu_seqlens is not None:
            documents = Documents.at(cu_seqlens, B * T, self.config.block_size)
            tokens, positions = tokens.reshape(1, B * T), documents.position
        if cache is not None:  # rows are at different positions, so every token has its own
            tokens, positions = tokens.reshape(1, B * T), cache.place(T).flatten()
        x, rotation = self.transformer["wte"](tokens), None
        if self.config.position == "learned":
            wpe = self.transformer["wpe"]  # F.embedding's backward sums in a fixed order; indexing's need not
            x = x + (wpe.weight[positions] if documents is None else wpe(positions))
        else:
            rotation = self.cos[positions], self.sin[positions]
        x = x.to(self.dtype)
        if self.config.embedding_norm:
            x = self.ops.rmsnorm(x, None, self.config.qk_epsilon)
        x = self._smeared(self.transformer["shift"](x, cache, documents), cache, documents)
        if self.training and self.config.dropout:
            x = F.dropout(x, self.config.dropout)
        x, update = self._through_blocks(x, tokens, rotation, cache, documents)
        return self.transformer["ln_f"](x, update)[0].view(B, T, self.config.n_embd)

    def _smeared(self, x: Tensor, cache: Cache | None, documents: Documents | None) -> Tensor:
        """Returns x plus a gated part of the previous token's embedding, if the config has the smear."""
        if self.smear_gate is None:
            return x
        place = self.config.smear_place
        (before,) = shifted(x, 1) if cache is None else cache.previous(place, x, 1)
        if documents is not None:
            before = before.masked_fill((documents.position < 1)[:, None], 0.0)
        return torch.addcmul(x, self.smear_lambda.to(x.dtype) * self.smear_gate(x), before)

    def _through_blocks(
        self,
        x: Tensor,
        tokens: Tensor,
        rotation: tuple[Tensor, Tensor] | None,
        cache: Cache | None,
        documents: Documents | None,
    ) -> tuple[Tensor, Tensor | None]:
        """Returns the residual stream after all blocks and its last update, unsummed."""
        embedding, middle, update = x, None, None
        blocks: Any = self.transformer["h"]
        for layer, block in enumerate(blocks):
            if self.resid_lambdas is not None:
                x, update = x if update is None else x + update, None
                x = self.resid_lambdas[layer] * x + self.x0_lambdas[layer] * embedding
            values = None
            if str(layer) in self.value_embeds:
                values = self.value_embeds[str(layer)](tokens).to(self.dtype)
            x, update = block(x, update, rotation, cache, documents, values)
            if self.backout_lambda is not None and layer == self.config.n_layer // 2:
                x, update = x + update, None
                middle = x
        if middle is not None:
            x, update = x if update is None else x + update, None
            x = x - self.backout_lambda.to(x.dtype) * middle
        return x, update

    def num_params(self, non_embedding: bool = True) -> int:
        """Counts parameters, a tied head once; `non_embedding` leaves out the position embedding, as nanoGPT does."""
        total = sum(p.numel() for p in self.parameters())
        wpe = self.transformer["wpe"].weight.numel() if self.config.position == "learned" else 0
        return total - wpe if non_embedding else total

    @classmethod
    def of(
        cls, config: GPTConfig, weights: dict[str, Tensor], ops: Ops, dtype: torch.dtype = torch.float32, *, where: str
    ) -> GPT:
        """Builds the model of `config` on the CPU with copies of these weights.

        Sizes are checked against the weights before memory is allocated. Raises UserError, which names `where`, for
        weights that are missing, unknown, of another shape, or not finite.
        """
        _check_weights(config, weights, ops, where)
        model = cls(config, ops, dtype)
        model.load_state_dict(weights)
        return model

    def crop_block_size(self, block_size: int) -> None:
        """Shortens the context of pretrained weights. Raises UserError if it would grow."""
        if block_size > self.config.block_size:
            raise UserError(f"block_size cannot grow from {self.config.block_size} to {block_size}; give a smaller one")
        self.config = dataclasses.replace(self.config, block_size=block_size)
        if self.config.position == "learned":
            wpe = self.transformer["wpe"]
            wpe.weight, wpe.num_embeddings = nn.Parameter(wpe.weight.detach()[:block_size].clone()), block_size
        self._set_rotation()


def _check_weights(config: GPTConfig, weights: dict[str, Tensor], ops: Ops, where: str) -> None:
    """Raises UserError unless these are exactly the weights of such a model, and finite."""

    def refuse(reason: str) -> UserError:
        return UserError(f"the weights in {where} do not fit its config: {reason}; fetch it again, or train another")

    total = sum(w.numel() for w in weights.values())
    if config.n_layer > len(weights):
        raise refuse(f"there are {len(weights)} tensors for {config.n_layer} layers")
    if config.block_size * config.head_dim > max(LARGEST_TABLE, total):  # size of the rotary tables
        raise refuse(f"block_size is {config.block_size}, and all weights have {total:,} numbers")
    with torch.device("meta"):
        expected = GPT(config, ops).state_dict()
    for reason, names in (
        ("there is no", expected.keys() - weights.keys()), ("it has no place for", weights.keys() - expected.keys())
    ):  # fmt: skip
        if names:
            raise refuse(f"{reason} {', '.join(sorted(names)[:3])}{f' ({len(names)} in all)' * (len(names) > 3)}")
    for name, shape in ((name, tuple(tensor.shape)) for name, tensor in expected.items()):
        w = weights[name]
        if tuple(w.shape) != shape or not w.is_floating_point():
            raise refuse(f"{name} is {tuple(w.shape)} {str(w.dtype).removeprefix('torch.')}, not {shape} of floats")
        if not w.float().sum().isfinite() and not w.float().isfinite().all():  # the sum is fast, but may overflow
            raise UserError(f"{where} has weights that are no numbers, the first in {name}; use an older checkpoint")
