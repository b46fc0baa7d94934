"""The self-test on a user's pair: it passes where all is well, and each planted bug fails it."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import asdict

import numpy as np
import pytest
import torch
from conftest import tiny_model
from scipy import stats

from specdistill.data.chat import EncodedPrompt
from specdistill.decoding import engine
from specdistill.decoding.cache import CachedModel
from specdistill.drafts.making import make_draft
from specdistill.errors import InputError
from specdistill.scoring import check, lossless, sampled_texts
from specdistill.scoring.check import Check, Pair, run_checks
from specdistill.scoring.statistics import martingale_p_value
from specdistill_kernels import verification
from specdistill_kernels.verification import reference


def make_pair(num_prompts: int = 2, tokens: int = 48, **model: object) -> Pair:
    """A pair whose answers end by length alone."""
    target = tiny_model(1, layers=3, eos_token_id=None, **model)
    target.tokenizer.eos_token = None
    draft = make_draft(target, [0, 1], torch.arange(48))
    prompts = [EncodedPrompt(str(i), [5 + i, 9, 30 - i, 7][: 2 + i]) for i in range(num_prompts)]
    return Pair(target, draft, prompts, tokens)


@pytest.fixture
def pair() -> Pair:
    return make_pair()


@pytest.fixture(scope="module")
def sound() -> dict[str, Check]:
    seen: list[tuple[str, float, float, str]] = []
    results = run_checks(make_pair(), lambda *told: seen.append(told))
    assert seen[0] == ("check", 0, 6, "identity")
    assert seen[-1][1:3] == (6, 6)
    return {result.name: result for result in results}


def test_a_sound_pair_passes_every_check(sound: dict[str, Check]) -> None:
    assert list(sound) == [
        "target as its own draft",
        "greedy text",
        "acceptance rate",
        "distribution, token verification",
        "distribution, block verification",
        "same seed, alone and in a batch",
    ]
    assert all(result.passed for result in sound.values()), sound
    assert sound["greedy text"].measured == "2 of 2 identical"
    assert sound["same seed, alone and in a batch"].measured == "2 of 2 texts identical"
    assert sound["target as its own draft"].measured.startswith("0 of ")


def test_the_acceptance_is_that_of_the_sampled_texts(sound: dict[str, Check], pair: Pair) -> None:
    figures = sound["acceptance rate"].figures
    rounds = [r for output in pair.sampled.values() for r in output.rounds]
    assert figures["accepted"] == sum(r.accepted for r in rounds)
    assert figures["tested"] == sum(r.tested for r in rounds) > 60
    assert 0.2 < figures["expected"] < 0.9
    error = (figures["expected"] * (1 - figures["expected"]) / figures["tested"]) ** 0.5
    assert 0.5 * error < figures["standard_error"] < error
    off = abs(figures["accepted"] / figures["tested"] - figures["expected"])
    assert off < 4 * figures["standard_error"]
    numbers = f"{figures['accepted']} of {figures['tested']}"
    assert numbers in sound["acceptance rate"].measured


# Planted bugs: each must fail the check that is there for it

Patch = Callable[[pytest.MonkeyPatch], None]


def residual_from_p(patch: pytest.MonkeyPatch) -> None:
    patch.setattr(reference.Proposals, "residual", lambda self, p, rows, at: p)


def unscaled_block_residual(patch: pytest.MonkeyPatch) -> None:
    rule = reference.block_rule

    def unscaled(*arguments: object) -> tuple[torch.Tensor, torch.Tensor]:
        num_accepted, joint = rule(*arguments)
        return num_accepted, torch.ones_like(joint)

    patch.setattr(reference, "block_rule", unscaled)


def coin_of_another_size(factor: float) -> Patch:
    def plant(patch: pytest.MonkeyPatch) -> None:
        rule = reference.token_rule
        patch.setattr(
            reference,
            "token_rule",
            lambda p, q, coins, offered: rule(p, q, coins * factor, offered),
        )

    return plant


def gullible_greedy(patch: pytest.MonkeyPatch) -> None:
    def accept_all(
        draft_tokens: torch.Tensor, target_logits: torch.Tensor, offered: torch.Tensor
    ) -> reference.Verdict:
        count = offered.sum(-1)
        final = target_logits.argmax(-1).gather(-1, count[:, None])[:, 0]
        return reference._assemble(draft_tokens, count, final)

    patch.setattr(reference, "_verify_greedy", accept_all)


def seed_by_order(patch: pytest.MonkeyPatch) -> None:
    numbers = itertools.count()
    patch.setattr(engine, "row_seed", lambda seed, request_id: next(numbers))


def noise_shared_by_draft_and_coin(patch: pytest.MonkeyPatch) -> None:
    noise = verification.verify.__kwdefaults__["noise"]

    def shared(seeds: torch.Tensor, step: torch.Tensor, position: torch.Tensor, *rest: object):
        return noise(seeds, step, position, 1, rest[1])

    patch.setitem(verification.verify.__kwdefaults__, "noise", shared)


BUGS: dict[str, tuple[Patch, str]] = {
    "residual from p": (residual_from_p, "distribution"),
    "residual from p, in a block": (residual_from_p, "distribution, block"),
    "unscaled residual of a block": (unscaled_block_residual, "distribution, block"),
    "noise shared by draft, coin and residual": (noise_shared_by_draft_and_coin, "distribution"),
    "strict coin, target as draft": (coin_of_another_size(1.5), "identity"),
    "strict coin": (coin_of_another_size(30.0), "acceptance"),
    "coin stuck at 0": (coin_of_another_size(0.0), "acceptance"),
    "greedy accepts everything": (gullible_greedy, "greedy"),
    "seeds by order": (seed_by_order, "seeds"),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_fails_its_check(
    bug: str, pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    plant, name = BUGS[bug]
    plant(monkeypatch)
    assert not check.CHECKS[name](pair).passed


def test_the_block_rule_is_tested_by_itself(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    unscaled_block_residual(monkeypatch)
    assert check.CHECKS["distribution"](pair).passed


def test_a_greedy_difference_passes_only_as_a_tie(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    gullible_greedy(monkeypatch)
    difference = {"prompt_id": "0", "position": 2, "top_two_gap": 0.1, "rounding": 0.2}
    for within_rounding in (True, False):
        explained = {**difference, "within_rounding": within_rounding}
        monkeypatch.setattr(lossless, "explain_difference", lambda *_, told=explained, **__: told)
        result = check.greedy(pair)
        assert result.passed == within_rounding
        assert result.figures["identical"] < result.figures["compared"] == 2
        assert ("part at a tie" in result.measured) == within_rounding
        assert explained in result.figures["differences"]


# How much rounding may explain


def test_rounding_is_measured_and_bounds_what_it_explains(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    fine = {
        dtype: make_pair(1, 10, dtype=dtype).rounding
        for dtype in (torch.float64, torch.float32, torch.bfloat16)
    }
    assert fine[torch.float64] < 1e-12
    assert 1e-7 <= fine[torch.float32] < 1e-5
    assert fine[torch.bfloat16] < 0.05
    run = CachedModel.run

    def rounded(self: CachedModel, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        return run(self, tokens, *rest) * (1.003 if tokens.shape[1] > 1 else 1.0)

    with monkeypatch.context() as patch:
        patch.setattr(CachedModel, "run", rounded)
        assert 1e-4 < make_pair(1, 10).rounding < 0.05
    pair = make_pair(1, 2)
    pair.__dict__["rounding"] = 0.003  # as if it had been measured
    for draws in (1, 3):
        most = pair.explained(200, draws)
        chance = 2 * draws * 0.003
        assert stats.binom.sf(most, 200, chance) <= 1e-4 < stats.binom.sf(most - 1, 200, chance)
    pair.__dict__["rounding"] = 0.9
    assert pair.explained(7) == 7


def test_rejections_beyond_rounding_fail_and_within_it_pass(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    coin_of_another_size(1.1)(monkeypatch)
    pair.__dict__["rounding"] = 0.1
    result = check.identity(pair)
    assert result.passed
    assert 0 < result.figures["rejected"] <= result.figures["explained_by_rounding"]
    pair.__dict__["rounding"] = 1e-7
    assert not check.identity(pair).passed


def test_the_bound_holds_and_is_not_idle() -> None:
    """Accepted - Σ a of simulated answers: the bound is above every tail, and not by much."""
    rng = np.random.default_rng(0)
    for chances in (rng.uniform(0.02, 0.98, 150), np.full(150, 0.99), np.full(150, 0.004)):
        accepted = (rng.random((20_000, 150)) < chances).sum(1)
        off = np.abs(accepted - chances.sum())
        variance = (chances * (1 - chances)).sum()
        for deviation in variance**0.5 * np.array([0.5, 1, 2, 3, 4]):
            bound = martingale_p_value(deviation, variance)
            assert bound >= (off >= deviation).mean()
        assert martingale_p_value(6 * variance**0.5 + 6, variance) < 1e-4
    assert martingale_p_value(0.0, 0.0) == martingale_p_value(-1.0, 5.0) == 1


def test_p_values_of_sound_verification_are_uniform(pair: Pair) -> None:
    for mode in ("token", "block"):
        values = [
            sampled_texts.distribution_p_value(
                pair.target, pair.draft, [5, 9, 30], seed, draws=500, mode=mode
            )
            for seed in range(20)
        ]
        assert stats.kstest(values, "uniform").pvalue > 1e-4


# What is asked


def test_the_built_in_prompts_are_questions() -> None:
    prompts = check.built_in_prompts(3)
    assert [prompt.id for prompt in prompts] == ["1", "2", "3"]
    assert all(prompt.messages[0]["role"] == "user" for prompt in prompts)
    assert len({p.messages[0]["content"] for p in check.built_in_prompts(99)}) == 8
    with pytest.raises(InputError, match="at least 1"):
        check.built_in_prompts(0)


def test_a_check_of_nothing_is_refused(pair: Pair) -> None:
    with pytest.raises(InputError, match="0 prompts"):
        Pair(pair.target, pair.draft, [], 20)
    with pytest.raises(InputError, match="max_new_tokens 1"):
        Pair(pair.target, pair.draft, pair.prompts, 1)


def test_the_cache_is_that_of_the_target_as_its_own_draft(pair: Pair) -> None:
    size = pair.cache_size()
    assert (size.rows, size.slots) == (2, 3 + 48 + check.NUM_DRAFT_TOKENS + 1)
    slots = 64  # in whole buckets
    layers, heads_and_width, keys_and_values, float32 = 3, 2 * 8, 2, 4
    one_model = 2 * slots * layers * heads_and_width * keys_and_values * float32
    assert size.bytes == 2 * one_model


def test_a_result_is_plain_data(sound: dict[str, Check]) -> None:
    import json

    for result in sound.values():
        assert json.loads(json.dumps(asdict(result))) == asdict(result)
