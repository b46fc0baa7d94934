"""The whole loop in one call: answers of the target, a draft, its score, distillation, its score
again, pictures, report.

Every stage leaves its result in the run folder and is skipped where the result is there, so an
interrupted run goes on.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from specdistill import models
from specdistill.config import DistillConfig, Training
from specdistill.data.chat import EncodedPrompt, encoded
from specdistill.data.generation import generate, signal_bytes
from specdistill.data.prompts import load_prompts
from specdistill.data.token_store import Example, read_examples, read_manifest
from specdistill.decoding import Sampling
from specdistill.drafts.making import choose_vocabulary, expected_usage, make_draft, save_draft
from specdistill.errors import InputError
from specdistill.files import holding
from specdistill.models import LanguageModel, gguf_files, packing
from specdistill.progress import Note, Progress, silent, unsaid
from specdistill.report import write_report
from specdistill.report.plots import plot_all
from specdistill.scoring.measure import score
from specdistill.scoring.scorecard import Scorecard
from specdistill.training.run import distill


@dataclass(frozen=True)
class QuickstartPlan:
    """What quickstart does; the defaults fit two CPU cores and eight minutes. The seconds bound the
    stages where a machine is slower than that."""

    target: str = gguf_files.DEMO
    train_prompts: str = "demo:train"
    heldout_prompts: str = "demo:heldout"
    answers: int = 240
    max_new_tokens: int = 64
    batch_size: int = 64
    layers: int = 2
    vocab_size: int = 3072
    answer_seconds: float = 140.0
    train_seconds: float = 120.0
    score_seconds: float = 110.0
    score_prompts: int = 6
    score_tokens: int = 48
    num_draft_tokens: tuple[int, ...] = (2, 3, 5)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    before_prompts: int = 4
    before_num_draft_tokens: tuple[int, ...] = (3,)
    seed: int = 0


@holding("run_dir")
def quickstart(
    run_dir: Path,
    plan: QuickstartPlan | None = None,
    progress: Progress = silent,
    note: Note = unsaid,
) -> tuple[Scorecard, Scorecard]:
    """Returns the scorecards before and after. Raises `InputError` where `run_dir` holds a finished
    run.
    """
    plan = plan or QuickstartPlan()
    if (run_dir / "report.md").exists():
        raise InputError(
            f"{run_dir} already holds a finished run; give another --run-dir, or remove it"
        )
    progress("load", 0, 1, plan.target)
    target = models.load(plan.target)
    progress("load", 1, 1, plan.target)
    note(
        f"target {plan.target}: {target.parameters():,} parameters, {target.dtype} on "
        f"{target.device}"
    )

    data = _answers(run_dir / "data", target, plan, progress, note)
    undistilled = _undistilled(run_dir / "undistilled", target, data, plan, note)
    heldout = encoded(
        target.tokenizer, load_prompts(plan.heldout_prompts, limit=plan.score_prompts)
    )
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
            seed=plan.seed,
            max_seconds=plan.score_seconds,
            keep_text=True,
            progress=progress,
        )
        card.write(run_dir / file)
        return card

    before = scored(
        "scorecard_before.json",
        undistilled,
        heldout[: plan.before_prompts],
        plan.before_num_draft_tokens,
    )
    if not (run_dir / "draft" / "config.json").exists():
        config = DistillConfig(
            target=plan.target,
            draft=str(undistilled),
            data=str(data),
            run_dir=str(run_dir),
            seed=plan.seed,
            heldout=max(1, min(32, len(read_manifest(data).ids) // 4)),
            decode=None,  # it is scored before and after
            training=Training(max_seconds=plan.train_seconds, batch_tokens=512),
        )
        student = models.load(str(undistilled), dtype="float32")
        distill(config, target, student, resume=True, in_place=True, progress=progress)
    after = scored("scorecard.json", run_dir / "draft", heldout, plan.num_draft_tokens)
    progress("report", 0, 1)
    plot_all(run_dir, note=note)
    write_report(run_dir)
    progress("report", 1, 1)
    return before, after


def _answers(
    folder: Path, target: LanguageModel, plan: QuickstartPlan, progress: Progress, note: Note
) -> Path:
    prompts = load_prompts(plan.train_prompts, limit=plan.answers)
    size = signal_bytes(target, len(prompts), plan.max_new_tokens)
    note(
        f"{len(prompts)} answers of up to {plan.max_new_tokens} tokens; their signal takes at "
        f"most {size / 1e6:.0f} MB"
    )
    if (folder.parent / "undistilled").exists():  # the answers were finished, perhaps out of time
        return folder
    packing.pack(target, plan.batch_size)
    generate(
        target,
        prompts,
        folder,
        max_new_tokens=plan.max_new_tokens,
        samplings=[Sampling(t) for t in plan.temperatures],
        seed=plan.seed,
        batch_size=plan.batch_size,
        max_seconds=plan.answer_seconds,
        progress=progress,
    )
    return folder


def _undistilled(
    folder: Path, target: LanguageModel, data: Path, plan: QuickstartPlan, note: Note
) -> Path:
    if not (folder / "config.json").exists():
        hidden = torch.cat([_hidden(e) for e in read_examples(data, signal=True)])
        generator = torch.Generator().manual_seed(plan.seed)
        sample = hidden[torch.randperm(len(hidden), generator=generator)[:4096]]
        usage = expected_usage(target, sample)
        vocabulary = choose_vocabulary(target, usage, plan.vocab_size)
        note(
            f"draft: first {plan.layers} layers, {plan.vocab_size:,} of {target.vocab_size:,} "
            "output tokens, which hold "
            f"{vocabulary.coverage:.2%} of the target's probability"
        )
        save_draft(make_draft(target, list(range(plan.layers)), vocabulary.ids), folder)
    return folder


def _hidden(example: Example) -> Tensor:
    assert example.signal is not None
    return example.signal["hidden"]
