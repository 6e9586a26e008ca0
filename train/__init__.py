"""Preparing data and training models, each a command: `python -m train.prepare`, `train.pretrain`, `train.speedrun`."""

from gptfast.parallel import bound_spinning

bound_spinning()  # before any page here imports torch
