"""One line of the table: what we take, what the peer takes, and whether that is enough."""

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field

HEADINGS = ["bench", "ours", "peer", "compared", "at least", "aim", "verdict"]


@dataclass(frozen=True)
class Row:
    """`compared` is a ratio to the peer or, without one, our own value; `unit` stands behind it ("x", " ms").

    `enough` and `aim` are in the same unit. Empty `ours`: not available here, and `notes` says why.
    """

    bench: str
    ours: str = ""
    peer: str = ""
    compared: float | None = None
    unit: str = "x"
    enough: float | None = None
    aim: float | None = None
    more_is_better: bool = False
    failed: bool = False
    notes: list[str] = field(default_factory=list)

    @property
    def verdict(self) -> str:
        if self.failed:
            return "failed"
        if not self.ours:
            return "not available"
        if self.compared is None or self.enough is None or self.aim is None:
            return ""
        if self._meets(self.aim):
            return "aim"
        return "enough" if self._meets(self.enough) else "short"

    def _meets(self, bound: float) -> bool:
        return self.compared >= bound if self.more_is_better else self.compared <= bound

    def cells(self) -> list[str]:
        sign = "≥" if self.more_is_better else "≤"
        compared = "" if self.compared is None else f"{number(self.compared)}{self.unit}"
        bounds = ["" if bound is None else f"{sign} {bound:g}{self.unit}" for bound in (self.enough, self.aim)]
        return [self.bench, self.ours, self.peer, compared, *bounds, self.verdict]


def table(rows: Sequence[Row]) -> str:
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells() for row in rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def number(value: float) -> str:
    """About three digits."""
    digits = 0 if abs(value) >= 100 else 1 if abs(value) >= 10 else 2
    return f"{value:.{digits}f}"


def spread(values: Sequence[float], unit: str) -> str:
    """The median, and from where to where they go."""
    middle = f"{number(statistics.median(values))} {unit}"
    return middle if len(values) == 1 else f"{middle} ({number(min(values))} to {number(max(values))})"


def percentile(values: Sequence[float], percent: float) -> float:
    """The smallest value that at least `percent` of all do not exceed (nearest rank)."""
    return sorted(values)[max(0, math.ceil(len(values) * percent / 100) - 1)]
