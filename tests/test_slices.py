"""The length of prompts from which on a draft no longer pays."""

from __future__ import annotations

import pytest
from cards import simulate

from specdistill.scoring.card_rows import PromptRow
from specdistill.scoring.slices import stops_paying
from specdistill.scoring.verdict import verdict


def prompts(speedups: dict[int, float], number: int = 4) -> list[PromptRow]:
    """Of some tokens each, that many times as fast with the draft as without, or nearly."""
    return [
        PromptRow(
            prompt_id=f"{tokens}-{i}",
            temperature=0.0,
            num_draft_tokens=4,
            emitted=100,
            rounds=40,
            seconds=5.0 / speedup * (1 + 0.01 * i),
            baseline_seconds=5.0,
            baseline_emitted=100,
            tested=80,
            accepted=60,
            prompt_tokens=tokens + i,
        )
        for tokens, speedup in speedups.items()
        for i in range(number)
    ]


@pytest.mark.parametrize(
    ("speedups", "band"),
    [
        ({100: 2.0, 300: 1.5, 600: 0.8, 1100: 0.5}, "512–1,023 tokens"),
        ({100: 2.0, 300: 0.8, 600: 1.3, 1100: 0.5}, "1,024–2,047 tokens"),
        ({100: 2.0, 300: 1.5, 600: 0.8, 1100: 1.2}, None),
        ({100: 2.0, 4000: 1.4, 16_384: 0.7}, "16,384–32,767 tokens"),
        ({100: 2.0, 300: 1.5}, None),
        ({100: 0.9, 300: 0.8}, None),
        ({100: 2.0, 300: 1.01}, None),
    ],
)
def test_the_band_from_which_on_a_draft_does_not_pay(
    speedups: dict[int, float], band: str | None
) -> None:
    found = stops_paying(prompts(speedups))
    assert (found and found.category) == band
    few = [*prompts(speedups), *prompts({5000: 0.1}, number=2)]
    assert stops_paying(few) == found, "two prompts say nothing"


def test_the_verdict_names_the_band() -> None:
    card = simulate({(0.0, 4): 0.8})
    assert card.verdict.pays
    assert "no longer pays" not in card.verdict.reason
    rows = [*prompts({100: 2.0, 300: 1.9}, 12), *prompts({600: 0.8})]
    judged = verdict(card.rows, per_prompt=rows)
    assert judged.pays
    assert "From prompts of 512–1,023 tokens on it no longer pays: 0.79 times" in judged.reason
    slow = verdict(card.rows, per_prompt=prompts({100: 0.9, 300: 0.8}))
    assert "no longer pays" not in slow.reason
