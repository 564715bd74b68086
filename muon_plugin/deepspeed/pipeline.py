"""A pipeline whose stages have different numbers of parameter groups: one has only an embedding, another only matrices.

ZeRO's stage 1 adds up the gradient norm over the stages group by group, so it would hang.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import deepspeed.comm as dist
import torch
from deepspeed.runtime import utils
from torch import Tensor

from ..core.agreement import gather


def even_out_norms(engine: Any, ranks: Any) -> None:
    """Lets every stage take part in as many sums as the stage with the most groups. Collective over the engine's ranks.

    The sums are over whatever groups the stages have at that position; the norm of all is the same on every stage.
    """
    wrapper = engine.optimizer
    groups = getattr(wrapper, "bit16_groups", None)  # BF16_Optimizer makes one sum of all
    if not engine.pipeline_parallelism or groups is None:
        return
    lacking = max(gather(len(groups), ranks)) - len(groups)
    if lacking:
        wrapper.scaled_global_norm = partial(_with_others, wrapper, wrapper.scaled_global_norm, lacking)


def _with_others(wrapper: Any, original: Callable[..., Tensor], lacking: int, norm_type: int = 2) -> Tensor:
    norms = [original(norm_type)]
    for _ in range(lacking):
        squares = torch.zeros(1, device=norms[0].device)
        wrapper._model_parallel_all_reduce(tensor=squares, op=dist.ReduceOp.SUM)
        norm = squares.sqrt().view(())
        utils.mask_nan_or_inf_with_val_inplace(norm, device=norm.device)  # as DeepSpeed marks an invalid norm
        norms.append(norm)
    if hasattr(utils, "combine_grad_norm_groups"):  # from 0.19
        return utils.combine_grad_norm_groups(norms)
    return torch.linalg.vector_norm(torch.stack(norms))
