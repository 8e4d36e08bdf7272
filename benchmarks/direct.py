"""The figures that the direct kernels must reach on an H200, measured in one run with cuDNN.

    python benchmarks/direct.py [--only tf32,depthwise] [--layers kb73,kb77] [--seconds 0.1] [--json FILE]

Times are medians of alternating repeats with cudnn.benchmark on, in ms, without bias and with the weights re-packed in
each call; small layers find their tensors in the GPU's cache. Every row is checked against float64 once: `error` is
direct's and `theirs` is cuDNN's. Gradients are grad_input and grad_weight together. A row that fails says why, and the
others go on.
"""

from __future__ import annotations

import argparse
import dataclasses
import functools
import json
import math
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from convt3d_gemm import library
from convt3d_gemm.bench import reference
from convt3d_gemm.bench.ceilings import measure_ceilings
from convt3d_gemm.bench.checking import Expected, error_bound
from convt3d_gemm.bench.competitors import ALGORITHMS
from convt3d_gemm.bench.device import versions, why_failed
from convt3d_gemm.bench.inputs import Layout, Tensors
from convt3d_gemm.bench.layers import LAYERS, PRESETS, PUBLISHED, Layer, Operator
from convt3d_gemm.bench.measure import comparison_mode
from convt3d_gemm.bench.targets import Targets, geometric_mean
from convt3d_gemm.bench.timing import Clock, Timing, time_in_turn
from convt3d_gemm.parameters import Parameters

COMPETITORS = ("native", "direct")
CUDA = torch.device("cuda", 0)
Row = dict[str, Any]


@dataclass(frozen=True)
class Section:
    """One table over all layers, and how many times as fast as cuDNN its geometric mean must be."""

    operator: Operator
    dtype: torch.dtype
    over_cudnn: float
    tf32: bool = False
    layout: Layout = "ncdhw"

    @property
    def precision(self) -> str:
        return "tf32" if self.tf32 else "ieee"


SECTIONS = {
    "tf32": Section("forward", torch.float32, 3.5, tf32=True),
    "float16": Section("forward", torch.float16, 2.7),
    "bfloat16": Section("forward", torch.bfloat16, 2.7),
    "ieee": Section("forward", torch.float32, 3.0),
    "channels_last": Section("forward", torch.float32, 2.0, tf32=True, layout="ndhwc"),
    "gradients_tf32": Section("grad_input_weight", torch.float32, 2.0, tf32=True),
    "gradients_bfloat16": Section("grad_input_weight", torch.bfloat16, 2.0),
}
PARTS = (*SECTIONS, "depthwise", "scaling")

#: Of section tf32, layer by layer: cuDNN's time over direct's, and the prototype's milliseconds.
OVER_CUDNN = {"kb72": 25.0, "kb73g4": 18.0, "kb77": 6.0, "kb58": 5.0, "nnunet_top": 3.9, "kb73": 3.5, "kb61": 2.5}
PROTOTYPE = {
    "kb73": 0.515,
    "kb73g4": 0.531,
    "kb77": 0.291,
    "kb72": 0.082,
    "kb61": 1.054,
    "kb58": 0.445,
    "nnunet_mid": 0.114,
    "nnunet_top": 0.209,
    "unet3d_k3s2": 0.180,
    "gan_k4s2": 0.875,
}
IEEE_ERROR_OVER_CUDNN = 1.5

DEPTHWISE_OPERATORS: tuple[Operator, ...] = ("forward", "grad_input")
DEPTHWISE_OVER_FLOOR = 1.6

KB73_TIMES_8 = dataclasses.replace(LAYERS["kb73"], name="kb73_times_8", input_size=(64, 128, 256))
SCALING = 1.15


def configuration(layer: Layer, operator: str, tensors: Tensors) -> str:
    """The names of the direct kernels that compute it."""
    parameters = Parameters(layer.stride, layer.padding, layer.output_padding, layer.dilation, layer.groups)
    sizes = torch.Size(layer.input_shape), torch.Size(layer.weight_shape)
    return library.plan_call("direct", operator, *sizes, parameters, tensors.input).plan.configuration


def compare(
    calls: Mapping[str, Callable[[], tuple[Tensor, ...]]], expected: Callable[[], Expected] | None, seconds: float
) -> Row:
    """Milliseconds of the calls, and their errors unless there is nothing expected.

    Raises:
        RuntimeError: direct can't be computed.
    """
    row: Row = {}
    if expected is not None:
        right = expected()
        for name, label in (("direct", "error"), ("native", "theirs")):
            if name in calls:
                row[label] = right.error(calls[name]())
        del right
    for name, timing in time_in_turn(calls, Clock(CUDA), repeats=200, seconds=seconds).items():
        if isinstance(timing, Timing):
            row[name] = timing.median
        elif name == "direct":
            raise RuntimeError(timing)
        else:
            row[f"{name}_failed"] = timing
    if "native" in row:
        row["speed"] = row["native"] / row["direct"]
    return row


class Benchmark:
    """A run: what it is given, the rows it makes, and the targets that they miss."""

    def __init__(self, layers: list[Layer], seconds: float, *, with_errors: bool) -> None:
        self.layers = layers
        self.seconds = seconds
        self.with_errors = with_errors
        self.targets = Targets()
        self.rows: list[Row] = []

    def add(self, part: str, layer: Layer, dtype: torch.dtype, precision: str, make: Callable[[], Row]) -> Row | None:
        """Make a row, show it, and hold its error against the bound; None where it can't be made."""
        row: Row = {"part": part, "layer": layer.name}
        try:
            row.update(make())
        except Exception as error:
            row["failed"] = why_failed(error)
            self.targets.misses.append(f"{part} {layer.name}: {row['failed']}")
        self.rows.append(row)
        show(row)
        torch.cuda.empty_cache()
        if "failed" in row:
            return None
        if "error" in row:
            # A NaN stays one, and misses.
            allowed = error_bound(dtype, precision) / max(row["error"], 1e-30)
            self.targets.require(f"{part} {layer.name}: bound over error", allowed, 1.0)
        return row

    def section(self, part: str) -> None:
        section = SECTIONS[part]
        ratios: list[float] = []
        with comparison_mode(section.tf32):
            for layer in self.layers:
                make = functools.partial(self.row_of_section, layer, section)
                row = self.add(part, layer, section.dtype, section.precision, make)
                if row is None or "speed" not in row:
                    continue
                ratios.append(row["speed"])
                if part == "tf32":
                    self.hold_against_layer_targets(row)
                if part == "ieee" and self.with_errors:
                    allowed = IEEE_ERROR_OVER_CUDNN * row["theirs"] / row["error"]
                    self.targets.require(f"ieee {layer.name}: 1.5 x cuDNN's error over direct's", allowed, 1.0)
        mean = geometric_mean(ratios)
        print(f"{part}: cuDNN over direct, geometric mean of {len(ratios)}: {mean:.2f}", flush=True)
        self.rows.append({"part": part, "layer": "geometric mean", "speed": mean})
        self.targets.require(f"{part}: cuDNN over direct, geometric mean of {len(ratios)}", mean, section.over_cudnn)

    def row_of_section(self, layer: Layer, section: Section, competitors: Sequence[str] = COMPETITORS) -> Row:
        operator = section.operator
        tensors = Tensors.draw(layer, operator, section.dtype, section.layout, CUDA, seed=0)
        operands = (tensors.grad_output, tensors.input, tensors.weight)
        calls = {name: functools.partial(ALGORITHMS[name].run, layer, operator, *operands) for name in competitors}
        expected = functools.partial(Expected.of, layer, operator, tensors) if self.with_errors else None
        row = compare(calls, expected, self.seconds)
        return {**row, "kernels": configuration(layer, operator, tensors)}

    def hold_against_layer_targets(self, row: Row) -> None:
        name = row["layer"]
        if name in OVER_CUDNN:
            self.targets.require(f"tf32 {name}: cuDNN over direct", row["speed"], OVER_CUDNN[name])
        if name in PROTOTYPE:
            self.targets.require(f"tf32 {name}: prototype over direct", PROTOTYPE[name] / row["direct"], 1.0)

    def depthwise(self) -> None:
        """Forward and grad_input against the time of moving input, weight and output once."""
        copy_rate = measure_ceilings(Clock(CUDA), ()).copy_rate
        print(f"copy {copy_rate / 1e12:.3f} TB/s", flush=True)
        with comparison_mode(tf32=True):
            for layer in PRESETS["depthwise"]:
                for dtype in (torch.float32, torch.bfloat16):
                    floor = 1e3 * layer.elements_moved("forward") * dtype.itemsize / copy_rate
                    for operator in DEPTHWISE_OPERATORS:
                        part = f"depthwise {operator} {str(dtype).removeprefix('torch.')}"
                        make = functools.partial(self.row_of_depthwise, layer, operator, dtype, floor)
                        row = self.add(part, layer, dtype, "ieee", make)
                        if row is not None:
                            label = f"{part} {layer.name}: 1.6 x floor over direct"
                            self.targets.require(label, DEPTHWISE_OVER_FLOOR / row["over_floor"], 1.0)

    def row_of_depthwise(self, layer: Layer, operator: Operator, dtype: torch.dtype, floor: float) -> Row:
        tensors = Tensors.draw(layer, operator, dtype, "ncdhw", CUDA, seed=0)
        operands = (tensors.grad_output, tensors.input, tensors.weight)
        calls = {name: functools.partial(ALGORITHMS[name].run, layer, operator, *operands) for name in COMPETITORS}
        answer = reference.forward if operator == "forward" else reference.grad_input

        def expected() -> Expected:
            return Expected((0,), answer(layer, tensors, (0,)), None, "sample 0")

        row = compare(calls, expected if self.with_errors else None, self.seconds)
        row["over_floor"] = row["direct"] / floor
        return {**row, "kernels": configuration(layer, operator, tensors)}

    def scaling(self) -> None:
        """The time per output of kb73, and of eight times its voxels: past 2^31 elements."""
        section = SECTIONS["tf32"]
        nanoseconds: list[float] = []  # per output
        with comparison_mode(section.tf32):
            for layer in (LAYERS["kb73"], KB73_TIMES_8):
                make = functools.partial(self.row_of_section, layer, section, ("direct",))
                row = self.add("scaling", layer, section.dtype, section.precision, make)
                if row is not None:
                    nanoseconds.append(1e6 * row["direct"] / math.prod(layer.output_shape))
        if len(nanoseconds) == 2:
            change = nanoseconds[1] / nanoseconds[0]
            print(f"scaling: the time per output changes by a factor of {change:.3f}", flush=True)
            self.targets.require("scaling: 1.15 over that factor", SCALING / max(change, 1 / change), 1.0)


def show(row: Row) -> None:
    values = dict(row)
    line = f"{values.pop('part'):<18} {values.pop('layer'):<12}"
    for key, value in values.items():
        line += f"  {key}={value:.4g}" if isinstance(value, float) else f"  {key}={value}"
    print(line, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default=",".join(PARTS), help="of %(default)s")
    parser.add_argument("--layers", default=",".join(layer.name for layer in PUBLISHED))
    parser.add_argument("--seconds", type=float, default=0.1, help="for the repeats of one row (%(default)s)")
    parser.add_argument("--no-errors", action="store_true", help="times alone")
    parser.add_argument("--json")
    arguments = parser.parse_args()
    layers = [LAYERS[name] for name in arguments.layers.split(",")]
    about = {"gpu": torch.cuda.get_device_name(), **versions()}
    print(", ".join(f"{name} {version}" for name, version in about.items()), flush=True)
    benchmark = Benchmark(layers, arguments.seconds, with_errors=not arguments.no_errors)
    for part in arguments.only.split(","):
        if part == "depthwise":
            benchmark.depthwise()
        elif part == "scaling":
            benchmark.scaling()
        else:
            benchmark.section(part)
    print(benchmark.targets.report())
    if arguments.json:
        found = {"rows": benchmark.rows, "misses": benchmark.targets.misses}
        with open(arguments.json, "w") as file:
            json.dump({**about, "arguments": sys.argv[1:], **found}, file, indent=1)
    return bool(benchmark.targets.misses)


if __name__ == "__main__":
    sys.exit(main())
