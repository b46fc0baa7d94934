"""A training run: data, budget, checkpoints and metrics around `Distiller.step`."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from dataclasses import asdict, replace
from hashlib import sha256
from itertools import islice, pairwise
from pathlib import Path
from typing import Any

from specdistill.config import DistillConfig
from specdistill.data.likeness import nearly_among, write_trained
from specdistill.data.signal import NONE, kept_tokens, read_states
from specdistill.data.sources import TokenAnswers, open_answers
from specdistill.data.token_store import Example
from specdistill.drafts.making import save_draft
from specdistill.errors import DecodingError, InputError, StorageError, TrainingError
from specdistill.files import held
from specdistill.models import LanguageModel, check_positions, set_origin
from specdistill.progress import Progress, silent
from specdistill.run_folder import (
    CHECKPOINTS,
    CONFIG,
    DRAFT,
    METRICS,
    SAMPLES,
    append_metrics,
    check_run,
    config_sha256,
    flat,
    keep_metrics,
    write_config,
)
from specdistill.training.batches import dealt, updates
from specdistill.training.checkpoints import (
    copy_weights,
    find_checkpoint,
    load_checkpoint,
    save_checkpoint,
)
from specdistill.training.distiller import Distiller, trainable
from specdistill.training.evaluation import Evaluation
from specdistill.training.hints import map_layers
from specdistill.training.policies import Source, examples_at, forget_samples, read_given


def rate(spent: float, config: DistillConfig) -> float:
    """Learning rate once a share `spent` of the budget is used: warm-up, cosine to a tenth."""
    peak, warmup = config.training.learning_rate, config.training.warmup
    if spent < warmup:
        return peak * max(spent / warmup, 0.01)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min((spent - warmup) / (1 - warmup), 1))))


def spent(state: dict[str, Any], config: DistillConfig) -> float:
    """The share of the budget that is used; sampling counts as training time."""
    if config.training.max_steps is not None:
        return state["step"] / config.training.max_steps
    return state["seconds"] / (config.training.max_seconds or 1)


def schedule(
    examples: Callable[[int], list[Example]], config: DistillConfig, step: int
) -> Iterator[list[list[Example]]]:
    """The micro-batches of each update from `step` on, without end, over `examples(step)`, which
    are asked for anew at every multiple of the policy's `refresh_every`.
    """
    training, period = config.training, config.policy.refresh_every
    while True:
        first = 0 if period is None else step - step % period
        stream = updates(
            examples(first),
            training.batch_tokens,
            training.accumulate,
            config.seed + first,
            skip=step - first,
        )
        for groups in islice(stream, None if period is None else first + period - step):
            yield groups
            step += 1


def split(examples: list[Example], heldout: int) -> tuple[list[Example], list[Example]]:
    """The answers that are held out and those trained on, in an order by lot that is the same in
    every run: in a folder they come a task at a time, and otherwise after an interrupt. Answers to
    equal prompts stay together where that is possible with up to twice as many held out, or fewer.
    """
    first: dict[tuple[int, ...], str] = {}
    for example in sorted(examples, key=lambda example: example.id):
        first.setdefault(tuple(example.prompt_tokens), example.id)

    def lot(example: Example) -> tuple[bytes, str]:
        return sha256(first[tuple(example.prompt_tokens)].encode()).digest(), example.id

    lots = sorted(examples, key=lot)
    ends = [i + 1 for i, (a, b) in enumerate(pairwise(lots)) if a.prompt_tokens != b.prompt_tokens]
    more = [end for end in ends if heldout <= end <= 2 * heldout]
    fewer = [end for end in ends if end < heldout]
    end = min(more, default=max(fewer, default=heldout))
    return lots[:end], lots[end:]


def distill(
    config: DistillConfig,
    target: LanguageModel | None,
    draft: LanguageModel,
    *,
    resume: bool = False,
    in_place: bool = False,
    show: Callable[[Example], None] | None = None,
    progress: Progress = silent,
) -> Path:
    """Run to the end of the budget; returns the folder of the finished draft, RUN/draft: the
    weights of the best evaluation, by `Evaluation.criterion`. The target is None exactly where
    `config.signal` is "none". `show` is given the first example that is trained on.

    A copy of `draft` is trained, in float32; `in_place` saves its memory where the caller has no
    further use for the draft, which must then be in float32 itself and not packed.

    Writes RUN/metrics.jsonl and RUN/checkpoints/; the last row of the metrics names the step whose
    weights were kept. Raises `InputError` as `check_run`, and where data and target do not belong
    together, and `TrainingError` at the first update whose loss, gradient or evaluation is no
    number; no draft is written then.
    """
    # Of several processes the first one writes.
    with held(Path(config.run_dir)) if os.environ.get("RANK", "0") == "0" else nullcontext():
        return _distill(config, target, draft, resume, in_place, show, progress)


def _distill(
    config: DistillConfig,
    target: LanguageModel | None,
    draft: LanguageModel,
    resume: bool,
    in_place: bool,
    show: Callable[[Example], None] | None,
    progress: Progress,
) -> Path:
    if os.environ.get("RANK", "0") == "0":  # the others may find what this one has begun
        check_run(config, resume)
    run = Path(config.run_dir)
    checkpoints = run / CHECKPOINTS
    answers = open_answers(config.data)
    if config.signal == "kept" and isinstance(answers, TokenAnswers):
        assert target is not None
        _check_signal(config, answers, draft, target)
    examples = read_given(config, target or draft)
    if len(examples) < 2:
        raise InputError(
            f"{config.data} has {len(examples)} answer, and one must be held out of training for "
            "the metrics; generate more"
        )
    if len(examples) <= config.heldout:
        raise InputError(
            f"{config.data} has {len(examples)} answers; heldout: {config.heldout}, kept out for "
            f"the metrics, leaves none to train on; set heldout={max(len(examples) // 5, 1)}, or "
            "generate more"
        )
    readers = [model for model in (target, draft) if model is not None]
    new = config.policy.max_new_tokens or 0  # sampled after a prompt
    lengths = ((e.id, len(e.prompt_tokens) + max(len(e.response_tokens), new)) for e in examples)
    check_positions(readers, lengths)
    heldout, training = split(examples, config.heldout)

    draft = draft if in_place else trainable(draft)
    distiller = Distiller(target, draft, config)
    accelerator = distiller.accelerator
    leads, processes = accelerator.is_main_process, accelerator.num_processes
    _check_processes(config, processes)
    evaluation = Evaluation(distiller, heldout, config)
    weights = distiller.parameters
    best = {name: value.detach().to("cpu", copy=True) for name, value in weights.items()}
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0, "best": None}
    config_hash = config_sha256(config)
    state["config_sha256"] = config_hash
    state["origins"] = origins = _origins(target, draft, [*heldout, *training])
    if resume and (checkpoint := find_checkpoint(checkpoints)):
        state = load_checkpoint(checkpoint, weights, best, distiller.restore)
        if evaluation.criterion not in state["best"]:
            raise StorageError(
                f"the checkpoint in {checkpoint} cannot be used: its best evaluation has no "
                f"{evaluation.criterion}; remove it to start over"
            )
        known = (run / CONFIG).exists()  # then `check_run` has compared them, key by key
        if not known and state.get("config_sha256", config_hash) != config_hash:
            raise InputError(
                f"{checkpoint} is of another configuration, and {run / CONFIG}, which would tell "
                "how it differs, is missing; put it back, or choose another run_dir"
            )
        read = {"target": target, "draft": draft}
        for name, now in origins.items():
            before, model = state["origins"].get(name, ""), read.get(name)
            if before != now and not (model is not None and model.has_sha256(before)):
                raise InputError(
                    f"{run} holds a run with another {name}: {getattr(config, name)} was changed "
                    "since it began; put back what was there, or choose another run_dir"
                )
    accelerator.wait_for_everyone()  # all have read what one of them now writes
    if leads:
        forget_samples(run / SAMPLES, state["step"])
        keep_metrics(run, state["step"])
        write_config(config, target, draft, processes)

    def sampled(step: int) -> list[Example]:
        if target is None:
            return training
        distiller.gather()
        source = Source(training, target, draft, config.policy, config.seed)
        with accelerator.main_process_first():  # it writes them, and the others read
            try:
                found = examples_at(source, step, run / SAMPLES)
            except DecodingError as error:
                raise TrainingError(
                    f"policy {config.policy.name!r} cannot sample after update {step}: {error}. "
                    f"Where the draft has diverged, {_begin_again(config)}"
                ) from error
        if config.policy.refresh_every is None or config.hints is not None:
            return found
        # They are trained on more than once, and the target need read them only once.
        return [
            replace(e, signal=read_states(target, e.prompt_tokens, e.response_tokens))
            for e in found
        ]

    def record(row: dict[str, Any]) -> None:
        row = {name: state[name] for name in ("step", "tokens", "seconds")} | row
        if leads:
            append_metrics(run, row)
        if "kept_step" not in row:
            accelerator.log(row, step=state["step"])

    def measured() -> dict[str, float]:
        """The row of an evaluation; the best one's weights are kept, the later of equals."""
        distiller.gather()
        row, criterion = evaluation.measure(), evaluation.criterion
        if state["best"] is None or row[criterion] >= state["best"][criterion]:
            state["best"] = {**row, "kept_step": state["step"]}
            copy_weights(weights, best)
        return row

    named = {
        k: v if isinstance(v, int | float | str) else str(v)
        for k, v in flat(config.model_dump()).items()
    }
    accelerator.init_trackers("distill", named)
    words = f"{len(training)} answers to train on, {len(heldout)} held out"
    given = {tuple(e.prompt_tokens) for e in training}
    others = [e for e in heldout if tuple(e.prompt_tokens) not in given]
    if len(others) < len(heldout):
        words += ", some of a prompt that is trained on, too"
    reader = (target or draft).tokenizer
    asked, learnt = (
        [str(reader.decode(e.prompt_tokens, skip_special_tokens=True)) for e in part]
        for part in (others, training)
    )
    if leads and (alike := len(nearly_among(asked, learnt))):
        words += f", {alike} of them on prompts nearly like one that is trained on"
    words += _smaller_writer(config, draft)
    words += f"; going on from step {state['step']}" if state["step"] else ""
    progress("distil", spent(state, config), 1.0, words)
    if state["step"] == 0:
        row = measured()
        _check_numbers(row, 0, config)
        record(row)
    stream = schedule(sampled, config, state["step"])
    while (share := spent(state, config)) < 1:
        start = time.perf_counter()
        groups = next(stream)
        if show is not None and state["step"] == 0:
            show(groups[0][0])
        batches = dealt(groups, accelerator.process_index, processes, draft.device)
        metrics = distiller.step(batches, rate(share, config))
        state["seconds"] += time.perf_counter() - start
        state["step"] += 1
        state["tokens"] += metrics.response_tokens
        row = {
            **asdict(metrics),
            "tokens": state["tokens"],
            "tokens_per_second": state["tokens"] / state["seconds"],
            "learning_rate": rate(share, config),
        }
        if state["step"] % config.evaluate_every == 0 or spent(state, config) >= 1:
            row |= measured()
        _check_numbers(row, state["step"], config)
        record(row)
        if state["step"] % config.checkpoint_every == 0:
            distiller.gather()
            moments = distiller.moments()
            if leads:
                save_checkpoint(checkpoints, state, weights, best, moments)
        progress("distil", min(share, 1.0), 1.0, f"step {state['step']}, loss {metrics.loss:.3f}")
    copy_weights(best, weights)
    distiller.finish()
    set_origin(draft, config_hash, state["best"]["kept_step"], target)
    if leads:
        save_draft(draft, run / DRAFT)
        write_trained(run / DRAFT, learnt)
    record(state["best"])
    accelerator.wait_for_everyone()  # the draft is there for all of them
    for tracker in accelerator.trackers:
        tracker.finish()
    progress("distil", 1.0, 1.0, f"{state['tokens']:,} tokens in {state['step']} steps")
    return run / DRAFT


def _origins(
    target: LanguageModel | None, draft: LanguageModel, examples: list[Example]
) -> dict[str, str]:
    """Hashes of what a run starts from, by the key of the configuration that names it."""
    answers = sha256()
    for e in examples:
        answers.update(repr((e.id, e.prompt_tokens, e.response_tokens)).encode())
    loaded = {} if target is None else {"target": target.sha256()}
    return {**loaded, "draft": draft.sha256(), "data": answers.hexdigest()}


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
        f"{Path(config.run_dir) / METRICS})"
    )


def _smaller_writer(config: DistillConfig, draft: LanguageModel) -> str:
    """Compute-matched answers may come from a model below the draft itself (2408.16737): a word of
    it then.
    """
    answers = open_answers(config.data)
    if not isinstance(answers, TokenAnswers):
        return ""
    manifest = answers.manifest
    parameters = manifest.writer_parameters
    if parameters is None or parameters >= draft.parameters():
        return ""
    return f", written by {manifest.settings['writer'][0]}, which is smaller than the draft"


def _check_processes(config: DistillConfig, processes: int) -> None:
    """An update's micro-batches are dealt to the processes, so that it is the same with any number
    of them; and they must all end at one step.
    """
    training = config.training
    if training.accumulate % processes:
        raise InputError(
            f"training.accumulate is {training.accumulate}, the forward passes in one update, and "
            f"{processes} processes share them: make it a multiple of {processes}"
        )
    if processes > 1 and training.max_steps is None:
        raise InputError(
            f"training.max_seconds would end {processes} processes at different steps; give "
            "training.max_steps"
        )


def _check_signal(
    config: DistillConfig, answers: TokenAnswers, draft: LanguageModel, target: LanguageModel
) -> None:
    """The states kept are those of this target's last layer alone; top-k are no states, and belong
    to temperature 1.
    """
    manifest = answers.manifest
    if not target.has_sha256(manifest.target_sha256):
        raise InputError(
            f"the signal in {config.data} was kept from {manifest.target}, another model than "
            f"{target.name} is now, by its weights or its config.json; generate anew"
        )
    kept = manifest.signal
    if kept == NONE:
        return  # reading it says so
    top_k = kept_tokens(kept) is not None
    if config.hints is not None:
        inner = {layer for _, layer in map_layers(config.hints.layers, draft, target)}
        if top_k or inner != {target.num_layers}:
            raise InputError(
                f"hints ask for the target's layers {sorted(inner)}, and {config.data} keeps "
                f"{kept!r}: {'no layer' if top_k else f'the last alone, {target.num_layers}'}; "
                "distil with signal: live, or map to a layer that is kept"
            )
    if top_k:
        for name in ("temperature", "decoding_temperature"):
            if getattr(config, name) != 1:
                raise InputError(
                    f"{name} is {getattr(config, name)}, and {config.data} keeps {kept!r} of the "
                    "target at temperature 1, which gives no other; keep 'states', or distil with "
                    "signal: live"
                )
