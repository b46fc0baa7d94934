"""Keys and values with a length per row. Rejecting tokens is a subtraction from the lengths the
caller keeps: nothing is copied, and what a stale slot holds is masked until it is overwritten.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin

from specdistill.decoding.graphs import CannotCaptureError, Graphs, warn_of_eager_rounds
from specdistill.decoding.prefixes import PrefixTree, common_prefix
from specdistill.errors import DecodingError
from specdistill.models import LanguageModel
from specdistill.models.memory import free_bytes

Mask = TypeVar("Mask")
BUCKET = 64  # attention sees a multiple of this many slots, so that shapes repeat
PREFILL_WIDTH, PREFILL_TOKENS = 512, 8192  # of a pass over prompts: positions, and of all rows
PREFILL_PAIRS = 2**23  # of its tokens and the slots that each may see, which masks have values for
SLACK = 256  # tokens that a further pass costs about as much as


class _RowLayer(CacheLayerMixin):
    """One layer's slots [B, L, H, D], written by position. `token` are the keys and the values
    [1, H, 1, D] that the layer keeps of one token, without their data.
    """

    is_sliding = False
    keys: Tensor
    values: Tensor

    def __init__(self, owner: CachedModel, token: tuple[Tensor, Tensor]) -> None:
        super().__init__()
        self.owner: CachedModel = weakref.proxy(owner)  # or slots would outlive their stream
        self.keys, self.values = (
            torch.zeros(
                (owner.batch, owner.capacity, part.shape[1], part.shape[3]),
                dtype=part.dtype,
                device=owner.model.device,
            )
            for part in token
        )
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """Never called: the slots are there from the start."""

    def write(self, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
        """Keys and values [b, n, H, D] into the places of this pass; returns what its rows see,
        [b, H, visible, D].
        """
        owner = self.owner
        out = []
        for slots, new in ((self.keys, keys), (self.values, values)):
            slots.flatten(0, 1).index_copy_(0, owner.places, new.flatten(0, 1))
            seen = slots[: owner.batch, : owner.visible]
            out.append((seen[owner.rows] if owner.is_subset else seen).transpose(1, 2))
        return out[0], out[1]

    def update(
        self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any
    ) -> tuple[Tensor, Tensor]:
        """The same for Transformers' own layers, whose states are [b, H, n, D]."""
        return self.write(key_states.transpose(1, 2), value_states.transpose(1, 2))

    def keep(self, rows: Tensor) -> None:
        self.keys = self.keys[rows]  # the old ones go before the values are copied
        self.values = self.values[rows]

    def copy(self, sources: Tensor, rows: Tensor, length: int) -> None:
        """The first `length` slots of each source row to its row."""
        for slots in (self.keys, self.values):
            slots[rows, :length] = slots[sources, :length]  # the right side is a copy already

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.owner.visible, 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self.owner.capacity


class CachedModel:
    """A model with slots for `batch` rows of up to `capacity` tokens, all of them allocated here.
    With `graphs`, passes over all rows are captured and replayed, and a pass overwrites what the
    last one of its shape returned. Raises `DecodingError`, here and later, where the memory does
    not suffice.
    """

    def __init__(
        self, model: LanguageModel, batch: int, capacity: int, graphs: Graphs | None = None
    ) -> None:
        self.model = model
        model.body  # noqa: B018 - found by passes of its own, not in one that memory may fail
        self.graphs = graphs
        self.batch = batch
        self.capacity = _whole_buckets(capacity)
        self.last_position = model.max_length - 1
        self.visible = BUCKET
        self.rows = self.places = torch.empty(0, dtype=torch.int64)
        self.is_subset = False
        self.prompts = PrefixTree()  # what rows hold from slot 0
        with memory_errors(model, batch, capacity):
            if cache_bytes(model, batch, capacity) > free_bytes(model.device):
                raise MemoryError
            self.layers = [_RowLayer(self, token) for token in model.token_slots]
        self.cache = Cache(layers=list(self.layers))

    def run(
        self, tokens: Tensor, positions: Tensor, visible: int, rows: Tensor | None = None
    ) -> Tensor:
        """Process tokens [b, n] at positions [b, n] of the given rows (all by default); returns
        hidden states [b, n, d].

        Each query sees the slots up to its own position. `visible` is a number of slots, known on
        the host, above every position; it is rounded up to a bucket. Positions past the model's
        last count as the last: in a target they hold what a round adds beyond the end of a row,
        which nobody reads, and in a draft with fewer positions only its guesses suffer.
        """
        self.visible = min(_whole_buckets(visible), self.capacity)
        with memory_errors(self.model, self.batch, self.capacity):
            if self.graphs is not None and rows is None:
                shape = (tokens.shape[1], self.visible)
                try:
                    return self.graphs.run(shape, self._pass, tokens, positions)
                except CannotCaptureError as error:
                    self.graphs = None
                    warn_of_eager_rounds(str(error))
            return self._pass(tokens, positions, rows)

    def _pass(self, tokens: Tensor, positions: Tensor, rows: Tensor | None = None) -> Tensor:
        """What a graph captures: no shape and no choice in it depends on the tensors' values."""
        device = self.model.device
        self.is_subset = rows is not None
        self.rows = torch.arange(self.batch, device=device) if rows is None else rows
        self.places = (self.rows[:, None] * self.capacity + positions).flatten()
        slots = torch.arange(self.visible, device=device)
        read = positions.clamp(max=self.last_position)
        return self.model.hidden(
            tokens,
            position_ids=read,
            attention_mask=attention_mask(self.model, slots, positions),
            past_key_values=self.cache,
            use_cache=True,
        )

    def logits(self, hidden: Tensor) -> Tensor:
        """Of states that `run` gave, by the packed head where there is one."""
        return self.model.logits(hidden, packed=True)

    def prefill(
        self,
        rows: Tensor,
        prompts: list[list[int]],
        *,
        width: int = PREFILL_WIDTH,
        tokens: int = PREFILL_TOKENS,
    ) -> None:
        """Write the prompts of some rows from position 0, at most `width` positions and `tokens`
        tokens in a pass. Of each, what a row already holds, this one or another, is copied, and
        what all of them begin with is computed once, as are equal prompts next to each other. A row
        must not run between the end of its text and its next prompt.
        """
        if shared := common_prefix(prompts):
            self._fill(rows[:1], [prompts[0][:shared]], width, tokens)
        different = [i for i, prompt in enumerate(prompts) if i == 0 or prompt != prompts[i - 1]]
        if len(different) < len(prompts):
            self._fill(rows[different], [prompts[i] for i in different], width, tokens)
        self._fill(rows, prompts, width, tokens)

    def _fill(self, rows: Tensor, prompts: list[list[int]], width: int, tokens: int) -> None:
        """Every row from the one that holds the longest beginning of its prompt; those that lack
        about as much together.
        """
        device = self.model.device
        sources, known = zip(*map(self.prompts.longest, prompts), strict=True)
        if most := max(known):
            index = torch.tensor(sources, device=device)
            with memory_errors(self.model, self.batch, self.capacity):
                for layer in self.layers:
                    layer.copy(index, rows, most)
        for row, prompt in zip(rows.tolist(), prompts, strict=True):
            self.prompts.put(row, prompt)
        missing = [len(p) - k for p, k in zip(prompts, known, strict=True)]
        for group in length_classes(missing):
            slots = max(len(prompts[i]) for i in group)
            count, step = pass_shape(missing[group[0]], slots, width, tokens)
            for members in (group[i : i + count] for i in range(0, len(group), count)):
                part = rows[torch.tensor(members, device=device)]
                texts, starts = [prompts[i] for i in members], [known[i] for i in members]
                for start in range(0, missing[members[0]], step):
                    self._write(part, texts, [k + start for k in starts], step)

    def _write(self, rows: Tensor, texts: list[list[int]], starts: list[int], width: int) -> None:
        """`width` tokens of each text from its start. Rows that are done repeat their last token at
        its position, which writes the same values again.
        """
        device = self.model.device
        pieces = [text[start : start + width] for text, start in zip(texts, starts, strict=True)]
        width = max(map(len, pieces))
        tokens = [p + t[-1:] * (width - len(p)) for p, t in zip(pieces, texts, strict=True)]
        last = torch.tensor([len(text) - 1 for text in texts], device=device)[:, None]
        places = torch.tensor(starts, device=device)[:, None] + torch.arange(width, device=device)
        stop = max(min(s + width, len(t)) for s, t in zip(starts, texts, strict=True))
        self.run(torch.tensor(tokens, device=device), places.minimum(last), stop, rows)

    def keep(self, rows: list[int]) -> None:
        """Drop all rows but these; they are renumbered in this order."""
        index = torch.tensor(rows, device=self.model.device)
        with memory_errors(self.model, self.batch, self.capacity):
            for layer in self.layers:
                layer.keep(index)
        self.batch = len(rows)
        self.prompts.keep(rows)
        if self.graphs is not None:  # they know the old slots
            self.graphs.clear()

    def compact(self, rows: list[int]) -> None:
        """As `keep`, in the same slots: what was captured with so many rows stays right."""
        index = torch.tensor(rows, device=self.model.device)
        with memory_errors(self.model, self.batch, self.capacity):
            for layer in self.layers:
                layer.copy(index, torch.arange(len(rows), device=index.device), self.capacity)
        self.batch = len(rows)
        self.prompts.keep(rows)

    def reset(self, batch: int) -> None:
        """So many of the rows there were at first, and nothing in them."""
        self.batch = batch
        self.prompts = PrefixTree()


def length_classes(lengths: Sequence[int]) -> list[list[int]]:
    """Indices of texts by falling length, those that a pass takes together: padded to the first one
    they waste at most half of their tokens, or `SLACK` of them. Texts without tokens are left out.
    """
    classes: list[list[int]] = []
    padding = longest = 0
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        padding += longest - lengths[i]
        if lengths[i] == 0:
            break
        if classes and (2 * lengths[i] >= longest or padding <= SLACK):
            classes[-1].append(i)
        else:
            classes.append([i])
            padding, longest = 0, lengths[i]
    return classes


def pass_shape(
    missing: int, slots: int, width: int = PREFILL_WIDTH, tokens: int = PREFILL_TOKENS
) -> tuple[int, int]:
    """Rows, at most, and positions of a pass over prompts that lack so many tokens of `slots`."""
    tokens = min(tokens, max(PREFILL_PAIRS // _whole_buckets(slots), 1))
    step = min(width, missing, tokens)
    return tokens // step, step


def attention_mask(
    model: LanguageModel, slots: Tensor, positions: Tensor
) -> Tensor | dict[str, Tensor]:
    """Mask [b, 1, n, slots]: slot j is seen from position i if j <= i, and i - j < window in a
    sliding layer, see `by_kind_of_layer`. Boolean, or to be added to the scores for models without
    fused attention.
    """
    here = positions[:, None, :, None]

    def mask(window: int | None) -> Tensor:
        seen = slots <= here
        seen = seen if window is None else seen & (slots > here - window)
        if model.config._attn_implementation != "eager":
            return seen
        unseen = torch.finfo(model.dtype).min
        return torch.zeros_like(seen, dtype=model.dtype).masked_fill_(~seen, unseen)

    return by_kind_of_layer(model, mask)


def by_kind_of_layer(
    model: LanguageModel, mask: Callable[[int | None], Mask]
) -> Mask | dict[str, Mask]:
    """What a model takes as attention mask: `mask(window)` of its layers' window, None where they
    have none. Models that mix kinds of layers get a dict by kind, as they expect.
    """
    window = getattr(model.config, "sliding_window", None)
    kinds = set(getattr(model.config, "layer_types", None) or ())
    if not window or kinds == {"full_attention"}:
        return mask(None)
    if not kinds:
        return mask(window)
    return {"full_attention": mask(None), "sliding_attention": mask(window)}


def cache_bytes(model: LanguageModel, batch: int, capacity: int) -> int:
    """Bytes of keys and values that a `CachedModel` of these sizes allocates."""
    one_token = sum(part.nbytes for token in model.token_slots for part in token)
    return batch * _whole_buckets(capacity) * one_token


def pass_bytes(model: LanguageModel, batch: int, slots: int) -> int:
    """About the bytes that a pass over prompts takes beside the caches, of so many rows that come
    to `slots` tokens each: its masks, what attention makes of them, a layer's keys and values of
    the rows, which are copied for it, and a layer's activations.
    """
    rows, width = pass_shape(slots, slots)
    rows, size = min(rows, batch), model.dtype.itemsize
    copied = max(sum(part.nbytes for part in token) for token in model.token_slots)
    config = model.config
    of_a_pair = 2 + size  # what is seen, what is not, and as it is added to the scores
    if config._attn_implementation == "eager":  # scores of every head, and their softmax in float32
        of_a_pair += 8 * config.num_attention_heads
    elif model.body is None:
        of_a_pair += 4  # as PyTorch's own attention takes it
    else:
        of_a_pair += (model.body.sharing - 1) * size  # once for each head that shares keys
    inner = getattr(config, "intermediate_size", None)
    inner = inner if isinstance(inner, int) else 4 * config.hidden_size
    # What goes into a layer and its norm; gate, up, the activation, and their product.
    of_a_token = 2 * config.hidden_size + 4 * inner
    tokens, seen = rows * width, rows * _whole_buckets(slots)
    return seen * (width * of_a_pair + copied) + tokens * of_a_token * size


@contextmanager
def memory_errors(model: LanguageModel, batch: int, capacity: int) -> Iterator[None]:
    """Turns running out of memory into a `DecodingError` that names the sizes."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, (MemoryError, torch.OutOfMemoryError)) and not any(
            words in str(error).lower() for words in _OUT_OF_MEMORY
        ):
            raise
        free = free_bytes(model.device)
        raise DecodingError(
            f"not enough memory on {model.device} to decode with {model.name}: keys and values of "
            f"{batch} rows of {_whole_buckets(capacity)} slots take "
            f"{cache_bytes(model, batch, capacity) / 1e6:,.1f} MB beside what a pass needs, and "
            f"{free / 1e6:,.1f} MB are free; take a smaller batch, shorter prompts or fewer new "
            "tokens"
        ) from error


_OUT_OF_MEMORY = (
    "out of memory",
    "not enough memory",
    "can't allocate memory",
    "cublas_status_alloc_failed",
)


def _whole_buckets(slots: int) -> int:
    return -(-slots // BUCKET) * BUCKET
