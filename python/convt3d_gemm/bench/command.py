"""``convt3d bench``: its arguments, and a run from the ceilings to the tables."""

from __future__ import annotations

import argparse
import contextlib
import datetime
import importlib.util
import shlex
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

import torch

from convt3d_gemm import build_info, get_workspace_limit
from convt3d_gemm.bench.ceilings import Ceilings, measure_ceilings
from convt3d_gemm.bench.competitors import ALGORITHMS, BASELINE, DEFAULT_ALGORITHMS
from convt3d_gemm.bench.device import describe, other_load, versions
from convt3d_gemm.bench.inputs import MEMORY_FORMATS
from convt3d_gemm.bench.layers import PRESETS, SPECIFICATION_HELP, Layer, Operator, parse_layer
from convt3d_gemm.bench.measure import Result, Settings, comparison_mode, measure
from convt3d_gemm.bench.timing import Clock
from convt3d_gemm.compatibility import allows_tf32

_Item = TypeVar("_Item")

DTYPES = {
    "float32": torch.float32,
    "float64": torch.float64,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

DESCRIPTION = """\
Compare the algorithms for transposed 3-D convolutions on this machine, layer by layer. Every result is
checked against float64 before it is timed; the competitors take turns; losses are printed like wins."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``convt3d bench``."""
    which = parser.add_argument_group("what to measure")
    which.add_argument(
        "--preset",
        choices=tuple(PRESETS),
        help="layers to measure: quick is small ones, all the published table "
        "(default: all with a GPU, else quick; none if --layer is given)",
    )
    which.add_argument(
        "--layer",
        action="append",
        default=[],
        type=_argument(parse_layer),
        metavar="LAYER",
        help=f"{SPECIFICATION_HELP}. May be given several times",
    )
    which.add_argument(
        "--algorithm",
        action="append",
        type=_argument(_list_of(ALGORITHMS, "algorithm")),
        metavar="NAME[,NAME]",
        help=f"of {', '.join(ALGORITHMS)} (default: {','.join(DEFAULT_ALGORITHMS)})",
    )
    which.add_argument("--backward", action="store_true", help="time grad_input and grad_weight together as well")

    how = parser.add_argument_group("how to measure it")
    how.add_argument("--device", type=_argument(_device), help="cpu, cuda or cuda:N (default: cuda if there is one)")
    how.add_argument(
        "--dtype",
        action="append",
        type=_argument(_list_of(DTYPES, "dtype")),
        metavar="DTYPE[,DTYPE]",
        help=f"of {', '.join(DTYPES)} (default: float32)",
    )
    how.add_argument("--layout", choices=tuple(MEMORY_FORMATS), default="ncdhw", help="memory format (default: ncdhw)")
    how.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help="whether float32 on a GPU may use TF32 (default: as torch.backends.cudnn.allow_tf32 has it)",
    )
    how.add_argument(
        "--repeats",
        type=_argument(_positive(int)),
        default=100,
        help="at most this many of each (default: 100)",
    )
    how.add_argument(
        "--seconds",
        type=_argument(_positive(float)),
        default=0.5,
        help="stop repeating one layer after this time, but not before 3 repeats (default: 0.5)",
    )
    parser.add_argument(
        "--json", type=_argument(_file_to_write), metavar="FILE", help="write everything measured to FILE"
    )


def _argument(parse: Callable[[str], _Item]) -> Callable[[str], _Item]:
    """``parse`` for argparse, which shows the message of its own exception but hides that of a ValueError."""

    def parse_argument(text: str) -> _Item:
        try:
            return parse(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return parse_argument


def _list_of(table: dict[str, _Item], kind: str) -> Callable[[str], list[_Item]]:
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
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise ValueError(f"cannot write a file at {text}")
    return path


def _device(text: str) -> torch.device:
    try:
        device = torch.device(text)
    except RuntimeError as error:
        raise ValueError(str(error).splitlines()[0]) from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"must be cpu, cuda or cuda:N, got {text}")
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if count == 0:
            raise ValueError("this PyTorch finds no CUDA device")
        if (device.index or 0) >= count:
            raise ValueError(f"there is no {text}: this machine has {count} CUDA devices")
    return device


def run(arguments: argparse.Namespace, command_line: list[str]) -> int:
    """Measure, print and write what ``arguments`` ask for.

    Args:
        arguments: as parsed after `add_arguments`.
        command_line: what was typed, for the record.

    Returns:
        The exit status: 0; 1 if a result other than PyTorch's own was wrong; 2 if the comparison could not
        run; 130 if it was interrupted.
    """
    if importlib.util.find_spec("rich") is None:
        print('convt3d bench needs rich: pip install "convt3d-gemm[bench]"', file=sys.stderr)
        return 2
    # Not at the top: `convt3d info` and `convt3d bench --help` do without rich.
    from convt3d_gemm.bench import report

    settings = Settings(
        device=_default_device() if arguments.device is None else arguments.device,
        layout=arguments.layout,
        tf32=allows_tf32() if arguments.tf32 is None else arguments.tf32,
        repeats=arguments.repeats,
        seconds=arguments.seconds,
    )
    layers = _layers(arguments, settings.device)
    dtypes = _flattened(arguments.dtype) or [torch.float32]
    algorithms = _flattened(arguments.algorithm) or [ALGORITHMS[name] for name in DEFAULT_ALGORITHMS]
    operators: tuple[Operator, ...] = ("forward", "grad_input_weight") if arguments.backward else ("forward",)
    cases = [(layer, operator, dtype) for layer in layers for operator in operators for dtype in dtypes]
    console = report.make_console()

    on_gpu = settings.device.type == "cuda"
    on_device = torch.cuda.device(settings.device) if on_gpu else contextlib.nullcontext()
    results: list[Result] = []
    interrupted = False
    with on_device, comparison_mode(settings.tf32):
        device = describe(settings.device)
        ceilings = measure_ceilings(Clock(settings.device), dtypes)
        precisions = {dtype: settings.precision(dtype) for dtype in dtypes}
        for line in report.header_lines(device, ceilings, precisions):
            console.print(line)
        if on_gpu and torch.float32 in dtypes:
            whose = "PyTorch's setting" if arguments.tf32 is None else "as asked for"
            console.print(f"TF32: {'on' if settings.tf32 else 'off'} ({whose})")
        busy = other_load()
        if busy is not None and not on_gpu:
            console.print(busy, style="yellow")
        try:
            with report.ProgressReport(len(cases)) as progress:
                for layer, operator, dtype in cases:
                    progress.begin(layer, operator, dtype)
                    measured = measure(layer, operator, dtype, algorithms, settings, ceilings)
                    results += measured
                    progress.end(measured)
        except KeyboardInterrupt:  # what is done is worth showing
            interrupted = True

    for table in report.tables(results):
        console.print(table)
    if results:
        console.print(f"\n{report.LEGEND}")
    if interrupted:
        console.print(f"interrupted after {len(results) // len(algorithms)} of {len(cases)} measurements")
    if arguments.json is not None:
        header = _header(command_line, settings, device, ceilings)
        report.write_json(arguments.json, header, results)
    if interrupted:
        return 130
    wrong = {result.algorithm for result in results if result.status == "wrong"}
    return 1 if wrong - {BASELINE} else 0


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _layers(arguments: argparse.Namespace, device: torch.device) -> list[Layer]:
    preset = arguments.preset
    if preset is None and not arguments.layer:
        preset = "all" if device.type == "cuda" else "quick"
    chosen = [*(PRESETS[preset] if preset else ()), *arguments.layer]
    return list(dict.fromkeys(chosen))


def _flattened(lists: list[list[_Item]] | None) -> list[_Item]:
    """The items of an argument that may be repeated and takes several, each once."""
    return list(dict.fromkeys(item for items in lists or () for item in items))


def _header(
    command_line: list[str], settings: Settings, device: dict[str, object], ceilings: Ceilings
) -> dict[str, object]:
    """What the JSON file says besides the results; rates per second."""
    return {
        "format": 1,
        "command_line": shlex.join(command_line),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "build": build_info(),
        "device": device,
        "settings": {
            "layout": settings.layout,
            "tf32": settings.tf32,
            "repeats": settings.repeats,
            "seconds": settings.seconds,
            "seed": settings.seed,
            "baseline": BASELINE,
            "workspace_limit_bytes": get_workspace_limit(),
        },
        "ceilings": {
            "copy_bytes_per_second": ceilings.copy_rate,
            "gemm_flops_per_second": {
                str(dtype).removeprefix("torch."): rate for dtype, rate in ceilings.gemm_rates.items()
            },
        },
    }
