"""Preparing data and training models, each a command: `python -m train.prepare`, `train.pretrain`, `train.speedrun`."""

from gptfast.runtime import set_up_process

set_up_process()  # before any page here imports torch
