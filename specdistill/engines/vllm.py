"""vLLM as an engine, in an environment of its own that the user names.

An engine's γ is fixed, so each γ has an engine of its own, one after the other, and plain decoding
one before them and one after them: two are never in memory together.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch

from specdistill.data.chat import EncodedPrompt
from specdistill.decoding.sampling import row_seed
from specdistill.engines.base import (
    WARM_UP_TOKENS,
    counts_in_sum,
    scorecard,
    slowed_at,
    without_stalls,
)
from specdistill.engines.vllm_engine import RUNNERS, Engine, Runner, started
from specdistill.engines.vllm_pair import Pair
from specdistill.engines.vllm_process import Deployment
from specdistill.progress import Progress, silent
from specdistill.scoring.load import Load, Run, load_rows
from specdistill.scoring.rows import Counts
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.turns import Answers, settled

TURNS = "engine by engine: plainly, with each γ, and plainly again"


def score(
    deployment: Deployment,
    pair: Pair,
    prompts: Sequence[EncodedPrompt],
    *,
    num_draft_tokens: Sequence[int],
    temperature: Sequence[float],
    max_new_tokens: int,
    seed: int = 0,
    concurrency: Sequence[int] = (),
    both_runners: bool = False,
    progress: Progress = silent,
) -> Scorecard:
    """Decode every prompt with vLLM, plainly and with what `pair` says proposes. Where a
    temperature is above 0 a draft samples its proposals, which vLLM does not by itself. Then all
    prompts are answered again by so many at a time as `concurrency` says. With `both_runners` all
    of that once by each of vLLM's model runners: the card is that of the faster one with the draft,
    and has the figures of both.

    Raises as `started`, and `DecodingError` where vLLM ends early or its counters do not tell
    enough. Where greedy texts differ, our own pass reads them once the engines have ended.
    """
    plan = _Plan(
        deployment,
        pair,
        prompts,
        list(dict.fromkeys(num_draft_tokens)),
        list(dict.fromkeys(temperature)),
        max_new_tokens,
        seed,
        concurrency,
    )
    if not both_runners:
        return _scored(plan, progress)
    plans = {runner: replace(plan, runner=runner) for runner in RUNNERS}
    for done, (runner, each) in enumerate(plans.items()):  # before hours are spent on the other
        progress("start", done, len(plans), f"whether there is a runner {runner}")
        with each.engine(max(each.num_draft_tokens)):
            pass
    progress("start", len(plans), len(plans))
    cards = [_scored(each, progress) for each in plans.values()]
    fastest = max(cards, key=lambda card: max(row.tokens_per_second for row in card.rows))
    facts = {"runners": [_summary(card) for card in cards]}
    return replace(fastest, provenance=fastest.provenance | facts)


@dataclass(frozen=True)
class _Plan:
    """What is asked of vLLM, by which of its runners (None: as it chooses)."""

    deployment: Deployment
    pair: Pair
    prompts: Sequence[EncodedPrompt]
    num_draft_tokens: Sequence[int]
    temperatures: Sequence[float]
    max_new_tokens: int
    seed: int
    concurrency: Sequence[int]
    runner: Runner | None = None

    @property
    def sampled(self) -> bool:
        return max(self.temperatures) > 0

    def engine(self, num: int, later: Sequence[int] = ()) -> Any:
        """The context of an engine with γ = `num`, or of plain decoding for 0. What vLLM says
        against those with `later` γ by their configs alone is raised before this one loads.
        """
        longest = max(len(prompt.tokens) for prompt in self.prompts) + self.max_new_tokens
        self.deployment.check_length(longest + _room(max(self.num_draft_tokens)))
        settings: dict[str, Any] = {
            "model": str(self.pair.target_path),
            "dtype": self.pair.target.dtype,
            "max_model_len": longest + _room(num),
            "max_num_seqs": max(self.concurrency, default=1),
            "enable_prefix_caching": False,  # prompts come again, and must cost the same again
            "disable_log_stats": False,
            "seed": 0,
        }
        if num:
            settings["speculative_config"] = self.pair.proposer.settings(num, self.sampled)
        configs = [self.pair.proposer.settings(n, self.sampled) for n in later if n]
        return started(self.deployment, settings, self.pair.weight_bytes, self.runner, configs)

    def request(self, temperature: float, prompt: EncodedPrompt, most: int) -> dict[str, Any]:
        return {
            "tokens": prompt.tokens,
            "temperature": temperature,
            "max_tokens": most,
            "stop_token_ids": list(self.pair.eos_ids),
            "seed": row_seed(self.seed, prompt.id) % 2**31,
            "detokenize": False,
        }


def _room(num: int) -> int:
    """Tokens beyond the longest text: those that its last round verifies, and those that would come
    after. Where one row has no room for them, vLLM proposes token 0 to all that share its batch.
    """
    return 2 * (num + 1)


@dataclass
class _Seen:
    """What the engines said: of themselves, and under load by temperature, concurrency and γ."""

    facts: dict[str, Any] = field(default_factory=dict)
    loads: dict[tuple[float, int], dict[int, list[Run]]] = field(
        default_factory=lambda: defaultdict(lambda: defaultdict(list))
    )

    def load(self) -> Load:
        load = Load()
        for (temperature, most), runs in self.loads.items():
            drafted = {num: run for num, (run, *_) in runs.items() if num}
            plain, rows = load_rows(temperature, most, runs[0], drafted)
            load.plain.append(plain)
            load.drafted.extend(rows)
        return load


def _scored(plan: _Plan, progress: Progress) -> Scorecard:
    """The card of one runner."""
    pair, seen = plan.pair, _Seen()
    at_load = partial(_under_load, plan, seen)

    def again(temperature: float, _: int) -> Answers[Counts]:
        only = replace(plan, temperatures=[temperature])
        return _by_engines(only, seen, partial(progress, "again"))

    measured = settled(
        lambda: _by_engines(plan, seen, partial(progress, "score"), at_load),
        again,
        without_stalls,
        slowed_at,
    )
    load = seen.load()
    ties, unexplained = pair.explained(plan.prompts, measured)  # the engines' memory is free now
    way = pair.proposer.drafting
    facts = _provenance(plan, seen.facts) | unexplained
    card = scorecard(pair.target, pair.draft, facts, plan.prompts, measured, ties, plan.seed, way)
    # vLLM 0.32 dies where the γ of a parallel draft changes to another than 0.
    only = card.fixed_gamma if way == "parallel" else None
    facts = card.provenance
    if seen.facts["schedules"] and (schedule := load.schedule(card.verdict.best.temperature, only)):
        facts = facts | {"schedule": schedule}
    return replace(card, load=load, provenance=facts)


def _provenance(plan: _Plan, engine: Mapping[str, Any]) -> dict[str, Any]:
    """With the facts of an engine."""
    facts = plan.pair.facts | {
        "engine": "vllm",
        "turns": TURNS,
        "versions": {
            "specdistill": plan.pair.facts["versions"].get("specdistill"),
            **engine["versions"],
        },
        "threads": plan.deployment.threads or torch.get_num_threads(),
        "device": engine["device"] or plan.pair.facts["device"],
        "compiled": engine["compiled"],
        "runner": engine["runner"],
        "draft_sampling": plan.pair.proposer.sampling(plan.sampled),
    }
    options = plan.deployment.settings
    return facts | ({"engine_options": options} if options else {})


def _by_engines(
    plan: _Plan,
    seen: _Seen,
    progress: Any,
    then: Any = lambda *_: None,
) -> Answers[Counts]:
    """Every prompt's answers in every setting, after a short one that does not count; `then` is
    done with each engine and its γ before it ends.
    """
    settings = [(t, num) for t in plan.temperatures for num in (0, *plan.num_draft_tokens)]
    answers: Answers[Counts] = {setting: [[] for _ in plan.prompts] for setting in settings}
    order = (0, *plan.num_draft_tokens, 0)
    for done, num in enumerate(order):
        words = f"γ = {num}" if num else "plain"
        progress(done, len(order), f"{words}: an engine starts")
        with plan.engine(num, order if not done else ()) as engine:
            seen.facts = engine.facts
            for temperature in plan.temperatures:
                _ask(engine, plan, num, temperature, plan.prompts[0], WARM_UP_TOKENS)
            total = len(plan.temperatures) * len(plan.prompts)
            for i, temperature in enumerate(plan.temperatures):
                for k, prompt in enumerate(plan.prompts):
                    progress(done + (i * len(plan.prompts) + k) / total, len(order), words)
                    counts = _ask(engine, plan, num, temperature, prompt, plan.max_new_tokens)
                    answers[temperature, num][k].append(counts)
            then(engine, num, partial(progress, done + 0.999, len(order)))
    progress(len(order), len(order), "")
    return answers


def _ask(
    engine: Engine, plan: _Plan, num: int, temperature: float, prompt: EncodedPrompt, most: int
) -> Counts:
    request = plan.request(temperature, prompt, most)
    each = bool(num) and plan.pair.proposer.drafting == "look-up"
    heard = engine.ask({"request": request, "each_round": each})
    tokens, seconds, steps = heard["tokens"], heard["seconds"], heard["step_seconds"]
    before, engine.counted = engine.counted, heard["counters"]
    if not num:
        return Counts(tokens, seconds, len(tokens), [], [], [], steps)
    if each:
        counts = _by_round(heard["rounds"], num)
    else:
        now = engine.counted
        rounds, proposed = (now[n] - before.get(n, 0) for n in ("rounds", "proposed"))
        accepted = _by_position(now, before, num)
        counts = counts_in_sum(prompt.id, num, int(rounds), int(proposed), accepted)
    return replace(counts, tokens=tokens, seconds=seconds, step_seconds=steps)


def _by_round(rounds: Sequence[tuple[int, int]], num: int) -> Counts:
    """From what was proposed and accepted in each round."""
    offered, tested, accepted = (
        [sum(of(*each) > i for each in rounds) for i in range(num)]
        for of in (
            lambda proposed, _: proposed,
            lambda proposed, accepted: min(accepted + 1, proposed),
            lambda _, accepted: accepted,
        )
    )
    return Counts([], math.nan, len(rounds), offered, tested, accepted)


def _by_position(now: Mapping[str, Any], before: Mapping[str, Any], num: int) -> list[int]:
    old = before.get("accepted_by_position", [0] * num)
    return [b - a for b, a in zip(now["accepted_by_position"][:num], old, strict=False)]


def _under_load(plan: _Plan, seen: _Seen, engine: Engine, num: int, progress: Any) -> None:
    """All prompts, so many at a time, at each temperature."""
    for temperature in plan.temperatures:
        requests = [plan.request(temperature, p, plan.max_new_tokens) for p in plan.prompts]
        for most in plan.concurrency:
            progress(f"{f'γ = {num}' if num else 'plain'}: {most} at a time")
            heard = engine.ask({"requests": requests, "at_a_time": most})
            before, engine.counted = engine.counted, heard.pop("counters")
            run = Run(**heard)
            if num:
                rounds = max(engine.counted["rounds"] - before.get("rounds", 0), 1)
                accepted = _by_position(engine.counted, before, num)
                run = replace(run, accepted_by_position=[count / rounds for count in accepted])
            seen.loads[temperature, most][num].append(run)


def _summary(card: Scorecard) -> dict[str, Any]:
    """The fastest setting of a runner, as the card of both tells it."""
    row = max(card.rows, key=lambda row: row.tokens_per_second)
    plain = {base.temperature: base.tokens_per_second for base in card.baseline}
    return {
        "runner": card.provenance["runner"],
        "temperature": row.temperature,
        "num_draft_tokens": row.num_draft_tokens,
        "tokens_per_second": row.tokens_per_second,
        "plain_tokens_per_second": plain[row.temperature],
    }
