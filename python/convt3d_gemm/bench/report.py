"""What a run shows while it goes on and when it is done: progress, tables, JSON."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import shutil
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType

import torch
from rich import box, filesize
from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table
from rich.text import Text

from convt3d_gemm.bench.ceilings import Ceilings
from convt3d_gemm.bench.layers import Layer, Operator
from convt3d_gemm.bench.measure import Result, Status

OPERATOR_TITLES: dict[Operator, str] = {"forward": "forward", "grad_input_weight": "grad_input + grad_weight"}

STATUS_TITLES: dict[Status, str] = {
    "ok": "-",
    "wrong": "WRONG",
    "failed": "failed",
    "not applicable": "n/a",
}

#: A table needs about this width: in a narrower terminal its lines wrap, which loses no figures.
_LEAST_WIDTH = 120
_WIDEST_NAME = 24

LEGEND = (
    "±: half of what lies between the quartiles. of floor: the least time that this device's own copy and "
    "GEMM rates allow, over the time. speed: native's time over the time (above 1 is faster than PyTorch)."
)


def dtype_name(dtype: torch.dtype) -> str:
    """float32 for torch.float32."""
    return str(dtype).removeprefix("torch.")


def precision_title(dtype: torch.dtype, precision: str) -> str:
    """The dtype, and for float32 its precision, which decides about speed and error."""
    return f"float32 ({precision.upper()})" if dtype == torch.float32 else dtype_name(dtype)


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for a table where there is none."""
    width = max(shutil.get_terminal_size((0, 0)).columns, _LEAST_WIDTH)
    return Console(stderr=stderr, width=width, highlight=False)


class ProgressReport:
    """Tells on stderr what is measured and what came out: a bar in a terminal, plain lines elsewhere."""

    def __init__(self, total: int) -> None:
        self._console = make_console(stderr=True)
        self._total, self._done, self._began = total, 0, time.monotonic()
        self._bar: Progress | None = None
        self._task = TaskID(0)
        if self._console.is_terminal:
            self._bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}"),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                console=self._console,
                transient=True,
            )
            self._task = self._bar.add_task("", total=total)

    def __enter__(self) -> ProgressReport:
        if self._bar is not None:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def begin(self, layer: Layer, operator: Operator, dtype: torch.dtype) -> None:
        """Say what is measured from now on."""
        if self._bar is not None:
            self._bar.update(self._task, description=_case_title(layer, operator, dtype))

    def end(self, results: Sequence[Result]) -> None:
        """Say what came out."""
        self._done += 1
        first = results[0]
        outcomes = ", ".join(f"{result.algorithm} {_time_or_status(result)}" for result in results)
        elapsed = time.monotonic() - self._began
        line = (
            f"[{self._done}/{self._total}, {elapsed:.0f} s] "
            f"{_case_title(first.layer, first.operator, first.dtype)}: {outcomes}"
        )
        self._console.print(line, markup=False, soft_wrap=True)
        if self._bar is not None:
            self._bar.advance(self._task)


def _case_title(layer: Layer, operator: Operator, dtype: torch.dtype) -> str:
    return f"{layer.name} {OPERATOR_TITLES[operator]} {dtype_name(dtype)}"


def _time_or_status(result: Result) -> str:
    if result.timing is None:
        return STATUS_TITLES[result.status]
    return f"{_milliseconds(result.timing.median)} ms{' WRONG' if result.status == 'wrong' else ''}"


def _milliseconds(value: float) -> str:
    return f"{value:.4f}" if value < 1 else f"{value:.3f}" if value < 100 else f"{value:.1f}"


def header_lines(device: dict[str, object], ceilings: Ceilings, precisions: dict[torch.dtype, str]) -> list[str]:
    """The device and its ceilings, as they are printed above the tables."""
    memory, cache = (filesize.decimal(int(str(device[key]))) for key in ("memory_bytes", "cache_bytes"))
    detail = (
        f"compute capability {device['compute_capability']}"
        if "compute_capability" in device
        else (f"{device['threads']} threads")
    )
    rates = ", ".join(
        f"{rate / 1e12:.3g} TFLOP/s {precision_title(dtype, precisions[dtype])}"
        for dtype, rate in ceilings.gemm_rates.items()
    )
    return [
        f"{device['name']}, {detail}, {memory} of memory, {cache} of cache",
        f"ceilings: copy {ceilings.copy_rate / 1e9:.4g} GB/s (read and written), GEMM {rates}",
    ]


def tables(results: Sequence[Result]) -> list[Table]:
    """One table per operator and dtype, with a section per layer and a row per algorithm."""
    groups: dict[tuple[Operator, torch.dtype], list[Result]] = {}
    for result in results:
        groups.setdefault((result.operator, result.dtype), []).append(result)
    return [_table(group) for group in groups.values()]


def _table(results: Sequence[Result]) -> Table:
    first = results[0]
    precision = precision_title(first.dtype, first.precision)
    title = f"{OPERATOR_TITLES[first.operator]}, {precision}, {first.layout.upper()}"
    notes = {reason: number for number, reason in enumerate(_reasons(results), start=1)}
    table = Table(
        title=title,
        title_justify="left",
        caption="\n".join(f"({number}) {reason}" for reason, number in notes.items()) or None,
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    longest_name = max(len(result.layer.name) for result in results)
    table.add_column("layer", overflow="fold", min_width=min(longest_name, _WIDEST_NAME))
    table.add_column("GFLOP", justify="right", no_wrap=True)
    table.add_column("algorithm", no_wrap=True)
    for column in ("ms", "±", "TFLOP/s", "of floor", "workspace", "error", "speed"):
        table.add_column(column, justify="right", no_wrap=True)
    for layer, group in itertools.groupby(results, key=lambda result: result.layer):
        gflop = layer.flops(first.operator) / 1e9
        # Once, beside the first algorithm.
        labels = [layer.name, f"{gflop:.1f}" if gflop >= 10 else f"{gflop:.3g}"]
        for result in group:
            table.add_row(*labels, *_cells(result, notes))
            labels = ["", ""]
        table.add_section()
    return table


def _reasons(results: Sequence[Result]) -> list[str]:
    """Why some are not "ok", each reason once."""
    return list(dict.fromkeys(result.reason for result in results if result.reason is not None))


def _cells(result: Result, notes: Mapping[str, int]) -> list[str | Text]:
    """A row, from the algorithm's name to its speed; wins and losses look alike."""
    dash = "-"
    timing = result.timing
    note = "" if result.reason is None else f" ({notes[result.reason]})"
    time_cell = Text(dash if timing is None else _milliseconds(timing.median))
    error_cell = Text(dash if result.error is None else f"{result.error:.1e}")
    if result.status == "wrong":
        error_cell = Text(f"WRONG{note} {error_cell}", style="bold red")
    elif result.status != "ok":
        time_cell = Text(STATUS_TITLES[result.status] + note, style="yellow")
    return [
        result.algorithm,
        time_cell,
        dash if timing is None else f"{timing.spread:.0%}",
        dash if result.tflops is None else f"{result.tflops:.3g}",
        dash if result.floor_fraction is None else f"{result.floor_fraction:.3f}",
        dash if result.workspace_bytes is None else filesize.decimal(result.workspace_bytes),
        error_cell,
        dash if result.speedup is None else f"{result.speedup:.2f}x",
    ]


def as_json(result: Result) -> dict[str, object]:
    """Everything known of a result, as JSON takes it: times in milliseconds, sizes in bytes."""
    return {
        "layer": dataclasses.asdict(result.layer),
        "specification": result.layer.specification,
        "operator": result.operator,
        "dtype": dtype_name(result.dtype),
        "precision": result.precision,
        "layout": result.layout,
        "algorithm": result.algorithm,
        "status": result.status,
        "reason": result.reason,
        "milliseconds": None if result.timing is None else dataclasses.asdict(result.timing),
        "gflop": result.layer.flops(result.operator) / 1e9,
        "tflops": result.tflops,
        "floor_milliseconds": result.floor,
        "floor_fraction": result.floor_fraction,
        "workspace_bytes": result.workspace_bytes,
        "measured_workspace_bytes": result.measured_workspace_bytes,
        # JSON has no NaN, and a result that holds one has no error to speak of.
        "error": result.error if result.error is not None and math.isfinite(result.error) else None,
        "error_bound": result.error_bound,
        "checked": result.checked,
        "speedup": result.speedup,
    }


def write_json(path: Path, header: dict[str, object], results: Sequence[Result]) -> None:
    """Write the header's entries and ``results``, a list with an object for each.

    Raises:
        OSError: if the file cannot be written.
    """
    content = {**header, "results": [as_json(result) for result in results]}
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n")
