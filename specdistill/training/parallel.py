"""A draft trained to propose its block in one pass (PARD, 2504.18583).

Served, it reads a text x_0 .. x_m and then masks, and the state of the mask at position n proposes
x_{n+1}. Row (b, n) is that state with the last b = n - m tokens hidden; its teacher is the target
at n, whatever b is. All rows of one visible prefix m are a block: row (0, m), which is the text's
own, and the masks (1, m + 1), (2, m + 2), ... The masks of all blocks stand after the text in one
pass, and see of it what they see when served.
"""

from __future__ import annotations

import copy
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from math import ceil
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Cache

from specdistill.config import Parallel
from specdistill.data.signal import Signal, States, TopK, logsumexps, token_log_probs
from specdistill.data.token_store import Example
from specdistill.errors import InputError
from specdistill.models import LanguageModel, choose_mask_token, set_parallel
from specdistill.training.attention import Sees, attending, whole_tiles
from specdistill.training.last_layer import only_at
from specdistill.training.losses import survival

Depths = Callable[[Example], Tensor]  # how many masks follow each visible prefix of an answer, [n]


def undropped(parallel: Parallel, example: Example) -> Tensor:
    """Every place of each block that ends within the answer."""
    num = len(example.response_tokens)
    return torch.arange(num - 1, -1, -1).clamp(max=parallel.num_draft_tokens - 1)


def depths_of(parallel: Parallel | None, key: str) -> Depths | None:
    """Those of an update, by a lot that depends on `key` and the example alone."""
    return None if parallel is None else partial(dropped, parallel, key)


def dropped(parallel: Parallel, key: str, example: Example) -> Tensor:
    """Conditional drop: place b is trained in a share max(keep^b, least) of the blocks, drawn by
    lot from those in which b - 1 is, so that a mask sees all masks before it.
    """
    whole = undropped(parallel, example)
    num = len(whole)
    order = random.Random(f"{key}-{example.id}").sample(range(num), num)
    most = torch.tensor([share * num for share in _shares(parallel)], dtype=torch.float64)
    return (torch.tensor(order)[:, None] < most).sum(1).minimum(whole)


def _shares(parallel: Parallel) -> list[float]:
    """Of the blocks, those that have place 1, 2, ..."""
    places = range(1, parallel.num_draft_tokens)
    return [max(parallel.keep**place, parallel.least) for place in places]


def pass_rows(parallel: Parallel | None, example: Example) -> int:
    """The rows of a pass that an example takes, at most: its text and the masks of its blocks."""
    num = len(example.response_tokens)
    masks = 0 if parallel is None else sum(ceil(share * num) for share in _shares(parallel))
    return len(example.prompt_tokens) + num + masks


@dataclass(frozen=True)
class Blocks:
    """The masks that follow the texts [B, L] of a batch, and the rows of the loss, block after
    block.

    places, positions: [B, L + M] the b and n of every row of the pass, padding included. rows: [R]
    which rows of the pass, counted through the batch, belong to the blocks; answer: [R] the
    position among the batch's response positions whose teacher and label a row has; lengths: [N]
    rows of each block.
    """

    places: Tensor
    positions: Tensor
    rows: Tensor
    answer: Tensor
    lengths: Tensor

    def cut(self) -> Blocks:
        """The same pass, without rows to learn from."""
        return Blocks(self.places, self.positions, self.rows[:0], self.answer[:0], self.lengths[:0])

    def within(self, span: slice, length: int) -> tuple[Blocks, Tensor]:
        """Of one text of `length` tokens, the blocks whose visible prefix ends in a window of it:
        their masks stand after the window. With them which of the R rows are theirs.
        """
        prefix = self.positions[0, self.rows[self.starts()]]
        here = (prefix >= span.start) & (prefix < span.stop)
        chosen = here.repeat_interleave(self.lengths)
        rows = self.rows[chosen]
        masked, width = rows >= length, span.stop - span.start
        masks = rows[masked]
        beyond = 1 + self.places.max()
        pads = whole_tiles(max(width + len(masks), width + 1), rows.device) - width - len(masks)

        def after(part: Tensor) -> Tensor:
            return torch.cat([part[0, span], part[0, masks], beyond.expand(pads)])[None]

        return Blocks(
            after(self.places),
            after(self.positions),
            torch.where(masked, width - 1 + masked.cumsum(0), rows - span.start),
            self.answer[chosen],
            self.lengths[here],
        ), chosen

    def rows_by_prefix(self, length: int) -> Tensor:
        """[L] rows of the pass that each token of one text takes: its own, and the masks that see
        the text up to it.
        """
        masks = self.rows[self.rows >= length]
        prefix = (self.positions - self.places)[0, masks]
        return 1 + torch.bincount(prefix, minlength=length)

    def starts(self) -> Tensor:
        """[R] whether a row is the first of its block."""
        first = torch.zeros_like(self.rows, dtype=torch.bool)
        first[self.lengths.cumsum(0) - self.lengths] = True
        return first


def lay_out(
    examples: Sequence[Example], longest: int, depths: Depths, device: torch.device
) -> Blocks:
    """The blocks of a batch whose texts are padded to `longest`."""
    places, positions, rows, answers, lengths = [], [], [], [], []
    before = 0
    for example in examples:
        length = depths(example) + 1
        block = torch.repeat_interleave(torch.arange(len(length)), length)
        place = torch.arange(len(block)) - (length.cumsum(0) - length)[block]
        position = len(example.prompt_tokens) - 1 + block + place
        masked = place > 0
        row = torch.where(masked, longest + masked.cumsum(0) - 1, position)
        places.append(place[masked])
        positions.append(position[masked])
        rows.append(row)
        answers.append(block + place + before)
        lengths.append(length)
        before += len(length)
    # Masks that only pad: of a place beyond all others, so that no other mask sees them. There is
    # one at least, so that a pass always has the mask's embedding in it.
    beyond = 1 + max(map(int, torch.cat(lengths)))
    width = max(longest + max(map(len, places)), longest + 1)
    width = whole_tiles(width, device)
    shape = (len(examples), width)
    all_places, all_positions = torch.full(shape, beyond), torch.full(shape, beyond)
    all_places[:, :longest], all_positions[:, :longest] = 0, torch.arange(longest)
    for i, (place, position) in enumerate(zip(places, positions, strict=True)):
        all_places[i, longest : longest + len(place)] = place
        all_positions[i, longest : longest + len(place)] = position
    parts = (torch.cat([row + i * width for i, row in enumerate(rows)]), torch.cat(answers))
    made = (all_places, all_positions, *parts, torch.cat(lengths))
    return Blocks(*(part.to(device) for part in made))


def sees(q_place: Tensor, q_position: Tensor, k_place: Tensor, k_position: Tensor) -> Tensor:
    """Whether row q sees row k: the text up to its visible prefix, and the masks of its own block
    up to itself. Of a text's own row (place 0) that is plain causal attention.
    """
    prefix = q_position - q_place
    text = (k_place == 0) & (k_position <= prefix)
    return text | ((k_place >= 1) & (k_position - k_place == prefix) & (k_place <= q_place))


def block_rule(blocks: Blocks, before: int, window: int | None) -> Sees:
    """`sees` by the numbers of rows, of which so many tokens of the text stand `before` those of
    the blocks. window: how many positions a layer looks back.
    """
    text = torch.arange(before, device=blocks.places.device).expand(len(blocks.places), -1)
    place = torch.cat([torch.zeros_like(text), blocks.places], 1)
    position = torch.cat([text, blocks.positions], 1)

    def visible(b: Tensor, h: Tensor | None, q: Tensor, k: Tensor) -> Tensor:
        q = q + before
        seen = sees(place[b, q], position[b, q], place[b, k], position[b, k])
        return seen if window is None else seen & (position[b, q] - position[b, k] < window)

    return visible


def states_of_blocks(
    draft: LanguageModel, tokens: Tensor, blocks: Blocks, prefix: Cache | None = None
) -> Tensor:
    """The draft's final states [R, d] at the rows of the blocks, in one pass over the texts
    [B, L], or a window of one text behind its prefix, and their masks.
    """
    shape = (len(tokens), blocks.places.shape[1] - tokens.shape[1])
    assert draft.mask_token is not None
    masks = tokens.new_full(shape, draft.mask_token)
    before = 0 if prefix is None else prefix.get_seq_length()
    rule = partial(block_rule, blocks, before)
    with (
        attending(draft, rule, blocks.places.shape, before) as attention_mask,
        only_at(draft, blocks.rows),
    ):
        hidden = draft.hidden(
            torch.cat([tokens, masks], 1),
            position_ids=blocks.positions.clamp(max=draft.max_length - 1),
            attention_mask=attention_mask,
            past_key_values=prefix,
            use_cache=prefix is not None,
        )
    return hidden.flatten(0, 1)[blocks.rows]


def hidden_token_weights(
    target: LanguageModel, signal: Signal, labels: Tensor, blocks: Blocks, chunk: int
) -> Tensor:
    """[R] the chance that the target, at temperature 1, would have written the tokens hidden before
    each row: the product of its probabilities of them (CAT of PARD-2, 2605.08632); 1 at place 0.
    """
    p = label_probabilities(target, signal, labels, chunk)[blocks.answer]
    before = p.roll(1).masked_fill(blocks.starts(), 1)
    return survival(before, blocks.lengths, 1 + int(blocks.places.max()))


def label_probabilities(
    target: LanguageModel, signal: Signal, labels: Tensor, chunk: int
) -> Tensor:
    """The target's probability of the token that the text has at each of N positions, [N]. Of a
    token outside the k that were kept it is an even share of the tail.
    """
    if isinstance(signal, TopK):
        match = signal.tokens.long() == labels[:, None]
        p = (signal.log_probs.float().exp() * match).sum(-1)
        rest = target.vocab_size - signal.tokens.shape[1]
        return torch.where(match.any(-1), p, signal.log_tail.exp() / rest)
    if signal.logsumexp is None:
        signal = States(signal.hidden, logsumexps(target, signal.hidden, chunk))
    return token_log_probs(target, signal, labels).exp()


class MaskEmbedding(nn.Module):
    """The mask's row of an embedding that is otherwise frozen."""

    def __init__(self, draft: LanguageModel) -> None:
        super().__init__()
        assert draft.mask_token is not None
        self.token = draft.mask_token
        embedding: Any = draft.model.get_input_embeddings()
        weight: Tensor = embedding.weight
        row = nn.Parameter(weight.detach()[self.token, None].clone())
        # An embedding of the draft's own class, as some scale what they look up.
        self.row: Any = copy.deepcopy(embedding, {id(weight): row})
        self.row.padding_idx = None

    @contextmanager
    def read_by(self, draft: LanguageModel) -> Iterator[None]:
        """Within it the draft reads this row for the mask."""

        def exchange(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> Tensor:
            (tokens,) = args
            masked = (tokens == self.token)[..., None]
            return torch.where(masked, self.row(torch.zeros_like(tokens[:1, :1])), output)

        embedding: Any = draft.model.get_input_embeddings()
        handle = embedding.register_forward_hook(exchange)
        try:
            yield
        finally:
            handle.remove()


def write_mask_row(draft: LanguageModel, row: Tensor) -> None:
    """Put a trained row [1, d] into the draft's embedding."""
    embedding: Any = draft.model.get_input_embeddings()
    embedding.weight.data[draft.mask_token] = row.detach()[0]


def begin(draft: LanguageModel, target: LanguageModel, parallel: Parallel) -> None:
    """Make `draft` one that can be trained in parallel, in place: it says which token is its mask,
    and that token's embedding is the mean of all, unless it is the mask of this draft already.
    Raises `InputError` for a mask that cannot be trained.
    """
    if (kind := draft.config._attn_implementation) != "sdpa":
        raise InputError(
            f"{draft.name} ({draft.config.model_type}) computes attention in the way {kind!r}, and "
            "blocks are trained by sdpa; take a draft of a family that has it"
        )
    mask = parallel.mask_token
    if mask == "auto":
        mask = choose_mask_token(target) if draft.mask_token is None else draft.mask_token
    if mask >= target.vocab_size:
        raise InputError(
            f"parallel.mask_token is {mask}, and {target.name} has the ids 0 to "
            f"{target.vocab_size - 1}; engines want one of them"
        )
    embedding: Any = draft.model.get_input_embeddings()
    if embedding.padding_idx is not None and mask == embedding.padding_idx % len(embedding.weight):
        raise InputError(
            f"parallel.mask_token is {mask}, the padding token of {draft.name}, whose embedding "
            "is never trained; name another unused one"
        )
    begun = mask == draft.mask_token
    set_parallel(draft, mask, parallel.num_draft_tokens)
    if not begun:
        with torch.no_grad():
            embedding.weight[mask] = embedding.weight.mean(0)


def refuse_mask(examples: Sequence[Example], draft: LanguageModel, where: str) -> None:
    """Raises `InputError` for a text that holds the mask: the draft would take a token that stands
    there for one that is hidden.
    """
    mask = draft.mask_token
    for example in examples:
        if mask in example.prompt_tokens or mask in example.response_tokens:
            raise InputError(
                f"{where}: the answer {example.id!r} holds the token {mask} "
                f"({draft.tokenizer.convert_ids_to_tokens(mask)!r}), which is the mask of the "
                "parallel draft; name another by parallel.mask_token, or leave the answer out"
            )
