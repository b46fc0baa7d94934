"""A vLLM server that runs, scored from outside: by a stand-in for it, and by vLLM itself."""

import json
import math
import re
import shutil
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from urllib.request import urlopen

import pytest
import torch
from real_vllm import VLLM_PYTHON, needs_vllm, served_target

pytest.importorskip("openai", reason="the extra 'openai' is not installed")

from conftest import tiny_model
from servers import Reply, failure, ok, serving
from small_runs import run as distilled
from small_runs import settings
from test_cli import run
from test_openai import KEY, in_haste  # noqa: F401

from specdistill import models
from specdistill.cli import tables
from specdistill.data.chat import EncodedPrompt
from specdistill.data.signal import keep, read_states
from specdistill.data.token_store import read_examples
from specdistill.decoding import Request, SpeculativeDecoder, drafter_for
from specdistill.drafts.export import export
from specdistill.drafts.making import make_draft, save_draft
from specdistill.engines import server, vllm_server
from specdistill.engines.server_metrics import Counters, read_metrics
from specdistill.engines.vllm_pair import Pair
from specdistill.engines.vllm_process import environment
from specdistill.errors import DecodingError, InputError, ServerError, SpecDistillError
from specdistill.report import write_report
from specdistill.report.plots import plot_all
from specdistill.scoring.comparable import obstacles
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.trust import objections, sound_card

PROMPTS = [EncodedPrompt(f"p{i}", [5 + i, 9, 2 + i], "odd" if i % 2 else "even") for i in range(6)]


class Vllm:
    """What vLLM says of itself and answers, drafting `num` tokens a round of which it accepts all,
    or plainly.
    """

    def __init__(self, num: int = 0) -> None:
        self.num, self.version, self.models = num, "0.32.0", ["tiny"]
        self.generated = self.rounds = 0
        self.lock = threading.Lock()

    def __call__(self, body: dict[str, Any], before: int) -> Reply:
        first = sum(body["prompt"])
        tokens = [5 + (first + i) % 50 for i in range(body["max_tokens"])]
        with self.lock:
            self.generated += len(tokens)
            self.rounds += math.ceil((len(tokens) - 1) / (self.num + 1))
        lines = [self.chunk({"token_ids": [token]}) for token in tokens]
        return 200, {"Content-Type": "text/event-stream"}, "\n\n".join(lines).encode()

    def chunk(self, choice: dict[str, Any]) -> str:
        return f"data: {json.dumps({'choices': [{'index': 0, 'text': '', **choice}]})}"

    def get(self, path: str) -> Reply:
        if path == "/v1/models":
            return ok({"data": [{"id": name} for name in self.models]})
        if path == "/version":
            return ok({"version": self.version})
        return 200, {"Content-Type": "text/plain"}, self.metrics().encode()

    def metrics(self) -> str:
        counts = {"generation_tokens_total": self.generated}
        lines = []
        if self.num:
            counts["spec_decode_num_drafts_total"] = self.rounds
            counts["spec_decode_num_draft_tokens_total"] = self.rounds * self.num
            name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
            lines = [
                f'{name}{{engine="0",position="{i}"}} {self.rounds}.0' for i in range(self.num)
            ]
        lines += [f'vllm:{name}{{engine="0"}} {count}.0' for name, count in counts.items()]
        return "\n".join(["# HELP vllm:e2e_request_latency_seconds Histogram", *lines])


@contextmanager
def served(vllm: Vllm) -> Iterator[tuple[str, Any]]:
    with serving(vllm, vllm.get) as running:
        yield running


@pytest.fixture(scope="module")
def pair() -> Pair:
    target = tiny_model(0, layers=3)
    return Pair.of(target, tiny_model(1), PROMPTS, 9, 0)


def score(
    pair: Pair, url: str, plain: str | None = None, concurrency: tuple[int, ...] = ()
) -> Scorecard:
    how = {"temperature": [0.0], "max_new_tokens": 9, "concurrency": concurrency}
    return server.score(url, plain, pair, PROMPTS, **how)


def test_one_server_tells_acceptance_and_no_speedup(pair: Pair, tmp_path: Path) -> None:
    vllm = Vllm(num=3)
    with served(vllm) as (url, fake):
        card = score(pair, url, concurrency=(1, 4))
    (row,) = card.rows
    assert (row.num_draft_tokens, row.prompts, row.emitted) == (3, 6, 54)
    assert row.rounds == 6 * (1 + 2), "the prompt's own pass, and two of up to four tokens"
    assert (row.tested, row.accepted) == (36, 36)
    assert row.tokens_per_second > 0
    assert card.baseline == []
    assert math.isnan(row.speedup)
    assert math.isnan(card.verdict.best.speedup)
    assert not card.verdict.pays
    assert "Plain decoding was not measured, so that no speedup is told" in card.verdict.reason
    assert "an acceptance rate of 1.00, 3.00 tokens a round" in card.verdict.reason
    assert card.label == "measured in vllm 0.32.0, without plain decoding"
    assert card.failures == []
    assert [(r.concurrency, r.emitted, r.pays) for r in card.load.drafted] == [
        (1, 54, False),
        (4, 54, False),
    ]
    assert all(math.isnan(r.speedup) for r in card.load.drafted)
    assert [r.accepted_by_position for r in card.load.drafted] == [[1.0] * 3] * 2
    assert card.load.plain == []
    assert card.load.lines == []
    assert {h["authorization"] for h in fake.headers} == {f"Bearer {KEY}"}

    file = tmp_path / "run" / "scorecard.json"
    card.write(file)
    assert KEY not in file.read_text()
    again = sound_card(file)
    assert again.document() == card.document()
    assert objections(again) == []
    assert "– [–, –]" in {
        cell for column in tables.rows_table(again).columns for cell in column._cells
    }
    (load,) = tables.load_tables(again)
    assert load.row_count == 2
    assert tables.evidence_line(again) == (
        "no text was compared with plain decoding of vllm 0.32.0"
    )
    notes: list[str] = []
    drawn = plot_all(tmp_path / "run", note=notes.append)
    assert {picture.name for picture in drawn} == {"acceptance.png", "survival.png"}
    assert notes == []
    report = write_report(tmp_path / "run")
    assert "was not decoded without it" in report.read_text()
    for reason in obstacles({"one": again, "other": again}):
        assert "plain decoding was not measured" in reason
    proud = replace(again, rows=[replace(row, speedup=2.0)])
    assert any("a speedup, and no plain decoding" in doubt for doubt in objections(proud))


def test_two_servers_take_turns(pair: Pair, tmp_path: Path) -> None:
    with served(Vllm(num=3)) as (url, drafting), served(Vllm()) as (plain_url, plain):
        card = score(pair, url, plain_url, concurrency=(2,))
    (row,) = card.rows
    assert (row.emitted, row.accepted) == (54, 36)
    assert card.baseline[0].tokens == 54
    assert row.speedup > 0
    assert card.lossless.greedy_identical == (6, 6)
    assert card.load.drafted[0].speedup > 0
    assert len(card.load.plain[0].tokens_per_second) == 2, "before and after"
    assert len(drafting.asked) == 1 + 6 + 6
    assert len(plain.asked) == 1 + 2 * 6 + 2 * 6
    assert card.provenance["servers"] == [url, plain_url]
    for fake in (drafting, plain):
        assert len({request["cache_salt"] for request in fake.requests}) == len(fake.requests)
    card.write(tmp_path / "card.json")
    assert sound_card(tmp_path / "card.json").document() == card.document()


def test_what_is_asked(pair: Pair) -> None:
    """All that a checkpoint's generation config could change, and nothing from a cache."""
    with served(Vllm(num=2)) as (url, fake):
        score(pair, url)
    assert [request["prompt"] for request in fake.requests[1:]] == [p.tokens for p in PROMPTS]
    for request in fake.requests:
        assert request["path"] == "/v1/completions"
        assert request["model"] == "tiny", "the one that is served, whatever the target's name"
        sampling = {"temperature": 0.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
        assert request.items() >= sampling.items()
        assert request["repetition_penalty"] == 1.0
        assert request["stop_token_ids"] == pair.eos_ids
        assert request["return_token_ids"]


def test_a_server_that_others_ask_is_not_scored(
    pair: Pair, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Nor one whose counters lag for good."""
    monkeypatch.setattr(vllm_server, "PAUSE", 0.0)
    for error in (1, -1):
        vllm = Vllm(num=3)

        def reply(body: dict[str, Any], before: int, vllm=vllm, error=error) -> Reply:
            made = vllm(body, before)
            vllm.generated += error
            return made

        with (
            serving(reply, vllm.get) as (url, _),
            pytest.raises(DecodingError, match="others ask it at the same time"),
        ):
            score(pair, url)


def test_counters_that_lag_are_waited_for(pair: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vllm_server, "PAUSE", 0.0)
    vllm, looks = Vllm(num=3), []

    def get(path: str) -> Reply:
        """Every second look sees what the one before it should have."""
        status, headers, text = vllm.get(path)
        if path == "/metrics":
            looks.append(text)
            text = looks[len(looks) // 2 * 2 - 1] if len(looks) > 1 else text
        return status, headers, text

    with serving(vllm, get) as (url, _):
        assert score(pair, url).rows[0].emitted == 54


def test_a_connection_that_is_dropped_is_tried_again(pair: Pair) -> None:
    vllm, dropped = Vllm(num=3), set()

    def reply(body: dict[str, Any], before: int) -> Reply | None:
        if before == 0 and len(dropped) < 3:
            dropped.add(str(body["prompt"]))
            return None
        return vllm(body, before)

    with serving(reply, vllm.get) as (url, fake):
        assert score(pair, url).rows[0].emitted == 54
    assert len(dropped) == 3
    assert len(fake.asked) == 1 + 6 + 3


WRONG: dict[str, tuple[type[SpecDistillError], str]] = {
    "nobody there": (ServerError, "cannot reach http://127.0.0.1:"),
    "no metrics": (InputError, "has no metrics: it is no vLLM server, or a proxy hides it"),
    "metrics of another program": (InputError, "is no vLLM server that tells its counters"),
    "no version": (InputError, "has no version: it is no vLLM server"),
    "a version that is none": (InputError, "tells no 'version' at /version"),
    "models that are none": (InputError, "tells no 'data' at /v1/models"),
    "another model": (InputError, "serves a, b, and none of it is called 'tiny-0'"),
    "no draft": (InputError, "does not draft: .* serve with --speculative-config"),
    "a key that is wrong": (ServerError, "refuses the key"),
    "too long": (ServerError, "refuses: .*longer than the model's context"),
    "no token ids": (ServerError, "tells no token ids"),
    "an error midway": (ServerError, "sends no answer: .*the engine died"),
    "half a stream": (ServerError, "sends no answer"),
    "no end": (ServerError, "sends no answer"),
    "another vocabulary": (ServerError, "the token 64, and tiny-0 has 0 to 63: it serves another"),
    "fewer proposals": (DecodingError, "do not tell in which rounds there were fewer"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_cannot_be_scored_is_said_in_one_sentence(pair: Pair, how: str) -> None:
    vllm = Vllm(num=0 if how == "no draft" else 3)

    def reply(body: dict[str, Any], before: int) -> Reply:
        stream = {"Content-Type": "text/event-stream"}
        match how:
            case "a key that is wrong":
                return failure(401, f"wrong key {KEY}")
            case "too long":
                return failure(400, "longer than the model's context")
            case "no token ids":
                return 200, stream, vllm.chunk({"text": "hello"}).encode()
            case "an error midway":
                return 200, stream, b'data: {"error": {"message": "the engine died"}}'
            case "no end":
                long = {**stream, "Content-Length": "9999"}
                return 200, long, vllm.chunk({"token_ids": [5]}).encode()
            case "another vocabulary":
                return 200, stream, vllm.chunk({"token_ids": [5, 64, 7]}).encode()
            case "half a stream":
                return 200, stream, vllm.chunk({"token_ids": [5]})[:-4].encode()
        return vllm(body, before)

    def get(path: str) -> Reply:
        status, headers, text = vllm.get(path)
        match how, path:
            case "no metrics", "/metrics":
                return failure(404)
            case "metrics of another program", "/metrics":
                return 200, {}, b"process_cpu_seconds_total 3.1"
            case "no version", "/version":
                return failure(404)
            case "a version that is none", "/version":
                return ok([1])
            case "models that are none", "/v1/models":
                return ok("hello")
            case "another model", "/v1/models":
                return ok({"data": [{"id": "a"}, {"id": "b"}]})
            case "fewer proposals", "/metrics":
                text = re.sub(rb"(draft_tokens_total.*) \d+\.0", rb"\1 7.0", text)
        return status, headers, text

    kind, words = WRONG[how]
    with serving(reply, get) as (url, _):
        if how != "nobody there":
            with pytest.raises(kind, match=words) as caught:
                score(pair, url)
    if how == "nobody there":
        with pytest.raises(kind, match=words) as caught:
            score(pair, url)
    assert KEY not in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("plain", "words"),
    [
        (Vllm(num=2), "drafts, too, and plain decoding is to be measured there"),
        (Vllm(), "vLLM 0.33.0 at .* and 0.32.0 at .* cannot be compared"),
    ],
)
def test_a_plain_server_that_is_none(pair: Pair, plain: Vllm, words: str) -> None:
    plain.version = "0.33.0" if not plain.num else plain.version
    with (
        served(Vllm(num=3)) as (url, _),
        served(plain) as (plain_url, _),
        pytest.raises(InputError, match=words),
    ):
        score(pair, url, plain_url)


def by_command(folder: Path, tiny_folder: Path, *more: object) -> Any:
    (folder / "prompts.txt").write_text("".join(f"w{5 + i} w9\n" for i in range(4)))
    asked = ["score", "--target", tiny_folder, "--draft", tiny_folder, "--engine", "vllm"]
    asked += ["--prompts", folder / "prompts.txt", "--out", folder / "card.json"]
    return run(*asked, "--max-new-tokens", 8, *more)


def test_by_command(tiny_folder: Path, tmp_path: Path) -> None:
    with served(Vllm(num=2)) as (url, _), served(Vllm()) as (plain_url, _):
        at = url.replace("//", "//me:hidden@")
        done = by_command(tmp_path, tiny_folder, "--base-url", at, "--concurrency", "1,2", "--json")
        assert done.code == 0, done.err
        assert done.document["baseline"] == []
        assert done.document["verdict"]["best"]["speedup"] is None
        assert "Plain decoding was not measured" in " ".join(done.err.split())
        turns = ["--base-url", url, "--plain-base-url", plain_url, "--overwrite", "--json"]
        both = by_command(tmp_path, tiny_folder, *turns, "--temperature", "0")
        assert both.code == 0, both.err
        assert both.document["baseline"][0]["temperature"] == 0
    for said in (done.out, done.err, (tmp_path / "card.json").read_text()):
        assert "hidden" not in said
        assert KEY not in said


def test_a_port_that_another_program_has(tiny_folder: Path, tmp_path: Path) -> None:
    def answer() -> None:
        with suppress(OSError):  # it is closed
            while True:
                client, _ = other.accept()
                with client:
                    client.sendall(b"SSH-2.0-OpenSSH_9.2\r\n")

    with socket.create_server(("127.0.0.1", 0)) as other:
        threading.Thread(target=answer, daemon=True).start()
        url = f"http://127.0.0.1:{other.getsockname()[1]}/v1"
        scored = by_command(tmp_path, tiny_folder, "--base-url", url)
        asking = ["ask", "--target", "tiny", "--prompts", tmp_path / "prompts.txt"]
        asked = run(*asking, "--out", tmp_path / "out", "--base-url", url)
        other.shutdown(socket.SHUT_RDWR)
    for done in (scored, asked):
        assert done.code == 2
        assert f"cannot reach {url}" in " ".join(done.err.split()), done.err


@pytest.mark.parametrize(
    ("more", "words"),
    [
        ("--base-url http://127.0.0.1:9/v1", "cannot reach http://127.0.0.1:9/v1"),
        ("--base-url localhost:8000", "must look like http://localhost:8000/v1"),
        ("--plain-base-url http://x/v1", "--plain-base-url goes with --base-url"),
        ("--base-url http://x/v1 --plain-base-url http://x/v1", "are the same server"),
        ("--base-url http://x/v1 --engine-python python", "name one"),
        ("--base-url http://x/v1 --num-draft-tokens 4", "--num-draft-tokens would have no effect"),
        ("--base-url http://x/v1 --threads 2", "--threads would have no effect with --base-url"),
        ("--base-url http://x/v1 --tensor-parallel 2", "--tensor-parallel would have no effect"),
        ("--base-url http://x/v1 --engine-options {}", "--engine-options would have no effect"),
        ("--base-url http://x/v1 --device cpu", "--device cpu has no effect"),
        ("--base-url http://x/v1 --engine specdistill", "--base-url would have no effect with"),
        ("", "or a server that runs by --base-url"),
    ],
)
def test_options_that_do_not_go_together(
    tiny_folder: Path, tmp_path: Path, more: str, words: str
) -> None:
    done = by_command(tmp_path, tiny_folder, *more.split())
    assert done.code == 2
    assert words in " ".join(done.err.split())
    assert not (tmp_path / "card.json").exists()


def test_counters_of_several_engines_are_added() -> None:
    name = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines = [
        f'{name}{{engine="{engine}",model_name="a,position=\\"7\\"",position="{i}"}} {i + engine}.0'
        for engine in range(2)
        for i in range(12)
    ]
    for engine in range(2):
        lines += [
            f'vllm:generation_tokens_total{{engine="{engine}"}} 1e+06',
            f'vllm:spec_decode_num_drafts_total{{engine="{engine}"}} 12.0',
            f'vllm:spec_decode_num_draft_tokens_total{{engine="{engine}"}} 144.0',
        ]
    counters = read_metrics("\n".join(lines))
    assert counters == Counters(2_000_000, 24, 288, tuple(2 * i + 1 for i in range(12)))
    assert read_metrics("python_info 1.0\nhello") is None


# And the real one, where there is one


@contextmanager
def vllm_serving(model: Path, *options: str) -> Iterator[str]:
    """The base URL of vLLM's own server, at a free port."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    small = ["--dtype", "float32", "--enforce-eager", "--max-model-len", "256"]
    command = [VLLM_PYTHON, "-m", "vllm.entrypoints.openai.api_server", "--model", str(model)]
    command += ["--host", "127.0.0.1", "--port", str(port), *small, *options]
    environ = environment(1)
    del environ["VLLM_ENABLE_V1_MULTIPROCESSING"]  # a server's engine has a process of its own
    log = model.parent / f"{port}.log"
    with log.open("w") as out:
        process = subprocess.Popen(command, cwd=model.parent, env=environ, stdout=out, stderr=out)
    try:
        while True:
            try:
                urlopen(f"http://127.0.0.1:{port}/health", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None, log.read_text()[-3000:]
                time.sleep(0.5)
        yield f"http://127.0.0.1:{port}/v1"
    finally:
        process.terminate()
        process.wait()


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A tiny target that vLLM can load, and a draft of two of its layers."""
    folder = tmp_path_factory.mktemp("world")
    save_draft(make_draft(served_target(folder), [0, 1]), folder / "made")
    export(str(folder / "made"), folder / "draft", "vllm")
    return {name: folder / name for name in ("target", "made", "draft")}


@pytest.mark.slow
@needs_vllm
def test_a_vllm_server_is_scored(world: dict[str, Path], tmp_path: Path) -> None:
    """It accepts what our engine accepts; without a plain server, and with one in turns."""
    config = {"method": "draft_model", "model": str(world["draft"]), "num_speculative_tokens": 3}
    target, draft = (models.load(str(world[n]), dtype="float32") for n in ("target", "draft"))
    both = Pair.of(target, draft, PROMPTS, 24, 0)
    how: dict[str, Any] = {"temperature": [0.0], "max_new_tokens": 24, "concurrency": [3]}
    with vllm_serving(world["target"], "--speculative-config", json.dumps(config)) as url:
        alone = server.score(url, None, both, PROMPTS, **how)
        with vllm_serving(world["target"]) as plain_url:
            card = server.score(url, plain_url, both, PROMPTS, **how)
    assert card.lossless.greedy_identical == (6, 6)
    assert card.rows[0].speedup > 0
    assert math.isnan(alone.rows[0].speedup)
    drafter = drafter_for(draft, target.vocab_size)
    decoder = SpeculativeDecoder(target, drafter, num_draft_tokens=3)
    # The first token of vLLM is its prompt's, not a round's: ours begins after it, too.
    plain = SpeculativeDecoder(target)
    begun = [p.tokens + plain.run([Request("", p.tokens, 1)]).outputs[0].tokens for p in PROMPTS]
    outputs = [decoder.run([Request("", tokens, 23)]).outputs[0] for tokens in begun]
    rounds = [r for output in outputs for r in output.rounds]
    survival = [sum(r.accepted > i for r in rounds) / len(rounds) for i in range(3)]
    for row in (alone.rows[0], card.rows[0]):
        assert row.emitted == sum(1 + len(output.tokens) for output in outputs)
        # But for the last rounds, which vLLM counts beyond the end of the answer.
        assert [*row.survival_by_position, 0.0, 0.0][:3] == pytest.approx(survival, abs=0.06)
    for row in (alone.load.drafted[0], card.load.drafted[0]):
        assert row.accepted_by_position == pytest.approx(survival, abs=0.06)


@pytest.mark.slow
@needs_vllm
def test_a_vllm_server_tells_the_targets_most_probable_tokens(
    world: dict[str, Path], tmp_path: Path
) -> None:
    """As our own pass does, and a draft learns from it; what the checkpoint's generation config
    says of sampling is not heeded.
    """
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"w{5 + i} w{9 + 2 * i}\n" for i in range(12)))
    odd = shutil.copytree(world["target"], tmp_path / "odd")
    config = odd / "generation_config.json"
    greedy = {"do_sample": True, "top_k": 1, "repetition_penalty": 2.0}
    config.write_text(json.dumps(json.loads(config.read_text()) | greedy))
    asking = ["ask", "--target", "tiny", "--prompts", prompts, "--out", tmp_path / "out"]
    asking += ["--signal", "top-k:20", "--checkpoint", world["target"], "--temperature", "0,1"]
    with vllm_serving(odd, "--served-model-name", "tiny") as url:
        done = run(*asking, "--max-new-tokens", 12, "--base-url", url, "--json")
        assert done.document["answers"] == 12
        more = [*asking[:5], "--out", tmp_path / "none", *asking[7:], "--base-url", url]
        done = run(*more, "--signal", "top-k:32")
        assert done.code == 2, done.err
        assert "max allowed: 20" in " ".join(done.out.split()), done.out
    target = models.load(str(world["target"]), dtype="float32")
    greedy_texts = outside = 0
    for example in read_examples(tmp_path / "out", signal=True):
        tokens, signal = torch.tensor(example.response_tokens), example.signal
        states = read_states(target, example.prompt_tokens, example.response_tokens)
        log_p = target.logits(states.hidden).log_softmax(-1)
        expected, _ = keep(target, states, "top-k:20")
        listed = signal.tokens.long()
        # vLLM tells the token it sampled in the place of the last where that is not among them.
        others = (listed != expected.tokens).nonzero().tolist()
        assert all(place == 19 and listed[row, 19] == tokens[row] for row, place in others)
        outside += len(others)
        greedy_texts += bool((tokens == log_p.argmax(-1)).all())
        torch.testing.assert_close(
            signal.log_probs.float(), log_p.gather(-1, listed), atol=2e-3, rtol=2e-3
        )
        tail = 1 - log_p.gather(-1, listed).exp().sum(-1)
        torch.testing.assert_close(signal.log_tail.float().exp(), tail, atol=1e-4, rtol=2e-3)
    assert 0 < greedy_texts < 12, "some are greedy, without a penalty, and some are sampled"
    assert outside, "and from more than the most probable tokens"
    where = {"target": str(world["target"]), "draft": str(world["made"])}
    where["data"] = str(tmp_path / "out")
    assert distilled(settings(where, tmp_path / "run", signal="kept", heldout=4))
