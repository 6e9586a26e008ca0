"""What judges kernels without a GPU: interpreter, emulator of Hopper's protocol, compiler, count of the traffic."""

"""What judges kernels without a GPU: interpreter, emulator of Hopper's protocol, compiler, count of the traffic."""
