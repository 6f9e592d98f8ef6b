"""The frame of `python -m kernels.bench`, with cases that need no GPU."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from kernels import bench
from kernels.bench import Case, Setup


def make_case(name: str = "add.forward") -> Case:
    x = torch.arange(4.0)

    def broken() -> torch.Tensor:
        raise RuntimeError("no image for this GPU\nmore")

    return Case(
        name=name,
        shape="N=4",
        build=lambda: Setup(
            ours=lambda: x + 1,
            peers={"off by a tenth": lambda: (x + 1) * 1.1, "broken": broken},
            exact=lambda: x.double() + 1,
            flops=4,
            bytes=32,
        ),
    )


def test_a_failing_peer_hides_nothing() -> None:
    row = bench.measure(make_case())
    assert set(row.timings) == {"ours", "off by a tenth"}
    assert row.timings["ours"].error == 0.0
    assert row.timings["off by a tenth"].error == pytest.approx(0.1)
    assert row.failures == {"broken": "RuntimeError: no image for this GPU"}
    assert row.ratio("off by a tenth") == pytest.approx(row.timings["off by a tenth"].ms / row.timings["ours"].ms)
    assert row.ratio("broken") is None
    text = bench.describe(row)
    assert "add.forward  N=4" in text and "x ours" in text and "no image for this GPU" in text


def test_a_case_that_cannot_be_built_is_reported() -> None:
    def build() -> Setup:
        raise MemoryError("too large")

    row = bench.measure(Case(name="big.forward", shape="N=1e9", build=build))
    assert row.failures == {"setup": "MemoryError: too large"} and not row.timings


def test_relative_error_takes_the_worst_output_and_shows_nan() -> None:
    good, bad = torch.ones(3), torch.full((3,), 1.5)
    assert bench.relative_error([good, bad], [good, good]) == pytest.approx(0.5)
    assert math.isnan(bench.relative_error([good, torch.tensor([1.0, math.nan, 1.0])], [good, good]))
    assert bench.relative_error([torch.zeros(2)], [torch.zeros(2)]) == 0.0


def test_cases_are_found_by_the_beginning_of_their_names(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    slow = replace(make_case("tiles.add"), on_request=True)
    monkeypatch.setattr(bench, "all_cases", lambda: [make_case(), make_case("mul.forward"), slow])
    assert bench.main(["--list"]) == 0
    assert "tiles" not in capsys.readouterr().out
    assert bench.main(["tiles", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["tiles.add", "N=4"]
    assert bench.main(["mul", "--list"]) == 0
    assert capsys.readouterr().out.split() == ["mul.forward", "N=4"]
    assert bench.main(["div"]) == 2
    assert "no case begins with div" in capsys.readouterr().err
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert bench.main(["mul"]) == 2
    assert "needs an NVIDIA GPU" in capsys.readouterr().err


def test_a_run_writes_its_rows(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(bench, "all_cases", lambda: [make_case()])
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "a GPU")
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: None)
    monkeypatch.setattr(bench, "_peak_mib", lambda call: 1.0)
    monkeypatch.setattr(bench, "_median_ms", lambda call, graphed: 2.0)
    target = tmp_path / "rows.json"
    assert bench.main(["--json", str(target)]) == 1  # a peer failed
    written = json.loads(target.read_text())
    assert written["device"] == "a GPU"
    assert written["rows"][0]["timings"]["ours"] == {
        "ms": 2.0,
        "tflops": pytest.approx(2e-9),
        "tb_per_s": pytest.approx(1.6e-8),
        "peak_mib": 1.0,
        "error": 0.0,
    }
    assert bench.read_rows(target)[0].ratio("off by a tenth") == 1.0


def test_a_table_of_what_was_written(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    test_a_run_writes_its_rows(monkeypatch, tmp_path)
    capsys.readouterr()
    assert bench.main(["--table", str(tmp_path / "rows.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[2].split(" | ") == ["| add.forward, N=4", "ours", "2.000", "0", "0.00", "1", "0.0e+00", " |"]
    assert lines[3].startswith("|  | off by a tenth | 2.000 |") and lines[3].endswith("| 1.00 |")
    assert lines[4].startswith("|  | broken | failed: RuntimeError")


def test_no_two_cases_are_called_the_same() -> None:
    names = [(case.name, case.shape) for case in bench.all_cases()]
    assert names and len(set(names)) == len(names)
