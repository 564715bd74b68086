"""What one step costs one rank in kernels, messages and memory, counted without a device and without other ranks.

The step really runs: `core.update.Update` with the plan of all ranks, on meta tensors, which have shapes and no data,
in a process group of torch's "fake" backend, in which nobody else is. A `Counter` sees every operation that torch
dispatches meanwhile, messages included. Tensors on meta take the same way through the code as those on CUDA.
"""

from __future__ import annotations

import weakref
from collections import Counter as Tally
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields, replace
from functools import cache, partial
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from ..core import launches
from ..core.exchange import ended
from ..core.layout import Shard, cut_shards
from ..core.orthogonalize import NewtonSchulz
from ..core.plan import Plan
from ..core.update import Update
from .calls import PlannedCall

META = torch.device("meta")
#: Matrix products: their time is that of their FLOPs, not of the bytes that they move.
PRODUCTS = ("mm", "bmm", "addmm", "baddbmm")
#: Operations that launch nothing; views beside them are told by their schema.
NOTHING = ("empty", "empty_like", "empty_strided", "new_empty", "detach", "alias", "_unsafe_view")
#: The functions of torch.distributed by which a step communicates.
POSTED = ("batch_isend_irecv", "broadcast", "all_to_all_single")
#: They write their first argument without reading it.
FILLS = ("copy_", "zero_", "fill_", "_foreach_copy_", "_foreach_zero_")
#: What torch hands to one launch of a multi-tensor kernel: so many tensors, by the number of lists, and so many chunks
#: of so many elements (ATen's MultiTensorApply.cuh; with CUDA 12 and recent drivers seven times as many).
TENSORS, CHUNKS, CHUNK = {1: 110, 2: 64, 3: 48, 4: 36, 5: 30}, 320, 65536


@dataclass(frozen=True)
class Counts:
    """One step of one rank.

    Attributes:
        held: elements of matrices that this rank updates.
        kernels: launches, those of matrix products among them.
        views, allocations: views of tensors, which launch nothing and cost the host as much time; tensors made.
        elementwise: bytes that all kernels but matrix products read and write in the device's memory.
        messages: point to point, sent and received.
        collectives: calls of torch.distributed; messages that are posted together are one.
        batch: the most messages that are posted together.
        sent: bytes, once for each receiver.
        peak: the most bytes that are allocated at a time beside weights, gradients and state.
    """

    held: int = 0
    kernels: int = 0
    views: int = 0
    allocations: int = 0
    elementwise: int = 0
    messages: int = 0
    collectives: int = 0
    batch: int = 0
    sent: int = 0
    peak: int = 0

    def __add__(self, other: Counts) -> Counts:
        """One after the other."""
        pairs = {f.name: (getattr(self, f.name), getattr(other, f.name)) for f in fields(self)}
        return Counts(**{name: max(pair) if name in ("batch", "peak") else sum(pair) for name, pair in pairs.items()})

    @property
    def bytes_each(self) -> float:
        """Elementwise traffic for each element held."""
        return self.elementwise / max(self.held, 1)


class Counter(TorchDispatchMode):
    """Counts the operations that are dispatched while it is entered."""

    def __init__(self) -> None:
        super().__init__()
        self._counts = Tally[str]()
        self._live = 0
        posting: dict[str, Any] = {name: partial(getattr(self, f"_{name}"), getattr(dist, name)) for name in POSTED}
        self._posted = mock.patch.multiple(dist, **posting)
        self._storages: dict[int, weakref.ref[Any]] = {}

    @property
    def counts(self) -> Counts:
        return Counts(**self._counts)

    def __enter__(self) -> Counter:
        self._posted.start()
        launches.counted = self._launch
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        super().__exit__(*error)
        self._posted.stop()
        launches.counted = None

    def _launch(self, nbytes: int) -> None:
        """Of a Triton kernel, or a small copy to the device for one."""
        self._counts["kernels"] += 1
        self._counts["elementwise"] += nbytes

    def _batch_isend_irecv(self, post: Any, messages: list[Any]) -> Any:
        self._counts["messages"] += len(messages)
        self._counts["collectives"] += 1
        self._counts["batch"] = max(self._counts["batch"], len(messages))
        self._counts["sent"] += sum(message.tensor.nbytes for message in messages if message.op is dist.isend)
        return post(messages)

    def _broadcast(self, post: Any, tensor: Tensor, source: int, **kwargs: Any) -> Any:
        self._counts["collectives"] += 1
        self._counts["sent"] += tensor.nbytes * (dist.get_world_size() - 1) * (source == dist.get_rank())
        return post(tensor, source, **kwargs)

    def _all_to_all_single(self, post: Any, come: Tensor, go: Tensor, *sizes: Sequence[int], **kwargs: Any) -> Any:
        own = sizes[1][dist.get_rank()] if sizes else go.numel() // dist.get_world_size()
        self._counts["collectives"] += 1
        self._counts["sent"] += go.nbytes - own * go.element_size()
        return post(come, go, *sizes, **kwargs)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if _is_view(function):  # at once: with tens of thousands of ranks, as many views of what each has sent
            self._counts["views"] += 1
            return function(*args, **kwargs)
        name = function.overloadpacket.__name__
        given = {id(tensor.untyped_storage()) for tensor in _tensors((args, kwargs))}
        found = function(*args, **kwargs)
        made = {id(storage): storage for t in _tensors(found) if id(storage := t.untyped_storage()) not in given}
        self._allocate(made.values())
        launches = _launches(name, function, args)
        self._counts["kernels"] += launches
        self._counts["views"] += not launches and not made
        if launches and name not in PRODUCTS:
            self._counts["elementwise"] += _traffic(name, function, args, kwargs, found)
        return found

    def _allocate(self, storages: Iterable[Any]) -> None:
        for storage in storages:
            size, key = storage.nbytes(), id(storage)

            def freed(_: Any, size: int = size, key: int = key) -> None:
                self._live -= size
                self._storages.pop(key, None)

            self._storages[key] = weakref.ref(storage, freed)
            self._live += size
            self._counts["allocations"] += 1
        self._counts["peak"] = max(self._counts["peak"], self._live)


def _tensors(tree: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _launches(name: str, function: Any, args: Sequence[Any]) -> int:
    if name.startswith("_foreach_"):
        lists = [own for own in args if isinstance(own, (list, tuple)) and own and isinstance(own[0], Tensor)]
        return _multi_tensor(name, lists)
    return 0 if _is_view(function) or name in NOTHING else 1


@cache
def _is_view(function: Any) -> bool:
    """Whether the operation returns its argument in another shape, and computes nothing."""
    returned = [value.alias_info for value in function._schema.returns]
    return any(alias is not None and not alias.is_write for alias in returned)


def _multi_tensor(name: str, lists: Sequence[Sequence[Tensor]]) -> int:
    """Launches of a `torch._foreach_*` operation on CUDA: one by one where torch does not take its fast path."""
    kinds = [{(t.dtype, t.device) for t in own} for own in lists]
    alike = all(len(kind) == 1 for kind in kinds) and (name == "_foreach_copy_" or len(set().union(*kinds)) == 1)
    if not (alike and all(t.is_contiguous() for own in lists for t in own)):
        return len(lists[0])
    norm = name == "_foreach_norm"
    most = TENSORS[len(lists) + (not norm and not name.endswith("_"))]
    launches = tensors = chunks = 0
    for tensor in lists[0]:
        tensors, left = tensors + 1, -(-tensor.numel() // CHUNK)
        while chunks + left >= CHUNKS:
            launches, left, chunks = launches + 1, left - (CHUNKS - chunks), 0
            tensors = int(left > 0)
        chunks += left
        if tensors == most:
            launches, tensors, chunks = launches + 1, 0, 0
    launches += chunks > 0
    # A norm's sums of chunks: set to 0 before, added up afterwards.
    return launches + 1 + -(-len(lists[0]) // TENSORS[1]) if norm else launches


def _traffic(name: str, function: Any, args: Any, kwargs: Mapping[str, Any], found: Any) -> int:
    """Bytes of the arguments that are read, and of those that are written or returned."""
    named = [(s, args[i] if i < len(args) else kwargs.get(s.name)) for i, s in enumerate(function._schema.arguments)]
    written = _tensors([value for s, value in named if s.alias_info is not None and s.alias_info.is_write])
    unread = {id(t) for t in written} if name in FILLS or "out" in kwargs else set()
    read = [tensor for tensor in _tensors((args, kwargs)) if id(tensor) not in unread]
    return sum(map(_bytes, read)) + sum(map(_bytes, written or _tensors(found)))


def _bytes(tensor: Tensor) -> int:
    """An expanded tensor lies in memory once."""
    return min(tensor.nbytes, tensor.untyped_storage().nbytes())


class Nothing:
    """A collective in which nobody else takes part, and its handle; of messages, as many handles as arrive."""

    def __init__(self, *args: Any, **kwargs: Any) -> None: ...
    def wait(self) -> None: ...
    def __len__(self) -> int:
        return 0

    def __iter__(self) -> Iterator[Nothing]:
        return iter(())


@contextmanager
def as_rank(rank: int, size: int) -> Iterator[None]:
    """torch.distributed as one of `size` ranks sees it, alone: messages go nowhere.

    Raises:
        RuntimeError: where torch.distributed runs already.
    """
    from torch.testing._internal.distributed.fake_pg import FakeStore

    if dist.is_initialized():
        raise RuntimeError(
            f"torch.distributed runs here ({dist.get_backend()}); allowed: a process without it, to count a step in"
        )
    dist.init_process_group("fake", store=FakeStore(), rank=rank, world_size=size)
    try:
        group = dist.distributed_c10d._get_default_group()
        group._register_backend(META, group.BackendType.CUSTOM, group._get_backend(torch.device("cpu")))
        nothing: dict[str, Any] = dict.fromkeys(POSTED, Nothing)  # torch 2.6 has none of them on meta
        with mock.patch.multiple(dist, **nothing):
            yield
    finally:
        dist.destroy_process_group()


def busiest(plan: Plan) -> int:
    """The rank with parts of most matrices; of those with as many, the one that computes most."""
    parts = Tally[int]()
    for route in plan.routes:
        parts.update(route.held.ranks)
    return max(range(len(plan.flops)), key=lambda rank: (parts[rank], plan.flops[rank]))


def count(
    call: PlannedCall,
    plan: Plan,
    rank: int,
    newton_schulz: NewtonSchulz,
    scalars: int = 0,
    momentum: torch.dtype = torch.float32,
) -> Counts:
    """One step of a call with matrices.

    Args:
        call, plan: the plan is of the call's ranks.
        rank: of them.
        newton_schulz: the iteration.
        scalars: bf16 numbers that are sent with each update.
        momentum: its dtype between steps.
    """
    shards = shards_of(call, rank, {matrix.parameter for matrix in call.matrices})
    with as_rank(rank, call.ranks):
        update = Update(call.matrices, shards, None, META, newton_schulz.on(META), lambda _: 0.5, bool(scalars), plan)
        momenta = [torch.empty_like(p, dtype=momentum) for p in update.tensors]
        for p in update.tensors:
            p.grad = torch.empty_like(p)
        groups = [{"lr": 0.5, "weight_decay": 0.5, "momentum": 0.5, "nesterov": True, "step": 0}] * len(momenta)
        ended(update.turns(groups, momenta))  # finds what later steps keep
        with Counter() as counter:
            ended(update.turns(groups, momenta))
    return replace(counter.counts, held=sum(shard.where.numel for shard in shards))


def shards_of(call: PlannedCall, rank: int, names: Collection[str]) -> list[Shard]:
    """What a rank holds of these parameters: ZeRO's parts lie in one flat tensor, others are tensors of their own."""
    dp, tp = divmod(rank, call.tp)
    flat = None if call.padded is None or call.replicas else torch.empty(call.padded, device=META)
    found: list[Shard] = []
    for span in call.held(dp):
        partition = call.parameters[span.number]
        if partition.name in names:
            tensor, offset = (torch.empty(span.length, device=META), 0) if flat is None else (flat, span.offset)
            found += cut_shards(partition, tp, Shard.of_range(partition.name, span.start, span.length, tensor, offset))
    return found
