"""The static roofline: what is counted is right, and the report is what the kernels do now."""

import pytest
import torch

from kernels import OPS
from kernels._triton import jit, tl
from kernels.proof import traffic
from kernels.proof.interpret import interpreting
from kernels.proof.options import varied

REPORTED = sorted({row["op"] for row in traffic.read_report()})


@jit
def _copy_kernel(x_ptr, out_ptr, N, TWICE: tl.constexpr, BLOCK: tl.constexpr):
    """One program copies BLOCK elements; if TWICE it walks its part of x again."""
    n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(x_ptr + n, n < N)
    if TWICE:
        x += tl.load(x_ptr + n, n < N)
    tl.store(out_ptr + n, x, n < N)


def counted(l2_bytes: float, **kwargs) -> float:
    """Bytes of a copy of 1,000 fp32 by 8 programs on 4 multiprocessors."""
    counter = traffic._Counter(4, l2_bytes)
    x, out = torch.zeros(1000), torch.zeros(1000)
    with interpreting(counter.guard):
        _copy_kernel[(8,)](x, out, 1000, BLOCK=128, **kwargs)
    return counter.bytes


def test_a_copy_moves_its_argument_and_its_result_once():
    assert counted(0, TWICE=False) == 2 * 4000


def test_what_a_program_reads_again_counts_as_far_as_it_overflows_the_cache():
    assert counted(1 << 20, TWICE=True) == 2 * 4000
    assert counted(0, TWICE=True) == 3 * 4000
    running = 4 * 4000 / 8
    assert counted(running / 2, TWICE=True) == 2.5 * 4000


def test_torch_between_launches_counts_and_views_do_not():
    counter = traffic._Counter(1, 0)
    x = torch.zeros(10, 100)
    with traffic._TorchTraffic(counter):
        x.t()[3:5].expand(7, 2, 10)
        torch.empty(50)
        assert counter.bytes == 0
        x.t().contiguous()
        assert counter.bytes == 8000
        torch.zeros(100)
        assert counter.bytes == 8400


@pytest.mark.parametrize("name", REPORTED)
def test_the_report_says_what_is_counted(name):
    """The smallest case of each op, counted anew."""
    row = min((r for r in traffic.read_report() if r["op"] == name), key=lambda r: r["moved_bytes"])
    assert row in traffic.rows(OPS[name], row["dims"])


def test_every_op_that_memory_bounds_is_in_the_report():
    bound = {
        (op.name, str(dict(dims)))
        for op in OPS.values()
        for dims in (*op.bench, *varied(op))
        if any(map(traffic.is_bound_by_memory, op.cost(**dims, itemsize=2)))
    }
    assert bound == {(row["op"], str(row["dims"])) for row in traffic.read_report()}


# What moves more than a twentieth too much, and why that stands
KNOWN = {
    ("add_layernorm", "forward", 65536): 1.25,  # rows too long for registers are read again
    ("layernorm", "backward", 65536): 2.3,  # rows too long for registers are read again, and once more for dweight
    ("add_layernorm", "backward", 65536): 2.2,
    ("rmsnorm", "backward", 65536): 2.0,
    ("add_rmsnorm", "backward", 65536): 1.95,
    ("attention", "forward", None): 1.21,  # every tile finds its documents in their table anew
    ("attention", "backward", None): 1.61,  # two kernels, for dq and for dk and dv, and each reads what the other reads
    ("append_attention", "forward", None): 1.28,  # as decode_attention, and the angles of all positions
    ("decode_linear", "forward", 11008): 1.2,  # rows of x read again for their norm by programs that share little L2
    ("decode_attention", "forward", None): 1.24,  # of many queries, parts in fp32; of a small window, its table
}


@pytest.mark.parametrize("row", traffic.read_report(), ids=lambda row: f"{row['op']} {row['direction']}")
def test_no_kernel_moves_much_more_than_it_must(row):
    most = KNOWN.get((row["op"], row["direction"], row["dims"].get("N")), 1.05)
    assert row["ratio"] <= most
