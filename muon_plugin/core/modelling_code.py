"""Which projections the code of a model splits: a sign that they are fused, where their layout is not known."""

from __future__ import annotations

import ast
import inspect
import sys
from functools import cache, lru_cache
from typing import Any

#: What leaves the outputs of a projection as they are, in another shape.
RESHAPES = {"view", "reshape", "transpose", "permute", "contiguous", "unsqueeze", "squeeze", "to", "float", "unflatten"}
SPLITS = {"split", "chunk", "unbind", "tensor_split", "split_with_sizes", "glu"}


@cache
def split_in(block: type) -> frozenset[str]:
    """The attributes whose outputs the methods of the class split along a dimension other than the first.

    A reading of the source, which finds what is written in one expression or passed on by one variable: what it does
    not find may be split all the same. Empty where there is no source.
    """
    definition = definition_of(block)
    found: set[str] = set()
    for method in ast.walk(definition) if definition else ():
        if isinstance(method, ast.FunctionDef):
            found |= _split_in(method)
    return frozenset(found)


def definition_of(block: type) -> ast.ClassDef | None:
    """The class statement of the class; None where there is no source."""
    return _definitions(block.__module__).get(block.__qualname__)


@lru_cache(maxsize=8)  # a model has its blocks in few modules, of thousands of lines
def _definitions(module: str) -> dict[str, ast.ClassDef]:
    """The last class statement of each qualified name. (`inspect.getsource` parses the whole module for each class.)"""
    try:
        tree = ast.parse(inspect.getsource(sys.modules[module]))
    except (KeyError, OSError, TypeError, SyntaxError):
        return {}
    found: dict[str, ast.ClassDef] = {}
    scopes: list[tuple[str, ast.AST]] = [("", tree)]
    for prefix, scope in scopes:
        for node in ast.iter_child_nodes(scope):
            within = prefix
            if isinstance(node, ast.ClassDef):
                found[prefix + node.name] = node
                within = f"{prefix}{node.name}."
            elif isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
                within = f"{prefix}{node.name}.<locals>."
            scopes.append((within, node))
    return found


def _split_in(method: ast.FunctionDef) -> set[str]:
    found: set[str] = set()
    held: dict[str, str] = {}  # variable -> the attribute whose output it holds
    calls_by_line = sorted(
        (node for node in ast.walk(method) if isinstance(node, (ast.Assign, ast.Call))),
        # in the order of the lines; in one line, what is split before what is assigned
        key=lambda node: (node.lineno, isinstance(node, ast.Assign)),
    )
    for node in calls_by_line:
        if isinstance(node, ast.Call):
            split = _split(node)
            attribute = _output_of(split, held) if split is not None else None
            if attribute:
                found.add(attribute)
        elif len(node.targets) == 1 and isinstance(node.targets[0], ast.Name):
            attribute = _output_of(node.value, held)
            held[node.targets[0].id] = attribute or ""
    return found


def _split(call: ast.Call) -> ast.expr | None:
    """What a call splits; None for other calls, and for splits of the first dimension (batches)."""
    function = call.func
    if not isinstance(function, ast.Attribute) or function.attr not in SPLITS:
        return None
    of_module = isinstance(function.value, ast.Name) and function.value.id in ("torch", "F")
    of_module = of_module or ast.unparse(function.value) == "nn.functional"
    arguments = call.args if of_module else [function.value, *call.args]
    position = 1 if function.attr in ("unbind", "glu") else 2
    given = [word.value for word in call.keywords if word.arg == "dim"] or arguments[position : position + 1]
    last_by_default = function.attr == "glu"
    first = not last_by_default if not given else ast.unparse(given[0]) == "0" and function.attr != "unbind"
    return arguments[0] if arguments and not first else None


def _output_of(value: Any, held: dict[str, str]) -> str | None:
    """The attribute of self whose output the expression is, possibly in another shape."""
    while True:
        if isinstance(value, ast.Name):
            return held.get(value.id) or None
        if not isinstance(value, ast.Call) or not isinstance(value.func, ast.Attribute):
            return None
        of = value.func
        if isinstance(of.value, ast.Name) and of.value.id == "self":
            return of.attr if value.args else None
        if of.attr not in RESHAPES:
            return None
        value = of.value
