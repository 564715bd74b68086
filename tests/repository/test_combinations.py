"""The combinations that tests take by default cover what they say."""

from __future__ import annotations

from itertools import combinations, product

import pytest

from tests.support.combinations import covering, in_turn

STAGES, WORLDS, DTYPES = (0, 1, 2, 3), (1, 2, 3, 4), ("fp32", "bf16", "fp16")


@pytest.mark.parametrize("strength", [1, 2, 3])
def test_any_values_of_as_many_parameters_meet(strength):
    parameters = STAGES, WORLDS, DTYPES, (1, 4)
    found = covering(*parameters, strength=strength, full=False)
    for places in combinations(range(4), strength):
        seen = {tuple(case[i] for i in places) for case in found}
        assert seen == set(product(*(parameters[i] for i in places))), places
    assert len(found) <= {1: 4, 2: 18, 3: 54}[strength]


def test_what_does_not_exist_is_left_out():
    def valid(stage: int, world: int, offload: bool) -> bool:
        return not (stage == 0 and offload)

    found = covering(STAGES, WORLDS, (False, True), valid=valid, full=False)
    assert all(valid(*case) for case in found)
    assert {(stage, offload) for stage, _, offload in found} == {*product((1, 2, 3), (False, True)), (0, False)}


def test_full_is_everything():
    assert covering(STAGES, WORLDS, full=True) == list(product(STAGES, WORLDS))
    assert in_turn("ab", [1, 2, 3], full=True) == list(product("ab", [1, 2, 3]))


def test_cases_take_turns():
    assert in_turn("ab", [1, 2, 3], full=False) == [("a", 1), ("a", 3), ("b", 2)]
