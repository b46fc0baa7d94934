"""Preparing prompts: what rows share is found in time linear in tokens, and changes nothing."""

import itertools
from collections.abc import Callable

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.profiler import ProfilerActivity, profile

from specdistill.decoding.cache import (
    SLACK,
    CachedModel,
    length_classes,
    pass_bytes,
    pass_shape,
)
from specdistill.decoding.prefixes import PrefixTree, common_prefix
from specdistill.models import LanguageModel

Tiny = Callable[..., LanguageModel]
TEXTS = st.lists(st.integers(0, 2), max_size=9)
COUNTS = (64, 128, 256, 512, 1024)


def plain_agreement(a: list[int], b: list[int]) -> int:
    pairs = zip(a, b, strict=False)
    return next((i for i, (x, y) in enumerate(pairs) if x != y), min(len(a), len(b)))


@given(rounds=st.lists(st.lists(st.tuples(st.integers(0, 4), TEXTS), max_size=5), max_size=6))
def test_the_longest_beginning_is_what_comparing_with_every_row_finds(
    rounds: list[list[tuple[int, list[int]]]],
) -> None:
    """Through rows that take other texts, and rows that leave, which renumbers the others."""
    tree, held = PrefixTree(), [[] for _ in range(5)]
    for number, texts in enumerate(rounds):
        for row, text in texts:
            row %= len(held)
            found, length = tree.longest(text)
            assert length == max(plain_agreement(text, other) for other in held)
            assert held[found][:length] == text[:length]
            tree.put(row, text)
            held[row] = text
        if number == 3:
            rows = [3, 0, 2]
            tree.keep(rows)
            held = [held[row] for row in rows]


def test_the_tree_forgets_what_no_row_holds() -> None:
    tree = PrefixTree()
    for text in ([1, 2, 3], [1, 2, 4, 5], [1], [7]):
        tree.put(0, text)
    assert tree.longest([1, 2, 3]) == (0, 0)
    assert list(tree.root.children) == [7]


@given(st.lists(TEXTS, min_size=2, max_size=5))
def test_the_common_prefix_is_the_shortest_agreement(texts: list[list[int]]) -> None:
    assert common_prefix(texts) == min(plain_agreement(a, b) for a in texts for b in texts)


def test_long_texts_are_compared_to_the_token() -> None:
    text = list(range(5, 400))
    for place in (0, 1, 63, 64, 65, 200, 394):
        other = [*text[:place], 0, *text[place + 1 :]]
        assert common_prefix([text, other]) == place
    assert common_prefix([text, text[:130]]) == 130


@given(st.lists(st.integers(0, 3000), max_size=60))
def test_rows_of_one_length_class_run_together(lengths: list[int]) -> None:
    classes = length_classes(lengths)
    assert sorted(i for group in classes for i in group) == [i for i, n in enumerate(lengths) if n]
    for group in classes:
        own = [lengths[i] for i in group]
        assert own == sorted(own, reverse=True)
        padding = len(own) * own[0] - sum(own)
        assert padding <= max(SLACK, sum(own))
    assert len(classes) <= 13, "a class for each doubling at most"


class Token(int):
    """Counts how often tokens are compared or looked up."""

    work = 0

    def __eq__(self, other: object) -> bool:
        Token.work += 1
        return int(self) == other

    def __hash__(self) -> int:
        Token.work += 1
        return int(self)


def work(model: LanguageModel, count: int, monkeypatch: pytest.MonkeyPatch) -> tuple[int, int]:
    """Of a host that prepares so many prompts twice, by tokens touched; and passes made."""
    generator = torch.Generator().manual_seed(count)
    passes: list[int] = []
    cached = CachedModel(model, count, 80)
    monkeypatch.setattr(cached, "run", lambda tokens, *_: passes.append(tokens.numel()))
    for layer in cached.layers:
        monkeypatch.setattr(layer, "copy", lambda *_: None)
    Token.work = 0
    for _ in range(2):
        lengths = torch.randint(1, 40, (count,), generator=generator).tolist()
        tails = [torch.randint(5, 9, (n,), generator=generator).tolist() for n in lengths]
        prompts = [[Token(t) for t in (*range(5, 29), *tail)] for tail in tails]
        cached.prefill(torch.arange(count), prompts)  # type: ignore[arg-type]
    assert max(passes) <= 8192
    return Token.work, len(passes)


def test_work_on_the_host_grows_with_the_tokens(
    tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = tiny(0)
    costs = [work(model, count, monkeypatch) for count in COUNTS]
    for count, (touched, passes) in zip(COUNTS, costs, strict=True):
        assert touched <= 8 * 2 * count * 44, (count, touched)  # a prompt has 44 tokens on average
        assert passes <= 2 * (count // 64 + 8)
    assert costs[-1][0] / costs[0][0] < 1.1 * COUNTS[-1] / COUNTS[0]


def test_what_is_shared_and_grouped_leaves_the_same_slots(tiny: Tiny) -> None:
    """Against rows that are each prepared alone, in passes of any size."""
    model = tiny(5, layers=2, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)

    def text(size: int) -> list[int]:
        return torch.randint(5, 9, (size,), generator=generator).tolist()

    head = text(20)
    first = [[*head, *text(n)] for n in (3, 300, 1, 150, 0, 17)]
    second = [[*first[1][:200], *text(60)], text(2), [], first[3], [*head, *text(290)], [7]]
    for sizes in ({}, {"width": 7, "tokens": 20}, {"width": 100, "tokens": 300}):
        cached = CachedModel(model, 6, 330)
        for texts in (first, second):
            cached.prefill(torch.arange(6), texts, **sizes)
            for row, own in enumerate(texts):
                alone = CachedModel(model, 1, 330)
                if own:
                    tokens = torch.tensor([own])
                    alone.run(tokens, torch.arange(len(own))[None], len(own))
                for layer, expected in zip(cached.layers, alone.layers, strict=True):
                    for slots, ours in (
                        (layer.keys, expected.keys),
                        (layer.values, expected.values),
                    ):
                        apart = slots[row, : len(own)] - ours[0, : len(own)]
                        assert apart.abs().sum() <= 1e-9


def test_the_masks_of_a_pass_do_not_grow_with_rows_times_length(tiny: Tiny) -> None:
    """Fewer rows, then fewer positions, as texts get longer; short ones are as they were."""
    for missing, slots, shape in (
        (40, 40, (204, 40)),
        (1000, 1000, (16, 512)),
        (4000, 4096, (4, 512)),
        (100, 4096, (20, 100)),
        (16_000, 16_384, (1, 512)),
        (100_000, 131_072, (1, 64)),
    ):
        assert pass_shape(missing, slots) == shape
    model = tiny(0, max_position_embeddings=4096)
    assert pass_bytes(model, 1, 64) < pass_bytes(model, 2, 64) < pass_bytes(model, 2, 128)
    most = pass_bytes(model, 4, 4096)
    assert pass_bytes(model, 64, 4096) == most


def taken(work: Callable[[], object]) -> int:
    """The most bytes of tensors that it had at once, by PyTorch's own account."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        work()
    events = watched.profiler.kineto_results.events()  # type: ignore[union-attr]
    changes = [(e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"]
    return max(itertools.accumulate(size for _, size in sorted(changes)))


@pytest.mark.parametrize("how", ["lean", "stock", "eager"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "length"), [(1, 3000), (6, 700)])
def test_a_pass_takes_what_is_told(
    tiny: Tiny, how: str, dtype: torch.dtype, rows: int, length: int
) -> None:
    model = tiny(0, layers=2, max_position_embeddings=4096, dtype=dtype)
    if how != "lean":
        model.body = None
    if how == "eager":
        model.model.set_attn_implementation("eager")
    cached = CachedModel(model, rows, length)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(5, 60, (rows, length), generator=generator).tolist()
    most = taken(lambda: cached.prefill(torch.arange(rows), prompts))
    told = pass_bytes(model, rows, length)
    assert 0.6 * told < most < 1.1 * told
