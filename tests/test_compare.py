"""Comparisons: right where they can be made, refused with reasons where they cannot."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from cards import simulate
from safetensors.torch import save_file
from scipy import stats
from test_cli import run

from specdistill.errors import InputError
from specdistill.scoring.comparable import obstacles
from specdistill.scoring.compare import Comparison, Difference, compare
from specdistill.scoring.scorecard import Scorecard, Verification
from specdistill.scoring.statistics import Ratio, prompts_needed

GOOD, BAD = {(0.0, 2): 0.7, (0.0, 4): 0.75}, {(0.0, 2): 0.5, (0.0, 4): 0.4}


@pytest.fixture
def good() -> Scorecard:
    return simulate(GOOD, draft="a", seed=1)


@pytest.fixture
def bad() -> Scorecard:
    return simulate(BAD, draft="b", seed=2)


def told(card: Scorecard, **facts: Any) -> Scorecard:
    return replace(card, provenance={**card.provenance, **facts})


def test_the_faster_draft_is_named_with_its_interval(good: Scorecard, bad: Scorecard) -> None:
    found = compare({"bad": bad, "good": good})
    assert [standing.card for standing in found.standings] == ["good", "bad"]
    assert [standing.num_draft_tokens for standing in found.standings] == [4, 2]
    (difference,) = found.differences
    assert (difference.faster, difference.slower) == ("good", "bad")
    expected = good.best_row(0.0).speedup / bad.best_row(0.0).speedup
    assert difference.ratio == pytest.approx(expected)
    low, high = difference.ratio_ci95
    assert 1 < low < expected < high
    assert difference.shown
    assert difference.sentence == (
        f"good is faster than bad by {100 * expected - 100:.1f}% [{100 * low - 100:.1f}%, "
        f"{100 * high - 100:.1f}%] (T = 0, 24 prompts)"
    )


def test_pairing_by_prompt_finds_what_the_prompts_spread_hides() -> None:
    """Prompts differ much more than the two drafts, but alike for both."""
    one, other = simulate({(0.0, 3): 0.615}, seed=3), simulate({(0.0, 3): 0.6}, seed=4, draft="b")
    low, high = one.rows[0].speedup_ci95
    assert low < other.rows[0].speedup < high, "each interval by itself holds the other's speedup"
    (difference,) = compare({"one": one, "other": other}).differences
    assert difference.faster == "one"
    assert difference.shown


def test_what_cannot_be_shown_says_how_many_prompts_would_do() -> None:
    cards = {
        name: simulate({(0.0, 3): 0.6}, seed=seed, draft=name, noise=0.2, prompts=6)
        for name, seed in (("a", 5), ("b", 6))
    }
    (difference,) = compare(cards).differences
    assert not difference.shown
    assert difference.ratio_ci95[0] < 1 < difference.ratio
    assert "no difference can be shown with 6 prompts" in difference.sentence
    assert "would be needed" in difference.sentence
    assert difference.prompts_needed > 6


def test_the_number_of_prompts_needed_is_about_enough() -> None:
    """That many prompts show a difference of the size four times out of five."""
    rng = np.random.default_rng(0)
    effect, spread, first = 0.05, 0.12, 12
    half = stats.t.isf(0.025, first - 1) * spread / first**0.5
    measured = Ratio(*np.exp([effect, effect - half, effect + half]))
    needed = round(prompts_needed(measured, first))
    normal = (2.80 * spread / effect) ** 2
    assert normal < needed < 1.1 * normal, "Student's t asks for a few more"
    samples = rng.normal(effect, spread, (4000, needed))
    shown = stats.ttest_1samp(samples, 0, axis=1).pvalue < 0.05
    assert 0.75 < shown.mean() < 0.85
    wide = np.exp([0.7, 0.7 - 1.5, 0.7 + 1.5])  # of two prompts: a small error, a large t
    assert 3 <= prompts_needed(Ratio(*wide), 2) < 10, "more than there were"
    for same in (1.0, 1 + 2e-16, 1 - 1e-9):  # but for the rounding of sums in another order
        assert math.isinf(prompts_needed(Ratio(same, 0.9, 1.1), 5))
    assert math.isnan(prompts_needed(Ratio(1.2, math.nan, math.nan), 1))


def test_one_prompt_shows_nothing() -> None:
    cards = {n: simulate(GOOD, seed=i, draft=n, prompts=1) for i, n in enumerate("ab")}
    found = compare(cards)
    (difference,) = found.differences
    assert not difference.shown
    assert "needs at least two" in difference.sentence
    assert found.document()["differences"][0]["ratio_ci95"] == [None, None]


def test_every_pair_at_every_common_temperature() -> None:
    two = {(0.0, 3): 0.7, (1.0, 3): 0.5}
    cards = {n: simulate(two, draft=n, seed=i) for i, n in enumerate("abc")}
    cards["c"] = simulate({**two, (0.5, 3): 0.6}, draft="c", seed=3)
    found = compare(cards)
    assert [s.temperature for s in found.standings] == [0.0] * 3 + [1.0] * 3
    for temperature in (0.0, 1.0):
        at = [d for d in found.differences if d.temperature == temperature]
        assert {frozenset((d.faster, d.slower)) for d in at} == {
            frozenset(pair) for pair in ("ab", "ac", "bc")
        }
        order = [s.card for s in found.standings if s.temperature == temperature]
        assert all(order.index(d.faster) < order.index(d.slower) for d in at)
        for difference in at:
            fast, slow = (
                cards[name].best_row(temperature).speedup
                for name in (difference.faster, difference.slower)
            )
            assert difference.ratio == pytest.approx(fast / slow)
            assert difference.ratio >= 1
            assert difference.ratio_ci95[0] < difference.ratio < difference.ratio_ci95[1]


VERSIONS = {"specdistill": "0.1.0", "torch": "2.12.0", "transformers": "5.23.0"}
CHANGES: dict[str, tuple[Callable[[Scorecard], Scorecard], tuple[str, str]]] = {
    "target": (
        lambda card: replace(card, target=replace(card.target, name="x/y", sha256="ef" * 32)),
        ("my/target (sha256 abababababab)", "x/y (sha256 efefefefefef)"),
    ),
    "target dtype": (
        lambda card: replace(card, target=replace(card.target, dtype="bfloat16")),
        ("float32", "bfloat16"),
    ),
    "prompts": (lambda card: told(card, prompts_sha256="12" * 32), ("24 (", "121212121212")),
    "longest answer": (lambda card: told(card, max_new_tokens=64), ("128 tokens", "64 tokens")),
    "sampling": (
        lambda card: replace(card, verification=Verification("token", "lin:0.5")),
        ("exact", "LOSSY, lenience lin:0.5"),
    ),
    "engine": (lambda card: told(card, engine="vllm"), ("specdistill 0.1.0", "vllm")),
    "engine ": (lambda card: told(card, versions=VERSIONS), ("torch 2.13.0", "torch 2.12.0")),
    "machine": (lambda card: told(card, threads=8), ("2 threads", "a processor, 8 threads")),
}


@pytest.mark.parametrize("field", CHANGES)
def test_other_conditions_are_refused_with_both_values(
    good: Scorecard, bad: Scorecard, field: str
) -> None:
    change, values = CHANGES[field]
    cards = {"good": good, "bad": change(bad)}
    (reason,) = obstacles(cards)
    assert reason.startswith(f"{field.strip()} differs: ")
    assert all(value in reason for value in values)
    with pytest.raises(InputError, match=f"{field.strip()} differs"):
        compare(cards)


def test_a_target_is_the_same_under_another_name(good: Scorecard, bad: Scorecard) -> None:
    moved = replace(bad, target=replace(bad.target, name="elsewhere"))
    assert obstacles({"good": good, "bad": moved}) == []


def test_how_vllm_ran_is_said_where_it_differs(good: Scorecard, bad: Scorecard) -> None:
    one = told(good, runner="V1", draft_sampling="greedy")
    other = told(bad, runner="V2", draft_sampling="probabilistic")
    remarks = compare({"one": one, "other": other}).remarks
    assert "vLLM's model runner differs: V1 in one, V2 in other" in remarks
    assert "the draft's sampling differs: greedy in one, probabilistic in other" in remarks


def test_what_else_differs_is_said(good: Scorecard, bad: Scorecard, tmp_path: Path) -> None:
    other = simulate({**BAD, (0.0, 3): 0.4}, draft="b", seed=2)
    other = told(replace(other, verification=Verification("block")), git="0123abc")
    found = compare({"good": good, "other": other})
    assert found.remarks == [
        "seed differs: 1 in good, 2 in other",
        "verification differs: token verification in good, block verification in other",
        "the program's commit differs: unknown in good, 0123abc in other",
        "γ differs: 2, 4 in good, 2, 3, 4 in other",
    ]
    assert found.document()["remarks"] == found.remarks
    assert compare({"good": good, "again": good}).remarks == []
    good.write(tmp_path / "good.json")
    other.write(tmp_path / "other.json")
    assert "seed differs: 1 in " in run("compare", *sorted(tmp_path.glob("*.json"))).out


def test_no_common_temperature_is_refused(good: Scorecard) -> None:
    warm = simulate({(1.0, 3): 0.5}, draft="b")
    (reason,) = obstacles({"good": good, "warm": warm})
    assert reason == "no temperature was scored in all: 0 in good; 1 in warm"


def test_block_verification_may_be_compared_and_is_labelled(good: Scorecard) -> None:
    block = replace(good, verification=Verification("block"))
    found = compare({"token": good, "block": block})
    assert {s.card: s.label for s in found.standings} == {
        "token": "",
        "block": "block verification",
    }
    assert "equally fast" in found.differences[0].sentence


# Cards that are not to be trusted


def test_a_slowed_baseline_is_caught(good: Scorecard) -> None:
    """A lot within the card, less by comparison with another."""
    assert obstacles({"good": good, "again": simulate(GOOD, seed=8)}) == []
    slow = simulate(GOOD, seed=9, slowed=1.5)
    assert max(r.speedup for r in slow.rows) > 1.3 * max(r.speedup for r in good.rows)
    for reason, gamma in zip(obstacles({"good": good, "slow": slow}), (2, 4), strict=True):
        assert reason.startswith(f"slow: T = 0, γ = {gamma}: a round without its draft steps took ")
        assert "plain decoding was slowed down" in reason
    assert math.isnan(slow.best_row(0.0).speedup)
    little = simulate(GOOD, seed=9, slowed=1.17)
    for cards in ({"good": good, "little": little}, {"little": little, "good": good}):
        reasons = obstacles(cards)
        assert len(reasons) == 2
        for reason in reasons:
            assert reason.startswith("plain decoding differs: at T = 0, γ = ")
            assert "the plain steps of little were slowed down" in reason


def test_a_verify_pass_faster_than_a_plain_step_has_no_speedup(good: Scorecard) -> None:
    slow = simulate(GOOD, seed=9, slowed=1.27)
    assert 0.88 < slow.rows[1].verify_ratio < 0.95
    reasons = obstacles({"good": good, "slow": slow})
    assert len(reasons) == 1
    assert reasons[0].startswith("slow: T = 0, γ = 4: a verify pass took 0.")


def test_a_truncated_prompt_set_is_caught(good: Scorecard) -> None:
    few = simulate(GOOD, prompts=20)
    (reason,) = obstacles({"good": good, "few": few})
    assert reason.startswith("prompts differs: 24 (")
    assert "20 (" in reason
    hidden = replace(good, per_prompt=[p for p in good.per_prompt if p.prompt_id != "p7"])
    reasons = obstacles({"good": good, "hidden": hidden})
    assert "hidden: T = 0, γ = 2: the card counts 24 prompts, its rows by prompt 23" in reasons[0]
    assert any("emitted tokens" in reason for reason in reasons)


def test_figures_changed_afterwards_are_caught(good: Scorecard) -> None:
    rows = [replace(good.rows[0], speedup=9.0), *good.rows[1:]]
    (reason,) = obstacles({"good": good, "proud": replace(good, rows=rows)})
    assert reason.startswith("proud: T = 0, γ = 2: the card tells speedup of 9, its rows by prompt")
    assert "no rows" in obstacles({"good": good, "empty": replace(good, rows=[])})[0]
    assert "no plain decoding" in obstacles({"good": good, "b": replace(good, baseline=[])})[0]


def test_a_card_whose_evidence_failed_is_not_ranked(
    good: Scorecard, bad: Scorecard, tmp_path: Path
) -> None:
    wrong = replace(good, lossless=replace(good.lossless, distribution_p_value=1e-9))
    (reason,) = obstacles({"wrong": wrong, "bad": bad})
    assert reason.startswith("wrong: FAILED, not lossless: sampled tokens do not follow ")
    wrong.write(tmp_path / "wrong.json")
    bad.write(tmp_path / "bad.json")
    done = run("compare", tmp_path / "wrong.json", tmp_path / "bad.json", "--json")
    assert (done.code, json.loads(done.out)["comparable"]) == (1, False)
    assert "wrong.json: FAILED" in done.err


def test_a_swapped_draft_is_caught(good: Scorecard, bad: Scorecard, tmp_path: Path) -> None:
    from specdistill.models.hashes import model_sha256

    folder = tmp_path / "run" / "draft"
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}")
    save_file({"w": torch.ones(3)}, folder / "model.safetensors")
    mine = replace(good, draft=replace(good.draft, sha256=model_sha256(folder)))
    mine.write(tmp_path / "run" / "scorecard.json")
    bad.write(tmp_path / "bad.json")
    cards = {str(tmp_path / "run"): mine, str(tmp_path / "bad.json"): bad}
    assert obstacles(cards) == []
    save_file({"w": torch.zeros(3)}, folder / "model.safetensors")
    (reason,) = obstacles(cards)
    assert f"{folder} holds another draft" in reason
    assert mine.draft.sha256[:12] in reason
    assert "score it again" in reason
    (folder / "model.safetensors").unlink()
    (reason,) = obstacles(cards)
    assert "holds neither model.safetensors" in reason


# How often the intervals hold


def differences(trials: int, alphas: tuple[float, float], prompts: int) -> list[Difference]:
    """Trial i has prompts and timings of its own; the first draft is always called a."""
    found = []
    for i in range(trials):
        cards = {
            name: simulate(
                {(0.0, 3): alpha}, seed=2 * i + k, workload=i, prompts=prompts, intervals=False
            )
            for k, (name, alpha) in enumerate(zip("ab", alphas, strict=True))
        }
        found += compare(cards).differences
    return found


@pytest.mark.parametrize("prompts", [6, 24])
def test_the_interval_of_a_difference_covers_the_truth(prompts: int) -> None:
    many = [
        simulate({(0.0, 3): alpha}, prompts=20_000, noise=0, workload=10**6, intervals=False).rows[
            0
        ]
        for alpha in (0.65, 0.6)
    ]
    truth = many[0].speedup / many[1].speedup
    hits, trials = 0, 100
    for found in differences(trials, (0.65, 0.6), prompts):
        low, high = found.ratio_ci95
        real = truth if found.faster == "a" else 1 / truth
        hits += low <= real <= high
    assert stats.binomtest(hits, trials, 0.94).pvalue > 1e-3, hits


def test_equal_drafts_are_called_different_about_one_time_in_twenty() -> None:
    shown = sum(found.shown for found in differences(100, (0.6, 0.6), 12))
    assert stats.binomtest(shown, 100, 0.05).pvalue > 1e-3, shown


# The command


def test_the_command_ranks_and_writes(good: Scorecard, bad: Scorecard, tmp_path: Path) -> None:
    good.write(tmp_path / "good" / "scorecard.json")
    bad.write(tmp_path / "bad.json")
    out = tmp_path / "out" / "comparison.json"
    done = run("compare", tmp_path / "bad.json", tmp_path / "good", "--out", out, "--json")
    document = done.document
    assert document == json.loads(out.read_text())
    assert document["comparable"]
    assert [s["card"] for s in document["standings"]] == [
        str(tmp_path / "good"),
        str(tmp_path / "bad.json"),
    ]
    (difference,) = document["differences"]
    assert difference["sentence"].startswith(f"{tmp_path / 'good'} is faster than")
    assert difference["sentence"] in done.err
    again = run("compare", tmp_path / "bad.json", tmp_path / "good", "--out", out)
    assert again.code == 2
    assert "--overwrite" in again.err
    assert run("compare", tmp_path / "bad.json", tmp_path / "good").code == 0


def test_the_command_refuses_with_exit_code_1_and_says_why(
    good: Scorecard, bad: Scorecard, tmp_path: Path
) -> None:
    good.write(tmp_path / "a.json")
    told(bad, threads=8).write(tmp_path / "b.json")
    done = run("compare", tmp_path / "a.json", tmp_path / "b.json", "--json")
    assert done.code == 1
    document = json.loads(done.out)
    assert not document["comparable"]
    assert document["reasons"][0] in done.err
    assert "8 threads" in document["reasons"][0]


def test_the_command_refuses_what_it_cannot_read(good: Scorecard, tmp_path: Path) -> None:
    good.write(tmp_path / "a.json")
    for arguments, words in (
        ([tmp_path / "a.json"], "at least two"),
        ([tmp_path / "a.json", tmp_path / "a.json"], "named twice"),
        ([tmp_path / "a.json", tmp_path / "none.json"], "there is no scorecard"),
        ([tmp_path / "a.json", tmp_path], "there is no scorecard"),
    ):
        done = run("compare", *arguments)
        assert done.code == 2
        assert words in done.err


def test_a_comparison_is_json_without_nan(good: Scorecard) -> None:
    found: Comparison = compare({"a": good, "b": good})
    assert "NaN" not in json.dumps(found.document())
    assert "Infinity" not in json.dumps(found.document())
