"""What each part of a model's step must compute and move, from the declared costs of the ops."""

from __future__ import annotations

from gptfast.config import GPTConfig
from kernels import OPS, Cost

NOTHING = Cost(0, 0)
ADAMW_BYTES = 28  # of a parameter: weight, gradient, two moments in fp32 read, and three of the four written


def of_step(config: GPTConfig, B: int, T: int, itemsize: int, mode: str = "train", S: int = 0) -> dict[str, Cost]:
    """FLOPs and compulsory bytes of the parts of a step by name.

    mode: 'train', 'prefill' (forward of B prompts of T, the last position's logits) or 'decode' (a token for each of B
    sequences with S positions in the cache).
    """
    M, C, L, V = B * T, config.n_embd, config.n_layer, config.vocab_size
    H, G, D, W = config.n_head, config.kv_heads, config.head_dim, config.hidden_width
    train = mode == "train"
    parts: dict[str, Cost] = {}

    def add(part: str, forward: Cost, backward: Cost = NOTHING, times: int = 1) -> None:
        old = parts.get(part, NOTHING)
        cost = Cost(forward.flops + train * backward.flops, forward.bytes + train * backward.bytes)
        parts[part] = Cost(old.flops + times * cost.flops, old.bytes + times * cost.bytes)

    def product(M: int, N: int, K: int, times: int) -> None:
        moved = (M * K + N * K + M * N) * itemsize
        add("GEMMs", Cost(2 * M * N * K, moved), Cost(4 * M * N * K, 2 * moved), times)

    gated = config.activation == "swiglu"
    product(M, (H + 2 * G) * D, C, L)
    product(M, C, H * D, L)
    product(M, W, C, L * (1 + gated))
    product(M, C, W, L)
    product(M if train else B, V, C, 1)
    if mode == "decode":
        add("attention", *OPS["decode_attention"].cost(B=B, T=1, S=S, H=H, G=G, D=D, itemsize=itemsize), times=L)
        parts["norms + GEMMs"] = parts["GEMMs"]  # by one kernel, whose norm reads nothing that its product does not
    else:
        add("attention", *OPS["attention"].cost(B=B, T=T, S=T, H=H, G=G, D=D, itemsize=itemsize), times=L)
    rows = {"bias": config.bias} if config.norm == "layernorm" else {"weight": config.norm_weight}
    add("norms", *OPS[config.norm].cost(M=M, N=C, **rows, itemsize=itemsize))
    add("norms", *OPS[f"add_{config.norm}"].cost(M=M, N=C, **rows, itemsize=itemsize), times=2 * L)
    if config.position == "rope":
        add("rotary", *OPS["rotary"].cost(B=B, T=T, H=H, G=G, D=D, itemsize=itemsize), times=L)
    width = M * W * itemsize
    add("MLP activation", Cost(10 * M * W, (2 + gated) * width), Cost(20 * M * W, (3 + 2 * gated) * width), L)
    if train:
        add("loss", Cost(4 * M * V, M * V * itemsize), Cost(3 * M * V, M * V * itemsize))
        add("embedding", Cost(0, M * C * 2 * itemsize), Cost(M * C, M * C * (itemsize + 4)))
        add("optimizer", Cost(12 * parameters(config), ADAMW_BYTES * parameters(config)))
    return parts


def parameters(config: GPTConfig) -> int:
    """Numbers that training learns, small vectors left out."""
    C, L, W = config.n_embd, config.n_layer, config.hidden_width
    gated = config.activation == "swiglu"
    block = C * (config.n_head + 2 * config.kv_heads) * config.head_dim + C * C + C * W * (2 + gated)
    positions = config.block_size * C if config.position == "learned" else 0
    return L * block + config.vocab_size * C * (1 if config.tied else 2) + positions
