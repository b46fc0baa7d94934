"""From examples to the batches of an update: padding or packing, the response mask, groups of like
length or full rows, and their order over a run.
"""

from __future__ import annotations

import random
from bisect import bisect_left, insort
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import chain, islice
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from specdistill.config import DistillConfig, Parallel
from specdistill.data.signal import Signal, joined, positions_of
from specdistill.data.token_store import Example
from specdistill.training.attention import whole_tiles
from specdistill.training.parallel import Blocks, Depths, lay_out, pass_rows
from specdistill.training.reward import Credit, credit_at, credit_of

if TYPE_CHECKING:
    from specdistill.training.windows import Prefix


@dataclass
class Batch:
    """Examples padded to one length, or packed into one row. tokens, mask: [B, L]; `response`
    [B, L] marks the positions whose next token belongs to an answer, N of them, `lengths` [E] of
    each; labels [N] is that token; signal: what was kept of the target there; best [N]: its most
    probable token there, where it was worked out. credit: what a reward makes of the N tokens.

    texts: [1, L] of a packed row, which example a token is of, -1 for padding. prefix: of a window
    of one text, what stands before it. For a parallel draft `blocks` says which rows [R] are learnt
    from, weights [R] how much each counts, where they differ.
    """

    tokens: Tensor
    mask: Tensor
    response: Tensor
    lengths: Tensor
    labels: Tensor
    signal: Signal | None
    best: Tensor | None = None
    credit: Credit | None = None
    texts: Tensor | None = None
    prefix: Prefix | None = None
    blocks: Blocks | None = None
    weights: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        """[B, S] of a pass over it, masks included."""
        return (self.tokens if self.blocks is None else self.blocks.places).shape


def make_batch(
    examples: list[Example],
    pad: int,
    device: torch.device,
    depths: Depths | None = None,
    *,
    packed: bool = False,
) -> Batch:
    """Right-padded, or one after the other where they are `packed`; with the target's signal where
    every example carries it, and with the blocks of a parallel draft as deep as `depths` says.
    """
    rows = [e.prompt_tokens + e.response_tokens for e in examples]
    learnt = [
        [len(e.prompt_tokens) - 1 <= i < len(row) - 1 for i in range(len(row))]
        for e, row in zip(examples, rows, strict=True)
    ]  # the token at t is predicted at t - 1
    texts = None
    if packed and len(rows) > 1:
        texts = [[i for i, row in enumerate(rows) for _ in row]]
        rows, learnt = [list(chain(*rows))], [list(chain(*learnt))]
    longest = max(map(len, rows))
    width = longest if texts is None else whole_tiles(longest, device)

    def padded(rows: list[list[Any]], value: Any) -> Tensor:
        return torch.tensor([row + [value] * (width - len(row)) for row in rows], device=device)

    signals = [e.signal for e in examples if e.signal is not None]
    return Batch(
        padded(rows, pad),
        padded([[1] * len(row) for row in rows], 0),
        padded(learnt, False),
        torch.tensor([len(e.response_tokens) for e in examples], device=device),
        torch.tensor([token for e in examples for token in e.response_tokens], device=device),
        joined(signals, device) if len(signals) == len(examples) else None,
        credit=credit_of(examples, device),
        texts=None if texts is None else padded(texts, -1),
        blocks=None if depths is None else lay_out(examples, longest, depths, device),
    )


def idle(batch: Batch) -> Batch:
    """The batch without its answers: a pass over it adds nothing to a loss, in a process that has
    no batch left while others have.
    """
    return replace(
        batch,
        response=torch.zeros_like(batch.response),
        lengths=torch.zeros_like(batch.lengths),
        labels=batch.labels[:0],
        signal=None if batch.signal is None else positions_of(batch.signal, slice(0)),
        credit=credit_at(batch.credit, slice(0)),
        blocks=None if batch.blocks is None else batch.blocks.cut(),
        weights=None if batch.weights is None else batch.weights[:0],
    )


def dealt(
    groups: list[list[Example]],
    process: int,
    processes: int,
    device: torch.device,
    depths: Depths | None = None,
    *,
    packed: bool = False,
) -> list[Batch]:
    """The micro-batches of an update that one of several processes passes over, dealt in turn. All
    make the same number of passes, as a pass over a draft that is cut needs them all: where the
    groups run out, the last one adds nothing.
    """
    make = partial(make_batch, pad=0, device=device, depths=depths, packed=packed)
    batches = [make(group) for group in groups[process::processes]]
    if len(batches) * processes < len(groups):
        batches.append(idle(make(groups[0])))
    return batches


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


def packed_rows(
    examples: list[Example], batch_tokens: int, seed: int, epoch: int
) -> list[list[Example]]:
    """One epoch: groups that fill a row of `batch_tokens` tokens, each example put where it leaves
    the least room, the longest first; in an order by seed and epoch as that of `length_buckets`.
    """
    rng = random.Random(f"{seed}-{epoch}")
    size = {e.id: pass_rows(None, e) for e in examples}
    rows: list[list[Example]] = []
    rooms: list[tuple[int, int]] = []  # how many tokens a row still takes, and which row
    for example in sorted(examples, key=lambda e: (-size[e.id], rng.random())):
        needed = size[example.id]
        at = bisect_left(rooms, (needed, -1))
        if at == len(rooms):
            room, row = batch_tokens, len(rows)
            rows.append([])
        else:
            room, row = rooms.pop(at)
        rows[row].append(example)
        if room > needed:
            insort(rooms, (room - needed, row))
    rng.shuffle(rows)
    return rows


def updates(
    examples: list[Example],
    batch_tokens: int,
    accumulate: int,
    seed: int,
    skip: int = 0,
    parallel: Parallel | None = None,
    *,
    packing: bool = False,
) -> Iterator[list[list[Example]]]:
    """Groups of `accumulate` micro-batches, one group an update, without end; the first `skip`
    updates are left out.
    """
    epoch = 0
    while True:
        if packing:
            groups = packed_rows(examples, batch_tokens, seed, epoch)
        else:
            groups = length_buckets(examples, batch_tokens, seed, epoch, parallel)
        for start in range(0, len(groups), accumulate):
            if skip:
                skip -= 1
            else:
                yield groups[start : start + accumulate]
        epoch += 1


def schedule(
    examples: Callable[[int], list[Example]],
    config: DistillConfig,
    step: int,
    masks_since: int | None = 0,
) -> Iterator[list[list[Example]]]:
    """The micro-batches of each update from `step` on, without end, over `examples(step)`, which
    are asked for anew at every multiple of the policy's `refresh_every`. Those of a parallel draft
    leave room for its masks where these began, at the step `masks_since`, and are dealt anew there.
    """
    training, period = config.training, config.policy.refresh_every
    while True:
        refresh = 0 if period is None else step - step % period
        first = max(refresh, masks_since or 0)
        stream = updates(
            examples(refresh),
            training.batch_tokens,
            training.accumulate,
            config.seed + first,
            step - first,
            None if masks_since is None else config.parallel,
            packing=training.packing,
        )
        for groups in islice(stream, None if period is None else refresh + period - step):
            yield groups
            step += 1
