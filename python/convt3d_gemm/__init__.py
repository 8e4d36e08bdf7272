"""Transposed 3-D convolution for PyTorch by GEMM and col2vol or by direct kernels, on CPU and CUDA.

`conv_transpose3d` and `ConvTranspose3d` take what their counterparts in `torch.nn` take, and one keyword more:
`algorithm`. `replace_conv_transpose3d` swaps every transposed 3-D convolution inside a model. `explain` says what
`algorithm="auto"` picks and why; `tune` makes it pick by measurements of a model's own layers.
"""

from convt3d_gemm.binding import build_info
from convt3d_gemm.conversion import replace_conv_transpose3d
from convt3d_gemm.explanation import Explanation, OperatorExplanation, explain
from convt3d_gemm.functional import conv_transpose3d
from convt3d_gemm.modules import ConvTranspose3d
from convt3d_gemm.selection import algorithms, workspace_bytes
from convt3d_gemm.settings import get_workspace_limit, set_workspace_limit
from convt3d_gemm.tuning import Tuning, tune

__all__ = [
    "ConvTranspose3d",
    "Explanation",
    "OperatorExplanation",
    "Tuning",
    "__version__",
    "algorithms",
    "build_info",
    "conv_transpose3d",
    "explain",
    "get_workspace_limit",
    "replace_conv_transpose3d",
    "set_workspace_limit",
    "tune",
    "workspace_bytes",
]

__version__: str = str(build_info()["version"])
