"""What the source of a model class of transformers says about its weights, by a reading of its own.

The routing is compared with this. It follows values through the methods of each module class, further than the
package's own reading does: through several variables, linear functions of bare parameters, and slices.
"""

from __future__ import annotations

import ast
import functools
import importlib
from typing import Any

import torch
from torch import nn

from muon_plugin.core.modelling_code import definition_of
from tests.support.combinations import FULL

#: The kinds of models that are trained most, with the names that transformers gives their tables.
MAPPINGS = (
    "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES",
    "MODEL_FOR_SEQ_TO_SEQ_CAUSAL_LM_MAPPING_NAMES",
    "MODEL_FOR_MASKED_LM_MAPPING_NAMES",
)
#: Those that the default tests try: every layout of a fused projection, of experts and of heads in them.
COMMON = [
    "AriaForConditionalGeneration",
    "BambaForCausalLM",
    "BertForMaskedLM",
    "BloomForCausalLM",
    "CodeGenForCausalLM",
    "DbrxForCausalLM",
    "DebertaForMaskedLM",
    "DeepseekV3ForCausalLM",
    "DeepseekV4ForCausalLM",
    "FalconForCausalLM",
    "Glm4MoeForCausalLM",
    "GPT2LMHeadModel",
    "GPTBigCodeForCausalLM",
    "GPTNeoXForCausalLM",
    "GptOssForCausalLM",
    "GraniteMoeHybridForCausalLM",
    "JambaForCausalLM",
    "JetMoeForCausalLM",
    "Lfm2ForCausalLM",
    "Llama4ForCausalLM",
    "LlamaForCausalLM",
    "MambaForCausalLM",
    "MiniMaxForCausalLM",
    "ModernBertForMaskedLM",
    "MoshiForConditionalGeneration",
    "NemotronHForCausalLM",
    "OlmoeForCausalLM",
    "Phi3ForCausalLM",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen3MoeForCausalLM",
    "Qwen3NextForCausalLM",
    "RecurrentGemmaForCausalLM",
    "T5ForConditionalGeneration",
    "XLNetLMHeadModel",
    "ZambaForCausalLM",
]
_SAME = {"view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "to", "float", "unflatten"}
_SAME |= {"flatten", "type", "clone", "swapaxes"}
_SPLITS = {"split", "chunk", "unbind", "tensor_split", "split_with_sizes", "glu"}


def classes(mappings: tuple[str, ...] = MAPPINGS) -> list[str]:
    """The names of all model classes in these tables of transformers."""
    tables = importlib.import_module("transformers.models.auto.modeling_auto")
    found: dict[str, None] = {}
    for mapping in mappings:
        for names in getattr(tables, mapping).values():
            found |= dict.fromkeys([names] if isinstance(names, str) else names)
    return list(found)


def build(name: str) -> nn.Module:
    """The model with its default config, on the meta device; whatever that raises."""
    import transformers

    model_class = getattr(transformers, name)
    config = model_class.config_class(**({} if FULL else _FEWER.get(name, {})))
    for key, value in _NEEDED.get(name, {}).items():
        *parts, last = key.split(".")
        setattr(functools.reduce(getattr, parts, config), last, value)
    with torch.device("meta"):
        return model_class(config)


#: In the default tests: of what the default config has many alike.
_FEWER: dict[str, dict[str, Any]] = {
    "DeepseekV3ForCausalLM": {"num_hidden_layers": 6, "n_routed_experts": 32},
    "DeepseekV4ForCausalLM": {"num_hidden_layers": 8, "n_routed_experts": 32},
    "Glm4MoeForCausalLM": {"num_hidden_layers": 4, "n_routed_experts": 32},
    "Qwen3NextForCausalLM": {"num_hidden_layers": 8, "num_experts": 32},
}

#: What the default config lacks.
_NEEDED: dict[str, dict[str, Any]] = {
    "DbrxForCausalLM": {"attn_config.rope_theta": 10000.0},
    "MoshiForConditionalGeneration": {"audio_vocab_size": 2048},
    "ReformerModelWithLMHead": {"is_decoder": True},
    "EsmForMaskedLM": {"vocab_size": 33},
    "NemotronForCausalLM": {"num_key_value_heads": 8},
}


@functools.cache
def split_by_code(block: type) -> dict[str, str]:
    """Attribute of `block` -> the expression by which a method splits its output (or the product with it)."""
    definition = definition_of(block)
    found: dict[str, str] = {}
    for method in ast.walk(definition) if definition else ():
        if isinstance(method, ast.FunctionDef):
            _Reader(found).visit(method)
    return found


class _Reader(ast.NodeVisitor):
    """Follows the outputs of attributes through one method."""

    def __init__(self, found: dict[str, str]) -> None:
        self.found = found
        self.held: dict[str, set[str]] = {}

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            for name in target.elts if isinstance(target, ast.Tuple) else [target]:
                if isinstance(name, ast.Name):
                    self.held[name.id] = set() if isinstance(target, ast.Tuple) else self._of(node.value)

    def visit_Call(self, node: ast.Call) -> None:
        self.generic_visit(node)
        function = node.func
        if isinstance(function, ast.Attribute) and function.attr in _SPLITS:
            of_module = ast.unparse(function.value) in ("torch", "F", "nn.functional", "torch.nn.functional")
            arguments = node.args if of_module else [function.value, *node.args]
            dims = [word.value for word in node.keywords if word.arg == "dim"]
            if function.attr not in ("unbind", "glu"):
                dims += arguments[2:3]
                if not dims or ast.unparse(dims[0]) == "0":
                    return  # parts of the batch
            for attribute in self._of(arguments[0]):
                self.found.setdefault(attribute, ast.unparse(node)[:90])

    def visit_Subscript(self, node: ast.Subscript) -> None:
        self.generic_visit(node)
        index = node.slice.elts if isinstance(node.slice, ast.Tuple) else []
        slices = index and ast.unparse(index[0]) in ("...", "Ellipsis") and isinstance(index[-1], ast.Slice)
        if slices and "rotary" not in ast.unparse(node) and (index[-1].lower or index[-1].upper):
            for attribute in self._of(node.value):
                self.found.setdefault(attribute, ast.unparse(node)[:90])

    def _of(self, value: ast.expr | None) -> set[str]:
        """The attributes whose outputs the expression holds, in whatever shape."""
        if isinstance(value, ast.Name):
            return self.held.get(value.id, set())
        if isinstance(value, ast.IfExp):
            return self._of(value.body) | self._of(value.orelse)
        if isinstance(value, ast.BinOp):
            if isinstance(value.op, ast.MatMult):
                return _attributes(value)
            return self._of(value.left) | self._of(value.right)
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
            return set()
        function = value.func
        if ast.unparse(function.value) == "self":
            return {function.attr} if value.args else set()
        if function.attr in _SAME:
            return self._of(function.value)
        if function.attr in ("linear", "matmul", "bmm"):
            return set().union(*(_attributes(argument) for argument in value.args))
        return set()


def _attributes(value: ast.expr) -> set[str]:
    return {
        node.attr for node in ast.walk(value) if isinstance(node, ast.Attribute) and ast.unparse(node.value) == "self"
    }
