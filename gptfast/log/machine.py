"""Facts about the origin of a measurement: hardware, software, commit, command, and the state of the GPU."""

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

# instruction sets that decide which CPU code path runs; the other flags do not matter
CPU_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "amx_int8",
    "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip

CODE = ("kernels", "gptfast", "train", "bench")  # folders in which a new file may change what runs


def now() -> str:
    """Returns the time in UTC, ISO 8601 to the second."""
    return datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")


def facts(device: str | torch.device) -> Row:
    """Returns the origin of a measurement: hardware, software, commit, dirty, command. Call it once per run."""
    return {"hardware": hardware(device), "software": software(), **commit(), "command": command()}


def hardware(device: str | torch.device) -> Row:
    """Describes the machine of `device`; `name` is the GPU's name, or the CPU's on a CPU run."""
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
    """Returns CPU model (with family and model number if the hypervisor hides the name), cores, flags and memory.

    `spin_turns` bounds the spinning of waiting threads; None for OpenMP's default.
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
    """Returns the versions of torch, triton, CUDA, cuDNN, driver and python; None for missing ones."""
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
    """Returns `commit` and `dirty` of this file's checkout; None outside git.

    Dirty are changes of tracked files, but for results/, which runs write, and new files in the folders of CODE.
    """
    sha = _git("rev-parse", "HEAD")
    changed = _git("status", "--porcelain", "--untracked-files=no", "--", ".", ":!results")
    new = _git("ls-files", "--others", "--exclude-standard", "--", *CODE)
    return {"commit": sha or None, "dirty": None if None in (sha, changed, new) else bool(changed or new)}


def _git(*arguments: str) -> str | None:
    root = Path(__file__).resolve().parents[2]
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command() -> str:
    """Returns the command line of this process, quoted for a shell."""
    arguments = [argument if "\n" not in argument else "..." for argument in sys.orig_argv[1:]]
    return shlex.join(["python", *arguments])


THROTTLE_REASONS = {  # bits of nvmlDeviceGetCurrentClocksThrottleReasons (NVML API reference)
    0x01: "idle", 0x02: "application clocks", 0x04: "power cap", 0x08: "hardware slowdown", 0x10: "sync boost",
    0x20: "thermal (software)", 0x40: "thermal (hardware)", 0x80: "power brake", 0x100: "display clocks",
}  # fmt: skip


def gpu_state(device: str | torch.device = "cuda") -> Row | None:
    """Returns a CUDA device's current clocks, power, temperature, throttle reasons; None without nvidia-ml-py."""
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
    """Returns power limit, maximal clocks and memory bus width: they tell PCIe, SXM and NVL boards apart."""
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
    """Returns the NVIDIA driver's version, or None."""
    if not _nvml_started():
        return None
    import pynvml as nvml

    return _ask(nvml.nvmlSystemGetDriverVersion)


def _nvml_started() -> bool:
    """Returns whether NVML works; without its package, a driver or permission the facts are None."""
    try:
        import pynvml as nvml
    except ImportError:
        return False
    try:
        nvml.nvmlInit()  # NVML counts references, so calling it again is cheap
    except nvml.NVMLError:
        return False
    return True


def _nvml_handle(device: str | torch.device) -> Any | None:
    """Returns NVML's handle of a CUDA device, by UUID, as CUDA_VISIBLE_DEVICES renumbers only CUDA's indices."""
    if torch.device(device).type != "cuda" or not torch.cuda.is_available() or not _nvml_started():
        return None
    import pynvml as nvml

    uuid = torch.cuda.get_device_properties(device).uuid
    return _ask(nvml.nvmlDeviceGetHandleByUUID, f"GPU-{uuid}")


def _ask(question: Any, *arguments: Any) -> Any | None:
    """Makes one NVML query; returns None where this board, driver or package version does not support it."""
    import pynvml as nvml

    try:
        return question(*arguments)
    except (nvml.NVMLError, AttributeError):
        return None
