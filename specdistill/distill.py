"""Distilling a draft against its target. `Distiller.step` is the whole of the training; accelerate
lives here alone.
"""

from __future__ import annotations

import json
import math
import random
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import yaml
from accelerate import Accelerator
from torch import Tensor

from specdistill.checkpoints import find_checkpoint, load_checkpoint, save_checkpoint
from specdistill.config import DistillConfig
from specdistill.data.store import Example, read_examples, read_manifest
from specdistill.divergences import Positions, chunked_sum, mixture
from specdistill.drafts import save_draft
from specdistill.errors import InputError, StorageError
from specdistill.models import LanguageModel
from specdistill.progress import Progress, silent
from specdistill.provenance import device_name, git_commit, versions


@dataclass
class Batch:
    """Examples padded to one length. tokens, mask: [B, L]; `response` [B, L] marks the positions
    whose next token belongs to the answer, N of them; labels [N] is that token; hidden [N, d] and
    logsumexp [N] the target's signal there, if kept.
    """

    tokens: Tensor
    mask: Tensor
    response: Tensor
    labels: Tensor
    hidden: Tensor | None
    logsumexp: Tensor | None


@dataclass
class StepMetrics:
    """One update: loss is the mean over `response_tokens` positions; `tokens` counts padding and
    prompts too.
    """

    loss: float
    response_tokens: int
    tokens: int


class Distiller:
    """Trains `draft` in place towards `target`, which is only read: its body too where the signal
    is taken live.
    """

    def __init__(self, target: LanguageModel, draft: LanguageModel, config: DistillConfig) -> None:
        self.target, self.draft, self.config = target, draft, config
        self.loss = mixture(config.loss)
        training = config.training
        self.accelerator = Accelerator(
            mixed_precision=training.precision, cpu=draft.device.type == "cpu"
        )
        draft.model.requires_grad_(True)
        if not training.train_embeddings:
            embedding = draft.model.get_input_embeddings().weight
            embedding.requires_grad_(embedding is draft.head.weight)
        self.parameters = {n: p for n, p in draft.model.named_parameters() if p.requires_grad}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(0.9, 0.95),
        )
        draft.model, self.optimizer = self.accelerator.prepare(draft.model, self.optimizer)
        vocab = (
            torch.arange(draft.vocab_size, device=draft.device)
            if draft.vocab is None
            else draft.vocab
        )
        self.vocab = vocab[vocab < target.vocab_size]
        self.index = torch.full((target.full_vocab_size,), -1, device=draft.device)
        self.index[self.vocab] = torch.arange(len(self.vocab), device=draft.device)
        self.kept_head = [p.detach()[self.vocab].float() for p in target.head.parameters()]

    def step(self, batches: list[Batch], learning_rate: float) -> StepMetrics:
        """One update from one or more micro-batches: the loss is a mean over all their response
        tokens.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = sum(len(batch.labels) for batch in batches)
        loss_sum = 0.0
        for batch in batches:
            with torch.no_grad():
                hidden, logsumexp = self.signal(batch)
            with self.accelerator.autocast():
                states = self.states(batch)
            loss = chunked_sum(
                states.float() if self.draft.dtype != torch.float64 else states,
                [
                    p.to(torch.promote_types(p.dtype, torch.float32))
                    for p in self.draft.head.parameters()
                ],
                lambda logits, rows: self.loss(
                    self.positions(hidden[rows], logsumexp[rows], batch.labels[rows]),  # noqa: B023 - used within the turn
                    self.draft.scale_logits(logits)[:, : len(self.vocab)],
                    self.config.temperature,
                ),
                self.config.training.chunk,
            )
            self.accelerator.backward(loss / total)
            loss_sum += loss.item()
        self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        return StepMetrics(loss_sum / total, total, sum(batch.tokens.numel() for batch in batches))

    def states(self, batch: Batch) -> Tensor:
        """The draft's final hidden states [N, d] at the response positions. An id that only pads
        the target's embedding is read as the draft's last one."""
        tokens = batch.tokens.clamp(max=self.draft.full_vocab_size - 1)
        return self.draft.hidden(tokens, attention_mask=batch.mask)[batch.response]

    def signal(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The target's final hidden states [N, d] and the logsumexp [N] of its full logits at the
        distillation temperature: as kept, or from a live pass. A kept logsumexp belongs to
        temperature 1; for others it is computed.
        """
        hidden, logsumexp = batch.hidden, batch.logsumexp
        if hidden is None:
            hidden = self.target.hidden(batch.tokens, attention_mask=batch.mask)[batch.response]
        if logsumexp is None or self.config.temperature != 1:
            parts = [
                self.target.logits(part) / self.config.temperature
                for part in hidden.split(self.config.training.chunk)
            ]
            logsumexp = torch.cat([part.logsumexp(-1) for part in parts])
        return hidden, logsumexp

    def positions(self, hidden: Tensor, logsumexp: Tensor, labels: Tensor) -> Positions:
        """What the target says over the draft's vocabulary, from its final hidden states."""
        logits = torch.nn.functional.linear(hidden.to(self.kept_head[0].dtype), *self.kept_head)
        logits = self.target.scale_logits(logits)
        kept = (logits / self.config.temperature).logsumexp(-1) - logsumexp
        return Positions(logits, self.index[labels], kept.exp().clamp(max=1))

    @torch.no_grad()
    def evaluate(self, batches: list[Batch]) -> dict[str, float]:
        """On held-out answers: expected α = mean Σ min(p, q) at temperature 1 over the full
        vocabulary (a token the draft lacks has q = 0), and the share of positions where both
        models' most probable tokens agree.
        """
        overlap = match = count = 0.0
        for batch in batches:
            states = self.states(batch)
            hidden = batch.hidden
            if hidden is None:
                hidden = self.target.hidden(batch.tokens, attention_mask=batch.mask)[batch.response]
            for rows, target_rows in zip(
                states.split(self.config.training.chunk),
                hidden.split(self.config.training.chunk),
                strict=True,
            ):
                p = self.target.logits(target_rows).softmax(-1)
                q = self.draft.logits(rows)[:, : len(self.vocab)].softmax(-1)
                overlap += torch.minimum(p[:, self.vocab], q).sum().item()
                match += (self.vocab[q.argmax(-1)] == p.argmax(-1)).sum().item()
                count += len(rows)
        return {"expected_alpha": overlap / count, "greedy_match": match / count}


def make_batch(examples: list[Example], pad: int, device: torch.device) -> Batch:
    """Right-padded, with the target's signal where every example carries it."""
    rows = [e.prompt_tokens + e.response_tokens for e in examples]
    longest = max(map(len, rows))
    response = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, example in enumerate(examples):  # the token at t is predicted at t - 1
        response[i, len(example.prompt_tokens) - 1 : len(rows[i]) - 1] = True
    kept = all(e.hidden is not None for e in examples)
    return Batch(
        torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device),
        torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device),
        response.to(device),
        torch.tensor([token for e in examples for token in e.response_tokens], device=device),
        torch.cat([e.hidden for e in examples if e.hidden is not None]).to(device)
        if kept
        else None,
        torch.cat([e.logsumexp for e in examples if e.logsumexp is not None]).to(device)
        if kept
        else None,
    )


def length_buckets(
    examples: list[Example], batch_tokens: int, seed: int, epoch: int
) -> list[list[Example]]:
    """One epoch: groups of similar length of at most `batch_tokens` padded tokens, in an order that
    depends on nothing but seed and epoch, so that a resumed run sees what an uninterrupted one
    would.
    """
    rng = random.Random(f"{seed}-{epoch}")
    size = {e.id: len(e.prompt_tokens) + len(e.response_tokens) for e in examples}
    order = sorted(examples, key=lambda e: (size[e.id] // 16, rng.random()))
    groups: list[list[Example]] = [[]]
    longest = 0
    for example in order:
        longest = max(longest, size[example.id])
        if groups[-1] and (len(groups[-1]) + 1) * longest > batch_tokens:
            groups.append([])
            longest = size[example.id]
        groups[-1].append(example)
    rng.shuffle(groups)
    return groups


def updates(
    examples: list[Example], config: DistillConfig, skip: int
) -> Iterator[list[list[Example]]]:
    """Groups of micro-batches, one group an update, without end; the first `skip` updates are left
    out.
    """
    epoch = 0
    while True:
        groups = length_buckets(examples, config.training.batch_tokens, config.seed, epoch)
        for start in range(0, len(groups), config.training.accumulate):
            if skip:
                skip -= 1
            else:
                yield groups[start : start + config.training.accumulate]
        epoch += 1


def rate(spent: float, config: DistillConfig) -> float:
    """Learning rate once a share `spent` of the budget is used: warm-up, cosine to a tenth."""
    peak, warmup = config.training.learning_rate, config.training.warmup
    if spent < warmup:
        return peak * max(spent / warmup, 0.01)
    return peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min((spent - warmup) / (1 - warmup), 1))))


def distill(
    config: DistillConfig,
    target: LanguageModel,
    draft: LanguageModel,
    *,
    resume: bool = False,
    progress: Progress = silent,
) -> Path:
    """Run to the end of the budget; returns the folder of the finished draft, RUN/draft.

    Writes RUN/metrics.jsonl and RUN/checkpoints/. Raises `InputError` where RUN holds a run and
    `resume` is off, or data and target do not belong together.
    """
    run = Path(config.run_dir)
    metrics_file, checkpoints = run / "metrics.jsonl", run / "checkpoints"
    if metrics_file.exists() and not resume:
        raise InputError(
            f"{run} already holds a run; pass --resume to go on with it, or choose another run_dir"
        )
    manifest = read_manifest(Path(config.data))
    if config.signal == "kept" and manifest.target_sha256 != target.sha256():
        raise InputError(
            f"the signal in {config.data} was kept from {manifest.target}, another model than "
            f"{target.name}"
        )
    examples = read_examples(Path(config.data), signal=config.signal == "kept")
    examples = [e for e in examples if e.response_tokens]
    if len(examples) <= config.heldout:
        raise InputError(
            f"{config.data} has {len(examples)} answers; heldout: {config.heldout} leaves none "
            "to train on"
        )
    heldout, training = examples[: config.heldout], examples[config.heldout :]

    distiller = Distiller(target, draft, config)
    state: dict[str, Any] = {"step": 0, "tokens": 0, "seconds": 0.0}
    if resume and (checkpoint := find_checkpoint(checkpoints)):
        state = load_checkpoint(checkpoint, distiller.parameters, distiller.optimizer)
    _keep_metrics(metrics_file, state["step"])
    _write_config(run / "config.yaml", config, target)
    budget = config.training

    def batch(group: list[Example]) -> Batch:
        return make_batch(group, 0, draft.device)

    def record(row: dict[str, Any]) -> None:
        try:
            with metrics_file.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**state, **row}) + "\n")
        except OSError as error:
            raise StorageError(
                f"cannot write to {metrics_file}: {error.strerror}; free space and resume"
            ) from error

    evaluation = [batch(group) for group in length_buckets(heldout, budget.batch_tokens, 0, 0)]
    if state["step"] == 0:
        record(distiller.evaluate(evaluation))
    for groups in updates(training, config, skip=state["step"]):
        share = (
            state["step"] / budget.max_steps
            if budget.max_steps
            else state["seconds"] / (budget.max_seconds or 1)
        )
        if share >= 1:
            break
        start = time.perf_counter()
        metrics = distiller.step([batch(group) for group in groups], rate(share, config))
        state["seconds"] += time.perf_counter() - start
        state["step"] += 1
        state["tokens"] += metrics.response_tokens
        row = {
            **asdict(metrics),
            "tokens_per_second": state["tokens"] / state["seconds"],
            "learning_rate": rate(share, config),
        }
        row["tokens"] = state["tokens"]
        if state["step"] % config.evaluate_every == 0:
            row |= distiller.evaluate(evaluation)
        record(row)
        if state["step"] % config.checkpoint_every == 0:
            save_checkpoint(checkpoints, state, distiller.parameters, distiller.optimizer)
        progress("distil", min(share, 1.0), 1.0, f"step {state['step']}, loss {metrics.loss:.3f}")
    record(distiller.evaluate(evaluation))
    draft.model = distiller.accelerator.unwrap_model(draft.model)
    draft.model.requires_grad_(False)
    save_draft(draft, run / "draft")
    progress("distil", 1.0, 1.0, f"{state['tokens']:,} tokens in {state['step']} steps")
    return run / "draft"


def _keep_metrics(file: Path, step: int) -> None:
    """Drop the rows after the checkpoint a run resumes from; they are written again."""
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
        rows = [
            line
            for line in lines
            if step and line.endswith("}") and json.loads(line)["step"] <= step
        ]
        file.write_text("".join(f"{line}\n" for line in rows), encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write to {file.parent}: {error.strerror}; choose another run_dir"
        ) from error


def _write_config(file: Path, config: DistillConfig, target: LanguageModel) -> None:
    """The resolved configuration, which `specdistill distill` reads again, and in comments what
    else decides a result."""
    facts = {
        "device": device_name(target.device),
        "threads": torch.get_num_threads(),
        "git": git_commit(),
        "target_sha256": target.sha256(),
        **versions(),
    }
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    text += "".join(f"# {name}: {value}\n" for name, value in facts.items())
    try:
        file.write_text(text, encoding="utf-8")
    except OSError as error:
        raise StorageError(
            f"cannot write {file}: {error.strerror}; free space or choose another run_dir"
        ) from error
