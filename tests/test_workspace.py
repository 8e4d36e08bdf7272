"""The workspace limit: kept to, without changing results, and lowered where memory is short."""

from __future__ import annotations

import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from cases import (
    ALGORITHMS,
    BOUNDS,
    LAYOUTS,
    NAMED,
    OPERATORS,
    Case,
    Tensors,
    native,
    ours,
    plan_of,
    relative_error,
    tf32,
    workspace_limit,
)
from convt3d_gemm import get_workspace_limit, library, set_workspace_limit, workspace_bytes

MIB = 1 << 20

#: Large enough to be cut in many ways: over samples, channels, groups and planes.
LARGE = {
    "strided": Case(3, 6, 20, size=(8, 7, 6), kernel=(3, 3, 3), padding=(1, 1, 1)),
    "grouped": Case(2, 6, 24, groups=3, size=(7, 6, 5), kernel=(3, 2, 3), stride=(1, 2, 2)),
    "dilated": Case(2, 4, 10, size=(9, 5, 6), kernel=(3, 3, 3), stride=(2, 1, 3), dilation=(3, 2, 2)),
    "kernel = stride": Case(2, 8, 12, size=(8, 6, 7), kernel=(2, 2, 2), padding=(0, 0, 0)),
    "pointwise": Case(3, 8, 12, 1, (7, 6, 5), (1, 1, 1), (1, 1, 1), (0, 0, 0)),
}
LIMITS = [1 << 10, 1 << 13, 1 << 15, 1 << 17, 1 << 20, 100_001]


def bytes_beside_the_limit(case: Case, tensors: Tensors, operator: str) -> int:
    """What comes on top: cuBLAS's own workspace on CUDA, and float32 copies of half types on a CPU."""
    if tensors.input.is_cuda:
        return 32 * MIB
    if tensors.input.element_size() > 2:
        return 0
    widened = [tensors.input, tensors.weight, tensors.bias, tensors.grad_output]
    if operator == "grad_input_weight":
        widened += [tensors.input, tensors.weight]
    return sum((tensor.numel() * 4 + 255) // 256 * 256 for tensor in widened)


def bytes_of(case: Case, tensors: Tensors, operator: str, algorithm: str = "gemm") -> int:
    return workspace_bytes(tensors.input, tensors.weight, **case.parameters, operator=operator, algorithm=algorithm)


def _rounded(number: int, multiple: int) -> int:
    return (number + multiple - 1) // multiple * multiple


OUT_OF_MEMORY: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)
OUT_OF_CPU_MEMORY = "DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes. Error code 12"


class Allocator:
    """torch.empty, which notes the workspaces asked for, and raises an error at those above a size."""

    def __init__(self, largest: int, error: RuntimeError) -> None:
        self.largest = largest
        self.error = error
        self.asked: list[int] = []
        self._empty = torch.empty

    def __call__(self, *arguments: Any, **keywords: Any) -> Tensor:
        if keywords.get("dtype") is torch.uint8:
            self.asked.append(int(arguments[0]))
            if self.asked[-1] > self.largest:
                raise self.error
        return self._empty(*arguments, **keywords)


@pytest.fixture
def allocator(monkeypatch: pytest.MonkeyPatch) -> Allocator:
    """Out of memory at sizes that a test may set; none at first."""
    allocator = Allocator(1 << 62, OUT_OF_MEMORY("CUDA out of memory"))
    monkeypatch.setattr(torch, "empty", allocator)
    return allocator


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", LARGE)
def test_limit_is_kept_to(
    name: str,
    operator: str,
    layout: torch.memory_format,
    dtype: torch.dtype,
    allocator: Allocator,
    device: torch.device,
) -> None:
    """What is allocated is what was said, keeps to the limit, and changes no result."""
    case = LARGE[name]
    tensors = case.tensors(device, dtype, layout, seed=1)
    with tf32(False):
        with workspace_limit(1 << 30):
            reference = [result.double() for result in ours(case, tensors, operator, "gemm")]
        beside = bytes_beside_the_limit(case, tensors, operator)
        fitting = 0
        for limit in LIMITS:
            allocator.asked.clear()
            with workspace_limit(limit):
                said = bytes_of(case, tensors, operator)
                columns = said - beside
                if columns > limit:
                    with pytest.raises(RuntimeError, match=f"at least {columns} bytes"):
                        ours(case, tensors, operator, "gemm")
                    assert allocator.asked == []
                    continue
                results = ours(case, tensors, operator, "gemm")
            assert allocator.asked == [said]
            assert relative_error(results, reference) <= BOUNDS[dtype]
            fitting += 1
    assert fitting >= 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("name", LARGE)
def test_direct_holds_partial_sums_and_packed_weights_alone(
    name: str,
    operator: str,
    layout: torch.memory_format,
    dtype: torch.dtype,
    allocator: Allocator,
    device: torch.device,
) -> None:
    """No columns under any limit; one partial sum under the smallest, and as many as fit under larger ones."""
    case = LARGE[name]
    tensors = case.tensors(device, dtype, layout, seed=1)
    expected = native(case, tensors, operator, torch.float64)
    one_partial_sum = _rounded(4 * tensors.weight.numel(), 256) if "weight" in operator else 0
    # Three float32 numbers for each, channels filled up to 64.
    channels = [_rounded(count // case.groups, 64) for count in (case.in_channels, case.out_channels)]
    packed = 3 * 4 * math.prod(case.kernel) * math.prod(channels) * case.groups
    for limit in [1, *LIMITS]:
        allocator.asked.clear()
        with tf32(False), workspace_limit(limit):
            plan = plan_of(case, tensors, operator, "direct")
            said = bytes_of(case, tensors, operator, "direct")
            results = ours(case, tensors, operator, "direct")
        assert plan.fits
        assert plan.column_bytes == 0
        assert plan.partial_bytes <= max(_rounded(limit, 256), one_partial_sum)
        assert plan.weight_bytes <= packed
        if tensors.input.is_cuda:
            assert plan.workspace_bytes == plan.partial_bytes + plan.weight_bytes
        assert allocator.asked == [plan.workspace_bytes] == [said]
        assert relative_error(results, expected) <= BOUNDS[dtype]


@pytest.mark.parametrize("operator", OPERATORS)
def test_a_larger_limit_never_takes_less_than_it_needs(operator: str) -> None:
    """Where something fits a limit, something fits every larger one."""
    for layout in LAYOUTS:
        case = LARGE["grouped"]
        tensors = case.tensors(torch.device("cpu"), torch.float32, layout, seed=2)
        fits = []
        for limit in sorted([*LIMITS, *range(1000, 60_000, 1777)]):
            with workspace_limit(limit):
                fits.append(bytes_of(case, tensors, operator) <= limit)
        assert fits == sorted(fits)


def test_pointwise_needs_nothing(device: torch.device) -> None:
    case = LARGE["pointwise"]
    tensors = case.tensors(device, torch.float32, torch.contiguous_format, seed=3)
    assert bytes_of(case, tensors, "forward") == bytes_beside_the_limit(case, tensors, "forward")
    with tf32(False), workspace_limit(1):
        results = ours(case, tensors, "forward", "gemm")
    assert relative_error(results, native(case, tensors, "forward", torch.float64)) <= BOUNDS[torch.float32]


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
def test_auto_takes_native_where_nothing_fits(
    operator: str,
    layout: torch.memory_format,
    allocator: Allocator,
    device: torch.device,
    cache: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # "direct" fits any limit, so that it has to stand aside.
    monkeypatch.setattr(library, "ALGORITHMS", {"gemm": library.ALGORITHMS["gemm"]})
    case = NAMED["plain"]
    tensors = case.tensors(device, torch.float32, layout, seed=4)
    with tf32(False), workspace_limit(1):
        results = ours(case, tensors, operator, "auto")
    assert allocator.asked == []
    assert relative_error(results, native(case, tensors, operator, torch.float64)) <= BOUNDS[torch.float32]


# ---- memory that can't be had ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "error"),
    [
        ("strided", OUT_OF_MEMORY("CUDA out of memory")),
        ("grouped", RuntimeError(OUT_OF_CPU_MEMORY)),
        ("dilated", OUT_OF_MEMORY("CUDA out of memory")),
    ],
    ids=["strided", "grouped", "dilated"],
)
@pytest.mark.parametrize(
    ("algorithm", "operator"),
    [*(("gemm", operator) for operator in OPERATORS), ("direct", "grad_weight"), ("direct", "grad_input_weight")],
)
def test_smaller_pieces_where_memory_is_short(
    algorithm: str, operator: str, name: str, error: RuntimeError, allocator: Allocator, device: torch.device
) -> None:
    case = LARGE[name]
    tensors = case.tensors(device, torch.float32, torch.contiguous_format, seed=5)
    with tf32(False):
        with workspace_limit(1):
            smallest = bytes_of(case, tensors, operator, algorithm)
        whole = bytes_of(case, tensors, operator, algorithm)
    if algorithm == "direct" and device.type == "cpu" and smallest == whole:
        pytest.skip("needs no partial sums")
    assert smallest < whole
    before = get_workspace_limit()
    expected = native(case, tensors, operator, torch.float64)
    for largest in (smallest, 2 * smallest, (smallest + whole) // 2):
        allocator.largest, allocator.error, allocator.asked = largest, error, []
        with tf32(False):
            results = ours(case, tensors, operator, algorithm)
        assert allocator.asked[0] == whole
        assert allocator.asked == sorted(set(allocator.asked), reverse=True)
        assert allocator.asked[-1] <= largest
        assert relative_error(results, expected) <= BOUNDS[torch.float32]
    assert get_workspace_limit() == before


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_gives_up_after_the_smallest_pieces(
    operator: str, algorithm: str, allocator: Allocator, device: torch.device
) -> None:
    case = LARGE["strided"]
    tensors = case.tensors(device, torch.float32, torch.contiguous_format, seed=6)
    with workspace_limit(1):
        smallest = bytes_of(case, tensors, operator, algorithm)
    allocator.largest = smallest - 1
    with pytest.raises(OUT_OF_MEMORY, match="CUDA out of memory"):
        ours(case, tensors, operator, algorithm)
    assert allocator.asked[-1] == smallest
    assert allocator.asked == sorted(set(allocator.asked), reverse=True)


def test_other_errors_are_not_tried_again(allocator: Allocator, device: torch.device) -> None:
    case = LARGE["strided"]
    tensors = case.tensors(device, torch.float32, torch.contiguous_format, seed=7)
    allocator.largest, allocator.error = 0, RuntimeError("CUDA error: an illegal memory access")
    with pytest.raises(RuntimeError, match="illegal memory access"):
        ours(case, tensors, "forward", "gemm")
    assert len(allocator.asked) == 1


# ---- the setting -------------------------------------------------------------------------------------------


def test_setting() -> None:
    before = get_workspace_limit()
    try:
        set_workspace_limit(12345)
        assert get_workspace_limit() == 12345
    finally:
        set_workspace_limit(before)


@pytest.mark.parametrize(("text", "expected"), [(None, 1024 * MIB), ("64", 64 * MIB), ("0.5", MIB // 2), ("1e-9", 1)])
def test_environment(text: str | None, expected: int) -> None:
    environment = {key: value for key, value in os.environ.items() if key != "CONVT3D_WORKSPACE_MB"}
    result = subprocess.run(
        [sys.executable, "-c", "import convt3d_gemm; print(convt3d_gemm.get_workspace_limit())"],
        env=environment | ({} if text is None else {"CONVT3D_WORKSPACE_MB": text}),
        capture_output=True,
        text=True,
        check=True,
    )
    assert result.stdout == f"{expected}\n"


# ---- on a GPU, measured ------------------------------------------------------------------------------------


@pytest.mark.cuda
@pytest.mark.parametrize(("algorithm", "limit"), [("gemm", 32 * MIB), ("gemm", 256 * MIB), ("direct", 32 * MIB)])
@pytest.mark.parametrize("operator", OPERATORS)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_peak_memory(layout: torch.memory_format, operator: str, algorithm: str, limit: int) -> None:
    """Beside the results, at most the limit and 64 MiB, for columns of 1.7 GB."""
    case = Case(2, 32, 64, size=(32, 48, 48), kernel=(3, 5, 3), stride=(2, 2, 2))
    tensors = case.tensors(torch.device("cuda"), torch.float32, layout, seed=8)
    tensors = Tensors(*(t.clone(memory_format=torch.preserve_format) for t in vars(tensors).values()))
    with workspace_limit(limit):
        results = ours(case, tensors, operator, algorithm)
        own = sum(result.numel() * result.element_size() for result in results)
        del results
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        free_before, _ = torch.cuda.mem_get_info()
        allocated_before = torch.cuda.memory_allocated()
        torch.cuda.reset_peak_memory_stats()
        results = ours(case, tensors, operator, algorithm)
        torch.cuda.synchronize()
        assert torch.cuda.max_memory_allocated() - allocated_before <= own + limit + 64 * MIB
        free_after, _ = torch.cuda.mem_get_info()
        assert free_before - free_after <= own + limit + 128 * MIB  # the caching allocator rounds up
    del results


@pytest.mark.cuda
def test_out_of_memory_on_a_gpu() -> None:
    """With the device's memory all but taken, the call is made in smaller pieces."""
    case = Case(2, 32, 64, size=(32, 48, 48), kernel=(3, 5, 3), stride=(2, 2, 2))
    tensors = case.tensors(torch.device("cuda"), torch.float32, torch.contiguous_format, seed=9)
    expected = native(case, tensors, "grad_weight", torch.float64)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    left = 300 * MIB
    taken = torch.empty(torch.cuda.mem_get_info()[0] - left, dtype=torch.uint8, device="cuda")
    assert bytes_of(case, tensors, "grad_weight") > left
    try:
        with tf32(False):
            results = ours(case, tensors, "grad_weight", "gemm")
    finally:
        del taken
        torch.cuda.empty_cache()
    assert relative_error(results, expected) <= BOUNDS[torch.float32]
