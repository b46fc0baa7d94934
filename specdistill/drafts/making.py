"""Making a draft from its target: some of the layers, and if wanted only the output rows a workload
uses.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, cast

import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils import skip_init

from specdistill import limits
from specdistill.errors import InputError, ModelError, StorageError, first_line
from specdistill.files import holding, must_be_new, replacing, writing
from specdistill.limits import shown
from specdistill.models import LanguageModel, load, stored_dtype, support
from specdistill.models.checkpoint_files import VOCAB_FILE
from specdistill.models.parallel import KIND, ORIGIN, PARD_TOKEN
from specdistill.models.randomness import Unfilled, seeded

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from specdistill.data.token_store import Store
    from specdistill.drafts.vocabulary import Vocabulary

FAR = 100.0  # how far below 0 the logits of tokens that a widened draft lacks should be
LEAST_ALONG = 0.3  # of an average state's part along the mean, what the smallest must have


def parse_layers(text: str) -> int | list[int]:
    """ "4" to 4, "0,1,29" to the numbers listed; how many layers there are is not known here."""
    parts = text.split(",")
    if not all(re.fullmatch(r"\s*[0-9]{1,19}\s*", part) for part in parts):
        raise InputError(
            f"--layers must be a number such as 4 or a list such as 0,1,29; got {shown(text)}"
        )
    numbers = [int(part) for part in parts]
    for number in numbers:
        limits.check("--layers", number, limits.LAYERS)
    return numbers if "," in text else numbers[0]


def listed_layers(layers: int | Sequence[int], available: int) -> list[int]:
    """4 is the first four layers, [0, 1, 29] the listed ones."""
    chosen = list(range(min(layers, available + 1))) if isinstance(layers, int) else list(layers)
    given = layers if isinstance(layers, int) else ",".join(map(str, layers))
    if not chosen or min(chosen) < 0 or max(chosen) >= available or len(set(chosen)) < len(chosen):
        raise InputError(
            f"layers must be a number of first layers, 1 to {available}, or a list of distinct "
            f"ones among the target's 0 to {available - 1}; got {shown(given)}"
        )
    return chosen


def make_draft(
    target: LanguageModel,
    layers: int | Sequence[int] = 4,
    vocabulary: Tensor | None = None,
    *,
    vocab_size: int | None = None,
    vocab_from: Store | str | Path | Sequence[Sequence[int]] | None = None,
    random_seed: int | None = None,
) -> LanguageModel:
    """A new model with the first `layers` of the target, or those listed, its embedding and its
    head (or the head's rows `vocabulary`; those of the `vocab_size` tokens most used in
    `vocab_from`, see `vocabulary_from`). With a seed it has the shape alone, and random weights.
    Raises `InputError` for arguments that do not fit, `ModelError` where these layers cannot stand
    by themselves.
    """
    from transformers import AutoModelForCausalLM

    if (vocab_size is None) != (vocab_from is None):
        raise InputError("vocab_size and vocab_from go together: how many tokens, and where from")
    if vocabulary is not None and vocab_size is not None:
        raise InputError("the vocabulary is given by its ids and by vocab_size; leave one out")
    layers = listed_layers(layers, target.num_layers)
    if vocab_size is not None and vocab_from is not None:
        from specdistill.drafts.vocabulary import vocabulary_from  # reads answers, by pydantic

        vocabulary = vocabulary_from(target, vocab_size, vocab_from).ids

    config = copy.deepcopy(target.model.config)
    text = config.get_text_config()
    for name, value in vars(text).items():
        # Settings by layer, such as layer_types.
        if isinstance(value, list) and len(value) == target.num_layers:
            setattr(text, name, [value[i] for i in layers])
    text.num_hidden_layers = len(layers)
    if shared := getattr(text, "num_kv_shared_layers", None):
        unshared = target.num_layers - shared
        if max(layers) >= unshared:
            raise ModelError(
                f"layers {unshared} to {target.num_layers - 1} of {target.name} have no keys and "
                "values of their own, but take those of earlier layers; take layers of 0 to "
                f"{unshared - 1}"
            )
        text.num_kv_shared_layers = 0
    for key in (ORIGIN, PARD_TOKEN, KIND):  # not this draft's
        vars(config).pop(key, None)
    if vocabulary is not None:
        text.tie_word_embeddings = config.tie_word_embeddings = False
    try:
        with Unfilled() if random_seed is None else seeded(random_seed):
            model = AutoModelForCausalLM.from_config(config, dtype=target.dtype)
    except Exception as error:  # settings that fit no other number of layers raise many kinds
        raise _unlike(target, layers, first_line(error)) from error
    model.generation_config = copy.deepcopy(target.model.generation_config)
    if random_seed is None:
        _copy_weights(target, layers, model)
    if vocabulary is not None:
        head = target.head if random_seed is None else model.get_output_embeddings()
        model.set_output_embeddings(_select_rows(head, vocabulary))
    model.to(target.device).eval().requires_grad_(False)
    draft = LanguageModel("draft", Path(), model, target.tokenizer, vocabulary)
    try:
        with torch.inference_mode():
            draft.hidden(torch.zeros((1, 2), dtype=torch.int64, device=draft.device))
    except Exception as error:  # a layer that reads what another one left
        raise _unlike(target, layers, first_line(error)) from error
    return draft


def _copy_weights(target: LanguageModel, layers: list[int], model: PreTrainedModel) -> None:
    prefix = f"{support.decoder_layers(target.name, target.model)[0]}."
    source = target.model.state_dict()
    weights = {}
    for name, empty in model.state_dict().items():
        origin = name
        if name.startswith(prefix):
            index, rest = name[len(prefix) :].split(".", 1)
            origin = f"{prefix}{layers[int(index)]}.{rest}"
        if origin not in source or source[origin].shape != empty.shape:
            raise _unlike(target, layers, f"nothing fits {name}")
        weights[name] = source[origin]
    model.load_state_dict(weights)


def _unlike(target: LanguageModel, layers: list[int], reason: str) -> ModelError:
    return ModelError(
        f"cannot make a draft of the layers {layers} of {target.name}: its layers are not alike "
        f"({reason}); take other layers, or an existing model as draft"
    )


class Made(NamedTuple):
    """What `write_draft` made, the target it is of, and how."""

    target: LanguageModel
    draft: LanguageModel
    layers: list[int]
    vocabulary: Vocabulary | None


@holding("out")
def write_draft(
    target: str,
    out: Path,
    layers: int | Sequence[int] = 4,
    *,
    vocab_size: int | None = None,
    vocab_from: str | None = None,
    random_seed: int | None = None,
    dtype: limits.Dtype = "auto",
) -> Made:
    """`make_draft` of the target of this name, on the CPU and in the dtype it is stored in, written
    to the new folder `out`. Raises as `make_draft`, `models.load` and `save_draft` do, and
    `InputError` before anything is loaded where `out` is not new or `vocab_from` is nowhere.
    """
    from specdistill.data.sources import open_answers
    from specdistill.drafts.vocabulary import vocabulary_from

    must_be_new(out)
    if vocab_from is not None:
        open_answers(vocab_from)
    model = load(target, dtype=stored_dtype(target) if dtype == "auto" else dtype, device="cpu")
    layers, vocabulary = listed_layers(layers, model.num_layers), None
    if vocab_size is not None and vocab_from is not None:
        vocabulary = vocabulary_from(model, vocab_size, vocab_from)
    ids = None if vocabulary is None else vocabulary.ids
    draft = save_draft(make_draft(model, layers, ids, random_seed=random_seed), out)
    return Made(model, draft, layers, vocabulary)


@holding("folder")
def save_draft(draft: LanguageModel, folder: Path) -> LanguageModel:
    """Write a checkpoint folder that `models.load` reads; without a trimmed vocabulary any Hugging
    Face program reads it. It takes the place of a checkpoint that is there, with all its files, and
    is there whole or not at all. Returns the same draft under the folder's name.

    Raises `StorageError`, also where `folder` holds anything else.
    """
    before = {*folder.iterdir()}
    if before and (folder / "config.json" not in before or any(file.is_dir() for file in before)):
        raise StorageError(
            f"{folder} holds other things than a checkpoint; name another folder or empty it"
        )
    advice = "free space or choose another folder"
    with writing(f"the draft to {folder}", advice), replacing(folder) as new:
        new.mkdir()
        size = "1TB" if draft.vocab is not None else "5GB"
        draft.model.save_pretrained(new, max_shard_size=size)
        draft.tokenizer.save_pretrained(new)
        if draft.vocab is not None:
            save_file({"ids": draft.vocab.cpu()}, new / VOCAB_FILE)
    return replace(draft, name=str(folder), path=folder)


def at_full_vocabulary(draft: LanguageModel, size: int | None = None) -> LanguageModel:
    """The same draft at the target's full vocabulary, for engines that know nothing of trimming,
    with as many rows for tokens as the target has (`size`): engines compare that number, padding
    included.

    Tokens it lacks must be out of reach in a checkpoint that has no place for a bias: a zero row
    has logit 0, and tens of thousands of those take a large part of the probability at temperature
    1. Their row is therefore `_far_row`'s. A head that has a bias says it exactly. The mask token
    of a parallel draft is only read: it gets such a row, in a head of its own.
    """
    size = size or draft.full_vocab_size
    mask = draft.mask_token
    if draft.vocab is None and size == draft.full_vocab_size and mask is None:
        return draft
    ids = torch.arange(draft.vocab_size) if draft.vocab is None else draft.vocab.cpu()
    columns = ((ids < size) & (ids != (-1 if mask is None else mask))).nonzero()[:, 0]
    ids, columns = ids[columns].to(draft.device), columns.to(draft.device)
    wide = copy.deepcopy(draft.model)
    if size != draft.full_vocab_size:
        wide.resize_token_embeddings(size, mean_resizing=False)
    head = cast("nn.Linear", wide.get_output_embeddings())
    if draft.vocab is not None or mask is not None:
        shape = (draft.head.in_features, size, draft.head.bias is not None)
        head = skip_init(nn.Linear, *shape, device=draft.device, dtype=draft.dtype)
        wide.config.get_text_config().tie_word_embeddings = False
        wide.config.tie_word_embeddings = False
    lacking = torch.ones(size, dtype=torch.bool, device=draft.device).index_fill(0, ids, False)
    wide.set_output_embeddings(head)
    wide.requires_grad_(False)
    head.weight[lacking] = 0 if head.bias is not None else _far_row(draft)
    head.weight[ids] = draft.head.weight[columns]
    if head.bias is not None:
        head.bias[lacking] = -FAR / draft.logit_scale
        head.bias[ids] = draft.head.bias[columns]
    return LanguageModel(draft.name, draft.path, wide, draft.tokenizer)


@torch.inference_mode()
def _far_row(draft: LanguageModel) -> Tensor:
    """A row [d] of the head whose logit is about -`FAR` at any final state.

    The final states h of a language model share a direction, their mean m, along which all of them
    lie: h·m / |m|² was 0.7 or more in whatever text of a distilled draft (`bench/LOG.md`). So the
    row is -FAR m / |m|². Where random texts say that this does not hold, a row of zeros is the
    least harm, and `export` tells what that costs.
    """
    states = draft.hidden(random_texts(draft, rows=32)).flatten(0, 1).double()
    mean = states.mean(0)
    along = states @ mean / mean.square().sum()
    if along.min() < LEAST_ALONG:
        return torch.zeros_like(draft.head.weight[0])
    return (-FAR / draft.logit_scale * mean / mean.square().sum()).to(draft.dtype)


def random_texts(draft: LanguageModel, rows: int) -> Tensor:
    """Any tokens in any order, the same ones each time, [rows, 64] or as long as the model reads:
    they take its states further afield than real text does.
    """
    generator = torch.Generator().manual_seed(0)
    size = (rows, min(64, draft.max_length))
    return torch.randint(draft.full_vocab_size, size, generator=generator).to(draft.device)


def _select_rows(head: nn.Module, rows: Tensor) -> nn.Linear:
    weight, bias = head.get_parameter("weight"), getattr(head, "bias", None)
    shape = (weight.shape[1], len(rows), bias is not None)
    new = skip_init(nn.Linear, *shape, device=weight.device, dtype=weight.dtype)
    with torch.no_grad():
        new.weight.copy_(weight[rows])
        if bias is not None:
            new.bias.copy_(bias[rows])
    return new


def decoder_layers(model: LanguageModel) -> nn.ModuleList:
    return support.decoder_layers(model.name, model.model)[1]
