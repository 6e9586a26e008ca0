"""The page at /, and the Content-Security-Policy under which it runs: its own script and style by hash, no other."""

from __future__ import annotations

import base64
import hashlib
import re
from pathlib import Path

PAGE = Path(__file__).with_name("page.html")
INLINE = re.compile(r"<(script|style)>(.*?)</\1>", re.DOTALL)


def read_page(path: Path = PAGE) -> tuple[bytes, str]:
    """The page, and its policy. <script> and <style> without attributes run; handlers and styles in attributes do not.

    It may fetch from this server alone, load pictures out of itself and of blobs, and be framed by nobody.
    """
    content = path.read_bytes()
    hashes: dict[str, list[str]] = {"script": [], "style": []}
    for kind, code in INLINE.findall(content.decode("utf-8")):
        digest = base64.b64encode(hashlib.sha256(code.encode("utf-8")).digest()).decode()
        hashes[kind].append(f"'sha256-{digest}'")
    allowed = {kind: " ".join(found) or "'none'" for kind, found in hashes.items()}
    policy = (
        f"default-src 'none'; script-src {allowed['script']}; style-src {allowed['style']}; connect-src 'self'; "
        "img-src 'self' data: blob:; base-uri 'none'; form-action 'none'; frame-ancestors 'none'; "
        "require-trusted-types-for 'script'; trusted-types 'none'"
    )
    return content, policy
