"""Tasks of the `repository` environment from issues with their patches; ``python -m rl.import_tasks`` runs this.

A row has ``repository``, ``commit`` (before the fix), ``issue`` (the text), ``patch`` (the fix) and ``test_patch``;
``test_command``, ``timeout_s`` and ``protected`` are optional. The tests are run without and with the fix. A task is
accepted when the fix makes at least one failing test pass and breaks none (DeepSeek-V3.2, section 3.2.3: fail-to-pass
above 0 and pass-to-fail 0); its row then has the prompt and an answer with both lists.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from rl.junit import PASSED
from rl.records import Record, read_records
from rollout.environments.protocol import EnvironmentFailed
from rollout.environments.repository import Checkout, Task

INSTRUCTION = (
    "The repository you are in has the following issue. Solve it by changing the code; tests that you cannot see will "
    "judge the result.\n\n"
)


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdict:
    """What the fix does to the tests, and why the task is refused ("" when it is accepted)."""

    fail_to_pass: tuple[str, ...] = ()
    pass_to_pass: tuple[str, ...] = ()
    pass_to_fail: tuple[str, ...] = ()
    refusal: str = ""


def judge(before: Mapping[str, str] | None, after: Mapping[str, str] | None) -> Verdict:
    """The accept rule, on the outcomes of all tests without and with the fix."""
    if before is None or after is None:
        return Verdict(refusal=f"the tests cannot be run {'without' if before is None else 'with'} the fix")
    passing = {name for name, outcome in before.items() if outcome == PASSED}
    fixed = {name for name, outcome in after.items() if outcome == PASSED}
    broken = tuple(sorted(passing - fixed))
    verdict = Verdict(
        fail_to_pass=tuple(sorted(fixed - passing)), pass_to_pass=tuple(sorted(fixed & passing)), pass_to_fail=broken
    )
    if not verdict.fail_to_pass:
        return replace(verdict, refusal="the fix makes no failing test pass")
    if broken:
        return replace(verdict, refusal=f"the fix breaks {', '.join(broken[:3])}")
    return verdict


async def examine(task: Task, patch: str, sandbox: Any) -> Verdict:
    """Runs the task's tests without and with the fix, each in a checkout of its own."""
    outcomes = []
    for applied in ("", patch):
        checkout = Checkout(task, sandbox)
        try:
            await checkout.start()
            if not await checkout.apply(applied):
                return Verdict(refusal="the fix does not apply")
            outcomes.append((await checkout.judge()).outcomes)
        finally:
            await asyncio.to_thread(checkout.close)
    return judge(*outcomes)


async def import_row(record: Record, root: str | None, sandbox: Any) -> tuple[dict[str, Any] | None, str]:
    """The task's row, or None and why it is refused."""
    fields = record.fields
    for name in ("issue", "patch", "test_patch"):
        if not isinstance(fields.get(name), str) or not fields[name].strip():
            raise record.error(f"needs the text '{name}'")
    task = Task.of(record.place, fields, root)
    try:
        verdict = await examine(task, fields["patch"], sandbox)
    except EnvironmentFailed as error:
        return None, str(error)
    if verdict.refusal:
        return None, verdict.refusal
    given = {key: fields[key] for key in Task.__slots__ if fields.get(key) is not None}
    answer = {**given, "fail_to_pass": list(verdict.fail_to_pass), "pass_to_pass": list(verdict.pass_to_pass)}
    name = {"id": str(fields["id"])} if "id" in fields else {}
    return {**name, "prompt": INSTRUCTION + fields["issue"], "answer": answer}, ""


async def import_tasks(source: str, target: str, root: str | None, concurrency: int, sandbox: Any) -> int:
    """Writes the accepted tasks; returns how many there are."""
    places = asyncio.Semaphore(concurrency)

    async def one(record: Record) -> tuple[dict[str, Any] | None, str]:
        async with places:
            return await import_row(record, root, sandbox)

    records = read_records(source)
    outcomes = await asyncio.gather(*(one(record) for record in records))
    for record, (row, refusal) in zip(records, outcomes, strict=True):
        if row is None:
            print(f"{record.place}: refused, {refusal}")
    rows = [row for row, _ in outcomes if row is not None]
    Path(target).write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    print(f"{len(rows)} of {len(records)} tasks accepted, written to {target}")
    return len(rows)
