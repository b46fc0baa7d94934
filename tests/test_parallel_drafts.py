"""Drafts that propose a round in one pass: how they decode, and what their scorecards say."""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from cards import simulate
from chains import WARM
from checks import MASKS, PROMPTS, Recorder, endless
from checks import drafter_for as adversary
from conftest import tiny_model
from test_cli import run

from specdistill import Decoder
from specdistill.data.chat import EncodedPrompt
from specdistill.decoding import (
    Drafting,
    ModelDrafter,
    ParallelDrafter,
    Request,
    Sampling,
    SpeculativeDecoder,
    drafter_for,
)
from specdistill.decoding.parallel import untrained_places
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.models.parallel import set_parallel
from specdistill.scoring import check, sampled_texts
from specdistill.scoring.acceptance import acceptance_chances
from specdistill.scoring.by_cost import by_cost
from specdistill.scoring.card_rows import draft_steps
from specdistill.scoring.comparable import remarks
from specdistill.scoring.measure import score
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.statistics import planned_speedup
from specdistill.scoring.trust import contradictions, doubts
from specdistill_kernels import probabilities

MASK = 63


def pair(trained: int = 4, dtype: torch.dtype = torch.float32) -> tuple[LanguageModel, ...]:
    """A target without an end, and two of its layers that draft in parallel."""
    target = tiny_model(2, layers=3, dtype=dtype, eos_token_id=None)
    target.tokenizer.eos_token = None
    draft = make_draft(target, [0, 1])
    set_parallel(draft, MASK, trained)
    return target, draft


# --- Drafters -----------------------------------------------------------------------------------


def test_a_draft_with_a_mask_token_drafts_in_parallel_by_default() -> None:
    target, draft = pair()
    assert isinstance(drafter_for(draft, 64), ParallelDrafter)
    assert type(drafter_for(draft, 64, Drafting("autoregressive"))) is ModelDrafter
    assert type(drafter_for(target, 64)) is ModelDrafter


def test_a_draft_without_a_mask_token_cannot_draft_in_parallel() -> None:
    target, _ = pair()
    for refused in (
        lambda: drafter_for(target, 64, Drafting("parallel")),
        lambda: ParallelDrafter(target, 64),
        lambda: score(target, target, asked(2), drafting="parallel"),
    ):
        with pytest.raises(InputError, match=r"has no mask token \(pard_token in its config.json"):
            refused()


def test_stopping_early_saves_nothing_in_parallel_and_is_refused() -> None:
    target, draft = pair()
    with pytest.raises(InputError, match=r"least_reach 0\.2 .* drafts in parallel"):
        score(target, draft, asked(2), least_reach=0.2)
    drafter = drafter_for(draft, 64, Drafting("autoregressive", 0.2))
    assert type(drafter) is ModelDrafter
    assert drafter.least_reach == 0.2


@pytest.mark.parametrize("kind", MASKS)
@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_round_is_one_pass_and_never_proposes_the_mask(kind: str, batch_size: int) -> None:
    target = endless()
    recorder = Recorder(adversary(target, kind))
    decoder = SpeculativeDecoder(target, recorder, num_draft_tokens=4, batch_size=batch_size)
    out = decoder.generate(PROMPTS, max_new_tokens=24, sampling=WARM)
    drafts = [draft for _, draft in recorder.notes]
    assert out.draft_steps == len(drafts)
    assert {draft.steps for draft in drafts} == {1}
    proposed = torch.cat([draft.tokens.flatten() for draft in drafts])
    assert (proposed >= 0).all()
    assert MASKS[kind] not in proposed
    rounds = [r for o in out.outputs for r in o.rounds]
    assert max(r.proposed for r in rounds) == 4
    assert all(o.rounds[-1].proposed < 4 for o in out.outputs), "a row proposes what it still needs"


def test_a_pass_reads_what_the_cache_lacks_the_last_token_and_masks() -> None:
    """By the tokens and positions of every pass of a row that accepts now more, now less."""
    target, draft = pair()
    drafter = ParallelDrafter(draft, 64)
    stream = drafter.open(1, 64)
    passes = []
    run = stream.cached.run

    def spied(tokens: torch.Tensor, positions: torch.Tensor, *more: object) -> torch.Tensor:
        passes.append((tokens[0].tolist(), positions[0].tolist(), more[0]))
        return run(tokens, positions, *more)

    stream.cached.run = spied
    with mock.patch.object(ParallelDrafter, "open", return_value=stream):
        decoder = SpeculativeDecoder(target, drafter, num_draft_tokens=3)
        prompt = [7, 8, 9]
        output = decoder.generate([prompt], max_new_tokens=20, sampling=WARM, seed=4).outputs[0]
    text, read = prompt, len(prompt) - 1
    for (tokens, positions, visible), r in zip(passes[1:], output.rounds, strict=False):
        masks = [MASK] * (r.proposed - 1)
        assert tokens == text[read:] + masks
        assert positions == list(range(read, read + len(tokens)))
        assert visible == positions[-1] + 1
        read, text = len(text), text + r.tokens
    assert len({r.accepted for r in output.rounds}) > 1


def test_the_python_face_decodes_with_it() -> None:
    target, draft = pair()
    plain, drafted = Decoder(target), Decoder(target, draft)
    messages = [{"role": "user", "content": "w7 w8"}]
    assert isinstance(drafted.engine.drafter, ParallelDrafter)
    one, other = (d.generate(messages, max_new_tokens=16) for d in (plain, drafted))
    assert one.tokens == other.tokens


def test_places_beyond_training_are_told() -> None:
    target, draft = pair(trained=4)
    assert untrained_places(draft, [1, 4]) == ""
    assert untrained_places(target, [9]) == ""
    assert "4 tokens a round, and γ goes up to 6: what it proposes beyond token 4" in (
        untrained_places(draft, [2, 6])
    )


# --- Scores -------------------------------------------------------------------------------------


def asked(count: int) -> list[EncodedPrompt]:
    return [EncodedPrompt(str(i), [7 + i, 8, 9 + 2 * i]) for i in range(count)]


@pytest.fixture(scope="module")
def card() -> Scorecard:
    target, draft = pair(trained=4)
    with mock.patch.object(sampled_texts, "distribution_p_value", return_value=0.5):
        return score(target, draft, asked(12), num_draft_tokens=[2, 5], max_new_tokens=40)


def test_the_card_says_how_it_drafts_and_counts_one_step_a_round(card: Scorecard) -> None:
    assert card.drafting == "parallel"
    assert card.label == "parallel draft trained for γ up to 4"
    assert not card.failures
    weights = card.draft.weight_bytes / card.target.weight_bytes
    step = {base.temperature: base.seconds["target"] / base.tokens for base in card.baseline}
    for row in card.rows:
        assert row.draft_steps == 1
        assert row.mbsu == pytest.approx(row.block_efficiency / (weights + 1))
        planned = planned_speedup(row.acceptance_rate, row.num_draft_tokens, row.cost_ratio, 1)
        assert row.planned_speedup == pytest.approx(planned)
        assert row.cost_ratio > row.seconds["draft"] / row.rounds / step[row.temperature] * 0.99
    assert card.fixed_gamma == card.verdict.best.num_draft_tokens
    assert ", one a round, costs" in card.verdict.reason or "trusted" in card.verdict.reason


def test_expected_acceptance_is_that_of_the_guessed_places(card: Scorecard) -> None:
    for row in card.rows:
        rate = row.acceptance_rate_expected
        if row.temperature:
            sigma = math.sqrt(rate * (1 - rate) / row.tested)
            assert abs(row.acceptance_rate - rate) < 4 * sigma
        else:
            assert row.acceptance_rate == rate


def test_chances_are_those_of_passes_without_a_cache() -> None:
    """Σ min(p, q) at each tested place, q from the whole text up to the round and its masks."""
    target, draft = pair(dtype=torch.float64)
    decoder = SpeculativeDecoder(target, ParallelDrafter(draft, 64), num_draft_tokens=4)
    prompt = [7, 8, 9]
    (output,) = decoder.run([Request("a", prompt, 40, Sampling(0.9), 3)]).outputs
    found = acceptance_chances(target, draft, prompt, output, 0.9)
    expected, text, warm = [], list(prompt), torch.tensor([0.9])
    for r in output.rounds:
        masked = draft.logits(draft.hidden(torch.tensor([text + [MASK] * 3])))[0, len(text) - 1 :]
        masked[:, MASK] = -math.inf
        for place in range(r.tested):
            seen = torch.tensor([text + r.tokens[:place]])
            p = probabilities(target.logits(target.hidden(seen))[0, -1:], warm)
            q = probabilities(masked[place][None], warm)
            expected.append(torch.minimum(p, q).sum().item())
        text += r.tokens
    assert found.tolist() == pytest.approx(expected, abs=1e-6)
    other = acceptance_chances(target, draft, prompt, output, 0.9, None, Drafting("autoregressive"))
    assert (found - other).abs().max() > 0.01


def test_one_checkpoint_is_scored_both_ways(card: Scorecard) -> None:
    target, draft = pair()
    with mock.patch.object(sampled_texts, "distribution_p_value", return_value=0.5):
        other = score(
            target,
            draft,
            asked(12),
            num_draft_tokens=[2, 5],
            max_new_tokens=40,
            drafting="autoregressive",
        )
    assert other.drafting == "autoregressive"
    assert other.label == ""
    assert [row.draft_steps for row in other.rows] == [2, 5, 2, 5]
    assert other.draft.sha256 == card.draft.sha256
    cards = {"ar": other, "pard": card}
    assert "drafting differs: autoregressive in ar, parallel in pard" in remarks(cards)
    assert [(each.autoregressive, each.parallel) for each in by_cost(cards)] == [("ar", "pard")] * 2


def test_a_card_reads_back_and_an_older_one_is_autoregressive(
    card: Scorecard, tmp_path: Path
) -> None:
    card.write(tmp_path / "card.json")
    assert Scorecard.read(tmp_path / "card.json") == card
    raw = json.loads((tmp_path / "card.json").read_text())
    for row in raw["rows"]:
        del row["drafting"]
    for name in ("mask_token", "trained_draft_tokens"):
        del raw["provenance"][name]
    (tmp_path / "old.json").write_text(json.dumps(raw))
    assert Scorecard.read(tmp_path / "old.json").drafting == "autoregressive"
    raw["rows"][0]["drafting"] = "parallel"
    (tmp_path / "mixed.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="some of its rows drafted in parallel, and some did not"):
        Scorecard.read(tmp_path / "mixed.json")


def test_a_card_that_lies_about_how_it_drafts_contradicts_itself(card: Scorecard) -> None:
    assert not doubts(card.baseline, card.rows, card.per_prompt)
    assert not contradictions(card)
    lie = replace(card, rows=[replace(row, drafting="autoregressive") for row in card.rows])
    assert any("MBSU" in told for told in contradictions(lie))


def test_check_holds_and_sees_an_acceptance_that_is_not_its_own() -> None:
    target, draft = pair()
    checked = check.Pair(target, draft, asked(4), 24, 1)
    assert check.acceptance(checked).passed
    assert check.greedy(checked).passed
    assert check.identity(checked).passed
    assert check.seeds(checked).passed
    assert isinstance(checked.decoder(draft, 1).drafter, ParallelDrafter)


# --- The command line ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pair")
    target, draft = pair(trained=4)
    save_draft(target, folder / "target")
    save_draft(draft, folder / "draft")
    (folder / "prompts.txt").write_text("w7 w8\nw9\nw5 w6\n")
    return folder


def scored(folder: Path, out: Path, *more: str) -> tuple[str, dict[str, Any]]:
    words = ["score", "--target", f"{folder}/target", "--draft", f"{folder}/draft", "--json"]
    words += ["--prompts", f"{folder}/prompts.txt", "--out", str(out), "--temperature", "0"]
    done = run(*words, "--max-new-tokens", "12", *more)
    assert done.code == 0, done
    return done.err, json.loads(done.out.splitlines()[-1])


def test_score_says_what_a_larger_block_than_trained_is(folders: Path, tmp_path: Path) -> None:
    said, card = scored(folders, tmp_path / "card.json", "--num-draft-tokens", "2,6")
    assert "was trained to propose 4 tokens a round, and γ goes up to 6" in " ".join(said.split())
    assert {row["drafting"] for row in card["rows"]} == {"parallel"}
    assert "speculative decoding (parallel draft trained for γ up to 4)" in " ".join(said.split())
    said, card = scored(
        folders, tmp_path / "other.json", "--num-draft-tokens", "6", "--drafting", "autoregressive"
    )
    assert "was trained to propose" not in said
    assert {row["drafting"] for row in card["rows"]} == {"autoregressive"}


def test_transformers_is_said_to_draft_token_by_token(folders: Path, tmp_path: Path) -> None:
    more = ("--num-draft-tokens", "2", "--engine", "transformers")
    said, card = scored(folders, tmp_path / "card.json", *more)
    assert "Transformers has no parallel drafting" in said
    assert {row["drafting"] for row in card["rows"]} == {"autoregressive"}


def test_compare_prints_what_both_are_worth_by_cost(tmp_path: Path) -> None:
    rates = {(0.0, 2): 0.8, (0.0, 4): 0.8}
    simulate(rates, draft="a").write(tmp_path / "ar.json")
    simulate(rates, draft="b", drafting="parallel").write(tmp_path / "pard.json")
    done = run("compare", str(tmp_path / "ar.json"), str(tmp_path / "pard.json"))
    assert done.code == 0, done
    text = " ".join(done.out.split())
    assert "by the cost c of a draft step, T = 0, verifying free" in text
    assert "beats" in text


# --- By cost ------------------------------------------------------------------------------------


def in_parallel(card: Scorecard, tau: dict[int, float]) -> Scorecard:
    rows = [
        replace(row, drafting="parallel", block_efficiency=tau[row.num_draft_tokens])
        for row in card.rows
    ]
    return replace(card, rows=rows)


def test_a_parallel_draft_beats_one_of_the_same_weights_from_a_cost_on() -> None:
    ar = simulate({(0.0, 1): 0.8, (0.0, 4): 0.8}, intervals=False)
    tau = {row.num_draft_tokens: row.block_efficiency for row in ar.rows}
    fewer = in_parallel(ar, {gamma: 0.8 * value for gamma, value in tau.items()})
    (found,) = by_cost({"ar": ar, "pard": fewer})
    crossing = found.break_even
    speeds = [value / (1 + crossing * gamma) for gamma, value in tau.items()]
    assert max(speeds) == pytest.approx(0.8 * tau[4] / (1 + crossing))
    assert "pard (parallel) beats ar where a draft step costs more than" in found.sentence
    at = {each.cost_ratio: each for each in found.costs}
    assert at[0.1].autoregressive == (max(v / (1 + 0.1 * g) for g, v in tau.items()), 4)
    assert at[0.1].parallel == (0.8 * tau[4] / 1.1, 4)
    more = in_parallel(ar, {gamma: 1.1 * value for gamma, value in tau.items()})
    assert "at any cost" in by_cost({"ar": ar, "pard": more})[0].sentence
    none = in_parallel(ar, dict.fromkeys(tau, 1.0))
    assert "at no cost" in by_cost({"ar": ar, "pard": none})[0].sentence


def test_drafts_of_other_weights_are_not_set_against_each_other() -> None:
    ar = simulate({(0.0, 2): 0.8}, intervals=False)
    pard = in_parallel(ar, {2: 2.0})
    pard = replace(pard, draft=replace(pard.draft, weight_bytes=1 + pard.draft.weight_bytes))
    assert not by_cost({"ar": ar, "pard": pard})
    assert not by_cost({"ar": ar, "again": copy.copy(ar)})


def test_a_round_takes_the_steps_that_its_drafting_takes() -> None:
    assert draft_steps(5, 3.2, 0.0, "autoregressive") == 5
    assert draft_steps(5, 3.2, 0.1, "autoregressive") == 3.2
    assert draft_steps(5, 3.2, 0.0, "parallel") == 1
