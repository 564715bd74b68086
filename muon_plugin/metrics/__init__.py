"""What the paper watches: RMS, SVD entropy, singular values, attention logits, by the groups of its appendix F.

Functions on tensors; ``python -m muon_plugin.metrics CHECKPOINT`` has a table and a picture of a saved model.
"""

from .attention import AttentionLogits, attention_logits, watch_attention
from .groups import GROUPS, cut, group_of, matrices_of
from .spectra import rms, singular_values, svd_entropy

__all__ = [
    "GROUPS",
    "AttentionLogits",
    "attention_logits",
    "cut",
    "group_of",
    "matrices_of",
    "rms",
    "singular_values",
    "svd_entropy",
    "watch_attention",
]
