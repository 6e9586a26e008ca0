"""A web server on this machine that misbehaves as told, for tests of downloads."""

from __future__ import annotations

import hashlib
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


@dataclass
class Site:
    """What the server serves and how it misbehaves, and the byte ranges it was asked for."""

    content: bytes
    files: dict[str, bytes] = field(default_factory=dict)  # by the end of the path; all others are `content`
    cut_after: list[int] = field(default_factory=list)  # of each coming request: close after so many bytes
    ranges: bool = True
    shift: int = 0  # how far from the byte asked for it goes on, while it says so
    lies: bool = False  # it goes on from another version of the file, whatever If-Range asks
    asked: list[str | None] = field(default_factory=list)
    url: str = ""


@contextmanager
def serve(content: bytes) -> Iterator[Site]:
    """The site while the server runs."""
    site = Site(content)

    class Handler(BaseHTTPRequestHandler):
        def content(self) -> bytes:
            return site.files.get(self.path.split("/")[-1], site.content)

        def do_HEAD(self) -> None:
            """As the hub answers for a large file: its sha256 is its tag."""
            self.send_response(200)
            self.send_header("Content-Length", str(len(self.content())))
            self.send_header("X-Repo-Commit", "0" * 40)
            self.send_header("ETag", f'"{hashlib.sha256(self.content()).hexdigest()}"')
            self.end_headers()

        def do_GET(self) -> None:
            content = self.content()
            asked = self.headers.get("Range")
            site.asked.append(asked)
            tag = f'"{hashlib.sha256(content).hexdigest()}"'
            is_same = site.lies or self.headers.get("If-Range", tag) == tag
            start = int(asked.removeprefix("bytes=").removesuffix("-")) if asked and site.ranges and is_same else 0
            if start >= len(content):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(content)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            is_part, start = start > 0, max(start + site.shift, 0) if start else 0
            self.send_response(206 if is_part else 200)
            self.send_header("Content-Length", str(len(content) - start))
            self.send_header("ETag", tag)
            if is_part:
                self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
            self.end_headers()
            stop = start + site.cut_after.pop(0) if site.cut_after else None
            self.wfile.write(content[start:stop])

        def log_message(self, format: str, *args: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    site.url = f"http://127.0.0.1:{server.server_port}/input.txt"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield site
    server.shutdown()
    thread.join()
    server.server_close()
