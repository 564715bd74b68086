"""Whoever asks for a CUDA device under `on_cpu` gets the CPU."""

from __future__ import annotations

from typing import Any

import torch


def test_every_way_to_ask_for_cuda_means_the_cpu(ranks, release):
    devices, missed = ranks(1, release).run(asked)[0]
    assert set(devices) == {"cpu"}
    assert missed == []


def asked(rank: int) -> tuple[list[str], list[str]]:
    """The devices of tensors for which CUDA was asked, and functions that would ask CUDA."""
    one = torch.ones(1)
    made = [torch.zeros(1, device="cuda"), torch.tensor([1], device=torch.cuda.current_device()), one.cuda()]
    made += [torch.rand_like(one, device="cuda:0"), one.new_zeros(1, device=torch.device("cuda")), one.to("cuda")]
    made += [one.to("cuda:1", torch.float16), one.to(device=0), torch.nn.Parameter(one).to(torch.device("cuda", 3))]
    made += torch.nn.Linear(1, 1, device="cuda").parameters()
    made += torch.nn.Linear(1, 1).to("cuda").parameters()
    made += torch.nn.Linear(1, 1).cuda().parameters()
    with torch.device("cuda"):
        made += [torch.ones(1), *torch.nn.Linear(1, 1).parameters()]
    assert one.type() == "torch.cuda.FloatTensor"
    assert one.type(torch.bfloat16).dtype == torch.bfloat16
    return [tensor.device.type for tensor in made], [*missed(torch), *missed(torch.Tensor)]


def missed(holder: Any) -> list[str]:
    """Functions that take a device by name, as their documentation says, and that `on_cpu` has not replaced."""
    found = []
    for name in dir(holder):
        function = getattr(holder, name)
        signature = str(getattr(function, "__doc__", "")).strip().partition(") -> Tensor")[0]
        takes = "device=" in signature and len(signature) < 300 and name not in ("ipu", "mtia", "xpu")
        if callable(function) and not name.startswith("_") and takes:
            found += [] if hasattr(function, "__wrapped__") else [name]
    return found
