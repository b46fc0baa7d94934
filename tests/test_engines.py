"""Outside engines: what they counted is what they did, and nothing is invented."""

import copy
import json
import math
import os
import re
import shlex
import shutil
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import replace
from itertools import pairwise
from math import nan
from pathlib import Path
from typing import Any
from unittest import mock

import public_heads
import pytest
import torch
from conftest import tiny_model, tiny_tokenizer
from real_vllm import VLLM_PYTHON, needs_vllm, served_target
from safetensors.torch import load_file, save_file
from scipy import stats
from servers import environment_with
from test_cli import Done, run

from specdistill import models
from specdistill.cli.scoring_by_vllm import serve_lines
from specdistill.cli.tables import evidence_line, load_tables, rows_table
from specdistill.data.chat import EncodedPrompt
from specdistill.data.filters import Filters
from specdistill.data.generation import generate
from specdistill.data.outside import Outside
from specdistill.data.prompts import Prompt
from specdistill.data.scorers import BestOf
from specdistill.data.signal import token_log_probs
from specdistill.data.token_store import Example, read_examples, read_manifest
from specdistill.decoding import Request, Round, Sampling, SpeculativeDecoder, drafter_for
from specdistill.drafts.export import export
from specdistill.drafts.making import make_draft, save_draft
from specdistill.engines import base, transformers, vllm
from specdistill.engines.vllm_engine import MEMORY_SHARE
from specdistill.engines.vllm_pair import Pair
from specdistill.engines.vllm_process import Deployment
from specdistill.engines.vllm_proposer import Proposer
from specdistill.errors import DecodingError, InputError, ModelError, StorageError
from specdistill.models import LanguageModel, head_only
from specdistill.models.head_only import load_outline
from specdistill.models.parallel import set_parallel
from specdistill.report.plots import figure_load, save
from specdistill.scoring import load
from specdistill.scoring.card_rows import ModelCard
from specdistill.scoring.comparable import obstacles, read_cards
from specdistill.scoring.compare import compare
from specdistill.scoring.measure import model_card
from specdistill.scoring.rows import Counts
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.trust import contradictions
from specdistill_kernels.verification.reference import probabilities

Both = tuple[LanguageModel, LanguageModel]  # target and draft
PROMPTS = [
    EncodedPrompt(f"p{i}", [7 + i, 9 + 3 * i % 50, 30 + i], ("a", "b")[i % 2]) for i in range(6)
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Both:
    """Target and draft as folders, in float64: no rounding decides anything."""
    folder = tmp_path_factory.mktemp("pair")
    target = tiny_model(1, layers=3)
    save_draft(target, folder / "target")
    save_draft(make_draft(target, [0, 1]), folder / "draft")
    return tuple(models.load(str(folder / n), dtype="float64") for n in ("target", "draft"))


@pytest.fixture(scope="module")
def card(pair: Both) -> Scorecard:
    return transformers.score(
        *pair, PROMPTS, num_draft_tokens=[1, 3], temperature=[0.0, 1.0], max_new_tokens=16
    )


# Transformers


def test_transformers_counts_what_our_engine_counts(card: Scorecard, pair: Both) -> None:
    """Greedy, float64: the same texts by the same rounds, but for an answer's last round, where
    an accepted end of the text counts as the target's own.
    """
    target, draft = pair
    for row in card.rows[:2]:
        assert row.temperature == 0
        gamma = row.num_draft_tokens
        decoder = SpeculativeDecoder(
            target, drafter_for(draft, target.vocab_size), num_draft_tokens=gamma
        )
        outputs = [decoder.run([Request(p.id, p.tokens, 16)]).outputs[0] for p in PROMPTS]
        rounds = [r for o in outputs for r in o.rounds]
        assert row.emitted == sum(len(o.tokens) for o in outputs)
        assert row.rounds == len(rounds)
        ended = sum(o.tokens[-1] in target.eos_ids for o in outputs)
        assert 0 <= sum(r.accepted for r in rounds) - row.accepted <= ended
        assert row.accepted > 0
        assert 0 <= row.tested - row.accepted <= row.rounds
        survival = [
            sum(r.accepted > i for r in rounds) / sum(r.proposed > i for r in rounds)
            for i in range(gamma)
        ]
        if not ended:
            assert row.survival_by_position == pytest.approx(survival, abs=0.05)
        assert row.block_efficiency == row.emitted / row.rounds


def test_a_transformers_card_holds_what_was_measured_and_no_more(card: Scorecard) -> None:
    assert card.provenance["engine"] == "transformers"
    assert card.outside_engine == f"transformers {card.provenance['versions']['transformers']}"
    assert card.lossless.greedy_identical == (12, 12)
    for row in card.rows:
        absent = ("acceptance_rate_expected", "cost_ratio", "verify_ratio", "predicted_speedup")
        assert all(math.isnan(getattr(row, name)) for name in (*absent, "planned_speedup"))
        assert 0 < row.accepted <= row.tested <= row.proposed
        assert row.proposed <= row.rounds * row.num_draft_tokens
        assert row.seconds == {}
    assert "cannot be trusted" not in card.verdict.reason
    assert "nan" not in card.verdict.reason
    assert "nothing else was checked of transformers" in evidence_line(card)
    assert {c.category for c in card.by_category} == {"a", "b"}
    table = rows_table(card)
    assert "measured in transformers" in str(table.title)
    assert not any("nan" in str(cell) for column in table.columns for cell in column._cells)


def test_a_card_of_an_engine_is_read_again_and_refused_beside_others(
    card: Scorecard, tmp_path: Path
) -> None:
    card.write(tmp_path / "card.json")
    text = (tmp_path / "card.json").read_text(encoding="utf-8")
    assert json.loads(text)["rows"][0]["cost_ratio"] is None
    again = Scorecard.read(tmp_path / "card.json")
    assert again.document() == card.document()
    other = replace(card, provenance={**card.provenance, "engine": "vllm"})
    (reason,) = obstacles({"theirs": card, "other": other})
    assert reason.startswith("engine differs: transformers ")


def test_the_target_as_its_own_assistant_is_accepted(pair: Both) -> None:
    target = pair[0]
    same = models.load(str(target.path), dtype="float64")
    card = transformers.score(
        target, same, PROMPTS, num_draft_tokens=[3], temperature=[0.0, 1.0], max_new_tokens=13
    )
    for row in card.rows:
        rejected = row.tested - row.accepted  # the ends of texts, see `_Rounds.answer`
        assert rejected <= row.prompts
        assert row.acceptance_by_position[0] > 0.9


def test_sampled_acceptance_is_the_overlap_of_the_distributions(pair: Both) -> None:
    """The q that Transformers verifies with is the one it drew from: accepted / tested is the mean
    of Σ min(p, q) at what was tested. One draft token, so every round tests right after its text.
    """
    target, draft = pair
    prompts = [EncodedPrompt(f"p{i}", [7 + i % 40, 9 + i % 50]) for i in range(40)]
    card = transformers.score(
        target, draft, prompts, num_draft_tokens=[1], temperature=[0.5], max_new_tokens=2
    )
    (row,) = card.rows
    assert row.proposed == row.tested == len(prompts), "two tokens: one is proposed, once"
    chances = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = torch.tensor([prompt.tokens])
            p, q = ((m.logits(m.hidden(tokens))[0, -1] / 0.5).softmax(-1) for m in (target, draft))
            chances.append(torch.minimum(p, q).sum().item())
    expected, spread = sum(chances), math.sqrt(sum(c * (1 - c) for c in chances))
    assert abs(row.accepted - expected) < 3.3 * spread + 1


def test_a_trimmed_draft_is_to_be_exported_first(pair: Both) -> None:
    target = pair[0]
    trimmed = make_draft(target, [0], torch.arange(0, 64, 2))
    with pytest.raises(InputError, match="specdistill export --for transformers"):
        transformers.score(
            target, trimmed, PROMPTS, num_draft_tokens=[1], temperature=[0.0], max_new_tokens=4
        )
    with pytest.raises(InputError, match="specdistill export --for transformers"):
        transformers.Batches(trimmed, 4)
    with pytest.raises(InputError, match="specdistill export --for vllm"):
        Pair.of(target, trimmed, PROMPTS, 4, 0)


# Answers to train on, by `generate` in batches

ASKED = [
    Prompt(f"p{i}", ({"role": "user", "content": " ".join(f"w{5 + i * 7 % 50}" * (i % 4 + 1))},))
    for i in range(11)
]


def answered(target: LanguageModel, folder: Path, **settings: object) -> dict[str, Example]:
    generate(target, ASKED, folder, **{"max_new_tokens": 12, "batch_size": 4, **settings})
    return {e.id: e for e in read_examples(folder, signal=True)}


BY_TRANSFORMERS = Outside("transformers", transformers.Batches)


def test_its_greedy_answers_and_their_signal_are_our_engines(pair: Both, tmp_path: Path) -> None:
    """Whatever else the checkpoint asks of `generate`: penalties are neither's to apply."""
    target = models.load(str(pair[0].path), dtype="float64")
    config = target.model.generation_config
    config.update(eos_token_id=[0, *range(5, 64, 9)], repetition_penalty=5.0, min_new_tokens=9)
    theirs = answered(target, tmp_path / "theirs", outside=BY_TRANSFORMERS)
    assert target.model.generation_config is config
    ours = answered(target, tmp_path / "ours")
    assert theirs.keys() == ours.keys() == {p.id for p in ASKED}
    assert any(len(e.response_tokens) < 12 for e in ours.values()), "an answer must end by itself"
    for id_, example in ours.items():
        assert theirs[id_].response_tokens == example.response_tokens
        for name, tensor in example.signal.tensors().items():
            assert torch.allclose(theirs[id_].signal.tensors()[name], tensor, atol=1e-5)


def test_its_samples_follow_the_filtered_distribution(pair: Both) -> None:
    target, count = pair[0], 4000
    requests = [
        Request(str(i), PROMPTS[0].tokens, 1, Sampling(0.7, top_k=6, top_p=0.9), seed=5)
        for i in range(count)
    ]
    rows = [row for r in transformers.Batches(target, 500).stream(requests) for row in r.rows]
    assert {row.request_id for row in rows} == {r.id for r in requests}
    drawn = torch.bincount(torch.tensor([row.tokens[0] for row in rows]), minlength=64)
    with torch.inference_mode():
        logits = target.logits(target.hidden(torch.tensor([PROMPTS[0].tokens]))[0, -1])
    knobs = {"temperature": 0.7, "top_k": 6, "top_p": 0.9}
    wanted = probabilities(logits[None], **{n: torch.tensor([x]) for n, x in knobs.items()})[0]
    wanted *= count
    assert drawn[wanted == 0].sum() == 0
    possible = wanted > 0
    assert 1 < possible.sum() <= 6
    statistic = ((drawn[possible] - wanted[possible]) ** 2 / wanted[possible]).sum().item()
    assert stats.chi2.sf(statistic, int(possible.sum()) - 1) > 1e-4


def test_its_batches_hold_one_sampling_each_and_go_on_after_an_interrupt(
    pair: Both, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = pair[0]
    both = {"samplings": [Sampling(0.0), Sampling(1.0)], "outside": BY_TRANSFORMERS}
    answer, calls = transformers.Batches._answer, []

    def breaks(self: transformers.Batches, requests: list[Request]) -> Round:
        assert len({r.sampling for r in requests}) == 1
        calls.append([r.id for r in requests])
        if len(calls) == 2:
            raise KeyboardInterrupt
        return answer(self, requests)

    monkeypatch.setattr(transformers.Batches, "_answer", breaks)
    with pytest.raises(KeyboardInterrupt):
        answered(target, tmp_path / "data", **both)
    answers = answered(target, tmp_path / "data", **both)
    assert answers.keys() == {p.id for p in ASKED}
    again = [id_ for call in calls[2:] for id_ in call]
    assert sorted([*calls[0], *again]) == sorted(p.id for p in ASKED), "asked twice"
    with pytest.raises(StorageError, match=r"other settings .*transformers"):
        answered(target, tmp_path / "data", samplings=both["samplings"])


def test_the_seed_decides_what_it_samples(pair: Both, tmp_path: Path) -> None:
    target = pair[0]

    def texts(name: str, seed: int, **more: object) -> list[list[int]]:
        how = {"outside": BY_TRANSFORMERS, "samplings": [Sampling(1.0)], **more}
        answers = answered(target, tmp_path / name, seed=seed, **how)
        return [answers[p.id].response_tokens for p in ASKED if p.id in answers]

    first = texts("a", 3)
    torch.manual_seed(99)
    assert texts("b", 3) == first
    assert texts("c", 4) != first
    again = texts("d", 3, filters=Filters(duplicates=True, retries=3), max_new_tokens=1)
    assert len({tuple(t) for t in again}) == len(again) > len({t[0] for t in first})


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_none_are_named(pair: Both, temperature: float) -> None:
    target = models.load(str(pair[0].path), dtype="float32")
    with torch.no_grad():
        next(p for n, p in target.model.named_parameters() if n.endswith("norm.weight"))[0] = nan
    request = Request("a", [7, 8], 4, Sampling(temperature))
    with pytest.raises(DecodingError, match="logits are NaN or all -inf; check the checkpoint"):
        next(transformers.Batches(target, 4).stream([request]))


def test_the_best_of_its_answers_is_kept(pair: Both, tmp_path: Path) -> None:
    target = pair[0]
    settings = {"outside": BY_TRANSFORMERS, "samplings": [Sampling(1.0)]}

    def score(example: Example) -> float:
        return token_log_probs(target, example.signal, example.response_tokens).mean()

    best = {
        number: answered(
            target, tmp_path / f"{number}", best_of=BestOf(number, "log-probability"), **settings
        )
        for number in (2, 8)
    }
    mean = {n: sum(map(score, answers.values())) / len(ASKED) for n, answers in best.items()}
    assert mean[8] > mean[2]


def test_generate_by_transformers(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "prompts.txt").write_text("w5 w6\nw7 w8\nw9\n")
    ask = ["generate", "--target", tiny_folder, "--prompts", tmp_path / "prompts.txt"]
    ask += ["--max-new-tokens", 6, "--json", "--dtype", "float32"]
    theirs = run(*ask, "--out", tmp_path / "theirs", "--engine", "transformers")
    ours = run(*ask, "--out", tmp_path / "ours")
    assert theirs.document["answers"] == ours.document["answers"] == 3
    assert read_manifest(tmp_path / "theirs").settings["engine"] == "transformers"
    texts = [
        {e.id: e.response_tokens for e in read_examples(tmp_path / n, signal=True)}
        for n in ("theirs", "ours")
    ]
    assert texts[0] == texts[1]


def test_a_request_too_long_for_the_target_is_refused_before_any_work(pair: Both) -> None:
    target = pair[0]
    with pytest.raises(InputError, match=r"request b: .*exceed the 512 positions"):
        next(
            transformers.Batches(target, 4).stream(
                [Request("a", [7], 2), Request("b", [7] * 511, 2)]
            )
        )


# vLLM: first its process, with a stand-in for vLLM on the other side

STAND_IN = """
import atexit, json, os, time
from types import SimpleNamespace as Names
__version__ = "VERSION"
now = 0.0
time.perf_counter = lambda: now  # no machine's
class SamplingParams:
    def __init__(self, **given):
        assert set(given) == {"temperature", "max_tokens", "stop_token_ids", "seed", "detokenize"}
        self.given = given
class Metric:
    def __init__(self, name, value):
        self.name = name
        setattr(self, "values" if isinstance(value, list) else "value", value)
class EngineArgs:
    def __init__(self, **given):
        self.config = given["speculative_config"]
    def create_engine_config(self):
        os.environ["OF_ANOTHER_ENGINE"] = "1"
        if self.config and self.config["num_speculative_tokens"] == self.config.get("refused"):
            raise ValueError("no runner here proposes so")
class LLM:
    def __init__(self, **given):
        assert given["enforce_eager"]
        assert "OF_ANOTHER_ENGINE" not in os.environ
        print("noise on stdout", flush=True)
        os.system("echo more noise")
        if "fail" in given:
            raise RuntimeError(given["fail"])
        v2 = os.environ.get("VLLM_USE_V2_MODEL_RUNNER") == "1"
        if v2 and "no_v2" in given:
            raise ValueError("Model Runner V2 needs Triton")
        with open(FOLDER + "/started", "a") as file:
            assert not os.path.exists(FOLDER + "/alive"), "two engines at a time"
            file.write(json.dumps(given) + "\\n")
        open(FOLDER + "/alive", "w").close()
        self.given, config = given, given.get("speculative_config", {})
        self.gamma = config.get("num_speculative_tokens", 0)
        self.looks_up = config.get("method") == "ngram"
        self.slow = 0.0 if v2 else given.get("slow_v1", 0.0)
        self.rounds = self.proposed = self.requests = 0
        self.accepted = [0] * self.gamma
        assert given["max_model_len"] == 3 + 10 + 2 * (self.gamma + 1), given
        self.most, self.under_way = given["max_num_seqs"], []
        self.vllm_config = Names(use_v2_model_runner=v2 and "only_v1" not in given)
        self.llm_engine = self
    def tokens_of(self, prompt, params):
        self.requests += 1
        if self.requests == self.given.get("die_at"):
            os._exit(7)
        first = sum(prompt["prompt_token_ids"]) % 50
        tokens = [first + i for i in range(params.given["max_tokens"])]
        if self.gamma == self.given.get("differs"):
            tokens[-1] += 1
        return tokens
    def add_request(self, id, prompt, params):
        self.under_way.append([id, self.tokens_of(prompt, params), 0])
        assert len(self.under_way) <= self.most
    def round_of(self, row):  # the prompt's pass emits one; a round accepts all but the last
        if row[2] == 0 or not self.gamma or self.looks_up and row[2] % 2:
            row[2] += 1
            return
        offered = self.gamma - 1 if self.looks_up else self.gamma
        self.rounds += 1
        self.proposed += offered
        for i in range(offered - 1):
            self.accepted[i] += 1
        row[2] += offered
    def step(self):  # in which several take longer where there is a draft
        global now
        each = self.given.get("costs", {}).get(str(self.gamma), bool(self.gamma))
        now += 0.002 + self.slow + 0.001 * len(self.under_way) * each
        outputs = []
        for row in self.under_way:
            self.round_of(row)
            done = row[2] >= len(row[1])
            output = Names(token_ids=row[1][: row[2]])
            outputs.append(Names(request_id=row[0], outputs=[output], finished=done))
        self.under_way = [row for row in self.under_way if row[2] < len(row[1])]
        return outputs
    def get_metrics(self):
        if not self.gamma:
            return [Metric("vllm:other", 3)]
        proposed = self.proposed - self.given.get("lacking", 0)
        return [Metric("vllm:spec_decode_num_drafts", self.rounds),
                Metric("vllm:spec_decode_num_draft_tokens", proposed),
                Metric("vllm:spec_decode_num_accepted_tokens", sum(self.accepted)),
                Metric("vllm:spec_decode_num_accepted_tokens_per_pos", self.accepted)]
atexit.register(lambda: os.path.exists(FOLDER + "/alive") and os.remove(FOLDER + "/alive"))
"""
CONFIG = """
class SpeculativeConfig:
    __dataclass_fields__ = {"num_speculative_tokens_per_batch_size": None}
"""


def stand_in(folder: Path, version: str = "9.9") -> Path:
    """An interpreter whose `vllm` is `STAND_IN`; engine options of its own say what it does."""
    for left in ("started", "alive"):
        (folder / left).unlink(missing_ok=True)
    text = STAND_IN.replace("VERSION", version).replace("FOLDER", repr(str(folder)))
    variables = "environment_variables = {'VLLM_USE_V2_MODEL_RUNNER': None}\n"
    return environment_with(folder, text, config=CONFIG, envs=variables)


def engines_of(folder: Path) -> list[dict[str, Any]]:
    """The arguments of each engine that was started there, in order."""
    return [json.loads(line) for line in (folder / "started").read_text().splitlines()]


def proposers_of(folder: Path) -> list[dict[str, Any]]:
    """Their speculative configs."""
    return [engine.get("speculative_config", {}) for engine in engines_of(folder)]


def gammas_of(folder: Path) -> list[int]:
    return [config.get("num_speculative_tokens", 0) for config in proposers_of(folder)]


def run_vllm(
    python: Path,
    pair: Both,
    config: dict[str, object] | None = None,
    options: dict[str, object] | None = None,
    drafting: str = "auto",
    **how: object,
) -> Scorecard:
    if config is None:
        asked = Pair.of(*pair, PROMPTS, 10, 0, drafting)
    else:
        asked = Pair.proposed_by(pair[0], config, PROMPTS, 10, 0)
    how = {"num_draft_tokens": [2, 3], "temperature": [0.0], "max_new_tokens": 10, **how}
    return vllm.score(Deployment(python, options=options or {}), asked, PROMPTS, **how)


def test_vllm_under_load(pair: Both, tmp_path: Path) -> None:
    """Every request at every concurrency, plainly before and after the drafts, and read again."""
    card = run_vllm(stand_in(tmp_path), pair, concurrency=[1, 4])
    assert card.provenance["runner"] == "V1"
    assert card.provenance["draft_sampling"] == "greedy"
    assert [row.concurrency for row in card.load.plain] == [1, 4]
    assert all(len(row.tokens_per_second) == 2 for row in card.load.plain)
    settings = [(row.concurrency, row.num_draft_tokens) for row in card.load.drafted]
    assert settings == [(1, 2), (1, 3), (4, 2), (4, 3)]
    for row in card.load.drafted:
        assert row.emitted == 60
        assert row.accepted_by_position == [1.0] * (row.num_draft_tokens - 1) + [0.0]
        assert 0 < row.first_token_seconds.median <= row.first_token_seconds.p95
        assert 0 < row.seconds_per_token.median <= row.seconds_per_token.p95
        (plain,) = (p for p in card.load.plain if p.concurrency == row.concurrency)
        mean = 2 / sum(1 / rate for rate in plain.tokens_per_second)  # of equal amounts
        assert row.speedup == pytest.approx(row.tokens_per_second / mean)
        assert row.pays == (row.tokens_per_second > max(plain.tokens_per_second))
    card.write(tmp_path / "card.json")
    assert Scorecard.read(tmp_path / "card.json").load == card.load
    (table,) = load_tables(card)
    assert table.row_count == 6
    save(figure_load(card), tmp_path / "load.png")
    without = run_vllm(stand_in(tmp_path), pair)
    assert not load_tables(without)
    assert not without.load.lines
    assert "schedule" not in without.provenance


def test_engines_of_vllm_come_one_after_the_other(pair: Both, tmp_path: Path) -> None:
    """The stand-in refuses to start beside another. No weights of the target are loaded here."""
    python = stand_in(tmp_path)
    bare = tuple(load_outline(str(model.path), dtype="float64") for model in pair)
    assert {p.device.type for model in bare for p in model.model.parameters()} == {"meta"}
    for outline, model in zip(bare, pair, strict=True):
        assert model_card(outline) == model_card(model)
        assert outline.eos_ids == model.eos_ids
        assert (outline.max_length, outline.mask_token) == (model.max_length, model.mask_token)
    with mock.patch("specdistill.engines.vllm_pair.load", side_effect=AssertionError):
        card = run_vllm(python, bare)
    assert gammas_of(tmp_path) == [0, 2, 3, 0]
    assert card.target == run_vllm(python, pair).target
    assert card.provenance["turns"].startswith("engine by engine")


def test_a_schedule_of_gamma_comes_of_the_table_of_loads(pair: Both, tmp_path: Path) -> None:
    """Rounds of the stand-in take 2 ms and with a draft 1 ms more for each request."""
    card = run_vllm(stand_in(tmp_path), pair, concurrency=[1, 2, 4])
    assert [bool(row.pays) for row in card.load.best(0.0).values()] == [True, True, False]
    assert card.provenance["schedule"] == card.load.schedule(0.0) == [[1, 3, 3], [4, 4, 0]]
    words = " ".join(serve_lines(card, "my/target", "served"))
    assert "1 to 3: γ = 3, 4: no draft, and so on" in words
    config = json.loads(shlex.split(words)[-1])
    assert config["num_speculative_tokens"] == 3
    assert config["num_speculative_tokens_per_batch_size"] == [[1, 3, 3], [4, 4, 0]]
    python = stand_in(tmp_path)
    (tmp_path / "vllm" / "config.py").write_text("class SpeculativeConfig:\n    pass\n")
    older = run_vllm(python, pair, concurrency=[1, 4])
    assert older.load.schedule(0.0)
    assert "schedule" not in older.provenance, "this version would not take it"


def test_schedules_have_no_holes() -> None:
    def schedule(*fastest: tuple[int, int, bool], only: int | None = None) -> list[list[int]]:
        rows = [
            load.Drafted(0.0, n, num, 9, 1.0, 1.1 / num, pays, *[load.Latency(1, 1)] * 2, [])
            for n, num, pays in fastest
        ]
        return load.Load([], rows).schedule(0.0, only)

    assert schedule((1, 4, True), (8, 2, True)) == [[1, 7, 4], [8, 8, 2]]
    assert schedule((2, 4, True), (4, 4, True), (8, 2, False)) == [[1, 7, 4], [8, 8, 0]]
    assert schedule((1, 4, True), (8, 4, True)) == []
    assert schedule((1, 4, False), (8, 2, False)) == []
    assert schedule() == []
    rows = [(1, 4, True), (8, 2, True), (8, 4, False)]
    assert schedule(*rows) == [[1, 7, 4], [8, 8, 2]]
    assert schedule(*rows, only=4) == [[1, 7, 4], [8, 8, 0]], "a parallel draft's γ is one"


def test_vllms_runners_are_both_measured_and_the_faster_one_served(
    pair: Both, tmp_path: Path
) -> None:
    for slow, faster, value in ((0.02, "V2", 1), (-0.001, "V1", 0)):
        python = stand_in(tmp_path)
        card = run_vllm(python, pair, options={"slow_v1": slow}, both_runners=True)
        assert gammas_of(tmp_path) == [3, 3, *[0, 2, 3, 0] * 2]
        assert [each["runner"] for each in card.provenance["runners"]] == ["V1", "V2"]
        assert card.provenance["runner"] == faster
        card.write(tmp_path / "card.json")
        card = Scorecard.read(tmp_path / "card.json")
        lines = serve_lines(card, "my/target", "served")
        assert f"model runner {faster} is the faster one" in lines[0]
        assert lines[-1].startswith(f"VLLM_USE_V2_MODEL_RUNNER={value} vllm serve my/target ")
    assert "VLLM_USE" not in serve_lines(run_vllm(python, pair), "t", "d")[-1]
    with pytest.raises(InputError, match="runs this by its runner V1 whatever it is told"):
        run_vllm(stand_in(tmp_path), pair, options={"only_v1": True}, both_runners=True)
    assert gammas_of(tmp_path) == [3, 3], "before anything was measured"
    with pytest.raises(DecodingError, match=r"by its runner V2 vLLM does not start.*needs Triton"):
        run_vllm(stand_in(tmp_path), pair, options={"no_v2": True}, both_runners=True)
    assert gammas_of(tmp_path) == [3], "nor was anything here"
    python = stand_in(tmp_path)
    (tmp_path / "vllm" / "envs.py").write_text("environment_variables = {}\n")
    with pytest.raises(InputError, match=r"vLLM 9\.9 has one model runner"):
        run_vllm(python, pair, both_runners=True)


def test_what_vllm_proposes_by_itself_gets_a_card_like_a_drafts(pair: Both, tmp_path: Path) -> None:
    """Look-ups propose in some rounds, and fewer than γ: each round is counted."""
    config = {"method": "ngram", "prompt_lookup_max": 3}
    card = run_vllm(stand_in(tmp_path), pair, config=config, temperature=[0.0, 1.0])
    assert card.drafting == "look-up"
    assert card.settings_label == "proposed by ngram"
    assert card.provenance["speculative_config"] == config
    assert card.provenance["draft_sampling"] == "none: looked up in the text"
    assert (card.draft.parameters, card.draft.name) == (0, "ngram")
    counts = [(r.rounds, r.proposed, r.tested, r.accepted) for r in card.rows[:2]]
    assert counts == [(6 * 10, 6 * 4, 6 * 4, 0), (6 * 6, 6 * 8, 6 * 8, 6 * 4)]
    assert card.rows[1].acceptance_by_position == [1.0, 0.0]
    assert not contradictions(card)
    card.write(tmp_path / "ngram.json")
    other = run_vllm(stand_in(tmp_path), pair, temperature=[0.0, 1.0])
    other.write(tmp_path / "ours.json")
    ranking = compare(read_cards([tmp_path / "ngram.json", tmp_path / "ours.json"]))
    assert {standing.draft for standing in ranking.standings} == {"ngram", other.draft.name}
    assert any("drafting differs: ngram" in remark for remark in ranking.remarks)
    command = serve_lines(Scorecard.read(tmp_path / "ngram.json"), "my/target", None)[-1]
    served = json.loads(shlex.split(command)[-1])
    assert served == {**config, "num_speculative_tokens": card.fixed_gamma}


def test_proposals_are_sampled_where_a_temperature_is_above_0_unless_a_config_says_otherwise(
    pair: Both, tmp_path: Path
) -> None:
    card = run_vllm(stand_in(tmp_path), pair, temperature=[0.0, 1.0], concurrency=[2])
    assert proposers_of(tmp_path)[1]["draft_sample_method"] == "probabilistic"
    assert card.provenance["draft_sampling"] == "probabilistic"
    assert [row.temperature for row in card.load.plain] == [0.0, 1.0]
    assert len(card.load.lines) == 2
    head = {"method": "eagle3", "model": str(pair[1].path)}
    card = run_vllm(stand_in(tmp_path), pair, config=head, temperature=[1.0])
    assert proposers_of(tmp_path)[1]["draft_sample_method"] == "probabilistic"
    assert card.provenance["draft_sampling"] == "probabilistic"
    assert card.drafting == "autoregressive"
    assert card.draft.parameters == pair[1].parameters()
    assert card.draft.sha256 == pair[1].sha256()
    greedy = {**head, "draft_sample_method": "greedy"}
    card = run_vllm(stand_in(tmp_path), pair, config=greedy, temperature=[1.0])
    assert proposers_of(tmp_path)[1]["draft_sample_method"] == "greedy"
    assert card.provenance["draft_sampling"] == "greedy"
    for method in ("dflash", "dspark"):
        assert Proposer.of_config({**head, "method": method}).drafting == "parallel"
    relative = os.path.relpath(pair[1].path)
    assert Proposer.of_config({**head, "model": relative}).config["model"] == str(pair[1].path)


def test_a_head_without_weights_of_its_own_reads_the_targets(pair: Both, tmp_path: Path) -> None:
    """Its embedding and output, or, of `mtp` and the like, all of it."""
    target, ours = pair[0], load_file(pair[0].path / "model.safetensors")
    head_bytes = 64 * 32 * 8  # in float64
    body = {n: w for n, w in ours.items() if "lm_head" not in n and "embed_tokens" not in n}
    both = {name: shutil.copytree(target.path, tmp_path / name) for name in ("head", "mtp")}
    save_file(body, both["head"] / "model.safetensors")
    config = {"method": "eagle3", "model": str(both["head"])}
    card = Pair.proposed_by(target, config, PROMPTS, 10, 0).draft
    assert card.weight_bytes == sum(w.nbytes for w in body.values()) + head_bytes
    more = {"model.layers.3.mlp.weight": torch.ones(8), "mtp.fc.weight": torch.ones(5)}
    save_file({**ours, **more}, both["mtp"] / "model.safetensors")
    target = replace(target, path=both["mtp"])
    for method in ("mtp", "deepseek_mtp", "dspark"):
        card = Pair.proposed_by(target, {"method": method}, PROMPTS, 10, 0).draft
        assert (card.name, card.parameters, card.weight_bytes) == (method, 13, 4 * 13 + head_bytes)


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({}, "must name its method"),
        ({"method": 3}, "must name its method"),
        ({"method": "ngram", "num_speculative_tokens": 3}, "--num-draft-tokens sets it"),
        ({"method": "eagle", "rejection_sample_method": "synthetic"}, "would not say"),
        ({"method": "eagle", "num_speculative_tokens_per_batch_size": []}, "--concurrency"),
    ],
)
def test_a_speculative_config_that_is_refused(config: dict[str, object], words: str) -> None:
    with pytest.raises(InputError, match=words):
        Proposer.of_config(config)


def test_up_to_which_concurrency_a_draft_pays_is_named() -> None:
    def rows(concurrency: int, seconds: float) -> tuple[load.Plain, list[load.Drafted]]:
        tokens, first, last = [11, 11], [0.1, 0.3], [1.1, 2.3]
        plain = [load.Run(span, tokens, first, last) for span in (2.0, 2.2)]
        drafted = {4: load.Run(seconds, tokens, first, last, [0.5, 0.2])}
        return load.load_rows(0.0, concurrency, plain, drafted)

    def line(*seconds: float) -> str:
        pairs = [rows(4**i, span) for i, span in enumerate(seconds)]
        (words,) = load.Load([p for p, _ in pairs], [d for _, each in pairs for d in each]).lines
        return words

    plain, (row,) = rows(1, 1.0)
    assert plain.tokens_per_second == [11.0, 10.0]
    assert row.speedup == pytest.approx(22 / (44 / 4.2))
    assert row.first_token_seconds.median == pytest.approx(0.2)
    assert row.seconds_per_token == load.Latency(pytest.approx(0.15), pytest.approx(0.195))
    assert "pays up to 4 at a time, and not at 16 (1: 2.10 times" in line(1.0, 1.5, 2.1)
    assert "does not pay at 1 at a time" in line(2.1, 1.0)
    assert "pays up to 4 at a time, the most that was measured" in line(1.0, 1.9)


def test_vllm_is_asked_in_turns_and_its_counters_taken(pair: Both, tmp_path: Path) -> None:
    card = run_vllm(stand_in(tmp_path), pair)
    assert card.outside_engine == "vllm 9.9"
    assert proposers_of(tmp_path)[1].keys() == {"method", "model", "num_speculative_tokens"}
    assert card.lossless.greedy_identical == (12, 12)
    for row, rounds in zip(card.rows, (5, 3), strict=True):
        gamma = row.num_draft_tokens
        assert row.emitted == 60
        assert row.rounds == 6 * (rounds + 1), "the prompt's own pass emits a token too"
        assert row.proposed == 6 * rounds * gamma
        assert row.accepted == 6 * rounds * (gamma - 1)
        assert row.tested == 6 * rounds * gamma, "all but the last were accepted"
        assert row.survival_by_position == [1.0] * (gamma - 1) + [0.0]
    assert [row.rounds for row in card.per_prompt] == [6] * 6 + [4] * 6


def test_vllm_is_told_to_draft_in_parallel(pair: Both, tmp_path: Path) -> None:
    target, draft = pair[0], copy.deepcopy(pair[1])
    set_parallel(draft, 63, 4)
    costs = {"options": {"costs": {"2": 0.2, "3": 0.6}}, "concurrency": [1, 6]}
    card = run_vllm(stand_in(tmp_path), (target, draft), **costs)
    assert card.provenance["schedule"] == [[1, 5, 3], [6, 6, 0]], "vLLM cannot change to γ = 2"
    assert [each.get("parallel_drafting") for each in proposers_of(tmp_path)[:2]] == [None, True]
    assert card.drafting == "parallel"
    assert card.provenance["mask_token"] == 63
    assert {row.draft_steps for row in card.rows} == {1}
    assert not contradictions(card)
    again = run_vllm(stand_in(tmp_path), (target, draft), drafting="autoregressive", **costs)
    assert again.provenance["schedule"] == [[1, 5, 3], [6, 6, 2]]
    assert again.drafting == "autoregressive"
    assert "parallel_drafting" not in proposers_of(tmp_path)[1]
    with pytest.raises(InputError, match="has no mask token"):
        Pair.of(*pair, PROMPTS, 10, 0, "parallel")


def test_transformers_drafts_token_by_token(pair: Both) -> None:
    target, draft = pair[0], copy.deepcopy(pair[1])
    set_parallel(draft, 63, 4)
    card = transformers.score(
        target, draft, PROMPTS[:2], num_draft_tokens=[2], temperature=[0.0], max_new_tokens=6
    )
    assert card.drafting == "autoregressive"


@pytest.mark.parametrize("rounding", [False, True])
def test_what_differs_in_vllm_is_explained_by_our_own_pass_or_fails(
    pair: Both, tmp_path: Path, rounding: bool
) -> None:
    """vLLM's passes of one and of many tokens round apart, as any engine's in half precision."""
    with ExitStack() as patches:
        if rounding:
            apart = {"most_rounding": 1e9, "both_passes": (torch.zeros(8, 64), torch.ones(8, 64))}
            for name, value in apart.items():
                place = f"specdistill.scoring.lossless.{name}"
                patches.enter_context(mock.patch(place, return_value=value))
        card = run_vllm(stand_in(tmp_path), pair, options={"differs": 3})
    assert card.lossless.greedy_identical == (6, 12)
    assert [tie["position"] for tie in card.lossless.ties] == [9] * 6
    assert all(tie["within_rounding"] is rounding for tie in card.lossless.ties)
    assert bool(card.failures) is not rounding


def test_a_target_too_large_for_our_own_pass_loses_no_measurement(
    pair: Both, tmp_path: Path
) -> None:
    with mock.patch("specdistill.engines.vllm_pair.load", side_effect=ModelError("too large")):
        card = run_vllm(stand_in(tmp_path), pair, options={"differs": 3})
    assert card.provenance["differences"] == "not explained by a pass of our own: too large"
    assert card.failures == [
        "6 of 12 greedy texts differ from those of plain decoding, and rounding does not explain it"
    ]
    card.write(tmp_path / "card.json")


def run_command(
    folder: Path,
    pair: Both,
    python: Path,
    target: Path,
    *more: object,
    draft: bool = True,
) -> Done:
    (folder / "prompts.txt").write_text("w5 w6 w7\nw6 w7 w8\nw9 w6 w8\n")
    asked = ["score", "--target", target, "--prompts", folder / "prompts.txt"]
    asked += ["--engine", "vllm", "--dtype", "float64", "--max-new-tokens", 7]
    asked += ["--num-draft-tokens", "2,3", "--temperature", 0, "--engine-python", python]
    asked += ["--draft", pair[1].path] if draft else []
    return run(*asked, "--out", folder / "card.json", "--overwrite", *more)


def test_the_command_scores_by_vllm(pair: Both, tmp_path: Path) -> None:
    """A draft, and what vLLM has of its own, on the same prompts; and a target as it is served."""
    target, python = pair[0].path, stand_in(tmp_path)
    cards = [tmp_path / f"{name}.json" for name in ("ours", "theirs", "quantised")]
    ours = run_command(tmp_path, pair, python, target, "--out", cards[0], "--runner", "both")
    assert ours.code == 0, ours.err
    assert "torch.float64 in the engine" in ours.err
    printed = " ".join(ours.out.split())
    assert "Serve it with" in printed
    assert "VLLM_USE_V2_MODEL_RUNNER=" in printed
    config = ["--speculative-config", '{"method": "ngram", "prompt_lookup_max": 2}']
    theirs = run_command(tmp_path, pair, python, target, "--out", cards[1], *config, draft=False)
    assert theirs.code == 0, theirs.err
    assert "are not checked" in theirs.err
    compared = run("compare", *cards[:2])
    assert compared.code == 0, compared.err
    assert "proposed by ngram" in " ".join(compared.out.split())
    options = ["--tensor-parallel", 2, "--engine-options", '{"quantization": "fp8", "x_y": true}']
    served = run_command(tmp_path, pair, python, target, "--out", cards[2], *options)
    assert served.code == 0, served.err
    assert "--tensor-parallel-size 2 --quantization fp8 --x-y --spec" in " ".join(
        served.out.split()
    )
    arguments = {"tensor_parallel_size": 2, "quantization": "fp8", "x_y": True}
    assert all(engine.items() >= arguments.items() for engine in engines_of(tmp_path)[-4:])
    assert Scorecard.read(cards[2]).provenance["engine_options"] == arguments
    compared = run("compare", cards[0], cards[2])
    assert compared.code == 1
    assert "deployment differs: {} in" in " ".join(compared.out.split())


def test_what_vllm_refuses_to_propose_with_is_seen_before_anything_is_measured(
    pair: Both, tmp_path: Path
) -> None:
    config = json.dumps({"method": "dspark", "model": str(pair[1].path), "refused": 3})
    more = ["--speculative-config", config]
    done = run_command(tmp_path, pair, stand_in(tmp_path), pair[0].path, *more, draft=False)
    assert done.code == 2
    assert re.search(r"does not start.*no runner here proposes so", " ".join(done.err.split()))
    assert not (tmp_path / "started").exists(), "no engine was started"


WRONG = {  # options of the stand-in, and what the command says
    "no such model": ({"fail": "no such model"}, "does not start (exit code 1). It said: .*model"),
    "no memory": (
        {"fail": "CUDA out of memory"},
        "the weights take .* GB over 1 devices, and up to 1 rows of .* tokens want a cache; take "
        "more devices .*CUDA out of memory",
    ),
    "it dies": ({"die_at": 3}, "vLLM process ended with exit code 7. It said: .*noise"),
    "counters": ({"lacking": 1}, "do not tell in which rounds"),
    "too short": ({"max_model_len": 9}, "max_model_len 9 cuts answers off: .* takes 21 tokens"),
    "too old": ({}, "vLLM 0.9.1 is too old: 0.32 and later are known here"),
    "no vLLM": ({}, "does not start (exit code 1). It said: .*ImportError: cannot import vllm"),
    "no interpreter": ({}, "there is no interpreter .*nothing"),
    "another target": ({}, "the draft's vocabulary .* differs from the target's"),
}


@pytest.mark.parametrize("how", WRONG)
def test_what_cannot_be_scored_is_one_sentence(pair: Both, tmp_path: Path, how: str) -> None:
    options, words = WRONG[how]
    python, target = stand_in(tmp_path, "0.9.1" if how == "too old" else "9.9"), pair[0].path
    if how == "no vLLM":
        (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('cannot import vllm')")
    if how == "no interpreter":
        python = tmp_path / "nothing"
    if how == "another target":
        other = tiny_model(1, layers=3)
        save_draft(replace(other, tokenizer=tiny_tokenizer(60)), target := tmp_path / "other")
    done = run_command(tmp_path, pair, python, target, "--engine-options", json.dumps(options))
    assert done.code == 2
    (line,) = (line for line in done.err.splitlines() if line.startswith("error: "))
    assert re.search(words.replace("(", r"\(").replace(")", r"\)"), line), line
    assert "Traceback" not in done.err
    assert not (tmp_path / "card.json").exists()


def test_a_pair_that_does_not_fit_is_refused_before_it_loads(pair: Both, tmp_path: Path) -> None:
    """An engine at a time has 90% of the memory for the pair, of float64."""
    weights = sum(8 * model.parameters() for model in pair)
    python = stand_in(tmp_path)

    def run_on(memory: float) -> Scorecard:
        (tmp_path / "vllm" / "platforms.py").write_text(
            "class current_platform:\n"
            "    is_cpu = staticmethod(lambda: False)\n"
            f"    get_device_total_memory = staticmethod(lambda: {int(memory)})\n"
        )
        return run_vllm(python, pair)

    with pytest.raises(InputError, match=r"1 devices: it needs larger ones, or more \(--tensor"):
        run_on(0.99 * weights / MEMORY_SHARE)
    with pytest.raises(DecodingError, match="AssertionError"):  # it begins to load
        run_on(1.01 * weights / MEMORY_SHARE)


def test_scoring_by_vllm_loads_no_weights(
    pair: Both,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The pair is in the dtype of the device that vLLM will have, which is to stay free for it."""
    from specdistill.cli import scoring

    monkeypatch.setattr(models, "load", mock.Mock(side_effect=AssertionError))
    monkeypatch.setattr(
        head_only, "choose_device", lambda device: "cuda" if device == "auto" else device
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: False)
    python = stand_in(tmp_path)
    (tmp_path / "prompts.txt").write_text("w5 w6 w7")
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('not here')")
    with pytest.raises(DecodingError, match="not here"):
        scoring.score(
            str(pair[0].path),
            str(tmp_path / "prompts.txt"),
            tmp_path / "card.json",
            str(pair[1].path),
            engine="vllm",
            engine_python=python,
        )
    assert capsys.readouterr().err.count("torch.float16 in the engine") == 2


def test_transformers_leaves_the_users_draft_as_it_was(pair: Both) -> None:
    config = pair[1].model.generation_config
    before = config.to_dict()
    transformers.score(
        *pair, PROMPTS[:2], num_draft_tokens=[2], temperature=[0.0], max_new_tokens=4
    )
    assert pair[1].model.generation_config is config
    assert config.to_dict() == before


# A clock: plain decoding twice, and what seems faster than it can be


def answers_by(clock: Callable[[float, int, int], float], asked: list[tuple[float, int]]):  # type: ignore[no-untyped-def]
    """An engine that takes `clock(t, γ, number of the question)` seconds a round of two tokens, or
    of one.
    """

    def ask(setting: tuple[float, int], prompt: EncodedPrompt, count: int) -> Counts:
        asked.append(setting)
        rounds = count // 2 if setting[1] else count
        steps = [clock(*setting, len(asked))] * rounds
        counts = [rounds] * setting[1]
        return Counts([5] * count, sum(steps), rounds, counts, counts, counts)

    return ask


def engine_card(clock: Callable[[float, int, int], float]) -> tuple[Scorecard, int]:
    asked: list[tuple[float, int]] = []
    measured = base.take_turns(
        answers_by(clock, asked), PROMPTS, [0.0], [1, 2], 16, lambda *_: None
    )
    sizes = ModelCard("m", 10, 40, "float32", 64, "ab" * 32)
    facts = {"engine": "vllm", "versions": {}}
    return base.scorecard(sizes, sizes, facts, PROMPTS, measured, [], 0), len(asked)


def test_an_engine_decodes_plainly_before_and_after_the_drafts() -> None:
    """The mean of both, but for one that stalled; γ chosen and judged by halves."""

    def clock(_: float, gamma: int, number: int) -> float:
        turn = (number - 4) % 4  # after the three of the warm-up
        return 1.2 if gamma else {0: 0.9, 3: 1.1}.get(turn, 1.0)

    card, asked = engine_card(clock)
    assert asked == 3 + 6 * 4
    assert card.rows[0].speedup == pytest.approx(2 / 1.2)
    assert card.verdict.pays
    assert "γ chosen on 3 prompts, judged on 3 others" in card.verdict.reason
    assert card.provenance["measured_again"] is None
    stalled, _ = engine_card(lambda t, g, n: 1.2 if g else 1.0 + 90 * (n == 4))
    assert stalled.rows[0].speedup == pytest.approx(2 / 1.2)
    assert stalled.provenance["stalls"] > 0.4


def test_an_engine_whose_rounds_are_too_fast_is_measured_again() -> None:
    card, asked = engine_card(lambda t, g, n: 0.9 if g else (1.3 if n < 20 else 0.8))
    assert asked == 3 + 2 * 6 * 4
    assert card.rows[0].speedup == pytest.approx(2 * 0.8 / 0.9)
    assert card.verdict.pays
    wrong, asked = engine_card(lambda t, g, n: 0.9 if g else 1.3)
    assert asked == 3 + 2 * 6 * 4
    assert not wrong.verdict.pays
    assert "a whole round took 0.69 of a plain step, also when it was" in wrong.verdict.reason
    assert math.isnan(wrong.verdict.best.speedup)


# And the real one, where there is one


def guesses_ahead(draft: LanguageModel, texts: list[list[int]], gamma: int, mask: int) -> None:
    """Teach a draft to guess `gamma` tokens of these very texts from masks."""
    set_parallel(draft, mask, gamma)
    rows = [(t[: n + 1], t[n + 1 : n + 1 + gamma]) for t in texts for n in range(len(t) - gamma)]
    width = max(len(seen) for seen, _ in rows) + gamma - 1
    read = [seen + [mask] * (width - len(seen)) for seen, _ in rows]
    places = [list(range(len(seen) - 1, len(seen) - 1 + gamma)) for seen, _ in rows]
    tokens, at, labels = (torch.tensor(x) for x in (read, places, [after for _, after in rows]))
    draft.model.requires_grad_(True)
    optimizer = torch.optim.Adam(draft.model.parameters(), lr=2e-3)
    for _ in range(60):
        logits = draft.model(tokens).logits.gather(1, at[..., None].expand(-1, -1, 64))
        torch.nn.functional.cross_entropy(logits.flatten(0, 1), labels.flatten()).backward()
        optimizer.step()
        optimizer.zero_grad()
    draft.model.requires_grad_(False)


@needs_vllm
@pytest.mark.parametrize("parallel", [False, True], ids=["autoregressive", "parallel"])
def test_vllm_accepts_what_our_engine_accepts(tmp_path: Path, parallel: bool) -> None:
    target = served_target(tmp_path)
    draft = make_draft(target, [0, 1])
    if parallel:
        answers = SpeculativeDecoder(target, batch_size=6).run(
            [Request(p.id, p.tokens, 24) for p in PROMPTS[::2]]
        )
        texts = [p.tokens + o.tokens for p, o in zip(PROMPTS[::2], answers.outputs, strict=True)]
        guesses_ahead(draft, texts, 3, 63)
    save_draft(draft, tmp_path / "made")
    export(str(tmp_path / "made"), tmp_path / "draft", "vllm")
    both = tuple(models.load(str(tmp_path / n), dtype="float32") for n in ("target", "draft"))
    asked = Pair.of(*both, PROMPTS, 24, 0)
    card = vllm.score(
        Deployment(Path(VLLM_PYTHON), threads=1),
        asked,
        PROMPTS,
        num_draft_tokens=[3],
        temperature=[0.0],
        max_new_tokens=24,
    )
    (row,) = card.rows
    same, compared = card.lossless.greedy_identical
    assert same == compared == len(PROMPTS)
    assert card.drafting == ("parallel" if parallel else "autoregressive")
    drafter = drafter_for(both[1], both[0].vocab_size)
    decoder = SpeculativeDecoder(both[0], drafter, num_draft_tokens=3)
    # The first token of vLLM is its prompt's, not a round's: ours begins after it, too.
    plain = SpeculativeDecoder(both[0])
    begun = [p.tokens + plain.run([Request("", p.tokens, 1)]).outputs[0].tokens for p in PROMPTS]
    outputs = [decoder.run([Request("", tokens, 23)]).outputs[0] for tokens in begun]
    rounds = [r for output in outputs for r in output.rounds]
    assert row.emitted == sum(1 + len(output.tokens) for output in outputs)
    survival = [sum(r.accepted > i for r in rounds) / len(rounds) for i in range(3)]
    theirs = [*row.survival_by_position, 0.0, 0.0][:3]
    # But for the last rounds, which vLLM counts beyond the end of the answer.
    assert theirs == pytest.approx(survival, abs=0.06)
    if parallel:
        assert survival[2] > 0.1, "the last place is tried, too"


def proposed_by_vllm(target: LanguageModel, config: dict[str, object]) -> Scorecard:
    card = vllm.score(
        Deployment(Path(VLLM_PYTHON), threads=1, options={"block_size": 32}),
        Pair.proposed_by(target, config, PROMPTS, 48, 0),
        PROMPTS,
        num_draft_tokens=[3],
        temperature=[0.0],
        max_new_tokens=48,
        concurrency=[1, 3],
    )
    assert card.lossless.greedy_identical == (len(PROMPTS), len(PROMPTS))
    assert [r.concurrency for r in card.load.drafted] == [1, 3]
    assert not contradictions(card)
    return card


@pytest.mark.slow
@needs_vllm
@pytest.mark.parametrize("method", ["eagle3", "dflash", "mtp"])
def test_a_public_head_is_counted_round_by_round(tmp_path: Path, method: str) -> None:
    """Its proposals are known, and so is what the target accepts of each."""
    make = public_heads.target_with_mtp if method == "mtp" else served_target
    folder = tmp_path / "target"
    make(folder if method == "mtp" else tmp_path)
    target = models.load(str(folder), dtype="float32")
    texts = []
    for prompt in PROMPTS:  # beyond the longest answer, as the last round looks there
        text = list(prompt.tokens)
        for _ in range(48 + 3):
            text.append(int(target.logits(target.hidden(torch.tensor([text]))[0, -1]).argmax()))
        texts.append(text[len(prompt.tokens) :])
    after = [Counter({(t + 1) % 64: 0}) for t in range(64)]
    for this, following in (each for text in texts for each in pairwise(text)):
        after[this][following] += 1
    follows = [max(public_heads.LOWEST, most.most_common(1)[0][0]) for most in after]
    config: dict[str, object] = {"method": method, "model": str(tmp_path / "head")}
    match method:
        case "eagle3":
            public_heads.eagle3(target, follows, tmp_path / "head")
        case "dflash":
            mask = next(t for t in range(64) if all(t not in text for text in texts))
            public_heads.dflash(follows, tmp_path / "head", mask)
        case "mtp":
            public_heads.mtp(target, follows)
            del config["model"]
    accepted = []
    for text in texts:
        done = 1
        while done < 48 and not target.eos_ids & set(text[:done]):
            proposed, last = 0, text[done - 1]
            while proposed < 3 and (last := follows[last]) == text[done + proposed]:
                proposed += 1
            accepted.append(proposed)
            done += proposed + 1
    card = proposed_by_vllm(target, config)
    (row,) = card.rows
    assert card.drafting == ("parallel" if method == "dflash" else "autoregressive")
    assert card.settings_label.endswith(f"proposed by {method}")
    assert card.draft.parameters > 0
    assert row.rounds == len(PROMPTS) + len(accepted)
    assert row.accepted == sum(accepted)
    by_place = [sum(number > i for number in accepted) / len(accepted) for i in range(3)]
    assert row.survival_by_position == pytest.approx(by_place)
    assert by_place[2] > 0, "the last place is tried, too"
    for loaded in card.load.drafted:  # whatever shares a batch
        assert loaded.accepted_by_position == pytest.approx(by_place), loaded.concurrency


@pytest.mark.slow
@needs_vllm
def test_vllms_own_look_up_is_counted_round_by_round(tmp_path: Path) -> None:
    """Of proposals that are in the text so far."""
    served_target(tmp_path)
    target = models.load(str(tmp_path / "target"), dtype="float32")
    config = {"method": "ngram", "prompt_lookup_max": 2, "prompt_lookup_min": 1}
    card = proposed_by_vllm(target, config)
    (row,) = card.rows
    assert card.drafting == "look-up"
    assert 0 < row.accepted < row.tested <= row.proposed < 3 * row.rounds
    assert row.emitted <= row.accepted + row.rounds, "each round emits a token of its own"
