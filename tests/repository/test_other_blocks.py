"""Every JSON block of the documentation starts an engine, every command is one that its program accepts.

Blocks of commands are run by bash with stand-ins for the programs, which write down how they were called; then each
program's own parser reads that. A block with another program, flag or language fails. What a page shows of an output,
a formula or a message is listed in `SHOWN`.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from muon_plugin.core.settings import Settings
from muon_plugin.watchdog import limits
from tests.support import ROOT
from tests.support.blocks import Block, blocks, of_page
from tests.support.ranks import Ranks

REPOSITORY = "https://github.com/muon-plugin/muon_plugin"
#: Blocks of text and what they show; none of them is code.
SHOWN = {
    "docs/checkpoints.md": ["message", "message", "message", "Megatron's message", "message"],
    "docs/clients.md": ["message"],
    "docs/design.md": ["data flow", "folders"],
    "docs/getting-started.md": ["start-up table"],
    "docs/migration.md": ["formula", "formula", "JSON with words in the place of numbers"],
    "docs/moe.md": ["start-up table"],
    "docs/planner.md": ["the planner's table", "the planner's table", "the planner's table"],
    "docs/preflight.md": ["the preflight's lines"],
    "docs/watching.md": ["log line", "message"],
}


def test_every_language_has_a_test():
    """Python's is test_python_blocks.py."""
    assert {block.language for block in blocks()} == {"python", "json", "bash", "yaml", "text"}
    assert Counter(block.page for block in blocks("text")) == {page: len(shown) for page, shown in SHOWN.items()}


def test_fenced_and_indented_blocks_are_found():
    page = "\n".join(
        (
            *("    {}", "", "Text:", "", "    pip install", "", "    more", "", "- item", "", "    of the item", ""),
            *('=== "Tab"', "", "    of the tab", "", "    ```json", "    [", "      1]", "    ```"),
        )
    )
    found = [(block.line, block.language, block.text) for block in of_page("page.md", f"\n{page}")]
    assert found == [(2, "json", "{}"), (6, "bash", "pip install\n\nmore"), (19, "json", "[\n  1]")]


# JSON and YAML.

#: What Hugging Face fills in.
AUTO = {"lr": 0.01, "weight_decay": 0.1}


@pytest.mark.parametrize("block", blocks("json"), ids=str)
def test_json(ranks, tmp_path, block):
    """Parts of a DeepSpeed JSON: DeepSpeed and the plugin take them."""
    if block.text.startswith("{"):  # names and shapes, with which `test_commands` calls the planner
        assert block.page == "docs/planner.md"
        return
    part = json.loads(f"{{{block.text}}}")
    params = part.get("optimizer", {"params": {}})["params"]
    params |= {key: AUTO[key] for key, value in params.items() if value == "auto"}
    Settings.from_dict(params)
    experts = part.pop("expert_parallel", None)
    if experts is not None:
        from deepspeed.module_inject import auto_ep_config

        config = auto_ep_config.parse_autoep_config(experts)
        assert vars(config).keys() >= experts.keys()
        auto_ep_config.validate_autoep_config(config, experts["autoep_size"], 1, 1, 1)
    processes = Ranks(1, clients=True)  # as those of test_python_blocks.py
    try:
        processes.run(starts, part, tmp_path)
    finally:
        processes.close()


def starts(rank: int, part: dict[str, Any], folder: Path) -> None:
    from tests.support.integers import build, config, train

    os.chdir(folder)
    engine = build(rank, config(2) | part)
    train(engine, rank, 1)
    engine.destroy()


def test_yaml():
    """LLaMA-Factory's; clients/test_scripts.py trains with such a file."""
    import yaml
    from transformers import TrainingArguments

    (block,) = blocks("yaml")
    given = yaml.safe_load(block.text)
    assert set(given) - set(TrainingArguments.__dataclass_fields__) == {"stage", "finetuning_type"}
    assert isinstance(given["learning_rate"], float)


# Commands.


@dataclass(frozen=True)
class Call:
    """How a block called a program: by name, with the value of MUON_WATCHDOG, in a folder, with these arguments."""

    program: str
    watchdog: str
    folder: str
    arguments: list[str]


#: Writes the call down. Programs that start another one start it.
STAND_IN = """#!/bin/bash
printf '%s\\0' "${0##*/}" "${MUON_WATCHDOG-}" "$PWD" "$@" >> "$CALLS"
printf '\\036' >> "$CALLS"
case ${0##*/} in srun) exec "$@";; esac
"""
#: What the documentation takes for granted.
VARIABLES = {"MASTER_ADDR": "n1", "MASTER_PORT": "29500", "OUTPUT": "runs/out", "HOME": "/home/user"}
#: Programs of the system that launch scripts use.
REAL = ("bash", "basename", "dirname", "env")


def calls_of(block: Block, folder: Path) -> list[Call]:
    """The calls of the programs in a block, which bash runs in a folder like a clone of this repository."""
    for name in ("benchmarks", "configs", "examples", "muon_plugin", "tests"):
        (folder / name).symlink_to(ROOT / name)
    programs = folder / "programs"
    programs.mkdir()
    for name in REAL:
        (programs / name).symlink_to(shutil.which(name) or "")
    for name in PROGRAMS:
        (programs / name).write_text(STAND_IN)
        (programs / name).chmod(0o755)
    (folder / ".venv").mkdir()
    (folder / ".venv" / "bin").symlink_to(programs)
    record = folder / "calls"
    record.touch()
    variables = VARIABLES | {"PATH": str(programs), "CALLS": str(record)}
    text = block.text.replace("=...", "=VALUE")  # of a variable; as an argument, "..." stands for any number of them
    command = ["bash", "-euo", "pipefail", "-c", text]
    ran = subprocess.run(command, cwd=folder, env=variables, capture_output=True, text=True)
    assert ran.returncode == 0, f"{block}: {ran.stderr}"
    found = []
    for line in record.read_text().split("\036")[:-1]:
        program, watchdog, at, *arguments = line.split("\0")[:-1]
        found.append(Call(program, watchdog, at, [argument for argument in arguments if argument != "..."]))
    assert found, f"{block}: nothing is called"
    return found


@pytest.mark.parametrize("block", blocks("bash"), ids=str)
def test_commands(tmp_path, block):
    calls = calls_of(block, tmp_path)
    for call in calls:
        if call.watchdog:
            limits(call.watchdog)
    megatrons = re.compile(r".*pretrain_gpt\.py|--|--megatron|.*megatron\.sbatch")
    of_megatron = any(megatrons.fullmatch(argument) for call in calls for argument in call.arguments)
    processes = Ranks(1, megatron="0.19.2" if of_megatron else None, group=False, clients=not of_megatron)
    try:
        processes.run(read_all, calls, tmp_path)
    finally:
        processes.close()


def read_all(rank: int, calls: list[Call], folder: Path) -> None:
    prepare(folder)
    read(calls)


def read(calls: list[Call]) -> None:
    """Every call, by its program's own parser."""
    for call in calls:
        os.chdir(call.folder)
        try:
            PROGRAMS[call.program](call.arguments)
        except SystemExit as end:
            if end.code:
                raise AssertionError(f"{call}: ended with {end.code}") from end
        except (AssertionError, ValueError, KeyError) as error:
            raise AssertionError(f"{call}: {error!r}") from error


def prepare(folder: Path) -> None:
    """The files that commands of the pages read."""
    llama = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 64, "hidden_size": 32}
    llama |= {"intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4}
    for name in ("CONFIG", "CONFIG_FOLDER", "llama"):
        (folder / name).mkdir()
        (folder / name / "config.json").write_text(json.dumps(llama))
    shutil.copy(ROOT / "configs" / "deepspeed_zero2_bf16.json", folder / "ds.json")
    (shapes,) = (block for block in blocks("json") if block.page == "docs/planner.md")
    (folder / "shapes.json").write_text(shapes.text)


def torchrun(arguments: list[str]) -> None:
    from torch.distributed.run import get_args_parser

    own = get_args_parser().parse_args(arguments)
    if own.module:
        module(own.training_script, own.training_script_args)
    else:
        assert own.training_script == "train.py"


def deepspeed(arguments: list[str]) -> None:
    from deepspeed.launcher.runner import parse_args

    own = parse_args(arguments)
    assert own.module
    module(own.user_script, own.user_args)


def accelerate(arguments: list[str]) -> None:
    from accelerate.commands.launch import launch_command_parser

    assert arguments.pop(0) == "launch"
    own = launch_command_parser().parse_args(arguments)
    assert own.module
    assert own.use_deepspeed
    module(own.training_script, own.training_script_args)


def python(arguments: list[str]) -> None:
    arguments = [a for a in arguments if a not in ("-u", "-W", "ignore")]
    if arguments[0] == "-m":
        module(arguments[1], arguments[2:])
    elif SCRIPTS.get(arguments[0]) is None:
        assert arguments[0] in SCRIPTS
        assert (ROOT / arguments[0]).exists()
    else:
        parsed_by(arguments[0], arguments[1:])


#: Scripts of the repository with a parser of their own, or None: without arguments that could be wrong.
SCRIPTS: dict[str, str | None] = {
    "benchmarks/gpu.py": "parse_args",
    "examples/paper/run.py": "parse_args",
    "examples/llama/train.py": "parse_args",
    "examples/megatron/train.py": "parse_args",
    "examples/llama/data.py": None,
    "tests/support/slurm_cluster.py": None,
}


def parsed_by(script: str, arguments: list[str]) -> None:
    import importlib.util

    sys.path.insert(0, str((ROOT / script).parent))
    spec = importlib.util.spec_from_file_location("script", ROOT / script)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)
    sys.modules["script"] = loaded
    spec.loader.exec_module(loaded)
    sys.argv = [script, *arguments]
    getattr(loaded, SCRIPTS[script] or "")()


def module(name: str, arguments: list[str]) -> None:
    MODULES[name](arguments)


def plugin(arguments: list[str]) -> None:
    """What ``python -m muon_plugin`` starts: a script of the user's."""
    first, *rest = arguments
    if first == "-m":
        assert rest[0] in ("package.train", "llamafactory.launcher")
    elif Path(first).name == "pretrain_gpt.py":
        megatron(rest)
    else:
        from deepspeed import add_config_arguments

        assert first == "train.py"
        parser = add_config_arguments(argparse.ArgumentParser(allow_abbrev=False))
        parser.add_argument("--config")
        parser.parse_args(rest)


def megatron(arguments: list[str]) -> None:
    from megatron.training.arguments import add_megatron_arguments

    from muon_plugin.megatron.arguments import add_arguments

    parser = add_arguments(add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False)))
    parser.parse_args(arguments)


def planner(arguments: list[str]) -> None:
    """Makes the plan, but for Megatron's arguments (megatron/test_launch.py plans the launch scripts)."""
    from muon_plugin.command_line import split_at_dashes
    from muon_plugin.planner import command
    from muon_plugin.planner.models import megatron_arguments

    if "[OPTIONS]" in arguments:  # the synopsis
        filled = {"N": ["8"], "MODEL": ["--hf", "CONFIG"], "[OPTIONS]": []}
        arguments = [part for argument in arguments for part in filled.get(argument, [argument])]
    mine, rest = split_at_dashes(arguments)
    own = command._parser().parse_args(mine)
    if own.megatron or "--" in arguments:
        megatron(megatron_arguments(str(ROOT / own.megatron)) if own.megatron else rest)
    else:
        assert command.printed(command.run(arguments)).startswith("muon_plugin planner")


def preflight(arguments: list[str]) -> None:
    from muon_plugin.command_line import split_at_dashes
    from muon_plugin.preflight.__main__ import _parser

    mine, rest = split_at_dashes(arguments)
    _parser().parse_args(mine)
    if rest:
        planner([*rest, "--nodes", "2", "--gpus-per-node", "8"])


def metrics(arguments: list[str]) -> None:
    from muon_plugin.metrics.__main__ import parse_args

    parse_args([argument for argument in arguments if argument not in ("[CHECKPOINT", "...]")])


def convert(arguments: list[str]) -> None:
    from deepspeed.checkpoint.ds_to_universal import parse_arguments

    sys.argv = ["convert", *arguments]
    parse_arguments()


def pip(arguments: list[str]) -> None:
    """Not run: it downloads. Extras and files of requirements are there."""
    project = (ROOT / "pyproject.toml").read_text()
    assert arguments[0] in ("install", "download", "wheel")
    for argument in arguments:
        if extra := re.search(r"\[(\w+)\]$", argument):
            assert re.search(rf"^{extra[1]} = \[", project, re.MULTILINE), argument
        if argument.endswith(".txt"):
            assert (ROOT / argument).exists()


def git(arguments: list[str]) -> None:
    """Not run: it downloads."""
    assert arguments == ["clone", REPOSITORY]


def make(arguments: list[str]) -> None:
    """Not run: gpu/test_parts.py and paper/test_paper.py run what these targets do."""
    makefile = (ROOT / "Makefile").read_text()
    for argument in arguments:
        name, given, _ = argument.partition("=")
        assert f"$({name})" in makefile if given else re.search(rf"^{name}:", makefile, re.MULTILINE), argument


def sbatch(arguments: list[str]) -> None:
    """Not run: it needs Slurm. cluster/test_slurm.py submits these scripts; their arguments are those of a train.py."""
    script = next(a for a in arguments if a.endswith(".sbatch"))
    assert (ROOT / script).exists()
    engine = "megatron" if "megatron" in script else "llama"
    parsed_by(f"examples/{engine}/train.py", arguments[arguments.index(script) + 1 :])


def not_run(arguments: list[str]) -> None:
    """It needs root (sudo), ms-swift (clients/test_scripts.py runs it) or DeepSpeed's repository (patch, pytest)."""


PROGRAMS: dict[str, Callable[[list[str]], None]] = {
    "torchrun": torchrun,
    "deepspeed": deepspeed,
    "accelerate": accelerate,
    "python": python,
    "srun": not_run,  # what it starts is written down, too
    "pip": pip,
    "git": git,
    "make": make,
    "sbatch": sbatch,
    "sudo": not_run,
    "swift": not_run,
    "patch": not_run,
}
MODULES: dict[str, Callable[[list[str]], None]] = {
    "muon_plugin": plugin,
    "muon_plugin.planner": planner,
    "muon_plugin.preflight": preflight,
    "muon_plugin.metrics": metrics,
    "muon_plugin.deepspeed.convert": convert,
    "pip": pip,
    "pytest": not_run,
}


WRONG = {
    "muon-train --fast": "command not found",
    "bash examples/megatron/launch/llama4.sh": "No such file",
    "torchrun --nodes 2 -m muon_plugin.preflight": "--nodes",
    "python -m muon_plugin.preflight --checkpoint DIR": "--checkpoint",
    "pip install -e '.[deepsped]'": "deepsped",
    "$TRAIN": "unbound variable",
}


@pytest.mark.parametrize("text", WRONG)
def test_what_is_wrong_is_found(tmp_path, monkeypatch, capsys, text):
    """A program, a script, a flag, an extra, a variable."""
    monkeypatch.chdir(tmp_path)  # `read` goes elsewhere, in this process
    with pytest.raises((AssertionError, SystemExit)) as error:
        read(calls_of(Block("page.md", 1, "bash", text), tmp_path))
    assert WRONG[text] in f"{error.value}{capsys.readouterr().err}"
