"""A model behind HTTP: OpenAI's API, nanochat's, a page to talk to it, and figures of how it is doing.

    python -m gptfast.serve --out_dir=out-chat/rl          # http://127.0.0.1:8000

    POST /v1/chat/completions, /v1/completions   whole, or by server-sent events with "stream": true
    GET  /v1/models
    POST /chat/completions                       nanochat's stream: {"token": ..., "gpu": 0} ... {"done": true}
    GET  /health, /stats, /metrics               JSON, JSON for the page's live panel, Prometheus
    GET  /                                       the page

Where an answer calls a tool, `content` holds what it says alone. The calls and what came of them are in addition: in a
stream `delta.part` {"type": "python" | "python_output", "text": ...} as they come, in a whole answer `message.parts`,
which may be given back as the content of an assistant's message; in nanochat's stream "part" beside "token".

One thread runs the engine, and all requests in it at once. HTTP is the event loop's, which never waits for a step.
"""
