"""Reads documents from files or the Hugging Face hub as a resumable stream, and writes them as token shards.

    documents = Documents.find("texts/")          # .parquet, .jsonl or .txt files; hf:user/name for the hub
    for texts, state in documents.read():         # a batch of documents, and where the next batch begins
        ...
    make_shards(Path("data/mine"), documents, BPETokenizer("gpt2"), Shape())

Documents are written in order: each one's BOS and tokens are appended to `train-00000.part`, and every n-th document
to `val-00000.part` instead; where that is one document alone, no more of it than val needs. Now and then the parts are
flushed, and progress.json records their valid length and where reading continues; so the same command continues a
killed run, and ends with the same bytes.
A full part becomes `train-00000.bin`. meta.json, with the sha256 of all files, is written last. A run that is refused
before it has read anything, or for too little text, leaves nothing.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from multiprocessing import get_all_start_methods, get_context, parent_process
from pathlib import Path
from typing import Any

import numpy as np

from gptfast import untrusted
from gptfast.aside import file_aside, flush, locked
from gptfast.data import HEADER, header, itemsize
from gptfast.errors import UserError, to_install
from gptfast.tokenizer import BPETokenizer, from_json, read_meta
from train import files
from train.download import sha256_of

BATCH = 64  # documents tokenized at a time; about 200 kB of web text
BATCH_CHARACTERS = 2**22  # beyond which a batch has fewer documents
SAVED_EVERY_S = 30.0
MOST, ENOUGH = 0.1, 100_000  # val of few documents: its share of them, or this share of the tokens up to so many

PROGRESS, MANIFEST = "progress.json", "meta.json"
SPLITS = ("train", "val")
HALF = re.compile("[\ud800-\udfff]")  # half of a surrogate pair, which alone is no character


@dataclass(frozen=True)
class Documents:
    """A source of documents: files on this disk, or a data set on the Hugging Face hub."""

    name: str  # of the hub's data set, or of the folder or file
    files: tuple[tuple[str, int], ...] = ()  # path and size in bytes; none: it is on the hub
    builder: str = ""  # of the files: parquet, json or text
    subset: str = ""
    split: str = "train"
    column: str = "text"

    @classmethod
    def find(cls, source: str, *, subset: str = "", split: str = "train", column: str = "text") -> Documents:
        """Returns the documents of `source`: hf:user/name, a file, or a folder of one kind; prints what it leaves out.

        Raises UserError if it is none of these.
        """
        if source.startswith("hf:"):
            return cls(source.removeprefix("hf:"), (), "", subset, split, column)
        path = Path(source)
        if not files.exists(path):
            raise UserError(
                f"cannot read {source[:200]}: No such file or directory; give a file, a folder, or hf:user/name"
            )
        taken, left_out = files.listed(path) if path.is_dir() else ([path], [])
        kinds = {files.builder_of(file): file for file in reversed(taken)}
        if len(kinds) != 1 or None in kinds:
            examples = ", ".join(str(file.relative_to(path)) for file in kinds.values())
            problem = f"{len(kinds)} kinds of files, such as {examples}" if len(kinds) > 1 else "none"
            raise UserError(f"{source} must hold files of one kind of {', '.join(files.BUILDERS)}; found {problem}")
        if left_out:
            names = [str(file.relative_to(path)) for file in left_out]
            print(f"{source}: left out {', '.join(names[:10])}{f' and {len(names) - 10} more' * (len(names) > 10)}")
        builder = str(kinds.popitem()[0])
        sized = tuple((str(file), file.stat().st_size) for file in taken)
        return cls(source, sized, builder, column="text" if builder == "text" else column)

    def read(self, state: dict[str, Any] | None = None) -> Iterator[tuple[list[str | None], dict[str, Any]]]:
        """Yields up to BATCH documents at a time, from `state` on, each time with the state of the next batch.

        None stands for a row without a document. Raises UserError with the reason where reading fails.
        """
        if self.files:
            texts: list[str | None] = []
            characters = 0
            row = None
            for row in files.read([path for path, _ in self.files], self.builder, self.column, state):
                texts.append(row.text)
                characters += len(row.text or "")
                if len(texts) == BATCH or characters >= BATCH_CHARACTERS:
                    yield texts, row.state()
                    texts, characters = [], 0
            if row is not None and texts:
                yield texts, row.state()
            return
        with self._explained():
            stream = self._open()
            columns = stream.column_names or [self.column]
            if self.column not in columns:
                raise UserError(f"{self.name} has no column {self.column}; set --column to one of {', '.join(columns)}")
            stream = stream.select_columns([self.column]).batch(BATCH)
            if state is not None:
                stream.load_state_dict(state)
            for chunk in stream:
                yield chunk[self.column], stream.state_dict()

    def count(self) -> int | None:
        """Returns an upper bound on the number of documents, or None where only reading them all would tell."""
        if self.files:
            return files.count([path for path, _ in self.files], self.builder)
        with self._explained():
            return getattr((self._open().info.splits or {}).get(self.split), "num_examples", None)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        """Turns any error while reading from the hub into a UserError."""
        try:
            yield
        except UserError:
            raise
        except ImportError as error:
            raise UserError(f"reading {self.name} needs datasets: {to_install(error, 'datasets')}") from None
        except Exception as error:  # a stream can end in the errors of a dozen libraries
            reason = (str(error).splitlines() or ["no reason given"])[0][:200]
            fix = "the same command goes on from there"
            if "NotFound" in type(error).__name__ or isinstance(error, ValueError):  # such as a split that is not there
                fix = "see to its name, --subset and --split, or to the network; what was read before is kept"
            raise UserError(f"reading {self.name} stopped ({type(error).__name__}: {reason}); {fix}") from None

    def _open(self) -> Any:
        """Opens the data set as a datasets.IterableDataset."""
        import datasets

        datasets.disable_progress_bars()
        datasets.logging.set_verbosity(datasets.logging.CRITICAL)  # errors arrive as exceptions
        return datasets.load_dataset(self.name, self.subset or None, split=self.split, streaming=True)


@dataclass(frozen=True)
class Shape:
    """What the files of a data set look like."""

    val_fraction: float = 0.0005  # share of documents for val: of every round(1 / val_fraction) the first; see balance
    shard_tokens: int = 100_000_000  # a file ends with the document that reaches this
    max_tokens: int = 0  # train ends with the batch that reaches this; 0: all documents

    def __post_init__(self) -> None:
        if not 0 < self.val_fraction <= 0.5:
            raise UserError(f"--val_fraction={self.val_fraction}: must be above 0 and at most 0.5")
        for name, least in (("shard_tokens", 1), ("max_tokens", 0)):
            if getattr(self, name) < least:
                raise UserError(f"--{name}={getattr(self, name)}: must be at least {least}")


# ---- tokens of many documents ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Tokenized:
    """The tokens of a batch of documents, and the number of documents, by split."""

    tokens: dict[str, bytes]
    documents: int
    text_bytes: int
    empty: int = 0  # rows without text, which are left out
    mended: int = 0  # documents in which halves of surrogate pairs became U+FFFD


def tokenize(tokenizer: BPETokenizer, every: int, first: int, texts: Sequence[str | None]) -> Tokenized:
    """Tokenizes documents, each after a BOS; every `every`-th, by an ordinal that starts at `first`, goes to val.

    Empty documents are left out; half of a surrogate pair, which JSON can hold and
    UTF-8 cannot, becomes U+FFFD. Raises UserError for a value that is not text.
    """
    ids_of: dict[str, list[int]] = {split: [] for split in SPLITS}
    text_bytes = empty = mended = 0
    for number, text in enumerate(texts, first):
        if not text:
            empty += 1
            continue
        if not isinstance(text, str):
            raise UserError(f"document {number} is no text but {type(text).__name__}; choose another --column")
        if HALF.search(text):
            mended, text = mended + 1, HALF.sub("\ufffd", text)
        ids_of["val" if number % every == 0 else "train"] += tokenizer.encode_document(text)
        text_bytes += len(text.encode())
    dtype = f"<u{itemsize(tokenizer.vocab_size)}"
    return Tokenized(
        {split: np.array(ids, dtype).tobytes() for split, ids in ids_of.items()}, len(texts), text_bytes, empty, mended
    )


Task = tuple[int, list[str | None], dict[str, Any]]  # number of the first document, documents, state after them


def tokenize_all(
    tasks: Iterable[Task], tokenizer: BPETokenizer, every: int, processes: int
) -> Iterator[tuple[Tokenized, dict[str, Any]]]:
    """Yields the results of all tasks in order, each with its state; reads ahead at most two tasks per process."""
    if processes == 1:
        for first, texts, state in tasks:
            yield tokenize(tokenizer, every, first, texts), state
        return
    pool = ProcessPoolExecutor(processes, _context(), _start_worker, (tokenizer.to_json(), every))
    waiting: deque[tuple[Future[Tokenized], dict[str, Any]]] = deque()
    try:
        for first, texts, state in tasks:
            waiting.append((pool.submit(_work, first, texts), state))
            if len(waiting) == 2 * processes:
                future, after = waiting.popleft()
                yield future.result(), after
        while waiting:
            future, after = waiting.popleft()
            yield future.result(), after
    except BrokenProcessPool:
        raise UserError(
            "a tokenizing process was killed, perhaps for want of memory; the same command goes on, and "
            "--processes=1 needs the least"
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _context() -> Any:
    """Returns how to start processes: where possible, forked from a clean server that has imported torch once."""
    if "forkserver" not in get_all_start_methods():
        return get_context("spawn")
    context = get_context("forkserver")
    context.set_forkserver_preload(["train.documents"])
    return context


def _start_worker(description: dict[str, Any], every: int) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    global _worker
    _worker = partial(tokenize, from_json(description), every)  # type: ignore[arg-type]


def _end_with_parent() -> None:
    """Ends this worker when its parent is killed; otherwise it would wait for work for ever."""
    parent = parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _work(first: int, texts: list[str | None]) -> Tokenized:
    return _worker(first, texts)


_worker: Callable[[int, Sequence[str | None]], Tokenized]


# ---- shards ----------------------------------------------------------------------------------------------------------


@dataclass
class Part:
    """The file of a split that is being written."""

    folder: Path
    split: str
    number: int = 0
    tokens: int = 0  # in it so far
    finished: int = 0  # tokens in the files before it

    def path(self, suffix: str) -> Path:
        return self.folder / f"{self.split}-{self.number:05d}.{suffix}"

    def place(self) -> dict[str, int]:
        return {"number": self.number, "tokens": self.tokens, "finished": self.finished}


@dataclass
class Job:
    """A data set being written: what is done, and how to continue."""

    folder: Path
    settings: dict[str, Any]  # everything that the output bytes depend on
    tokenizer: BPETokenizer
    shard_tokens: int
    parts: dict[str, Part]
    state: dict[str, Any] | None = None  # where reading continues
    documents: int = 0
    text_bytes: int = 0
    empty: int = 0
    mended: int = 0
    files: dict[str, Any] = field(default_factory=dict)  # the finished ones, as meta.json lists them
    saved_at: float = field(default_factory=time.monotonic)

    @property
    def itemsize(self) -> int:
        return itemsize(self.tokenizer.vocab_size)

    def tokens(self, split: str) -> int:
        return self.parts[split].finished + self.parts[split].tokens

    def add(self, batch: Tokenized, state: dict[str, Any]) -> None:
        """Appends tokens, finishes a full file, and saves the progress if it is due."""
        is_full = False
        for split, content in batch.tokens.items():
            self.append(self.parts[split], content)
            is_full |= self.parts[split].tokens >= self.shard_tokens
        self.documents += batch.documents
        self.text_bytes += batch.text_bytes
        self.empty += batch.empty
        self.mended += batch.mended
        self.state = state
        if is_full or time.monotonic() - self.saved_at > SAVED_EVERY_S:
            self.save()
        for part in self.parts.values():
            if part.tokens >= self.shard_tokens:
                self.finish(part)

    def append(self, part: Part, content: bytes) -> None:
        with part.path("part").open("ab") as file:
            if file.tell() == 0:
                file.write(bytes(HEADER.size))  # the real header is written when the count is known
            file.write(content)
        part.tokens += len(content) // self.itemsize

    def move(self, giver: Part, taker: Part, kept: int) -> None:
        """Moves what a part has after its first `kept` tokens to the end of another, as a document of its own."""
        bos = np.array(self.tokenizer.encode_document(""), f"<u{self.itemsize}").tobytes()
        size = HEADER.size + kept * self.itemsize
        content = giver.path("part").read_bytes()[size:]
        self.append(taker, content if content.startswith(bos) else bos + content)
        giver.tokens = kept
        self.save()  # first, as what is saved may be less than a file has, but not more
        os.truncate(giver.path("part"), size)

    def discard(self) -> None:
        """Removes all that the job wrote."""
        for part in self.parts.values():
            for path in (part.path("part"), *self.folder.glob(f"{part.split}-[0-9]*.bin")):
                path.unlink(missing_ok=True)
        (self.folder / PROGRESS).unlink(missing_ok=True)

    def save(self) -> None:
        """Flushes the parts to the disk, then writes progress.json, which records them."""
        for part in self.parts.values():
            if part.path("part").exists():
                flush(part.path("part"))
        progress = {
            "settings": self.settings, "state": self.state, "documents": self.documents, "text_bytes": self.text_bytes,
            "empty": self.empty, "mended": self.mended, "files": self.files,
            "parts": {split: part.place() for split, part in self.parts.items()},
        }  # fmt: skip
        replace(self.folder / PROGRESS, json.dumps(progress).encode())
        self.saved_at = time.monotonic()

    def finish(self, part: Part) -> None:
        """Turns a part into a .bin file, and begins the next part."""
        path = part.path("bin")
        with part.path("part").open("r+b") as file:
            file.write(header(part.tokens, self.tokenizer.vocab_size, self.tokenizer.fingerprint))
        flush(part.path("part"))
        os.replace(part.path("part"), path)
        self.files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256_of(path), "tokens": part.tokens}
        part.number, part.tokens, part.finished = part.number + 1, 0, part.finished + part.tokens
        self.save()

    def rewind(self) -> None:
        """Truncates the files to what progress.json records, as a crash may have left more in them."""
        for part in self.parts.values():
            path, size = part.path("part"), HEADER.size + part.tokens * self.itemsize
            if part.path("bin").exists():
                os.replace(part.path("bin"), path)
            if not part.tokens:
                path.unlink(missing_ok=True)
            elif not path.exists() or path.stat().st_size < size:
                raise UserError(f"{path} has less than {PROGRESS} says; remove {self.folder} and begin again")
            else:
                os.truncate(path, size)
            if part.tokens >= self.shard_tokens:
                self.finish(part)


def make_shards(
    folder: Path, documents: Documents, tokenizer: BPETokenizer, shape: Shape, *, processes: int = 1
) -> dict[str, Any]:
    """Writes the tokens of all documents to `folder`, and returns the content of its meta.json; prints progress.

    Continues an interrupted call with the same arguments. A complete folder is checked by the sha256 of every file and
    left as it is. Raises UserError for a folder made with other arguments, a damaged file, a source that ends early
    (after saving the progress), and documents too few for two splits.
    """
    tokenizer.encode_document("")
    try:
        with locked(folder):
            return _make_shards(folder, documents, tokenizer, shape, processes)
    except UserError:
        with suppress(OSError):
            folder.rmdir()  # where it is empty
        raise


def _make_shards(
    folder: Path, documents: Documents, tokenizer: BPETokenizer, shape: Shape, processes: int
) -> dict[str, Any]:
    settings = {"documents": asdict(documents), "tokenizer": tokenizer.fingerprint, "batch": BATCH, **asdict(shape)}
    settings = json.loads(json.dumps(settings))  # as it will be read back
    meta = read_meta(folder) if folder.is_dir() else None
    if meta is not None:
        _check_same(folder, meta.get("settings"), settings)
        return _check_files(folder, meta)
    job = _begin(folder, settings, tokenizer, shape.shard_tokens)
    try:
        _run(job, documents, shape, processes)
    except UserError:
        (job.save if job.documents else job.discard)()
        raise
    balance(job, shape.val_fraction)
    if not all(job.tokens(split) for split in SPLITS):
        job.discard()
        raise UserError(f"{documents.name} has {_counted(job)}, too few for train and val; prepare more text")
    for part in job.parts.values():
        if part.tokens:
            job.finish(part)
    meta = {
        "vocab_size": tokenizer.vocab_size, "tokenizer": tokenizer.to_json(), "fingerprint": tokenizer.fingerprint,
        "source": documents.name, "settings": settings, "documents": job.documents, "text_bytes": job.text_bytes,
        "empty_documents": job.empty, "mended_documents": job.mended, "files": dict(sorted(job.files.items())),
    }  # fmt: skip
    replace(folder / MANIFEST, json.dumps(meta, indent=1).encode())
    (folder / PROGRESS).unlink()
    for split in SPLITS:
        print(f"{split} has {job.tokens(split):,} tokens")
    if job.empty:
        print(f"{job.empty:,} of {job.documents:,} rows have no text, and are left out")
    if job.mended:
        print(f"in {job.mended:,} documents halves of surrogate pairs became U+FFFD")
    print(f"{job.text_bytes / max(job.tokens('train') + job.tokens('val'), 1):.2f} bytes per token")
    return meta


def balance(job: Job, val_fraction: float) -> None:
    """Where val is one document alone, or one without text, cuts it, or the last of train, to what val needs."""
    train, val = (job.parts[split] for split in SPLITS)
    total = job.tokens("train") + job.tokens("val")
    wanted = int(max(val_fraction * total, min(MOST * total, ENOUGH)))
    if job.documents > round(1 / val_fraction) or val.number or wanted < 2:
        return
    if val.tokens > wanted:
        which = "the beginning of the first"
        job.move(val, train, wanted)
    elif not val.tokens and train.tokens > wanted:
        which = "the end of the last, as the first is empty"
        job.move(train, val, train.tokens - wanted + 1)  # and a BOS before them
    else:
        return
    print(f"{_counted(job)}: val is {which}, {wanted / total:.1%} of all tokens")


def _counted(job: Job) -> str:
    return f"{job.documents:,} document{'s' * (job.documents != 1)}"


def replace(path: Path, content: bytes) -> None:
    """Replaces a file atomically."""
    with file_aside(path, flushed=True) as building:
        building.write_bytes(content)


def _begin(folder: Path, settings: dict[str, Any], tokenizer: BPETokenizer, shard_tokens: int) -> Job:
    """Returns a new job, or the one that progress.json records."""
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / PROGRESS
    if not path.exists():
        if any(folder.glob("*.bin")):
            raise UserError(f"{folder} holds token files already; choose another name, or remove it")
        job = Job(folder, settings, tokenizer, shard_tokens, {split: Part(folder, split) for split in SPLITS})
        job.rewind()
        job.save()  # first, so that progress.json always covers every file that exists
        return job
    fix = f"remove {folder} and begin again"
    progress = untrusted.json_object(path, fix)
    with untrusted.expected(str(path), fix):
        _check_same(folder, _but_for_files_to_come(progress, settings), settings)
        counts = {name: untrusted.count(progress.get(name, 0)) for name in ("empty", "mended")}
        counts |= {name: untrusted.count(progress[name]) for name in ("documents", "text_bytes")}
        parts = {}
        for split in SPLITS:
            place = {name: untrusted.count(value) for name, value in progress["parts"][split].items()}
            parts[split] = Part(folder, split, **place)
        if progress["state"] is not None and settings["documents"]["files"]:
            for name in ("file", "row", "at"):
                untrusted.count(progress["state"][name])
        files = progress["files"]
        if not isinstance(files, dict):
            raise TypeError("its files are no object")
        job = Job(folder, settings, tokenizer, shard_tokens, parts, progress["state"], files=files, **counts)
        job.rewind()
    print(f"going on after {job.documents:,} documents and {job.tokens('train'):,} tokens")
    return job


def _but_for_files_to_come(progress: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """Returns the saved settings, updated with the unread files of `settings` and the size of the one being read.

    So a file that stopped the reading can be fixed or removed; the reader itself checks that the file being read still
    has the last document that it read there.
    """
    saved, wanted = progress["settings"], settings["documents"]
    old, state = saved["documents"], progress["state"]
    if not old["files"] or not wanted["files"]:
        return saved
    done = 0 if state is None else state["file"]
    current = (
        [] if state is None or done >= len(wanted["files"]) else [[old["files"][done][0], wanted["files"][done][1]]]
    )
    files = [*old["files"][:done], *current, *wanted["files"][done + len(current) :]]
    return saved | {"documents": old | {"files": files}}


def _run(job: Job, documents: Documents, shape: Shape, processes: int) -> None:
    """Tokenizes the remaining documents."""
    from tqdm import tqdm

    total = shape.max_tokens or documents.count()
    tasks = _numbered(documents.read(job.state), job.documents)
    every = round(1 / shape.val_fraction)
    done = job.tokens("train") if shape.max_tokens else job.documents
    unit = " tokens" if shape.max_tokens else " documents"
    with tqdm(total=total, initial=done, unit=unit, unit_scale=True, desc=job.folder.name, mininterval=1) as bar:
        if shape.max_tokens and done >= shape.max_tokens:
            return
        for tokenized, state in tokenize_all(tasks, job.tokenizer, every, processes):
            job.add(tokenized, state)
            reached = job.tokens("train") if shape.max_tokens else job.documents
            bar.update(reached - done)
            done = reached
            bar.set_postfix_str(f"{job.tokens('train') / 1e6:,.1f} M tokens", refresh=False)
            if shape.max_tokens and done >= shape.max_tokens:
                return


def _numbered(batches: Iterable[tuple[list[str | None], dict[str, Any]]], first: int) -> Iterator[Task]:
    for texts, state in batches:
        yield first, texts, state
        first += len(texts)


def _check_same(folder: Path, saved: dict[str, Any] | None, wanted: dict[str, Any]) -> None:
    differing = [name for name in wanted if (saved or {}).get(name) != wanted[name]]
    if differing:
        raise UserError(
            f"{folder} holds a data set of other {', '.join(differing)}; choose another name, or remove the folder"
        )


def _check_files(folder: Path, meta: dict[str, Any]) -> dict[str, Any]:
    """Compares every file with its sha256."""
    from tqdm import tqdm

    with untrusted.expected(f"{folder / MANIFEST}", f"remove {folder} and prepare it again"):
        for name, entry in tqdm(meta["files"].items(), desc=f"checking {folder.name}", unit=" files"):
            path = folder / name
            if not path.is_file() or sha256_of(path) != entry["sha256"]:
                raise UserError(
                    f"{path} is missing or damaged (its sha256 differs); remove {folder} and prepare it again"
                )
        print(f"{folder} is whole: {sum(entry['tokens'] for entry in meta['files'].values()):,} tokens")
    return meta
