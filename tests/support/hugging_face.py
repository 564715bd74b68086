"""What users of Hugging Face's libraries have: a small Llama, a tokenizer, text, a JSON of "auto" values, a Trainer."""

from __future__ import annotations

import contextlib
import io
import warnings
from pathlib import Path
from typing import Any

import deepspeed
import torch
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, LlamaConfig, PreTrainedTokenizerFast, TrainerCallback

from tests.support.integers import weights
from tests.support.moves import Moves

STEPS = 4
SAVED = STEPS // 2
WORDS = 64


def start() -> None:
    """What a user's script begins with."""
    import muon_plugin

    warnings.simplefilter("ignore")
    muon_plugin.register()
    # accelerate asks DeepSpeed for its process group on GPUs alone, and zero.Init counts one process without it.
    deepspeed.init_distributed("gloo")


def settings(stage: int, optimizer: bool = True, scheduler: bool = False, **params: Any) -> dict[str, Any]:
    """The JSON: whatever Hugging Face knows is "auto"."""
    config: dict[str, Any] = {
        "train_batch_size": "auto",
        "train_micro_batch_size_per_gpu": "auto",
        "gradient_accumulation_steps": "auto",
        "gradient_clipping": "auto",
        "fp16": {"enabled": "auto", "initial_scale_power": 8},
        "bf16": {"enabled": "auto"},
        "zero_optimization": {
            "stage": stage,
            "reduce_bucket_size": "auto",
            "stage3_prefetch_bucket_size": "auto",
            "stage3_param_persistence_threshold": "auto",
        },
    }
    if optimizer:
        config["optimizer"] = {"type": "Muon", "params": {"lr": "auto", "weight_decay": "auto", **params}}
    if scheduler:
        names = ("warmup_min_lr", "warmup_max_lr", "warmup_num_steps", "total_num_steps")
        config["scheduler"] = {"type": "WarmupDecayLR", "params": dict.fromkeys(names, "auto")}
    return config


def llama(seed: int = 0) -> Any:
    """Random weights; under ZeRO-3, Hugging Face builds it inside ``zero.Init``."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(
        LlamaConfig(
            vocab_size=WORDS,
            hidden_size=32,
            intermediate_size=64,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=4,  # fewer would leave the gradient of o_proj without full rank
            tie_word_embeddings=False,
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
        )
    )


def tokenizer() -> Any:
    """Words "w0" to "w63"; the first three are special."""
    model = Tokenizer(WordLevel({f"w{number}": number for number in range(WORDS)}, unk_token="w3"))
    model.pre_tokenizer = Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=model, bos_token="w0", eos_token="w1", pad_token="w2", unk_token="w3"
    )


def words(ids: list[int]) -> str:
    return " ".join(f"w{number}" for number in ids)


def texts(rows: int = 32, length: int = 16) -> list[list[int]]:
    """Token ids: eight sequences without a pattern, over and over, which a model learns by heart."""
    random = torch.Generator().manual_seed(3)
    kinds = torch.randint(4, WORDS, (8, length), generator=random).tolist()
    return [kinds[row % 8] for row in range(rows)]


class Text(torch.utils.data.Dataset):
    def __init__(self) -> None:
        self.rows = [torch.tensor(row) for row in texts()]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        return {"input_ids": self.rows[index], "labels": self.rows[index]}


def arguments(out: Path | str, config: dict[str, Any] | None, **more: Any) -> dict[str, Any]:
    """Arguments of any TrainingArguments: saved at half of the steps."""
    return {
        "output_dir": str(out),
        "use_cpu": True,
        "deepspeed": config,
        "max_steps": STEPS,
        "save_steps": SAVED,
        "logging_steps": 1,
        "per_device_train_batch_size": 4,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "lr_scheduler_type": "linear",
        "bf16": False,
        "report_to": [],
        "disable_tqdm": True,
        **more,
    }


class Watch(TrainerCallback):
    """Follows a trainer's parameters, step by step."""

    trainer: Any = None
    moves: Moves | None = None

    def on_step_begin(self, *_: Any, **kwargs: Any) -> None:
        self.moves = self.moves or Moves.of(self.trainer.model_wrapped)
        self.moves.before()

    def on_step_end(self, *_: Any, **kwargs: Any) -> None:
        assert self.moves is not None
        self.moves.after()


def train(trainer: Any, resume: bool = False) -> dict[str, Any]:
    """Trains, all steps or from the half on; returns what the parameters did, and what they are at the end."""
    watch = Watch()
    watch.trainer = trainer
    if not resume:
        trainer.add_callback(watch)
    with contextlib.redirect_stdout(io.StringIO()) as printed:
        trainer.train(resume_from_checkpoint=f"{trainer.args.output_dir}/checkpoint-{SAVED}" if resume else None)
    engine = trainer.model_wrapped
    found = {
        "printed": printed.getvalue(),
        "losses": [entry["loss"] for entry in trainer.state.log_history if "loss" in entry],
        "weights": weights(engine),
        "moves": watch.moves.found if watch.moves else {},
        "groups": [{key: g[key] for key in ("use_muon", "lr", "weight_decay")} for g in trainer.optimizer.param_groups],
    }
    engine.destroy()
    return found
