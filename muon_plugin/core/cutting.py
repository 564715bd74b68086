"""How a parameter stores matrices, and the matrices that a rule cuts it into."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from .layout import Matrix, Strided


@dataclass(frozen=True)
class Rule:
    """How the output dimension of a fused parameter is cut: `sizes`, repeated `groups` times.

    With `interleaved`, each part holds so many matrices whose columns take turns (stored out-in, one group).
    """

    sizes: tuple[int, ...]
    groups: int = 1
    interleaved: int = 1

    def fits(self, stored: Stored) -> bool:
        """Whether the sizes are positive and add up to the outputs."""
        whole = sum(self.sizes) * self.groups == stored.outputs and all(size > 0 for size in self.sizes)
        simple = self.interleaved == 1 or (self.groups == 1 and not stored.transposed)
        return whole and simple and stored.cols % self.interleaved == 0


@dataclass(frozen=True)
class Stored:
    """How a parameter holds matrices: `batch` of (rows, cols), (inputs, outputs) if `transposed`.

    Attributes:
        told: whether it is known which of the two dimensions the outputs are; otherwise nothing is cut along it.
    """

    batch: int
    rows: int
    cols: int
    transposed: bool = False
    told: bool = True

    @staticmethod
    def of(shape: Sequence[int], transposed: bool = False, told: bool = True) -> Stored:
        """A batch in the leading dimensions."""
        *batch, rows, cols = shape
        return Stored(math.prod(batch), rows, cols, transposed, told)

    @property
    def outputs(self) -> int:
        return self.cols if self.transposed else self.rows

    @property
    def inputs(self) -> int:
        return self.rows if self.transposed else self.cols

    def equal(self, parts: int) -> Rule:
        """The outputs in `parts` equal parts, one after the other."""
        return Rule((self.outputs // parts,) * parts)


def cut(name: str, stored: Stored, rule: Rule) -> list[Matrix]:
    """The matrices of one parameter: each part of the rule, for each entry of the batch."""
    found = []
    rows, cols, transposed = stored.rows, stored.cols, stored.transposed
    period = sum(rule.sizes)
    counts = (stored.batch, len(rule.sizes), rule.interleaved)
    for entry in range(stored.batch):
        begin = 0
        for number, size in enumerate(rule.sizes):
            outputs = size * rule.groups
            # Stored (in, out), a part is columns: `groups` runs in each of `rows` rows, all one period apart.
            unit, count = (1, rows * rule.groups) if transposed else (cols, rule.groups)
            run, stride, start = size * unit, period * unit, entry * rows * cols + begin * unit
            if run == stride:
                run, count = run * count, 1
            for turn in range(rule.interleaved):
                label = ",".join(str(i) for i, n in zip((entry, number, turn), counts) if n > 1)
                where = Strided(start, run, stride, count)
                shape = (rows, outputs) if transposed else (outputs, cols)
                if rule.interleaved > 1:  # every so many-th element of the part
                    where = Strided(start + turn, 1, rule.interleaved, outputs * cols // rule.interleaved)
                    shape = (outputs, cols // rule.interleaved)
                found.append(Matrix(f"{name}[{label}]" if label else name, name, *shape, where, transposed))
            begin += size
    return found
