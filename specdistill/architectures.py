"""Which models the engine can decode: those whose rows can be rewound, each at its own length."""

from __future__ import annotations

import inspect
from typing import Any

import torch

from specdistill.errors import ModelError


def check_decodable(name: str, config: Any, trust_remote_code: bool) -> None:
    """Refuse what the engine cannot decode, by the config and by the empty modules it describes:
    no weights are read. Raises `ModelError`.
    """
    from transformers import AutoModelForCausalLM

    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder model; only decoder-only models are supported"
        )
    state = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    obstacle = None
    if not state:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code)
        if model._is_stateful:
            state = {"recurrent layers"}
        else:
            obstacle = _obstacle(text, model)
    if state:
        obstacle = (
            f"has layers that cannot be rewound after a rejection ({', '.join(sorted(state))})"
        )
    if obstacle is not None:
        raise ModelError(
            f"{name} ({text.model_type}) {obstacle}; supported are models of full and sliding "
            "attention over a cache of keys and values, with rotary or learned positions"
        )


def _obstacle(config: Any, model: Any) -> str | None:
    """What in a model without recurrent layers would make the engine compute something else."""
    body, head = model.base_model, model.get_output_embeddings()
    known = {id(p) for module in (body, head) if module is not None for p in module.parameters()}
    between = [key for key, p in model.named_parameters() if id(p) not in known]
    takes = inspect.signature(body.forward).parameters
    if head is None or body is model:
        return "is not made of a body and an output head"
    if between:
        return f"changes its hidden states before the output head ({between[0]})"
    if "past_key_values" not in takes:
        return "has no cache of keys and values"
    if "position_ids" not in takes or getattr(config, "alibi", False):
        return (
            "takes no position ids (ALiBi or relative positions): rows could not differ in length"
        )
    if any(buffer.dim() == 4 for buffer in model.buffers()):
        return "masks by place in the cache, not by position, in buffers of its own"
    if getattr(config, "use_bidirectional_attention", None) is True:
        return "attends to later tokens"
    return None
