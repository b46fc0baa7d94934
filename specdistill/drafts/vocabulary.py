"""Which tokens a draft with a trimmed output vocabulary can propose."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from specdistill.data.signal import STATES, States
from specdistill.data.sources import TokenAnswers, open_answers
from specdistill.data.token_store import Store
from specdistill.errors import InputError
from specdistill.models import LanguageModel, check_tokens

MOST_STATES = 4096  # of answers, read to choose a vocabulary


@dataclass(frozen=True)
class Vocabulary:
    """The tokens a trimmed draft can propose; `coverage` is their share of the usage, which is
    counted in `unit`.
    """

    ids: Tensor  # [Vd] sorted target ids
    coverage: float
    unit: Literal["tokens", "the target's probability"] = "tokens"


def count_tokens(target: LanguageModel, texts: Iterable[list[int]]) -> Tensor:
    """How often each token occurs in token lists, [V] float64. Raises `InputError` for ids that
    the target does not embed.
    """
    texts = list(texts)
    for text in texts:
        check_tokens(target, text, "the data to count tokens in")
    tokens = torch.tensor([token for text in texts for token in text], dtype=torch.int64)
    return torch.bincount(tokens, minlength=target.vocab_size).double()


@torch.inference_mode()
def expected_usage(target: LanguageModel, hidden: Tensor, chunk: int = 256) -> Tensor:
    """How often the target would emit each token at temperature 1 after final hidden states [N, d]:
    its probabilities, summed, [V] float64. Sees far more of the tail than the N tokens drawn."""
    usage = torch.zeros(target.vocab_size, dtype=torch.float64, device=target.device)
    for rows in hidden.to(target.device).split(chunk):
        usage += target.logits(rows).softmax(-1).sum(0)
    return usage.cpu()


def choose_vocabulary(target: LanguageModel, usage: Tensor, size: int) -> Vocabulary:
    """The `size` tokens of greatest `usage` [V]; special tokens and ends of answers always stay."""
    if not 1 <= size <= target.vocab_size:
        raise InputError(f"vocabulary size must be 1 to {target.vocab_size}; got {size}")
    if not usage.sum() > 0:
        raise InputError("the data to count tokens in is empty")
    always = sorted({*target.tokenizer.all_special_ids, *target.eos_ids} & set(range(len(usage))))
    if size < len(always):
        raise InputError(
            f"vocabulary size {size} is below the {len(always)} special tokens, which always stay"
        )
    ranked = usage.clone()
    ranked[always] = torch.inf
    # Where the data uses fewer tokens than asked for, the lowest ids follow: the commonest in BPE.
    ids = ranked.argsort(descending=True, stable=True)[:size].sort().values
    return Vocabulary(ids, (usage[ids].sum() / usage.sum()).item())


def vocabulary_from(
    target: LanguageModel,
    size: int,
    source: Store | str | Path | Sequence[Sequence[int]],
    seed: int = 0,
) -> Vocabulary:
    """The `size` tokens of greatest use in answers: a folder of `generate` or what that returned, a
    file of prompts with responses, or token lists. Where states of this target are kept, use is its
    probability, over at most `MOST_STATES` positions drawn by the seed: such a vocabulary held .92
    to .94 of the target's mass, and one by counts .80 to .84 (`bench/LOG.md`). Elsewhere tokens are
    counted. Raises `InputError`, and as the answers' readers do.
    """
    if not isinstance(source, Store | str | Path):
        return choose_vocabulary(target, count_tokens(target, map(list, source)), size)
    answers = open_answers(str(source.folder if isinstance(source, Store) else source))
    if not (
        isinstance(answers, TokenAnswers)
        and answers.manifest.signal == STATES
        and target.has_sha256(answers.manifest.target_sha256)
    ):
        usage = count_tokens(target, answers.token_lists(target.tokenizer))
        return choose_vocabulary(target, usage, size)
    examples = list(answers.examples(signal=True))
    for example in examples:
        check_tokens(
            target, example.prompt_tokens + example.response_tokens, f"answer {example.id}"
        )
    signals = [example.signal for example in examples]
    hidden = torch.cat([signal.hidden for signal in signals if isinstance(signal, States)])
    places = torch.randperm(len(hidden), generator=torch.Generator().manual_seed(seed))
    usage = expected_usage(target, hidden[places[:MOST_STATES]])
    return replace(choose_vocabulary(target, usage, size), unit="the target's probability")
