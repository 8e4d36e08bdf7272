"""What "auto" must reach, measured: it takes its turn beside gemm, direct and native.

    python benchmarks/auto.py [--tuned | --first-use] [--device cuda] [--only tf32,unseen] [--seconds 0.2] [--json FILE]

Rows are the published layers in several dtypes and both layouts, forward and both gradients, and for `unseen` twenty
random layers of a seed that benchmarks/fit_selection.py does not fit to. With --tuned each row is tuned first; with
--first-use auto measures each row by itself, as it does wherever cudnn.benchmark is on; otherwise nothing that was ever
measured on this machine counts, only the package's table. Every miss is listed at the end.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import fit_selection
import torch

from convt3d_gemm import decision, tuning
from convt3d_gemm.bench.device import release_memory, versions
from convt3d_gemm.bench.layers import PRESETS, PUBLISHED
from convt3d_gemm.bench.measure import comparison_mode
from convt3d_gemm.bench.targets import Targets, geometric_mean
from convt3d_gemm.choice import forward_of
from convt3d_gemm.problem import Problem

OPERATORS = ("forward", "grad_input_weight")
UNSEEN, UNSEEN_SEED = 20, 1000

#: Of the best single algorithm's speed and of native's, at least; a GPU's published layers first untuned, then tuned.
OF_BEST = {False: 1 / 1.08, True: 1 / 1.03}
OF_BEST_UNSEEN = 1 / 1.15
OF_NATIVE, OF_NATIVE_UNSEEN, OF_NATIVE_ON_CPU = 0.97, 0.95, 0.95
OVER_NATIVE_TF32 = 3.7

Row = dict[str, Any]


class Section(NamedTuple):
    """Rows that stand together in the table."""

    name: str
    problems: list[Problem]


def sections(device: torch.device) -> list[Section]:
    """The published layers by setting, and those that no fit has seen."""
    found = []
    settings = fit_selection.SETTINGS[device.type]
    layers = PUBLISHED if device.type == "cuda" else PRESETS["quick"]
    for setting in settings:
        problems = [forward_of(layer, setting.dtype, setting.layout, setting.tf32, device) for layer in layers]
        name = setting.precision if setting.layout == "ncdhw" else f"{setting.precision}_{setting.layout}"
        found.append(Section(name, problems))
    bounds = fit_selection.RANDOM_BOUNDS[device.type]
    draw = random.Random(UNSEEN_SEED)
    unseen: list[Problem] = []
    number = UNSEEN_SEED * 10**6
    while len(unseen) < UNSEEN:
        layer, setting = fit_selection.random_layer(number), draw.choice(settings)
        number += 1
        if layer is not None:
            problem = forward_of(layer, setting.dtype, setting.layout, setting.tf32, device)
            if bounds.least_operations <= problem.operations <= bounds.operations:
                unseen.append(problem)
    return [*found, Section("unseen", unseen)]


def measured(problem: Problem, seconds: float, tuned: bool) -> Row:
    """One row: milliseconds, what was picked, and how auto stands beside the best and native."""
    with comparison_mode(problem.tf32):
        if tuned:
            parts = ["grad_input", "grad_weight"] if problem.operator == "grad_input_weight" else []
            operators = [problem.operator, *parts]
            tuning.tune_problems([problem._replace(operator=operator) for operator in operators], seconds=seconds)
        made = decision.decide(problem)
        times = tuning.measure(problem, ("auto", *tuning.ALGORITHMS), seconds=seconds)
    release_memory(problem.device)
    singles = {name: time for name, time in times.items() if name != "auto" and isinstance(time, float)}
    row: Row = {"problem": str(problem), "pick": " + ".join(made.pick), "source": made.source, "times": times}
    auto = times["auto"]
    if isinstance(auto, float) and singles:
        row["of_best"] = min(singles.values()) / auto
        row["of_native"] = singles["native"] / auto if "native" in singles else None
    return row


def line_of(row: Row) -> str:
    """A row of the table."""
    times = row["times"]
    shown = "".join(f"{times[name]:10.4g}" if isinstance(times[name], float) else f"{'-':>10}" for name in times)
    ratios = "".join(f"{row[key]:9.2f}" if row.get(key) else f"{'-':>9}" for key in ("of_best", "of_native"))
    return f"{shown}{ratios}  {row['pick']:16} {row['source']:6} {row['problem']}"


def require(targets: Targets, section: Section, rows: Sequence[Row], tuned: bool, on_cuda: bool) -> None:
    """Note what the rows miss."""
    unseen = section.name == "unseen"
    of_best = OF_BEST[True] if tuned else OF_BEST_UNSEEN if unseen else OF_BEST[False]
    of_native = OF_NATIVE_ON_CPU if not on_cuda else OF_NATIVE_UNSEEN if unseen else OF_NATIVE
    for row in rows:
        if "of_best" not in row:
            targets.misses.append(f"{row['problem']}: auto has no time: {row['times']['auto']}")
            continue
        if on_cuda:
            targets.require(f"{row['problem']}: of the best's speed", row["of_best"], of_best)
        if row["of_native"] is not None:
            targets.require(f"{row['problem']}: of native's speed", row["of_native"], of_native)


@contextlib.contextmanager
def empty_cache() -> Iterator[None]:
    """What was measured on this machine before does not count, and nothing is left behind."""
    before = os.environ.get("CONVT3D_CACHE_DIR")
    with tempfile.TemporaryDirectory() as folder:
        os.environ["CONVT3D_CACHE_DIR"] = folder
        decision.forget_decisions()
        try:
            yield
        finally:
            os.environ.pop("CONVT3D_CACHE_DIR")
            if before is not None:
                os.environ["CONVT3D_CACHE_DIR"] = before


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    ways = parser.add_mutually_exclusive_group()
    ways.add_argument("--tuned", action="store_true", help="tune each row first")
    ways.add_argument("--first-use", action="store_true", help="have auto measure each row when it first meets it")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--only", default="", help="sections, separated by commas (default: all)")
    parser.add_argument("--seconds", type=float, default=0.2, help="per row (default: 0.2)")
    parser.add_argument("--json", type=Path, metavar="FILE")
    arguments = parser.parse_args(argv)
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    chosen = sections(device)
    if arguments.only:
        names = arguments.only.split(",")
        chosen = [section for section in chosen if section.name in names]
        if len(chosen) != len(set(names)):
            parser.error(f"--only takes {', '.join(section.name for section in sections(device))}")

    if not arguments.first_use:
        decision.measure_first_uses_by(None)
    targets, found = Targets(), {}
    header = "".join(f"{name:>10}" for name in ("auto", *tuning.ALGORITHMS)) + f"{'of best':>9}{'of nat.':>9}  pick"
    with empty_cache():
        for section in chosen:
            for operator in OPERATORS:
                print(f"\n{section.name}, {operator}, ms\n{header}", flush=True)
                rows = []
                for problem in section.problems:
                    row = measured(problem._replace(operator=operator), arguments.seconds, arguments.tuned)
                    rows.append(row)
                    print(line_of(row), flush=True)
                mean = geometric_mean(row["of_native"] for row in rows if row.get("of_native"))
                print(f"geometric mean over native: {mean:.2f}")
                require(targets, section, rows, arguments.tuned, device.type == "cuda")
                if (section.name, operator) == ("tf32", "forward"):
                    targets.require("tf32, forward: geometric mean over native", mean, OVER_NATIVE_TF32)
                found[f"{section.name} {operator}"] = rows
    print(f"\n{targets.report()}")
    if arguments.json is not None:
        arguments.json.write_text(
            json.dumps(
                {"versions": versions(), "tuned": arguments.tuned, "first_use": arguments.first_use, "rows": found}
            )
        )
    return 1 if targets.misses else 0


if __name__ == "__main__":
    sys.exit(main())
