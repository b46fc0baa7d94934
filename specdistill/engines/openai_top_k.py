"""A target behind servers that tell its most probable tokens: answers with a top-k signal.

OpenAI's protocol names tokens by their text. vLLM names them by id where it is asked to, and tells
the prompt's, too; else the bytes of a token must be those of one token alone.
"""

from __future__ import annotations

import asyncio
import queue
import re
import threading
from collections.abc import Iterable, Iterator, Sequence
from contextlib import suppress
from functools import cached_property
from math import exp, isfinite
from typing import Any

import torch
from transformers.convert_slow_tokenizer import bytes_to_unicode

from specdistill.data.prompts import Prompt
from specdistill.decoding import Request, Round, RowRound, SpeculativeDecoder
from specdistill.decoding.sampling import row_seed
from specdistill.engines.openai_replies import NoAnswer
from specdistill.engines.openai_servers import Crew, Line, Server, question
from specdistill.models import LanguageModel
from specdistill_kernels import TargetTopK

# Else vLLM samples by the checkpoint's generation config in what a request leaves out.
SAMPLING = {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}
VLLM = {"return_tokens_as_token_ids": True, "return_token_ids": True, **SAMPLING}
LEAST_TAIL = 1e-7  # what float32 leaves of 1 minus a sum
ROUNDING = 1e-3  # by which a sum of probabilities may exceed 1


class Tokens:
    """The target's tokens by what a server calls them."""

    def __init__(self, target: LanguageModel) -> None:
        self.name, self.size = target.name, target.vocab_size
        self.tokenizer = target.tokenizer

    def id_of(self, entry: Any) -> int:
        """Raises `NoAnswer` for a name that is none, or that of several tokens."""
        name = entry.token
        if match := re.fullmatch(r"token_id:(\d{1,18})", name):
            id_ = int(match[1])
            if id_ >= self.size:
                raise NoAnswer(f"token id {id_}, and {self.name} has 0 to {self.size - 1}")
            return id_
        spelt = getattr(entry, "bytes", None)
        id_ = self.by_bytes.get(bytes(spelt) if spelt else name.encode(), -1)
        if id_ < 0:
            raise NoAnswer(f"the token {name!r}, which is no one token of {self.name}'s tokenizer")
        return id_

    @cached_property
    def by_bytes(self) -> dict[bytes, int]:
        """Tokens whose bytes no other has."""
        vocab = self.tokenizer.get_vocab()
        known = {letter: byte for byte, letter in bytes_to_unicode().items()}
        by_byte = any(piece.startswith("Ġ") for piece in vocab)
        special = set(self.tokenizer.all_special_tokens)
        ids: dict[bytes, list[int]] = {}
        for piece, id_ in vocab.items():
            if by_byte and piece not in special and all(letter in known for letter in piece):
                spelt = bytes(known[letter] for letter in piece)
            elif match := re.fullmatch(r"<0x([0-9A-F]{2})>", piece):
                spelt = bytes.fromhex(match[1])
            else:
                spelt = piece.replace("▁", " ").encode()
            ids.setdefault(spelt, []).append(id_)
        return {spelt: several[0] for spelt, several in ids.items() if len(several) == 1}


def read_top_k(reply: Any, tokens: Tokens, request: Request, k: int) -> RowRound:
    """The answer of a reply, as one row. vLLM tells the sampled token in the place of the last
    where it is not among the most probable; its probability and the tail's are exact then, too.
    Raises `NoAnswer` for a reply that does not tell `k` tokens at each place, or whose prompt has
    other tokens than the request.
    """
    choice = reply.choices[0]
    prompt = getattr(reply, "prompt_token_ids", None)
    usage = getattr(reply, "usage", None)
    count = len(prompt) if prompt is not None else getattr(usage, "prompt_tokens", None)
    if count not in (None, 0, len(request.tokens)) or prompt not in (None, list(request.tokens)):
        raise NoAnswer(
            f"the server makes {count} tokens of the prompt, and the chat template of "
            f"{tokens.name} {len(request.tokens)}: they must be the same"
        )
    entries = getattr(getattr(choice, "logprobs", None), "content", None)
    if not isinstance(entries, list) or not entries:
        raise NoAnswer("no log-probabilities; serve with them, or ask without --signal")
    ids = [tokens.id_of(entry) for entry in entries]
    answered = getattr(choice, "token_ids", None)
    if answered is not None and list(answered)[: len(ids)] != ids:
        raise NoAnswer("the tokens of the log-probabilities are not those of the answer")
    tops = [_top(entry.top_logprobs, tokens, k) for entry in entries]
    log_prob = sum(entry.logprob for entry in entries)
    if not isfinite(log_prob):
        raise NoAnswer("a log-probability that is no number")
    top_ids, log_probs = (torch.tensor([top[i] for top in tops]) for i in range(2))
    tail = [max(1 - sum(map(exp, top[1])), LEAST_TAIL) for top in tops]
    top = TargetTopK(top_ids, log_probs, torch.tensor(tail).log())
    row = RowRound(request.id, ids, 0, 0, 0, finished=True, top=top, log_prob=log_prob)
    row.alpha_cost = sum(tail)  # no more than that, and nobody tells how much
    return row


def _top(entries: Any, tokens: Tokens, k: int) -> tuple[list[int], list[float]]:
    """The k most probable of the tokens that a server names, in order."""
    values = [(float(entry.logprob), tokens.id_of(entry)) for entry in entries or ()]
    if any(not value <= ROUNDING for value, _ in values):
        raise NoAnswer("a log-probability that is none")
    values = sorted(values, reverse=True)[:k]
    if len({id_ for _, id_ in values}) < k:
        raise NoAnswer(
            f"{len(values)} of the {k} most probable tokens that were asked for; ask for as many "
            "as the server tells, such as --signal top-k:5, or serve with a higher cap (vLLM: "
            "--max-logprobs)"
        )
    if sum(exp(value) for value, _ in values) > 1 + ROUNDING:
        raise NoAnswer("log-probabilities whose probabilities add up to more than 1")
    return [id_ for _, id_ in values], [value for value, _ in values]


class TopKAnswers:
    """Answers of servers in the shape of `SpeculativeDecoder.stream`, each as one round. Work is
    taken as it comes; what a server was asked that fails, or refuses it, is asked of the others.
    """

    def __init__(
        self,
        servers: Sequence[Server],
        target: LanguageModel,
        prompts: Sequence[Prompt],
        k: int,
        refused: dict[str, str],
    ) -> None:
        """Which prompts are `refused`, and why, is written there."""
        self.servers, self.target, self.k = servers, target, k
        self.prompts = {prompt.id: prompt for prompt in prompts}
        self.tokens = Tokens(target)
        self.refused = refused

    @property
    def facts(self) -> dict[str, Any]:
        return {"name": "openai", "servers": [server.public for server in self.servers]}

    def stream(self, requests: Iterable[Request]) -> Iterator[Round]:
        """A round without rows first. Raises `InputError` as `SpeculativeDecoder.stream`, and
        `ServerError` where no server answers any more, or all is refused.
        """
        requests = list(requests)
        SpeculativeDecoder(self.target).check(requests)
        heard: queue.Queue[RowRound | BaseException | None] = queue.Queue()
        loop = asyncio.new_event_loop()
        task = loop.create_task(self._all(requests, heard))

        def work() -> None:
            try:
                loop.run_until_complete(task)
                heard.put(None)
            except BaseException as error:
                heard.put(error)
            finally:
                loop.close()

        thread = threading.Thread(target=work, daemon=True)
        thread.start()
        try:
            yield Round([], {}, 0)
            while (row := heard.get()) is not None:
                if isinstance(row, BaseException):
                    raise row
                yield Round([row], {}, 0)
        finally:
            with suppress(RuntimeError):  # where the loop has ended
                loop.call_soon_threadsafe(task.cancel)
            thread.join()

    async def _all(self, requests: Sequence[Request], heard: queue.Queue[Any]) -> None:
        """Until nothing waits, or no server is left."""

        async def ask(line: Line, request: Request) -> None:
            heard.put(await self._answer(line, request))

        def refuse(request: Request, reason: str) -> None:
            self.refused[request.id.partition("\n")[0]] = reason

        async with Crew(self.servers, VLLM) as crew:
            await crew.ask_all({r.id: r for r in requests}, ask, refuse)

    async def _answer(self, line: Line, request: Request) -> RowRound:
        prompt = self.prompts[request.id.partition("\n")[0]]
        seed = row_seed(request.seed, request.id)
        asked = question(line.server.model, prompt, request.sampling, seed)
        asked |= {"logprobs": True, "top_logprobs": self.k}
        return await line.reply(
            asked,
            request.max_new_tokens,
            lambda reply: read_top_k(reply, self.tokens, request, self.k),
        )
