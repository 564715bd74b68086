"""The ranks that share matrices, where both data and tensor parallelism cut them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from .agreement import gather, ranks_of, together, world_of


def joint_groups(pairs: Sequence[tuple[Any, Any]], ranks: Any = None) -> list[Any]:
    """For each (DP group, TP group): the process group of the TP groups of all ranks of the DP group.

    These ranks share matrices.

    Args:
        pairs: of this rank; ranks of other pipeline stages may have other numbers of them.
        ranks: those that call this together: a process group, None or a `Grid`. Collective over them.
    """

    def wanted(dp: Any, tp: Any) -> tuple[int, ...]:
        return tuple(sorted(set().union(*gather(dist.get_process_group_ranks(tp), dp))))

    everyone = together(lambda: [wanted(dp, tp) for dp, tp in pairs], ranks)
    known = {tuple(sorted(dist.get_process_group_ranks(group))): group for pair in pairs for group in reversed(pair)}
    lacking = gather([runs_of(members) for members in everyone if members not in known], ranks)
    for runs in sorted(set().union(*lacking)):
        members = tuple(rank for begin, end in runs for rank in range(begin, end))
        group = _new_group(members, ranks, _timeout(pairs[0][0]))
        if dist.get_rank() in members:
            known[members] = group
            # torch leaves undefined what NCCL does in a group whose first messages are between some of its ranks.
            gather(None, group)
    return [known[members] for members in everyone]


def runs_of(members: Sequence[int]) -> tuple[tuple[int, int], ...]:
    """Ascending ranks as (first, after the last) of consecutive ones: every rank hears of the groups of all."""
    begins = [rank for i, rank in enumerate(members) if i == 0 or members[i - 1] + 1 != rank]
    ends = [rank + 1 for i, rank in enumerate(members) if i + 1 == len(members) or members[i + 1] != rank + 1]
    return tuple(zip(begins, ends))


def _new_group(members: Sequence[int], ranks: Any, timeout: Any) -> Any:
    """A process group of `members`, some of `ranks`. Collective over `ranks`.

    torch makes a group by a collective over the world, or by its members alone. These then name it by how many groups
    each of them has, and wait for each other under different names where these numbers differ: groups of one rank, for
    which nobody waits, make them equal.
    """
    if world_of(ranks)[1] == world_of(None)[1]:
        return dist.new_group(list(members), timeout=timeout)
    numbers = dict(zip(ranks_of(ranks), gather(_number_of_groups(), ranks), strict=True))
    me, most = dist.get_rank(), max(numbers[rank] for rank in members)
    if me not in members:
        return None
    for _ in range(most - numbers[me]):
        dist.new_group([me], timeout=timeout, use_local_synchronization=True)
    return dist.new_group(list(members), timeout=timeout, use_local_synchronization=True)


def _number_of_groups() -> int:
    return len(dist.distributed_c10d._world.pg_names)


def _timeout(group: Any) -> Any:
    """That of an engine's own groups, which may be longer than torch's default."""
    backend = group._get_backend(dist.distributed_c10d._get_pg_default_device(group))
    return backend.options._timeout
