"""The report: everything in it comes from the run's files, and nothing a model wrote can act in it."""

from __future__ import annotations

import base64
import hashlib
import json
import re
import socket
import subprocess
import sys
import zlib
from collections import Counter
from html.parser import HTMLParser

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rl.errors import DataError
from rl.report import Budget, build_comparison, build_report
from rl.report.block import compressed, to_script_json
from rl.report.json_lines import JsonLines
from rl.report.recipe_differences import recipe_differences
from rl.report.samples import evenly
from rl.run_directory import RunDirectory
from tests.rl.report_runs import ALARMS, episode, trajectory, write_lines, write_run

HOSTILE = "</script><script>document.title='owned'</script><img src=x onerror=alert(1)>&lt;<!--\u2028\u202e{{data}}"


class Page(HTMLParser):
    """The page's elements, the text of its scripts and styles, and what its blocks hold."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: dict[str, list[str]] = {}
        self._open = ""
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self._open = dict(attrs).get("id") or tag if tag == "script" else tag
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
        return json.loads(self.text("run-data"))

    @property
    def run(self):
        (run,) = self.data["runs"]
        return run

    def block(self, name: str, number: int = 0):
        return json.loads(zlib.decompress(base64.b64decode(self.text(f"block-{number}-{name}")), 31))

    @property
    def trajectories(self):
        return [self.block(one["block"])[one["place"]] for one in self.block("index")]


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
    assert page.run["metrics"]["steps"] == [row["step"] for row in rows]
    for name in ("reward/mean", "eval/sums", "user/brevity"):
        column = page.run["metrics"]["columns"][name]
        assert [value is None for value in column] == [name not in row for row in rows]
        assert column == [pytest.approx(row[name], rel=1e-5) if name in row else None for row in rows]
    assert len(page.run["supervised"]["columns"]["loss/supervised"]) == 40
    assert notes == ()


def test_the_embedded_trajectories_are_those_of_the_files(run):
    _, page, _ = page_of(run)
    shown = page.trajectories
    records = [
        json.loads(line)
        for step in (5, 10, 15, 20, 25, 30)
        for line in (run.samples / f"step_{step}.jsonl").read_text().splitlines()
    ]
    assert [entry["id"] for entry in shown] == [record["id"] for record in records]
    for entry, record in zip(shown, records, strict=True):
        (sequence,) = entry["sequences"]
        assert sequence["tokens"] == record["tokens"] and entry["messages"] == record["messages"]
        assert sequence["sampled"] == "".join(map(str, record["sampled"]))
        assert sequence["routed"] == "".join(map(str, record["routed"]))
        assert sequence["kept_sizes"] == record["kept_sizes"] and sequence["versions"] == record["versions"]
        assert sequence["log_ratios"] == pytest.approx(record["log_ratios"], rel=6e-3)
        assert sequence["rollout_logprobs"] == pytest.approx(record["rollout_logprobs"], rel=6e-3)
        assert (entry["reward"], sequence["masked"], sequence["cut"]) == (record["reward"], record["masked"], 0)


def test_an_episode_keeps_its_turns_its_sequences_and_the_judges_words(tmp_path):
    rng = np.random.default_rng(0)
    with RunDirectory.create(tmp_path / "demo", recipe="") as run:
        run.log({"step": 5, "reward/mean": 0.5})
        run.log_samples(5, [episode(rng, 5, 0, comment="Untested.")])
    _, page, _ = page_of(run)
    (record,) = map(json.loads, (run.samples / "step_5.jsonl").read_text().splitlines())
    (entry,) = page.trajectories
    assert [turn["reply"] for turn in entry["turns"]] == [turn["reply"] for turn in record["turns"]]
    assert entry["turns"][0]["calls"] == [{"name": "search", "arguments": {"pattern": "total_pages", "path": "."}}]
    assert entry["turns"][1]["malformed"] and entry["turns"][2]["results"] == record["turns"][2]["results"]
    assert [one["tokens"] for one in entry["sequences"]] == [record["earlier"][0]["tokens"], record["tokens"]]
    assert [one["masked"] for one in entry["sequences"]] == [True, False]
    assert entry["comments"] == {"rubric": "Untested."} and json.loads(entry["state"]) == record["final_state"]
    (summary,) = page.block("index")
    expected = [
        "masked",
        "several versions",
        "calls tools",
        "tool errors",
        "malformed",
        "commented",
        "restarted context",
    ]
    assert summary["flags"] == expected and summary["turns"] == 4
    assert summary["tokens"] == sum(map(sum, (record["earlier"][0]["sampled"], record["sampled"])))
    ratios = [abs(ratio) for one in (record["earlier"][0], record) for ratio in one["log_ratios"]]
    assert summary["mismatch"] == pytest.approx(max(ratios), rel=6e-3)


def test_timeline_and_alarms_are_those_of_the_files(tmp_path):
    run = write_run(tmp_path / "demo", extras=True)
    write_lines(run.path / "timeline.jsonl", [{"actor": "x", "phase": "y", "begin": "0", "end": 1}, ["no span"]])
    _, page, notes = page_of(run)
    assert page.run["alarms"] == list(ALARMS)
    rows = [json.loads(line) for line in (run.path / "timeline.jsonl").read_text().splitlines()][:-2]
    spans = page.block("timeline")
    for key in ("actor", "phase", "detail"):
        assert [spans["names"][place] for place in spans[key]] == [row[key] for row in rows]
    assert spans["step"] == [row["step"] for row in rows]
    assert spans["begin"] == [pytest.approx(1000 * row["begin"], abs=0.5) for row in rows]
    assert spans["length"] == [pytest.approx(1000 * (row["end"] - row["begin"]), abs=0.6) for row in rows]
    assert notes == ("2 lines of timeline.jsonl could not be read.",)
    _, page, notes = page_of(run, spans=10)
    assert page.block("timeline")["begin"] == spans["begin"][-10:]
    assert notes[-1] == f"The timeline shows the last 10 of {len(rows)} spans."


def test_the_header_gives_the_key_numbers(run):
    html, _, _ = page_of(run)
    assert '<span class="pill good">finished</span>' in html
    assert "41.2% → 93.0%" in html and "+51.8 points, step 0 to 30" in html
    assert "30 of 30" in html  # syncs verified
    assert "30 steps · 40 cold-start steps · started" in html
    rewards = [json.loads(line).get("reward/mean") for line in run.metrics.read_text().splitlines()][1:]
    assert f"{np.mean(rewards[:5]):.3f} → {np.mean(rewards[-5:]):.3f}" in html


def test_the_header_gives_the_time_of_all_sittings_without_the_pauses(tmp_path):
    run = write_run(tmp_path / "demo", extras=True)
    status = json.loads((run.path / "status.json").read_text())
    status |= {"started": "2026-01-01T10:00:00+00:00", "ended": "2026-01-01T20:00:00+00:00"}
    (run.path / "status.json").write_text(json.dumps(status))
    assert "took 10:00:00" in page_of(run)[0]
    ended = max(json.loads(line)["end"] for line in (run.path / "timeline.jsonl").read_text().splitlines())
    start = {"actor": "driver", "phase": "start", "begin": ended + 1, "end": 3725.0, "step": None, "detail": ""}
    write_lines(run.path / "timeline.jsonl", [start])
    html, _, _ = page_of(run)
    assert "ran 1:02:05 in all, pauses left out" in html and "took" not in html.split("<main>")[0]


@pytest.mark.parametrize(
    ("value", "shown"), [(0.016, "0.016"), (7e-5, "7 × 10⁻⁵"), (4.34e-7, "4.3 × 10⁻⁷"), (0.0, "0.0"), (1.5, "1.5")]
)
def test_a_small_mismatch_is_readable(tmp_path, value, shown):
    with RunDirectory.create(tmp_path / "demo", recipe="") as run:
        run.log({"step": 1, "mismatch/logprob_abs": value})
    assert f"<dd>{shown}<small>nats per token" in page_of(run)[0]


def test_what_stands_for_no_measurement_is_a_gap(tmp_path):
    with RunDirectory.create(tmp_path / "demo", recipe="") as run:
        for step, (some, none) in enumerate([(0.5, 0.0), (0.0, 0.0)], start=1):
            shares = {"reward_share/a/x": some, "reward_share/a/y": 1.0 if some else 0.0, "reward_share/b/x": none}
            run.log({"step": step, **shares, "time/reward_s": some, "loss/kl": 0.0})
    columns = page_of(run)[1].run["metrics"]["columns"]
    assert columns["reward_share/a/x"] == [0.5, None] and columns["reward_share/a/y"] == [1.0, None]
    assert columns["time/reward_s"] == [0.5, None] and columns["loss/kl"] == [0.0, 0.0]
    assert "reward_share/b/x" not in columns


def abandon(run: RunDirectory) -> None:
    """As a process leaves it that is killed."""
    process = subprocess.Popen(["true"])
    process.wait()
    (run.path / ".lock").write_text(f"process {process.pid} on {socket.gethostname()}")


def test_a_run_that_goes_on_says_so(tmp_path):
    run = write_run(tmp_path / "demo", end=False)
    html, page, _ = page_of(run)
    assert '<span class="pill good">running</span>' in html and page.run["standing"]["word"] == "running"


@pytest.mark.parametrize(("end", "shown"), [(abandon, "not finished"), (lambda run: run.stop("a<b"), "stopped")])
def test_a_run_that_did_not_finish_says_so(tmp_path, end, shown):
    run = write_run(tmp_path / "demo", end=False)
    end(run)
    html, _, _ = page_of(run)
    assert f'<span class="pill bad">{shown}</span>' in html and "pill good" not in html
    assert ("a&lt;b" in html) == (shown == "stopped")


def test_the_page_needs_no_network(run):
    html, page, _ = page_of(run)
    html = re.sub(r'(<script type="application/gzip"[^>]*>)[^<]*', r"\1", html)  # base64 may spell anything
    assert not re.search(r"""(src|href|url|@import)\s*[=(]?\s*["']?(https?:)?//""", html)
    urls = set(re.findall(r"https?://[^\"'\s<]+", page.text("script") + page.text("style")))
    assert urls <= {"http://www.w3.org/2000/svg"}  # a namespace, never fetched
    for _tag, attributes in page.tags:
        assert (attributes.get("href") or "#").startswith("#") and "src" not in attributes
    # The one request in the script is for a page that is served; the policy of this one forbids it.
    assert len(re.findall(r"\b(?:fetch|XMLHttpRequest|WebSocket|EventSource|import)\s*\(", page.text("script"))) == 1
    assert "connect-src" not in html


def test_the_security_policy_admits_only_the_pages_own_script_and_style(run):
    _, page, _ = page_of(run)
    (policy,) = [a["content"] for _, a in page.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy and policy.startswith("default-src 'none'")
    assert [tag for tag, a in page.tags if tag == "script" and not a] == ["script"]
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
    scripts = [attributes.get("type") for tag, attributes in page.tags if tag == "script"]
    assert scripts == ["application/json", *["application/gzip"] * 3, None]  # timeline, index, one step
    assert "img" not in [tag for tag, _ in page.tags]
    (shown,) = page.trajectories
    assert shown["messages"][0]["content"] == HOSTILE and HOSTILE in "".join(shown["sequences"][0]["tokens"])
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
    assert page.trajectories[0]["answer"] == shown


def test_lone_surrogates_do_not_break_the_page(tmp_path):
    with RunDirectory.create(tmp_path / "demo", recipe="") as run:
        run.log({"step": 1, "reward/mean": 0.5})
    record = {"step": 1, "id": "a", "tokens": ["\ud800"], "sampled": [1], "messages": []}
    (run.samples / "step_1.jsonl").write_text(json.dumps(record) + "\n")
    _, page, _ = page_of(run)
    assert page.trajectories[0]["sequences"][0]["tokens"] == ["?"]


def test_the_page_is_bounded_and_says_what_it_leaves_out(tmp_path):
    run = write_run(tmp_path / "demo", steps=200, trajectories=4, sample_every=2)
    _, page, notes = page_of(run, steps=100, sample_bytes=40_000, tokens=30)
    steps = page.run["metrics"]["steps"]
    assert len(steps) <= 100 and steps[0] == 0 and steps[-1] == 200
    assert set(range(10, 201, 10)) <= set(steps)  # no evaluation is dropped
    index = page.block("index")
    kept = sorted({one["step"] for one in index})
    assert 20_000 <= sum(len(page.text(f"block-0-{step}")) for step in kept) <= 40_000
    assert kept[0] == 2 and kept[-1] == 200 and max(np.diff(kept)) <= 2 * min(np.diff(kept))
    cut = [sequence for entry in page.trajectories for sequence in entry["sequences"]]
    assert all(len(sequence["tokens"]) == 30 and sequence["cut"] > 0 for sequence in cut)
    assert notes[0] == f"Curves show {len(steps)} of 201 metrics steps, evenly chosen."
    assert notes[1] == f"Trajectories are those of {len(kept)} of 100 recorded steps, evenly chosen."
    assert notes[2] == f"{len(cut)} trajectories cut after 30 tokens."
    assert page.run["notes"] == list(notes)


def test_where_few_steps_fit_each_shows_fewer_trajectories(tmp_path):
    run = write_run(tmp_path / "demo", trajectories=12)
    _, whole, _ = page_of(run)
    every = sum(len(whole.text(f"block-0-{step}")) for step in (5, 10, 15, 20, 25, 30))
    _, page, notes = page_of(run, sample_bytes=every * 2 // 3)
    by_step = Counter(one["step"] for one in page.block("index"))
    assert set(by_step) == {5, 10, 15, 20, 25, 30} and len(set(by_step.values())) == 1
    assert 2 <= by_step[5] < 12
    assert notes == (f"Of 72 trajectories of these steps, the page holds {6 * by_step[5]}.",)


def test_a_trajectory_larger_than_the_budget_is_left_out(run):
    _, page, notes = page_of(run, sample_bytes=500)
    assert page.block("index") == []
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
    _, page, notes = page_of(run)
    assert len(page.run["metrics"]["steps"]) == 31 and len(page.trajectories) == 24
    assert notes[0] == "4 lines of metrics.jsonl could not be read."
    assert notes[1] == "3 lines of the trajectories could not be read and were skipped."
    assert page.run["notes"] == list(notes)


def command(*arguments):
    return subprocess.run([sys.executable, "-m", "rl.report", *map(str, arguments)], capture_output=True, text=True)


def test_the_command_rebuilds_the_page(run):
    result = command(run.path)
    assert (result.returncode, result.stdout.strip(), result.stderr) == (0, str(run.report), "")
    assert run.report.exists() and not list(run.path.glob(".*.partial"))


def test_the_command_ends_bad_input_with_one_sentence(tmp_path):
    missing, empty, unreadable = tmp_path / "missing", tmp_path / "empty", tmp_path / "unreadable"
    for path in (empty, unreadable):
        path.mkdir()
    (unreadable / "metrics.jsonl").write_text("{")
    for path, sentence in [(missing, "is not a directory"), (empty, "holds no metrics"), (unreadable, "no metrics")]:
        result = command(path)
        assert result.returncode == 1 and result.stdout == ""
        (line,) = result.stderr.splitlines()
        assert line.startswith(f"keel: {path} ") and sentence in line
        assert not (path / "report.html").exists()


def test_a_page_that_cannot_be_written_is_named(tmp_path):
    run = RunDirectory.create(tmp_path / "demo", recipe="")
    run.log_supervised({"step": 1, "loss/supervised": 3.0})
    out = tmp_path / "nowhere" / "page.html"
    result = command(run.path, "--out", out)
    assert (result.returncode, result.stderr) == (1, f"keel: {out} cannot be written: No such file or directory\n")


def test_a_run_that_ended_in_its_cold_start_still_has_a_report(tmp_path):
    run = RunDirectory.create(tmp_path / "demo", recipe="")
    run.log_supervised({"step": 1, "loss/supervised": 3.0})
    run.stop("out of demonstrations")
    html, page, _ = page_of(run)
    assert page.run["metrics"]["steps"] == [] and page.run["supervised"]["columns"] == {"loss/supervised": [3.0]}
    assert "out of demonstrations" in html


def test_nothing_to_report_is_a_data_error(tmp_path):
    with pytest.raises(DataError, match=r"metrics.jsonl is missing, empty or unreadable"):
        build_report(tmp_path)


def test_a_comparison_holds_every_run_and_where_their_recipes_differ(tmp_path):
    one = write_run(tmp_path / "one", recipe="name: one\nlearner: {lr: 1.0e-6, betas: [0.9, 0.95]}\nseed: 0\n")
    two = write_run(tmp_path / "two", steps=20, seed=1, recipe="name: two\nlearner: {lr: 2.0e-6, betas: [0.9, 0.99]}\n")
    path, notes = build_comparison([one.path, two.path], tmp_path / "both.html")
    page = Page(path.read_text(encoding="utf-8"))
    assert [run["name"] for run in page.data["runs"]] == ["one", "two"] and notes == ()
    assert [run["metrics"]["steps"][-1] for run in page.data["runs"]] == [30, 20]
    assert page.data["differences"] == [
        {"key": "learner.lr", "values": ["1.0e-06", "2.0e-06"]},
        {"key": "learner.betas[1]", "values": ["0.95", "0.99"]},
        {"key": "seed", "values": ["0", None]},
    ]
    assert len(page.block("index", 0)) == 24 and len(page.block("index", 1)) == 16


@pytest.mark.parametrize(
    ("recipes", "keys"),
    [
        (["a: 1", "a: 1"], []),
        (["a: {b: 1, c: []}", "a: {b: 1, c: {}}"], ["a.c"]),
        (["a: null", "a: ''"], ["a"]),
        (["a: yes", "a: 'yes'"], ["a"]),
        (["a: [", "a: 1"], ["(recipe.yaml)", "a"]),
        (["name: x\nruns: y", "name: z"], []),
    ],
)
def test_recipes_differ_where_a_value_differs(recipes, keys):
    assert [row["key"] for row in recipe_differences(recipes)] == keys


def test_lines_are_read_on_while_they_are_written(tmp_path):
    path = tmp_path / "a.jsonl"
    lines = JsonLines(path)
    assert lines.read() and lines.rows == []
    path.write_bytes(b'{"step": 1}\n{"step": ')
    assert lines.read() and lines.rows == [{"step": 1}] and lines.skipped == 0
    with open(path, "ab") as file:
        file.write(b"2}\n\xff\n")
    assert lines.read() and lines.rows == [{"step": 1}, {"step": 2}] and lines.skipped == 1
    path.write_bytes(b'{"step": 7}\n')
    assert not lines.read() and lines.rows == [{"step": 7}] and lines.skipped == 0
    path.unlink()
    assert not lines.read() and lines.rows == []


@given(st.recursive(st.text() | st.integers(), lambda inner: st.lists(inner) | st.dictionaries(st.text(), inner)))
def test_a_block_reads_back(value):
    assert json.loads(zlib.decompress(compressed(value), 31)) == value
