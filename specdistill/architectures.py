"""Which models the engine can decode: those whose rows can be rewound, each at its own length."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import torch

from specdistill.checkpoint_files import CONFIG, read_json
from specdistill.errors import ModelError, first_line

MOST_LAYERS = 10_000
# Settings of a config that count something: there is at least one of it.
_SIZES = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
)


def read_config(name: str, folder: Path) -> Any:
    """The configuration of a checkpoint, as Transformers reads it. Raises `ModelError` for one that
    is damaged, or asks for code of its own.
    """
    from transformers import CONFIG_MAPPING, AutoConfig

    written = read_json(folder / CONFIG)
    kind = written.get("model_type")
    if "auto_map" in written and kind not in CONFIG_MAPPING:
        raise ModelError(
            f"{name} needs code out of its own folder (auto_map in its {CONFIG}), which is never "
            "run here; take a model of a family that Transformers itself knows"
        )
    try:
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        sizes = {size: getattr(text, size, None) for size in _SIZES}
    except Exception as error:  # readers of damaged settings raise many kinds
        raise ModelError(
            f"cannot load {name}: its {CONFIG} is damaged ({first_line(error)})"
        ) from error
    if sizes["max_position_embeddings"] == -1:  # no limit
        del sizes["max_position_embeddings"]
    for size, value in sizes.items():
        one = min(value, default=0) if isinstance(value, list) else value  # some have one a layer
        if one is not None and (not isinstance(one, int) or isinstance(one, bool) or one < 1):
            raise ModelError(
                f"cannot load {name}: its {CONFIG} says {size}: {value}; it must be 1 or more"
            )
    if (layers := sizes["num_hidden_layers"] or 0) > MOST_LAYERS:
        raise ModelError(
            f"cannot load {name}: its {CONFIG} says num_hidden_layers: {layers:,}; no model has "
            f"more than {MOST_LAYERS:,}"
        )
    return config


def empty_model(name: str, config: Any) -> Any:
    """The modules a configuration describes, on the meta device. Raises `ModelError`."""
    from transformers import AutoModelForCausalLM

    try:
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config, trust_remote_code=False)
    except Exception as error:  # settings that fit no module raise many kinds
        raise ModelError(
            f"cannot load {name}: its {CONFIG} describes no language model that Transformers can "
            f"build ({first_line(error)})"
        ) from error


def check_decodable(name: str, config: Any) -> None:
    """Refuse what the engine cannot decode, by the config and by the empty modules it describes:
    no weights are read. Raises `ModelError`.
    """
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder model; only decoder-only models are supported"
        )
    state = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    obstacle = None
    if not state:
        model = empty_model(name, config)
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
