"""A coefficient set is one iteration alone, under DeepSpeed, under Megatron and in Emerging-Optimizers."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from muon_plugin import Muon
from muon_plugin.core.coefficients import COEFFICIENT_SETS, coefficients_for
from muon_plugin.core.orthogonalize import NewtonSchulz
from muon_plugin.core.settings import Settings
from muon_plugin.megatron.settings import Settings as MegatronSettings
from tests.support.jobs import environment
from tests.support.ranks import ROOT

STEPS = range(5, 11)
#: The folder in which `make test` installs the package whose sets Megatron uses.
EMERGING_OPTIMIZERS = ROOT / ".venv" / "megatron-core" / "emerging-optimizers-0.3.0"
#: Prints the triples that each of its sets takes in so many steps, by running its iteration on a small matrix.
THEIRS = """
import json, typing
import torch, typing_extensions
if not hasattr(typing, "override"):  # it is written for Python 3.12
    typing.override = typing_extensions.override
from emerging_optimizers.orthogonalized_optimizers import muon_utils
seen = []
def step(x, a, b, c, **_):
    seen.append((a, b, c))
    return x
muon_utils.newton_schulz_step = step
found = {}
for name in muon_utils._COEFFICIENT_SETS:
    for steps in range(1, 21):
        seen.clear()
        muon_utils.newton_schulz(torch.ones(2, 3), steps, name)
        found[f"{name} {steps}"] = list(seen)
print("triples:", json.dumps(found))
"""


def megatron_config(name: str, steps: int) -> Any:
    return SimpleNamespace(
        muon_momentum=0.9,
        muon_num_ns_steps=steps,
        muon_coefficient_type=name,
        muon_scale_mode="spectral",
        muon_extra_scale_factor=1.0,
        muon_split_qkv=True,
    )


def from_megatron(name: str, steps: int) -> Any:
    return MegatronSettings.from_config(megatron_config(name, steps)).newton_schulz.coefficients


@pytest.mark.parametrize("steps", STEPS)
@pytest.mark.parametrize("name", COEFFICIENT_SETS)
def test_a_set_is_the_same_iteration_under_both_engines(name, steps):
    ours = Settings.from_dict({"ns_steps": steps, "ns_coefficients": name}).newton_schulz.coefficients
    assert len(ours) == steps
    assert from_megatron(name, steps) == ours


@pytest.mark.parametrize(
    ("name", "steps", "last"),
    [
        ("simple", 7, (3.4445, -4.7750, 2.0315)),
        ("aol", 5, (4.0098, -7.0585, 2.4635)),
        ("aol", 8, (2.7215, -3.0494, 1.3169)),
        ("quintic", 6, (4.0848, -6.8946, 2.9270)),
        ("quintic", 10, (2.8366, -3.0525, 1.2012)),
        ("polar_express", 9, (1.8750, -1.2500, 0.3750)),
        ("cans", 6, (2.2737, -1.6447, 0.4162)),
        ("deepseekv4", 11, (2.0, -1.5, 0.5)),
    ],
)
def test_a_set_starts_over_or_repeats_its_last_triple(name, steps, last):
    assert coefficients_for(steps, name)[-1] == last


@pytest.mark.parametrize(("name", "steps"), [("aol", 4), ("quintic", 5)])
def test_auto_takes_the_standard_form_once_a_set_starts_over(name, steps):
    """The step that starts over magnifies errors: see test_orthogonalize's comparison with float64 for "aol"."""
    forms = [NewtonSchulz(coefficients_for(n, name)) for n in (steps, steps + 1)]
    standard = [NewtonSchulz(form.coefficients, "standard") for form in forms]
    assert forms[0].flops(64, 256) < standard[0].flops(64, 256)
    assert forms[1].flops(64, 256) == standard[1].flops(64, 256)


def test_a_users_own_triples_repeat_the_last():
    own = [list(triple) for triple in coefficients_for(4, "aol")]
    assert coefficients_for(6, own)[3:] == (tuple(own[-1]),) * 3


def test_the_sets_are_those_of_emerging_optimizers():
    """All of its sets, for 1 to 20 steps."""
    if not EMERGING_OPTIMIZERS.is_dir() and not os.environ.get("REQUIRE_RELEASES"):
        pytest.skip(f"{EMERGING_OPTIMIZERS} is not there (make test installs it)")
    command = [sys.executable, "-c", THEIRS]
    ran = subprocess.run(command, env=environment(EMERGING_OPTIMIZERS), capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-2000:]
    theirs = json.loads(ran.stdout.partition("triples: ")[2])
    assert {key.split()[0] for key in theirs} == set(COEFFICIENT_SETS)
    ours = {f"{name} {steps}": coefficients_for(steps, name) for name in COEFFICIENT_SETS for steps in range(1, 21)}
    assert ours == {key: tuple(map(tuple, triples)) for key, triples in theirs.items()}


@pytest.mark.parametrize(
    ("name", "steps", "reaches"),
    [
        ("simple", 5, None),
        ("quintic", 5, None),
        ("polar_express", 5, None),
        ("cans", 5, None),
        ("deepseekv4", 10, None),
        ("quintic", 6, (0.06, 0.16)),
        ("aol", 5, (-1.20, 1.21)),
        (((1.5, -0.5, 0.0),), 2, (0.22, 1.00)),  # Newton-Schulz' own cubic, too few steps of it
    ],
)
def test_what_leaves_singular_values_far_from_1_is_noted_before_the_first_step(name, steps, reaches):
    settings = Settings.from_dict({"ns_steps": steps, "ns_coefficients": name})
    assert len(settings.notes) == (reaches is not None)
    if reaches is None:
        return
    low, high = (float(value) for value in re.search(r"to (-?\d.\d\d) to (\d.\d\d), not", settings.notes[0]).groups())
    assert (low, high) == pytest.approx(reaches, abs=0.011)
    model = torch.nn.Linear(4, 4)
    table = Muon(model.named_parameters(), ns_steps=steps, ns_coefficients=name).summary()
    assert f"note: {settings.notes[0]}" in table
    assert ("the update is reversed" in table) == (low < 0)
    if isinstance(name, str):
        assert MegatronSettings.from_config(megatron_config(name, steps)).notes == settings.notes
