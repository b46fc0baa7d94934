"""Transformers' `generate` as an engine: assisted generation, with and without `assistant_model`,
that is scored, and answers in batches to train on.

Transformers keeps no counts, but its public hooks give them: a streamer is handed the tokens of
each round, and every forward pass of the assistant proposes one token.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, astuple
from itertools import groupby, pairwise
from typing import TYPE_CHECKING, Any

import torch
import transformers
from transformers import GenerationConfig
from transformers.generation.logits_process import LogitsProcessor, LogitsProcessorList
from transformers.generation.streamers import BaseStreamer

from specdistill.data.chat import EncodedPrompt
from specdistill.decoding import Request, Round, RowRound, Sampling, SpeculativeDecoder
from specdistill.decoding.sampling import row_seed
from specdistill.engines.base import explained_differences, scorecard, take_turns
from specdistill.errors import DecodingError, InputError
from specdistill.models import LanguageModel, check_positions, check_sizes
from specdistill.models.randomness import seeded
from specdistill.progress import Progress, silent
from specdistill.scoring.choice import Setting
from specdistill.scoring.measure import model_card, provenance
from specdistill.scoring.rows import Counts
from specdistill.scoring.scorecard import Scorecard

if TYPE_CHECKING:
    from torch import Tensor


class _Rounds(BaseStreamer):
    """How many tokens each round emitted, when, and the assistant had proposed before."""

    def __init__(self) -> None:
        self.passes = 0  # of the assistant, in the round that is under way
        self.sizes: list[tuple[int, int]] = []
        self.times: list[float] = []

    def put(self, value: Tensor) -> None:
        self.sizes.append((value.numel(), self.passes))
        self.times.append(time.perf_counter())
        self.passes = 0

    def end(self) -> None:
        """The answer is whole."""

    def count(self, *_: Any) -> None:
        self.passes += 1

    def answer(self, tokens: list[int], seconds: float, num: int) -> Counts:
        """A round emits what it accepted and one token more. Transformers counts so even where the
        answer ends with an accepted proposal, which it takes for that one token.
        """
        rounds = [(proposed, emitted - 1) for emitted, proposed in self.sizes[1:]]  # 0: the prompt
        return Counts(
            tokens,
            seconds,
            rounds=len(rounds),
            offered=[sum(proposed > i for proposed, _ in rounds) for i in range(num)],
            tested=[
                sum(proposed > i <= accepted for proposed, accepted in rounds) for i in range(num)
            ],
            accepted=[sum(accepted > i for _, accepted in rounds) for i in range(num)],
            step_seconds=[b - a for a, b in pairwise(self.times[1:])],
        )


def score(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    *,
    num_draft_tokens: Sequence[int],
    temperature: Sequence[float],
    max_new_tokens: int,
    seed: int = 0,
    progress: Progress = silent,
) -> Scorecard:
    """Decode every prompt with `generate`, plainly and with the draft as `assistant_model` at a
    constant γ, with no filter or penalty. Greedy differences are explained as in our own cards.
    Raises `InputError` for a draft with a trimmed vocabulary.
    """
    _refuse_trimmed(draft)
    check_sizes(target, draft)
    check_positions([draft], ((p.named, len(p.tokens) + max_new_tokens) for p in prompts))

    def ask(setting: Setting, prompt: EncodedPrompt, count: int) -> Counts:
        return _generate(target, draft, prompt, setting, count, seed)

    measured = take_turns(ask, prompts, temperature, num_draft_tokens, max_new_tokens, progress)
    ties = explained_differences(lambda: target, prompts, measured)
    facts = provenance(target, draft, seed, max_new_tokens, prompts)
    facts |= {"engine": "transformers", "turns": "prompt by prompt, in one process"}
    return scorecard(model_card(target), model_card(draft), facts, prompts, measured, ties, seed)


class _Checked(LogitsProcessor):
    """Names logits that hold no distribution, of which `generate` makes any token."""

    def __init__(self, model: LanguageModel) -> None:
        self.name = model.name

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if not scores.amax(-1).isfinite().all():
            raise DecodingError(
                f"{self.name}: Transformers' logits are NaN or all -inf; check the checkpoint, or "
                "try dtype float32, or batches of one"
            )
        return scores


class Batches:
    """Answers of `target` by `generate`, `batch_size` requests at a time, in the shape of
    `SpeculativeDecoder.stream`: each batch is one round, in which all its rows end. Batches hold
    requests of one sampling and like lengths. A sampled answer depends on the seed and on what else
    is in its batch, so that an interrupt changes the answers after it.
    """

    def __init__(self, target: LanguageModel, batch_size: int) -> None:
        """Raises `InputError` for a trimmed vocabulary."""
        _refuse_trimmed(target)
        self.target, self.batch_size = target, batch_size

    @property
    def facts(self) -> dict[str, Any]:
        """What decodes."""
        dtype = str(self.target.dtype).removeprefix("torch.")
        return {"name": "transformers", "version": transformers.__version__, "dtype": dtype}

    @property
    def refused(self) -> dict[str, str]:
        return {}

    def stream(self, requests: Iterable[Request]) -> Iterator[Round]:
        """Raises `InputError` and `DecodingError` as `SpeculativeDecoder.stream`."""
        waiting = sorted(requests, key=lambda r: (*_alike(r), len(r.tokens)))
        if waiting:
            SpeculativeDecoder(self.target).check(waiting)
        for _, group in groupby(waiting, key=_alike):
            rows = list(group)
            for first in range(0, len(rows), self.batch_size):
                yield self._answer(rows[first : first + self.batch_size])

    @torch.inference_mode()
    def _answer(self, requests: list[Request]) -> Round:
        target, first = self.target, requests[0]
        model: Any = target.model
        longest = max(len(r.tokens) for r in requests)
        pads = [longest - len(r.tokens) for r in requests]
        rows = [[0] * pad + list(r.tokens) for pad, r in zip(pads, requests, strict=True)]
        mask = [[0] * pad + [1] * (longest - pad) for pad in pads]
        tokens, given = (torch.tensor(x, device=target.device) for x in (rows, mask))
        start = time.perf_counter()
        drawing = seeded(row_seed(first.seed, first.id), target.device)
        config = _plainly(target, first.sampling, first.max_new_tokens)
        with drawing, _configured(target, config):
            checked = LogitsProcessorList([_Checked(target)])
            out = model.generate(tokens, attention_mask=given, logits_processor=checked)
        seconds = time.perf_counter() - start
        ends, answers = target.eos_ids, []
        for request, answer in zip(requests, out[:, longest:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(answer) if token in ends), None)
            answers.append(RowRound(request.id, answer[:end], 0, 0, 0, finished=True))
        return Round(answers, {"target": seconds}, draft_steps=0)


def _alike(request: Request) -> tuple[Any, ...]:
    """What the rows of one call of `generate` share."""
    return (*astuple(request.sampling), request.max_new_tokens)


def _refuse_trimmed(model: LanguageModel) -> None:
    if model.vocab is not None:
        raise InputError(
            f"{model.name} has a trimmed vocabulary, which Transformers cannot read; write it at "
            "full vocabulary with `specdistill export --for transformers`, and name that"
        )


def _plainly(model: LanguageModel, sampling: Sampling, count: int) -> GenerationConfig:
    """Nothing that the checkpoint asks for beside, such as a repetition penalty: the plain
    distribution, as our engine decodes it.
    """
    ends = sorted(model.eos_ids)
    # Off is said, as the defaults would filter.
    how = {"do_sample": True, **asdict(sampling)} if sampling.temperature else {}
    return GenerationConfig(
        max_new_tokens=count,
        eos_token_id=ends or None,
        pad_token_id=ends[0] if ends else 0,
        **how,
    )


def _proposing(draft: LanguageModel, num: int) -> GenerationConfig:
    """Of an assistant that always proposes `num` tokens."""
    config = copy.deepcopy(draft.model.generation_config)
    config.update(
        num_assistant_tokens=num,
        num_assistant_tokens_schedule="constant",
        assistant_confidence_threshold=0.0,
    )
    return config


@contextmanager
def _configured(model: LanguageModel, config: GenerationConfig) -> Iterator[None]:
    """`generate` heeds `config`; afterwards the model is as it was."""
    before, model.model.generation_config = model.model.generation_config, config
    try:
        yield
    finally:
        model.model.generation_config = before


@torch.inference_mode()
def _generate(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: EncodedPrompt,
    setting: Setting,
    count: int,
    seed: int,
) -> Counts:
    temperature, num = setting
    model: Any = target.model
    tokens = torch.tensor([prompt.tokens], device=target.device)
    rounds = _Rounds()
    hook = draft.model.register_forward_hook(rounds.count)
    drawing = seeded(row_seed(seed, f"{prompt.id}:{num}"), target.device)
    plainly = _configured(target, _plainly(target, Sampling(temperature), count))
    start = time.perf_counter()
    try:
        with drawing, plainly, _configured(draft, _proposing(draft, num)):
            out = model.generate(
                tokens,
                attention_mask=torch.ones_like(tokens),
                streamer=rounds,
                assistant_model=draft.model if num else None,
            )
    finally:
        hook.remove()
    seconds = time.perf_counter() - start
    answer: list[int] = out[0, len(prompt.tokens) :].tolist()
    return rounds.answer(answer, seconds, num)
