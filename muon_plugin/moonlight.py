"""What Moonlight's training needs and the engines lack: its learning rate in three stages, its router's bias and scale.

Numbers and formulas are those of "Muon is Scalable for LLM Training" (arXiv 2502.16982), section 3.3 and its appendix.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

import torch
from torch import Tensor

__all__ = ["Stages", "gate_scaling_factor", "router_bias"]


@dataclass(frozen=True)
class Stages:
    """Learning rate and batch over the tokens seen: warm-up and cosine, then a cooldown with a warm-up of its own.

    The defaults are Moonlight's: 2,000 steps of 2048 x 8192 tokens up to `peak`, a cosine to `low` at 5.2T tokens, 100
    steps of 4096 x 8192 tokens up to `cooldown_peak`, linearly to 0 at 5.7T.

    Attributes:
        warmup: tokens at which the warm-up ends.
        cosine_end: tokens at which the cosine ends.
        cooldown_warmup: tokens at which the cooldown's own warm-up ends.
        end: tokens at which training ends.
        peak: learning rate at `warmup`.
        low: learning rate at `cosine_end`.
        cooldown_peak: learning rate at `cooldown_warmup`; at `end` it is 0.
        batches: pairs of the tokens from which a batch holds and the sequences in it, in the order of the tokens.

    Raises:
        ValueError: where the stages' ends do not follow one another.

    Examples:
        >>> from muon_plugin.moonlight import Stages
        >>> moonlight = Stages()
        >>> [moonlight.lr(tokens) for tokens in (0, moonlight.warmup, 5.2e12, 5.7e12)]
        [0.0, 0.00042, 4.2e-05, 0.0]
        >>> moonlight.batch(100e9), moonlight.batch(300e9)
        (2048, 4096)
        >>> small = moonlight.scaled(end=1e9, warmup=1e7, cooldown_warmup=1e6, batch=64)
        >>> small.batch(1e9), round(small.lr(1e7), 6)
        (128, 0.00042)
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
        """The learning rate once so many tokens have been seen, 0 at first and from `end` on."""
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
        """Number of sequences in a batch once so many tokens have been seen."""
        return next(size for start, size in reversed(self.batches) if tokens >= start)

    def bias_rate(self, tokens: float) -> float:
        """The rate of `router_bias` once so many tokens have been seen: 1e-3, and 0 in the cooldown."""
        return 1e-3 if tokens < self.cosine_end else 0.0

    def scaled(self, end: float, warmup: float, cooldown_warmup: float, lr: float = 1.0, batch: int = 1) -> Stages:
        """The same stages for a smaller run, whose cosine ends at the same share of all tokens.

        Args:
            end: number of tokens in all.
            warmup: number of tokens of the warm-up.
            cooldown_warmup: number of tokens of the cooldown's own warm-up.
            lr: factor on all learning rates.
            batch: sequences in the first batch; it grows by the same factors at the same shares.

        Raises:
            ValueError: where the stages' ends do not follow one another.
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

    Moonlight's form of DeepSeek-V3's rule (arXiv 2412.19437, section 2.1.2), with the mean subtracted: the sum of the
    biases stays. Megatron's `get_updated_expert_bias` leaves the mean out, which chooses the same experts.

    Args:
        bias: (..., experts) float32, added to the scores where experts are chosen.
        tokens_per_expert: (..., experts) of any dtype: tokens of the whole batch (summed over ranks) that each expert
            got.
        rate: u.

    Returns:
        A new tensor of the shape and dtype of `bias`.

    Examples:
        >>> import torch
        >>> from muon_plugin.moonlight import router_bias
        >>> router_bias(torch.zeros(4), torch.tensor([70, 10, 10, 10]), rate=1e-3)
        tensor([-0.0015,  0.0005,  0.0005,  0.0005])
    """
    load = tokens_per_expert.to(bias.dtype)
    sign = torch.sign(load.mean(-1, keepdim=True) - load)
    return bias + rate * (sign - sign.mean(-1, keepdim=True))


def gate_scaling_factor(
    experts: int, top_k: int, *, samples: int = 2**16, generator: torch.Generator | None = None
) -> float:
    """By how much to scale a sigmoid router's weights so that the experts' sum has the RMS of one expert's output.

    The mean over standard normal logits of 1 / sqrt(sum p^2), p being the `top_k` largest sigmoids, divided by their
    sum (the paper's appendix on Moonlight). Its 64 experts and top-6 give 2.446.

    Args:
        experts: number of experts that the router chooses from.
        top_k: number of experts that it chooses for a token.
        samples: number of tokens whose logits are drawn.
        generator: draws them, on the CPU; by default torch's own.

    Examples:
        >>> import torch
        >>> from muon_plugin.moonlight import gate_scaling_factor
        >>> round(gate_scaling_factor(64, 6, generator=torch.Generator().manual_seed(0)), 2)
        2.45
    """
    logits = torch.randn(samples, experts, generator=generator, device="cpu")
    p = logits.sigmoid().topk(top_k, dim=-1).values
    p = p / p.sum(-1, keepdim=True)
    return float(p.square().sum(-1).rsqrt().mean())
