"""Keel's kernels beside their peers, measured in one run: `python -m kernels.bench [names] [--json FILE]`.

Every module in `kernels/bench_cases/` has a function `cases() -> list[Case]`. A name given on the command line selects
the cases that begin with it ("sparse_mla", "sparse_mla.forward"); `--list` prints them all. Each line shows our time,
rate, peak memory and error, then each peer's, with the ratio of its time to ours: above 1 ours is faster. Times are
medians over repetitions with a cold L2 cache, or, for decode, over replays of a CUDA graph with a warm one; memory is
what a call adds to its arguments at its peak. The error is the largest over the outputs of |found - exact| / |exact|
(Frobenius norms), where the case has an exact answer.
"""

from __future__ import annotations

import argparse
import importlib
import json
import pkgutil
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch

from kernels import bench_cases

Outputs = torch.Tensor | Sequence[torch.Tensor]
Call = Callable[[], Outputs]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setup:
    """What a case runs, its inputs already on the device and bound."""

    ours: Call
    peers: dict[str, Call]  # only those that can run here
    exact: Call | None = None  # the same outputs in higher precision; None where nothing independent fits in memory
    flops: float = 0.0  # of the mathematics, not of what an implementation recomputes
    bytes: float = 0.0  # least memory traffic, where memory is what bounds the kernel
    graphed: bool = False  # timed as replays of a CUDA graph, as an engine runs its decode steps


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    name: str  # kernel.what, e.g. sparse_mla.forward
    shape: str  # e.g. "N=4096 M=32768 H=128 K=2048"
    build: Callable[[], Setup]
    on_request: bool = False  # left out unless a name on the command line selects it


@dataclass(frozen=True, slots=True, kw_only=True)
class Timing:
    """One implementation in one case."""

    ms: float
    tflops: float  # 0 where the case states no flops
    tb_per_s: float  # likewise
    peak_mib: float
    error: float | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """One case; `failures` maps an implementation to what stopped it."""

    name: str
    shape: str
    timings: dict[str, Timing] = field(default_factory=dict)  # "ours" and the peers' names
    failures: dict[str, str] = field(default_factory=dict)

    def ratio(self, peer: str) -> float | None:
        """A peer's time over ours."""
        if "ours" not in self.timings or peer not in self.timings:
            return None
        return self.timings[peer].ms / self.timings["ours"].ms


def all_cases() -> list[Case]:
    """The cases of every module in `kernels.bench_cases`."""
    names = sorted(module.name for module in pkgutil.iter_modules(bench_cases.__path__))
    modules = [importlib.import_module(f"{bench_cases.__name__}.{name}") for name in names]
    return [case for module in modules for case in module.cases()]


def measure(case: Case) -> Row:
    """Builds a case and times all of its implementations; one that fails does not hide the others."""
    row = Row(name=case.name, shape=case.shape)
    try:
        setup = case.build()
        exact = None if setup.exact is None else _tensors(setup.exact())
    except Exception as error:
        row.failures["setup"] = _reason(error)
        return row
    for name, call in {"ours": setup.ours, **setup.peers}.items():
        try:
            row.timings[name] = _time(call, setup, exact)
        except Exception as error:
            row.failures[name] = _reason(error)
    return row


def _time(call: Call, setup: Setup, exact: list[torch.Tensor] | None) -> Timing:
    error = None if exact is None else relative_error(_tensors(call()), exact)
    peak_mib = _peak_mib(call)
    ms = _median_ms(call, graphed=setup.graphed)
    return Timing(ms=ms, tflops=setup.flops / ms / 1e9, tb_per_s=setup.bytes / ms / 1e9, peak_mib=peak_mib, error=error)


def relative_error(found: Sequence[torch.Tensor], exact: Sequence[torch.Tensor]) -> float:
    """The largest |found - exact| / |exact| over pairs of tensors, in Frobenius norms; NaN where any entry is."""
    errors = []
    for tensor, wanted in zip(found, exact, strict=True):
        difference, size = (tensor.double() - wanted.double()).norm(), wanted.double().norm()
        errors.append(float(difference / size) if size > 0 else float(difference))
    return max(errors, key=lambda error: (error != error, error))


def _tensors(outputs: Outputs) -> list[torch.Tensor]:
    return [tensor.detach() for tensor in ([outputs] if isinstance(outputs, torch.Tensor) else outputs)]


def _peak_mib(call: Call) -> float:
    if not torch.cuda.is_available():
        return 0.0
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - before) / 2**20


def _median_ms(call: Call, *, graphed: bool) -> float:
    if torch.cuda.is_available():
        from triton.testing import do_bench, do_bench_cudagraph

        if graphed:
            return float(do_bench_cudagraph(call, rep=20, return_mode="median"))  # type: ignore[arg-type]
        return float(do_bench(call, warmup=20, rep=100, return_mode="median"))  # type: ignore[arg-type]
    times = []
    for _ in range(5):
        start = time.perf_counter()
        call()
        times.append(time.perf_counter() - start)
    return statistics.median(times) * 1e3


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200] if lines else ''}"


def describe(row: Row) -> str:
    """A row as lines of text."""
    lines = [f"{row.name}  {row.shape}"]
    for name, timing in row.timings.items():
        parts = [f"{timing.ms:10.3f} ms"]
        parts.append(f"{timing.tflops:7.1f} TFLOP/s" if timing.tflops else " " * 15)
        parts.append(f"{timing.tb_per_s:6.2f} TB/s" if timing.tb_per_s else " " * 11)
        parts.append(f"{timing.peak_mib:9.1f} MiB")
        parts.append(f"error {timing.error:.2e}" if timing.error is not None else " " * 14)
        ratio = row.ratio(name)
        parts.append(f"{ratio:6.2f}x ours" if name != "ours" and ratio is not None else "")
        lines.append(f"    {name:24s}" + "  ".join(parts).rstrip())
    lines += [f"    {name:24s}failed: {reason}" for name, reason in row.failures.items()]
    return "\n".join(lines)


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown, the cases of one kernel under each other."""
    lines = ["| case | implementation | ms | TFLOP/s | TB/s | MiB | error | time over ours |", "| --- " * 8 + "|"]
    for row in rows:
        case = f"{row.name}, {row.shape}"
        for name, timing in row.timings.items():
            ratio = row.ratio(name)
            cells = [
                case,
                name,
                f"{timing.ms:.3f}",
                f"{timing.tflops:.0f}" if timing.tflops else "",
                f"{timing.tb_per_s:.2f}" if timing.tb_per_s else "",
                f"{timing.peak_mib:.0f}",
                f"{timing.error:.1e}" if timing.error is not None else "",
                f"{ratio:.2f}" if name != "ours" and ratio is not None else "",
            ]
            lines.append(f"| {' | '.join(cells)} |")
            case = ""
        lines += [f"| {case} | {name} | failed: {reason} | | | | | |" for name, reason in row.failures.items()]
    return "\n".join(lines)


def read_rows(path: Path) -> list[Row]:
    """What `--json` wrote."""
    return [
        Row(**{**row, "timings": {name: Timing(**timing) for name, timing in row["timings"].items()}})
        for row in json.loads(path.read_text())["rows"]
    ]


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description="Keel's kernels beside their peers.")
    parser.add_argument("names", nargs="*", help="only cases whose names begin with one of these")
    parser.add_argument("--json", type=Path, metavar="FILE", help="also write the rows to FILE")
    parser.add_argument("--list", action="store_true", help="print the cases and stop")
    parser.add_argument(
        "--table", type=Path, metavar="FILE", help="print what --json wrote to FILE as a table and stop"
    )
    options = parser.parse_args(arguments)
    if options.table is not None:
        print(table(read_rows(options.table)))
        return 0
    chosen = tuple(options.names)
    cases = [case for case in all_cases() if (case.name.startswith(chosen) if chosen else not case.on_request)]
    if not cases:
        print(f"no case begins with {' or '.join(options.names)}; --list shows them all", file=sys.stderr)
        return 2
    if options.list:
        print("\n".join(f"{case.name:32s}{case.shape}" for case in cases))
        return 0
    if not torch.cuda.is_available():
        print("kernels.bench needs an NVIDIA GPU", file=sys.stderr)
        return 2
    torch.manual_seed(0)
    machine = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
    print(f"{machine['device']}, torch {machine['torch']}", flush=True)
    rows = []
    for case in cases:
        row = measure(case)
        torch.cuda.empty_cache()
        print(describe(row), flush=True)
        rows.append(row)
    if options.json is not None:
        options.json.write_text(json.dumps({**machine, "rows": [asdict(row) for row in rows]}, indent=1) + "\n")
    return 1 if any(row.failures for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
