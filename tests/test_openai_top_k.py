"""A target behind a server that tells its most probable tokens, and one that misbehaves."""

import json
import threading
from math import log
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("openai", reason="the extra 'openai' is not installed")

from servers import Reply, failure, ok, serving
from small_runs import run as distilled
from small_runs import settings
from test_cli import run
from test_openai import in_haste  # noqa: F401

from specdistill.data.chat import encode_prompt
from specdistill.data.generation import generate
from specdistill.data.outside import Outside
from specdistill.data.prompts import Prompt
from specdistill.data.signal import keep, read_states
from specdistill.data.token_store import Example, read_examples, read_manifest
from specdistill.decoding import GREEDY, Request
from specdistill.drafts.making import make_draft, save_draft
from specdistill.engines.openai_replies import NoAnswer
from specdistill.engines.openai_servers import REPLIES, Server
from specdistill.engines.openai_top_k import Tokens, TopKAnswers, read_top_k
from specdistill.errors import ServerError
from specdistill.models import LanguageModel
from specdistill_kernels import TargetTopK

K = 4
PROMPTS = [
    Prompt(f"p{i}", ({"role": "user", "content": f"w{5 + i} w{9 + 2 * i}"},)) for i in range(10)
]


class Served:
    """The tiny target as vLLM would serve it, or a server that knows OpenAI's fields alone."""

    def __init__(self, target: LanguageModel, ids: bool = True) -> None:
        self.target, self.ids = target, ids

    def name(self, token: int) -> str:
        return (
            f"token_id:{token}" if self.ids else self.target.tokenizer.convert_ids_to_tokens(token)
        )

    def document(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt = Prompt("x", tuple(body["messages"]))
        given = encode_prompt(self.target.tokenizer, prompt)
        tokens = list(given)
        with torch.inference_mode():
            for _ in range(body["max_tokens"]):
                logits = self.target.logits(self.target.hidden(torch.tensor([tokens]))[0, -1])
                tokens.append(int(logits.argmax()))
        answer = tokens[len(given) :]
        states = read_states(self.target, given, answer)
        log_p = self.target.logits(states.hidden).log_softmax(-1)
        top = log_p.topk(body["top_logprobs"], -1)
        content = [
            {
                "token": self.name(token),
                "logprob": log_p[i, token].item(),
                "top_logprobs": [
                    {"token": self.name(int(id_)), "logprob": value.item()}
                    for id_, value in zip(top.indices[i], top.values[i], strict=True)
                ],
            }
            for i, token in enumerate(answer)
        ]
        message = {"role": "assistant", "content": self.target.tokenizer.decode(answer)}
        choice = {"index": 0, "message": message, "finish_reason": "length"}
        choice["logprobs"] = {"content": content}
        document = {"id": "x", "choices": [choice]}
        document["usage"] = {"prompt_tokens": len(given)}
        if self.ids:
            document["prompt_token_ids"] = given
            choice["token_ids"] = answer
        return document

    def __call__(self, body: dict[str, Any], before: int) -> Reply:
        if not self.ids and "return_token_ids" in body:
            return failure(400, "Unrecognized request argument: return_token_ids")
        return ok(self.document(body))


def asked(
    target: LanguageModel,
    urls: list[str],
    out: Path,
    refused: dict[str, str] | None = None,
    concurrency: int = 2,
) -> dict[str, Example]:
    servers = [Server(url, "big", concurrency) for url in urls]
    refused = {} if refused is None else refused

    def decoder(model: LanguageModel, _: int) -> TopKAnswers:
        return TopKAnswers(servers, model, PROMPTS, K, refused)

    signal, how = f"top-k:{K}", {"max_new_tokens": 5, "samplings": [GREEDY]}
    generate(target, PROMPTS, out, signal=signal, outside=Outside("openai", decoder), **how)
    return {e.id: e for e in read_examples(out, signal=True)}


@pytest.mark.parametrize("ids", [True, False])
def test_its_signal_is_the_targets(target: LanguageModel, tmp_path: Path, ids: bool) -> None:
    with serving(Served(target, ids)) as (url, fake):
        answers = asked(target, [url], tmp_path / "out")
    assert fake.requests[0]["top_logprobs"] == K
    assert answers.keys() == {p.id for p in PROMPTS}
    for example in answers.values():
        states = read_states(target, example.prompt_tokens, example.response_tokens)
        expected, _ = keep(target, states, f"top-k:{K}")
        assert torch.equal(example.signal.tokens, expected.tokens)
        torch.testing.assert_close(example.signal.log_probs, expected.log_probs)
        torch.testing.assert_close(example.signal.log_tail, expected.log_tail, atol=1e-4, rtol=1e-4)
    (part,) = read_manifest(tmp_path / "out").parts
    assert part["alpha_cost"] == pytest.approx(part["tail_mass"], rel=1e-3), "no more is known"


def test_a_server_that_fails_loses_nothing(target: LanguageModel, tmp_path: Path) -> None:
    served = Served(target)

    def failing(body: dict[str, Any], before: int) -> Reply:
        return served(body, before) if len(bad.asked) < 3 else failure(500)

    with serving(served) as (good_url, good), serving(failing) as (bad_url, bad):
        answers = asked(target, [good_url, bad_url], tmp_path / "out")
        assert answers.keys() == {p.id for p in PROMPTS}
        assert good.asked
        assert bad.asked
    with serving(failing) as (bad_url, bad):
        with pytest.raises(ServerError, match="fails or limits the rate"):
            asked(target, [bad_url], tmp_path / "broken")
        before_it_failed = {e.id for e in read_examples(tmp_path / "broken", signal=True)}
        assert before_it_failed, "what was answered until then"
    with serving(served) as (url, fake):
        assert asked(target, [url], tmp_path / "broken").keys() == answers.keys()
        assert len(fake.asked) == len(PROMPTS) - len(before_it_failed)


def test_few_prompts_are_shared_out(target: LanguageModel, tmp_path: Path) -> None:
    served = Served(target)
    with serving(served) as (one_url, one), serving(served) as (other_url, other):
        answers = asked(target, [one_url, other_url], tmp_path / "out", concurrency=64)
    assert answers.keys() == {p.id for p in PROMPTS}
    assert [len(one.asked), len(other.asked)] == [5, 5]


def test_what_one_server_refuses_is_asked_of_the_other(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A server without log-probabilities among those that have them is left alone after a while."""
    monkeypatch.setattr("specdistill.engines.openai_servers.REFUSALS", 3)
    served, begun = Served(target), threading.Event()

    def without(body: dict[str, Any], before: int) -> Reply:
        begun.set()
        return spoilt(served.document(body), "none at all")

    def patient(body: dict[str, Any], before: int) -> Reply:
        begun.wait()  # each server gets some
        return served(body, before)

    refused: dict[str, str] = {}
    with serving(patient) as (good_url, good), serving(without) as (bad_url, bad):
        answers = asked(target, [bad_url, good_url], tmp_path / "out", refused)
    assert answers.keys() == {p.id for p in PROMPTS}
    assert refused == {}
    assert sorted(good.asked) == sorted(p.messages[0]["content"] for p in PROMPTS)
    assert 1 <= len(set(bad.asked)) <= 3 + 1, "those under way as well"


def spoilt(document: dict[str, Any], how: str) -> Reply:
    (choice,) = document["choices"]
    content = choice["logprobs"]["content"]
    match how:
        case "none at all":
            choice["logprobs"] = None
        case "short":
            content[1]["top_logprobs"].pop()
        case "missing":
            del content[2]["top_logprobs"]
        case "other ids":
            content[0]["token"] = "token_id:64"
        case "twice":
            content[0]["top_logprobs"][1]["token"] = content[0]["top_logprobs"][0]["token"]
        case "NaN":
            content[0]["top_logprobs"][2]["logprob"] = float("nan")
        case "NaN of its own":
            content[0]["logprob"] = float("nan")
        case "too probable":
            for entry in content[0]["top_logprobs"]:
                entry["logprob"] = log(0.5)
        case "bytes":
            content[0]["token"], content[0]["bytes"] = "\\xe2", [0xE2]
        case "another answer":
            choice["token_ids"] = [*choice["token_ids"][1:], 5]
        case "another prompt":
            document["prompt_token_ids"] = [5, *document["prompt_token_ids"]]
    return ok(document)


SPOILT = {
    "none at all": "no log-probabilities; serve with them",
    "short": "3 of the 4 most probable tokens that were asked for",
    "missing": "0 of the 4 most probable",
    "other ids": "token id 64, and .* has 0 to 63",
    "twice": "of the 4 most probable tokens",
    "NaN": "a log-probability that is none",
    "NaN of its own": "a log-probability that is no number",
    "too probable": "add up to more than 1",
    "bytes": "no one token of",
    "another answer": "not those of the answer",
    "another prompt": "they must be the same",
}


@pytest.mark.parametrize("how", SPOILT)
def test_a_reply_that_tells_it_wrongly_is_refused(
    target: LanguageModel, tmp_path: Path, how: str
) -> None:
    """One prompt's, always; the others are answered."""
    served = Served(target)

    def reply(body: dict[str, Any], before: int) -> Reply:
        text = body["messages"][-1]["content"]
        document = served.document(body)
        return spoilt(document, how) if text == "w7 w13" else ok(document)

    refused: dict[str, str] = {}
    with serving(reply) as (url, fake):
        answers = asked(target, [url], tmp_path / "out", refused)
        assert fake.times_asked("w7 w13") == REPLIES
    assert answers.keys() == {p.id for p in PROMPTS} - {"p2"}
    with pytest.raises(AssertionError, match=SPOILT[how]):
        raise AssertionError(refused["p2"])
    with serving(served) as (url, fake):
        assert len(asked(target, [url], tmp_path / "out")) == len(PROMPTS)
        assert fake.asked == ["w7 w13"], "and nothing else"


def test_a_server_that_caps_them_says_so_and_is_no_server(
    target: LanguageModel, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("specdistill.engines.openai_servers.REFUSALS", 3)
    words = "Requested 4 logprobs, which is greater than max allowed: 2"
    with (
        serving(lambda body, before: failure(400, words)) as (url, _),
        pytest.raises(ServerError, match=f"refused 3 prompts in a row.*{words}"),
    ):
        asked(target, [url], tmp_path / "out")


def test_tokens_are_known_by_their_bytes() -> None:
    vocab = {"Ġa": 0, "a": 1, "âĤ": 2, "<|end|>": 3, "Ċ": 4}
    tokenizer = SimpleNamespace(get_vocab=lambda: vocab, all_special_tokens=["<|end|>"])
    tokens = Tokens(SimpleNamespace(name="T", vocab_size=5, tokenizer=tokenizer))
    for text, spelt, id_ in [
        (" a", None, 0),
        ("a", [97], 1),
        ("\ufffd", [0xE2, 0x82], 2),
        ("<|end|>", None, 3),
        ("\n", [10], 4),
    ]:
        assert tokens.id_of(SimpleNamespace(token=text, bytes=spelt)) == id_
    with pytest.raises(NoAnswer, match="no one token"):
        tokens.id_of(SimpleNamespace(token="b", bytes=None))
    sentences = {"▁a": 0, "<0x0A>": 1, "x": 2, "▁x": 3}
    tokenizer.get_vocab = lambda: sentences
    tokens = Tokens(SimpleNamespace(name="T", vocab_size=5, tokenizer=tokenizer))
    assert [tokens.id_of(SimpleNamespace(token=t, bytes=None)) for t in (" a", "\n", "x")] == [
        0,
        1,
        2,
    ]


def test_a_sampled_token_that_is_not_among_the_most_probable() -> None:
    """vLLM tells it in the place of the last, others beside them: what is told is exact."""
    tokens = Tokens(SimpleNamespace(name="T", vocab_size=64, tokenizer=None))
    chances = {7: 0.01, 1: 0.4, 2: 0.3, 3: 0.1}

    def entry(id_: int, chance: float) -> SimpleNamespace:
        return SimpleNamespace(token=f"token_id:{id_}", logprob=log(chance))

    def read(k: int) -> TargetTopK:
        sampled = entry(7, chances[7])
        sampled.top_logprobs = [entry(*each) for each in chances.items()]
        choice = SimpleNamespace(logprobs=SimpleNamespace(content=[sampled]))
        row = read_top_k(SimpleNamespace(choices=[choice]), tokens, Request("a", [5], 1), k)
        assert row.tokens == [7]
        assert row.log_prob == pytest.approx(log(0.01))
        return row.top

    for k, ids, tail in ((4, [1, 2, 3, 7], 0.19), (3, [1, 2, 3], 0.2)):
        top = read(k)
        assert top.tokens.tolist() == [ids]
        assert top.log_probs.exp()[0].tolist() == pytest.approx([chances[id_] for id_ in ids])
        assert top.log_tail.exp().tolist() == pytest.approx([tail])


def test_by_command_and_learnt_from(
    tiny_folder: Path, target: LanguageModel, tmp_path: Path
) -> None:
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"w{5 + i} w{9 + 2 * i}\n" for i in range(12)))
    with serving(Served(target)) as (url, _):
        asking = ["ask", "--base-url", url, "--target", "big", "--prompts", prompts]
        asking += ["--signal", f"top-k:{K}", "--max-new-tokens", 6, "--out", tmp_path / "out"]
        asking += ["--json", "--checkpoint"]
        done = run(*asking, tiny_folder)
        assert done.document["answers"] == 12
        assert done.document["alpha_cost"] == pytest.approx(done.document["tail_mass"], rel=1e-3)
        assert "loses at most" in done.err
    save_draft(make_draft(target, [0, 1]), tmp_path / "draft")
    world = {"target": str(tiny_folder), "draft": str(tmp_path / "draft")}
    world["data"] = str(tmp_path / "out")
    distilled(settings(world, tmp_path / "run", signal="kept"))
    assert json.loads((tmp_path / "run" / "metrics.jsonl").read_text().splitlines()[-1])
    with serving(lambda body, before: spoilt(Served(target).document(body), "none at all")) as (
        url,
        _,
    ):
        asking[2], asking[asking.index("--out") + 1] = url, tmp_path / "without"
        done = run(*asking, tiny_folder)
        assert done.code == 2
        assert "no log-probabilities; serve with them" in done.err
    for more, words in [
        (["--signal", "top-k:4"], "--signal and --checkpoint go together"),
        (["--signal", "states", "--checkpoint", tiny_folder], "a server tells its most probable"),
    ]:
        asking = ["ask", "--base-url", "http://localhost:9/v1", "--target", "big"]
        done = run(*asking, "--prompts", prompts, "--out", tmp_path / "none", *more)
        assert done.code == 2
        assert words in " ".join(done.err.split())
