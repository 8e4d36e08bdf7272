"""Whether a result is right: its error against float64, and how large that may be."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from convt3d_gemm.bench import reference
from convt3d_gemm.bench.inputs import Tensors
from convt3d_gemm.bench.layers import Layer, Operator

_ERROR_BOUNDS = {torch.float64: 1e-12, torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}
_TF32_BOUND = 1e-3

# Above either, float64 results of all samples would cost more than the measurement, and only a part is compared.
_CHECKED_FLOPS = 20e9
_CHECKED_BYTES = 512 << 20


def error_bound(dtype: torch.dtype, precision: str) -> float:
    """The relative L2 error against float64 above which a result is wrong."""
    return _TF32_BOUND if precision == "tf32" else _ERROR_BOUNDS[dtype]


@dataclass(frozen=True)
class Expected:
    """The float64 results, or for a large layer a part of them.

    The part is the first and the last sample; of grad_weight, which sums over all samples, it is everything.

    Attributes:
        samples: those that are in ``by_sample``.
        by_sample: of the output or of grad_input, the chosen samples; None if the operator gives neither.
        grad_weight: (Cin, Cout/groups, kd, kh, kw), or None if the operator does not give it.
        checked: in words, what part of the result is compared.
    """

    samples: tuple[int, ...]
    by_sample: Tensor | None
    grad_weight: Tensor | None
    checked: str

    @classmethod
    def of(cls, layer: Layer, operator: Operator, tensors: Tensors) -> Expected:
        """Compute them on the device of the tensors."""
        largest = max(math.prod(layer.output_shape), math.prod(layer.input_shape))
        samples: tuple[int, ...] = tuple(range(layer.batch))
        checked = "everything"
        if layer.flops(operator) > _CHECKED_FLOPS or 8 * largest > _CHECKED_BYTES:
            samples = tuple(sorted({0, layer.batch - 1}))
            checked = f"samples {', '.join(map(str, samples))}"
        if operator == "forward":
            return cls(samples, reference.forward(layer, tensors, samples), None, checked)
        if operator == "grad_weight":
            return cls((), None, reference.grad_weight(layer, tensors), "everything")
        by_sample = reference.grad_input(layer, tensors, samples)
        if operator == "grad_input":
            return cls(samples, by_sample, None, checked)
        if checked != "everything":
            checked += " of grad_input; all of grad_weight"
        return cls(samples, by_sample, reference.grad_weight(layer, tensors), checked)

    def error(self, results: tuple[Tensor, ...]) -> float:
        """The relative L2 error, for a pair of gradients the larger; not finite if a result is not."""
        errors = []
        if self.by_sample is not None:
            errors.append(relative_error(results[0][list(self.samples)], self.by_sample))
        if self.grad_weight is not None:
            errors.append(relative_error(results[-1], self.grad_weight))
        return math.nan if any(map(math.isnan, errors)) else max(errors)


def relative_error(result: Tensor, expected: Tensor) -> float:
    """The L2 norm of the difference over that of ``expected``, both of one shape; the former alone if that is 0."""
    difference = float(torch.linalg.vector_norm(result.to(torch.float64) - expected))
    norm = float(torch.linalg.vector_norm(expected))
    return difference / norm if norm else difference
