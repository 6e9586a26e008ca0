"""Downloads that go on: only from the same version of the file, and only where they were asked to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from local_server import Site, serve

from gptfast.errors import UserError
from train.download import download

OLD, NEW = bytes(range(256)) * 40, bytes(reversed(range(256))) * 30


@pytest.fixture
def site() -> Iterator[Site]:
    with serve(OLD) as site:
        yield site


def fetch(site: Site, path: Path, attempts: int = 2) -> None:
    download(site.url, path, None, otherwise="the same command goes on", attempts=attempts, wait_s=0.0)


def half(site: Site, path: Path) -> None:
    site.cut_after = [5000]
    with pytest.raises(UserError, match="connection closed after 5,000"):
        fetch(site, path, attempts=1)
    assert not path.exists()


def test_a_file_that_changed_meanwhile_comes_anew(site: Site, tmp_path: Path) -> None:
    half(site, tmp_path / "x")
    site.content = NEW
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == NEW
    assert [path.name for path in tmp_path.iterdir()] == ["x"]


@pytest.mark.parametrize("shift", [-5000, -1, 1])
def test_a_server_that_goes_on_elsewhere_is_not_believed(site: Site, tmp_path: Path, shift: int) -> None:
    half(site, tmp_path / "x")
    site.shift = shift
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == OLD


def test_a_file_that_became_shorter_than_what_came_is_not_what_came(site: Site, tmp_path: Path) -> None:
    half(site, tmp_path / "x")
    site.content, site.lies = NEW[:3000], True
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == NEW[:3000]


def test_what_came_without_a_tag_and_a_sum_is_not_gone_on_with(site: Site, tmp_path: Path) -> None:
    (tmp_path / "x.part").write_bytes(b"of another time")
    fetch(site, tmp_path / "x")
    assert (tmp_path / "x").read_bytes() == OLD and site.asked == [None]
