"""Command lines: the fields of a dataclass are the flags, and a user's mistake prints one line, never a traceback.

    @dataclass(frozen=True)
    class Config:
        learning_rate: float = 6e-4  # highest learning rate

    def main(argv: list[str]) -> None:
        config = cli.parse(Config, argv, presets={"small": Config(1e-3)})

    if __name__ == "__main__":
        sys.exit(cli.run(main))

`--key=value` and `--key value`, hyphens or underscores; `--flag`, `--flag=True`, `--flag=False`; an int where a float
is meant. A bare word names a preset, or sets the field that `positional` names. Flags override presets and later flags
earlier ones, wherever they stand. tyro converts values and writes `--help`, with each field's comment as its help.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import errno
import io
import os
import re
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from types import FrameType
from typing import Any, TypeVar, get_type_hints

from gptfast import leave_at_once
from gptfast.errors import UserError, nearest

Config = TypeVar("Config")


# Ranges of numbers by flag name, which means the same in every command; others may be any finite number of 64 bits.
# Each command checks whatever depends on more than the number itself.
ANY_INT, ANY_FLOAT = (-(2**63), 2**63 - 1), (-(10.0**30), 10.0**30)
COUNT, SHARE, POSITIVE = (1, 2**40), (0.0, 1.0), (10.0**-12, 10.0**18)
LIMITS: dict[str, tuple[float, float]] = {
    "threads": (1, 4096), "processes": (0, 4096), "world_size": (1, 10**6), "n_gpu": (1, 10**6), "rounds": (1, 10**6),
    "seed": (0, 2**63 - 1), "n_layer": (1, 10**5), "n_head": (1, 10**5), "n_kv_head": (1, 10**5),
    "head_dim": (1, 10**5), "n_embd": (1, 10**6), "mlp_width": (1, 10**7), "depth": (0, 10**4),
    "block_size": (1, 2**31 - 1), "batch_size": (1, 2**31 - 1), "vocab_size": (0, 2**31 - 1),
    "context": (0, 2**31 - 1), "stride": (0, 2**31 - 1),
    "num_samples": (0, 10**6), "max_new_tokens": (1, 10**9), "sample_tokens": (0, 10**9), "top_k": (0, 2**31 - 1),
    "temperature": (0.0, 10.0**6), "dropout": SHARE, "val_fraction": SHARE, "ratio": POSITIVE, "samples": COUNT,
    "memory_gb": POSITIVE, "power_w": POSITIVE, "peak_tflops": POSITIVE, "tokens_per_s": POSITIVE,
    "ms_per_iter": POSITIVE, "nvlink_gbs": POSITIVE, "network_gbs": POSITIVE, "reached": (10.0**-6, 1.0),
    "hop_us": (0.0, 10.0**9), "memory_gbs": POSITIVE, "newton_schulz_tflops": POSITIVE,
    "budget_s": (0.0, float("inf")),
}  # fmt: skip
# What other programs, nanochat before all, call a flag: of ours, the first that the command has.
ALIASES: dict[str, tuple[str, ...]] = {
    "num_iterations": ("max_iters",), "num_steps": ("max_iters",), "max_steps": ("max_iters",),
    "max_seq_len": ("block_size",), "sequence_len": ("block_size",), "context_length": ("block_size",),
    "num_layers": ("n_layer",), "num_heads": ("n_head",), "hidden_size": ("n_embd",), "run": ("wandb_run_name",),
    "lr": ("learning_rate",), "embedding_lr": ("learning_rate",), "unembedding_lr": ("head_lr",),
    "wd": ("weight_decay",), "warmup_steps": ("warmup_iters",), "grad_accum": ("gradient_accumulation_steps",),
    "eval_every": ("eval_interval",), "save_every": ("eval_interval",), "mmlu_epochs": ("mixture",),
    "gsm8k_epochs": ("mixture",), "prompt": ("start",), "max_tokens": ("max_new_tokens",),
    "max_new_tokens": ("max_tokens",), "num_tokens": ("max_new_tokens", "max_tokens"),
}  # fmt: skip
SHORT: dict[str, tuple[str, ...]] = {  # nanochat's flags of one letter, likewise
    "t": ("temperature",), "k": ("top_k",), "m": ("max_tokens", "max_new_tokens"), "n": ("num_samples",),
    "p": ("prompt", "port", "start"), "d": ("dtype",),
}  # fmt: skip
CHECKPOINTS = ("i", "g", "source", "model_tag")  # nanochat's flags that choose a model
SHOWN = 80  # characters of the user's input that an error repeats


def run(main: Callable[[list[str]], Any], argv: Sequence[str] | None = None) -> int:
    """Runs `main(argv)` and returns the exit code: the int that it returns or exits with, or 0; 2 for a UserError, 130
    for Ctrl-C, 1 where stdout cannot be written; each of these errors prints one line on stderr.
    """
    if signal.getsignal(signal.SIGINT) is leave_at_once:
        signal.signal(signal.SIGINT, _interrupt)
    if sys.stdout is None:  # closed; no file may get its descriptor
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper) and "utf" not in stream.encoding.lower():
            stream.reconfigure(errors="backslashreplace")  # do not fail on a letter that the terminal lacks
    failures = _noted_failures(sys.stdout)
    try:
        try:
            code = main(_checked(sys.argv[1:] if argv is None else argv))
        except SystemExit as end:  # --help, and argparse's errors
            if not isinstance(end.code, int | None):
                raise
            code = end.code
        sys.stdout.flush()
    except UserError as error:
        with contextlib.suppress(OSError):
            sys.stdout.flush()
        code = 1 if _comes_of(error, failures) else 2
        if code == 2:  # otherwise the line below is the whole truth
            print(f"error: {_on_one_line(str(error))}", file=sys.stderr)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        code = 130
    except OSError as error:
        if error.errno == errno.ENAMETOOLONG:
            print(f"error: no file can have so long a name: {_shown(str(error.filename))}", file=sys.stderr)
            return 2
        if not (failures or _is_broken(sys.stdout)):
            if error.filename is None:
                raise
            print(f"error: {_shown(str(error.filename))}: {error.strerror}", file=sys.stderr)
            return 2
        code = 1
    if failures or _is_broken(sys.stdout):
        failure = failures[0] if failures else OSError(errno.EIO, "it is closed")
        if not isinstance(failure, BrokenPipeError):  # the reader, such as `| head`, has seen enough
            print(f"error: cannot write the output: {failure.strerror}", file=sys.stderr)
        with contextlib.suppress(OSError, ValueError):  # or Python would try again at exit
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = code or 1
    return code if isinstance(code, int) else 0


def _comes_of(error: BaseException | None, failures: Sequence[OSError]) -> bool:
    """Returns whether the error was raised while one of the failures was handled."""
    while error is not None and error not in failures:
        error = error.__context__
    return error is not None


def _interrupt(signum: int, frame: FrameType | None) -> None:
    """Handles Ctrl-C: raises KeyboardInterrupt; leaves at once from an import, where libraries in C++ would abort."""
    caller = frame
    while caller is not None:
        if caller.f_code.co_filename == "<frozen importlib._bootstrap>":
            leave_at_once(signum, frame)
        caller = caller.f_back
    raise KeyboardInterrupt


def _checked(argv: Sequence[str]) -> list[str]:
    """Returns `argv`. Raises UserError for `--name=--`, which argparse turns into an empty list."""
    for argument in argv:
        if argument.startswith("--") and argument.endswith("=--"):
            raise UserError(f"{_shown(argument)}: -- is no value")
    return list(argv)


def _on_one_line(text: str) -> str:
    """Escapes line ends and control characters in `text`, which may contain names from outside; cuts long words."""
    text = re.sub(r"\S{1000,}", lambda word: _shown(word[0]), text)
    return "".join(letter if letter.isprintable() else repr(letter)[1:-1] for letter in text)


def _noted_failures(stream: Any) -> list[OSError]:
    """Returns a list that collects the errors of writing to the real stdout; argparse swallows them."""
    failures: list[OSError] = []

    def noted(method: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            try:
                return method(*arguments)
            except OSError as error:
                failures.append(error)
                raise

        return call

    is_real = stream is sys.__stdout__
    if is_real:
        stream.write, stream.flush = noted(stream.write), noted(stream.flush)
    return failures


def _is_broken(stream: Any) -> bool:
    """Returns whether flushing the stream fails."""
    try:
        stream.flush()
    except (OSError, ValueError):
        return True
    return False


def parse(
    config_type: type[Config],
    argv: Sequence[str],
    presets: Mapping[str, Config] | None = None,
    *,
    positional: str | None = None,
) -> Config:
    """Reads `argv` into a `config_type` (a flat dataclass with a default for every field).

    `presets` maps names to instances. A name may be spelled as nanoGPT's config files are: `config/train_gpt2.py` is
    the preset `train_gpt2`, and a leading `train_` may be left out. `positional` is the field that a bare word sets.
    Raises UserError for an unknown flag or preset (names the nearest) and for a value of the wrong type (names the
    type); exits with code 0 after `--help`.
    """
    words, flags = _split(argv, config_type)
    if len(words) > 1:
        raise UserError(f"{' '.join(words)}: give one name, not {len(words)}")
    base = config_type()
    for word in words:
        if positional is not None:
            flags.insert(0, (positional, word))
        else:
            base = (presets or {})[_preset_name(word, presets or {})]
    if ("help", "True") in flags:
        _help(config_type, base, presets or {}, positional)
    typed_values = {key: _convert(config_type, key, text) for key, text in flags}
    return dataclasses.replace(base, **typed_values)  # type: ignore[type-var]


def check_range(name: str, value: Any) -> None:
    """Raises UserError for a number outside the range of the flag `name`, such as infinity or too many threads."""
    if isinstance(value, bool) or not isinstance(value, int | float):
        return
    least, most = LIMITS.get(name, ANY_INT if isinstance(value, int) else ANY_FLOAT)
    if not least <= value <= most:
        shown = f"{value:g}" if isinstance(value, float) else str(value) if abs(value) < 10**40 else "a longer number"
        if value > most:
            limit = f"at most {most:,}"
        elif value < least:
            limit = "above 0" if least == POSITIVE[0] else f"at least {least:,}"
        else:
            limit = "a number"
        raise UserError(f"--{name}={shown}: must {'not be negative' if value < 0 == least else f'be {limit}'}")


def check_ranges(arguments: argparse.Namespace) -> argparse.Namespace:
    """Returns `arguments` after `check_range` on every number in them."""
    for name, value in vars(arguments).items():
        check_range(name, value)
    return arguments


def typed(argv: Sequence[str], config_type: type) -> dict[str, str]:
    """Returns the flags that the user typed, `{key: text}`, to tell a choice from a default."""
    return dict(_split(argv, config_type)[1])


def _split(argv: Sequence[str], config_type: type) -> tuple[list[str], list[tuple[str, str]]]:
    """Returns the bare words, and `(key, text)` for every flag, in the order typed."""
    types = get_type_hints(config_type)
    words: list[str] = []
    flags: list[tuple[str, str]] = []
    remaining = list(argv)
    while remaining:
        argument = remaining.pop(0)
        if argument in ("-h", "--help"):
            flags.append(("help", "True"))
            continue
        if re.match("-[a-zA-Z]", argument):
            raise _unknown("-", argument[1:].partition("=")[0], config_type, types)
        if not argument.startswith("--"):
            words.append(argument)
            continue
        name, equals, text = argument[2:].partition("=")
        key = name.replace("-", "_")
        if key not in types:
            raise _unknown("--", name, config_type, types)
        if not equals:
            is_switch = types[key] is bool and (not remaining or remaining[0].lower() not in ("true", "false"))
            if not is_switch and (not remaining or remaining[0].startswith("--")):
                raise UserError(f"--{name} needs a value: --{name}={_type_name(types[key])}")
            text = "True" if is_switch else remaining.pop(0)
        flags.append((key, text))
    return words, flags


def _unknown(dashes: str, name: str, config_type: type, types: Mapping[str, Any]) -> UserError:
    """The error for a flag that the command has not, with what was meant."""
    key, said = name.replace("-", "_"), f"unknown flag {dashes}{_shown(name)}"
    if key in CHECKPOINTS and {"init_from", "out_dir"} & set(types):
        is_own = getattr(config_type, "init_from", "resume") in ("resume", "scratch")  # a field's default
        return UserError(f"{said}; the checkpoint is named by --{'out_dir' if is_own else 'init_from'}=FOLDER")
    for meant in (ALIASES if dashes == "--" else SHORT).get(key, ()):
        if meant in types:
            return UserError(f"{said}; did you mean --{meant}?")
    return UserError(said + (nearest(key, types, "--") if dashes == "--" else "; flags are typed --key=value"))


def _preset_name(word: str, presets: Mapping[str, Any]) -> str:
    stem = os.path.basename(word).removesuffix(".py")
    for name in (stem, stem.removeprefix("train_"), f"train_{stem}"):
        if name in presets:
            return name
    if not presets:
        raise UserError(f"unexpected argument {_shown(word)}; flags are typed --key=value")
    raise UserError(f"unknown preset {_shown(word)}{nearest(stem, [name.removeprefix('train_') for name in presets])}")


def _convert(config_type: type, key: str, text: str) -> Any:
    """Returns the value of `--key=text`; a parser of this one flag makes the error name it."""
    import tyro

    expected = get_type_hints(config_type)[key]
    if expected is bool:
        text = text.capitalize()
    flag = dataclasses.make_dataclass("Flag", [(key, expected)])
    try:
        with contextlib.redirect_stderr(io.StringIO()), contextlib.redirect_stdout(io.StringIO()):
            parsed: Any = tyro.cli(
                flag, args=[f"--{key}={text}"], config=(tyro.conf.FlagConversionOff,), add_help=False
            )
    except SystemExit:
        raise UserError(f"--{key}={_shown(text)}: expected {_type_name(expected)}") from None
    check_range(key, getattr(parsed, key))
    return getattr(parsed, key)


def _shown(text: str) -> str:
    return text if len(text) <= SHOWN else f"{text[:SHOWN]}..."


def _type_name(expected: Any) -> str:
    if expected is bool:
        return "True or False"
    choices = getattr(expected, "__args__", ())
    if choices and all(isinstance(choice, str) for choice in choices):
        return " or ".join([", ".join(choices[:-1]), choices[-1]] if len(choices) > 1 else choices)
    return getattr(expected, "__name__", str(expected)) if not choices else str(expected)


def _help(config_type: type, base: Any, presets: Mapping[str, Any], positional: str | None) -> None:
    """Prints every flag with its default and help, and exits with code 0."""
    import tyro

    program = sys.modules["__main__"]
    spec = getattr(program, "__spec__", None)
    description = (program.__doc__ or "").strip()
    if presets:
        description += f"\n\nPresets, typed as a bare word: {', '.join(presets)}"
    if positional:
        description += f"\n\nA bare word sets --{positional}"
    tyro.cli(
        config_type,
        prog=f"python -m {spec.name.removesuffix('.__main__')}" if spec else None,
        description=description,
        default=base,
        args=["--help"],
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )
