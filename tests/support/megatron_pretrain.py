"""Megatron's own training loop, ``megatron.training.pretrain`` of 0.19.2, on the CPU: a job for `trained_by_megatron`.

Under `on_cpu`, with the rest of CUDA that the loop asks for. Megatron keeps its arguments, timers and groups for good,
so every run has ranks of its own, which are forked and cost little.
"""

from __future__ import annotations

import contextlib
import io
import sys
import zlib
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from functools import partial
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor

from tests.support.megatron_model import Layout, full_weights, named, part_of, tp_cut
from tests.support.ranks import Ranks

SEQUENCE, VOCAB = 32, 127
#: A small Llama in fp32 with AdamW's and Muon's settings of the paper, without clipping, whose norm rounds.
ARGUMENTS = f"""
    --num-layers 2 --hidden-size 32 --ffn-hidden-size 80 --num-attention-heads 4 --group-query-attention
    --num-query-groups 2 --seq-length {SEQUENCE} --max-position-embeddings {SEQUENCE} --swiglu --normalization RMSNorm
    --position-embedding-type rope --disable-bias-linear --attention-dropout 0.0 --hidden-dropout 0.0
    --vocab-size {VOCAB} --make-vocab-size-divisible-by 64 --tokenizer-type NullTokenizer --seed 1234
    --use-cpu-initialization
    --micro-batch-size 2 --global-batch-size 4 --train-iters 6 --eval-iters 0 --eval-interval 1000 --num-workers 0
    --lr 0.01 --lr-decay-style constant --lr-decay-iters 1000 --weight-decay 0.1 --adam-beta2 0.95 --clip-grad 0.0
    --transformer-impl local --no-persist-layer-norm --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-swiglu-fusion --no-bias-gelu-fusion --no-bias-dropout-fusion --no-rope-fusion
    --use-distributed-optimizer --distributed-backend gloo --log-interval 2 --log-throughput
    --ckpt-format torch_dist --dist-ckpt-optim-fully-reshardable
"""
EXPERTS = """
    --num-experts 4 --moe-ffn-hidden-size 48 --moe-router-topk 2 --moe-token-dispatcher-type allgather
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 0.01
"""
UNTIED = "--untie-embeddings-and-output-weights"


@dataclass
class Run:
    """A training run, as one rank saw it.

    Attributes:
        losses: of every micro-batch; empty but on the last stage.
        weights: whole parameters by name, before the steps that were asked for and (-1) at the end.
        printed: by this rank.
        held: names of the parameters of which it holds at least a part.
    """

    losses: list[float] = field(default_factory=list)
    weights: dict[int, dict[str, Tensor]] = field(default_factory=dict)
    printed: str = ""
    held: set[str] = field(default_factory=set)


def pretrained(world: int, *arguments: str, **options: Any) -> list[Run]:
    """A training run on so many ranks, which end with it; see `job` for the options."""
    pool = Ranks(world, "0.19.2")
    try:
        return pool.run(job, " ".join(arguments), **options)
    finally:
        pool.close()


def job(
    rank: int,
    arguments: str,
    keep: Sequence[int] = (),
    frozen: str = "",
    filled: bool = True,
    uninitialized_is_nan: bool = False,
    without: str = "",
) -> Run:
    """Trains in this process, as a script that calls ``pretrain`` would.

    Args:
        rank: not needed: Megatron knows it.
        arguments: of the command line, beside `ARGUMENTS`.
        keep: numbers of the steps before which the weights are kept.
        frozen: pattern of the parameters' names that are not trained.
        filled: whether the weights are drawn by their names, so that they are the same in every layout.
        uninitialized_is_nan: whether memory that nobody has initialized holds NaN.
        without: what is left out of `ARGUMENTS`.
    """
    if "--optimizer muon" in arguments:
        import muon_plugin

        muon_plugin.register("megatron")
    stand_in_for_cuda()
    if uninitialized_is_nan:  # this makes torch fill new memory with it
        torch.use_deterministic_algorithms(True, warn_only=True)
    sys.argv = ["pretrain.py", *ARGUMENTS.replace(without, "").split(), *arguments.split()]
    run, recorder = Run(), Recorder(keep, frozen, filled)
    printed = io.StringIO()
    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        try:
            _pretrain(recorder)
        except BaseException:
            print(printed.getvalue()[-4000:], file=sys.__stderr__)
            raise
    recorder.keep(-1)
    run.losses, run.printed = recorder.losses, printed.getvalue()
    run.held = {name for name, _, _ in named(recorder.models)}
    run.weights = {number: recorder.whole(number) for number in sorted(recorder.kept)}
    return run


def _pretrain(recorder: Recorder) -> None:
    from megatron.core.enums import ModelType
    from megatron.training import pretrain
    from megatron.training.argument_utils import gpt_config_from_args, pretrain_cfg_container_from_args
    from megatron.training.arguments import parse_and_validate_args
    from megatron.training.models.gpt import GPTModelBuilder

    args = parse_and_validate_args()
    recorder.tied = not args.untie_embeddings_and_output_weights

    def provider(pre_process: bool, post_process: bool, pg_collection: Any, config: Any, vp_stage: Any = None) -> Any:
        builder = GPTModelBuilder(gpt_config_from_args(args, config))
        return recorder.seen(builder.build_model(pg_collection, pre_process, post_process, vp_stage))

    config = pretrain_cfg_container_from_args(args)
    pretrain(config, _datasets, ModelType.encoder_or_decoder, partial(_forward, recorder), model_provider=provider)


class Recorder:
    """What a rank remembers of its run."""

    def __init__(self, keep: Sequence[int], frozen: str, filled: bool) -> None:
        self.steps, self.frozen, self.filled, self.tied = keep, frozen, filled, False
        self.models: list[Any] = []
        self.losses: list[float] = []
        self.kept: dict[int, list[list[Tensor]]] = {}

    @torch.no_grad()
    def seen(self, model: Any) -> Any:
        """A model chunk, as a client's provider might hand it on: filled, and with some parameters frozen."""
        self.models.append(model)
        for name, p, module in named([model]):
            p.requires_grad = not fnmatchcase(name, self.frozen)
            if self.filled and p.dim() > 1:
                name = "embedding.word_embeddings.weight" if self.tied and name == "output_layer.weight" else name
                dim, stride, rank, size = tp_cut(name, p, module)
                shape = tuple(n * size if d == dim else n for d, n in enumerate(p.shape))
                generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
                p.copy_(part_of(torch.randn(shape, generator=generator) * 0.02, dim, stride, rank, size))
        return model

    def keep(self, number: int) -> None:
        """Keeps the weights before this step; of a stage with several chunks, when the first of them is run."""
        if number not in self.kept:
            self.kept[number] = [[p.detach().clone() for p in model.parameters()] for model in self.models]

    @torch.no_grad()
    def whole(self, number: int) -> dict[str, Tensor]:
        """The weights that were kept, put together over all ranks, whose replicas must agree. Collective."""
        for model, weights in zip(self.models, self.kept[number]):
            for p, kept in zip(model.parameters(), weights, strict=True):
                p.copy_(kept)
        return full_weights(self.models, Layout())


class Walks(torch.utils.data.Dataset):
    """Sequences in which each token says what the next one is; four of them have every token once."""

    def __init__(self, count: int) -> None:
        self.count = count

    def __len__(self) -> int:
        return self.count

    def __getitem__(self, number: int) -> dict[str, Tensor]:
        walk = torch.tensor([pow(3, SEQUENCE * number + i, VOCAB) for i in range(SEQUENCE + 1)])  # 3 generates 1 to 126
        return {"tokens": walk[:-1], "labels": walk[1:]}


def _datasets(counts: Sequence[int], vp_stage: int | None = None) -> Any:
    return Walks(counts[0]), None, None


_datasets.is_distributed = True  # type: ignore[attr-defined]  # every rank makes its own, also within TP


def _forward(recorder: Recorder, batches: Iterator[dict[str, Tensor]], model: Any) -> Any:
    from megatron.training import get_args

    if (number := get_args().curr_iteration) in recorder.steps:
        recorder.keep(number)
    batch = next(batches)
    positions = torch.arange(SEQUENCE).expand_as(batch["tokens"])
    mask = torch.ones(batch["tokens"].shape)
    output = model(batch["tokens"], positions, None, labels=batch["labels"], loss_mask=mask)
    return output, partial(_loss, recorder)


def _loss(recorder: Recorder, losses: Tensor) -> Any:
    loss, count = losses.float().sum(), torch.tensor(losses.numel(), dtype=torch.int)
    recorder.losses.append(float(loss.detach()) / losses.numel())
    return loss, count, {"lm loss": torch.stack([loss.detach(), count.float()])}


def stand_in_for_cuda(start: str = "megatron.training.initialize") -> None:
    """What the training loop asks of CUDA beyond `on_cpu`. `start`: the module that insists on a GPU."""

    def of_megatrons_start(yes: Any, no: Any) -> Callable[[], Any]:
        return lambda: yes if sys._getframe(1).f_globals.get("__name__") == start else no

    cuda: Any = torch.cuda
    cuda.is_available = of_megatrons_start(True, False)
    cuda.device_count = of_megatrons_start(1, 0)
    for name in ("set_device", "manual_seed", "empty_cache", "reset_peak_memory_stats"):
        setattr(cuda, name, lambda *_, **__: None)
    for name in ("memory_allocated", "max_memory_allocated", "memory_reserved", "max_memory_reserved"):
        setattr(cuda, name, lambda *_, **__: 0)
    cuda.get_device_properties = lambda *_: SimpleNamespace(name="cpu", major=9, minor=0, total_memory=2**34)
    cuda.device_memory_used = lambda *_: 0
    cuda.mem_get_info = lambda *_: (2**34, 2**34)
    cuda.memory_stats = lambda *_: {}
    cuda.get_rng_state = lambda *_: torch.get_rng_state()
    cuda.set_rng_state = lambda state, *_: torch.set_rng_state(state)
    import megatron.core.datasets.utils as datasets
    import megatron.core.tensor_parallel.random as random

    random._set_cuda_rng_state = lambda state, *_, **__: torch.set_rng_state(state)
    datasets.compile_helpers = lambda: None  # the wheel has them compiled, without their Makefile
