"""The arguments of ``convt3d bench``, checked as far as they can be before anything is measured."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from convt3d_gemm.bench.competitors import ALGORITHMS, DEFAULT_ALGORITHMS
from convt3d_gemm.bench.factory import FACTORY_HELP, parse_factory, parse_input_size
from convt3d_gemm.bench.inputs import MEMORY_FORMATS, Layout
from convt3d_gemm.bench.layers import PRESETS, SPECIFICATION_HELP, parse_layer

_Item = TypeVar("_Item")

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

LAYOUTS: dict[str, Layout] = {layout: layout for layout in MEMORY_FORMATS}

TF32_HELP = "whether float32 on a GPU may use TF32 (default: as torch.backends.cudnn.allow_tf32 has it)"

DESCRIPTION = """\
Compare the algorithms for transposed 3-D convolutions on this machine, layer by layer. Every result is
checked against float64 before it is timed; the competitors take turns; losses are printed like wins."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``convt3d bench``."""
    which = parser.add_argument_group("what to measure")
    which.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="layers to measure: quick is small ones, all is kernelbench, decoders and depthwise "
        "(default: all with a GPU, else quick; none if --layer or --model is given)",
    )
    which.add_argument(
        "--layer",
        action="append",
        default=[],
        type=argument_type(parse_layer),
        metavar="LAYER",
        help=f"{SPECIFICATION_HELP}. May be given several times",
    )
    which.add_argument(
        "--model",
        type=argument_type(parse_factory),
        metavar="PACKAGE.MODULE:FACTORY",
        help=f"{FACTORY_HELP}. Its transposed convolutions are measured with the shapes that they see, and the whole "
        "network before and after they are replaced, forward and training step",
    )
    which.add_argument(
        "--input",
        action="append",
        default=[],
        type=argument_type(parse_input_size),
        metavar="NxCxDxHxW",
        help="the size of the model's input, such as 1x1x96x96x96. May be given several times, for several inputs",
    )
    which.add_argument(
        "--algorithm",
        action="append",
        type=argument_type(list_of(ALGORITHMS, "algorithm")),
        metavar="NAME[,NAME]",
        help=f"of {', '.join(ALGORITHMS)} (default: {','.join(DEFAULT_ALGORITHMS)}; with --model auto, too)",
    )
    which.add_argument(
        "--backward",
        action="store_true",
        help="time grad_input, grad_weight, and both together, as a training step needs them, as well",
    )

    how = parser.add_argument_group("how to measure it")
    how.add_argument(
        "--device", type=argument_type(parse_device), help="cpu, cuda or cuda:N (default: cuda if there is one)"
    )
    how.add_argument(
        "--dtype",
        action="append",
        type=argument_type(list_of(DTYPES, "dtype")),
        metavar="DTYPE[,DTYPE]",
        help=f"of {', '.join(DTYPES)} (default: float32)",
    )
    how.add_argument(
        "--layout",
        action="append",
        type=argument_type(list_of(LAYOUTS, "layout")),
        metavar="LAYOUT[,LAYOUT]",
        help=f"memory format, of {', '.join(LAYOUTS)} (default: ncdhw)",
    )
    how.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help=TF32_HELP,
    )
    how.add_argument(
        "--repeats",
        type=argument_type(_positive(int)),
        default=100,
        help="at most this many of each (default: 100)",
    )
    how.add_argument(
        "--seconds",
        type=argument_type(_positive(float)),
        default=0.5,
        help="stop repeating one layer after this time, but not before 3 repeats (default: 0.5)",
    )
    for option, parse, what in (
        ("--json", _file_to_write, "everything measured"),
        ("--markdown", _file_to_write, "the tables, in Markdown,"),
        ("--plot", _picture_to_write, "all layers' times and a roofline, as a picture (png, svg or pdf),"),
    ):
        parser.add_argument(option, type=argument_type(parse), metavar="FILE", help=f"write {what} to FILE")


def argument_type(parse: Callable[[str], _Item]) -> Callable[[str], _Item]:
    """``parse`` for argparse, which shows the message of its own exception but hides that of a ValueError."""

    def parse_argument(text: str) -> _Item:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def list_of(table: dict[str, _Item], kind: str) -> Callable[[str], list[_Item]]:
    """Reads names of ``table`` with commas between them."""

    def parse(text: str) -> list[_Item]:
        names = [name.strip() for name in text.split(",")]
        for name in names:
            if name not in table:
                raise ValueError(f"no {kind} is called {name!r}: there are {', '.join(table)}")
        return [table[name] for name in names]

    return parse


def _positive(number: Callable[[str], _Item]) -> Callable[[str], _Item]:
    def parse(text: str) -> _Item:
        value = number(text)
        if not value > 0:  # type: ignore[operator]
            raise ValueError(f"must be above 0, got {text}")
        return value

    return parse


def _file_to_write(text: str) -> Path:
    """Fail before the run, not after it."""
    path = Path(text)
    was_there = path.exists()
    try:
        with path.open("a"):
            pass
        if not was_there:
            path.unlink()
    except OSError as error:
        raise ValueError(f"cannot write a file at {text}: {error.strerror}") from None
    return path


def _picture_to_write(text: str) -> Path:
    path = _file_to_write(text)
    if path.suffix not in (".png", ".svg", ".pdf"):
        raise ValueError(f"a picture's name must end in .png, .svg or .pdf, got {text}")
    return path


def parse_device(text: str) -> torch.device:
    """A device that this machine has, from ``cpu``, ``cuda`` or ``cuda:N``."""
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"must be cpu, cuda or cuda:N, got {text}")
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if device.type == "cuda" and (device.index or 0) >= count:
        raise ValueError(f"there is no {text}: PyTorch finds {count} CUDA devices")
    return device
