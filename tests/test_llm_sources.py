"""LLMs of the hub: found by name or repository, in one file or the parts that an index names."""

import io
import json

import numpy as np
import pytest
from fetching import Origin, files_in
from rich.console import Console
from safetensors.numpy import save

from allmrec_jax.data import catalogue, sources
from allmrec_jax.data.places import Hub
from allmrec_jax.errors import UserError
from allmrec_jax.models.llm import sizes

PARTS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
INDEX = "model.safetensors.index.json"


@pytest.fixture
def hub(monkeypatch):
    """A repository `me/large` in two parts."""
    origin = Origin()
    monkeypatch.setenv("HF_ENDPOINT", origin.url)
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    files = {"config.json": b"{}", "tokenizer.json": b"{}"}
    files |= {part: save({part: np.arange(k + 3)}) for k, part in enumerate(PARTS)}
    files[INDEX] = json.dumps({"weight_map": {"a": PARTS[0], "b": PARTS[1], "c": PARTS[0]}}).encode()
    origin.paths = {f"/me/large/resolve/main/{name}": [(200, {}, body)] for name, body in files.items()}
    yield origin
    origin.close()


def _fetch(cache):
    return sources.fetch("me/large", cache=cache, console=Console(file=io.StringIO()))


def test_all_parts_that_the_index_names_are_fetched_and_remembered(hub, tmp_path):
    folder = _fetch(tmp_path)
    assert {"config.json", "tokenizer.json", INDEX, *PARTS} <= {file.split("/")[-1] for file in files_in(tmp_path)}
    asked = len(hub.asked)
    assert _fetch(tmp_path) == folder
    assert len(hub.asked) == asked
    (folder / PARTS[1]).unlink()  # a part is as much a piece of it as the index
    _fetch(tmp_path)
    assert (folder / PARTS[1]).is_file()


@pytest.mark.parametrize(
    "index", [b"{", b"[]", b'{"weight_map": {}}', b'{"weight_map": {"a": "../evil"}}', b'{"weight_map": {"a": 3}}']
)
def test_a_damaged_index_is_an_error_and_names_no_other_places(index, hub, tmp_path):
    hub.paths[f"/me/large/resolve/main/{INDEX}"] = [(200, {}, index)]
    with pytest.raises(UserError, match=r"in parts.*damaged twice"):
        _fetch(tmp_path)
    assert not any("evil" in path for path in hub.asked)


def test_a_part_that_is_not_there_is_an_error(hub, tmp_path):
    del hub.paths[f"/me/large/resolve/main/{PARTS[1]}"]
    with pytest.raises(UserError, match="cannot get me/large"):
        _fetch(tmp_path)
    assert files_in(tmp_path) == []


def test_every_named_llm_has_known_sizes_and_is_found_by_its_repository():
    llms = {name: source for name, source in catalogue.KNOWN.items() if source.kind == "llm"}
    assert {"opt-125m", "opt-350m", "opt-6.7b", "opt-66b", "smollm2-135m-instruct", "qwen3-8b"} <= llms.keys()
    for name, source in llms.items():
        assert sizes.known_as(name) is not None, name
        repos = [place.repo for place in source.places if isinstance(place, Hub)]
        assert [catalogue.on_the_hub(repo) for repo in repos] == [source] * len(repos)
