"""The bench of ops: what it times is checked, a wrong kernel is refused, and rows state the sizes that ran."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys

import pytest
import torch

import kernels
from bench import ops, peers, warm
from bench.failures import FAILURES
from bench.ops import Case, cases, fitted, halved, run_case, variants
from bench.peaks import Ceilings, from_rows
from bench.results import read
from bench.timing import Settings, flatten, stopwatch
from gptfast.errors import UserError
from gptfast.log import Log, check_row, facts

CPU = torch.device("cpu")
QUICK = Settings(samples=3, most_samples=3, warmup_s=0.0, budget_s=0.0, most_cpu_bytes=1 << 16)
BOUNDLESS = Ceilings({}, None, None, "none", 0.0)


@pytest.fixture
def boundless(monkeypatch: pytest.MonkeyPatch) -> None:
    """A command that holds its figures against nothing, since measuring ceilings takes half a minute."""
    monkeypatch.setattr(ops, "ceilings", lambda *arguments: BOUNDLESS)
    monkeypatch.setattr(ops, "measured_ceilings", lambda *arguments: BOUNDLESS)


def smallest(dims: dict) -> dict:
    smaller = halved(dims)
    return dict(dims) if smaller is None else smallest(smaller)


DIMS = {op.name: smallest(op.bench[0]) for op in kernels.OPS.values()}


def rows_of(case: Case, functions: dict, roof: Ceilings = BOUNDLESS) -> dict[str, dict]:
    rows = run_case(case, functions, QUICK, roof, Log(None, console=False), facts(CPU), threads=1)
    return {row["impl"]: row for row in rows}


@pytest.mark.parametrize(
    "name, direction",
    [(name, d) for name, op in kernels.OPS.items() for d in ops.directions_of(op, ops.DIRECTIONS)],
)
def test_every_op_and_peer_is_timed_and_checked(name, direction):
    op = kernels.OPS[name]
    case = Case(op, DIMS[name], "float32", direction, CPU)
    rows = rows_of(case, variants(op, CPU, compiled=False))
    assert "reference" in rows
    for row in rows.values():
        assert row["valid"], row
        assert row["dims"] == DIMS[name] and row["threads"] == 1 and row["n"] == 3
        assert 0 <= row["error"] < 1e-4
        check_row(json.loads(json.dumps(row)))


@pytest.mark.parametrize("direction", ops.DIRECTIONS)
def test_a_wrong_implementation_is_refused(direction):
    op = kernels.OPS["layernorm"]
    case = Case(op, dict(M=16, N=32), "float32", direction, CPU)

    def off(x, weight, bias=None, eps=1e-5):
        return op.reference(x, weight * (1 + 1e-5), bias, eps)

    rows = rows_of(case, {"reference": op.reference, "triton": off, "peer": lambda *a: 2 * op.reference(*a)})
    assert rows["reference"]["valid"]
    assert not rows["triton"]["valid"] and "wrong" in rows["triton"]["invalid_reason"]
    assert not rows["peer"]["valid"]


def test_an_inexact_peer_keeps_its_time_and_is_said_to_be_inexact():
    op = kernels.OPS["layernorm"]
    case = Case(op, dict(M=16, N=32), "float32", "forward", CPU)

    def coarse(*arguments):
        return op.reference(*(a.bfloat16() for a in arguments)).float()

    row = rows_of(case, {"reference": op.reference, "coarse": coarse})["coarse"]
    assert row["valid"] and "ours may have" in row["inexact"] and row["error"] > 1e-4


def test_a_peer_that_cannot_do_a_case_is_left_out_and_noted(tmp_path):
    op = kernels.OPS["layernorm"]

    def refuses(*arguments):
        raise RuntimeError("only on Tuesdays")

    with Log(tmp_path, console=False) as log:
        case = Case(op, dict(M=4, N=8), "float32", "both", CPU)
        run_case(case, {"reference": op.reference, "refuses": refuses}, QUICK, BOUNDLESS, log, facts(CPU), 1)
    note, row = [json.loads(line) for line in log.path.read_text().splitlines()]
    assert "only on Tuesdays" in note["text"] and row["impl"] == "reference"
    with pytest.raises(RuntimeError, match="Tuesdays"):  # ours may not be left out
        rows_of(case, {"reference": op.reference, "triton": refuses})


def test_faster_than_light_is_an_invalid_row():
    op = kernels.OPS["layernorm"]
    case = Case(op, dict(M=64, N=64), "float32", "forward", CPU)
    row = rows_of(case, {"reference": op.reference}, Ceilings({}, 1.0, 1.0, "a snail", 0.0))["reference"]
    assert not row["valid"] and "speed of light" in row["invalid_reason"]


def test_without_compile_a_peer_that_compiles_is_left_out(tmp_path):
    op = kernels.OPS["layernorm"]
    functions = {"reference": op.reference, "compiling": torch.compile(peers.layernorm)}
    assert rows_of(Case(op, dict(M=4, N=8), "float32", "forward", CPU), functions).keys() == {"reference"}


def test_inputs_and_cotangents_are_not_the_same_numbers():
    case = Case(kernels.OPS["layernorm"], dict(M=64, N=64), "float32", "both", CPU)
    x = case.draw(7)[0] - 0.5  # the op draws its input off-centre
    (dy,) = case.cotangents((x,), 7)
    assert abs(torch.corrcoef(torch.stack([x.flatten(), dy.flatten()]))[0, 1]) < 0.1


def test_rewritten_inputs_reach_the_timed_call():
    case = Case(kernels.OPS["layernorm"], dict(M=8, N=16), "float32", "both", CPU)
    wanted = case.differentiable(case.op.reference)
    work = case.work(case.op.reference, case.draw(0), wanted)
    before = flatten(work.run())
    work.refresh(5)
    after = flatten(work.run())
    for old, new, right in zip(before, after, case.truth(wanted).usual(5), strict=True):
        assert not torch.equal(old, new)
        torch.testing.assert_close(new, right)


def test_cpu_sizes_are_halved_until_they_fit():
    for op in kernels.OPS.values():
        for dims in op.bench:
            small = fitted(op, dims, 4)
            forward, _ = op.cost(**small, itemsize=4)
            assert small.keys() == dict(dims).keys()
            assert halved(small) is None or (forward.flops <= ops.CPU_FLOPS and forward.bytes <= ops.CPU_BYTES)


def test_a_campaign_sees_every_op_before_more_sizes_of_one():
    names = list(kernels.OPS)
    found = cases(names, ["float32"], ["both"], CPU, quick=False)
    assert [case.op.name for case in found[: len(names)]] == names
    assert len({str(case) for case in found}) == len(found)
    assert len(cases(names, ["float32"], ["both"], CPU, quick=True)) == len(names)


def test_on_a_gpu_the_sizes_are_those_that_the_op_declares():
    found = cases(list(kernels.OPS), ["bfloat16"], ["forward"], torch.device("cuda"), quick=False)
    mine = [case.dims for case in found if case.op.name == "layernorm"]
    declared = kernels.OPS["layernorm"].bench
    assert mine[0] == declared[0] and len(mine) == len(declared) and all(dict(dims) in declared for dims in mine)


def test_sizes_come_by_what_they_add_to_those_before():
    sizes = [dict(T=1024, D=64), dict(T=2048, D=64), dict(T=16384, D=64), dict(T=4096, D=64), dict(T=1024, D=128)]
    assert [(s["T"], s["D"]) for s in ops.by_worth(sizes)] == [
        (1024, 64), (16384, 64), (4096, 64), (2048, 64), (1024, 128)
    ]  # fmt: skip
    assert ops.apart(dict(T=8, cache="int8"), dict(T=8)) == 2.0


def test_an_op_that_moves_work_forward_is_compared_in_both_alone():
    op = kernels.OPS["linear_cross_entropy"]
    assert ops.directions_of(op, ops.DIRECTIONS) == ["both"] and ops.directions_of(op, ["backward"]) == []
    assert ops.directions_of(kernels.OPS["layernorm"], ops.DIRECTIONS) == list(ops.DIRECTIONS)


def test_backward_of_further_sizes_comes_last():
    found = cases(["layernorm"], ["bfloat16"], ops.DIRECTIONS, torch.device("cuda"), quick=False)
    assert [case.direction for case in found[:5]] == ["forward", "backward", "both", "forward", "both"]
    assert {case.direction for case in found[-4:]} == {"backward"}


def test_a_row_says_what_a_copy_of_this_run_would_have_reached():
    case = Case(kernels.OPS["layernorm"], dict(M=64, N=64), "float32", "forward", CPU)
    sheet, seen = Ceilings({}, 8e12, 8e12, "datasheet", 0.0), Ceilings({}, 4e12, 4e12, "measured here", 0.25)
    arguments = (case, {"reference": case.op.reference}, QUICK, sheet, Log(None, console=False), facts(CPU), 1, seen)
    (row,) = run_case(*arguments)
    assert row["of_measured"] == pytest.approx(2 * row["roofline"]) and row["measured_source"] == "measured here"


def test_peers_are_there_only_where_they_can_run():
    cuda = torch.device("cuda")
    assert "flex" in peers.of("attention", cuda) and "flex" not in peers.of("attention", cuda, compiled=False)
    assert "sdpa cudnn" not in peers.of("attention", CPU) and "sdpa cudnn" in peers.of("attention", cuda)
    absent = peers.Peer(print, "no_such_module", "no-such-package")
    assert not absent.can_run(cuda, True) and set(peers.PEERS) <= set(kernels.OPS)


@pytest.mark.parametrize(
    "features",
    [dict(), dict(window=20), dict(cu_seqlens=torch.tensor([0, 0, 100, 120, 256]), window=50)],
    ids=["causal", "window", "documents"],
)
def test_flex_attention_sees_what_attention_sees(features, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)
    peers._compiled_flex.cache_clear()
    q, k, v = torch.randn(3, 1, 256, 2, 16).unbind()
    expected = kernels.OPS["attention"].reference(q, k, v, **features)
    torch.testing.assert_close(peers.flex(q, k, v, **features), expected, rtol=1e-4, atol=1e-4)
    monkeypatch.setattr(torch.Tensor, "tolist", lambda x: pytest.fail("a call that is timed waits for the GPU"))
    peers.flex(q, k, v, **features)
    peers._compiled_flex.cache_clear()


def test_torchs_chunked_loss_chunks(monkeypatch):
    """Only with options: without them it makes all the logits at once."""
    asked = {}
    monkeypatch.setattr(torch.nn.functional, "linear_cross_entropy", lambda *a, **k: asked.update(k), raising=False)
    monkeypatch.setattr(torch.nn, "LinearCrossEntropyOptions", lambda: "options", raising=False)
    peers.linear_cross_entropy_chunked(torch.empty(1, 1), torch.empty(1, 1), torch.empty(1))
    assert asked == {"options": "options"}


def test_truth_too_large_for_memory_is_told_at_smaller_sizes():
    layernorm = kernels.OPS["layernorm"]

    def narrow(x, weight, bias=None, eps=1e-5):
        if x.dtype == torch.float64 and x.shape[0] > 256:
            raise torch.OutOfMemoryError("as on a full GPU")
        return layernorm.reference(x, weight, bias, eps)

    op = dataclasses.replace(layernorm, reference=narrow)
    case = Case(op, dict(M=1024, N=16), "float32", "forward", CPU)
    row = rows_of(case, {"reference": op.reference})["reference"]
    assert row["valid"] and row["error"] < 1e-6
    assert row["dims"]["M"] == 1024 and row["error_dims"]["M"] == 256


def test_ceilings_come_from_the_best_valid_rows():
    def peak(name: str, valid: bool = True, **fields):
        return {"what": "peak", "name": name, "valid": valid, "date": "2026-01-01T00:00:00+00:00", **fields}

    rows = [
        peak("copy", best_gbs=50.0, dims={"bytes": 1 << 20}),
        peak("copy", best_gbs=10.0, dims={"bytes": 1 << 30}),
        peak("gemm", best_tflops=1.0, dtype="float32", dims={}),
        peak("gemm", best_tflops=2.0, dtype="float32", dims={}),
        peak("gemm", best_tflops=9.0, dtype="float32", dims={}, valid=False),
    ]
    found = from_rows(rows)
    assert (found.flops, found.bytes_per_s, found.limit_bytes_per_s) == ({"float32": 2e12}, 10e9, 50e9)
    assert found.judge(1.0, 0, 20e6, "float32")[1] is None  # twice memory, but a cache can do that
    assert "speed of light" in found.judge(1.0, 0, 200e6, "float32")[1]
    assert from_rows([]) is None


def test_a_figure_beyond_a_measured_ceiling_has_it_measured_again():
    """What a slow minute measured does not condemn an honest figure, nor does it let a cheat through."""
    asked = []

    def again(dtype: str) -> Ceilings:
        asked.append(dtype)
        return Ceilings({"float32": 3e12}, 8e9, 50e9, "a minute later", 0.25)

    roof = Ceilings({"float32": 1e12}, 10e9, 20e9, "a slow minute", 0.25, again)
    assert roof.judge(1.0, 1.2e9, 0, "float32") == (pytest.approx(1.2), None) and not asked
    assert roof.judge(1.0, 3e9, 0, "float32") == (pytest.approx(1.0), None) and asked == ["float32"]
    assert (roof.flops, roof.bytes_per_s, roof.limit_bytes_per_s) == ({"float32": 3e12}, 10e9, 50e9)
    assert roof.source == "a minute later"
    assert "speed of light" in roof.judge(1.0, 9e9, 0, "float32")[1] and len(asked) == 2


def test_an_op_without_a_gradient_is_timed_forward_whatever_is_asked_of_the_others():
    def directions(asked: str) -> set:
        cases = ops.cases(["layernorm", "newton_schulz"], ["float32"], [asked], CPU, quick=True)
        return {(case.op.name, case.direction) for case in cases}

    assert directions("both") == {("layernorm", "both"), ("newton_schulz", "forward")}
    assert directions("backward") == {("layernorm", "backward")}


def test_what_is_warmed_is_every_case_once():
    todo = warm.commands(3, None, True, True, 50.0)
    shares = [ops._share(flag.partition("=")[2]) for command in todo for flag in command if flag.startswith("--warm=")]
    assert shares == [(0, 3), (1, 3), (2, 3)] and "--quick" in todo[0]
    with pytest.raises(UserError, match="expected I/N"):
        ops._share("3/3")


def test_warming_stops_with_its_budget_and_is_no_failure(capsys):
    quick, slow = [sys.executable, "-c", ""], [sys.executable, "-c", "import time; time.sleep(60)"]
    assert warm.run([quick, slow], 1.0) == 0
    assert "1 of 2 processes" in capsys.readouterr().out


def test_a_share_runs_its_cases_and_writes_nothing(tmp_path, capsys):
    flags = ["--only=layernorm,rmsnorm", "--quick", "--device=cpu", "--dtype=float32", f"--out={tmp_path}"]
    assert ops.main([*flags, "--warm=0/2"]) == 0
    assert not list(tmp_path.iterdir()) and capsys.readouterr().out == ""


# ---- kernels that fail, and those that nobody has run yet ------------------------------------------------------------
def out_of_resources(*arguments, **kwargs):
    """What Triton raises where a tile needs more shared memory than there is."""
    from triton.runtime.errors import OutOfResources

    raise OutOfResources(300_000, 232_448, "shared memory")


def fails(*arguments, **kwargs):
    raise RuntimeError("Triton Error [CUDA]: invalid argument")


def off(x, weight, bias=None, eps=1e-5):
    return kernels.OPS["layernorm"].reference(x, weight * 1.01, bias, eps)


def only_wide(x, weight, bias=None, eps=1e-5):
    if x.shape[1] < 1024:
        raise ValueError("x: the kernel is for wide rows")
    return kernels.OPS["layernorm"].reference(x, weight, bias, eps)


def refuses(*arguments, **kwargs):
    raise ValueError("q: the kernel is for sm_90")


@pytest.mark.triton
def test_what_triton_raises_is_among_the_failures_of_every_page():
    from triton.compiler.errors import CompilationError
    from triton.runtime.errors import OutOfResources, PTXASError

    from bench import decode, model, optim, tune

    for error in (CompilationError, OutOfResources, PTXASError, torch.OutOfMemoryError):
        assert issubclass(error, FAILURES) and not issubclass(KeyboardInterrupt, FAILURES)
    assert all(page.FAILURES is FAILURES for page in (decode, model, ops, optim, tune))


def test_without_triton_it_raises_nothing():
    absent = "import sys; sys.modules['triton'] = None; from kernels import _triton; assert _triton.ERRORS == ()"
    assert subprocess.run([sys.executable, "-c", absent], cwd=ops.results.ROOT.parent).returncode == 0


@pytest.mark.parametrize(
    "kernel, reason",
    [
        pytest.param(out_of_resources, "OutOfResources: out of resource: shared memory", marks=pytest.mark.triton),
        (fails, "RuntimeError: Triton Error [CUDA]: invalid argument"), (refuses, "ValueError: q: the kernel"),
        (off, "output 0 is wrong"),
    ],
)  # fmt: skip
def test_a_kernel_that_fails_or_is_wrong_is_not_timed_and_the_others_are(monkeypatch, tmp_path, kernel, reason):
    broken = dataclasses.replace(kernels.OPS["layernorm"], triton=kernel)
    fine = dataclasses.replace(kernels.OPS["rmsnorm"], triton=kernels.OPS["rmsnorm"].reference)
    monkeypatch.setattr(kernels, "OPS", {"layernorm": broken, "rmsnorm": fine})
    with Log(tmp_path, console=False) as log:
        assert ops.proven(["layernorm", "rmsnorm"], [], ["float32"], CPU, log) == ({"rmsnorm": []}, False)
    (note,) = read(tmp_path / "log.jsonl")
    assert note["name"].endswith(": triton") and note["text"].startswith(f"wrong and not timed: {reason}")


@pytest.mark.triton
def test_a_case_that_fails_is_noted_and_the_next_one_runs(monkeypatch, tmp_path, boundless):
    ran = []

    def run_case(case, *rest):
        ran.append(case.op.name)
        return out_of_resources() if case.op.name == "layernorm" else []

    monkeypatch.setattr(ops, "run_case", run_case)
    flags = ["--only=layernorm,rmsnorm", "--quick", "--direction=forward", "--dtype=float32", "--device=cpu"]
    assert ops.main([*flags, f"--out={tmp_path}"]) == 1
    (note,) = read(tmp_path / "ops.jsonl")
    assert ran == ["layernorm", "rmsnorm"] and note["text"].startswith("failed: OutOfResources")


def test_a_variant_is_timed_only_where_it_is_asked_for():
    attention, gpu = kernels.OPS["attention"], torch.device("cuda")
    assert "gluon" in attention.variants and "gluon" not in variants(attention, gpu, compiled=False)
    asked = variants(attention, gpu, compiled=False, asked=["gluon"])
    assert list(asked)[:3] == ["triton", "gluon", "reference"]


def test_a_variant_that_refuses_a_case_is_left_out_and_the_others_are_timed(tmp_path):
    attention, functions = kernels.OPS["attention"], {"gluon": refuses, "reference": kernels.OPS["attention"].reference}
    case = Case(attention, dict(attention.parity[0]), "float32", "forward", CPU)
    with Log(tmp_path, console=False) as log:
        assert list(ops.build(case, functions, 1, log)[0]) == ["reference"]
        with pytest.raises(ValueError, match="for sm_90"):
            ops.build(case, {"triton": refuses}, 1, log)


def test_a_variant_is_checked_first_where_it_can_run(monkeypatch, tmp_path):
    right = dataclasses.replace(
        kernels.OPS["layernorm"],
        triton=kernels.OPS["layernorm"].reference,
        variants={"wide": only_wide, "off": off, "refuses": refuses, "fails": fails},
    )
    monkeypatch.setattr(kernels, "OPS", {"layernorm": right})
    with Log(tmp_path, console=False) as log:
        proven = lambda *asked: ops.proven(["layernorm"], asked, ["float32"], CPU, log)
        assert proven("wide") == ({"layernorm": ["wide"]}, True)
        assert proven("wide", "off") == ({"layernorm": ["wide"]}, False)
        assert proven("fails", "wide") == ({"layernorm": ["wide"]}, False)
        assert proven("refuses") == ({"layernorm": []}, True)  # what is for another GPU is no fault of this one
    note = read(tmp_path / "log.jsonl")[-1]
    assert (note["name"], note["text"]) == ("layernorm: refuses", "cannot run here: q: the kernel is for sm_90")


def test_the_sizes_at_which_a_variant_is_checked_are_those_it_is_for():
    cases = ops.smoke_cases(kernels.OPS["attention"], "gluon", ["bfloat16"], CPU)
    assert {64, 128} <= {case.dims["D"] for case in cases} and max(case.dims["T"] for case in cases) >= 1024
    assert all(case.cost.flops < 4 * ops.CPU_FLOPS for case in cases)
    (one,) = ops.smoke_cases(kernels.OPS["attention"], "triton", ["bfloat16"], CPU)
    assert one.dims == kernels.OPS["attention"].parity[-1]


@pytest.mark.parametrize(
    "flags, message",
    [
        (["--variants=glun"], "--variants=glun is unknown; did you mean gluon"),
        (["--variants=gluon", "--device=cpu"], "kernels run on a CUDA device"),
    ],
)
def test_variants_that_cannot_be(tmp_path, flags, message):
    with pytest.raises(UserError, match=message):
        ops.main([*flags, f"--out={tmp_path}"])


gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="times CUDA kernels")


@gpu
@pytest.mark.parametrize("direction", ops.DIRECTIONS)
@pytest.mark.parametrize("name", kernels.OPS)
def test_every_op_is_timed_and_checked_on_gpu(name, direction):
    device = torch.device("cuda")
    case = Case(kernels.OPS[name], DIMS[name], "bfloat16", direction, device)
    functions = variants(case.op, device, compiled=False)
    rows = run_case(case, functions, QUICK, BOUNDLESS, Log(None, console=False), facts(device))
    assert all(row["valid"] for row in rows), [row["invalid_reason"] for row in rows]
    with stopwatch(device) as watch:
        assert watch.sets_needed(1 << 20) > 1


def test_cases_beyond_the_budget_are_named_and_do_not_fail_the_page(tmp_path, capsys, boundless):
    assert (
        ops.main(
            [
                "--only=layernorm,rmsnorm",
                "--quick",
                "--device=cpu",
                "--dtype=float32",
                "--budget_s=0",
                f"--out={tmp_path}",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert "6 cases not begun within 0 s: layernorm forward float32" in said and "rmsnorm both float32" in said
    notes = [json.loads(row)["text"] for row in (tmp_path / "ops.jsonl").read_text().splitlines()]
    assert len(notes) == 1 and "6 cases not begun" in notes[0]


@pytest.mark.parametrize("fastest, names", [(torch.float32, ["float32"]), (torch.bfloat16, ["float32", "bfloat16"])])
def test_a_cpu_is_timed_in_the_dtypes_that_its_units_have(monkeypatch, fastest, names):
    monkeypatch.setattr(ops, "compute_dtype", lambda device: (fastest, "for this test"))
    assert ops.native_dtypes(CPU) == names
