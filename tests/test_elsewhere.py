"""What judges kernels on a GPU, run on a second device that needs none: every tensor is made where the others lie."""

import pytest
import test_attention
import torch
from elsewhere import Elsewhere
from oracle import check_parity, neighbours
from torch import Tensor

import kernels
from kernels.attention import attention_reference


def test_tensors_of_two_devices_do_not_meet():
    with Elsewhere():
        x = torch.ones(3, device="meta")
        assert x.device.type == "meta" and (x * 2).sum().item() == 6
        assert torch.equal(torch.ones(3).to(x) + x, x * 2)
        with pytest.raises(RuntimeError, match="same device"):
            x + torch.ones(3)


@pytest.mark.parametrize("op", kernels.OPS.values(), ids=lambda op: op.name)
def test_the_oracle_stays_on_the_tensors_device(op):
    """With the reference in the kernel's place: cotangents, jitter and truth are drawn where the arguments are."""
    with Elsewhere():
        arguments = op.inputs(**op.parity[-1], dtype=torch.float16, device="meta")[0]
        assert {a.device.type for a in arguments if isinstance(a, Tensor)} == {"meta"}
        check_parity(op, op.reference, arguments)
        assert all(error >= 0 for error in neighbours(op.reference, arguments, draws=1)[0].errors)


def test_the_judge_of_attentions_options_stays_on_the_tensors_device():
    with Elsewhere():
        q, k, v = (x.to("meta") for x in test_attention.qkv(5, 5))
        test_attention.check(q, k, v, attention_reference, window=2)
