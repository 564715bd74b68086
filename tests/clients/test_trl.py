"""TRL under DeepSpeed: supervised fine-tuning, preferences against a reference model, reinforcement learning."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from tests.support.combinations import FULL
from tests.support.integers import differing, gathered
from tests.support.moves import check

MATRICES, REST = 14, 7
#: The trainers with their stages.
CASES = [("sft", 1), ("dpo", 2), ("grpo", 2)]
CASES += [("sft", 3), ("dpo", 3), ("grpo", 3), ("dpo with LoRA", 2), ("dpo with LoRA", 3)] if FULL else []


@pytest.mark.parametrize(("what", "stage"), CASES)
def test_trl(ranks, tmp_path, what, stage):
    name = what.split()[0]
    lora = "LoRA" in what
    whole, resumed = (ranks.clients(2, JOBS[name], tmp_path, stage, lora, resume)[0] for resume in (False, True))
    names = check(whole["moves"])
    assert [len(names[half]) for half in ("muon", "adamw", "frozen")] == ([28, 0, 21] if lora else [MATRICES, REST, 0])
    assert whole["printed"].count("muon_plugin ---") == 1  # the reference model's engine has no optimizer
    assert whole["reference"] == ([], 0 if name == "sft" or lora else MATRICES + REST)
    if name != "grpo":  # whose loss is no measure of success
        assert whole["losses"][-1] < whole["losses"][0] - (0.002 if lora else 0.1)
    assert differing(whole["weights"], resumed["weights"]) == []
    assert whole["losses"] == resumed["losses"]


def sft(rank: int, out: Path, stage: int, lora: bool, resume: bool) -> dict[str, Any]:
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    from tests.support import hugging_face as hf

    hf.start()
    arguments = SFTConfig(**hf.arguments(out, hf.settings(stage), bf16=True))
    data = Dataset.from_dict({"input_ids": hf.texts()})
    trainer = SFTTrainer(hf.llama(), args=arguments, train_dataset=data, processing_class=hf.tokenizer())
    return {**hf.train(trainer, resume), "reference": ([], 0)}


def dpo(rank: int, out: Path, stage: int, lora: bool, resume: bool) -> dict[str, Any]:
    from datasets import Dataset
    from peft import LoraConfig
    from trl import DPOConfig, DPOTrainer

    from tests.support import hugging_face as hf

    hf.start()
    arguments = DPOConfig(**hf.arguments(out, hf.settings(stage)))
    rows = [
        {"prompt": hf.words(ids[:4]), "chosen": f" {hf.words(ids[4:8])}", "rejected": f" {hf.words(ids[8:])}"}
        for ids in hf.texts(length=12)
    ]
    given: dict[str, Any] = {"ref_model": hf.llama()}
    if lora:
        given = {"peft_config": LoraConfig(r=8, target_modules="all-linear", task_type="CAUSAL_LM")}
    data = Dataset.from_list(rows)
    tokenizer = hf.tokenizer()
    trainer = DPOTrainer(hf.llama(), args=arguments, train_dataset=data, processing_class=tokenizer, **given)
    return with_reference(trainer, resume)


def grpo(rank: int, out: Path, stage: int, lora: bool, resume: bool) -> dict[str, Any]:
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl import GRPOConfig, GRPOTrainer

    from tests.support import hugging_face as hf

    hf.start()
    folder = f"{out}/model"  # from which the trainer makes the reference model
    if rank == 0 and not resume:
        hf.llama().save_pretrained(folder)
    torch.distributed.barrier()
    own = {"num_generations": 4, "max_completion_length": 6, "beta": 0.1}
    arguments = GRPOConfig(**hf.arguments(out, hf.settings(stage), **own))
    data = Dataset.from_list([{"prompt": hf.words(ids[:4])} for ids in hf.texts(length=12)])
    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = hf.tokenizer()
    trainer = GRPOTrainer(model, odd_words, args=arguments, train_dataset=data, processing_class=tokenizer)
    return with_reference(trainer, resume)


def odd_words(completions: list[str], **_: Any) -> list[float]:
    """The reward."""
    return [float(sum(int(word[1:]) % 2 for word in text.split())) for text in completions]


def with_reference(trainer: Any, resume: bool) -> dict[str, Any]:
    """`hugging_face.train`, and "reference": what has changed in the reference model, and its number of parameters."""
    from tests.support import hugging_face as hf

    def reference() -> dict[str, torch.Tensor]:
        if trainer.ref_model is None:
            return {}
        with gathered(trainer.ref_model.module):
            return {name: p.detach().clone() for name, p in trainer.ref_model.module.named_parameters()}

    before = reference()
    found = hf.train(trainer, resume)
    return {**found, "reference": (differing(before, reference()), len(before))}


JOBS = {"sft": sft, "dpo": dpo, "grpo": grpo}
