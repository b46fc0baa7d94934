"""The configuration of a converted GGUF file: made to say what the file says, and compared with it.
What a configuration cannot say is refused by the key's name.
"""

from __future__ import annotations

import json
import math
import re
from typing import Any

import torch
from torch import Tensor

from specdistill.errors import ModelError
from specdistill.models.gguf_contents import FACTORS, SPECIAL, Contents

BASE = 10_000.0  # of rotary frequencies, where a file does not say
_LLAMA3 = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_NORM = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_epsilon", "norm_eps")
# Keys below the architecture's name, and the settings that say the same: the first that the
# configuration has.
_SETTINGS = {
    "attention.head_count": ("num_attention_heads",),
    "attention.head_count_kv": ("num_key_value_heads", "num_kv_heads"),
    "attention.layer_norm_epsilon": _NORM,
    "attention.layer_norm_rms_epsilon": _NORM,
    "attn_logit_softcapping": ("attn_logit_softcapping",),
    "block_count": ("num_hidden_layers",),
    "context_length": ("max_position_embeddings",),
    "embedding_length": ("hidden_size",),
    "expert_count": ("num_experts", "num_local_experts"),
    "expert_feed_forward_length": ("moe_intermediate_size",),
    "expert_shared_feed_forward_length": ("shared_expert_intermediate_size",),
    "expert_used_count": ("num_experts_per_tok",),
    "expert_weights_norm": ("norm_topk_prob",),
    "feed_forward_length": ("intermediate_size", "ffn_hidden_size", "n_inner"),
    "final_logit_softcapping": ("final_logit_softcapping",),
    "logit_scale": ("logit_scale",),
    "use_parallel_residual": ("use_parallel_residual",),
    "vocab_size": ("vocab_size",),
}
_ELSEWHERE = {  # read below
    "attention.key_length",
    "attention.sliding_window",
    "attention.value_length",
    "rope.dimension_count",
    "rope.freq_base",
    "rope.scale_linear",
    "rope.scaling.attn_factor",
    "rope.scaling.factor",
    "rope.scaling.original_context_length",
    "rope.scaling.type",
    "rope.scaling.yarn_beta_fast",
    "rope.scaling.yarn_beta_slow",
}
_REMARKS = {"rope.scaling.finetuned", "tensor_data_layout"}  # say nothing about the computation
_WITHOUT_EFFECT = {  # but for these values
    "attention.causal": True,
    "attention.clamp_kqv": 0.0,
    "attention.max_alibi_bias": 0.0,
    "expert_gating_func": 1,  # softmax
    "expert_group_count": 0,
    "expert_shared_count": 0,
    "expert_weights_scale": 1.0,
    "leading_dense_block_count": 0,
    "nextn_predict_layers": 0,
    "pooling_type": 0,
}
_WINDOWED = {"gemma2", "gemma3_text", "gpt_oss"}  # families of which every second layer has one


def settle(config: Any, contents: Contents) -> None:
    """Make the configuration say what the file does, or refuse by the key's name."""
    settings = contents.settings
    for key, value in settings.items():
        harmless = key in _REMARKS | _ELSEWHERE or _WITHOUT_EFFECT.get(key) == value
        harmless |= key == "expert_gating_func" and hasattr(config, "scoring_func")
        if key in _SETTINGS:
            if (name := _setting(config, key)) is not None:
                setattr(config, name, _scalar(contents, key, value))
            elif key not in ("attention.head_count_kv", "feed_forward_length"):
                raise _unknown(contents, key, value)
        elif not harmless:
            raise _unknown(contents, key, value)
    head = _head_width(contents)
    if hasattr(config, "head_dim"):
        config.head_dim = head
    elif head * config.num_attention_heads != config.hidden_size:
        raise _unknown(contents, "attention.key_length", head)
    if config.model_type in ("gemma2", "gemma3_text"):  # the largest of either scales otherwise
        largest = config.num_hidden_layers == {"gemma2": 46, "gemma3_text": 62}[config.model_type]
        width = config.hidden_size // config.num_attention_heads
        config.query_pre_attn_scalar = width if largest else head
    _settle_window(config, contents)
    _settle_rope(config, contents)
    for name, key in SPECIAL.items():
        setattr(config, f"{name}_id", contents.token_id(key))
    ends = contents.ends
    config.eos_token_id = ends if len(ends) > 1 else next(iter(ends), None)


def _setting(config: Any, key: str) -> str | None:
    return next((name for name in _SETTINGS[key] if hasattr(config, name)), None)


def _unknown(contents: Contents, key: str, value: Any) -> ModelError:
    return contents.refusal(
        f"says {contents.architecture}.{key}: {str(value)[:60]}, which the converted model would "
        "not do"
    )


def _scalar(contents: Contents, key: str, value: Any) -> Any:
    """Some files have one value a layer."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise _unknown(contents, key, value)
        return value[0]
    return value


def _head_width(contents: Contents) -> int:
    settings = contents.settings
    head = settings.get("attention.key_length")
    if head is None:
        heads = _scalar(contents, "attention.head_count", settings["attention.head_count"])
        head = settings["embedding_length"] // heads
    if (values := settings.get("attention.value_length", head)) != head:
        raise _unknown(contents, "attention.value_length", values)
    return int(head)


def _settle_window(config: Any, contents: Contents) -> None:
    key = "attention.sliding_window"
    window, positions = contents.settings.get(key), contents.settings.get("context_length")
    if config.model_type in _WINDOWED:
        if window is not None:
            config.sliding_window = int(window)
        return
    if window and (positions is None or window < positions):
        raise _unknown(contents, key, window)
    if getattr(config, "sliding_window", None) is not None:
        config.sliding_window = None


def _settle_rope(config: Any, contents: Contents) -> None:
    settings = contents.settings
    ropes = getattr(config, "rope_parameters", None)
    if not ropes:
        if contents.factors is not None or any(key.startswith("rope.") for key in settings):
            raise contents.refusal("has rotary positions, and its family has none in Transformers")
        return
    config.rope_parameters = ropes = json.loads(json.dumps(ropes))
    rope = ropes.get("full_attention", ropes)  # what windows see is not scaled
    rope["rope_theta"] = float(settings.get("rope.freq_base", BASE))
    head = _head_width(contents)
    dims = int(settings.get("rope.dimension_count", head))
    if dims != head or "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = dims / head
    kind, factor, original = _scaling(contents)
    if kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": float(settings.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(settings.get("rope.scaling.yarn_beta_slow", 1.0)),
        }
    elif kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    if contents.factors is None:
        return
    if rope.get("rope_type", "default") != "default":
        raise contents.refusal(f"scales its rotary positions twice ({kind} and {FACTORS})")
    if len(contents.factors) != dims // 2:
        raise contents.refusal(f"has {len(contents.factors)} rotary factors for {dims} dimensions")
    rope |= _scaled_by(contents.factors, rope["rope_theta"], config.max_position_embeddings)


def _scaling(contents: Contents) -> tuple[str, float, int]:
    """Kind, factor and positions before the scaling, by llama.cpp's rules for what is not said."""
    settings = contents.settings
    kind = settings.get("rope.scaling.type", "linear")
    scale = settings.get("rope.scaling.factor", settings.get("rope.scale_linear"))
    factor = float(scale or 1.0)
    before = settings.get("rope.scaling.original_context_length")
    original = int(before or settings["context_length"])
    if kind not in ("none", "linear", "yarn"):
        raise _unknown(contents, "rope.scaling.type", kind)
    if not math.isfinite(factor) or factor <= 0 or (kind == "yarn" and factor < 1):
        raise _unknown(contents, "rope.scaling.factor", factor)
    if (scale := settings.get("rope.scaling.attn_factor", 1.0)) != 1:
        raise _unknown(contents, "rope.scaling.attn_factor", scale)
    return kind, factor, original


def _scaled_by(factors: Tensor, theta: float, positions: int) -> dict[str, Any]:
    """The settings by which Transformers divides each frequency by its factor: Llama 3's where they
    make the same, else the factors themselves.
    """
    plain = _frequencies(theta, 2 * len(factors))
    factor = round(factors.max().item(), 4)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    before = _LLAMA3["original_max_position_embeddings"]
    smooth = ((before * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.min() <= 0 or not factors.isfinite().all():
        raise ModelError(f"{FACTORS} holds factors that are none: {factors.min().item()}")
    if factor > 1 and torch.allclose(expected, factors, rtol=1e-5, atol=0):
        return {"rope_type": "llama3", "factor": factor, **_LLAMA3}
    return {
        "rope_type": "longrope",
        "short_factor": factors.tolist(),
        "long_factor": factors.tolist(),
        "factor": 1.0,
        "attention_factor": 1.0,
        "original_max_position_embeddings": positions,
    }


def _frequencies(theta: float, dims: int) -> Tensor:
    """Before any scaling, [dims / 2] float64."""
    return 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)


def check_frequencies(model: Any, contents: Contents) -> None:
    """Compare the model's rotary frequencies with llama.cpp's from the file's keys."""
    settings = contents.settings
    wide = [
        buffer.double()
        for name, buffer in model.named_buffers()
        if re.search(r"(^|\.)(full_attention_)?inv_freq$", name)
    ]
    if not wide:
        return
    dims = int(settings.get("rope.dimension_count", _head_width(contents)))
    theta = float(settings.get("rope.freq_base", BASE))
    kind, factor, _ = _scaling(contents)
    expected = _frequencies(theta, dims)
    if contents.factors is not None:
        expected /= contents.factors
    if kind == "linear":
        expected /= factor
    for frequencies in wide:
        same = len(frequencies) == len(expected)
        if same and kind != "yarn":
            same = torch.allclose(frequencies, expected, rtol=1e-4, atol=0)
        if not same:
            raise contents.refusal(
                f"has rotary positions ({kind}, {dims} dimensions, base {theta:g}) that the "
                "converted model would not have"
            )


def check_config(config: Any, contents: Contents) -> None:
    """Compare what was written with the file, key by key."""
    for key, value in contents.settings.items():
        if key not in _SETTINGS or (name := _setting(config, key)) is None:
            continue
        written, wanted = getattr(config, name), _scalar(contents, key, value)
        floats = isinstance(wanted, float) and isinstance(written, float)
        if written != wanted and not (floats and math.isclose(written, wanted, rel_tol=1e-6)):
            raise _unknown(contents, key, value)
