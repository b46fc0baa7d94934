"""Answers that are decoded with a draft: the same ones, and what it saves is measured."""

import itertools
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from test_cli import run

from specdistill import models
from specdistill.data import draft_gain
from specdistill.data.draft_gain import decode_timed, measure_gain
from specdistill.data.generation import generate
from specdistill.data.prompts import Prompt
from specdistill.data.scorers import BestOf
from specdistill.data.token_store import read_examples
from specdistill.decoding import (
    GREEDY,
    Generation,
    ModelDrafter,
    Request,
    Sampling,
    SpeculativeDecoder,
)
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import StorageError
from specdistill.models import LanguageModel

PROMPTS = [Prompt(f"p{i}", ({"role": "user", "content": f"w{5 + i} w9"},)) for i in range(13)]
LENGTH = 10


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> LanguageModel:
    return models.load(str(tiny_folder), dtype="float64")


@pytest.fixture(scope="module")
def draft(target: LanguageModel, tmp_path_factory: pytest.TempPathFactory) -> LanguageModel:
    folder = tmp_path_factory.mktemp("draft") / "draft"
    save_draft(make_draft(target, [0, 1, 2], torch.arange(0, 64, 2)), folder)
    return models.load(str(folder), dtype="float64")


def answer(target: LanguageModel, folder: Path, **changes: object) -> dict:
    settings = {"max_new_tokens": LENGTH, "samplings": [GREEDY], "seed": 3, "batch_size": 5}
    generate(target, PROMPTS, folder, **{**settings, **changes})  # type: ignore[arg-type]
    return {e.id: e for e in read_examples(folder, signal=True)}


def test_greedy_answers_and_their_signal_are_those_without_the_draft(
    target: LanguageModel, draft: LanguageModel, tmp_path: Path
) -> None:
    plain = answer(target, tmp_path / "plain")
    drafted = answer(target, tmp_path / "drafted", draft=draft, num_draft_tokens=3)
    assert plain.keys() == drafted.keys()
    for i, example in plain.items():
        assert drafted[i].response_tokens == example.response_tokens
        for name in ("hidden", "logsumexp"):
            assert torch.allclose(drafted[i].signal[name], example.signal[name], atol=1e-6)


def test_sampled_ones_go_through_filters_and_scorers_too(
    target: LanguageModel, draft: LanguageModel, tmp_path: Path
) -> None:
    settings = {"samplings": [Sampling(1.0)], "best_of": BestOf(3, "log-probability")}
    found = answer(target, tmp_path / "a", draft=draft, num_draft_tokens=2, **settings)
    again = answer(
        target, tmp_path / "b", draft=draft, num_draft_tokens=2, batch_size=7, **settings
    )
    assert len(found) == 13
    for i, example in found.items():
        assert again[i].response_tokens == example.response_tokens
        tokens = torch.tensor([example.prompt_tokens + example.response_tokens])
        stock = target.model(tokens).logits[0, len(example.prompt_tokens) - 1 : -1]
        assert torch.allclose(target.logits(example.signal["hidden"]), stock, atol=1e-5)


def test_the_folder_belongs_to_the_draft_it_was_made_with(
    target: LanguageModel, draft: LanguageModel, tmp_path: Path
) -> None:
    answer(target, tmp_path / "data", draft=draft, num_draft_tokens=3)
    for other in ({}, {"draft": draft, "num_draft_tokens": 2}):
        with pytest.raises(StorageError, match="other settings"):
            answer(target, tmp_path / "data", **other)


def test_the_gain_is_that_of_the_clock(
    target: LanguageModel, draft: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a clock by which plain runs take 3 s and drafted ones 1 s."""
    ticks = itertools.accumulate([0, 3, 0, 1, 0, 1, 0, 3])
    drafted = SpeculativeDecoder(
        target, ModelDrafter(draft, target.vocab_size), num_draft_tokens=3, batch_size=4
    )
    requests = [Request(str(i), [5 + i, 9], 50) for i in range(9)]
    run = SpeculativeDecoder.run
    seen: list[tuple[bool, int, int]] = []

    def watched(self: SpeculativeDecoder, asked: list[Request]) -> object:
        seen.append((self.drafter is not None, len(asked), asked[0].max_new_tokens))
        return run(self, asked)

    monkeypatch.setattr(SpeculativeDecoder, "run", watched)
    monkeypatch.setattr(draft_gain, "perf_counter", lambda: next(ticks))
    found = measure_gain(target, draft, 3, requests, 4)
    assert seen[2:] == [(which, 4, draft_gain.TOKENS) for which in (False, True, True, False)]
    assert found.prompts == 4
    assert found.ratio == pytest.approx(3)
    outputs = run(
        drafted, [Request(r.id, r.tokens, draft_gain.TOKENS) for r in requests[:4]]
    ).outputs
    emitted = sum(len(o.tokens) for o in outputs)
    assert found.tokens_per_call == pytest.approx(emitted / sum(len(o.rounds) for o in outputs))
    assert found.tokens_per_call > 1
    assert found.plain == pytest.approx(2 * emitted / 6)


def test_what_plain_decoding_would_have_taken(
    target: LanguageModel, draft: LanguageModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Plain rounds of 4 rows take 2 s and prompts 3 s; drafted runs 1 s a round."""
    run = SpeculativeDecoder.run

    def clocked(self: SpeculativeDecoder, asked: list[Request]) -> Generation:
        found = run(self, asked)
        assert self.drafter or [r.max_new_tokens for r in asked] == [draft_gain.PLAIN_TOKENS] * 4
        prompts, rounds = (0.0, found.rounds) if self.drafter else (3.0, 2.0 * found.rounds)
        return replace(found, seconds={"prefill": prompts, "target": rounds})

    monkeypatch.setattr(SpeculativeDecoder, "run", clocked)
    decoder = SpeculativeDecoder(
        target, ModelDrafter(draft, target.vocab_size), num_draft_tokens=3, batch_size=4
    )
    requests = [Request(str(i), [5 + i, 9], 50) for i in range(8)]
    found = decode_timed(decoder, requests)
    emitted = sum(len(output.tokens) for output in found.generation.outputs)
    probe = run(
        SpeculativeDecoder(target, batch_size=4),
        [replace(r, max_new_tokens=draft_gain.PLAIN_TOKENS) for r in requests[:4]],
    )
    probed = sum(len(output.tokens) for output in probe.outputs)
    assert found.tokens == emitted
    assert found.seconds == found.generation.rounds + 3 + 2 * probe.rounds, "finding out counts"
    assert found.plain_seconds == pytest.approx(3 * 2 + 2 * probe.rounds / probed * emitted)
    assert found.tokens_per_call == pytest.approx(
        emitted / sum(len(output.rounds) for output in found.generation.outputs)
    )


def test_the_command_tells_what_the_draft_gains(
    tiny_folder: Path, draft: LanguageModel, tmp_path: Path
) -> None:
    (tmp_path / "prompts.txt").write_text("w5 w6\nw7 w8\nw9 w10\n")
    asked = ["generate", "--target", tiny_folder, "--prompts", tmp_path / "prompts.txt"]
    asked += ["--max-new-tokens", 5, "--threads", 1]
    done = run(*asked, "--out", tmp_path / "data", "--draft", draft.path, "--json")
    assert done.document["answers"] == 3
    assert done.document["draft_gain"] > 0
    assert "measured on 3 prompts decoded both ways" in done.err
    pays = done.document["draft_gain"] > 1
    assert ("it does not pay: leave --draft out" in done.err) == (not pays)
    assert (done.document["seconds_saved"] > 0) == pays
    alone = run(*asked, "--out", tmp_path / "x", "--num-draft-tokens", 2)
    assert (alone.code, "--num-draft-tokens has no effect" in alone.err) == (2, True)
