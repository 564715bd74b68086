"""The one trainer of all experiments: a `Run` says everything that decides its result, `train` gives that result.

One process, or all ranks of torchrun (plain DDP): batches and their order are the same for any number of them.
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import platform
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import transformers
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm
from transformers import AutoModelForCausalLM, DeepseekV3Config, LlamaConfig

import muon_plugin
from muon_plugin import metrics, moonlight

sys.path.append(str(Path(__file__).resolve().parent.parent / "llama"))
import data

QUICK, FULL = 32, 256  # validation windows during a run and after it
SAVE_SECONDS, SAVE_STEPS = 60, 10  # between checkpoints of a run that goes on, and between looks at the clock


@dataclass(frozen=True)
class Run:
    """One training run; what is equal here is one run, and its result is found again by `name`.

    Attributes:
        kind: "llama", or "moe": DeepSeek-V3's layers, of which the first is dense.
        layers, heads, hidden, intermediate, vocab, sequence: of the model; `intermediate` of dense MLPs.
        batch: sequences of all ranks together.
        tokens: to train on, all in all; the learning rate's cosine ends there.
        update_rms: r of r sqrt(max(A, B)), the paper's 0.2.
        scaling: "adjusted" (Eq. 4), "baseline" (Eq. 5), "update norm" (Eq. 6).
        norm_decay: whether RMSNorm's gamma decays too.
        start: the run whose weights are the first ones; "": random ones.
        text: "main", or "shifted".
        evaluations: during the run, evenly spaced.
        per_head: whether each head of query, key and value is a matrix of its own.
        momentum: dtype of Muon's momentum between steps.
    """

    kind: str
    layers: int
    heads: int
    hidden: int
    intermediate: int
    vocab: int
    sequence: int
    optimizer: str
    lr: float
    batch: int
    tokens: int
    seed: int
    weight_decay: float = 0.1
    update_rms: float = 0.2
    scaling: str = "adjusted"
    norm_decay: bool = True
    start: str = ""
    text: str = "main"
    evaluations: int = 8
    per_head: bool = False
    momentum: str = "fp32"

    @property
    def name(self) -> str:
        """Readable, and another one for another run."""
        said = asdict(self)
        for later in ("per_head", "momentum"):  # runs that were logged before these fields were there keep their names
            if said[later] == type(self).__dataclass_fields__[later].default:
                del said[later]
        digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:10]
        return f"{self.kind}-{self.layers}x{self.hidden}-{self.optimizer}-{digest}"

    @property
    def steps(self) -> int:
        return max(1, round(self.tokens / (self.batch * self.sequence)))

    @property
    def parameters(self) -> int:
        """Parameters without embedding and output head that a token passes through: the paper's N."""
        with torch.device("meta"):
            model = make_model(self)
        routed = sum(p.numel() for name, p in model.named_parameters() if ".experts." in name)
        tables = 2 * self.vocab * self.hidden
        active = routed * model.config.num_experts_per_tok // model.config.n_routed_experts if routed else 0
        return sum(p.numel() for p in model.parameters()) - tables - routed + active

    @property
    def flops(self) -> float:
        """6 N D, as the paper counts."""
        return 6.0 * self.parameters * self.steps * self.batch * self.sequence


def make_model(run: Run) -> Any:
    """Hugging Face's model of this size, with random weights."""
    common = {
        "vocab_size": run.vocab,
        "hidden_size": run.hidden,
        "intermediate_size": run.intermediate,
        "num_hidden_layers": run.layers,
        "num_attention_heads": run.heads,
        "num_key_value_heads": run.heads,
        "max_position_embeddings": run.sequence,
        "tie_word_embeddings": False,
        "use_cache": False,
    }
    if run.kind == "llama":
        return AutoModelForCausalLM.from_config(LlamaConfig(**common))
    head = run.hidden // run.heads
    experts, top = 8, 2
    return AutoModelForCausalLM.from_config(
        DeepseekV3Config(
            **common,
            n_routed_experts=experts,
            num_experts_per_tok=top,
            n_shared_experts=1,
            moe_intermediate_size=-(-11 * run.hidden // 128) * 8,  # 11/16 of hidden, as in Moonlight
            first_k_dense_replace=1,
            n_group=1,
            topk_group=1,
            routed_scaling_factor=round(moonlight.gate_scaling_factor(experts, top, generator=_generator(0)), 3),
            q_lora_rank=None,
            kv_lora_rank=run.hidden // 2,
            qk_nope_head_dim=head,
            qk_rope_head_dim=head // 2,
            v_head_dim=head,
        )
    )


def _generator(seed: int) -> torch.Generator:
    return torch.Generator(device="cpu").manual_seed(seed)


def make_optimizer(run: Run, model: nn.Module) -> torch.optim.Optimizer:
    """AdamW or Muon with the same learning rate and weight decay, and Table 1's and Table 8's variants of Muon."""
    named = list(model.named_parameters())
    groups = [{"params": [(n, p) for n, p in named if run.norm_decay or p.dim() > 1]}]
    if not run.norm_decay:
        groups.append({"params": [(n, p) for n, p in named if p.dim() == 1], "weight_decay": 0.0})
    if run.optimizer == "AdamW":
        plain = [{**group, "params": [p for _, p in group["params"]]} for group in groups]
        return torch.optim.AdamW(plain, run.lr, betas=(0.9, 0.95), weight_decay=run.weight_decay)
    rule, factor = {
        "adjusted": ("match_rms_adamw", run.update_rms / 0.2),
        "baseline": ("none", run.update_rms * math.sqrt(run.hidden)),
        "update norm": ("update_norm", run.update_rms / 0.2),
    }[run.scaling]
    # The update is scaled, the decay is not: lr (factor u + wd w).
    rates = {"lr": run.lr, "muon_lr": run.lr * factor}
    settings = {"weight_decay": run.weight_decay, "adjust_lr_fn": rule, "per_head_muon": run.per_head}
    settings["momentum_dtype"] = run.momentum
    optimizer = muon_plugin.Muon(groups, model=model, **settings, **rates)
    for group in optimizer.param_groups:
        if group["use_muon"]:
            group["weight_decay"] /= factor
    return optimizer


def schedule(optimizer: torch.optim.Optimizer, steps: int) -> Any:
    """Linear warm-up over a tenth of the steps, then a cosine to a tenth of the peak."""
    warmup = max(1, steps // 10)

    def share(step: int) -> float:
        if step < warmup:
            return (step + 1) / warmup
        return 0.55 + 0.45 * math.cos(math.pi * (step - warmup) / max(1, steps - warmup))

    return torch.optim.lr_scheduler.LambdaLR(optimizer, share)


class RouterBiases:
    """Balances the experts of every router after each step, by Moonlight's rule."""

    def __init__(self, model: nn.Module) -> None:
        self.gates = [m for m in model.modules() if hasattr(m, "e_score_correction_bias")]
        for gate in self.gates:
            gate.tokens = torch.zeros_like(gate.e_score_correction_bias)
            gate.register_forward_hook(self._count)

    @staticmethod
    def _count(gate: Any, _: Any, output: tuple[Tensor, Tensor, Tensor]) -> None:
        if gate.training:
            gate.tokens += torch.bincount(output[2].flatten(), minlength=len(gate.tokens))

    def step(self, rate: float) -> None:
        for gate in self.gates:
            _sum(gate.tokens)
            gate.e_score_correction_bias.copy_(moonlight.router_bias(gate.e_score_correction_bias, gate.tokens, rate))
            gate.tokens.zero_()


def _world() -> tuple[int, int]:
    return (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)


def _sum(tensor: Tensor) -> Tensor:
    if dist.is_initialized():
        dist.all_reduce(tensor)
    return tensor


def _device() -> torch.device:
    cuda = torch.cuda.is_available()
    return torch.device("cuda", int(os.environ.get("LOCAL_RANK", "0"))) if cuda else torch.device("cpu")


class Trainer:
    """A run in progress: `step` and `evaluate` on this rank's share of each batch."""

    def __init__(self, run: Run, folder: Path, micro_batch: int) -> None:
        if run.batch < _world()[1]:
            raise ValueError(
                f"a batch of {run.batch} sequences on {_world()[1]} ranks; allowed: at least one each, so fewer ranks, "
                "or a larger --scale"
            )
        self.run, self.folder, self.micro_batch = run, folder, micro_batch
        self.device = _device()
        transformers.set_seed(run.seed)
        start = folder / "models" / run.start
        model = AutoModelForCausalLM.from_pretrained(start) if run.start else make_model(run)
        self.model = model.to(self.device).train()
        self.biases = RouterBiases(self.model)
        self.optimizer = make_optimizer(run, self.model)
        self.scheduler = schedule(self.optimizer, run.steps)
        self.wrapped = DistributedDataParallel(self.model) if dist.is_initialized() else self.model
        data.SEQUENCE = run.sequence
        texts = text_folder(run, folder)
        self.windows = data.load_windows(texts, "train", run.batch)
        self.text = digest_of(texts)
        held_out = data.load_windows(texts, "val", 1)
        spread = [np.linspace(0, len(held_out) - 1, min(n, len(held_out))).astype(int) for n in (QUICK, FULL)]
        self.quick, self.full = (held_out[places] for places in spread)
        self.order = np.random.default_rng(run.seed).permutation(len(self.windows))
        self.points: list[dict[str, Any]] = []
        self.since: list[tuple[float, float]] = []  # (loss, gradient norm) of the steps since the last point
        self.done, self.seconds = 0, 0.0

    def _passes(self, windows: np.ndarray) -> list[Tensor]:
        """This rank's share of some windows, as token ids in passes of at most `micro_batch` sequences."""
        rank, world = _world()
        mine = torch.from_numpy(windows[rank::world].astype(np.int64)).to(self.device)
        return list(mine.split(self.micro_batch))

    def _loss(self, model: Any, batch: Tensor) -> Tensor:
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda"):
            return model(input_ids=batch, labels=batch).loss

    def step(self) -> None:
        """One optimizer step."""
        run = self.run
        places = np.arange(self.done * run.batch, (self.done + 1) * run.batch) % len(self.order)
        passes = self._passes(self.windows[self.order[places]])
        total = torch.zeros((), device=self.device)
        for number, batch in enumerate(passes):
            last = number == len(passes) - 1
            if self.wrapped is not self.model:
                self.wrapped.require_backward_grad_sync = last
            loss = self._loss(self.wrapped, batch) * len(batch) / run.batch * _world()[1]
            loss.backward()
            total += loss.detach() / _world()[1]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        self.biases.step(moonlight.Stages().bias_rate(0))
        self.scheduler.step()
        self.done += 1
        self.since.append((float(_sum(total)), float(norm)))

    @property
    def diverged(self) -> bool:
        return bool(self.since) and not math.isfinite(self.since[-1][0])

    @torch.no_grad()
    def validate(self, windows: np.ndarray) -> float:
        """Mean loss per token over the windows."""
        self.model.eval()
        sums = torch.zeros(2, device=self.device, dtype=torch.float64)
        for batch in self._passes(windows):
            sums += torch.tensor([self._loss(self.model, batch).double() * len(batch), len(batch)], device=self.device)
        self.model.train()
        return float(_sum(sums)[0] / sums[1])

    def measured_step(self) -> dict[str, float]:
        """A step, and the RMS of its update of query and MLP matrices over the learning rate, without the decay."""
        watched = {name: p for name, p in self.model.named_parameters() if _role(name) in ("query", "mlp")}
        before = {name: p.detach().clone() for name, p in watched.items()}
        decay = {p: g["lr"] * g["weight_decay"] for g in self.optimizer.param_groups for p in g["params"]}
        lr = self.scheduler.get_last_lr()[0] if self.run.optimizer == "AdamW" else None
        lr = lr or self.run.lr * self.scheduler.lr_lambdas[0](self.done)
        self.step()
        found: dict[str, list[float]] = {}
        for name, p in watched.items():
            update = before[name] * (1 - decay[p]) - p.detach()
            found.setdefault(_role(name), []).append(metrics.rms(update) / lr)
        return {role: float(np.mean(values)) for role, values in found.items()}

    @torch.no_grad()
    def look(self, update: dict[str, float]) -> None:
        """Adds a point to the log: losses, norms, weights, attention."""
        last = self.done == self.run.steps
        losses, norms = zip(*self.since)
        weights: dict[str, list[float]] = {}
        for name, p in self.model.named_parameters():
            weights.setdefault(_role(name), []).append(metrics.rms(p))
        self.model.eval()
        with metrics.watch_attention(self.model) as logits:
            self._loss(self.model, self._passes(self.quick)[0][:4])
        self.model.train()
        point = {
            "step": self.done,
            "tokens": self.done * self.run.batch * self.run.sequence,
            "loss": float(np.mean(losses)),
            "val_loss": self.validate(self.full if last else self.quick),
            **({"quick_loss": self.validate(self.quick)} if last else {}),  # to be drawn with the earlier ones
            "grad_norm": float(np.mean(norms)),
            "grad_norm_max": max(norms),
            "weight_rms": {role: float(np.mean(values)) for role, values in weights.items()},
            "update_rms": update,
            "max_logit": [round(logits[layer].max, 3) for layer in sorted(logits)],
            "large_logits": sum(logits.values(), start=metrics.AttentionLogits(-math.inf, 0, 0)).share,
        }
        if self.run.kind == "moe":
            sigma = spectra(self.model)
            point["entropy"] = {name: round(metrics.svd_entropy(values), 5) for name, values in sigma.items()}
            if last:
                point["sigma"] = {name: [round(float(v / s[0]), 4) for v in s] for name, s in sigma.items()}
        self.points.append(point)
        self.since = []

    def save(self, file: Path) -> None:
        """What a resumed run needs; the old file stays until the new one is whole."""
        kept = ("points", "since", "done", "seconds", "text")
        parts = {name: getattr(self, name).state_dict() for name in ("model", "optimizer", "scheduler")}
        if _world()[0] == 0:
            file.parent.mkdir(parents=True, exist_ok=True)
            torch.save({**parts, **{name: getattr(self, name) for name in kept}}, file.with_suffix(".tmp"))
            file.with_suffix(".tmp").replace(file)

    def restore(self, file: Path) -> None:
        state = torch.load(file, map_location=self.device, weights_only=True)
        _same_text(state["text"], self.text, file)
        for name, value in state.items():
            if name in ("model", "optimizer", "scheduler"):
                getattr(self, name).load_state_dict(value)
            else:
                setattr(self, name, value)


def text_folder(run: Run, folder: Path) -> Path:
    return folder / "data" / str(run.vocab) / run.text


@functools.cache
def digest_of(texts: Path) -> str:
    """Of the tokens of a text."""
    tokens = [(texts / f"{part}.npy").read_bytes() for part in ("train", "val")]
    return hashlib.sha256(b"".join(tokens)).hexdigest()[:10]


def _same_text(before: str, now: str, file: Path) -> None:
    if before != now:
        raise ValueError(
            f"{file} was trained on another text, or one tokenized otherwise, than --data and --shifted say now; "
            "allowed: another --out for another text"
        )


def _role(name: str) -> str:
    """Whose weight RMS a parameter counts to."""
    if "norm" in name:
        return "gamma"
    if ".q_proj." in name:
        return "query"
    if ".mlp." in name:
        return "mlp"
    return "embedding and head" if name.split(".")[-2] in ("embed_tokens", "lm_head") else "other"


def spectra(model: nn.Module) -> dict[str, Tensor]:
    """Matrix -> its singular values, for every matrix that Muon would have; fused ones taken apart."""
    return {name: metrics.singular_values(matrix) for name, matrix in metrics.matrices_of(model)}


def train(run: Run, folder: Path, micro_batch: int = 64, position: int = 0) -> dict[str, Any]:
    """The result of a run: read where there is one, else trained, from its checkpoint where there is one.

    Args:
        folder: with data/VOCAB/TEXT prepared; written are results/NAME.json, models/NAME (Hugging Face's format), and
            checkpoints/NAME.pt while the run goes on.
        micro_batch: sequences in one pass of one process.
        position: line of the progress bar.

    Raises:
        ValueError: if what is there was trained on another text, or a batch has fewer sequences than there are ranks.
    """
    result = folder / "results" / f"{run.name}.json"
    if result.exists():
        before = json.loads(result.read_text())
        _same_text(before["text"], digest_of(text_folder(run, folder)), result)
        return before
    trainer = Trainer(run, folder, micro_batch)
    checkpoint = folder / "checkpoints" / f"{run.name}.pt"
    if checkpoint.exists():
        trainer.restore(checkpoint)
    rank, world = _world()
    rows = {round(run.steps * (i + 1) / run.evaluations) for i in range(run.evaluations)} | {1, run.steps}
    bar = tqdm(total=run.steps, initial=trainer.done, desc=run.name, position=position, leave=False, disable=rank > 0)
    began = saved = time.perf_counter()
    before = trainer.seconds
    while trainer.done < run.steps and not trainer.diverged:
        if trainer.done + 1 in rows:
            update = trainer.measured_step()
            if trainer.diverged:
                break
            trainer.look(update)
            bar.set_postfix_str(f"validation {trainer.points[-1]['val_loss']:.3f}", refresh=False)
        else:
            trainer.step()
        bar.update()
        now = time.perf_counter()
        trainer.seconds = before + now - began
        if trainer.done % SAVE_STEPS == 0:
            due = torch.tensor(float(now - saved > SAVE_SECONDS and rank == 0), device=trainer.device)
            if float(_sum(due)):  # rank 0's clock, since saving is a matter of all ranks
                trainer.save(checkpoint)
                saved = now
    bar.close()
    found = {
        "name": run.name,
        "config": asdict(run),
        "text": trainer.text,
        "parameters": run.parameters,
        "flops": run.flops,
        "seconds": round(trainer.seconds, 1),
        "versions": versions() | {"processes": world, "device": str(trainer.device)},
        "points": trainer.points,
        "diverged": trainer.diverged,
    }
    if rank == 0:
        trainer.model.save_pretrained(folder / "models" / run.name)
        result.parent.mkdir(parents=True, exist_ok=True)
        result.with_suffix(".tmp").write_text(json.dumps(found))
        result.with_suffix(".tmp").replace(result)
        checkpoint.unlink(missing_ok=True)
    if dist.is_initialized():
        dist.barrier()
    return found


def versions() -> dict[str, str]:
    """What a result may depend on beside its config."""
    return {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "muon_plugin": muon_plugin.__version__,
    }
