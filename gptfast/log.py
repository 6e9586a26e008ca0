"""What is written down: the console line, the JSONL row, the tracker, and the facts of the machine that a figure needs.

A row is one JSON object on one line. Rows of training and of the bench share one schema, `check_row`, so that plots,
reports and comparisons read both. A row that states a time or a rate must say where it was measured: hardware,
software, commit, date and command. Rows inside a run (`step`, `eval`, ...) are covered by the `run` row that opens
the file.

    with Log("out") as log:
        log.row("run", **facts("cuda"), config={...})
        log.row("step", step=0, loss=4.2, ms=12.0)
        log.say("iter 0: loss 4.2000")
"""

from __future__ import annotations

import contextlib
import datetime
import importlib
import json
import math
import os
import platform
import queue
import shlex
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from importlib import metadata
from pathlib import Path
from typing import Any, Self

import torch

from gptfast.cli import UserError
from gptfast.parallel import spin_turns

SCHEMA = 1
Row = dict[str, Any]

NUMBER = (int, float)
TEXT = (str,)
MAYBE_TEXT = (str, type(None))
MAYBE_NUMBER = (int, float, type(None))

EVERY_ROW: dict[str, tuple[type, ...]] = {"schema": (int,), "what": TEXT, "date": TEXT}
FACTS: dict[str, tuple[type, ...]] = {
    "hardware": (dict,), "software": (dict,), "commit": MAYBE_TEXT, "dirty": (bool, type(None)), "command": TEXT,
}  # fmt: skip
TIMES: dict[str, tuple[type, ...]] = {"ms_p20": NUMBER, "ms_p50": NUMBER, "ms_p80": NUMBER, "n": (int,)}

CHECKOUT = f"{Path(__file__).resolve().parents[1]}/"

# what a row of each kind must hold beside EVERY_ROW
KINDS: dict[str, dict[str, tuple[type, ...]]] = {
    "run": FACTS,  # opens a training log; `config` and whatever else describes the run
    "step": {"step": (int,)},
    "eval": {"step": (int,)},
    "sample": {"text": TEXT},
    "note": {"text": TEXT},
    "summary": {"name": TEXT, **FACTS},
    "aot": {"name": TEXT, **FACTS},
    "op": {"name": TEXT, "impl": TEXT, "direction": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
    "peak": {"name": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
    "model": {"name": TEXT, "impl": TEXT, "dtype": TEXT, "tokens_per_s": NUMBER, **TIMES, **FACTS},
    "decode": {"name": TEXT, "impl": TEXT, "dtype": TEXT, "tokens_per_s": NUMBER, **TIMES, **FACTS},
    "optimizer": {"name": TEXT, "impl": TEXT, **TIMES, **FACTS},  # one step over the matrices of the model `name`
    "product": {"name": TEXT, "impl": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},  # of Newton-Schulz
    "profile": {"name": TEXT, "impl": TEXT, "direction": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
    "host": {"name": TEXT, "impl": TEXT, "direction": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
    "tune": {"name": TEXT, "dims": (dict,), "dtype": TEXT, **TIMES, **FACTS},
}

# fields a row may hold; where present they must be of these types
OPTIONAL: dict[str, tuple[type, ...]] = {
    "config": (dict,), "dims": (dict,), "valid": (bool,), "invalid_reason": MAYBE_TEXT,
    "ms_low": NUMBER, "ms_high": NUMBER, "host_ms_p50": MAYBE_NUMBER, "method": TEXT, "threads": (int, type(None)),
    "tflops": MAYBE_NUMBER, "gbs": MAYBE_NUMBER, "roofline": MAYBE_NUMBER, "roofline_source": MAYBE_TEXT,
    "error": MAYBE_NUMBER, "error_allowed": MAYBE_NUMBER, "error_dims": (dict,), "inexact": MAYBE_TEXT,
    "mfu": MAYBE_NUMBER, "mfu_palm": MAYBE_NUMBER, "hfu": MAYBE_NUMBER, "mbu": MAYBE_NUMBER,
    "tokens_per_s": MAYBE_NUMBER, "memory_bytes": MAYBE_NUMBER, "loss": MAYBE_NUMBER, "ms": MAYBE_NUMBER,
    "state_before": (dict, type(None)), "state_after": (dict, type(None)),
}  # fmt: skip

# instruction sets that decide which CPU code path runs; the full list of flags would only be noise
CPU_FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx512_bf16", "avx512_fp16", "amx_bf16", "amx_tile", "amx_int8",
    "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip


# ---- the row ----------------------------------------------------------------------------------------------------
def check_row(row: object) -> Row:
    """Return `row` if it is a row of today's schema; else raise ValueError (TypeError) that names the field."""
    if not isinstance(row, dict):
        raise TypeError(f"a row is a JSON object, not {type(row).__name__}")
    if row.get("schema") != SCHEMA:
        raise ValueError(f"row has schema {row.get('schema', 'missing')}, this version reads schema {SCHEMA}")
    _check_fields(row, EVERY_ROW, required=True)
    what = row["what"]
    if what not in KINDS:
        raise ValueError(f"unknown kind of row what={what!r}; known: {', '.join(sorted(KINDS))}")
    _check_fields(row, KINDS[what], required=True)
    _check_fields(row, OPTIONAL, required=False)
    if "hardware" in row and not row["hardware"].get("name"):
        raise ValueError("hardware.name is missing: a figure must say which machine it is from")
    if "software" in row and not row["software"].get("torch"):
        raise ValueError("software.torch is missing")
    if "ms_p50" in row and not 0 <= row["ms_p20"] <= row["ms_p50"] <= row["ms_p80"] < math.inf:
        raise ValueError(f"times out of order: p20 {row['ms_p20']}, p50 {row['ms_p50']}, p80 {row['ms_p80']}")
    if row.get("n", 1) < 1:
        raise ValueError("n is the number of samples, at least 1")
    return row


def _check_fields(row: Row, fields: dict[str, tuple[type, ...]], required: bool) -> None:
    for name, types in fields.items():
        if name not in row:
            if required:
                raise ValueError(f"{row.get('what', 'row')}: field {name!r} is missing")
            continue
        value = row[name]
        if isinstance(value, str) and float in types and value in NOT_FINITE and not name.startswith("ms_"):
            continue  # a loss that became nan is a fact worth keeping
        if not isinstance(value, types) or (isinstance(value, bool) and bool not in types):
            expected = " or ".join("null" if kind is type(None) else kind.__name__ for kind in types)
            raise ValueError(f"field {name!r} is {value!r}, expected {expected}")


NOT_FINITE = ("nan", "inf", "-inf")  # JSON has no such numbers; as text they survive, and float() reads them back


def plain(value: Any) -> Any:
    """`value` as JSON can hold it: tensors of one element become numbers, tuples lists, non-finite floats text."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, Path | torch.dtype | torch.device):
        return str(value).removeprefix("torch.")
    if hasattr(value, "item") and not isinstance(value, bool | int | float | str):
        value = value.item()
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    return value


class Log:
    """Console lines, and checked rows appended to `out_dir/name`, each flushed so that a killed run keeps its rows.

    `out_dir=None` writes no file; `console=False` prints nothing (both together: a rank that stays silent).
    """

    def __init__(self, out_dir: str | Path | None, *, name: str = "log.jsonl", console: bool = True) -> None:
        self.console = console
        self.path = None if out_dir is None else Path(out_dir) / name
        if self.path is not None:
            self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = None if self.path is None else _open_at_line_start(self.path)

    def say(self, text: str) -> None:
        """Print one line to the console."""
        if self.console:
            print(text, flush=True)

    def row(self, what: str, **fields: Any) -> Row:
        """Check and write one row, and return it. Raises ValueError that names a missing or wrong field.

        In the file, paths inside this checkout are relative to it: its place on this machine is nobody's business.
        """
        row = check_row({"schema": SCHEMA, "what": what, "date": now(), **plain(fields)})
        if self._file is not None:
            line = json.dumps(row, allow_nan=False).replace(CHECKOUT, "") + "\n"
            try:
                self._file.write(line)
                self._file.flush()
            except OSError as error:
                file, self._file = self._file, None
                with contextlib.suppress(OSError):  # it tries the same bytes again
                    file.close()
                raise UserError(
                    f"cannot write {self.path} ({len(line)} bytes needed): {error.strerror}; "
                    "free some space, or choose another --out_dir"
                ) from None
        return row

    def close(self) -> None:
        if self._file is not None:
            self._file.close()
            self._file = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _open_at_line_start(path: Path) -> Any:
    """Open to append; a last line that a killed run left half written is ended, so that the next row stays whole."""
    file = path.open("ab+")
    if file.tell() > 0:
        file.seek(-1, os.SEEK_END)
        if file.read(1) != b"\n":
            file.write(b"\n")
    file.close()
    return path.open("a", encoding="utf-8")


# ---- trackers ---------------------------------------------------------------------------------------------------
TRACKER_PATIENCE_S = 10.0  # how long the end of a run waits for what has not been sent
TRACKER_BACKLOG = 1000  # rows that wait to be sent; more are dropped, and counted


class Tracker:
    """Sends rows of numbers to wandb, trackio or tensorboard on a thread of its own; kind "none" sends nothing.

    Training never waits for it: a service that is slow, down or broken costs rows, and one warning. Raises UserError,
    naming the `flag` that asked for it, only where the package is missing.
    """

    def __init__(self, kind: str, flag: str, out_dir: str | Path, project: str, name: str, config: Row) -> None:
        self.kind = kind
        self.dropped = 0
        self._rows: queue.Queue[Row | None] = queue.Queue(TRACKER_BACKLOG)
        self._thread: threading.Thread | None = None
        if kind == "none":
            return
        module = _import_tracker(kind, flag)
        if kind == "tensorboard":
            connect = partial(_tensorboard, module, Path(out_dir) / "tensorboard")
        else:
            connect = partial(_wandb_like, module, project, name, config)
        self._thread = threading.Thread(target=self._send, args=(connect,), daemon=True)
        self._thread.start()

    def log(self, row: Row) -> None:
        """Send one row; "iter" is its step, None values are left out."""
        if self._thread is None:
            return
        try:
            self._rows.put_nowait({key: value for key, value in row.items() if value is not None})
        except queue.Full:
            self.dropped += 1

    def close(self) -> None:
        """Waits TRACKER_PATIENCE_S at most for rows not yet sent; says how many were lost."""
        if self._thread is None:
            return
        if self._thread.is_alive():
            with contextlib.suppress(queue.Full):
                self._rows.put(None, timeout=TRACKER_PATIENCE_S)
            self._thread.join(TRACKER_PATIENCE_S)
        lost = self.dropped + self._rows.qsize()
        if self._thread.is_alive() or lost:
            print(f"warning: {self.kind} did not take {lost} rows; metrics.jsonl has them all", file=sys.stderr)
        self._thread = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _send(self, connect: Callable[[], tuple[Callable[[Row], Any], Callable[[], Any]]]) -> None:
        try:
            send, finish = connect()
            while (row := self._rows.get()) is not None:
                send(row)
            finish()
        except BaseException as error:
            print(f"warning: {self.kind} failed and gets no more rows: {error!r}", file=sys.stderr)
            self.dropped += 1


def _import_tracker(kind: str, flag: str) -> Any:
    module = "torch.utils.tensorboard" if kind == "tensorboard" else kind
    try:
        return importlib.import_module(module)
    except ImportError:
        raise UserError(f"{flag} needs the package {kind}: pip install {kind}, or leave the flag out") from None


def _wandb_like(module: Any, project: str, name: str, config: Row) -> tuple[Callable[[Row], Any], Callable[[], Any]]:
    module.init(project=project, name=name, config=config)
    return module.log, getattr(module, "finish", lambda: None)


def _tensorboard(module: Any, folder: Path) -> tuple[Callable[[Row], Any], Callable[[], Any]]:
    writer = module.SummaryWriter(str(folder))

    def send(row: Row) -> None:
        for key, value in row.items():
            if key != "iter":
                writer.add_scalar(key, value, row["iter"])

    return send, writer.close


# ---- the facts --------------------------------------------------------------------------------------------------
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
    root = Path(__file__).resolve().parents[1]
    try:
        done = subprocess.run(["git", "-C", root, *arguments], capture_output=True, text=True, timeout=10, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout.strip() if done.returncode == 0 else None


def command() -> str:
    """The command line of this process, fit to be typed again."""
    arguments = [argument if "\n" not in argument else "..." for argument in sys.orig_argv[1:]]
    return shlex.join(["python", *arguments])


# ---- the state of the GPU, which decides its speed ---------------------------------------------------------------
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
