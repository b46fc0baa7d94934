"""What a draft is worth on held-out answers while it is trained: its overlap with the target, and a
short real speculative decode with its weights of the moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import islice
from typing import Any

import torch
from torch import Tensor

from specdistill.config import DistillConfig
from specdistill.data.signal import States, TopK
from specdistill.data.token_store import Example
from specdistill.decoding import Drafting, Request, Sampling, SpeculativeDecoder, drafter_for
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.models.packing import pack
from specdistill.training.batches import Batch, length_buckets, make_batch
from specdistill.training.distiller import Distiller
from specdistill.training.losses import Positions, Target
from specdistill.training.policies import decoded_rows
from specdistill_kernels import divergence, draft_columns


class Evaluation:
    """Held-out examples, made ready once: the target is asked only here. Raises `InputError` where
    `config.decode` asks for a target's body that was not read.
    """

    def __init__(
        self, distiller: Distiller, examples: list[Example], config: DistillConfig
    ) -> None:
        target = distiller.target
        if config.decode and target and any(p.is_meta for p in target.model.parameters()):
            raise InputError(
                f"decode asks for all of {target.name}, and its head alone was read; load it "
                "whole, or set decode: null"
            )
        if target is not None and (rows := decoded_rows(config)):
            # Before any pass: packed products round differently, and a run that resumes must read
            # with the same ones as a run that never stopped.
            pack(target, rows)
        self.distiller, self.examples, self.config = distiller, examples, config
        groups = length_buckets(examples, config.training.batch_tokens, 0, 0)
        device = distiller.draft.device
        self.batches = [make_batch(group, 0, device) for group in groups]
        self.criterion = "token_match"
        if target is not None:
            self.batches = [with_answers(distiller, target, batch) for batch in self.batches]
            self.criterion = "block_efficiency" if config.decode else "expected_alpha"

    def measure(self) -> dict[str, float]:
        """`overlap` and, where the configuration has `decode`, `decoded`; `on_text` where there is
        no target.
        """
        target, draft = self.distiller.target, self.distiller.draft
        if target is None:
            return on_text(self.distiller, self.batches)
        measures = overlap(self.distiller, self.batches)
        if self.config.decode is not None:
            measures |= decoded(target, draft, self.examples, self.config)
        return measures


@torch.no_grad()
def with_answers(distiller: Distiller, target: LanguageModel, batch: Batch) -> Batch:
    """The batch with all that `overlap` asks of the target: its signal, logsumexp, best tokens."""
    signal = distiller.signal(batch)
    assert signal is not None
    if isinstance(signal, TopK):
        return replace(batch, signal=signal, best=signal.tokens[:, 0].long())
    chunks = signal.hidden.split(distiller.config.training.chunk)
    logits = [target.logits(rows) for rows in chunks]
    logsumexp = torch.cat([part.logsumexp(-1) for part in logits])
    best = torch.cat([part.argmax(-1) for part in logits])
    return replace(batch, signal=States(signal.hidden, logsumexp), best=best)


@torch.no_grad()
def overlap(distiller: Distiller, batches: list[Batch]) -> dict[str, float]:
    """On batches `with_answers`: expected α = mean Σ min(p, q) at temperature 1 over the full
    vocabulary (a token the draft lacks has q = 0), and the share of positions where both models'
    most probable tokens agree. From the k most probable tokens alone, expected α is too high by at
    most `tail_mass`, the mean mass of all others.
    """
    sums, count = {"expected_alpha": 0.0, "greedy_match": 0.0}, 0
    for batch in batches:
        signal = distiller.signal(batch)
        assert batch.best is not None
        at = distiller.positions(batch, distiller.states(batch).hidden, signal)
        for rows, logits in _logits(at):
            target = at.target(1.0)
            assert target is not None
            lost = divergence(logits, _rows(target, rows), loss="tvd", draft_vocab=at.draft_vocab)
            agree = distiller.vocab[logits.argmax(-1)] == batch.best[rows]
            sums["expected_alpha"] += (1 - lost).sum().item()
            sums["greedy_match"] += agree.sum().item()
        if isinstance(signal, TopK):
            tail = signal.log_tail.exp().sum().item()
            sums["tail_mass"] = sums.get("tail_mass", 0.0) + tail
        count += len(batch.labels)
    return {name: value / count for name, value in sums.items()}


@torch.no_grad()
def on_text(distiller: Distiller, batches: list[Batch]) -> dict[str, float]:
    """ce: the mean of −log q of the tokens that the draft has. token_match: the share of all tokens
    that are its most probable ones.
    """
    total, matches, known, count = 0.0, 0, 0, 0
    for batch in batches:
        at = distiller.positions(batch, distiller.states(batch).hidden, None)
        columns = draft_columns(batch.labels, len(distiller.vocab), distiller.draft_vocab)
        for rows, logits in _logits(at):
            log_q, column = logits.log_softmax(-1), columns[rows]
            total -= log_q[column >= 0].gather(-1, column[column >= 0, None]).sum().item()
            matches += int((log_q.argmax(-1) == column).sum())
        known += int((columns >= 0).sum())
        count += len(batch.labels)
    return {"ce": total / max(known, 1), "token_match": matches / count}


def decoded(
    target: LanguageModel, draft: LanguageModel, examples: list[Example], config: DistillConfig
) -> dict[str, float]:
    """Block efficiency τ, tokens a target call and row, and acceptance rate, accepted / tested, of
    the first `config.decode.prompts` distinct prompts decoded by the project's own engine.
    """
    assert config.decode is not None
    settings, num = config.decode, config.decode.num_draft_tokens
    sampling = Sampling(settings.temperature)
    asked: dict[tuple[int, ...], Example] = {}
    for example in examples:
        asked.setdefault(tuple(example.prompt_tokens), example)
    requests = [
        Request(e.id, e.prompt_tokens, settings.max_new_tokens, sampling, config.seed)
        for e in islice(asked.values(), settings.prompts)
    ]
    drafting = Drafting(least_reach=settings.least_reach)
    drafter = drafter_for(draft, target.vocab_size, drafting)
    decoder = SpeculativeDecoder(target, drafter, num_draft_tokens=num, batch_size=len(requests))
    rounds = [r for output in decoder.run(requests).outputs for r in output.rounds]
    tested = sum(r.tested for r in rounds)
    return {
        "block_efficiency": sum(len(r.tokens) for r in rounds) / len(rounds),
        "acceptance_rate": sum(r.accepted for r in rounds) / max(tested, 1),
        "num_draft_tokens": num,
    }


def _logits(at: Positions) -> Iterator[tuple[slice, Tensor]]:
    """The draft's, `at.chunk` rows at a time."""
    for start in range(0, len(at.labels), at.chunk):
        rows = slice(start, start + at.chunk)
        yield rows, at.head.logits(at.states[rows])


def _rows(target: Target, rows: slice) -> Target:
    parts = target._asdict().items()
    cut: dict[str, Any] = {n: v[rows] if isinstance(v, Tensor) else v for n, v in parts}
    return type(target)(**cut)
