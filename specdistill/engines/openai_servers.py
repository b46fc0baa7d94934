"""Servers that speak OpenAI's chat completions: who they are, what one is asked, and how many
questions are shared out among several.

The key comes from the environment, OPENAI_API_KEY, and goes nowhere but to the servers. Waiting
after a rate limit (Retry-After), backing off and trying again are the client's own; what it cannot
judge, an answer that is none, is asked for again here.
"""

from __future__ import annotations

import asyncio
import re
from collections import deque
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import AbstractAsyncContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar
from urllib.parse import urlsplit

from specdistill import limits
from specdistill.data.prompts import Prompt
from specdistill.decoding.sampling import Sampling
from specdistill.engines.openai_replies import KEY, NoAnswer, api_key, one_line, said_by
from specdistill.errors import InputError, ServerError

if TYPE_CHECKING:
    from openai import APIStatusError, AsyncOpenAI

CLIENT_RETRIES = 8  # about 40 s of backing off, or as often as long as the server says
SECONDS = 600.0  # an answer may take, from the question to its last byte
REPLIES = 3  # how often an answer that is none is asked for
BACKOFF = 0.5  # seconds before the second reply is asked for; doubles
REFUSALS = 16  # prompts in a row, with which the trouble is not with single ones
GO_ON = "what was answered is kept, run the same command again to go on"
UNREAD = (ValueError, TypeError, AttributeError, LookupError, RecursionError, OverflowError)
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
        if not _is_base_url(self.base_url):
            raise InputError(
                "--base-url must look like http://localhost:8000/v1: http or https, a host, a port "
                f"if there is one, in plain ASCII and without a query; got {self.public!r}"
            )
        limits.check("concurrency", self.concurrency, limits.QUESTIONS)

    @property
    def public(self) -> str:
        """The URL without what may be secret in it: user, password and query."""
        address = re.split(r"[?#]", self.base_url, maxsplit=1)[0]
        scheme, mark, rest = address.rpartition("://")
        return scheme + mark + rest.rpartition("@")[2]


def _is_base_url(url: str) -> bool:
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError:
        return False
    plain = re.fullmatch(r"[!-~]+", url) and not re.search(r"[?#]", url)
    named = re.fullmatch(r"[\w.:%-]+", host) and port != 0
    return parts.scheme in ("http", "https") and bool(plain and named)


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
                words += f" (it asks to wait {wait} s)" if wait else ""
                words = f"{server.public} fails or limits the rate: {words}"
                raise ServerError(f"{words}; {GO_ON}") from None
            except openai.APIConnectionError as error:
                raise ServerError(f"{unreachable(server, error)}; {GO_ON}") from None
            except TimeoutError:
                words = f"{server.public} sends no end of an answer"
                raise ServerError(f"{words}; {GO_ON}") from None
            # What the client does not check: JSON that is none, or of other types.
            except (NoAnswer, *UNREAD, openai.OpenAIError) as error:
                reason = said_by(error)
            tries += 1
            if tries < REPLIES:
                await asyncio.sleep(BACKOFF * 2 ** (tries - 1))
        raise Refused(f"{REPLIES} replies without an answer, the last: {reason}")


class Crew(AbstractAsyncContextManager["Crew"]):
    """Servers that are asked together, each as much at a time as it takes: work is taken as it
    comes. What a server was asked that refuses it or fails is asked of the others. One that failed,
    or refused `REFUSALS` prompts in a row, is left alone.
    """

    def __init__(self, servers: Sequence[Server], more: Mapping[str, Any] | None = None) -> None:
        """`more` are fields of every question that are not OpenAI's."""
        self.lines = [Line(server) for server in servers]
        for line in self.lines:
            line.more = more
        self.failures: dict[Line, ServerError] = {}
        self.in_a_row: dict[Line, set[str]] = {line: set() for line in self.lines}

    async def __aexit__(self, *_: object) -> None:
        for line in self.lines:
            await line.client.close()

    @property
    def left(self) -> list[Line]:
        return [line for line in self.lines if line not in self.failures]

    async def ask_all(
        self,
        questions: Mapping[str, T],
        ask: Callable[[Line, T], Awaitable[None]],
        refuse: Callable[[T, str], None],
        grace: float = 0.0,
        stopping: Callable[[int], None] = lambda under_way: None,
    ) -> None:
        """Do `ask` with each of the questions, whose names begin with a line that is their
        prompt's. What all servers that are left refuse goes to `refuse`, with the last reason.
        After an error or an interrupt no more are begun, and those under way, of which `stopping`
        is told the number, have `grace` seconds to end. Raises `ServerError` where no server is
        left, and what `ask` raises.
        """
        waiting = deque(questions)
        reasons: dict[str, dict[Line, Refused]] = {}  # of what waits, by name
        ended = False

        def give_up_what_all_refuse() -> None:
            for name in [n for n in reasons if reasons[n].keys() >= set(self.left)]:
                if name in waiting:
                    waiting.remove(name)
                    refuse(questions[name], str(list(reasons.pop(name).values())[-1]))

        def fail(line: Line, error: ServerError) -> None:
            self.failures[line] = error
            if not self.left:
                raise error
            give_up_what_all_refuse()

        async def work(line: Line) -> None:
            while not ended and line not in self.failures:
                name = next((n for n in waiting if line not in reasons.get(n, {})), None)
                if name is None:
                    return
                waiting.remove(name)
                try:
                    await ask(line, questions[name])
                    self.in_a_row[line].clear()
                except Refused as reason:
                    reasons.setdefault(name, {})[line] = reason
                    waiting.append(name)
                    give_up_what_all_refuse()
                    self.in_a_row[line].add(name.partition("\n")[0])
                    if len(self.in_a_row[line]) == REFUSALS:
                        words = f"refused {REFUSALS} prompts in a row, the last with: {reason}"
                        fail(line, ServerError(f"{line.server.public} {words}"))
                except ServerError as error:
                    waiting.appendleft(name)
                    fail(line, error)

        while waiting:
            most = min(max(line.server.concurrency for line in self.left), len(waiting))
            # By turns, so that few questions do not go to one alone.
            turns = [line for i in range(most) for line in self.left if i < line.server.concurrency]
            workers = [asyncio.create_task(work(line)) for line in turns]
            try:
                done, _ = await asyncio.wait(workers, return_when=asyncio.FIRST_EXCEPTION)
                for worker in done:
                    worker.result()
            finally:
                if under_way := sum(not worker.done() for worker in workers):
                    ended = True
                    stopping(under_way)
                    await asyncio.wait(workers, timeout=grace)
                for worker in workers:
                    worker.cancel()
                await asyncio.gather(*workers, return_exceptions=True)


def names(servers: Sequence[Server]) -> str:
    return ", ".join(server.public for server in servers)


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
                f"{prompt.named} has {', '.join(map(repr, prompt.beside_text))}, and a server is "
                "asked text alone; remove the row, or let a local target answer"
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
