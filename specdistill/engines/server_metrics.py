"""A vLLM server's `/metrics`, in Prometheus' text format: how much it has drafted so far."""

from __future__ import annotations

import re
from collections import defaultdict
from dataclasses import dataclass

GENERATED = "vllm:generation_tokens_total"
ROUNDS = "vllm:spec_decode_num_drafts_total"
PROPOSED = "vllm:spec_decode_num_draft_tokens_total"
ACCEPTED = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
_LINE = re.compile(r"(vllm:\w+)(?:\{(.*)\})? ([0-9.e+]+)(?: \d+)?")
_POSITION = re.compile(r'(?:^|,)position="(\d+)"')


@dataclass(frozen=True)
class Counters:
    """Totals of all engines behind the server since it was started. `accepted` is by position in
    the round; a server that does not draft has none.
    """

    generated: int
    rounds: int = 0
    proposed: int = 0
    accepted: tuple[int, ...] = ()

    def since(self, before: Counters) -> Counters:
        return Counters(
            self.generated - before.generated,
            self.rounds - before.rounds,
            self.proposed - before.proposed,
            tuple(now - then for now, then in zip(self.accepted, before.accepted, strict=False)),
        )


def read_metrics(text: str) -> Counters | None:
    """None where these are no vLLM's."""
    totals: dict[str, int] = defaultdict(int)
    accepted: dict[int, int] = defaultdict(int)
    for line in text.splitlines():
        if (match := _LINE.fullmatch(line)) is None:
            continue
        name, labels, value = match[1], match[2] or "", int(float(match[3]))
        if name == ACCEPTED and (position := _POSITION.search(labels)):
            accepted[int(position[1])] += value
        else:
            totals[name] += value
    if GENERATED not in totals:
        return None
    by_position = tuple(accepted[i] for i in range(len(accepted)))
    return Counters(totals[GENERATED], totals[ROUNDS], totals[PROPOSED], by_position)
