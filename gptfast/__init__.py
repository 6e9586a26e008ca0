"""A GPT to train and sample: model, optimizers, data, checkpoints, measures. Imports kernels; `train` and `bench` use it."""
