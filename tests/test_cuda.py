"""What only a GPU shows: precision of whole layers, streams, devices, graphs, vectors, 64-bit indices."""

from __future__ import annotations

import concurrent.futures
import dataclasses
import functools
import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    ALGORITHMS,
    ANY_DEPTHWISE,
    BANDS,
    BOUNDS,
    BOXED,
    COPIED,
    CUBES,
    FILLED_RUNS,
    GRAD_INPUT_BANDS,
    HALF_TYPES,
    LAYOUTS,
    MANY_RUNS,
    MANY_TILES,
    NAMED,
    OPERATORS,
    PATTERNS,
    TF32_BOUND,
    TF32_TOO,
    Case,
    Tensors,
    bound_of,
    direct_kernels,
    dtype_of,
    kernels_of,
    native,
    ours,
    plan_of,
    poison,
    relative_error,
    tf32,
)
from convt3d_gemm import ConvTranspose3d, conv_transpose3d

pytestmark = pytest.mark.cuda

CUDA = torch.device("cuda")

#: A tenth of the layers that the figures are measured on, but of every kind.
LAYERS = {
    "kb77": Case(2, 32, 64, 1, (12, 24, 24), (3, 3, 3), (2, 2, 2), (1, 1, 1), (0, 0, 0), (2, 2, 2)),
    "kb73, grouped": Case(1, 32, 32, 4, (12, 24, 48), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "kb72": Case(2, 32, 32, 4, (6, 12, 24), (3, 5, 7), (2, 2, 2), (1, 2, 3), (1, 1, 1)),
    "nnunet_top": Case(1, 64, 32, 1, (24, 32, 32), (2, 2, 2), (2, 2, 2), (0, 0, 0)),
    "unet3d_k3s2": Case(1, 128, 64, 1, (12, 16, 16), (3, 3, 3), (2, 2, 2), (1, 1, 1), (1, 1, 1)),
    "gan_k4s2": Case(2, 128, 64, 1, (12, 12, 12), (4, 4, 4), (2, 2, 2), (1, 1, 1)),
    "stride 1": Case(2, 16, 24, 1, (10, 20, 20), (3, 3, 3), (1, 1, 1), (0, 0, 0)),
    "depthwise": Case(2, 48, 48, 48, (16, 16, 16), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "depthwise, long rows": Case(1, 3, 3, 3, (4, 9, 300), (3, 3, 3), (2, 2, 2), (1, 1, 1)),
    "odd channels": Case(2, 33, 31, 1, (8, 15, 17), (3, 2, 3), (2, 2, 3), (1, 0, 1)),
    "pointwise": Case(2, 64, 48, 1, (16, 16, 16), (1, 1, 1), (1, 1, 1), (0, 0, 0)),
}


@functools.lru_cache(maxsize=8)
def tensors_of(
    case: Case, dtype: torch.dtype = torch.float32, layout: torch.memory_format = torch.contiguous_format
) -> Tensors:
    """Drawn once for the tests that follow one another; none writes to them."""
    return case.tensors(CUDA, dtype, layout, seed=1)


# ---- precision ---------------------------------------------------------------------------------------------


PRECISIONS = ["float64", "float32", "tf32", "float16", "bfloat16"]


@functools.lru_cache(maxsize=1)
def expected_of(case: Case, operator: str, layout: torch.memory_format, precision: str) -> list[Tensor]:
    """The results in float64: once for the algorithms that follow one another."""
    return native(case, tensors_of(case, dtype_of(precision), layout), operator, torch.float64)


@functools.lru_cache(maxsize=1)
def their_error_of(case: Case, operator: str, layout: torch.memory_format, precision: str) -> float:
    """That of PyTorch's own."""
    dtype = dtype_of(precision)
    with tf32(precision == "tf32"):
        results = native(case, tensors_of(case, dtype, layout), operator, dtype)
    return relative_error(results, expected_of(case, operator, layout, precision))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", LAYERS)
def test_error_of_layers(name: str, operator: str, layout: torch.memory_format, precision: str, algorithm: str) -> None:
    """Within the bound, and no more than 1.5 times PyTorch's own, on at least 1e5 outputs."""
    case = LAYERS[name]
    dtype = dtype_of(precision)
    tensors = tensors_of(case, dtype, layout)
    assert tensors.grad_output.numel() >= 1e5
    expected = expected_of(case, operator, layout, precision)
    their_error = their_error_of(case, operator, layout, precision)
    with tf32(precision == "tf32"):
        error = relative_error(ours(case, tensors, operator, algorithm), expected)
    assert error <= bound_of(precision)
    if precision == "tf32" and their_error < 1e-5:  # cuDNN answered in IEEE float32
        assert error <= 5e-4
    elif precision != "float64":
        assert error <= 1.5 * their_error


@pytest.mark.parametrize("operator", OPERATORS)
def test_every_direct_kernel_is_reached(operator: str) -> None:
    """By a named case, which it computes right."""
    reached: set[str] = set()
    for case, layout, precision in itertools.product(NAMED.values(), LAYOUTS, PRECISIONS):
        dtype = dtype_of(precision)
        tensors = case.tensors(CUDA, dtype, layout, seed=1)
        with tf32(precision == "tf32"):
            kernels = set(kernels_of(plan_of(case, tensors, operator, "direct")))
            if kernels <= reached or case.batch == 0:
                continue
            results = ours(case, tensors, operator, "direct")
        expected = native(case, tensors, operator, torch.float64)
        assert relative_error(results, expected) <= bound_of(precision)
        reached |= kernels
    assert reached == direct_kernels(CUDA, operator)


@pytest.mark.parametrize("precision", HALF_TYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", MANY_TILES)
def test_direct_with_many_tiles(name: str, layout: torch.memory_format, precision: str) -> None:
    operator, case = MANY_TILES[name]
    tensors = case.tensors(CUDA, dtype_of(precision), layout, seed=1)
    check_direct(case, tensors, operator, precision)


@pytest.mark.parametrize("precision", TF32_TOO)
@pytest.mark.parametrize("name", MANY_RUNS)
def test_direct_with_many_runs(name: str, precision: str) -> None:
    operator, case, _ = MANY_RUNS[name]
    tensors = case.tensors(CUDA, dtype_of(precision), torch.contiguous_format, seed=1)
    check_direct(case, tensors, operator, precision)


@pytest.mark.parametrize("elements", [0, 1])
@pytest.mark.parametrize("precision", TF32_TOO)
@pytest.mark.parametrize("name", FILLED_RUNS)
def test_direct_with_filled_runs(name: str, precision: str, elements: int) -> None:
    """Runs that have rows without taps as well."""
    check_copied_source(FILLED_RUNS[name], precision, elements)


@pytest.mark.parametrize("precision", TF32_TOO)
@pytest.mark.parametrize("name", FILLED_RUNS)
def test_direct_with_filled_runs_without_bias(name: str, precision: str) -> None:
    """Where these rows are zeros that need not be put into every tile's runs."""
    case = FILLED_RUNS[name]
    tensors = case.tensors(CUDA, dtype_of(precision), torch.contiguous_format, seed=1)
    poison(CUDA)
    with tf32(precision == "tf32"):
        result = conv_transpose3d(tensors.input, tensors.weight, **case.parameters, algorithm="direct")
    given = tensors.to(torch.float64)
    expected = torch.nn.functional.conv_transpose3d(given.input, given.weight, **case.parameters)
    assert relative_error([result], [expected]) <= bound_of(precision)


@pytest.mark.parametrize("elements", [0, 1])
@pytest.mark.parametrize("precision", TF32_TOO)
@pytest.mark.parametrize("name", COPIED)
def test_direct_with_a_copied_source(name: str, precision: str, elements: int) -> None:
    """In bulk, or element by element where it begins between vectors; with NaN on both sides."""
    check_copied_source(COPIED[name], precision, elements)


@pytest.mark.parametrize("elements", [0, 1])
@pytest.mark.parametrize("name", BOXED)
def test_direct_with_boxes_of_the_source(name: str, elements: int) -> None:
    """The same where taps read different voxels."""
    check_copied_source(BOXED[name], "tf32", elements)


@pytest.mark.parametrize("precision", TF32_TOO)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("name", PATTERNS)
def test_direct_with_patterns(name: str, layout: torch.memory_format, precision: str) -> None:
    operator, case = PATTERNS[name]
    tensors = case.tensors(CUDA, dtype_of(precision), layout, seed=1)
    check_direct(case, tensors, operator, precision)


@pytest.mark.parametrize("elements", [0, 1])
@pytest.mark.parametrize("precision", TF32_TOO)
@pytest.mark.parametrize("name", CUBES)
def test_direct_with_cubes_of_a_shifted_source(name: str, precision: str, elements: int) -> None:
    check_copied_source(CUBES[name], precision, elements)


@pytest.mark.parametrize("elements", [0, 1])
@pytest.mark.parametrize("value", [math.inf, math.nan])
def test_direct_with_boxes_and_gaps_of_what_is_not_finite(value: float, elements: int) -> None:
    """What has no tap there stays finite, though its weights are zeros."""
    case = BOXED["gaps"]
    tensors = case.tensors(CUDA, torch.float32, torch.contiguous_format, seed=1)
    tensors.input[1, 9, 5, 7, 11] = value
    tensors = dataclasses.replace(tensors, input=_shifted(tensors.input, 16 + elements))
    with tf32(True):
        (result,) = ours(case, tensors, "forward", "direct")
    (expected,) = native(case, tensors, "forward", torch.float64)
    assert 0 < (~expected.isfinite()).sum() < 1000
    check_where_finite(result, expected, bound_of("tf32"))


@pytest.mark.parametrize("elements", [0, 1])
@pytest.mark.parametrize("precision", HALF_TYPES)
@pytest.mark.parametrize("name", BANDS)
def test_direct_by_bands(name: str, precision: str, elements: int) -> None:
    check_copied_source(BANDS[name], precision, elements)


@pytest.mark.parametrize("precision", HALF_TYPES)
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["sectors", "words", "odd rows", "unlike shifts, odd rows"])
def test_direct_by_bands_of_what_is_not_finite(name: str, value: float, precision: str) -> None:
    """What has no tap there stays finite, though the bands have zeros there."""
    case = BANDS[name]
    tensors = case.tensors(CUDA, dtype_of(precision), torch.contiguous_format, seed=1)
    tensors.input[1, 2, 3, 7, 5] = value
    check_what_is_not_finite(case, tensors, "forward", precision, most=math.prod(case.kernel))


@pytest.mark.parametrize("elements", [0, 1, 6])
@pytest.mark.parametrize("precision", HALF_TYPES)
@pytest.mark.parametrize("name", GRAD_INPUT_BANDS)
def test_direct_grad_input_by_bands(name: str, precision: str, elements: int) -> None:
    check_copied_source(GRAD_INPUT_BANDS[name], precision, elements, "grad_input")


@pytest.mark.parametrize("precision", HALF_TYPES)
@pytest.mark.parametrize("value", [math.inf, math.nan])
@pytest.mark.parametrize("name", ["whole rows", "odd rows", "words", "dilated rows"])
def test_direct_grad_input_by_bands_of_what_is_not_finite(name: str, value: float, precision: str) -> None:
    """What has no tap there stays finite, though the bands have zeros there, and rows lie beside each other."""
    case = GRAD_INPUT_BANDS[name]
    tensors = case.tensors(CUDA, dtype_of(precision), torch.contiguous_format, seed=1)
    tensors.grad_output[1, 2, 3, 7, 5] = value
    tensors.grad_output[0, 1, 4, 9, -1] = value
    check_what_is_not_finite(case, tensors, "grad_input", precision, most=2 * math.prod(case.kernel))


@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", ["forward", "grad_input", "grad_weight"])
@pytest.mark.parametrize("name", ANY_DEPTHWISE)
def test_direct_depthwise_of_any_geometry(
    name: str, operator: str, layout: torch.memory_format, precision: str
) -> None:
    case = ANY_DEPTHWISE[name]
    tensors = case.tensors(CUDA, dtype_of(precision), layout, seed=1)
    poison(CUDA)
    with tf32(precision == "tf32"):
        results = ours(case, tensors, operator, "direct")
    expected = native(case, tensors, operator, torch.float64)
    assert relative_error(results, expected) <= bound_of("float32" if precision == "tf32" else precision)


def check_what_is_not_finite(case: Case, tensors: Tensors, operator: str, precision: str, most: int) -> None:
    """Which is to be of the same kind everywhere, and somewhere, but in no more than `most` places."""
    (result,) = ours(case, tensors, operator, "direct")
    (expected,) = native(case, tensors, operator, torch.float64)
    assert torch.equal(result.isnan(), expected.isnan())
    assert 0 < (~expected.isfinite()).sum() <= most
    check_where_finite(result, expected, bound_of(precision))


def check_where_finite(result: Tensor, expected: Tensor, bound: float) -> None:
    """Which is to be the same everywhere."""
    assert torch.equal(result.isfinite(), expected.isfinite())
    assert relative_error([result.where(result.isfinite(), 0)], [expected.where(expected.isfinite(), 0)]) <= bound


def check_direct(case: Case, tensors: Tensors, operator: str, precision: str) -> None:
    poison(CUDA)
    with tf32(precision == "tf32"):
        results = ours(case, tensors, operator, "direct")
    assert relative_error(results, native(case, tensors, operator, torch.float64)) <= bound_of(precision)


def check_copied_source(case: Case, precision: str, elements: int, operator: str = "forward") -> None:
    tensors = case.tensors(CUDA, dtype_of(precision), torch.contiguous_format, seed=1)
    source = "input" if operator == "forward" else "grad_output"
    tensors = dataclasses.replace(tensors, **{source: _shifted(getattr(tensors, source), 16 + elements)})
    check_direct(case, tensors, operator, precision)


def _error_of_forward(case: Case, tensors: Tensors, expected: list[Tensor], algorithm: str) -> float:
    return relative_error(ours(case, tensors, "forward", algorithm), expected)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_tf32_follows_the_switch(algorithm: str) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs TF32: compute capability 8.0")
    case = LAYERS["gan_k4s2"]
    tensors = tensors_of(case)
    expected = native(case, tensors, "forward", torch.float64)
    for _ in range(2):  # once more, from the remembered plans
        with tf32(False):
            assert _error_of_forward(case, tensors, expected, algorithm) <= 2e-6
        with tf32(True):
            assert 1e-5 <= _error_of_forward(case, tensors, expected, algorithm) <= TF32_BOUND


@pytest.mark.skipif(not hasattr(torch.backends.cudnn, "conv"), reason="PyTorch before 2.9")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("precision", ["ieee", "tf32"])
def test_tf32_follows_the_newer_switch(precision: str, algorithm: str) -> None:
    if torch.cuda.get_device_capability() < (8, 0):
        pytest.skip("needs TF32: compute capability 8.0")
    case = LAYERS["gan_k4s2"]
    tensors = tensors_of(case)
    expected = native(case, tensors, "forward", torch.float64)
    settings: Any = torch.backends.cudnn.conv  # type: ignore[attr-defined, unused-ignore]
    before = settings.fp32_precision
    try:
        settings.fp32_precision = precision
        error = _error_of_forward(case, tensors, expected, algorithm)
        their_error = relative_error(native(case, tensors, "forward", torch.float32), expected)
    finally:
        settings.fp32_precision = before
    for one in (error, their_error):
        assert (1e-5 <= one <= TF32_BOUND) if precision == "tf32" else (one <= 2e-6)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("allow", [False, True])
def test_matmul_switch_has_no_say(allow: bool, algorithm: str) -> None:
    """PyTorch's convolutions ask cuDNN's switch alone, not the one for matrix products."""
    case = LAYERS["gan_k4s2"]
    tensors = tensors_of(case)
    before = torch.backends.cuda.matmul.allow_tf32
    with tf32(allow):
        expected = ours(case, tensors, "forward", algorithm)
        try:
            torch.backends.cuda.matmul.allow_tf32 = not allow
            results = ours(case, tensors, "forward", algorithm)
        finally:
            torch.backends.cuda.matmul.allow_tf32 = before
    assert torch.equal(results[0], expected[0])


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["kb77", "kb73, grouped", "nnunet_top", "depthwise"])
def test_reproducible(name: str, operator: str, layout: torch.memory_format, precision: str, algorithm: str) -> None:
    case = LAYERS[name]
    tensors = tensors_of(case, dtype_of(precision), layout)
    with tf32(precision == "tf32"):
        first, *others = [ours(case, tensors, operator, algorithm) for _ in range(4)]
    for other in others:
        assert all(torch.equal(a, b) for a, b in zip(first, other, strict=True))


# ---- streams, devices and threads --------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_another_stream(operator: str, algorithm: str) -> None:
    """The work goes to the current stream, behind what was queued there before."""
    case = LAYERS["kb77"]
    tensors = tensors_of(case)
    with tf32(False):
        expected = ours(case, tensors, operator, algorithm)
        stream = torch.cuda.Stream()
        blank = Tensors(*(torch.zeros_like(tensor) for tensor in vars(tensors).values()))
        torch.cuda.synchronize()
        with torch.cuda.stream(stream):
            torch.cuda._sleep(400_000_000)  # some 200 ms
            for target, source in zip(vars(blank).values(), vars(tensors).values(), strict=True):
                target.copy_(source)
            results = ours(case, blank, operator, algorithm)
        assert not stream.query()
        assert torch.cuda.default_stream().query()
        stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_gradients_on_another_stream(algorithm: str) -> None:
    case = LAYERS["nnunet_top"]
    tensors = tensors_of(case)
    given = (tensors.input, tensors.weight, tensors.bias)
    leaves = input, weight, bias = [tensor.detach().requires_grad_() for tensor in given]

    def gradients() -> tuple[Tensor, ...]:
        output = conv_transpose3d(input, weight, bias, **case.parameters, algorithm=algorithm)
        return torch.autograd.grad(output, leaves, tensors.grad_output)

    expected = gradients()
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        results = gradients()
    stream.synchronize()
    assert all(torch.equal(a, b) for a, b in zip(results, expected, strict=True))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_calls_do_not_wait_for_the_gpu(algorithm: str) -> None:
    case = LAYERS["kb77"]
    tensors = tensors_of(case)
    for operator in OPERATORS:
        ours(case, tensors, operator, algorithm)
    torch.cuda.synchronize()
    torch.cuda._sleep(2_000_000_000)  # about a second
    for operator in OPERATORS:
        ours(case, tensors, operator, algorithm)
    assert not torch.cuda.current_stream().query()
    torch.cuda.synchronize()


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_another_device(operator: str, algorithm: str) -> None:
    """Tensors of the second device while the first is current, and the current one stays so."""
    case = LAYERS["kb77"]
    tensors = tensors_of(case)
    second = Tensors(*(tensor.to("cuda:1") for tensor in vars(tensors).values()))
    expected = ours(case, tensors, operator, algorithm)
    with torch.cuda.device(0):
        results = ours(case, second, operator, algorithm)
        assert torch.cuda.current_device() == 0
        again = ours(case, tensors, operator, algorithm)
    assert all(result.device == torch.device("cuda:1") for result in results)
    bound = TF32_BOUND if torch.backends.cudnn.allow_tf32 else BOUNDS[torch.float32]
    moved = [result.to("cuda:0") for result in results]
    assert relative_error(moved, [tensor.double() for tensor in expected]) <= bound
    assert all(torch.equal(a, b) for a, b in zip(again, expected, strict=True))


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_tensors_of_two_devices() -> None:
    input, weight = torch.ones(1, 1, 2, 2, 2, device="cuda:0"), torch.ones(1, 1, 2, 2, 2, device="cuda:1")
    for algorithm in ALGORITHMS:
        with pytest.raises(RuntimeError, match=r"weight must be on the same device.*cuda:1 and cuda:0"):
            conv_transpose3d(input, weight, algorithm=algorithm)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_four_host_threads(algorithm: str) -> None:
    """Each with its own stream, layer and results."""
    names = ["kb77", "nnunet_top", "kb73, grouped", "unet3d_k3s2"]
    given = {name: tensors_of(LAYERS[name]) for name in names}
    pairs = [(name, operator) for name in names for operator in OPERATORS]
    expected = {(name, operator): ours(LAYERS[name], given[name], operator, algorithm) for name, operator in pairs}
    torch.cuda.synchronize()

    def work(name: str) -> int:
        wrong = 0
        stream = torch.cuda.Stream()
        with torch.cuda.stream(stream):
            for _ in range(20):
                for operator in OPERATORS:
                    results = ours(LAYERS[name], given[name], operator, algorithm)
                    same = [torch.equal(a, b) for a, b in zip(results, expected[name, operator], strict=True)]
                    wrong += not all(same)
        return wrong

    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        assert list(pool.map(work, names)) == [0, 0, 0, 0]


# ---- CUDA graphs -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["kb77", "kb73, grouped", "nnunet_top", "depthwise", "pointwise"])
def test_captured_operators(
    name: str, operator: str, layout: torch.memory_format, dtype: torch.dtype, algorithm: str
) -> None:
    """A replay computes on what the tensors hold then."""
    case = LAYERS[name]
    tensors = tensors_of(case, dtype, layout)
    other = case.tensors(CUDA, dtype, layout, seed=2)
    expected = [ours(case, given, operator, algorithm) for given in (tensors, other)]
    held = Tensors(*(tensor.clone(memory_format=torch.preserve_format) for tensor in vars(tensors).values()))
    _warm_up(lambda: ours(case, held, operator, algorithm))
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = ours(case, held, operator, algorithm)
    for given, reference in ((other, expected[1]), (tensors, expected[0]), (other, expected[1])):
        for target, source in zip(vars(held).values(), vars(given).values(), strict=True):
            target.copy_(source)
        for result in results:
            result.fill_(math.nan)
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(results, reference, strict=True))


def _warm_up(call: Callable[[], Any]) -> None:
    """On a stream of its own, as the documentation of torch.cuda.graph asks."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(2):
            call()
    torch.cuda.current_stream().wait_stream(stream)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_captured_training_step(algorithm: str) -> None:
    """Forward and gradients together through autograd, with inputs that change between replays."""
    torch.manual_seed(3)
    layer = ConvTranspose3d(16, 8, 3, 2, 1, output_padding=1, algorithm=algorithm).cuda()
    input = torch.randn(2, 16, 6, 7, 8, device="cuda", requires_grad=True)
    wanted = [input, *layer.parameters()]

    def step() -> tuple[Tensor, ...]:
        output = layer(input)
        return (output, *torch.autograd.grad(output.square().sum(), wanted))

    _warm_up(step)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = [result.detach() for result in step()]
    for seed in (4, 5):
        torch.manual_seed(seed)
        with torch.no_grad():
            input.normal_()
            layer.weight.normal_()
        graph.replay()
        assert all(torch.equal(a, b) for a, b in zip(captured, step(), strict=True))


# ---- addresses and sizes -----------------------------------------------------------------------------------


def _shifted(tensor: Tensor, elements: int) -> Tensor:
    """A copy whose address is some elements past an aligned one, with NaN before and behind it."""
    storage = tensor.new_full((tensor.numel() + 32,), math.nan)
    return storage.as_strided(tensor.size(), tensor.stride(), elements).copy_(tensor)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("elements", [1, 2, 4])
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", ["kb77", "nnunet_top", "pointwise", "depthwise"])
def test_unaligned_addresses(
    name: str, operator: str, layout: torch.memory_format, precision: str, elements: int, algorithm: str
) -> None:
    case, dtype = LAYERS[name], dtype_of(precision)
    shifted = Tensors(*(_shifted(tensor, elements) for tensor in vars(tensors_of(case, dtype, layout)).values()))
    assert shifted.input.data_ptr() % 16 == elements * shifted.input.element_size() % 16
    expected = expected_of(case, operator, layout, precision)
    with tf32(precision == "tf32"):
        error = relative_error(ours(case, shifted, operator, algorithm), expected)
    assert error <= bound_of(precision)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("channels", [1, 2, 3, 4, 6, 8, 12, 16, 20, 33])
@pytest.mark.parametrize("precision", ["float32", "tf32", "float16"])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_channel_counts(
    operator: str, layout: torch.memory_format, precision: str, channels: int, algorithm: str
) -> None:
    """Whole vectors, halves, and none."""
    case, dtype = Case(2, channels, channels, 1, (5, 6, 7)), dtype_of(precision)
    tensors = tensors_of(case, dtype, layout)
    expected = expected_of(case, operator, layout, precision)
    with tf32(precision == "tf32"):
        error = relative_error(ours(case, tensors, operator, algorithm), expected)
    assert error <= bound_of(precision)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_unaligned_slice_of_channels(algorithm: str) -> None:
    case = LAYERS["nnunet_top"]
    tensors = tensors_of(case, torch.float16, torch.channels_last_3d)
    wider = torch.cat([tensors.input] * 2, 1).contiguous(memory_format=torch.channels_last_3d)
    wider[:, 1 : 1 + case.in_channels] = tensors.input
    view = wider[:, 1 : 1 + case.in_channels]
    assert view.data_ptr() % 16 == 2
    given = Tensors(view, tensors.weight, tensors.bias, tensors.grad_output)
    for operator in OPERATORS:
        expected = native(case, tensors, operator, torch.float64)
        assert relative_error(ours(case, given, operator, algorithm), expected) <= BOUNDS[torch.float16]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_empty_batch(operator: str, layout: torch.memory_format, algorithm: str) -> None:
    for case in NAMED.values():
        full = tensors_of(case, torch.float32, layout)
        empty = Tensors(full.input[:0], full.weight, full.bias, full.grad_output[:0])
        for result in ours(case, empty, operator, algorithm):
            assert result.numel() == 0 or torch.equal(result, torch.zeros_like(result))


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("dtype", list(BOUNDS), ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("groups", [1, 4])
def test_pointwise_with_bias(groups: int, layout: torch.memory_format, dtype: torch.dtype, algorithm: str) -> None:
    case = Case(3, 20, 28, groups, (5, 9, 11), (1, 1, 1), (1, 1, 1), (0, 0, 0))
    tensors = tensors_of(case, dtype, layout)
    with tf32(False):
        expected = native(case, tensors, "forward", torch.float64)
        assert relative_error(ours(case, tensors, "forward", algorithm), expected) <= BOUNDS[dtype]


def _memory_or_skip(gibibytes: int) -> None:
    torch.cuda.empty_cache()
    if torch.cuda.mem_get_info()[0] < gibibytes << 30:
        pytest.skip(f"needs {gibibytes} GiB of GPU memory")


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("kernel", [(2, 2, 2), (3, 3, 3)], ids=str)
def test_more_than_2_to_the_31_outputs(
    kernel: tuple[int, int, int], layout: torch.memory_format, algorithm: str
) -> None:
    """float16, against float64 on a corner, the middle and the opposite corner of the output."""
    _memory_or_skip(24)
    case = Case(2, 8, 16, 1, (208, 208, 208), kernel, (2, 2, 2), (0, 0, 0))
    generator = torch.Generator(CUDA).manual_seed(6)
    input = torch.empty(2, 8, *case.size, dtype=torch.float16, device=CUDA, memory_format=layout)
    input.normal_(generator=generator)
    weight = torch.randn(8, 16, *kernel, dtype=torch.float16, device=CUDA, generator=generator)
    bias = torch.randn(16, dtype=torch.float16, device=CUDA, generator=generator)
    output = conv_transpose3d(input, weight, bias, stride=2, algorithm=algorithm)
    assert output.numel() > 2**31
    assert output.is_contiguous(memory_format=layout)
    for sample, start, stop in ((0, 0, 12), (1, 100, 112), (1, 196, 208)):
        part = input[sample : sample + 1, :, start:stop, start:stop, start:stop].double()
        expected = conv_transpose3d(part, weight.double(), bias.double(), stride=2, algorithm="native")
        # The planes at a cut side also get contributions from voxels outside of the part.
        low, high = (0 if start == 0 else 2), (None if stop == 208 else -2)
        inner = expected[:, :, low:high, low:high, low:high]
        first = 2 * start + low
        last = [first + inner.size(2 + axis) for axis in range(3)]
        result = output[sample : sample + 1, :, first : last[0], first : last[1], first : last[2]]
        assert relative_error([result], [inner]) <= BOUNDS[torch.float16]


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_gradients_past_2_to_the_31(layout: torch.memory_format, algorithm: str) -> None:
    """The sums of the gradients are known: every element of grad_output is one."""
    _memory_or_skip(24)
    case = Case(2, 8, 16, 1, (208, 208, 208), (2, 2, 2), (2, 2, 2), (0, 0, 0))
    size = (2, 16, 416, 416, 416)
    grad_output = torch.empty(size, dtype=torch.float16, device=CUDA, memory_format=layout).fill_(1)
    assert grad_output.numel() > 2**31
    weight = torch.ones(8, 16, 2, 2, 2, dtype=torch.float16, device=CUDA)
    operators, parameters = torch.ops.convt3d_gemm, case.operator_parameters(algorithm)
    grad_input = operators.grad_input(grad_output, weight, case.size, *parameters)
    assert bool((grad_input == 16 * 8).all())
    input = torch.empty(2, 8, *case.size, dtype=torch.float16, device=CUDA, memory_format=layout)
    input.fill_(2.0**-12)
    grad_weight = operators.grad_weight(grad_output, input, (2, 2, 2), *parameters)
    expected = 2 * 208**3 * 2.0**-12
    assert float((grad_weight.double() - expected).abs().max()) <= BOUNDS[torch.float16] * expected
