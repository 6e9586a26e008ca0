"""Conversations with a model: their form in tokens, the tools it may call, and the answers it gives."""
