from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from hypothesis import settings

from convt3d_gemm import build_info, decision

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


@pytest.fixture(scope="session", autouse=True)
def _no_measurements(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What somebody has measured on this machine must not decide what is tested."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CONVT3D_CACHE_DIR", str(tmp_path_factory.mktemp("no measurements")))
        yield


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """An empty folder for measurements, with no decision made before or left behind."""
    monkeypatch.setenv("CONVT3D_CACHE_DIR", str(tmp_path))
    decision.forget_decisions()
    yield tmp_path
    decision.forget_decisions()
