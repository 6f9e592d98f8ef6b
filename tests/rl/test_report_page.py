"""The report's page in a real browser: what it draws, how it is used, and that nothing a model wrote acts in it."""

from __future__ import annotations

import contextlib
import json
import math
import threading
import time
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest

from rl.report import build_comparison, build_report
from rl.report.server import ReportServer
from rl.run_directory import RunDirectory
from tests.rl.browser import CHROMIUM, Browser
from tests.rl.report_runs import (
    ALARMS,
    ASSISTANT,
    BOS,
    USER,
    encode,
    episode,
    spans,
    step_metrics,
    trajectory,
    write_lines,
    write_run,
)

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="drives a real browser: apt-get install chromium")

PAYLOADS = (
    "</script><script>window.owned = 1</script>",
    "<img src=x onerror='window.owned = 2'>",
    "\"'><svg onload=window.owned=3>",
    "<!--<script>window.owned = 4//",
    "\u2028window.owned = 5\u2029",
    "\u202eowned\u2066\u200b\x1b]0;owned\x07",
    "{{data}} ${window.owned = 6} </style></title></textarea>",
)
HOSTILE = "".join(PAYLOADS)
RECIPE = "name: demo\nseed: 0\nobjective: {clip_low: 0.01, clip_high: 0.03}\n"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with Browser() as browser:
        browser.look(width=1280, height=900)
        yield browser


@pytest.fixture(scope="module")
def demo(tmp_path_factory) -> RunDirectory:
    return write_run(tmp_path_factory.mktemp("runs") / "demo", extras=True, recipe=RECIPE)


@pytest.fixture
def page(browser: Browser, demo: RunDirectory) -> Iterator[Browser]:
    """The demo's report, opened as a file; whatever a test does must neither raise nor ask the network for anything."""
    path, _ = build_report(demo.path)
    browser.open(path.as_uri())
    browser.wait("document.querySelectorAll('.list li').length > 0")
    yield browser
    assert browser.errors == []
    assert browser.requests == [path.as_uri()]


def texts(browser: Browser, selector: str) -> list[str]:
    return browser.run(f"[...document.querySelectorAll({json.dumps(selector)})].map((node) => node.textContent)")


def go_to(browser: Browser, tab: str) -> None:
    browser.click(f"nav a[href='#{tab}']")
    browser.wait(f"!document.getElementById('{tab}').hidden")


def test_every_metric_has_a_curve(page: Browser):
    titles = set(texts(page, ".chart h4"))
    assert {"Reward", "Held-out accuracy", "Staleness", "Time per step", "user/brevity", "Supervised loss"} <= titles
    for number in range(page.run("document.querySelectorAll('.group').length")):  # drawn when they come into sight
        group = f"document.querySelectorAll('.group')[{number}]"
        page.run(f"{group}.scrollIntoView()")
        page.wait(
            f"[...{group}.querySelectorAll('.chart')].every((chart) => chart.querySelector('path.line, path.area'))"
        )
    assert page.run("document.querySelectorAll('.chart').length") == len(texts(page, ".chart h4"))


CARDS = """Object.fromEntries([...document.querySelectorAll('.chart')].map((chart) => [
    chart.querySelector('h4').textContent,
    { group: chart.closest('.group').querySelector('h3').textContent,
      keys: [...chart.querySelectorAll('.key')].map((key) => key.textContent),
      ticks: [...chart.querySelectorAll('.tick')].filter((tick) => tick.getAttribute('text-anchor') === 'end')
          .map((tick) => [tick.textContent, tick.getBBox().x]),
      lines: [...chart.querySelectorAll('path.line')].map((line) => line.getAttribute('d')) }]))"""


def cards(browser: Browser, run: RunDirectory) -> dict[str, Any]:
    """What the charts of a run's report show, by title."""
    path, _ = build_report(run.path)
    browser.look(width=1280, height=6000)  # what is out of sight is not drawn
    try:
        browser.open(f"{path.as_uri()}#curves")
        browser.wait("[...document.querySelectorAll('.chart')].every((chart) => chart.querySelector('.tick'))")
        return browser.run(CARDS)
    finally:
        browser.look(width=1280, height=900)


def log_steps(run: RunDirectory, **columns: list[float]) -> None:
    """Rows of metrics from columns; ``__`` stands for a slash in a name."""
    for at, values in enumerate(zip(*columns.values(), strict=True), start=1):
        names = [name.replace("__", "/") for name in columns]
        run.log({"step": at, "reward/mean": 0.5} | dict(zip(names, values, strict=True)))


def test_bytes_and_large_numbers_are_readable(browser: Browser, tmp_path):
    with RunDirectory.create(tmp_path / "demo", recipe="") as run:
        large = [11_266_347.0, 11_333_323.0, 11_387_887.0]
        log_steps(run, checkpoint__bytes=large, checkpoint__seconds=[0.31, 0.1, 0.17], user__large=large)
    shown = cards(browser, run)
    assert shown["Checkpoint size"]["keys"] == ["11.4 MB"]
    assert shown["Checkpoint beside the steps"]["keys"] == ["0.17 s"]
    for title in ("Checkpoint size", "user/large"):
        labels = [label for label, _ in shown[title]["ticks"]]
        assert len(set(labels)) == len(labels) >= 2
        assert min(x for _, x in shown[title]["ticks"]) >= 0  # nothing is cut off
    assert "11.30M" in [label for label, _ in shown["user/large"]["ticks"]]


def test_only_faults_that_happened_are_shown(browser: Browser, tmp_path):
    with RunDirectory.create(tmp_path / "quiet", recipe="") as run:
        log_steps(run, faults__tools=[0.0, 0.0], faults__late=[0.0, 0.0])
    assert {card["group"] for card in cards(browser, run).values()} == {"Learning"}
    with RunDirectory.create(tmp_path / "loud", recipe="") as loud:
        log_steps(loud, faults__tools=[0.0, 2.0], faults__late=[0.0, 0.0], faults__new_one=[1.0, 0.0])
    shown = {title: card["keys"] for title, card in cards(browser, loud).items() if card["group"] == "Faults"}
    assert shown == {"Tools that failed": ["2"], "Other faults": ["new one 0"]}
    assert texts(browser, ".group .about")[0].startswith("What failed")
    path, _ = build_comparison([run.path, loud.path], tmp_path / "both.html")
    browser.open(path.as_uri())
    assert {"Tools that failed", "Other faults"} <= set(texts(browser, ".chart h4"))
    assert "Late phases" not in texts(browser, ".chart h4")
    named = "[...document.querySelectorAll('.chart')].filter((c) => c.textContent.startsWith('Tools that failed'))"
    assert browser.run(f"{named}.map((c) => c.querySelectorAll('.key')[1].textContent)") == ["loud 2"]


def test_where_nothing_was_measured_a_curve_has_a_gap(browser: Browser, tmp_path):
    with RunDirectory.create(tmp_path / "demo", recipe="") as run:
        log_steps(
            run,
            reward_share__sums__format=[0.25, 0.0, 0.5, 0.5, 0.0],
            reward_share__sums__answer=[0.75, 0.0, 0.5, 0.5, 1.0],
            speed__engines_tokens_per_s=[900.0, 0, 800.0, 700.0, 800.0],
            tokens_per_s=[500.0, 400.0, 500.0, 500.0, 500.0],
            time__other_s=[1.0, 1.0, 1.0, 1.0, 9.6e-6],
        )
    shown = cards(browser, run)
    assert [line.count("M") for line in shown["Shares of the reward"]["lines"]] == [2, 2]
    assert shown["Shares of the reward"]["keys"] == ["sums/format 0.0 %", "sums/answer 100.0 %"]
    assert [line.count("M") for line in shown["Generation speed"]["lines"]] == [1, 2]
    assert shown["Generation speed"]["keys"] == ["tokens a second 500", "engines tokens a second 800"]
    assert shown["Other times"]["keys"] == ["other 0.0096 ms"]


def test_a_run_without_a_training_step_offers_no_numbers_of_one(browser: Browser, tmp_path):
    with RunDirectory.create(tmp_path / "demo", recipe="") as run:
        run.log_supervised({"step": 1, "loss/supervised": 3.0})
    assert set(cards(browser, run)) == {"Supervised loss"}
    assert not browser.run("document.querySelector('details.numbers').checkVisibility()")


def test_a_click_on_a_curve_holds_a_step_and_the_slider_moves_it(page: Browser):
    page.click(".chart svg")
    (held,) = texts(page, ".step-bar output")
    assert held.endswith(", held")
    step = int(held.removeprefix("Step ").removesuffix(", held"))
    assert 10 <= step <= 20  # a click in the middle of 30 steps
    page.click("details.numbers summary")
    page.wait("document.querySelectorAll('.numbers th').length > 20")
    rows = dict(zip(texts(page, ".numbers th"), texts(page, ".numbers td"), strict=True))
    assert rows["sync/version"] == str(step)
    page.run("document.querySelector('.step-bar input[type=range]').focus()")
    page.call("Input.dispatchKeyEvent", type="keyDown", key="ArrowRight", windowsVirtualKeyCode=39)
    page.wait(f"document.querySelector('.step-bar output').textContent === 'Step {step + 1}, held'")
    page.type("input[aria-label='Filter curves']", "staleness")
    page.wait("[...document.querySelectorAll('.chart:not([hidden])')].filter((c) => c.offsetWidth).length < 5")
    assert "Staleness" in texts(page, ".chart:not([hidden]) h4")


def test_an_alarm_is_read_and_leads_to_its_step(page: Browser):
    assert texts(page, ".alarm summary b") == ["entropy", "mismatch"]
    assert texts(page, ".alarm .when") == ["since step 12", "steps 14 to 20, cleared"]
    marked = "[...document.querySelectorAll('.chart')].filter((chart) => chart.querySelector('.alarm-mark'))"
    page.run("document.querySelectorAll('.group')[1].scrollIntoView()")
    page.wait(f"{marked}.map((chart) => chart.querySelector('h4').textContent).join() === 'Entropy,Mismatch KL'")
    page.click(".alarm summary")
    assert texts(page, ".alarm[open] .sentence") == [ALARMS[0]["sentence"]]
    page.click(".alarm[open] .places button")
    page.wait("document.querySelector('.step-bar output').textContent === 'Step 12, held'")


def test_the_timeline_says_who_did_what_and_who_idled(page: Browser):
    go_to(page, "timeline")
    page.wait("document.querySelector('.timeline canvas').height > 100")
    page.run("[...document.querySelectorAll('.controls button')].find((b) => b.textContent === 'Whole run').click()")
    page.wait("document.querySelector('.timeline .range').textContent.startsWith('0 s')")
    assert texts(page, ".share .actor") == ["driver", "engine 0", "engine 1", "rewards", "learner"]
    head = texts(page, ".spent thead th")
    shares = {row[0]: dict(zip(head[1:], row[1:], strict=True)) for row in page.run(TABLE)}
    rows = list(spans(np.random.default_rng(), 1))  # only for the names
    assert {row["phase"] for row in rows} <= set(head)
    assert shares["learner"]["generate"] == "" and float(shares["learner"]["step"].split(" ")[0]) > 30
    total = sum(float(cell.split(" ")[0]) for cell in shares["learner"].values() if cell)
    assert total == pytest.approx(100, abs=0.3)
    lane = page.run(
        "(() => { const box = document.querySelector('.timeline canvas').getBoundingClientRect();"
        " return [box.x, box.y, box.width]; })()"
    )
    page.call("Input.dispatchMouseEvent", type="mouseMoved", x=lane[0] + 5, y=lane[1] + 36)
    page.wait("[...document.querySelectorAll('.tip')].some((tip) => tip.textContent.includes('driver: start'))")
    page.click("button[aria-label='Zoom in']")
    page.wait("!document.querySelector('.timeline .range').textContent.startsWith('0 s')")


def test_the_timeline_marks_where_the_run_went_on(browser: Browser, tmp_path):
    run = write_run(tmp_path / "demo", steps=5)
    first = list(spans(np.random.default_rng(0), 3, begin=40.0))
    ended = max(row["end"] for row in first)
    later = [row | {"begin": row["begin"] + ended + 5, "end": row["end"] + ended + 5} for row in first]
    write_lines(run.path / "timeline.jsonl", [*first, *later])
    path, _ = build_report(run.path)
    browser.open(f"{path.as_uri()}#timeline")
    browser.wait("document.querySelector('.timeline canvas')?.height > 100")
    browser.run("[...document.querySelectorAll('.controls button')].find((b) => b.textContent === 'Whole run').click()")
    browser.wait("document.querySelector('.timeline .range').textContent.startsWith('0 s')")
    assert texts(browser, ".timeline .legend .key")[-1] == "resumed"
    assert marked_share(browser) == pytest.approx(ended / later[-1]["end"], abs=0.01)
    other = write_run(tmp_path / "other", extras=True)
    path, _ = build_report(other.path)
    browser.open(f"{path.as_uri()}#timeline")
    browser.wait("document.querySelector('.timeline canvas')?.height > 100")
    assert "resumed" not in texts(browser, ".timeline .legend .key")


def marked_share(browser: Browser) -> float:
    """Where in the timeline the line of an interruption is, as a share of its width."""
    return browser.run(
        """(() => {
        const canvas = document.querySelector('.timeline canvas');
        const probe = document.createElement('i');
        probe.style.color = 'var(--bad)';
        document.body.append(probe);
        const wanted = getComputedStyle(probe).color.match(/\\d+/g).map(Number);
        probe.remove();
        const row = canvas.getContext('2d').getImageData(0, canvas.height - 2, canvas.width, 1).data;
        for (let x = 0; x < canvas.width; x += 1) {
            if (wanted.every((value, i) => row[4 * x + i] === value)) return x / canvas.width;
        }
        return null;
    })()"""
    )


TABLE = """[...document.querySelectorAll('.spent tbody tr')].map((row) => [...row.children].map((cell) =>
    cell.firstChild?.textContent ?? ''))"""


def test_the_reader_filters_orders_and_searches(page: Browser):
    go_to(page, "trajectories")
    assert texts(page, ".count") == ["36 of 36 trajectories"]
    page.choose("select[aria-label=domain]", "coding")
    assert texts(page, ".count") == ["12 of 36 trajectories"]
    page.choose("select[aria-label=flag]", "masked")
    assert texts(page, ".count") == ["6 of 36 trajectories"]
    page.type("input[aria-label='reward from']", "0.5")
    assert texts(page, ".count") == ["0 of 36 trajectories"]
    assert texts(page, ".pane") == ["No trajectory matches these filters."]
    page.run("[...document.querySelectorAll('.filters button')].find((b) => b.textContent === 'Clear').click()")
    assert texts(page, ".count") == ["36 of 36 trajectories"]
    assert texts(page, ".item-step")[0] == "step 30" and texts(page, ".item-step")[-1] == "step 5"
    page.choose("select[aria-label=order]", "step")
    assert texts(page, ".item-step")[0] == "step 5" and texts(page, ".item-step")[-1] == "step 30"
    page.type("input[type=search][placeholder='Search the text']", "SLICE skipped")
    page.wait("document.querySelector('.count').textContent === '12 of 36 trajectories'")
    page.wait("CSS.highlights.get('found')?.size > 0")
    found = page.run("[...CSS.highlights.get('found')].map((range) => range.toString().toLowerCase())")
    assert set(found) == {"slice", "skipped"}


def test_the_reader_opens_on_training_and_marks_evaluation(browser: Browser, tmp_path):
    rng = np.random.default_rng(0)
    run = write_run(tmp_path / "demo", steps=5, sample_every=5, end=False)
    run.log_samples(0, [trajectory(rng, 0, index, log_ratios=None) for index in range(2)])
    path, _ = build_report(run.path)
    browser.open(f"{path.as_uri()}#trajectories")
    browser.wait("document.querySelectorAll('.list li').length === 6")
    browser.wait("document.querySelector('.pane .facts-row')?.textContent.includes('step5')")
    assert [text.startswith("evaluation") for text in texts(browser, ".list .snippet")] == [False] * 4 + [True] * 2
    browser.click(".list li:last-child button")
    browser.wait("document.querySelector('.pane .facts-row')?.textContent.includes('step0')")
    assert "advantage–" in texts(browser, ".pane .facts-row")[0]
    assert "evaluation" in texts(browser, ".pane h3 .pill")
    browser.choose("select[aria-label=flag]", "evaluation")
    assert texts(browser, ".count") == ["2 of 6 trajectories"]


def test_a_served_evaluation_gives_way_to_training(browser: Browser, tmp_path):
    rng = np.random.default_rng(0)
    run = RunDirectory.create(tmp_path / "demo", recipe="")
    run.log({"step": 0, "eval/sums": 0.4})
    run.log_samples(0, [trajectory(rng, 0, 0, log_ratios=None)])
    facts = "document.querySelector('.pane .facts-row')?.textContent"
    with served(run) as url:
        browser.open(f"{url}#trajectories")
        browser.wait(f"{facts}?.includes('step0')")
        run.log(step_metrics(rng, 1, 5))
        run.log_samples(1, [trajectory(rng, 1, 0)])
        browser.wait(f"{facts}?.includes('step1')")
        run.log(step_metrics(rng, 2, 5))
        run.log_samples(2, [trajectory(rng, 2, 0)])
        browser.wait("document.querySelectorAll('.list li').length === 3")
        assert "step1" in browser.run(facts)  # somebody may be reading it
        run.finish()


def clipped(run: RunDirectory, name: str, low: float) -> int:
    """Tokens of a trajectory with negative advantage whose ratio is below 1 - low."""
    records = map(json.loads, (run.samples / "step_30.jsonl").read_text().splitlines())
    record = next(record for record in records if record["id"] == name)
    assert record["advantage"] < 0
    ratios = [ratio for one in (*record["earlier"], record) for ratio in one["log_ratios"]]
    return sum(math.exp(ratio) < 1 - low for ratio in ratios)


def test_an_episode_reads_as_a_conversation(page: Browser, demo: RunDirectory):
    go_to(page, "trajectories")
    page.choose("select[aria-label=domain]", "coding")
    page.wait("document.querySelectorAll('.turn-head').length === 4")
    parts = page.run("[...document.querySelectorAll('.pane > .message, .pane > .restart, .pane > .malformed')].map("
                     "(node) => [node.className, node.textContent])")  # fmt: skip
    kinds = [name.replace("message ", "").strip() for name, _ in parts]
    assert kinds == [
        *("given system", "given"),
        *("thinking", "calls", "result"),
        *("thinking", "calls", "malformed", "result failed", "restart"),
        *("thinking", "calls", "result failed"),
        *("thinking", "reply"),
    ]
    assert "search(pattern=total_pages, path=.)" in parts[4][1] and "shelf.py:3" in parts[4][1]
    assert parts[-1][1].endswith("The slice skipped the first book; it is gone.<｜end▁of▁sentence｜>")
    assert texts(page, ".comment") == ["rubric saysMended, but untested."]
    assert "masked as off-policy" in texts(page, ".pane h3 .pill")
    page.hover(".message.thinking .token.warm, .message.thinking .token.cool")
    page.wait("[...document.querySelectorAll('.tip')].some((tip) => tip.textContent.includes('learner − rollout'))")
    page.choose("select[aria-label=colour]", "routed")
    page.wait("document.querySelector('.scale')?.textContent.includes('routed live')")
    page.choose("select[aria-label=colour]", "clipped")
    page.wait(
        "document.querySelector('.scale')?.textContent === 'learned fromgradient cut off, ratio beyond 0.99 to 1.03'"
    )
    ratios = "[...document.querySelectorAll('.stream .token.warm')].length"
    assert page.run(ratios) == clipped(demo, "coding/30#0", 0.01)
    page.click(".siblings .chip:last-child")
    page.wait("location.hash.includes('coding')")


def test_a_link_opens_the_trajectory_it_names(page: Browser):
    go_to(page, "trajectories")
    page.click(".list li:nth-child(8) button")
    page.wait("location.hash.startsWith('#trajectories/0/')")
    # The address comes first, and the pane when the trajectory is unpacked.
    named = "decodeURIComponent(location.hash.split('/')[3])"
    page.wait(f"document.querySelector('.pane h3')?.textContent.startsWith({named})")
    address, title = page.run("location.href"), texts(page, ".pane h3")
    page.call("Page.navigate", url="about:blank")
    page.requests.clear()
    page.open(address)
    page.wait(f"document.querySelector('.pane h3')?.textContent === {json.dumps(title[0])}")
    page.requests[:] = [address.partition("#")[0]]


def test_nothing_a_model_wrote_acts(browser: Browser, tmp_path):
    rng = np.random.default_rng(0)
    with RunDirectory.create(tmp_path / "demo", recipe=f"system: {HOSTILE}\n") as run:
        run.log({"step": 1, "reward/mean": 0.5, f"reward/sums/{HOSTILE}": 0.5})
        texts = [HOSTILE] * (len(encode(f"{BOS}{USER}{HOSTILE}{ASSISTANT}<think>so")))
        said = trajectory(rng, 1, 0, text="so", prompt=HOSTILE, comment=HOSTILE, token_texts=texts)
        run.log_samples(1, [said, episode(rng, 1, 0, result=HOSTILE, comment=HOSTILE)])
        write_lines(run.path / "alarms.jsonl", [ALARMS[0] | {"sentence": HOSTILE, "alarm": HOSTILE, "step": 1}])
        write_lines(run.path / "timeline.jsonl", [row | {"detail": HOSTILE, "actor": HOSTILE} for row in spans(rng, 1)])
    path, _ = build_report(run.path)
    browser.open(f"{path.as_uri()}#trajectories")
    for item in (1, 2):
        browser.wait("document.querySelectorAll('.list li').length === 2")
        browser.click(f".list li:nth-child({item}) button")
        browser.wait("document.querySelector('.comment')?.textContent.includes('window.owned')")
        browser.run("document.querySelectorAll('details').forEach((details) => (details.open = true))")
        browser.hover(".pane .stream .token")
        browser.wait("[...document.querySelectorAll('.tip')].some((tip) => !tip.hidden)")
        assert_inert(browser)
        assert "⟨U+202E⟩owned⟨U+2066⟩⟨U+200B⟩⟨U+001B⟩]0;owned⟨U+0007⟩" in browser.run("document.body.innerText")
    for tab in ("curves", "timeline", "recipe"):
        go_to(browser, tab)
        assert_inert(browser)
    assert browser.errors == [] and browser.requests == [f"{path.as_uri()}"]


def assert_inert(browser: Browser) -> None:
    time.sleep(0.1)  # what would act, acts soon
    assert browser.run("window.owned") is None
    assert browser.run("document.title") == "demo · Keel run report"
    assert browser.run("document.querySelectorAll('img, iframe, object, embed, form:not(.filters)').length") == 0
    assert browser.run("document.querySelectorAll('svg').length === document.querySelectorAll('.chart svg').length")
    acting = """(() => {
        const body = document.body.cloneNode(true);
        body.querySelectorAll('script').forEach((node) => node.remove());
        return /[\\u0000-\\u0008\\u001b\\u200b\\u2028-\\u202e\\u2066-\\u2069]/.test(body.innerHTML);
    })()"""
    assert browser.run(acting) is False


def test_runs_are_compared_curve_by_curve(browser: Browser, demo: RunDirectory, tmp_path):
    other = write_run(tmp_path / "other", steps=20, seed=1, recipe=RECIPE.replace("seed: 0", "seed: 1"))
    path, _ = build_comparison([demo.path, other.path], tmp_path / "both.html")
    browser.open(path.as_uri())
    browser.wait("document.querySelectorAll('.list li').length > 0")
    assert texts(browser, ".runs thead th") == ["", "demo", "other"]
    reward = "[...document.querySelectorAll('.chart')].find((c) => c.querySelector('h4').textContent === 'Reward')"
    assert browser.run(f"{reward}.querySelectorAll('.legend .key').length") == 2
    assert browser.run(f"{reward}.querySelectorAll('path.line:not(.raw)').length") == 2
    title = "[...document.querySelectorAll('.chart h4')].find((h) => h.textContent === 'reward/sums/length_penalty')"
    assert browser.run(f"[...{title}.childNodes].map((node) => node.textContent || '-').join('')") == (
        "reward/-sums/-length_-penalty"  # where it may be broken
    )
    go_to(browser, "recipe")
    assert texts(browser, ".differences tbody th") == ["seed"]
    assert texts(browser, ".differences tbody td") == ["0", "1"]
    go_to(browser, "trajectories")
    assert texts(browser, ".count") == ["52 of 52 trajectories"]
    browser.choose("select[aria-label=run]", "1")
    assert texts(browser, ".count") == ["16 of 52 trajectories"]
    assert browser.errors == []


@contextlib.contextmanager
def served(*runs: RunDirectory) -> Iterator[str]:
    with ReportServer([run.path for run in runs], port=0) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        try:
            yield server.url
        finally:
            server.shutdown()
            thread.join()


def test_a_served_page_follows_the_run(browser: Browser, tmp_path):
    rng = np.random.default_rng(0)
    run = write_run(tmp_path / "demo", steps=5, end=False)
    with served(run) as url:
        browser.open(url)
        browser.wait("document.querySelectorAll('.list li').length === 4")
        assert texts(browser, ".standing .pill") == ["running"]
        browser.wait("document.querySelector('.step-bar output').textContent === 'Latest, step 5'")
        browser.run("document.querySelector('.chart').marked = true")
        write_lines(run.path / "timeline.jsonl", spans(rng, 6))
        write_lines(run.path / "alarms.jsonl", [ALARMS[0]])
        run.log(step_metrics(rng, 6, 30) | {"eval/sums": 0.9})
        run.log_samples(6, [trajectory(rng, 6, 0, text="news</think>9")])
        browser.wait("document.querySelector('.step-bar output').textContent === 'Latest, step 6'")
        browser.wait("document.querySelectorAll('.list li').length === 5")
        assert browser.run("document.querySelector('.chart').marked")  # it was not built again
        assert texts(browser, ".alarm summary b") == ["entropy"]
        assert "41.2% → 90.0%+48.8 points, step 0 to 6" in texts(browser, ".tile dd")
        go_to(browser, "timeline")
        browser.wait("document.querySelectorAll('.share .actor').length === 5")
        go_to(browser, "trajectories")
        browser.type("input[type=search][placeholder='Search the text']", "news")
        browser.wait("document.querySelector('.count').textContent === '1 of 5 trajectories'")
        run.finish()
        browser.wait("document.querySelector('.standing .pill').textContent === 'finished'")
        assert all(request.startswith(url) for request in browser.requests)
        assert browser.errors == []


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [1280, 400])
def test_no_view_is_wider_than_the_window(browser: Browser, demo: RunDirectory, width, dark):
    path, _ = build_report(demo.path)
    browser.look(width=width, height=900, dark=dark)
    try:
        for tab in ("curves", "timeline", "trajectories", "recipe"):
            browser.open(f"{path.as_uri()}#{tab}")
            browser.wait("document.querySelectorAll('.list li').length > 0")
            assert browser.run("document.documentElement.scrollWidth") <= width
            light = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(250, 250, 248)"
            assert light is not dark
    finally:
        browser.look(width=1280, height=900)
