"""What `tune` has measured: one JSON file for each device, in the cache folder of the platform.

The file says which versions it was measured with; one of other versions, or one that can't be read, is left alone with
a warning, and replaced by the next tuning. It is written whole or not at all, and several processes may write at once.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import tempfile
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from convt3d_gemm.binding import build_info
from convt3d_gemm.problem import Problem

__all__ = ["Measurements", "cache_folder", "key_of"]

_FORMAT = 1

#: Milliseconds of each algorithm.
Times = Mapping[str, float]


def cache_folder() -> Path:
    """Where the files are: CONVT3D_CACHE_DIR, else convt3d-gemm in XDG_CACHE_HOME, else in ~/.cache."""
    own = os.environ.get("CONVT3D_CACHE_DIR")
    if own:
        return Path(own)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "convt3d-gemm"


def key_of(problem: Problem) -> str:
    """What a problem is called in the file: all that its time depends on but the device."""
    threads = f", {problem.threads} threads" if problem.device.type == "cpu" else ""
    return f"{problem.operator} {problem.layer}, {problem.precision}, {problem.layout}{threads}"


def _versions() -> dict[str, object]:
    """Measurements hold for these alone."""
    return {
        "convt3d_gemm": build_info()["version"],
        "torch": torch.__version__,
        "cudnn": torch.backends.cudnn.version(),
    }


class Measurements:
    """The measured times on one device; read from its file once, when they are first asked for.

    Attributes:
        path: of the file.
    """

    def __init__(self, device_name: str) -> None:
        self._device_name = device_name
        self.path = cache_folder() / f"{re.sub(r'[^A-Za-z0-9.]+', '-', device_name).strip('-')}.json"
        self._times: dict[str, dict[str, float]] | None = None

    def find(self, problem: Problem) -> Times:
        """Milliseconds of each algorithm on a problem, or nothing if it was not measured."""
        if self._times is None:
            self._times = self._read()
        return self._times.get(key_of(problem), {})

    def add(self, times: Mapping[Problem, Times]) -> bool:
        """Remember measured times, and add them to the file, beside those that other processes have added.

        Returns:
            Whether they are in the file. If it can't be written there is a warning, and this process alone knows them.
        """
        new = {key_of(problem): dict(measured) for problem, measured in times.items()}
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self._locked():
                self._times = {**self._read(), **new}
                self._write(self._times)
        except OSError as error:
            self._times = {**(self._times or {}), **new}
            warnings.warn(f"measurements are not kept: {error}", stacklevel=3)
            return False
        return True

    def _read(self) -> dict[str, dict[str, float]]:
        try:
            text = self.path.read_text("utf-8")
        except (FileNotFoundError, NotADirectoryError):
            return {}
        except (OSError, UnicodeDecodeError) as error:
            return self._refused(f"it can't be read ({error})")
        try:
            content = json.loads(text)
            found = {"format": content["format"], "device": content["device"], "versions": content["versions"]}
            expected = {"format": _FORMAT, "device": self._device_name, "versions": _versions()}
            if found != expected:
                different = ", ".join(f"{key} {found[key]}" for key in found if found[key] != expected[key])
                return self._refused(f"it is of another {different}")
            return _checked(content["measurements"])
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            return self._refused(f"it is not what this package writes ({type(error).__name__}: {error})")

    def _refused(self, why: str) -> dict[str, dict[str, float]]:
        warnings.warn(f"{self.path} is ignored: {why}; the next tuning replaces it", stacklevel=4)
        return {}

    @contextlib.contextmanager
    def _locked(self) -> Iterator[None]:
        """Alone among all processes that add to this file. The lock is a file beside it, since that one is replaced."""
        with open(self.path.with_suffix(".lock"), "a") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _write(self, times: Mapping[str, Times]) -> None:
        content = {
            "format": _FORMAT,
            "device": self._device_name,
            "versions": _versions(),
            "measurements": dict(sorted(times.items())),
        }
        descriptor, temporary = tempfile.mkstemp(dir=self.path.parent, prefix=self.path.name, suffix=".tmp")
        try:
            with os.fdopen(descriptor, "w", encoding="utf-8") as file:
                json.dump(content, file, indent=1)
                file.flush()
                os.fsync(file.fileno())  # else a crash may leave the new name with no content
            os.replace(temporary, self.path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(temporary)
            raise


def _checked(measurements: Any) -> dict[str, dict[str, float]]:
    """The measurements as they were read; ValueError unless they are positive numbers by algorithm by problem."""
    for key, times in measurements.items():
        for name, time in times.items():
            if type(time) not in (int, float) or not 0 < time < float("inf"):
                raise ValueError(f"{key}: {name} takes {time!r}")
    return dict(measurements)
