"""What a GPT is, as data: a frozen dataclass and the named sizes.

`dataclasses.asdict(config)` is JSON; `config_of` brings it back.

The fields from embedding_norm on are nanochat's (github.com/karpathy/nanochat), which has most of them from
modded-nanogpt (github.com/KellerJordan/modded-nanogpt). Windows: Beltagy et al., arXiv:2004.05150; value embeddings:
Zhou et al., arXiv:2410.17897. Each is off by default, and has weights at which it does nothing.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal, get_args, get_type_hints

from .errors import UserError, nearest

VALUE_GATE_CHANNELS, SMEAR_GATE_CHANNELS = 12, 24  # what the gates read of a token's activations
LARGEST = 2**31 - 1  # of sizes

Architecture = Literal["nanochat", "gptfast"]
VOCAB, CONTEXT, ASPECT, HEAD_DIM = 32768, 2048, 64, 128  # nanochat's, of a model of any depth; width = ASPECT · depth


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
    softcap: float | None = None  # logits become softcap * tanh(logits / softcap), in fp32
    embedding_norm: bool = False  # RMS-normalize the embedding, without a weight
    window_pattern: str = ""  # S and L, repeated over the layers, the last always L: those of S have the window
    window: int | None = None  # positions before its own that a query of an S layer sees
    value_embeddings: bool = False  # in every other layer up to the last, values gain 3 sigmoid(gate) · (a table's row)
    residual_scalars: bool = False  # every layer reads r · x + a · (the embedding) in place of x, r and a its own
    smear: bool = False  # an embedding gains lambda · sigmoid(gate) · (that of the token before)
    backout: bool = False  # the last norm reads x - lambda · (x after layer n_layer // 2)
    rope_sign: int = 1  # -1: rotary positions turn by minus the angle
    qk_gain: float = 1.0  # with qk_norm, what queries and keys are multiplied by
    initialization: Literal["gpt2", "nanochat"] = "gpt2"  # of the weights

    @property
    def nanochats(self) -> tuple[str, ...]:
        """The fields of nanochat's parts that this config has on: what computes a block by itself must know them."""
        names = (
            "embedding_norm", "window", "value_embeddings", "residual_scalars", "smear", "backout", "rope_sign",
            "qk_gain",
        )  # fmt: skip
        return tuple(name for name in names if getattr(self, name) != getattr(GPTConfig, name))

    @property
    def windows(self) -> tuple[int | None, ...]:
        """Of each layer, how many positions before its own a query sees; None: all."""
        letters = (self.window_pattern or "L") * self.n_layer
        return (*(self.window if c == "S" else None for c in letters[: self.n_layer - 1]), None)

    @property
    def value_layers(self) -> tuple[int, ...]:
        """The layers with value embeddings."""
        return tuple(range((self.n_layer - 1) % 2, self.n_layer, 2)) if self.value_embeddings else ()

    @property
    def smear_place(self) -> int:
        """The number of the smear's input among those that a cache keeps; the token shifts' come before it."""
        return self.token_shift * (1 + 2 * self.n_layer * self.block_shift)

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
        for name in ("norm", "position", "activation", "initialization"):
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
        self._check_nanochats()
        _require(self.hidden_width >= 1, "mlp_width", f"is {self.mlp_width}; it must be at least 1")
        _require(
            self.softcap is None or self.softcap > 0.0, "softcap", f"is {self.softcap}; it must be positive or None"
        )

    def _check_nanochats(self) -> None:
        pattern = self.window_pattern
        _require(set(pattern) <= set("SL"), "window_pattern", f"is {pattern!r}; it is made of S and L, as SSSL is")
        _require(
            ("S" in pattern) == (self.window is not None),
            "window",
            f"is {self.window} and window_pattern {pattern!r}; a pattern with an S needs a window, no other has one",
        )
        _require(self.window is None or self.window >= 0, "window", f"is {self.window}; it must not be negative")
        _require(self.rope_sign in (1, -1), "rope_sign", f"is {self.rope_sign}; it must be 1 or -1")
        _require(self.qk_gain > 0.0, "qk_gain", f"is {self.qk_gain}; it must be positive")
        _require(self.qk_norm or self.qk_gain == 1.0, "qk_gain", "is of qk_norm, which is off; set qk_norm too")
        for name, channels in (("value_embeddings", VALUE_GATE_CHANNELS), ("smear", SMEAR_GATE_CHANNELS)):
            fits = self.n_embd >= channels or not getattr(self, name)
            _require(fits, name, f"has a gate that reads {channels} channels; n_embd is {self.n_embd}")


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


def nanochat(
    *, block_size: int, vocab_size: int, n_layer: int, n_head: int, n_embd: int, n_kv_head: int | None = None,
    window_pattern: str = "SSSL",
) -> GPTConfig:  # fmt: skip
    """nanochat's model of these sizes, to the last weight (gpt.py of github.com/karpathy/nanochat at 92d63d4).

    A layer of S sees a quarter of the context, rounded up to a multiple of 128.
    """
    window = -(-block_size // (4 * 128)) * 128 if "S" in window_pattern else None
    return GPTConfig(
        block_size=block_size, vocab_size=vocab_size, n_layer=n_layer, n_head=n_head, n_embd=n_embd,
        n_kv_head=n_kv_head, bias=False, norm="rmsnorm", norm_eps=2.0**-23, position="rope", rope_base=100_000.0,
        rope_sign=-1, activation="relu2", qk_norm=True, qk_gain=1.2, tied=False, softcap=15.0, embedding_norm=True,
        window_pattern=window_pattern, window=window, value_embeddings=True, residual_scalars=True, smear=True,
        backout=True, initialization="nanochat",
    )  # fmt: skip


def of_depth(
    depth: int, vocab_size: int = VOCAB, context: int = CONTEXT, head_dim: int = HEAD_DIM,
    architecture: Architecture = "nanochat",
) -> GPTConfig:  # fmt: skip
    """Returns the model of that depth: rotary positions, RMSNorm, ReLU², normalized queries and keys, an untied head;
    with the nanochat architecture also its value embeddings, windows and scalars."""
    if depth < 1:
        raise UserError(f"--depth={depth}: must be at least 1")
    width = -(-depth * ASPECT // head_dim) * head_dim
    shape: dict[str, Any] = dict(
        block_size=context, vocab_size=vocab_size, n_layer=depth, n_head=width // head_dim, n_embd=width
    )
    if architecture == "nanochat":
        return nanochat(**shape)
    return GPTConfig(
        **shape, bias=False, norm="rmsnorm", position="rope", activation="relu2", qk_norm=True, tied=False, softcap=15.0
    )


def is_preset(name: str) -> bool:
    """Whether `preset` knows the name: one of PRESETS, or 'd12', nanochat's model of depth 12."""
    return name in PRESETS or re.fullmatch(r"d[1-9]\d?", name) is not None


def preset(name: str, flag: str = "preset") -> GPTConfig:
    """Returns the config of a preset or a depth. Raises UserError, which begins with `flag`, for other names."""
    if not is_preset(name):
        raise UserError(f"{flag}={name} is unknown{nearest(name, PRESETS)}; or a depth, as d12")
    return PRESETS[name] if name in PRESETS else of_depth(int(name[1:]))


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
NAMES = f"{', '.join(PRESETS)}, or d1, d2, ...: nanochat's model of that depth"  # what `preset` takes, for --help
