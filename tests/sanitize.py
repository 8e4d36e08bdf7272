"""Small cases of every kernel, to run under compute-sanitizer. It is no test of its own.

    PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --tool memcheck python tests/sanitize.py

racecheck reports cuBLAS's own kernels unless it is told `--kernel-name kns=convt3d`; initcheck seems not to see what
their bulk stores write. Without PyTorch's caching allocator every tensor has an allocation of its own.
"""

from __future__ import annotations

import sys

import torch

from cases import BOUNDS, LAYOUTS, NAMED, OPERATORS, Case, ours, workspace_limit
from test_grad_bias import test_grad_bias

#: Beside the named cases: what enough work brings out, that is spans of channels, pairs and vectors of outputs.
LARGER = [
    Case(2, 8, 32, 1, (16, 32, 33), (k, k, k), (s, s, s), (0, 0, 0), (0, 0, 0), (d, d, d))
    for k, s, d in ((1, 2, 1), (2, 1, 1), (3, 1, 1), (3, 2, 1), (3, 2, 2), (5, 2, 2), (7, 2, 1))
] + [Case(2, 8, 32, 1, (16, 32, 32), (2, 2, 2), (2, 2, 2), (0, 0, 0))]


def main() -> None:
    device = torch.device(sys.argv[1] if len(sys.argv) > 1 else "cuda")
    for dtype in BOUNDS:
        for layout in LAYOUTS:
            test_grad_bias(device, dtype, layout, batch=3)
            for case in (*NAMED.values(), *LARGER):
                tensors = case.tensors(device, dtype, layout, seed=0)
                for limit in (1 << 30, 1 << 18):
                    with workspace_limit(limit):
                        for operator in OPERATORS:
                            try:
                                ours(case, tensors, operator)
                            except RuntimeError as error:
                                if "needs a workspace of at least" not in str(error):
                                    raise
    print("done")


if __name__ == "__main__":
    main()
