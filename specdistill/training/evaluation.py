"""What a draft is worth on held-out answers while it is trained: its overlap with the target, and a
short real speculative decode with its weights of the moment.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
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
from specdistill.training.losses import Positions, Target, survival
from specdistill.training.parallel import undropped
from specdistill.training.policies import decoded_rows
from specdistill_kernels import divergence, draft_columns


class Evaluation:
    """Held-out examples, made ready once: the target is asked only here. Raises `InputError` where
    `config.decode` asks for a target's body that was not read, or for a draft that stops early
    and proposes in parallel.
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
        if config.decode is not None:
            Drafting(least_reach=config.decode.least_reach).in_parallel(distiller.draft)
        if target is not None and (rows := decoded_rows(config)):
            # Before any pass: packed products round differently, and a run that resumes must read
            # with the same ones as a run that never stopped.
            pack(target, rows)
        self.distiller, self.examples, self.config = distiller, examples, config
        parallel, depths = config.parallel, None
        if parallel is not None:
            parallel = parallel.model_copy(update={"keep": 1.0})
            depths = partial(undropped, parallel)
        groups = length_buckets(examples, config.training.batch_tokens, 0, 0, parallel)
        device = distiller.draft.device
        self.batches = [make_batch(group, 0, device, depths) for group in groups]
        self.criterion = "token_match"
        if target is not None:
            self.batches = [with_answers(distiller, target, batch) for batch in self.batches]
            self.criterion = "expected_alpha" if parallel is None else "expected_block_efficiency"
            self.criterion = "block_efficiency" if config.decode else self.criterion

    def measure(self) -> dict[str, Any]:
        """`overlap` and, where the configuration has `decode`, `decoded`; `on_text` where there is
        no target.
        """
        target, draft = self.distiller.target, self.distiller.draft
        if target is None:
            return on_text(self.distiller, self.batches)
        measure = overlap if self.config.parallel is None else overlap_by_place
        measures = measure(self.distiller, self.batches)
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
    parts = []
    for rows in signal.hidden.split(distiller.chunk):
        logits = target.logits(rows)
        parts.append((logits.logsumexp(-1), logits.argmax(-1)))
    logsumexp, best = map(torch.cat, zip(*parts, strict=True))
    return replace(batch, signal=States(signal.hidden, logsumexp), best=best)


@torch.no_grad()
def overlap(distiller: Distiller, batches: list[Batch]) -> dict[str, Any]:
    """On batches `with_answers`: expected α = mean Σ min(p, q) at temperature 1 over the full
    vocabulary (a token the draft lacks has q = 0), and the share of positions where both models'
    most probable tokens agree. From the k most probable tokens alone, expected α is too high by at
    most `tail_mass`, the mean mass of all others.
    """
    sums, count = {"expected_alpha": 0.0, "greedy_match": 0.0}, 0
    for batch in batches:
        alpha, agree = overlap_of_rows(distiller, batch)
        sums["expected_alpha"] += alpha.sum().item()
        sums["greedy_match"] += agree.sum().item()
        _add_tail(sums, batch)
        count += len(batch.labels)
    return {name: value / count for name, value in sums.items()}


@torch.no_grad()
def overlap_by_place(distiller: Distiller, batches: list[Batch]) -> dict[str, Any]:
    """`overlap` of a parallel draft, whose places are those of a block: of the first, and a list by
    place. expected_block_efficiency: mean of 1 + Σ_b Π α along a block that begins anywhere, which
    is τ at temperature 1 where texts are the target's.
    """
    assert distiller.config.parallel is not None
    num = distiller.config.parallel.num_draft_tokens
    sums, reached, blocks = {"tail_mass": 0.0}, 0.0, 0
    alphas, agreements, counts = torch.zeros(3, num, dtype=torch.float64)
    for batch in batches:
        assert batch.blocks is not None
        alpha, agree = overlap_of_rows(distiller, batch)
        place = batch.blocks.places.flatten()[batch.blocks.rows].cpu()
        alphas.index_add_(0, place, alpha.double().cpu())
        agreements.index_add_(0, place, agree.double().cpu())
        counts += place.bincount(minlength=num)
        reached += survival(alpha, batch.blocks.lengths, num).sum().item()
        blocks += len(batch.blocks.lengths)
        _add_tail(sums, batch)
    by_place = (alphas / counts)[counts > 0].tolist(), (agreements / counts)[counts > 0].tolist()
    tail = {"tail_mass": sums["tail_mass"] / blocks} if sums["tail_mass"] else {}
    return {
        "expected_alpha": by_place[0][0],
        "greedy_match": by_place[1][0],
        **tail,
        "expected_block_efficiency": 1 + reached / blocks,
        "expected_alpha_by_place": by_place[0],
        "greedy_match_by_place": by_place[1],
    }


def overlap_of_rows(distiller: Distiller, batch: Batch) -> tuple[Tensor, Tensor]:
    """Σ min(p, q) and whether the most probable tokens agree, of every row that is learnt from."""
    assert batch.best is not None
    at = distiller.positions(batch, distiller.states(batch).hidden, distiller.signal(batch))
    best = batch.best if batch.blocks is None else batch.best[batch.blocks.answer]
    alphas, agreements = [], []
    target = at.target(1.0)
    assert target is not None
    for rows, logits in _logits(at):
        part = _rows(target, rows)
        alphas.append(1 - divergence(logits, part, loss="tvd", draft_vocab=at.draft_vocab))
        agreements.append(distiller.vocab[logits.argmax(-1)] == best[rows])
    return torch.cat(alphas), torch.cat(agreements)


def _add_tail(sums: dict[str, float], batch: Batch) -> None:
    if isinstance(batch.signal, TopK):
        tail = batch.signal.log_tail.exp().sum().item()
        sums["tail_mass"] = sums.get("tail_mass", 0.0) + tail


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
    decoder = SpeculativeDecoder(
        target, drafter, num_draft_tokens=num, batch_size=len(requests), cuda_graphs=False
    )  # in one call: what it captured would be thrown away
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
