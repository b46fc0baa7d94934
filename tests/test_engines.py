"""Outside engines: what they counted is what they did, and nothing is invented."""

import json
import math
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import tiny_model

from specdistill import models
from specdistill.decoding import ModelDrafter, Request, Sampling, SpeculativeDecoder
from specdistill.drafts import make_draft, save_draft
from specdistill.engines import transformers, vllm
from specdistill.errors import DecodingError, InputError
from specdistill.models import LanguageModel
from specdistill.scoring.comparable import obstacles
from specdistill.scoring.measure import EncodedPrompt
from specdistill.scoring.scorecard import Scorecard
from specdistill.tables import evidence_line, rows_table

Tiny = Callable[..., LanguageModel]
PROMPTS = [
    EncodedPrompt(f"p{i}", [7 + i, 9 + 3 * i % 50, 30 + i], ("a", "b")[i % 2]) for i in range(6)
]


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[LanguageModel, LanguageModel]:
    """Target and draft as folders, in float64: no rounding decides anything."""
    folder = tmp_path_factory.mktemp("pair")
    target = tiny_model(1, layers=3)
    save_draft(target, folder / "target")
    save_draft(make_draft(target, [0, 1]), folder / "draft")
    return tuple(models.load(str(folder / n), dtype="float64") for n in ("target", "draft"))


@pytest.fixture(scope="module")
def card(pair: tuple[LanguageModel, LanguageModel]) -> Scorecard:
    return transformers.score(
        *pair, PROMPTS, num_draft_tokens=[1, 3], temperatures=[0.0, 1.0], max_new_tokens=16
    )


# Transformers


def test_transformers_counts_what_our_engine_counts(
    card: Scorecard, pair: tuple[LanguageModel, LanguageModel]
) -> None:
    """Greedy, float64: the same texts by the same rounds, but for an answer's last round, where
    an accepted end of the text counts as the target's own.
    """
    target, draft = pair
    for row in card.rows[:2]:
        assert row.temperature == 0
        gamma = row.num_draft_tokens
        decoder = SpeculativeDecoder(
            target, ModelDrafter(draft, target.vocab_size), num_draft_tokens=gamma
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
    ours = replace(card, provenance={**card.provenance, "engine": "specdistill"})
    (reason,) = obstacles({"theirs": card, "ours": ours})
    assert reason.startswith("engine differs: transformers ")


def test_the_target_as_its_own_assistant_is_accepted(
    pair: tuple[LanguageModel, LanguageModel],
) -> None:
    target = pair[0]
    same = models.load(str(target.path), dtype="float64")
    found = transformers.score(
        target, same, PROMPTS, num_draft_tokens=[3], temperatures=[0.0, 1.0], max_new_tokens=13
    )
    for row in found.rows:
        rejected = row.tested - row.accepted  # the ends of texts, see `_Rounds.answer`
        assert rejected <= row.prompts
        assert row.acceptance_by_position[0] > 0.9


def test_sampled_acceptance_is_the_overlap_of_the_distributions(
    pair: tuple[LanguageModel, LanguageModel],
) -> None:
    """The q that Transformers verifies with is the one it drew from: accepted / tested is the mean
    of Σ min(p, q) at what was tested. One draft token, so every round tests right after its text.
    """
    target, draft = pair
    prompts = [EncodedPrompt(f"p{i}", [7 + i % 40, 9 + i % 50]) for i in range(40)]
    found = transformers.score(
        target, draft, prompts, num_draft_tokens=[1], temperatures=[0.5], max_new_tokens=2
    )
    (row,) = found.rows
    assert row.proposed == row.tested == len(prompts), "two tokens: one is proposed, once"
    chances = []
    with torch.inference_mode():
        for prompt in prompts:
            tokens = torch.tensor([prompt.tokens])
            p, q = ((m.logits(m.hidden(tokens))[0, -1] / 0.5).softmax(-1) for m in (target, draft))
            chances.append(torch.minimum(p, q).sum().item())
    expected, spread = sum(chances), math.sqrt(sum(c * (1 - c) for c in chances))
    assert abs(row.accepted - expected) < 3.3 * spread + 1


def test_a_trimmed_draft_is_to_be_exported_first(pair: tuple[LanguageModel, LanguageModel]) -> None:
    target = pair[0]
    trimmed = make_draft(target, [0], torch.arange(0, 64, 2))
    with pytest.raises(InputError, match="specdistill export --for transformers"):
        transformers.score(
            target, trimmed, PROMPTS, num_draft_tokens=[1], temperatures=[0.0], max_new_tokens=4
        )
    with pytest.raises(InputError, match="specdistill export --for vllm"):
        vllm.Pair.of(target, trimmed, PROMPTS, 4, 0)


# vLLM: first its process, with a stand-in for vLLM on the other side

STAND_IN = """
import os
__version__ = "9.9"
class SamplingParams:
    def __init__(self, **given):
        assert set(given) == {"temperature", "max_tokens", "stop_token_ids", "seed", "detokenize"}
        self.given = given
class Metric:
    def __init__(self, name, value):
        self.name = name
        setattr(self, "values" if isinstance(value, list) else "value", value)
class LLM:
    def __init__(self, **given):
        assert given["enforce_eager"]
        print("noise on stdout", flush=True)
        os.system("echo more noise")
        if "BREAK" in given["model"]:
            raise RuntimeError("no such model")
        self.gamma = given.get("speculative_config", {}).get("num_speculative_tokens", 0)
        self.rounds = self.requests = 0
        assert given["max_model_len"] == 3 + 10 + self.gamma + 1, given
    def generate(self, prompts, params, use_tqdm):
        (prompt,) = prompts
        self.requests += 1
        if self.requests == DIE_AT:
            os._exit(7)
        first = sum(prompt["prompt_token_ids"]) % 50
        tokens = [first + i for i in range(params.given["max_tokens"])]
        if self.gamma:  # every round accepts all but the last, and the prompt's pass emits one
            self.rounds += -(-(len(tokens) - 1) // self.gamma)
        class Output:
            token_ids = tokens
        class Request:
            outputs = [Output]
        return [Request]
    def get_metrics(self):
        if not self.gamma:
            return [Metric("vllm:other", 3)]
        kept = [self.rounds] * (self.gamma - 1) + [0]
        return [Metric("vllm:spec_decode_num_drafts", self.rounds),
                Metric("vllm:spec_decode_num_draft_tokens", self.rounds * self.gamma - LACKING),
                Metric("vllm:spec_decode_num_accepted_tokens", sum(kept)),
                Metric("vllm:spec_decode_num_accepted_tokens_per_pos", kept)]
"""


def stand_in(folder: Path, die_at: int = 0, lacking: int = 0) -> Path:
    """An interpreter whose `vllm` is `STAND_IN`."""
    text = STAND_IN.replace("DIE_AT", str(die_at)).replace("LACKING", str(lacking))
    package = folder / "vllm"
    package.mkdir(exist_ok=True)
    (package / "__init__.py").write_text(text, encoding="utf-8")
    platform = "class current_platform:\n    is_cpu = staticmethod(lambda: True)\n"
    (package / "platforms.py").write_text(platform, encoding="utf-8")
    python = folder / "python"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{folder}" exec "{sys.executable}" "$@"\n')
    python.chmod(0o755)
    return python


def run_vllm(
    python: Path, pair: tuple[LanguageModel, LanguageModel], target_path: Path | None = None
) -> Scorecard:
    asked = vllm.Pair.of(*pair, PROMPTS, 10, 0)
    if target_path is not None:
        asked = replace(asked, target_path=target_path)
    return vllm.score(
        python, asked, PROMPTS, num_draft_tokens=[2, 3], temperatures=[0.0], max_new_tokens=10
    )


def test_vllm_is_asked_in_turns_and_its_counters_taken(
    pair: tuple[LanguageModel, LanguageModel], tmp_path: Path
) -> None:
    found = run_vllm(stand_in(tmp_path), pair)
    assert found.outside_engine == "vllm 9.9"
    assert found.lossless.greedy_identical == (12, 12)
    for row, rounds in zip(found.rows, (5, 3), strict=True):
        gamma = row.num_draft_tokens
        assert row.emitted == 60
        assert row.rounds == 6 * (rounds + 1), "the prompt's own pass emits a token too"
        assert row.proposed == 6 * rounds * gamma
        assert row.accepted == 6 * rounds * (gamma - 1)
        assert row.tested == 6 * rounds * gamma, "all but the last were accepted"
        assert row.survival_by_position == [1.0] * (gamma - 1) + [0.0]
    assert [row.rounds for row in found.per_prompt] == [6] * 6 + [4] * 6


def test_a_vllm_that_ends_early_says_why(
    pair: tuple[LanguageModel, LanguageModel], tmp_path: Path
) -> None:
    with pytest.raises(DecodingError, match=r"exit code 1: RuntimeError: no such model"):
        run_vllm(stand_in(tmp_path), pair, tmp_path / "BREAK")
    with pytest.raises(DecodingError, match=r"exit code 7: "):
        run_vllm(stand_in(tmp_path, die_at=3), pair)
    with pytest.raises(DecodingError, match="do not tell in which rounds"):
        run_vllm(stand_in(tmp_path, lacking=1), pair)
    (tmp_path / "vllm" / "__init__.py").write_text("raise ImportError('cannot import vllm')")
    with pytest.raises(DecodingError, match="cannot import vllm"):
        run_vllm(tmp_path / "python", pair)
    with pytest.raises(InputError, match="there is no interpreter"):
        run_vllm(tmp_path / "nothing", pair)


# And the real one, where there is one

VLLM_PYTHON = os.environ.get("SPECDISTILL_VLLM_PYTHON", "")


@pytest.mark.skipif(not VLLM_PYTHON, reason="SPECDISTILL_VLLM_PYTHON names no python with vLLM")
def test_vllm_accepts_what_our_engine_accepts(tmp_path: Path) -> None:
    target = tiny_model(1, layers=3, vocab=64, hidden_size=128, head_dim=32)
    save_draft(target, tmp_path / "target")
    save_draft(make_draft(target, [0, 1]), tmp_path / "draft")
    both = tuple(models.load(str(tmp_path / n), dtype="float32") for n in ("target", "draft"))
    asked = vllm.Pair.of(*both, PROMPTS, 24, 0)
    found = vllm.score(
        Path(VLLM_PYTHON),
        asked,
        PROMPTS,
        num_draft_tokens=[3],
        temperatures=[0.0],
        max_new_tokens=24,
        threads=1,
    )
    (row,) = found.rows
    same, compared = found.lossless.greedy_identical
    assert same == compared == len(PROMPTS)
    drafter = ModelDrafter(both[1], both[0].vocab_size)
    decoder = SpeculativeDecoder(both[0], drafter, num_draft_tokens=3)
    outputs = [
        decoder.run([Request(p.id, p.tokens, 24, Sampling(0.0))]).outputs[0] for p in PROMPTS
    ]
    rounds = [r for output in outputs for r in output.rounds]
    assert row.emitted == sum(len(output.tokens) for output in outputs)
    # The first token of vLLM is its prompt's, not a round's, so rounds begin one token later.
    survival = [sum(r.accepted > i for r in rounds) / len(rounds) for i in range(3)]
    assert row.survival_by_position == pytest.approx(survival, abs=0.12)
