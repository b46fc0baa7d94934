"""Targets behind servers that speak OpenAI's chat completions: black boxes that return text."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from specdistill.data.filters import NO_FILTER, Filters
from specdistill.data.prompts import Prompt, prompts_sha256
from specdistill.data.questions import answer_id, round_seed
from specdistill.data.scorers import BestOf
from specdistill.data.selection import Selection
from specdistill.data.text_store import AnswerStore, Choices, Settled, settle
from specdistill.decoding.sampling import Sampling, own_sampling, row_seed
from specdistill.engines.openai_replies import read_reply
from specdistill.engines.openai_servers import Crew, Line, Server, check_askable, names, question
from specdistill.errors import InputError, ServerError
from specdistill.files import holding
from specdistill.progress import Progress, silent
from specdistill.provenance import versions

GRACE = 10.0  # seconds an interrupt waits for answers that are under way


@holding("folder")
def ask(
    servers: Sequence[Server],
    prompts: Sequence[Prompt],
    folder: Path,
    *,
    max_new_tokens: int,
    samplings: Sequence[Sampling],
    seed: int = 0,
    filters: Filters = NO_FILTER,
    best_of: BestOf | None = None,
    progress: Progress = silent,
) -> tuple[Settled, dict[str, str]]:
    """Have the servers answer every prompt not yet answered in `folder`, see `Crew`. The same call
    again goes on where an interrupted one stopped, and asks for no reply twice. Returns what is
    kept and, by id, why prompts were refused; those a later call asks again. With several samplings
    each prompt gets one of them, by its id and the seed. `filters`, in words, and `best_of` choose
    among replies as they do among a local target's answers, see `generation.generate`.

    Raises `ServerError` where no server can be reached, knows the key and the model, or works
    without failures and limits for longer than the client waits, or all is refused; what was
    answered until then is kept.
    """
    if not prompts or not samplings:
        raise InputError("there are no prompts to answer, or no sampling to answer with")
    check_askable(prompts, samplings)
    selection = Selection.checked(filters, best_of, prompts, samplings)
    crew = Crew(servers)
    store = AnswerStore(
        folder,
        {
            "target": servers[0].model,
            "server": names(servers),
            "prompts_sha256": prompts_sha256(prompts),
            "settings": {
                "max_new_tokens": max_new_tokens,
                "seed": seed,
                "samplings": [asdict(sampling) for sampling in samplings],
                **selection.settings,
            },
            "versions": versions(),
        },
    )
    choices = Choices(selection)
    asking = _Asking(crew, prompts, store, choices, samplings, seed, max_new_tokens, progress)
    try:
        asyncio.run(asking.all())
    finally:
        settled = asking.settled()
        store.keep(settled)
    if not store.replies:
        raise ServerError(
            f"{names(servers)} answered nothing; the last reason: "
            f"{list(asking.refused.values())[-1]}"
        )
    return settled, {id_: reason for (id_, _), reason in asking.refused.items()}


@dataclass
class _Asking:
    """One call of `ask`: what is still to be asked, and what was refused in it."""

    crew: Crew
    prompts: Sequence[Prompt]
    store: AnswerStore
    choices: Choices
    samplings: Sequence[Sampling]
    seed: int
    max_new_tokens: int
    progress: Progress
    refused: dict[tuple[str, int], str] = field(default_factory=dict)  # attempts
    open: set[str] = field(default_factory=set)  # prompts

    def settled(self) -> Settled:
        return settle(self.prompts, self.store.replies, self.choices, self._retries, self.refused)

    async def all(self) -> None:
        """Until nothing is missing: once, and again for what was removed."""
        asked = names([line.server for line in self.crew.lines])
        asking = f"asking {asked}, which may take a minute to say that nobody is there"

        def stopping(under_way: int) -> None:
            self._tell(f"stopping, up to {GRACE:.0f} s for {under_way} under way")

        async with self.crew:
            while questions := self.settled().missing:
                self.open = {prompt.id for prompt, _ in questions}
                self._tell(asking)
                asking = ""
                by_name = {answer_id(p.id, attempt): (p, attempt) for p, attempt in questions}
                await self.crew.ask_all(by_name, self._ask, self._refuse, GRACE, stopping)
        self._tell(ended=True)

    def _refuse(self, asked: tuple[Prompt, int], reason: str) -> None:
        prompt, attempt = asked
        self.refused[prompt.id, attempt] = reason
        self._tell()

    async def _ask(self, line: Line, asked: tuple[Prompt, int]) -> None:
        prompt, attempt = asked
        question = self._question(line, prompt, attempt)
        reply = await line.reply(
            question,
            self.max_new_tokens,
            lambda reply: read_reply(reply, prompt.id, attempt, "logprobs" in question),
        )
        self.store.append(reply)
        replies, selection = self.store.replies[prompt.id], self.choices.selection
        attempts = selection.attempts(attempt // selection.number)
        if all(a in replies for a in attempts):  # a scorer that fails should not do so after hours
            chosen, _ = self.choices.among(prompt, [replies[a] for a in attempts])
            if chosen is not None:
                self.open.discard(prompt.id)
        self._tell()

    def _question(self, line: Line, prompt: Prompt, attempt: int) -> dict[str, Any]:
        sampling = own_sampling(self.samplings, self.seed, prompt.id)
        selection = self.choices.selection
        round_, number = divmod(attempt, selection.number)
        seed = row_seed(round_seed(self.seed, round_), answer_id(prompt.id, number))
        scored = {"logprobs": True} if selection.reads_log_probability else {}
        return question(line.server.model, prompt, sampling, seed) | scored

    def _retries(self, prompt: Prompt) -> int:
        sampling = own_sampling(self.samplings, self.seed, prompt.id)
        return self.choices.selection.filters.retries_of(sampling)

    def _tell(self, detail: str = "", *, ended: bool = False) -> None:
        total, refused = len(self.prompts), len({id_ for id_, _ in self.refused})
        replies = f"{self.store.count:,} replies"
        detail = detail or (f"{replies}, {refused} refused" if refused else replies)
        done = min(total - len(self.open), total - 0.01)  # a duplicate may have to be asked again
        self.progress("ask", total if ended else done, total, detail)
