"""What Moonlight's training needs and the engines lack: its learning rate in three stages, its router's bias and scale.

Numbers and formulas are those of "Muon is Scalable for LLM Training" (arXiv 2502.16982), section 3.2 and its appendix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor


@dataclass(frozen=True)
class Stages:
    """Learning rate and batch over the tokens seen: warm-up and cosine, then a cooldown with a warm-up of its own.

    The defaults are Moonlight's: 2,000 steps of 2048 x 8192 tokens up to `peak`, a cosine to `low` at 5.2T tokens, 100
    steps of 4096 x 8192 tokens up to `cooldown_peak`, linearly to 0 at 5.7T.

    Attributes:
        warmup, cosine_end, cooldown_warmup, end: tokens at which warm-up, cosine, cooldown's warm-up, training end.
        peak, low, cooldown_peak: learning rates at the first three of these; at the last it is 0.
        batches: (tokens from which it holds, sequences in a batch).

    Raises:
        ValueError: where the stages' ends do not follow one another.
    """

    warmup: float = 2000 * 2048 * 8192
    cosine_end: float = 5.2e12
    cooldown_warmup: float = 5.2e12 + 100 * 4096 * 8192
    end: float = 5.7e12
    peak: float = 4.2e-4
    low: float = 4.2e-5
    cooldown_peak: float = 1e-4
    batches: tuple[tuple[float, int], ...] = ((0, 2048), (200e9, 4096))

    def __post_init__(self) -> None:
        ends = (0, self.warmup, self.cosine_end, self.cooldown_warmup, self.end)
        if any(a >= b for a, b in pairwise(ends)):
            raise ValueError(
                f"warmup={self.warmup}, cosine_end={self.cosine_end}, cooldown_warmup={self.cooldown_warmup}, "
                f"end={self.end} do not follow one another; allowed: each above the one before, the first above 0"
            )

    def lr(self, tokens: float) -> float:
        """The learning rate once so many tokens have been seen; 0 from the end on."""
        if tokens < self.warmup:
            return self.peak * tokens / self.warmup
        if tokens < self.cosine_end:
            done = (tokens - self.warmup) / (self.cosine_end - self.warmup)
            return self.low + (self.peak - self.low) * (1 + math.cos(math.pi * done)) / 2
        if tokens < self.cooldown_warmup:
            done = (tokens - self.cosine_end) / (self.cooldown_warmup - self.cosine_end)
            return self.low + (self.cooldown_peak - self.low) * done
        return self.cooldown_peak * max(0.0, (self.end - tokens) / (self.end - self.cooldown_warmup))

    def batch(self, tokens: float) -> int:
        """Sequences in the batch once so many tokens have been seen."""
        return next(size for start, size in reversed(self.batches) if tokens >= start)

    def bias_rate(self, tokens: float) -> float:
        """The router's `router_bias` rate: 1e-3, and 0 in the cooldown."""
        return 1e-3 if tokens < self.cosine_end else 0.0

    def scaled(self, end: float, warmup: float, cooldown_warmup: float, lr: float = 1.0, batch: int = 1) -> Stages:
        """The same stages for a smaller run: the cosine ends at the same share of it, rates are multiplied by `lr`.

        Args:
            end: tokens in all.
            warmup, cooldown_warmup: tokens of the two warm-ups.
            batch: sequences in the first batch; it grows by the same factors at the same shares.
        """
        cosine_end = end * self.cosine_end / self.end
        first = self.batches[0][1]
        return Stages(
            warmup,
            cosine_end,
            cosine_end + cooldown_warmup,
            end,
            self.peak * lr,
            self.low * lr,
            self.cooldown_peak * lr,
            tuple((start * end / self.end, batch * size // first) for start, size in self.batches),
        )


def router_bias(bias: Tensor, tokens_per_expert: Tensor, rate: float) -> Tensor:
    """The router's bias after a step: b_i + u (sign(e_i) - mean(sign(e))), with e_i how far expert i is below the mean.

    DeepSeek-V3's rule, and Megatron's `get_updated_expert_bias`, without its drift: the sum of the biases stays.

    Args:
        bias: (..., experts) float32, added to the scores where experts are chosen.
        tokens_per_expert: (..., experts) tokens of the whole batch (summed over ranks) that each expert got.
        rate: u.
    """
    load = tokens_per_expert.to(bias.dtype)
    sign = torch.sign(load.mean(-1, keepdim=True) - load)
    return bias + rate * (sign - sign.mean(-1, keepdim=True))


def gate_scaling_factor(
    experts: int, top_k: int, *, samples: int = 2**16, generator: torch.Generator | None = None
) -> float:
    """By how much to scale a sigmoid router's weights so that the experts' sum has the RMS of one expert's output.

    The mean over standard normal logits of 1 / sqrt(sum p^2), p being the `top_k` largest sigmoids, divided by their
    sum. Moonlight's 64 experts and top-6 give 2.446.
    """
    logits = torch.randn(samples, experts, generator=generator, device="cpu")
    p = logits.sigmoid().topk(top_k, dim=-1).values
    p = p / p.sum(-1, keepdim=True)
    return float(p.square().sum(-1).rsqrt().mean())
