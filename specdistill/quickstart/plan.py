"""What `quickstart` does in the minutes it is given: what the user asks for, what is chosen for
what the user leaves open, and how the minutes are divided.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import median
from typing import NamedTuple

import torch

from specdistill import limits
from specdistill.config import Parallel
from specdistill.data.chat import EncodedPrompt
from specdistill.data.generation import signal_bytes
from specdistill.decoding import Request, SpeculativeDecoder
from specdistill.decoding.cache import cache_bytes
from specdistill.demo import DEMO
from specdistill.drafts.making import make_draft
from specdistill.drafts.vocabulary import choose_vocabulary
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.models.memory import free_bytes
from specdistill.progress import Progress, silent
from specdistill.scoring.card_rows import DraftingWay
from specdistill.scoring.turns import MIN_PROMPTS
from specdistill.training.parallel import begin

MINUTES = 30.0
LEAST_ANSWERS = 16
LENGTHS = (256, 128, 64, 32, 16)  # of answers, in tokens
SHARE = 0.35  # of the time: the most that answers take, and the most that scoring takes
SLACK = 1.2  # no machine is always as fast as when it was timed


@dataclass(frozen=True)
class Task:
    """What a user asks for. `choose` decides what is None; the minutes are then 30, and the
    held-out prompts are split from the others. With nothing asked for it is the demo.
    """

    target: str = DEMO
    prompts: str = "demo:train"
    heldout: str | None = None
    minutes: float | None = None
    layers: int | None = None
    vocab_size: int | None = None
    drafting: DraftingWay | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "minutes": limits.POSITIVE,
            "layers": limits.COUNT,
            "vocab_size": limits.VOCABULARY,
            "seed": limits.SEED,
        }
        for name, allowed in bounds.items():
            if (value := getattr(self, name)) is not None:
                limits.check(name, value, allowed)


@dataclass(frozen=True)
class Plan:
    """How much is done of what. The defaults are the demo's: they fit two CPU cores and eight
    minutes. The seconds bound the stages where a machine is slower than that.
    """

    answers: int = 512
    max_new_tokens: int = 64
    batch_size: int = 64
    layers: int = 2
    vocab_size: int | None = 3072  # None keeps the target's
    batch_tokens: int = 512
    learning_rate: float = 2e-3
    answer_seconds: float = 140.0
    train_seconds: float = 112.0
    score_seconds: float = 110.0
    score_prompts: int = 6
    score_tokens: int = 48
    num_draft_tokens: tuple[int, ...] = (2, 3, 5)
    early_num_draft_tokens: int = 8  # the most of a proposal that stops where it is doubtful
    drafting: DraftingWay = "parallel"
    temperatures: tuple[float, ...] = (0.0, 1.0)
    before_prompts: int = 2
    before_num_draft_tokens: tuple[int, ...] = (3,)


class Speed(NamedTuple):
    """Measured seconds of plain decoding: to read the prompts of a full batch and for a token of
    each of its rows, and the same of one row alone.
    """

    batch_prefill: float
    batch_step: float
    prefill: float
    step: float


def choose(
    task: Task,
    target: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    heldout: Sequence[EncodedPrompt],
    began: float,
    progress: Progress = silent,
) -> Plan:
    """What the task leaves open, by these rules:

    - the draft has the target's first layers, one in twelve, and at least one;
    - it proposes in parallel on a CPU, where there is an unused token for its mask: elsewhere how
      such a draft is trained has not been measured;
    - it keeps the target's output tokens where the head has fewer weights than those layers, and
      else a sixteenth of them, in thousands;
    - as many answers are made together as fill a quarter of the free memory, 64 at most;
    - an update reads 512 tokens on a CPU, 4,096 elsewhere, and the learning rate falls with the
      width of the model, from 2e-3 at 576;
    - the rest is `divide`'s, by the speed of a short run.

    `began` is when the minutes began, by `time.perf_counter`. Raises `InputError` and `ModelError`
    for what the target cannot give.
    """
    layers = task.layers or max(1, target.num_layers // 12)
    if not 1 <= layers < target.num_layers:
        raise InputError(
            f"a draft needs fewer layers than its target, and {target.name} has "
            f"{target.num_layers}; got {layers}"
        )
    draft = make_draft(target, list(range(layers)))
    drafting = _drafting(task, target, draft)
    vocab_size = task.vocab_size
    if vocab_size is not None:
        choose_vocabulary(target, torch.ones(target.vocab_size), vocab_size)  # or it raises
    elif 2 * draft.head.weight.numel() > draft.weight_bytes() // draft.dtype.itemsize:
        fewer = max(1024, target.vocab_size // 16 // 1024 * 1024)
        vocab_size = fewer if fewer < target.vocab_size else None
    del draft
    longest = max(len(p.tokens) for p in (*prompts, *heldout))
    room = target.max_length - longest
    least = LENGTHS[-1]
    over = [p.named for p in (*prompts, *heldout) if len(p.tokens) + least > target.max_length]
    if over:
        more = f" and {len(over) - 3:,} more" if len(over) > 3 else ""
        raise InputError(
            f"{target.name} has {target.max_length:,} positions, which leaves no room for an "
            f"answer of {least} tokens to {', '.join(over[:3])}{more} (the longest has "
            f"{longest:,} tokens); leave out what is so long"
        )
    row = cache_bytes(target, 1, longest + min(LENGTHS[0], room))
    rows = min(64, len(prompts), free_bytes(target.device) // 4 // max(row, 1))
    on_cpu = target.device.type == "cpu"
    plan = Plan(
        batch_size=max(rows, 1),
        layers=layers,
        vocab_size=vocab_size,
        drafting=drafting,
        batch_tokens=512 if on_cpu else 4096,
        learning_rate=2e-3 * min(1.0, 576 / target.head.in_features),
    )
    speed = measure_speed(target, [p.tokens for p in prompts[: plan.batch_size]], progress)
    minutes = task.minutes or MINUTES
    return divide(
        plan, minutes, time.perf_counter() - began, speed, len(prompts), len(heldout), room
    )


def _drafting(task: Task, target: LanguageModel, draft: LanguageModel) -> DraftingWay:
    """Raises `InputError` where a parallel draft is asked for and cannot be trained."""
    asked = task.drafting == "parallel"
    if not asked and (task.drafting is not None or target.device.type != "cpu"):
        return "autoregressive"
    try:
        begin(draft, target, Parallel())
    except InputError:
        if asked:
            raise
        return "autoregressive"
    return "parallel"


def measure_speed(
    target: LanguageModel, prompts: Sequence[Sequence[int]], progress: Progress = silent
) -> Speed:
    """Of plain decoding of the prompts together, and of one of them alone, by a few tokens."""
    times: list[float] = []
    for number, batch in enumerate((prompts, prompts[:1])):
        progress("timing", number, 2, "a few tokens of plain decoding")
        decoder = SpeculativeDecoder(target, batch_size=len(batch))
        rounds = decoder.stream([Request(str(i), [*p], 8) for i, p in enumerate(batch)])
        seconds = [round_.seconds for round_ in rounds]
        prefill = seconds[0]["prefill"]
        times += [prefill, median(sum(s.values()) - s["prefill"] for s in seconds)]
    progress("timing", 2, 2)
    return Speed(*times)


def divide(
    plan: Plan,
    minutes: float,
    spent: float,
    speed: Speed,
    prompts: int,
    heldout: int,
    room: int = LENGTHS[0],
) -> Plan:
    """The plan with what is left of the minutes after `spent` seconds divided: answers and scoring
    each get what they need, `SHARE` of it at most, and training gets the rest. Answers are as long
    as `room` and the time allow for 128 of them, and in the score, up to 128 tokens, for 6 prompts,
    or for as many as there are.

    Raises `InputError` where the time does not suffice for the least of both.
    """
    settings, rows = len(plan.temperatures), plan.batch_size
    early = plan.drafting == "autoregressive"

    def answering(batches: int, tokens: int) -> float:
        return SLACK * batches * (speed.batch_prefill + tokens * speed.batch_step)

    def scoring(count: int, tokens: int) -> float:
        """Plainly twice, with every γ once, stopping early, and as long again for the evidence; so,
        too, the few prompts of the score before.
        """
        runs = (3 + early + len(plan.num_draft_tokens)) * count
        runs += (3 + len(plan.before_num_draft_tokens)) * min(count, plan.before_prompts)
        return SLACK * settings * runs * (speed.prefill + tokens * speed.step)

    left = 60 * minutes - spent
    most = SHARE * left

    def answered(tokens: int) -> int:
        return min(prompts, rows * max(0, int(most / answering(1, tokens))))

    def scored(tokens: int) -> int:
        counts = range(min(heldout, 32), 0, -1)
        return next((count for count in counts if scoring(count, tokens) <= most), 0)

    lengths = [tokens for tokens in LENGTHS if tokens <= room]
    shortest = lengths[-1]
    longest = next((n for n in lengths if answered(n) >= min(prompts, 128)), shortest)
    to_score = [n for n in lengths if n <= min(longest, 128)]
    score_tokens = next((n for n in to_score if scored(n) >= min(heldout, 6)), shortest)
    if answered(longest) < LEAST_ANSWERS or scored(score_tokens) < MIN_PROMPTS:
        batches = -(-LEAST_ANSWERS // rows)
        least = max(answering(batches, shortest), scoring(MIN_PROMPTS, shortest)) / SHARE + spent
        raise InputError(
            f"{minutes:g} minutes do not suffice for {LEAST_ANSWERS} answers and {MIN_PROMPTS} "
            f"scored prompts on this machine: give at least {least / 60 + 0.05:.1f}, or take a "
            "smaller target"
        )
    answer_seconds = answering(-(-answered(longest) // rows), longest)
    score_seconds = scoring(scored(score_tokens), score_tokens)
    return replace(
        plan,
        answers=answered(longest),
        max_new_tokens=longest,
        answer_seconds=answer_seconds,
        train_seconds=left - answer_seconds - score_seconds,
        score_seconds=score_seconds,
        score_prompts=scored(score_tokens),
        score_tokens=score_tokens,
    )


def announcement(target: LanguageModel, plan: Plan) -> list[str]:
    """What will be done and how long it takes, for a user to read before."""
    size = signal_bytes(target, plan.answers, plan.max_new_tokens) / 1e6
    tokens = "all" if plan.vocab_size is None else f"{plan.vocab_size:,} of"
    gammas = ", ".join(map(str, plan.num_draft_tokens))
    parallel = plan.drafting == "parallel"
    kind = "parallel draft" if parallel else "draft"
    gammas += "" if parallel else f" and up to {plan.early_num_draft_tokens}"
    temperatures = " and ".join(f"{t:g}" for t in plan.temperatures)
    parts = [
        (
            plan.answer_seconds,
            f"{plan.answers} answers of up to {plan.max_new_tokens} tokens, {plan.batch_size} at a "
            f"time; their signal takes at most {size:,.0f} MB",
        ),
        (
            plan.train_seconds,
            f"distillation of a {kind} of the first {plan.layers} of {target.num_layers} layers, "
            f"with {tokens} {target.vocab_size:,} output tokens",
        ),
        (
            plan.score_seconds,
            f"scores before and after on up to {plan.score_prompts} held-out prompts, "
            f"γ = {gammas}, temperature {temperatures}",
        ),
    ]
    return [
        f"target {target.name}: {target.parameters():,} parameters, {target.dtype} on "
        f"{target.device}",
        *(f"up to {_duration(seconds)}: {what}" for seconds, what in parts),
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"
