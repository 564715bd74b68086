"""What the trainable parameters of PEFT's adapters are, tuner by tuner (read in PEFT 0.21.2).

A parameter of an adapter is known by its attribute in the adapted layer: that of an adapter called ``lm_head`` or of an
adapted expert is what it is elsewhere.
"""

from __future__ import annotations

import math
import re
from typing import Any

from torch import nn

from .cutting import Rule, Stored
from .fused import known_rule
from .places import Place

#: Matrices (out, in): factors of low rank, of Kronecker and Hadamard products, singular vectors, small networks.
MATRICES = re.compile(
    r"lora_[AB]|hada_w[12]_[ab]|lokr_w[12](_[ab])?|hira_[AB]|delora_[AB]|deft_[PR]|glora_[ABC]|gralora_[AB]_general|lily_A"
    r"|peanut_\w+|adamss_[AB]|osf_svd_params|supertuning_lora_[AB]|psoft_R|shadow_(down|up|update_transform|update_gate)"
)
#: Matrices (in, out), or batches of them in the leading dimensions.
IN_OUT = re.compile(r"gralora_[AB]|poly_lora_[AB]|miss_block")
#: What has two or more dimensions, and is no matrix.
NO_MATRICES = {
    "oft_R": "packed skew-symmetric entries",
    "oft_embedding_R": "packed skew-symmetric entries",
    "boft_R": "generators of rotations",
    "hra_u": "normals of reflections",
    "randlora_lambda": "scales",
    "randlora_gamma": "scales",
    "c3a_kernel": "circulant blocks",
    "vblora_vector_bank": "a bank of vectors",
    "vblora_logits_A": "logits",
    "vblora_logits_B": "logits",
    "poly_router": "a router",
    "lily_router": "a router",
    "trainable_tokens_delta": "embedding",
    "hada_t1": "a core tensor",
    "hada_t2": "a core tensor",
    "lokr_t2": "a core tensor",
}


def adapter_stored(place: Place, shape: tuple[int, ...]) -> Stored | str:
    """How a parameter of an adapter stores matrices, or the reason why it stores none."""
    attribute, layer = place.attribute, place.layer
    if attribute in NO_MATRICES:
        return NO_MATRICES[attribute]
    if "embedding" in attribute:
        return "embedding"
    if IN_OUT.fullmatch(attribute):
        return Stored.of(shape, True)
    if attribute == "lily_B":  # as many (rank, out) below each other as the layers share
        several = _number(getattr(place.tuner, "num_B", 1))
        return Stored(several, shape[0] // several, shape[1], True)
    if attribute in ("lora_A", "lora_B") and type(layer).__name__ == "BlockDiagonalLinear":
        blocks = _number(getattr(layer, "nblocks", 1))
        return Stored(blocks, shape[0] // blocks, shape[1])
    if attribute == "lora_A" and _experts(place) > 1:  # of all experts, below each other
        return Stored(_experts(place), shape[0] // _experts(place), shape[1])
    if MATRICES.fullmatch(attribute):
        groups = layer.groups if isinstance(layer, nn.modules.conv._ConvNd) else 1
        return Stored(groups, shape[0] // groups, math.prod(shape[1:]))
    return f"{attribute} of an adapter that muon_plugin does not know"


def adapter_rule(place: Place, stored: Stored) -> Rule | None:
    """How the outputs of an adapter's matrix are cut: those of lora_B as the weight that it adapts.

    The adapters of fused experts are (out, rank x experts) in lora_B: the experts' columns take turns.
    """
    whole = Rule((stored.outputs,))
    if place.attribute != "lora_B" or stored.batch > 1 or place.adapted is None:
        return whole
    experts = _experts(place)
    of_weight = known_rule(place.adapted, Stored(1, stored.outputs, stored.inputs // experts))
    if experts > 1:
        simple = of_weight is not None and of_weight.groups == 1
        return Rule(of_weight.sizes if of_weight and simple else whole.sizes, interleaved=experts)
    return of_weight


def _experts(place: Place) -> int:
    """How many experts' adapters are stacked in one layer (PEFT's ``target_parameters``, issue #3009)."""
    return _number(getattr(place.tuner, "num_experts", 1))


def _number(value: Any) -> int:
    """A number, or the same number for each adapter."""
    return int(next(iter(value.values()), 1) if isinstance(value, dict) else value)
