"""The scaling study on paper: limits that can be reckoned by hand, published runs, and the files it writes."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from gptfast.errors import UserError
from train import scaling
from train.scaling import METHODS, PUBLISHED, WORKLOADS, Cluster

CLUSTER = Cluster()


def test_a_ring_moves_all_but_its_own_part() -> None:
    perfect = Cluster(nvlink_gbs=400, network_gbs=25, reached=1.0, hop_us=0.0)
    assert perfect.collective_s(8e9, 8) == pytest.approx(7e9 / 400e9)
    assert perfect.collective_s(16e9, 16) == pytest.approx(15e9 / 200e9)  # 8 ports of 25 GB/s at a node's border
    assert perfect.collective_s(1e9, 1) == 0
    assert replace(perfect, hop_us=10).collective_s(0, 64) == pytest.approx(7 * 10e-6)


def test_the_model_has_gpt2s_parameters_and_products() -> None:
    assert WORKLOADS[0].parameters == pytest.approx(124e6, rel=0.01)
    assert WORKLOADS[1].parameters == pytest.approx(1558e6, rel=0.01)
    assert scaling.newton_schulz_flops(3072, 768) == scaling.newton_schulz_flops(768, 3072) == 5 * 18 * 768**3


def test_shares_are_even_until_matrices_run_out() -> None:
    flops = [scaling.newton_schulz_flops(*shape) for shape in WORKLOADS[0].matrices]
    assert scaling.largest_share(flops, 1) == sum(flops)
    assert scaling.largest_share(flops, 8) == pytest.approx(sum(flops) / 8, rel=0.05)
    assert scaling.largest_share(flops, 1024) == max(flops)


@pytest.mark.parametrize("work", WORKLOADS, ids=lambda work: work.name)
@pytest.mark.parametrize("method", METHODS)
def test_more_gpus_slower_links_and_less_work_never_help(method: str, work: scaling.Workload) -> None:
    def at(gpus: int, cluster: Cluster = CLUSTER, tokens: int = work.tokens) -> float:
        return scaling.efficiency(method, replace(work, tokens=tokens), cluster, gpus)

    assert 0 < at(1024) < at(512) < 1  # from 8 on it may rise first: each owns less of the optimizer
    assert at(64, replace(CLUSTER, network_gbs=5)) < at(64)
    assert at(64, tokens=work.tokens // 8) < at(64)


def test_sharing_muon_out_helps_where_it_is_dear() -> None:
    for work in WORKLOADS:
        shared, whole = (scaling.muon_s(work, CLUSTER, n, gathers=n > 1) for n in (8, 1))
        assert shared < 0.5 * whole


@pytest.mark.parametrize("run", PUBLISHED, ids=lambda run: run.name)
def test_published_runs_are_met(run: scaling.Published) -> None:
    assert scaling.predict(run, CLUSTER) == pytest.approx(run.measured, rel=0.05)
    slow = replace(CLUSTER, network_gbs=2.5)
    assert scaling.predict(run, slow) < 0.8 * run.measured  # the check can fail


def test_the_page_writes_table_and_figure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert scaling.main([f"--out={tmp_path}"]) == 0
    said = capsys.readouterr().out
    assert "gpt2-xl" in said and "Checked against published runs:" in said
    assert (tmp_path / "scaling.md").read_text().startswith("Predicted by") and (
        tmp_path / "scaling.png"
    ).stat().st_size
    with pytest.raises(UserError, match="--nvlink_gbs=0: must be above 0"):
        scaling.main(["--nvlink_gbs=0"])
