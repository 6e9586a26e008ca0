"""What a GPT is, as data: a frozen dataclass and the named sizes.

`dataclasses.asdict(config)` is JSON; `config_of` brings it back.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from .errors import UserError

LARGEST = 2**31 - 1  # of sizes


@dataclass(frozen=True)
class GPTConfig:
    """The architecture, declaratively. Raises UserError, naming the field and the fix, for one that cannot be built."""

    block_size: int = 1024  # T, the longest sequence
    vocab_size: int = 50304  # V: GPT-2's 50257 rounded up to a multiple of 64
    n_layer: int = 12
    n_head: int = 12  # H
    n_kv_head: int | None = None  # G, heads of keys and values; None means n_head
    n_embd: int = 768  # C
    head_size: int | None = None  # D, of each head; None means n_embd / n_head
    dropout: float = 0.0
    bias: bool = True  # in Linear and LayerNorm
    norm: Literal["layernorm", "rmsnorm"] = "layernorm"
    norm_weight: bool = False  # rmsnorm multiplies by a weight; layernorm always does
    norm_eps: float | None = None  # None means 1e-5 in layernorm, 1e-6 in rmsnorm
    position: Literal["learned", "rope"] = "learned"
    rope_base: float = 10000.0  # the angles are position * rope_base^(-2i / D)
    activation: Literal["gelu", "gelu_tanh", "relu2", "swiglu"] = "gelu"
    mlp_width: int | None = None  # between the MLP's two layers; None means 4 n_embd
    qk_norm: bool = False  # RMS-normalize each query and key
    qk_norm_weight: bool = False  # with qk_norm, multiply by a weight of each dimension of a head, as Qwen3 does
    token_shift: bool = False  # each position also sees the one before it (the embedding two), channel by channel
    block_shift: bool = True  # with token_shift, in the blocks as well as in the embedding
    tied: bool = True  # the head's weight is the token embedding
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap)

    @property
    def kv_heads(self) -> int:
        """G: the number of key and value heads."""
        return self.n_head if self.n_kv_head is None else self.n_kv_head

    @property
    def head_dim(self) -> int:
        """D, which is C / H unless head_size says otherwise."""
        return self.n_embd // self.n_head if self.head_size is None else self.head_size

    @property
    def attention_width(self) -> int:
        """H · D: of all queries of a token, and of what attention gives."""
        return self.n_head * self.head_dim

    @property
    def hidden_width(self) -> int:
        """What the MLP is wide between its two layers."""
        return 4 * self.n_embd if self.mlp_width is None else self.mlp_width

    @property
    def qk_epsilon(self) -> float:
        """The same of the norm of queries and keys, which is always an RMS norm."""
        return 1e-6 if self.norm_eps is None else self.norm_eps

    @property
    def epsilon(self) -> float:
        """What the norms add to the mean square, so that it is never 0."""
        default = 1e-5 if self.norm == "layernorm" else 1e-6
        return default if self.norm_eps is None else self.norm_eps

    def __post_init__(self) -> None:
        for name, expected in _types().items():
            _check_type(name, expected, getattr(self, name))
        for name in ("block_size", "vocab_size", "n_layer", "n_head", "n_embd"):
            _require(getattr(self, name) >= 1, name, f"is {getattr(self, name)}; it must be at least 1")
        _require(
            self.head_size is not None or self.n_embd % self.n_head == 0,
            "n_embd",
            f"is {self.n_embd}, which {self.n_head} heads do not divide; change n_embd or n_head, or set head_size",
        )
        _require(
            self.kv_heads >= 1 and self.n_head % self.kv_heads == 0,
            "n_kv_head",
            f"is {self.n_kv_head}; it must divide n_head, which is {self.n_head}",
        )
        _require(0.0 <= self.dropout < 1.0, "dropout", f"is {self.dropout}; it must be in [0, 1)")
        for name in ("norm", "position", "activation"):
            known = get_args(_types()[name])
            _require(
                getattr(self, name) in known, name, f"is {getattr(self, name)!r}; choose one of {', '.join(known)}"
            )
        _require(self.head_dim >= 1, "head_size", f"is {self.head_size}; it must be at least 1")
        _require(
            self.qk_norm or not self.qk_norm_weight, "qk_norm_weight", "is of qk_norm, which is off; set qk_norm too"
        )
        _require(
            self.position != "rope" or self.head_dim % 2 == 0,
            "n_embd" if self.head_size is None else "head_size",
            f"{'/ n_head ' * (self.head_size is None)}is {self.head_dim}; rotary positions need an even head size",
        )
        for name in ("norm_eps", "rope_base"):
            value = getattr(self, name)
            _require(value is None or value > 0.0, name, f"is {value}; it must be positive")
        _require(self.hidden_width >= 1, "mlp_width", f"is {self.mlp_width}; it must be at least 1")
        _require(
            self.softcap is None or self.softcap > 0.0, "softcap", f"is {self.softcap}; it must be positive or None"
        )


@cache
def _types() -> dict[str, Any]:
    return get_type_hints(GPTConfig)


def _check_type(name: str, expected: Any, value: Any) -> None:
    """Raises UserError for a value of another type, and for numbers that are none or that no size can be."""
    kinds = (expected, *get_args(expected))
    if type(None) in kinds and value is None:
        return
    if bool in kinds:
        _require(type(value) is bool, name, f"is {_shown(value)}; it must be true or false")
    elif float in kinds:
        _require(type(value) in (int, float) and abs(value) < LARGEST, name, f"is {_shown(value)}; it must be a number")
    elif int in kinds:
        _require(type(value) is int and value <= LARGEST, name, f"is {_shown(value)}; it must be an integer of 31 bits")
    else:
        _require(isinstance(value, str), name, f"is {_shown(value)}; it must be a word")


def _shown(value: Any) -> str:
    try:
        return repr(value)[:60]
    except (ValueError, RecursionError):  # an integer of thousands of digits, a list without end
        return f"a strange {type(value).__name__}"


def config_of(description: Any) -> GPTConfig:
    """The config that `dataclasses.asdict` described. Raises UserError for anything else."""
    if not isinstance(description, dict):
        raise UserError(f"not the description of a model, but {_shown(description)}; train or import the model again")
    unknown = sorted(str(key)[:60] for key in set(description) - set(_types()))
    if unknown:
        raise UserError(f"a model of fields that this gptfast has not: {', '.join(unknown[:5])}; use a newer gptfast")
    return GPTConfig(**description)


def _require(condition: bool, field: str, message: str) -> None:
    if not condition:
        raise UserError(f"{field} {message}")


def preset(name: str) -> GPTConfig:
    """The config of that name in PRESETS. Raises UserError with the names there are."""
    if name not in PRESETS:
        raise UserError(f"no model preset named {name!r}; choose one of {', '.join(PRESETS)}")
    return PRESETS[name]


_GPT2 = GPTConfig(vocab_size=50257)  # Radford et al. 2019; as OpenAI published it
_CHAR = GPTConfig(block_size=256, vocab_size=65, n_layer=6, n_head=6, n_embd=384, dropout=0.2, bias=False)
_CHAR_CPU = dataclasses.replace(_CHAR, block_size=64, n_layer=4, n_head=4, n_embd=128, dropout=0.0)
_MODERN = GPTConfig(bias=False, norm="rmsnorm", position="rope", activation="relu2", qk_norm=True, tied=False)

PRESETS: dict[str, GPTConfig] = {
    "gpt2": _GPT2,
    "gpt2-medium": dataclasses.replace(_GPT2, n_layer=24, n_head=16, n_embd=1024),
    "gpt2-large": dataclasses.replace(_GPT2, n_layer=36, n_head=20, n_embd=1280),
    "gpt2-xl": dataclasses.replace(_GPT2, n_layer=48, n_head=25, n_embd=1600),
    "char": _CHAR,  # nanoGPT's train_shakespeare_char
    "char-cpu": _CHAR_CPU,  # nanoGPT's README command for a CPU
    "char-modern-cpu": dataclasses.replace(_MODERN, block_size=64, vocab_size=65, n_layer=4, n_head=4, n_embd=128),
    "modern": _MODERN,  # GPT-2 124M's layers, width and heads
}
