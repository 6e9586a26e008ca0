"""A checkpoint comes back bit for bit, or is refused by name; whatever fails in a save, the older one still loads."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
import stat
import subprocess
import sys
import threading
import tracemalloc
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import Tensor, nn

from gptfast import checkpoint
from gptfast.checkpoint import Saver, load, save
from gptfast.errors import UserError

ROOT = Path(__file__).parent.parent
DTYPES = [
    torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.int64, torch.int32, torch.int16, torch.int8,
    torch.uint8, torch.uint16, torch.uint32, torch.uint64, torch.bool, torch.float8_e4m3fn, torch.float8_e5m2,
]  # fmt: skip


def save_step(out_dir: Path, step: int, keep: int = 2) -> Path:
    """A small checkpoint whose every part tells its step."""
    return save(
        out_dir,
        step=step,
        model={"w": torch.full((3, 5), float(step)), "b": torch.arange(7) + step},
        optimizer={"state": {0: {"step": torch.tensor(float(step))}}},
        meta={"step": step},
        keep=keep,
    )


def assert_step(out_dir: Path, step: int) -> None:
    found = load(out_dir)
    assert found.step == step and found.meta == {"step": step}
    assert torch.equal(found.model["w"], torch.full((3, 5), float(step)))
    assert found.optimizer["state"][0]["step"] == step


def equal(a: Any, b: Any) -> bool:
    """Whether two trees are the same in structure, types and bits."""
    if type(a) is not type(b):
        return False
    if isinstance(a, Tensor):
        return a.dtype == b.dtype and a.shape == b.shape and a.numpy().tobytes() == b.numpy().tobytes()
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return repr(a) == repr(b) if isinstance(a, float) else a == b


# ---- what goes in comes out


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_every_dtype_comes_back_bit_for_bit(tmp_path: Path, dtype: torch.dtype) -> None:
    patterns = torch.randint(0, 2 if dtype == torch.bool else 256, (6, 40), dtype=torch.uint8).view(dtype)
    save(tmp_path, step=1, model={"m": patterns}, optimizer={"o": patterns}, meta={"t": patterns})
    found = load(tmp_path)
    for tensor in (found.model["m"], found.optimizer["o"], found.meta["t"]):
        assert tensor.dtype == dtype and tensor.shape == patterns.shape
        assert torch.equal(tensor.view(torch.uint8), patterns.view(torch.uint8))


def test_odd_shapes_and_layouts_come_back(tmp_path: Path) -> None:
    base = torch.randn(4, 6)
    model = {
        "scalar": torch.tensor(2.5), "empty": torch.empty(0, 3), "transposed": base.t(), "strided": base[:, ::2],
        "expanded": torch.ones(1, 3).expand(5, 3), "row": base[1], "next row": base[2], "flat": base.view(-1),
        "parameter": nn.Parameter(base + 1),
    }  # fmt: skip
    save(tmp_path, step=1, model=model, optimizer={}, meta={})
    found = load(tmp_path).model
    assert set(found) == set(model)
    for name, tensor in model.items():
        assert torch.equal(found[name], tensor) and not found[name].requires_grad


def test_tied_weights_are_stored_once_and_come_back_tied(tmp_path: Path) -> None:
    wte = torch.randn(1000, 64)
    path = save(tmp_path, step=1, model={"wte": wte, "lm_head": wte}, optimizer={}, meta={})
    found = load(tmp_path).model
    assert found["lm_head"] is found["wte"] and torch.equal(found["wte"], wte)
    assert (path / "model.safetensors").stat().st_size < 1.1 * wte.nbytes


def test_a_loaded_tensor_may_be_written_and_the_file_does_not_change(tmp_path: Path) -> None:
    save_step(tmp_path, 1)
    load(tmp_path).model["w"].zero_()
    assert_step(tmp_path, 1)


def test_adamw_continues_as_if_never_stopped(tmp_path: Path) -> None:
    def run(steps: range, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        for step in steps:
            torch.manual_seed(step)
            model(torch.randn(8, 4)).square().mean().backward()
            optimizer.step()
            optimizer.zero_grad()

    def fresh() -> tuple[nn.Module, torch.optim.Optimizer]:
        model = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 2)).bfloat16().float()
        matrices = [p for p in model.parameters() if p.dim() == 2]
        vectors = [p for p in model.parameters() if p.dim() == 1]
        groups = [{"params": matrices, "weight_decay": 0.1}, {"params": vectors, "weight_decay": 0.0}]
        return model, torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.95), fused=True)

    model, optimizer = fresh()
    run(range(5), model, optimizer)
    save(tmp_path, step=5, model=model.state_dict(), optimizer=optimizer.state_dict(), meta={})
    saved = optimizer.state_dict()
    found = load(tmp_path)
    assert equal(found.optimizer, saved)
    assert isinstance(found.optimizer["param_groups"][0]["betas"], tuple)
    resumed, resumed_optimizer = fresh()
    resumed.load_state_dict(found.model)
    resumed_optimizer.load_state_dict(found.optimizer)
    run(range(5, 10), model, optimizer)
    run(range(5, 10), resumed, resumed_optimizer)
    assert equal(dict(resumed.state_dict()), dict(model.state_dict()))
    assert equal(resumed_optimizer.state_dict(), optimizer.state_dict())


def test_rng_states_resume_the_streams(tmp_path: Path) -> None:
    save(tmp_path, step=1, model={}, optimizer={}, meta={"rng": {"cpu": torch.get_rng_state()}})
    expected = torch.rand(5)
    torch.set_rng_state(load(tmp_path).meta["rng"]["cpu"])
    assert torch.equal(torch.rand(5), expected)


plain = st.one_of(
    st.none(), st.booleans(), st.integers(), st.floats(), st.text(),
    st.sampled_from([torch.tensor(1.5), torch.tensor([], dtype=torch.bool), torch.arange(3)]),
)  # fmt: skip
keys = st.one_of(
    st.text(max_size=3), st.integers(), st.sampled_from(["$tensor", "$dict", "$tuple", "1", "0.0"]), st.none(),
    st.floats(allow_nan=False), st.tuples(st.integers(), st.text(max_size=2)),
)  # fmt: skip
trees = st.recursive(
    plain,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.lists(inner, max_size=3).map(tuple), st.dictionaries(keys, inner, max_size=3)
    ),
    max_leaves=8,
)


@given(trees)
@example({"$tensor": "w"})
@example({"$tuple": [1], "$dict": [], "$float": {"$float": "nan"}})
@example({"1": torch.tensor(1), 1: torch.tensor(2)})
def test_any_tree_survives_json(tree: Any) -> None:
    structure, tensors = checkpoint._flatten(tree, "optimizer")
    text = json.dumps(structure, allow_nan=False)
    assert equal(checkpoint._unflatten(json.loads(text), tensors), tree)


@pytest.mark.parametrize("value", [object(), {1, 2}, b"bytes", Path("x"), torch.float32, torch.nn.Linear(1, 1)])
def test_what_cannot_be_saved_is_named_and_nothing_is_touched(tmp_path: Path, value: object) -> None:
    save_step(tmp_path, 1)
    with pytest.raises(TypeError, match=r"meta\.config\.1"):
        save(tmp_path, step=2, model={}, optimizer={}, meta={"config": [0, value]})
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-000001"]


def test_files_are_json_and_safetensors_readable_like_their_folder(tmp_path: Path) -> None:
    path = save_step(tmp_path, 12)
    names = ["manifest.json", "meta.json", "model.safetensors", "optimizer.json", "optimizer.safetensors"]
    assert path == tmp_path / "ckpt-000012" and sorted(p.name for p in path.iterdir()) == names
    assert json.loads((path / "meta.json").read_text()) == {"step": 12}
    assert {stat.S_IMODE(p.stat().st_mode) for p in path.iterdir()} == {stat.S_IMODE(path.stat().st_mode) & 0o666}


# ---- which one


def test_the_last_k_are_kept(tmp_path: Path) -> None:
    for step in range(5):
        save_step(tmp_path, step, keep=3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-000002", "ckpt-000003", "ckpt-000004"]
    assert load(tmp_path).step == 4 and load(tmp_path, step=2).step == 2
    with pytest.raises(UserError, match="keep 1 or more"):
        save_step(tmp_path, 5, keep=0)


def test_the_first_of_a_run_replaces_those_of_an_earlier_one(tmp_path: Path) -> None:
    """Or the best of both would be taken for this run's."""
    for step, score, first in ((5, 1.0, True), (9, 1.5, False), (2, 3.0, True), (4, 2.0, False)):
        save(tmp_path, step=step, model={"w": torch.ones(1)}, optimizer={}, meta={}, score=score, first=first)
    assert load(tmp_path, best=True).step == 4 and sorted(path.name for path in tmp_path.glob("ckpt-*")) == [
        "ckpt-000002", "ckpt-000004",
    ]  # fmt: skip


def test_the_best_stays_whatever_its_age(tmp_path: Path) -> None:
    losses = {1: 3.0, 2: 2.0, 3: math.nan, 4: 2.5, 5: 2.0, 6: None, 7: 2.2, 8: 2.1}
    for step, loss in losses.items():
        save(tmp_path, step=step, model={}, optimizer={}, meta={}, score=loss)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-000005", "ckpt-000007", "ckpt-000008"]
    assert load(tmp_path, best=True).step == 5 and load(tmp_path).step == 8
    (tmp_path / "ckpt-000005" / "model.safetensors").write_bytes(b"")
    assert load(tmp_path, best=True).step == 8  # the next best, and it says what it skipped


# ---- saving in the background


def test_a_background_save_is_of_the_moment_it_was_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    started, go = threading.Event(), threading.Event()
    written, save_now = [], checkpoint.save

    def slow(*args: Any, **parts: Any) -> Path:
        started.set()
        assert go.wait(10)
        written.append(parts["step"])
        return save_now(*args, **parts)

    monkeypatch.setattr(checkpoint, "save", slow)
    w = torch.ones(1000)
    with Saver(background=True) as saver:
        saver.save(tmp_path, step=1, model={"w": w, "tied": w}, optimizer={"m": [w, (w,)]}, meta={"step": 1})
        assert started.wait(10) and not checkpoint.exists(tmp_path)
        w.zero_()
        go.set()
        saver.save(tmp_path, step=2, model={"w": w}, optimizer={}, meta={"step": 2})  # waits for the first
        assert written[0] == 1
    first, second = load(tmp_path, step=1), load(tmp_path)
    assert first.model["w"].eq(1).all() and first.model["tied"] is first.model["w"]
    assert first.optimizer["m"][1][0].eq(1).all() and second.model["w"].eq(0).all()


def test_a_background_save_holds_one_copy_and_no_more(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    alive: list[weakref.ref[Tensor]] = []
    save_now = checkpoint.save

    def counted(out_dir: Path, **parts: Any) -> Path:
        alive.append(weakref.ref(parts["model"]["w"]))
        assert sum(copy() is not None for copy in alive) == 1
        return save_now(out_dir, **parts)

    monkeypatch.setattr(checkpoint, "save", counted)
    with Saver(background=True) as saver:
        for step in range(5):
            saver.save(tmp_path, step=step, model={"w": torch.ones(10)}, optimizer={}, meta={})
    assert len(alive) == 5 and load(tmp_path).step == 4


def test_a_background_save_that_fails_is_told_at_the_next_and_at_the_end(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    parts = dict(step=1, model={}, optimizer={}, meta={})
    with pytest.raises(UserError, match="cannot save"), Saver(background=True) as saver:
        saver.save(tmp_path / "file", **parts)
    with Saver(background=True) as saver:
        saver.save(tmp_path / "file", **parts)
        with pytest.raises(UserError, match="cannot save"):
            saver.save(tmp_path / "out", **parts)
        saver.save(tmp_path / "out", **parts)
    assert load(tmp_path / "out").step == 1


def test_the_last_saved_counts_not_the_highest_step(tmp_path: Path) -> None:
    """A run begun anew in the folder of a longer one must keep and find its own checkpoints."""
    for step in (1000, 2000, 10):
        save_step(tmp_path, step)
    assert_step(tmp_path, 10)
    save_step(tmp_path, 20)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt-000010", "ckpt-000020"]


def test_a_step_may_be_saved_again(tmp_path: Path) -> None:
    save_step(tmp_path, 7)
    save(tmp_path, step=7, model={"w": torch.ones(1)}, optimizer={}, meta={"again": True})
    assert load(tmp_path).meta == {"again": True}
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-000007"]


@pytest.mark.parametrize("name", ["", "nowhere", "a_file"])
def test_no_checkpoint_is_one_line_with_the_fix(tmp_path: Path, name: str) -> None:
    (tmp_path / "a_file").touch()
    with pytest.raises(UserError, match=r"no checkpoint in .*--out_dir"):
        load(tmp_path / name)


def test_an_absent_step_names_those_there_are(tmp_path: Path) -> None:
    save_step(tmp_path, 3), save_step(tmp_path, 6)
    with pytest.raises(UserError, match="no checkpoint of step 5; it has 3, 6"):
        load(tmp_path, step=5)


# ---- damage


def files_of(folder: Path) -> list[Path]:
    return sorted(path for path in folder.iterdir() if path.stat().st_size)


def test_every_flipped_bit_is_found(tmp_path: Path) -> None:
    """1,000 single flipped bits over all files, the manifest and the headers included: none is loaded."""
    folder = save_step(tmp_path, 1)
    draw = random.Random(0)
    for _ in range(1000):
        path = draw.choice(files_of(folder))
        whole = path.read_bytes()
        damaged = bytearray(whole)
        bit = draw.randrange(8 * len(whole))
        damaged[bit // 8] ^= 1 << bit % 8
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="no whole checkpoint") as error:
            load(tmp_path)
        assert str(folder) in str(error.value) and "\n" not in str(error.value)
        path.write_bytes(whole)
    assert_step(tmp_path, 1)


@pytest.mark.parametrize("name", ["manifest.json", "meta.json", "model.safetensors", "optimizer.json"])
def test_truncated_extended_and_missing_files_are_named(tmp_path: Path, name: str) -> None:
    path = save_step(tmp_path, 1) / name
    whole = path.read_bytes()
    for content in (whole[:-1], whole[: len(whole) // 2], b"", whole + b"\0"):
        path.write_bytes(content)
        said = "is altered" if name == "manifest.json" else f"has {len(content)} bytes, not {len(whole)}"
        with pytest.raises(UserError, match=f"{name} {said}"):
            load(tmp_path)
    path.unlink()
    with pytest.raises(UserError, match=f"{name} is missing"):
        load(tmp_path, step=1)


def test_a_manifest_that_lists_too_little_or_too_much_is_refused(tmp_path: Path) -> None:
    """Each file that it lists is as it should be, and yet others would be read, or none."""
    folder = save_step(tmp_path, 1)
    (folder / "more.safetensors").write_bytes((folder / "model.safetensors").read_bytes())
    with pytest.raises(UserError, match=r"more\.safetensors is not of it"):
        load(tmp_path)
    (folder / "more.safetensors").unlink()
    (folder / "notes.txt").write_text("mine")  # nothing reads it
    load(tmp_path)
    manifest = json.loads((folder / "manifest.json").read_text())
    listed = {key: value for key, value in manifest.items() if key != "sha256"}
    for files in ({}, {"../x.json": {"bytes": 0, "sha256": ""}, **listed["files"]}):
        (folder / "manifest.json").write_bytes(checkpoint._canonical({**listed, "files": files}))
        with pytest.raises(UserError, match=r"does not list meta\.json|lists '\.\./x\.json'"):
            load(tmp_path)


@pytest.mark.parametrize("name", ["manifest.json", "model.safetensors"])
def test_a_damaged_newest_is_skipped_aloud(tmp_path: Path, capsys: pytest.CaptureFixture[str], name: str) -> None:
    save_step(tmp_path, 1)
    newest = save_step(tmp_path, 2)
    (newest / name).write_bytes((newest / name).read_bytes()[:-1])
    assert_step(tmp_path, 1)
    said = capsys.readouterr().err
    assert str(newest) in said and name in said and "using" in said
    assert len(load(tmp_path).skipped) == 1
    with pytest.raises(UserError, match=name):
        load(tmp_path, step=2)


def test_another_format_is_refused_and_never_pruned(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"]
    (folder / "manifest.json").write_bytes(checkpoint._canonical({**manifest, "format": 99}))
    with pytest.raises(UserError, match="written in format 99; this gptfast reads formats 1 to 2"):
        load(tmp_path)
    for step in (2, 3, 4):
        save_step(tmp_path, step)
    assert folder.exists() and load(tmp_path).step == 4


def test_the_first_format_without_scores_is_still_read(tmp_path: Path) -> None:
    folder = save_step(tmp_path, 1)
    manifest = json.loads((folder / "manifest.json").read_text())
    del manifest["sha256"], manifest["score"]
    (folder / "manifest.json").write_bytes(checkpoint._canonical({**manifest, "format": 1}))
    assert_step(tmp_path, 1)
    save_step(tmp_path, 2)
    with pytest.raises(UserError, match="tells its validation loss"):
        load(tmp_path, best=True)


# ---- faults while saving


class Killed(BaseException):
    """Ends a save as SIGKILL does: no `except OSError` sees it, nothing is tidied up."""


def disk_calls(monkeypatch: pytest.MonkeyPatch, fail_at: int, error: BaseException) -> Callable[[], int]:
    """Makes the `fail_at`-th call that changes or flushes the disk raise; returns a counter of the calls made."""
    count = 0

    def guard(module: Any, name: str) -> None:
        original = getattr(module, name)

        def guarded(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            if count == fail_at:
                raise error
            return original(*args, **kwargs)

        monkeypatch.setattr(module, name, guarded)

    for module, name in (
        (os, "fsync"), (os, "rename"), (os, "mkdir"), (Path, "write_text"), (Path, "write_bytes"), (Path, "chmod"),
        (checkpoint.safetensors.torch, "save_file"), (shutil, "rmtree"),
    ):  # fmt: skip
        guard(module, name)
    return lambda: count


@pytest.mark.parametrize("error", [OSError(28, "No space left on device"), OSError(5, "I/O error"), Killed()], ids=repr)
@pytest.mark.parametrize("next_step", [2, 1], ids=["new step", "same step"])
def test_each_disk_call_may_fail_once_and_a_whole_checkpoint_is_left(
    tmp_path: Path, error: BaseException, next_step: int
) -> None:
    fail_at = 0
    while True:
        fail_at += 1
        out_dir = tmp_path / str(fail_at)
        save_step(out_dir, 0, keep=1)
        save_step(out_dir, 1, keep=1)
        with pytest.MonkeyPatch.context() as patch:
            calls = disk_calls(patch, fail_at, error)
            try:
                save_step(out_dir, next_step, keep=1)
            except UserError as raised:
                assert str(out_dir) in str(raised) and (out_dir / "ckpt-000001").exists()
            except Killed:
                pass
            if calls() < fail_at:
                break
        found = load(out_dir)
        assert found.step in (1, next_step) and found.meta == {"step": found.step} and not found.skipped
        save_step(out_dir, found.step, keep=1)
        save_step(out_dir, 3, keep=1)
        assert [path.name for path in out_dir.iterdir()] == ["ckpt-000003"], f"leftovers after failing call {fail_at}"
    assert fail_at > 15


def test_everything_is_on_the_disk_before_the_rename_and_the_rename_after(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    events: list[str] = []
    fsync, rename = os.fsync, os.rename

    def recorded_fsync(descriptor: int) -> None:
        fsync(descriptor)
        inode = os.fstat(descriptor).st_ino
        events.extend(path.name for path in (tmp_path, *tmp_path.rglob("*")) if path.stat().st_ino == inode)

    def recorded_rename(source: Path, target: Path) -> None:
        rename(source, target)
        events.append("renamed")

    monkeypatch.setattr(os, "fsync", recorded_fsync)
    monkeypatch.setattr(os, "rename", recorded_rename)
    names = sorted(path.name for path in save_step(tmp_path, 1).iterdir() if path.name != "manifest.json")
    assert events == [*names, "manifest.json", f".tmp-{os.getpid()}-ckpt-000001", "renamed", tmp_path.name]


def test_a_failed_save_leaves_no_debris_and_names_path_bytes_and_fix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_step(tmp_path, 1)

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(UserError) as error:
        save(tmp_path, step=2, model={"w": torch.zeros(10**6)}, optimizer={}, meta={})
    message = str(error.value)
    assert str(tmp_path / "ckpt-000002") in message and "4.0 MB needed" in message and "MB free" in message
    assert "No space left on device; free some space" in message and "\n" not in message
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-000001"]


def test_an_unwritable_out_dir_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "a_file").touch()
    for out_dir in (tmp_path / "a_file", tmp_path / "a_file" / "below"):
        with pytest.raises(UserError, match="make the folder writable, or choose another --out_dir"):
            save_step(out_dir, 1)


FULL_DISK = """
import resource, signal, sys, torch
from gptfast import checkpoint
from gptfast.errors import UserError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)  # so that a write past the limit fails with EFBIG, as on a full disk
model = {"w": torch.zeros(100_000)}
checkpoint.save(sys.argv[1], step=0, model=model, optimizer=dict(model), meta={})
failed = 0
for limit in [1, 7, 8, 100, 333, *range(1_000, 400_000, 20_000), 399_999]:
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        checkpoint.save(sys.argv[1], step=1, model=model, optimizer=dict(model), meta={})
    except UserError as error:
        failed += "cannot save" in str(error)
    assert checkpoint.load(sys.argv[1]).step == 0
print(failed)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs RLIMIT_FSIZE")
def test_writes_that_stop_at_any_byte_leave_the_old_checkpoint(tmp_path: Path) -> None:
    command = [sys.executable, "-c", FULL_DISK, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.stdout.split() == ["26"], done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["ckpt-000000"]


KILLED = """
import os, random, signal, sys, time, torch
from gptfast import checkpoint
torch.set_num_threads(1)

def save(step):
    value = torch.full((300, 300), float(step))
    checkpoint.save(sys.argv[1], step=step, model={"w": value}, optimizer={"w": value}, meta={"step": step})

save(0)
draw, last = random.Random(0), 0
for _ in range(40):
    child = os.fork()
    if child == 0:
        for step in range(last + 1, last + 1000):
            save(step)
        os._exit(1)
    time.sleep(draw.uniform(0.001, 0.03))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    found = checkpoint.load(sys.argv[1])
    assert not found.skipped and found.step >= last and found.meta["step"] == found.step
    assert found.model["w"].eq(found.step).all() and found.optimizer["w"].eq(found.step).all()
    last = found.step
print(last)
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_forty_kills_at_random_instants_lose_nothing(tmp_path: Path) -> None:
    command = [sys.executable, "-c", KILLED, str(tmp_path)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and int(done.stdout) >= 0, done.stderr


def test_an_old_checkpoint_that_cannot_be_removed_does_not_stop_the_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    save_step(tmp_path, 1, keep=1)

    def stuck(folder: Path) -> None:
        raise OSError(16, "Device or resource busy")

    monkeypatch.setattr(checkpoint, "_remove", stuck)
    save_step(tmp_path, 2, keep=1)
    assert "cannot remove the old checkpoint" in capsys.readouterr().err
    assert_step(tmp_path, 2)


def test_a_tree_takes_its_memory_once_as_it_is_read(tmp_path: Path) -> None:
    tree = json.loads("[" + '{"":[]},' * 20_000 + "0]")
    size = sys.getsizeof(tree) + 20_000 * (sys.getsizeof(tree[0]) + sys.getsizeof([]))
    tracemalloc.start()
    try:
        read = checkpoint._unflatten(tree, {})
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert len(read) == 20_001 and read[0] == {"": []}
    assert peak < size / 20


def test_losses_that_are_not_finite_come_back(tmp_path: Path) -> None:
    save(tmp_path, step=1, model={}, optimizer={}, meta={"best": math.inf, "worst": -math.inf, "last": math.nan})
    meta = load(tmp_path).meta
    assert meta["best"] == math.inf and meta["worst"] == -math.inf and math.isnan(meta["last"])
