"""Ranks that differ are all told where, without sending all that they compare."""

from __future__ import annotations

import contextlib
import pickle
from typing import Any
from unittest import mock

import pytest
import torch
import torch.distributed as dist

from muon_plugin.core.agreement import agree, alike, gather_rows, together
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


@pytest.mark.parametrize(
    ("facts", "told"),
    [
        (["one", "one", "one"], None),
        (["one", None, "one"], None),
        ([None, None, None], None),
        ([None, "one", None], None),
        (["one", "two", "one"], "one on ranks 0, 2 / two on rank 1"),
        ([None, "one", "two"], "one on rank 1 / two on rank 2"),
    ],
)
def test_a_fact_that_some_ranks_have(ranks, facts, told):
    for error in ranks(3).run(asked, facts):
        assert error is None if told is None else error == f"the ranks disagree about it: {told}. Do this"


def asked(rank: int, facts: list[str | None]) -> str | None:
    try:
        alike("it", facts[rank], "Do this")
    except ValueError as error:
        return str(error)
    return None


@pytest.mark.parametrize("failing", [[], [1], [0, 2]])
def test_what_fails_on_some_ranks_fails_on_all(ranks, failing):
    found = ranks(3).run(tried, failing)
    for rank, (result, error, sent) in enumerate(found):
        assert result == (None if failing else rank)
        told = f"rank {failing[0]} of 3 failed: 'of {failing[0]}'" if failing else None
        assert error == (("KeyError", f"'of {rank}'") if rank in failing else told and ("ValueError", told))
        assert sent == (["all_reduce", "all_gather_object"] if failing else ["all_reduce"])


def tried(rank: int, failing: list[int]) -> tuple[Any, Any, list[str]]:
    def work() -> int:
        if rank in failing:
            raise KeyError(f"of {rank}")
        return rank

    sent: list[str] = []
    with contextlib.ExitStack() as stack:
        for name in ("all_reduce", "all_gather", "all_gather_into_tensor", "all_gather_object", "broadcast"):
            original = getattr(dist, name)

            def counted(*args: Any, name: str = name, original: Any = original, **kwargs: Any) -> Any:
                sent.append(name)
                return original(*args, **kwargs)

            stack.enter_context(mock.patch.object(dist, name, counted))
        try:
            return together(work), None, sent
        except (KeyError, ValueError) as error:
            return None, (type(error).__name__, str(error)), sent


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
