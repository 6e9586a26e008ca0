"""Files that somebody made who wishes harm: refused in one line or read, in bounded memory, nothing written.

The long form is `make chaos`. What makes the files is tests/hostile.py.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

import kernels
from gptfast import checkpoint, hf, report, sample
from gptfast.chat import conversation
from gptfast.config import GPTConfig, config_of
from gptfast.data import Shards, load_tokens, whole_split
from gptfast.errors import UserError
from gptfast.model import GPT
from gptfast.packing import PackedBatches
from gptfast.parallel.team import ALONE
from gptfast.tokenizer import BPETokenizer, load_bpe, load_tokenizer
from tests.hostile import DEEP, Loader, attacks, signed
from train import trainer
from train.build import describe_data
from train.config import Pretrain
from train.documents import Documents, Shape, make_shards
from train.prepare import _read_text, prepare
from train.sft import inherit
from train.tasks import Where, find

OPS = kernels.load("reference")
BYTES = BPETokenizer.from_ranks({bytes([i]): i for i in range(256)} | {b"th": 256, b"the": 257}, {"<|bos|>": 258})
SMALL: dict[str, Any] = dict(block_size=16, n_layer=2, n_head=2, n_embd=16)
TEXT = "the quick brown fox jumps over the lazy dog\n" * 40
TALK = [{"role": "user", "content": "a"}, {"role": "assistant", "content": [{"type": "text", "text": "b"}]}]


# ---- what reads files


def model(**more: Any) -> GPT:
    torch.manual_seed(0)
    settings = dict(vocab_size=259, bias=False, norm="rmsnorm", norm_weight=True, position="rope", activation="swiglu")
    return GPT(GPTConfig(**SMALL, **settings | more), OPS)


def make_export(folder: Path) -> None:
    hf.save(model(), folder, BYTES)


def make_indexed(folder: Path) -> None:
    hf.save(model(), folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    index = {}
    for file, part in (("a.safetensors", names[::2]), ("b.safetensors", names[1::2])):
        save_file({name: weights[name] for name in part}, folder / file)
        index |= dict.fromkeys(part, file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))


def load_export(folder: Path) -> None:
    made = hf.load(folder, OPS)
    made.logits(torch.tensor([[1, 2]]))
    if (folder / "tokenizer.json").exists():
        hf.load_tokenizer(folder).encode("the end")


def make_data(folder: Path) -> None:
    (folder.parent / "text.txt").write_text(TEXT)
    prepare(folder.name, folder.parent, folder.parent / "text.txt")


def load_data(folder: Path) -> None:
    vocab_size, _ = describe_data(folder)
    load_tokenizer(folder).encode("the")
    load_tokens(folder / "train.bin", vocab_size, 16)


def a_run(out_dir: Path, data: Path, **more: Any) -> Pretrain:
    settings: dict[str, Any] = SMALL | dict(
        out_dir=str(out_dir), dataset=data.name, data_dir=str(data.parent), device="cpu", compile=False, batch_size=2,
        gradient_accumulation_steps=1, max_iters=1, lr_decay_iters=1, eval_iters=1, kernels="reference",
        whole_val=False, warmup_iters=0,
    )  # fmt: skip
    return Pretrain(**settings | more)


def make_run(folder: Path) -> None:
    data = folder.parent / "data"
    make_data(data)
    with trainer.started(a_run(folder, data), trainer.Recipe(), {}) as (run, log):
        trainer.train(run, log)
    (folder / "metrics.jsonl").unlink()


def load_run(folder: Path) -> None:
    """As the commands do that sample from it, go on with it, and build on it."""
    sample.load_model("resume", str(folder), OPS, torch.float32)
    trainer.start(a_run(folder, folder.parent / "data", resume="latest"), trainer.Recipe(), ALONE)
    hf.load(folder, OPS)
    inherit(Pretrain(init_from=str(folder)), {}, 0.5)


def make_sharded(folder: Path) -> None:
    """A checkpoint of two ranks."""
    small, halves = model(), {}
    for name, w in small.state_dict().items():
        halves[name] = w.chunk(2) if w.dim() == 2 else (w,)

    def write(building: Path) -> None:
        for rank in (0, 1):
            parts = {f"model/{name}/0": half[rank].clone() for name, half in halves.items() if rank < len(half)}
            offsets = {
                f"model/{name}/0": {"saved_offsets": [rank * len(half[0]), 0] if len(half) > 1 else [0]}
                for name, half in halves.items()
            }
            info = {"DCP_SHARDING_INFO": json.dumps(offsets)}
            save_file(parts, building / f"shard-{rank}.safetensors", metadata=info)
        (building / "parts.json").write_text(json.dumps({"ranks": 2, "aliases": {}}))

    meta = {"model": vars(small.config), "tokenizer": BYTES.to_json()}
    checkpoint.save(folder, step=1, model={}, optimizer={"state": {}}, meta=meta, write_parts=write)


def load_sharded(folder: Path) -> None:
    made, _ = sample.load_model("resume", str(folder), OPS, torch.float32)
    made.logits(torch.tensor([[1, 2]]))


def make_documents(folder: Path) -> None:
    """A job that was stopped by a line that is no JSON."""
    source = folder.parent / "source.jsonl"
    lines = [json.dumps({"text": f"document {i}"}) for i in range(600)]
    source.write_text("\n".join([*lines, "{"]))
    with pytest.raises(UserError, match="not JSON"):
        make_shards(folder, Documents.find(str(source)), BYTES, Shape(0.5, 10**6))
    source.write_text("\n".join(lines))


def load_documents(folder: Path) -> None:
    make_shards(folder, Documents.find(str(folder.parent / "source.jsonl")), BYTES, Shape(0.5, 10**6))


def make_talks(folder: Path) -> None:
    (folder / "talks.jsonl").write_text("".join(json.dumps({"messages": TALK}) + "\n" for _ in range(5)))


def load_talks(folder: Path) -> None:
    for _ in conversation.read(folder / "talks.jsonl"):
        pass
    examples = find(f"jsonl:{folder / 'talks.jsonl'}").examples("train", Where())
    for i in range(len(examples)):
        assert examples[i].messages


def make_task(folder: Path) -> None:
    (folder / "gsm8k").mkdir()
    row = {"question": "How many?", "answer": "2 + 3 = <<2+3=5>>5\n#### 5"}
    (folder / "gsm8k" / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for _ in range(5)))


def load_task(folder: Path) -> None:
    examples = find("gsm8k").examples("test", Where(str(folder)))
    for i in range(len(examples)):
        assert examples[i].messages


def make_text(folder: Path) -> None:
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": f"line {i}"}) + "\n" for i in range(9)))
    (folder / "prompt").write_text("once upon a time")


def load_text(folder: Path) -> None:
    sample.read_prompt(f"FILE:{folder / 'prompt'}")
    _read_text(folder / "prompt", "a text")
    for _ in Documents.find(str(folder / "a.jsonl")).read():
        pass


DOCUMENT_READERS = tuple(f"train/files.py:{name}" for name in ("_unpacked", "_of_json", "_parsed"))
CHECKPOINT_READERS = tuple(
    f"gptfast/checkpoint.py:{name}" for name in ("_opened", "_read_manifest", "_read_json", "_read_tensors")
)
LOADERS = [
    Loader(
        "tokenizer", BYTES.save, lambda folder: load_bpe(folder).encode("the end"),
        reads=("gptfast/tokenizer.py:load_bpe", "gptfast/tokenizer.py:_read_ranks"),
    ),
    Loader(
        "export", make_export, load_export,
        reads=("gptfast/hf/__init__.py:read_settings", "gptfast/hf/tokenizer_files.py:read"),
    ),
    Loader("indexed", make_indexed, load_export, reads=("gptfast/hf/__init__.py:_read_tensors",)),
    Loader(
        "data", make_data, load_data,
        reads=("gptfast/data.py:inspect", "gptfast/data.py:_read", "gptfast/tokenizer.py:read_meta"),
    ),
    Loader("checkpoint", make_run, load_run, reads=CHECKPOINT_READERS),
    Loader("signed checkpoint", make_run, load_run, signed),
    Loader("sharded checkpoint", make_sharded, load_sharded, signed, reads=("gptfast/parallel/parts.py:read_parts",)),
    Loader(
        "documents", make_documents, load_documents, writes=True,
        reads=(
            *DOCUMENT_READERS, "train/files.py:_count_lines", "train/documents.py:_begin",
            "train/documents.py:_make_shards", "train/documents.py:Job.finish", "train/download.py:sha256_of",
            "gptfast/aside.py:_locked", "gptfast/aside.py:flush",
        ),
    ),
    Loader(
        "conversations", make_talks, load_talks,
        reads=("gptfast/chat/conversation.py:read", "train/tasks/jsonl.py:examples"),
    ),
    Loader("task", make_task, load_task, reads=("train/tasks/task.py:rows", "train/tasks/task.py:_read")),
    Loader("text", make_text, load_text, reads=("gptfast/sample.py:read_prompt", "train/prepare.py:_read_text")),
]  # fmt: skip


@pytest.mark.parametrize("loader", LOADERS, ids=lambda loader: loader.name)
def test_a_hostile_file_is_refused_in_one_line(
    loader: Loader, tmp_path: Path, chaos: Callable[[int, int], int]
) -> None:
    count = chaos(12, 200)
    verdicts = attacks(loader, tmp_path, count)
    assert sum(verdicts.values()) == count and verdicts["refused"] >= count // 8
    if count > 100:
        print(f"{loader.name}: {verdicts}")


# ---- each kind by itself


def test_the_counts_of_a_stopped_job_are_whole_numbers(tmp_path: Path) -> None:
    folder = tmp_path / "made"
    folder.mkdir()
    make_documents(folder)
    written = json.loads((folder / "progress.json").read_text())
    for name, value in itertools.product(
        ("documents", "text_bytes", "empty", "mended"), (-1, 1.5, True, "7", None, {"n": 5})
    ):
        (folder / "progress.json").write_text(json.dumps(written | {name: value}))
        with pytest.raises(UserError, match="no count"):
            load_documents(folder)
    (folder / "progress.json").write_text(json.dumps(written))
    load_documents(folder)  # nothing was lost meanwhile


def test_sizes_are_held_to_the_weights_before_memory_is_taken(tmp_path: Path) -> None:
    made = hf.save(model(), tmp_path / "out", BYTES)
    settings = json.loads((made / "config.json").read_text())
    for name, value in {
        "num_hidden_layers": 10**9, "vocab_size": 2**31 - 1, "max_position_embeddings": 2**31 - 1,
        "intermediate_size": 2**31 - 2, "hidden_size": 2**30, "head_dim": 2**30,
    }.items():  # fmt: skip
        (made / "config.json").write_text(json.dumps(settings | {name: value}))
        with pytest.raises(UserError, match=r"do not fit|lack") as error:
            hf.load(made, OPS)
        assert "alloc" not in str(error.value), name


@pytest.mark.parametrize(
    ("field", "value"),
    [("n_layer", "4"), ("n_layer", 2.0), ("n_head", True), ("n_embd", None), ("bias", 1), ("norm", 3), ("dropout", "0"),
     ("rope_base", float("inf")), ("softcap", [1]), ("vocab_size", 10**12), ("norm", {}), ("norm_eps", float("nan"))],
)  # fmt: skip
def test_a_config_holds_only_what_its_fields_can_be(field: str, value: Any) -> None:
    with pytest.raises(UserError, match=f"^{field} is .*; (it must be|choose)"):
        config_of({field: value})


def test_a_config_of_other_fields_is_named() -> None:
    with pytest.raises(UserError, match="fields that this gptfast has not: span"):
        config_of({"n_layer": 2, "span": 4})
    with pytest.raises(UserError, match="not the description of a model"):
        config_of([1])


def test_weights_that_are_missing_unknown_or_no_numbers_are_named() -> None:
    config, weights = model().config, model().state_dict()
    first, *others = weights
    cases = {
        "there is no": {name: weights[name] for name in others},
        "it has no place for extra": weights | {"extra": weights[first]},
        "not .* of floats": weights | {first: weights[first].to(torch.int64)},
        "no numbers, the first in": weights | {first: torch.full_like(weights[first], float("nan"))},
    }
    for said, wrong in cases.items():
        with pytest.raises(UserError, match=said):
            GPT.of(config, wrong, OPS, where="out")


def test_a_nesting_without_end_is_one_line(tmp_path: Path) -> None:
    for loader, name in (("export", "config.json"), ("tokenizer", "encoding.json"), ("data", "meta.json")):
        (tmp_path / loader).mkdir()
        chosen = next(each for each in LOADERS if each.name == loader)
        chosen.make(tmp_path / loader)
        (tmp_path / loader / name).write_text("[" * DEEP)
        with pytest.raises(UserError, match=rf"{name} \(it is nested too deep\)"):
            chosen.load(tmp_path / loader)


@pytest.mark.parametrize("line", ["AA== 99999999999", "AA== -1", "AA==", "AA== x", ""])
def test_a_rank_beyond_its_file_takes_no_memory(line: str, tmp_path: Path) -> None:
    BYTES.save(tmp_path)
    (tmp_path / "ranks.tiktoken").write_text(line)
    with pytest.raises(UserError, match=r"ranks\.tiktoken"):
        load_bpe(tmp_path)


def test_a_vocabulary_is_that_of_its_tokenizer(tmp_path: Path) -> None:
    make_data(tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    for size in (meta["vocab_size"] + 1, 10**12):
        (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | {"vocab_size": size}))
        for read in (describe_data, load_tokenizer):
            with pytest.raises(UserError, match=f"states vocab_size {size}, and its tokenizer has"):
                read(tmp_path / "data")


def test_counts_of_a_stopped_job_are_numbers(tmp_path: Path) -> None:
    (tmp_path / "job").mkdir()
    make_documents(tmp_path / "job")
    progress = json.loads((tmp_path / "job" / "progress.json").read_text())
    trees = [(progress, ("documents", "text_bytes", "empty", "mended")), (progress["state"], ("file", "row", "at"))]
    trees += [(progress["parts"][split], ("number", "tokens", "finished")) for split in ("train", "val")]
    for tree, names in trees:
        for name in names:
            before = tree[name]
            for value in ({"a": 1}, [None], -1, 0.5, "x", 10**40):
                tree[name] = value
                (tmp_path / "job" / "progress.json").write_text(json.dumps(progress))
                with pytest.raises(UserError, match=r"progress\.json is not as gptfast|of other documents"):
                    load_documents(tmp_path / "job")
            tree[name] = before


def test_files_beside_their_folder_are_not_read(tmp_path: Path) -> None:
    make_indexed_in = tmp_path / "model"
    make_indexed_in.mkdir()
    make_indexed(make_indexed_in)
    index = make_indexed_in / "model.safetensors.index.json"
    for name in ("../a.safetensors", "/a.safetensors", "..", 5):
        index.write_text(json.dumps({"weight_map": {"w": name}}))
        with pytest.raises(UserError, match="which is no file of its folder"):
            hf.load(make_indexed_in, OPS)
    make_data(tmp_path / "data")
    meta = json.loads((tmp_path / "data" / "meta.json").read_text())
    (tmp_path / "data" / "meta.json").write_text(json.dumps(meta | {"files": {"../train.bin": {}}}))
    with pytest.raises(UserError, match="lists files that are none of its folder"):
        load_tokens(tmp_path / "data" / "train.bin")


@pytest.mark.parametrize("name", ["optimizer.json", "model.safetensors", "manifest.json", "meta.json"])
def test_a_pipe_in_a_checkpoint_is_not_waited_for(name: str, tmp_path: Path) -> None:
    folder = checkpoint.save(tmp_path, step=1, model={"w": torch.ones(2)}, optimizer={}, meta={})
    (folder / name).unlink()
    os.mkfifo(folder / name)
    with pytest.raises(UserError, match="no regular file"):
        checkpoint.load(tmp_path)


def test_a_prompt_a_text_and_a_log_are_files(tmp_path: Path) -> None:
    for read in (lambda path: sample.read_prompt(f"FILE:{path}"), lambda path: report.read([path])):
        with pytest.raises(UserError, match="no regular file"):
            read("/dev/zero")


# ---- ids


def test_ids_are_held_to_the_vocabulary_as_they_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the blocks that were looked at when the file was opened."""
    monkeypatch.setattr("gptfast.data.IN_MEMORY_BYTES", 0)
    monkeypatch.setattr("gptfast.data.CHECKED_BLOCK", 4)
    monkeypatch.setattr("gptfast.data.CHECKED_BLOCKS", 2)
    ids = torch.arange(400, dtype=torch.int32) % 50
    ids[::10] = 0
    for number, bad in (("00000", None), ("00001", 70)):
        part = ids.clone()
        if bad is not None:
            part[123] = bad
        part.to(torch.uint16).numpy().tofile(tmp_path / f"train-{number}.bin")
    tokens = load_tokens(tmp_path / "train.bin", 50, 8)
    assert isinstance(tokens, Shards)
    said = r"train-00001\.bin has token id 70, but vocab_size is 50"
    with pytest.raises(UserError, match=said):
        list(whole_split(tokens, 8))
    batches = PackedBatches(tokens, 8, 8, bos=0)
    with pytest.raises(UserError, match=said):
        for _ in range(20):
            next(batches)
    batches.close()
    drawn = trainer.Batches(tokens, 64, 8)
    with pytest.raises(UserError, match=said):
        for _ in range(50):
            next(drawn)
