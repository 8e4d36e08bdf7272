"""``--plot``: the time of every layer by algorithm, and all of them under the device's roofline."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

from convt3d_gemm.bench.ceilings import Ceilings
from convt3d_gemm.bench.layers import Layer
from convt3d_gemm.bench.measure import Result
from convt3d_gemm.bench.tables import STATUS_TITLES, group_title, grouped_results

#: Colours that differ for colour-blind eyes too (Okabe and Ito), and markers, so that colour is not all.
_STYLES = {
    "native": ("#000000", "o"),
    "gemm": ("#0072b2", "s"),
    "direct": ("#d55e00", "^"),
    "aten": ("#888888", "D"),
    "auto": ("#cc79a7", "*"),
}
_WRONG = "#cc0000"
_FLOOR = "#009e73"
_ROW_INCHES = 0.42
_ROW_SPAN = 0.6  # of a row's height, for the marks of all algorithms
_LEAST_ROWS = 9  # below that the roofline would be too flat to read
_NAME_GAP = 0.032  # between the names under a roofline, of its width


def write_plot(path: Path, device_name: str, ceilings: Ceilings, results: Sequence[Result]) -> None:
    """Draw a pair of panels for each operator, dtype and layout.

    Args:
        path: the picture; its ending chooses the format (png, svg, pdf).
        device_name: for the title.
        ceilings: of that device.
        results: of layers; those without a time are named beside the layer's row.

    Raises:
        OSError: if the file cannot be written.
        ValueError: if there are no results, or the ending stands for no format.
    """
    groups = grouped_results(results)
    if not groups:
        raise ValueError("nothing was measured that could be plotted")
    rows = [max(len(_by_layer(group)), _LEAST_ROWS) for group in groups]
    heights = [1.9 + _ROW_INCHES * count for count in rows]
    figure = Figure(figsize=(16, sum(heights) + 0.9), layout="constrained")
    figure.suptitle(f"Transposed 3-D convolutions on {device_name}", fontsize=15, fontweight="bold")
    axes = figure.subplots(len(groups), 2, squeeze=False, height_ratios=heights, width_ratios=(1, 1))
    for group, (times, roofline) in zip(groups, axes, strict=True):
        _draw_times(times, group)
        _draw_roofline(roofline, group, ceilings)
    figure.savefig(path, dpi=120)


def _by_layer(results: Sequence[Result]) -> list[tuple[Layer, list[Result]]]:
    return [(layer, list(group)) for layer, group in itertools.groupby(results, key=lambda result: result.layer)]


def _style(algorithm: str) -> tuple[str, str]:
    return _STYLES.get(algorithm, ("#56b4e9", "P"))


def _plain_numbers(axis: Axis, *, between: bool) -> None:
    """0.1 and 10 instead of powers; 2 and 5 ``between`` them where there is room."""
    axis.set_major_locator(LogLocator(subs=(1, 2, 5) if between else (1,), numticks=40))
    axis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axis.set_minor_formatter(NullFormatter())


def _grid(axes: Axes) -> None:
    axes.grid(which="major", color="#cccccc", linewidth=0.8)
    axes.grid(which="minor", color="#e8e8e8", linewidth=0.5)
    axes.set_axisbelow(True)


def _draw_times(axes: Axes, results: Sequence[Result]) -> None:
    """A row per layer, a mark per algorithm over its quartiles, and the floor, which nothing can pass."""
    layers = _by_layer(results)
    # One below the other within a row, so that equal times do not cover each other.
    names = list(dict.fromkeys(result.algorithm for result in results if result.timing is not None))
    below = {name: _ROW_SPAN * (number / max(len(names) - 1, 1) - 0.5) for number, name in enumerate(names)}
    for row, (_, group) in enumerate(layers):
        floor = group[0].floor
        axes.plot([floor, floor], [row - _ROW_SPAN / 2, row + _ROW_SPAN / 2], color=_FLOOR, linewidth=3, zorder=2)
        for result in group:
            if result.timing is None:
                continue
            timing, place = result.timing, row + below[result.algorithm]
            colour, marker = _style(result.algorithm)
            axes.plot([floor, timing.median], [place, place], color="#dddddd", linewidth=0.8, zorder=1)
            axes.plot([timing.lower_quartile, timing.upper_quartile], [place] * 2, color=colour, linewidth=3, alpha=0.5)
            edge = _WRONG if result.status == "wrong" else "white"
            axes.plot(timing.median, place, marker, color=colour, markersize=7, markeredgecolor=edge, zorder=3)
        troubles = [result for result in group if result.status in ("wrong", "failed", "out of memory")]
        if troubles:
            text = ", ".join(f"{result.algorithm}: {STATUS_TITLES[result.status]}" for result in troubles)
            axes.annotate(
                text,
                (1, row),
                (5, 0),
                xycoords=axes.get_yaxis_transform(),
                textcoords="offset points",
                va="center",
                fontsize=8,
                color=_WRONG,
                zorder=4,
            )
    axes.set_xscale("log")
    axes.set_yticks(range(len(layers)), [layer.name for layer, _ in layers])
    axes.set_ylim(len(layers) - 0.4, -0.6)
    low, high = axes.get_xlim()
    _plain_numbers(axes.xaxis, between=high / low < 1e4)
    axes.set_xlabel("time of one call, ms (left is faster)")
    axes.set_title(group_title(results), loc="left", fontsize=12)
    _grid(axes)
    axes.grid(axis="y", visible=False)
    for row in range(1, len(layers)):
        axes.axhline(row - 0.5, color="#cccccc", linewidth=0.8, zorder=0)
    handles = [*_legend_of(results), Line2D([], [], linestyle="", marker="|", color=_FLOOR, markersize=13)]
    handles[-1].set(label="floor: the device's copy and GEMM rates", markeredgewidth=2.5)
    axes.legend(
        handles=handles,
        ncols=len(handles),
        frameon=False,
        loc="lower left",
        bbox_to_anchor=(0, 1),
        borderaxespad=2,  # above the title
    )


def _legend_of(results: Sequence[Result]) -> list[Line2D]:
    handles = []
    for name in dict.fromkeys(result.algorithm for result in results if result.timing is not None):
        colour, marker = _style(name)
        handles.append(Line2D([], [], linestyle="", marker=marker, color=colour, label=name, markersize=8))
    return handles


def _draw_roofline(axes: Axes, results: Sequence[Result], ceilings: Ceilings) -> None:
    """Operations per second over operations per byte; a layer is a vertical line, named at its foot."""
    peak, copy_rate = ceilings.gemm_rates[results[0].dtype], ceilings.copy_rate
    layers = _by_layer(results)
    intensity = {layer: _intensity(group[0]) for layer, group in layers}
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
    for layer, group in layers:
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
    _plain_numbers(axes.xaxis, between=right / left < 1e2)
    _plain_numbers(axes.yaxis, between=top / bottom < 1e3)
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
