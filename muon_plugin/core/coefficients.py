"""Coefficients of the Newton-Schulz iteration: the named sets, their sources, and how each continues."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class CoefficientSet:
    """Coefficients of the iteration, one (a, b, c) for each step.

    Attributes:
        source: where the numbers come from.
        triples: the first steps.
        after: how the set continues after `triples`: "cycle" starts over, "last" repeats the last triple.
    """

    source: str
    triples: tuple[Triple, ...]
    after: Literal["cycle", "last"] = "last"

    def expanded(self, steps: int) -> tuple[Triple, ...]:
        """One triple for each of `steps` steps."""
        n = len(self.triples)
        return tuple(self.triples[k % n if self.after == "cycle" else min(k, n - 1)] for k in range(steps))


#: The named sets. Triples and continuation are those of emerging-optimizers 0.3.0, so that a name means the same
#: iteration here and there.
COEFFICIENT_SETS: dict[str, CoefficientSet] = {
    "simple": CoefficientSet(
        "Keller Jordan; the paper's Eq. 2, torch.optim.Muon", ((3.4445, -4.7750, 2.0315),), "cycle"
    ),
    "quintic": CoefficientSet(
        "tuned for less spread around 1 after five steps: https://leloykun.github.io/ponder/muon-opt-coeffs/",
        (
            (4.0848, -6.8946, 2.9270),
            (3.9505, -6.3029, 2.6377),
            (3.7418, -5.5913, 2.3037),
            (2.8769, -3.1427, 1.2046),
            (2.8366, -3.0525, 1.2012),
        ),
        "cycle",
    ),
    "polar_express": CoefficientSet(
        "Polar Express (arXiv 2505.16932), divided by the powers of its safety factor of 1.01",
        (
            (8.2051, -22.9019, 16.4607),
            (4.0664, -2.8612, 0.5184),
            (3.9096, -2.8234, 0.5250),
            (3.2856, -2.4153, 0.4853),
            (2.2779, -1.6198, 0.3985),
            (1.8726, -1.2307, 0.3585),
            (1.8564, -1.2132, 0.3568),
            (1.8750, -1.2500, 0.3750),
        ),
    ),
    "cans": CoefficientSet(
        "Chebyshev-type polynomials by Remez' algorithm (arXiv 2506.10935)",
        (
            (8.4703, -25.1081, 18.6293),
            (4.1828, -3.1087, 0.5806),
            (3.9619, -2.9541, 0.5630),
            (3.2866, -2.4647, 0.5074),
            (2.2737, -1.6447, 0.4162),
        ),
    ),
    "aol": CoefficientSet(
        "https://github.com/thib-s/flash-newton-schulz",
        (
            (4.0098, -7.0585, 2.4635),
            (3.4585, -5.5479, 2.5959),
            (2.7573, -3.2939, 1.4254),
            (2.7215, -3.0494, 1.3169),
        ),
        "cycle",
    ),
    # Eight steps of "simple", then Newton-Schulz proper.
    "deepseekv4": CoefficientSet("DeepSeek-V4", ((3.4445, -4.7750, 2.0315),) * 8 + ((2.0, -1.5, 0.5),) * 2),
}


def notes(triples: Sequence[Triple]) -> tuple[str, ...]:
    """For the start-up table: on an iteration that leaves singular values far from 1.

    "aol" beyond its 4 triples and "quintic" beyond its 5 do, since they start over; "aol" also turns values above 0.88
    negative, since its source scales the matrix otherwise.
    """
    values = [x / 1000 for x in range(100, 1001)]
    for a, b, c in triples:
        values = [a * x + b * x**3 + c * x**5 for x in values]
    low, high = min(values), max(values)
    if low > 0.5 and high < 1.5:
        return ()
    reversed_ = "; where they are negative, the update is reversed" if low < 0 else ""
    return (
        f"these {len(triples)} Newton-Schulz steps take singular values of 0.1 to 1 (relative to the Frobenius "
        f"norm) to {low:.2f} to {high:.2f}, not to about 1{reversed_}",
    )


def coefficients_for(steps: int, which: str | Triple | tuple[Triple, ...]) -> tuple[Triple, ...]:
    """One triple for each step.

    Args:
        steps: number of steps.
        which: the name of one of `COEFFICIENT_SETS`, one triple, or a sequence of triples, whose last one repeats.

    Raises:
        ValueError: for an unknown name, or anything that is not made of triples of finite numbers.
    """
    allowed = f"[a, b, c], a list of such triples, or one of {sorted(COEFFICIENT_SETS)}"
    if isinstance(which, str):
        if which not in COEFFICIENT_SETS:
            raise ValueError(f"ns_coefficients={which!r} is not a known set; allowed: {allowed}")
        return COEFFICIENT_SETS[which].expanded(steps)
    try:
        rows = [which] if isinstance(which[0], (int, float)) else list(which)
        triples = tuple((float(a), float(b), float(c)) for a, b, c in rows)
    except (TypeError, ValueError, IndexError, KeyError):
        raise ValueError(f"ns_coefficients={which!r} is not made of triples; allowed: {allowed}") from None
    if not all(math.isfinite(value) for triple in triples for value in triple):
        raise ValueError(f"ns_coefficients={which!r} holds a number that is not finite; allowed: {allowed}")
    if len(triples) > steps:
        raise ValueError(
            f"ns_coefficients has {len(triples)} triples for ns_steps={steps}; allowed: at most one a step"
        )
    return CoefficientSet("the settings", triples).expanded(steps)
