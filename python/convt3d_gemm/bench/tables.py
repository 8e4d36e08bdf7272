"""The tables of a run as plain text in rows and columns, before anything lays them out."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeVar

import torch

from convt3d_gemm.bench.competitors import BASELINE
from convt3d_gemm.bench.discovery import Found
from convt3d_gemm.bench.layers import Layer, Operator
from convt3d_gemm.bench.measure import Result, Status
from convt3d_gemm.bench.network import BEFORE, NetworkResult
from convt3d_gemm.bench.timing import Timing

_Outcome = TypeVar("_Outcome", Result, NetworkResult)

OPERATOR_TITLES: dict[Operator, str] = {
    "forward": "forward",
    "grad_input": "grad_input",
    "grad_weight": "grad_weight",
    "grad_input_weight": "grad_input + grad_weight",
}

STATUS_TITLES: dict[Status, str] = {
    "ok": "-",
    "wrong": "WRONG",
    "failed": "failed",
    "out of memory": "out of memory",
    "not applicable": "n/a",
}

LAYER_LEGEND = (
    "±: half of what lies between the quartiles. GB/s: as if every tensor were moved once. of floor: the least time "
    "that this device's own copy and GEMM rates allow, over the time. error: relative, against float64. speed: "
    "native's time over the time (above 1 is faster than PyTorch)."
)
NETWORK_LEGEND = (
    "before: the network as it is; the others: a copy after replace_conv_transpose3d with that algorithm. training "
    "step: forward, a loss and backward; the optimizer, which is the same in all, is left out. error: of the outputs, "
    "of a training step that of all parameters' gradients, relative, against the network in float64, without dropout. "
    "float16 and bfloat16 are computed under autocast; TF32 is for matrix products as well. Times include the host's."
)


class Cell(NamedTuple):
    """One entry of a table; what is not "plain" should catch the eye."""

    text: str
    kind: Literal["plain", "wrong", "missing"] = "plain"


class Column(NamedTuple):
    """The name of a column, and whether it holds figures, which are aligned to the right."""

    name: str
    figures: bool = True


@dataclass(frozen=True)
class Table:
    """Rows in sections, and what is said below them.

    Attributes:
        sections: of a layer or a network each, holding rows of one `Cell` per column.
        notes: to which numbers in the cells refer, (1) to the first.
    """

    title: str
    columns: tuple[Column, ...]
    sections: list[list[list[Cell]]]
    notes: list[str]


_DASH = Cell("-")
_LAYER_COLUMNS = (
    Column("layer", figures=False),
    Column("GFLOP"),
    Column("algorithm", figures=False),
    *map(Column, ("ms", "±", "TFLOP/s", "GB/s", "of floor", "workspace", "error", "speed")),
)
_NETWORK_COLUMNS = (
    Column("network", figures=False),
    Column("algorithm", figures=False),
    *map(Column, ("ms", "±", "peak memory", "error", "speed")),
)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def precision_title(dtype: torch.dtype, precision: str) -> str:
    """The dtype, and for float32 its precision, which decides about speed and error."""
    return f"float32 ({precision.upper()})" if dtype == torch.float32 else dtype_name(dtype)


def milliseconds(value: float) -> str:
    """With the digits that a measurement is good for."""
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 100 else f"{value:.1f}"


def size(number: int) -> str:
    """Bytes in decimal units: 7.1 MB."""
    value, unit = float(number), "bytes"
    for larger in ("kB", "MB", "GB", "TB"):
        if value < 1000:
            break
        value, unit = value / 1000, larger
    return f"{number} bytes" if unit == "bytes" else f"{value:.1f} {unit}"


def time_or_status(result: Result | NetworkResult) -> str:
    """For a line of progress."""
    if result.timing is None:
        return STATUS_TITLES[result.status]
    return f"{milliseconds(result.timing.median)} ms{' WRONG' if result.status == 'wrong' else ''}"


def grouped_results(results: Iterable[Result]) -> list[list[Result]]:
    """The results of each operator, dtype and layout: what belongs into one table."""
    groups: dict[tuple[Operator, torch.dtype, str], list[Result]] = {}
    for result in results:
        groups.setdefault((result.operator, result.dtype, result.layout), []).append(result)
    return list(groups.values())


def group_title(results: Sequence[Result]) -> str:
    """Operator, dtype and layout of a group."""
    first = results[0]
    precision = precision_title(first.dtype, first.precision)
    return f"{OPERATOR_TITLES[first.operator]}, {precision}, {first.layout.upper()}"


def layer_tables(results: Iterable[Result]) -> list[Table]:
    """One table per operator, dtype and layout, with a section per layer and a row per algorithm."""
    return [_layer_table(group) for group in grouped_results(results)]


def _layer_table(results: Sequence[Result]) -> Table:
    notes = _numbered_reasons(results)
    sections = []
    for layer, group in itertools.groupby(results, key=lambda result: result.layer):
        labels = [Cell(layer.name), Cell(_gflop(layer, results[0].operator))]  # once, beside the first algorithm
        rows = []
        for result in group:
            rows.append([*labels, *_layer_cells(result, notes)])
            labels = [Cell(""), Cell("")]
        sections.append(rows)
    return Table(group_title(results), _LAYER_COLUMNS, sections, list(notes))


def _gflop(layer: Layer, operator: Operator) -> str:
    gflop = layer.flops(operator) / 1e9
    return f"{gflop:.1f}" if gflop >= 10 else f"{gflop:.3g}"


def _layer_cells(result: Result, notes: Mapping[str, int]) -> list[Cell]:
    """A row, from the algorithm's name to its speed; wins and losses look alike."""
    return [
        Cell(result.algorithm),
        *_time_cells(result, notes),
        _cell(result.tflops, "{:.3g}"),
        _cell(result.gigabytes_per_second, "{:.4g}"),
        _cell(result.floor_fraction, "{:.3f}"),
        _DASH if result.workspace_bytes is None else Cell(size(result.workspace_bytes)),
        _error_cell(result, notes),
        _cell(result.speedup, "{:.2f}x"),
    ]


def grouped_networks(results: Iterable[NetworkResult]) -> dict[str, list[NetworkResult]]:
    """The results of each task, dtype and layout, which is what they are called."""
    groups: dict[str, list[NetworkResult]] = {}
    for result in results:
        precision = precision_title(result.dtype, result.precision)
        groups.setdefault(f"whole network, {result.task}, {precision}, {result.layout.upper()}", []).append(result)
    return groups


def network_tables(results: Iterable[NetworkResult]) -> list[Table]:
    """One table per task, dtype and layout, with a section per network and a row before and after."""
    return [_network_table(title, group) for title, group in grouped_networks(results).items()]


def _network_table(title: str, results: Sequence[NetworkResult]) -> Table:
    notes = _numbered_reasons(results)
    sections = []
    for network, group in itertools.groupby(results, key=lambda result: result.network):
        label = Cell(network)
        rows = []
        for result in group:
            memory = _DASH if result.peak_bytes is None else Cell(size(result.peak_bytes))
            rows.append(
                [
                    label,
                    Cell(result.algorithm),
                    *_time_cells(result, notes),
                    memory,
                    _error_cell(result, notes),
                    _cell(result.speedup, "{:.2f}x"),
                ]
            )
            label = Cell("")
        sections.append(rows)
    return Table(title, _NETWORK_COLUMNS, sections, list(notes))


def _numbered_reasons(results: Sequence[_Outcome]) -> dict[str, int]:
    """Why some are not "ok", each reason once, numbered from 1; a plain lack of memory says so in its cell."""
    reasons = dict.fromkeys(
        result.reason for result in results if result.reason is not None and result.reason != result.status
    )
    return {reason: number for number, reason in enumerate(reasons, start=1)}


def _note(result: Result | NetworkResult, notes: Mapping[str, int]) -> str:
    number = None if result.reason is None else notes.get(result.reason)
    return "" if number is None else f" ({number})"


def _time_cells(result: Result | NetworkResult, notes: Mapping[str, int]) -> tuple[Cell, Cell]:
    """The median and its spread, or why there are none."""
    timing: Timing | None = result.timing
    if timing is not None:
        return Cell(milliseconds(timing.median)), Cell(f"{timing.spread:.0%}")
    if result.status in ("ok", "wrong"):
        return _DASH, _DASH
    return Cell(STATUS_TITLES[result.status] + _note(result, notes), "missing"), _DASH


def _error_cell(result: Result | NetworkResult, notes: Mapping[str, int]) -> Cell:
    text = "-" if result.error is None else f"{result.error:.1e}"
    if result.status == "wrong":
        return Cell(f"{STATUS_TITLES['wrong']}{_note(result, notes)} {text}", "wrong")
    return Cell(text)


def _cell(value: float | None, form: str) -> Cell:
    return _DASH if value is None else Cell(form.format(value))


def share_lines(found: Sequence[Found], results: Sequence[Result], networks: Sequence[NetworkResult]) -> list[str]:
    """How much of each network's forward pass its transposed convolutions take natively: the most there is to gain."""
    lines = []
    for network in networks:
        if network.algorithm != BEFORE or network.task != "forward" or network.timing is None:
            continue
        times = {
            result.layer: result.timing.median
            for result in results
            if (result.algorithm, result.operator) == (BASELINE, "forward")
            and (result.dtype, result.layout) == (network.dtype, network.layout)
            and result.timing is not None
        }
        if all(entry.layer in times for entry in found):
            layers = sum(entry.calls * times[entry.layer] for entry in found)
            precision = precision_title(network.dtype, network.precision)
            lines.append(
                f"{network.network}, forward, {precision}, {network.layout.upper()}: natively, its transposed "
                f"convolutions, measured one by one, take {milliseconds(layers)} of "
                f"{milliseconds(network.timing.median)} ms ({layers / network.timing.median:.0%})."
            )
    return lines
