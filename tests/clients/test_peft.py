"""PEFT's adapters under DeepSpeed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from tests.support.combinations import FULL
from tests.support.integers import differing
from tests.support.moves import check

#: adapter -> stage, number of parameters of Muon, AdamW, neither
CASES: dict[str, tuple[int, int, int, int]] = {
    "LoRA on all layers": (1, 28, 0, 21),
    "LoRA on some, and modules_to_save": (3 if FULL else 2, 8, 2, 21),
    "prompt tuning": (2, 0, 1, 21),
}
if FULL:
    CASES |= {
        "DoRA and new tokens": (2, 4, 3, 21),
        "IA3": (1, 0, 6, 21),
        "prefix tuning": (1, 0, 1, 21),
    }


def adapter(name: str) -> Any:
    from peft import IA3Config, LoraConfig, PrefixTuningConfig, PromptTuningConfig

    kind: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    few = {"r": 8, "target_modules": ["q_proj", "v_proj"], **kind}
    return {
        "LoRA on all layers": lambda: LoraConfig(r=8, target_modules="all-linear", **kind),
        "LoRA on some, and modules_to_save": lambda: LoraConfig(modules_to_save=["embed_tokens", "lm_head"], **few),
        "DoRA and new tokens": lambda: LoraConfig(
            r=8, use_dora=True, target_modules=["q_proj"], trainable_token_indices=[5, 6, 7], **kind
        ),
        "IA3": lambda: IA3Config(**kind),
        "prompt tuning": lambda: PromptTuningConfig(num_virtual_tokens=4, **kind),
        "prefix tuning": lambda: PrefixTuningConfig(num_virtual_tokens=4, **kind),
    }[name]()


@pytest.mark.parametrize("name", CASES)
def test_peft(ranks, tmp_path, name):
    stage, *numbers = CASES[name]
    whole, resumed = (ranks.clients(2, adapt, tmp_path, name, stage, resume)[0] for resume in (False, True))
    names = check(whole["moves"])
    assert [len(names[half]) for half in ("muon", "adamw", "frozen")] == numbers
    assert ("AdamW trains all of them" in whole["printed"]) is (numbers[0] == 0)
    assert whole["losses"][-1] < whole["losses"][0]  # as far as an adapter can teach a random model
    assert differing(whole["weights"], resumed["weights"]) == []
    assert whole["losses"] == resumed["losses"]


def test_qk_clip_and_adapters(ranks, tmp_path):
    """Of a query or key they are refused; others leave QK-Clip its work."""
    refused, clipped = ranks.clients(1, clipped_beside_adapters)[0]
    assert "q_proj.lora_A" in refused
    assert "is an adapter of a query or key projection" in refused
    assert clipped == 4


def clipped_beside_adapters(rank: int) -> tuple[str, int]:
    import torch
    from peft import LoraConfig, get_peft_model

    from muon_plugin import Muon
    from tests.support.clipped import llama

    words = ""
    for target in ("q_proj", "v_proj"):
        model = get_peft_model(llama(), LoraConfig(target_modules=[target], r=4)).train()
        for name, p in model.named_parameters():
            if "q_proj.weight" in name or "k_proj.weight" in name:
                p.requires_grad_(True)
        try:
            muon = Muon(model.named_parameters(), model=model, qk_clip={"threshold": 1e-4})
        except ValueError as error:
            words = str(error)
    tokens = torch.randint(0, 40, (2, 16))
    model(input_ids=tokens, labels=tokens).loss.backward()
    muon.step()
    return words, sum(count for _, _, count in muon.halves.clip.last)


def adapt(rank: int, out: Path, name: str, stage: int, resume: bool) -> dict[str, Any]:
    from peft import get_peft_model
    from transformers import Trainer, TrainingArguments

    from tests.support import hugging_face as hf

    hf.start()
    # In order: both ranks' batches are all texts, so losses of different steps can be compared.
    more: dict[str, Any] = {"learning_rate": 0.1, "train_sampling_strategy": "sequential"}
    arguments = TrainingArguments(**hf.arguments(out, hf.settings(stage), **more))
    return hf.train(Trainer(get_peft_model(hf.llama(), adapter(name)), arguments, train_dataset=hf.Text()), resume)
