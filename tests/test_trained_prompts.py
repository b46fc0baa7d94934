"""A run says what its held-out prompts have in common with those it trains on, and a score which of
its prompts the draft was trained on; no prompt counts twice.
"""

from __future__ import annotations

from pathlib import Path

from small_runs import ask, pair_of, reported, settings

from specdistill import models
from specdistill.data.chat import encode_prompt, encoded
from specdistill.data.likeness import TRAINED, fingerprint, read_trained
from specdistill.data.prompts import Prompt
from specdistill.scoring.headline import trained_line
from specdistill.scoring.measure import score
from specdistill.training.answers import read_given, split


def test_a_score_on_prompts_of_training_says_so(world: dict[str, str], tmp_path: Path) -> None:
    config = settings(world, tmp_path / "run", training={"max_steps": 2}, decode=None)
    assert any("8 held out" in line for line in reported(config))
    target, _ = pair_of(world)
    _, training = split(read_given(config, target), config.heldout)
    texts = [target.tokenizer.decode(e.prompt_tokens, skip_special_tokens=True) for e in training]
    made = tmp_path / "run" / "draft"
    assert read_trained(made) == {fingerprint(text) for text in texts}

    ids = [e.id for e in training[:2]]
    learnt = [prompt for prompt in ask(40) if prompt.id in ids]
    new = [Prompt(f"new{i}", ({"role": "user", "content": f"w{i} w{i} w9"},)) for i in range(7, 10)]
    asked = encoded(target.tokenizer, [*learnt, *new])

    def scored(folder: Path) -> str:
        pair = target, models.load(str(folder), dtype="float32")
        card = score(*pair, asked, num_draft_tokens=[2], temperature=[0.0], max_new_tokens=4)
        trained = card.provenance["trained_prompts"]
        assert (trained is None) == (not (folder / TRAINED).exists())
        return trained_line(card)

    assert scored(made).startswith("2 of 5 prompts were trained on: on new ones")
    assert scored(Path(world["draft"])) == ""


def test_near_duplicates_on_both_sides_are_said(world: dict[str, str], tmp_path: Path) -> None:
    words = " ".join(f"w{i}" for i in range(10, 22))
    rows = [f'{{"prompt": "{words} w{30 + i}", "response": "w7 w8"}}\n' for i in range(12)]
    (tmp_path / "rows.jsonl").write_text("".join(rows))
    world = world | {"data": str(tmp_path / "rows.jsonl")}
    # What all of them share is no likeness, so some ask something else.
    others = [f'{{"prompt": "w{i} w{i + 9}", "response": "w7"}}\n' for i in range(30, 42)]
    (tmp_path / "rows.jsonl").write_text("".join([*rows, *others]))
    more = {"policy": "fixed", "signal": "live", "decode": None, "heldout": 12}
    config = settings(world, tmp_path / "run", training={"max_steps": 1}, **more)
    heldout, _ = split(read_given(config, pair_of(world)[0]), 12)
    alike = sum(int(e.id) <= 12 for e in heldout)
    assert alike
    words = f"{alike} of them on prompts nearly like one that is"
    assert any(words in line for line in reported(config))


def test_copies_of_a_prompt_are_scored_once(tiny_folder: Path) -> None:
    tokenizer = models.load(str(tiny_folder), dtype="float32").tokenizer
    copies = [Prompt(f"c{i}", ask(1)[0].messages) for i in range(40)]
    questions = encoded(tokenizer, [*copies, *ask(3)])
    assert [p.id for p in questions] == ["c0", "1", "2"]
    assert questions[0].tokens == encode_prompt(tokenizer, copies[0])
