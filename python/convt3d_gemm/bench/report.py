"""What a run shows on a terminal, while it goes on and when it is done."""

from __future__ import annotations

import shutil
import time
from collections.abc import Sequence
from types import TracebackType

import torch
from rich import box
from rich.console import Console
from rich.measure import Measurement
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
)
from rich.table import Table as RichTable
from rich.text import Text

from convt3d_gemm.bench.ceilings import Ceilings
from convt3d_gemm.bench.discovery import Found
from convt3d_gemm.bench.measure import Result
from convt3d_gemm.bench.network import NetworkResult
from convt3d_gemm.bench.tables import Cell, Table, precision_title, size, time_or_status

#: A table needs about this width: in a narrower terminal its lines wrap, which loses no figures.
_LEAST_WIDTH = 132
_WIDEST_TABLE = 1000
_WIDEST_NAME = 24

_STYLES = {"wrong": "bold red", "missing": "yellow"}


def make_console(*, stderr: bool = False) -> Console:
    """A console as wide as the terminal, or wide enough for a table where there is none."""
    width = max(shutil.get_terminal_size((0, 0)).columns, _LEAST_WIDTH)
    return Console(stderr=stderr, width=width, highlight=False, markup=False)


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
                TextColumn("{task.description}", markup=False),
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

    def begin(self, title: str) -> None:
        """Say what is measured from now on."""
        if self._bar is not None:
            self._bar.update(self._task, description=title)

    def end(self, title: str, results: Sequence[Result] | Sequence[NetworkResult]) -> None:
        """Say what came out."""
        self._done += 1
        outcomes = ", ".join(f"{result.algorithm} {time_or_status(result)}" for result in results)
        elapsed = time.monotonic() - self._began
        self._console.print(f"[{self._done}/{self._total}, {elapsed:.0f} s] {title}: {outcomes}", soft_wrap=True)
        if self._bar is not None:
            self._bar.advance(self._task)


def header_lines(device: dict[str, object], ceilings: Ceilings, precisions: dict[torch.dtype, str]) -> list[str]:
    """The device and its ceilings, as they are printed above the tables."""
    memory, cache = (size(int(str(device[key]))) for key in ("memory_bytes", "cache_bytes"))
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


def found_lines(name: str, found: Sequence[Found]) -> list[str]:
    """What a network holds, a line for each geometry."""
    lines = [f"{name} calls {sum(entry.calls for entry in found)} transposed 3-D convolutions:"]
    for entry in found:
        times = f", {entry.calls} times" if entry.calls > 1 else ""
        left = "" if entry.replaced else ", a class of its own, which replace_conv_transpose3d leaves as it is"
        lines.append(f"  {entry.layer.name} {entry.layer.specification}{times}: {', '.join(entry.modules)}{left}")
    return lines


def show(console: Console, table: Table) -> None:
    """Print the table, where it needs it wider than the terminal: there its lines wrap, but no column is left out."""
    longest_name = max((len(row[0].text) for section in table.sections for row in section), default=0)
    folded_name = min(longest_name, _WIDEST_NAME)
    rich_table = _rendered(table, folded_name)
    unfolded = Measurement.get(console, console.options.update(width=_WIDEST_TABLE), rich_table).maximum
    console.width = max(console.width, unfolded - longest_name + folded_name)
    console.print(rich_table)


def _rendered(table: Table, least_name: int) -> RichTable:
    """The table for a terminal, notes below it; names may be folded down to ``least_name``."""
    rich_table = RichTable(
        title=Text(table.title),
        title_justify="left",
        caption=Text("\n".join(f"({number}) {note}" for number, note in enumerate(table.notes, start=1)) or ""),
        caption_justify="left",
        box=box.SIMPLE_HEAD,
    )
    rich_table.add_column(table.columns[0].name, overflow="fold", min_width=least_name)
    for column in table.columns[1:]:
        rich_table.add_column(column.name, justify="right" if column.figures else "left", no_wrap=True)
    for section in table.sections:
        for row in section:
            rich_table.add_row(*map(_styled, row))
        rich_table.add_section()
    return rich_table


def _styled(cell: Cell) -> Text:
    return Text(cell.text, style=_STYLES.get(cell.kind, ""))
