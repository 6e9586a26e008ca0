"""What our ops are timed beside: the one list of others' code, by op.

`PEERS[op][name]` takes the arguments of the op. What needs a package that is not installed, or a kind of device that is
not there, is left out by `of`; `versions` says which packages took part. A name says which code ran, so two names never
stand for the same kernels of the same library: `sdpa` is what torch chooses by itself, `sdpa cudnn` is cuDNN and no
other. cuDNN's version is in the software of every row.
"""

from __future__ import annotations

import contextlib
import functools
import importlib.metadata
import importlib.util
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from kernels import Ops, load
from kernels.attention.reference import operands
from kernels.op import Op, require

Function = Callable[..., Any]


@dataclass(frozen=True)
class Peer:
    """Others' code for an op, and what it needs."""

    run: Function
    package: str | None = None  # the module that must be importable
    distribution: str | None = None  # the package as installers name it
    on: tuple[str, ...] = ("cpu", "cuda")  # kinds of device
    compiles: bool = False  # whether it is torch.compile'd code, which --no-compile leaves out
    there: bool = True  # whether this version of torch has it

    def can_run(self, device: torch.device, compiled: bool) -> bool:
        installed = self.package is None or importlib.util.find_spec(self.package) is not None
        return self.there and installed and device.type in self.on and (compiled or not self.compiles)


def of(op: str, device: torch.device, compiled: bool = True) -> dict[str, Function]:
    """The peers of an op that can run here, by name. Without `compiled` none that compiles itself."""
    return {name: peer.run for name, peer in PEERS.get(op, {}).items() if peer.can_run(device, compiled)}


OURS = ("triton", "gluon", "columns", "cpu", "reference")  # names of our own implementations in rows; others are peers'
# What people write for an op without kernels of their own is its reference, but torch's fused operator for attention,
# whose reference holds T x S scores for every head: at T = 16k no GPU's memory does.
IN_TORCH = {"attention": "cpu"}


def in_torch(op: Op) -> Function:
    """An op as people write it in plain torch."""
    return op.cpu if IN_TORCH.get(op.name) == "cpu" and op.cpu is not None else op.reference


def ops_in_torch() -> Ops:
    """All ops as people write them in plain torch."""
    return load("reference", **IN_TORCH)


def version(op: str, name: str) -> str | None:
    """The version of the package that a peer of an op comes from; None for torch itself and for what is ours."""
    peer = PEERS.get(op, {}).get(name)
    if peer is None or peer.distribution is None:
        return None
    with contextlib.suppress(importlib.metadata.PackageNotFoundError):
        return importlib.metadata.version(peer.distribution)
    return None


def absent() -> list[str]:
    """The packages of peers that are not installed here."""
    wanted = {peer.package: peer.distribution for peers in PEERS.values() for peer in peers.values() if peer.package}
    return sorted(str(name) for package, name in wanted.items() if importlib.util.find_spec(package) is None)


# ---- torch -----------------------------------------------------------------------------------------------------------
def sdpa(backend: str | None) -> Function:
    """torch's fused attention, by the backend named or by torch's own choice; causal, as the benches are."""

    def run(q: Tensor, k: Tensor | None = None, v: Tensor | None = None, *, heads: int | None = None) -> Tensor:
        from torch.nn.attention import SDPBackend, sdpa_kernel

        chosen = contextlib.nullcontext() if backend is None else sdpa_kernel(getattr(SDPBackend, backend))
        q, k, v = (x.transpose(1, 2) for x in operands(q, k, v, heads))
        with chosen:
            out = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return run


def activation(
    h: Tensor,
    bias: Tensor | None = None,
    gate: Tensor | None = None,
    gate_bias: Tensor | None = None,
    kind: str = "gelu",
) -> Tensor:
    """What a plain MLP calls, in h's dtype throughout."""
    h = h if bias is None else h + bias
    if gate is not None:
        return F.silu(gate if gate_bias is None else gate + gate_bias) * h
    return F.relu(h).square() if kind == "relu2" else F.gelu(h, approximate="tanh" if kind == "gelu_tanh" else "none")


@functools.cache
def _compiled_flex(
    T: int, S: int, window: int | None, edges: tuple[int, ...], device: torch.device
) -> tuple[Function, object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    document = torch.bucketize(torch.arange(S, device=device), torch.tensor(edges, device=device), right=True)

    def sees(b: Tensor, h: Tensor, t: Tensor, s: Tensor) -> Tensor:
        position = t + S - T
        seen = position >= s
        if window is not None:
            seen = seen & (position - s <= window)
        return seen & (document[position] == document[s]) if edges else seen

    return torch.compile(flex_attention), create_block_mask(sees, None, None, T, S, device=device)


@functools.lru_cache(maxsize=64)
def _edges(cu_seqlens: Tensor) -> tuple[int, ...]:
    """The starts of documents, read once for each tensor: a peer is not timed with a wait of the host in every call."""
    return tuple(cu_seqlens.tolist())


def flex(q: Tensor, k: Tensor, v: Tensor, *, window: int | None = None, cu_seqlens: Tensor | None = None) -> Tensor:
    """torch's FlexAttention, compiled, with the block mask made beforehand: causal, a window, packed documents."""
    edges = () if cu_seqlens is None else _edges(cu_seqlens)
    function, mask = _compiled_flex(q.shape[1], k.shape[1], window, edges, q.device)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    return function(q, k, v, block_mask=mask, enable_gqa=q.shape[1] != k.shape[1]).transpose(1, 2)


def sdpa_decode(backend: str | None) -> Function:
    """torch's fused attention: of its own choice under a mask made from lengths, or by a backend that takes no mask."""

    from torch.nn.attention import SDPBackend, sdpa_kernel

    # Torch's compiler knows no list of an enum's members; that of all backends is what there is without one.
    chosen = None if backend is None else getattr(SDPBackend, backend)

    def run(
        q: Tensor, k: Tensor, v: Tensor, lengths: Tensor, *rest: Tensor | None, window: int | None = None
    ) -> Tensor:  # fmt: skip
        require(window is None, "window: not for torch's attention here; leave it out")
        require(not any(x is not None for x in rest), "k: neither pages nor scales are known to torch's attention")
        T, mask = q.shape[1], None
        if backend is None:
            position = lengths[:, None] - T + torch.arange(T, device=q.device)
            mask = (torch.arange(k.shape[1], device=q.device) <= position[..., None])[:, None]
        else:
            require(T == 1, "q: without a mask only T = 1 and a full cache are right")
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        with contextlib.nullcontext() if chosen is None else sdpa_kernel(chosen):
            out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=q.shape[1] != k.shape[1])
        return out.transpose(1, 2)

    return run


def layernorm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    return F.layer_norm(x, (x.shape[-1],), weight, bias, eps)


def rmsnorm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight, eps)


def add_then(norm: Function) -> Function:
    """The two calls that an op with a residual sum replaces."""

    def run(x: Tensor, residual: Tensor, *parameters: Any) -> tuple[Tensor, Tensor]:
        h = x + residual
        return norm(h, *parameters), h

    return run


def cross_entropy_wide(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits.float(), targets)


def linear_then_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(F.linear(x, weight).float(), targets)


def linear_cross_entropy_chunked(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    """torch's own, which goes through the rows in chunks only where it is given options."""
    return F.linear_cross_entropy(x, weight, targets, options=torch.nn.LinearCrossEntropyOptions())


def dequantize_then_linear(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's linear on the matrix in x's dtype, which is made anew each time: what there is without a fused kernel."""
    return F.linear(x, (weight * scale[:, None]).to(x.dtype), bias)


def int8pack(x: Tensor, weight: Tensor, scale: Tensor, bias: Tensor | None = None) -> Tensor:
    """torch's own product with an int8 matrix, which takes the scales in x's dtype."""
    y = torch._weight_int8pack_mm(x, weight, scale.to(x.dtype))
    return y if bias is None else y + bias


# ---- packages that may be installed ----------------------------------------------------------------------------------
def liger_rmsnorm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    return LigerRMSNormFunction.apply(x, weight, eps, 0.0, "llama", False)  # in place it would overwrite the gradient


def liger_add_rmsnorm(
    x: Tensor, residual: Tensor, weight: Tensor | None = None, eps: float = 1e-6
) -> tuple[Tensor, Tensor]:
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, 0.0, "llama", False)


def liger_layernorm(x: Tensor, weight: Tensor, bias: Tensor | None = None, eps: float = 1e-5) -> Tensor:
    from liger_kernel.ops.layer_norm import LigerLayerNormFunction

    require(bias is not None, "bias: Liger's layernorm has always one")
    return LigerLayerNormFunction.apply(x, weight, bias, eps)


def liger_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    """Of a copy of the logits: it writes over them, asked for a gradient or not."""
    from liger_kernel.ops.cross_entropy import LigerCrossEntropyFunction

    result = LigerCrossEntropyFunction.apply(logits.clone(), targets, None)
    return result[0] if isinstance(result, tuple) else result


def liger_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    result = LigerFusedLinearCrossEntropyFunction.apply(x, weight, targets)
    return result[0] if isinstance(result, tuple) else result


def quack_rmsnorm(x: Tensor, weight: Tensor | None = None, eps: float = 1e-6) -> Tensor:
    import quack

    return quack.rmsnorm(x, weight, eps=eps)


def quack_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    import quack

    return quack.cross_entropy(logits, targets, ignore_index=-100, reduction="mean")


def flash_attention(version: int) -> Function:
    """The flash-attn package: version 2, and for Hopper 3."""

    def run(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        if version == 3:
            from flash_attn_interface import flash_attn_func
        else:
            from flash_attn import flash_attn_func
        result = flash_attn_func(q, k, v, causal=True)
        return result[0] if isinstance(result, tuple) else result

    return run


def _liger(run: Function) -> Peer:
    return Peer(run, "liger_kernel", "liger-kernel", on=("cuda",))


def _quack(run: Function) -> Peer:
    return Peer(run, "quack", "quack-kernels", on=("cuda",))


PEERS: Mapping[str, Mapping[str, Peer]] = {
    "attention": {
        "sdpa": Peer(sdpa(None)),
        "sdpa cudnn": Peer(sdpa("CUDNN_ATTENTION"), on=("cuda",)),
        "sdpa flash": Peer(sdpa("FLASH_ATTENTION"), on=("cuda",)),
        "flex": Peer(flex, compiles=True),
        "flash-attn 2": Peer(flash_attention(2), "flash_attn", "flash-attn", on=("cuda",)),
        "flash-attn 3": Peer(flash_attention(3), "flash_attn_interface", "flash-attn-3", on=("cuda",)),
    },
    "decode_attention": {
        "sdpa": Peer(sdpa_decode(None)),
        "sdpa cudnn": Peer(sdpa_decode("CUDNN_ATTENTION"), on=("cuda",)),
        "sdpa flash": Peer(sdpa_decode("FLASH_ATTENTION"), on=("cuda",)),
    },
    "layernorm": {"torch": Peer(layernorm), "liger": _liger(liger_layernorm)},
    "rmsnorm": {"torch": Peer(rmsnorm), "liger": _liger(liger_rmsnorm), "quack": _quack(quack_rmsnorm)},
    "add_layernorm": {"torch": Peer(add_then(layernorm))},
    "add_rmsnorm": {"torch": Peer(add_then(rmsnorm)), "liger": _liger(liger_add_rmsnorm)},
    "cross_entropy": {
        "torch": Peer(F.cross_entropy), "torch fp32": Peer(cross_entropy_wide),
        "liger, of a copy": _liger(liger_cross_entropy), "quack": _quack(quack_cross_entropy),
    },
    "linear_cross_entropy": {
        "torch": Peer(linear_then_cross_entropy),
        "torch chunked": Peer(linear_cross_entropy_chunked, there=hasattr(torch.nn, "LinearCrossEntropyOptions")),
        "liger": _liger(liger_linear_cross_entropy),
    },
    "activation": {"torch": Peer(activation)},
    "int8_linear": {"dequantize, linear": Peer(dequantize_then_linear), "int8pack": Peer(int8pack)},
}  # fmt: skip
