"""What a model wrote cannot act on a terminal."""

from __future__ import annotations

import unicodedata

import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.printable import printable

ACTING = ("Cc", "Cf", "Zl", "Zp", "Cs")


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("plain", "plain"),
        ("two\n\tlines", "two\n\tlines"),
        ("größer 数 👩‍🚀", "größer 数 👩‍🚀"),
        ("\x1b[2J\x1b]0;owned\x07", "\\x1b[2J\\x1b]0;owned\\x07"),
        ("\x9b31m", "\\x9b31m"),
        ("back\rover\x08", "back\\x0dover\\x08"),
        ("\u202egnp.exe\u2066\u2028", "\\u202egnp.exe\\u2066\\u2028"),
        ("\ufeff\u200b\U000e0041", "\\ufeff\\u200b\\U000e0041"),
        ("\ud800", "\\ud800"),
    ],
)
def test_what_acts_is_spelled_out(text, shown):
    assert printable(text) == shown


@given(st.text(st.characters()))
def test_nothing_that_acts_is_left_and_nothing_else_changes(text):
    shown = printable(text)
    shown.encode()
    assert not [c for c in shown if unicodedata.category(c) in ACTING and c not in "\n\t\u200c\u200d"]
    harmless = "".join(c for c in text if unicodedata.category(c) not in ACTING)
    assert printable(harmless) == harmless
