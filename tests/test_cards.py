"""What other GPUs than the measured ones take: whose tiles, which messages, and what the tables say of them."""

from types import SimpleNamespace

import pytest
import torch

import kernels
from kernels import _triton
from kernels._triton import Launcher, launching, tile_arch
from kernels.attention import attention_triton
from kernels.proof import aot, cards
from kernels.proof.machine_code import CHIPS


@pytest.fixture
def device(monkeypatch):
    """device(capability, hip): the one GPU that torch sees."""

    def there(major: int, minor: int, hip: str | None = None) -> None:
        monkeypatch.setattr(torch.version, "hip", hip)
        properties = SimpleNamespace(major=major, minor=minor, multi_processor_count=104)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "the GPU")
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (major, minor))
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: properties)
        _triton._properties.cache_clear()

    yield there
    _triton._properties.cache_clear()


@pytest.mark.parametrize("hip, arch", [(None, 90), ("6.3", 0)])
def test_an_mi250_that_calls_itself_9_0_is_no_hopper(device, hip, arch):
    device(9, 0, hip)
    assert _triton.arch(torch.empty(0)) == arch and _triton.multiprocessors(torch.empty(0)) == 104


def launched(arch: int, **shape: int) -> list[str]:
    """The kernels of attention forward and backward at that architecture."""
    names: list[str] = []
    q, k, v = (torch.empty(1, 256, 2, 128, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in "qkv")
    with launching(Launcher(lambda kernel, grid, *args, **kwargs: names.append(kernel.__name__), arch, 104)):
        attention_triton(q, k, v).sum().backward()
    return names


def test_hoppers_kernels_are_for_hopper_alone():
    assert any(name.endswith("hopper") for name in launched(90))
    for arch in (0, 80, 86, 89, 100, 103, 120):
        assert not any(name.endswith("hopper") for name in launched(arch))


def test_kernels_are_taken_unasked_on_nvidia_from_sm_80_and_on_amd_when_asked_for(device):
    device(8, 6)
    assert kernels.load("auto").chosen["attention"] == ("triton", "CUDA is available")
    device(9, 4, "6.3")
    implementation, why = kernels.load("auto").chosen["attention"]
    assert implementation == "cpu" and "AMD" in why
    assert kernels.load("triton").chosen["attention"][0] == "triton"
    device(7, 5)
    assert "sm_80 or newer, also in fp16" in kernels.load("auto").chosen["attention"][1]
    with pytest.raises(RuntimeError, match="sm_75"):
        kernels.load("triton")


@pytest.mark.parametrize("name, arch", [
    ("A100", 80), ("NVIDIA A100", 80), ("RTX 3090", 86), ("A10", 86), ("NVIDIA GeForce RTX 4090", 89), ("L4", 89),
    ("L40S", 89), ("H200", 90), ("B300", 103), ("rtx 5070 ti", 120), ("GB10", 120), ("RTX PRO 6000", 120),
    ("sm_90a", 90), ("8.9", 89), ("sm_103", 103), ("120", 120), ("T4", 75), ("RTX 2080 Ti", 75),
])  # fmt: skip
def test_a_card_is_known_by_its_name(name, arch):
    assert cards.arch_of(name) == arch


def test_an_unknown_card_is_an_error_that_names_the_known():
    with pytest.raises(ValueError, match=r"--gpu=Voodoo 2: not known; give its compute capability.*RTX 40"):
        cards.arch_of("Voodoo 2")


def test_every_known_chip_takes_tiles_that_somebody_chose_and_they_fit_it():
    rows = aot.read_report()
    for arch, chip in CHIPS.items():
        assert tile_arch(arch) in (80, 86, 90, 100)
        assert all(row["shared_bytes"] <= chip.shared_per_program for row in rows if row["arch"] == tile_arch(arch))
    assert tile_arch(121) == tile_arch(120) and tile_arch(94) == tile_arch(0) == 0


def test_the_page_of_a_card_says_whose_tiles_and_why():
    page = "\n".join(cards.page("L4"))
    assert "those of sm_86" in page and "none of its kind" in page and "BLOCK_M=64" in page
    assert "variant gluon: attention by Gluon: q: the kernel is for sm_90, this is sm_89" in page
    assert "variant gluon: takes it" in "\n".join(cards.page("H100"))
    assert "no kernels" in next(cards.page("T4"))


def test_the_table_of_cards_has_them_all():
    table = cards.markdown()
    assert all(f"| sm_{arch} |" in table for arch in CHIPS)
    assert table.count("| H200 |") == 1 and table.count("never |") == len(CHIPS) - 1
