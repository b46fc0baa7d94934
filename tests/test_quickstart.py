"""The whole loop on somebody's own model and prompts, and how it divides the minutes."""

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from cards import simulate
from conftest import tiny_model
from small_runs import padded_target
from test_cli import run

from specdistill import models, quickstart
from specdistill.cli.quickstart import _next_step
from specdistill.config import load_config
from specdistill.data.chat import encoded
from specdistill.data.prompts import load_prompts
from specdistill.decoding import SpeculativeDecoder
from specdistill.errors import InputError, SpecDistillError
from specdistill.models import LanguageModel
from specdistill.quickstart import loop
from specdistill.quickstart import plan as plans
from specdistill.quickstart.loop import early_stop, training_precision
from specdistill.quickstart.plan import LENGTHS, SHARE, Plan, Speed, Task, choose, divide
from specdistill.scoring.scorecard import Scorecard

FAST = Speed(0.1, 0.01, 0.01, 0.005)


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    file = tmp_path / "prompts.jsonl"
    lines = [json.dumps({"prompt": " ".join(f"w{5 + i * k % 53}" for k in (1, 3, 7, 11, 13, 17))})
             for i in range(1, 41)]  # fmt: skip
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return file


@pytest.mark.parametrize("minutes", [0.5, 3, 30, 300])
@pytest.mark.parametrize("speed", [FAST, Speed(*(x / 8 for x in FAST)), Speed(1, 0.1, 0.02, 0.02)])
@pytest.mark.parametrize(("prompts", "heldout", "room"), [(16, 4, 16), (1000, 32, 4000)])
def test_the_minutes_are_divided_without_rest(
    minutes: float, speed: Speed, prompts: int, heldout: int, room: int
) -> None:
    try:
        plan = divide(Plan(batch_size=16), minutes, 10.0, speed, prompts, heldout, room)
    except InputError as error:
        least = float(str(error).split("give at least ")[1].split(",")[0])
        assert least > minutes
        plan = divide(Plan(batch_size=16), least, 10.0, speed, prompts, heldout, room)
        minutes = least
    left = 60 * minutes - 10
    parts = plan.answer_seconds, plan.score_seconds, plan.train_seconds
    assert sum(parts) == pytest.approx(left)
    assert max(parts[:2]) <= SHARE * left
    assert 16 <= plan.answers <= prompts
    assert 4 <= plan.score_prompts <= heldout
    assert plan.max_new_tokens in LENGTHS
    assert plan.max_new_tokens <= room


def test_more_minutes_buy_longer_answers_then_more_of_them_then_training() -> None:
    speed = Speed(5, 0.25, 0.04, 0.04)
    plans = [divide(Plan(), m, 0.0, speed, 1000, 32, 4000) for m in (4, 16, 64, 128, 256, 512)]
    lengths = [plan.max_new_tokens for plan in plans]
    assert lengths == sorted(lengths)
    assert lengths[0] < lengths[-1] == LENGTHS[0]
    assert plans[-1].answers == 1000
    assert plans[-1].train_seconds - plans[-2].train_seconds == pytest.approx(256 * 60)


@pytest.mark.parametrize(("vocabulary", "kept"), [(600, None), (2000, 1024)])
def test_the_draft_keeps_fewer_tokens_than_there_are_or_all(
    prompts: Path, vocabulary: int, kept: int | None
) -> None:
    target = tiny_model(vocab=vocabulary, layers=4)  # the head is most of a draft
    questions = encoded(target.tokenizer, load_prompts(str(prompts)))
    task = Task(str(prompts.parent), str(prompts))
    plan = choose(task, target, questions[:20], questions[20:], time.perf_counter())
    assert plan.vocab_size == kept


def test_prompts_that_leave_no_room_for_an_answer_are_named(tmp_path: Path) -> None:
    lines = [f"w{5 + i} w6 w7" for i in range(30)]
    lines[11], lines[25] = " ".join(["w8"] * 500), " ".join(["w9"] * 501)  # of 512 positions
    (tmp_path / "p.txt").write_text("\n".join(lines))
    target = tiny_model(layers=4)
    asked = encoded(target.tokenizer, load_prompts(str(tmp_path / "p.txt")))
    task = Task(str(tmp_path), str(tmp_path / "p.txt"))
    with pytest.raises(InputError) as caught:
        choose(task, target, asked[:20], asked[20:], time.perf_counter())
    for part in ("512 positions, which leaves no room", "'12' (", "line 12)", "'26' (", "line 26)"):
        assert part in str(caught.value)


@pytest.mark.parametrize("drafting", ["autoregressive", "parallel"])
def test_a_command_takes_somebodys_model_to_a_verdict(
    tmp_path: Path,
    tiny_folder: Path,
    prompts: Path,
    monkeypatch: pytest.MonkeyPatch,
    drafting: str,
) -> None:
    """Planned by a speed and a cost that no busy machine changes, and not stopped where it is slow;
    how they are measured is tested by itself.
    """
    measured = []

    def unhurried(function: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, max_seconds, **kwargs: function(*args, **kwargs)

    def steady(target: LanguageModel, prompts: list[list[int]], *_: object) -> Speed:
        measured.append(len(prompts))
        return Speed(0.01, 0.001, 0.005, 0.0005)

    monkeypatch.setattr(plans, "measure_speed", steady)
    monkeypatch.setattr(
        plans, "divide", lambda plan, minutes, spent, *others: divide(plan, minutes, 0.0, *others)
    )
    for name in ("generate", "score"):
        monkeypatch.setattr(loop, name, unhurried(getattr(loop, name)))
    if drafting == "autoregressive":
        monkeypatch.setattr(loop, "early_stop", lambda before, plan: {8: 0.2})
    folder = tmp_path / "run"
    target = tiny_folder
    if drafting == "parallel":  # which wants a token that no text holds
        target = padded_target(tmp_path / "target")
    asked = ["quickstart", "--target", target, "--prompts", prompts, "--run-dir", folder]
    done = run(*asked, "--minutes", 0.1, "--vocab-size", 32)
    assert done.code == 0, done.err
    assert len(measured) == 1
    plan = json.loads((folder / "plan.json").read_text())["plan"]
    for seconds, what in (("answer", "answers of up to"), ("train", "first 1 of 4 layers")):
        assert f"up to {plan[f'{seconds}_seconds']:.0f} seconds: " in done.err
        assert what in done.err
    precision = load_config(folder / "config.yaml").training.precision
    assert precision == training_precision(models.load(str(target)))
    card, draft = Scorecard.read(folder / "scorecard.json"), models.load(str(folder / "draft"))
    assert card.verdict.reason in done.out
    assert (draft.num_layers, draft.vocab_size) == (1, 32)
    assert (card.drafting, draft.mask_token is None) == (drafting, drafting != "parallel")
    assert f"{folder / 'report.html'}" in done.out
    assert ("specdistill export" if card.verdict.pays else "--minutes 0.2") in done.out
    answered = json.loads((folder / "data" / "manifest.json").read_text())["parts"]
    early = [row.num_draft_tokens for row in card.rows if row.least_reach]
    assert early == ([] if drafting == "parallel" else [8, 8])
    scored = {row.prompt_id for row in card.per_prompt}
    assert len(scored) >= 4
    assert not scored & {id_ for part in answered for id_ in part["ids"]}
    assert run(*asked).code == 2, "a finished run is not begun again"


def test_more_time_is_asked_for_with_what_was_asked_before() -> None:
    card = simulate({(0.0, 2): 0.1})
    task = Task("t", "p.txt", minutes=5, layers=3, vocab_size=512, drafting="autoregressive")
    assert _next_step(Path("run"), task, card) == (
        "With more time: specdistill quickstart --target t --prompts p.txt --layers 3 "
        "--vocab-size 512 --drafting autoregressive --minutes 10"
    )
    assert "export --draft run/draft" in _next_step(Path("run"), task, simulate({(0.0, 2): 0.9}))


def test_a_target_without_an_unused_token_is_refused_a_parallel_draft(
    tmp_path: Path, tiny_folder: Path, prompts: Path
) -> None:
    asked = ["quickstart", "--target", tiny_folder, "--prompts", prompts, "--minutes", 1]
    done = run(*asked, "--drafting", "parallel", "--run-dir", tmp_path / "run")
    assert done.code == 2, done.err
    assert "no unused token for a parallel draft's mask" in " ".join(done.err.split())


def test_a_draft_is_trained_in_the_precision_of_its_target() -> None:
    for dtype, precision in ((torch.bfloat16, "bf16"), (torch.float32, "fp32")):
        assert training_precision(tiny_model(dtype=dtype)) == precision


def test_the_least_reach_is_by_the_cost_of_a_draft_step() -> None:
    plan = Plan(drafting="autoregressive")
    before = simulate({(0.0, 3): 0.1, (1.0, 3): 0.1})
    for costs, reach in (((0.08, 0.1), {8: 0.14}), ((math.nan, 0.2), {8: 0.3})):
        rows = [replace(row, cost_ratio=c) for row, c in zip(before.rows, costs, strict=True)]
        assert early_stop(replace(before, rows=rows), plan) == reach
        assert early_stop(replace(before, rows=rows), Plan()) == {}, "one pass gives all"
    for cost in (math.nan, 0.0, 0.7):  # unknown, or more than a token can gain
        rows = [replace(row, cost_ratio=cost) for row in before.rows]
        assert early_stop(replace(before, rows=rows), plan) == {}


def test_speed_is_measured_for_a_batch_and_for_one_row() -> None:
    batch_sizes, target = [], tiny_model(0)
    real = plans.SpeculativeDecoder

    def decoder(model: LanguageModel, *, batch_size: int) -> SpeculativeDecoder:
        batch_sizes.append(batch_size)
        return real(model, batch_size=batch_size)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(plans, "SpeculativeDecoder", decoder)
        assert min(plans.measure_speed(target, [[5, 6], [7, 8, 9], [4]])) > 0
    assert batch_sizes == [3, 1]


def test_the_same_command_goes_on(tmp_path: Path, tiny_folder: Path, prompts: Path) -> None:
    task = Task(str(tiny_folder), str(prompts), minutes=1.0)
    small = Plan(16, 8, 16, 1, None, train_seconds=0.3, score_prompts=4, score_tokens=6)
    small = replace(small, drafting="autoregressive")
    folder, seen = tmp_path / "run", []

    def stop(stage: str, done: float, total: float, detail: str = "") -> None:
        seen.append(stage)
        if stage == "distil" and seen.count("distil") == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quickstart.quickstart(folder, task, small, progress=stop)
    plan, before = (folder / "plan.json").read_text(), (folder / "scorecard_before.json").stat()
    asked = ["quickstart", "--target", tiny_folder, "--prompts", prompts, "--run-dir", folder]
    other = run(*asked, "--minutes", 1, "--layers", 2)
    assert other.code == 2
    assert "holds a run with layers: None, and now it is 2" in other.err
    seen.clear()
    quickstart.quickstart(folder, task, progress=lambda stage, *_: seen.append(stage))
    assert {"timing", "generate"}.isdisjoint(seen)
    assert (folder / "plan.json").read_text() == plan
    assert (folder / "scorecard_before.json").stat().st_mtime_ns == before.st_mtime_ns
    assert models.load(str(folder / "draft")).vocab is None


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"layers": 4}, "fewer layers than its target"),
        ({"vocab_size": 65}, "vocabulary size must be 1 to 64"),
        ({"minutes": 0.001}, "give at least"),
        ({"target": "nowhere/none"}, "nowhere/none"),
    ],
)
def test_what_cannot_work_is_refused_before_work(
    tmp_path: Path, tiny_folder: Path, prompts: Path, change: dict, words: str
) -> None:
    task = Task(**{"target": str(tiny_folder), "prompts": str(prompts), "minutes": 1.0, **change})
    with pytest.raises(SpecDistillError, match=words):
        quickstart.quickstart(tmp_path / "run", task)
    assert not (tmp_path / "run").exists()


def test_one_minute_is_one(tmp_path: Path, tiny_folder: Path) -> None:
    asked = ["--target", tiny_folder, "--prompts", tmp_path / "none.txt", "--run-dir", "here"]
    assert "about 1 minute, in here" in run("quickstart", *asked, "--minutes", 1).err


def test_too_few_prompts_are_refused(tmp_path: Path, tiny_folder: Path, prompts: Path) -> None:
    lines = prompts.read_text().splitlines(keepends=True)
    few, same = tmp_path / "few.jsonl", tmp_path / "same.jsonl"
    few.write_text("".join(lines[:19]))
    same.write_text(lines[0] * 4)
    for task, words in (
        (Task(str(tiny_folder), str(few)), "15 prompts to answer and 4 held-out"),
        (Task(str(tiny_folder), str(prompts), heldout=str(same)), "1 different held-out"),
    ):
        with pytest.raises(InputError, match=words):
            quickstart.quickstart(tmp_path / "run", task)
    assert not (tmp_path / "run").exists()
