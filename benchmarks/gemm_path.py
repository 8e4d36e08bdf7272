"""The figures that the GEMM path must reach on an H200, measured in one run with their competitors.

    python benchmarks/gemm_path.py [--only forward,gradients,host,memory] [--json FILE]

Forward is TF32, NCDHW, without bias, on the published layers; times are medians of alternating repeats, in ms.
`bmm` is `torch.bmm` making the same columns, and `bound` is bmm + (column bytes + output bytes) / copy rate.
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

import torch

import convt3d_gemm
from convt3d_gemm.bench.competitors import ALGORITHMS
from convt3d_gemm.bench.layers import LAYERS, PUBLISHED, Layer
from convt3d_gemm.bench.targets import Targets, geometric_mean

FORWARD_BOUND = ("kb58", "kb61", "kb70", "kb73", "kb77", "nnunet_mid", "nnunet_top", "gan_k4s2")
FORWARD_OVER_CUDNN = {
    "kb72": 2.5,
    "kb73g4": 4.0,
    "kb77": 1.4,
    "nnunet_top": 1.5,
    "nnunet_mid": 1.3,
    "swin_top": 1.3,
}
GRADIENTS_OVER_CUDNN = {"kb72": 1.8, "kb73g4": 1.0}


def medians(functions: dict[str, Callable[[], object]], seconds: float = 0.6) -> dict[str, float]:
    """Median milliseconds of each function, one call of each in turn. What runs out of memory is left out."""
    warm: dict[str, float] = {}
    for name, function in functions.items():
        try:
            function()
            function()
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            begin.record()
            function()
            end.record()
            end.synchronize()
            warm[name] = begin.elapsed_time(end)
        except torch.cuda.OutOfMemoryError:
            torch.cuda.empty_cache()
    repeats = max(5, min(200, int(seconds * 1e3 / max(sum(warm.values()), 1e-3))))
    events: dict[str, list[tuple[torch.cuda.Event, torch.cuda.Event]]] = {name: [] for name in warm}
    for _ in range(repeats):
        for name in warm:
            begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            # A few microseconds of work hide the host's time to queue what is measured.
            torch.cuda._sleep(200_000)
            begin.record()
            functions[name]()
            end.record()
            events[name].append((begin, end))
    torch.cuda.synchronize()
    return {name: statistics.median(b.elapsed_time(e) for b, e in pairs) for name, pairs in events.items()}


def copy_rate() -> float:
    """Bytes per second that a copy reads and writes."""
    source = torch.empty(1 << 30, dtype=torch.float32, device="cuda").normal_()
    target = torch.empty_like(source)
    milliseconds = medians({"copy": lambda: target.copy_(source)})["copy"]
    return 2 * source.numel() * 4 / (milliseconds * 1e-3)


def column_products(layer: Layer, input: torch.Tensor, weight: torch.Tensor) -> Callable[[], object] | None:
    """`torch.bmm` that makes the layer's columns, or None where they don't fit or there are groups."""
    rows = weight[0].numel()
    if layer.groups > 1 or layer.batch * rows * math.prod(layer.input_size) * 4 > 60e9:
        return None
    samples = input.reshape(layer.batch, layer.in_channels, -1)
    matrix = weight.reshape(layer.in_channels, rows).t().expand(layer.batch, -1, -1)
    columns = torch.empty(layer.batch, rows, samples.shape[2], device="cuda")
    return lambda: torch.bmm(matrix, samples, out=columns)


def forward(layer: Layer, rate: float) -> dict[str, Any]:
    input = torch.randn(layer.input_shape, device="cuda")
    weight = torch.randn(layer.weight_shape, device="cuda")
    names = {"gemm": "gemm", "cudnn": "native", **({"aten": "aten"} if layer.groups == 1 else {})}
    functions: dict[str, Callable[[], object]] = {
        label: functools.partial(ALGORITHMS[name].forward, layer, input, weight) for label, name in names.items()
    }
    products = column_products(layer, input, weight)
    if products is not None:
        functions["bmm"] = products
    row: dict[str, Any] = {"layer": layer.name, **medians(functions)}
    column_bytes = layer.batch * layer.out_channels * layer.taps * math.prod(layer.input_size) * 4
    output_bytes = math.prod(layer.output_shape) * 4
    row["traffic"] = (column_bytes + output_bytes) / rate * 1e3
    if "bmm" in row:
        row["over_bound"] = row["gemm"] / (row["bmm"] + row["traffic"])
    row["cudnn_over_gemm"] = row["cudnn"] / row["gemm"]
    if "aten" in row:
        row["aten_over_gemm"] = row["aten"] / row["gemm"]
    return row


def gradients(layer: Layer) -> dict[str, Any]:
    input = torch.randn(layer.input_shape, device="cuda")
    weight = torch.randn(layer.weight_shape, device="cuda")
    grad_output = torch.randn(layer.output_shape, device="cuda")
    functions: dict[str, Callable[[], object]] = {
        label: functools.partial(ALGORITHMS[name].run, layer, "grad_input_weight", grad_output, input, weight)
        for label, name in (("gemm", "gemm"), ("cudnn", "native"))
    }
    row: dict[str, Any] = {"layer": layer.name, **medians(functions)}
    row["cudnn_over_gemm"] = row["cudnn"] / row["gemm"]
    return row


def host() -> dict[str, float]:
    """Microseconds that the host spends on one call while the GPU's queue is empty, medians."""
    input = torch.randn(1, 8, 8, 8, 8, device="cuda")
    layer = convt3d_gemm.ConvTranspose3d(8, 8, 3, stride=2, padding=1, algorithm="gemm").cuda()
    native = torch.nn.ConvTranspose3d(8, 8, 3, stride=2, padding=1).cuda()

    def call(function: Callable[..., object], module: torch.nn.ConvTranspose3d, **extra: Any) -> Callable[[], object]:
        return lambda: function(input, module.weight, module.bias, stride=2, padding=1, **extra)

    calls = {
        "gemm functional, no grad": (False, call(convt3d_gemm.conv_transpose3d, layer, algorithm="gemm")),
        "native functional, no grad": (False, call(torch.nn.functional.conv_transpose3d, native)),
        "gemm module, no grad": (False, lambda: layer(input)),
        "gemm module, grad": (True, lambda: layer(input)),
        "native module, grad": (True, lambda: native(input)),
    }
    times: dict[str, list[float]] = {name: [] for name in calls}
    for repeat in range(600):
        for name, (with_grad, function) in calls.items():
            with torch.set_grad_enabled(with_grad):
                torch.cuda.synchronize()
                begin = time.perf_counter()
                function()
                elapsed = time.perf_counter() - begin
            if repeat >= 100:
                times[name].append(elapsed * 1e6)
    torch.cuda.synchronize()
    return {name: statistics.median(values) for name, values in times.items()}


def memory(layer: Layer) -> dict[str, Any]:
    """Peak bytes that one call takes beside its output."""
    input = torch.randn(layer.input_shape, device="cuda")
    weight = torch.randn(layer.weight_shape, device="cuda")
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    output = ALGORITHMS["gemm"].forward(layer, input, weight)
    torch.cuda.synchronize()
    extra = torch.cuda.max_memory_allocated() - before - output.numel() * 4
    return {"layer": layer.name, "extra_bytes": extra, "limit": convt3d_gemm.get_workspace_limit()}


def show(row: dict[str, Any]) -> None:
    parts = [f"{key}={value:.4g}" if isinstance(value, float) else f"{key}={value}" for key, value in row.items()]
    print("  ".join(parts), flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="forward,gradients,host,memory")
    parser.add_argument("--layers", default=",".join(layer.name for layer in PUBLISHED))
    parser.add_argument("--limit-mb", type=float, help="workspace limit in MiB")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    if arguments.limit_mb:
        convt3d_gemm.set_workspace_limit(int(arguments.limit_mb * 2**20))
    torch.backends.cudnn.benchmark = True
    torch.backends.cudnn.allow_tf32 = True
    torch.backends.cuda.matmul.allow_tf32 = True
    results: dict[str, Any] = {"gpu": torch.cuda.get_device_name(), "torch": torch.__version__}
    layers = [LAYERS[name] for name in arguments.layers.split(",")]
    targets = Targets()
    require = targets.require
    parts = arguments.only.split(",")
    if "forward" in parts:
        results["copy_rate"] = rate = copy_rate()
        print(f"copy {rate / 1e12:.3f} TB/s")
        rows = results["forward"] = []
        for layer in layers:
            rows.append(forward(layer, rate))
            show(rows[-1])
            torch.cuda.empty_cache()
        mean = geometric_mean(row["aten_over_gemm"] for row in rows if "aten_over_gemm" in row)
        print(f"aten over gemm, geometric mean: {mean:.2f}")
        require("aten over gemm, geometric mean", mean, 4.0)
        for row in rows:
            name = row["layer"]
            if name in FORWARD_BOUND:
                require(f"{name}: 1.2 / (gemm over bound)", 1.2 / row["over_bound"], 1.0)
            if name in FORWARD_OVER_CUDNN:
                require(f"{name}: cudnn over gemm", row["cudnn_over_gemm"], FORWARD_OVER_CUDNN[name])
            if "aten_over_gemm" in row:
                require(f"{name}: aten over gemm", row["aten_over_gemm"], 2.5)
    if "gradients" in parts:
        rows = results["gradients"] = []
        for layer in layers:
            rows.append(gradients(layer))
            show(rows[-1])
            torch.cuda.empty_cache()
            name = rows[-1]["layer"]
            if name in GRADIENTS_OVER_CUDNN:
                require(f"{name}: gradients, cudnn over gemm", rows[-1]["cudnn_over_gemm"], GRADIENTS_OVER_CUDNN[name])
    if "host" in parts:
        results["host"] = host()
        show(results["host"])
        require("30 / host microseconds", 30 / results["host"]["gemm functional, no grad"], 1.0)
    if "memory" in parts:
        rows = results["memory"] = []
        for layer in layers:
            rows.append(memory(layer))
            show(rows[-1])
            torch.cuda.empty_cache()
            allowed = rows[-1]["limit"] + (64 << 20)
            require(f"{layer.name}: allowed over extra bytes", allowed / max(rows[-1]["extra_bytes"], 1), 1.0)
    results["misses"] = targets.misses
    if arguments.json:
        with open(arguments.json, "w") as file:
            json.dump(results, file, indent=1)
    print(targets.report())
    return bool(targets.misses)


if __name__ == "__main__":
    sys.exit(main())
