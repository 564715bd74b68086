"""Every model class of transformers, on the meta device: the routing against what its modelling code does."""

from __future__ import annotations

import os
import re

import pytest
from torch import nn

from muon_plugin.core.heads import UNKNOWN
from muon_plugin.core.places import places
from muon_plugin.core.routing import route
from tests.support import model_sweep

NAMES = model_sweep.classes() if os.environ.get("FULL") == "1" else model_sweep.COMMON


@pytest.mark.parametrize("part", range(8))
def test_weights_go_where_the_code_says(part):
    tried, wrong = 0, []
    for name in NAMES[part::8]:
        try:
            model = model_sweep.build(name)
        except Exception as error:  # its default config is incomplete, or a package is missing
            if name in model_sweep.COMMON:
                raise
            print(f"not built: {name}: {type(error).__name__}: {str(error)[:80]}")
            continue
        tried += 1
        wrong += [f"{name}: {line}" for line in [*deviations(model), *unknown_heads(model)]]
    assert tried, "no model could be built"
    print(f"{tried} classes, {len(wrong)} deviations")
    assert not wrong, "\n".join(wrong[:40])


#: One head in all, of convolutions; grouped convolutions, which are matrices by group; what goes through another
#: projection, that of torch's attention; and one that keeps no width.
NO_HEADS = re.compile(r"\w*(VQVAE|VisionTokenizer)\w*AttnBlock|(SqueezeBertSelf|AriaCross)Attention|EvollaSeq\w*")


def unknown_heads(model: nn.Module) -> list[str]:
    """Projections whose heads are not known, in attentions of which they should be."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    at, unknown = places(model, [*shapes]), route(shapes, model=model, per_head=True).not_by_head
    return [
        f"{type(at[name].block).__name__}: the heads of {name} are not known"
        for name, why in unknown.items()
        if why == UNKNOWN and not NO_HEADS.fullmatch(type(at[name].block).__name__)
    ]


def deviations(model: nn.Module) -> list[str]:
    """Where the routing differs from the modelling code."""
    shapes = {name: tuple(p.shape) for name, p in model.named_parameters()}
    routing, at = route(shapes, model=model), places(model, [*shapes])
    parts: dict[str, list] = {name: [] for name in shapes}
    for matrix in routing.matrices:
        parts[matrix.parameter].append(matrix)
    noted = [re.escape(note.split(" is kept whole")[0]).replace(r"\*", r"\d+") for note in routing.notes]
    named = {name for name in shapes if any(re.fullmatch(note, name) for note in noted)}
    assert len(noted) == len(set(noted)), "a note is repeated"
    found = []
    for name, shape in shapes.items():
        place = at[name]
        matrices, why, block = parts[name], routing.adamw.get(name), place.block
        if bool(matrices) == (why is not None):
            found.append(f"{name} is in {'both halves' if matrices else 'no half'}")
        elif matrices and sum(m.numel for m in matrices) != int(_numel(shape)):
            found.append(f"{name}: its matrices do not make it up")
        elif isinstance(place.layer, nn.Embedding) and why is None:
            found.append(f"{name} is an embedding")
        elif isinstance(getattr(block, "is_transposed", None), bool) and len(shape) == 3 and name not in named:
            found += _experts(name, shape, matrices, block)
        elif len(matrices) == (shape[0] if len(shape) == 3 else 1) and name not in named:
            code = model_sweep.split_by_code(type(block)).get(place.attribute)
            if code and getattr(block, "qk_rope_head_dim", 1):  # without a rotary part, nothing is split off
                found.append(f"{type(block).__name__}.{place.attribute} is whole, but the code has {code}")
    return found


def _numel(shape: tuple[int, ...]) -> int:
    size = 1
    for n in shape:
        size *= n
    return size


def _experts(name: str, shape: tuple[int, ...], matrices: list, block: nn.Module) -> list[str]:
    """transformers marks how its experts are stored."""
    gated = block.has_gate and "gate_up" in name
    outputs = shape[2] if block.is_transposed else shape[1]
    inputs = shape[1] if block.is_transposed else shape[2]
    expected = (outputs // 2 if gated else outputs, inputs)
    if "bias" in name or not matrices:
        return []
    wrong = {m.out_in for m in matrices} != {expected} or len(matrices) != shape[0] * (2 if gated else 1)
    turns = gated and matrices[0].where.run == 1
    if wrong or turns != (gated and not block.is_concatenated):
        return [f"{name} {list(shape)}: {len(matrices)} matrices of {matrices[0].out_in}, expected {expected}"]
    return []
