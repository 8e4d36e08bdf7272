"""Small cases of every kernel, for compute-sanitizer, in several processes side by side. It is no test of its own.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py --part 1/4

racecheck reports cuBLAS's own kernels unless it is told `--kernel-name kns=convt3d`; initcheck seems not to see what
their bulk stores write. Without PyTorch's caching allocator every tensor has an allocation of its own.
"""

from __future__ import annotations

import argparse
import functools
import itertools
from collections.abc import Callable

import torch

from cases import (
    ALGORITHMS,
    ANY_DEPTHWISE,
    BANDS,
    BOUNDS,
    BOXED,
    COPIED,
    FILLED_RUNS,
    GRAD_INPUT_BANDS,
    LAYOUTS,
    MANY_RUNS,
    MANY_TILES,
    NAMED,
    OPERATORS,
    PATTERNS,
    Case,
    dtype_of,
    ours,
    plan_of,
    tf32,
    workspace_limit,
)
from test_grad_bias import test_grad_bias

#: Beside the named cases: what enough work brings out, that is spans of channels, pairs and vectors of outputs.
LARGER = [
    Case(2, 8, 32, 1, (8, 16 if s > 1 else 32, 33), (k, k, k), (s, s, s), (0, 0, 0), (0, 0, 0), (d, d, d))
    for k, s, d in ((1, 2, 1), (2, 1, 1), (3, 1, 1), (3, 2, 1), (3, 2, 2), (5, 2, 2), (7, 2, 1))
] + [Case(2, 8, 32, 1, (8, 16, 32), (2, 2, 2), (2, 2, 2), (0, 0, 0))]

PRECISIONS = [(dtype, False) for dtype in BOUNDS] + [(torch.float32, True)]

#: Of the combinations of a case with operators, layouts and precisions, which are 40, every so many are computed: their
#: numbers have no factor in common, so neighbouring cases, which use the same kernels, go through all of them.
STEP = 7


def compute(
    device: torch.device,
    algorithm: str,
    case: Case,
    operator: str,
    layout: torch.memory_format,
    dtype: torch.dtype,
    allow_tf32: bool,
    limit: int,
) -> None:
    tensors = case.tensors(device, dtype, layout, seed=0)
    with tf32(allow_tf32), workspace_limit(limit):
        if plan_of(case, tensors, operator, algorithm).fits:
            ours(case, tensors, operator, algorithm)


def calls(device: torch.device, algorithms: list[str]) -> list[Callable[[], None]]:
    bias_gradients: list[Callable[[], None]] = [
        functools.partial(test_grad_bias, device, dtype, layout, batch=3) for dtype in BOUNDS for layout in LAYOUTS
    ]
    cases = [*NAMED.values(), *LARGER]
    chosen = list(itertools.product(cases, OPERATORS, LAYOUTS, PRECISIONS))[::STEP]
    limits = itertools.cycle((1 << 30, 1 << 18))
    operators = [
        functools.partial(compute, device, algorithm, case, operator, layout, *precision, limit)
        for algorithm in algorithms
        for (case, operator, layout, precision), limit in zip(chosen, limits, strict=False)
    ]
    handed_over = [(operator, case, "float16") for operator, case in MANY_TILES.values()]
    handed_over += [(operator, case, precisions[0]) for operator, case, precisions in MANY_RUNS.values()]
    forward = [("forward", case, precision) for case in COPIED.values() for precision in ("float16", "tf32")]
    forward += [("forward", case, precision) for case in FILLED_RUNS.values() for precision in ("bfloat16", "tf32")]
    forward += [("forward", case, "tf32") for case in BOXED.values()]
    forward += [("forward", case, "bfloat16") for case in BANDS.values()]
    patterns = [(operator, case, "tf32") for operator, case in PATTERNS.values()]
    backward = [("grad_input", case, "bfloat16") for case in GRAD_INPUT_BANDS.values()]
    depthwise = [
        (operator, case, precision)
        for case in ANY_DEPTHWISE.values()
        for operator, precision in (("forward", "float32"), ("grad_input", "float16"), ("grad_weight", "bfloat16"))
    ]
    special = [
        functools.partial(
            compute, device, "direct", case, operator, torch.contiguous_format, dtype_of(precision), True, 1 << 30
        )
        for operator, case, precision in (*handed_over, *forward, *patterns, *backward, *depthwise)
        if "direct" in algorithms
    ]
    return [*bias_gradients, *operators, *special]


def share(text: str) -> tuple[int, int]:
    """(I, N) for "I/N"."""
    number, _, count = text.partition("/")
    if not 1 <= int(number) <= int(count):
        raise argparse.ArgumentTypeError(f"must be I/N with I from 1 to N, got {text}")
    return int(number), int(count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", type=torch.device, default="cuda")
    parser.add_argument("--algorithm", choices=ALGORITHMS, action="append", help="(default: all)")
    parser.add_argument("--part", type=share, default=(1, 1), metavar="I/N", help="the I-th of N shares of the cases")
    arguments = parser.parse_args()
    number, count = arguments.part
    mine = calls(arguments.device, arguments.algorithm or ALGORITHMS)[number - 1 :: count]
    for call in mine:
        call()
    print(f"done: {len(mine)} calls")


if __name__ == "__main__":
    main()
