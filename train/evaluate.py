"""Evaluates models on a text (loss, perplexity, bits per byte) or on tasks; ours and others' side by side.

    python -m train.evaluate --models=out --text=book.txt
    python -m train.evaluate --models=out-owt-30m,gpt2,gpt2-medium,gpt2-large,gpt2-xl --dataset=openwebtext
    python -m train.evaluate eval_gpt2_all                     GPT-2 124M … 1558M on openwebtext's validation split
    python -m train.evaluate --models=out-sft,out-rl --tasks=gsm8k,humaneval --task_dir=tasks     (train/score.py)
    python -m train.evaluate --models=out-sft --tasks=all      every task with a judge, from the hub
    python -m train.evaluate --models=out,gpt2 --tasks=core --out_dir=core     CORE, by which base models are compared;
                                                               the same command goes on where it stopped (train/core.py)

Each model uses its own tokenizer, so losses and perplexities are comparable only between models with the same one;
bits per byte always are. Every token of the text is predicted once, in windows of the model's own context.

    loss = nats / tokens        perplexity = exp(loss)        bits per byte = nats / (ln 2 · bytes of UTF-8)

± is the standard error of nats / tokens as a ratio estimator, with windows as independent draws (Cochran, "Sampling
Techniques", section 2.11).
"""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from gptfast import cli, hf, runtime, untrusted
from gptfast.aside import check_writable, unwritable, write_whole
from gptfast.chat.conversation import Chat
from gptfast.data import load_tokens, parts_of
from gptfast.errors import UserError, nearest, to_install
from gptfast.log import Log, facts
from gptfast.model import GPT, IGNORED
from gptfast.tokenizer import load_tokenizer
from kernels import Ops
from train import core, score
from train.files import TEXT_BYTES, decoded
from train.score import Encoder
from train.tasks import Where, judged
from train.tasks.core import CoreTask
from train.tasks.core import read as read_core

NatsPerRow = Callable[[Tensor, Tensor], Tensor]  # tokens, targets (B, T) -> (B,), summed over targets that count


@dataclass(frozen=True)
class Evaluate:
    models: str = "out"  # folders of checkpoints, folders in Hugging Face's layout, names on the hub; commas between
    text: str = ""  # a text file; without one, the text is that of `dataset`
    dataset: str = "openwebtext"  # name of a prepared data set
    split: str = "val"  # its split
    data_dir: str = "data"  # folder of the prepared data sets
    context: int = 0  # tokens in a window; 0: as many as each model takes
    stride: int = 0  # tokens between the starts of two windows, which is how many each predicts; 0: no overlap
    batch_size: int = 8  # windows at once; for CORE, as many tokens as these windows hold
    tasks: str = ""  # tasks of train/tasks instead of a text: all, or names with commas between; core, core:NAME
    task_dir: str = ""  # folder with a folder of files for each task; empty: from the network
    max_examples: int = 0  # of each task; 0: all
    samples: int = 1  # answers to each problem; one must pass
    temperature: float = 0.0  # of answers; 0 takes the likeliest token
    top_k: int = 50  # tokens that an answer is drawn from, at a temperature above 0
    max_tokens: int = 512  # of an answer
    out_dir: str = ""  # where evaluation.md and evaluation.jsonl go; nowhere if empty
    device: str = "cuda"  # cuda, cuda:N, mps or cpu; the default becomes cpu, and says so, where there is no GPU
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = "auto"  # of activations; auto: the best this device has
    kernels: Literal["auto", "cpu", "reference", "triton", "interpret"] = "auto"  # which implementation of each op runs

    def __post_init__(self) -> None:
        for name in ("context", "stride", "max_examples", "temperature", "top_k"):
            if getattr(self, name) < 0:
                raise UserError(f"--{name}={getattr(self, name)}: must not be negative")
        for name in ("batch_size", "samples", "max_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least 1")


def _on_openwebtext(models: str) -> Evaluate:
    return Evaluate(models=models, dataset="openwebtext", split="val")


PRESETS = {
    "eval_gpt2": _on_openwebtext("gpt2"),
    "eval_gpt2_medium": _on_openwebtext("gpt2-medium"),
    "eval_gpt2_large": _on_openwebtext("gpt2-large"),
    "eval_gpt2_xl": _on_openwebtext("gpt2-xl"),
    "eval_gpt2_all": _on_openwebtext("gpt2,gpt2-medium,gpt2-large,gpt2-xl"),
}


@dataclass(frozen=True)
class Subject:
    """A model to be evaluated."""

    name: str
    parameters: int
    context: int  # the longest sequence
    tokenizer: Encoder
    nats: NatsPerRow


@dataclass(frozen=True)
class Result:
    """The figures of `measure`, with standard errors, which are nan where there is only one window."""

    name: str
    parameters: int
    context: int
    tokens: int  # predicted
    bytes: int  # of UTF-8 in these tokens
    loss: float  # nats per token
    loss_error: float

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss)

    @property
    def bits_per_byte(self) -> float:
        return self.loss * self._bits

    @property
    def bits_per_byte_error(self) -> float:
        return self.loss_error * self._bits

    @property
    def _bits(self) -> float:
        return self.tokens / (math.log(2) * self.bytes)


def main(argv: list[str]) -> None:
    config = cli.parse(Evaluate, argv, PRESETS)
    device = runtime.choose_device(config.device, typed="device" in cli.typed(argv, Evaluate))
    dtype, why = runtime.choose_dtype(config.dtype, device)
    print(f"dtype: {str(dtype).removeprefix('torch.')}, {why}")
    ops = runtime.choose_ops(config.kernels, device)
    if config.out_dir:
        check_writable(Path(config.out_dir))
    if config.tasks:
        return score_tasks(config, ops, dtype, device)
    documents = read_documents(config)
    results = []
    for name in filter(None, config.models.split(",")):
        subject = open_subject(name.strip(), ops, dtype, device, context=config.context)
        results.append(
            measure(subject, documents, device, context=config.context, stride=config.stride, batch=config.batch_size)
        )
    if not results:
        raise UserError("--models is empty; name a folder with a model, or gpt2")
    print(table(results))
    if config.out_dir:
        write(results, config.out_dir, device)


# ---- tasks


def score_tasks(config: Evaluate, ops: Ops, dtype: torch.dtype, device: str) -> None:
    """Prints each model's score on each task, and writes it to out_dir."""
    named = [name.strip() for name in config.tasks.split(",") if name.strip()]
    converse = [name for name in named if name != "core" and not name.startswith(core.PREFIX)]
    chosen = core_tasks(config, [name for name in named if name not in converse])
    examples = []
    for task in judged(",".join(converse)):
        rows = task.examples("test", Where(config.task_dir))
        examples.append((task, rows[: config.max_examples] if config.max_examples else rows))
    settings = score.Settings(config.samples, config.temperature, config.top_k, config.max_tokens, config.batch_size)
    journal = core.Journal(_made(config.out_dir) / "core-progress.jsonl" if config.out_dir and chosen else None)
    scores: dict[str, list[score.Score]] = {}
    for name in filter(None, map(str.strip, config.models.split(","))):
        scores[name] = []
        if examples:
            player = open_player(name, ops, dtype, device)
            scores[name] += [score.measure(player, task, rows, settings) for task, rows in examples]
        if chosen:
            reader = open_reader(name, ops, dtype, device, config)
            scores[name] += [core.measure(reader, task, config.batch_size, journal) for task in chosen]
    if not scores:
        raise UserError("--models is empty; name a folder with a model")
    core_names = [core.PREFIX + task.name for task in chosen] if "core" in named else []
    print(score.table(scores, core_names))
    if config.out_dir:
        write_scores(scores, core_names, config.out_dir, device)


def core_tasks(config: Evaluate, named: Sequence[str]) -> list[CoreTask]:
    """Returns the CORE tasks among the names: all for `core`, one for `core:NAME`."""
    if not named:
        return []
    bundle = read_core(config.task_dir, config.data_dir, config.max_examples)
    if "core" in named:
        return list(bundle.values())
    names = [name.removeprefix(core.PREFIX) for name in named]
    for name in names:
        if name not in bundle:
            raise UserError(f"unknown task {core.PREFIX}{name}{nearest(name, bundle)}; core means all")
    return [bundle[name] for name in names]


def _made(folder: str) -> Path:
    try:
        Path(folder).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"--out_dir={folder}: cannot write there ({error.strerror}); choose another") from None
    return Path(folder)


def open_player(source: str, ops: Ops, dtype: torch.dtype, device: str) -> score.Player:
    """Opens the model of `source` for tasks; its tokenizer needs the special tokens of conversations."""
    folder = hf.find(source)
    chat = Chat(_tokenizer(source, folder))  # type: ignore[arg-type]
    reason = hf.why_not(folder)
    if reason:
        return score.Theirs(_theirs(source, folder, reason, dtype, device), chat)
    return score.Ours(hf.load(source, ops, dtype=dtype).to(device).eval(), chat)


def write_scores(scores: dict[str, list[score.Score]], whole: Sequence[str], out_dir: str, device: str) -> None:
    """Writes tasks.md, and to tasks.jsonl a row per model and task; one for CORE if `whole` lists its tasks."""
    write_whole(Path(out_dir) / "tasks.md", score.table(scores, whole) + "\n")
    with unwritable(Path(out_dir)), Log(out_dir, name="tasks.jsonl") as log:
        for name, of_model in scores.items():
            for s in of_model:
                log.row(
                    "summary", name=name, task=s.task, accuracy=s.accuracy, accuracy_error=s.error, chance=s.chance,
                    examples=s.count, passed=s.passed, centred=s.centred, **facts(device),
                )  # fmt: skip
            mean = score.mean_centred(of_model)
            if mean is not None:
                log.row(
                    "summary", name=name, task="ChatCORE", accuracy=mean[0], accuracy_error=mean[1], **facts(device)
                )
            mean = score.mean_centred(of_model, whole)
            if mean is not None:
                log.row(
                    "summary", name=name, core=mean[0], core_error=mean[1], tasks=len(whole),
                    examples=sum(s.count for s in of_model if s.task in whole), **facts(device),
                )  # fmt: skip
    print(f"wrote {Path(out_dir) / 'tasks.md'} and {log.path}")


# ---- the text


def read_documents(config: Evaluate) -> list[str]:
    """Returns the text file as one document, or the decoded documents of a split."""
    if config.text:
        try:
            documents = [decoded(untrusted.content(config.text, TEXT_BYTES), Path(config.text))]
        except (OSError, ValueError) as error:
            if isinstance(error, UserError):
                raise
            reason = untrusted.reason(error)
            raise UserError(f"--text={config.text}: cannot read it ({reason}); name a text file") from None
    else:
        folder = Path(config.data_dir) / config.dataset
        tokenizer = load_tokenizer(folder)
        tokens = load_tokens(folder / f"{config.split}.bin", tokenizer.vocab_size)
        documents = [tokenizer.decode(ids) for part in parts_of(tokens) for ids in _between(part, tokenizer.bos)]
    if not any(documents):
        raise UserError("the text is empty; give another --text or --dataset")
    return documents


def _between(tokens: Tensor, bos: int | None) -> Iterator[list[int]]:
    """Yields the ids of each document, split at `bos`."""
    if bos is None:
        yield tokens.tolist()
        return
    places = [-1, *(tokens == bos).nonzero().flatten().tolist(), len(tokens)]
    for i, first in enumerate(places[:-1]):
        if first + 1 < places[i + 1]:
            yield tokens[first + 1 : places[i + 1]].tolist()


def encode(tokenizer: Encoder, documents: Iterable[str]) -> tuple[Tensor, Tensor, int]:
    """Returns ids (N,) int64, whether each is predicted (N,) bool, and the UTF-8 bytes of the predicted ones.

    Each document follows a BOS, which is not predicted itself. Without a BOS in the tokenizer, the very first token is
    not predicted.
    """
    ids: list[int] = []
    counted: list[bool] = []
    size = 0
    for document in documents:
        new_ids = tokenizer.encode(document)
        if tokenizer.bos is not None:
            ids.append(tokenizer.bos)
            counted.append(False)
        ids += new_ids
        counted += [True] * len(new_ids)
        size += len(document.encode())
    if tokenizer.bos is None:
        counted[0] = False
        size -= len(tokenizer.decode(ids[:1]).encode())
    return torch.tensor(ids), torch.tensor(counted), size


# ---- the figures


@torch.no_grad()
def measure(
    subject: Subject, documents: Sequence[str], device: str, *, context: int = 0, stride: int = 0, batch: int = 8
) -> Result:
    """Returns the loss of `subject` over all of `documents`. Shows progress."""
    from tqdm import tqdm

    if context > subject.context:
        raise UserError(f"--context={context}: {subject.name} takes {subject.context} tokens at most")
    context = context or subject.context
    stride = stride or context
    if stride > context:
        raise UserError(f"--stride={stride}: must not be longer than the {context} tokens of a window")
    ids, counted, size = encode(subject.tokenizer, documents)
    if not counted[1:].any():
        raise UserError(f"the text has {len(ids)} token for {subject.name}; give a longer one")
    count = count_windows(len(ids), context, stride)
    width = min(context, len(ids))  # a model may say that it takes any number of tokens
    nats, counts = [], []
    with tqdm(total=count, desc=subject.name, unit="window", disable=None) as progress:
        for first in range(0, count, batch):
            x, y = windows(ids, counted, width, stride, range(first, min(first + batch, count)))
            nats.append(subject.nats(x.to(device), y.to(device)).double().cpu())
            counts.append((y != IGNORED).sum(1))
            progress.update(len(x))
    predicted = torch.cat(counts)
    loss, error = ratio(torch.cat(nats), predicted)
    return Result(subject.name, subject.parameters, context, int(predicted.sum()), size, loss, error)


def count_windows(length: int, context: int, stride: int) -> int:
    """Returns how many windows it takes to predict all of `length` ids but the first."""
    return 1 + max(0, math.ceil((length - 1 - context) / stride))


def windows(ids: Tensor, counted: Tensor, context: int, stride: int, which: range) -> tuple[Tensor, Tensor]:
    """Returns inputs and targets (len(which), context) int64. Each counted id but the first is a target once.

    Windows begin `stride` apart; where one overlaps the previous one, only its new targets count, and the others are
    IGNORED. Inputs after the end repeat the last id; no counted target sees them.
    """
    number = torch.tensor(which)[:, None]
    offset = torch.arange(context)
    index = (stride * number + offset).clamp(max=len(ids) - 1)  # of the input
    following = (index + 1).clamp(max=len(ids) - 1)
    is_new = (stride * number + offset + 1 < len(ids)) & ((number == 0) | (offset >= context - stride))
    return ids[index], torch.where(is_new & counted[following], ids[following], IGNORED)


def ratio(sums: Tensor, counts: Tensor) -> tuple[float, float]:
    """Returns sum(sums) / sum(counts) and its standard error, for independent pairs."""
    n, total = len(sums), counts.sum()
    value = sums.sum() / total
    residual = (sums - value * counts).square().sum()
    error = (residual * n / (n - 1)).sqrt() / total if n > 1 else torch.tensor(math.nan)
    return value.item(), error.item()


# ---- the models


def open_subject(source: str, ops: Ops, dtype: torch.dtype, device: str, *, context: int = 0) -> Subject:
    """Opens the model and tokenizer of `source`: ours, or of a layout that we can load; any other through transformers.

    `context` is used for a model that states none. Only safetensors are read and no code of the author's runs: raises
    UserError for a model that needs anything else.
    """
    model, longest, tokenizer = _open(source, ops, dtype, device, context)
    if isinstance(model, GPT):
        gpt = model
        parameters = gpt.num_params(non_embedding=False)
        return Subject(source, parameters, longest, tokenizer, lambda x, y: nats_per_row(gpt, x, y))

    def nats(tokens: Tensor, targets: Tensor) -> Tensor:
        logits = model(tokens).logits
        per_token = F.cross_entropy(logits.float().mT, targets, ignore_index=IGNORED, reduction="none")
        return per_token.sum(1)

    return Subject(source, model.num_parameters(), longest, tokenizer, nats)


def open_reader(source: str, ops: Ops, dtype: torch.dtype, device: str, config: Evaluate) -> core.Reader:
    """Opens the model and tokenizer of `source`, as `open_subject` does, to read logits from."""
    model, longest, tokenizer = _open(source, ops, dtype, device, config.context)
    if config.context > longest:
        raise UserError(f"--context={config.context}: {source} takes {longest} tokens at most")

    def logits(tokens: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
        tokens, rows, columns = (t.to(device) for t in (tokens, rows, columns))
        if not isinstance(model, GPT):
            return model(tokens).logits[rows, columns]
        return model.logits_of(model.hidden(tokens)[rows, columns].float())

    identity = f"{dtype} {device} {ops} {_weights(hf.find(source))}"
    return core.Reader(source, config.context or longest, tokenizer, logits, identity)


def _weights(folder: Path) -> list[tuple[str, int, int]]:
    """Returns names, sizes and times of a model's files, or of its one: enough to notice a change without reading."""
    found = [folder] if folder.is_file() else folder.rglob("*")
    files = sorted(path for path in found if path.suffix in (".safetensors", ".json", ".pt") and path.is_file())
    return [(str(path.relative_to(folder)), path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def _open(source: str, ops: Ops, dtype: torch.dtype, device: str, context: int) -> tuple[Any, int, Encoder]:
    """Returns the model on `device` (a GPT or one of transformers), its longest sequence, and its tokenizer."""
    folder = hf.find(source)
    reason = hf.why_not(folder)
    if not reason:
        model = hf.load(source, ops, dtype=dtype).to(device).eval()
        return model, model.config.block_size, Fitting(source, _tokenizer(source, folder), model.config.vocab_size)
    loaded = _theirs(source, folder, reason, dtype, device)
    longest = getattr(loaded.config, "max_position_embeddings", None) or context
    if type(longest) is not int or longest < 1:
        raise UserError(f"{source} does not say how long its sequences may be; give --context")
    return loaded, longest, Fitting(source, _tokenizer(source, folder), loaded.get_input_embeddings().num_embeddings)


class Fitting:
    """A tokenizer that raises UserError for an id that its model, of `vocabulary` tokens, does not have.

    On a GPU a lookup beyond the embedding would end the process.
    """

    def __init__(self, source: str, tokenizer: Encoder, vocabulary: int) -> None:
        self.source, self.tokenizer, self.vocabulary = source, tokenizer, vocabulary
        self.bos = tokenizer.bos
        self._check([] if self.bos is None else [self.bos])

    def encode(self, text: str) -> list[int]:
        return self._check(self.tokenizer.encode(text))

    def decode(self, ids: Sequence[int]) -> str:
        return self.tokenizer.decode(ids)

    def _check(self, ids: list[int]) -> list[int]:
        if ids and max(ids) >= self.vocabulary:
            raise UserError(
                f"{self.source}: its tokenizer has a token {max(ids)} where its model has {self.vocabulary} tokens; "
                "give the tokenizer that belongs to it"
            )
        return ids


def nats_per_row(model: GPT, tokens: Tensor, targets: Tensor) -> Tensor:
    """Returns the summed loss (B,) fp32 of each row of targets (B, T)."""
    h = model.hidden(tokens)
    weight = model.lm_head.weight.to(h.dtype)
    settings: dict[str, Any] = {"ignore_index": IGNORED, "softcap": model.config.softcap, "reduction": "sum"}
    rows = zip(h, targets, strict=True)
    return torch.stack([model.ops.linear_cross_entropy(row, weight, wanted, **settings) for row, wanted in rows])


def _theirs(source: str, folder: Path, reason: str, dtype: torch.dtype, device: str) -> Any:
    """Loads a model through transformers; `reason` says why it cannot be one of ours."""
    print(f"{source} runs through transformers: {reason}")
    auto = _import_transformers().AutoModelForCausalLM
    loading = {"dtype": dtype, "use_safetensors": True, "output_loading_info": True}
    model, told = _from_pretrained(auto, source, folder, **loading)
    drawn = sorted(map(str, [*told["missing_keys"], *told["mismatched_keys"]]))
    if drawn:  # transformers draws these at random, and goes on
        raise UserError(
            f"{source}: its weights lack {', '.join(drawn[:5])}, or have them in other sizes than config.json says; "
            "fetch it again"
        )
    model = model.to(device).eval()
    try:
        with torch.no_grad():  # of many settings the first use tells that they are none
            model(torch.zeros(1, 2, dtype=torch.int64, device=device))
    except Exception as error:  # of any kind, as above
        reason = f"{type(error).__name__}: {_first_line(error)}"
        raise UserError(f"{source}: transformers cannot run it ({reason}); fetch it again") from None
    return model


def _from_pretrained(auto: Any, source: str, folder: Path, **options: Any) -> Any:
    """Calls auto.from_pretrained on the folder's data alone, without any code from it."""
    try:
        return auto.from_pretrained(folder, trust_remote_code=False, local_files_only=True, **options)
    except Exception as error:  # transformers raises OSError, ValueError, KeyError and more
        reason = _first_line(error)
        raise UserError(
            f"{source}: transformers cannot load it ({type(error).__name__}: {reason}); gptfast runs no code that "
            "comes with a model, and reads weights from safetensors only"
        ) from None


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or ["no reason given"])[0][:200]


def _tokenizer(source: str, folder: Path) -> Encoder:
    try:
        return hf.load_tokenizer(source)
    except UserError as error:
        if not (folder / "tokenizer_config.json").is_file():
            raise
        print(f"{source}'s tokenizer runs through transformers: {error}")
        return TheirTokenizer(source, folder)


class TheirTokenizer:
    """A tokenizer of transformers as an Encoder."""

    def __init__(self, source: str, folder: Path) -> None:
        self._tokenizer = _from_pretrained(_import_transformers().AutoTokenizer, source, folder)
        first, last = self._tokenizer.bos_token_id, self._tokenizer.eos_token_id
        self.bos: int | None = last if first is None else first

    @property
    def special_tokens(self) -> dict[str, int]:
        return self._tokenizer.get_added_vocab()

    def encode(self, text: str) -> list[int]:
        return self._tokenizer.encode(text, add_special_tokens=False, split_special_tokens=True, verbose=False)

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids))


def _import_transformers() -> Any:
    try:
        import transformers
    except ImportError as error:
        raise UserError(f"this model needs transformers: {to_install(error, 'transformers')}") from None
    return transformers


# ---- the report


def table(results: Sequence[Result]) -> str:
    """Returns the results as a Markdown table."""
    head = ("model", "parameters", "context", "tokens", "loss", "perplexity", "bits per byte")
    lines = [head, ("---", *["---:"] * 6)]
    for r in results:
        lines.append(
            (
                r.name, f"{r.parameters / 1e6:.1f}M", f"{r.context:,}", f"{r.tokens:,}",
                f"{r.loss:.4f}{_plus_minus(r.loss_error, 4)}",
                f"{r.perplexity:.2f}{_plus_minus(r.perplexity * r.loss_error, 2)}",
                f"{r.bits_per_byte:.4f}{_plus_minus(r.bits_per_byte_error, 4)}",
            )
        )  # fmt: skip
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _plus_minus(error: float, digits: int) -> str:
    return " ± n/a" if math.isnan(error) else f" ± {error:.{digits}f}"


def write(results: Sequence[Result], out_dir: str, device: str) -> None:
    """Writes evaluation.md, and a row for each model to evaluation.jsonl."""
    write_whole(Path(out_dir) / "evaluation.md", table(results) + "\n")
    with unwritable(Path(out_dir)), Log(out_dir, name="evaluation.jsonl") as log:
        for r in results:
            log.row(
                "summary", name=r.name, parameters=r.parameters, context=r.context, tokens=r.tokens, bytes=r.bytes,
                loss=r.loss, loss_error=r.loss_error, perplexity=r.perplexity, bits_per_byte=r.bits_per_byte,
                bits_per_byte_error=r.bits_per_byte_error, **facts(device),
            )  # fmt: skip
    print(f"wrote {Path(out_dir) / 'evaluation.md'} and {log.path}")


if __name__ == "__main__":
    sys.exit(cli.run(main))
