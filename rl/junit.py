"""Test reports in JUnit's format, as test runners of most languages write them."""

from __future__ import annotations

from xml.etree import ElementTree

PASSED = "passed"


def read_junit(xml: str | bytes) -> dict[str, str]:
    """The outcome of every test in a JUnit report, by ``classname::name``, or ``name`` without a class.

    A name that occurs several times has the worst of its outcomes. Raises ValueError for what is no such report, and
    for a document type definition, which a report has no use for.
    """
    raw = xml.encode() if isinstance(xml, str) else xml
    if b"<!DOCTYPE" in raw or b"<!ENTITY" in raw:
        raise ValueError("the test report declares a document type or entities, which no JUnit report does")
    try:
        root = ElementTree.fromstring(raw)
    except ElementTree.ParseError as error:
        raise ValueError(f"the test report is not XML ({error})") from error
    outcomes: dict[str, str] = {}
    for case in root.iter("testcase"):
        name = "::".join(filter(None, (case.get("classname"), case.get("name"))))
        kinds = {child.tag for child in case}
        outcome = next((word for tag, word in _OUTCOMES.items() if tag in kinds), PASSED)
        worse = _RANK.index(outcome) < _RANK.index(outcomes.get(name, PASSED))
        outcomes[name] = outcome if worse or name not in outcomes else outcomes[name]
    return outcomes


_OUTCOMES = {"error": "error", "failure": "failed", "skipped": "skipped"}
_RANK = ("error", "failed", "skipped", PASSED)
