"""What the server says of itself: its model, its health, and figures for the live panel and for Prometheus."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from gptfast import mfu
from gptfast.engine import Engine
from gptfast.serve.batcher import Batcher
from gptfast.serve.meter import Meter
from gptfast.serve.replies import Spelling
from gptfast.tokenizer import Tokenizer


class State:
    """Facts of a server whose engine is `batcher`'s. `peak` is that of its device, None where it is not known."""

    def __init__(self, engine: Engine, batcher: Batcher, meter: Meter, model: str, peak: mfu.Peak | None) -> None:
        assert engine.tokenizer is not None
        self.tokenizer: Tokenizer = engine.tokenizer
        self.batcher, self.meter, self.model, self.peak = batcher, meter, model, peak
        self.context, self.vocab_size = engine.config.block_size, engine.config.vocab_size
        bos = self.tokenizer.bos
        self.plain_stops = () if bos is None else (bos,)  # a text that is continued ends where the next one begins
        self.paths: tuple[str, ...] = ()
        self.spelling = Spelling(self.tokenizer)
        self._engine, self._started = engine, int(time.time())
        cache = engine.cache
        self._room = cache.pages * cache.page_size
        self._position_bytes = _position_bytes(engine)
        self._kernels = {op: how for op, (how, _) in engine.model.ops.chosen.items()}
        self._device = _device_name(engine)

    @property
    def healthy(self) -> bool:
        return self.batcher.alive and not self.batcher.closing

    def health(self) -> dict[str, Any]:
        return {"status": "ok" if self.healthy else "closing", "ready": self.healthy, "model": self.model}

    def models(self) -> dict[str, Any]:
        entry = {"id": self.model, "object": "model", "created": self._started, "owned_by": "gptfast"}
        return {"object": "list", "data": [{**entry, "context_length": self.context}]}

    def stats(self) -> dict[str, Any]:
        """What the page's live panel shows. Rates are those of the last seconds, of the time that the engine worked."""
        steps, ttft_s = self.meter.recent()
        seconds = sum(step.seconds for step in steps)
        busy = len(self._engine.running)
        return {
            "tokens_per_s": sum(step.tokens for step in steps) / seconds if seconds else 0.0,
            "ttft_ms_p50": None if ttft_s is None else 1000 * ttft_s,
            "slots": self.batcher.slots,
            "busy": busy,
            "queue": max(self.batcher.open - busy, 0),
            "queue_limit": self.batcher.queue,
            "kv_used": steps[-1].kept if steps and busy else 0,
            "kv_total": self._room,
            "mbu": self._mbu(),
            "kernels": self._kernels,
            "model": self.model,
            "context_length": self.context,
            "device": self._device,
            "weights": self._engine.why,
            "tools": self._tools(),
            "prompt_tokens_read": self._engine.tokens_read,
            "prompt_tokens_reused": self._engine.tokens_reused,
            "ended": self.meter.ends(),
        }

    def metrics(self) -> bytes:
        stats = self.stats()
        gauges: dict[str, tuple[str, float]] = {
            "slots": ("answers that run at once", stats["slots"]),
            "slots_busy": ("answers that run", stats["busy"]),
            "queue": ("answers that wait", stats["queue"]),
            "kv_positions": ("positions of the cache", stats["kv_total"]),
            "kv_positions_used": ("positions of the cache that hold something", stats["kv_used"]),
            "prompt_tokens_read": ("of prompts, since the start", stats["prompt_tokens_read"]),
            "prompt_tokens_reused": ("of prompts that the cache held already", stats["prompt_tokens_reused"]),
            "tokens_per_second": ("of the last seconds, while the engine worked", stats["tokens_per_s"]),
        }
        if stats["mbu"] is not None:
            gauges["mbu"] = ("memory bandwidth utilization of decoding", stats["mbu"])
        return self.meter.prometheus(gauges).encode()

    def _mbu(self) -> float | None:
        """Bytes that the last decoding steps had to read, over their time and the peak bandwidth."""
        steps, _ = self.meter.recent()
        decoding = [step for step in steps if step.decoding and step.tokens]
        seconds = sum(step.seconds for step in decoding)
        if not seconds:
            return None
        read = sum(self._engine.matrix_bytes + step.kept * self._position_bytes for step in decoding)
        return mfu.mbu(seconds, read, self.peak)

    def _tools(self) -> Mapping[str, bool]:
        tools = self.batcher.tools
        is_chat = self.batcher.chat is not None
        return {"calculator": is_chat and tools.calculator, "python": is_chat and tools.python is not None}


def _position_bytes(engine: Engine) -> int:
    """Bytes of the keys and values of one position."""
    config, keys = engine.config, engine.cache.k[0]
    return config.n_layer * 2 * config.kv_heads * config.head_dim * keys.element_size()


def _device_name(engine: Engine) -> str:
    from gptfast.log import hardware

    return str(hardware(engine.cache.lengths.device)["name"])
