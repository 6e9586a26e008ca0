"""Preparing data and training models, each a command: `python -m train.prepare`, `train.pretrain`, `train.speedrun`."""
