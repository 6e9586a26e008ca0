"""Where and by what a figure is made: hardware, software, commit, command, and the state of the GPU."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

from gptfast.runtime import spin_turns

from .schema import Row

# instruction sets that decide which CPU code path runs; the full list of flags would only be noise
CPU_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "amx_int8",
    "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip


def now() -> str:
    """The time in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def facts(device: str | torch.device) -> Row:
    """Where and by what a figure is made: hardware, software, commit, dirty, command. Gather once per run."""
    return {"hardware": hardware(device), "software": software(), **commit(), "command": command()}


def hardware(device: str | torch.device) -> Row:
    """The machine that `device` is part of: `name` is the GPU's own name, or the CPU's on a CPU run."""
    device = torch.device(device)
    cpu = cpu_facts()
    row: Row = {"kind": device.type, "name": cpu["model"], "cpu": cpu, "platform": platform.platform()}
    if device.type == "cuda":
        properties = torch.cuda.get_device_properties(device)
        row |= {
            "name": properties.name,
            "capability": f"{properties.major}.{properties.minor}",
            "sm_count": properties.multi_processor_count,
            "memory_bytes": properties.total_memory,
            "l2_bytes": getattr(properties, "L2_cache_size", None),
            "count": torch.cuda.device_count(),
            "limits": gpu_limits(device),
        }
    return row


def cpu_facts() -> Row:
    """CPU model (with family and model number where the hypervisor hides the name), cores, flags, memory.

    `spin_turns` is the bound on the spinning of waiting threads, None for the default of OpenMP.
    """
    info = _first_processor()
    family = "-".join(info[key] for key in ("cpu family", "model", "stepping") if key in info)
    model = info.get("model name") or platform.processor() or platform.machine()
    flags = set((info.get("flags") or info.get("Features") or "").split())
    return {
        "model": f"{model} ({family})" if family else model,
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "spin_turns": spin_turns(),
        "flags": [flag for flag in CPU_FLAGS if flag in flags],
        "memory_bytes": _memory_bytes(),
    }


def _first_processor() -> dict[str, str]:
    try:
        first = Path("/proc/cpuinfo").read_text().split("\n\n")[0]
    except OSError:
        return {}
    pairs = (line.partition(":") for line in first.splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (ValueError, OSError, AttributeError):
        return None


def software() -> Row:
    """Versions of what runs: torch, triton, CUDA, cuDNN, driver, python. None where there is none."""
    return {
        "torch": torch.__version__,
        "triton": _version("triton", "pytorch-triton"),
        "cuda": torch.version.cuda,
        "cudnn": torch.backends.cudnn.version() if torch.cuda.is_available() else None,
        "driver": driver_version(),
        "python": platform.python_version(),
    }


def _version(*names: str) -> str | None:
    for name in names:
        try:
            return metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return None


def commit() -> Row:
    """`commit` and `dirty` of the checkout this file is in (results/ aside, which runs write); None outside git."""
    sha = _git("rev-parse", "HEAD")
    status = _git("status", "--porcelain", "--", ".", ":!results")
    return {"commit": sha or None, "dirty": None if sha is None or status is None else status != ""}


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command() -> str:
    """The command line of this process, fit to be typed again."""
    arguments = [argument if "\n" not in argument else "..." for argument in sys.orig_argv[1:]]
    return shlex.join(["python", *arguments])


THROTTLE_REASONS = {  # bits of nvmlDeviceGetCurrentClocksThrottleReasons (NVML API reference)
    0x01: "idle", 0x02: "application clocks", 0x04: "power cap", 0x08: "hardware slowdown", 0x10: "sync boost",
    0x20: "thermal (software)", 0x40: "thermal (hardware)", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


def gpu_state(device: str | torch.device = "cuda") -> Row | None:
    """Clocks, power, temperature and throttle reasons of a CUDA device now; None without NVML (nvidia-ml-py)."""
    handle = _nvml_handle(device)
    if handle is None:
        return None
    import pynvml as nvml

    reasons = _ask(nvml.nvmlDeviceGetCurrentClocksThrottleReasons, handle)
    power_mw = _ask(nvml.nvmlDeviceGetPowerUsage, handle)
    return {
        "sm_mhz": _ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_SM),
        "memory_mhz": _ask(nvml.nvmlDeviceGetClockInfo, handle, nvml.NVML_CLOCK_MEM),
        "power_w": None if power_mw is None else power_mw / 1000,
        "temperature_c": _ask(nvml.nvmlDeviceGetTemperature, handle, nvml.NVML_TEMPERATURE_GPU),
        "throttle": None if reasons is None else [name for bit, name in THROTTLE_REASONS.items() if reasons & bit],
    }


def gpu_limits(device: str | torch.device = "cuda") -> Row | None:
    """What tells PCIe, SXM and NVL boards of one name apart: power limit, maximal clocks, memory bus width."""
    handle = _nvml_handle(device)
    if handle is None:
        return None
    import pynvml as nvml

    limit_mw = _ask(nvml.nvmlDeviceGetPowerManagementLimit, handle)
    return {
        "power_limit_w": None if limit_mw is None else limit_mw / 1000,
        "sm_max_mhz": _ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_SM),
        "memory_max_mhz": _ask(nvml.nvmlDeviceGetMaxClockInfo, handle, nvml.NVML_CLOCK_MEM),
        "memory_bus_bits": _ask(nvml.nvmlDeviceGetMemoryBusWidth, handle),
    }


def driver_version() -> str | None:
    """The NVIDIA driver's version, or None."""
    if not _nvml_started():
        return None
    import pynvml as nvml

    return _ask(nvml.nvmlSystemGetDriverVersion)


def _nvml_started() -> bool:
    """Whether NVML answers; without the package, a driver or permission the facts are None, and the row says so."""
    try:
        import pynvml as nvml
    except ImportError:
        return False
    try:
        nvml.nvmlInit()  # counted by NVML: calling it again is cheap
    except nvml.NVMLError:
        return False
    return True


def _nvml_handle(device: str | torch.device) -> Any | None:
    """NVML's handle of a CUDA device, found by UUID because CUDA_VISIBLE_DEVICES renumbers only CUDA's indices."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available() or not _nvml_started():
        return None
    import pynvml as nvml

    uuid = torch.cuda.get_device_properties(device).uuid
    return _ask(nvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")


def _ask(question: Any, *arguments: Any) -> Any | None:
    """One NVML answer, or None where this board, driver or package version has none."""
    import pynvml as nvml

    try:
        return question(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None
