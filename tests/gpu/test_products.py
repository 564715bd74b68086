"""Symmetric products by the libraries that are installed, on the device and with the batches of real runs."""

from __future__ import annotations

import warnings
from dataclasses import replace

import pytest
import torch

from muon_plugin.core import products
from muon_plugin.core.orthogonalize import _batch_is_exact
from muon_plugin.core.settings import Settings

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device here")

#: Batch, rows, cols: experts and dense layers.
BATCHES = [(32, 1024, 1024), (11, 2048, 1408), (64, 2048, 1408), (6, 2048, 8192), (2, 4096, 4096)]


@pytest.mark.parametrize("name", ["quack", "triton"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(256, 256), (1024, 1024), (1408, 2048), (2048, 8192), (4096, 4096)], ids=str)
def test_a_library_has_torchs_products_and_one_matrixs_bits_in_a_batch(name, dtype, shape):
    device = torch.device("cuda", torch.cuda.current_device())
    there = products.symmetric_on(device)
    if name not in dict(there.releases):
        pytest.skip(f"{name} is not installed, or not for compute capability {there.capability / 10}")
    assert products._trial(products._library(name), *shape, dtype, device) == ""


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
@pytest.mark.parametrize("batch", BATCHES, ids=str)
def test_batches_of_real_runs_are_taken_without_a_warning(batch, dtype):
    device = torch.device("cuda", torch.cuda.current_device())
    newton_schulz = replace(Settings().newton_schulz, method="gram", dtype=dtype).on(device)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert _batch_is_exact(newton_schulz, batch, device)


@pytest.mark.parametrize("shape", [(1024, 1024), (1408, 2048), (2048, 8192)], ids=str)
def test_the_iteration_is_as_exact_by_half_as_by_torch(shape):
    device = torch.device("cuda", torch.cuda.current_device())
    fp16 = replace(Settings().newton_schulz, dtype="fp16")
    x = torch.randn(1, *shape, generator=torch.Generator(device).manual_seed(0), device=device).bfloat16()
    exact = x[0].double() / x[0].double().norm()
    for a, b, c in fp16.coefficients:
        gram = exact @ exact.mT
        exact = a * exact + (b * gram + c * gram @ gram) @ exact
    by_half, whole = (replace(fp16, products=p)(x)[0].double() for p in (None, products.TORCH))
    errors = [float((found - exact).norm() / exact.norm()) for found in (by_half, whole)]
    assert errors[0] < max(1.2 * errors[1], 0.004), errors
