"""A draft as other programs load it: an ordinary checkpoint at full vocabulary, with a model card,
loaded and compared after it was written.
"""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import torch

from specdistill import models
from specdistill.data.likeness import TRAINED
from specdistill.documents import read_yaml_mapping
from specdistill.drafts import making
from specdistill.drafts.model_card import readme
from specdistill.drafts.serve_commands import (
    IN_PARALLEL,
    NAMES,
    Engine,
    command,
    fenced,
    name_elsewhere,
)
from specdistill.errors import InputError, ModelError
from specdistill.files import holding, keep_apart, must_be_new, replacing, writing
from specdistill.models import LanguageModel
from specdistill.models.parallel import trained_draft_tokens
from specdistill.models.support import read_config
from specdistill.run_folder import RunFolder
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.served import Served
from specdistill.scoring.trust import objections, swapped_draft

MOST_LEAKED = 0.03  # of a draft's probability, what it may lose without a word
DEFAULT_NUM_DRAFT_TOKENS = 4  # for an unscored draft


@dataclass(frozen=True)
class Exported:
    """What was written, and what the check after it saw: the largest difference of a logit from the
    draft's own, and the share of probability that tokens a trimmed draft lacks take at temperature
    1 (mean over random texts, 0 for an untrimmed one).
    """

    out: str
    vocab_size: int
    serve: str
    largest_difference: float
    leaked: float
    scorecard: str | None
    notes: list[str]


@holding("out")
def export(
    draft: str | LanguageModel,
    out: str | Path,
    engine: Engine,
    scorecard: Path | None = None,
    target_name: str | None = None,
) -> Exported:
    """Write `draft`, a folder or a model loaded from one, into the new folder `out` for `engine`,
    whole or not at all. Figures come from `scorecard`, or from the scorecard.json beside the
    draft's folder where that is of this draft.

    The checkpoint has as many rows for tokens as the target, which is `target_name`, or that of the
    run that made the draft.

    Raises `InputError` for a scorecard of another draft or a draft that lies in no folder,
    `ModelError` where the written checkpoint does not compute what the draft does.
    """
    out = Path(out)
    if isinstance(draft, LanguageModel):
        if draft.path == Path():
            raise InputError("this draft lies in no folder yet; distil it, and export what comes")
        draft = str(draft.path)
    keep_apart([out], [draft, scorecard])
    must_be_new(out)
    model = models.load(draft, dtype=models.stored_dtype(draft), device="cpu")
    size = _target_size(model, target_name)
    card, notes = _card(model, scorecard)
    target = card.target.name if card else _named_target(model.path)
    serve = _serve(engine, target, str(out), model, card)
    advice = "free space or choose another folder"
    with writing(f"the draft to {out}", advice), replacing(out) as new:
        written = making.at_full_vocabulary(model, size)
        if model.mask_token is not None:  # or vLLM would take this one
            vars(written.model.config).pop("mask_token_id", None)
        making.save_draft(written, new)
        if (known := model.path / TRAINED).is_file():  # a score there asks for it, too
            shutil.copyfile(known, new / TRAINED)
        difference, leaked = check_written(model, new)
        both = None
        if model.mask_token is not None:
            both = _both_ways(engine, target, str(out), model, card)
        text = readme(model, target, card, fenced(engine, serve), both, leaked)
        (new / "README.md").write_text(text, encoding="utf-8")
    if leaked > MOST_LEAKED:
        notes.append(
            f"tokens that the trimmed draft lacks take {leaked:.0%} of its probability at "
            "temperature 1, so that other engines accept less than SpecDistill does"
        )
    figures = None if card is None else str(scorecard or _beside(model.path))
    return Exported(str(out), size, serve, difference, leaked, figures, notes)


@torch.inference_mode()
def check_written(draft: LanguageModel, folder: Path) -> tuple[float, float]:
    """Load the checkpoint as any program would and compare every logit of random texts with the
    draft's. Returns `Exported`'s largest difference and leaked share; raises `ModelError`.
    """
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stock = AutoModelForCausalLM.from_pretrained(folder, dtype=draft.dtype).eval()
    size = stock.get_input_embeddings().weight.shape[0]
    tokens = making.random_texts(draft, rows=8) % size
    theirs = stock(input_ids=tokens).logits
    ours = draft.logits(draft.hidden(tokens))
    theirs = theirs.to(ours.dtype)
    ids = torch.arange(draft.vocab_size) if draft.vocab is None else draft.vocab
    columns = ids < size
    if draft.mask_token is not None:  # out of reach there, and the draft never proposes it
        columns &= ids != draft.mask_token
    ids, ours = ids[columns], ours[..., columns]
    difference = (theirs[..., ids] - ours).abs().max().item()
    largest = ours.abs().max().item()
    # Stock logits of a model in half precision are rounded to it, ours are not.
    rounding = 1e-3 if draft.dtype in (torch.float32, torch.float64) else 0.03
    if not difference <= rounding * largest:
        raise ModelError(
            f"a checkpoint for other engines would not compute what {draft.name} does: a logit "
            f"differs by {difference:.3g} where the largest is {largest:.3g}; nothing was exported"
        )
    tokenizer = AutoTokenizer.from_pretrained(folder)
    if (
        tokenizer.get_vocab() != draft.tokenizer.get_vocab()
        or tokenizer.chat_template != draft.tokenizer.chat_template
    ):
        raise ModelError(
            f"a checkpoint's tokenizer would not be that of {draft.name}; nothing was exported"
        )
    share = theirs.double().softmax(-1)[..., ids].sum(-1)
    return difference, max(0.0, 1 - share.mean().item()) if len(ids) < size else 0.0


def _serve(
    engine: Engine, target: str, folder: str, draft: LanguageModel, card: Scorecard | None
) -> str:
    """The command, at the γ that was the fastest where the card's draft proposed in the same way;
    else at the one that a parallel draft was trained for.
    """
    mask = draft.mask_token if engine in IN_PARALLEL else None
    served = None
    if card and (card.drafting == "parallel") == (mask is not None):
        gamma, served = card.fixed_gamma, Served.of(card)
    else:
        trained = None if mask is None else trained_draft_tokens(draft)
        gamma = trained or DEFAULT_NUM_DRAFT_TOKENS
    return command(engine, name_elsewhere(target), folder, gamma, mask_token=mask, served=served)


def _both_ways(
    engine: Engine, target: str, folder: str, draft: LanguageModel, card: Scorecard | None
) -> str:
    """How a parallel draft is served in the way that `engine` does not."""
    other: Engine = "transformers" if engine in IN_PARALLEL else "vllm"
    way = "One token a pass" if engine in IN_PARALLEL else "In parallel"
    return (
        "This draft proposes in two ways, and the text is the target's in both. vLLM and "
        "TensorRT-LLM draft in parallel: one pass gives a whole round, from mask tokens (id "
        f"{draft.mask_token}, `pard_token` in config.json). Transformers, SGLang and llama.cpp "
        f"take a pass for every token, as of any draft. {way}, with {NAMES[other]}:\n\n"
        + fenced(other, _serve(other, target, folder, draft, card))
    )


def _target_size(draft: LanguageModel, name: str | None) -> int:
    """How many rows for tokens the target has; the draft's own where nobody says."""
    rows = (models.origin(draft) or {}).get("target_vocab_size")
    size = rows if isinstance(rows, int) and not isinstance(rows, bool) else draft.full_vocab_size
    if name is not None:
        size = read_config(name, models.locate(name)).get_text_config().vocab_size
    if size < (tokens := len(draft.tokenizer)):
        raise InputError(
            f"the target has {size} rows for tokens, and the tokenizer of {draft.name} {tokens} "
            "tokens: it is not the target of this draft"
        )
    return size


def _beside(folder: Path) -> Path:
    return RunFolder(folder.resolve().parent).scorecard


def _card(draft: LanguageModel, named: Path | None) -> tuple[Scorecard | None, list[str]]:
    """The draft's scorecard, or why there is none."""
    if named is not None:
        card = Scorecard.read(named)
        if doubts := swapped_draft(card.draft, draft.path):
            raise InputError(f"{named} is of another draft: {'; '.join(doubts)}")
        if doubts := objections(card):
            raise InputError(
                f"the figures of {named} cannot go along: {'; '.join(doubts)}; score the draft "
                "again, or leave --scorecard out"
            )
        return card, []
    beside = _beside(draft.path)
    if not beside.exists():
        return None, [
            f"the model card has no figures: score the draft first ({beside} is found by itself), "
            "or name a scorecard with --scorecard"
        ]
    card = Scorecard.read(beside)
    if doubts := swapped_draft(card.draft, draft.path) or objections(card):
        return None, [f"the model card has no figures: {'; '.join(doubts)}"]
    return card, []


def _named_target(folder: Path) -> str:
    """What the run's configuration calls the target; "TARGET" where there is none."""
    config = folder.resolve().parent / "config.yaml"
    try:
        target = read_yaml_mapping(config).get("target")
    except InputError:
        return "TARGET"
    return target if isinstance(target, str) else "TARGET"
