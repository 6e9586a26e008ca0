"""Utilization of the hardware: peaks with sources, FLOPs per token, and three utilization figures.

    found = peak_of(torch.device("cuda"))              # or peak("H100 SXM"), Peak.given(989); None on a CPU
    utilization(tokens_per_s, config, T, peak=found)   # {"mfu": 0.41, "mfu_palm": 0.44, "hfu": 0.42}

    mfu       exact matrix-multiply FLOPs of forward and backward, lm_head included. A (query, key) pair that attention
              sees counts and a masked one does not, so causal attention counts once
    mfu_palm  6N + 12 L H Q T per token, which counts the masked half too (PaLM, arXiv:2204.02311, appendix B; nanoGPT
              prints this one; nanochat too, with a layer's window in T's place). GPT-2 124M scores 7% more by it than
              by `mfu` at T = 1024, 71% more at T = 32768
    hfu       `mfu` plus the products that the backward pass recomputes

Every peak is dense: datasheet figures with 2:4 sparsity were halved. 16-bit products are summed in fp32, which GeForce
cards do at half of the rate usually quoted for them. Unknown values are None and print as n/a; nothing is guessed.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch

from .config import SMEAR_GATE_CHANNELS, VALUE_GATE_CHANNELS, GPTConfig

DTYPES = ("bf16", "fp16", "tf32", "fp32", "fp8", "int8")
_FIGURES = (*DTYPES, "bytes_per_s")
_DTYPE_OF_TORCH = {
    torch.bfloat16: "bf16", torch.float16: "fp16", torch.float32: "fp32", torch.int8: "int8",
    torch.float8_e4m3fn: "fp8", torch.float8_e5m2: "fp8",
}  # fmt: skip


@dataclass(frozen=True)
class Peak:
    """The peak of one device: dense FLOP/s by input dtype, and memory bytes/s. None where unknown.

    `tf32` is fp32 matrices multiplied as TF32; `fp32` is full fp32. One device is what torch counts as one: a GCD of an
    MI250X, one of the four GPUs on an A16 board. `kind` says where the figures come from: a vendor's datasheet, the
    user, or a measurement on this machine.
    """

    device: str
    bf16: float | None = None
    fp16: float | None = None
    tf32: float | None = None
    fp32: float | None = None
    fp8: float | None = None
    int8: float | None = None
    bytes_per_s: float | None = None
    source: str = ""
    kind: Literal["datasheet", "given", "measured"] = "datasheet"
    memory_gb: float | None = None
    power_w: float | None = None

    def flops(self, dtype: str | torch.dtype) -> float | None:
        """Returns FLOP/s at `dtype`: one of DTYPES, or a torch dtype (float32 means full fp32; use "tf32" for TF32)."""
        name = _DTYPE_OF_TORCH.get(dtype) if isinstance(dtype, torch.dtype) else dtype
        if name not in DTYPES:
            raise ValueError(f"dtype {dtype}: peaks are known for {', '.join(DTYPES)}")
        return getattr(self, name)

    @classmethod
    def given(cls, tflops: float, gb_per_s: float | None = None) -> Peak:
        """Returns a peak given by the user, valid for whatever dtype the run uses."""
        if not tflops > 0:
            raise ValueError(f"peak_tflops {tflops}: must be above 0")
        figures = dict.fromkeys(DTYPES, tflops * 1e12)
        bytes_per_s = None if gb_per_s is None else gb_per_s * 1e9
        return cls("given", **figures, bytes_per_s=bytes_per_s, source="--peak_tflops", kind="given")

    @classmethod
    def measured(cls, device: str, flops: Mapping[str, float], bytes_per_s: float | None, how: str) -> Peak:
        """Returns a peak measured on this machine. `flops`: FLOP/s by dtype name. `how`: command, date and clocks."""
        figures = {name: flops.get(name) for name in DTYPES}
        return cls(device, **figures, bytes_per_s=bytes_per_s, source=how, kind="measured")


# --- the table ------------------------------------------------------------------------------------

_NVIDIA = "https://www.nvidia.com/en-us/"
SOURCES = {
    "pascal": "NVIDIA Tesla P100, P40 and P4 datasheets (no tensor cores: fp16 and int8 are the CUDA cores')",
    "volta": "NVIDIA V100 datasheet, "
    "https://images.nvidia.com/content/technologies/volta/pdf/volta-v100-datasheet-update-us-1165301-r5.pdf",
    "t4": f"NVIDIA T4 datasheet, {_NVIDIA}data-center/tesla-t4/; bandwidth from the product brief",
    "turing": "NVIDIA Turing GPU architecture whitepaper, appendix tables (Quadro RTX and TITAN RTX accumulate in "
    "fp32 at full rate); RTX 4000 and 5000: Quadro RTX datasheets",
    "a100": "NVIDIA A100 datasheet, the figures without sparsity, https://www.nvidia.com/content/dam/en-zz/Solutions/"
    "Data-Center/a100/pdf/nvidia-a100-datasheet-us-nvidia-1758950-r4-web.pdf; the 40 GB modules from its first edition",
    "a800": "NVIDIA A800: an A100 with NVLink cut to 400 GB/s, peaks as in the A100 datasheet; "
    f"A800 40GB Active: {_NVIDIA}products/workstations/a800/",
    "a30": f"NVIDIA A30 datasheet, the figures without sparsity, {_NVIDIA}data-center/products/a30-gpu/",
    "a40": "NVIDIA A40 datasheet, the figures without sparsity, "
    "https://images.nvidia.com/content/Solutions/data-center/a40/nvidia-a40-datasheet.pdf",
    "a10": f"NVIDIA A10 datasheet, the figures without sparsity, {_NVIDIA}data-center/products/a10-gpu/",
    "a10g": "NVIDIA A10G datasheet for AWS, the figures without sparsity: an A10G is not an A10",
    "a16": f"NVIDIA A16 datasheet, {_NVIDIA}data-center/products/a16-gpu/: one of the board's four GPUs, without "
    "sparsity; bf16 is not listed there and runs at the fp16 rate",
    "a2": f"NVIDIA A2 datasheet, the figures without sparsity, {_NVIDIA}data-center/products/a2/",
    "l4": f"NVIDIA L4 datasheet, sparse figures halved, {_NVIDIA}data-center/l4/",
    "l40": f"NVIDIA L40 datasheet, the figures without sparsity, {_NVIDIA}data-center/l40/",
    "l40s": f"NVIDIA L40S datasheet, the figures without sparsity, {_NVIDIA}data-center/l40s/",
    "h100": "NVIDIA H100 datasheet, sparse figures halved, "
    "https://resources.nvidia.com/en-us-tensor-core/nvidia-tensor-core-gpu-datasheet",
    "h100-96": "No datasheet: a custom 500 W module with 96 GB of HBM2e that calls itself NVIDIA H100, its peak as the "
    "SXM's by its user, https://github.com/pytorch/torchtitan/pull/554",
    "h800": "NVIDIA H800: an H100 with NVLink cut to 400 GB/s, peaks as in the H100 datasheet (FP64 aside)",
    "china": "NVIDIA H20 and L20 specification as given to partners; there is no public datasheet",
    "gh200": f"NVIDIA GH200 datasheet, sparse figures halved, {_NVIDIA}data-center/grace-hopper-superchip/",
    "h200": f"NVIDIA H200 datasheet, sparse figures halved, {_NVIDIA}data-center/h200/",
    "b100": "NVIDIA HGX B100, Blackwell architecture technical brief: the system's sparse figures / 8 / 2",
    "b200": f"NVIDIA HGX B200, {_NVIDIA}data-center/hgx/: the system's sparse figures / 8 / 2; bandwidth: DGX B200",
    "b300": f"NVIDIA HGX B300, {_NVIDIA}data-center/hgx/: the system's sparse figures / 8 / 2; int8 was cut, by "
    "how much the publications disagree",
    "gb200": f"NVIDIA GB200 NVL72, {_NVIDIA}data-center/gb200-nvl72/: the rack's sparse figures / 72 / 2",
    "gb300": f"NVIDIA GB300 NVL72, {_NVIDIA}data-center/gb300-nvl72/: the rack's sparse figures / 72 / 2",
    "gb10": f"NVIDIA DGX Spark, {_NVIDIA}products/workstations/dgx-spark/: states only FP4 compute, with sparsity",
    "rtx-a": "NVIDIA RTX A-series datasheets: sparse tensor figures halved, fp32 accumulation at full rate, TF32 at "
    "half of that; A6000: GA102 whitepaper",
    "rtx-ada": "NVIDIA RTX Ada Generation datasheets: the tensor figure is sparse FP8, dense FP8 is half of it, "
    "16-bit a quarter, TF32 an eighth; fp32 accumulation at full rate",
    "ada-4000": "NVIDIA RTX 4000 Ada Generation datasheet, whose tensor figure does not fit its cores and clock",
    "rtx-pro": "NVIDIA RTX PRO 6000 Blackwell datasheets: AI TOPS are sparse FP4, dense FP8 is a quarter of it, "
    "16-bit an eighth, TF32 a sixteenth; fp32 accumulation at full rate",
    "pro-server": "NVIDIA RTX PRO 6000 Blackwell Server Edition datasheet, whose tensor figures are rounded too far",
    "mi100": "AMD Instinct MI100 data sheet, https://www.amd.com/en/products/accelerators/instinct/mi100.html",
    "mi200": "AMD Instinct MI200 series data sheet, https://www.amd.com/en/products/accelerators/instinct/mi200.html; "
    "MI250 and MI250X halved: torch sees each of the two GCDs as one device",
    "mi300": "AMD Instinct MI300 series data sheets, figures without sparsity, "
    "https://www.amd.com/en/products/accelerators/instinct/mi300.html",
    "mi350": "AMD Instinct MI350 series data sheets, figures without sparsity, "
    "https://www.amd.com/en/products/accelerators/instinct/mi350.html",
    "geforce": "NVIDIA GeForce specifications (cores, reference boost clock, bandwidth), "
    f"{_NVIDIA}geforce/graphics-cards/compare/; tensor rates with fp32 accumulation (half rate on GeForce) "
    "from the Turing, GA102, Ada and RTX Blackwell architecture whitepapers; without sparsity",
}

# A device = its other names | GB, watts | TFLOP/s: bf16, fp16, tf32, fp32, fp8, int8 | GB/s | source.
# Names are compared as sets of words (see _words), so word order, vendor and "SXM4" against "SXM" do not matter.
_DEVICES = """
P100 SXM = P100 SXM 16GB                  |  16  300 |      -   21.2      -   10.6      -      - |  732 | pascal
P100 PCIe 16GB                            |  16  250 |      -   18.7      -    9.3      -      - |  732 | pascal
P100 PCIe 12GB                            |  12  250 |      -   18.7      -    9.3      -      - |  549 | pascal
P40                                       |  24  250 |      -      -      -     12      -     47 |  346 | pascal
P4                                        |   8   75 |      -      -      -    5.5      -     22 |  192 | pascal
V100 SXM 16GB                             |  16  300 |      -    125      -   15.7      -      - |  900 | volta
V100 SXM 32GB                             |  32  300 |      -    125      -   15.7      -      - |  900 | volta
V100 PCIe 16GB                            |  16  250 |      -    112      -     14      -      - |  900 | volta
V100 PCIe 32GB                            |  32  250 |      -    112      -     14      -      - |  900 | volta
V100S PCIe = V100S PCIe 32GB = V100S      |  32  250 |      -    130      -   16.4      -      - | 1134 | volta
T4                                        |  16   70 |      -     65      -    8.1      -    130 |  320 | t4
Titan RTX                                 |  24  280 |      -  130.5      -   16.3      -    261 |  672 | turing
Quadro RTX 8000 = RTX 8000                |  48  295 |      -  130.5      -   16.3      -    261 |  672 | turing
Quadro RTX 6000                           |  24  295 |      -  130.5      -   16.3      -    261 |  672 | turing
Quadro RTX 5000                           |  16  265 |      -   89.2      -   11.2      -  178.4 |  448 | turing
Quadro RTX 4000                           |   8  160 |      -     57      -    7.1      -      - |  416 | turing
A100 SXM 40GB                             |  40  400 |    312    312    156   19.5      -    624 | 1555 | a100
A100 SXM 80GB                             |  80  400 |    312    312    156   19.5      -    624 | 2039 | a100
A100 PCIe 40GB                            |  40  250 |    312    312    156   19.5      -    624 | 1555 | a100
A100 PCIe 80GB                            |  80  300 |    312    312    156   19.5      -    624 | 1935 | a100
A800 SXM 80GB = A800 SXM                  |  80  400 |    312    312    156   19.5      -    624 | 2039 | a800
A800 PCIe 80GB                            |  80  300 |    312    312    156   19.5      -    624 | 1935 | a800
A800 40GB Active = A800 PCIe 40GB         |  40  240 |    312    312    156   19.5      -    624 | 1555 | a800
A30                                       |  24  165 |    165    165     82   10.3      -    330 |  933 | a30
A40 = A40 PCIe                            |  48  300 |  149.7  149.7   74.8   37.4      -  299.3 |  696 | a40
A10                                       |  24  150 |    125    125   62.5   31.2      -    250 |  600 | a10
A10G                                      |  24  300 |     70     70     35   31.5      -    140 |  600 | a10g
A16                                       |  16   62 |   17.9   17.9      9    4.5      -   35.9 |  200 | a16
A2                                        |  16   60 |     18     18      9    4.5      -     36 |  200 | a2
L4                                        |  24   72 |    121    121     60   30.3  242.5  242.5 |  300 | l4
L20                                       |  48  275 |  119.5  119.5   59.8   59.8    239    239 |  864 | china
L40                                       |  48  300 |    181    181   90.5   90.5    362    362 |  864 | l40
L40S                                      |  48  350 |    362    362    183   91.6    733    733 |  864 | l40s
H100 SXM = H100 80GB HBM3 = H100 SXM 80GB |  80  700 |  989.5  989.5  494.5     67   1979   1979 | 3350 | h100
H100 PCIe = H100 PCIe 80GB                |  80  350 |    756    756    378     51   1513   1513 | 2000 | h100
H100 NVL = H100 NVL 94GB                  |  94  400 |  835.5  835.5  417.5     60 1670.5 1670.5 | 3900 | h100
H100 SXM 96GB                             |  96  500 |  989.5  989.5      -      -      -      - |    - | h100-96
H800 SXM = H800 = H800 80GB HBM3          |  80  700 |  989.5  989.5  494.5     67   1979   1979 | 3350 | h800
H800 PCIe = H800 PCIe 80GB                |  80  350 |    756    756    378     51   1513   1513 | 2000 | h800
H20 = H20 96GB                            |  96  400 |    148    148     74     44    296    296 | 4000 | china
H20 3e = H20 141GB                        | 141  500 |    148    148     74     44    296    296 | 4800 | china
GH200 480GB = GH200 96GB                  |  96    - |  989.5  989.5  494.5     67   1979   1979 | 4000 | gh200
GH200 144G HBM3e = GH200 144GB            | 144    - |  989.5  989.5  494.5     67   1979   1979 | 4900 | gh200
H200 SXM = H200 = H200 SXM 141GB          | 141  700 |  989.5  989.5  494.5     67   1979   1979 | 4800 | h200
H200 NVL = H200 NVL 141GB                 | 141  600 |  835.5  835.5  417.5     60 1670.5 1670.5 | 4800 | h200
B100                                      | 192  700 |   1750   1750    875     60   3500   3500 | 8000 | b100
B200 = B200 SXM                           | 180 1000 |   2250   2250   1125     75   4500   4500 | 8000 | b200
B300 = B300 SXM = B300 SXM AC             | 288 1100 |   2250   2250   1125     75   4500      - | 8000 | b300
GB200                                     | 186 1200 |   2500   2500   1250     80   5000   5000 | 8000 | gb200
GB300                                     | 288 1400 |   2500   2500   1250      -   5000      - | 8000 | gb300
GB10                                      | 128    - |      -      -      -      -      -      - |  273 | gb10
RTX A2000 = RTX A2000 12GB                |   -   70 |   31.9   31.9   15.9      8      -   63.9 |  288 | rtx-a
RTX A4000                                 |  16  140 |   76.7   76.7   38.3   19.2      -  153.4 |  448 | rtx-a
RTX A4500                                 |  20  200 |   94.6   94.6   47.3   23.7      -  189.2 |  640 | rtx-a
RTX A5000                                 |  24  230 |  111.1  111.1   55.5   27.8      -  222.2 |  768 | rtx-a
RTX A5500                                 |  24  230 |  136.4  136.4   68.2   34.1      -  272.8 |  768 | rtx-a
RTX A6000                                 |  48  300 |  154.8  154.8   77.4   38.7      -  309.7 |  768 | rtx-a
RTX 2000 Ada                              |  16   70 |     48     48     24     12   95.9   95.9 |  224 | rtx-ada
RTX 4000 Ada                              |  20  130 |      -      -      -   26.7      -      - |  360 | ada-4000
RTX 4500 Ada                              |  24  210 |  158.5  158.5   79.2   39.6    317    317 |  432 | rtx-ada
RTX 5000 Ada                              |  32  250 |  261.1  261.1  130.5   65.3  522.2  522.2 |  576 | rtx-ada
RTX 6000 Ada                              |  48  300 |  364.2  364.2  182.1   91.1  728.5  728.5 |  960 | rtx-ada
RTX PRO 6000 Workstation                  |  96  600 |    500    500    250    125   1000   1000 | 1792 | rtx-pro
RTX PRO 6000 Max-Q                        |  96  300 |  438.9  438.9  219.4    110  877.8  877.8 | 1792 | rtx-pro
RTX PRO 6000 Server                       |  96  600 |      -      -      -    120      -      - | 1597 | pro-server
MI100                                     |  32  300 |   92.3  184.6      -   46.1      -  184.6 | 1229 | mi100
MI210                                     |  64  300 |    181    181      -   45.3      -    181 | 1638 | mi200
MI250                                     |  64    - |    181    181      -   45.3      -    181 | 1638 | mi200
MI250X                                    |  64    - |  191.5  191.5      -   47.9      -  191.5 | 1638 | mi200
MI300A                                    | 128  550 |  980.6  980.6  490.3  122.6 1961.2 1961.2 | 5300 | mi300
MI300X = MI300X OAM                       | 192  750 | 1307.4 1307.4  653.7  163.4 2614.9 2614.9 | 5300 | mi300
MI325X = MI325X OAM                       | 256 1000 | 1307.4 1307.4  653.7  163.4 2614.9 2614.9 | 6000 | mi300
MI350X = MI350X OAM                       | 288 1000 | 2306.9 2306.9      -  144.2 4613.7 4613.7 | 8000 | mi350
MI355X = MI355X OAM                       | 288 1400 | 2516.6 2516.6      -  157.3 5033.2 5033.2 | 8000 | mi350
"""

# GeForce: device | GB | family, CUDA cores, reference boost MHz | GB/s (- where boards of one name differ).
# Turing laptops without Max-Q report the desktop card's name, and read low against its peak.
_GEFORCE = """
RTX 2060 6GB    |  6 | Turing     1920 1680 |  336
RTX 2060 12GB   | 12 | Turing     2176 1650 |  336
RTX 2060 Super  |  8 | Turing     2176 1650 |  448
RTX 2070        |  8 | Turing     2304 1620 |  448
RTX 2070 Super  |  8 | Turing     2560 1770 |  448
RTX 2080        |  8 | Turing     2944 1710 |  448
RTX 2080 Super  |  8 | Turing     3072 1815 |  496
RTX 2080 Ti     | 11 | Turing     4352 1545 |  616
RTX 3050 6GB    |  6 | Ampere     2304 1470 |  168
RTX 3050 8GB    |  8 | Ampere     2560 1777 |  224
RTX 3060 8GB    |  8 | Ampere     3584 1777 |  240
RTX 3060 12GB   | 12 | Ampere     3584 1777 |  360
RTX 3060 Ti     |  8 | Ampere     4864 1665 |    -
RTX 3070        |  8 | Ampere     5888 1725 |  448
RTX 3070 Ti     |  8 | Ampere     6144 1765 |  608
RTX 3080 10GB   | 10 | Ampere     8704 1710 |  760
RTX 3080 12GB   | 12 | Ampere     8960 1710 |  912
RTX 3080 Ti     | 12 | Ampere    10240 1665 |  912
RTX 3090        | 24 | Ampere    10496 1695 |  936
RTX 3090 Ti     | 24 | Ampere    10752 1860 | 1008
RTX 4060        |  8 | Ada        3072 2460 |  272
RTX 4060 Ti     |  - | Ada        4352 2535 |  288
RTX 4070        | 12 | Ada        5888 2475 |    -
RTX 4070 Super  | 12 | Ada        7168 2475 |  504
RTX 4070 Ti     | 12 | Ada        7680 2610 |  504
RTX 4070 Ti Super | 16 | Ada        8448 2610 |  672
RTX 4080        | 16 | Ada        9728 2505 |  717
RTX 4080 Super  | 16 | Ada       10240 2550 |  736
RTX 4090 D      | 24 | Ada       14592 2520 | 1008
RTX 4090        | 24 | Ada       16384 2520 | 1008
RTX 5050        |  8 | Blackwell  2560 2570 |  320
RTX 5060        |  8 | Blackwell  3840 2497 |  448
RTX 5060 Ti     |  - | Blackwell  4608 2572 |  448
RTX 5070        | 12 | Blackwell  6144 2512 |  672
RTX 5070 Ti     | 16 | Blackwell  8960 2452 |  896
RTX 5080        | 16 | Blackwell 10752 2617 |  960
RTX 5090        | 32 | Blackwell 21760 2407 | 1792
"""

# Tensor rates of a GeForce family as multiples of its fp32 rate (2 x cores x clock), with fp32 accumulation.
_GEFORCE_RATES = {
    "Turing": {"fp32": 1, "fp16": 4, "int8": 16},
    "Ampere": {"fp32": 1, "fp16": 2, "bf16": 2, "tf32": 1, "int8": 8},
    "Ada": {"fp32": 1, "fp16": 2, "bf16": 2, "tf32": 1, "fp8": 4, "int8": 8},
    "Blackwell": {"fp32": 1, "fp16": 2, "bf16": 2, "tf32": 1, "fp8": 4, "int8": 8},
}

# Names that several devices share: only the values common to all are known, unless memory or power tells them apart.
_SHARED = """
P100                           : P100 SXM, P100 PCIe 16GB, P100 PCIe 12GB
P100 PCIe                      : P100 PCIe 16GB, P100 PCIe 12GB
V100                           : V100 SXM 16GB, V100 SXM 32GB, V100 PCIe 16GB, V100 PCIe 32GB
V100 SXM                       : V100 SXM 16GB, V100 SXM 32GB
V100 PCIe                      : V100 PCIe 16GB, V100 PCIe 32GB
A100                           : A100 SXM 40GB, A100 SXM 80GB, A100 PCIe 40GB, A100 PCIe 80GB
A100 SXM                       : A100 SXM 40GB, A100 SXM 80GB
A100 PCIe                      : A100 PCIe 40GB, A100 PCIe 80GB
A100 40GB                      : A100 SXM 40GB, A100 PCIe 40GB
A100 80GB                      : A100 SXM 80GB, A100 PCIe 80GB
A800                           : A800 SXM 80GB, A800 PCIe 80GB, A800 40GB Active
A800 PCIe                      : A800 PCIe 80GB, A800 40GB Active
A800 80GB                      : A800 SXM 80GB, A800 PCIe 80GB
H100                           : H100 SXM, H100 PCIe, H100 NVL, H100 SXM 96GB
H100 80GB                      : H100 SXM, H100 PCIe
GH200                          : GH200 480GB, GH200 144G HBM3e
RTX 4000                       : Quadro RTX 4000, RTX 4000 Ada
RTX 5000                       : Quadro RTX 5000, RTX 5000 Ada
RTX 6000                       : Quadro RTX 6000, RTX 6000 Ada, RTX PRO 6000 Workstation
RTX PRO 6000                   : RTX PRO 6000 Workstation, RTX PRO 6000 Max-Q, RTX PRO 6000 Server
RTX PRO 6000 Max-Q Workstation : RTX PRO 6000 Max-Q
MI250X / MI250                 : MI250X, MI250
MI300                          : MI300A, MI300X
RTX 2060                       : RTX 2060 6GB, RTX 2060 12GB
RTX 3050                       : RTX 3050 6GB, RTX 3050 8GB
RTX 3060                       : RTX 3060 8GB, RTX 3060 12GB
RTX 3080                       : RTX 3080 10GB, RTX 3080 12GB
"""

# Words that do not distinguish any two of these devices.
_NOISE = {"nvidia", "amd", "tesla", "geforce", "instinct", "radeon", "gpu", "graphics", "generation"}
_NOISE |= {"blackwell", "edition"}  # of RTX PRO cards


def _words(name: str) -> frozenset[str]:
    """Returns a name's distinctive words: "NVIDIA A100-SXM4-80GB" and "A100 80 GB SXM" both give {a100, sxm, 80gb}."""
    text = re.sub(r"\((?:r|tm)\)|[®™_]", " ", name.lower()).replace("pci-e", "pcie")
    text = re.sub(r"\b(\d+)\s+(gb?)\b", r"\1\2", text)  # "80 GB"
    text = re.sub(r"\b(\d{4})\s*(ti|super)\b", r"\1 \2", text)  # "3090Ti"
    text = re.sub(r"\bsxm[2456]\b", "sxm", text)
    return frozenset(re.findall(r"[a-z0-9.]+", text)) - _NOISE


def _number(text: str, unit: float = 1) -> float | None:
    return None if text == "-" else float(text) * unit


def _cells(table: str, separator: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split(separator)] for line in table.strip().splitlines()]


def _read_devices() -> list[tuple[Peak, list[str]]]:
    """Returns every device of the two tables, with all its names."""
    devices: list[tuple[Peak, list[str]]] = []

    def add(names: str, gb_per_s: str, **facts: Any) -> None:
        all_names = names.split(" = ")
        devices.append((Peak(all_names[0], bytes_per_s=_number(gb_per_s, 1e9), **facts), all_names))

    for names, board, tflops, gb_per_s, source in _cells(_DEVICES, "|"):
        memory, power = board.split()
        flops = {dtype: _number(text, 1e12) for dtype, text in zip(DTYPES, tflops.split(), strict=True)}
        facts = {"memory_gb": _number(memory), "power_w": _number(power), "source": SOURCES[source]}
        add(names, gb_per_s, **facts, **flops)
    for names, memory, chip, gb_per_s in _cells(_GEFORCE, "|"):
        family, cores, boost_mhz = chip.split()
        fp32 = 2 * int(cores) * int(boost_mhz) * 1e6
        flops = {dtype: multiple * fp32 for dtype, multiple in _GEFORCE_RATES[family].items()}
        add(names, gb_per_s, memory_gb=_number(memory), source=SOURCES["geforce"], **flops)
    return devices


def _claim_names(named: Sequence[tuple[str, tuple[Peak, ...]]]) -> dict[frozenset[str], tuple[Peak, ...]]:
    """Maps the words of every name to the devices that have it. Raises ValueError if two rows claim one name."""
    by_words: dict[frozenset[str], tuple[Peak, ...]] = {}
    for name, bearers in named:
        if _words(name) in by_words:
            raise ValueError(f"peak table: two rows claim the name {name}")
        by_words[_words(name)] = bearers
    return by_words


def _read_shared(devices: Mapping[str, Peak]) -> list[tuple[str, tuple[Peak, ...]]]:
    return [
        (name, tuple(devices[owner.strip()] for owner in owners.split(","))) for name, owners in _cells(_SHARED, ":")
    ]


_NAMED = [(name, (device,)) for device, names in _read_devices() for name in names]
DEVICES: dict[str, Peak] = {device.device: device for _, (device,) in _NAMED}
_BY_WORDS = _claim_names([*_NAMED, *_read_shared(DEVICES)])


# --- looking a device up --------------------------------------------------------------------------


def peak(device_name: str, *, memory_gb: float | None = None, power_w: float | None = None) -> Peak | None:
    """Returns the datasheet peak of a device, or None if the name is not in the table.

    `device_name`: as torch.cuda.get_device_name or nvidia-smi print it ("NVIDIA H100 80GB HBM3"), or short
    ("H100 SXM"). For a name that several products share ("NVIDIA H100"), values that differ among them are None;
    `memory_gb` and `power_w`, the device's memory and default power limit, choose among them. A laptop's GPU, a MIG
    slice or a virtual GPU is never taken for the whole card of that name. See `why_unknown`.
    """
    owners = _BY_WORDS.get(_words(device_name), ())
    if len(owners) > 1:
        owners = tuple(o for o in owners if _near(memory_gb, o.memory_gb, 0.08) and _near(power_w, o.power_w, 0.05))
    agreed = _agreement(owners)
    return agreed if any(getattr(agreed, field) is not None for field in _FIGURES) else None


def _agreement(owners: Sequence[Peak]) -> Peak:
    """Returns a peak with the values common to all `owners`."""
    if len(owners) == 1:
        return owners[0]
    common = {field: values.pop() for field in (*_FIGURES, "memory_gb", "power_w")
              if len(values := {getattr(owner, field) for owner in owners}) == 1}  # fmt: skip
    sources = dict.fromkeys(owner.source for owner in owners)
    return Peak(" or ".join(owner.device for owner in owners), **common, source="; ".join(sources))


def _near(hint: float | None, listed: float | None, tolerance: float) -> bool:
    return hint is None or listed is None or abs(hint - listed) <= tolerance * listed


def why_unknown(device_name: str, dtype: str = "bf16") -> str:
    """Returns one line on why a device has no peak at `dtype`, and what to do."""
    words, override = _words(device_name), "give --peak_tflops (dense TFLOP/s at the dtype of the run)"
    owners = [owner.device for owner in _BY_WORDS.get(words, ())]
    if len(owners) == 1:
        return f"no dense {dtype} figure is published for {owners[0]}; {override}"
    if owners:
        return f"{device_name} may be any of {', '.join(owners)}: name one of them, or {override}"
    if words & {"laptop", "mobile"} or {"max", "q"} <= words:
        return f"{device_name}: a laptop GPU's peak depends on the power its maker allows; {override}"
    if "mig" in words:
        return f"{device_name}: a MIG slice has a part of the chip; {override}"
    names = {name.lower(): name for name in DEVICES}
    close = difflib.get_close_matches(device_name.lower(), names, n=1, cutoff=0.6)
    hint = f"did you mean {names[close[0]]}? If not, " if close else ""
    return f"{device_name} is not in the peak table; {hint}{override}"


def peak_of(device: torch.device, peak_tflops: float | None = None) -> Peak | None:
    """Returns the peak of `device`: the user's if given, else the datasheet's; None for a CPU or unknown GPU."""
    if peak_tflops is not None:
        return Peak.given(peak_tflops)
    if device.type != "cuda":
        return None
    properties = torch.cuda.get_device_properties(device)
    return peak(properties.name, memory_gb=properties.total_memory / 2**30)


# --- FLOPs per token ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Flops:
    """FLOPs per training token, forward and backward, by the three conventions of the module's docstring."""

    mfu: float
    palm: float
    hfu: float


def flops_per_token(
    config: GPTConfig, T: int, *, causal: bool = True, window: int | None = None,
    recompute_attention: bool = True, recompute_blocks: bool = False, recompute_logits: bool = False,
) -> Flops:  # fmt: skip
    """Returns the training FLOPs per token for sequences of T tokens (a multiply-add counts 2).

    `window`: a query sees itself and at most `window` tokens before it, in every layer; by default each layer has the
    config's. `causal=False` counts every pair, as torch's FlopCounterMode does. hfu adds to mfu: with
    `recompute_attention`, the scores, which a flash backward recomputes (5 products instead of 4); with
    `recompute_blocks`, the forward pass of the blocks (activation checkpointing); with `recompute_logits`, the logits
    (a fused loss does not store them).
    """
    if not causal and window is not None:
        raise ValueError("window: only causal attention has one")
    windows = config.windows if window is None else (window,) * config.n_layer
    keys = sum(mean_keys(T, causal, its if causal else None) for its in windows)
    scores = 2 * config.attention_width * keys  # q.k of all layers; p.v costs the same
    weights = block_params(config) + lm_head_params(config) + smear_params(config)
    model = 3 * (2 * weights + 2 * scores)
    again = (
        recompute_attention * scores
        + recompute_blocks * (2 * block_params(config) + 2 * scores)
        + recompute_logits * 2 * lm_head_params(config)
    )
    return Flops(
        mfu=model,
        palm=6 * palm_params(config)
        + 12 * config.attention_width * sum(T if w is None else min(w, T) for w in windows),
        hfu=model + again,
    )


def mean_keys(T: int, causal: bool = True, window: int | None = None) -> float:
    """Returns the number of keys per query, averaged over T positions: (T + 1) / 2 when causal and without a window."""
    if not causal:
        if window is not None:
            raise ValueError("window: only causal attention has one")
        return float(T)
    full = T if window is None else min(T, window + 1)  # the first queries see 1, 2, ... full keys, the others full
    return (full * (full + 1) / 2 + (T - full) * full) / T


def block_params(config: GPTConfig) -> int:
    """Returns the number of weights in the blocks' linear layers: qkv, attention output, the two (swiglu: three) of the
    MLP, and the gates of value embeddings."""
    C, Q, kv_width = config.n_embd, config.attention_width, config.kv_heads * config.head_dim
    layers = 3 if config.activation == "swiglu" else 2
    gates = len(config.value_layers) * VALUE_GATE_CHANNELS * config.kv_heads
    return config.n_layer * (C * (Q + 2 * kv_width) + Q * C + layers * C * config.hidden_width) + gates


def smear_params(config: GPTConfig) -> int:
    return config.smear * SMEAR_GATE_CHANNELS


def value_params(config: GPTConfig) -> int:
    """Returns the size of the value embeddings, which are looked up and not multiplied."""
    return len(config.value_layers) * config.vocab_size * config.kv_heads * config.head_dim


def scalar_params(config: GPTConfig) -> int:
    """Returns the number of scalars of the residual stream, the smear and the backout."""
    return config.residual_scalars * 2 * config.n_layer + config.smear + config.backout


def lm_head_params(config: GPTConfig) -> int:
    return config.vocab_size * config.n_embd


def palm_params(config: GPTConfig) -> int:
    """Returns the N of nanoGPT's and nanochat's 6N: all parameters except the scalars of the residual stream and the
    embeddings of positions and values, which are only looked up; token embedding and lm_head count as one."""
    C, Q, kv_width = config.n_embd, config.attention_width, config.kv_heads * config.head_dim
    layernorm, hidden_layers = config.norm == "layernorm", 2 if config.activation == "swiglu" else 1
    per_norm = (layernorm or config.norm_weight) + (layernorm and config.bias)
    vectors = (2 * config.n_layer + 1) * C * per_norm + 2 * config.n_layer * config.head_dim * config.qk_norm_weight
    if config.bias:
        vectors += config.n_layer * ((Q + 2 * kv_width) + C + hidden_layers * config.hidden_width + C)
    return block_params(config) + lm_head_params(config) + smear_params(config) + vectors


# --- the figures ----------------------------------------------------------------------------------


def utilization(
    tokens_per_s: float, config: GPTConfig, T: int, *, peak: Peak | None, dtype: str | torch.dtype = "bf16",
    world_size: int = 1, flops: Flops | None = None,
) -> dict[str, float | None]:  # fmt: skip
    """Returns {"mfu", "mfu_palm", "hfu"} as fractions of the peak; all None where the peak at `dtype` is unknown.

    `tokens_per_s`: of all `world_size` devices together. `flops`: by default `flops_per_token` with its defaults.
    """
    rate = peak.flops(dtype) if peak is not None else None
    if rate is None:
        return {"mfu": None, "mfu_palm": None, "hfu": None}
    flops = flops or flops_per_token(config, T)
    share = tokens_per_s / (rate * world_size)
    return {"mfu": flops.mfu * share, "mfu_palm": flops.palm * share, "hfu": flops.hfu * share}


def decode_bytes(
    config: GPTConfig, context: int, batch: int = 1, *, weight_bytes: float = 2, kv_bytes: float = 2
) -> float:
    """Returns the bytes that a decode step must read: each multiplied weight once, and each sequence's keys and values.

    `context`: tokens in the cache of each of `batch` sequences. `weight_bytes`, `kv_bytes`: per number (2 for bf16).
    """
    keys = sum(context if w is None else min(context, w + 1) for w in config.windows)
    kv_numbers = batch * keys * 2 * config.kv_heads * config.head_dim
    return palm_params(config) * weight_bytes + kv_numbers * kv_bytes


def mbu(step_s: float, read_bytes: float, peak: Peak | None) -> float | None:
    """Returns the memory bandwidth utilization of a decode step of `step_s` seconds; None if it is unknown."""
    if peak is None or peak.bytes_per_s is None:
        return None
    return read_bytes / step_s / peak.bytes_per_s


def format_mfu(fraction: float | None) -> str:
    """Formats a fraction for the log, "41.27%"; None becomes "n/a"."""
    return "n/a" if fraction is None else f"{100 * fraction:.2f}%"
