"""What a GPT keeps of the tokens it has seen: keys and values, and the newest inputs of its token shifts.

    cache = KVCache(model.config, model.ops, slots=8)
    logits = model.logits(prompt[None], last_only=True, cache=(going_in := cache.prompt(slot=3)))
    going_in.advance(len(prompt))
    logits = model.logits(tokens, cache=cache)  # (8, 1) -> (8, 1, V): the next token of every slot
    cache.advance(1)

Every slot holds one sequence. Contiguous, a slot is one stretch of memory; in pages, it takes them from a common pool,
and sequences that begin alike share the pages of what they share (Kwon et al., arXiv:2309.06180).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.model import narrowed, shifted
from kernels import Ops
from kernels.decode_attention import QUANTIZED, quantize_kv
from kernels.op import require

# Positions of which a token shift's input is kept: two before the next token, and as many as may be taken back.
RECENT = 16
MAX_STEP = 8  # tokens of a row in one step, as many as decode_attention takes


class KVCache:
    """Keys and values of `slots` sequences of up to `capacity` tokens each (by default the model's block_size).

    Per layer `k` and `v` are (N, page_size, G, D), where a contiguous cache has one page for each slot. `dtype` is that
    of the activations; `storage` "int8" or "fp8" keeps rounded numbers with an fp32 scale per head and position.
    `lengths` (slots,) int32 counts the tokens kept. With a `page_size` a slot gets pages in `reserve` and returns them
    in `release`; the pool has `pages` of them, by default enough for all slots. All memory is allocated here, and every
    shape stays as it is.
    """

    def __init__(
        self,
        config: GPTConfig,
        ops: Ops,
        slots: int,
        *,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        capacity: int | None = None,
        storage: Literal["same", "int8", "fp8"] = "same",
        page_size: int | None = None,
        pages: int | None = None,
    ) -> None:
        capacity = config.block_size if capacity is None else capacity
        require(slots >= 1, f"slots: expected at least 1, got {slots}")
        require(capacity >= 1, f"capacity: expected at least 1, got {capacity}")
        require(page_size is None or page_size >= 1, f"page_size: expected at least 1 or None, got {page_size}")
        require(storage in ("same", *QUANTIZED), f"storage: expected same, int8 or fp8, got {storage!r}")
        require(pages is None or page_size is not None, "pages: a pool of pages needs a page_size")
        self.config, self.ops, self.slots, self.capacity = config, ops, slots, capacity
        self.paged, self.page_size = page_size is not None, page_size or capacity
        per_slot = -(-capacity // self.page_size)
        self.pages = (slots * per_slot if pages is None else pages) if self.paged else slots
        require(self.pages >= 1, f"pages: expected at least 1, got {pages}")
        self._stored = QUANTIZED.get(storage)
        count = self.pages + self.paged  # page 0 of a pool takes what slots without pages write
        shape = (count, self.page_size, config.kv_heads, config.head_dim)

        def per_layer(shape: tuple[int, ...], dtype: torch.dtype) -> list[Tensor]:
            return [torch.zeros(shape, dtype=dtype, device=device) for _ in range(config.n_layer)]

        self.k, self.v = per_layer(shape, self._stored or dtype), per_layer(shape, self._stored or dtype)
        scales = shape[:3] if self._stored else (0,)
        self.k_scale, self.v_scale = per_layer(scales, torch.float32), per_layer(scales, torch.float32)
        places = config.smear_place + config.smear
        self._recent = torch.zeros(places, slots, RECENT, config.n_embd, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        own = torch.arange(slots, dtype=torch.int32, device=device)[:, None]
        self.table = torch.zeros(slots, per_slot, dtype=torch.int32, device=device) if self.paged else own
        self._rows = torch.arange(slots, device=device)[:, None]
        self._free = list(range(self.pages, 0, -1)) if self.paged else []
        self._held: list[list[int]] = [[] for _ in range(slots)]
        self._holders = [0] * count

    # ---- one step of all slots ---------------------------------------------------------------------------------------
    def place(self, T: int) -> Tensor:
        """Positions (slots, T) int64 of the next T tokens of every slot, which `attend` and `earlier` then keep."""
        if not 1 <= T <= MAX_STEP:
            raise ValueError(f"tokens: a step takes 1 to {MAX_STEP} a row, got {T}; a prompt goes in by prompt()")
        self._positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        page = self.table.gather(1, self._positions // self.page_size).long()
        self._where = (page * self.page_size + self._positions % self.page_size).flatten()
        self._seen = self.lengths + T
        return self._positions.clamp(max=self.config.block_size - 1)  # guesses past it are never taken

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k and v (1, slots * T, G, D) of `layer`; attention of q (1, slots * T, H, D) to all kept, like q."""
        self.keep(layer, self._where, k, v)
        scales = (self.k_scale[layer], self.v_scale[layer]) if self._stored else (None, None)
        out = self.ops.decode_attention(
            q.reshape(self.slots, -1, *q.shape[2:]),
            self.k[layer],
            self.v[layer],
            self._seen,
            self.table if self.paged else None,
            *scales,
            window=self.config.windows[layer],
        )
        return out.reshape(q.shape)

    def earlier(self, place: int, x: Tensor, taps: int) -> Sequence[Tensor]:
        """Keeps x (1, slots * T, C), the input of token shift `place`; x as it was 1 ... `taps` positions before."""
        recent, new = self._recent[place], x.view(self.slots, -1, x.shape[-1])
        T, before = new.shape[1], self._positions[:, :1] + torch.arange(-taps, 0, device=x.device)
        old = recent[self._rows, before % RECENT].masked_fill((before < 0)[..., None], 0.0)
        both = torch.cat((old, new), dim=1)
        recent[self._rows, self._positions % RECENT] = new
        return [both[:, taps - i : taps - i + T].reshape(x.shape) for i in range(1, taps + 1)]

    def advance(self, n: int | Tensor) -> None:
        """Count n more tokens of every slot, or n (slots,) of each; a negative n takes back up to MAX_STEP."""
        self.lengths += n

    # ---- one slot ----------------------------------------------------------------------------------------------------
    def reserve(self, slot: int, tokens: int) -> bool:
        """Make room for `tokens` in the empty `slot`; False, with nothing done, if too few pages are free."""
        return self._hold(slot, [], tokens)

    def release(self, slot: int) -> None:
        """Empty `slot` and give its pages back."""
        for page in self._held[slot]:
            self._holders[page] -= 1
            if not self._holders[page]:
                self._free.append(page)
        self._set_held(slot, [])
        self.lengths[slot] = 0

    def prompt(self, slot: int) -> Prompt:
        """The empty `slot`, to be filled by one forward pass over a whole prompt."""
        return Prompt(self, slot)

    def clone(self, source: int, slot: int, tokens: int) -> bool:
        """All of `source` also in the empty `slot`, with room for `tokens`; whole pages are shared, not copied.

        False, with nothing done, if too few pages are free.
        """
        length = int(self.lengths[source])
        shared = length // self.page_size if self.paged else 0
        if not self._hold(slot, self._held[source][:shared], tokens):
            return False
        positions = torch.arange(shared * self.page_size, length, device=self.lengths.device)
        old, new = self._flat(source, positions), self._flat(slot, positions)
        for stored in (self.k, self.v, *((self.k_scale, self.v_scale) if self._stored else ())):
            for x in stored:
                x.flatten(0, 1)[new] = x.flatten(0, 1)[old]
        self._recent[:, slot] = self._recent[:, source]
        self.lengths[slot] = length
        return True

    @property
    def rounded(self) -> bool:
        """Whether keys and values are kept in 8 bits, with scales."""
        return self._stored is not None

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no slot holds."""
        return len(self._free)

    def pages_for(self, tokens: int) -> int:
        """Pages that a slot needs for `tokens`."""
        return -(-tokens // self.page_size)

    def keep(self, layer: int, where: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v (1, n, G, D) of `layer` at `where` (n,), counted over the rows of all pages."""
        for new, stored, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            if self._stored:
                new, scale = quantize_kv(new, self._stored)
                scales[layer].flatten(0, 1)[where] = scale[0]
                stored[layer].flatten(0, 1)[where] = new[0]
            else:  # in half the time, but torch has it for no fp8
                stored[layer].flatten(0, 1).index_copy_(0, where, new[0])

    def _flat(self, slot: int, positions: Tensor) -> Tensor:
        """Where positions (n,) of a slot lie, counted over the rows of all pages."""
        return self.table[slot].long()[positions // self.page_size] * self.page_size + positions % self.page_size

    def _hold(self, slot: int, shared: list[int], tokens: int) -> bool:
        require(tokens <= self.capacity, f"tokens: {tokens}, but a slot takes {self.capacity}")
        if not self.paged:
            return True
        require(not self._held[slot], f"slot: {slot} is in use; release it first")
        missing = self.pages_for(tokens) - len(shared)
        if missing > len(self._free):
            return False
        self._set_held(slot, shared + [self._free.pop() for _ in range(missing)])
        for page in self._held[slot]:
            self._holders[page] += 1
        return True

    def _set_held(self, slot: int, pages: list[int]) -> None:
        self._held[slot] = pages
        if self.paged:
            row = pages + [0] * (self.table.shape[1] - len(pages))
            self.table[slot] = torch.tensor(row, dtype=torch.int32)


class Prompt:
    """A prompt on its way into an empty slot: it attends to itself, as in training, and its keys and values stay."""

    def __init__(self, cache: KVCache, slot: int) -> None:
        self.cache, self.slot = cache, slot

    def place(self, T: int) -> Tensor:
        """Positions (1, T): 0 ... T - 1."""
        positions = torch.arange(T, device=self.cache.lengths.device)
        self._where = self.cache._flat(self.slot, positions)
        return positions[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k and v (1, T, G, D) of `layer`; causal attention of q (1, T, H, D)."""
        self.cache.keep(layer, self._where, k, v)
        window = narrowed(self.cache.config.windows[layer], q.shape[1])
        return self.cache.ops.attention(q, k, v, causal=True, window=window)

    def earlier(self, place: int, x: Tensor, taps: int) -> Sequence[Tensor]:
        """Keeps the end of x (1, T, C), the input of token shift `place`; x as it was 1 ... `taps` positions before."""
        positions = torch.arange(x.shape[1], device=x.device)[-RECENT:]
        self.cache._recent[place, self.slot, positions % RECENT] = x[0, -RECENT:]
        return shifted(x, taps)

    def advance(self, n: int) -> None:
        """Count the n tokens of the prompt."""
        self.cache.lengths[self.slot] = n
