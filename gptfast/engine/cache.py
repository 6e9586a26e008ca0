"""What a GPT keeps of the tokens it has seen: keys and values, and the newest inputs of its token shifts.

    cache = KVCache(model.config, model.ops, slots=8)
    pieces = cache.pieces([Piece(slot=3, start=0, tokens=len(prompt))])
    x = model.hidden(prompt[None], cache=pieces)
    pieces.advance()
    logits = model.logits(tokens, cache=cache)  # (8, 1) -> (8, 1, V): the next token of every slot
    cache.advance(1)

Every slot holds one sequence. Contiguous, a slot is one stretch of memory; in pages, it takes them from a common pool,
and sequences that begin alike share the pages of what they share (Kwon et al., arXiv:2309.06180). A layer with a window
keeps no more than that, round and round in a few pages of its slot, unless a pool remembers: whoever goes on from there
needs what lay before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from gptfast.config import GPTConfig
from gptfast.engine.pages import Pages
from gptfast.model import narrowed
from kernels import Ops
from kernels.decode_attention.reference import QUANTIZED, quantize_kv
from kernels.op import require

# Positions of which a token shift's input is kept: two before the next token, and as many as may be taken back.
RECENT = 16
TAPS = 2  # positions that a token shift looks back, at most
MAX_STEP = 8  # tokens of a row in one step, as many as decode_attention takes
RING_PAGE = 16  # positions, at most, of a page of a layer with a window


class Piece(NamedTuple):
    """Tokens of a text that go into a slot together, so many from position `start` on."""

    slot: int
    start: int
    tokens: int

    @property
    def end(self) -> int:
        return self.start + self.tokens


class KVCache:
    """Keys and values of `slots` sequences of up to `capacity` tokens each (by default the model's block_size).

    Per layer `k` and `v` are (N, page_size, G, D), where a contiguous cache has one page for each slot, and a layer
    that keeps its window alone as few small ones as hold it. `dtype` is that of the activations; `storage` "int8" or
    "fp8" keeps rounded numbers with an fp32 scale per head and position. `lengths` (slots,) int32 counts the tokens
    kept. With a `page_size` the slots take pages from `pool`, which has `pages` of them, by default enough for all;
    with `remembers` it knows full pages by their text. A cache `beside` another has the same pages, for another model.
    All memory is allocated here, and every shape stays as it is.
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
        remembers: bool = False,
        beside: KVCache | None = None,
    ) -> None:
        capacity = config.block_size if capacity is None else capacity
        require(slots >= 1, f"slots: expected at least 1, got {slots}")
        require(capacity >= 1, f"capacity: expected at least 1, got {capacity}")
        require(page_size is None or page_size >= 1, f"page_size: expected at least 1 or None, got {page_size}")
        require(storage in ("same", *QUANTIZED), f"storage: expected same, int8 or fp8, got {storage!r}")
        require(pages is None or page_size is not None, "pages: a pool of pages needs a page_size")
        self.config, self.ops, self.slots, self.capacity = config, ops, slots, capacity
        self.windows = config.windows  # of each layer, None where it sees everything
        self.paged, self.page_size = page_size is not None, page_size or capacity
        per_slot = -(-capacity // self.page_size)
        self.pages = (slots * per_slot if pages is None else pages) if self.paged else slots
        require(self.pages >= 1, f"pages: expected at least 1, got {pages}")
        self._stored = QUANTIZED.get(storage)
        count = self.pages + self.paged  # page 0 of a pool takes what slots without pages write
        shape = (count, self.page_size, config.kv_heads, config.head_dim)

        ring = self._plan_ring(device, may=not (self.paged and remembers))

        def per_layer(dtype: torch.dtype, width: int = 4) -> list[Tensor]:
            shapes = [ring if self.is_ring(layer) else shape for layer in range(config.n_layer)]
            return [torch.zeros(shape[:width], dtype=dtype, device=device) for shape in shapes]

        self.k, self.v = per_layer(self._stored or dtype), per_layer(self._stored or dtype)
        none = [torch.zeros(0, device=device)] * config.n_layer
        self.k_scale, self.v_scale = (per_layer(torch.float32, 3) if self._stored else none for _ in "kv")
        places = config.smear_place + config.smear
        self._recent = torch.zeros(places, slots, RECENT, config.n_embd, dtype=dtype, device=device)
        # Who goes on from the end of a page needs the newest inputs there, which its slot never saw.
        self._tail = min(TAPS, self.page_size) * (self.paged and remembers)
        self._ends = torch.zeros(places, count * self._tail, config.n_embd, dtype=dtype, device=device)
        self.lengths = torch.zeros(slots, dtype=torch.int32, device=device)
        self.pool: Pages = beside.pool if beside else Pages(slots, self.pages, self.page_size, remembers)
        own = torch.arange(slots, dtype=torch.int32, device=device)[:, None]
        empty = torch.zeros(slots, per_slot, dtype=torch.int32, device=device)
        self.table: Tensor = beside.table if beside else empty if self.paged else own
        self._rows = torch.arange(slots, device=device)[:, None]

    def _plan_ring(self, device: torch.device | str, may: bool) -> tuple[int, ...]:
        """Of layers with a window: `_span` pages for each slot, 0 where that saves nothing. Returns their shape."""
        config, slots = self.config, self.slots
        window = next((window for window in self.windows if window is not None), None)
        self._ring_page, self._span = min(self.page_size, RING_PAGE), 0
        if window is not None and may:  # what a step sees, adds, and takes back; they begin anywhere in a page
            self._span = -(-(window + 2 * MAX_STEP) // self._ring_page) + 1
            self._span *= self._span * self._ring_page < self.capacity
        blocks = torch.arange(-(-self.capacity // self._ring_page), device=device)
        first = torch.arange(slots, device=device)[:, None] * self._span
        self._ring_table = (first + blocks % max(1, self._span)).to(torch.int32)
        return slots * self._span, self._ring_page, config.kv_heads, config.head_dim

    @property
    def has_rings(self) -> bool:
        """Whether layers with a window keep that alone."""
        return self._span > 0

    def is_ring(self, layer: int) -> bool:
        """Whether `layer` keeps its window alone."""
        return self.has_rings and self.windows[layer] is not None

    def table_of(self, layer: int) -> Tensor | None:
        """Which pages of `layer` hold each slot's text, as decode_attention takes it: None where a slot is a page."""
        return self._ring_table if self.is_ring(layer) else self.table if self.paged else None

    # ---- one step of all slots ---------------------------------------------------------------------------------------
    def place(self, T: int) -> Tensor:
        """Positions (slots, T) int64 of the next T tokens of every slot, which `attend` and `earlier` then keep."""
        if not 1 <= T <= MAX_STEP:
            raise ValueError(f"tokens: a step takes 1 to {MAX_STEP} a row, got {T}; a prompt goes in by pieces()")
        self._positions = self.lengths[:, None] + torch.arange(T, device=self.lengths.device)
        page = self.table.gather(1, self._positions // self.page_size).long()
        self._where = (page * self.page_size + self._positions % self.page_size).flatten()
        if self._span:
            page = self._ring_table.gather(1, self._positions // self._ring_page).long()
            self._ring_where = (page * self._ring_page + self._positions % self._ring_page).flatten()
        self._seen = self.lengths + T
        return self._positions.clamp(max=self.config.block_size - 1)  # guesses past it are never taken

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k and v (1, slots * T, G, D) of `layer`; attention of q (1, slots * T, H, D) to all kept, like q."""
        self.keep(layer, self._ring_where if self.is_ring(layer) else self._where, k, v)
        scales = (self.k_scale[layer], self.v_scale[layer]) if self._stored else (None, None)
        out = self.ops.decode_attention(
            q.reshape(self.slots, -1, *q.shape[2:]),
            self.k[layer],
            self.v[layer],
            self._seen,
            self.table_of(layer),
            *scales,
            window=self.windows[layer],
        )
        return out.reshape(q.shape)

    def previous(self, place: int, x: Tensor, taps: int) -> Sequence[Tensor]:
        """Keeps x (1, slots * T, C), the input of token shift `place`; x as it was 1 ... `taps` positions before."""
        recent, new = self._recent[place], x.view(self.slots, -1, x.shape[-1])
        T, before = new.shape[1], self._positions[:, :1] + torch.arange(-taps, 0, device=x.device)
        old = recent[self._rows, before % RECENT].masked_fill((before < 0)[..., None], 0.0)
        both = torch.cat((old, new), dim=1)
        recent[self._rows, self._positions % RECENT] = new
        if self._tail:
            self._ends[place][self.ends(self._where)] = x[0]
        return [both[:, taps - i : taps - i + T].reshape(x.shape) for i in range(1, taps + 1)]

    def advance(self, n: int | Tensor) -> None:
        """Count n more tokens of every slot, or n (slots,) of each; a negative n takes back up to MAX_STEP."""
        self.lengths += n

    # ---- some slots --------------------------------------------------------------------------------------------------
    def reserve(self, slot: int, tokens: int) -> bool:
        """Make room for `tokens` in `slot`, in all; False, with nothing done, if too few pages are free."""
        require(tokens <= self.capacity, f"tokens: {tokens}, but a slot takes {self.capacity}")
        done = not self.paged or self.pool.grow(slot, tokens)
        self.refresh()
        return done

    def release(self, slot: int) -> None:
        """Empty `slot` and give its pages back."""
        self.pool.release(slot)
        self.lengths[slot] = 0
        self.refresh()

    def refresh(self) -> None:
        """Let the table (slots, pages of a slot) be that of the pool; without that, steps write where slots were."""
        if self.paged and self.pool.changed:
            width = self.table.shape[1]
            rows = [[*held, *[0] * (width - len(held))] for held in self.pool.held]
            self.table.copy_(to_device(torch.tensor(rows, dtype=torch.int32), self.table.device))
            self.pool.changed = False

    def pieces(self, pieces: Sequence[Piece]) -> Pieces:
        """Slots to be filled further, each from where its text has come to, by one forward pass over all pieces."""
        return Pieces(self, pieces)

    def padded(self, tokens: int, seen: int) -> Padded:
        """Slots to be filled further by one piece after another, each of up to so many tokens."""
        return Padded(self, tokens, seen)

    def resume(self, slot: int, length: int) -> None:
        """The pages of `slot` hold `length` tokens, to the end of a page, which it never saw go in."""
        self.lengths[slot] = length
        if len(self._recent) and length:
            positions = torch.arange(max(0, length - TAPS), length)
            ends = to_device(self.ends(self.rows(slot, positions)), self._ends.device)
            self._recent[:, slot, to_device(positions % RECENT, ends.device)] = self._ends[:, ends]

    def copy(self, source: int, slot: int, shared: int, length: int) -> None:
        """The `length` tokens of `source` into `slot` too, which has room for them, and its first `shared` pages."""
        positions = torch.arange(shared * self.page_size, length)
        old, new = (to_device(self.rows(s, positions), self.lengths.device) for s in (source, slot))
        for stored in (self.k, self.v, *((self.k_scale, self.v_scale) if self._stored else ())):
            for layer, x in enumerate(stored):
                if self.is_ring(layer):
                    ring = x.view(self.slots, self._span, *x.shape[1:])
                    ring[slot] = ring[source]
                else:
                    x.flatten(0, 1)[new] = x.flatten(0, 1)[old]
        self._recent[:, slot] = self._recent[:, source]
        self.lengths[slot] = length

    @property
    def free_pages(self) -> int:
        """Pages of the pool that no slot holds."""
        return self.pool.free if self.paged else 0

    def keep(self, layer: int, where: Tensor, k: Tensor, v: Tensor) -> None:
        """Write k and v (1, n, G, D) of `layer` at `where` (n,), counted over the rows of all pages."""
        for new, stored, scales in ((k, self.k, self.k_scale), (v, self.v, self.v_scale)):
            if self._stored:
                new, scale = quantize_kv(new, self._stored)
                scales[layer].flatten(0, 1)[where] = scale[0]
                stored[layer].flatten(0, 1)[where] = new[0]
            else:  # in half the time, but torch has it for no fp8
                stored[layer].flatten(0, 1).index_copy_(0, where, new[0])

    def kept(self, layer: int, slot: int, length: int, rows: Tensor | None, dtype: torch.dtype) -> list[Tensor]:
        """The first `length` keys and values (1, length, G, D) of a slot, or those of these rows of all pages."""

        def take(x: Tensor) -> Tensor:
            return x[slot : slot + 1, :length] if rows is None else x.flatten(0, 1)[rows][None]

        found = [take(x[layer]) for x in (self.k, self.v)]
        if not self._stored:
            return found
        scales = (take(x[layer])[..., None] for x in (self.k_scale, self.v_scale))
        return [(numbers.float() * scale).to(dtype) for numbers, scale in zip(found, scales, strict=True)]

    def as_kept(self, x: Tensor) -> Tensor:
        """Keys or values as they will be when they are kept."""
        if not self._stored:
            return x
        numbers, scale = quantize_kv(x, self._stored)
        return (numbers.float() * scale[..., None]).to(x.dtype)

    def rows(self, slot: int, positions: Tensor) -> Tensor:
        """Where positions (n,) of a slot lie, counted over the rows of all pages; on the host."""
        pages = torch.tensor(self.pool.held[slot] if self.paged else [slot])
        return pages[positions // self.page_size] * self.page_size + positions % self.page_size

    def rows_with_room(self, slot: int, first: int, end: int) -> Tensor:
        """The same of positions `first` to `end`, of which the slot may lack pages: those go where nothing is read."""
        size, held = self.page_size, self.pool.held[slot] if self.paged else [slot]
        positions, room = torch.arange(first, end), len(held) * size
        if room >= end:
            return self.rows(slot, positions)
        nobodys = positions % size if self.paged else torch.tensor(room - 1 + slot * size)  # behind the longest text
        return torch.where(positions < room, self.rows(slot, positions.clamp(max=room - 1)), nobodys)

    def ring_rows(self, slot: int, positions: Tensor) -> Tensor:
        """The same in a layer that keeps its window alone."""
        size = self._ring_page
        return (slot * self._span + positions // size % self._span) * size + positions % size

    def ends(self, where: Tensor) -> Tensor:
        """Where in `_ends` the inputs of rows `where` go: those at the ends of pages; others to page 0, for nobody."""
        page, place = where // self.page_size, where % self.page_size - (self.page_size - self._tail)
        return torch.where(place >= 0, page * self._tail + place, 0)


class Pieces:
    """Pieces of texts on their way into their slots, one after the other as the sequence (1, N) of a forward pass.

    Each attends to what its slot holds and to itself. A cache in 8 bits is attended to as it is kept, so that what a
    text gives does not depend on where it was cut.
    """

    def __init__(self, cache: KVCache, pieces: Sequence[Piece]) -> None:
        self.cache, self.list = cache, pieces
        self._inputs: list[tuple[int, Tensor, Tensor]] = []  # of token shifts, kept when all has gone well
        self._rings: list[tuple[int, Tensor, Tensor]] = []  # keys and values of layers with a window, likewise
        device = cache.lengths.device
        positions = [torch.arange(piece.start, piece.end) for piece in pieces]
        where = [cache.rows(piece.slot, at) for piece, at in zip(pieces, positions, strict=True)]
        slots, ends = (torch.tensor(x) for x in zip(*((piece.slot, piece.end) for piece in pieces), strict=True))
        together = all_to_device([torch.cat(positions), torch.cat(where), slots, ends], device)
        self._positions, self._where, self._slots, self._ends = together
        if len(cache._recent):
            self._plan_shifts(torch.cat(where))
        alone = [piece.start == 0 and not cache._stored for piece in pieces]  # it sees itself, and nothing that is kept
        self._kept = [
            None if alone or not cache.paged else to_device(cache.rows(piece.slot, torch.arange(piece.end)), device)
            for piece, alone in zip(pieces, alone, strict=True)
        ]
        if cache._span:
            self._plan_rings()
        self._alone, self._starts = alone, None
        if all(alone) and len(pieces) > 1 and device.type != "cpu":  # where a kernel for each piece is as fast
            ends = torch.tensor([0, *(piece.tokens for piece in pieces)]).cumsum(0)
            self._starts = to_device(ends.to(torch.int32), device)

    def place(self, T: int) -> Tensor:
        """Positions (1, N) of all tokens, each in its own text."""
        require(len(self._positions) == T, f"tokens: the pieces have {len(self._positions)}, got {T}")
        return self._positions[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k and v (1, N, G, D) of `layer`; attention of q (1, N, H, D), causal in each text."""
        cache = self.cache
        attention, window, is_ring = cache.ops.attention, cache.windows[layer], cache.is_ring(layer)
        if is_ring:
            self._rings.append((layer, k[:, self._ring_from], v[:, self._ring_from]))
        else:
            cache.keep(layer, self._where, k, v)
        if self._starts is not None:  # without a window one that hides nothing, for which the reference computes less
            hidden = max(piece.tokens for piece in self.list) - 1
            window = hidden if window is None else min(hidden, window)
            return attention(q, k, v, causal=True, window=window, cu_seqlens=self._starts)
        out, first, single = [], 0, len(self.list) == 1
        for i, piece in enumerate(self.list):
            own = slice(first, first := first + piece.tokens)
            mine, *seen = (q, k, v) if single else (x[:, own] for x in (q, k, v))
            if is_ring and not self._alone[i]:
                past = cache.kept(layer, piece.slot, 0, self._past[i], q.dtype)
                seen = [torch.cat((old, cache.as_kept(new)), dim=1) for old, new in zip(past, seen, strict=True)]
            elif not self._alone[i]:
                seen = cache.kept(layer, piece.slot, piece.end, self._kept[i], q.dtype)
            out.append(attention(mine, *seen, causal=True, window=narrowed(window, seen[0].shape[1])))
        return out[0] if single else torch.cat(out, dim=1)

    def previous(self, place: int, x: Tensor, taps: int) -> Sequence[Tensor]:
        """Keeps x (1, N, C), the input of token shift `place`; x as it was 1 ... `taps` positions before."""
        old = self.cache._recent[place].flatten(0, 1)[self._old].masked_fill(self._before_all, 0.0)
        self._inputs.append((place, x[0, self._newest], x[0, self._last]))
        both = torch.cat((old, x[0]))
        return [both[self._sources[i]][None] for i in range(taps)]

    def advance(self) -> None:
        """Count the tokens of all pieces."""
        cache = self.cache
        for place, newest, last in self._inputs:
            cache._recent[place].flatten(0, 1)[self._newest_to] = newest
            cache._ends[place][self._last_to] = last
        for layer, k, v in self._rings:
            cache.keep(layer, self._ring_to, k, v)
        cache.lengths[self._slots] = self._ends.to(torch.int32)

    def _plan_rings(self) -> None:
        """Where the window before each piece lies, which tokens at its end are kept, and where they go."""
        cache, device = self.cache, self._where.device
        window, size = max(w for w in cache.windows if w is not None), cache._span * cache._ring_page
        self._past, came, goes, first = [], [], [], 0
        for piece in self.list:
            seen = torch.arange(max(0, piece.start - window), piece.start)
            self._past.append(to_device(cache.ring_rows(piece.slot, seen), device))
            kept = torch.arange(max(piece.start, piece.end - size), piece.end)
            came.append(kept - piece.start + first)
            goes.append(cache.ring_rows(piece.slot, kept))
            first += piece.tokens
        self._ring_from, self._ring_to = (to_device(torch.cat(x), device) for x in (came, goes))

    def _plan_shifts(self, where: Tensor) -> None:
        """Which rows of [kept inputs, inputs of the pieces] lie 1 ... TAPS before each; which are kept, and where."""
        pieces, device, cache = self.list, self._where.device, self.cache
        before = [(piece.slot, piece.start - i) for piece in pieces for i in range(TAPS, 0, -1)]
        kept, first = len(before), 0
        sources: list[list[int]] = [[] for _ in range(TAPS)]
        newest: list[int] = []
        newest_to: list[int] = []
        for n, piece in enumerate(pieces):
            for i in range(1, TAPS + 1):
                own = [kept + first + t - i for t in range(piece.tokens)]
                own[:i] = [TAPS * n + TAPS - i + t for t in range(min(i, piece.tokens))]
                sources[i - 1] += own
            recent = range(max(0, piece.tokens - RECENT), piece.tokens)
            newest += [first + t for t in recent]
            newest_to += [piece.slot * RECENT + (piece.start + t) % RECENT for t in recent]
            first += piece.tokens
        self._old = to_device(torch.tensor([slot * RECENT + at % RECENT for slot, at in before]), device)
        self._before_all = to_device(torch.tensor([[at < 0] for _, at in before]), device)
        self._sources = to_device(torch.tensor(sources), device)
        self._newest, self._newest_to = (to_device(torch.tensor(x), device) for x in (newest, newest_to))
        last = (where % cache.page_size >= cache.page_size - cache._tail).nonzero()[:, 0]  # at the ends of pages
        self._last, self._last_to = (to_device(x, device) for x in (last, cache.ends(where[last])))


class Padded:
    """One piece of a text at a time on its way into its slot, padded to `tokens`: of a pass the sequence (1, tokens).

    It attends to itself where it begins the text, with `seen` = 0; else to what its slot holds, and ends within the
    first `seen` positions. All that depends on the piece lies in one tensor, so that a CUDA graph may read any. What
    stands behind its end is seen by nobody: nothing looks ahead, and its keys and values go where nothing is read.
    """

    def __init__(self, cache: KVCache, tokens: int, seen: int) -> None:
        require(not (seen and cache._span), "seen: layers that keep their window alone have no rows of all positions")
        self.cache, self.length, self.seen = cache, tokens, seen
        self._recent, self._taps = (n * (len(cache._recent) > 0) for n in (RECENT, TAPS))
        self._ring = min(tokens, cache._span * cache._ring_page)  # keys that layers with a window keep
        sizes = [tokens] * 3 + [seen, self._taps, self._taps, *[self._recent] * 2, *[self._ring] * 2, 1, 1, 1]
        self._given = torch.zeros(sum(sizes), dtype=torch.int64, device=cache.lengths.device)
        given = iter(self._given.split(sizes))
        self.tokens, self._positions, self._where, self._rows, self._before, self._old = (next(given) for _ in range(6))
        self._newest, self._newest_to, self._ring_from, self._ring_to = (next(given) for _ in range(4))
        self._last, self._slot, self._end = given

    def give(self, piece: Piece, text: Sequence[int]) -> None:
        """From now on it is `text`, the tokens of `piece`, that is read; the host waits for nothing."""
        cache, (slot, start, T) = self.cache, piece
        tokens, positions = torch.tensor([*text, *[text[-1]] * (self.length - T)]), start + torch.arange(self.length)
        given = [tokens, positions, cache.rows_with_room(slot, start, start + self.length)]
        if self.seen:  # no row of others, which may be no numbers
            given.append(cache.rows(slot, torch.arange(self.seen).clamp(max=piece.end - 1)))
        # Where there are fewer than are kept, the last one goes to its place more than once.
        if self._recent:
            before, newest = start - self._taps + torch.arange(self._taps), self._newest_of(T, self._recent)
            places = (slot * RECENT + at % RECENT for at in (before, start + newest))
            given += [before, next(places), newest, next(places)]
        if self._ring:
            newest = self._newest_of(T, self._ring)
            given += [newest, cache.ring_rows(slot, newest)]
        given.append(torch.tensor([T - 1, slot, piece.end]))
        self._given.copy_(to_device(torch.cat(given), self._given.device))

    @staticmethod
    def _newest_of(T: int, n: int) -> Tensor:
        return (max(0, T - n) + torch.arange(n)).clamp(max=T - 1)

    def place(self, T: int) -> Tensor:
        """Positions (1, tokens), each in its own text."""
        return self._positions.clamp(max=self.cache.config.block_size - 1)[None]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Keeps k and v (1, tokens, G, D) of `layer`; causal attention of q (1, tokens, H, D) to all kept."""
        cache = self.cache
        attention, window = cache.ops.attention, cache.windows[layer]
        if cache.is_ring(layer):
            cache.keep(layer, self._ring_to, k[:, self._ring_from], v[:, self._ring_from])
        else:
            cache.keep(layer, self._where, k, v)
        if not self.seen:
            window = narrowed(window, self.length)
            return attention(q, cache.as_kept(k), cache.as_kept(v), causal=True, window=window)
        # Queries stand at their positions among as many as there are keys, so that causality hides what is behind them.
        among = q.new_zeros(1, self.seen, *q.shape[2:]).index_copy_(1, self._positions, q)
        kept = cache.kept(layer, 0, 0, self._rows, q.dtype)
        out = attention(among, *kept, causal=True, window=narrowed(window, self.seen))
        return out.index_select(1, self._positions)

    def previous(self, place: int, x: Tensor, taps: int) -> Sequence[Tensor]:
        """Keeps x (1, tokens, C), the input of token shift `place`; x as it was 1 ... `taps` positions before."""
        cache = self.cache
        recent = cache._recent[place].flatten(0, 1)
        both = torch.cat((recent[self._old].masked_fill((self._before < 0)[:, None], 0.0), x[0]))
        recent[self._newest_to] = x[0, self._newest]
        if cache._tail:
            cache._ends[place][cache.ends(self._where)] = x[0]
        return [both[TAPS - i : TAPS - i + self.length][None] for i in range(1, taps + 1)]

    def finish(self, x: Tensor) -> Tensor:
        """Counts the tokens of the piece; of x (1, tokens, C) the row (1, C) at its end."""
        self.cache.lengths.index_copy_(0, self._slot, self._end.to(torch.int32))
        return x[0].index_select(0, self._last)


def to_device(x: Tensor, device: torch.device) -> Tensor:
    """x of the host on `device`; on CUDA by a copy that the host does not wait for."""
    return x.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else x.to(device)


def all_to_device(tensors: list[Tensor], device: torch.device) -> Sequence[Tensor]:
    """Vectors int64 of the host on `device`, by one copy for all."""
    return to_device(torch.cat(tensors), device).split([len(x) for x in tensors])
