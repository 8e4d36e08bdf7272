"""What PyTorch 2.2 and later releases spell differently, under one name each."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext

import torch

__all__ = [
    "OutOfMemoryError",
    "allows_tf32",
    "autocast_dtype",
    "cuda_stream",
    "forward_gradients_enabled",
    "is_compiling",
    "is_plain",
    "is_plain_eager",
    "single_level_autograd",
]

OutOfMemoryError: type[RuntimeError] = getattr(torch, "OutOfMemoryError", torch.cuda.OutOfMemoryError)


if hasattr(torch._C, "_get_fp32_precision_getter"):  # PyTorch 2.9 and later: torch.backends.cudnn.conv.fp32_precision

    def allows_tf32() -> bool:
        """Whether PyTorch's own convolution would use TF32 for float32 on CUDA just now."""
        return bool(torch._C._get_fp32_precision_getter("cuda", "conv") == "tf32")
else:

    def allows_tf32() -> bool:
        """Whether PyTorch's own convolution would use TF32 for float32 on CUDA just now."""
        return bool(torch.backends.cudnn.allow_tf32)


if hasattr(torch, "get_autocast_dtype"):  # PyTorch 2.4 and later

    def autocast_dtype(device_type: str) -> torch.dtype | None:
        """The dtype that autocast wants convolutions in on this device type, or None outside autocast."""
        if device_type == "meta":  # autocast raises at its name
            return None
        return torch.get_autocast_dtype(device_type) if torch.is_autocast_enabled(device_type) else None
else:

    def autocast_dtype(device_type: str) -> torch.dtype | None:
        """The dtype that autocast wants convolutions in on this device type, or None outside autocast."""
        if device_type == "cuda":
            return torch.get_autocast_gpu_dtype() if torch.is_autocast_enabled() else None
        return torch.get_autocast_cpu_dtype() if torch.is_autocast_cpu_enabled() else None


if hasattr(torch._C, "_cuda_getCurrentRawStream"):
    cuda_stream = torch._C._cuda_getCurrentRawStream
else:

    def cuda_stream(device: int) -> int:
        """The address of the device's current stream."""
        return int(torch.cuda.current_stream(device).cuda_stream)


# PyTorch's own function, because torch.compile knows it by identity; torch.compiler has it from 2.3 on.
is_compiling = torch.compiler.is_compiling if hasattr(torch.compiler, "is_compiling") else torch._utils.is_compiling


def forward_gradients_enabled() -> AbstractContextManager[object]:
    """In which forward-mode differentiation is on, if a level of it is open."""
    return torch.autograd.forward_ad._set_fwd_grad_enabled(True)


try:
    from torch._functorch.utils import enable_single_level_autograd_function as single_level_autograd
except ImportError:
    single_level_autograd = nullcontext  # type: ignore[assignment]


_PLAIN_TYPES = frozenset({torch.Tensor, torch.nn.Parameter})
_is_batched = getattr(torch._C._functorch, "is_legacy_batchedtensor", lambda tensor: False)


def is_plain(operand: object) -> bool:
    """Whether it is no tensor at all, or one whose data are where and what it says, which no dispatcher has to see to.

    That is no tensor subclass, none without data, none that is one of a batch (`is_grads_batched`), and none that
    stands for its negative.
    """
    if type(operand) in _PLAIN_TYPES:
        return not (operand.is_meta or operand.is_neg() or _is_batched(operand))  # type: ignore[attr-defined]
    return not isinstance(operand, torch.Tensor)


def is_plain_eager() -> bool:
    """Whether nothing watches operators being called: no tracing, dispatch mode, functional transform or profiler.

    Where a release lacks one of the questions, the answer is no, and the call takes the longer way.
    """
    try:
        return (
            torch._C._len_torch_dispatch_stack() == 0
            and torch._C._functorch.peek_interpreter_stack() is None
            and torch._C._get_tracing_state() is None
            and torch.autograd.forward_ad._current_level < 0
            and torch._C._len_torch_function_stack() == 0
            and not torch._C._autograd._profiler_enabled()
        )
    except AttributeError:
        return False
