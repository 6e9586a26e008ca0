"""Parameters in fp32 beside activations of 16 bits, as in training: nothing is computed once for each layout."""

import pytest

import kernels
from kernels.proof import aot


def lengths(name: str, parameters: str) -> dict[str, int]:
    """Lines of PTX of each kernel that a training step's rows launch on an H100."""
    launched = aot.launches(kernels.OPS[name], dict(M=512, N=768, parameters=parameters), 90)
    return {launch.kernel.__name__: aot.compile_launch(launch, 90).asm["ptx"].count("\n") for launch in launched}


@pytest.mark.parametrize("name", ["add_layernorm", "rmsnorm", "activation"])
def test_parameters_of_another_dtype_cost_no_second_computation(name):
    """Triton spreads rows of fp32 over the threads otherwise than tiles of 16 bits, and what depends on both may be
    computed in both ways: the backward of GELU had twice the instructions, and took 2.6 times as long on an H200.
    """
    same, wide = lengths(name, ""), lengths(name, "float32")
    assert len(same) >= 2 and same.keys() == wide.keys()
    assert not {kernel: (n, same[kernel]) for kernel, n in wide.items() if n > 1.1 * same[kernel]}
