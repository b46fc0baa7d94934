"""A training run: data, budget, checkpoints and metrics around `Distiller.step`."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from torch import nn

from specdistill.config import DistillConfig, from_keywords
from specdistill.data.likeness import nearly_among, write_trained
from specdistill.data.signal import States, read_states
from specdistill.data.sources import open_answers
from specdistill.data.token_store import Example, Store
from specdistill.drafts.making import save_draft
from specdistill.errors import DecodingError, InputError, StorageError, TrainingError
from specdistill.files import held
from specdistill.models import LanguageModel, set_origin
from specdistill.progress import Progress, silent
from specdistill.provenance import training_facts
from specdistill.run_folder import (
    RunFolder,
    append_metrics,
    check_run,
    config_sha256,
    flat,
    keep_metrics,
    write_config,
)
from specdistill.training.answers import (
    examples_sha256,
    heldout_and_training,
    rewritten_turns,
    smaller_writer,
    template_settings,
)
from specdistill.training.batches import dealt, schedule
from specdistill.training.checkpoints import (
    RunState,
    copy_weights,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from specdistill.training.distiller import Distiller
from specdistill.training.evaluation import Evaluation
from specdistill.training.losses import configured_objective
from specdistill.training.pair import read_models
from specdistill.training.parallel import depths_of, refuse_mask
from specdistill.training.policies import Source, examples_at, forget_samples
from specdistill.training.processes import check_processes, first_process
from specdistill.training.reward import configured_reward, mean_reward


def distill(
    target: LanguageModel | str | Path,
    draft: LanguageModel | str | Path,
    answers: Store | str | Path,
    run_dir: str | Path,
    *,
    resume: bool = False,
    show: Callable[[Example], None] | None = None,
    progress: Progress = silent,
    **options: Any,
) -> LanguageModel:
    """Distil a draft towards its target; returns it with its best weights, which are in
    RUN_DIR/draft too. The given draft stays as it was; it is a copy in float32 that is trained, and
    what is returned has the dtype of the draft that was given, or else of the target.

    Models are given themselves or by their folders or names, answers as what `generate` returns or
    its folder, or with policy="fixed" as a file of prompts with responses. options: the keys of a
    configuration file (`DistillConfig`), and those of its sections also by themselves where no
    other section has them: max_steps=2000 is training={"max_steps": 2000}.

    Raises `InputError` for an option that is unknown, and as `train`.
    """
    given = [model for model in (target, draft) if isinstance(model, LanguageModel)]
    if len(given) == 2 and (unread := options.keys() & {"dtype", "device"}):
        raise InputError(
            f"{' and '.join(sorted(unread))} would say how models are loaded, and both are given "
            "here; leave it out, or give their folders or names"
        )
    named = {
        key: model.name if isinstance(model, LanguageModel) else str(model)
        for key, model in (("target", target), ("draft", draft))
    }
    data = str(answers.folder if isinstance(answers, Store) else answers)
    config = from_keywords(**named, data=data, run_dir=str(run_dir), **options)
    with begun(config, resume):
        teacher, student = read_models(config, target, draft)
        folder = train(config, teacher, student, resume=resume, show=show, progress=progress)
    dtype = (draft if isinstance(draft, LanguageModel) else teacher or student).dtype
    nn.Module.to(student.model, dtype)
    return replace(student, name=str(folder), path=folder)


def train(
    config: DistillConfig,
    target: LanguageModel | None,
    draft: LanguageModel,
    *,
    resume: bool = False,
    show: Callable[[Example], None] | None = None,
    progress: Progress = silent,
) -> Path:
    """Train `draft`, in place, to the end of the budget; returns the folder it is saved in,
    RUN/draft. It ends with the weights of the best evaluation, by `Evaluation.criterion`. The
    target is None exactly where `config.signal` is "none". `show` is given the first example that
    is trained on.

    Writes RUN/metrics.jsonl and RUN/checkpoints/; the last row of the metrics names the step whose
    weights were kept. Raises `InputError` as `check_run`, for a draft that is not in float32 or is
    packed (see `trainable`), and where data and target do not belong together; `TrainingError` at
    the first update whose loss, gradient or evaluation is no number: no draft is written then.
    """
    with begun(config, resume):
        return Run(config, target, draft, resume, show, progress).to_the_end()


@contextmanager
def begun(config: DistillConfig, resume: bool) -> Iterator[None]:
    """Alone in the run's folder, once all is checked that needs no model: to be entered before any
    is read, and again by whoever does not know that it was. Raises as `train` does.
    """
    configured_objective(config)
    open_answers(config.data)
    if not first_process():  # they may find what the first one has begun, and write nothing
        yield
        return
    with held(Path(config.run_dir)):
        check_run(config, resume)
        yield


def rate(spent: float, config: DistillConfig) -> float:
    """Learning rate once a share `spent` of the budget is used: warm-up, then a straight line to a
    fiftieth (2502.15938).
    """
    peak, warmup = config.training.learning_rate, config.training.warmup
    if spent < warmup:
        return peak * max(spent / warmup, 0.01)
    return peak * max(1 - (spent - warmup) / (1 - warmup), 0.02)


class Run:
    """One run in its folder, of one process or several."""

    def __init__(
        self,
        config: DistillConfig,
        target: LanguageModel | None,
        draft: LanguageModel,
        resume: bool,
        show: Callable[[Example], None] | None,
        progress: Progress,
    ) -> None:
        """Everything is read and checked before anything is written."""
        self.config, self.target, self.draft = config, target, draft
        self.folder = RunFolder(Path(config.run_dir))
        self.show, self.progress = show, progress
        self.heldout, self.training = heldout_and_training(config, target, draft)
        self.template_settings = template_settings(config)
        self.reward = configured_reward(config)
        self.sample_states: dict[str, States] = {}  # of the samples, by their id
        self.distiller = Distiller(target, draft, config)
        if config.parallel is not None:
            refuse_mask([*self.heldout, *self.training], draft, config.data)
        self.accelerator = self.distiller.accelerator
        check_processes(config, self.accelerator.num_processes)
        self.evaluation = Evaluation(self.distiller, self.heldout, config)
        weights = self.distiller.parameters
        self.best = {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}
        pair = {"draft": draft} if target is None else {"target": target, "draft": draft}
        origins = {name: model.sha256() for name, model in pair.items()}
        origins["data"] = examples_sha256([*self.heldout, *self.training])
        self.state = RunState(0, 0, 0.0, {}, origins, config_sha256(config))
        if resume and (checkpoint := find_checkpoint(self.folder.checkpoints)):
            self.state = self.checkpointed(checkpoint)
        self.accelerator.wait_for_everyone()  # all have read what one of them now writes
        if self.accelerator.is_main_process:
            forget_samples(self.folder.samples, self.state.step)
            keep_metrics(self.folder, self.state.step)
            write_config(config, training_facts(target, draft, self.accelerator.num_processes))
        values = flat(config.model_dump()).items()
        named = {k: v if isinstance(v, int | float | str) else str(v) for k, v in values}
        self.accelerator.init_trackers("distill", named)

    @property
    def spent(self) -> float:
        """The share of the budget that is used; sampling counts as training time."""
        if self.config.training.max_steps is not None:
            return self.state.step / self.config.training.max_steps
        return self.state.seconds / (self.config.training.max_seconds or 1)

    def to_the_end(self) -> Path:
        """Update after update until the budget is used, then the best weights to RUN/draft."""
        config, state, accelerator = self.config, self.state, self.accelerator
        parallel = config.parallel
        self.progress("distil", self.spent, 1.0, self.announcement())
        if state.step == 0:
            self.record(self.evaluate())
        updates = schedule(self.examples, config, state.step, state.masks_since)
        while (spent := self.spent) < 1:
            start, learning_rate = time.perf_counter(), rate(spent, config)
            if parallel and state.masks_since is None and spent >= parallel.ordinary:
                state.masks_since = state.step
                updates = schedule(self.examples, config, state.step, state.masks_since)
            groups = self.with_signal(next(updates))
            if self.show is not None and state.step == 0:
                self.show(groups[0][0])
            masks = None if state.masks_since is None else parallel
            batches = dealt(
                groups,
                accelerator.process_index,
                accelerator.num_processes,
                self.draft.device,
                depths_of(masks, f"{config.seed}-{state.step}"),
                packed=config.training.packing,
            )
            metrics = self.distiller.step(batches, learning_rate)
            state.seconds += time.perf_counter() - start
            state.step += 1
            state.tokens += metrics.response_tokens
            row = {
                **asdict(metrics),
                "tokens": state.tokens,
                "tokens_per_second": state.tokens / state.seconds,
                "learning_rate": learning_rate,
                **mean_reward(groups),
            }
            if state.step % config.evaluate_every == 0 or self.spent >= 1:
                row |= self.evaluate()
            self.record(row)
            if state.step % config.checkpoint_every == 0:
                self.save_checkpoint()
            self.progress(
                "distil", min(spent, 1.0), 1.0, f"step {state.step}, loss {metrics.loss:.3f}"
            )
        return self.finish()

    def examples(self, step: int) -> list[Example]:
        """What the policy has trained on from a step to its next refresh."""
        if self.target is None:
            return self.training
        config, accelerator = self.config, self.accelerator
        self.distiller.gather()
        source = Source(
            self.training, self.target, self.draft, config.policy, config.seed, self.reward
        )
        with accelerator.main_process_first():  # it writes them, and the others read
            try:
                examples = examples_at(source, step, self.folder.samples)
            except DecodingError as error:
                raise TrainingError(
                    f"policy {config.policy.name!r} cannot sample after update {step}: {error}. "
                    f"Where the draft has diverged, {_begin_again(config)}"
                ) from error
        if config.parallel is not None:
            refuse_mask(examples, self.draft, str(self.folder.samples))
        self.sample_states.clear()
        return examples

    def with_signal(self, groups: list[list[Example]]) -> list[list[Example]]:
        """The micro-batches of an update, with the target's states of this process's samples: they
        are trained on more than once, and the target reads each when it is first met.
        """
        target, accelerator = self.target, self.accelerator
        if target is None or self.config.policy.refresh_every is None or self.config.hints:
            return groups  # kept with the data, or read in the step

        def read(e: Example) -> Example:
            if e.id not in self.sample_states:
                self.sample_states[e.id] = read_states(target, e.prompt_tokens, e.response_tokens)
            return replace(e, signal=self.sample_states[e.id])

        mine = range(accelerator.process_index, len(groups), accelerator.num_processes)
        return [[read(e) for e in group] if i in mine else group for i, group in enumerate(groups)]

    def evaluate(self) -> dict[str, Any]:
        """The held-out measures of now; the best one's weights are kept, the later of equals."""
        self.distiller.gather()
        row, criterion = self.evaluation.measure(), self.evaluation.criterion
        if not self.state.best or row[criterion] >= self.state.best[criterion]:
            self.state.best = {**row, "kept_step": self.state.step}
            copy_weights(self.distiller.parameters, self.best)
        return row

    def record(self, row: dict[str, Any]) -> None:
        """Append to the metrics. Raises `TrainingError` for a value that is no number."""
        state = self.state
        _check_numbers(row, state.step, self.config)
        row = {"step": state.step, "tokens": state.tokens, "seconds": state.seconds} | row
        if self.accelerator.is_main_process:
            append_metrics(self.folder, row)
        if "kept_step" not in row:
            self.accelerator.log(row, step=state.step)

    def save_checkpoint(self) -> None:
        """All processes call it, and the first one writes."""
        self.distiller.gather()
        moments = self.distiller.moments()
        if self.accelerator.is_main_process:
            folder, weights = self.folder.checkpoints, self.distiller.parameters
            save_checkpoint(folder, self.state, weights, self.best, moments)

    def checkpointed(self, checkpoint: Path) -> RunState:
        """Go on from a checkpoint. Raises `InputError` where it is of another configuration, draft,
        target or data, `StorageError` where it cannot be used.
        """
        config, criterion = self.config, self.evaluation.criterion
        weights, restore = self.distiller.parameters, self.distiller.restore
        state = load_checkpoint(checkpoint, weights, self.best, restore)
        if criterion not in state.best:
            raise StorageError(
                f"the checkpoint in {checkpoint} cannot be used: its best evaluation has no "
                f"{criterion}; remove it to start over"
            )
        known = self.folder.config.exists()  # then `check_run` has compared them, key by key
        if not known and state.config_sha256 not in (None, self.state.config_sha256):
            raise InputError(
                f"{checkpoint} is of another configuration, and {self.folder.config}, which "
                "would tell how it differs, is missing; put it back, or choose another run_dir"
            )
        pair = {"target": self.target, "draft": self.draft}
        for name, now in self.state.origins.items():
            before, model = state.origins.get(name, ""), pair.get(name)
            if before != now and not (model is not None and model.has_sha256(before)):
                raise InputError(
                    f"{self.folder.path} holds a run with another {name}: {getattr(config, name)} "
                    "was changed since it began; put back what was there, or choose another run_dir"
                )
        return state

    def finish(self) -> Path:
        """Write the draft with its best weights, and the row of the metrics that says whose."""
        state, accelerator, draft = self.state, self.accelerator, self.draft
        copy_weights(self.best, self.distiller.parameters)
        self.distiller.finish()
        settings = self.template_settings
        set_origin(
            draft, config_sha256(self.config), state.best["kept_step"], self.target, settings
        )
        if accelerator.is_main_process:
            save_draft(draft, self.folder.draft)
            write_trained(self.folder.draft, self.prompts(self.training))
        self.record(state.best)
        accelerator.wait_for_everyone()  # the draft is there for all of them
        for tracker in accelerator.trackers:
            tracker.finish()
        self.progress("distil", 1.0, 1.0, f"{state.tokens:,} tokens in {state.step} steps")
        return self.folder.draft

    def prompts(self, examples: list[Example]) -> list[str]:
        """Their text."""
        tokenizer = (self.target or self.draft).tokenizer
        return [str(tokenizer.decode(e.prompt_tokens, skip_special_tokens=True)) for e in examples]

    def announcement(self) -> str:
        """What is trained on, and what is held out, in words."""
        training, heldout = self.training, self.heldout
        words = f"{len(training)} answers to train on, {len(heldout)} held out"
        trained = {tuple(e.prompt_tokens) for e in training}
        others = [e for e in heldout if tuple(e.prompt_tokens) not in trained]
        if len(others) < len(heldout):
            words += ", some of a prompt that is trained on, too"
        if self.accelerator.is_main_process and (
            alike := len(nearly_among(self.prompts(others), self.prompts(training)))
        ):
            words += f", {alike} of them on prompts nearly like one that is trained on"
        words += smaller_writer(self.config, self.draft)
        words += rewritten_turns(self.config, self.target or self.draft)
        return words + (f"; going on from step {self.state.step}" if self.state.step else "")


def _check_numbers(row: dict[str, Any], step: int, config: DistillConfig) -> None:
    lost = [f"{n} = {v}" for n, v in row.items() if isinstance(v, float) and not math.isfinite(v)]
    if lost and step == 0:
        raise TrainingError(
            f"the draft gives {', '.join(lost)} before any update: {config.draft} or "
            f"{config.target} holds numbers that are none; check the checkpoints"
        )
    if lost:
        raise TrainingError(
            f"update {step} gave {', '.join(lost)}: the training has diverged; "
            f"{_begin_again(config)}"
        )


def _begin_again(config: DistillConfig) -> str:
    return (
        f"begin again in another run_dir with a training.learning_rate below "
        f"{config.training.learning_rate} (the updates before are in "
        f"{RunFolder(Path(config.run_dir)).metrics})"
    )
