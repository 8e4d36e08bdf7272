"""Draws the figures of the documents: speed-ups from docs/figures/h200.json, and which inputs an output takes.

    python benchmarks/draw_figures.py [FOLDER]

Needs matplotlib (the "bench" extra). The figures are written beside the data, as SVG.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("svg")
from matplotlib import pyplot as plt
from matplotlib.axes import Axes

FOLDER = Path(__file__).parent.parent / "docs" / "figures"
COLOURS = {"gemm": "#d9822b", "direct": "#2b6cb0"}


def draw_speed(measured: dict[str, Any], to: Path) -> None:
    """How many times as fast as cuDNN each algorithm is, layer by layer, on a logarithmic axis."""
    tables = measured["milliseconds"]
    figure, panes = plt.subplots(1, 2, figsize=(9.5, 5.2), sharey=True, layout="constrained")
    titles = {"forward": "forward", "gradients": "grad_input and grad_weight"}
    for pane, (name, title) in zip(panes, titles.items(), strict=True):
        _draw_table(pane, tables[name], title)
    panes[0].set_yticks(range(len(tables["forward"])), list(tables["forward"]))
    panes[0].invert_yaxis()
    panes[0].legend(loc="lower right", frameon=False)
    figure.suptitle(f"Times as fast as cuDNN: {measured['gpu']}, {measured['precision']}, {measured['date']}")
    figure.savefig(to, metadata={"Date": None})
    plt.close(figure)


def _draw_table(pane: Axes, table: dict[str, dict[str, float]], title: str) -> None:
    for shift, (algorithm, colour) in zip((-0.2, 0.2), COLOURS.items(), strict=True):
        ratios = [times["native"] / times[algorithm] for times in table.values()]
        places = [row + shift for row in range(len(ratios))]
        # Bars begin at 1: what points to the left is a loss.
        pane.barh(places, [ratio - 1 for ratio in ratios], 0.38, left=1, color=colour, label=algorithm)
        for place, ratio in zip(places, ratios, strict=True):
            is_win = ratio >= 1
            pane.annotate(
                f"{ratio:.2g}" if ratio < 10 else f"{ratio:.0f}",
                (ratio, place),
                xytext=(3 if is_win else -3, 0),
                textcoords="offset points",
                ha="left" if is_win else "right",
                va="center",
                fontsize=6.5,
            )
    pane.set_xscale("log")
    pane.set_xlim(0.11, 40)
    ticks = [0.125, 0.25, 0.5, 1, 2, 4, 8, 16, 32]
    pane.set_xticks(ticks, [f"{tick:g}" for tick in ticks])
    pane.minorticks_off()
    pane.axvline(1, color="black", linewidth=0.8)
    pane.spines[["top", "right"]].set_visible(False)
    pane.set_title(title, fontsize=10)


def draw_phases(to: Path, kernel: int = 3, stride: int = 2, padding: int = 1, inputs: int = 5) -> None:
    """One axis of a transposed convolution: every line is a tap; outputs of one residue take alike inputs."""
    outputs = (inputs - 1) * stride - 2 * padding + kernel
    figure, pane = plt.subplots(figsize=(7.5, 2.2), layout="constrained")
    for source in range(inputs):
        for tap in range(kernel):
            target = source * stride - padding + tap
            if 0 <= target < outputs:
                pane.plot([source * stride, target], [1, 0], color=f"C{target % stride}", linewidth=1.2, zorder=1)
                pane.annotate(
                    f"w{tap}", ((source * stride + 2 * target) / 3, 1 / 3), fontsize=7, ha="center", va="center"
                ).set_bbox({"facecolor": "white", "edgecolor": "none", "pad": 0.8})
    pane.scatter([source * stride for source in range(inputs)], [1] * inputs, s=210, color="#555555", zorder=2)
    colours = [f"C{output % stride}" for output in range(outputs)]
    pane.scatter(range(outputs), [0] * outputs, s=210, color=colours, zorder=2)
    for source in range(inputs):
        pane.annotate(f"x{source}", (source * stride, 1), color="white", ha="center", va="center", fontsize=8)
    for output in range(outputs):
        pane.annotate(f"y{output}", (output, 0), color="white", ha="center", va="center", fontsize=8)
    pane.set_ylim(-0.35, 1.35)
    pane.set_title(
        f"kernel {kernel}, stride {stride}, padding {padding}: each colour is a residue of the output, a phase",
        fontsize=9,
    )
    pane.axis("off")
    figure.savefig(to, metadata={"Date": None})
    plt.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", nargs="?", type=Path, default=FOLDER)
    folder = parser.parse_args().folder
    draw_speed(json.loads((FOLDER / "h200.json").read_text()), folder / "speed.svg")
    draw_phases(folder / "phases.svg")


if __name__ == "__main__":
    main()
