"""Judges kernels without a GPU: interpreter, emulator of Hopper's barriers, ahead-of-time compiler, traffic counter."""
