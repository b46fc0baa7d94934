"""A target behind a server: what is asked of it, what a server that misbehaves leads to, and a real
one.
"""

import asyncio
import json
import math
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.parse import quote
from urllib.request import urlopen

import pytest

pytest.importorskip("openai", reason="the extra 'openai' is not installed")

from servers import Reply, completion, failure, ok, serving
from test_cli import run

from specdistill import models
from specdistill.data.chat import encode_prompt
from specdistill.data.filters import Filters
from specdistill.data.prompts import Prompt, load_prompts
from specdistill.data.scorers import BestOf
from specdistill.data.text_store import ANSWERS, REPLIES, read_answers
from specdistill.data.token_store import MANIFEST
from specdistill.decoding import GREEDY, Sampling, SpeculativeDecoder
from specdistill.engines import openai, openai_servers
from specdistill.engines.openai_servers import Crew, Line, Server
from specdistill.errors import InputError, ServerError, StorageError

KEY = "sk-this-must-not-be-seen"
PROMPTS = [
    Prompt(f"p{i}", ({"role": "user", "content": f"question {i}"},), "odd" if i % 2 else None)
    for i in range(12)
]


@pytest.fixture(autouse=True)
def in_haste(monkeypatch: pytest.MonkeyPatch) -> None:
    """Short pauses, no proxies, and a key."""
    from openai import _base_client

    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    monkeypatch.setattr(openai_servers, "BACKOFF", 0.01)
    monkeypatch.setattr(openai, "GRACE", 1.0)
    monkeypatch.setattr(_base_client, "INITIAL_RETRY_DELAY", 0.01)
    monkeypatch.setattr(_base_client, "MAX_RETRY_DELAY", 0.02)


@pytest.fixture
def interruptible() -> Iterator[None]:
    """As a shell's background jobs are not."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


def echo(body: dict[str, Any], before: int) -> Reply:
    return completion(f"answer to {body['messages'][-1]['content']}")


def ask(url: str, folder: Path, prompts: list[Prompt] = PROMPTS, **changes: Any) -> Any:
    """Of one server, or of several whose addresses are apart by a space."""
    concurrency = changes.pop("concurrency", 4)
    servers = [Server(each, "big", concurrency) for each in url.split(" ")]
    settings = {"max_new_tokens": 32, "samplings": [GREEDY], **changes}
    return openai.ask(servers, prompts, folder, **settings)


def texts(folder: Path) -> dict[str, str]:
    return {a.prompt.id: a.prompt.response or "" for a in read_answers(folder)}


EVERYTHING = {p.id: f"answer to question {p.id[1:]}" for p in PROMPTS}


def test_every_prompt_is_asked_once_and_answered(tmp_path: Path) -> None:
    with serving(echo) as (url, fake):
        settled, refused = ask(url, tmp_path / "data")
        assert refused == {}
        assert [a.prompt.id for a in settled.answers] == list(EVERYTHING)
        assert settled.counts == {"removed": {}, "regenerated": 0, "dropped": 0}
        assert texts(tmp_path / "data") == EVERYTHING
        assert sorted(fake.asked) == sorted(f"question {i}" for i in range(12))
        ask(url, tmp_path / "data")
        assert len(fake.asked) == 12, "asked twice"
    assert {a.prompt.id: a.prompt.category for a in read_answers(tmp_path / "data")} == {
        p.id: p.category for p in PROMPTS
    }
    again = load_prompts(str(tmp_path / "data" / ANSWERS))
    assert {p.id: p.response for p in again} == EVERYTHING, "what any reader of prompts reads"


def test_what_is_asked(tmp_path: Path) -> None:
    samplings = [Sampling(0.7, top_p=0.9), GREEDY]
    with serving(echo) as (url, fake):
        ask(url, tmp_path / "a", samplings=samplings, seed=3)
        ask(url, tmp_path / "b", samplings=samplings, seed=3)
        ask(url, tmp_path / "c", samplings=samplings, seed=4)
    first, second, third = (
        {r["messages"][-1]["content"]: r for r in fake.requests[i : i + 12]} for i in (0, 12, 24)
    )
    assert first == second
    assert first != third
    assert len({r["seed"] for r in first.values()}) == 12
    assert {(r["temperature"], r["top_p"]) for r in first.values()} == {(0.7, 0.9), (0.0, 1.0)}
    for request in first.values():
        assert request["path"] == "/v1/chat/completions"
        assert (request["model"], request["max_tokens"]) == ("big", 32)
        assert request["messages"][0]["role"] == "user"
        assert 0 <= request["seed"] < 2**31
    assert {h["authorization"] for h in fake.headers} == {f"Bearer {KEY}"}


def test_a_model_that_wants_the_limit_by_another_name(tmp_path: Path) -> None:
    def newer(body: dict[str, Any], before: int) -> Reply:
        if "max_tokens" in body:
            return failure(400, "Unsupported parameter: 'max_tokens'. Use 'max_completion_tokens'.")
        assert body["max_completion_tokens"] == 32
        return echo(body, before)

    with serving(newer) as (url, fake):
        ask(url, tmp_path / "data", concurrency=1)
    assert texts(tmp_path / "data") == EVERYTHING
    assert len(fake.requests) == len(PROMPTS) + 1, "learnt once"


@pytest.mark.parametrize("most", [1, 3])
def test_no_more_at_once_than_allowed(tmp_path: Path, most: int) -> None:
    def slow(body: dict[str, Any], before: int) -> Reply:
        time.sleep(0.05)
        return echo(body, before)

    with serving(slow) as (url, fake):
        ask(url, tmp_path / "data", concurrency=most)
        assert fake.most_at_once == most


# A server that misbehaves for a while


TRANSIENT: dict[str, Callable[[], Reply | None]] = {
    "rate limit": lambda: failure(429, **{"Retry-After": "0.05"}),
    "internal error": lambda: failure(500),
    "overloaded": lambda: (503, {"Content-Type": "text/html"}, b"<h1>busy</h1>"),
    "dropped connection": lambda: None,
    "truncated body": lambda: (200, {"Content-Length": "999"}, b'{"choices": [{"mess'),
    "half of a JSON": lambda: (200, {}, b'{"choices": [{"mess'),
    "no JSON": lambda: (200, {}, b"<html>hello</html>"),
    "no UTF-8": lambda: (200, {}, b'{"choices": "\xff"}'),
    "a page": lambda: (200, {"Content-Type": "text/html"}, b"<html>hello</html>"),
    "empty body": lambda: (200, {}, b""),
    "empty choices": lambda: ok({"choices": []}),
    "no choices": lambda: ok({"object": "chat.completion"}),
    "null choices": lambda: ok({"choices": None}),
    "no message": lambda: ok({"choices": [{"finish_reason": "stop"}]}),
    "no text": lambda: completion(None),
    "text of another type": lambda: completion(["a", "b"]),
    "half a surrogate pair": lambda: completion("\ud83d"),
    "a list": lambda: ok([1]),
    "null": lambda: ok(None),
    "a number": lambda: ok(7),
    "text": lambda: ok("text"),
    "a list of lists": lambda: ok([[]]),
    "choices by name": lambda: ok({"choices": {}}),
    "a choice that is a number": lambda: ok({"choices": [3]}),
    "a choice that is a list": lambda: ok({"choices": [[]]}),
    "a message that is a list": lambda: ok({"choices": [{"message": []}]}),
    "reasoning of another type": lambda: completion("a", reasoning_content={"a": 1}),
}


@pytest.mark.parametrize("kind", TRANSIENT)
def test_trouble_that_passes_is_outlasted(tmp_path: Path, kind: str) -> None:
    def reply(body: dict[str, Any], before: int) -> Reply | None:
        return TRANSIENT[kind]() if before < 2 else echo(body, before)

    with serving(reply) as (url, fake):
        _, refused = ask(url, tmp_path / "data", PROMPTS[:3])
        assert refused == {}
        assert len(fake.asked) == 9
    assert texts(tmp_path / "data") == {p.id: EVERYTHING[p.id] for p in PROMPTS[:3]}


def test_retry_after_is_waited_for(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        return failure(429, **{"Retry-After": "0.4"}) if before == 0 else echo(body, before)

    with serving(reply) as (url, fake):
        ask(url, tmp_path / "data", PROMPTS[:1])
        assert fake.times[1] - fake.times[0] >= 0.4


def test_a_rate_limit_that_lasts_keeps_what_was_answered_and_is_gone_on_from(
    tmp_path: Path,
) -> None:
    limited = True

    def reply(body: dict[str, Any], before: int) -> Reply:
        number = int(body["messages"][-1]["content"].split()[1])
        return failure(429, **{"Retry-After": "3600"}) if limited and number >= 6 else echo(body, 0)

    with serving(reply) as (url, fake):
        with pytest.raises(ServerError, match=r"429.*wait 3600 s.*kept, run the same command"):
            ask(url, tmp_path / "data", concurrency=1)
        assert sorted(texts(tmp_path / "data")) == sorted(f"p{i}" for i in range(6))
        assert fake.times_asked("question 6") == 1, "an hour is not waited for"
        limited = False
        ask(url, tmp_path / "data")
        assert texts(tmp_path / "data") == EVERYTHING
        assert all(fake.times_asked(f"question {i}") == 1 for i in range(6)), "asked twice"


def test_errors_that_do_not_pass_end_the_run(tmp_path: Path) -> None:
    with serving(lambda body, before: failure(500, "out of order")) as (url, fake):
        with pytest.raises(ServerError, match=r"out of order.*run the same command again"):
            ask(url, tmp_path / "data", concurrency=1)
        assert len(fake.asked) == openai_servers.CLIENT_RETRIES + 1
    with pytest.raises(ServerError, match=f"cannot reach {url}: .+ kept, run"):
        ask(url, tmp_path / "data", concurrency=1)


@pytest.mark.parametrize(
    ("status", "message"),
    [
        (401, r"refuses the key: .*not for you; check the environment variable OPENAI_API_KEY"),
        (403, r"refuses the key: .*not for you; check the environment variable OPENAI_API_KEY"),
        (404, r"does not serve 'big': .*not for you; check --target and --base-url"),
    ],
)
def test_a_wrong_key_or_model_ends_the_run_at_once(
    tmp_path: Path, status: int, message: str
) -> None:
    with serving(lambda body, before: failure(status, "not for you")) as (url, fake):
        with pytest.raises(ServerError, match=message):
            ask(url, tmp_path / "data", concurrency=1)
        assert len(fake.asked) == 1


def test_a_prompt_that_is_refused_is_counted_and_asked_again_later(tmp_path: Path) -> None:
    strict = True

    def reply(body: dict[str, Any], before: int) -> Reply:
        long = body["messages"][-1]["content"] in ("question 3", "question 7")
        return failure(400, "too long") if strict and long else echo(body, before)

    with serving(reply) as (url, fake):
        settled, refused = ask(url, tmp_path / "data")
        assert refused.keys() == {"p3", "p7"}
        assert "too long" in refused["p3"]
        assert len(settled.answers) == 10
        strict = False
        assert ask(url, tmp_path / "data")[1] == {}
        assert texts(tmp_path / "data") == EVERYTHING
        assert len(fake.asked) == 14


def test_several_servers_share_the_work_and_one_that_fails_loses_nothing(tmp_path: Path) -> None:
    """What both refuse was asked of both."""

    def choosy(body: dict[str, Any], before: int) -> Reply:
        long = body["messages"][-1]["content"] == "question 5"
        return failure(400, "too long") if long else echo(body, before)

    def failing(body: dict[str, Any], before: int) -> Reply:
        return choosy(body, before) if len(bad.asked) < 3 else failure(500, "out of order")

    (tmp_path / "prompts.txt").write_text("".join(f"question {i}\n" for i in range(12)))
    asked = ["ask", "--target", "big", "--prompts", tmp_path / "prompts.txt", "--json"]
    with serving(choosy) as (one, good), serving(choosy) as (other, same):
        both = ["--base-url", one, "--base-url", other, "--concurrency", 1]
        done = run(*asked, *both, "--out", tmp_path / "a")
        assert (done.code, done.document["answers"], done.document["refused"]) == (0, 11, 1)
        assert good.times_asked("question 5") == same.times_asked("question 5") == 1
        assert len(good.asked) + len(same.asked) == 11 + 2
        assert min(len(good.asked), len(same.asked)) > 1
    assert f"{one}, {other}" in (tmp_path / "a" / MANIFEST).read_text()
    with serving(choosy) as (one, good), serving(failing) as (other, bad):
        both = ["--base-url", one, "--base-url", other, "--concurrency", 1]
        done = run(*asked, *both, "--out", tmp_path / "b")
        assert (done.code, done.document["answers"]) == (0, 11)
        assert bad.asked
    with serving(lambda body, before: failure(500, "out of order")) as (bad_url, _):
        both = ["--base-url", bad_url, "--base-url", bad_url, "--concurrency", 1]
        done = run(*asked, *both, "--out", tmp_path / "c")
        assert done.code == 2
        assert "out of order" in done.err


def test_a_run_that_failed_at_its_start_can_be_begun_otherwise(tmp_path: Path) -> None:
    with (
        serving(lambda body, before: failure(404, "which?")) as (url, _),
        pytest.raises(ServerError),
    ):
        ask(url, tmp_path / "data")
    with serving(echo) as (url, _):
        ask(url, tmp_path / "data", seed=7)
    assert texts(tmp_path / "data") == EVERYTHING


def test_what_a_server_says_in_its_own_way_is_told(tmp_path: Path) -> None:
    detail = (400, {}, b'{"detail": "pinned to another model"}')
    with (
        serving(lambda body, before: detail) as (url, _),
        pytest.raises(ServerError, match=r"400 - .*pinned to another model"),
    ):
        ask(url, tmp_path / "data", PROMPTS[:1])


def test_a_server_that_refuses_everything_is_no_server(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with serving(lambda body, before: failure(400, "no seed here")) as (url, fake):
        with pytest.raises(ServerError, match=r"answered nothing; the last reason: .*no seed here"):
            ask(url, tmp_path / "data")
        monkeypatch.setattr(openai_servers, "REFUSALS", 5)
        with pytest.raises(ServerError, match=r"refused 5 prompts in a row, .*no seed here"):
            ask(url, tmp_path / "more", concurrency=1)
        assert len(fake.asked) == 12 + 5
    page = b"<h1>welcome</h1>"
    with serving(lambda body, before: (200, {"Content-Type": "text/html"}, page)) as (url, fake):
        with pytest.raises(ServerError, match=r"3 replies without an answer.*welcome"):
            ask(url, tmp_path / "page", PROMPTS[:2])
        assert len(fake.asked) == 2 * openai_servers.REPLIES


# What an answer is


def test_a_cut_answer_an_empty_one_and_reasoning_given_apart(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        number = int(body["messages"][-1]["content"].split()[1])
        made = [
            completion("cut", "length"),
            completion("", "content_filter"),
            completion("said", reasoning_content="thought"),
            completion("said", reasoning="thought"),
            completion("open", None),
        ]
        return made[number]

    with serving(reply) as (url, fake):
        ask(url, tmp_path / "data", PROMPTS[:5])
        ask(url, tmp_path / "data", PROMPTS[:5])
        assert len(fake.asked) == 5, "an empty answer is one, too"
    answers = {a.prompt.id: a for a in read_answers(tmp_path / "data")}
    assert answers.keys() == {"p0", "p2", "p3", "p4"}
    assert {i: a.ended for i, a in answers.items()} == {
        "p0": False,
        "p2": True,
        "p3": True,
        "p4": False,
    }
    assert [answers[i].reasoning for i in answers] == [None, "thought", "thought", None]


# What is kept

WARM = {"samplings": [Sampling(1.0)]}


def drawn(*texts: str) -> Callable[[dict[str, Any], int], Reply]:
    """A server whose replies to a text are these in turn, by the seeds it has seen with it; one
    that ends in "..." is cut. Questions of one round arrive in any order.
    """
    seeds: dict[str, list[int]] = {}
    lock = threading.Lock()

    def reply(body: dict[str, Any], before: int) -> Reply:
        asked = body["messages"][-1]["content"]
        with lock:
            known = seeds.setdefault(asked, [])
            if body["seed"] not in known:
                known.append(body["seed"])
            text = texts[known.index(body["seed"]) % len(texts)]
        text = text.replace("@", asked)
        return completion(text, "length" if text.endswith("...") else "stop")

    return reply


@pytest.mark.parametrize(
    ("filters", "bad", "reason"),
    [
        (Filters(min_tokens=3, retries=2), "so so", "short"),
        (Filters(max_repetition=0.5, retries=2), "so " * 9, "repetitive"),
        (Filters(truncated=True, retries=2), "so far so ...", "truncated"),
    ],
)
def test_what_a_filter_removes_is_asked_again_up_to_the_limit(
    tmp_path: Path, filters: Filters, bad: str, reason: str
) -> None:
    stubborn = {"question 4", "question 5"}

    def reply(body: dict[str, Any], before: int) -> Reply:
        always = body["messages"][-1]["content"] in stubborn
        return (drawn(bad) if always else third)(body, before)

    third = drawn(bad, bad, "answer to @")
    with serving(reply) as (url, fake):
        settled, refused = ask(url, tmp_path / "data", filters=filters, **WARM)
        assert refused == {}
        expected = {i: t for i, t in EVERYTHING.items() if i not in ("p4", "p5")}
        assert texts(tmp_path / "data") == expected
        counts = {"removed": {reason: 2 * 10 + 3 * 2}, "regenerated": 10, "dropped": 2}
        assert settled.counts == counts
        assert len(fake.asked) == 36
        manifest = json.loads((tmp_path / "data" / MANIFEST).read_text())
        assert manifest.items() >= counts.items()
        ask(url, tmp_path / "data", filters=filters, **WARM)
        assert len(fake.asked) == 36, "asked twice"
        with pytest.raises(StorageError, match="other settings"):
            ask(url, tmp_path / "data", **WARM)


def test_of_equal_answers_one_stays(tmp_path: Path) -> None:
    """Of the two halves each has one text the first time; later texts are their own."""

    def reply(body: dict[str, Any], before: int) -> Reply:
        odd = int(body["messages"][-1]["content"].split()[1]) % 2
        return (first_odd if odd else first_even)(body, before)

    first_odd, first_even = drawn("odd", "again @"), drawn("even", "again @")
    filters = Filters(duplicates=True, retries=1)
    with serving(reply) as (url, fake):
        settled, _ = ask(url, tmp_path / "data", filters=filters, **WARM)
        assert len(fake.asked) == 22
    again = {f"p{i}": f"again question {i}" for i in range(12)}
    assert texts(tmp_path / "data") == again | {"p0": "even", "p1": "odd"}
    assert settled.counts == {"removed": {"duplicate": 10}, "regenerated": 10, "dropped": 0}


@pytest.mark.parametrize(("scorer", "kept"), [("majority", "is 7"), ("exact-match", "is 9")])
def test_the_best_of_several_replies_is_kept(tmp_path: Path, scorer: str, kept: str) -> None:
    prompts = [replace(p, response="#### 9") for p in PROMPTS]
    reply = drawn("the answer is 8", "the answer is 7", "the answer is 9", "the answer is 7")
    with serving(reply) as (url, fake):
        settled, _ = ask(url, tmp_path / "data", prompts, best_of=BestOf(4, scorer), **WARM)
        assert len(fake.asked) == 48
        assert len({r["seed"] for r in fake.requests}) == 48
    assert set(texts(tmp_path / "data").values()) == {f"the answer {kept}"}
    assert settled.counts == {"removed": {}, "regenerated": 0, "dropped": 0}


def test_a_scorer_that_likes_none_is_asked_again(tmp_path: Path) -> None:
    prompts = [replace(p, response="#### 9") for p in PROMPTS]
    reply = drawn("answer: 8", "answer: 7", "answer: 6", "answer: 9")
    best = {"best_of": BestOf(2, "exact-match"), "filters": Filters(retries=1)}
    with serving(reply) as (url, fake):
        settled, _ = ask(url, tmp_path / "data", prompts, **best, **WARM)
        assert len(fake.asked) == 48
    assert set(texts(tmp_path / "data").values()) == {"answer: 9"}
    assert settled.counts == {"removed": {"scorer": 24}, "regenerated": 12, "dropped": 0}


def test_the_likeliest_reply_by_the_servers_own_log_probabilities(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        assert body["logprobs"] is True
        tokens = [{"token": "a", "logprob": means[before % 3] + d} for d in (-0.5, 0.5)]
        choice = {"message": {"content": f"said {before}"}, "finish_reason": "stop"}
        return ok({"choices": [{**choice, "logprobs": {"content": tokens} if given else None}]})

    given, means = True, [-3.0, -1.0, -2.0]
    best = {"best_of": BestOf(3, "log-probability"), **WARM}
    with serving(reply) as (url, _):
        ask(url, tmp_path / "data", concurrency=1, **best)
        assert set(texts(tmp_path / "data").values()) == {"said 1"}
        given = False
        with pytest.raises(ServerError, match="no log-probabilities, which the scorer"):
            ask(url, tmp_path / "none", PROMPTS[:1], concurrency=1, **best)
        given, means = True, [math.nan] * 3
        with pytest.raises(ServerError, match="no log-probabilities, which the scorer"):
            ask(url, tmp_path / "nan", PROMPTS[:1], concurrency=1, **best)


def test_a_prompt_that_is_refused_does_not_end_a_run_of_many_replies_each(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        asked = body["messages"][-1]["content"]
        return failure(400, "too long") if asked == "question 3" else echo(body, before)

    with serving(reply) as (url, _):
        best = {"best_of": BestOf(openai_servers.REFUSALS, "majority"), **WARM}
        _, refused = ask(url, tmp_path / "data", concurrency=1, **best)
        assert refused.keys() == {"p3"}
        assert texts(tmp_path / "data") == {i: t for i, t in EVERYTHING.items() if i != "p3"}


def test_of_a_round_in_which_some_are_refused_the_others_count(tmp_path: Path) -> None:
    strict = True

    def reply(body: dict[str, Any], before: int) -> Reply:
        if strict and before % 2:
            return failure(400, "not this one")
        return completion("answer: 7" if before < 4 else "answer: 8")

    best = {"best_of": BestOf(4, "majority"), "concurrency": 1, **WARM}
    with serving(reply) as (url, fake):
        settled, refused = ask(url, tmp_path / "data", PROMPTS[:2], **best)
        assert refused.keys() == {"p0", "p1"}
        assert set(texts(tmp_path / "data").values()) == {"answer: 7"}
        assert settled.counts == {"removed": {}, "regenerated": 0, "dropped": 0}
        strict = False
        assert ask(url, tmp_path / "data", PROMPTS[:2], **best)[1] == {}
        assert len(fake.asked) == 8 + 4, "those refused, and no others"


def test_a_reply_that_says_nothing_is_not_the_majority(tmp_path: Path) -> None:
    reply = drawn("", "answer: 7", " ", "answer: 7", "")
    with serving(reply) as (url, _):
        settled, _ = ask(url, tmp_path / "data", best_of=BestOf(5, "majority"), **WARM)
    assert set(texts(tmp_path / "data").values()) == {"answer: 7"}
    assert settled.counts["removed"] == {"empty": 36}


def test_replies_are_judged_anew_by_a_mended_reference(tmp_path: Path) -> None:
    """What had been removed by mistake is not paid for again."""
    how = {"best_of": BestOf(1, "exact-match"), "filters": Filters(retries=1), **WARM}
    with serving(drawn("answer: 9", "answer: 8")) as (url, fake):
        wrong = [replace(p, response="7") for p in PROMPTS]
        settled, _ = ask(url, tmp_path / "data", wrong, **how)
        assert (settled.answers, settled.dropped, len(fake.asked)) == ([], 12, 24)
        right = [replace(p, response="9") for p in PROMPTS]
        settled, _ = ask(url, tmp_path / "data", right, **how)
        assert len(fake.asked) == 24
    assert set(texts(tmp_path / "data").values()) == {"answer: 9"}
    assert settled.counts == {"removed": {}, "regenerated": 0, "dropped": 0}


def test_a_scorer_is_asked_once_a_round_and_as_soon_as_it_can_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def score(prompt: Prompt, answers: list[str]) -> list[int]:
        calls.append(prompt.id)
        if broken:
            raise RuntimeError("no such tool")
        return [-math.inf if "no" in text else 1 for text in answers]

    monkeypatch.setattr(sys.modules[__name__], "score", score, raising=False)
    best = {"best_of": BestOf(2, f"{__name__}:score"), "filters": Filters(retries=1), **WARM}
    broken = False
    with serving(drawn("no", "no", "yes", "yes")) as (url, _):
        ask(url, tmp_path / "data", **best)
    assert sorted(calls) == sorted(2 * [p.id for p in PROMPTS])
    broken = True
    with serving(drawn("no")) as (url, fake):
        with pytest.raises(InputError, match="no such tool"):
            ask(url, tmp_path / "broken", concurrency=1, **best)
        assert len(fake.asked) == 2


def test_progress_ends_once(tmp_path: Path) -> None:
    seen: list[float] = []
    details: list[str] = []

    def progress(stage: str, done: float, total: float, detail: str = "") -> None:
        assert total == len(PROMPTS)
        seen.append(done)
        details.append(detail)

    filters = Filters(min_tokens=2, retries=2)
    with serving(drawn("no", "no", "yes, it is")) as (url, _):
        ask(url, tmp_path / "data", filters=filters, progress=progress, **WARM)
    assert len(seen) == 3 + 36 + 1, "a word before each round, a reply each, the end"
    assert seen[-1] == 12
    assert max(seen[:-1]) < 12
    assert all(a <= b for a, b in pairwise(seen)), "never backwards"
    assert seen[:26] == [0] * 26, "nothing of the first two rounds stays"
    assert seen[26:38] == list(range(12)), "then a prompt a reply"
    assert details[1:4] == ["1 replies", "2 replies", "3 replies"]
    assert details[-1] == "36 replies"


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_changes_nothing_of_what_is_kept(tmp_path: Path) -> None:
    """Each reply is paid for once, whenever the process stops between two of them."""

    def reply(body: dict[str, Any], before: int) -> Reply:
        unique = f"{body['messages'][-1]['content']} {body['seed']}"
        if stops and len(fake.asked) >= stops[0]:
            stops.pop(0)
            os.kill(os.getpid(), signal.SIGINT)
        return completion(("twin twin", "no", unique)[body["seed"] % 3])

    filters = Filters(min_tokens=2, duplicates=True, retries=3)
    how = {"filters": filters, "best_of": BestOf(2, "majority"), "concurrency": 1, **WARM}
    stops: list[int] = []
    with serving(reply) as (url, fake):
        whole, _ = ask(url, tmp_path / "whole", **how)
        paid = sorted(r["seed"] for r in fake.requests)
    assert whole.removed["short"] > 3
    assert whole.removed["duplicate"] > 1
    assert whole.regenerated > 3
    stops = [3, 11, len(paid) // 2, len(paid) // 2 + 2, len(paid) - 2]
    with serving(reply) as (url, fake):
        interrupts = 0
        while True:
            try:
                parted, _ = ask(url, tmp_path / "parted", **how)
                break
            except KeyboardInterrupt:
                interrupts += 1
        assert (interrupts, stops) == (5, [])
        assert sorted(r["seed"] for r in fake.requests) == paid
    assert parted == whole
    assert texts(tmp_path / "parted") == texts(tmp_path / "whole")


def test_filters_by_command(tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("question 1\nquestion 2\n")
    ask = ["ask", "--target", "big", "--temperature", 1, "--json"]
    ask += ["--prompts", tmp_path / "prompts.txt", "--retries", 1]
    with serving(drawn("no", "yes, that is so")) as (url, _):
        done = run(*ask, "--base-url", url, "--out", tmp_path / "a", "--min-words", 3)
        assert done.code == 0
        counts = {"answers": 2, "removed": {"short": 2}, "regenerated": 2, "dropped": 0}
        assert done.document.items() >= counts.items()
        assert "removed: 2 short; 2 prompts answered in another way, 0 without" in done.err
        assert "does not sample" not in done.err
        done = run(*ask, "--base-url", url, "--out", tmp_path / "b", "--min-words", 9)
        assert done.code == 2
        assert "removed: 4 short; 0 prompts answered in another way, 2 without" in done.err
        assert "no answer is left" in done.err
        with pytest.raises(InputError, match=r"none of it was kept; ask again"):
            read_answers(tmp_path / "b")
    with serving(echo) as (url, _):
        done = run(*ask, "--base-url", url, "--out", tmp_path / "c", "--drop-truncated")
        assert "does not sample" not in done.err, "nothing was asked again"
        best = ["--best-of", 3, "--scorer", "majority"]
        done = run(*ask[:-2], "--base-url", url, "--out", tmp_path / "d", *best)
        assert "the server gave 2 prompts the same reply each time: it does not sample" in done.err


# Interruptions and damage


@pytest.mark.usefixtures("interruptible")
def test_an_interrupt_keeps_what_is_under_way_and_the_same_call_goes_on(tmp_path: Path) -> None:
    def reply(body: dict[str, Any], before: int) -> Reply:
        if len(fake.asked) >= 6 and not interrupted.is_set():
            interrupted.set()
            os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.2 if interrupted.is_set() else 0)
        return echo(body, before)

    def progress(stage: str, done: float, total: float, detail: str = "") -> None:
        details.append(detail)

    details: list[str] = []
    interrupted = threading.Event()
    with serving(reply) as (url, fake):
        with pytest.raises(KeyboardInterrupt):
            ask(url, tmp_path / "data", concurrency=2, progress=progress)
        assert any(re.fullmatch(r"stopping, up to 1 s for [12] under way", d) for d in details)
        asked = len(fake.asked)
        assert 6 <= asked <= 8
        assert len(texts(tmp_path / "data")) == asked, "an answer under way was lost"
        ask(url, tmp_path / "data")
        assert texts(tmp_path / "data") == EVERYTHING
        assert len(fake.asked) == 12, "asked twice"


def test_half_a_line_is_asked_again_and_nothing_else(tmp_path: Path) -> None:
    with serving(echo) as (url, fake):
        ask(url, tmp_path / "data", concurrency=1)
        file = tmp_path / "data" / REPLIES
        file.write_bytes(file.read_bytes()[:-20])
        ask(url, tmp_path / "data")
        assert texts(tmp_path / "data") == EVERYTHING
        assert len(fake.asked) == 13


def test_a_folder_of_something_else_is_left_alone(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "data/model.safetensors").write_text("weights")
    with serving(echo) as (url, fake):
        with pytest.raises(StorageError, match="holds no answers of `generate`"):
            ask(url, tmp_path / "data")
        assert fake.asked == []
    assert [f.name for f in (tmp_path / "data").iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("damage", ["no JSON", '{"id": "p1"}', "[]", "7"])
def test_a_damaged_line_is_named(tmp_path: Path, damage: str) -> None:
    with serving(echo) as (url, _):
        ask(url, tmp_path / "data")
        for name, use in {
            ANSWERS: lambda: read_answers(tmp_path / "data"),
            REPLIES: lambda: ask(url, tmp_path / "data"),
        }.items():
            file = tmp_path / "data" / name
            lines = file.read_text().splitlines()
            lines[4] = damage
            file.write_text("\n".join(lines) + "\n")
            with pytest.raises(StorageError, match=f"{name}, line 5 is damaged"):
                use()


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"seed": 4}, "other settings"),
        ({"max_new_tokens": 7}, "other settings"),
        ({"samplings": [Sampling(0.5)]}, "other settings"),
        ({"prompts": PROMPTS[:11]}, "other prompts"),
    ],
)
def test_other_answers_in_the_folder_are_refused(
    tmp_path: Path, changes: dict[str, Any], named: str
) -> None:
    with serving(echo) as (url, fake):
        ask(url, tmp_path / "data")
        with pytest.raises(StorageError, match=f"{named}.*choose another folder"):
            ask(url, tmp_path / "data", **changes)
        (tmp_path / "data" / MANIFEST).write_text("{")
        with pytest.raises(StorageError, match=r"manifest.json is damaged"):
            ask(url, tmp_path / "data")
        assert len(fake.asked) == 12


def test_the_same_questions_may_go_on_at_another_address(tmp_path: Path) -> None:
    with serving(echo) as (url, _):
        ask(url, tmp_path / "data")
    with serving(echo) as (url, fake):
        ask(url, tmp_path / "data")
        assert fake.asked == []


# Secrets


def test_the_key_is_in_no_file_message_or_output(tmp_path: Path) -> None:
    """Nor are user and password of the address, though the server quotes what it got."""

    def reply(body: dict[str, Any], before: int) -> Reply:
        if "1" in body["messages"][-1]["content"]:
            return failure(400, f"{'x' * 290} your key {KEY} is odd")
        return echo(body, before)

    prompts = tmp_path / "prompts.jsonl"
    rows = [{"prompt": p.messages[0]["content"]} for p in PROMPTS]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with serving(reply) as (url, _):
        secret = url.replace("//", "//me:hidden@")
        answered = run(
            *("ask", "--target", "big", "--base-url", secret),
            *("--prompts", prompts, "--out", tmp_path / "data", "--json"),
        )
        assert answered.document["refused"] == 3
    with serving(lambda body, before: failure(401, f"wrong key {KEY}")) as (url, _):
        refused = run(
            *("ask", "--target", "big", "--base-url", url),
            *("--prompts", prompts, "--out", tmp_path / "none"),
        )
        assert refused.code == 2
        assert "wrong key ***" in refused.err
    written = [f.read_text() for f in tmp_path.rglob("*") if f.is_file()]
    for text in (answered.out, answered.err, refused.out, refused.err, *written):
        assert KEY not in text
        assert KEY[:10] not in text
        assert "hidden" not in text
    assert url.rpartition(":")[0] in (tmp_path / "data" / MANIFEST).read_text()


# What is refused before anything is asked


@pytest.mark.parametrize(
    "url",
    [
        *(
            "localhost:8000",
            "ftp://x/v1",
            "",
            "http://",
            "v1",
            "http://a b/v1",
            "http://x:99999/v1",
        ),
        *("http://x:port/v1", "http://[::1/v1", "http://x/v1?key=hidden", "http://x/v1#hidden"),
        *("http://me:hidden@x:0/v1", "http://x/\x1b[2J", "http://x:8000/v1\n"),
    ],
)
def test_addresses_that_are_none(url: str) -> None:
    with pytest.raises(InputError, match="must look like http://localhost:8000/v1") as caught:
        Server(url, "big")
    assert "hidden" not in str(caught.value)


@pytest.mark.parametrize("end", ["\r", "\n", "\t", "\r\n", " "])
def test_white_space_around_the_key_is_no_part_of_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, end: str
) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY + end)
    with serving(echo) as (url, fake):
        ask(url, tmp_path / "data")
    assert {h["authorization"] for h in fake.headers} == {f"Bearer {KEY}"}


@pytest.mark.parametrize("key", ["sk-a\nb", "sk-a\x00b", "sk-a b", "sk-\u00e4b"])
def test_a_key_that_no_header_may_hold(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str
) -> None:
    if "\0" in key:
        monkeypatch.setattr(os.environ, "get", lambda name, default=None: key)
    else:
        monkeypatch.setenv("OPENAI_API_KEY", key)
    with pytest.raises(InputError, match="OPENAI_API_KEY holds a space") as caught:
        ask("http://localhost:1/v1", tmp_path / "data")
    assert "sk-" not in str(caught.value)


@pytest.mark.parametrize("quoted", [repr, json.dumps, quote, lambda key: quote(key, safe="")])
def test_a_key_that_is_quoted_is_not_seen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quoted: Callable[[str], str]
) -> None:
    key = "sk-\\this'/\"must+not&be/seen"
    monkeypatch.setenv("OPENAI_API_KEY", key)

    def reply(body: dict[str, Any], before: int) -> Reply:
        number = int(body["messages"][-1]["content"].split()[-1])
        if number % 2:
            return failure(400, f"odd {quoted(key)}")
        return completion(f"answer {number} {quoted(key)}", reasoning_content=quoted(key))

    with serving(reply) as (url, _):
        refused = ask(url, tmp_path / "data")[1]
    seen = [*refused.values(), *(f.read_text() for f in (tmp_path / "data").iterdir())]
    assert any("***" in text for text in seen)
    for text in seen:
        assert "not" not in text.replace("another", "")


def test_what_a_server_says_moves_no_cursor(tmp_path: Path) -> None:
    with (
        serving(lambda body, before: failure(401, "no\x1b[2J\x9b")) as (url, _),
        pytest.raises(ServerError) as caught,
    ):
        ask(url, tmp_path / "data")
    assert "no\\x1b[2J" in str(caught.value)
    assert str(caught.value).isprintable()


def test_settings_that_have_no_meaning(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no top-k or min-p"):
        ask("http://x/v1", tmp_path, samplings=[Sampling(1.0, top_k=5)])
    for number in (0, 10**9):
        with pytest.raises(InputError, match=f"concurrency must be 1 to 1024; got {number}"):
            ask("http://x/v1", tmp_path, concurrency=number)
    with pytest.raises(InputError, match="no prompts"):
        ask("http://x/v1", tmp_path, [])
    (tmp_path / "p.jsonl").write_text('{"prompt": "x", "id": "a", "tools": [{"name": "f"}]}\n')
    with pytest.raises(InputError, match=r"prompt 'a' \(.*p\.jsonl, line 1\) has 'tools', and"):
        ask("http://x/v1", tmp_path / "data", load_prompts(str(tmp_path / "p.jsonl")))


def test_without_the_package_it_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(InputError, match=r"pip install 'specdistill\[openai\]'"):
        ask("http://x/v1", tmp_path)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("generate --engine openai", "type `specdistill ask --base-url URL"),
        ("generate --engine=openai --base-url http://x --signal none", "type `specdistill ask"),
        ("generate --base-url http://x", "No such option: --base-url"),
        ("generate --concurrency 3", "No such option: --concurrency"),
        ("generate --shots 2", "--shots 2 has no effect with the style 'instruction'"),
        ("generate --style in-context", "prompts with responses by --examples"),
        ("generate --style poem", "unknown style 'poem'; choose from instruction, in-context"),
        ("generate --response-column x", "--response-column has no effect without --scorer"),
        ("ask", "Missing option '--base-url'"),
        ("ask --base-url http://x --signal none", "--signal and --checkpoint go together"),
        ("ask --base-url http://x --retries 3", "retries: 3 has no effect without"),
        ("ask --base-url http://x --best-of 3", "--best-of and --scorer go together"),
    ],
)
def test_options_without_effect_are_errors(tmp_path: Path, arguments: str, message: str) -> None:
    given = ("--target", "demo:x", "--prompts", "demo:train", "--out", tmp_path / "x")
    done = run(*arguments.split(), *given)
    assert done.code == 2
    assert message in done.err
    assert not (tmp_path / "x").exists()


# A real server


@pytest.fixture(scope="module")
def real(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    """`transformers serve` with the tiny target, told to sample where it is asked to."""
    for package in ("fastapi", "uvicorn"):
        pytest.importorskip(package, reason="`transformers serve` needs fastapi and uvicorn")
    folder = shutil.copytree(tiny_folder, tmp_path_factory.mktemp("served") / "model")
    config = folder / "generation_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "do_sample": True}))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    code = "from transformers.cli.transformers import main; main()"
    command = [sys.executable, "-c", code, "serve", str(folder), "--port", str(port)]
    options = ["--host", "127.0.0.1", "--device", "cpu", "--dtype", "float32"]
    server = subprocess.Popen(
        [*command, *options], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        for _ in range(600):
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except (URLError, OSError):
                assert server.poll() is None, server.stdout and server.stdout.read()
                time.sleep(0.2)
        yield Server(f"http://127.0.0.1:{port}/v1", str(folder), 3)
    finally:
        server.kill()
        server.communicate()


def test_a_real_server_answers_as_the_engine_does(
    real: Server, tiny_folder: Path, tmp_path: Path
) -> None:
    prompts = [
        Prompt(f"p{i}", ({"role": "user", "content": f"w{5 + i} w{9 + 2 * i} w30"},))
        for i in range(6)
    ]
    _, refused = openai.ask([real], prompts, tmp_path / "d", max_new_tokens=8, samplings=[GREEDY])
    assert refused == {}
    target = models.load(str(tiny_folder), dtype="float32")
    ids = [encode_prompt(target.tokenizer, p) for p in prompts]
    ours = SpeculativeDecoder(target, batch_size=6).generate(ids, max_new_tokens=8)
    answers = {a.prompt.id: a for a in read_answers(tmp_path / "d")}
    for prompt, output in zip(prompts, ours.outputs, strict=True):
        expected = target.tokenizer.decode(output.tokens, skip_special_tokens=True)
        assert answers[prompt.id].prompt.response == expected
        assert answers[prompt.id].ended == (output.tokens[-1] in target.eos_ids)


def test_a_real_servers_replies_are_filtered(real: Server, tmp_path: Path) -> None:
    prompts = [Prompt(f"p{i}", ({"role": "user", "content": f"w{5 + i} w9"},)) for i in range(8)]
    settled, refused = openai.ask(
        [real],
        prompts,
        tmp_path / "d",
        max_new_tokens=20,
        samplings=[Sampling(1.0)],
        filters=Filters(truncated=True, retries=6),
        best_of=BestOf(2, "majority"),
    )
    assert refused == {}
    assert settled.answers
    assert all(answer.ended for answer in settled.answers)
    assert settled.removed["truncated"] > 0
    assert settled.unvaried == 0, "asked again, it says something else"
    assert len(settled.answers) + settled.dropped == 8


def test_what_a_failing_server_was_asked_is_asked_of_the_others() -> None:
    """Once, and before the call ends: whoever asks need not look for what is missing."""
    failing, working = (Server(f"http://localhost:{port}/v1", "m", 2) for port in (1, 2))
    answered: list[int] = []

    async def ask(line: Line, number: int) -> None:
        await asyncio.sleep(0)
        if line.server is failing:
            raise ServerError("it fails")
        answered.append(number)

    async def ask_all() -> None:
        async with Crew([failing, working]) as crew:
            numbers = {str(number): number for number in range(6)}
            await crew.ask_all(numbers, ask, lambda number, reason: answered.append(-1))

    asyncio.run(ask_all())
    assert sorted(answered) == [*range(6)]
