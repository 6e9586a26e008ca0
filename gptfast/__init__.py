"""A GPT to train and sample: model, optimizers, data, checkpoints and measures. Built on `kernels`."""
