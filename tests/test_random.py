"""Every operator on hundreds of random convolutions, against PyTorch in float64."""

from __future__ import annotations

import math

import pytest
import torch
from cases import BOUNDS, TF32_BOUND, Case, cases, native, ours, poison, relative_error, squared_error, tf32, workspace_limit
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

OPERATORS = ["forward", "grad_input", "grad_weight", "grad_input_weight"]
LAYOUTS = [torch.contiguous_format, torch.channels_last_3d]

#: Whole problems at once, pieces of samples, channels and planes, and the smallest pieces there are.
LIMITS = [1 << 30, 1 << 16, 1 << 12]


@pytest.mark.parametrize("operator", OPERATORS)
def test_random_convolutions(operator: str, device: torch.device) -> None:
    pooled: dict[str, list[float]] = {}

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

        # PyTorch's own error is noise on a case of a few numbers, so the two are compared over all cases together;
        # but not where it is the reference itself, or where cuDNN answers a TF32 call of several groups in IEEE float32.
        sums = pooled.setdefault("tf32" if uses_tf32 else str(dtype), [0.0, 0.0])
        for result, their_result, reference in zip(results, theirs, expected, strict=True):
            _, norm = squared_error(reference, reference)
            finite = bool(their_result.isfinite().all())  # oneDNN's bfloat16 gradients at times are not
            if norm > 0 and finite and dtype != torch.float64 and not (uses_tf32 and case.groups > 1):
                sums[0] += squared_error(result, reference)[0] / norm
                sums[1] += squared_error(their_result, reference)[0] / norm

    check()
    for name, (our_error, their_error) in pooled.items():
        assert math.sqrt(our_error) <= 1.5 * math.sqrt(their_error), f"{name}: {our_error} against {their_error}"
