"""The core knows no engine, no watchdog and no command: it works where none of them can be imported, and names none."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import nn

from muon_plugin.core import adamw
from tests.support.ranks import ROOT

CORE = ROOT / "muon_plugin" / "core"
#: Words of engines, and of what is built around the core.
FOREIGN = re.compile(r"deepspeed|megatron|watchdog|(?<![a-z])moe(?![a-z])", re.IGNORECASE)
#: Imports every module of the core, then makes a step of Muon that must move every weight, with both halves.
ALONE = """
import importlib, pkgutil, sys

class Refuses:
    HERE = "muon_plugin."
    BELOW = ("deepspeed", "megatron", "watchdog", "planner", "preflight", "metrics")
    asked = []

    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("deepspeed", "megatron") or name.startswith(tuple(self.HERE + b for b in self.BELOW)):
            self.asked.append(name)
            raise ImportError(f"{name} is out of reach")

sys.meta_path.insert(0, Refuses())
import muon_plugin.core
modules = [module.name for module in pkgutil.iter_modules(muon_plugin.core.__path__, "muon_plugin.core.")]
for name in modules:
    importlib.import_module(name)
import torch
from muon_plugin.core.muon import Muon
model = torch.nn.ModuleDict({"embed": torch.nn.Embedding(5, 4), "up": torch.nn.Linear(4, 6)})
optimizer = Muon(model.named_parameters(), lr=0.1)
before = [p.detach().clone() for p in model.parameters()]
for p in model.parameters():
    p.grad = torch.ones_like(p)
optimizer.step()
try:
    Muon(model.named_parameters(), adamw="deepspeed")
    raise SystemExit("an engine's AdamW was taken without the engine")
except ValueError as error:
    told = str(error)
assert "adamw='deepspeed' is not valid; allowed: auto, apex, torch_fused, torch" in told, told
print(len(modules), [torch.equal(a, b) for a, b in zip(before, model.parameters())], Refuses.asked)
"""


def test_the_core_works_where_nothing_around_it_can_be_imported():
    ran = subprocess.run([sys.executable, "-c", ALONE], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert ran.returncode == 0, ran.stderr[-3000:]
    modules = [path for path in CORE.glob("*.py") if path.name != "__init__.py"]
    assert ran.stdout.strip() == f"{len(modules)} [False, False, False] []"


def words(source: str) -> Iterator[tuple[int, str]]:
    """(Line, text) of every string, name, attribute, argument, keyword and import in code. Docstrings are left out."""
    tree = ast.parse(source)
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    docstrings = {
        id(node.body[0].value)
        for node in ast.walk(tree)
        if isinstance(node, documented) and node.body and isinstance(node.body[0], ast.Expr)
    }
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        if isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docstrings:
            yield line, node.value
        for field in ("id", "attr", "arg", "name", "asname", "module"):
            if isinstance(text := getattr(node, field, None), str):
                yield line, text


@pytest.mark.parametrize("path", sorted(CORE.glob("*.py")), ids=lambda path: path.stem)
def test_no_code_of_the_core_names_what_is_around_it(path: Path):
    found = [f"{path.name}:{line}: {text}" for line, text in words(path.read_text()) if FOREIGN.search(text)]
    assert found == []


def test_such_a_name_would_be_found():
    source = (
        '"""On DeepSpeed."""\nimport megatron.core as m\ndef f(moe=1):\n    g.watchdog(key="has_moe", deepspeed=2)\n'
    )
    found = sorted(text for _, text in words(source) if FOREIGN.search(text))
    assert found == ["deepspeed", "has_moe", "megatron.core", "moe", "watchdog"]


class Counting(torch.optim.SGD):
    """An engine's AdamW, as far as the choice goes."""


def test_an_engine_offers_its_own_adamw(monkeypatch):
    monkeypatch.setattr(adamw, "_IMPLEMENTATIONS", dict(adamw._IMPLEMENTATIONS))
    known = adamw.implementations()
    for _ in range(2):  # twice is the same as once
        adamw.offer("engines_own", lambda groups: Counting(groups[0]["params"], lr=0.1), integer_steps=True)
    assert adamw.implementations() == ("auto", "engines_own", *known[1:])
    p = nn.Parameter(torch.zeros(3))
    groups = [{"params": [p], "lr": 0.1, "betas": (0.9, 0.95), "eps": 1e-8, "weight_decay": 0.0}]
    optimizer, name = adamw.build(groups, "engines_own")
    assert name == "engines_own (not bit-exact over layouts on CPU)"
    step = adamw.new_state(optimizer, p)["step"]
    assert (step, type(step)) == (0, int)
    assert adamw.build(groups, "auto")[1] == "torch"  # on CPU
    monkeypatch.setattr(adamw, "_is_cuda", lambda groups: True)
    assert adamw.build(groups, "auto")[1] == "engines_own"  # the first that is tried on CUDA
