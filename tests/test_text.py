"""Learning from text alone: another tokenizer than the target's, and no target at all."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from small_runs import run
from test_cli import run as command

from specdistill import models
from specdistill.config import DistillConfig, parse_config
from specdistill.data.chat import encode_example
from specdistill.data.generation import generate
from specdistill.data.prompts import Prompt
from specdistill.data.sources import open_answers
from specdistill.data.text_store import AnswerStore, Settled, TextAnswer
from specdistill.data.token_store import Example
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.report.plots.training import figure_training
from specdistill.run_folder import read_metrics
from specdistill.training.answers import read_given
from specdistill.training.batches import make_batch
from specdistill.training.distiller import Distiller
from specdistill.training.evaluation import on_text

Tiny = Callable[..., LanguageModel]


def prompt(i: int) -> Prompt:
    response = " ".join(f"w{(5 + i + 3 * k) % 40 + 5}" for k in range(6))
    return Prompt(f"p{i}", ({"role": "user", "content": f"w{6 + i % 30} w9"},), "kind", response)


@pytest.fixture(scope="module")
def world(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Text answers of a target that is nowhere, every other one cut; a draft of 48 words, and one
    of them trimmed to the even ones.
    """
    folder = tmp_path_factory.mktemp("text")
    store = AnswerStore(folder / "data", {"target": "far away"})
    answers = [TextAnswer(prompt(i), ended=i % 2 == 0) for i in range(40)]
    store.keep(Settled(answers))
    draft = tiny(3, vocab=48)
    save_draft(draft, folder / "draft")
    save_draft(make_draft(draft, [0], torch.arange(0, 48, 2)), folder / "trimmed")
    names = {"data": str(folder / "data"), "draft": str(folder / "draft")}
    return {"target": "far away", **names}


def settings(world: dict[str, str], run: Path, **more: object) -> DistillConfig:
    raw = {**world, "run_dir": str(run), "loss": "ce", "signal": "none", "heldout": 8}
    raw |= {"evaluate_every": 5, "checkpoint_every": 4}
    training = {"max_steps": 30, "batch_tokens": 120, "learning_rate": 2e-2}
    return parse_config({**raw, "training": training, **more})


def test_the_text_becomes_the_drafts_tokens(world: dict[str, str]) -> None:
    """With the end of the turn only where the answer ended."""
    draft = models.load(world["draft"], dtype="float32")
    examples = read_given(settings(world, Path("unused")), draft)
    assert len(examples) == 40
    for i, example in enumerate(examples):
        assert (example.id, example.category) == (f"p{i}", "kind")
        said = prompt(i).response or ""
        words = [draft.tokenizer.convert_tokens_to_ids(word) for word in said.split()]
        assert example.response_tokens == words + ([0] if i % 2 == 0 else [])
        assert draft.tokenizer.decode(example.prompt_tokens).endswith("w9 <|end|> <|assistant|>")


@pytest.mark.parametrize("draft", ["draft", "trimmed"])
def test_a_step_is_the_plain_cross_entropy(world: dict[str, str], draft: str) -> None:
    folder = str(Path(world["draft"]).parent / draft)
    config = settings({**world, "draft": folder}, Path("unused"))
    ours, twin = (models.load(folder, dtype="float32") for _ in range(2))
    examples = read_given(config, ours)[:7]
    total, known, matches, count = torch.zeros(()), 0, 0, 0
    columns = list(range(48)) if twin.vocab is None else twin.vocab.tolist()
    for example in examples:
        tokens = torch.tensor([example.prompt_tokens + example.response_tokens])
        rows = twin.logits(twin.hidden(tokens))[0, len(example.prompt_tokens) - 1 : -1]
        for row, token in zip(rows, example.response_tokens, strict=True):
            count += 1
            matches += columns[int(row.argmax())] == token
            if token in columns:
                known += 1
                total -= row.log_softmax(-1)[columns.index(token)]
    distiller = Distiller(None, ours, config)
    batches = [make_batch(examples[:4], 0, ours.device), make_batch(examples[4:], 0, ours.device)]
    found = on_text(distiller, batches)
    assert found == {"ce": pytest.approx((total / known).item()), "token_match": matches / count}
    metrics = distiller.step(batches, 1e-3)
    assert metrics.loss == pytest.approx((total / count).item(), rel=1e-5)
    assert (metrics.response_tokens, metrics.missing) == (count, count - known)


def test_a_run_learns_the_text_and_resumes_to_the_bit(
    world: dict[str, str], tmp_path: Path
) -> None:
    whole = run(settings(world, tmp_path / "whole"))
    held_out = [row for row in whole if "ce" in row]
    assert held_out[0]["ce"] > math.log(10)
    assert held_out[-1]["ce"] < held_out[0]["ce"] - 1
    assert held_out[-1]["token_match"] > held_out[0]["token_match"]
    assert "expected_alpha" not in held_out[0]
    config = settings(world, tmp_path / "cut")
    with pytest.raises(KeyboardInterrupt):
        run(config, stop_at=14)
    assert [row.get("loss") for row in run(config, resume=True)] == [r.get("loss") for r in whole]
    assert "# device:" in (tmp_path / "cut" / "config.yaml").read_text()
    assert (tmp_path / "cut" / "draft" / "config.json").exists()


def test_the_command_needs_no_target_and_the_picture_shows_what_was_met(
    world: dict[str, str], tmp_path: Path
) -> None:
    config = {**world, "run_dir": str(tmp_path / "run"), "loss": "ce", "signal": "none"}
    config |= {"heldout": 8, "training": {"max_steps": 3}}
    (tmp_path / "config.yaml").write_text(json.dumps(config))
    done = command("distill", tmp_path / "config.yaml", "--json")
    assert done.document["ce"] > 0
    assert "held-out cross entropy" in done.err
    figure = figure_training(read_metrics(tmp_path / "run" / "metrics.jsonl"))
    assert [line.get_label() for line in figure.axes[1].get_lines()] == ["tokens met", "kept"]


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"loss": "fkl"}, "loss 'fkl'"),
        ({"loss": {"ce": 0.5, "tvd": 0.5}}, "loss 'tvd'"),
        ({"hints": {"kind": "mse"}}, "hints"),
        ({"policy": "skd"}, "policy 'skd'"),
        ({"decode": {"prompts": 2}}, "decode"),
        ({"policy": "draft", "loss": "rkl"}, "loss 'rkl', policy 'draft'"),
    ],
)
def test_what_needs_the_target_is_refused_by_name(
    world: dict[str, str], changes: dict, named: str
) -> None:
    with pytest.raises(InputError, match=f"{named}: wants more of the target than its text"):
        settings(world, Path("unused"), **changes)


def test_text_has_no_signal_to_keep_but_a_target_may_read_it(
    world: dict[str, str], tiny: Tiny
) -> None:
    target = tiny(0)
    with pytest.raises(InputError, match=r"holds text, and nothing is kept.*signal: none"):
        read_given(settings(world, Path("unused"), signal="kept"), target)
    live = read_given(settings(world, Path("unused"), signal="live", loss="fkl"), target)
    assert len(live) == 40
    assert live[0].response_tokens[-1] == 0


def test_another_models_tokens_are_refused(
    world: dict[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    target = models.load(str(tiny_folder), dtype="float32")
    asked = [Prompt(str(i), ({"role": "user", "content": f"w{5 + i}"},)) for i in range(12)]
    generate(target, asked, tmp_path / "data", max_new_tokens=4, signal="none")
    draft = models.load(world["draft"], dtype="float32")
    for more in ({}, {"signal": "live", "loss": "fkl"}):
        config = settings({**world, "data": str(tmp_path / "data")}, Path("unused"), **more)
        with pytest.raises(InputError, match="whose tokenizer or chat template differs from"):
            read_given(config, draft)
        assert all(isinstance(e, Example) for e in read_given(config, target)), "its own are not"


def test_a_vocabulary_is_counted_in_text_too(world: dict[str, str]) -> None:
    tokenizer = models.load(world["draft"], dtype="float32").tokenizer
    lists = open_answers(world["data"]).token_lists(tokenizer)
    said = [(prompt(i).response or "").split() for i in range(40)]
    assert lists == [tokenizer.convert_tokens_to_ids(words) for words in said]


def test_a_cut_answer_gets_no_end_of_turn(tiny: Tiny) -> None:
    tokenizer = tiny(0).tokenizer
    whole, mask = encode_example(tokenizer, prompt(1), "w7 w8")
    cut, shorter = encode_example(tokenizer, prompt(1), "w7 w8", ended=False)
    assert cut == whole[:-1]
    assert shorter == mask[:-1]
    tokenizer.chat_template = None
    assert encode_example(tokenizer, prompt(1), "w7", ended=False)[0][-1] == 7
