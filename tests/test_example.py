"""The MRI example: the layer's algorithm does not change what is learned. (.ci/run runs the whole example, too.)"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

for needed in ("matplotlib", "nibabel", "tqdm"):
    pytest.importorskip(needed, reason="needs the extra [examples]")

EXAMPLE = Path(__file__).parents[1] / "examples" / "mri_superresolution.py"


def losses(layer: str, folder: Path) -> list[float]:
    written = folder / f"{layer}.json"
    options = ["--layer", layer, "--steps", "20", "--losses", str(written), "--output", str(folder / "slices.png")]
    # So few steps don't win, and the exit status says so; the losses are written all the same.
    subprocess.run([sys.executable, str(EXAMPLE), *options], check=False, capture_output=True, timeout=170)
    values: list[float] = json.loads(written.read_text())
    return values


def test_losses_do_not_depend_on_the_algorithm(tmp_path: Path) -> None:
    gemm, direct, native = (losses(algorithm, tmp_path) for algorithm in ("gemm", "direct", "native"))
    assert len(gemm) == 20
    assert gemm[-1] < 0.9 * gemm[0]
    assert gemm == pytest.approx(native, rel=1e-5)
    assert direct == pytest.approx(native, rel=1e-5)
    assert (tmp_path / "slices.png").stat().st_size > 10_000
