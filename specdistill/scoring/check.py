"""The affordable part of the lossless proof on a user's own pair: what `specdistill check` runs."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from typing import Any

import torch

from specdistill.data.chat import EncodedPrompt, encoded
from specdistill.data.prompts import Prompt
from specdistill.decoding import (
    ModelDrafter,
    Request,
    Sampling,
    SpeculativeDecoder,
    drafter_for,
)
from specdistill.decoding.records import CacheSize, Output
from specdistill.errors import InputError
from specdistill.models import LanguageModel, check_positions
from specdistill.progress import Progress, silent
from specdistill.scoring import lossless, sampled_texts
from specdistill.scoring.acceptance import acceptance_chances
from specdistill.scoring.lossless import FALSE_ALARM, GreedyPair
from specdistill.scoring.statistics import martingale_p_value
from specdistill_kernels import Mode

NUM_DRAFT_TOKENS = 4
TEXTS, TEXT_TOKENS = 4, 16  # sampled texts of a prompt, for their distribution
QUESTIONS = (
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the n-th Fibonacci number.",
    "List five things to check before you rent a flat.",
    "Rewrite this politely: I need the report now, you are two days late.",
    "What is 17 times 23? Show the steps.",
    "Write a short letter to a friend about a day at the sea.",
    "Summarise the story of Romeo and Juliet.",
    "Give a recipe for pancakes with the amounts.",
)


def built_in_prompts(limit: int) -> list[Prompt]:
    """For a user who names none: the first `limit` of a few questions of different kinds."""
    if limit < 1:
        raise InputError(f"limit is {limit}; it must be at least 1")
    return [
        Prompt(str(number), ({"role": "user", "content": text},))
        for number, text in enumerate(QUESTIONS[:limit], 1)
    ]


@dataclass(frozen=True)
class Check:
    """One line of the table; `figures` are the numbers behind the words."""

    name: str
    measured: str
    expected: str
    passed: bool
    figures: dict[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Pair:
    """What is checked. What several checks need is decoded once. Raises `InputError` where nothing
    would be proposed.
    """

    target: LanguageModel
    draft: LanguageModel
    prompts: Sequence[EncodedPrompt]
    max_new_tokens: int
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.prompts or self.max_new_tokens < 2:
            raise InputError(
                "a check needs at least one prompt and two new tokens, or nothing is proposed; got "
                f"{len(self.prompts)} prompts and max_new_tokens {self.max_new_tokens}"
            )

        lengths = ((p.named, len(p.tokens) + self.max_new_tokens) for p in self.prompts)
        check_positions([self.target, self.draft], lengths)

    def decode(
        self, draft: LanguageModel | None, temperature: float, batch_size: int | None = None
    ) -> dict[str, Output]:
        """Answers by prompt id: plain without a draft; all prompts in one batch by default."""
        decoder = self.decoder(draft, batch_size or len(self.prompts))
        generation = decoder.run(self._requests(temperature))
        return {output.request_id: output for output in generation.outputs}

    def cache_size(self) -> CacheSize:
        """What the largest cache will take, that of the target as its own draft."""
        return self.decoder(self.target, len(self.prompts)).cache_size(self._requests(1.0))

    def decoder(
        self, draft: LanguageModel | None, batch_size: int, mode: Mode = "token"
    ) -> SpeculativeDecoder:
        return SpeculativeDecoder(
            self.target,
            None if draft is None else drafter_for(draft, self.target.vocab_size),
            num_draft_tokens=0 if draft is None else NUM_DRAFT_TOKENS,
            batch_size=batch_size,
            mode=mode,
        )

    def _requests(self, temperature: float) -> list[Request]:
        sampling = Sampling(temperature)
        return [
            Request(p.id, p.tokens, self.max_new_tokens, sampling, self.seed) for p in self.prompts
        ]

    @cached_property
    def sampled(self) -> dict[str, Output]:
        """Speculative answers at temperature 1, in one batch."""
        return self.decode(self.draft, 1.0)

    @cached_property
    @torch.inference_mode()
    def rounding(self) -> float:
        """The share of probability that rounding moves: total variation between the distributions
        after one pass over many tokens and after passes over one, mean over the ends of sampled
        answers, of the model where it is larger; never below the precision of the logits.
        """
        readable = ModelDrafter(self.draft, self.target.vocab_size).readable
        moved = []
        for model in (self.target, self.draft):
            texts = (
                readable(torch.tensor(p.tokens + self.sampled[p.id].tokens)).tolist()
                for p in self.prompts[:4]
            )
            distances = [lossless.moved_by_rounding(model, text) for text in texts]
            moved.append(torch.cat(distances).mean().item())
        return max(torch.finfo(torch.promote_types(model.dtype, torch.float32)).eps, *moved)

    def explained(self, trials: int, draws: int = 1) -> int:
        """See `lossless.explained_by_rounding`."""
        return lossless.explained_by_rounding(self.rounding, trials, draws)


def identity(pair: Pair) -> Check:
    """The target as its own draft at temperature 1: p = q, so every proposal must stand."""
    rounds = [r for o in pair.decode(pair.target, 1.0).values() for r in o.rounds]
    tested = sum(r.tested for r in rounds)
    rejected = tested - sum(r.accepted for r in rounds)
    allowed = pair.explained(tested)
    return Check(
        "target as its own draft",
        f"{rejected} of {tested} rejected",
        _unless_rounding("none", allowed, pair),
        rejected <= allowed,
        {"tested": tested, "rejected": rejected, "explained_by_rounding": allowed},
    )


def greedy(pair: Pair) -> Check:
    """Temperature 0: token-identical to plain decoding, or parting at a tie within rounding. In
    half precision, where rounding is large, prompts are decoded one by one, so that the passes of a
    difference can be made again, and some of them in float32 too.
    """
    half = pair.target.dtype.itemsize < 4
    prompts = [(p.id, p.tokens) for p in pair.prompts]
    if half:
        pairs = lossless.greedy_pairs(
            pair.target, pair.draft, prompts, NUM_DRAFT_TOKENS, pair.max_new_tokens
        )
    else:
        plain, speculative = pair.decode(None, 0.0), pair.decode(pair.draft, 0.0)
        pairs = [GreedyPair(id_, tokens, plain[id_], speculative[id_]) for id_, tokens in prompts]
    differences = [
        lossless.explain_difference(pair.target, each, alone=half)
        for each in pairs
        if not each.identical
    ]
    ties = sum(difference["within_rounding"] for difference in differences)
    identical = len(pairs) - len(differences)
    measured = f"{identical} of {len(pairs)} identical" + (
        f", {ties} part at a tie" if ties else ""
    )
    figures = {"identical": identical, "compared": len(pairs), "differences": differences}
    passed = ties == len(differences)
    if half:
        wide = lossless.greedy_in_float32(
            pair.target, pair.draft, prompts[: lossless.SHARE], NUM_DRAFT_TOKENS, pair.seed
        )
        same, compared = wide.greedy_identical
        measured += f"; in float32 {wide.missing or f'{same} of {compared}'}"
        figures |= {"float32": asdict(wide), "differences": differences + wide.ties}
        passed = passed and not wide.failures
    return Check(
        "greedy text",
        measured,
        "that of plain decoding; it may part where rounding decides a tie",
        passed,
        figures,
    )


def acceptance(pair: Pair) -> Check:
    """Accepted / tested at temperature 1 against the mean of Σ min(p, q) from passes of their own.

    Given the text so far, a tested proposal stands with chance a = Σ min(p, q), so accepted - Σ a
    is a martingale of variance Σ a (1 - a).
    """
    chances = torch.cat(
        [
            acceptance_chances(pair.target, pair.draft, p.tokens, pair.sampled[p.id], 1.0)
            for p in pair.prompts
        ]
    )
    tested = len(chances)
    accepted = sum(r.accepted for o in pair.sampled.values() for r in o.rounds)
    variance = (chances * (1 - chances)).sum().item()
    off = abs(accepted - chances.sum().item()) - 2 * pair.rounding * tested
    p_value = martingale_p_value(off, variance)
    expected, error = chances.mean().item(), math.sqrt(variance) / tested
    return Check(
        "acceptance rate",
        f"{accepted / tested:.3f} ({accepted} of {tested})",
        f"Σ min(p, q) = {expected:.3f} ± {error:.3f}",
        p_value >= FALSE_ALARM,
        {
            "accepted": accepted,
            "tested": tested,
            "expected": expected,
            "standard_error": error,
            "p_value": p_value,
        },
    )


def distribution(pair: Pair, mode: Mode) -> Check:
    """The tokens emitted at temperature 1: by the pair's own logits after some of the prompts, and
    in texts that its own engine samples after them.
    """
    prompts = pair.prompts[:4]
    narrow = sampled_texts.combined_p_value(
        [
            sampled_texts.distribution_p_value(
                pair.target, pair.draft, p.tokens, pair.seed + i, mode=mode
            )
            for i, p in enumerate(prompts)
        ]
    )
    requests = [
        Request(
            f"{p.id}#{i}",
            p.tokens,
            min(TEXT_TOKENS, pair.max_new_tokens),
            Sampling(1.0),
            pair.seed,
        )
        for p in prompts
        for i in range(TEXTS)
    ]
    outputs = pair.decoder(pair.draft, len(requests), mode).run(requests).outputs
    texts = [(list(r.tokens), o) for r, o in zip(requests, outputs, strict=True)]
    sampled = sampled_texts.sampled_p_value(pair.target, pair.draft, texts, pair.seed)
    p_value = min(1.0, 2 * min(narrow, sampled))
    tokens = sum(len(o.tokens) for o in outputs)
    return Check(
        f"distribution, {mode} verification",
        f"p = {p_value:.2g}",
        f"p of at least {FALSE_ALARM:g}",
        p_value >= FALSE_ALARM,
        {"p_value": p_value, "prompts": len(prompts), "sampled_tokens": tokens},
    )


def seeds(pair: Pair) -> Check:
    """Temperature 1: a seed gives the same text alone and in a batch, but for rounding. A token is
    decided by three draws: the draft's, the coin and the one after the accepted tokens.
    """
    alone = Pair(pair.target, pair.draft, pair.prompts[:4], pair.max_new_tokens, pair.seed)
    texts = {id_: output.tokens for id_, output in alone.decode(pair.draft, 1.0, 1).items()}
    parted = sum(pair.sampled[id_].tokens != tokens for id_, tokens in texts.items())
    allowed = min(len(texts), pair.explained(sum(map(len, texts.values())), draws=3))
    return Check(
        "same seed, alone and in a batch",
        f"{len(texts) - parted} of {len(texts)} texts identical",
        _unless_rounding("all", allowed, pair),
        parted <= allowed,
        {"compared": len(texts), "parted": parted, "explained_by_rounding": allowed},
    )


CHECKS: Mapping[str, Callable[[Pair], Check]] = {
    "identity": identity,
    "greedy": greedy,
    "acceptance": acceptance,
    "distribution": lambda pair: distribution(pair, "token"),
    "distribution, block": lambda pair: distribution(pair, "block"),
    "seeds": seeds,
}


def check(
    target: LanguageModel,
    draft: LanguageModel,
    prompts: Sequence[Prompt] | None = None,
    *,
    max_new_tokens: int = 32,
    seed: int = 0,
    progress: Progress = silent,
) -> list[Check]:
    """`run_checks` on the prompts, or on a few that are built in. Raises `InputError`."""
    asked = built_in_prompts(len(QUESTIONS)) if prompts is None else prompts
    pair = Pair(target, draft, encoded(target.tokenizer, asked), max_new_tokens, seed)
    return run_checks(pair, progress)


def run_checks(pair: Pair, progress: Progress = silent) -> list[Check]:
    """All checks, in this order. Where nothing is wrong, each one that looks at chance fails at
    most once in 1 / FALSE_ALARM seeds.
    """
    results = []
    for number, (name, check) in enumerate(CHECKS.items()):
        progress("check", number, len(CHECKS), name)
        results.append(check(pair))
    progress("check", len(CHECKS), len(CHECKS))
    return results


def _unless_rounding(expected: str, allowed: int, pair: Pair) -> str:
    if not allowed:
        return expected
    dtype = str(pair.target.dtype).removeprefix("torch.")
    return f"{expected}; rounding in {dtype} explains up to {allowed}"
