"""A vLLM server that already runs, with its draft, scored as its users meet it.

Prompts go out as token ids and come back as such, streamed. What the draft did is told by the
server's `/metrics` before and after. One server tells no speedup: vLLM cannot leave the draft out
of single requests. A second one, of the target alone, takes turns with it, prompt by prompt.
"""

from __future__ import annotations

import asyncio
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from urllib.parse import urlsplit

from specdistill.data.chat import EncodedPrompt
from specdistill.decoding.sampling import row_seed
from specdistill.engines.base import (
    WARM_UP_TOKENS,
    Ask,
    BySetting,
    Measured,
    counts_in_sum,
    scorecard,
    take_turns,
)
from specdistill.engines.server_metrics import Counters
from specdistill.engines.vllm_pair import Pair
from specdistill.engines.vllm_server import Request, Streamed, VllmServer
from specdistill.errors import InputError
from specdistill.progress import Progress, silent
from specdistill.scoring.choice import Setting
from specdistill.scoring.load import Load, Run, load_rows, without_plain
from specdistill.scoring.rows import Counts
from specdistill.scoring.scorecard import Scorecard


def score(
    base_url: str,
    plain_base_url: str | None,
    pair: Pair,
    prompts: Sequence[EncodedPrompt],
    *,
    temperature: Sequence[float],
    max_new_tokens: int,
    seed: int = 0,
    concurrency: Sequence[int] = (),
    progress: Progress = silent,
) -> Scorecard:
    """Have a server answer every prompt, one after the other, then all of them by so many at a time
    as `concurrency` says. γ and the draft are the server's; with the server of the target alone at
    `plain_base_url` each prompt is decoded there, too, in turns, else the card tells no speedup.

    Raises `ServerError` for a server that cannot be reached or refuses, `InputError` for one that
    is no vLLM, does not draft, or drafts where it should not, `DecodingError` where its counters do
    not tell enough.
    """
    with asyncio.Runner() as runner, ExitStack() as stack:

        def connected(url: str) -> tuple[VllmServer, Counters]:
            server = VllmServer(url, pair.target)
            stack.callback(lambda: runner.run(server.client.close()))
            return server, runner.run(server.connect())

        drafting, counters = connected(base_url)
        num = len(counters.accepted)
        if not num:
            raise InputError(
                f"{drafting.server.public} does not draft: its /metrics have no acceptance by "
                "position; serve with --speculative-config"
            )
        servers = {num: drafting}
        if plain_base_url is not None:
            servers[0] = _plain(*connected(plain_base_url), drafting)

        def ask(setting: Setting, prompt: EncodedPrompt, count: int) -> Counts:
            server, asked = servers[setting[1]], _request(setting[0], prompt, count, pair, seed)
            answers, since = runner.run(server.counted(lambda: _answers(server, [asked], 1)))
            return _counts(setting[1], prompt.id, answers[0], since)

        if 0 in servers:
            measured = take_turns(ask, prompts, temperature, [num], max_new_tokens, progress)
        else:
            measured = _one_after_the_other(
                ask, prompts, temperature, num, max_new_tokens, progress
            )
        requests = {
            t: [_request(t, prompt, max_new_tokens, pair, seed) for prompt in prompts]
            for t in dict.fromkeys(temperature)
        }
        load = _under_load(
            lambda num, asked, most: runner.run(_loaded(servers[num], asked, most)),
            num,
            0 in servers,
            requests,
            concurrency,
            progress,
        )
    ties, unexplained = pair.explained(prompts, measured)
    card = scorecard(
        pair.target,
        pair.draft,
        _facts(pair, servers) | unexplained,
        prompts,
        measured,
        ties,
        seed,
        pair.proposer.drafting,
    )
    return replace(card, load=load)


def _plain(server: VllmServer, counters: Counters, drafting: VllmServer) -> VllmServer:
    """Raises `InputError` for a server that plain decoding cannot be measured at."""
    if counters.accepted:
        raise InputError(
            f"{server.server.public} drafts, too, and plain decoding is to be measured there; "
            "serve the target without --speculative-config"
        )
    if server.version != drafting.version:
        raise InputError(
            f"vLLM {server.version} at {server.server.public} and {drafting.version} at "
            f"{drafting.server.public} cannot be compared; serve both with one version"
        )
    return server


def _facts(pair: Pair, servers: dict[int, VllmServer]) -> dict[str, Any]:
    """The provenance: what a server does not tell (device, threads, dtype) is left out."""
    drafting = next(server for num, server in servers.items() if num)
    facts = pair.facts | {
        "engine": "vllm",
        "device": f"a server at {urlsplit(drafting.server.base_url).hostname}",
        "versions": {
            "specdistill": pair.facts["versions"].get("specdistill"),
            "vllm": drafting.version,
        },
        "servers": [server.server.public for server in servers.values()],
        "turns": "prompt by prompt, at a server each",
    }
    facts.pop("threads", None)
    return facts


def _request(
    temperature: float, prompt: EncodedPrompt, count: int, pair: Pair, seed: int
) -> Request:
    """Whatever the checkpoint's generation config says, which a server heeds."""
    return {
        "prompt": prompt.tokens,
        "temperature": temperature,
        "max_tokens": count,
        "seed": row_seed(seed, prompt.id) % 2**31,
        "top_p": 1.0,
        "extra_body": {
            "top_k": 0,
            "min_p": 0.0,
            "repetition_penalty": 1.0,
            "stop_token_ids": pair.eos_ids,
            "return_token_ids": True,
        },
    }


async def _answers(server: VllmServer, requests: Sequence[Request], most: int) -> list[Streamed]:
    """Up to `most` at a time; in the order in which they end."""
    waiting, answers = deque(requests), list[Streamed]()

    async def work() -> None:
        while waiting:
            answers.append(await server.answer(waiting.popleft()))

    await asyncio.gather(*(work() for _ in range(min(most, len(requests)))))
    return answers


def _counts(num: int, prompt_id: str, answer: Streamed, since: Counters) -> Counts:
    if not num:
        return Counts(answer.tokens, answer.last, len(answer.tokens), [], [], [])
    counts = counts_in_sum(prompt_id, num, since.rounds, since.proposed, since.accepted)
    return replace(counts, tokens=answer.tokens, seconds=answer.last)


def _one_after_the_other(
    ask: Ask,
    prompts: Sequence[EncodedPrompt],
    temperatures: Sequence[float],
    num: int,
    max_new_tokens: int,
    progress: Progress,
) -> Measured:
    """With the draft alone, after a short run that does not count."""
    settings = [(t, num) for t in dict.fromkeys(temperatures)]
    runs: BySetting = {setting: [] for setting in settings}
    for setting in settings:
        ask(setting, prompts[0], WARM_UP_TOKENS)
    for done, prompt in enumerate(prompts):
        progress("score", done, len(prompts))
        for setting in settings:
            runs[setting].append(ask(setting, prompt, max_new_tokens))
    progress("score", len(prompts), len(prompts))
    return Measured(runs, None, 0.0, None)


def _under_load(
    run: Callable[[int, Sequence[Request], int], Run],
    num: int,
    plainly: bool,
    requests: Mapping[float, Sequence[Request]],
    concurrency: Sequence[int],
    progress: Progress,
) -> Load:
    """Requests by temperature, so many at a time; plainly before and after, where that can be."""
    load = Load()
    every = [(t, most) for t in requests for most in concurrency]
    for done, (t, most) in enumerate(every):
        progress("load", done, len(every), f"{most} at a time, T = {t:g}")
        if not plainly:
            load.drafted.append(without_plain(t, most, num, run(num, requests[t], most)))
            continue
        before, drafted, after = (run(g, requests[t], most) for g in (0, num, 0))
        plain, rows = load_rows(t, most, [before, after], {num: drafted})
        load.plain.append(plain)
        load.drafted.extend(rows)
    progress("load", len(every), len(every))
    return load


async def _loaded(server: VllmServer, requests: Sequence[Request], most: int) -> Run:
    seconds = 0.0

    async def work() -> list[Streamed]:
        nonlocal seconds
        begin = time.perf_counter()
        answers = await _answers(server, requests, most)
        seconds = time.perf_counter() - begin
        return answers

    answers, since = await server.counted(work)
    rounds = max(since.rounds, 1)
    return Run(
        seconds,
        [len(answer.tokens) for answer in answers],
        [answer.first for answer in answers],
        [answer.last for answer in answers],
        [accepted / rounds for accepted in since.accepted],
    )
