"""Text from a GPT: prompts go in once, every step gives each running request its next token.

    engine = Engine(model, slots=8, tokenizer=tokenizer)
    request = engine.submit("Once upon", Sampling(max_tokens=100, temperature=0.8, top_k=200, seed=1, stop=("\\n",)))
    while engine.busy:
        for update in engine.step():  # submit and cancel at any time between steps
            print(update.text, end="")
    request.tokens, request.text, request.finish_reason

    tokens = generate(model, tokens, 100, temperature=0)  # (B, T) -> (B, T + 100)

Between two steps up to `prefill_tokens` tokens of prompts are read, of several requests together and of a long one in
pieces: no request waits longer for its next token than a step and so many tokens take, and one pass over block_size
tokens where some text is longer than that. While nobody waits for a next token, up to `prefill_alone` are read at once:
on CUDA one pass of 960 tokens takes a host as long as each of two of 480. With a `page_size` the pool may be smaller
than what all could need: texts take pages as they grow, who was let in last gives way and is read again, and what a
text has in common with an earlier one is not read again while the pool still holds it.

What a request draws depends on its prompt, its settings and its seed: each draws with random numbers of its own, by
position, a step has the same shape whatever the slots hold, and no kernel adds up over the rows of a batch. So a
decoding step gives a row the same bits in any company. Reading a prompt does not: the products of other shapes, cut
elsewhere or beside others, may differ in the last bit, in fp32 some 1e-6 of a logit, and so may those of another number
of slots or of guesses, and of a text that is read again after it gave way. Such a bit changes a token only where two
are as likely as each other to that precision; in 16 bits that happens. With float16 and int8 weights on a CPU products
are the same to the bit for any number of rows.

On CUDA the host hears of tokens a step late (`lag`). A request that ends with a stop token or a stop string, or is
cancelled, may have been given a step more, which nobody sees.

Past the model's block_size each new token comes from a forward pass over the last block_size tokens, as in nanoGPT: all
positions have changed, and with them every key and value.

A draft model may guess the next tokens (Leviathan et al., arXiv:2211.17192). A guess is kept where it is the token that
the model itself draws with the request's random number, so the text is that without a draft, greedy or not.

sampling.py   what a request wants, and the drawing     scheduler.py  who runs, waits and gives way
requests.py   a request, and what a step adds to it     loop.py       the step on the device
text.py       tokens to text as they come               decoder.py    a model over its cache
pages.py      whose page is which                       cache.py      keys and values
weights.py    matrices as decoding wants them           engine.py     all of it together
"""

from __future__ import annotations

import torch
from torch import Tensor

from gptfast.engine.cache import KVCache
from gptfast.engine.engine import Engine
from gptfast.engine.requests import Logprob, Request, Update
from gptfast.engine.sampling import Sampling
from gptfast.engine.weights import Weights
from gptfast.model import GPT
from kernels.op import require

__all__ = ["Engine", "KVCache", "Logprob", "Request", "Sampling", "Update", "Weights", "generate"]

MOST_SLOTS = 32  # of generate(): rows beyond wait until one is done


def generate(
    model: GPT,
    tokens: Tensor,
    max_new_tokens: int,
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    generator: torch.Generator | None = None,
    weights: Weights = "auto",
) -> Tensor:
    """Continues each row of `tokens (B, T)` int64 by `max_new_tokens`; returns (B, T + max_new_tokens).

    Drawn as Sampling says, each row by a seed from `generator`, which lives on the device of `tokens`; None is torch's
    own generator. Raises ValueError as Engine and its submit do.
    """
    require(tokens.dim() == 2, f"tokens: expected (B, T), got {tuple(tokens.shape)}")
    seeds = torch.randint(2**63 - 1, (len(tokens),), generator=generator, device=tokens.device).tolist()
    engine = Engine(model, slots=max(1, min(len(tokens), MOST_SLOTS)), weights=weights)
    requests = [
        engine.submit(prompt, Sampling(max_new_tokens, temperature, top_k, top_p, seed=seed))
        for prompt, seed in zip(tokens.tolist(), seeds, strict=True)
    ]
    while engine.busy:
        engine.step()
        for request in requests:
            require(request.finish_reason != "error", request.error)
    new = torch.tensor([request.tokens for request in requests], dtype=tokens.dtype, device=tokens.device)
    return torch.cat((tokens, new.view(len(tokens), max_new_tokens)), dim=1)
