"""Which models the engine can decode: those whose rows can be rewound, each at its own length."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from specdistill.errors import ModelError, model_errors
from specdistill.models.checkpoint_files import CONFIG, read_json

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
    with model_errors(f"cannot load {name}: its {CONFIG} is damaged"):
        config = AutoConfig.from_pretrained(folder, trust_remote_code=False)
        text = config.get_text_config()
        sizes = {size: _one(text, size) for size in _SIZES}
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


def _one(config: Any, setting: str) -> Any:
    """A setting, or None where Transformers says that each layer has one of its own."""
    try:
        return getattr(config, setting, None)
    except RuntimeError:
        return None


def empty_model(name: str, config: Any) -> Any:
    """The modules a configuration describes, on the meta device. Raises `ModelError`."""
    from transformers import AutoModelForCausalLM

    unfit = f"cannot load {name}: its {CONFIG} describes no model that Transformers can build"
    with model_errors(unfit), torch.device("meta"):
        return AutoModelForCausalLM.from_config(config, trust_remote_code=False)


def check_decodable(name: str, config: Any) -> None:
    """Refuse what the engine cannot decode, by the config and by the empty modules it describes:
    no weights are read. Raises `ModelError`.
    """
    text = config.get_text_config()
    if config.is_encoder_decoder:
        raise ModelError(
            f"{name} is an encoder-decoder model; only decoder-only models are supported"
        )
    others = set(getattr(text, "layer_types", None) or []) - {"full_attention", "sliding_attention"}
    obstacle = _rewinds_no(others) if others else _obstacle(text, empty_model(name, config))
    if obstacle is not None:
        raise ModelError(
            f"{name} ({text.model_type}) {obstacle}; supported are models of full and sliding "
            "attention over a cache of keys and values, with rotary or learned positions"
        )


def _rewinds_no(layers: Iterable[str]) -> str:
    return f"has layers that cannot be rewound after a rejection ({', '.join(sorted(layers))})"


def _obstacle(config: Any, model: Any) -> str | None:
    """What in a model would make the engine compute something else."""
    if model._is_stateful:
        return _rewinds_no(["recurrent layers"])
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


def decoder_layers(name: str, model: Any) -> tuple[str, nn.ModuleList]:
    """The layers of the text model and where they are, such as "model.layers": other towers have
    layers too, and may have as many. Raises `ModelError`.
    """
    text = model.get_decoder()
    inside = {id(module) for module in text.modules()}
    count = model.config.get_text_config().num_hidden_layers
    for place, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and id(module) in inside:
            return place, module
    raise ModelError(f"{name}: found no list of {count} layers in its text model")


def settle_window(name: str, model: Any) -> None:
    """Make the configuration in memory say which layers slide as its modules do: a family that
    knows no sliding window has no use for one that its config.json names, but Transformers' caches
    would take it, and so would the masks made here.
    """
    config = model.config.get_text_config()
    if not getattr(config, "sliding_window", None):
        return
    slides = _sliding_layers(name, model)
    if getattr(config, "layer_types", None):
        kinds = ["sliding_attention" if slid else "full_attention" for slid in slides]
        if config.layer_types != kinds:
            config.layer_types = kinds
    elif not any(slides):
        try:
            config.sliding_window = None
        except Exception:  # a family whose settings must name one
            config.sliding_window = 2**31 - 1


@torch.inference_mode()
def _sliding_layers(name: str, model: Any) -> list[bool]:
    """Of each layer, whether it is handed a mask that slides, in a pass whose window is short."""
    place, layers = decoder_layers(name, model)
    text = model.get_submodule(place.rpartition(".")[0])
    slides = [False] * len(layers)

    def watch(index: int) -> Any:
        def look(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            for mask in (*args, *kwargs.values()):
                if isinstance(mask, Tensor) and mask.dim() == 4 and mask.shape[-1] == len(tokens):
                    first = mask[..., -1, 0]  # whether the last token does not see the first
                    slides[index] = bool((~first if mask.dtype == torch.bool else first < -1).all())

        return layers[index].register_forward_pre_hook(look, with_kwargs=True)

    tokens, window = list(range(8)), text.config.sliding_window
    hooks = [watch(index) for index in range(len(layers))]
    text.config.sliding_window = 3
    try:
        device = next(text.parameters()).device
        text(input_ids=torch.tensor([tokens], device=device), use_cache=False)
    finally:
        text.config.sliding_window = window
        for hook in hooks:
            hook.remove()
    return slides


# What families call the number of a mixture's experts, and how many of them a token is sent to.
_EXPERTS = (
    "num_local_experts",
    "num_experts",
    "n_routed_experts",
    "moe_num_experts",
    "num_moe_experts",
)
_CHOSEN = (
    "num_experts_per_tok",
    "num_experts_per_token",
    "moe_topk",
    "moe_top_k",
    "moe_k",
    "top_k_experts",
    "num_selected_experts",
)


def active_experts(config: Any) -> Fraction:
    """The share of a mixture's experts that a token is sent to; 1 where none are known."""
    experts, chosen = _first(config, _EXPERTS), _first(config, _CHOSEN)
    return Fraction(min(chosen, experts), experts) if experts and chosen else Fraction(1)


def is_of_experts(name: str, parameter: Tensor, config: Any) -> bool:
    """Whether a parameter is of experts among which tokens are dealt: a module of that name, each
    by itself or all in one tensor [experts, ...].
    """
    if "experts" in name.split("."):
        return True
    return parameter.dim() == 3 and parameter.shape[0] == _first(config, _EXPERTS)


def _first(config: Any, names: Sequence[str]) -> int | None:
    values = (getattr(config, name, None) for name in names)
    return next((v for v in values if isinstance(v, int) and v > 0), None)
