"""Text that a model may have written, made safe to print: what a terminal would act on becomes visible instead."""

from __future__ import annotations

import unicodedata

_PLAIN = {"\n", "\t"}
_JOINERS = {"\u200c", "\u200d"}  # part of how some scripts and emoji are written


def printable(text: str) -> str:
    r"""The text with control, bidirectional and other invisible characters spelled out: ``\x1b[2J``, ``\u202e``.

    Line breaks and tabs stay. A lone surrogate, which cannot be encoded, is spelled out too.
    """
    if text.isascii() and text.isprintable():
        return text
    return "".join(_spelled(character) for character in text)


def _spelled(character: str) -> str:
    if character in _PLAIN or character in _JOINERS:
        return character
    # Cc: controls; Cf: marks of direction, tags; Zl and Zp: separators; Cs: surrogates.
    if unicodedata.category(character) not in ("Cc", "Cf", "Zl", "Zp", "Cs"):
        return character
    return character.encode("ascii", "backslashreplace").decode() if character > "\xff" else f"\\x{ord(character):02x}"
