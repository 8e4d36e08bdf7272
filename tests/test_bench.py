"""The comparison: its layers, its reference and its verdicts. The command line is in test_cli.py."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn import functional

from convt3d_gemm.bench import reference
from convt3d_gemm.bench.ceilings import Ceilings, measure_ceilings
from convt3d_gemm.bench.checking import Expected, error_bound
from convt3d_gemm.bench.competitors import ALGORITHMS, DEFAULT_ALGORITHMS, Algorithm
from convt3d_gemm.bench.device import cache_bytes, describe, poisoned_memory, why_failed
from convt3d_gemm.bench.inputs import Tensors
from convt3d_gemm.bench.layers import LAYERS, PRESETS, Layer, Operator, Triple, parse_layer
from convt3d_gemm.bench.measure import Result, Settings, comparison_mode, measure
from convt3d_gemm.bench.targets import Targets, geometric_mean
from convt3d_gemm.bench.timing import Burst, Clock, Timing, rotations, time_in_turn

CPU = torch.device("cpu")
OPERATORS: tuple[Operator, ...] = ("forward", "grad_input", "grad_weight", "grad_input_weight")
SMALL = Layer("small", 2, 4, 6, (3, 2, 1), (3, 4, 5), (2, 1, 2), (1, 0, 0), (1, 0, 1), groups=2)
CEILINGS = Ceilings(copy_rate=1e9, gemm_rates=dict.fromkeys((torch.float32, torch.float64), 1e9))

# Of the published table: GFLOP, and the floor in ms with TF32 at 379 TFLOP/s and a copy rate of 4.22 TB/s.
PUBLISHED = {
    "kb58": (56.4, 0.149),
    "kb61": (260.9, 0.688),
    "kb68": (1288.5, 3.400),
    "kb70": (440.3, 1.162),
    "kb72": (5.9, 0.030),
    "kb73": (58.0, 0.279),
    "kb73g4": (14.5, 0.279),
    "kb77": (29.0, 0.143),
    "nnunet_deep": (1.7, 0.004),
    "nnunet_mid": (8.6, 0.040),
    "nnunet_top": (17.2, 0.159),
    "swin_top": (4.1, 0.045),
    "unet3d_k3s2": (29.0, 0.076),
    "gan_k4s2": (274.9, 0.725),
    "gan_first": (68.7, 0.181),
    "vae_aniso": (54.8, 0.144),
}


# Layers -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_operations_and_floor(name: str) -> None:
    gflop, floor = PUBLISHED[name]
    ceilings = Ceilings(copy_rate=4.22e12, gemm_rates={torch.float32: 379e12})
    assert LAYERS[name].flops("forward") / 1e9 == pytest.approx(gflop, abs=0.05)
    assert 1e3 * ceilings.floor_seconds(LAYERS[name], "forward", torch.float32) == pytest.approx(floor, abs=1e-3)


def test_presets() -> None:
    kernelbench, decoders, depthwise = (PRESETS[name] for name in ("kernelbench", "decoders", "depthwise"))
    assert [layer.name for layer in (*kernelbench, *decoders)] == list(PUBLISHED)
    assert all(layer.name.startswith("kb") for layer in kernelbench)
    assert not any(layer.name.startswith("kb") for layer in decoders)
    assert all(layer.groups == layer.in_channels == layer.out_channels >= 32 for layer in depthwise)
    assert {layer.kernel_size[0] for layer in depthwise} == {2, 3, 4}
    assert PRESETS["all"] == kernelbench + decoders + depthwise
    assert len(PRESETS["all"]) == len(set(PRESETS["all"])) == 25
    quick = PRESETS["quick"]
    assert sum(layer.flops("forward") for layer in quick) < 2e9
    assert any(layer.kernel_size == layer.stride for layer in quick)
    assert any(max(layer.output_padding) > 0 and layer.kernel_size == (3, 3, 3) for layer in quick)
    assert any(layer.kernel_size == (4, 4, 4) for layer in quick)
    assert any(1 < layer.groups < layer.in_channels for layer in quick)
    assert any(layer.groups == layer.in_channels == layer.out_channels for layer in quick)
    assert any(max(layer.dilation) > 1 for layer in quick)


@pytest.mark.parametrize("layer", [*LAYERS.values(), SMALL], ids=lambda layer: layer.name)
def test_output_shape_is_pytorchs(layer: Layer) -> None:
    output = functional.conv_transpose3d(
        torch.empty(layer.input_shape, device="meta"),
        torch.empty(layer.weight_shape, device="meta"),
        None,
        layer.stride,
        layer.padding,
        layer.output_padding,
        layer.groups,
        layer.dilation,
    )
    assert layer.output_shape == tuple(output.shape)


def test_what_an_operator_costs() -> None:
    layer = Layer("by hand", 2, 4, 6, (1, 2, 3), (2, 3, 4), groups=2)
    x, w, y = 2 * 4 * 24, 4 * 3 * 6, 2 * 6 * (2 * 4 * 6)
    assert layer.output_size == (2, 4, 6)
    assert layer.flops("forward") == 2 * 2 * 24 * 4 * 3 * 6
    assert layer.flops("grad_input") == layer.flops("grad_weight") == layer.flops("forward")
    assert layer.flops("grad_input_weight") == 2 * layer.flops("forward")
    for operator in ("forward", "grad_input", "grad_weight"):
        assert layer.elements_moved(operator) == x + w + y
    assert layer.elements_moved("grad_input_weight") == y + 2 * x + 2 * w
    assert layer.result_shapes("forward") == ((2, 6, 2, 4, 6),)
    assert layer.result_shapes("grad_input") == ((2, 4, 2, 3, 4),)
    assert layer.result_shapes("grad_weight") == ((4, 3, 1, 2, 3),)
    assert layer.result_shapes("grad_input_weight") == ((2, 4, 2, 3, 4), (4, 3, 1, 2, 3))


def test_the_floor_is_the_larger_of_its_two_parts() -> None:
    layer = Layer("by hand", 1, 1, 1, (1, 1, 1), (10, 10, 10))  # 2000 operations, 2001 elements
    multiplying = Ceilings(copy_rate=math.inf, gemm_rates={torch.float16: 1e3})
    moving = Ceilings(copy_rate=1e3, gemm_rates={torch.float16: math.inf})
    assert multiplying.floor_seconds(layer, "forward", torch.float16) == 2.0
    assert moving.floor_seconds(layer, "forward", torch.float16) == pytest.approx(2 * 2.001)


@st.composite
def layers(draw: st.DrawFn) -> Layer:
    def triple(least: int, most: int) -> Triple:
        number = st.integers(least, most)
        return draw(number), draw(number), draw(number)

    groups = draw(st.integers(1, 3))
    stride, dilation = triple(1, 3), triple(1, 3)
    depth, height, width = (draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    return Layer(
        name="drawn",
        batch=draw(st.integers(1, 3)),
        in_channels=groups * draw(st.integers(1, 3)),
        out_channels=groups * draw(st.integers(1, 3)),
        kernel_size=triple(1, 4),
        input_size=triple(3, 5),  # with a padding of at most 1, an output is left
        stride=stride,
        padding=triple(0, 1),
        output_padding=(depth, height, width),
        dilation=dilation,
        groups=groups,
    )


@given(layers())
def test_a_specification_gives_its_layer_back(layer: Layer) -> None:
    parsed = parse_layer(layer.specification)
    assert parsed == dataclasses.replace(layer, name=layer.specification)
    assert hash(parsed) == hash(dataclasses.replace(layer, name=layer.specification))
    assert parsed.specification == layer.specification


def test_specification_defaults_and_spelling() -> None:
    assert parse_layer("kb72") is LAYERS["kb72"]
    text = "cin8, COUT4, k2, in3x4x5"
    assert parse_layer(text) == Layer(text, 1, 8, 4, (2, 2, 2), (3, 4, 5))
    layer = parse_layer("N2,Cin64,Cout32,k2x2x2,in64x64x64,s2,p0,op0,d1,g1")
    assert (layer.batch, layer.stride, layer.padding, layer.groups) == (2, (2, 2, 2), (0, 0, 0), 1)
    assert layer.specification == "N2,Cin64,Cout32,k2,in64,s2,p0,op0,d1,g1"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("nnunet_topp", "no layer is called 'nnunet_topp': did you mean nnunet_top"),
        ("zzz", "no layer is called 'zzz': there are kb58, kb61"),
        ("Cin4,Cout4,k2", "lacks in$"),
        ("N1,k2,in8", "lacks Cin, Cout$"),
        ("Cin4,Cout4,k2,in8,q3", "cannot read 'q3'"),
        ("Cin4,Cout4,k2,in8,", "cannot read ''"),
        ("Cin4,Cout4,k2x2,in8", "cannot read 'k2x2': one number, or three"),
        ("Cin4x4x4,Cout4,k2,in8", "cannot read 'Cin4x4x4': one number must follow"),
        ("Cin4,Cout4,k,in8", "cannot read 'k'"),
        ("Cin4,Cout4,k-2,in8", "cannot read 'k-2'"),
        ("Cin4,Cout4,k2,in8,k3", "k is given twice"),
        ("N0,Cin4,Cout4,k2,in8", "batch must be at least 1, got 0$"),
        ("Cin0,Cout4,k2,in8", "input's channels must be at least 1, got 0$"),
        ("Cin4,Cout0,k2,in8", "weight's output channels must be at least 1, got 0$"),
        ("Cin4,Cout4,k2x0x2,in8", r"weight's kernel height must be at least 1, got kernel size \(2, 0, 2\)$"),
        ("Cin4,Cout4,k2,in8x8x0", r"input's width must be at least 1 .* got input size \(8, 8, 0\)$"),
        ("Cin4,Cout4,k2,in8,s0", r"in8,s0': non-positive stride .*: stride must be at least 1, got \(0, 0, 0\)$"),
        ("Cin4,Cout4,k2,in8,d1x0x1", r"dilation must be at least 1, got \(1, 0, 1\)$"),
        ("Cin4,Cout4,k2,in8,g0", "groups must be at least 1, got 0$"),
        ("Cin4,Cout6,k2,in8,g4", "groups must divide the output's channels: got groups=4 and 6 channels$"),
        ("Cin6,Cout4,k2,in8,g4", "groups must divide the input's channels: got groups=4 and 6 channels$"),
        (
            "Cin4,Cout4,k2,in8,s2,op2",
            r"output_padding must be smaller than either stride or dilation in every dimension: "
            r"got output_padding \(2, 2, 2\), stride \(2, 2, 2\), dilation \(1, 1, 1\)$",
        ),
        (
            "Cin4,Cout4,k1,in1x1x4,p0x0x2",
            r"output size must be at least 1 in every dimension, but its width would be 0: input \(1, 1, 4\), "
            r"kernel \(1, 1, 1\), stride \(1, 1, 1\), padding \(0, 0, 2\), output_padding \(0, 0, 0\), "
            r"dilation \(1, 1, 1\)$",
        ),
    ],
)
def test_bad_specifications(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        parse_layer(text)


# The reference ----------------------------------------------------------------------------------------------


def pytorch_in_float64(layer: Layer, tensors: Tensors) -> tuple[Tensor, Tensor, Tensor]:
    """Output, grad_input and grad_weight by PyTorch's own float64."""
    x = tensors.input.double().requires_grad_()
    w = tensors.weight.double().requires_grad_()
    y = functional.conv_transpose3d(
        x, w, None, layer.stride, layer.padding, layer.output_padding, layer.groups, layer.dilation
    )
    grad_input, grad_weight = torch.autograd.grad(y, (x, w), tensors.grad_output.double())
    return y.detach(), grad_input, grad_weight


@settings(max_examples=40)
@given(layers())
def test_the_reference_is_pytorchs_float64(layer: Layer) -> None:
    tensors = Tensors.draw(layer, "grad_input_weight", torch.float32, "ncdhw", CPU, seed=0)
    y, grad_input, grad_weight = pytorch_in_float64(layer, tensors)
    samples = range(layer.batch)
    for result, whole_batch in (
        (reference.forward(layer, tensors, samples), y),
        (reference.grad_input(layer, tensors, samples), grad_input),
        (reference.grad_weight(layer, tensors), grad_weight),
    ):
        torch.testing.assert_close(result, whole_batch, rtol=0.0, atol=1e-12)


def test_a_part_of_the_reference() -> None:
    tensors = Tensors.draw(SMALL, "grad_input_weight", torch.float32, "ndhwc", CPU, seed=1)
    y, grad_input, grad_weight = pytorch_in_float64(SMALL, tensors)
    for result, whole_batch in (
        (reference.forward(SMALL, tensors, (1,)), y[1:]),
        (reference.grad_input(SMALL, tensors, (1,)), grad_input[1:]),
        (reference.grad_weight(SMALL, tensors), grad_weight),
    ):
        assert result.is_contiguous()
        torch.testing.assert_close(result, whole_batch, rtol=0.0, atol=1e-12)


@pytest.mark.parametrize("operator", ["forward", "grad_input", "grad_input_weight"])
def test_a_large_layer_is_checked_in_part(operator: Operator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convt3d_gemm.bench.checking._CHECKED_FLOPS", 0)
    layer = Layer("three samples", 3, 2, 2, (3, 1, 1), (2, 2, 2))
    tensors = Tensors.draw(layer, operator, torch.float64, "ncdhw", CPU, seed=0)
    expected = Expected.of(layer, operator, tensors)
    results = ALGORITHMS["native"].run(layer, operator, tensors.grad_output, tensors.input, tensors.weight)
    assert expected.samples == (0, 2)
    assert expected.by_sample is not None
    assert expected.by_sample.shape == (2, *results[0].shape[1:])
    assert expected.error(results) < 1e-14
    results[0][1] = math.nan  # the sample that is left out
    assert expected.error(results) < 1e-14
    if operator != "grad_input_weight":
        assert expected.checked == "samples 0, 2"
    else:
        assert expected.checked == "samples 0, 2 of grad_input; all of grad_weight"
        results[1][1, 1, 1] += 1  # one tap that is neither the first nor the last
        norm = float(torch.linalg.vector_norm(reference.grad_weight(layer, tensors)))
        assert expected.error(results) == pytest.approx(1 / norm)
        results[1][1, 1, 1] -= 1
    last = float(torch.linalg.vector_norm(results[0][2])) / float(torch.linalg.vector_norm(expected.by_sample))
    results[0][2] *= 1.5
    assert expected.error(results) == pytest.approx(0.5 * last)
    results[0][2] = math.nan
    assert math.isnan(expected.error(results))


def test_of_a_large_grad_weight_everything_is_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("convt3d_gemm.bench.checking._CHECKED_FLOPS", 0)
    tensors = Tensors.draw(SMALL, "grad_weight", torch.float64, "ncdhw", CPU, seed=0)
    expected = Expected.of(SMALL, "grad_weight", tensors)
    assert (expected.by_sample, expected.checked) == (None, "everything")
    results = ALGORITHMS["native"].run(SMALL, "grad_weight", tensors.grad_output, tensors.input, tensors.weight)
    assert expected.error(results) < 1e-14
    assert expected.error((2 * results[0],)) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("dtype", "precision", "bound"),
    [
        (torch.float64, "ieee", 1e-12),
        (torch.float32, "ieee", 2e-6),
        (torch.float32, "tf32", 1e-3),
        (torch.float16, "ieee", 2e-3),
        (torch.bfloat16, "ieee", 1.5e-2),
    ],
)
def test_error_bounds(dtype: torch.dtype, precision: str, bound: float) -> None:
    assert error_bound(dtype, precision) == bound


# Verdicts ---------------------------------------------------------------------------------------------------


def native_but(change: Callable[[Tensor], Tensor], name: str = "changed") -> Algorithm:
    """PyTorch's own, and then ``change`` to the output or to the last of the gradients."""
    native = ALGORITHMS["native"]

    def forward(layer: Layer, input: Tensor, weight: Tensor) -> Tensor:
        return change(native.forward(layer, input, weight))

    def gradients(
        layer: Layer, operator: Operator, grad_output: Tensor, input: Tensor, weight: Tensor
    ) -> tuple[Tensor, ...]:
        *others, last = native.gradients(layer, operator, grad_output, input, weight)
        return (*others, change(last))

    return Algorithm(name, forward, gradients)


def verdicts(
    *algorithms: Algorithm,
    layer: Layer = SMALL,
    operator: Operator = "forward",
    dtype: torch.dtype = torch.float32,
) -> list[Result]:
    settings = Settings(CPU, repeats=3)
    with comparison_mode(tf32=False):
        return measure(layer, operator, dtype, algorithms, settings, CEILINGS)


@pytest.mark.parametrize("layout", ["ncdhw", "ndhwc"])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_algorithm_is_right(operator: Operator, dtype: torch.dtype, layout: str) -> None:
    settings = Settings(CPU, layout="ndhwc" if layout == "ndhwc" else "ncdhw", repeats=4, seconds=60.0)
    competitors = [ALGORITHMS[name] for name in DEFAULT_ALGORITHMS]
    with comparison_mode(tf32=False):
        native, *ours, aten = measure(SMALL, operator, dtype, competitors, settings, CEILINGS)
    assert [result.algorithm for result in ours] == ["gemm", "direct"]
    assert (aten.algorithm, aten.status) == ("aten", "not applicable")
    for result in (native, *ours):
        assert result.status == "ok", result.reason
        assert result.error is not None
        assert result.error <= result.error_bound == error_bound(dtype, "ieee")
        assert result.checked == "everything"
        assert result.timing is not None
        assert result.timing.repeats == 4
        assert result.tflops == pytest.approx(SMALL.flops(operator) / result.timing.median / 1e9)
        moved = SMALL.elements_moved(operator) * dtype.itemsize
        assert result.gigabytes_per_second == pytest.approx(moved / result.timing.median / 1e6)
        assert result.floor_fraction == pytest.approx(result.floor / result.timing.median)
    assert native.timing is not None
    assert native.speedup == 1.0
    assert native.workspace_bytes is None
    for result in ours:
        assert result.timing is not None
        assert result.speedup == pytest.approx(native.timing.median / result.timing.median)
        assert result.workspace_bytes is not None


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_wrong_result_is_shown_as_wrong(operator: Operator) -> None:
    native, wrong = verdicts(ALGORITHMS["native"], native_but(lambda result: result * (1 + 1e-3)), operator=operator)
    assert native.status == "ok"
    assert wrong.status == "wrong"
    assert wrong.error == pytest.approx(1e-3, rel=1e-2)
    assert wrong.reason == "error 1.0e-03, at most 2.0e-06 allowed"
    assert wrong.timing is None
    assert wrong.speedup is None


def test_a_wrong_baseline_is_shown_and_timed() -> None:
    """It is what PyTorch does: without its time there is nothing to compare with."""
    imprecise, changed = verdicts(
        native_but(lambda result: result * (1 + 1e-5), "native"), native_but(lambda result: result * 2)
    )
    assert imprecise.status == "wrong"
    assert imprecise.error == pytest.approx(1e-5, rel=1e-2)
    assert imprecise.timing is not None
    assert imprecise.speedup == 1.0
    assert changed.timing is None
    (broken,) = verdicts(native_but(lambda result: result * math.nan, "native"))
    assert (broken.status, broken.timing) == ("wrong", None)


def test_a_nan_is_wrong() -> None:
    (result,) = verdicts(native_but(lambda y: torch.where(y == y.flatten()[5], math.nan, y)))
    assert result.status == "wrong"
    assert result.error is not None
    assert math.isnan(result.error)


def test_a_wrong_shape_is_wrong() -> None:
    (result,) = verdicts(native_but(lambda y: y[:, :, 1:]))
    assert result.status == "wrong"
    assert result.reason is not None
    assert str(SMALL.output_shape) in result.reason


def test_what_is_never_written_is_wrong() -> None:
    """Fresh memory holds NaN during the check; else it may hold the last result, which is right."""

    def keep_all_but_one_plane(y: Tensor) -> Tensor:
        output = torch.empty_like(y)
        output[:, :, 1:] = y[:, :, 1:]
        return output

    (result,) = verdicts(native_but(keep_all_but_one_plane))
    assert result.status == "wrong"
    with poisoned_memory(CPU, 0):
        assert torch.empty(3).isnan().all()
    assert not torch.are_deterministic_algorithms_enabled()


def test_what_fails_is_a_row_and_the_rest_goes_on() -> None:
    def out_of_memory(result: Tensor) -> Tensor:
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 80 GiB")

    def broken(result: Tensor) -> Tensor:
        raise TypeError("first line\nsecond line")

    first, second, native = verdicts(
        native_but(out_of_memory, "first"), native_but(broken, "second"), ALGORITHMS["native"]
    )
    assert (first.status, first.reason) == ("out of memory", "out of memory")
    assert (second.status, second.reason) == ("failed", "TypeError: first line")
    assert native.status == "ok"
    assert native.timing is not None


def test_what_fails_only_when_timed() -> None:
    calls = []

    def only_once(result: Tensor) -> Tensor:
        calls.append(result)
        if len(calls) > 1:
            raise RuntimeError("not again")
        return result

    changed, native = verdicts(native_but(only_once), ALGORITHMS["native"])
    assert (changed.status, changed.reason) == ("failed", "RuntimeError: not again")
    assert changed.error is not None
    assert native.speedup == 1.0


@pytest.mark.parametrize("operator", OPERATORS)
def test_aten_applies_to_ungrouped_layers(operator: Operator) -> None:
    ungrouped = Layer("ungrouped", 1, 3, 2, (3, 3, 3), (3, 3, 3), (2, 2, 2))
    (result,) = verdicts(ALGORITHMS["aten"], layer=ungrouped, operator=operator, dtype=torch.float64)
    assert result.status == "ok", result.reason
    (result,) = verdicts(ALGORITHMS["aten"], operator=operator)
    assert (result.status, result.reason) == ("not applicable", "slow_conv_transpose3d takes no groups")


def test_atens_gradients_are_of_neither_cudnn_nor_onednn(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[tuple[bool, bool]] = []

    def convolution_backward(*_: object) -> tuple[Tensor, Tensor, None]:
        seen.append((torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()))
        return torch.zeros(1), torch.ones(1), None

    monkeypatch.setattr(torch.ops.aten, "convolution_backward", convolution_backward)
    before = torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()
    operands = torch.empty(1), torch.empty(1), torch.empty(1)
    (of_weight,) = ALGORITHMS["aten"].gradients(SMALL, "grad_weight", *operands)
    assert float(of_weight) == 1.0
    assert (torch.backends.cudnn.enabled, torch._C._get_mkldnn_enabled()) == before
    ALGORITHMS["native"].gradients(SMALL, "grad_weight", *operands)
    assert seen == [(False, False), before]


def test_a_layer_without_memory_fails_in_every_row(monkeypatch: pytest.MonkeyPatch) -> None:
    def no_memory(*_: object) -> Tensors:
        raise RuntimeError("[enforce fail at alloc_cpu.cpp:1] DefaultCPUAllocator: can't allocate memory")

    monkeypatch.setattr(Tensors, "draw", no_memory)
    for result in verdicts(ALGORITHMS["native"], ALGORITHMS["gemm"]):
        assert (result.status, result.reason) == ("out of memory", "before any algorithm ran: out of memory")


def test_a_layer_that_cannot_fit_is_not_tried() -> None:
    """On a CPU, asking for too much would end the process."""
    huge = Layer("huge", 64, 512, 512, (3, 3, 3), (1024, 1024, 1024))
    for result in verdicts(ALGORITHMS["native"], ALGORITHMS["direct"], layer=huge):
        assert result.status == "out of memory"
        assert result.timing is None


def test_the_comparison_leaves_pytorchs_settings_as_they_were() -> None:
    def settings() -> tuple[bool, bool, str, bool]:
        cudnn = torch.backends.cudnn
        return (
            cudnn.benchmark,
            cudnn.allow_tf32,
            torch.get_float32_matmul_precision(),
            torch.is_grad_enabled(),
        )

    before = settings()
    with comparison_mode(tf32=not before[1]):
        inside = (True, not before[1], "highest" if before[1] else "high", False)
        assert settings() == inside
        verdict = Expected.of(SMALL, "forward", Tensors.draw(SMALL, "forward", torch.float32, "ncdhw", CPU, seed=0))
        assert verdict.checked == "everything"
        assert settings() == inside  # the reference's own do not outlast it
    assert settings() == before

    def fail_inside() -> None:
        with comparison_mode(tf32=not before[1]):
            raise KeyError

    with pytest.raises(KeyError):
        fail_inside()
    assert settings() == before


# Time and device --------------------------------------------------------------------------------------------


class FakeClock(Clock):
    """Makes the calls and takes the times from a list."""

    def __init__(self, seconds: float | list[float]) -> None:
        super().__init__(CPU)
        self.seconds = seconds

    def time(self, call: Callable[[], object], count: int = 1, host_seconds: float = 0.0) -> Burst:
        for _ in range(count):
            call()
        seconds = self.seconds.pop(0) if isinstance(self.seconds, list) else self.seconds
        return Burst(seconds, seconds)


def test_competitors_go_through_the_sets_from_different_ones_on() -> None:
    turns = rotations(range(12), 4)
    assert [[next(turn) for _ in range(13)][::4] for turn in turns] == [
        [0, 4, 8, 0],
        [3, 7, 11, 3],
        [6, 10, 2, 6],
        [9, 1, 5, 9],
    ]
    assert [next(turn) for turn in rotations(["one"], 3)] == ["one"] * 3


def test_competitors_take_turns() -> None:
    made: list[str] = []
    calls = {"a": lambda: made.append("a"), "b": lambda: made.append("b")}
    warm = [9.0, 9.0, 9.0, 9.0]
    timings = time_in_turn(calls, FakeClock([*warm, 1.0, 2.0, 4.0, 3.0, 5.0, 6.0]), 3, 100.0)
    assert "".join(made) == "aaabbb" + "ab" + "ba" + "ab"
    assert timings["a"] == Timing(3000.0, 2000.0, 4000.0, repeats=3, calls=1)
    assert timings["b"] == Timing(4000.0, 3000.0, 5000.0, repeats=3, calls=1)


def test_short_calls_are_timed_in_bursts() -> None:
    made: list[int] = []
    timings = time_in_turn({"short": lambda: made.append(0)}, FakeClock(1e-4), repeats=5, seconds=100.0)
    assert timings["short"] == Timing(0.1, 0.1, 0.1, repeats=5, calls=10)
    assert len(made) == 1 + 2 + 5 * 10


def test_calls_longer_than_the_time_allowed_get_one_warm_up_and_three_repeats() -> None:
    made: list[int] = []
    timings = time_in_turn({"long": lambda: made.append(0)}, FakeClock(2.0), repeats=100, seconds=1e-9)
    assert timings["long"] == Timing(2000.0, 2000.0, 2000.0, repeats=3, calls=1)
    assert len(made) == 1 + 3


def test_timing_summary() -> None:
    timing = Timing.of([4.0, 1.0, 2.0, 3.0, 5.0], calls=2)
    assert timing == Timing(3.0, 2.0, 4.0, repeats=5, calls=2)
    assert timing.spread == pytest.approx(1 / 3)
    assert Timing.of([2.0], calls=1).spread == 0.0


def test_the_clock_divides_by_the_calls() -> None:
    events = []
    burst = Clock(CPU).time(lambda: events.append(torch.ones(10).sum()), count=20)
    assert len(events) == 20
    assert 0 < burst.seconds < 0.1


def test_ceilings_count_both_ways_of_a_copy_and_both_operations_of_a_multiply_add() -> None:
    ceilings = measure_ceilings(FakeClock(0.5), [torch.float32])
    assert ceilings.copy_rate == 4 * 2**28
    assert ceilings.gemm_rates == {torch.float32: 4 * 512**3}


def test_what_is_known_of_the_device() -> None:
    known = describe(CPU)
    assert known["threads"] == torch.get_num_threads()
    assert known["cache_bytes"] == cache_bytes(CPU) >= 1 << 16
    assert why_failed(ValueError()) == "ValueError"
    assert len(why_failed(ValueError("x" * 1000))) == 160


# targets ----------------------------------------------------------------------------------------------------


def test_targets_keep_what_is_missed() -> None:
    targets = Targets()
    assert targets.report() == "every target reached"
    for label, value in (("equal", 1.5), ("below", 1.4), ("none", math.nan)):
        targets.require(label, value, 1.5)
    assert targets.report() == "missed:\nbelow: 1.400, needed 1.5\nnone: nan, needed 1.5"


def test_geometric_mean() -> None:
    assert geometric_mean([0.5, 8.0]) == pytest.approx(2.0)
    assert math.isnan(geometric_mean([]))
