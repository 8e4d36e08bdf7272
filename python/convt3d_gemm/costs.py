"""The cost model: what each algorithm is expected to take for a problem on a class of devices.

    work = launch + operations / multiply rate + bytes / copy rate
    time = work * exp(mean + sum over the measured layers of weight * exp(-distance / reach))

The work is what the device's best rates allow; for "gemm" its bytes include the columns. The exponential is the inverse
of the efficiency, which is carried over from measured layers to those like them: kriging, with weights for each
algorithm and operator. Of a GPU's "direct" more is known, where the table has a clock rate: its plans say which family
of kernels computes, each of which has weights of its own, and but for depthwise and simt they expect clock cycles.

    work of direct = launch + expected cycles / clock rate

A layer that was measured itself is not predicted: its measured times are taken. `costs.json` holds all of it;
``benchmarks/fit_selection.py`` makes it.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from convt3d_gemm import _C, library
from convt3d_gemm.parameters import Parameters, Triple
from convt3d_gemm.problem import Problem

__all__ = [
    "COORDINATES",
    "Costs",
    "Hardware",
    "Planner",
    "costs_for",
    "distance",
    "family_of",
    "place_of",
    "problem_of",
    "times_of",
]

Times = Mapping[str, float]
Planner = Callable[[Problem], _C.Plan]


@dataclass(frozen=True)
class Hardware:
    """What decides which class of the table stands for a device.

    Attributes:
        type: "cuda" or "cpu".
        name: the model, as the driver or the operating system has it.
        capability: CUDA's compute capability; (0, 0) for a CPU.
        units: multiprocessors of a GPU, threads of a CPU.
    """

    type: str
    name: str
    capability: tuple[int, int]
    units: int


#: What makes layers alike: the coordinates of their places, each with the distance that a difference of 1 makes. Sizes
#: are logarithms to base 2.
COORDINATES = {
    "input channels of a group": 1.0,
    "output channels of a group": 1.0,
    "groups": 0.7,
    "taps": 1.0,
    "stride": 1.0,  # the product of the three
    "samples": 0.3,
    "voxels": 0.4,
    "width": 0.3,
    "input channels' alignment": 0.4,
    "output channels' alignment": 0.4,
    "rows' alignment": 0.3,
    "depthwise": 2.0,
    "kernel = stride": 2.0,
    "dilated": 2.0,
    "ndhwc": 3.0,
    "half": 3.0,
    "bfloat16": 0.3,
    "ieee": 4.0,
    "double": 6.0,
}

# Where native's victories are looked for, layers of other precisions and layouts are left out if so many remain.
_ENOUGH = 8


def place_of(problem: Problem) -> tuple[float, ...]:
    """The values of `COORDINATES`, in units of distance. No size of the problem may be 0."""
    return tuple(weight * value for weight, value in zip(COORDINATES.values(), _coordinates(problem), strict=True))


def distance(first: tuple[float, ...], second: tuple[float, ...]) -> float:
    """How far two places lie apart."""
    return math.dist(first, second)


def _coordinates(problem: Problem) -> tuple[float, ...]:
    parameters = problem.parameters
    in_channels, out_channels = problem.input_size[1] // parameters.groups, problem.weight_size[1]
    kernel = tuple(problem.weight_size[2:])
    row_bytes = problem.output_size[4] * problem.dtype.itemsize
    return (
        math.log2(in_channels),
        math.log2(out_channels),
        math.log2(parameters.groups),
        math.log2(problem.taps),
        math.log2(math.prod(parameters.stride)),
        math.log2(problem.input_size[0]),
        math.log2(math.prod(problem.input_size[2:])),
        math.log2(problem.input_size[4]),
        math.log2(math.gcd(in_channels, 8)),
        math.log2(math.gcd(out_channels, 8)),
        math.log2(math.gcd(row_bytes, 16)),
        float(in_channels == out_channels == 1),
        float(kernel == parameters.stride),
        float(parameters.dilation != (1, 1, 1)),
        float(problem.layout == "ndhwc"),
        float(problem.dtype in (torch.float16, torch.bfloat16)),
        float(problem.dtype is torch.bfloat16),
        float(problem.precision == "float32"),
        float(problem.precision == "float64"),
    )


@dataclass(frozen=True)
class _Measured:
    """A layer of the table: its place, precision and layout, and its milliseconds."""

    place: tuple[float, ...]
    setting: tuple[str, str]
    times: Mapping[str, Times]


@dataclass(frozen=True)
class _Fit:
    """Logarithms of how much longer than its work an algorithm takes.

    Attributes:
        mean: of all that were measured.
        weights: of the measured layers, by which they pull what is near away from the mean; none where nothing does.
    """

    mean: float
    weights: tuple[float, ...]


# Of a family of direct's kernels that was hardly measured, if its plans expect cycles.
_AS_PLANNED = _Fit(0.0, ())

# Between measurements of one layer in two runs lie one or two per cent.
_MEASURED_MARGIN = 0.02


class Costs:
    """The times that one class of devices takes.

    Attributes:
        name: of the class in the table.
        source: where its figures are from.
        margin: how much faster than native an algorithm must be expected to be before it is preferred: 0.05 for 5 %.
        margin_of_measured: the same where the very layer was measured.
        agreeing: on how many of the nearest measured layers it must have been faster than native, too.
        copy_rate: bytes per second, those read and those written.
        multiply_rates: operations per second of a large matrix product, by precision.
        clock_rate: cycles per second by which the plans of "direct" are believed; None where they are not asked.
    """

    def __init__(self, name: str, entry: Mapping[str, Any], speed: float = 1.0, margin: float = 0.0) -> None:
        """Read a class of the table.

        Args:
            name: of the class.
            entry: its part of the table.
            speed: of the device, in units of the device that was measured.
            margin: on top of the class's own.
        """
        self.name = name
        self.source = str(entry["source"])
        self.margin = float(entry["margin"]) + margin
        self.margin_of_measured = _MEASURED_MARGIN + margin
        self.agreeing = int(entry["agreeing"])
        self.copy_rate = speed * float(entry["copy_rate"])
        self.multiply_rates = {precision: speed * float(rate) for precision, rate in entry["multiply_rates"].items()}
        self.clock_rate: float | None = entry.get("clock_rate")
        self._speed = speed
        self._launch = float(entry["launch_seconds"])
        self._reach = float(entry["reach"])
        self._fits = {
            operator: {name: _Fit(float(fit["mean"]), tuple(fit["weights"])) for name, fit in fits.items()}
            for operator, fits in entry["fits"].items()
        }
        self._times = {(layer, precision, layout): times for layer, precision, layout, times in entry["measured"]}
        self._settings = {(precision, layout) for _, precision, layout in self._times}
        # One problem's operators are asked about one after the other.
        self._distances = functools.lru_cache(maxsize=16)(self._find_distances)

    def floor(self, problem: Problem) -> float:
        """Milliseconds of all multiplications or of moving every tensor once, whichever is longer."""
        multiplying = problem.operations / self.multiply_rates[problem.precision]
        return 1e3 * max(multiplying, problem.tensor_bytes / self.copy_rate)

    def work(self, problem: Problem, algorithm: str) -> float:
        """Milliseconds at the device's best rates, one after the other; for "gemm" with its columns."""
        moved = problem.tensor_bytes
        if algorithm == "gemm":  # written once, and read by each product or by col2vol
            moved += (3 if problem.operator == "grad_input_weight" else 2) * problem.column_bytes
        multiplying = problem.operations / self.multiply_rates[problem.precision]
        return 1e3 * (self._launch + multiplying + moved / self.copy_rate)

    def planned_work(self, problem: Problem, planned: _C.Plan) -> float:
        """Milliseconds that a plan of "direct" expects at the class's clock rate; its work, where it expects none."""
        if planned.expected_cycles == 0 or self.clock_rate is None:
            return self.work(problem, "direct")
        return 1e3 * (self._launch + planned.expected_cycles / self.clock_rate)

    def measured(self, problem: Problem) -> Times:
        """Milliseconds of each algorithm where this very layer is in the table, else nothing."""
        times = self._times.get((problem.layer, problem.precision, problem.layout), {})
        return {name: value / self._speed for name, value in times_of(times, problem.operator).items()}

    def predict(self, problem: Problem, plan: Planner | None = None) -> Times:
        """Milliseconds expected of each algorithm; none if nothing was measured at this precision and in this layout.

        Args:
            problem: none of whose sizes is 0.
            plan: makes the plans of "direct", whose expectations are taken where the class has a clock rate; by default
                for the problem's own device.
        """
        if (problem.precision, problem.layout) not in self._settings:
            return {}
        plan = plan or (lambda part: library.planned("direct", part).plan)
        operators = ("grad_input", "grad_weight") if problem.operator == "grad_input_weight" else ()
        parts = [self._expected(problem._replace(operator=part), plan) for part in operators]
        # One call for both gradients shares work: gemm's columns, a vendor's copies in another layout.
        names = set.intersection(*map(set, parts)) if parts else set()
        return {**{name: sum(part[name] for part in parts) for name in sorted(names)}, **self._expected(problem, plan)}

    def doubted(self, problem: Problem) -> set[str]:
        """Algorithms that native has beaten on one of the `agreeing` nearest layers, whatever is expected of them here.

        What is expected may be off by more than any margin where a library picks a kernel of its own for some shapes
        (cuDNN, oneDNN); such shapes come in clusters.
        """
        if self.agreeing == 0:
            return set()
        setting = problem.precision, problem.layout
        pairs = list(zip(self._distances(place_of(problem)), self._measured, strict=True))
        alike = [pair for pair in pairs if pair[1].setting == setting]
        nearest = sorted(alike if len(alike) >= _ENOUGH else pairs, key=lambda pair: pair[0])[: self.agreeing]
        doubted = set()
        for _, layer in nearest:
            times = times_of(layer.times, problem.operator)
            doubted |= {name for name, time in times.items() if time > times.get("native", math.inf)}
        return doubted

    def _expected(self, problem: Problem, plan: Planner) -> dict[str, float]:
        fits = self._fits.get(problem.operator, {})
        expected = {
            name: self.work(problem, name) * math.exp(self._slowness(problem, fits[name]))
            for name in (*library.ALGORITHMS, "native")
            if name in fits
        }
        if self.clock_rate is not None and problem.operator != "grad_input_weight":
            planned = plan(problem)
            fit = fits.get(family_of(planned), _AS_PLANNED if planned.expected_cycles > 0 else None)
            if fit is not None:
                expected["direct"] = self.planned_work(problem, planned) * math.exp(self._slowness(problem, fit))
        return expected

    def _slowness(self, problem: Problem, fit: _Fit) -> float:
        """The logarithm of how much longer than its work an algorithm is expected to take."""
        if not fit.weights:
            return fit.mean
        closeness = (math.exp(-apart / self._reach) for apart in self._distances(place_of(problem)))
        return fit.mean + sum(weight * close for weight, close in zip(fit.weights, closeness, strict=True))

    def _find_distances(self, place: tuple[float, ...]) -> list[float]:
        """From a place to every measured layer, in the table's order."""
        return [distance(place, layer.place) for layer in self._measured]

    @functools.cached_property
    def _measured(self) -> list[_Measured]:
        return [
            _Measured(place_of(problem_of("forward", layer, precision, layout)), (precision, layout), times)
            for (layer, precision, layout), times in self._times.items()
        ]


def family_of(planned: _C.Plan) -> str:
    """The name in the table of the family of direct's kernels that a plan has chosen."""
    return f"direct {planned.configuration.split()[0]}"


def times_of(times: Mapping[str, Times], operator: str) -> Times:
    """The times of an operator; those of both gradients are added up where they were not taken together."""
    if operator != "grad_input_weight":
        return times.get(operator, {})
    first, second = times.get("grad_input", {}), times.get("grad_weight", {})
    return {**{name: first[name] + second[name] for name in first if name in second}, **times.get(operator, {})}


_DTYPES = {
    "tf32": torch.float32,
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}


def problem_of(operator: str, layer: str, precision: str, layout: str) -> Problem:
    """The problem whose `layer`, `precision` and `layout` these are, on no device."""
    values = dict(re.findall(r"([A-Za-z]+)([0-9x]+)", layer))

    def triple(key: str) -> Triple:
        numbers = [int(number) for number in values[key].split("x")]
        return (numbers[0], numbers[len(numbers) // 2], numbers[-1])

    in_channels, out_channels, groups = int(values["Cin"]), int(values["Cout"]), int(values["g"])
    return Problem(
        operator,
        torch.Size((int(values["N"]), in_channels, *triple("in"))),
        torch.Size((in_channels, out_channels // groups, *triple("k"))),
        Parameters(triple("s"), triple("p"), triple("op"), triple("d"), groups),
        torch.channels_last_3d if layout == "ndhwc" else torch.contiguous_format,
        _DTYPES[precision],
        precision == "tf32",
        torch.device("meta"),
        1,
        0,
    )


@functools.lru_cache(maxsize=1)
def _table() -> dict[str, Any]:
    table: dict[str, Any] = json.loads(resources.files("convt3d_gemm").joinpath("costs.json").read_text("utf-8"))
    return table


#: Algorithms must be this much further ahead of native on a device that is not the measured one: efficiencies do not
#: carry over quite.
_STRANGER_MARGIN = 0.15


def costs_for(hardware: Hardware, table: Mapping[str, Any] | None = None) -> Costs | None:
    """The class of the table that stands for a device, or None if there is none.

    A GPU that was not measured is given the class of the nearest compute capability, with all rates in proportion to
    the multiprocessors and a wider margin. Below a class's `least_capability` other kernels run, and it stands for
    nothing. A CPU is given the one class that CPUs have, with a wider margin too: their names say little.

    Args:
        hardware: the device.
        table: in place of the package's own.
    """
    classes = (_table() if table is None else table)["classes"]

    def distance(name: str) -> tuple[int, int, int]:
        major, minor = classes[name]["capability"]
        apart = abs(10 * (major - hardware.capability[0]) + minor - hardware.capability[1])
        return classes[name]["device"] != hardware.name, apart, abs(classes[name]["units"] - hardware.units)

    suitable = [
        name
        for name, entry in classes.items()
        if entry["type"] == hardware.type and tuple(entry["least_capability"]) <= hardware.capability
    ]
    if not suitable:
        return None
    name = min(suitable, key=distance)
    entry = classes[name]
    stranger = hardware.type == "cpu" or entry["device"] != hardware.name
    speed = hardware.units / entry["units"]
    return Costs(name, entry, speed, _STRANGER_MARGIN if stranger else 0.0)
