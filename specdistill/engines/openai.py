"""A target behind a server that speaks OpenAI's chat completions: a black box that returns text.

The key comes from the environment, OPENAI_API_KEY, and goes nowhere but to the server. Waiting
after a rate limit (Retry-After), backing off and trying again are the client's own; what it cannot
judge, an answer that is none, is asked for again here.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from specdistill import limits
from specdistill.data.filters import NO_FILTER, Filters
from specdistill.data.prompts import Prompt, prompts_sha256
from specdistill.data.questions import answer_id, round_seed
from specdistill.data.scorers import BestOf
from specdistill.data.selection import Selection
from specdistill.data.text_store import AnswerStore, Choices, Settled, settle
from specdistill.decoding.sampling import Sampling, own_sampling, row_seed
from specdistill.engines.openai_replies import KEY, NoAnswer, api_key, one_line, read_reply, said_by
from specdistill.errors import InputError, ServerError
from specdistill.files import holding
from specdistill.progress import Progress, silent
from specdistill.provenance import versions

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

CLIENT_RETRIES = 8  # about 40 s of backing off, or as often as long as the server says
SECONDS = 600.0  # an answer may take, from the question to its last byte
REPLIES = 3  # how often an answer that is none is asked for
BACKOFF = 0.5  # seconds before the second reply is asked for; doubles
REFUSALS = 16  # in a row, with which the trouble is not with single prompts
GRACE = 10.0  # seconds an interrupt waits for answers that are under way
T = TypeVar("T")


@dataclass(frozen=True)
class Server:
    """Who is asked: a base URL such as http://localhost:8000/v1, the model's name there, and how
    many questions may be under way at once.
    """

    base_url: str
    model: str
    concurrency: int = 8

    def __post_init__(self) -> None:
        problem = _problem(self.base_url)
        if problem:
            raise InputError(
                f"--base-url must look like http://localhost:8000/v1; got {self.public!r} "
                f"({problem})"
            )
        limits.check("concurrency", self.concurrency, limits.QUESTIONS)

    @property
    def public(self) -> str:
        """The URL without what may be secret in it: user, password and query."""
        address = re.split(r"[?#]", self.base_url, maxsplit=1)[0]
        scheme, mark, rest = address.rpartition("://")
        return scheme + mark + rest.rpartition("@")[2]


def _problem(url: str) -> str | None:
    """Why it is no base URL."""
    try:
        parts = urlsplit(url)
        port = parts.port
    except ValueError as error:
        return "its port is none" if "ort" in str(error) else "its host is none"
    if re.search(r"[^!-~]", url):
        return "spaces, control characters and other letters than ASCII's have no place in it"
    if parts.scheme not in ("http", "https"):
        return "it begins with neither http:// nor https://"
    if not parts.hostname or not re.fullmatch(r"[\w.:%-]+", parts.hostname):
        return "it names no host"
    if port == 0:
        return "its port is none"
    if "?" in url or "#" in url:
        return "a base URL has no query and no fragment"
    return None


class Refused(Exception):
    """A prompt that gets no answer, and why."""


class Line:
    """A server and the client that asks it."""

    def __init__(self, server: Server) -> None:
        self.server, self.client = server, client_of(server)
        self.limit = "max_tokens"  # by which name the server knows the limit of an answer
        self.more: Mapping[str, Any] | None = None  # fields that are not OpenAI's

    async def reply(
        self, question: dict[str, Any], max_new_tokens: int, read: Callable[[Any], T]
    ) -> T:
        """What `read` makes of the reply; one of which it makes `NoAnswer` is asked for again.
        Raises `Refused` for this question alone, `ServerError` where others will fare no better.
        """
        import openai

        server, reason, tries = self.server, "", 0
        while tries < REPLIES:
            limit = self.limit
            asked = {**question, limit: max_new_tokens}
            more = self.more
            if more is not None:
                asked["extra_body"] = more
            try:
                reply = await asyncio.wait_for(
                    self.client.chat.completions.create(**asked), SECONDS * (CLIENT_RETRIES + 1)
                )
                return read(reply)
            except openai.APIStatusError as error:
                status, words = error.status_code, said_by(error)
                if refused := refusal(server, error):
                    raise refused from None
                if status == 400 and limit == "max_tokens" and "max_completion_tokens" in words:
                    # OpenAI's newer models know the limit by this name alone.
                    self.limit = "max_completion_tokens"
                    continue
                if status == 400 and more is not None and any(name in words for name in more):
                    self.more = None  # it takes OpenAI's fields alone
                    continue
                if status != 429 and status < 500:
                    raise Refused(words) from None
                wait = one_line(error.response.headers.get("retry-after", ""))
                raise ServerError(
                    f"{server.public} fails or limits the rate: {words}"
                    f"{f' (it asks to wait {wait} s)' if wait else ''}; what was answered is kept, "
                    "run the same command again to go on"
                ) from None
            except openai.APIConnectionError as error:
                raise ServerError(
                    f"{unreachable(server, error)}; what was answered is kept, run the same "
                    "command again to go on"
                ) from None
            except TimeoutError:
                raise ServerError(
                    f"{server.public} sends no end of an answer; what was answered is kept, run "
                    "the same command again to go on"
                ) from None
            # What the client does not check: JSON that is none, or of other types.
            except (NoAnswer, ValueError, TypeError, AttributeError, LookupError) as error:
                reason = said_by(error)
            except (openai.OpenAIError, RecursionError, OverflowError) as error:
                reason = said_by(error)
            tries += 1
            if tries < REPLIES:
                await asyncio.sleep(BACKOFF * 2 ** (tries - 1))
        raise Refused(f"{REPLIES} replies without an answer, the last: {reason}")


@holding("folder")
def ask(
    server: Server,
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
    """Have the server answer every prompt not yet answered in `folder`. The same call again goes on
    where an interrupted one stopped, and asks for no reply twice. Returns what is kept and, by id,
    why prompts were refused; those a later call asks again. With several samplings each prompt gets
    one of them, by its id and the seed. `filters`, in words, and `best_of` choose among replies as
    they do among a local target's answers, see `generation.generate`.

    Raises `ServerError` where the server cannot be reached, knows no such key or model, fails or
    limits the rate for longer than the client waits, or refuses everything; what was answered until
    then is kept.
    """
    if not prompts or not samplings:
        raise InputError("there are no prompts to answer, or no sampling to answer with")
    check_askable(prompts, samplings)
    selection = Selection.checked(filters, best_of, prompts, samplings)
    line = Line(server)
    store = AnswerStore(
        folder,
        {
            "target": server.model,
            "server": server.public,
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
    asking = _Asking(
        server, line, prompts, store, choices, samplings, seed, max_new_tokens, progress
    )
    try:
        asyncio.run(asking.all())
    finally:
        settled = asking.settled()
        store.keep(settled)
    if not store.replies:
        raise ServerError(
            f"{server.public} answered nothing; the last reason: "
            f"{list(asking.refused.values())[-1]}"
        )
    return settled, {id_: reason for (id_, _), reason in asking.refused.items()}


@dataclass
class _Asking:
    """One call of `ask`: what is still to be asked, and what was refused in it."""

    server: Server
    line: Line
    prompts: Sequence[Prompt]
    store: AnswerStore
    choices: Choices
    samplings: Sequence[Sampling]
    seed: int
    max_new_tokens: int
    progress: Progress
    refused: dict[tuple[str, int], str] = field(default_factory=dict)  # attempts
    refused_in_a_row: set[str] = field(default_factory=set)  # prompts
    open: set[str] = field(default_factory=set)  # prompts

    def settled(self) -> Settled:
        return settle(self.prompts, self.store.replies, self.choices, self._retries, self.refused)

    async def all(self) -> None:
        """Until nothing is missing: once, and again for what was removed."""
        asking = f"asking {self.server.public}, which may take a minute to say that nobody is there"
        async with self.line.client:
            while questions := self.settled().missing:
                self.open = {prompt.id for prompt, _ in questions}
                self._tell(asking)
                asking = ""
                await self._all_of(questions)
        self._tell(ended=True)

    async def _all_of(self, questions: Sequence[tuple[Prompt, int]]) -> None:
        """As many at a time as the server takes. After an error or an interrupt no more are begun,
        and those under way have `GRACE` seconds to end.
        """
        waiting = deque(questions)

        async def work() -> None:
            while waiting:
                await self._ask(*waiting.popleft())

        number = min(self.server.concurrency, len(waiting))
        workers = [asyncio.create_task(work()) for _ in range(number)]
        try:
            ended, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
            for worker in ended:
                worker.result()
        finally:
            waiting.clear()
            if under_way := sum(not worker.done() for worker in workers):
                self._tell(f"stopping, up to {GRACE:.0f} s for {under_way} under way")
            await asyncio.wait(workers, timeout=GRACE)
            for worker in workers:
                worker.cancel()
            await asyncio.gather(*workers, return_exceptions=True)

    async def _ask(self, prompt: Prompt, attempt: int) -> None:
        try:
            question = self._question(prompt, attempt)
            reply = await self.line.reply(
                question,
                self.max_new_tokens,
                lambda said: read_reply(said, prompt.id, attempt, "logprobs" in question),
            )
        except Refused as reason:
            self.refused[prompt.id, attempt] = str(reason)
            self.refused_in_a_row.add(prompt.id)
            self._tell()
            if len(self.refused_in_a_row) == REFUSALS:
                raise ServerError(
                    f"{self.server.public} refused {REFUSALS} prompts in a row, the last with: "
                    f"{reason}"
                ) from None
            return
        self.refused_in_a_row.clear()
        self.store.append(reply)
        replies, selection = self.store.replies[prompt.id], self.choices.selection
        attempts = selection.attempts(attempt // selection.number)
        if all(a in replies for a in attempts):  # a scorer that fails should not do so after hours
            chosen, _ = self.choices.among(prompt, [replies[a] for a in attempts])
            if chosen is not None:
                self.open.discard(prompt.id)
        self._tell()

    def _question(self, prompt: Prompt, attempt: int) -> dict[str, Any]:
        sampling = own_sampling(self.samplings, self.seed, prompt.id)
        selection = self.choices.selection
        round_, number = divmod(attempt, selection.number)
        seed = row_seed(round_seed(self.seed, round_), answer_id(prompt.id, number))
        scored = {"logprobs": True} if selection.reads_log_probability else {}
        return question(self.server.model, prompt, sampling, seed) | scored

    def _retries(self, prompt: Prompt) -> int:
        sampling = own_sampling(self.samplings, self.seed, prompt.id)
        return self.choices.selection.filters.retries_of(sampling)

    def _tell(self, detail: str = "", *, ended: bool = False) -> None:
        total, refused = len(self.prompts), len({id_ for id_, _ in self.refused})
        replies = f"{self.store.count:,} replies"
        detail = detail or (f"{replies}, {refused} refused" if refused else replies)
        done = min(total - len(self.open), total - 0.01)  # a duplicate may have to be asked again
        self.progress("ask", total if ended else done, total, detail)


def question(model: str, prompt: Prompt, sampling: Sampling, seed: int) -> dict[str, Any]:
    """What a server is asked."""
    return {
        "model": model,
        "messages": [
            {key: turn[key] for key in ("role", "content", "name") if key in turn}
            for turn in prompt.messages
        ],
        "temperature": sampling.temperature,
        "top_p": sampling.top_p,
        "seed": seed >> 32,  # 31 bits: what every server takes
    }


def check_askable(prompts: Sequence[Prompt], samplings: Sequence[Sampling]) -> None:
    """Raises `InputError` for what the protocol has no words for."""
    for prompt in prompts:
        if prompt.beside_text:
            raise InputError(
                f"prompt {prompt.id!r} has {', '.join(map(repr, prompt.beside_text))}, and a "
                "server is asked text alone; remove the row, or let a local target answer"
            )
    if any(sampling.top_k or sampling.min_p for sampling in samplings):
        raise InputError(
            "OpenAI's protocol has temperature and top-p, and no top-k or min-p: leave these out"
        )


def refusal(server: Server, error: APIStatusError) -> ServerError | None:
    """What no other question would change: the key or the model."""
    words = said_by(error)
    if error.status_code in (401, 403):
        return ServerError(
            f"{server.public} refuses the key: {words}; check the environment variable {KEY}, and "
            "--target and --base-url"
        )
    if error.status_code == 404:
        return ServerError(
            f"{server.public} does not serve {server.model!r}: {words}; check --target and "
            "--base-url"
        )
    return None


def unreachable(server: Server, error: BaseException) -> ServerError:
    return ServerError(f"cannot reach {server.public}: {said_by(error.__cause__ or error)}")


def client_of(server: Server, retries: int = CLIENT_RETRIES) -> AsyncOpenAI:
    """Raises `InputError` where the package is missing, or the key is none."""
    try:
        from openai import AsyncOpenAI
    except ImportError:
        raise InputError(
            "the engine 'openai' needs a package: pip install 'specdistill[openai]'"
        ) from None
    # Servers of one's own want no key, the client does.
    return AsyncOpenAI(base_url=server.base_url, api_key=api_key() or "none", max_retries=retries)
