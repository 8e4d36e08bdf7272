"""Every operator on hundreds of random convolutions, against PyTorch in float64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import (
    ALGORITHMS,
    BOUNDS,
    LAYOUTS,
    OPERATORS,
    TF32_BOUND,
    Case,
    cases,
    direct_kernels,
    kernels_of,
    native,
    ours,
    plan_of,
    poison,
    relative_error,
    tf32,
    workspace_limit,
)
from convt3d_gemm import _C, library

#: Whole problems at once, pieces of samples, channels and planes, and the smallest pieces there are.
LIMITS = [1 << 30, 1 << 16, 1 << 12]

#: Of all dtypes together; on a GPU there are kernels of their own for each.
EXAMPLES = {"cpu": 300, "cuda": 300 * len(BOUNDS)}

#: The numbers of a result, but for zeros, below which they may cancel to nearly nothing, and so may all of it.
FEW_NUMBERS = 16
#: The cases below which an average of errors says little.
FEW_CASES = 20


@pytest.mark.parametrize("algorithm", ALGORITHMS)
@pytest.mark.parametrize("operator", OPERATORS)
def test_random_convolutions(operator: str, algorithm: str, device: torch.device) -> None:
    check_random(operator, algorithm, device, direct_kernels(device, operator) if algorithm == "direct" else set())


@pytest.mark.cuda
@pytest.mark.parametrize("operator", ["forward", "grad_input"])
def test_random_convolutions_with_the_kernels_of_older_gpus(operator: str, monkeypatch: pytest.MonkeyPatch) -> None:
    find_target = _C.Target.cuda

    def older(device: int) -> _C.Target:
        target = find_target(device)
        target.compute_capability = min(target.compute_capability, 80)
        return target

    monkeypatch.setattr(_C.Target, "cuda", older)
    library.planned.cache_clear()
    try:
        check_random(operator, "direct", torch.device("cuda", 0), {"simt", "depthwise", "tensor"})
    finally:
        library.planned.cache_clear()


def on_cpu(tensors: list[torch.Tensor]) -> list[torch.Tensor]:
    return [tensor.cpu() for tensor in tensors]


def check_random(operator: str, algorithm: str, device: torch.device, families: set[str]) -> None:
    """Hundreds of random convolutions, on which these families of kernels are chosen, each at least once."""
    ratios: dict[str, list[float]] = {}
    kernels: set[str] = set()

    @settings(max_examples=EXAMPLES[device.type], suppress_health_check=list(HealthCheck))
    @given(
        case=cases(),
        dtype=st.sampled_from(list(BOUNDS)),
        layout=st.sampled_from(LAYOUTS),
        limit=st.sampled_from(LIMITS),
        seed=st.integers(0, 2**31),
        allow_tf32=st.booleans(),
    )
    def check(
        case: Case, dtype: torch.dtype, layout: torch.memory_format, limit: int, seed: int, allow_tf32: bool
    ) -> None:
        uses_tf32 = allow_tf32 and dtype == torch.float32 and device.type == "cuda"
        tensors = case.tensors(device, dtype, layout, seed)
        expected = on_cpu(native(case, tensors, operator, torch.float64))
        poison(device)
        with tf32(allow_tf32), workspace_limit(limit):
            plan = plan_of(case, tensors, operator, algorithm)
            with workspace_limit(limit if plan.fits else 1 << 30):
                # Off the GPU before PyTorch's own run: some of cuDNN's grouped gradients (9.19) write past their end.
                results = on_cpu(ours(case, tensors, operator, algorithm))
            # On a CPU rounding stands in for oneDNN, whose gradients in half types crash at times (PyTorch 2.13).
            is_rounding = device.type == "cpu" and dtype.itemsize == 2
            theirs = [e.to(dtype) for e in expected] if is_rounding else native(case, tensors, operator, dtype)
        assert plan.fits or algorithm == "gemm"
        kernels.update(kernels_of(plan))
        magnitudes = expected
        if min(int(result.count_nonzero()) for result in expected) < FEW_NUMBERS:
            magnitudes = on_cpu(native(case, tensors.abs(), operator, torch.float64))
        assert relative_error(results, expected, magnitudes) <= (TF32_BOUND if uses_tf32 else BOUNDS[dtype])
        assert all(result.dtype == dtype for result in results)

        # On a case of a few numbers either error is noise, so their ratios are averaged over all cases of the same
        # kernels (some of which multiply in IEEE float32 where TF32 is allowed); but not where PyTorch's answer is the
        # reference itself, or where cuDNN answers a TF32 call in IEEE float32.
        ours_off, theirs_off = relative_error(results, expected), relative_error(on_cpu(theirs), expected)
        answered_in_ieee = uses_tf32 and theirs_off < 10 * BOUNDS[torch.float32]
        if dtype != torch.float64 and not answered_in_ieee and ours_off > 0 and theirs_off > 0:
            name = " ".join(["tf32" if uses_tf32 else str(dtype), *kernels_of(plan)])
            ratios.setdefault(name, []).append(math.log(ours_off / theirs_off))

    check()
    # mma.sync's gather stands in for the pipelined one where that has no room; else no other family is chosen.
    stand_ins = {"tensor"} if "pipelined" in families else set()
    assert families <= kernels <= families | stand_ins
    for name, logarithms in ratios.items():
        if len(logarithms) < FEW_CASES:
            continue
        ratio = math.exp(statistics.fmean(logarithms))
        assert ratio <= 1.5, f"{name}: {ratio:.2f} times PyTorch's own error, over {len(logarithms)} cases"
