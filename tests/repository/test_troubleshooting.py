"""docs/troubleshooting.md has the errors and warnings of the package, and no others.

The source is parsed, not imported. Of each message the page has the longest part without placeholders of what is wrong;
what is allowed instead, or to be done, need not be there.
"""

from __future__ import annotations

import ast
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cache

from tests.support import ROOT

#: Stands for a value that is known when the program runs.
VALUE = "…"
RAISED = {
    *("ValueError", "RuntimeError", "TypeError", "ImportError", "UnpicklingError"),
    *("ArgumentTypeError", "SystemExit", "Stop"),
}
#: Functions that are called with a message.
TOLD = {"warn", "warning", "_warn", "say", "_end"}
#: What `core.checks.refuse` says; docs/refused.md and docs/refused-megatron.md have the settings.
REFUSED = " is not supported by muon_plugin's Muon"
#: Where the words for what is allowed, or the advice, begin.
ADVICE = re.compile(r"; (?:allowed|supported)\b|\. |\n")
#: What is raised or told with the words of another message.
PASSED_ON = {
    "RuntimeError(error)": "what `FirstStep._first_left_out` has found, which the page has",
    "SystemExit(f'muon_plugin: {error}')": "a ValueError of the converter",
    "SystemExit(f'error: {error}')": "a ValueError of the metrics",
    "ValueError(done.stderr.strip().splitlines()[-1].removeprefix('planner: '))": "a ValueError of the planner",
    "ValueError(complaint.getvalue().strip().rpartition('error: ')[2])": "what Megatron's own parser says",
    "RuntimeError(f'{rounds.step}: {str(error).partition(chr(10))[0]}')": "the communication that failed, and why",
    "warnings.warn(f'muon_plugin: {text}', stacklevel=2)": "what `_warn` is called with",
}
#: What no user meets.
INTERNAL = {
    "unreachable: torch's AdamW can always be built": "as it says",
    "this rank holds more than the planned calls say": "`startup` counts a start for the tests and the benchmarks",
    "this rank holds other parts than the planned calls say": "the same",
    "torch.distributed runs here": "`report` and the command plan in a process of their own then",
    "equal parts: TP cannot cut it": "every caller has checked that they divide the dimension",
    "bytes of shared memory for a program": "the warning about symmetric products holds it",
}


@dataclass(frozen=True)
class Message:
    """What a user may read.

    Attributes:
        at: file and line.
        text: with VALUE for what is not constant.
        part: what the page has to have of it.
    """

    at: str
    text: str
    part: str


def one_line(text: str) -> str:
    return re.sub(rf"{VALUE}+", VALUE, re.sub(r"\s+", " ", text))


def constants(text: str) -> list[str]:
    """What is between the values, without punctuation at its ends."""
    return [part.strip(" ,;:.()") for part in text.split(VALUE)]


def longest(*texts: str) -> str:
    return max((part for text in texts for part in constants(text)), key=len)


def rendered(node: ast.expr, names: Mapping[str, ast.expr]) -> str:
    """An expression as a text; `names` are those of which it is known what they stand for."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        return node.value
    if isinstance(node, ast.JoinedStr):
        return "".join(rendered(value, names) for value in node.values)
    if isinstance(node, ast.FormattedValue) and node.conversion == -1 and node.format_spec is None:
        return rendered(node.value, names)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return rendered(node.left, names) + rendered(node.right, names)
    if isinstance(node, ast.Name) and node.id in names:
        return rendered(names[node.id], {name: value for name, value in names.items() if name != node.id})
    return VALUE


def assigned(nodes: Iterable[ast.AST]) -> Iterator[tuple[str, ast.expr]]:
    """(Name, value) of the assignments among these."""
    for node in nodes:
        if not (isinstance(node, ast.Assign) and len(node.targets) == 1):
            continue
        target, value = node.targets[0], node.value
        several = isinstance(target, ast.Tuple) and isinstance(value, ast.Tuple)
        pairs = zip(target.elts, value.elts) if several else [(target, value)]
        yield from ((name.id, to) for name, to in pairs if isinstance(name, ast.Name))


def inside(function: ast.AST, names: Mapping[str, ast.expr]) -> dict[str, ast.expr]:
    """What is known in a function, where this is known around it: names that are assigned once."""
    nodes = list(ast.walk(function))
    stored = Counter(node.id for node in nodes if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))
    own = {node.arg for node in nodes if isinstance(node, ast.arg)} | set(stored)
    outer = {name: value for name, value in names.items() if name not in own}
    return outer | {name: value for name, value in assigned(nodes) if stored[name] == 1}


def nodes_of(tree: ast.AST, names: Mapping[str, ast.expr]) -> Iterator[tuple[ast.AST, Mapping[str, ast.expr]]]:
    """Every node, with what is known where it is. Docstrings are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            continue
        known = inside(node, names) if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)) else names
        yield node, known
        yield from nodes_of(node, known)


@cache
def source() -> Sequence[tuple[str, ast.AST, Mapping[str, ast.expr]]]:
    """(File, node, what is known there), of the whole package."""
    found = []
    for path in sorted((ROOT / "muon_plugin").rglob("*.py")):
        tree = ast.parse(path.read_text())
        found += [(str(path.relative_to(ROOT)), *of) for of in nodes_of(tree, dict(assigned(tree.body)))]
    return found


def name_of(node: ast.expr) -> str:
    """The last part of a dotted name."""
    return getattr(node, "attr", getattr(node, "id", ""))


def told_by(node: ast.AST) -> ast.Call | None:
    """The call whose first argument is a message, if this node raises or tells one."""
    if isinstance(node, ast.Raise):
        made = node.exc
        return made if isinstance(made, ast.Call) and name_of(made.func) in RAISED else None
    if not isinstance(node, ast.Call):
        return None
    problem = name_of(node.func) == "append" and name_of(getattr(node.func, "value", node)) == "problems"
    return node if problem or name_of(node.func) in TOLD else None


def texts_of(node: ast.AST, names: Mapping[str, ast.expr]) -> tuple[str, str] | None:
    """(The message, the longest constant part of what is wrong) of a node that has one."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):  # `core.checks`, `core.agreement`
        arguments = [one_line(rendered(argument, names)) for argument in node.args]
        if node.func.id == "Refusal":
            setting, _, _, advice = arguments
            text = f"{setting}={VALUE}{REFUSED}; supported: {advice}"
            return text, longest(setting, advice)
        if node.func.id in ("agree", "alike") and len(arguments) > 2:
            what, _, advice, *_ = arguments
            return f"the ranks disagree about {what}: {VALUE}. {advice}", longest(f"the ranks disagree about {what}")
    made = told_by(node)
    if made is None or not made.args or isinstance(getattr(made.args[0], "value", None), int):  # an exit code
        return None
    if ast.unparse(made) in PASSED_ON:
        return None
    text = rendered(made.args[0], names)
    wrong = one_line(ADVICE.split(text)[0])
    return one_line(text), longest(wrong) if len(longest(wrong)) > 2 else longest(one_line(text))


def messages() -> Iterator[Message]:
    for file, node, names in source():
        found = texts_of(node, names)
        if found is not None:
            yield Message(f"{file}:{getattr(node, 'lineno', 0)}", *found)


def entries() -> list[str]:
    """The page's messages: what is in backquotes in the first column of a table of messages."""
    found, within = [], False
    for line in (ROOT / "docs" / "troubleshooting.md").read_text().splitlines():
        first = line.split("|")[1].strip() if line.startswith("|") else ""
        within = first == "message" or (within and bool(first))
        found += re.findall(r"`([^`]+)`", first) if within else []
    return found


def has(text: str, entry: str) -> bool:
    """Whether an entry's words are in a message, in their order."""
    begin = 0
    for part in (part.strip() for part in entry.split(VALUE)):
        begin = text.find(part, begin) + len(part)
        if begin < len(part):
            return False
    return True


def test_every_message_is_on_the_page():
    known = entries()
    refused = one_line("".join((ROOT / "docs" / f"refused{of}.md").read_text() for of in ("", "-megatron")))

    def is_there(message: Message) -> bool:
        if not message.part:
            return False
        if message.part in INTERNAL or (REFUSED in message.text and message.part in refused):
            return True
        return any(message.part in entry and has(message.text, entry) for entry in known)

    lacking = [f"{m.at}: docs/troubleshooting.md lacks `{m.part}`" for m in messages() if not is_there(m)]
    assert not lacking, "\n" + "\n".join(lacking)


def test_every_entry_is_in_the_code():
    texts = {message.text for message in messages()}
    texts |= {one_line(rendered(node, names)) for _, node, names in source() if isinstance(node, ast.expr)}
    stale = [entry for entry in entries() if not any(has(text, entry) for text in texts)]
    assert not stale, "docs/troubleshooting.md has what the code does not say:\n" + "\n".join(stale)


def test_no_entry_is_there_twice():
    assert [entry for entry, count in Counter(entries()).items() if count > 1] == []


def test_the_exceptions_of_this_test_are_in_the_code():
    nodes = [node for _, node, _ in source()]
    calls = {ast.unparse(made) for node in nodes if (made := told_by(node)) is not None}
    assert set(PASSED_ON) <= calls
    assert set(INTERNAL) <= {message.part for message in messages()}


def test_a_message_without_an_entry_is_found():
    """Of a message in several pieces, with values, a name that is assigned once, and advice."""
    code = 'def f(a):\n    told = f"{a!r} is out " f"of reach"\n    raise ValueError(told + f": {a}; allowed: less")'
    tree = ast.parse(code)
    (found,) = filter(None, (texts_of(node, names) for node, names in nodes_of(tree, {})))
    assert found == ("… is out of reach: …; allowed: less", "is out of reach")
    assert has(found[0], "… is out of …: …; allowed: …")
    assert not has(found[0], "allowed: … is out of reach")
