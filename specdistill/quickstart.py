"""The whole loop in one call: answers of the target, a draft, its score, distillation, its score
again, pictures, report.

The plan and every stage's result are kept in the run folder. A stage is skipped where its result is
there, so an interrupted run goes on.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import NamedTuple

import torch
from torch import Tensor

from specdistill import limits, models
from specdistill.config import DistillConfig, Training
from specdistill.data.chat import EncodedPrompt, encoded
from specdistill.data.generation import generate, signal_bytes
from specdistill.data.likeness import split_prompts
from specdistill.data.prompts import Prompt, load_prompts
from specdistill.data.token_store import Example, read_examples, read_manifest
from specdistill.decoding import Request, Sampling, SpeculativeDecoder
from specdistill.decoding.cache import cache_bytes, free_bytes
from specdistill.documents import read_json
from specdistill.drafts.making import choose_vocabulary, expected_usage, make_draft, save_draft
from specdistill.errors import InputError, StorageError
from specdistill.files import holding, keep_apart, write_whole
from specdistill.models import LanguageModel, gguf_files, packing
from specdistill.progress import Note, Progress, silent, unsaid
from specdistill.report import write_report
from specdistill.report.plots import plot_all
from specdistill.scoring.measure import MIN_PROMPTS, score
from specdistill.scoring.scorecard import Scorecard
from specdistill.training.run import distill

PLAN = "plan.json"  # in the run folder
STAGES = ("data", "undistilled", "draft")  # folders in it
MINUTES = 30.0
LEAST_ANSWERS = 16
LENGTHS = (256, 128, 64, 32, 16)  # of answers, in tokens
SHARE = 0.35  # of the time: the most that answers take, and the most that scoring takes
SLACK = 1.2  # no machine is always as fast as when it was timed


@dataclass(frozen=True)
class Task:
    """What a user asks for. `choose` decides what is None; the minutes are then 30, and the
    held-out prompts are split from the others. With nothing asked for it is the demo.
    """

    target: str = gguf_files.DEMO
    prompts: str = "demo:train"
    heldout: str | None = None
    minutes: float | None = None
    layers: int | None = None
    vocab_size: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        bounds = {
            "minutes": limits.POSITIVE,
            "layers": limits.COUNT,
            "vocab_size": limits.VOCABULARY,
            "seed": limits.SEED,
        }
        for name, allowed in bounds.items():
            if (value := getattr(self, name)) is not None:
                limits.check(name, value, allowed)


@dataclass(frozen=True)
class Plan:
    """How much is done of what. The defaults are the demo's: they fit two CPU cores and eight
    minutes. The seconds bound the stages where a machine is slower than that.
    """

    answers: int = 240
    max_new_tokens: int = 64
    batch_size: int = 64
    layers: int = 2
    vocab_size: int | None = 3072  # None keeps the target's
    batch_tokens: int = 512
    learning_rate: float = 2e-3
    answer_seconds: float = 140.0
    train_seconds: float = 120.0
    score_seconds: float = 110.0
    score_prompts: int = 6
    score_tokens: int = 48
    num_draft_tokens: tuple[int, ...] = (2, 3, 5)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    before_prompts: int = 4
    before_num_draft_tokens: tuple[int, ...] = (3,)


class Speed(NamedTuple):
    """Measured seconds of plain decoding: to read the prompts of a full batch and for a token of
    each of its rows, and the same of one row alone.
    """

    batch_prefill: float
    batch_step: float
    prefill: float
    step: float


@dataclass(frozen=True)
class _Kept:
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
    began = time.perf_counter()
    keep_apart([run_dir], [task.target])
    keep_apart([run_dir / name for name in STAGES], [task.prompts, task.heldout])
    kept = check_run(run_dir, task)
    train, heldout = read_prompts(task)
    progress("load", 0, 1, task.target)
    target = models.load(task.target)
    progress("load", 1, 1, task.target)
    questions = encoded(target.tokenizer, heldout)
    _enough(len(train), len(questions), "different ")
    if kept is not None:
        plan = kept.plan
    elif plan is None and task == Task():
        plan = Plan()
    elif plan is None:
        asked = encoded(target.tokenizer, train)
        plan = choose(task, target, asked, questions, began, progress)
    _write_plan(run_dir, _Kept(task, plan))
    for line in announcement(target, plan):
        note(line)

    data = _answers(run_dir / "data", target, train[: plan.answers], task.seed, plan, progress)
    undistilled = _undistilled(run_dir / "undistilled", target, data, task.seed, plan, note)
    questions = questions[: plan.score_prompts]
    packing.pack(target, 8)

    def scored(
        file: str, draft: Path, prompts: list[EncodedPrompt], gammas: Sequence[int]
    ) -> Scorecard:
        if (run_dir / file).exists():
            return Scorecard.read(run_dir / file)
        card = score(
            target,
            packing.pack(models.load(str(draft)), 8),
            prompts,
            num_draft_tokens=gammas,
            temperatures=plan.temperatures,
            max_new_tokens=plan.score_tokens,
            seed=task.seed,
            max_seconds=plan.score_seconds,
            keep_text=True,
            progress=progress,
        )
        card.write(run_dir / file)
        return card

    before = scored(
        "scorecard_before.json",
        undistilled,
        questions[: plan.before_prompts],
        plan.before_num_draft_tokens,
    )
    if not (run_dir / "draft" / "config.json").exists():
        config = DistillConfig(
            target=task.target,
            draft=str(undistilled),
            data=str(data),
            run_dir=str(run_dir),
            seed=task.seed,
            heldout=max(1, min(32, len(read_manifest(data).ids) // 4)),
            decode=None,  # it is scored before and after
            training=Training(
                max_seconds=plan.train_seconds,
                batch_tokens=plan.batch_tokens,
                learning_rate=plan.learning_rate,
            ),
        )
        student = models.load(str(undistilled), dtype="float32")
        distill(config, target, student, resume=True, in_place=True, progress=progress)
    after = scored("scorecard.json", run_dir / "draft", questions, plan.num_draft_tokens)
    progress("report", 0, 1)
    plot_all(run_dir, note=note)
    write_report(run_dir)
    progress("report", 1, 1)
    return before, after


def check_run(run_dir: Path, task: Task) -> _Kept | None:
    """The plan that an interrupted run goes on with. Raises `InputError` for a folder whose run is
    finished, or is not this task.
    """
    if (run_dir / "report.md").exists():
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
    kept = read_json(run_dir / PLAN, _Kept, "remove the run folder, or give another --run-dir")
    for name, now in asdict(task).items():
        if (first := getattr(kept.task, name)) != now:
            raise InputError(
                f"{run_dir} holds a run with {name}: {first}, and now it is {now}; go on with the "
                "first command, or give another --run-dir"
            )
    return kept


def _write_plan(run_dir: Path, kept: _Kept) -> None:
    try:
        write_whole(run_dir / PLAN, json.dumps(asdict(kept), indent=1) + "\n")
    except OSError as error:
        raise StorageError(
            f"cannot write {run_dir / PLAN}: {error.strerror}; free space or give another --run-dir"
        ) from error


def read_prompts(task: Task) -> tuple[list[Prompt], list[Prompt]]:
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
        sides = split_prompts(prompts, number, task.seed)
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


def choose(
    task: Task,
    target: LanguageModel,
    prompts: Sequence[EncodedPrompt],
    heldout: Sequence[EncodedPrompt],
    began: float,
    progress: Progress = silent,
) -> Plan:
    """What the task leaves open, by these rules:

    - the draft has the target's first layers, one in twelve, and at least one;
    - it keeps the target's output tokens where the head has fewer weights than those layers, and
      else a sixteenth of them, in thousands;
    - as many answers are made together as fill a quarter of the free memory, 64 at most;
    - an update reads 512 tokens on a CPU, 4,096 elsewhere, and the learning rate falls with the
      width of the model, from 2e-3 at 576;
    - the rest is `divide`'s, by the speed of a short run.

    `began` is when the minutes began, by `time.perf_counter`. Raises `InputError` and `ModelError`
    for what the target cannot give.
    """
    layers = task.layers or max(1, target.num_layers // 12)
    if not 1 <= layers < target.num_layers:
        raise InputError(
            f"a draft needs fewer layers than its target, and {target.name} has "
            f"{target.num_layers}; got {layers}"
        )
    draft = make_draft(target, list(range(layers)))
    vocab_size = task.vocab_size
    if vocab_size is not None:
        choose_vocabulary(target, torch.ones(target.vocab_size), vocab_size)  # or it raises
    elif 2 * draft.head.weight.numel() > draft.weight_bytes() // draft.dtype.itemsize:
        fewer = max(1024, target.vocab_size // 16 // 1024 * 1024)
        vocab_size = fewer if fewer < target.vocab_size else None
    del draft
    longest = max(len(p.tokens) for p in (*prompts, *heldout))
    room = target.max_length - longest
    row = cache_bytes(target, 1, longest + min(LENGTHS[0], room))
    rows = min(64, len(prompts), free_bytes(target.device) // 4 // max(row, 1))
    on_cpu = target.device.type == "cpu"
    plan = Plan(
        batch_size=max(rows, 1),
        layers=layers,
        vocab_size=vocab_size,
        batch_tokens=512 if on_cpu else 4096,
        learning_rate=2e-3 * min(1.0, 576 / target.head.in_features),
    )
    speed = measure_speed(target, [p.tokens for p in prompts[: plan.batch_size]], progress)
    minutes = task.minutes or MINUTES
    return divide(
        plan, minutes, time.perf_counter() - began, speed, len(prompts), len(heldout), room
    )


def measure_speed(
    target: LanguageModel, prompts: Sequence[Sequence[int]], progress: Progress = silent
) -> Speed:
    """Of plain decoding of the prompts together, and of one of them alone, by a few tokens."""
    times: list[float] = []
    for number, batch in enumerate((prompts, prompts[:1])):
        progress("timing", number, 2, "a few tokens of plain decoding")
        packing.pack(target, len(batch))
        decoder = SpeculativeDecoder(target, batch_size=len(batch))
        rounds = decoder.stream([Request(str(i), [*p], 8) for i, p in enumerate(batch)])
        seconds = [round_.seconds for round_ in rounds]
        prefill = seconds[0]["prefill"]
        times += [prefill, median(sum(s.values()) - s["prefill"] for s in seconds)]
    progress("timing", 2, 2)
    return Speed(*times)


def divide(
    plan: Plan,
    minutes: float,
    spent: float,
    speed: Speed,
    prompts: int,
    heldout: int,
    room: int = LENGTHS[0],
) -> Plan:
    """The plan with what is left of the minutes after `spent` seconds divided: answers and scoring
    each get what they need, `SHARE` of it at most, and training gets the rest. Answers are as long
    as `room` and the time allow for 128 answers and 8 scored prompts, or for as many as there are.

    Raises `InputError` where the time does not suffice for the least of both.
    """
    settings = len(plan.temperatures)

    def answering(batches: int, tokens: int) -> float:
        return SLACK * batches * (speed.batch_prefill + tokens * speed.batch_step)

    def scoring(count: int, tokens: int) -> float:
        """Plainly twice, with every γ once, and as long again for the evidence; so, too, the few
        prompts of the score before."""
        runs = (3 + len(plan.num_draft_tokens)) * count
        runs += (3 + len(plan.before_num_draft_tokens)) * min(count, plan.before_prompts)
        return SLACK * settings * runs * (speed.prefill + tokens * speed.step)

    most = SHARE * (60 * minutes - spent)
    lengths = [tokens for tokens in LENGTHS if tokens <= room]
    if not lengths:
        raise InputError(
            f"the longest prompt leaves the target {max(room, 0)} positions for an answer, and "
            f"{LENGTHS[-1]} are the least; leave out the longest prompts"
        )
    for tokens in lengths:
        batches = max(0, int(most / answering(1, tokens)))
        answers = min(prompts, batches * plan.batch_size)
        counts = range(min(heldout, 32), 0, -1)
        scored = next((count for count in counts if scoring(count, tokens) <= most), 0)
        if answers >= min(prompts, 128) and scored >= min(heldout, 8):
            break
    if answers < LEAST_ANSWERS or scored < MIN_PROMPTS:
        batches = -(-LEAST_ANSWERS // plan.batch_size)
        needed = max(answering(batches, tokens), scoring(MIN_PROMPTS, tokens)) / SHARE + spent
        raise InputError(
            f"{minutes:g} minutes do not suffice for {LEAST_ANSWERS} answers and {MIN_PROMPTS} "
            f"scored prompts on this machine: give at least {needed / 60 + 0.05:.1f}, or take a "
            "smaller target"
        )
    answer_seconds = answering(-(-answers // plan.batch_size), tokens)
    score_seconds = scoring(scored, tokens)
    return replace(
        plan,
        answers=answers,
        max_new_tokens=tokens,
        answer_seconds=answer_seconds,
        train_seconds=60 * minutes - spent - answer_seconds - score_seconds,
        score_seconds=score_seconds,
        score_prompts=scored,
        score_tokens=tokens,
    )


def announcement(target: LanguageModel, plan: Plan) -> list[str]:
    """What will be done and how long it takes, for a user to read before."""
    size = signal_bytes(target, plan.answers, plan.max_new_tokens) / 1e6
    tokens = "all" if plan.vocab_size is None else f"{plan.vocab_size:,} of"
    gammas = ", ".join(map(str, plan.num_draft_tokens))
    temperatures = " and ".join(f"{t:g}" for t in plan.temperatures)
    parts = [
        (
            plan.answer_seconds,
            f"{plan.answers} answers of up to {plan.max_new_tokens} tokens, {plan.batch_size} at a "
            f"time; their signal takes at most {size:,.0f} MB",
        ),
        (
            plan.train_seconds,
            f"distillation of a draft of the first {plan.layers} of {target.num_layers} layers, "
            f"with {tokens} {target.vocab_size:,} output tokens",
        ),
        (
            plan.score_seconds,
            f"scores before and after on up to {plan.score_prompts} held-out prompts, γ = {gammas},"
            f" temperature {temperatures}",
        ),
    ]
    return [
        f"target {target.name}: {target.parameters():,} parameters, {target.dtype} on "
        f"{target.device}",
        *(f"up to {_duration(seconds)}: {what}" for seconds, what in parts),
    ]


def _duration(seconds: float) -> str:
    return f"{seconds / 60:.1f} minutes" if seconds >= 60 else f"{seconds:.0f} seconds"


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
    packing.pack(target, plan.batch_size)
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
        hidden = torch.cat([_hidden(e) for e in read_examples(data, signal=True)])
        generator = torch.Generator().manual_seed(seed)
        sample = hidden[torch.randperm(len(hidden), generator=generator)[:4096]]
        usage = expected_usage(target, sample)
        vocabulary = choose_vocabulary(target, usage, plan.vocab_size)
        ids = vocabulary.ids
        note(f"the draft's tokens hold {vocabulary.coverage:.2%} of the target's probability")
    save_draft(make_draft(target, list(range(plan.layers)), ids), folder)
    return folder


def _hidden(example: Example) -> Tensor:
    assert example.signal is not None
    return example.signal["hidden"]
