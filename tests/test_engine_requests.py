"""Requests that harm nobody else: what cannot be drawn is refused, or ends alone."""

from __future__ import annotations

import torch

import kernels
from gptfast.config import GPTConfig
from gptfast.engine import Engine, Sampling
from gptfast.model import GPT
from gptfast.tokenizer import BPETokenizer

OPS = kernels.load("reference")


def test_ids_that_have_no_token_are_never_drawn() -> None:
    """As in cl100k_base, whose special tokens do not follow on its others."""
    with_gaps = BPETokenizer.from_ranks({bytes([byte]): byte for byte in range(256)}, {"<|bos|>": 300})
    assert with_gaps.holes().tolist() == list(range(256, 300))
    torch.manual_seed(0)
    model = GPT(GPTConfig(block_size=64, vocab_size=320, n_layer=1, n_head=1, n_embd=8), OPS).eval()
    with torch.no_grad():
        model.lm_head.weight[256:300] *= 50
    engine = Engine(model, slots=2, tokenizer=with_gaps)
    requests = [engine.submit("abc", Sampling(max_tokens=60, temperature=t, seed=1)) for t in (0.0, 1.0)]
    while engine.busy:
        engine.step()
    tokens = [token for request in requests for token in request.tokens]
    assert len(tokens) == 120 and not set(tokens) & set(range(256, 300)) and max(tokens) <= 300
