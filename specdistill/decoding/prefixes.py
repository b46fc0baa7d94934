"""Which row of a batch holds the longest beginning of a text, in time linear in its tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

STRIDE = 64  # tokens compared at once


@dataclass(eq=False, slots=True)
class _Node:
    """The tokens `text[start:stop]` after the parent's. `rows` are those whose text ends here."""

    text: Sequence[int]
    start: int
    stop: int
    parent: _Node | None
    children: dict[int, _Node] = field(default_factory=dict)
    rows: set[int] = field(default_factory=set)


class PrefixTree:
    """The texts of rows as a radix tree: each token is compared once on the way down, whatever the
    number of rows.
    """

    def __init__(self) -> None:
        self.root = _Node((), 0, 0, None)
        self.ends: dict[int, _Node] = {}

    def longest(self, text: Sequence[int]) -> tuple[int, int]:
        """A row that holds the longest beginning of a text, and how long that is; (0, 0) where no
        row holds any of it.
        """
        node, length = self._follow(text)
        if length == 0:
            return 0, 0
        while not node.rows:
            node = next(iter(node.children.values()))
        return next(iter(node.rows)), length

    def put(self, row: int, text: Sequence[int]) -> None:
        """The row holds this text, and no longer what it held."""
        if row in self.ends:
            self._remove(row)
        node, length = self._follow(text)
        if length < node.stop:
            node = self._split(node, length)
        if length < len(text):
            leaf = _Node(text, length, len(text), node)
            node.children[text[length]] = leaf
            node = leaf
        node.rows.add(row)
        self.ends[row] = node

    def keep(self, rows: Sequence[int]) -> None:
        """Forget all rows but these, renumbered in this order."""
        for row in self.ends.keys() - set(rows):
            self._remove(row)
        ends = [(new, self.ends[row]) for new, row in enumerate(rows) if row in self.ends]
        for node in self.ends.values():
            node.rows.clear()
        for new, node in ends:
            node.rows.add(new)
        self.ends = dict(ends)

    def _follow(self, text: Sequence[int]) -> tuple[_Node, int]:
        """The last node that a text reaches into, and how many tokens of the text lead there."""
        node, length = self.root, 0
        while length == node.stop and length < len(text):
            child = node.children.get(text[length])
            if child is None:
                break
            node = child
            length = agreement(child.text, text, child.start, child.stop)
        return node, length

    def _split(self, node: _Node, at: int) -> _Node:
        """A new node between a node and its parent that ends after `at` tokens."""
        assert node.parent is not None  # the root has no tokens
        middle = _Node(node.text, node.start, at, node.parent, {node.text[at]: node})
        node.parent.children[node.text[node.start]] = middle
        node.start, node.parent = at, middle
        return middle

    def _remove(self, row: int) -> None:
        node = self.ends.pop(row)
        node.rows.remove(row)
        while node.parent is not None and not node.rows and not node.children:
            del node.parent.children[node.text[node.start]]
            node = node.parent


def agreement(a: Sequence[int], b: Sequence[int], start: int, stop: int) -> int:
    """The first place from `start` where two texts differ, at most `stop` or the end of one."""
    stop = min(stop, len(a), len(b))
    while start < stop and a[start : start + STRIDE] == b[start : start + STRIDE]:
        start += STRIDE
    while start < stop and a[start] == b[start]:
        start += 1
    return min(start, stop)


def common_prefix(texts: Sequence[Sequence[int]]) -> int:
    """How many tokens all texts begin with; 0 for a single text, which shares with nobody."""
    if len(texts) == 1:
        return 0
    return min(agreement(texts[0], text, 0, len(texts[0])) for text in texts[1:])
