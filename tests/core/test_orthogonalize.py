"""Newton-Schulz: the polynomial of Eq. 2, in both forms, in any batch."""

from __future__ import annotations

import re
import warnings
from dataclasses import dataclass, replace
from itertools import product

import pytest
import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from muon_plugin.core import orthogonalize, products
from muon_plugin.core.coefficients import COEFFICIENT_SETS, coefficients_for
from muon_plugin.core.orthogonalize import NewtonSchulz, runs_of
from tests.support.combinations import FULL, covering
from tests.support.torch_releases import needs_muon

pytestmark = pytest.mark.fast

PAPER = coefficients_for(5, "simple")


def matrix(rows: int, cols: int, smallest: float = 0.0, seed: int = 0) -> Tensor:
    """Gaussian; or with singular values spread evenly, in logarithm, from 1 down to `smallest`."""
    g = torch.randn(rows, cols, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    if smallest:
        u, _, v = torch.linalg.svd(g, full_matrices=False)
        decades = torch.tensor(smallest).log10().item()
        g = u * torch.logspace(0, decades, min(rows, cols), dtype=torch.float64) @ v
    return g.bfloat16()


def exact(x: Tensor, triples) -> Tensor:
    """The same polynomial in float64."""
    x = x.double() / x.double().norm()
    if x.size(0) > x.size(1):
        return exact(x.T, triples).T
    for a, b, c in triples:
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def error(found: Tensor, expected: Tensor) -> float:
    return ((found.double() - expected).norm() / expected.norm()).item()


#: 16 x 91: one product of this size is below the size at which torch's CPU products change kernel, a batch is above.
SHAPES = [(1, 7), (16, 91), (33, 91), (91, 33), (64, 64), (128, 512), (512, 128)]
SHAPES += [(256, 768), (512, 1536)] if FULL else []


@pytest.mark.parametrize(
    ("shape", "method", "dtype"),
    [
        *((shape, method, "bf16") for shape in SHAPES for method in ("standard", "gram")),
        *((shape, "gram", "fp16") for shape in SHAPES[:5]),  # the CPU is slow in it
    ],
)
def test_a_batch_gives_the_bits_of_one_at_a_time(shape, method, dtype):
    newton_schulz = NewtonSchulz(PAPER, method, dtype=dtype)
    most = 24 if shape[0] < 100 else 4
    batch = torch.stack([matrix(*shape, seed=i) for i in range(most)])
    alone = [newton_schulz(one[None])[0] for one in batch]
    for size in sorted({1, 2, 3, min(6, most), most}):
        for start in (0, 1):  # from another address
            found = newton_schulz(batch[start : start + size])
            assert all(torch.equal(a, b) for a, b in zip(found, alone[start : start + size]))


@needs_muon
@pytest.mark.parametrize("shape", SHAPES)
def test_the_standard_form_is_torchs_bit_for_bit(shape):
    from torch.optim._muon import _zeropower_via_newtonschulz

    x = matrix(*shape)
    expected = _zeropower_via_newtonschulz(x.clone(), PAPER[0], 5, 1e-7)
    assert torch.equal(NewtonSchulz(PAPER, "standard")(x[None].clone())[0], expected)


@pytest.mark.parametrize(
    ("shape", "smallest", "name"),
    covering([(128, 512), (512, 128), (100, 333), (256, 512)], [0.0, 1e-2, 1e-4], list(COEFFICIENT_SETS)),
)
def test_auto_is_as_exact_as_the_standard_form(shape, smallest, name):
    """Against float64: at most a quarter more than the standard form's error (often less), or below 2%."""
    triples = coefficients_for(5, name)
    x = matrix(*shape, smallest)
    expected = exact(x, triples)
    standard, auto = (error(NewtonSchulz(triples, m)(x[None].clone())[0], expected) for m in ("standard", "auto"))
    assert auto < max(1.25 * standard, 0.02)


@pytest.mark.parametrize(
    ("shape", "smallest", "name", "steps"),
    covering([(64, 256), (256, 64), (96, 96)], [0.0, 1e-2, 1e-4], list(COEFFICIENT_SETS), [3, 4, 5, 6, 8]),
)
def test_fp16_is_far_more_exact_than_the_standard_form(shape, smallest, name, steps):
    """Against float64: at most 0.6 of the standard form's error, or 0.6%, of which the result's bf16 is 0.2%."""
    triples = coefficients_for(steps, name)
    x = matrix(*shape, smallest)
    expected = exact(x, triples)
    standard = error(NewtonSchulz(triples, "standard")(x[None].clone())[0], expected)
    fp16 = error(NewtonSchulz(triples, dtype="fp16")(x[None].clone())[0], expected)
    assert fp16 < max(0.6 * standard, 0.006)


def test_fp16_does_not_depend_on_the_size_of_the_gradient():
    """Momentum of 1e-7 is below fp16's smallest number, and 1e6 above its largest."""
    x = matrix(64, 160)
    one, *others = (NewtonSchulz(PAPER, dtype="fp16")((x * 2.0**power)[None])[0] for power in (0, -23, 20))
    assert one.isfinite().all()
    assert all(torch.equal(other, one) for other in others)


def test_entries_near_the_smallest_number_of_fp16_cost_nothing():
    """One row of 1 and others of 1e-4: after the normalization, most entries are below 6e-5, fp16's smallest normal."""
    x = matrix(64, 4096)
    x[1:] *= 1e-4
    assert (x[1:].float() / x.float().norm()).abs().max() < 2**-14
    expected = exact(x, PAPER)
    standard, fp16 = (error(f(x[None])[0], expected) for f in (NewtonSchulz(PAPER), NewtonSchulz(PAPER, dtype="fp16")))
    assert fp16 < standard


@dataclass(frozen=True)
class Coarse(products.Products):
    """In fp16 with a smallest number of 2**-16 in place of 2**-24: small matrices are to it as 4096x16384 to fp16."""

    def gram(self, x: Tensor) -> Tensor:
        return self.rounded(super().gram(x.float()))

    def symmetric(self, c: Tensor, a: Tensor, b: Tensor, beta: float, alpha: float = 1.0) -> Tensor:
        return self.rounded(super().symmetric(c.float(), a.float(), b.float(), beta, alpha))

    def apply(self, polynomial: Tensor, x: Tensor, beta: float = 0.0) -> Tensor:
        return self.rounded(super().apply(polynomial.float(), x.float(), beta))

    def rounded(self, x: Tensor) -> Tensor:
        return torch.where(x.abs() < 2**-6, (x * 2**16).round() / 2**16, x).half()


def test_entries_below_the_range_of_fp16_are_scaled_into_it(monkeypatch):
    x = matrix(256, 1024)
    expected = exact(x, PAPER)
    coarse = NewtonSchulz(PAPER, dtype="fp16", products=Coarse())
    assert error(coarse(x[None])[0], expected) < 0.004
    monkeypatch.setattr(orthogonalize, "SCALE", 1.0)
    assert error(coarse(x[None])[0], expected) > 0.006


@pytest.mark.parametrize("method", ["auto", "gram", "standard"])
def test_auto_is_fp16_in_the_gram_form_on_cuda_and_bf16_elsewhere(monkeypatch, method):
    cpu, cuda, planned = torch.device("cpu"), torch.device("cuda"), torch.device("meta")
    monkeypatch.setattr(orthogonalize, "products_on", lambda device, dtype: products.TORCH)
    monkeypatch.setattr(orthogonalize, "error_in_fp16", {cuda: 0.0025}.__getitem__)  # only CUDA is tried
    auto = NewtonSchulz(PAPER, method, dtype="auto")
    assert auto.on(cpu).dtype == "bf16"
    for device in (cuda, planned):
        found = auto.on(device)
        assert found.dtype == ("bf16" if method == "standard" else "fp16")
        assert found.on(device) == found
        assert found._form(512, 512) == ("standard" if method == "standard" else "gram")
        assert replace(auto, dtype="bf16").on(device).dtype == "bf16"
        steep = NewtonSchulz(((8.0, -20.0, 14.0),) * 5, method, dtype="auto").on(device)
        assert steep.dtype == "bf16"  # these coefficients do not allow the Gram form
    x = matrix(48, 200)[None]
    assert torch.equal(auto(x)[0], NewtonSchulz(PAPER, method)(x)[0])


def in_bf16(x: Tensor) -> Tensor:
    return x.bfloat16().to(x.dtype)


@dataclass(frozen=True)
class Inexact(products.Widened):
    """A device that loses fp16's last three bits in one of the products."""

    def gram(self, x: Tensor) -> Tensor:
        return in_bf16(super().gram(x))


@pytest.mark.parametrize("exact", [True, False])
def test_a_device_on_which_fp16_is_not_exact_is_found_and_takes_bf16(monkeypatch, exact):
    device = torch.device("cuda:7")
    on_it = products.WIDENED if exact else Inexact()
    monkeypatch.setattr(orthogonalize, "products_on", lambda device, dtype: on_it)
    generator, drawn = torch.Generator, torch.randn
    monkeypatch.setattr(torch, "Generator", lambda device: generator())
    monkeypatch.setattr(torch, "randn", lambda shape, generator, device: drawn(shape, generator=generator))
    monkeypatch.setattr(orthogonalize, "TRIED", (128, 512))
    orthogonalize.error_in_fp16.cache_clear()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        found = [NewtonSchulz(PAPER, dtype="auto").on(device) for _ in range(2)]
    assert found[0] == found[1]
    if exact:
        assert (found[0].dtype, caught) == ("fp16", [])
        assert 0.002 < orthogonalize.error_in_fp16(device) < 0.003
    else:
        assert found[0].dtype == "bf16"
        (line,) = (str(one.message) for one in caught)
        assert re.fullmatch(
            r"muon_plugin: Newton-Schulz in fp16 has an error of .*% on cuda:7, where 0.5% is allowed: it runs in bf16",
            line,
        )
        assert re.match(r"Newton-Schulz in bf16; fp16 has an error of .*% on this device; ", found[0].describe())
    orthogonalize.error_in_fp16.cache_clear()


def test_fp16_is_a_choice_on_the_cpu():
    x = matrix(48, 200)[None]
    assert torch.equal(NewtonSchulz(PAPER)(x)[0], NewtonSchulz(PAPER, dtype="bf16")(x)[0])
    assert not torch.equal(NewtonSchulz(PAPER)(x)[0], NewtonSchulz(PAPER, dtype="fp16")(x)[0])


@pytest.mark.parametrize(
    ("most", "lengths"),
    [
        (2, {1: [1], 2: [2], 3: [2, 1], 5: [2, 2, 1], 6: [2, 2, 2]}),
        (3, {1: [1], 3: [3], 4: [2, 2], 5: [3, 2], 7: [3, 2, 2], 8: [3, 3, 2], 10: [3, 3, 2, 2]}),
    ],
)
def test_steps_are_cut_into_few_runs_of_about_one_length(most, lengths):
    for steps, wanted in lengths.items():
        triples = tuple((float(i), 0.0, 0.0) for i in range(steps))
        runs = runs_of(triples, most)
        assert [len(run) for run in runs] == wanted
        assert sum(runs, ()) == triples


@pytest.mark.parametrize("method", ["standard", "gram", "auto"])
def test_singular_values_end_near_one(method):
    values = torch.linalg.svdvals(NewtonSchulz(PAPER, method)(matrix(96, 300)[None])[0].double())
    assert values.min() > 0.6
    assert values.max() < 1.25


@pytest.mark.parametrize(
    ("name", "low", "high"), [("simple", 0.67, 1.15), ("quintic", 0.97, 1.04), ("polar_express", 0.86, 1.13)]
)
def test_coefficient_sets_drive_singular_values_to_one(name, low, high):
    """Five steps of each set, on numbers: a wrong coefficient leaves the band."""
    values = torch.linspace(0.02, 1, 5000, dtype=torch.float64)
    for a, b, c in coefficients_for(5, name):
        values = a * values + b * values**3 + c * values**5
    assert low < values.min()
    assert values.max() < high


@pytest.mark.parametrize("multiply", [products.TORCH, products.WIDENED])
def test_products_are_exact_and_rounded_once(multiply):
    """Sums of products of small integers are exact in fp32, in any order; the results are not in bf16."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randint(-9, 10, (21, 40), generator=generator).bfloat16()
    half = torch.randint(-5, 6, (21, 21), generator=generator).bfloat16()
    r, wide = half + half.mT, x.double()
    exact = {
        "gram": (multiply.gram(x), wide @ wide.mT),
        "symmetric": (multiply.symmetric(r, r, r, 0.5, 0.25), 0.5 * r.double() + 0.25 * r.double() @ r.double()),
        "apply": (multiply.apply(r, x), r.double() @ wide),
        "apply and add": (multiply.apply(r, x, 0.5), 0.5 * wide + r.double() @ wide),
    }
    for name, (found, expected) in exact.items():
        assert torch.equal(found, expected.bfloat16()), name
        assert not torch.equal(found.double(), expected), name


def test_a_cpu_without_bf16_instructions_multiplies_in_fp32_but_for_torchs_bits(monkeypatch):
    taken = []
    monkeypatch.setattr(products.Widened, "gram", lambda self, x: (taken.append(x.dtype), products.TORCH.gram(x))[1])
    for native, method, expected in [(True, "auto", 0), (False, "auto", 5), (False, "gram", 3), (False, "standard", 0)]:
        monkeypatch.setattr(products, "_cpu_multiplies", lambda dtype, native=native: native)
        taken.clear()
        NewtonSchulz(PAPER, method)(matrix(24, 24)[None])
        assert len(taken) == expected, (native, method)


def test_a_torch_without_onednn_is_not_asked_what_it_multiplies(monkeypatch):
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    monkeypatch.setattr(products, "_cpu_multiplies", products._cpu_multiplies.__wrapped__)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", None)
    assert products.products_on(torch.device("cpu"), "bf16") is products.WIDENED


@pytest.mark.parametrize("native", [True, False])
def test_the_error_is_the_same_where_a_cpu_multiplies_bf16_in_fp32(monkeypatch, native):
    monkeypatch.setattr(products, "_cpu_multiplies", lambda dtype: native)
    for shape in ((96, 96), (96, 300)):
        x = matrix(*shape)
        assert error(NewtonSchulz(PAPER)(x[None].clone())[0], exact(x, PAPER)) < 0.02


def test_a_zero_matrix_stays_zero():
    assert not any(x.any() for x in NewtonSchulz(PAPER)(torch.zeros(2, 8, 16, dtype=torch.bfloat16)))


@pytest.mark.parametrize("steps", [1, 4, 5])
@pytest.mark.parametrize(("method", "dtype"), [*product(["standard", "gram", "auto"], ["bf16"]), ("auto", "fp16")])
@pytest.mark.parametrize("shape", [(64, 64), (64, 80), (64, 256), (300, 20)])
def test_flops_are_those_that_run(shape, method, dtype, steps):
    newton_schulz = NewtonSchulz(coefficients_for(steps, "quintic"), method, dtype=dtype)
    with FlopCounterMode(display=False) as counter:
        newton_schulz(torch.stack([matrix(*shape), matrix(*shape)]))
    assert counter.get_total_flops() == 2 * newton_schulz.flops(*shape)


def test_auto_takes_the_form_with_fewer_flops():
    for shape in [(64, 64), (64, 95), (64, 97), (64, 256), (300, 20)]:
        auto, standard, gram = (NewtonSchulz(PAPER[:4], m).flops(*shape) for m in ("auto", "standard", "gram"))
        assert auto == min(standard, gram)


def test_coefficients_repeat_the_last_triple():
    assert coefficients_for(3, [[1, 2, 3], [4, 5, 6]]) == ((1.0, 2.0, 3.0), (4.0, 5.0, 6.0), (4.0, 5.0, 6.0))
    assert len(coefficients_for(10, "polar_express")) == 10


@pytest.mark.parametrize(
    "bad", [[[1, 2, 3]] * 6, "fast", [1, 2], [], [[1, 2, 3], [1, 2]], [1.0, 2.0, float("nan")], 3, {"a": 1}]
)
def test_bad_coefficients_are_refused(bad):
    with pytest.raises(ValueError, match="ns_coefficients"):
        coefficients_for(5, bad)
