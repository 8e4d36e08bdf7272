from __future__ import annotations

import os

import pytest
import torch
from hypothesis import settings

from convt3d_gemm import build_info

settings.register_profile("fixed", derandomize=True, deadline=None, print_blob=True)
settings.register_profile("fresh", deadline=None, print_blob=True)
settings.load_profile("fixed" if os.environ.get("CI") else "fresh")

HAS_CPU = "cpu" in build_info()["backends"]  # type: ignore[operator]
HAS_CUDA = torch.cuda.is_available() and "cuda" in build_info()["backends"]  # type: ignore[operator]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("cuda") and not HAS_CUDA:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device and a build with the CUDA backend"))


@pytest.fixture(
    params=[
        pytest.param("cpu", marks=pytest.mark.skipif(not HAS_CPU, reason="this build has no CPU backend")),
        pytest.param("cuda", marks=pytest.mark.cuda),
    ],
    scope="session",
)
def device(request: pytest.FixtureRequest) -> torch.device:
    return torch.device(request.param)
