"""A vLLM server that already runs, asked by token ids and streamed, and what its counters say."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from typing import Any
from uuid import uuid4

from specdistill.engines.openai_replies import said_by
from specdistill.engines.openai_servers import Server, client_of, refusal, unreachable
from specdistill.engines.server_metrics import Counters, read_metrics
from specdistill.errors import DecodingError, InputError, ServerError
from specdistill.scoring.card_rows import ModelCard

LOOKS = 50  # at the counters, until they tell of all tokens that came
PAUSE = 0.1  # seconds between two looks
TRIES = 3  # of a connection
Request = dict[str, Any]  # what `completions` takes


@dataclass(frozen=True)
class Streamed:
    """One answer, and the seconds from its request to its first and to its last token."""

    tokens: list[int]
    first: float
    last: float


class VllmServer:
    """A server, the one model of it that is asked, and its counters."""

    def __init__(self, base_url: str, target: ModelCard) -> None:
        self.server, self.target = Server(base_url, target.name), target
        self.client = client_of(self.server, retries=0)  # which would be timed, too
        self.version = ""

    @property
    def root(self) -> str:
        """Where `/metrics` and `/version` are, beside the protocol's `/v1`."""
        return self.server.base_url.rstrip("/").removesuffix("/v1")

    async def connect(self) -> Counters:
        """Raises `ServerError` where nobody is there, `InputError` for what is no vLLM or serves
        several models of which none is called as the target.
        """
        models = await self._document(f"{self.server.base_url.rstrip('/')}/models", "data")
        names = [str(model.get("id")) for model in models if isinstance(model, dict)]
        if self.server.model not in names and len(names) != 1:
            raise InputError(
                f"{self.server.public} serves {', '.join(names) or 'nothing'}, and none of it is "
                f"called {self.server.model!r}; serve the target alone, or under this name"
            )
        if self.server.model not in names:
            self.server = replace(self.server, model=names[0])
        counters = await self.counters()
        self.version = str(await self._document(f"{self.root}/version", "version"))
        return counters

    async def counters(self) -> Counters:
        counters = read_metrics(await self._text(f"{self.root}/metrics"))
        if counters is None:
            raise InputError(
                f"{self.server.public} is no vLLM server that tells its counters: its /metrics "
                "lacks vllm:generation_tokens_total; serve with vLLM, and without "
                "--disable-log-stats"
            )
        return counters

    async def answer(self, request: Request) -> Streamed:
        """Asked again, by a new clock, where an idle connection was closed at that moment."""
        import openai

        tries = 0
        while True:
            tries += 1
            try:
                return await self._streamed(request)
            except openai.APIStatusError as error:
                raise self._refusal(error) from None
            except openai.OpenAIError as error:
                if tries == TRIES or isinstance(error, openai.APITimeoutError):
                    raise unreachable(self.server, error) from None
            except ServerError:
                raise
            except Exception as error:  # what breaks off is its transport's, of whatever package
                words = said_by(error)
                raise ServerError(f"{self.server.public} sends no answer: {words}") from None

    async def _streamed(self, request: Request) -> Streamed:
        # Not from the cache of prefixes: prompts come again, and must cost the same again.
        more = {**request["extra_body"], "cache_salt": uuid4().hex}
        tokens: list[int] = []
        first = last = 0.0
        begin = time.perf_counter()
        asking = self.client.completions.with_streaming_response.create(
            model=self.server.model, stream=True, **{**request, "extra_body": more}
        )
        async with asking as response:
            async for line in response.iter_lines():
                if ids := _ids(line):
                    last = time.perf_counter() - begin
                    first = first or last
                    tokens += ids
        if not tokens:
            raise ServerError(
                f"{self.server.public} tells no token ids; score at a vLLM server that knows "
                "return_token_ids"
            )
        if max(tokens) >= self.target.vocab_size:
            raise ServerError(
                f"{self.server.public} sends the token {max(tokens)}, and {self.target.name} has 0 "
                f"to {self.target.vocab_size - 1}: it serves another model; name that by --target"
            )
        return Streamed(tokens, first, last)

    async def counted(
        self, work: Callable[[], Awaitable[list[Streamed]]]
    ) -> tuple[list[Streamed], Counters]:
        """What came of the work, and what the server counted of it. Raises `DecodingError` where
        it counted other tokens than came: others ask it at the same time.
        """
        before = await self.counters()
        answers = await work()
        came = sum(len(answer.tokens) for answer in answers)
        for _ in range(LOOKS):
            since = (await self.counters()).since(before)
            if since.generated >= came:
                break
            await asyncio.sleep(PAUSE)
        if since.generated != came:
            raise DecodingError(
                f"{self.server.public} sent {came} tokens and counts {since.generated}: others ask "
                "it at the same time, whose rounds would be taken for these; score it when it is "
                "idle"
            )
        return answers, since

    async def _document(self, url: str, name: str) -> Any:
        """That field of a JSON document."""
        try:
            return json.loads(await self._text(url))[name]
        except (ValueError, TypeError, LookupError):
            path = url.removeprefix(self.root)
            raise InputError(
                f"{self.server.public} tells no {name!r} at {path}: it is no vLLM server"
            ) from None

    async def _text(self, url: str) -> str:
        import openai

        try:
            return await self.client.with_options(max_retries=TRIES - 1).get(url, cast_to=str)
        except openai.APIStatusError as error:
            if url.endswith(("/metrics", "/version")) and error.status_code == 404:
                raise InputError(
                    f"{self.server.public} has no {url.rpartition('/')[2]}: it is no vLLM server, "
                    "or a proxy hides it; name the server itself"
                ) from None
            raise self._refusal(error) from None
        except openai.OpenAIError as error:
            raise unreachable(self.server, error) from None

    def _refusal(self, error: Any) -> ServerError:
        return refusal(self.server, error) or ServerError(
            f"{self.server.public} refuses: {said_by(error)}"
        )


def _ids(line: str) -> list[int]:
    """The token ids of one line of the stream. Raises `ValueError` for an error that it tells."""
    if not line.startswith("data: {"):
        return []
    document = json.loads(line.removeprefix("data: "))
    if "error" in document:
        raise ValueError(document["error"])
    return [int(id_) for choice in document["choices"] for id_ in choice.get("token_ids") or ()]
