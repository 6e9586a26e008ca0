"""Preparing data and training models, each a command: `python -m train.prepare`, `train.pretrain`, `train.speedrun`."""

from gptfast.runtime import settle

settle()  # before any page here imports torch
