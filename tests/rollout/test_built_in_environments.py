"""The environments that ship, with real kernels, real Git and a real MCP server."""

from __future__ import annotations

import asyncio
import json
import math
import socket
import subprocess
import sys
import time
from pathlib import Path

import bm25s
import pytest

from rewards.sandbox import Sandbox
from rewards.test_suite import TestSuite
from rl.config import EnvironmentUse
from rl.errors import DataError, RecipeError
from rl.import_tasks import main as import_tasks
from rl.records import read_records
from rl.sample import Prompt, ToolCall, ToolResult
from rollout.environments.protocol import EnvironmentFailed
from rollout.environments.protocol import answer as answered
from rollout.environments.registry import resolve
from rollout.environments.search import load_corpus
from rollout.environments.tasks import judge
from rollout.environments.worker import EnvironmentPool
from tests.rl.tiny_runs import make_sample

ROOT = Path(__file__).parents[2]
ASK = ({"role": "user", "content": "Q"},)


def call(name: str, /, **arguments) -> ToolCall:
    return ToolCall(name=name, arguments=arguments)


def talk(use: str, *calls: ToolCall, answer=None, **args) -> tuple[list[ToolResult], object]:
    """The results of the calls, one after another, and the final state."""

    async def run():
        pool = EnvironmentPool(EnvironmentUse(use=use, args=args), sandbox=Sandbox())
        try:
            async with pool.open(Prompt(id="p", domain="d", messages=ASK, answer=answer)) as environment:
                await environment.start()
                results = [await answered(environment, one) for one in calls]
                state = environment.final_state()
                return results, await state if asyncio.iscoroutine(state) else state
        finally:
            await pool.close()

    return asyncio.run(asyncio.wait_for(run(), 240))


# --- code_interpreter -----------------------------------------------------------------------------------------------


def test_cells_share_a_session_and_show_what_a_notebook_shows(tmp_path):
    (tmp_path / "data.csv").write_text("1\n2\n")
    results, state = talk(
        "code_interpreter",
        call("python", code="x = 40\nprint('hi')\nx + 2"),
        call("python", code="x += 1"),
        call("python", code="import os; os.system('echo from a child'); open('data.csv').read() + str(x)"),
        call("python", code="1/0"),
        call("python", code="print('y' * 50_000)"),
        files=str(tmp_path),
    )
    assert results[0] == ToolResult(text="hi\n42")
    assert results[1] == ToolResult(text="(no output)")
    assert results[2].text.splitlines() == ["from a child", "'1\\n2\\n41'"]
    assert (
        results[3].failed and "ZeroDivisionError: division by zero" in results[3].text and "\x1b" not in results[3].text
    )
    assert "output cut" in results[4].text and len(results[4].text) < 13_000
    assert state == {"cells": 5}


def test_a_cell_that_runs_too_long_is_interrupted_and_the_session_goes_on():
    results, _ = talk(
        "code_interpreter",
        call("python", code="x = 7"),
        call("python", code="print('before')\nwhile True: pass"),
        call("python", code="x"),
        timeout_s=1.0,
    )
    assert results[1].failed and results[1].text.startswith("before") and "interrupted after 1 s" in results[1].text
    assert results[2].text == "7"


def test_a_cell_that_ends_its_session_says_so_and_a_fresh_one_begins():
    results, _ = talk(
        "code_interpreter",
        call("python", code="x = 7; open('kept.txt', 'w').write('kept')"),
        call("python", code="import os; os._exit(1)"),
        call("python", code="print(open('kept.txt').read()); x"),
    )
    assert results[1].failed and "variables are lost, files are kept" in results[1].text
    assert results[2].failed and results[2].text.startswith("kept") and "NameError" in results[2].text


def test_a_session_is_in_the_sandbox():
    (result,), _ = talk(
        "code_interpreter",
        call("python", code=f"import os\nprint(os.path.exists({str(ROOT / 'rl')!r}), 'RAY_ADDRESS' in os.environ)\n"
             "import socket\nsocket.create_connection(('1.1.1.1', 53), timeout=2)"),
    )  # fmt: skip
    assert result.failed and result.text.startswith("False False")


# --- search ---------------------------------------------------------------------------------------------------------


def test_search_open_and_find_over_the_corpus_that_ships():
    results, state = talk(
        "search",
        call("search", query="lighthouse designed by an engineer"),
        call("open", id="venn-reef"),
        call("find", id="venn-reef", text="NEEDLE"),
        call("find", id="venn-reef", text="submarine"),
        call("open", id="venn-reef", page=2),
        call("open", id="atlantis"),
        call("search", query="zzzz qqqq"),
        call("search", query=" "),
    )
    found = json.loads(results[0].text)
    assert "venn-reef" in [one["id"] for one in found] and len(found) <= 5
    assert results[1].text.startswith("Venn Reef (page 1 of 1)\n\nVenn Reef stretches")
    assert results[2].text.startswith("1 places\n- ...") and "the Needle" in results[2].text
    assert results[3] == ToolResult(text="'submarine' does not occur in document venn-reef")
    assert [one.failed for one in results[4:]] == [True, True, False, True]
    assert results[6].text == "[]"
    assert state == {"searches": 2, "opened": ["venn-reef"]}


def test_ranking_is_bm25s_by_hand():
    """Scores of the variant that bm25s calls Lucene, written out."""
    corpus = load_corpus(str(ROOT / "recipes/data/archipelago.jsonl"))
    query = "clock lighthouse tarn"
    texts = [f"{one.title}\n{one.text}" for one in corpus.documents]
    words = [[str(word) for word in line] for line in bm25s.tokenize(texts, return_ids=False, show_progress=False)]
    mean = sum(map(len, words)) / len(words)
    scores = []
    for own in words:
        score = 0.0
        for word in query.split():
            df = sum(word in other for other in words)
            tf = own.count(word)
            if df:
                idf = math.log(1 + (len(words) - df + 0.5) / (df + 0.5))
                score += idf * tf / (tf + 1.5 * (1 - 0.75 + 0.75 * len(own) / mean))
        scores.append(score)
    order = sorted(range(len(words)), key=lambda i: -scores[i])[:5]
    expected = [corpus.documents[i].id for i in order if scores[i] > 0]
    assert [one.id for one in corpus.best(query, 5)] == expected


def test_every_question_of_the_corpus_can_be_answered_from_it():
    corpus = load_corpus(str(ROOT / "recipes/data/archipelago.jsonl"))
    assert len(read_records(ROOT / "recipes/data/archipelago_questions.jsonl")) == 20
    assert len(corpus.documents) == 30 and len(corpus.places) == 30


def test_ones_own_corpus_is_checked(tmp_path):
    path = tmp_path / "corpus.jsonl"
    path.write_text('{"id": "a", "text": "x"}\n{"id": "a", "text": "y"}\n')
    with pytest.raises(DataError, match="line 2: id 'a' is taken already"):
        resolve("search", {"corpus": str(path)})
    path.write_text(
        "".join(json.dumps({"id": n, "title": f"T{n}", "text": f"word{n} " * 900}) + "\n" for n in range(3))
    )
    results, _ = talk("search", call("search", query="word1"), call("open", id="1", page=2), corpus=str(path))
    assert [one["id"] for one in json.loads(results[0].text)] == ["1"]
    assert results[1].text.startswith("T1 (page 2 of 2)")


# --- tools ----------------------------------------------------------------------------------------------------------


def test_a_toolset_over_a_database():
    results, state = talk(
        "tools",
        call("list_items"),
        call("price", name="plum"),
        call("buy", name="fig", count=2),
        call("buy", name="fig", count=2),
        call("submit_result", result={"best": "fig"}),
        call("price", database="x", name="fig"),
        call("nothing"),
        toolset="tests.rollout.shop",
        state_tables=["items"],
        answer={"seed": 5},
    )
    assert results[0].text == '["apple", "fig", "pear"]'
    assert results[1] == ToolResult(text="error: there is no plum", failed=True)
    assert results[2].text == "bought"
    assert results[3] == ToolResult(text="error: not enough in stock", failed=True)
    assert results[4].text == "submitted"
    assert "has no parameter 'database'" in results[5].text and "there is no tool 'nothing'" in results[6].text
    assert isinstance(state, dict) and state["submitted"] and state["result"] == {"best": "fig"}
    stock = {name: left for name, _, left in state["tables"]["items"]}
    assert stock == {"apple": 3, "pear": 3, "fig": 1}  # the failed purchase was undone
    _, other = talk("tools", toolset="tests.rollout.shop", state_tables=["items"], answer={"seed": 6})
    assert isinstance(other, dict) and other["tables"] != state["tables"] and not other["submitted"]


def test_an_endless_query_is_stopped():
    results, _ = talk("tools", call("ponder"), call("list_items"), toolset="tests.rollout.shop")
    assert results[0] == ToolResult(text="error: ponder took too long", failed=True)
    assert not results[1].failed


@pytest.mark.parametrize(
    ("args", "complaint"),
    [
        ({"toolset": "tests.rollout.nothing"}, "cannot be imported"),
        ({"toolset": "tests.rollout.plugged"}, "has no SCHEMA"),
        ({"toolset": "tests.rollout.shop", "state_tables": ["orders"]}, "no such table: orders"),
        ({}, "needs the argument 'toolset'"),
    ],
)
def test_toolsets_that_cannot_be_are_refused(args, complaint):
    with pytest.raises(RecipeError, match=complaint):
        resolve("tools", args)


# --- repository -----------------------------------------------------------------------------------------------------

TEST = "from shelf import total\n\n\ndef test_empty():\n    assert total([]) == 0\n"
TEST_PATCH = """\
diff --git a/test_shelf.py b/test_shelf.py
--- a/test_shelf.py
+++ b/test_shelf.py
@@ -3,3 +3,7 @@

 def test_empty():
     assert total([]) == 0
+
+
+def test_total():
+    assert total([2, 3]) == 5
"""
FIX = """\
diff --git a/shelf.py b/shelf.py
--- a/shelf.py
+++ b/shelf.py
@@ -1,2 +1,2 @@
 def total(numbers):
-    return 0
+    return sum(numbers)
"""


def git(place: Path, *arguments: str) -> str:
    command = ["git", "-c", "user.name=a", "-c", "user.email=a@b", "-C", str(place), *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


@pytest.fixture(scope="module")
def task(tmp_path_factory) -> dict:
    place = tmp_path_factory.mktemp("repository")
    git(place, "init", "-q", ".")
    (place / "shelf.py").write_text("def total(numbers):\n    return 0\n")
    (place / "test_shelf.py").write_text(TEST)
    git(place, "add", "-A")
    git(place, "commit", "-q", "-m", "begins")
    commit = git(place, "rev-parse", "HEAD")
    (place / "shelf.py").write_text("def total(numbers):\n    return sum(numbers)\n")
    git(place, "commit", "-q", "-am", "solved")
    return {"repository": str(place), "commit": commit, "issue": "total is 0", "patch": FIX, "test_patch": TEST_PATCH}


def test_tasks_are_imported_by_the_accept_rule(task, tmp_path, capsys):
    rows = [
        {**task, "id": "good"},
        {**task, "id": "useless", "patch": FIX.replace("sum(numbers)", "0 * len(numbers)")},
        {**task, "id": "breaks", "patch": FIX.replace("sum(numbers)", "sum(numbers) or 1 // len(numbers)")},
        {**task, "id": "stale", "patch": FIX.replace("return 0", "return 1")},
    ]
    source, target = tmp_path / "issues.jsonl", tmp_path / "tasks.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert import_tasks([str(source), str(target)]) == 0
    (accepted,) = [record.fields for record in read_records(target)]
    assert accepted["id"] == "good" and accepted["prompt"].endswith("total is 0")
    assert accepted["answer"]["fail_to_pass"] == ["test_shelf::test_total"]
    assert accepted["answer"]["pass_to_pass"] == ["test_shelf::test_empty"]
    said = capsys.readouterr().out
    assert "line 2: refused, the fix makes no failing test pass" in said
    assert "line 3: refused, the fix breaks test_shelf::test_empty" in said
    assert "line 4: refused, the fix does not apply" in said


def test_the_accept_rule():
    assert judge({"a": "failed", "b": "passed"}, {"a": "passed", "b": "passed", "c": "passed"}).fail_to_pass == (
        "a",
        "c",
    )
    assert judge({"b": "passed"}, {"a": "passed"}).refusal == "the fix breaks b"
    assert "without the fix" in judge(None, {}).refusal


def test_a_checkout_is_edited_in_the_sandbox_and_judged_by_its_tests(task):
    answer = {**task, "fail_to_pass": ["test_shelf::test_total"], "pass_to_pass": ["test_shelf::test_empty"]}
    results, state = talk(
        "repository",
        call("bash", command="git log --oneline | wc -l; cat shelf.py"),
        call("edit", path="shelf.py", old="return 0", new="return sum(numbers)"),
        call("edit", path="shelf.py", old="nowhere", new="x"),
        call("edit", path="../../escape.py", old="", new="x"),
        call("edit", path="notes/new.txt", old="", new="x\n"),
        call("bash", command="echo 'def test_total(): pass' > test_shelf.py; false"),
        answer=answer,
    )
    assert results[0].text == "1\ndef total(numbers):\n    return 0"  # no history that would give the solution away
    assert results[1].text == "edited shelf.py"
    assert results[2].text == "error: the text to replace occurs 0 times in shelf.py; it must occur exactly once"
    assert results[3].failed and "must be relative" in results[3].text
    assert results[4].text == "made notes/new.txt" and results[5].text == "(exit status 1)"
    assert isinstance(state, dict)
    # The tests that judge are the task's, whatever the policy made of them.
    assert state["tests"] == {"test_shelf::test_empty": "passed", "test_shelf::test_total": "passed"}
    assert "+    return sum(numbers)" in state["patch"]
    sample = make_sample(Prompt(id="p", domain="d", messages=ASK, answer=answer), 0, final_state=state)
    assert TestSuite()(sample).value == 1.0


def score(answer: dict, *commands: str) -> tuple[float, dict]:
    """The reward and the final state after these commands of the shell."""
    _, state = talk("repository", *(call("bash", command=command) for command in commands), answer=answer)
    assert isinstance(state, dict)
    sample = make_sample(Prompt(id="p", domain="d", messages=ASK, answer=answer), 0, final_state=state)
    return TestSuite()(sample).value, state


def test_a_policy_may_commit_and_write_tests_of_its_own(task):
    answer = {**task, "fail_to_pass": ["test_shelf::test_total"], "pass_to_pass": ["test_shelf::test_empty"]}
    value, state = score(
        answer,
        "echo 'from sums import total' > shelf.py && echo 'total = sum' > sums.py",
        "sed -i 's/== 0/== 0.0/' test_shelf.py && echo 'def test_more(): pass' > test_more.py",
        "git add -A && git -c user.name=p -c user.email=p@q commit -qm 'solved' && rm -rf .git/refs",
    )
    assert value == 1.0
    assert state["set_back"] == ["test_more.py", "test_shelf.py"]
    assert all(
        line in state["patch"] for line in ("+total = sum", "+from sums import total", "+    assert total([]) == 0.0")
    )
    assert "test_shelf::test_more" not in state["tests"]


PASSES = """\
import pytest

@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport():
    report = yield
    report.outcome = "passed"
    return report
"""
FORGES = """\
import os, sys
cases = "".join(f'<testcase classname="test_shelf" name="{name}"/>' for name in ("test_empty", "test_total"))
path = next(one.partition("=")[2] for one in sys.orig_argv if one.startswith("--junitxml"))
open(path, "w").write(f"<testsuite>{cases}</testsuite>")
os._exit(0)
"""
ATTACKS = {
    "conftest.py": PASSES,
    "pytest.ini": "[pytest]\naddopts = -p cheat\n",
    "cheat.py": PASSES,
    "evil-1.dist-info/entry_points.txt": "[pytest11]\ncheat = cheat\n",
    "evil-1.dist-info/METADATA": "Name: evil\nVersion: 1\n",
    "pyproject.toml": "[tool.pytest.ini_options]\naddopts = '-p cheat'\n",
    "sitecustomize.py": FORGES,
    "pytest/__init__.py": "",
    "pytest/__main__.py": FORGES,
    "xml.py": FORGES,
    "_pytest.py": FORGES,
    "test_shelf.py/__init__.py": "def test_empty(): pass\ndef test_total(): pass\n",
    "../.local/lib/python3/site-packages/usercustomize.py": FORGES,
    "../conftest.py": PASSES,
}


def test_a_policy_cannot_change_what_judges_it(task):
    """Most of these alone make every test pass where they are believed; cheat.py is what others of them name."""
    answer = {**task, "fail_to_pass": ["test_shelf::test_total"], "pass_to_pass": ["test_shelf::test_empty"]}
    write = "import json, pathlib, sys\nfor name, text in json.load(sys.stdin).items():\n"
    write += (
        "    path = pathlib.Path(name)\n    path.parent.mkdir(parents=True, exist_ok=True)\n    path.write_text(text)\n"
    )
    value, state = score(
        answer,
        f"rm test_shelf.py && python3 -c '{write}' <<'END'\n{json.dumps(ATTACKS)}\nEND",
        "git add -A && git -c user.name=p -c user.email=p@q commit -qm 'all is well'",
        "printf '#!/bin/sh\\nrm -f test_shelf.py' > .git/hooks/post-checkout && chmod +x .git/hooks/post-checkout",
        "git config --global core.hooksPath /box/repository/.git/hooks && git config filter.x.smudge true",
        "python3 -m compileall -q shelf.py && sed -i 's/0/1/' shelf.py && git config core.worktree /tmp",
    )
    assert state["tests"] == {"test_shelf::test_empty": "failed", "test_shelf::test_total": "failed"} and value == 0.0
    inside = {name for name in ATTACKS if not name.startswith("../")} - {"cheat.py"}
    assert {name for name in state["set_back"] if "__pycache__" not in name} == {*inside, "test_shelf.py"}


def test_a_policy_that_destroys_its_checkout_has_solved_nothing(task):
    answer = {**task, "fail_to_pass": ["test_shelf::test_total"]}
    value, state = score(answer, "cd .. && rm -rf repository && ln -s /usr repository")
    assert value == 0.0 and "tests" not in state


def test_an_unsolved_checkout_fails_its_tests(task):
    answer = {**task, "fail_to_pass": ["test_shelf::test_total"]}
    _, state = talk("repository", answer=answer)
    assert isinstance(state, dict) and state["tests"]["test_shelf::test_total"] == "failed"
    with pytest.raises(EnvironmentFailed, match="needs 'commit' in its answer"):
        talk("repository", answer={"repository": "x"})
    with pytest.raises(DataError, match="git cannot get commit 0000"):
        talk("repository", answer={**task, "commit": "0" * 40})


# --- mcp ------------------------------------------------------------------------------------------------------------


def test_the_tools_of_an_mcp_server():
    results, state = talk(
        "mcp",
        call("put", title="Emma"),
        call("put", title="Dune"),
        call("put"),
        call("fail"),
        call("nothing"),
        call("sleep"),
        command=sys.executable,
        arguments=["-m", "tests.rollout.mcp_server"],
        timeout_s=2.0,
    )
    assert [one.text for one in results[:2]] == ["1 books", "2 books"]  # one server, with its state, for the episode
    assert [one.failed for one in results] == [False, False, True, True, True, True]
    assert "Error executing tool fail" in results[3].text and "no answer within 2 s" in results[5].text
    assert state == {"calls": 5}


def test_an_mcp_server_that_runs_already_is_shared_by_episodes():
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "-m", "tests.rollout.mcp_server", str(port)], cwd=ROOT)
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                socket.create_connection(("127.0.0.1", port), timeout=1).close()
                break
            except OSError:
                assert server.poll() is None and time.monotonic() < deadline
                time.sleep(0.1)
        url = f"http://127.0.0.1:{port}/mcp"
        (first,), _ = talk("mcp", call("put", title="Emma"), url=url, only=["put"])
        results, state = talk("mcp", call("put", title="Dune"), call("fail"), call("die"), url=url, timeout_s=5.0)
    finally:
        server.kill()
        server.wait()
    assert [first.text, results[0].text] == ["1 books", "2 books"]
    assert results[1].failed and "Error executing tool fail" in results[1].text
    assert results[2].failed and state == {"calls": 3}


def test_mcp_servers_that_cannot_be():
    with pytest.raises(RecipeError, match="either the command of a server or the url"):
        resolve("mcp", {})
    with pytest.raises(RecipeError, match="there is no program 'nonesuch'"):
        resolve("mcp", {"command": "nonesuch"})
    with pytest.raises(EnvironmentFailed, match="no session with the MCP server"):
        talk("mcp", command=sys.executable, arguments=["-c", "pass"])
    with pytest.raises(EnvironmentFailed, match="the server has no tool take"):
        talk("mcp", command=sys.executable, arguments=["-m", "tests.rollout.mcp_server"], only=["put", "take"])
