"""Transformers' assisted generation as an engine: `generate` with and without `assistant_model`.

Transformers keeps no counts, but its public hooks give them: a streamer is handed the tokens of
each round, and every forward pass of the assistant proposes one token.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers.generation.streamers import BaseStreamer

from specdistill.decoding.sampling import row_seed
from specdistill.engines.measure import Answer, scorecard, take_turns
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.progress import Progress, silent
from specdistill.scoring.lossless import explain_difference
from specdistill.scoring.measure import EncodedPrompt, Setting
from specdistill.scoring.provenance import model_card, provenance
from specdistill.scoring.scorecard import Scorecard

if TYPE_CHECKING:
    from torch import Tensor


class _Rounds(BaseStreamer):
    """How many tokens each round emitted and the assistant had proposed before."""

    def __init__(self) -> None:
        self.passes = 0  # of the assistant, in the round that is under way
        self.sizes: list[tuple[int, int]] = []

    def put(self, value: Tensor) -> None:
        self.sizes.append((value.numel(), self.passes))
        self.passes = 0

    def end(self) -> None:
        """The answer is whole."""

    def count(self, *_: Any) -> None:
        self.passes += 1

    def answer(self, tokens: list[int], seconds: float, num: int) -> Answer:
        """A round emits what it accepted and one token more. Transformers counts so even where the
        answer ends with an accepted proposal, which it takes for that one token.
        """
        rounds = [(proposed, emitted - 1) for emitted, proposed in self.sizes[1:]]  # 0: the prompt
        return Answer(
            tokens,
            seconds,
            rounds=len(rounds),
            offered=[sum(proposed > i for proposed, _ in rounds) for i in range(num)],
            tested=[sum(proposed > i <= kept for proposed, kept in rounds) for i in range(num)],
            accepted=[sum(kept > i for _, kept in rounds) for i in range(num)],
        )


def score(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    *,
    num_draft_tokens: Sequence[int],
    temperatures: Sequence[float],
    max_new_tokens: int,
    seed: int = 0,
    progress: Progress = silent,
) -> Scorecard:
    """Decode every prompt with `generate`, plainly and with the draft as `assistant_model` at a
    constant γ, no filters. Greedy differences are explained as in our own cards. Raises
    `InputError` for a draft with a trimmed vocabulary.
    """
    if draft.vocab is not None:
        raise InputError(
            f"{draft.name} has a trimmed vocabulary, which Transformers cannot read; write it at "
            "full vocabulary with `specdistill export --for transformers`, and score that"
        )

    def ask(setting: Setting, prompt: EncodedPrompt, count: int) -> Answer:
        return _generate(target, draft, prompt, setting, count, seed)

    runs = take_turns(ask, prompts, temperatures, num_draft_tokens, max_new_tokens, progress)
    ties = [
        explain_difference(target, prompt.id, prompt.tokens, plain.tokens, answer.tokens)
        for (t, g), answers in runs.items()
        if t == 0 and g
        for prompt, plain, answer in zip(prompts, runs[0, 0], answers, strict=True)
        if plain.tokens != answer.tokens
    ]
    told = provenance(target, seed, max_new_tokens, prompts)
    told |= {"engine": "transformers", "turns": "prompt by prompt, in one process"}
    return scorecard(model_card(target), model_card(draft), told, prompts, runs, ties, seed)


@torch.inference_mode()
def _generate(
    target: LanguageModel,
    draft: LanguageModel,
    prompt: EncodedPrompt,
    setting: Setting,
    count: int,
    seed: int,
) -> Answer:
    temperature, num = setting
    model: Any = target.model
    tokens = torch.tensor([prompt.tokens], device=target.device)
    ends = sorted(target.eos_ids)
    settings: dict[str, Any] = {
        "max_new_tokens": count,
        "eos_token_id": ends or None,
        "pad_token_id": ends[0] if ends else 0,
        "do_sample": temperature > 0,
    }
    if temperature:  # its defaults would filter
        settings |= {"temperature": temperature, "top_k": 0, "top_p": 1.0}
    rounds = _Rounds()
    hook = draft.model.register_forward_hook(rounds.count)
    if num:
        draft.model.generation_config.update(
            num_assistant_tokens=num,
            num_assistant_tokens_schedule="constant",
            assistant_confidence_threshold=0.0,
        )
        settings["assistant_model"] = draft.model
    torch.manual_seed(row_seed(seed, f"{prompt.id}:{num}"))
    start = time.perf_counter()
    try:
        out = model.generate(
            tokens, attention_mask=torch.ones_like(tokens), streamer=rounds, **settings
        )
    finally:
        hook.remove()
    seconds = time.perf_counter() - start
    answer: list[int] = out[0, len(prompt.tokens) :].tolist()
    return rounds.answer(answer, seconds, num)
