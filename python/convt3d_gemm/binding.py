"""The compiled library `_C`, loaded after torch so that it binds to the cuBLAS that torch has loaded."""

import torch  # noqa: F401  (before _C, see above)

from convt3d_gemm import _C

__all__ = ["build_info", "has_backend", "missing_backend"]

_INFO = _C.build_info()
_BACKENDS = frozenset(_INFO["backends"])  # type: ignore[call-overload]


def build_info() -> dict[str, object]:
    """What the library was built with and what it found at run time.

    Returns:
        A dictionary with the keys `version`; `backends`, a list of "cpu" and "cuda"; `cblas`, the BLAS behind the CPU
        backend, or None; `openmp`; `cuda_version` of the toolkit, or None; `cuda_architectures`; `cuda_missing`, why
        there is no CUDA backend, or None; `cublas`, the cuBLAS bound at run time, or None.
    """
    return dict(_INFO)


def has_backend(device_type: str) -> bool:
    """Whether the library computes on tensors of this device type."""
    return device_type in _BACKENDS


def missing_backend(device_type: str) -> str:
    """Why tensors of this device type can't be computed on, and what to do about it."""
    if device_type == "cuda":
        return (
            f"this build of convt3d_gemm has no CUDA backend ({_INFO['cuda_missing']}); rebuild it with a CUDA toolkit "
            "on the PATH: CONVT3D_CUDA=ON pip install --force-reinstall --no-deps ."
        )
    if device_type == "cpu":
        return (
            "this build of convt3d_gemm has no CPU backend, because no CBLAS was found; rebuild it with "
            "scipy-openblas32 installed"
        )
    return f"convt3d_gemm computes on cpu and cuda tensors, but the input is on {device_type}"
