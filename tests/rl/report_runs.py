"""Runs with invented numbers, written as the driver would leave them."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path

import numpy as np

from rl.run_directory import RunDirectory
from rl.sample import Kept, Prompt, Sample, Scored, Status, ToolCall, ToolResult, Turn
from rl.trajectory import SequenceView, Trajectory, token_texts

BOS, EOS, USER, ASSISTANT = "<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<｜User｜>", "<｜Assistant｜>"
SPECIAL_TOKENS = (BOS, EOS, USER, ASSISTANT, "<think>", "</think>", "｜DSML｜")


def encode(text: str) -> list[int]:
    """Bytes, with one id for each special token: the shape of the byte tokenizer."""
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text)
    ids = [[256 + SPECIAL_TOKENS.index(piece)] if piece in SPECIAL_TOKENS else list(piece.encode()) for piece in pieces]
    return [token for piece in ids for token in piece]


def decode(ids: list[int]) -> str:
    pieces = (bytes([token]) if token < 256 else SPECIAL_TOKENS[token - 256].encode() for token in ids)
    return b"".join(pieces).decode(errors="replace")


def sequence_of(rng, pieces, prompt: Prompt, version: int, **changes) -> Sample:
    """A sample of [(text, whether the policy said it)], with random numbers for every sampled token."""
    encoded = [(encode(text), said) for text, said in pieces]
    ids = np.array([token for part, _ in encoded for token in part], np.int32)
    sampled = np.array([said for part, said in encoded for _ in part])
    sizes = np.where(sampled, rng.integers(1, 12, len(ids)), 0)
    rows = [np.unique([token, *range(size)]) if size else np.array([], int) for token, size in zip(ids, sizes)]  # noqa: B905
    fields = {
        "prompt": prompt,
        "token_ids": ids,
        "sampled": sampled,
        "rollout_logprobs": np.where(sampled, -rng.exponential(0.25, len(ids)), 0).astype(np.float32),
        "versions": np.where(sampled, version, -1).astype(np.int32),
        "routes": np.zeros((len(ids), 2, 2), np.uint8),
        "routed": np.arange(len(ids)) < len(ids) - 1,
        "kept": Kept.from_rows(rows),
    }
    return Sample(**(fields | changes))


def view(rng, sample: Sample, masked: bool = False, **changes) -> SequenceView:
    options = {
        "token_texts": token_texts(sample.token_ids, decode),
        "log_ratios": np.where(sample.sampled, rng.normal(0, 0.02, len(sample)), 0),
    }
    return SequenceView(sample=sample, masked=masked, **(options | changes))


def trajectory(
    rng,
    step,
    index,
    text="The sum is 4 + 5 = 9.</think>9<｜end▁of▁sentence｜>",
    prompt="4 + 5 = ?",
    comment="",
    **changes,
):
    asked = Prompt(id=f"sums/{step * 7}", domain="sums", messages=({"role": "user", "content": prompt},), answer="9")
    pieces = [(f"{BOS}{USER}{prompt}{ASSISTANT}<think>", False), (text, True)]
    status = Status.TRUNCATED if index % 5 == 4 else Status.FINISHED
    sample = sequence_of(rng, pieces, asked, max(step - 1 - index % 2, 0), index=index, status=status)
    reward = float(rng.random() < 0.3 + step / 200)
    parts = {"sums": reward, "format": 1.0, "length_penalty": -0.125}
    scored = Scored(sample=sample, reward=reward, parts=parts, comments={"sums": comment} if comment else {})
    return Trajectory(scored=scored, sequences=[view(rng, sample, index == 3, **changes)], advantage=reward - 0.5)


def call_text(name: str, **arguments: str) -> str:
    given = "".join(
        f'<｜DSML｜parameter name="{k}" string="true">{v}</｜DSML｜parameter>\n' for k, v in arguments.items()
    )
    return (
        f'<｜DSML｜function_calls>\n<｜DSML｜invoke name="{name}">\n{given}</｜DSML｜invoke>\n</｜DSML｜function_calls>'
    )


PATCH = "def total_pages(books):\n    return sum(book['pages'] for book in books)\n"
ISSUE = "total_pages leaves out the first book of the shelf. Mend it; tests that you cannot see will judge the result."


def episode(rng, step, index, result="shelf.py:3:    return sum(b['pages'] for b in books[1:])", comment=""):
    """Four turns over two sequences: a search, a call that cannot be read, an edit that fails, a last word."""
    asked = Prompt(
        id=f"coding/{step}",
        domain="coding",
        messages=({"role": "system", "content": "You mend code."}, {"role": "user", "content": ISSUE}),
        answer={"fail_to_pass": ["test_every_book_counts"]},
    )
    search = f"Where is it?</think>{call_text('search', pattern='total_pages', path='.')}{EOS}"
    broken = f"Edit it.</think><｜DSML｜function_calls>\nedit shelf.py{EOS}"
    edit = f"Once more, properly.</think>{call_text('write_file', path='shelf.py', text=PATCH)}{EOS}"
    last = f"That should do.</think>The slice skipped the first book; it is gone.{EOS}"
    found, unread = f"\n\n<function_results>\n<result>{result}</result>\n</function_results>\n\n", "cannot be read"
    refused = f"\n\n<function_results>\n<result>error: {unread}</result>\n</function_results>\n\n"
    head = f"{BOS}You mend code.{USER}{ISSUE}{ASSISTANT}<think>"
    first = [(head, False), (search, True), (f"{found}<think>", False), (broken, True)]
    second = [
        (f"{head}{search}{found}{refused}<think>", False),
        (edit, True),
        ("\n\nread-only\n\n<think>", False),
        (last, True),
    ]
    asks = ToolCall(name="search", arguments={"pattern": "total_pages", "path": "."})
    writes = ToolCall(name="write_file", arguments={"path": "shelf.py", "text": PATCH})
    error = ToolResult(text=f"error: {unread}", failed=True)
    turns = (
        Turn(reply=search, calls=(asks,), results=(ToolResult(text=result),)),
        Turn(reply=broken, results=(error,), malformed="a line break must follow the tag"),
        Turn(reply=edit, calls=(writes,), results=(ToolResult(text="read-only file system", failed=True),)),
        Turn(reply=last),
    )
    earlier = sequence_of(rng, first, asked, step - 1, index=index, part=0)
    sample = sequence_of(
        rng,
        second,
        asked,
        step,
        index=index,
        earlier=(earlier,),
        turns=turns,
        reply=last,
        final_state={"patch": "-[1:]"},
    )
    reward = float(index % 2)
    parts = {"test_suite": reward, "test_suite/fail_to_pass": reward, "rubric": 0.5}
    scored = Scored(sample=sample, reward=reward, parts=parts, comments={"rubric": comment} if comment else {})
    views = [view(rng, earlier, masked=index == 0), view(rng, sample)]
    return Trajectory(scored=scored, sequences=views, advantage=reward - 0.5)


def step_metrics(rng, step, steps):
    learned = 1 / (1 + math.exp(-(step - steps * 0.35) / (steps * 0.12)))
    reward = 0.38 + 0.55 * learned + rng.normal(0, 0.03)
    rollout, learn = 1.6 + rng.random() * 0.3, 1.1 + rng.random() * 0.2
    return {
        "step": step,
        "time/step_s": 0.48 + rollout + learn,
        "time/rollout_s": rollout,
        "time/reward_s": 0.05 + rng.random() * 0.02,
        "time/learn_s": learn,
        "time/forward_s": learn * 0.3,
        "time/backward_s": learn * 0.5,
        "time/optimizer_s": learn * 0.1,
        "time/sync_s": 0.48,
        "time/learner_idle_s": rollout,
        "time/engines_idle_s": learn * 0.4,
        "tokens/generated": int(9000 + rng.normal(0, 400)),
        "tokens/trained": int(8800 + rng.normal(0, 400)),
        "tokens_per_s": 3100 + rng.normal(0, 150),
        "reward/mean": reward,
        "reward/sums": reward,
        "reward/sums/format": min(1.0, 0.7 + 0.3 * learned),
        "reward/sums/length_penalty": -0.1 + 0.08 * learned,
        "accuracy/sums": min(max(reward, 0), 1),
        "length/mean": 62 - 20 * learned + rng.normal(0, 1.5),
        "length/truncated": max(0.04 * (1 - learned) + rng.normal(0, 0.004), 0),
        "groups/zero_variance": 0.1 + 0.6 * learned,
        "groups/failed": 0,
        "groups/replaced": 0,
        "samples/failed": int(rng.random() < 0.1),
        "loss/policy": rng.normal(0, 0.01),
        "loss/kl": 0.002 * step / steps,
        "loss/total": rng.normal(0, 0.01),
        "entropy": 0.62 - 0.45 * learned + rng.normal(0, 0.01),
        "ratio/mean": 1 + rng.normal(0, 0.002),
        "ratio/clipped": abs(rng.normal(0.004, 0.001)),
        "grad_norm": 0.6 + abs(rng.normal(0, 0.15)),
        "lr": 1e-4 * min(step / 10, 1),
        "mask/off_policy": abs(rng.normal(0.02, 0.008)),
        "kept/mean_size": 9 - 4 * learned,
        "kept/share": 0.98,
        "routes/replayed": 0.995,
        "mismatch/logprob_abs": abs(rng.normal(2e-6, 3e-7)),
        "mismatch/kl": abs(rng.normal(1e-9, 2e-10)),
        "staleness/mean": 0.7 + rng.normal(0, 0.1),
        "staleness/max": 1,
        "sync/bytes": 7_340_032,
        "sync/verified": 1,
        "sync/version": step,
        "user/brevity": rng.random(),
    }


def spans(rng, steps, engines=2, begin=4.0):
    """The lines of timeline.jsonl of an asynchronous run."""
    now = begin
    yield {"actor": "driver", "phase": "start", "begin": 0.0, "end": begin, "step": None, "detail": ""}
    for step in range(1, steps + 1):
        wait, learn, sync = 0.3 + rng.random(), 1.2 + 0.3 * rng.random(), 0.25
        rows = [("driver", "rollout", 0.0, wait, ""), ("learner", "step", wait, wait + learn, "3 micro-batches")]
        rows += [("learner", "sync", wait + learn, wait + learn + sync, "")]
        for engine in range(engines):
            busy = wait + learn * (0.5 + 0.4 * rng.random())
            rows.append((f"engine {engine}", "generate", 0.02, busy, f"version {step - 1}"))
            rows.append((f"engine {engine}", "sync", wait + learn + 0.05, wait + learn + sync, ""))
        rows += [("rewards", "score", at, at + 0.4, f"sums/{step * 7 + n}") for n, at in enumerate((0.2, 0.35, 0.9))]
        for actor, phase, start, end, detail in sorted(rows, key=lambda row: row[3]):
            times = {"begin": round(now + start, 4), "end": round(now + end, 4)}
            yield {"actor": actor, "phase": phase, **times, "step": step, "detail": detail}
        now += wait + learn + sync + 0.05


def alarm(step: int, name: str, metric: str, value: float, limit: float, sentence: str) -> dict[str, object]:
    told = {"metric": metric, "active": "cleared" not in sentence, "value": value, "limit": limit, "sentence": sentence}
    return {"step": step, "alarm": name, **told}


ALARMS = (
    alarm(12, "entropy", "entropy", 0.11, 0.2, "Entropy fell below 0.2 nats a token: look at kl_beta."),
    alarm(14, "mismatch", "mismatch/kl", 3e-4, 1e-4, "Engine and learner drift apart."),
    alarm(20, "mismatch", "mismatch/kl", 1e-5, 1e-4, "alarm mismatch cleared"),
)


def write_lines(path: Path, rows) -> None:
    with open(path, "ab") as file:
        file.writelines(json.dumps(row).encode() + b"\n" for row in rows)


def write_run(
    path: Path, steps=30, trajectories=4, sample_every=5, end=True, seed=0, recipe="", extras=False
) -> RunDirectory:
    """A run of its kind; with ``extras`` it has a timeline, alarms and episodes with tools too."""
    rng = np.random.default_rng(seed)
    run = RunDirectory.create(path, recipe=recipe or "name: demo\nsystem: '<b>&</b>'\n")
    for step in range(1, 41):
        run.log_supervised({"step": step, "loss/supervised": 4 * math.exp(-step / 12) + 0.6 + rng.normal(0, 0.03)})
    run.log({"step": 0, "eval/sums": 0.412})
    for step in range(1, steps + 1):
        metrics = step_metrics(rng, step, steps)
        if step % 10 == 0:
            metrics["eval/sums"] = 0.41 + 0.52 * step / steps
        run.log(metrics)
        if step % sample_every == 0:
            members = [trajectory(rng, step, index) for index in range(trajectories)]
            members += (
                [episode(rng, step, index, comment="Mended, but untested.") for index in range(2)] if extras else []
            )
            run.log_samples(step, members)
    if extras:
        write_lines(path / "timeline.jsonl", spans(rng, steps))
        write_lines(path / "alarms.jsonl", ALARMS)
    if end:
        run.finish()
    return run
