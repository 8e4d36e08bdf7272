"""The bias gradient of the C++ library, for which the package itself takes PyTorch's sum."""

from __future__ import annotations

import pytest
import torch

from cases import BOUNDS, LAYOUTS
from convt3d_gemm import _C

_DTYPES = {dtype: getattr(_C.DataType, str(dtype).removeprefix("torch.")) for dtype in BOUNDS}


@pytest.mark.parametrize("batch", [3, 0])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_grad_bias(device: torch.device, dtype: torch.dtype, layout: torch.memory_format, batch: int) -> None:
    """The sum over samples and voxels; zero of an empty batch."""
    problem = _C.Problem(
        batch=batch,
        in_channels=4,
        out_channels=40,
        groups=1,
        input=(5, 6, 7),
        kernel=(3, 3, 3),
        stride=(2, 2, 2),
        padding=(1, 1, 1),
        output_padding=(0, 0, 0),
        dilation=(1, 1, 1),
        layout=_C.Layout.ndhwc if layout == torch.channels_last_3d else _C.Layout.ncdhw,
        dtype=_DTYPES[dtype],
        precision=_C.Precision.ieee,
    )
    on_cuda = device.type == "cuda"
    target = _C.Target.cuda(0) if on_cuda else _C.Target.cpu(1)
    plan = _C.Plan(problem, _C.Operator.grad_bias, target, 1 << 30)
    grad_output = torch.randn(batch, 40, *problem.output, device=device, dtype=dtype).contiguous(memory_format=layout)
    workspace = torch.empty(plan.workspace_bytes, dtype=torch.uint8, device=device)
    result = torch.full((40,), torch.nan, device=device, dtype=dtype)
    stream = torch.cuda.current_stream().cuda_stream if on_cuda else 0
    plan.grad_bias(grad_output.data_ptr(), result.data_ptr(), workspace.data_ptr(), 0, stream, 1)
    expected = grad_output.double().sum((0, 2, 3, 4))
    assert float((result.double() - expected).norm()) <= BOUNDS[dtype] * float(expected.norm())
