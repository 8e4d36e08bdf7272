"""Every operator on hundreds of random convolutions, against PyTorch in float64."""

from __future__ import annotations

import math
import statistics

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cases import (
    BOUNDS,
    LAYOUTS,
    OPERATORS,
    TF32_BOUND,
    Case,
    cases,
    native,
    ours,
    poison,
    relative_error,
    tf32,
    workspace_limit,
)

#: Whole problems at once, pieces of samples, channels and planes, and the smallest pieces there are.
LIMITS = [1 << 30, 1 << 16, 1 << 12]


@pytest.mark.parametrize("operator", OPERATORS)
def test_random_convolutions(operator: str, device: torch.device) -> None:
    ratios: dict[str, list[float]] = {}

    @settings(max_examples=300, suppress_health_check=list(HealthCheck))
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
        expected = native(case, tensors, operator, torch.float64)
        poison(device)
        with tf32(allow_tf32), workspace_limit(limit):
            try:
                results = ours(case, tensors, operator)
            except RuntimeError as error:
                if "needs a workspace of at least" not in str(error):
                    raise
                with workspace_limit(1 << 30):
                    results = ours(case, tensors, operator)
            theirs = native(case, tensors, operator, dtype)
        bound = TF32_BOUND if uses_tf32 else BOUNDS[dtype]
        assert relative_error(results, expected) <= bound
        assert all(result.dtype == dtype for result in results)

        # On a case of a few numbers either error is noise, so their ratios are averaged over all cases; but not where
        # PyTorch's answer is the reference itself, or not finite (oneDNN's bfloat16 gradients at times), or where cuDNN
        # answers a TF32 call in IEEE float32.
        ours_off, theirs_off = relative_error(results, expected), relative_error(theirs, expected)
        answered_in_ieee = uses_tf32 and theirs_off < 10 * BOUNDS[torch.float32]
        if dtype != torch.float64 and not answered_in_ieee and ours_off > 0 and 0 < theirs_off < math.inf:
            ratios.setdefault("tf32" if uses_tf32 else str(dtype), []).append(math.log(ours_off / theirs_off))

    check()
    for name, logarithms in ratios.items():
        ratio = math.exp(statistics.fmean(logarithms))
        assert ratio <= 1.5, f"{name}: {ratio:.2f} times PyTorch's own error, over {len(logarithms)} cases"
