"""Whole networks in the comparison: making one, finding its layers, and measuring it before and after."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from convt3d_gemm import ConvTranspose3d
from convt3d_gemm.bench import network as network_module
from convt3d_gemm.bench.discovery import find_layers
from convt3d_gemm.bench.factory import FactoryError, parse_factory, parse_input_size
from convt3d_gemm.bench.layers import Layer
from convt3d_gemm.bench.measure import Settings, comparison_mode
from convt3d_gemm.bench.network import (
    Network,
    NetworkResult,
    Task,
    combined_error,
    draw_inputs,
    measure_network,
    tensors_in,
)

CPU = torch.device("cpu")
TASKS: tuple[Task, ...] = ("forward", "training step")


# Making one -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "source", "attribute", "arguments", "keywords"),
    [
        ("a.b:C", "a.b", "C", (), {}),
        ("net.py:make.small", "net.py", "make.small", (), {}),
        ("a:C()", "a", "C", (), {}),
        ("a:C(1, [2, 3], x=(4, -5), y={'k': None})", "a", "C", (1, [2, 3]), {"x": (4, -5), "y": {"k": None}}),
    ],
)
def test_reading_a_factory(
    text: str, source: str, attribute: str, arguments: tuple[Any, ...], keywords: dict[str, Any]
) -> None:
    factory = parse_factory(text)
    assert (factory.source, factory.attribute) == (source, attribute)
    assert (factory.arguments, factory.keywords) == (arguments, keywords)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a.b", "expected PACKAGE.MODULE:FACTORY"),
        (":C", "expected PACKAGE.MODULE:FACTORY"),
        ("a:", "expected PACKAGE.MODULE:FACTORY"),
        ("a:C(", "expected PACKAGE.MODULE:FACTORY"),
        ("a:C + 1", "expected PACKAGE.MODULE:FACTORY"),
        ("a:3", "expected PACKAGE.MODULE:FACTORY"),
        ("a:C(x=y)", "must be literals"),
        ("a:C(open('f'))", "must be literals"),
        ("a:C(**{'x': 1})", "must be literals"),
    ],
)
def test_factories_that_cannot_be_read(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_factory(text)


NETWORK_FILE = """
import torch

class Net(torch.nn.Sequential):
    def __init__(self, channels=2, stride=2):
        super().__init__(torch.nn.ConvTranspose3d(channels, 3, 2, stride))

def broken():
    raise OSError("no weights here")

ready = Net(5)
number = 7
"""


@pytest.fixture
def network_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    file = tmp_path / "made_for_this_test.py"
    file.write_text(NETWORK_FILE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, file.stem, raising=False)
    return file


def test_a_network_from_a_file_and_from_a_module(network_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    made = parse_factory(f"{network_file}:Net(4, stride=(1, 2, 3))").make()
    layer = next(made.children())
    assert isinstance(layer, nn.ConvTranspose3d)
    assert (layer.in_channels, layer.stride) == (4, (1, 2, 3))
    sys.modules.pop(network_file.stem)
    monkeypatch.chdir(network_file.parent)
    made = parse_factory(f"{network_file.stem}:ready").make()
    assert next(made.parameters()).shape == (5, 3, 2, 2, 2)
    sys.modules.pop(network_file.stem)


@pytest.mark.parametrize(
    ("attribute", "message"),
    [
        ("Net(color='red')", "cannot make .*TypeError"),
        ("nothing", "cannot make .*AttributeError"),
        ("broken", "cannot make .*OSError: no weights here"),
        ("number", "cannot make .*TypeError"),
        ("torch.zeros(1)", "must make a torch.nn.Module, got Tensor"),
    ],
)
def test_factories_that_make_no_network(network_file: Path, attribute: str, message: str) -> None:
    with pytest.raises(FactoryError, match=message):
        parse_factory(f"{network_file}:{attribute}").make()


def test_a_module_that_is_not_there() -> None:
    with pytest.raises(FactoryError, match=r"cannot make no\.such:thing: ModuleNotFoundError: No module named 'no'"):
        parse_factory("no.such:thing").make()


def test_input_sizes() -> None:
    assert parse_input_size("1x1x96x96x96") == (1, 1, 96, 96, 96)
    assert parse_input_size("7") == (7,)
    for text in ("", "1x", "1x0", "1,2", "axb", "-1x2"):
        with pytest.raises(ValueError, match="expected numbers joined by x"):
            parse_input_size(text)


# Finding its layers -----------------------------------------------------------------------------------------


class Scaled(nn.ConvTranspose3d):
    """A class of somebody's own."""

    def forward(self, input: Tensor, output_size: list[int] | None = None) -> Tensor:
        return 2 * super().forward(input, output_size)


class Decoder(nn.Module):
    """Calls some layers in every way there is, and one not at all."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.ConvTranspose3d(4, 6, 2, 2)
        self.shared = nn.ConvTranspose3d(6, 6, 3, 1, 1, groups=3, dilation=(1, 1, 1))
        self.sized = nn.ConvTranspose3d(6, 2, 3, (2, 1, 2), 1)
        self.own = nn.Sequential(Scaled(2, 2, (1, 2, 3)))
        self.unused = nn.ConvTranspose3d(2, 2, 2)

    def forward(self, x: Tensor) -> dict[str, Any]:
        x = self.shared(self.shared(self.up(input=x)))
        x = self.sized(x, output_size=[12, 6, 11])
        return {"out": self.own(x), "sides": [x, None]}


def test_the_layers_of_a_network_with_the_shapes_that_they_see() -> None:
    network = Decoder()
    found = find_layers("Decoder", network, [torch.zeros(2, 4, 3, 3, 3)])
    triple = (6, 6, 6)
    assert [entry.layer for entry in found] == [
        Layer("Decoder[0]", 2, 4, 6, (2, 2, 2), (3, 3, 3), (2, 2, 2)),
        Layer("Decoder[1]", 2, 6, 6, (3, 3, 3), triple, (1, 1, 1), (1, 1, 1), groups=3),
        # output_padding is what the output_size of the call makes it
        Layer("Decoder[2]", 2, 6, 2, (3, 3, 3), triple, (2, 1, 2), (1, 1, 1), (1, 0, 0)),
        Layer("Decoder[3]", 2, 2, 2, (1, 2, 3), (12, 6, 11)),
    ]
    assert [entry.modules for entry in found] == [("up",), ("shared",), ("sized",), ("own.0",)]
    assert [entry.calls for entry in found] == [1, 2, 1, 1]
    assert [entry.replaced for entry in found] == [True, True, True, False]
    assert not any(module._forward_hooks for module in network.modules())
    assert type(network.up) is nn.ConvTranspose3d


def test_layers_that_see_the_same_are_one() -> None:
    network = nn.Sequential(nn.ConvTranspose3d(2, 2, 1), nn.ReLU(), nn.ConvTranspose3d(2, 2, 1))
    (found,) = find_layers("Net", network, [torch.zeros(2, 3, 4, 5)])  # one sample, no batch
    assert found.layer == Layer("Net[0]", 1, 2, 2, (1, 1, 1), (3, 4, 5))
    assert (found.modules, found.calls) == (("0", "2"), 2)


def test_a_layer_that_has_an_output_by_its_output_padding_alone() -> None:
    network = nn.Sequential(nn.ConvTranspose3d(1, 1, 2, stride=2, padding=1, output_padding=1))
    (found,) = find_layers("Net", network, [torch.zeros(1, 1, 1, 4, 4)])
    two, one = (2, 2, 2), (1, 1, 1)
    assert found.layer == Layer("Net[0]", 1, 1, 1, two, (1, 4, 4), two, padding=one, output_padding=one)


def test_hooks_do_not_outlast_a_network_that_fails() -> None:
    network = Decoder()
    with pytest.raises(RuntimeError, match="expected input"):
        find_layers("Decoder", network, [torch.zeros(2, 5, 3, 3, 3)])
    assert not any(module._forward_hooks for module in network.modules())


# Before and after -------------------------------------------------------------------------------------------


class Small(nn.Module):
    """A convolution, dropout, normalisation and a transposed convolution."""

    def __init__(self) -> None:
        super().__init__()
        self.down = nn.Conv3d(1, 4, 3, 2, 1)
        self.norm = nn.BatchNorm3d(4)
        self.dropout = nn.Dropout3d(0.5)
        self.up = nn.ConvTranspose3d(4, 2, 2, 2)
        self.trained: list[bool] = []
        self.dtypes: list[torch.dtype] = []

    def forward(self, x: Tensor) -> Tensor:
        self.trained.append(self.training)
        y: Tensor = self.up(self.dropout(self.norm(self.down(x))))
        self.dtypes.append(y.dtype)
        return y


def measured(
    module: nn.Module,
    task: Task,
    *algorithms: str,
    dtype: torch.dtype = torch.float32,
    sizes: tuple[tuple[int, ...], ...] = ((2, 1, 8, 8, 8),),
    layout: str = "ncdhw",
) -> list[NetworkResult]:
    settings = Settings(CPU, layout="ndhwc" if layout == "ndhwc" else "ncdhw", repeats=3)
    with comparison_mode(tf32=False):
        return measure_network(Network("Net", module, sizes), task, dtype, algorithms, settings)


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize(
    ("dtype", "largest_error"), [(torch.float64, 1e-14), (torch.float32, 1e-6), (torch.bfloat16, 2e-2)]
)
@pytest.mark.parametrize("task", TASKS)
def test_a_network_before_and_after(task: Task, dtype: torch.dtype, largest_error: float, layout: str) -> None:
    module = Small()
    weights = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    before, *after = measured(module, task, "auto", "gemm", "direct", dtype=dtype, layout=layout)
    assert (before.algorithm, before.speedup) == ("before", 1.0)
    assert [result.algorithm for result in after] == ["auto", "gemm", "direct"]
    for result in (before, *after):
        assert result.status == "ok", result.reason
        assert result.timing is not None
        assert result.timing.repeats == 3
        assert result.error is not None
        assert result.error <= largest_error
        assert (result.error > 1e-9) == (dtype != torch.float64)
        assert (result.task, result.dtype, result.layout, result.peak_bytes) == (task, dtype, layout, None)
    assert before.timing is not None
    for result in after:
        assert result.timing is not None
        assert result.speedup == pytest.approx(before.timing.median / result.timing.median)
    # Only copies were touched.
    assert type(module.up) is nn.ConvTranspose3d
    assert module.training
    assert module.trained == []
    assert all(parameter.grad is None and parameter.requires_grad for parameter in module.parameters())
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, weights[name])


@pytest.mark.parametrize("task", TASKS)
def test_errors_are_taken_in_evaluation_and_a_training_step_is_timed_in_training(task: Task) -> None:
    seen: list[Small] = []

    class Remembered(Small):
        def __deepcopy__(self, memo: dict[int, Any]) -> Small:
            made = Small()
            made.load_state_dict(self.state_dict())
            seen.append(made)
            return made

    measured(Remembered(), task, "gemm", dtype=torch.bfloat16)
    exact, before, after = seen
    assert exact.trained == [False]
    assert exact.dtypes == [torch.float64]
    assert (type(before.up), type(after.up)) == (nn.ConvTranspose3d, ConvTranspose3d)
    for variant in (before, after):
        assert set(variant.dtypes) == {torch.bfloat16}
        assert len(variant.trained) > 4
        assert variant.trained == [False] + [task == "training step"] * (len(variant.trained) - 1)
        assert next(variant.parameters()).dtype == torch.float32


def changing(change: Callable[[nn.Module], None]) -> Callable[[nn.Module, str], nn.Module]:
    """In place of `replace_conv_transpose3d`: with "bad", the network comes out changed."""

    def replace(module: nn.Module, algorithm: str) -> nn.Module:
        if algorithm == "bad":
            change(module)
        return module

    return replace


@pytest.mark.parametrize("task", TASKS)
def test_a_network_that_comes_out_wrong(task: Task, monkeypatch: pytest.MonkeyPatch) -> None:
    def scale(module: nn.Module) -> None:
        module.get_parameter("up.weight").data *= 1.01

    monkeypatch.setattr(network_module, "replace_conv_transpose3d", changing(scale))
    before, bad, gemm = measured(Small(), task, "bad", "gemm")
    assert bad.status == "wrong"
    assert bad.error is not None
    assert 1e-3 < bad.error < 0.1
    assert before.error is not None
    assert bad.error_bound == max(2e-6, 10 * before.error)
    assert bad.reason == f"error {bad.error:.1e}, at most {bad.error_bound:.1e} allowed"
    assert (bad.timing, bad.speedup) == (None, None)
    assert (before.status, gemm.status) == ("ok", "ok")


def test_a_network_that_fails_or_has_no_memory_is_a_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def break_it(error: Exception) -> None:
        def forward(_: Tensor) -> Tensor:
            raise error

        def change(module: nn.Module) -> None:
            module.forward = forward

        monkeypatch.setattr(network_module, "replace_conv_transpose3d", changing(change))

    break_it(KeyError("skip"))
    before, bad, gemm = measured(Small(), "forward", "bad", "gemm")
    assert (bad.status, bad.reason) == ("failed", "KeyError: 'skip'")
    assert (before.speedup, gemm.status) == (1.0, "ok")
    break_it(torch.cuda.OutOfMemoryError("CUDA out of memory"))
    before, bad, gemm = measured(Small(), "forward", "bad", "gemm")
    assert (bad.status, bad.reason) == ("out of memory", "out of memory")
    assert (before.speedup, gemm.status) == (1.0, "ok")


def test_a_network_that_does_not_take_the_input_fails_in_every_row() -> None:
    for result in measured(Small(), "forward", "gemm", sizes=((2, 3, 8, 8, 8),)):
        assert result.status == "failed"
        assert result.reason is not None
        assert result.reason.startswith("in float64: RuntimeError: ")
        assert "3 channels" in result.reason


def test_a_network_whose_numbers_are_not_finite_is_wrong() -> None:
    module = Small()
    module.up.weight.data[0, 0, 0, 0, 0] = math.nan
    for result in measured(module, "forward", "gemm"):
        assert (result.status, result.reason) == ("wrong", "results are not finite")


def test_a_training_step_needs_an_output_that_depends_on_parameters() -> None:
    class Constant(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up = nn.ConvTranspose3d(1, 1, 1)

        def forward(self, x: Tensor) -> Tensor:
            return x

    for result in measured(Constant(), "training step", "gemm"):
        assert result.status == "failed"
        assert result.reason is not None
        assert "no output of the network depends on its parameters" in result.reason


def test_tensors_in_what_a_network_returns() -> None:
    a, b, c = torch.zeros(1), torch.zeros(2), torch.zeros(3)
    nested = {"a": a, "rest": (None, [b, "text", torch.zeros(4, dtype=torch.int64)], {"c": c})}
    assert [tensor.numel() for tensor in tensors_in(nested)] == [1, 2, 3]
    assert tensors_in(None) == []


def test_the_error_of_several_tensors_is_that_of_all_as_one() -> None:
    exact = [torch.tensor([3.0, 0.0]).double(), torch.tensor([4.0]).double()]
    assert combined_error([torch.tensor([3.0, 0.3]), torch.tensor([4.4])], exact) == pytest.approx(0.1)
    assert combined_error([torch.zeros(2)], [torch.zeros(2).double()]) == 0.0
    assert math.isnan(combined_error([torch.tensor([math.nan])], [torch.ones(1).double()]))


def test_inputs_are_in_the_layout_and_the_same_for_a_seed() -> None:
    network = Network("Net", Small(), ((2, 3, 4, 5, 6), (2, 7)))
    first, second = draw_inputs(network, torch.bfloat16, "ndhwc", CPU, seed=3)
    assert first.is_contiguous(memory_format=torch.channels_last_3d)
    assert (first.shape, second.shape, first.dtype) == ((2, 3, 4, 5, 6), (2, 7), torch.float32)
    assert torch.equal(first, draw_inputs(network, torch.float32, "ncdhw", CPU, seed=3)[0])
    assert draw_inputs(network, torch.float64, "ncdhw", CPU, seed=3)[0].dtype == torch.float64


# Real networks ----------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore")  # MONAI's own and its dependencies'
@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("UNet(3, 1, 2, channels=(4, 8, 16), strides=(2, 2))", 2),
        ("DynUNet(3, 1, 2, [3, 3, 3], [1, 2, 2], [2, 2], filters=[4, 8, 16])", 2),
        ("SegResNet(upsample_mode='deconv', init_filters=8)", 3),
        ("VNet()", 4),
        ("UNETR(1, 2, 32, feature_size=4, hidden_size=48, mlp_dim=64, num_heads=4)", 10),
    ],
)
def test_networks_of_monai(text: str, calls: int) -> None:
    pytest.importorskip("monai")
    module = parse_factory(f"monai.networks.nets:{text}").make()
    found = find_layers("Net", module.eval(), [torch.randn(1, 1, 32, 32, 32)])
    assert sum(entry.calls for entry in found) == calls
    assert all(entry.replaced for entry in found)
    before, after = measured(module, "forward", "direct", sizes=((1, 1, 32, 32, 32),))
    assert (before.status, after.status) == ("ok", "ok"), after.reason
