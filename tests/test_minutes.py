"""The acceptance that `bench.minutes` works out from answers is that of real decoding."""

from pathlib import Path

import pytest
import torch
from conftest import tiny_model
from small_runs import ask

from bench.minutes import acceptance, at_each_temperature, rounds
from specdistill.data.generation import generate
from specdistill.data.token_store import read_examples
from specdistill.decoding import ModelDrafter, Request, Sampling, SpeculativeDecoder
from specdistill.drafts.making import make_draft


def test_greedy_rounds_are_those_of_decoding_and_sampled_ones_in_the_mean(tmp_path: Path) -> None:
    target = tiny_model(layers=3)
    draft = make_draft(target, [0, 1], torch.arange(0, 64).roll(3)[:56].sort().values)
    for temperature, count in ((0.0, 20), (1.0, 400)):
        folder = tmp_path / f"{temperature}"
        generate(
            target,
            ask(count),
            folder,
            max_new_tokens=24,
            samplings=[Sampling(temperature)],
            batch_size=50,
        )
        answers = read_examples(folder, signal=True)
        chances = [acceptance(target, draft, answer, temperature)[1].tolist() for answer in answers]
        for gamma in (1, 3):
            drafter = ModelDrafter(draft, target.vocab_size)
            decoder = SpeculativeDecoder(target, drafter, num_draft_tokens=gamma, batch_size=50)
            sampling = Sampling(temperature)
            run = decoder.run([Request(a.id, a.prompt_tokens, 24, sampling, 7) for a in answers])
            real = [len(output.rounds) for output in run.outputs]
            expected = [rounds(c, gamma) for c in chances]
            if temperature == 0:
                assert real == expected
                continue
            tokens = sum(len(output.tokens) for output in run.outputs)
            rate = sum(expected) / sum(map(len, chances))
            assert sum(real) / tokens == pytest.approx(rate, rel=0.02)


def test_a_prompt_that_is_answered_twice_is_answered_at_both_temperatures(tmp_path: Path) -> None:
    asked = at_each_temperature(ask(6))
    folder, samplings = tmp_path / "answers", [Sampling(0.0), Sampling(1.0)]
    generate(tiny_model(), asked, folder, max_new_tokens=8, samplings=samplings)
    greedy = tmp_path / "greedy"
    generate(tiny_model(), ask(6), greedy, max_new_tokens=8, temperature=0.0)
    answers = read_examples(folder, signal=False)
    first = {tuple(e.prompt_tokens): e.response_tokens for e in read_examples(greedy, signal=False)}
    agree = [e.response_tokens == first[tuple(e.prompt_tokens)] for e in answers]
    assert (len(answers), sum(agree)) == (12, 6)
