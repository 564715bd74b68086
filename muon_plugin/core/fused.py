"""What is known of fused projections: which layer, in which class of module, and how the module's code splits it.

Each line was read in the modelling code. The sizes come from the module itself, which the code reads, too.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from typing import Any

from .cutting import Rule, Stored
from .places import Place

#: Further layers that hold a fused projection in most models, of an unknown layout where nothing below applies.
OTHER_FUSED_NAMES = {"in_proj_qkv", "in_proj_qkvz", "in_proj_ba"}
GATE_UP_NAMES = {"gate_up_proj", "w12", "gate_up"}
#: Query, key and value, one after the other along the outputs, in plain torch and timm models ...
QKV_NAMES = {"qkv", "qkv_proj", "wqkv", "c_attn", "in_proj_weight", "query_key_value", "w_pack"}
#: ... and in models with a config: those whose code was read. Others use the same names for other layouts.
QKV_IN_ORDER = {"gpt2", "openai-gpt", "imagegpt", "decision_transformer", "phi3", "mpt", "dbrx", "modernbert"}
#: q, k and v of one head, then of the next.
QKV_BY_HEAD = {"gpt_neox", "gpt_neox_japanese", "bloom", "persimmon"}


@dataclass(frozen=True)
class Fused:
    """How one kind of layer is cut.

    Attributes:
        layers: regular expression of the layer's name in its block; in a `torch.nn.Sequential` of the block,
            ``transform.2``.
        blocks: regular expression of the block's class; other classes use the name for other layouts.
        rule: (block, how the weight is stored) -> the rule; an attribute that the block lacks says that it is another
            kind of block.
    """

    layers: str
    blocks: str
    rule: Callable[[Any, Stored], Rule]

    def applies(self, kind: str, layer: str) -> bool:
        """Whether it is about layers of this name in blocks of this class."""
        return bool(re.fullmatch(self.layers, layer) and re.match(self.blocks, kind))


def _each(stored: Stored, *sizes: int) -> Rule:
    """The sizes of one head, then of the next, as often as they fit."""
    return Rule(sizes, stored.outputs // sum(sizes))


def _falcon(block: Any, stored: Stored) -> Rule:
    if block.new_decoder_architecture:
        shared = block.num_heads // block.num_kv_heads
        return _each(stored, shared * block.head_dim, block.head_dim, block.head_dim)
    if block.multi_query:
        return Rule((block.num_heads * block.head_dim, block.head_dim, block.head_dim))
    return _each(stored, *(block.head_dim,) * 3)


def _gpt_bigcode(block: Any, stored: Stored) -> Rule:
    if block.is_cross_attention:
        return stored.equal(2)
    if block.multi_query:
        return Rule((block.embed_dim, block.kv_dim, block.kv_dim))
    return _each(stored, *(block.head_dim,) * 3)


def _key_value_width(block: Any) -> int:
    return int(block.num_key_value_heads * block.head_dim)


def _grouped(block: Any, stored: Stored) -> Rule:
    """Query, then the fewer heads of key and value."""
    width = _key_value_width(block)
    return Rule((stored.outputs - 2 * width, width, width))


def _mamba2(block: Any, stored: Stored) -> Rule:
    """Gate, hidden states, B, C and time steps."""
    state = block.n_groups * block.ssm_state_size
    return Rule((block.intermediate_size, block.conv_dim - 2 * state, state, state, block.num_heads))


def _gated_query(block: Any, stored: Stored) -> Rule:
    """Query and its gate, head by head."""
    if stored.outputs != 2 * block.o_proj.in_features:
        raise AttributeError("no gate")
    return _each(stored, block.head_dim, block.head_dim)


def _adaptive(block: Any, stored: Stored) -> Rule:
    """Shifts, scales and gates of an adaptive norm."""
    return stored.equal(block.num_chunks)


KNOWN = (
    # Multi-head latent attention (DeepSeek-V2, arXiv 2405.04434): W_DKV and W_KR; W_UK and W_UV; W_UQ and W_QR.
    Fused("kv_a_proj_with_mqa", "", lambda b, s: Rule((s.outputs - b.qk_rope_head_dim, b.qk_rope_head_dim))),
    Fused("kv_b_proj", "", lambda b, s: _each(s, b.qk_nope_head_dim, b.v_head_dim)),
    Fused("q_b_proj|q_proj", "", lambda b, s: _each(s, b.qk_nope_head_dim, b.qk_rope_head_dim)),
    Fused("q_gate_proj", "", lambda b, s: _each(s, b.qk_nope_head_dim, b.qk_rope_head_dim, b.v_head_dim)),
    # Two overlapping series of compressed keys, in DeepSeek-V4.
    Fused("kv_proj|gate_proj", "DeepseekV4(CSACompressor|Indexer)", lambda b, s: Rule((b.head_dim, b.head_dim))),
    Fused(
        "fn",
        r"\w*HyperConnection",
        lambda b, s: Rule((b.hc_mult,) * 2 + ((b.hc_mult**2,) if s.outputs > 2 * b.hc_mult else ())),
    ),
    # Gated attention, and the gated delta rule.
    Fused("q_proj", "Qwen3Next|Qwen3_5|Qwen4Exp", _gated_query),
    Fused(
        "in_proj_qkvz",
        "Qwen3Next",
        lambda b, s: Rule((b.head_k_dim,) * 2 + (b.num_v_heads // b.num_k_heads * b.head_v_dim,) * 2, b.num_k_heads),
    ),
    Fused("in_proj_ba", "Qwen3Next", lambda b, s: Rule((b.num_v_heads // b.num_k_heads,) * 2, b.num_k_heads)),
    Fused("in_proj_qkv", "Qwen3_5|Qwen4Exp|LaraMini", lambda b, s: Rule((b.key_dim, b.key_dim, b.value_dim))),
    Fused(
        "index_qk_proj",
        "Qwen4Exp",
        lambda b, s: Rule((b.index_n_heads * b.index_head_dim, b.index_kv_heads * b.index_head_dim)),
    ),
    # State spaces and short convolutions.
    Fused("in_proj", r"\w*Mamba|FalconH1|Bamba|GraniteMoeHybrid|NemotronH", _mamba2),
    Fused("in_proj", "ZambaMamba", lambda b, s: Rule((1, 1), s.outputs // 2)),
    Fused("in_proj", r"(Mamba|Jamba|FalconMamba)\w*Mixer", lambda b, s: Rule((b.intermediate_size,) * 2)),
    Fused("x_proj|x_proj_weight", "", lambda b, s: Rule((b.time_step_rank, b.ssm_state_size, b.ssm_state_size))),
    Fused("in_proj", r"Lfm\w*ShortConv", lambda b, s: s.equal(3)),
    # Gated linear units: gate, then up.
    Fused("gate_up_proj", r"GptOss|OpenAIPrivacyFilter", lambda b, s: Rule((1, 1), s.outputs // 2)),
    Fused("Wi", r"\w*ModernBert\w*MLP", lambda b, s: s.equal(2)),
    Fused("fc1", r"(Moshi|KyutaiSpeechToText)GatingMLP|Moonshine\w*DecoderMLP", lambda b, s: s.equal(2)),
    Fused("input_linear", r"GraniteMoe\w*MLP|JetMoeMoE", lambda b, s: s.equal(2)),
    Fused("proj", r"\w*GatedLinearUnit", lambda b, s: s.equal(2)),
    Fused("linear_start", r"Gemma\w*LightConv1d", lambda b, s: s.equal(2)),
    Fused("pointwise_conv1|pointwise_lin1|up_conv", r"\w*Conv(olution)?Module", lambda b, s: s.equal(2)),
    Fused("linear_1", r"(AyaVision|Cohere2Vision)MultiModalProjector", lambda b, s: s.equal(2)),
    Fused("ext_pw_conv_1d", r"\w*GluPointWiseConv", lambda b, s: s.equal(2)),
    Fused("conv", r"(Data2VecAudio|Wav2Vec2|Wav2Vec2Conformer|WavLM)AdapterLayer", lambda b, s: s.equal(2)),
    # Query, key and value.
    Fused(
        "qkv|att_proj|qkv_linear|in_proj_weight",
        r"Bark|LayoutLMv2|Hiera|Sam2|MultiheadAttention",
        lambda b, s: s.equal(3),
    ),
    Fused("qkv", "Exaone4_5", lambda b, s: Rule((b.q_dim, b.kv_dim, b.kv_dim))),
    Fused("Wqkv", r"ModernBert|Mpt", lambda b, s: s.equal(3)),
    Fused("Wqkv|qkv_proj", r"Dbrx|Phi3|Phi4Multimodal", _grouped),
    Fused(
        "qkv_proj|in_proj",
        r"MiniMaxLightning|Deberta|DisentangledSelfAttention",
        lambda b, s: _each(s, *(s.outputs // 3 // b.num_attention_heads,) * 3),
    ),
    Fused("qkv_proj", "CodeGen", lambda b, s: _each(s, *(s.outputs // 12,) * 3)),  # query, value and key, four times
    Fused("query_key_value", "Falcon", _falcon),
    Fused("c_attn", "GPTBigCode", _gpt_bigcode),
    Fused(
        "c_attn",
        "GPT2|ImageGPT|DecisionTransformerGPT2",
        lambda b, s: Rule((b.split_size,) * (s.outputs // b.split_size)),
    ),
    Fused("qkv_opreact", "xLSTM", lambda b, s: Rule((b.qk_dim, b.qk_dim, b.v_dim, b.v_dim))),
    Fused("kv_proj|to_kv", r"JetMoe|GraniteSpeech|Evolla", lambda b, s: s.equal(2)),
    Fused("proj", "EsmFoldSelfAttention", lambda b, s: _each(s, *(s.outputs // 3 // b.num_heads,) * 3)),
    Fused("proj", "EsmFoldSequenceToPair", lambda b, s: s.equal(2)),
    Fused("linear_kv", "EsmFoldInvariantPointAttention", lambda b, s: _each(s, b.hidden_dim, b.hidden_dim)),
    Fused("proj_bundle", "EsmFold2Triangle", lambda b, s: s.equal(4)),
    Fused("input_proj", "EsmFold2OuterProductMean", lambda b, s: s.equal(2)),
    # Adaptive norms of diffusion heads.
    Fused("adaln_proj|linear|linear_1", r"GradiumPhonon|PocketTTS|VibeVoiceDiffusionHead", _adaptive),
    Fused("linear", "Qwen2_5_OmniAdaLayerNormZero_Final", lambda b, s: s.equal(2)),
    Fused("linear", "Qwen2_5_OmniAdaLayerNormZero$", lambda b, s: s.equal(6)),
    Fused("adaln_linear", "EsmFold2", lambda b, s: s.equal(6)),
    # A projected prefix of PEFT's: key and value of every layer, each as wide as the prefix's embedding.
    Fused(r"transform\.2", "PrefixEncoder", lambda b, s: s.equal(s.outputs // b.embedding.embedding_dim)),
    # Plain torch: the gates of recurrent layers, in the order of its documentation.
    Fused(r"weight_[ih]h_l\d+(_reverse)?", "LSTM", lambda b, s: s.equal(4)),
    Fused(r"weight_[ih]h_l\d+(_reverse)?", "GRU", lambda b, s: s.equal(3)),
)


@cache
def _about(kind: str, layer: str) -> tuple[Fused, ...]:
    """Those of `KNOWN` that apply: a model has few kinds of layers, and tens of thousands of each."""
    kind = kind.removeprefix("Parametrized")  # as torch calls a class with parametrizations
    return tuple(fused for fused in KNOWN if fused.applies(kind, layer))


def known_rule(place: Place, stored: Stored) -> Rule | None:
    """How the layer at `place` is cut; None where it looks fused and its layout is not known."""
    attribute = place.attribute.lower()
    block, name = place.in_block
    for fused in _about(type(block).__name__, name) if block is not None else ():
        try:
            rule = fused.rule(block, stored)
        except (AttributeError, TypeError, ZeroDivisionError):
            continue  # another kind of block with a layer of that name
        rule = replace(rule, sizes=tuple(size for size in rule.sizes if size))  # such as no rotary part
        return rule if rule.fits(stored) else None
    if attribute in GATE_UP_NAMES and stored.outputs % 2 == 0:
        # In transformers, experts say whether gate and up take turns.
        turns = getattr(place.block, "is_concatenated", True) is False or _model_type(place) == "gpt_oss"
        return Rule((1, 1), stored.outputs // 2) if turns else stored.equal(2)
    if attribute in QKV_NAMES:
        return _query_key_value(place, stored)
    return None if attribute in GATE_UP_NAMES | OTHER_FUSED_NAMES else Rule((stored.outputs,))


def _model_type(place: Place) -> str | None:
    return getattr(place.config, "model_type", None)


def _query_key_value(place: Place, stored: Stored) -> Rule | None:
    model_type, attribute, config = _model_type(place), place.attribute.lower(), place.config
    if model_type is None and attribute == "query_key_value":
        return None  # by head in most models
    if attribute in ("in_proj_weight", "qkv") or model_type is None:  # torch's attention, vision, plain models
        return stored.equal(3) if stored.outputs == 3 * stored.inputs else None
    if model_type not in QKV_IN_ORDER | QKV_BY_HEAD:
        return None
    heads = int(getattr(config, "num_attention_heads", None) or getattr(config, "n_head", None) or 0)
    groups = int(getattr(config, "num_key_value_heads", None) or heads)
    if not heads:
        return stored.equal(3) if stored.outputs == 3 * stored.inputs else None
    width, rest = divmod(stored.outputs, heads + 2 * groups)
    if rest:
        return None
    if model_type in QKV_BY_HEAD:
        return Rule((width,) * 3, heads) if heads == groups else None
    return Rule((heads * width, groups * width, groups * width))


@dataclass(frozen=True)
class Batch:
    """A parameter that is no plain (out, in) matrix: (layers, blocks) as in `Fused`, and how it is stored.

    With `flat`, the batch is no dimension of its own.
    """

    layers: str
    blocks: str
    stored: Callable[[Any, tuple[int, ...]], Stored]
    flat: bool = False


BATCHES = (
    # The experts of DBRX, below each other; w2 is (in, out).
    Batch(
        "w1|v1",
        "DbrxExpertGLU",
        lambda b, shape: Stored(shape[0] // b.ffn_hidden_size, b.ffn_hidden_size, shape[1]),
        flat=True,
    ),
    Batch(
        "w2",
        "DbrxExpertGLU",
        lambda b, shape: Stored(shape[0] // b.ffn_hidden_size, b.ffn_hidden_size, shape[1], True),
        flat=True,
    ),
    # Experts that are (in, out) without a mark, in some releases of transformers.
    Batch("gate_up_proj|down_proj", "Llama4TextExperts|GptOssExperts", lambda b, shape: Stored.of(shape, True)),
    Batch(r"\w*", r"\w*ParallelExperts", lambda b, shape: Stored.of(shape)),
    Batch("gate_proj|up_proj|down_proj", r"Inkling\w*", lambda b, shape: Stored.of(shape)),
    # A layer for each codebook.
    Batch("weight", r"(Moshi|KyutaiSpeechToText)FlexibleLinear", lambda b, shape: Stored.of(shape)),
    # The heads of Zamba's state spaces and of RecurrentGemma's gates, whose matrices multiply from the right.
    Batch("x_proj_weight|dt_proj_weight", "ZambaMamba", lambda b, shape: Stored.of(shape)),
    Batch(r"(input|recurrent)_gate_weight", "RecurrentGemma", lambda b, shape: Stored.of(shape, True)),
    # Attention whose heads have a dimension of their own: (hidden, heads, width); `o` returns to the hidden states.
    Batch("[qkvr]", "XLNetRelativeAttention", lambda b, shape: Stored(1, shape[0], math.prod(shape[1:]), True)),
    Batch("o", "XLNetRelativeAttention", lambda b, shape: Stored(1, shape[0], math.prod(shape[1:]))),
    Batch("r_kernel", "Funnel", lambda b, shape: Stored(1, shape[0], math.prod(shape[1:]), True)),
)


def known_batch(place: Place, shape: tuple[int, ...]) -> Stored | None:
    """How a parameter of several matrices, or of more than two dimensions, is stored; None for other parameters."""
    for holder, attribute in ((place.block, place.attribute), (place.layer, place.name.rpartition(".")[2])):
        batch = _batch(type(holder).__name__, attribute, len(shape) <= 2)
        if batch is not None:
            return batch.stored(holder, shape)
    return None


@cache
def _batch(kind: str, layer: str, flat: bool) -> Batch | None:
    """The first of `BATCHES` that is about layers of this name in blocks of this class, in two dimensions or more."""
    found = (batch for batch in BATCHES if batch.flat or not flat)
    return next((b for b in found if re.match(b.blocks, kind) and re.fullmatch(b.layers, layer)), None)


def stored_experts(place: Place, shape: tuple[int, ...]) -> Stored:
    """How a stack of experts (experts, rows, cols) is stored.

    transformers marks whether its experts are (in, out). Elsewhere the hidden size tells, if it is one of the two.
    """
    *_, rows, cols = shape
    marked = getattr(place.block, "is_transposed", None)
    if isinstance(marked, bool):
        return Stored.of(shape, marked)
    hidden = getattr(_text_config(place.config), "hidden_size", None)
    if rows == cols or hidden not in (rows, cols):
        return Stored.of(shape, told=False)
    reads = any(word in place.name for word in ("gate", "up"))  # the hidden states, which the others write
    return Stored.of(shape, hidden == (rows if reads else cols))


def _text_config(config: Any) -> Any:
    """The part of a composite config that describes the language model."""
    try:
        return config.get_text_config()
    except (AttributeError, ValueError):  # no such part, or several
        return config
