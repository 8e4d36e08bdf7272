"""The command line: ``convt3d info``, ``bench``, ``explain`` and ``tune``."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Sequence
from typing import Any

import torch

from convt3d_gemm import build_info, choice, get_workspace_limit
from convt3d_gemm.bench import command
from convt3d_gemm.bench.device import describe, versions


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line.

    Args:
        argv: the arguments after the program's name; those of the process if None.

    Returns:
        The exit status: 0 if all went well, 1 if a compared result was wrong, 2 if the command could not run, or
        could not write what it was asked to; 141 if nobody reads on.

    Raises:
        SystemExit: after ``--help``, and with status 2 if the arguments cannot be read.
    """
    arguments_given = list(sys.argv[1:] if argv is None else argv)
    parser = argparse.ArgumentParser(prog="convt3d", description="Transposed 3-D convolutions by GEMM.")
    commands = parser.add_subparsers(dest="command", required=True)
    info = commands.add_parser("info", help="say what is installed, built and found", description=_info.__doc__)
    info.add_argument("--json", action="store_true", help="print JSON")
    bench = commands.add_parser("bench", help="compare the algorithms, layer by layer", description=command.DESCRIPTION)
    command.add_arguments(bench)
    explain = commands.add_parser("explain", help="say what algorithm auto picks for a layer, and why")
    choice.add_explain_arguments(explain)
    tune = commands.add_parser("tune", help="measure layers, so that auto picks by what is fastest on this machine")
    choice.add_tune_arguments(tune)

    arguments = parser.parse_args(arguments_given)
    try:
        status = _run(arguments, arguments_given)
        sys.stdout.flush()
        return status
    except BrokenPipeError:  # whoever reads has had enough, as head has
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # so that exiting does not write there again
        return 141  # as if the signal had ended it


def _run(arguments: argparse.Namespace, arguments_given: Sequence[str]) -> int:
    if arguments.command == "bench":
        return command.run(arguments, ["convt3d", *arguments_given])
    if arguments.command == "explain":
        return choice.run_explain(arguments)
    if arguments.command == "tune":
        return choice.run_tune(arguments)
    return _info(as_json=arguments.json)


def _info(*, as_json: bool) -> int:
    """Say what is installed, built and found: versions, backends, GPUs, limits."""
    known = _known()
    if as_json:
        print(json.dumps(known, indent=2))
    else:
        lines = _lines(known)
        width = max(len(name) for name, _ in lines)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in lines))
    return 0


def _known() -> dict[str, Any]:
    """What ``convt3d info`` says; sizes in bytes."""
    gpus = range(torch.cuda.device_count() if torch.cuda.is_available() else 0)
    return {
        "build": build_info(),
        "versions": versions(),
        "gpus": [describe(torch.device("cuda", index)) for index in gpus],
        "threads": torch.get_num_threads(),
        "workspace_limit_bytes": get_workspace_limit(),
    }


def _lines(known: dict[str, Any]) -> list[tuple[str, str]]:
    """The same for people, a name and a value per line."""
    build, found = known["build"], known["versions"]
    cuda_of_torch = f"CUDA {found['torch_cuda']}" if found["torch_cuda"] else "no CUDA"
    lines = [
        ("convt3d-gemm", build["version"]),
        ("PyTorch", f"{found['torch']} ({cuda_of_torch})"),
        ("backends", ", ".join(build["backends"])),
    ]
    if build["cuda_missing"]:
        lines.append(("no CUDA backend", build["cuda_missing"]))
    if "cuda" in build["backends"]:
        lines += [
            ("CUDA toolkit", build["cuda_version"] or "unknown"),
            ("architectures", ", ".join(build["cuda_architectures"])),
            ("cuBLAS", build["cublas"] or "not bound: PyTorch has loaded none"),
            ("cuDNN (native)", str(found["cudnn"] or "none")),
        ]
    lines += [
        ("CBLAS", build["cblas"] or "none"),
        ("OpenMP", "yes" if build["openmp"] else "no"),
        ("threads", str(known["threads"])),
    ]
    for number, gpu in enumerate(known["gpus"]):
        capability, memory = gpu["compute_capability"], gpu["memory_bytes"] / 2**30
        lines.append((f"GPU {number}", f"{gpu['name']}, compute capability {capability}, {memory:.0f} GiB"))
    if not known["gpus"]:
        lines.append(("GPU", "none found by PyTorch"))
    lines.append(("workspace limit", f"{known['workspace_limit_bytes'] / 2**20:.0f} MiB"))
    return lines
