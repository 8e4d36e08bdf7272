"""The workspace limit: how many bytes of columns and partial sums one call may hold at once."""

import os

__all__ = ["get_workspace_limit", "set_workspace_limit"]

_DEFAULT_MB = 1024


def _limit_from_environment() -> int:
    text = os.environ.get("CONVT3D_WORKSPACE_MB", str(_DEFAULT_MB))
    try:
        megabytes = float(text)
    except ValueError:
        megabytes = 0.0
    if not 0.0 < megabytes < 2.0**40:
        raise ValueError(f"CONVT3D_WORKSPACE_MB must be a positive number of mebibytes, got {text!r}")
    return max(int(megabytes * 2**20), 1)


_limit = _limit_from_environment()


def set_workspace_limit(limit: int) -> None:
    """Set how many bytes of columns and partial sums one call may hold; larger layers are computed in pieces.

    Args:
        limit: bytes, at least 1. The default is 1 GiB, or the environment variable CONVT3D_WORKSPACE_MB in mebibytes.
            cuBLAS's own workspace (32 MiB) and the direct kernels' re-packed weights come on top.

    Raises:
        TypeError: `limit` is not an integer.
        ValueError: `limit` is below 1.
    """
    global _limit
    if not isinstance(limit, int) or isinstance(limit, bool):
        raise TypeError(f"limit must be an int (bytes), got {type(limit).__name__}")
    if not 1 <= limit < 2**62:
        raise ValueError(f"limit must be at least 1 byte and below 2^62, got {limit}")
    _limit = limit


def get_workspace_limit() -> int:
    """Return the workspace limit in bytes."""
    return _limit
