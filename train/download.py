"""Downloads that appear only when complete, and resume where they stopped."""

from __future__ import annotations

import hashlib
import os
import re
import sys
import time
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path

from gptfast.aside import locked
from gptfast.errors import UserError


def download(
    url: str, path: Path, sha256: str | None, *, otherwise: str, attempts: int = 3, wait_s: float = 1.0
) -> None:
    """Downloads `url` to `path`, which appears only when complete and, where one is given, of this sha256.

    A partial download stays in <path>.part, and the next attempt or run resumes it. Raises UserError that ends with
    `otherwise`, the way out for the user, and Busy where another process writes the folder.
    """
    with locked(path.parent):
        _download(url, path, sha256, otherwise, attempts, wait_s)


def _download(url: str, path: Path, sha256: str | None, otherwise: str, attempts: int, wait_s: float) -> None:
    part = path.with_name(path.name + ".part")
    for attempt in range(attempts):
        try:
            _fetch(url, part, sha256 is not None)
            break
        except (urllib.error.URLError, HTTPException, TimeoutError, ConnectionError) as error:
            if attempt == attempts - 1:
                reason = getattr(error, "reason", error)
                raise UserError(f"cannot download {url} ({reason}); {otherwise}") from None
            time.sleep(wait_s * 2**attempt)
    part.with_name(f"{part.name}.tag").unlink(missing_ok=True)
    found = sha256_of(part)
    if sha256 is not None and found != sha256:
        part.unlink()
        raise UserError(f"{url} gave bytes of sha256 {found[:12]}, not {sha256[:12]}; run again, or {otherwise}")
    os.replace(part, path)


def sha256_of(path: Path) -> str:
    """Returns the sha256 of a file of any size, in hex."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fetch(url: str, part: Path, has_sha256: bool) -> None:
    """Appends the rest of `url` to `part`, or fetches all of it if `part` is not the beginning of the same file.

    The server's ETag, stored in <part>.tag, tells whether it is; without a tag, `part` is trusted only if a sha256 will
    be checked. Raises urllib's errors and ConnectionError, after which another attempt may succeed.
    """
    tag_file = part.with_name(f"{part.name}.tag")
    tag = tag_file.read_text("utf-8") if tag_file.exists() else ""
    have = part.stat().st_size if part.exists() and (tag or has_sha256) else 0
    headers = ({"Range": f"bytes={have}-"} | ({"If-Range": tag} if tag else {})) if have else {}
    try:
        response = urllib.request.urlopen(urllib.request.Request(url, headers=headers), timeout=30)
    except urllib.error.HTTPError as error:
        if error.code != 416 or not have:
            raise
        stated = re.fullmatch(r"bytes \*/(\d+)", error.headers.get("Content-Range", ""))
        if (int(stated[1]) == have) if stated else has_sha256:  # already complete
            return
        part.unlink()
        raise ConnectionError(f"the file has changed: it ends before the {have:,} bytes that came earlier") from None
    with response:
        if response.status == 206:
            stated = re.match(r"bytes (\d+)-", response.headers.get("Content-Range", ""))
            if not have or stated is None or int(stated[1]) != have:
                part.unlink(missing_ok=True)
                raise ConnectionError("the server went on at another byte than it was asked to")
        new = response.headers.get("ETag") or response.headers.get("Last-Modified") or ""
        is_strong = new and not new.startswith("W/")
        with part.open("ab" if response.status == 206 else "wb") as file:
            tag_file.write_text(new if is_strong else "", "utf-8")
            remaining = int(response.headers.get("Content-Length", 0))
            total = file.tell() + remaining
            done = file.tell()
            while chunk := response.read(2**16):
                file.write(chunk)
                done += len(chunk)
                _progress(done, total)
    if remaining and done < total:
        raise ConnectionError(f"connection closed after {done:,} of {total:,} bytes")


def _progress(done: int, total: int) -> None:
    end = "\n" if done >= total else "\r"
    share = f"{done / total:4.0%} of {total / 1e6:.1f} MB" if total else f"{done / 1e6:.1f} MB"
    if sys.stderr.isatty() or done >= total:
        print(f"downloading: {share}", end=end, file=sys.stderr, flush=True)
