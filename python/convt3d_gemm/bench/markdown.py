"""``--markdown``: the tables of a run for an issue, a README or a paper's notes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from convt3d_gemm.bench.tables import Cell, Table


def write_markdown(path: Path, header: Sequence[str], tables: Iterable[Table], legends: Sequence[str]) -> None:
    """Write the header's lines as a list, the tables, and what explains them.

    Raises:
        OSError: if the file cannot be written.
    """
    blocks = ["\n".join(f"- {_escaped(line)}" for line in header)]
    blocks += [as_markdown(table) for table in tables]
    blocks += [_escaped(legend) for legend in legends]
    path.write_text("\n\n".join(blocks) + "\n", encoding="utf-8")


def as_markdown(table: Table) -> str:
    """A heading, the rows, and the notes as a paragraph; what went wrong is bold."""
    lines = [
        f"### {_escaped(table.title)}",
        "",
        _row(column.name for column in table.columns),
        _row("---:" if column.figures else "---" for column in table.columns),
    ]
    lines += [_row(map(_cell, row)) for section in table.sections for row in section]
    if table.notes:
        lines += ["", "; ".join(f"({number}) {_escaped(note)}" for number, note in enumerate(table.notes, start=1))]
    return "\n".join(lines)


def _row(cells: Iterable[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(cell: Cell) -> str:
    return f"**{_escaped(cell.text)}**" if cell.kind == "wrong" else _escaped(cell.text)


def _escaped(text: str) -> str:
    """Names such as dw32_k2 and messages must not turn into formatting or columns."""
    for character in ("\\", "|", "*", "_", "<"):
        text = text.replace(character, f"\\{character}")
    return text
