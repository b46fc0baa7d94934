"""The loop: answers of the target, a draft, its score, distillation, its score again, pictures,
report.

The plan and every stage's result are kept in the run folder. A stage is skipped where its result is
there, so an interrupted run goes on.
"""

from __future__ import annotations

import random
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import median
from typing import Literal

import torch

from specdistill import models
from specdistill.config import Parallel
from specdistill.data.chat import EncodedPrompt, encoded
from specdistill.data.generation import generate
from specdistill.data.likeness import split_prompts
from specdistill.data.prompts import Prompt, load_prompts
from specdistill.data.token_store import read_manifest
from specdistill.decoding import Sampling
from specdistill.documents import read_json
from specdistill.drafts.making import make_draft, save_draft
from specdistill.drafts.vocabulary import vocabulary_from
from specdistill.errors import InputError
from specdistill.files import holding, keep_apart
from specdistill.models import LanguageModel
from specdistill.progress import Note, Progress, silent, unsaid
from specdistill.quickstart.plan import LEAST_ANSWERS, Plan, Task, announcement, choose
from specdistill.report import write_report
from specdistill.report.plots import plot_all
from specdistill.run_folder import RunFolder
from specdistill.scoring.measure import score
from specdistill.scoring.scorecard import Scorecard, write_json
from specdistill.scoring.turns import MIN_PROMPTS
from specdistill.training.run import distill

PLAN = "plan.json"  # in the run folder
STAGES = ("data", "undistilled", "draft")  # folders in it
# Updates. The rate ends at next to nothing, so the last weights are the best, and more evaluations
# would take the time of a fifth of the updates.
EVALUATE_EVERY = 400


@dataclass(frozen=True)
class _Begun:
    task: Task
    plan: Plan


@holding("run_dir")
def quickstart(
    run_dir: Path,
    task: Task | None = None,
    plan: Plan | None = None,
    progress: Progress = silent,
    note: Note = unsaid,
) -> tuple[Scorecard, Scorecard]:
    """Returns the scorecards before and after. Without a `plan` the demo's is taken for the demo,
    and `choose` makes one for any other task.

    Raises `InputError` where `run_dir` holds a finished run or that of another task, and before
    any work where the prompts are too few, the minutes too short, or the target too shallow.
    """
    task = task or Task()
    began, run = time.perf_counter(), RunFolder(run_dir)
    keep_apart([run_dir], [task.target])
    keep_apart([run_dir / name for name in STAGES], [task.prompts, task.heldout])
    begun = check_run(run_dir, task)
    train, heldout = read_prompts(task, note)
    progress("load", 0, 1, task.target)
    target = models.load(task.target)
    progress("load", 1, 1, task.target)
    questions = encoded(target.tokenizer, heldout)
    _enough(len(train), len(questions), "different ")
    if begun is not None:
        plan = begun.plan
    elif plan is None and task == Task():
        plan = Plan()
    elif plan is None:
        asked = encoded(target.tokenizer, train)
        plan = choose(task, target, asked, questions, began, progress)
    write_json(asdict(_Begun(task, plan)), run_dir / PLAN)
    for line in announcement(target, plan):
        note(line)

    data = _answers(run_dir / "data", target, train[: plan.answers], task.seed, plan, progress)
    undistilled = _undistilled(run_dir / "undistilled", target, data, task.seed, plan, note)
    questions = questions[: plan.score_prompts]

    def scored(
        file: Path,
        draft: Path,
        prompts: list[EncodedPrompt],
        gammas: Sequence[int],
        least_reach: Mapping[int, float],
    ) -> Scorecard:
        if file.exists():
            return Scorecard.read(file)
        card = score(
            target,
            models.load(str(draft)),
            prompts,
            num_draft_tokens=gammas,
            temperature=plan.temperatures,
            max_new_tokens=plan.score_tokens,
            seed=task.seed,
            least_reach=least_reach,
            max_seconds=plan.score_seconds,
            keep_text=True,
            progress=progress,
        )
        card.write(file)
        return card

    before = scored(
        run.scorecard_before,
        undistilled,
        questions[: plan.before_prompts],
        plan.before_num_draft_tokens,
        {},
    )
    if not (run.draft / "config.json").exists():
        distill(
            target,
            undistilled,
            data,
            run_dir,
            resume=True,
            progress=progress,
            seed=task.seed,
            heldout=max(1, min(16, len(read_manifest(data).ids) // 4)),
            evaluate_every=EVALUATE_EVERY,
            decode=None,  # it is scored before and after
            max_seconds=plan.train_seconds,
            batch_tokens=plan.batch_tokens,
            learning_rate=plan.learning_rate,
            precision=training_precision(target),
            parallel=parallel_training(plan),
        )
    early = early_stop(before, plan)
    gammas = [*plan.num_draft_tokens, *early]
    after = scored(run.scorecard, run.draft, questions, gammas, early)
    progress("report", 0, 1)
    plot_all(run_dir, note=note)
    write_report(run_dir)
    progress("report", 1, 1)
    return before, after


def parallel_training(plan: Plan) -> Parallel | None:
    """Half of the time as an ordinary draft, which was the best beginning (bench/LOG.md), and then
    blocks as long as the longest that is scored.
    """
    if plan.drafting == "autoregressive":
        return None
    return Parallel(ordinary=0.5, num_draft_tokens=max(plan.num_draft_tokens))


def training_precision(target: LanguageModel) -> Literal["fp32", "bf16"]:
    """Half precision where the target is read in it: the device is then fast in it, and a run makes
    nearly half as many updates again.
    """
    return "bf16" if target.dtype == torch.bfloat16 else "fp32"


def early_stop(before: Scorecard, plan: Plan) -> dict[int, float]:
    """The least reach by γ of a proposal that stops early: one and a half times what a draft step
    costs, in plain steps, which was the best of a replay (bench/LOG.md). The draft has the shape of
    the undistilled one, whose steps were timed. Empty where a step costs as much as it can gain,
    and for a parallel draft, whose one pass gives all.
    """
    if plan.drafting == "parallel":
        return {}
    costs = [row.cost_ratio for row in before.rows if row.cost_ratio > 0]
    reach = float(f"{1.5 * median(costs):.1e}") if costs else 1.0
    return {plan.early_num_draft_tokens: reach} if reach < 1 else {}


def check_run(run_dir: Path, task: Task) -> _Begun | None:
    """The plan that an interrupted run goes on with. Raises `InputError` for a folder whose run is
    finished, or is not this task.
    """
    if RunFolder(run_dir).report.exists():
        raise InputError(
            f"{run_dir} already holds a finished run; give another --run-dir, or remove it"
        )
    if not (run_dir / PLAN).exists():
        for name in ("config.yaml", *STAGES):
            if task != Task() and (run_dir / name).exists():
                raise InputError(
                    f"{run_dir} holds {name} of something else; give another --run-dir"
                )
        return None
    begun = read_json(run_dir / PLAN, _Begun, "remove the run folder, or give another --run-dir")
    for name, now in asdict(task).items():
        if (first := getattr(begun.task, name)) != now:
            raise InputError(
                f"{run_dir} holds a run with {name}: {first}, and now it is {now}; go on with the "
                "first command, or give another --run-dir"
            )
    return begun


def read_prompts(task: Task, note: Note) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts to answer and those held out for the score. Where the task names no held-out
    ones, a fifth of the prompts are, 32 at most. Raises `InputError` where there are too few.
    """
    prompts = load_prompts(task.prompts)
    heldout = task.heldout or ("demo:heldout" if task.prompts == "demo:train" else None)
    if heldout is not None:
        sides = prompts, load_prompts(heldout)
    else:
        _enough(len(prompts) - MIN_PROMPTS, MIN_PROMPTS)
        number = max(MIN_PROMPTS, min(32, len(prompts) // 5))
        sides = split_prompts(prompts, number, task.seed, note)
    _enough(len(sides[0]), len(sides[1]))
    if task != Task():  # a file may go by topic, and its first prompts are not like its last
        for side in sides:
            random.Random(task.seed).shuffle(side)
    return sides


def _enough(train: int, heldout: int, kind: str = "") -> None:
    if train < LEAST_ANSWERS or heldout < MIN_PROMPTS:
        raise InputError(
            f"there are {train} prompts to answer and {heldout} {kind}held-out ones: a verdict "
            f"needs at least {LEAST_ANSWERS} and {MIN_PROMPTS}; give more prompts"
        )


def _answers(
    folder: Path,
    target: LanguageModel,
    prompts: Sequence[Prompt],
    seed: int,
    plan: Plan,
    progress: Progress,
) -> Path:
    if (folder.parent / "undistilled").exists():  # the answers were finished, perhaps out of time
        return folder
    generate(
        target,
        prompts,
        folder,
        max_new_tokens=plan.max_new_tokens,
        samplings=[Sampling(t) for t in plan.temperatures],
        seed=seed,
        batch_size=plan.batch_size,
        max_seconds=plan.answer_seconds,
        progress=progress,
    )
    return folder


def _undistilled(
    folder: Path, target: LanguageModel, data: Path, seed: int, plan: Plan, note: Note
) -> Path:
    if (folder / "config.json").exists():
        return folder
    ids = None
    if plan.vocab_size is not None:
        vocabulary = vocabulary_from(target, plan.vocab_size, data, seed)
        ids = vocabulary.ids
        note(f"the draft's tokens hold {vocabulary.coverage:.2%} of {vocabulary.unit}")
    save_draft(make_draft(target, plan.layers, ids), folder)
    return folder
