"""``--json``: everything that a run measured, and under what circumstances."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
import shlex
from collections.abc import Sequence
from pathlib import Path

from convt3d_gemm import build_info, get_workspace_limit
from convt3d_gemm.bench.ceilings import Ceilings
from convt3d_gemm.bench.competitors import BASELINE
from convt3d_gemm.bench.device import versions
from convt3d_gemm.bench.discovery import Found
from convt3d_gemm.bench.measure import Result, Settings
from convt3d_gemm.bench.network import NetworkResult
from convt3d_gemm.bench.tables import dtype_name


def header(
    command_line: Sequence[str],
    settings: Settings,
    layouts: Sequence[str],
    device: dict[str, object],
    ceilings: Ceilings,
) -> dict[str, object]:
    """What the file says besides the results; rates per second."""
    return {
        "format": 1,
        "command_line": shlex.join(command_line),
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "versions": versions(),
        "build": build_info(),
        "device": device,
        "settings": {
            "layouts": list(layouts),
            "tf32": settings.tf32,
            "repeats": settings.repeats,
            "seconds": settings.seconds,
            "seed": settings.seed,
            "baseline": BASELINE,
            "workspace_limit_bytes": get_workspace_limit(),
        },
        "ceilings": {
            "copy_bytes_per_second": ceilings.copy_rate,
            "gemm_flops_per_second": {dtype_name(dtype): rate for dtype, rate in ceilings.gemm_rates.items()},
        },
    }


def layer_as_json(result: Result) -> dict[str, object]:
    """Everything known of a layer's result, as JSON takes it: times in milliseconds, sizes in bytes."""
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
        "gigabytes_per_second": result.gigabytes_per_second,
        "floor_milliseconds": result.floor,
        "floor_fraction": result.floor_fraction,
        "workspace_bytes": result.workspace_bytes,
        "measured_workspace_bytes": result.measured_workspace_bytes,
        "error": _finite(result.error),
        "error_bound": result.error_bound,
        "checked": result.checked,
        "speedup": result.speedup,
    }


def network_as_json(result: NetworkResult) -> dict[str, object]:
    """Everything known of a network's result, as JSON takes it."""
    known = {field.name: getattr(result, field.name) for field in dataclasses.fields(result)}
    timing = known.pop("timing")
    return {
        **known,
        "dtype": dtype_name(result.dtype),
        "milliseconds": None if timing is None else dataclasses.asdict(timing),
        "error": _finite(result.error),
    }


def _finite(error: float | None) -> float | None:
    """JSON has no NaN, and a result that holds one has no error to speak of."""
    return error if error is not None and math.isfinite(error) else None


def write_json(
    path: Path,
    header: dict[str, object],
    results: Sequence[Result],
    found: Sequence[Found] = (),
    networks: Sequence[NetworkResult] = (),
) -> None:
    """Write the header's entries and lists of results: of layers, of what a network holds, of networks.

    Raises:
        OSError: if the file cannot be written.
    """
    content = {
        **header,
        "results": [layer_as_json(result) for result in results],
        "found": [
            {
                "layer": entry.layer.name,
                "specification": entry.layer.specification,
                "modules": list(entry.modules),
                "calls": entry.calls,
                "replaced": entry.replaced,
            }
            for entry in found
        ],
        "networks": [network_as_json(result) for result in networks],
    }
    path.write_text(json.dumps(content, indent=2, allow_nan=False) + "\n", encoding="utf-8")
