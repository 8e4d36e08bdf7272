"""Makes the table that algorithm "auto" decides by, python/convt3d_gemm/costs.json, in two steps.

    python benchmarks/fit_selection.py measure FILE [--device cuda] [--seconds 230] [--part 1/3]
    python benchmarks/fit_selection.py fit FILE... [--write]

`measure` times gemm, direct and native on the published layers and then on random ones, seeded, until the time is up,
and appends a line of JSON for each layer to FILE. Layers that are done already are not measured again; parts I/N, on
several GPUs or one after the other, share the layers out. What fails, for want of memory for example, is noted and
left out.

`fit` needs numpy and no GPU. It fits the model (see convt3d_gemm.costs), says how well it picks on layers that it has
not seen, and with --write replaces the device's class in the table. Without FILE it takes the table's own measurements.
It asks the library for direct's plans, so it is to be run again whenever these or what they expect have changed.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import random
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from convt3d_gemm import _C, decision, library, tuning
from convt3d_gemm.bench.ceilings import measure_ceilings
from convt3d_gemm.bench.device import release_memory, versions
from convt3d_gemm.bench.inputs import Layout
from convt3d_gemm.bench.layers import PRESETS, Layer
from convt3d_gemm.bench.measure import comparison_mode
from convt3d_gemm.bench.targets import geometric_mean
from convt3d_gemm.bench.timing import Clock
from convt3d_gemm.choice import forward_of
from convt3d_gemm.costs import Costs, Planner, distance, family_of, place_of, problem_of, times_of
from convt3d_gemm.problem import OPERATORS, Problem
from convt3d_gemm.settings import get_workspace_limit

TABLE = Path(__file__).parent.parent / "python" / "convt3d_gemm" / "costs.json"
ALGORITHMS = tuning.ALGORITHMS
Times = dict[str, dict[str, float]]


# ---- measure --------------------------------------------------------------------------------------------------------


class Setting(NamedTuple):
    """How a layer is measured, and the share of random layers that are."""

    dtype: torch.dtype
    tf32: bool
    layout: Layout
    share: float

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 else str(self.dtype).removeprefix("torch.")


SETTINGS = {
    "cuda": (
        Setting(torch.float32, True, "ncdhw", 0.30),
        Setting(torch.bfloat16, False, "ncdhw", 0.20),
        Setting(torch.float32, True, "ndhwc", 0.15),
        Setting(torch.bfloat16, False, "ndhwc", 0.15),
        Setting(torch.float16, False, "ncdhw", 0.10),
        Setting(torch.float32, False, "ncdhw", 0.07),
        Setting(torch.float16, False, "ndhwc", 0.03),
    ),
    "cpu": (
        Setting(torch.float32, False, "ncdhw", 0.6),
        Setting(torch.float32, False, "ndhwc", 0.15),
        Setting(torch.bfloat16, False, "ncdhw", 0.1),
        Setting(torch.float16, False, "ncdhw", 0.05),
        Setting(torch.float64, False, "ncdhw", 0.1),
    ),
}


class Bounds(NamedTuple):
    """The smallest and the largest layers that are measured, and how long each operator of a layer is."""

    least_operations: float
    operations: float
    tensor_bytes: float
    seconds: float


PUBLISHED_BOUNDS = {"cuda": Bounds(0, math.inf, math.inf, 0.06), "cpu": Bounds(0, 4e9, 5e8, 0.1)}
RANDOM_BOUNDS = {"cuda": Bounds(5e7, 6e11, 2e9, 0.03), "cpu": Bounds(1e6, 1e9, 5e7, 0.08)}
LAUNCH_SECONDS = {"cuda": 5e-6, "cpu": 2e-5}


#: Of random layers, and how often each is drawn.
KINDS = {
    "kernel = stride": 2,
    "k3s2": 2,
    "k4s2": 1,
    "stride 1": 2,
    "grouped": 2,
    "depthwise": 1,
    "dilated": 1,
    "uneven": 1,
    "pointwise": 1,
}


def random_layer(number: int) -> Layer | None:
    """A layer as decoders, generators and benchmarks have them; None if the draw is not a convolution."""
    draw = random.Random(number)
    channels = (8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256, 320, 384, 512)
    in_channels = draw.choice(channels)
    out_channels = draw.choice([in_channels, max(in_channels // 2, 4), draw.choice(channels), draw.choice((1, 3, 4))])
    kind = draw.choices(list(KINDS), list(KINDS.values()))[0]
    kernel, stride, padding, output_padding, dilation = (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0), (1, 1, 1)
    groups = 1
    if kind == "kernel = stride":
        kernel = stride = draw.choice([(2, 2, 2), (2, 2, 2), (1, 2, 2), (4, 4, 4), (3, 3, 3)])
        padding = (0, 0, 0)
    elif kind == "k4s2":
        kernel = (4, 4, 4)
    elif kind == "pointwise":
        kernel, stride, padding = (1, 1, 1), (1, 1, 1), (0, 0, 0)
    elif kind in ("stride 1", "uneven"):
        kernel = draw.choice([(3, 3, 3), (5, 5, 5), (1, 3, 3), (3, 5, 5), (3, 5, 7)])
        stride = (1, 1, 1) if kind == "stride 1" else draw.choice([(1, 2, 2), (2, 2, 1), (2, 2, 2), (3, 3, 3)])
        padding = draw.choice([(0, 0, 0), (kernel[0] // 2, kernel[1] // 2, kernel[2] // 2)])
    elif kind == "dilated":
        dilation = draw.choice([(2, 2, 2), (1, 2, 2), (3, 3, 3)])
        stride = draw.choice([(1, 1, 1), (2, 2, 2)])
    elif kind == "depthwise":
        groups, out_channels = in_channels, in_channels
        kernel = draw.choice([(2, 2, 2), (3, 3, 3), (4, 4, 4)])
        padding = tuple((k - 1) // 2 for k in kernel)  # type: ignore[assignment]
    elif kind == "grouped":
        groups = draw.choice([2, 4, 8, 16])
        in_channels, out_channels = (-(-c // groups) * groups for c in (in_channels, out_channels))
        kernel = draw.choice([(3, 3, 3), (2, 2, 2), (4, 4, 4), (3, 5, 5)])
    if kind in ("k3s2", "grouped", "depthwise") and stride == (2, 2, 2):
        output_padding = draw.choice([(0, 0, 0), (1, 1, 1)])
    side = draw.choice((4, 6, 8, 12, 16, 20, 24, 32, 40, 48, 64, 96))
    size = draw.choice([(side, side, side), (max(side // 2, 2), side, side), (max(side // 4, 2), side, side + 1)])
    try:
        return Layer(
            f"random {number}",
            draw.choice((1, 1, 2, 2, 4, 8, 16)),
            in_channels,
            out_channels,
            kernel,
            size,
            stride,
            padding,
            output_padding,
            dilation,
            groups,
        )
    except ValueError:
        return None


def problems_to_measure(device: torch.device, part: int, parts: int, seed: int) -> Iterator[tuple[Problem, float]]:
    """All of the published layers, then random ones without end; of these every `parts`-th. And seconds for each."""
    settings = SETTINGS[device.type]

    def within(problem: Problem, bounds: Bounds) -> bool:
        enough = bounds.least_operations <= problem.operations <= bounds.operations
        return enough and problem.tensor_bytes <= bounds.tensor_bytes

    bounds = PUBLISHED_BOUNDS[device.type]
    named = [*PRESETS["all"], *(PRESETS["quick"] if device.type == "cpu" else ())]
    published = [
        forward_of(layer, setting.dtype, setting.layout, setting.tf32, device)
        for setting in settings
        for layer in named
    ]
    for problem in published[part - 1 :: parts]:
        if within(problem, bounds):
            yield problem, bounds.seconds
    bounds = RANDOM_BOUNDS[device.type]
    for number in itertools.count(seed * 10**6 + part - 1, parts):
        layer = random_layer(number)
        setting = random.Random(-number).choices(settings, [each.share for each in settings])[0]
        if layer is not None and within(
            problem := forward_of(layer, setting.dtype, setting.layout, setting.tf32, device), bounds
        ):
            yield problem, bounds.seconds


def measure_problem(problem: Problem, seconds: float) -> tuple[Times, dict[str, str]]:
    """Milliseconds by operator and algorithm, and failures by both names."""
    times: Times = {}
    failures = {}
    for operator in OPERATORS:
        results = tuning.measure(problem._replace(operator=operator), ALGORITHMS, seconds=seconds)
        times[operator] = {name: result for name, result in results.items() if isinstance(result, float)}
        failures.update({f"{operator} {name}": why for name, why in results.items() if isinstance(why, str)})
    release_memory(problem.device)
    return times, failures


def measure(arguments: argparse.Namespace) -> int:
    """Append lines to the file until the time is up."""
    device = torch.device(arguments.device)
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    part, parts = arguments.part
    began = time.monotonic()
    done = (
        {(row.layer, row.precision, row.layout) for row in read(arguments.file)[1]}
        if arguments.file.exists()
        else set()
    )
    count = 0
    with arguments.file.open("a") as file:

        def write(line: Mapping[str, Any]) -> None:
            file.write(json.dumps(line) + "\n")
            file.flush()  # what is measured is kept if the run is cut short

        write({"device": describe_class(device), "versions": versions()})
        for problem, seconds in problems_to_measure(device, part, parts, arguments.seed):
            key = problem.layer, problem.precision, problem.layout
            if time.monotonic() - began > arguments.seconds:
                break
            if key in done:
                continue
            done.add(key)
            with comparison_mode(problem.tf32):
                times, failures = measure_problem(problem, seconds)
            row = dict(zip(("layer", "precision", "layout"), key, strict=True))
            write({**row, "times": times, "failures": failures})
            count += 1
            said = "".join(f"; {what} FAILED: {why}" for what, why in failures.items())
            forward = ", ".join(f"{name} {value:.3g}" for name, value in times["forward"].items())
            elapsed = time.monotonic() - began
            print(
                f"[{elapsed:.0f} s, {count}] {' '.join(key)}: {forward} ms{' FAILED ' + said if said else ''}",
                flush=True,
            )
    print(f"{count} layers measured in {time.monotonic() - began:.0f} s")
    return 0


def describe_class(device: torch.device) -> dict[str, Any]:
    """What the table says of a class besides the fit: what it is, and its best rates."""
    hardware = decision.hardware_of(device)
    rates: dict[str, float] = {}
    copy_rate = 0.0
    for tf32 in (False, True) if device.type == "cuda" else (False,):
        settings = [setting for setting in SETTINGS[device.type] if setting.tf32 == tf32]
        with comparison_mode(tf32):
            ceilings = measure_ceilings(Clock(device), dict.fromkeys(setting.dtype for setting in settings))
        copy_rate = max(copy_rate, ceilings.copy_rate)
        rates.update({setting.precision: ceilings.gemm_rates[setting.dtype] for setting in settings})
    return {
        "type": hardware.type,
        "device": hardware.name,
        "capability": hardware.capability,
        # Below 8.0 the direct kernels are others.
        "least_capability": (8, 0) if hardware.type == "cuda" else (0, 0),
        "units": hardware.units,
        "shared_memory": _C.Target.cuda(device.index).shared_memory if hardware.type == "cuda" else 0,
        "copy_rate": copy_rate,
        "multiply_rates": rates,
        "launch_seconds": LAUNCH_SECONDS[hardware.type],
    }


# ---- fit ------------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True, order=True)
class Row:
    """One layer's measured milliseconds."""

    layer: str
    precision: str
    layout: str
    times: Times = dataclasses.field(compare=False)

    def problem(self, operator: str) -> Problem:
        return problem_of(operator, self.layer, self.precision, self.layout)

    @property
    def fold(self) -> int:
        """The same for all settings of a layer, so that none has been seen when the layer is held out."""
        return hashlib.sha256(self.layer.encode()).digest()[0]


def read(*files: Path) -> tuple[dict[str, Any], list[Row]]:
    """The device's description, its best rates of all runs, and the rows of all files; of equal layers the last."""
    device: dict[str, Any] = {}
    rows: dict[tuple[str, str, str], Row] = {}
    for file in files:
        for number, text in enumerate(file.read_text().splitlines(), 1):
            try:
                line = json.loads(text)
            except ValueError:
                print(f"{file}:{number}: cut short, left out", file=sys.stderr)
                continue
            if "device" in line:
                device = merged(device, line["device"])
            else:
                rows[line["layer"], line["precision"], line["layout"]] = Row(
                    line["layer"], line["precision"], line["layout"], line["times"]
                )
    return device, list(rows.values())


def merged(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Two descriptions of one device; the better rates."""
    if not first:
        return second
    if (first["device"], first["units"]) != (second["device"], second["units"]):
        raise SystemExit(f"measurements of two devices: {first['device']} and {second['device']}")
    rates = dict(first["multiply_rates"])
    for precision, rate in second["multiply_rates"].items():
        rates[precision] = max(rate, rates.get(precision, 0.0))
    return {**second, "copy_rate": max(first["copy_rate"], second["copy_rate"]), "multiply_rates": rates}


class Choice(NamedTuple):
    """What cross-validation chooses."""

    reach: float
    margin: float
    agreeing: int


REACHES = (6.0, 12.0, 24.0)
MARGINS = (0.0, 0.03, 0.06, 0.1, 0.15, 0.2, 0.3, 0.5)
AGREEING = (0, 2, 4)
#: Layers that a family of direct's kernels must have been measured on before anything is expected of it on others: a
#: few say nothing of a kernel of last resort.
ENOUGH_OF_FAMILY = 10
FOLDS = 5

# The variance of what efficiencies in the same place are apart, in units of that far apart.
NOISE = 0.1

# Both gradients take what each of them takes, where direct's plans are believed.
SINGLE_OPERATORS = ("forward", "grad_input", "grad_weight")


def planner_of(device: Mapping[str, Any]) -> Planner | None:
    """What plans direct for the device that was measured; None where its plans expect no cycles."""
    major, minor = device["capability"]
    if (major, minor) < (8, 0) or "shared_memory" not in device:
        return None
    target = _C.Target.cuda(
        compute_capability=10 * major + minor,
        multiprocessors=device["units"],
        shared_memory=device["shared_memory"],
    )
    limit = get_workspace_limit()
    return functools.cache(lambda problem: library.plan_for(target, "direct", problem._replace(limit=limit)))


def fitted(
    device: Mapping[str, Any], rows: Sequence[Row], choice: Choice, source: str, plan: Planner | None
) -> dict[str, Any]:
    """The class's entry in the table."""
    entry = {
        **device,
        "source": source,
        "margin": choice.margin,
        "reach": choice.reach,
        "agreeing": choice.agreeing,
        "fits": {},
        "measured": [[row.layer, row.precision, row.layout, row.times] for row in rows],
    }
    costs = Costs("", entry)
    places = [place_of(row.problem("forward")) for row in rows]
    closeness = np.exp(-np.array([[distance(one, other) for other in places] for one in places]) / choice.reach)
    fits: dict[str, dict[str, dict[str, Any]]] = {operator: {} for operator in OPERATORS}
    for operator, algorithm in itertools.product(OPERATORS, ALGORITHMS):
        times = times_by_row(rows, operator, algorithm)
        if times and (algorithm != "direct" or plan is None):
            slowness = {
                number: math.log(measured / costs.work(rows[number].problem(operator), algorithm))
                for number, measured in times.items()
            }
            fits[operator][algorithm] = kriged(slowness, closeness)
    if plan is None:
        return {**entry, "fits": fits}
    costs.clock_rate = entry["clock_rate"] = clock_rate_of(device, rows, plan)
    for operator in SINGLE_OPERATORS:
        families: dict[str, dict[int, float]] = {}
        for number, measured in times_by_row(rows, operator, "direct").items():
            problem = rows[number].problem(operator)
            planned = plan(problem)
            slowness = families.setdefault(family_of(planned), {})
            slowness[number] = math.log(measured / costs.planned_work(problem, planned))
        for family, slowness in sorted(families.items()):
            if len(slowness) >= ENOUGH_OF_FAMILY:
                fits[operator][family] = kriged(slowness, closeness)
    return {**entry, "fits": fits}


def clock_rate_of(device: Mapping[str, Any], rows: Sequence[Row], plan: Planner) -> float:
    """Cycles per second by which direct's plans expect what was measured, in the median."""
    rates = []
    for operator in SINGLE_OPERATORS:
        for number, measured in times_by_row(rows, operator, "direct").items():
            cycles = plan(rows[number].problem(operator)).expected_cycles
            if cycles > 0:
                rates.append(cycles / (1e-3 * measured - device["launch_seconds"]))
    return float(np.median(rates))


def times_by_row(rows: Sequence[Row], operator: str, algorithm: str) -> dict[int, float]:
    """Milliseconds by the number of the row, of those that have them."""
    return {
        number: row.times[operator][algorithm]
        for number, row in enumerate(rows)
        if algorithm in row.times.get(operator, {})
    }


def kriged(values: Mapping[int, float], closeness: np.ndarray) -> dict[str, Any]:
    """The values' mean, and the weights of all rows by which it is off near them.

    Args:
        values: by the number of the row; those of some rows may be missing, and these weigh nothing.
        closeness: of any two rows, 1 for the same place.
    """
    known = list(values)
    mean = float(np.mean(list(values.values())))
    covariance = closeness[np.ix_(known, known)] + NOISE * np.eye(len(known))
    weights = np.zeros(len(closeness))
    weights[known] = np.linalg.solve(covariance, np.array(list(values.values())) - mean)
    return {"mean": round(mean, 4), "weights": [round(float(weight), 4) for weight in weights]}


class Outcome(NamedTuple):
    """A pick on a layer that the model had not seen."""

    row: Row
    operator: str
    pick: decision.Pick
    over_best: float  # its time over that of the fastest
    over_native: float  # native's time over its own


class Expectation(NamedTuple):
    """What a fit to the other folds' rows expects of a row, and what was measured.

    Attributes:
        expected: milliseconds of all that may be picked, fastest first.
        measured: the same as measured.
        doubted: what is not picked all the same, by the number of layers that must agree.
    """

    row: Row
    operator: str
    expected: Mapping[decision.Pick, float]
    measured: Mapping[decision.Pick, float]
    doubted: Mapping[int, frozenset[decision.Pick]]


def expectations(
    device: Mapping[str, Any], rows: Sequence[Row], reach: float, plan: Planner | None
) -> list[Expectation]:
    """Of every row and operator."""
    found: list[Expectation] = []
    for fold in range(FOLDS):
        known = [row for row in rows if row.fold % FOLDS != fold]
        if not known:
            continue
        costs = Costs("", fitted(device, known, Choice(reach, 0.0, 0), "", plan))
        for row in rows:
            if row.fold % FOLDS == fold:
                found += expectations_of(row, costs, plan)
    return found


def expectations_of(row: Row, costs: Costs, plan: Planner | None) -> Iterator[Expectation]:
    for operator in OPERATORS:
        parts = [operator, *(("grad_input", "grad_weight") if operator == "grad_input_weight" else ())]
        expected = {part: costs.predict(row.problem(part), plan) for part in parts}
        measured = decision.candidates_of({part: times_of(row.times, part) for part in parts}, ALGORITHMS)
        candidates = decision.candidates_of(expected, ALGORITHMS)
        candidates = {pick: time for pick, time in candidates.items() if pick in measured}
        doubted = {}
        for costs.agreeing in AGREEING:
            of_parts = {part: costs.doubted(row.problem(part)) for part in parts}
            doubted[costs.agreeing] = decision.doubted_of(candidates, of_parts)
        if ("native",) in candidates:
            yield Expectation(row, operator, candidates, measured, doubted)


def outcomes(expected: Iterable[Expectation], margin: float, agreeing: int) -> list[Outcome]:
    found = []
    for row, operator, guesses, measured, doubted in expected:
        pick = decision.pick_of(guesses, margin, doubted[agreeing])
        best = min(measured.values())
        found.append(Outcome(row, operator, pick, measured[pick] / best, measured["native",] / measured[pick]))
    return found


def loss(found: Iterable[Outcome]) -> float:
    """Small where picks are near the best; being slower than native counts ten times."""
    values = [math.log(each.over_best) ** 2 + 10 * min(math.log(each.over_native), 0.0) ** 2 for each in found]
    return sum(values) / max(len(values), 1)


def cross_validated(
    device: Mapping[str, Any],
    rows: Sequence[Row],
    margins: Sequence[float],
    agreeing: Sequence[int],
    plan: Planner | None,
) -> tuple[Choice, list[Outcome]]:
    """The choice with the least loss on layers that were held out, and what it picked there."""
    tried: list[tuple[float, Choice, list[Outcome]]] = []
    for reach in REACHES:
        expected = expectations(device, rows, reach, plan)
        best = math.inf
        for margin, count in itertools.product(margins, agreeing):
            found = outcomes(expected, margin, count)
            tried.append((loss(found), Choice(reach, margin, count), found))
            best = min(best, tried[-1][0])
        print(f"reach {reach}: loss {best:.5f}", flush=True)
    _, choice, found = min(tried, key=lambda one: one[0])
    return choice, found


def report(found: Sequence[Outcome]) -> str:
    """How good the picks are on held-out layers, operator by operator, and the worst of them."""
    lines = [
        f"{'held out':20}{'rows':>6}{'<= 8 %':>8}{'<= 15 %':>9}{'worst':>8}{'over native':>13}{'least':>7}{'< 0.95':>8}"
    ]
    for operator in (*OPERATORS, "all"):
        chosen = [each for each in found if operator in (each.operator, "all")]
        if chosen:
            over_best = [each.over_best for each in chosen]
            shares = [sum(value <= bound for value in over_best) / len(chosen) for bound in (1.08, 1.15)]
            native = [each.over_native for each in chosen]
            lines.append(
                f"{operator:20}{len(chosen):6}{shares[0]:8.1%}{shares[1]:9.1%}{max(over_best):8.2f}"
                f"{geometric_mean(native):13.2f}{min(native):7.2f}{sum(ratio < 0.95 for ratio in native):8}"
            )
    lines.append("worst:")
    for each in sorted(found, key=lambda one: -one.over_best)[:10]:
        row = each.row
        lines.append(
            f"  {each.operator} of {row.layer}, {row.precision}, {row.layout}: {' + '.join(each.pick)} takes "
            f"{each.over_best:.2f} times the best, and is {each.over_native:.2f} times as fast as native"
        )
    return "\n".join(lines)


def fit(arguments: argparse.Namespace) -> int:
    """Fit, report, and write if asked to."""
    table = json.loads(TABLE.read_text())
    device, rows = read(*arguments.files) if arguments.files else from_table(table, arguments.name)
    rows = sorted(row for row in rows if row.times.get("forward", {}).get("native"))
    if not rows:
        raise SystemExit("no measurements")
    name = arguments.name or device["device"]
    present = table["classes"].get(name, {})
    if "shared_memory" in present:  # which measurements before 2026-11-21 do not say
        device.setdefault("shared_memory", present["shared_memory"])
    plan = planner_of(device)
    print(f"{name}: {len(rows)} layers" + ("" if plan is None else ", and what direct's plans expect"))
    margins = MARGINS if arguments.margin is None else [arguments.margin]
    agreeing = AGREEING if arguments.agreeing is None else [arguments.agreeing]
    choice, found = cross_validated(device, rows, margins, agreeing, plan)
    print("chosen: " + ", ".join(f"{name} {value}" for name, value in choice._asdict().items()))
    print(report(found))
    if arguments.write:
        source = arguments.source or present.get("source") or "benchmarks/fit_selection.py"
        table["classes"][name] = rounded(fitted(device, rows, choice, source, plan))
        TABLE.write_text(spelled(table))
        print(f"{TABLE}: {TABLE.stat().st_size} bytes")
    return 0


def from_table(table: Mapping[str, Any], name: str | None) -> tuple[dict[str, Any], list[Row]]:
    """The measurements that are in the table."""
    if name not in table["classes"]:
        raise SystemExit(f"give FILE, or --name, one of {', '.join(table['classes'])}")
    entry = table["classes"][name]
    fitted_parts = ("source", "margin", "reach", "agreeing", "clock_rate", "fits", "measured")
    device = {key: value for key, value in entry.items() if key not in fitted_parts}
    return device, [Row(*measured) for measured in entry["measured"]]


def rounded(entry: dict[str, Any]) -> dict[str, Any]:
    """Three digits of all figures: there is noise below."""

    def of(numbers: Mapping[str, float]) -> dict[str, float]:
        return {name: float(f"{number:.3g}") for name, number in numbers.items()}

    measured = [
        [layer, precision, layout, {operator: of(by_name) for operator, by_name in times.items()}]
        for layer, precision, layout, times in entry["measured"]
    ]
    rates = of({name: entry[name] for name in ("copy_rate", "clock_rate") if name in entry})
    return {**entry, **rates, "multiply_rates": of(entry["multiply_rates"]), "measured": measured}


def spelled(table: Mapping[str, Any]) -> str:
    """JSON with one measured layer, or one fit, a line: so that a change is easy to see."""
    classes = []
    for name, entry in sorted(table["classes"].items()):
        parts = [f"   {json.dumps(key)}: {json.dumps(value)}" for key, value in entry.items() if not is_long(key)]
        operators = ",\n".join(
            f"    {json.dumps(operator)}: {{\n"
            + ",\n".join(f"     {json.dumps(algorithm)}: {json.dumps(values)}" for algorithm, values in fits.items())
            + "\n    }"
            for operator, fits in entry["fits"].items()
        )
        parts.append(f'   "fits": {{\n{operators}\n   }}')
        measured = ",\n".join(f"    {json.dumps(row)}" for row in entry["measured"])
        parts.append(f'   "measured": [\n{measured}\n   ]')
        classes.append(f"  {json.dumps(name)}: {{\n" + ",\n".join(parts) + "\n  }")
    return '{\n "format": 1,\n "classes": {\n' + ",\n".join(classes) + "\n }\n}\n"


def is_long(key: str) -> bool:
    return key in ("fits", "measured")


# ---- the command line -----------------------------------------------------------------------------------------------


def part_of(text: str) -> tuple[int, int]:
    part, _, parts = text.partition("/")
    if not (part.isdigit() and parts.isdigit() and 1 <= int(part) <= int(parts)):
        raise argparse.ArgumentTypeError(f"must be I/N with 1 <= I <= N, got {text}")
    return int(part), int(parts)


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    steps = parser.add_subparsers(dest="step", required=True)
    measuring = steps.add_parser("measure", help="time all algorithms on this device")
    measuring.add_argument("file", type=Path, help="lines of JSON are appended to it")
    measuring.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    measuring.add_argument("--seconds", type=float, default=230.0, help="stop after this time (default: 230)")
    measuring.add_argument("--part", type=part_of, default=(1, 1), metavar="I/N", help="share the layers out")
    measuring.add_argument("--seed", type=int, default=0, help="of the random layers")
    fitting = steps.add_parser("fit", help="fit the model to measurements")
    fitting.add_argument("files", type=Path, nargs="*", metavar="FILE", help="what measure has written")
    fitting.add_argument("--name", help="of the class in the table (default: the device's)")
    fitting.add_argument("--margin", type=float, help="in place of the one that cross-validation chooses")
    fitting.add_argument("--agreeing", type=int, choices=AGREEING, help="likewise")
    fitting.add_argument("--source", help="where the figures are from, for explain")
    fitting.add_argument("--write", action="store_true", help="replace the class in the table")
    arguments = parser.parse_args(argv)
    return measure(arguments) if arguments.step == "measure" else fit(arguments)


if __name__ == "__main__":
    sys.exit(main())
