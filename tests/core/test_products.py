"""What computes symmetric products: which library for which shape, and what happens where one is not right."""

from __future__ import annotations

import sys
import warnings
from dataclasses import replace
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from muon_plugin import Muon, kernels
from muon_plugin.core import orthogonalize, products
from muon_plugin.core.agreement import alike
from muon_plugin.core.coefficients import coefficients_for
from muon_plugin.core.orthogonalize import NewtonSchulz
from muon_plugin.core.products import Symmetric
from tests.support.ranks import RankError

pytestmark = pytest.mark.fast

PAPER = coefficients_for(5, "simple")
BOTH = Symmetric(90, (("quack", "0.6.5"), ("triton", "3.9.0")))
TRITON = Symmetric(80, (("triton", "3.9.0"),))
CPU = torch.device("cpu")


def matrices(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0)).bfloat16()


def gemm_symmetric(A: Tensor, B: Tensor, C: Tensor | None = None, alpha: float = 1.0, beta: float = 1.0) -> Tensor:
    """quack's, as its source has it: A (l, m, k), B (l, k, m), each with a contiguous dimension."""
    assert A.dim() == B.dim() == 3
    assert A.stride(-1) == 1 in B.stride()[-2:]
    found = alpha * A.float() @ B.float()
    return (found if C is None else found + beta * C.float()).to(A.dtype)


@pytest.fixture
def quack(monkeypatch):
    """A package of quack's name with `gemm_symmetric`; no trial is remembered."""
    package = ModuleType("quack")
    package.gemm_interface = ModuleType("quack.gemm_interface")
    package.gemm_interface.gemm_symmetric = gemm_symmetric
    for module in (package, package.gemm_interface):
        monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(products, "TORCH", products.WIDENED)  # fast on every CPU
    _forget()
    yield package.gemm_interface
    _forget()


def _forget() -> None:
    """What was imported with another `gemm_symmetric`, and what was found of it."""
    products.works.cache_clear()
    sys.modules.pop("muon_plugin.kernels.symmetric_quack", None)
    vars(kernels).pop("symmetric_quack", None)


@pytest.mark.parametrize(
    ("shape", "both", "triton"),
    [
        ((64, 64), "torch", "torch"),  # one tile
        ((256, 1024), "triton", "triton"),  # one tile of 256, which is all of the product; three of 128
        ((320, 320), "torch", "torch"),  # tiles of 128 reach far beyond its borders
        ((1408, 2048), "triton", "triton"),  # quack's larger tiles compute 1.27 times as much
        ((2048, 2048), "quack", "triton"),
        ((4096, 16384), "quack", "triton"),
        ((4096, 16381), "torch", "torch"),  # rows begin anywhere
    ],
)
def test_the_library_is_a_function_of_the_shape_and_of_what_is_there(shape, both, triton):
    assert (BOTH.chosen(*shape), TRITON.chosen(*shape), Symmetric(70).chosen(*shape)) == (both, triton, "torch")


def test_a_symmetric_product_counts_half_where_half_is_computed():
    newton_schulz = NewtonSchulz(PAPER, dtype="fp16", products=TRITON)
    m, n = 1408, 2048
    assert newton_schulz.flops(m, n) == newton_schulz.flops(n, m) == 2 * (m * m * n + 2 * m * m * n) + 14 * m**3
    assert newton_schulz.flops(64, 200) == NewtonSchulz(PAPER, dtype="fp16").flops(64, 200)


def test_the_iteration_is_the_same_by_quack(quack):
    x = matrices(2, 512, 520)[:, :, :512].contiguous()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        tried = replace(BOTH, releases=BOTH.releases[:1], device=CPU)
        found = [NewtonSchulz(PAPER, dtype="fp16", products=p)(x) for p in (tried, products.WIDENED)]
    assert BOTH.chosen(512, 512) == "quack"
    assert all(torch.allclose(a, b, atol=0.01) for a, b in zip(*found))


@pytest.mark.parametrize(
    ("broken", "told"),
    [
        (lambda A, B, **kw: 1.02 * gemm_symmetric(A, B, **kw), "differ from torch's by 2.0%"),
        (lambda A, B, **kw: gemm_symmetric(A, B, **kw) * (1 + (len(A) - 1) / 2**10), "have other bits in a batch"),
        (lambda *_, **__: {}["no kernel image"], "fail with KeyError: 'no kernel image'"),
    ],
)
def test_a_library_that_is_not_right_is_replaced_by_torch_with_one_line(quack, broken, told):
    quack.gemm_symmetric = broken
    x, tried = matrices(512, 512).half() / 32, replace(BOTH, device=CPU)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert tried.flops(512, 512) == 2 * 512**3  # the plan knows it, too
        found = [tried.gram(x) for _ in range(2)]
    assert "quack" not in tried.describe([(512, 512)])
    assert [str(one.message) for one in caught] == [
        f"muon_plugin: quack 0.6.5's symmetric products of 512x512 in float16 on cpu {told}; torch's take their place"
    ]
    assert all(torch.equal(one, products.TORCH.gram(x)) for one in found)


def test_what_is_installed_decides_on_cuda(monkeypatch):
    there, broken = {"quack-kernels": "0.6.7", "triton": "3.9.0"}, set()
    monkeypatch.setattr(products.importlib.metadata, "distributions", lambda name: _versions(there.get(name)))
    monkeypatch.setattr(products, "works", lambda name, *_: name not in broken)

    def on(capability: tuple[int, int]) -> Symmetric:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _: capability)
        return products.symmetric_on.__wrapped__(torch.device("cuda"))

    cuda = torch.device("cuda")
    assert on((9, 0)) == Symmetric(90, (("quack", "0.6.7"), ("triton", "3.9.0")), cuda)
    assert on((8, 6)) == Symmetric(86, (("triton", "3.9.0"),), cuda)
    assert on((7, 0)) == Symmetric(70, (), cuda)
    broken.add("triton")
    assert on((10, 0)) == Symmetric(100, (("quack", "0.6.7"),), cuda)
    there["quack-kernels"] = "0.7.0"
    with pytest.warns(UserWarning, match=r"quack-kernels 0.7.0 is not used; supported: 0.6.5 and below 0.7"):
        assert on((9, 0)) == Symmetric(90, (), cuda)


def _versions(release: str | None) -> list[Any]:
    return [] if release is None else [SimpleNamespace(version=release)]


def test_the_table_says_what_computes_which_matrices():
    newton_schulz = NewtonSchulz(PAPER, dtype="fp16", products=BOTH)
    assert newton_schulz.describe([(2048, 1408), (4096, 4096), (2048, 8192), (33, 91)]) == (
        "Newton-Schulz in fp16; symmetric products on compute capability 9.0 by quack 0.6.5 (short side "
        f"2048, 4096), triton 3.9.0 (short side 1408), torch {torch.__version__} (short side 33)"
    )
    model = torch.nn.Linear(64, 32)
    for given, dtype in ((None, "bf16"), ("fp16", "fp16")):
        muon = Muon(model.named_parameters(), **({} if given is None else {"ns_dtype": given}))
        assert f"\n  Newton-Schulz in {dtype}; torch {torch.__version__}\n" in muon.summary()


def test_a_batch_that_is_refused_is_told(monkeypatch):
    monkeypatch.setattr(NewtonSchulz, "_together", lambda self, x: torch.zeros_like(x))
    tried = orthogonalize._batch_is_exact.__wrapped__
    newton_schulz, drawn = NewtonSchulz(PAPER).on(torch.device("cpu")), torch.randn
    monkeypatch.setattr(torch, "Generator", lambda device: SimpleNamespace(manual_seed=lambda seed: None))
    monkeypatch.setattr(torch, "randn", lambda shape, generator, device: drawn(shape))
    with pytest.warns(
        UserWarning, match="a batch of 3 matrices of 8x16 has other bits on cuda than one matrix at a time"
    ):
        assert not tried(newton_schulz, (3, 8, 16), torch.device("cuda"))


def test_gpus_of_several_kinds_are_an_error_at_start_but_with_the_standard_form(ranks):
    with pytest.raises(RankError) as caught:
        ranks(3).run(built_on, [[9, 0], [8, 0], [9, 0]], None, {"ns_dtype": "fp16"})
    way = "Newton-Schulz in fp16; symmetric products on compute capability {} by triton 3.9.0, torch "
    way += torch.__version__
    assert len(caught.value.errors) == 3
    for kind, message in caught.value.errors:
        assert kind == "ValueError"
        assert message == (
            "the ranks disagree about how matrices are orthogonalized, so their bits would depend on the layout: "
            f"{way.format('9.0')} on ranks 0, 2 / {way.format('8.0')} on rank 1. Use GPUs of one kind and the same "
            "packages on every rank, or Newton-Schulz' method standard (ns_method, --muon-ns-method)"
        )
    assert ranks(2).run(built_on, [[9, 0], [8, 0]], None, {"ns_method": "standard"}) == [0, 0]


def test_a_library_that_fails_on_one_rank_alone_is_an_error_at_start(ranks):
    with pytest.raises(RankError) as caught:
        ranks(2).run(built_on, [[9, 0], [9, 0]], [1], {"ns_dtype": "fp16"})
    for kind, message in caught.value.errors:
        assert kind == "ValueError"
        way = "Newton-Schulz in fp16; symmetric products on compute capability 9.0 by"
        assert f"{way} triton 3.9.0 (short side 512) on rank 0 / " in message
        assert f"{way} torch {torch.__version__} (short side 512) on rank 1. " in message
    assert ranks(2).run(built_on, [[9, 0], [9, 0]], [0, 1], {"ns_dtype": "fp16"}) == [0, 0]


def built_on(
    rank: int, capabilities: list[tuple[int, int]], failing: list[int] | None, settings: dict[str, Any]
) -> int:
    """Builds an optimizer as on GPUs of these kinds, where our kernel fails for the model's shape on some ranks."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch.cuda, "get_device_capability", lambda _: capabilities[rank])
        patched.setattr(
            products.importlib.metadata,
            "distributions",
            lambda name: _versions("3.9.0" if name == "triton" else None),
        )
        patched.setattr(
            products, "works", lambda name, release, m, k, *_: (m, rank) not in [(512, r) for r in failing or ()]
        )
        patched.setattr(orthogonalize, "products_on", lambda device, dtype: products.symmetric_on.__wrapped__(device))
        model = torch.nn.Linear(512, 512, bias=False)
        Muon(model.named_parameters(), process_group=torch.distributed.group.WORLD, **settings)
    return 0


def test_ranks_without_a_matrix_have_no_say(ranks):
    assert ranks(3).run(asked, [None, "bf16", "bf16"]) == ["", "", ""]
    found = ranks(3).run(asked, ["fp16", None, "bf16"])
    assert found == ["the ranks disagree about the way: fp16 on rank 0 / bf16 on rank 2. Do this"] * 3


def asked(rank: int, facts: list[str | None]) -> str:
    try:
        alike("the way", facts[rank], "Do this")
    except ValueError as error:
        return str(error)
    return ""
