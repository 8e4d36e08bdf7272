"""Figures that a benchmark must reach, and those that it misses."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable
from dataclasses import dataclass, field


@dataclass
class Targets:
    """Collects what is missed.

    Attributes:
        misses: a line for each.
    """

    misses: list[str] = field(default_factory=list)

    def require(self, label: str, value: float, least: float) -> None:
        """Note a miss unless `value` is at least `least`; a NaN is not."""
        if not value >= least:
            self.misses.append(f"{label}: {value:.3f}, needed {least}")

    def report(self) -> str:
        """The misses, or that there are none."""
        return "\n".join(["missed:", *self.misses]) if self.misses else "every target reached"


def geometric_mean(ratios: Iterable[float]) -> float:
    """Of positive numbers; NaN of none."""
    logarithms = [math.log(ratio) for ratio in ratios]
    return math.exp(statistics.fmean(logarithms)) if logarithms else math.nan
