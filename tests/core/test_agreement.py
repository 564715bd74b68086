"""Ranks that differ are all told where, without sending all that they compare."""

from __future__ import annotations

import pickle
from typing import Any

import pytest
import torch
import torch.distributed as dist

from muon_plugin.core.agreement import agree, gather_rows
from muon_plugin.core.process_groups import runs_of

pytestmark = pytest.mark.fast


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({}, None),
        ({2: {617: "another"}}, "rank 0 has line 617, rank 2 has another"),
        ({1: {999: "last"}, 2: {998: "before"}}, "rank 0 has line 998, rank 2 has before"),
        ({0: {0: "first"}}, "rank 0 has first, rank 1 has line 0"),
        ({1: {1000: "more"}}, "rank 0 has 1000 entries, rank 1 has 1001 entries"),
    ],
)
def test_the_first_line_that_differs(ranks, changes, told):
    for error, most in ranks(3).run(compared, changes):
        assert error is None if told is None else f"the ranks disagree about it: {told}. Do this" in error
        assert most < 200, "a line of a thousand"


def compared(rank: int, changes: dict[int, dict[int, str]]) -> tuple[str | None, int]:
    """The error, and the most bytes that this rank gave to a collective."""
    lines = {**{i: f"line {i}" for i in range(1000)}, **changes.get(rank, {})}
    given, gather = [0], dist.all_gather_object

    def counted(into: list[Any], value: Any, group: Any = None) -> None:
        given.append(len(pickle.dumps(value)))
        gather(into, value, group=group)

    dist.all_gather_object = counted
    try:
        agree("it", [lines[i] for i in sorted(lines)], "Do this")
    except ValueError as error:
        return str(error), max(given)
    finally:
        dist.all_gather_object = gather
    return None, max(given)


def test_ranks_of_a_group_in_few_numbers():
    assert runs_of(range(8, 520)) == ((8, 520),)
    assert runs_of([0, 1, 4, 5, 9]) == ((0, 2), (4, 6), (9, 10))
    assert runs_of([]) == ()


def test_rows_of_every_rank(ranks):
    for found in ranks(3).run(gathered):
        assert found == [[[], [[1, 0], [1, 1]], [[2, 0], [2, 1], [2, 2], [2, 3]]], [[], [], []]]


def gathered(rank: int) -> list[list[list[list[int]]]]:
    mine = torch.tensor([[rank, i] for i in range(2 * rank)], dtype=torch.int64).view(-1, 2)
    return [[rows.tolist() for rows in gather_rows(of, None)] for of in (mine, mine[:0])]
