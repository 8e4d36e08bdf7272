"""``convt3d bench``: a run from the ceilings to the tables and files."""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import torch

from convt3d_gemm import algorithms as package_algorithms
from convt3d_gemm.bench import record, tables
from convt3d_gemm.bench.ceilings import Ceilings, measure_ceilings
from convt3d_gemm.bench.competitors import ALGORITHMS, BASELINE, DEFAULT_ALGORITHMS, Algorithm
from convt3d_gemm.bench.device import OUT_OF_MEMORY, describe, other_load, why_failed
from convt3d_gemm.bench.discovery import Found, find_layers
from convt3d_gemm.bench.factory import Factory, FactoryError
from convt3d_gemm.bench.inputs import Layout
from convt3d_gemm.bench.layers import PRESETS, Layer, Operator
from convt3d_gemm.bench.markdown import write_markdown
from convt3d_gemm.bench.measure import Result, Settings, comparison_mode, measure
from convt3d_gemm.bench.network import BEFORE, Network, NetworkResult, Task, draw_inputs, measure_network
from convt3d_gemm.bench.options import DESCRIPTION, add_arguments
from convt3d_gemm.bench.timing import Clock
from convt3d_gemm.compatibility import allows_tf32

__all__ = ["DESCRIPTION", "add_arguments", "run"]

_Item = TypeVar("_Item")


def run(arguments: argparse.Namespace, command_line: list[str]) -> int:
    """Measure, print and write what ``arguments`` ask for.

    Args:
        arguments: as parsed after `add_arguments`.
        command_line: what was typed, for the record.

    Returns:
        The exit status: 0; 1 if a result other than PyTorch's own was wrong; 2 if the comparison could not
        run; 130 if it was interrupted.
    """
    complaint = _complaint(arguments)
    if complaint is not None:
        print(complaint, file=sys.stderr)
        return 2
    device = _default_device() if arguments.device is None else arguments.device
    settings = Settings(
        device=device,
        tf32=allows_tf32() if arguments.tf32 is None else arguments.tf32,
        repeats=arguments.repeats,
        seconds=arguments.seconds,
    )
    on_device = torch.cuda.device(device) if device.type == "cuda" else contextlib.nullcontext()
    with on_device, comparison_mode(settings.tf32):
        try:
            return _Run(arguments, settings, command_line).go()
        except FactoryError as error:
            print(error, file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print("interrupted before anything was measured", file=sys.stderr)
            return 130


def _complaint(arguments: argparse.Namespace) -> str | None:
    """What is missing for the run, if anything: better said before it than after."""
    for name, is_needed in (("rich", True), ("matplotlib", arguments.plot is not None)):
        if is_needed and importlib.util.find_spec(name) is None:
            what = "convt3d bench" if name == "rich" else "convt3d bench --plot"
            return f'{what} needs {name}: pip install "convt3d-gemm[bench]"'
    if (arguments.model is None) != (not arguments.input):
        return "convt3d bench: --model and --input go together"
    return None


@dataclass(frozen=True)
class _Case:
    """One step of the run: a layer or a network through all competitors."""

    title: str
    measure: Callable[[], list[Result] | list[NetworkResult]]


class _Run:
    """A run from the ceilings to the files."""

    def __init__(self, arguments: argparse.Namespace, settings: Settings, command_line: list[str]) -> None:
        # Not at the top: `convt3d info` and `convt3d bench --help` do without rich.
        from convt3d_gemm.bench import report

        self.report = report
        self.console = report.make_console()
        self.arguments, self.settings, self.command_line = arguments, settings, command_line
        self.dtypes: list[torch.dtype] = _flattened(arguments.dtype) or [torch.float32]
        self.layouts: list[Layout] = _flattened(arguments.layout) or ["ncdhw"]
        self.algorithms: list[Algorithm] = _flattened(arguments.algorithm) or [
            ALGORITHMS[name] for name in DEFAULT_ALGORITHMS
        ]
        self.layers = _layers(arguments, settings.device)
        self.found: list[Found] = []
        self.network: Network | None = None
        self.results: list[Result] = []
        self.networks: list[NetworkResult] = []

    def go(self) -> int:
        """Do it all; the exit status."""
        if self.arguments.model is not None:
            self._look_into(self.arguments.model)
        device = describe(self.settings.device)
        ceilings = measure_ceilings(Clock(self.settings.device), self.dtypes)
        header = self._header_lines(device, ceilings)
        for line in header:
            self.console.print(line)
        busy = other_load()
        if busy is not None and self.settings.device.type != "cuda":
            self.console.print(busy, style="yellow")

        cases = [*self._layer_cases(ceilings), *self._network_cases()]
        done = self._measure(cases)
        shown = [*tables.layer_tables(self.results), *tables.network_tables(self.networks)]
        legends = self._legends()
        for table in shown:
            self.report.show(self.console, table)
        for legend in legends:
            self.console.print(f"\n{legend}")
        if done < len(cases):
            self.console.print(f"interrupted after {done} of {len(cases)} measurements")
        is_written = self._write(header, shown, legends, device, ceilings)
        if done < len(cases):
            return 130
        if not is_written:
            return 2
        wrong = {result.algorithm for result in self.results if result.status == "wrong"}
        wrong |= {result.algorithm for result in self.networks if result.status == "wrong"}
        return 1 if wrong - {BASELINE, BEFORE} else 0

    def _look_into(self, factory: Factory) -> None:
        """Make the network and find its layers."""
        with torch.random.fork_rng(devices=()):
            torch.manual_seed(self.settings.seed)
            module = factory.make()
        network = Network(type(module).__name__, module, tuple(self.arguments.input))
        device = self.settings.device
        try:
            inputs = draw_inputs(network, torch.float32, "ncdhw", device, self.settings.seed)
            on_device = copy.deepcopy(module).to(device, torch.float32).eval()
            self.found = find_layers(network.name, on_device, inputs)
        except Exception as error:  # of the network, whose input may be of a size that it does not take
            reason = why_failed(error)
            if reason != OUT_OF_MEMORY:
                sizes = ", ".join("x".join(map(str, size)) for size in network.input_sizes)
                raise FactoryError(f"{factory.text} does not take input {sizes}: {reason}") from error
            self.console.print(f"{network.name} runs out of memory when its layers are looked for", style="yellow")
        else:
            if not self.found:
                raise FactoryError(f"{factory.text} calls no torch.nn.ConvTranspose3d: there is nothing to compare")
            for line in self.report.found_lines(network.name, self.found):
                self.console.print(line, soft_wrap=True)
        self.network = network
        self.layers += [entry.layer for entry in self.found]

    def _header_lines(self, device: dict[str, object], ceilings: Ceilings) -> list[str]:
        precisions = {dtype: self.settings.precision(dtype) for dtype in self.dtypes}
        lines = self.report.header_lines(device, ceilings, precisions)
        if self.settings.device.type == "cuda" and torch.float32 in self.dtypes:
            whose = "PyTorch's setting" if self.arguments.tf32 is None else "as asked for"
            lines.append(f"TF32: {'on' if self.settings.tf32 else 'off'} ({whose})")
        return lines

    def _settings(self) -> Iterator[tuple[torch.dtype, Settings]]:
        """Every dtype in every layout."""
        for dtype in self.dtypes:
            for layout in self.layouts:
                yield dtype, dataclasses.replace(self.settings, layout=layout)

    def _layer_cases(self, ceilings: Ceilings) -> Iterator[_Case]:
        operators: tuple[Operator, ...] = ("forward",)
        if self.arguments.backward:
            operators = ("forward", "grad_input", "grad_weight", "grad_input_weight")
        for layer in self.layers:
            for operator in operators:
                for dtype, settings in self._settings():
                    title = f"{layer.name} {tables.OPERATOR_TITLES[operator]}{self._suffix(dtype, settings)}"
                    yield _Case(title, _measuring(layer, operator, dtype, self.algorithms, settings, ceilings))

    def _network_cases(self) -> Iterator[_Case]:
        if self.network is None:
            return
        names = [algorithm.name for algorithm in self.algorithms if algorithm.name in package_algorithms()]
        names = [name for name in names if name != BASELINE]  # which is what the network has before
        if not self.arguments.algorithm:
            names.insert(0, "auto")
        tasks: tuple[Task, ...] = ("forward", "training step")
        for task in tasks:
            for dtype, settings in self._settings():
                title = f"{self.network.name} {task}{self._suffix(dtype, settings)}"
                yield _Case(title, _measuring_network(self.network, task, dtype, names, settings))

    def _suffix(self, dtype: torch.dtype, settings: Settings) -> str:
        layout = f" {settings.layout.upper()}" if len(self.layouts) > 1 else ""
        return f" {tables.dtype_name(dtype)}{layout}"

    def _measure(self, cases: Sequence[_Case]) -> int:
        """Go through the cases; how many there was time for before an interruption."""
        done = 0
        try:
            with self.report.ProgressReport(len(cases)) as progress:
                for case in cases:
                    progress.begin(case.title)
                    measured = case.measure()
                    self.results += [result for result in measured if isinstance(result, Result)]
                    self.networks += [result for result in measured if isinstance(result, NetworkResult)]
                    done += 1
                    progress.end(case.title, measured)
        except KeyboardInterrupt:  # what is done is worth showing
            pass
        return done

    def _legends(self) -> list[str]:
        legends = [tables.LAYER_LEGEND] if self.results else []
        if self.networks:
            legends.append(tables.NETWORK_LEGEND)
            legends += tables.share_lines(self.found, self.results, self.networks)
        return legends

    def _write(
        self,
        header: Sequence[str],
        shown: Sequence[tables.Table],
        legends: Sequence[str],
        device: dict[str, object],
        ceilings: Ceilings,
    ) -> bool:
        """The files that were asked for; whether all of them could be written, of which one does not keep another."""

        def write_record(path: Path) -> None:
            about = record.header(self.command_line, self.settings, self.layouts, device, ceilings)
            record.write_json(path, about, self.results, self.found, self.networks)

        def write_tables(path: Path) -> None:
            name = "" if self.network is None else self.network.name
            lines = self.report.found_lines(name, self.found) if self.found else []
            write_markdown(path, [*header, *map(str.strip, lines)], shown, legends)

        def draw(path: Path) -> None:
            from convt3d_gemm.bench.plot import write_plot  # matplotlib is for those who want a picture

            write_plot(path, str(device["name"]), ceilings, self.results, self.networks)

        writes = [(self.arguments.json, write_record), (self.arguments.markdown, write_tables)]
        if self.results or self.networks:
            writes.append((self.arguments.plot, draw))
        is_written = True
        for path, write in writes:
            try:
                if path is not None:
                    write(path)
            except OSError as error:
                print(f"cannot write {path}: {error.strerror}", file=sys.stderr)
                is_written = False
        return is_written


def _measuring(
    layer: Layer,
    operator: Operator,
    dtype: torch.dtype,
    algorithms: Sequence[Algorithm],
    settings: Settings,
    ceilings: Ceilings,
) -> Callable[[], list[Result]]:
    return lambda: measure(layer, operator, dtype, algorithms, settings, ceilings)


def _measuring_network(
    network: Network, task: Task, dtype: torch.dtype, algorithms: Sequence[str], settings: Settings
) -> Callable[[], list[NetworkResult]]:
    return lambda: measure_network(network, task, dtype, algorithms, settings)


def _default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return torch.device("cpu")


def _layers(arguments: argparse.Namespace, device: torch.device) -> list[Layer]:
    preset = arguments.preset
    if preset is None and not arguments.layer and arguments.model is None:
        preset = "all" if device.type == "cuda" else "quick"
    chosen = [*(PRESETS[preset] if preset else ()), *arguments.layer]
    return list(dict.fromkeys(chosen))


def _flattened(lists: list[list[_Item]] | None) -> list[_Item]:
    """The items of an argument that may be repeated and takes several, each once."""
    return list(dict.fromkeys(item for items in lists or () for item in items))
