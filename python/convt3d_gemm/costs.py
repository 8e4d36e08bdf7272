"""The cost model: what each algorithm is expected to take for a problem on a class of devices.

    time = (launch + operations / multiply rate + bytes / copy rate) * exp(coefficients . features + correction)

The sum in front is what the work would take at the device's best rates; for "gemm" its bytes include the columns. The
exponential is the inverse of the efficiency: its coefficients are fitted to measurements of each algorithm and
operator, and the correction is what the nearest measured layers are off that fit. A layer that was measured itself is
not predicted: its measured times are taken. `costs.json` holds all of it; ``benchmarks/fit_selection.py`` makes it.
"""

from __future__ import annotations

import functools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from importlib import resources
from typing import Any

import torch

from convt3d_gemm.parameters import Parameters, Triple
from convt3d_gemm.problem import Problem

__all__ = ["FEATURES", "Costs", "Hardware", "costs_for", "features", "problem_of", "times_of"]

Times = Mapping[str, float]


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


#: What makes layers alike: the coordinates that they are compared by, each with the distance that a difference of 1
#: makes. Sizes are logarithms to base 2.
_COORDINATES = {
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

#: Pairs whose product is a feature of its own.
_PRODUCTS = (
    ("input channels of a group", "input channels of a group"),
    ("output channels of a group", "output channels of a group"),
    ("input channels of a group", "output channels of a group"),
    ("groups", "groups"),
    ("groups", "input channels of a group"),
    ("taps", "taps"),
    ("taps", "stride"),
    ("taps", "output channels of a group"),
    ("voxels", "voxels"),
    ("voxels", "input channels of a group"),
    ("voxels", "output channels of a group"),
    ("depthwise", "taps"),
    ("kernel = stride", "input channels of a group"),
    ("kernel = stride", "output channels of a group"),
    ("ndhwc", "input channels of a group"),
    ("ndhwc", "output channels of a group"),
    ("ndhwc", "groups"),
    ("ndhwc", "taps"),
    ("ndhwc", "kernel = stride"),
    ("ndhwc", "half"),
    ("half", "input channels of a group"),
    ("half", "output channels of a group"),
    ("half", "groups"),
    ("half", "taps"),
    ("half", "kernel = stride"),
    ("ieee", "input channels of a group"),
    ("ieee", "output channels of a group"),
    ("ieee", "taps"),
)

#: What the coefficients belong to, in order.
FEATURES = ("1", *_COORDINATES, *(f"{first} * {second}" for first, second in _PRODUCTS))

# Of the nearest layers' deviations from the fit, and how much of "no deviation" goes into their mean.
_NEIGHBOURS = 8
_PRIOR = 0.3


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


_PLACES = {name: place for place, name in enumerate(_COORDINATES)}
_PRODUCT_PLACES = tuple((_PLACES[first], _PLACES[second]) for first, second in _PRODUCTS)
_WEIGHTS = tuple(_COORDINATES.values())


def _features(coordinates: tuple[float, ...]) -> tuple[float, ...]:
    return (1.0, *coordinates, *(coordinates[i] * coordinates[j] for i, j in _PRODUCT_PLACES))


def features(problem: Problem) -> tuple[float, ...]:
    """What the coefficients are multiplied by: the values of `FEATURES`. No size of the problem may be 0."""
    return _features(_coordinates(problem))


@dataclass(frozen=True)
class _Neighbour:
    """A layer of the table: the problem without its operator, where it lies, and its milliseconds."""

    problem: Problem
    coordinates: tuple[float, ...]
    times: Mapping[str, Times]


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
        self._speed = speed
        self._launch = float(entry["launch_seconds"])
        self._reach = float(entry["reach"])
        self._fits: Mapping[str, Mapping[str, Mapping[str, list[float]]]] = entry["fits"]
        self._measured = {(layer, precision, layout): times for layer, precision, layout, times in entry["measured"]}
        self._settings = {(precision, layout) for _, precision, layout in self._measured}
        # One problem's operators are asked about one after the other.
        self._nearest = functools.lru_cache(maxsize=16)(self._find_nearest)

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

    def measured(self, problem: Problem) -> Times:
        """Milliseconds of each algorithm where this very layer is in the table, else nothing."""
        times = self._measured.get((problem.layer, problem.precision, problem.layout), {})
        return {name: value / self._speed for name, value in times_of(times, problem.operator).items()}

    def predict(self, problem: Problem) -> Times:
        """Milliseconds expected of each algorithm; none if nothing was measured at this precision and in this layout.

        Args:
            problem: none of whose sizes is 0.
        """
        if (problem.precision, problem.layout) not in self._settings:
            return {}
        coordinates = _coordinates(problem)
        neighbours = self._nearest(coordinates, (problem.precision, problem.layout))
        operators = ("grad_input", "grad_weight") if problem.operator == "grad_input_weight" else ()
        parts = [self._expected(problem._replace(operator=part), coordinates, neighbours) for part in operators]
        together = self._expected(problem, coordinates, neighbours)
        # One call for both gradients shares work: gemm's columns, a vendor's copies in another layout.
        names = set.intersection(*map(set, parts)) if parts else set()
        return {**{name: sum(part[name] for part in parts) for name in sorted(names)}, **together}

    def doubted(self, problem: Problem) -> set[str]:
        """Algorithms that native has beaten on one of the `agreeing` nearest layers, whatever is expected of them here.

        What is expected may be off by more than any margin where a library picks a kernel of its own for some shapes
        (cuDNN, oneDNN); such shapes come in clusters.
        """
        doubted = set()
        nearest = self._nearest(_coordinates(problem), (problem.precision, problem.layout))
        for _, neighbour in nearest[: self.agreeing]:
            times = times_of(neighbour.times, problem.operator)
            doubted |= {name for name, time in times.items() if time > times.get("native", math.inf)}
        return doubted

    def _expected(
        self,
        problem: Problem,
        coordinates: tuple[float, ...],
        neighbours: list[tuple[float, _Neighbour]],
    ) -> dict[str, float]:
        values = _features(coordinates)
        expected = {}
        for name, fit in self._fits.get(problem.operator, {}).items():
            slowness = _fitted(fit, values)
            deviations, weights = 0.0, _PRIOR
            for weight, neighbour in neighbours:
                time = neighbour.times.get(problem.operator, {}).get(name)
                if time is not None:
                    there = neighbour.problem._replace(operator=problem.operator)
                    fitted = _fitted(fit, _features(neighbour.coordinates))
                    deviations += weight * (math.log(time / self._speed / self.work(there, name)) - fitted)
                    weights += weight
            expected[name] = self.work(problem, name) * math.exp(slowness + deviations / weights)
        return expected

    def _find_nearest(self, coordinates: tuple[float, ...], setting: tuple[str, str]) -> list[tuple[float, _Neighbour]]:
        """The nearest layers that were measured, each with the weight of its deviation.

        Of the same precision and layout where there are enough of these: libraries have kernels of their own for each.
        """
        found = []
        same = [each for each in self._neighbours if (each.problem.precision, each.problem.layout) == setting]
        for neighbour in same if len(same) >= _NEIGHBOURS else self._neighbours:
            apart = zip(_WEIGHTS, coordinates, neighbour.coordinates, strict=True)
            found.append((sum((w * (a - b)) ** 2 for w, a, b in apart), neighbour))
        found.sort(key=lambda pair: pair[0])
        return [(self._weight(square), neighbour) for square, neighbour in found[:_NEIGHBOURS]]

    def _weight(self, square: float) -> float:
        """Of a deviation, by the square of the distance; without reach no layer says anything of another."""
        return math.exp(-0.5 * square / self._reach**2) if self._reach else 0.0

    @functools.cached_property
    def _neighbours(self) -> list[_Neighbour]:
        neighbours = []
        for (layer, precision, layout), times in self._measured.items():
            problem = problem_of("forward", layer, precision, layout)
            neighbours.append(_Neighbour(problem, _coordinates(problem), times))
        return neighbours


def times_of(times: Mapping[str, Times], operator: str) -> Times:
    """The times of an operator; those of both gradients are added up where they were not taken together."""
    if operator != "grad_input_weight":
        return times.get(operator, {})
    first, second = times.get("grad_input", {}), times.get("grad_weight", {})
    return {**{name: first[name] + second[name] for name in first if name in second}, **times.get(operator, {})}


def _fitted(fit: Mapping[str, list[float]], values: tuple[float, ...]) -> float:
    """The logarithm of how much longer than its work an algorithm takes; not beyond what was ever measured."""
    least, most = fit["range"]
    return min(max(sum(a * b for a, b in zip(fit["coefficients"], values, strict=True)), least), most)


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
