"""``convt3d explain`` and ``convt3d tune``: what "auto" picks for layers that the command line names."""

from __future__ import annotations

import argparse
import itertools
import sys

import torch

from convt3d_gemm.bench.inputs import MEMORY_FORMATS, Layout
from convt3d_gemm.bench.layers import PRESETS, SPECIFICATION_HELP, Layer, parse_layer
from convt3d_gemm.bench.measure import comparison_mode
from convt3d_gemm.bench.options import DTYPES, TF32_HELP, argument_type, list_of, parse_device
from convt3d_gemm.binding import has_backend, missing_backend
from convt3d_gemm.compatibility import allows_tf32
from convt3d_gemm.explanation import explain_problem
from convt3d_gemm.parameters import Parameters
from convt3d_gemm.problem import OPERATORS, Problem
from convt3d_gemm.settings import get_workspace_limit
from convt3d_gemm.tuning import tune_problems

__all__ = ["add_explain_arguments", "add_tune_arguments", "forward_of", "run_explain", "run_tune"]


def add_explain_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``convt3d explain``."""
    _add_which(parser)


def add_tune_arguments(parser: argparse.ArgumentParser) -> None:
    """Give ``parser`` the arguments of ``convt3d tune``."""
    _add_which(parser)
    parser.add_argument("--forward-only", action="store_true", help="leave the gradients out")
    parser.add_argument(
        "--seconds",
        type=float,
        default=0.2,
        help="for each operator of each layer, the time after which nothing is repeated (default: 0.2)",
    )


def _add_which(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--layer",
        action="append",
        default=[],
        type=argument_type(parse_layer),
        metavar="LAYER",
        help=SPECIFICATION_HELP,
    )
    parser.add_argument("--preset", choices=tuple(PRESETS), help="the layers of a preset of convt3d bench")
    parser.add_argument(
        "--device", type=argument_type(parse_device), help="cpu, cuda or cuda:N (default: cuda if there is one)"
    )
    parser.add_argument(
        "--dtype",
        type=argument_type(list_of(DTYPES, "dtype")),
        default=[torch.float32],
        help=f"of {', '.join(DTYPES)} (default: float32)",
    )
    parser.add_argument("--layout", choices=tuple(MEMORY_FORMATS), default="ncdhw", help="default: ncdhw")
    parser.add_argument(
        "--tf32",
        action=argparse.BooleanOptionalAction,
        help=TF32_HELP,
    )


def run_explain(arguments: argparse.Namespace) -> int:
    """Print what "auto" picks for each layer and dtype, and why.

    Returns:
        The exit status: 0; 2 if nothing was asked for, or this build does not compute on the device.
    """
    problems = _problems(arguments)
    if problems is None:
        return 2
    print("\n\n".join(str(explain_problem(problem)) for problem in problems))
    return 0


def run_tune(arguments: argparse.Namespace) -> int:
    """Measure each layer and dtype, with PyTorch at its best (cudnn.benchmark), and keep the times for "auto".

    Returns:
        The exit status: 0; 1 if the measurements could not be kept; 2 as `run_explain`.
    """
    problems = _problems(arguments)
    if problems is None:
        return 2
    if not arguments.seconds > 0:
        print(f"convt3d tune: --seconds must be above 0, got {arguments.seconds}", file=sys.stderr)
        return 2
    operators = ("forward",) if arguments.forward_only else OPERATORS
    wanted = [problem._replace(operator=operator) for problem in problems for operator in operators]

    def progress(problem: Problem) -> None:
        print(f"[{wanted.index(problem) + 1}/{len(wanted)}] {problem}", file=sys.stderr)

    with comparison_mode(_tf32(arguments)):
        tuning = tune_problems(wanted, seconds=arguments.seconds, progress=progress)
    print(tuning)
    return 0 if tuning.kept else 1


def _tf32(arguments: argparse.Namespace) -> bool:
    return allows_tf32() if arguments.tf32 is None else bool(arguments.tf32)


def _problems(arguments: argparse.Namespace) -> list[Problem] | None:
    """Forward of every layer in every dtype; None, with a message, where there is nothing to do."""
    device = arguments.device
    if device is None:
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cuda" and device.index is None:
        device = torch.device("cuda", torch.cuda.current_device())
    layers = [*(PRESETS[arguments.preset] if arguments.preset else ()), *arguments.layer]
    if not layers:
        print(f"convt3d {arguments.command}: name a layer with --layer, or several with --preset", file=sys.stderr)
        return None
    if not has_backend(device.type):
        print(f"convt3d {arguments.command}: {missing_backend(device.type)}", file=sys.stderr)
        return None
    combinations = itertools.product(dict.fromkeys(layers), dict.fromkeys(arguments.dtype))
    tf32 = _tf32(arguments)
    return [forward_of(layer, dtype, arguments.layout, tf32, device) for layer, dtype in combinations]


def forward_of(layer: Layer, dtype: torch.dtype, layout: Layout, tf32: bool, device: torch.device) -> Problem:
    """A layer's forward, under the present number of threads and workspace limit; TF32 counts for float32 on CUDA."""
    on_cuda = device.type == "cuda"
    return Problem(
        "forward",
        torch.Size(layer.input_shape),
        torch.Size(layer.weight_shape),
        Parameters(layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups),
        MEMORY_FORMATS[layout],
        dtype,
        tf32 and on_cuda and dtype is torch.float32,
        device,
        1 if on_cuda else torch.get_num_threads(),
        get_workspace_limit(),
    )
