"""The GEMM path on a CPU beside PyTorch's own, with oneDNN and without it. Medians of alternating calls, in ms.

python benchmarks/cpu_path.py [--layers kb77,nnunet_mid] [--layout ndhwc]
"""

from __future__ import annotations

import argparse
import functools
import statistics
import time
from collections.abc import Callable

import torch

import convt3d_gemm
from convt3d_gemm.bench.competitors import ALGORITHMS
from convt3d_gemm.bench.layers import LAYERS, Layer, Operator

DEFAULT = "nnunet_deep,nnunet_mid,unet3d_k3s2,swin_top,kb72,kb77,quick_k4s2,quick_k3s1,quick_grouped,quick_depthwise"


def medians(functions: dict[str, Callable[[], object]], repeats: int = 9) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in functions}
    for repeat in range(repeats + 1):
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if repeat:
                times[name].append((time.perf_counter() - begin) * 1e3)
    return {name: statistics.median(values) for name, values in times.items()}


def without_onednn(function: Callable[[], object]) -> Callable[[], object]:
    def call() -> object:
        enabled = torch._C._get_mkldnn_enabled()
        torch._C._set_mkldnn_enabled(False)
        try:
            return function()
        finally:
            torch._C._set_mkldnn_enabled(enabled)

    return call


def compare(layer: Layer, layout: torch.memory_format) -> tuple[dict[str, float], dict[str, float]]:
    """Milliseconds of forward, and of both gradients together, on at most two samples."""
    input = torch.randn(min(layer.batch, 2), *layer.input_shape[1:]).contiguous(memory_format=layout)
    weight = torch.randn(layer.weight_shape)
    native, gemm = ALGORITHMS["native"], ALGORITHMS["gemm"]
    grad_output = torch.randn_like(native.forward(layer, input, weight))
    functions: list[dict[str, Callable[[], object]]] = []
    operators: tuple[Operator, ...] = ("forward", "grad_input_weight")
    for operator in operators:
        theirs = functools.partial(native.run, layer, operator, grad_output, input, weight)
        functions.append(
            {
                "gemm": functools.partial(gemm.run, layer, operator, grad_output, input, weight),
                "onednn": theirs,
                "aten": without_onednn(theirs),
            }
        )
    return medians(functions[0]), medians(functions[1], repeats=5)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", default=DEFAULT)
    parser.add_argument("--layout", choices=("ncdhw", "ndhwc"), default="ncdhw")
    arguments = parser.parse_args()
    layout = torch.channels_last_3d if arguments.layout == "ndhwc" else torch.contiguous_format
    print(f"{convt3d_gemm.build_info()['cblas']}, {torch.get_num_threads()} threads, {arguments.layout}")
    print(f"{'layer':16}{'':10}{'gemm':>10}{'oneDNN':>10}{'no oneDNN':>11}")
    for name in arguments.layers.split(","):
        for operator, row in zip(("forward", "gradients"), compare(LAYERS[name], layout), strict=True):
            print(f"{name:16}{operator:10}{row['gemm']:10.2f}{row['onednn']:10.2f}{row['aten']:11.2f}", flush=True)


if __name__ == "__main__":
    main()
