"""Evidence that must fail where an engine is wrong, and cards that must not be believed, for the
tests and for planted bugs.
"""

from __future__ import annotations

from dataclasses import replace

from cards import simulate
from conftest import tiny_model

from specdistill.scoring.lossless import explain_difference, greedy_pairs
from specdistill.scoring.trust import contradictions


def check_tie() -> None:
    """A token that no pass prefers is no tie, however the texts came about."""
    target = tiny_model(1, layers=2)
    (pair,) = greedy_pairs(target, target, [("a", [7, 8, 9])], 3, 6)
    assert pair.identical
    tokens = pair.speculative.tokens
    wrong = replace(pair.speculative, tokens=[(tokens[0] + 1) % 64, *tokens[1:]])
    for alone in (True, False):
        told = explain_difference(target, replace(pair, speculative=wrong), alone=alone)
        assert not told["within_rounding"], "a wrong token passes for a tie"


def check_failed() -> None:
    """A difference that nothing explains takes the verdict back."""
    card = simulate({(0.0, 2): 0.7, (0.0, 4): 0.75})
    assert card.verdict.pays
    tie = {"prompt_id": "a", "position": 0, "within_rounding": False}
    wrong = replace(card, lossless=replace(card.lossless, greedy_identical=(47, 48), ties=[tie]))
    assert not wrong.verdict.pays, "a draft pays whose text is not the target's"
    assert wrong.verdict.reason.startswith("FAILED"), wrong.verdict.reason


def check_figures() -> None:
    """What a card says in sum is computed again."""
    card = simulate({(0.0, 2): 0.7, (0.0, 4): 0.75})
    assert contradictions(card) == []
    for change in ({"acceptance_rate": 0.99}, {"speedup_ci95": (1.9, 2.0)}):
        proud = replace(card, rows=[replace(card.rows[0], **change), *card.rows[1:]])
        assert contradictions(proud), f"{change} is believed"
