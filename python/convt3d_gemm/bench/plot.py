"""``--plot``: the time of every layer by algorithm, all of them under the device's roofline, and whole networks."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from convt3d_gemm.bench.ceilings import Ceilings
from convt3d_gemm.bench.layers import Layer
from convt3d_gemm.bench.measure import Result
from convt3d_gemm.bench.network import BEFORE, NetworkResult
from convt3d_gemm.bench.tables import (
    STATUS_TITLES,
    group_title,
    grouped_networks,
    grouped_results,
    precision_title,
)

_Item = TypeVar("_Item")

#: Colours that differ for colour-blind eyes too (Okabe and Ito), and markers, so that colour is not all.
_STYLES = {
    "native": ("#000000", "o"),
    BEFORE: ("#000000", "o"),
    "gemm": ("#0072b2", "s"),
    "direct": ("#d55e00", "^"),
    "aten": ("#888888", "D"),
    "auto": ("#aa4499", "v"),
}
_WRONG = "#cc0000"
_FLOOR = "#009e73"
_ROW_INCHES = 0.42
_ROW_SPAN = 0.6  # of a row's height, for the marks of all algorithms
_LEAST_ROWS = 9  # below that the roofline would be too flat to read
_NAME_GAP = 0.032  # between the names under a roofline, of its width


@dataclass(frozen=True)
class _Row:
    """What is drawn at one height: the outcomes of a layer or a network, and the floor under their times, if any."""

    label: str
    floor: float | None
    outcomes: Sequence[Result | NetworkResult]


def write_plot(
    path: Path,
    device_name: str,
    ceilings: Ceilings,
    results: Sequence[Result],
    networks: Sequence[NetworkResult] = (),
) -> None:
    """Draw a pair of panels for each operator, dtype and layout, and one for all whole networks.

    Args:
        path: the picture; its ending chooses the format (png, svg, pdf).
        device_name: for the title.
        ceilings: of that device.
        results: of layers; those without a time are named beside the layer's row.
        networks: of networks, likewise.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there are no results, or the ending stands for no format.
    """
    groups = grouped_results(results)
    if not groups and not networks:
        raise ValueError("nothing was measured that could be plotted")
    heights = [2.2 + _ROW_INCHES * max(len(_by_layer(group)), _LEAST_ROWS) for group in groups]
    rows = [
        _Row(_network_label(outcomes[0]), None, outcomes)
        for group in grouped_networks(networks).values()
        for outcomes in _in_runs(group, lambda outcome: outcome.network)
    ]
    if rows:
        heights.append(1.6 + _ROW_INCHES * len(rows))
    layout = ConstrainedLayoutEngine(h_pad=0.2)  # inches: with the legends, which it does not know of
    figure = Figure(figsize=(16, sum(heights) + 0.8), layout=layout)
    figure.suptitle(f"Transposed 3-D convolutions on {device_name}", fontsize=15, fontweight="bold")
    grid = figure.add_gridspec(len(heights), 2, height_ratios=heights)
    for number, group in enumerate(groups):
        layers = [_Row(layer.name, outcomes[0].floor, outcomes) for layer, outcomes in _by_layer(group).items()]
        _draw_times(figure.add_subplot(grid[number, 0]), group_title(group), layers)
        _draw_roofline(figure.add_subplot(grid[number, 1]), group, ceilings)
    if rows:
        _draw_times(figure.add_subplot(grid[-1, :]), "whole network, before and after replace_conv_transpose3d", rows)
    figure.savefig(path, dpi=120)


def _network_label(result: NetworkResult) -> str:
    precision = precision_title(result.dtype, result.precision)
    return f"{result.network}, {result.task}\n{precision}, {result.layout.upper()}"


def _by_layer(results: Sequence[Result]) -> dict[Layer, list[Result]]:
    return {group[0].layer: group for group in _in_runs(results, lambda result: result.layer)}


def _in_runs(items: Iterable[_Item], key: Callable[[_Item], object]) -> list[list[_Item]]:
    """Neighbours of the same key together."""
    return [list(group) for _, group in itertools.groupby(items, key=key)]


def _style(algorithm: str) -> tuple[str, str]:
    return _STYLES.get(algorithm, ("#56b4e9", "P"))


def _plain_numbers(axis: Axis) -> None:
    """0.1 and 10 instead of powers, and as many numbers between them as there is room for."""
    low, high = sorted(axis.get_view_interval())
    decades = math.log10(high / low)
    between = (1, 1.5, 2, 3, 4, 5, 7) if decades < 1 else (1, 2, 5) if decades < 3 else (1,)
    axis.set_major_locator(LogLocator(subs=between, numticks=40))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _grid(axes: Axes) -> None:
    axes.grid(which="major", color="#cccccc", linewidth=0.8)
    axes.grid(which="minor", color="#e8e8e8", linewidth=0.5)
    axes.set_axisbelow(True)


def _draw_times(axes: Axes, title: str, rows: Sequence[_Row]) -> None:
    """A mark per algorithm over its quartiles in every row, and the floor, which nothing can pass."""
    # One below the other within a row, so that equal times do not cover each other.
    names = _timed_algorithms(outcome for row in rows for outcome in row.outcomes)
    below = {name: _ROW_SPAN * (number / max(len(names) - 1, 1) - 0.5) for number, name in enumerate(names)}
    for height, row in enumerate(rows):
        if row.floor is not None:
            ends = [height - _ROW_SPAN / 2, height + _ROW_SPAN / 2]
            axes.plot([row.floor, row.floor], ends, color=_FLOOR, linewidth=3, zorder=2)
        for outcome in row.outcomes:
            if outcome.timing is None:
                continue
            timing, place = outcome.timing, height + below[outcome.algorithm]
            colour, marker = _style(outcome.algorithm)
            if row.floor is not None:
                axes.plot([row.floor, timing.median], [place, place], color="#dddddd", linewidth=0.8, zorder=1)
            axes.plot([timing.lower_quartile, timing.upper_quartile], [place] * 2, color=colour, linewidth=3, alpha=0.5)
            edge = _WRONG if outcome.status == "wrong" else "white"
            axes.plot(timing.median, place, marker, color=colour, markersize=7, markeredgecolor=edge, zorder=3)
        troubles = [outcome for outcome in row.outcomes if outcome.status in ("wrong", "failed", "out of memory")]
        if troubles:
            text = ", ".join(f"{outcome.algorithm}: {STATUS_TITLES[outcome.status]}" for outcome in troubles)
            axes.annotate(
                text,
                (1, height),
                (5, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=_WRONG,
                zorder=4,
            )
    axes.set_xscale("log")
    axes.set_yticks(range(len(rows)), [row.label for row in rows])
    axes.set_ylim(len(rows) - 0.4, -0.6)
    _plain_numbers(axes.xaxis)
    axes.set_xlabel("time of one call, ms (left is faster)")
    axes.set_title(title, loc="left", fontsize=12)
    _grid(axes)
    axes.grid(axis="y", visible=False)
    for height in range(1, len(rows)):
        axes.axhline(height - 0.5, color="#cccccc", linewidth=0.8, zorder=0)
    handles = [
        Line2D([], [], linestyle="", marker=_style(name)[1], color=_style(name)[0], label=name, markersize=8)
        for name in names
    ]
    if any(row.floor is not None for row in rows):
        label = "floor of the device's rates"
        handles.append(
            Line2D([], [], linestyle="", marker="|", color=_FLOOR, label=label, markersize=13, markeredgewidth=2.5)
        )
    legend = axes.legend(
        handles=handles,
        ncols=len(handles),
        frameon=False,
        columnspacing=1.2,
        handletextpad=0.3,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=2,  # above the title
    )
    legend.set_in_layout(False)  # it is wider than its axes may be, and there is room beside it


def _timed_algorithms(outcomes: Iterable[Result | NetworkResult]) -> list[str]:
    """Each once, in the order in which they were measured."""
    return list(dict.fromkeys(outcome.algorithm for outcome in outcomes if outcome.timing is not None))


def _draw_roofline(axes: Axes, results: Sequence[Result], ceilings: Ceilings) -> None:
    """Operations per second over operations per byte; a layer is a vertical line, named at its foot."""
    peak, copy_rate = ceilings.gemm_rates[results[0].dtype], ceilings.copy_rate
    layers = _by_layer(results)
    intensity = {layer: _intensity(group[0]) for layer, group in layers.items()}
    left = min(*intensity.values(), peak / copy_rate) / 2
    right = max(*intensity.values(), peak / copy_rate) * 2
    rates = [result.tflops for result in results if result.tflops is not None]
    bottom = min([left * copy_rate / 1e12, *rates]) / 4
    top = peak / 1e12 * 2.5
    ridge = [left, peak / copy_rate, right]
    axes.plot(ridge, [min(peak, x * copy_rate) / 1e12 for x in ridge], color=_FLOOR, linewidth=2.5, zorder=2)
    label = f"GEMM {peak / 1e12:.3g} TFLOP/s"
    axes.annotate(label, (right, peak / 1e12), (-6, 5), textcoords="offset points", fontsize=10, ha="right")
    axes.set(xscale="log", yscale="log", xlim=(left, right), ylim=(bottom, top))
    for layer, group in layers.items():
        x = intensity[layer]
        axes.plot([x, x], [bottom, min(peak, x * copy_rate) / 1e12], color="#cccccc", linewidth=0.8, zorder=1)
        for result in group:
            if result.tflops is not None:
                colour, marker = _style(result.algorithm)
                edge = _WRONG if result.status == "wrong" else "white"
                axes.plot(x, result.tflops, marker, color=colour, markersize=8, markeredgecolor=edge, zorder=3)
    _name_at_the_foot(axes, intensity)
    axes.set_xlabel("operations per byte, if every tensor is moved once", labelpad=6)
    axes.set_ylabel("TFLOP/s (up is faster)")
    axes.set_title(f"roofline: copy {copy_rate / 1e9:.4g} GB/s", loc="left", fontsize=12)
    _plain_numbers(axes.xaxis)
    _plain_numbers(axes.yaxis)
    axes.xaxis.tick_top()
    axes.xaxis.set_label_position("top")
    _grid(axes)


def _intensity(result: Result) -> float:
    """Operations per byte."""
    moved = result.layer.elements_moved(result.operator) * result.dtype.itemsize
    return result.layer.flops(result.operator) / moved


def _name_at_the_foot(axes: Axes, intensity: dict[Layer, float]) -> None:
    """The names side by side below the axis, each with a line to its intensity."""
    low, high = map(math.log, axes.get_xlim())
    ordered = sorted(intensity, key=lambda layer: intensity[layer])
    places = spread([(math.log(intensity[layer]) - low) / (high - low) for layer in ordered], _NAME_GAP)
    transform = axes.get_xaxis_transform()
    for layer, place in zip(ordered, places, strict=True):
        spot = math.exp(low + place * (high - low))
        axes.plot(
            [intensity[layer], spot], [0, -0.04], transform=transform, color="#aaaaaa", linewidth=0.8, clip_on=False
        )
        axes.text(spot, -0.045, layer.name, transform=transform, rotation=90, ha="center", va="top", fontsize=9)


def spread(places: Sequence[float], gap: float) -> list[float]:
    """Sorted places in 0 to 1, moved as little as they must be to lie ``gap`` apart, or evenly if there is no room.

    Neighbours that are too close form a block around the mean of where its members want to be; blocks that touch
    are one.
    """
    if len(places) > 1:
        gap = min(gap, 1 / (len(places) - 1))
    blocks: list[list[float]] = []
    for place in places:
        blocks.append([place])
        while len(blocks) > 1 and _start(blocks[-2], gap) + gap * len(blocks[-2]) > _start(blocks[-1], gap):
            last = blocks.pop()
            blocks[-1] += last
    return [_start(block, gap) + gap * number for block in blocks for number in range(len(block))]


def _start(block: Sequence[float], gap: float) -> float:
    """Where the first of a block goes, so that none leaves 0 to 1."""
    width = gap * (len(block) - 1)
    return min(max(sum(block) / len(block) - width / 2, 0.0), 1.0 - width)
