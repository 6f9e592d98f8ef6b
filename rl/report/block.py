"""Pieces of the page's data: plain JSON where it is small, compressed where it is read only when somebody looks."""

from __future__ import annotations

import base64
import json
import zlib
from typing import Any


def to_script_json(value: Any) -> str:
    """JSON that can stand inside a ``<script>`` element whatever text it carries."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    escapes = {"<": "\\u003c", ">": "\\u003e", "&": "\\u0026", "\u2028": "\\u2028", "\u2029": "\\u2029"}
    text = text.translate(str.maketrans(escapes))
    return text.encode("utf-8", errors="replace").decode()  # lone surrogates, which JSON lines may hold, become "?"


def compressed(value: Any) -> bytes:
    """JSON, gzipped: the same bytes for the same value."""
    text = json.dumps(value, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    packer = zlib.compressobj(6, zlib.DEFLATED, 31)  # 31 says gzip
    return packer.compress(text.encode("utf-8", errors="replace")) + packer.flush()


def to_block(value: Any) -> str:
    """The same in base64, for a ``<script>`` element that the page unpacks when it is asked for."""
    return base64.b64encode(compressed(value)).decode()
