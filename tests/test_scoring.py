"""The score: counts, rates and intervals against computations by hand; evidence that can fail."""

import json
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from specdistill.cli.tables import evidence_line
from specdistill.data.chat import EncodedPrompt
from specdistill.decoding import (
    Drafting,
    ModelDrafter,
    Request,
    Round,
    Sampling,
    SpeculativeDecoder,
)
from specdistill.decoding.cache import CachedModel
from specdistill.decoding.records import Output, RowRound
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import InputError, ModelError
from specdistill.models import LanguageModel, load, packing
from specdistill.scoring import lossless, measure, sampled_texts
from specdistill.scoring.acceptance import acceptance_chances
from specdistill.scoring.card_evidence import Float32
from specdistill.scoring.rows import example
from specdistill.scoring.scorecard import Scorecard, Verification
from specdistill.scoring.statistics import acceptance_for, break_even, planned_speedup
from specdistill.scoring.trust import objections, sound_card
from specdistill.scoring.verdict import verdict
from specdistill_kernels import Lenience
from specdistill_kernels.verification.reference import Verdict

Tiny = Callable[..., LanguageModel]
PROMPTS = [EncodedPrompt(str(i), [5 + i, 9, 30 - i], ("even", "odd")[i % 2]) for i in range(4)]


@pytest.fixture(scope="module")
def pair(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, ...]:
    target = load(str(tiny_folder), dtype="float32")
    folder = tmp_path_factory.mktemp("pair")
    save_draft(make_draft(target, [0, 1, 2], torch.arange(48)), folder)
    return target, load(str(folder), dtype="float32")


@pytest.fixture(scope="module")
def card(pair: tuple[LanguageModel, ...]) -> Scorecard:
    return measure.score(
        *pair, PROMPTS, num_draft_tokens=[3, 1], temperature=[0.0, 1.0], max_new_tokens=20, seed=4
    )


def test_the_card_counts_what_the_engine_did(pair, card: Scorecard) -> None:
    target, draft = pair
    settings = [(r.temperature, r.num_draft_tokens) for r in card.rows]
    assert settings == [*product((0.0, 1.0), (1, 3))]
    for row in card.rows:
        decoder = SpeculativeDecoder(
            target, ModelDrafter(draft, 64), num_draft_tokens=row.num_draft_tokens
        )
        rounds, emitted = [], 0
        for prompt in PROMPTS:
            request = Request(prompt.id, prompt.tokens, 20, Sampling(row.temperature), 4)
            out = decoder.run([request]).outputs[0]
            rounds += out.rounds
            emitted += len(out.tokens)
        assert (row.rounds, row.emitted) == (len(rounds), emitted)
        assert row.accepted == sum(r.accepted for r in rounds)
        assert row.tested == sum(r.tested for r in rounds)
        assert row.proposed == sum(r.proposed for r in rounds)
        assert row.acceptance_rate == pytest.approx(row.accepted / row.tested)
        assert row.acceptance_per_proposal == pytest.approx(row.accepted / row.proposed)
        assert row.block_efficiency == pytest.approx(emitted / len(rounds))
        for i, conditional in enumerate(row.acceptance_by_position):
            reached = [r for r in rounds if r.tested > i]
            assert conditional == pytest.approx(sum(r.accepted > i for r in reached) / len(reached))
        assert row.survival_by_position[0] == row.acceptance_by_position[0]
        if row.temperature == 0:
            assert row.acceptance_rate_expected == pytest.approx(row.acceptance_rate)
        share = card.draft.weight_bytes / card.target.weight_bytes
        mbsu = row.block_efficiency / (share * row.num_draft_tokens + 1)
        assert row.mbsu == pytest.approx(mbsu)


def test_greedy_is_identical_and_the_evidence_holds(card: Scorecard) -> None:
    assert card.lossless.greedy_identical == (8, 8)
    assert card.lossless.identity_acceptance > 0.99
    assert card.lossless.distribution_p_value > 1e-4
    assert card.lossless.holds


def test_a_card_survives_the_file(card: Scorecard, tmp_path: Path) -> None:
    card.write(tmp_path / "a" / "scorecard.json")
    assert Scorecard.read(tmp_path / "a" / "scorecard.json") == card
    unknown = replace(card.rows[0], speedup_ci95=(math.nan, math.nan))
    replace(card, rows=[unknown]).write(tmp_path / "nan.json")
    assert "NaN" not in (tmp_path / "nan.json").read_text()
    assert math.isnan(Scorecard.read(tmp_path / "nan.json").rows[0].speedup_ci95[0])
    raw = json.loads((tmp_path / "a" / "scorecard.json").read_text())
    raw["schema"] = "specdistill.scorecard/9"
    (tmp_path / "new.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="scorecard/9"):
        Scorecard.read(tmp_path / "new.json")


def test_the_card_says_where_it_came_from(card: Scorecard) -> None:
    for key in ("device", "threads", "dtype", "versions", "git", "seed", "date", "engine"):
        assert key in card.provenance
    assert len(card.target.sha256) == 64
    assert card.target.sha256 != card.draft.sha256
    assert (card.target.vocab_size, card.draft.vocab_size) == (64, 48)


def test_a_wrong_verify_function_shows_in_the_evidence(pair, monkeypatch) -> None:
    """Accepting every proposal is caught by the distribution test and by the greedy texts."""
    target, draft = pair

    def gullible(draft_tokens, draft_logits, target_logits, rows, *, lengths, **rest):
        bonus = target_logits[:, -1].argmax(-1, keepdim=True)
        return Verdict(torch.cat([draft_tokens, bonus], 1), lengths)

    monkeypatch.setattr(sampled_texts, "verify", gullible)
    assert sampled_texts.distribution_p_value(target, draft, [5, 9, 30], seed=0) < 1e-6
    monkeypatch.setattr("specdistill.decoding.engine.verify", gullible)
    wrong = measure.score(
        *pair, PROMPTS, num_draft_tokens=[3], temperature=[0.0], max_new_tokens=20
    )
    same, compared = wrong.lossless.greedy_identical
    assert same < compared
    assert any(not tie["within_rounding"] for tie in wrong.lossless.ties)
    assert not wrong.lossless.holds
    assert not wrong.verdict.pays
    assert wrong.verdict.reason.startswith("FAILED, not lossless: ")
    assert wrong.label == "FAILED: not lossless"


FAILING: dict[str, tuple[dict[str, object], str]] = {
    "greedy": ({"greedy_identical": (7, 8)}, "1 of 8 greedy texts differ"),
    "identity": ({"identity_acceptance": 0.8}, "the target accepts 0.800 of its own tokens"),
    "distribution": ({"distribution_p_value": 1e-9}, "do not follow the target's distribution"),
    "no identity": ({"identity_acceptance": math.nan}, "the target was not tried"),
    "no distribution": ({"distribution_p_value": math.nan}, "was not tested"),
}


@pytest.mark.parametrize("evidence", FAILING)
def test_evidence_that_fails_makes_the_verdict_failed_wherever_a_card_is_read(
    card: Scorecard, tmp_path: Path, evidence: str
) -> None:
    """Whatever the file says of itself."""
    changes, words = FAILING[evidence]
    raw = card.document()
    raw["verdict"] |= {"pays": True, "reason": "The draft pays: 9.00 times plain decoding."}
    for name, value in changes.items():
        raw["lossless"][name] = None if value != value else value
    (tmp_path / "card.json").write_text(json.dumps(raw))
    read = Scorecard.read(tmp_path / "card.json")
    assert not read.verdict.pays
    assert read.verdict.reason.startswith("FAILED, not lossless: ")
    assert words in read.verdict.reason
    assert "FAILED" in read.label
    assert any(words in objection for objection in objections(read))
    read.write(tmp_path / "again.json")
    assert Scorecard.read(tmp_path / "again.json").verdict == read.verdict
    assert not any(words in objection for objection in objections(card)), "before"
    assert "FAILED" not in card.verdict.reason


def test_the_distribution_test_sees_what_a_trimmed_draft_cannot_say(pair, monkeypatch) -> None:
    """Tokens outside the draft's vocabulary come from the residual alone: losing them shows."""
    target, draft = pair
    real = sampled_texts.verify

    def forgetful(*arguments, draft_vocab, **rest):
        out = real(*arguments, draft_vocab=draft_vocab, **rest)
        lost = (out.tokens >= 0) & ~torch.isin(out.tokens, draft_vocab)
        return out._replace(tokens=out.tokens.where(~lost, draft_vocab[0]))

    prompt = [5, 9, 30, 31, 12]
    assert sampled_texts.distribution_p_value(target, draft, prompt, seed=0) > 1e-4
    monkeypatch.setattr(sampled_texts, "verify", forgetful)
    assert sampled_texts.distribution_p_value(target, draft, prompt, seed=0) < 1e-6


def test_the_distribution_is_tested_where_the_target_is_uncertain(pair, monkeypatch) -> None:
    """Chat prompts end in tokens that a target is sure of, where no bias could show."""
    target, draft = pair
    seen = []
    real = sampled_texts.verify

    def spy(tokens, q_logits, p_logits, *rest, **more):
        seen.append(p_logits[0])
        return real(tokens, q_logits, p_logits, *rest, **more)

    monkeypatch.setattr(sampled_texts, "verify", spy)
    prompt = list(range(5, 25))
    sampled_texts.distribution_p_value(target, draft, prompt, seed=0, draws=10, width=128)
    (tested,) = (logits.softmax(-1) for logits in seen)
    every = target.logits(target.hidden(torch.tensor([prompt])))[0].softmax(-1)
    least = every.square().sum(-1).topk(3, largest=False).values
    assert torch.allclose(tested.square().sum(-1), least, rtol=0.1)
    assert not torch.allclose(every[-3:].square().sum(-1), least, rtol=0.2)
    assert sampled_texts.distribution_p_value(target, draft, [7], seed=0, draws=100) > 0


def test_a_block_is_scored_as_exact_and_says_so(pair, tmp_path: Path, monkeypatch) -> None:
    modes = []
    real = sampled_texts.verify

    def spy(*arguments, mode, **rest):
        modes.append(mode)
        return real(*arguments, mode=mode, **rest)

    monkeypatch.setattr(sampled_texts, "verify", spy)
    card = measure.score(
        *pair,
        PROMPTS[:2],
        num_draft_tokens=[3],
        temperature=[0.0, 1.0],
        max_new_tokens=16,
        mode="block",
    )
    assert card.verification == Verification("block", None)
    assert (card.verification.lossy, card.verification.label) == (False, "block verification")
    assert all(math.isnan(row.acceptance_rate_expected) for row in card.rows)
    assert all(0 < row.acceptance_rate < 1 for row in card.rows)
    assert modes == ["block"]
    assert card.lossless.greedy_identical == (2, 2)
    assert card.lossless.holds
    assert "LOSSY" not in card.verdict.reason
    card.write(tmp_path / "card.json")
    raw = json.loads((tmp_path / "card.json").read_text())
    assert raw["verification"] == {"mode": "block", "lenience": None, "lossy": False}
    assert raw["rows"][0]["acceptance_rate_expected"] is None
    assert Scorecard.read(tmp_path / "card.json").verification == card.verification


def test_a_prompt_too_long_is_named_before_any_work(pair) -> None:
    long = EncodedPrompt("the long one", [5] * 500)
    settings = {"num_draft_tokens": [3], "temperature": [0.0], "max_new_tokens": 24}
    with pytest.raises(ModelError, match=r"'the long one' comes to 524 tokens, and .* reads 512"):
        measure.score(*pair, [*PROMPTS, long], **settings, progress=None)


def test_a_lenient_score_is_lossy_everywhere(pair, card: Scorecard, tmp_path: Path) -> None:
    strict, exact = card.rows[3], card
    rule = Lenience("lin", 0.4)
    card = measure.score(
        *pair, PROMPTS, num_draft_tokens=[3], temperature=[1.0], max_new_tokens=24, lenience=rule
    )
    assert card.verification.lossy
    assert card.verification.label == "LOSSY, lenience lin:0.4"
    assert card.verdict.reason.startswith(card.verification.label)
    assert math.isnan(card.lossless.distribution_p_value)
    assert not card.lossless.holds
    assert exact.lossless.holds
    (row,) = card.rows
    assert (strict.temperature, strict.num_draft_tokens) == (1.0, 3)
    assert row.acceptance_rate_expected > strict.acceptance_rate_expected + 0.05
    error = 0.5 / row.tested**0.5
    assert row.acceptance_rate == pytest.approx(row.acceptance_rate_expected, abs=4 * error)
    card.write(tmp_path / "card.json")
    raw = json.loads((tmp_path / "card.json").read_text())
    assert raw["verification"] == {"mode": "token", "lenience": "lin:0.4", "lossy": True}
    assert raw["lossless"]["distribution_p_value"] is None
    assert Scorecard.read(tmp_path / "card.json").verification.lossy


def test_a_lenient_chance_is_the_overlap_of_f_of_p_and_q(pair) -> None:
    """Σ min(f(p), q) written out, for one answer, against the stock models' own passes."""
    target, draft = pair
    prompt, rule = [5, 9, 30], Lenience("sq", 0.6)
    decoder = SpeculativeDecoder(target, ModelDrafter(draft, 64), num_draft_tokens=3)
    output = decoder.generate([prompt], max_new_tokens=12, sampling=Sampling(0.8)).outputs[0]
    chances = {
        lenience: acceptance_chances(target, draft, prompt, output, 0.8, lenience)
        for lenience in (None, rule)
    }
    texts, text = [], list(prompt)
    for r in output.rounds:
        texts += [text + r.tokens[:i] for i in range(r.tested)]
        text = text + r.tokens
    assert len(texts) == len(chances[rule]) > 5
    for i, context in enumerate(texts):
        tokens = torch.tensor([context])
        p = (target.model(tokens).logits[0, -1].double() / 0.8).softmax(-1)[draft.vocab]
        q = (draft.logits(draft.hidden(tokens))[0, -1].double() / 0.8).softmax(-1)
        assert chances[None][i].item() == pytest.approx(torch.minimum(p, q).sum().item(), abs=1e-5)
        lenient = torch.minimum(p / 0.36, q).sum().item()
        assert chances[rule][i].item() == pytest.approx(lenient, abs=1e-5)
    short = decoder.generate([prompt], max_new_tokens=1, sampling=Sampling(0.8)).outputs[0]
    assert len(acceptance_chances(target, draft, prompt, short, 0.8)) == 0


def test_a_lenience_that_means_nothing_is_refused_before_work(pair, monkeypatch) -> None:
    monkeypatch.setattr(SpeculativeDecoder, "run", None)
    settings = {"num_draft_tokens": [1], "max_new_tokens": 4, "lenience": Lenience("lin", 0.5)}
    with pytest.raises(InputError, match="no effect at temperature 0"):
        measure.score(*pair, PROMPTS, temperature=[1.0, 0.0], **settings)
    with pytest.raises(InputError, match="single tokens"):
        measure.score(*pair, PROMPTS, temperature=[1.0], mode="block", **settings)


def test_a_card_without_the_field_was_exact(card: Scorecard, tmp_path: Path) -> None:
    raw = card.document()
    assert raw.pop("verification") == {"mode": "token", "lenience": None, "lossy": False}
    (tmp_path / "old.json").write_text(json.dumps(raw))
    assert Scorecard.read(tmp_path / "old.json") == card


def test_the_cache_of_a_score_is_a_row_for_every_setting(pair) -> None:
    target, draft = pair
    size = measure.cache_size(*pair, PROMPTS, [5, 2], 20)
    assert (size.rows, size.slots) == (3, 3 + 20 + 5 + 1)
    request = Request("0", PROMPTS[0].tokens, 20)
    plain = SpeculativeDecoder(target).cache_size([request]).bytes
    both = SpeculativeDecoder(target, ModelDrafter(draft, 64), num_draft_tokens=2)
    assert size.bytes == plain + 2 * both.cache_size([request]).bytes


def greedy_pair(
    target: LanguageModel, monkeypatch: pytest.MonkeyPatch, size: float
) -> tuple[lossless.GreedyPair, Callable[[], dict[str, object]]]:
    """Answers that part as passes over several tokens raise a token by `size`; and what explains
    it, as the same passes do.
    """
    run = CachedModel.run

    def uneven(self: CachedModel, tokens: torch.Tensor, *rest: object) -> torch.Tensor:
        out = run(self, tokens, *rest)
        return out + size * target.head.weight[9] if tokens.shape[1] > 1 else out

    monkeypatch.setattr(CachedModel, "run", uneven)
    ((pair),) = lossless.greedy_pairs(target, target, [("a", [7, 8, 9])], 3, 12)
    return pair, lambda: lossless.explain_difference(target, pair)


def test_a_tie_is_told_from_an_error(tiny: Tiny, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding decides a tie only where each side took the best token of its own pass."""
    target = tiny(1, layers=2, dtype=torch.bfloat16)
    monkeypatch.setattr(LanguageModel, "eos_ids", frozenset())
    pair, explain = greedy_pair(target, monkeypatch, 0.1)
    assert not pair.identical
    tie = explain()
    assert tie["within_rounding"]
    assert 0 < tie["top_two_gap"] <= 2 * tie["rounding"]
    at = tie["position"]
    wrong = [*pair.speculative.tokens]
    wrong[at] = next(t for t in range(64) if t not in (pair.plain.tokens[at], wrong[at]))
    plain, speculative = pair.plain, pair.speculative
    swapped = replace(
        pair,
        plain=replace(plain, tokens=speculative.tokens),
        speculative=replace(speculative, tokens=plain.tokens),
    )
    answer = replace(speculative, tokens=wrong)
    for other in (replace(pair, speculative=answer), swapped):
        assert not lossless.explain_difference(target, other)["within_rounding"]
    shorter = replace(pair.plain, tokens=pair.plain.tokens[:at])
    cut = lossless.explain_difference(target, replace(pair, plain=shorter))
    assert (cut["within_rounding"], cut["top_two_gap"]) == (False, None)


def test_what_is_too_large_for_rounding_explains_nothing(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Passes that differ by a fault of the engine differ in the same way when made again."""
    target = tiny(1, layers=2)
    monkeypatch.setattr(LanguageModel, "eos_ids", frozenset())
    pair, explain = greedy_pair(target, monkeypatch, 0.1)
    assert not pair.identical
    assert not explain()["within_rounding"], "it is float32"


def test_half_precision_is_shown_in_float32_too(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    half = tuple(load(str(model.path), dtype="bfloat16") for model in pair)
    asked = {"num_draft_tokens": [2], "temperature": [0.0], "max_new_tokens": 8}
    card = measure.score(*half, PROMPTS, **asked)
    assert card.lossless.dtype == "bfloat16"
    assert card.lossless.float32.greedy_identical == (4, 4)
    assert card.lossless.float32.identity_acceptance == 1
    assert "; 4 of 4 in float32" in evidence_line(card)
    assert evidence_line(card).startswith("greedy outputs token-identical: ")
    wrong = Float32((3, 4), [], 1.0)
    failed = replace(card.lossless, float32=wrong).failures
    assert failed == [
        "1 of 4 greedy texts differ from those of plain decoding in float32, and rounding does not "
        "explain it"
    ]
    monkeypatch.setattr(lossless, "free_bytes", lambda device: 1000)
    none = lossless.greedy_in_float32(*half, [("a", [5, 9])], 2, 0)
    assert "are free on cpu" in none.missing
    assert not none.failures
    line = evidence_line(replace(card, lossless=replace(card.lossless, float32=none)))
    assert "not shown in float32: copies of both models take" in line


def test_what_the_evidence_takes_is_known_before(pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of the shortest prompts; in float32 one by one where memory is short of a row for each."""
    half = tuple(load(str(model.path), dtype="bfloat16") for model in pair)
    prompts = [("long", [5] * 90), *((str(i), [5, 9 + i]) for i in range(4))]
    made: list[tuple[int, int]] = []
    widest: list[int] = []
    stream = SpeculativeDecoder.stream

    def watched(self: SpeculativeDecoder, requests: Iterable[Request]) -> Iterator[Round]:
        requests = list(requests)
        size = self.cache_size(requests)
        made.append((size.bytes + size.passes, size.rows))
        if self.target.dtype == torch.float32:
            widest.append(size.bytes + size.passes)
        return stream(self, requests)

    monkeypatch.setattr(SpeculativeDecoder, "stream", watched)
    lossless.evidence(*half, prompts, [], {2: Drafting()}, 0)
    needed = lossless._copies(*half)
    wide = lossless._wide_size(half[0], ModelDrafter(half[1], 64), lossless.shortest(prompts), 2)
    assert lossless.evidence_bytes(*half, prompts, 2) == needed + wide > max(made)[0]
    assert max(widest) <= wide < 1.5 * max(widest), "its passes are a little smaller than told"
    made.clear()
    lossless.evidence(*half, prompts, [], {2: Drafting()}, 0, lossy=True)
    assert max(made)[0] == lossless.evidence_bytes(*half, prompts, 2, lossy=True)
    for short, rows in ((0, 4), (1, 1)):
        room = needed + wide
        monkeypatch.setattr(lossless, "free_bytes", lambda device, free=room - short: free)
        made.clear()
        shown = lossless.greedy_in_float32(*half, lossless.shortest(prompts), 2, 0)
        assert shown.greedy_identical == (4, 4)
        assert {width for _, width in made[:2]} == {rows}


def test_a_float32_copy_is_of_the_packed_model_too(pair) -> None:
    """And leaves it as it was, whether its layers are known or Transformers' own."""
    for body in (True, False):
        half = load(str(pair[0].path), dtype="bfloat16")
        if not body:
            half.body = None
        expected = half.hidden(torch.tensor([[5, 9, 30]]))
        packing.pack(half, 8)
        wide = packing.widened(half)
        stock = load(str(pair[0].path), dtype="bfloat16").model.float()
        tokens = torch.tensor([[5, 9, 30]])
        assert wide.dtype == torch.float32
        assert torch.allclose(wide.logits(wide.hidden(tokens)), stock(tokens).logits, atol=1e-5)
        assert half.dtype == torch.bfloat16
        assert torch.allclose(half.hidden(tokens).float(), expected.float(), atol=0.1)


def test_texts_of_the_engine_are_tested_at_the_drafts_own_columns(tiny: Tiny) -> None:
    """A vocabulary out of order, or with an id twice, is seen though no copy of it would show it;
    and a sound engine is accused as seldom as it should be.
    """
    target = tiny(1, layers=3)
    draft = make_draft(target, [0, 1], torch.arange(48))
    for seed in range(12):
        assert sampled_texts.emitted_p_value(target, draft, [5, 9, 30], seed, "token") > 1e-3
    shuffled = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    twice = torch.arange(48).clamp(max=40)
    for vocab in (shuffled, twice):
        wrong = replace(draft, vocab=vocab)
        assert sampled_texts.emitted_p_value(target, wrong, [5, 9, 30], 0, "token") < 1e-4


def test_planned_speedup_and_break_even_are_inverse() -> None:
    assert planned_speedup(0.8, 5, 0.1) == pytest.approx((1 - 0.8**6) / (0.2 * 1.5))
    assert planned_speedup(1.0, 3, 0.0) == 4
    alpha = acceptance_for(1.6, 4)
    assert sum(alpha**i for i in range(5)) == pytest.approx(1.6)
    assert (acceptance_for(0.9, 4), acceptance_for(5.0, 4)) == (0, 1)
    # 0.7 emits 2.533 tokens in a round of four; 0.8 times as fast as plain, so 3.166 are needed.
    assert break_even(0.7, 3, 0.8) == pytest.approx(acceptance_for(2.533 / 0.8, 3))
    assert break_even(0.7, 3, 1.0) == pytest.approx(0.7)
    assert math.isnan(break_even(math.nan, 3, 1.0))


@pytest.mark.parametrize(
    ("speedup", "interval", "words"),
    [
        (1.5, (1.3, 1.7), "The draft pays"),
        (0.8, (0.7, 0.9), "The draft does not pay: "),
        (0.9, (0.7, 1.2), "The draft is not shown to pay: "),
        (0.9, (math.nan, math.nan), "The draft is not shown to pay: "),
        (1.1, (0.9, 1.3), "cannot be shown"),
    ],
)
def test_the_verdict_follows_the_interval(card: Scorecard, speedup, interval, words) -> None:
    row, slow = (replace(row, verify_ratio=1.0) for row in card.rows[:2])  # whatever was measured
    row = replace(row, speedup=speedup, speedup_ci95=interval)
    slow = replace(slow, speedup=0.1, speedup_ci95=(0.05, 0.2))
    found = verdict([slow, row])
    assert words in found.reason
    assert found.pays == (words == "The draft pays")
    assert found.best.num_draft_tokens == row.num_draft_tokens


def test_score_refuses_nothing_to_do(pair) -> None:
    with pytest.raises(InputError, match="no prompts"):
        measure.score(*pair, [], num_draft_tokens=[1], temperature=[0.0], max_new_tokens=4)
    with pytest.raises(InputError, match="at least one"):
        measure.score(*pair, PROMPTS, num_draft_tokens=[], temperature=[0.0], max_new_tokens=4)


def test_an_example_tells_where_each_token_came_from(tiny: Tiny) -> None:
    """Pieces join to the text; a character of several tokens belongs to its last."""
    raw = "aé€z!".encode()
    tokenizer = SimpleNamespace(decode=lambda ids, **_: bytes(ids).decode(errors="replace"))
    rounds = [
        RowRound("p", list(raw[:3]), 3, 3, 2, False),  # two accepted, then a rejection
        RowRound("p", list(raw[3:7]), 3, 3, 3, False),  # all accepted, then the bonus token
        RowRound("p", list(raw[7:]), 3, 1, 1, True),  # the answer's end among the proposals
    ]
    output = Output("p", list(raw), rounds)
    found = example(tokenizer, "p", (0.0, 3), output)  # type: ignore[arg-type]
    kinds = ["accepted"] * 2 + ["residual"] + ["accepted"] * 3 + ["bonus", "accepted"]
    assert found.pieces == list(zip(["a", "", "é", "", "", "€", "z", "!"], kinds, strict=True))


# Drafting that stops early


@pytest.fixture(scope="module")
def early(pair: tuple[LanguageModel, LanguageModel]) -> Scorecard:
    return measure.score(
        *pair,
        PROMPTS,
        num_draft_tokens=3,
        temperature=[0.0, 1.0],
        max_new_tokens=20,
        least_reach=0.2,
    )


def test_one_card_has_fixed_gammas_and_one_that_stops_early(
    pair: tuple[LanguageModel, LanguageModel], card: Scorecard, early: Scorecard, tmp_path: Path
) -> None:
    settings = {"temperature": 0.0, "max_new_tokens": 20}
    both = measure.score(*pair, PROMPTS, num_draft_tokens=[1, 3], least_reach={3: 0.2}, **settings)
    assert [(row.num_draft_tokens, row.least_reach) for row in both.rows] == [(1, 0), (3, 0.2)]
    for row, other in zip(both.rows, [card.rows[0], early.rows[0]], strict=True):
        for count in ("rounds", "proposed", "tested", "accepted", "emitted"):
            assert getattr(row, count) == getattr(other, count)
    assert both.label == ""
    assert not both.failures
    assert both.fixed_gamma == 1
    assert early.fixed_gamma == round(early.verdict_row().draft_steps)
    both.write(tmp_path / "card.json")
    again = sound_card(tmp_path / "card.json")
    stopped = again.verdict.best.num_draft_tokens == 3
    assert ("γ ≤ 3 (stops early)" in again.verdict.reason) == stopped
    with pytest.raises(InputError, match="least_reach is given for γ = 4, which is not to be"):
        measure.score(*pair, PROMPTS, num_draft_tokens=3, least_reach={4: 0.2}, **settings)


def test_a_draft_that_stops_early_proposes_less_and_says_so(
    card: Scorecard, early: Scorecard, tmp_path: Path
) -> None:
    fixed = [row for row in card.rows if row.num_draft_tokens == 3]
    for row, other in zip(early.rows, fixed, strict=True):
        assert row.proposed < other.proposed
        assert row.draft_steps == row.proposed / row.rounds < 3 == other.draft_steps
        assert sum(row.survival_by_position) * row.rounds == pytest.approx(row.accepted)
        assert math.isnan(row.planned_speedup)
    assert "stops early (least reach 0.2)" in early.label
    assert math.isnan(early.verdict.break_even_acceptance)
    assert "nan" not in early.verdict.reason
    assert not early.failures
    early.write(tmp_path / "card.json")
    again = sound_card(tmp_path / "card.json")
    assert again.rows[0].least_reach == 0.2
    raw = json.loads((tmp_path / "card.json").read_text())
    for row in raw["rows"]:
        row.pop("least_reach")
    (tmp_path / "card.json").write_text(json.dumps(raw))
    with pytest.raises(InputError, match="contradicts itself"):
        sound_card(tmp_path / "card.json")
