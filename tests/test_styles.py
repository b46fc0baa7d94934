"""How prompts are put: the messages of each style, and which examples are shown."""

import pytest
from prompt_files import user

from specdistill.data.prompts import Prompt
from specdistill.data.styles import STYLES, THINK, styled
from specdistill.errors import InputError

SYSTEM = {"role": "system", "content": "be brief"}
ASKED = [Prompt("a", (user("one"),)), Prompt("b", (SYSTEM, user("two")), "kind")]
SHOWN = [Prompt(f"e{i}", (SYSTEM, user(f"q{i}")), response=f"r{i}") for i in range(9)]


def test_instruction_is_the_prompt_as_it_is() -> None:
    assert styled(ASKED, "instruction") == ASKED


def test_chain_of_thought_asks_for_the_reasoning_at_the_end_of_the_question() -> None:
    plain, with_system = styled(ASKED, "chain-of-thought")
    assert plain.messages == (user(f"one\n\n{THINK}"),)
    assert with_system.messages == (SYSTEM, user(f"two\n\n{THINK}"))
    assert (with_system.id, with_system.category) == ("b", "kind")


def test_in_context_shows_examples_as_turns_before_the_question() -> None:
    plain, with_system = styled(ASKED, "in-context", examples=SHOWN, shots=3, seed=1)
    *shown, question = plain.messages
    assert question == user("one")
    assert [turn["role"] for turn in shown] == ["user", "assistant"] * 3
    for asked, said in zip(shown[::2], shown[1::2], strict=True):
        assert said["content"] == asked["content"].replace("q", "r")
    assert with_system.messages[0] == SYSTEM
    assert [turn["role"] for turn in with_system.messages].count("system") == 1
    assert with_system.messages[-1] == user("two")
    assert len(with_system.messages) == 8


def test_the_seed_and_the_id_draw_the_examples() -> None:
    once = styled(ASKED, "in-context", examples=SHOWN, seed=1)
    assert styled(ASKED, "in-context", examples=SHOWN, seed=1) == once
    assert styled(ASKED[1:], "in-context", examples=SHOWN, seed=1) == once[1:]
    assert styled(ASKED, "in-context", examples=SHOWN, seed=2) != once
    shown = [{t["content"] for t in p.messages[:-1] if t["role"] == "user"} for p in once]
    assert shown[0] != shown[1]
    assert all(len(questions) == 4 for questions in shown), "an example shown twice"


def test_an_example_that_asks_the_same_is_not_shown() -> None:
    """It would give the answer away."""
    same = [Prompt(f"e{i}", (user("one"),), response="r") for i in range(5)]
    (put,) = styled(ASKED[:1], "in-context", examples=[*same, *SHOWN[:2]], shots=4)
    assert [t["content"] for t in put.messages if t["role"] == "user"].count("one") == 1
    assert len(put.messages) == 5, "the two that are left"


def test_what_has_no_meaning_is_refused() -> None:
    with pytest.raises(InputError, match="unknown style 'x'; choose from instruction, in-context"):
        styled(ASKED, "x")
    with pytest.raises(
        InputError, match=r"'in-context' shows examples: name a file of prompts with responses"
    ):
        styled(ASKED, "in-context")
    with pytest.raises(InputError, match="got 9 and style 'chain-of-thought'"):
        styled(ASKED, "chain-of-thought", examples=SHOWN)
    with pytest.raises(InputError, match="example 'a' has no response to show"):
        styled(ASKED, "in-context", examples=ASKED)
    with pytest.raises(InputError, match="shots, the examples shown, must be at least 1"):
        styled(ASKED, "in-context", examples=SHOWN, shots=0)
    with pytest.raises(InputError, match="--shots 2 has no effect with the style 'instr"):
        styled(ASKED, "instruction", shots=2)


def test_every_style_has_a_test() -> None:
    assert set(STYLES) == {"instruction", "in-context", "chain-of-thought"}
