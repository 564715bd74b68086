"""The ranks that share matrices, where both data and tensor parallelism cut them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from .agreement import gather, together


def joint_groups(pairs: Sequence[tuple[Any, Any]]) -> list[Any]:
    """For each (DP group, TP group): the process group of the TP groups of all ranks of the DP group.

    These ranks share matrices. Collective over the world: every rank takes part in making every group.
    """

    def wanted(dp: Any, tp: Any) -> tuple[int, ...]:
        return tuple(sorted(set().union(*gather(dist.get_process_group_ranks(tp), dp))))

    everyone = together(lambda: [wanted(dp, tp) for dp, tp in pairs])  # stages of a pipeline may have other numbers
    known = {tuple(sorted(dist.get_process_group_ranks(group))): group for pair in pairs for group in reversed(pair)}
    lacking = gather([ranks for ranks in everyone if ranks not in known], None)
    for ranks in sorted(set().union(*lacking)):
        group = dist.new_group(list(ranks), timeout=_timeout(pairs[0][0]))
        if dist.get_rank() in ranks:
            known[ranks] = group
    return [known[ranks] for ranks in everyone]


def _timeout(group: Any) -> Any:
    """That of an engine's own groups, which may be longer than torch's default."""
    backend = group._get_backend(dist.distributed_c10d._get_pg_default_device(group))
    return backend.options._timeout
