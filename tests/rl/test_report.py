"""The report: everything in it comes from the run's files, and nothing a model wrote can act in it."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
import shutil
import subprocess
import sys
from collections import Counter
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.errors import DataError
from rl.report import Budget, build_report
from rl.report.embed import evenly, to_script_json
from rl.run_directory import RunDirectory
from rl.sample import Kept, Prompt, Sample, Scored, Status
from rl.trajectory import Trajectory, token_texts

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&lt;<!--\u2028\u202e{{data}}"


class Page(HTMLParser):
    """The page's elements, and the text of its scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = "data" if dict(attrs).get("id") == "run-data" else tag
        self.texts.setdefault(self._open, [])

    def handle_data(self, data):
        if self._open:
            self.texts[self._open].append(data)

    def handle_endtag(self, tag):
        self._open = ""

    def text(self, name: str) -> str:
        return "".join(self.texts[name])

    @property
    def data(self):
        return json.loads(self.text("data"))


SPECIAL_TOKENS = (
    "<｜begin▁of▁sentence｜>",
    "<｜end▁of▁sentence｜>",
    "<｜User｜>",
    "<｜Assistant｜>",
    "<think>",
    "</think>",
)


def encode(text: str) -> list[int]:
    """Bytes, with one id for each special token: the shape of the byte tokenizer."""
    pieces = re.split("(" + "|".join(map(re.escape, SPECIAL_TOKENS)) + ")", text)
    ids = [[256 + SPECIAL_TOKENS.index(piece)] if piece in SPECIAL_TOKENS else list(piece.encode()) for piece in pieces]
    return [token for piece in ids for token in piece]


def decode(ids: list[int]) -> str:
    pieces = (bytes([token]) if token < 256 else SPECIAL_TOKENS[token - 256].encode() for token in ids)
    return b"".join(pieces).decode(errors="replace")


def trajectory(
    rng, step, index, text="The sum is 4 + 5 = 9.</think>9<｜end▁of▁sentence｜>", prompt="4 + 5 = ?", **changes
):
    head = f"<｜begin▁of▁sentence｜><｜User｜>{prompt}<｜Assistant｜><think>"
    ids = encode(head) + encode(text)
    sampled = np.arange(len(ids)) >= len(encode(head))
    logprobs = np.where(sampled, -rng.exponential(0.25, len(ids)), 0).astype(np.float32)
    sizes = np.where(sampled, rng.integers(1, 12, len(ids)), 0)
    rows = [
        np.array(sorted({token, *range(size)})) if size else np.array([], int)
        for token, size in zip(ids, sizes, strict=True)
    ]
    sample = Sample(
        prompt=Prompt(
            id=f"sums/{step * 7}", domain="sums", messages=({"role": "user", "content": prompt},), answer="9"
        ),
        index=index,
        token_ids=np.array(ids, np.int32),
        sampled=sampled,
        rollout_logprobs=logprobs,
        versions=np.where(sampled, max(step - 1 - index % 2, 0), -1).astype(np.int32),
        routes=np.zeros((len(ids), 2, 2), np.uint8),
        routed=np.arange(len(ids)) < len(ids) - 1,
        kept=Kept.from_rows(rows),
        status=Status.TRUNCATED if index % 5 == 4 else Status.FINISHED,
    )
    reward = float(rng.random() < 0.3 + step / 200)
    options = {"log_ratios": np.where(sampled, rng.normal(0, 0.02, len(ids)), 0), "advantage": reward - 0.5} | changes
    return Trajectory(
        scored=Scored(sample=sample, reward=reward, parts={"sums": reward, "format": 1.0, "length_penalty": -0.125}),
        token_texts=token_texts(ids, decode),
        masked=index == 3,
        **options,
    )


def step_metrics(rng, step, steps):
    learned = 1 / (1 + math.exp(-(step - steps * 0.35) / (steps * 0.12)))
    reward = 0.38 + 0.55 * learned + rng.normal(0, 0.03)
    rollout, learn = 1.6 + rng.random() * 0.3, 1.1 + rng.random() * 0.2
    return {
        "step": step,
        "time/step_s": 0.4 + rollout + learn * 0.6,
        "time/rollout_s": rollout,
        "time/reward_s": 0.05 + rng.random() * 0.02,
        "time/learn_s": learn,
        "time/sync_s": 0.08,
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


def write_run(path: Path, steps=30, trajectories=4, sample_every=5, end=True) -> RunDirectory:
    """A run as the driver would leave it, with invented numbers."""
    rng = np.random.default_rng(0)
    run = RunDirectory.create(path, recipe="name: demo\nsystem: '<b>&</b>'\n")
    for step in range(1, 41):
        run.log_supervised({"step": step, "loss/supervised": 4 * math.exp(-step / 12) + 0.6 + rng.normal(0, 0.03)})
    run.log({"step": 0, "eval/sums": 0.412})
    for step in range(1, steps + 1):
        metrics = step_metrics(rng, step, steps)
        if step % 10 == 0:
            metrics["eval/sums"] = 0.41 + 0.52 * step / steps
        run.log(metrics)
        if step % sample_every == 0:
            run.log_samples(step, [trajectory(rng, step, index) for index in range(trajectories)])
    if end:
        run.finish()
    return run


@pytest.fixture
def run(tmp_path):
    return write_run(tmp_path / "demo")


def page_of(run, **budget) -> tuple[str, Page, tuple[str, ...]]:
    path, notes = build_report(run.path, Budget(**budget))
    html = path.read_text(encoding="utf-8")
    return html, Page(html), notes


def test_the_embedded_numbers_are_those_of_the_files(run):
    _, page, notes = page_of(run)
    rows = [json.loads(line) for line in run.metrics.read_text().splitlines()]
    assert page.data["metrics"]["steps"] == [row["step"] for row in rows]
    for name in ("reward/mean", "eval/sums", "user/brevity"):
        column = page.data["metrics"]["columns"][name]
        assert [value is None for value in column] == [name not in row for row in rows]
        assert column == [pytest.approx(row[name], rel=1e-5) if name in row else None for row in rows]
    assert len(page.data["supervised"]["columns"]["loss/supervised"]) == 40
    assert notes == ()


def test_the_embedded_trajectories_are_those_of_the_files(run):
    _, page, _ = page_of(run)
    shown = page.data["trajectories"]
    records = [
        json.loads(line)
        for step in (5, 10, 15, 20, 25, 30)
        for line in (run.samples / f"step_{step}.jsonl").read_text().splitlines()
    ]
    assert [entry["id"] for entry in shown] == [record["id"] for record in records]
    for entry, record in zip(shown, records, strict=True):
        assert entry["tokens"] == record["tokens"] and entry["messages"] == record["messages"]
        assert entry["sampled"] == "".join(map(str, record["sampled"]))
        assert entry["kept_sizes"] == record["kept_sizes"] and entry["versions"] == record["versions"]
        assert entry["log_ratios"] == pytest.approx(record["log_ratios"], rel=1e-3)
        assert (entry["reward"], entry["masked"], entry["cut"]) == (record["reward"], record["masked"], 0)


def test_the_header_gives_the_key_numbers(run):
    html, _, _ = page_of(run)
    assert '<span class="pill good">finished</span>' in html
    assert "41.2% → 93.0%" in html and "+51.8 points, step 0 to 30" in html
    assert "30 of 30" in html  # syncs verified
    assert "30 steps · 40 cold-start steps · started" in html
    rewards = [json.loads(line).get("reward/mean") for line in run.metrics.read_text().splitlines()][1:]
    assert f"{np.mean(rewards[:5]):.3f} → {np.mean(rewards[-5:]):.3f}" in html


@pytest.mark.parametrize(
    ("end", "shown"), [(lambda run: None, "not finished"), (lambda run: run.stop("a<b"), "stopped")]
)
def test_a_run_that_did_not_finish_says_so(tmp_path, end, shown):
    run = write_run(tmp_path / "demo", end=False)
    end(run)
    html, _, _ = page_of(run)
    assert f'<span class="pill bad">{shown}</span>' in html and "pill good" not in html
    assert ("a&lt;b" in html) == (shown == "stopped")


def test_the_page_needs_no_network(run):
    html, page, _ = page_of(run)
    assert not re.search(r"""(src|href|url|@import)\s*[=(]?\s*["']?(https?:)?//""", html)
    urls = set(re.findall(r"https?://[^\"'\s<]+", page.text("script") + page.text("style")))
    assert urls <= {"http://www.w3.org/2000/svg"}  # a namespace, never fetched
    for _tag, attributes in page.tags:
        assert (attributes.get("href") or "#").startswith("#") and "src" not in attributes
    assert not re.search(r"\b(fetch|XMLHttpRequest|import)\s*\(", page.text("script"))


def test_the_security_policy_admits_only_the_pages_own_script_and_style(run):
    _, page, _ = page_of(run)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy.startswith("default-src 'none'")
    for kind in ("script", "style"):
        digest = base64.b64encode(hashlib.sha256(page.text(kind).encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert not re.search(
        r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", page.text("script")
    )


def test_hostile_text_stays_text(tmp_path):
    rng = np.random.default_rng(0)
    path = tmp_path / "<img src=x onerror=alert(1)>"
    with RunDirectory.create(path, recipe=f"system: {HOSTILE}\n") as run:
        run.log({"step": 1, "reward/mean": 0.5, f"eval/{HOSTILE}": 0.5})
        run.log_samples(1, [trajectory(rng, 1, 0, text=HOSTILE, prompt=HOSTILE)])
    html, page, _ = page_of(run)
    assert [tag for tag, _ in page.tags].count("script") == 2 and "img" not in [tag for tag, _ in page.tags]
    (shown,) = page.data["trajectories"]
    assert shown["messages"][0]["content"] == HOSTILE and HOSTILE in "".join(shown["tokens"])
    assert html.count('id="run-data"') == 1


@given(
    st.recursive(
        st.text() | st.just(HOSTILE) | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)
    )
)
def test_script_json_is_inert_and_reads_back(value):
    text = to_script_json(value)
    assert not set("<>&\u2028\u2029") & set(text)
    assert json.loads(text) == value


@pytest.mark.parametrize(
    ("answer", "shown"), [("9", "9"), (9, "9"), ({"answer": "9", "n": 1}, "9"), ({"n": 1}, '{"n": 1}')]
)
def test_the_expected_answer_is_shown_alone(run, answer, shown):
    record = {"step": 5, "id": "a", "tokens": [], "answer": answer}
    (run.samples / "step_5.jsonl").write_text(json.dumps(record) + "\n")
    _, page, _ = page_of(run)
    assert page.data["trajectories"][0]["answer"] == shown


def test_lone_surrogates_do_not_break_the_page(tmp_path):
    with RunDirectory.create(tmp_path / "demo", recipe="") as run:
        run.log({"step": 1, "reward/mean": 0.5})
    record = {"step": 1, "id": "a", "tokens": ["\ud800"], "sampled": [1], "messages": []}
    (run.samples / "step_1.jsonl").write_text(json.dumps(record) + "\n")
    _, page, _ = page_of(run)
    assert page.data["trajectories"][0]["tokens"] == ["?"]


def test_the_page_is_bounded_and_says_what_it_leaves_out(tmp_path):
    run = write_run(tmp_path / "demo", steps=400, trajectories=6, sample_every=2)
    html, page, notes = page_of(run, steps=100, sample_steps=30, sample_bytes=150_000, tokens=30)
    steps = page.data["metrics"]["steps"]
    assert len(steps) <= 100 and steps[0] == 0 and steps[-1] == 400
    assert set(range(10, 401, 10)) <= set(steps)  # no evaluation is dropped
    shown = page.data["trajectories"]
    assert len(to_script_json(shown).encode()) <= 151_000
    kept = sorted({entry["step"] for entry in shown})
    assert kept[0] == 2 and kept[-1] == 400 and max(np.diff(kept)) <= 2 * min(np.diff(kept))
    assert all(len(entry["tokens"]) == 30 and entry["cut"] > 0 for entry in shown)
    assert notes[0] == f"Curves show {len(steps)} of 401 metrics steps, evenly chosen."
    assert f"Trajectories are those of {len(kept)} of 200 recorded steps" in notes[1]
    assert all(note in html for note in notes)


def test_where_few_steps_fit_each_shows_fewer_trajectories(tmp_path):
    run = write_run(tmp_path / "demo", trajectories=12)
    _, page, notes = page_of(run, sample_bytes=40_000)
    shown = page.data["trajectories"]
    by_step = Counter(entry["step"] for entry in shown)
    assert set(by_step) == {5, 10, 15, 20, 25, 30} and set(by_step.values()) == {4}
    assert len(to_script_json(shown).encode()) <= 40_100
    assert notes == ("Of 72 trajectories of these steps, the page holds 24.",)


def test_a_trajectory_larger_than_the_budget_is_left_out(run):
    _, page, notes = page_of(run, sample_bytes=500)
    assert page.data["trajectories"] == []
    assert notes[-1] == "Of 8 trajectories of these steps, the page holds 0."


@given(st.lists(st.integers(), max_size=50), st.integers(0, 60))
def test_evenly_keeps_both_ends_and_the_order(items, count):
    positions = evenly(list(range(len(items))), count)
    assert len(positions) == min(len(items), count) and positions == sorted(set(positions))
    if count >= 2 and items:
        assert positions[0] == 0 and positions[-1] == len(items) - 1


def test_corrupt_lines_are_skipped_and_counted(run):
    with open(run.metrics, "a") as file:
        file.write('{"step": 31, "reward/mean": 0.\nnot json\n[1]\n{"reward/mean": 1}\n')
    with open(run.samples / "step_5.jsonl", "ab") as file:
        file.write(b'\xff\xfe\n{"step": 5, "tokens": "text"}\n{"step": 5, "tokens": ["a"], "sampled": [1, 1]}\n')
    html, page, notes = page_of(run)
    assert len(page.data["metrics"]["steps"]) == 31 and len(page.data["trajectories"]) == 24
    assert notes[0].startswith("4 lines of the metrics could not be read")
    assert notes[1].startswith("3 lines of the trajectories could not be read")
    assert notes[0] in html


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "rl.report", *map(str, arguments)], capture_output=True, text=True)


def test_the_command_rebuilds_the_page(run):
    result = command(run.path)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, str(run.report), "")
    assert run.report.exists() and not list(run.path.glob(".*"))


def test_the_command_ends_bad_input_with_one_sentence(tmp_path):
    missing, empty, unreadable = tmp_path / "missing", tmp_path / "empty", tmp_path / "unreadable"
    for path in (empty, unreadable):
        path.mkdir()
    (unreadable / "metrics.jsonl").write_text("{")
    for path, sentence in [(missing, "is not a directory"), (empty, "holds no metrics"), (unreadable, "no metrics")]:
        result = command(path)
        assert result.returncode == 1 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"rl.report: {path} ") and sentence in line
        assert not (path / "report.html").exists()


def test_a_run_that_ended_in_its_cold_start_still_has_a_report(tmp_path):
    run = RunDirectory.create(tmp_path / "demo", recipe="")
    run.log_supervised({"step": 1, "loss/supervised": 3.0})
    run.stop("out of demonstrations")
    html, page, _ = page_of(run)
    assert page.data["metrics"]["steps"] == [] and page.data["supervised"]["columns"] == {"loss/supervised": [3.0]}
    assert "out of demonstrations" in html


def test_nothing_to_report_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"metrics.jsonl is missing, empty or unreadable"):
        build_report(tmp_path)


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
FLAGS = "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
FLAGS += " --disable-component-update --disable-sync --virtual-time-budget=3000 --window-size=1280,900 --dump-dom"


@pytest.mark.skipif(CHROMIUM is None, reason="draws the page in Chromium, which is not installed")
def test_a_browser_draws_every_curve_and_keeps_hostile_text_inert(tmp_path):
    assert CHROMIUM
    rng = np.random.default_rng(0)
    run = write_run(tmp_path / "demo", end=False)
    run.log_samples(1, [trajectory(rng, 1, 0, text=f"so {HOSTILE}</think>9", prompt=HOSTILE)])
    run.finish()
    page, _ = build_report(run.path)
    browser = [CHROMIUM, *FLAGS.split(), f"--user-data-dir={tmp_path / 'profile'}", page.as_uri()]
    dom = subprocess.run(browser, capture_output=True, text=True, timeout=120).stdout
    assert "<title>demo · Keel run report</title>" in dom  # the hostile script did not run
    titles = re.findall(r"<h4>([^<]+)</h4>(?=<span class=\"key\"|</div>)", dom)
    expected = {"Reward", "Held-out accuracy", "Staleness", "Time per step", "user/brevity", "Supervised loss"}
    assert expected <= set(titles)
    assert len(re.findall(r'<path class="line', dom)) >= len(titles)
    assert 'class="message thinking"' in dom and 'class="message reply"' in dom
    assert "<img" not in dom and dom.count("<script") == 2
