"""How a parameter stores matrices, and the matrices that a rule cuts it into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from .checks import is_whole
from .layout import Matrix, Strided

SPLIT_HELP = (
    'sizes along the output dimension ([512, 256, 256]), a number of equal parts (3), {"sizes": [...], "groups": n} '
    'for sizes that repeat n times (interleaved by head or query group), {"sizes": ..., "along": "inputs"} for parts '
    'of the input dimension (an output projection by head), or "whole"'
)


@dataclass(frozen=True)
class Rule:
    """How the output dimension of a fused parameter is cut: `sizes`, repeated `groups` times.

    With `interleaved`, each part holds so many matrices whose columns take turns (stored out-in, one group). With
    `inputs`, the input dimension is cut in the place of the outputs.
    """

    sizes: tuple[int, ...]
    groups: int = 1
    interleaved: int = 1
    inputs: bool = False

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
    if rule.inputs:
        other = replace(stored, transposed=not stored.transposed)
        of_inputs = cut(name, other, replace(rule, inputs=False))
        return [replace(matrix, transposed=stored.transposed) for matrix in of_inputs]
    rows, cols, transposed = stored.rows, stored.cols, stored.transposed
    if stored.batch == rule.interleaved == rule.groups == len(rule.sizes) == 1:  # most of tens of thousands
        whole = Strided(0, rows * cols, cols if transposed else rows * cols)
        return [Matrix(name, name, rows, cols, whole, transposed)]
    found = []
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


def asked_rule(stored: Stored, value: Any, where: str) -> Rule:
    """The rule that a user wrote.

    Args:
        stored: how the parameter is stored.
        value: see `SPLIT_HELP`.
        where: the setting, its value and the parameter, for errors.

    Raises:
        ValueError: for what is no rule, or does not fit.
    """

    def positive(number: Any) -> bool:
        return is_whole(number) and bool(number > 0)

    if value == "whole":
        return Rule((stored.outputs,))
    sizes, groups, along = value, 1, "outputs"
    if isinstance(value, Mapping):
        if set(value) - {"sizes", "groups", "along"} or "sizes" not in value:
            raise ValueError(f"{where}: the keys are {sorted(map(str, value))}; allowed: {SPLIT_HELP}")
        sizes, groups, along = value["sizes"], value.get("groups", 1), value.get("along", along)
    length = stored.inputs if along == "inputs" else stored.outputs
    if positive(sizes) and not (isinstance(value, Mapping) and along == "outputs"):
        if length % sizes:
            raise ValueError(f"{where}: {length} {along} cannot be cut in {sizes} equal parts; allowed: {SPLIT_HELP}")
        sizes = (length // sizes,) * sizes
    several = isinstance(sizes, (list, tuple)) and sizes and all(map(positive, sizes)) and positive(groups)
    if not several or along not in ("outputs", "inputs"):
        raise ValueError(f"{where} is not a split; allowed: {SPLIT_HELP}")
    if sum(sizes) * groups != length:
        raise ValueError(f"{where}: the sizes add up to {sum(sizes) * groups}, not to its {length} {along}")
    return Rule(tuple(sizes), groups, inputs=along == "inputs")
