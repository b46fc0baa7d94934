"""From examples to the batches of an update: padding, the response mask, groups of like length, and
their order over a run.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice

import torch
from torch import Tensor

from specdistill.config import DistillConfig, Parallel
from specdistill.data.signal import Signal, joined, positions_of
from specdistill.data.token_store import Example
from specdistill.errors import InputError
from specdistill.training.parallel import Blocks, Depths, lay_out, pass_rows
from specdistill.training.reward import Credit, credit_of, cut


@dataclass
class Batch:
    """Examples padded to one length. tokens, mask: [B, L]; `response` [B, L] marks the positions
    whose next token belongs to the answer, N of them; labels [N] is that token; signal: what was
    kept of the target there; best [N]: its most probable token there, where it was worked out. For
    a parallel draft `blocks` says which rows [R] are learnt from, weights [R] how much each counts,
    where they differ. credit: what a reward makes of the N tokens.
    """

    tokens: Tensor
    mask: Tensor
    response: Tensor
    labels: Tensor
    signal: Signal | None
    best: Tensor | None = None
    blocks: Blocks | None = None
    weights: Tensor | None = None
    credit: Credit | None = None


def make_batch(
    examples: list[Example], pad: int, device: torch.device, depths: Depths | None = None
) -> Batch:
    """Right-padded, with the target's signal where every example carries it, and with the blocks
    of a parallel draft as deep as `depths` says.
    """
    rows = [e.prompt_tokens + e.response_tokens for e in examples]
    longest = max(map(len, rows))
    response = torch.zeros(len(rows), longest, dtype=torch.bool)
    for i, example in enumerate(examples):  # the token at t is predicted at t - 1
        response[i, len(example.prompt_tokens) - 1 : len(rows[i]) - 1] = True
    signals = [e.signal for e in examples if e.signal is not None]
    return Batch(
        torch.tensor([row + [pad] * (longest - len(row)) for row in rows], device=device),
        torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows], device=device),
        response.to(device),
        torch.tensor([token for e in examples for token in e.response_tokens], device=device),
        joined(signals, device) if len(signals) == len(examples) else None,
        blocks=None if depths is None else lay_out(examples, longest, depths, device),
        credit=credit_of(examples, device),
    )


def idle(batch: Batch) -> Batch:
    """The batch without its answers: a pass over it adds nothing to a loss, in a process that has
    no batch left while others have.
    """
    return replace(
        batch,
        response=torch.zeros_like(batch.response),
        labels=batch.labels[:0],
        signal=None if batch.signal is None else positions_of(batch.signal, slice(0)),
        blocks=None if batch.blocks is None else batch.blocks.cut(),
        credit=cut(batch.credit),
    )


def dealt(
    groups: list[list[Example]],
    process: int,
    processes: int,
    device: torch.device,
    depths: Depths | None = None,
) -> list[Batch]:
    """The micro-batches of an update that one of several processes passes over, dealt in turn. All
    make the same number of passes, as a pass over a draft that is cut needs them all: where the
    groups run out, the last one adds nothing.
    """
    batches = [make_batch(group, 0, device, depths) for group in groups[process::processes]]
    if len(batches) * processes < len(groups):
        batches.append(idle(make_batch(groups[0], 0, device, depths)))
    return batches


def check_processes(config: DistillConfig, processes: int) -> None:
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


def length_buckets(
    examples: list[Example],
    batch_tokens: int,
    seed: int,
    epoch: int,
    parallel: Parallel | None = None,
) -> list[list[Example]]:
    """One epoch: groups of similar length of at most `batch_tokens` padded tokens, masks of a
    parallel draft included, in an order that depends on nothing but seed and epoch, so that a
    resumed run sees what an uninterrupted one would.
    """
    rng = random.Random(f"{seed}-{epoch}")
    size = {e.id: pass_rows(parallel, e) for e in examples}
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
    examples: list[Example],
    batch_tokens: int,
    accumulate: int,
    seed: int,
    skip: int = 0,
    parallel: Parallel | None = None,
) -> Iterator[list[list[Example]]]:
    """Groups of `accumulate` micro-batches, one group an update, without end; the first `skip`
    updates are left out.
    """
    epoch = 0
    while True:
        groups = length_buckets(examples, batch_tokens, seed, epoch, parallel)
        for start in range(0, len(groups), accumulate):
            if skip:
                skip -= 1
            else:
                yield groups[start : start + accumulate]
        epoch += 1


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
            step - first,
            config.parallel,
        )
        for groups in islice(stream, None if period is None else first + period - step):
            yield groups
            step += 1
