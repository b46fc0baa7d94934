"""The whole loop on the embedded model, in small; and that model's losslessness."""

import json
import time
from pathlib import Path

import pytest
import torch
import yaml
from transformers import AutoModelForCausalLM

from specdistill import models, quickstart
from specdistill.config import load_config
from specdistill.data.chat import encode_prompt
from specdistill.data.prompts import load_prompts
from specdistill.decoding import ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.demo import DEMO
from specdistill.drafts.making import at_full_vocabulary, make_draft, save_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.scoring.scorecard import Scorecard


@pytest.fixture(scope="module")
def smollm2() -> LanguageModel:
    return models.load(DEMO, dtype="float32")


def test_greedy_text_with_a_draft_is_that_without(smollm2: LanguageModel) -> None:
    prompts = [encode_prompt(smollm2.tokenizer, p) for p in load_prompts("demo:heldout", limit=3)]
    plain = SpeculativeDecoder(smollm2).generate(prompts, max_new_tokens=24)
    draft = make_draft(
        models.load(DEMO, dtype="float32"), [0, 1], torch.arange(0, smollm2.vocab_size, 3)
    )
    for drafter, batch_size in ((ModelDrafter(draft, smollm2.vocab_size), 3), (None, 2)):
        decoder = SpeculativeDecoder(
            smollm2, drafter, num_draft_tokens=3 if drafter else 0, batch_size=batch_size
        )
        out = decoder.generate(prompts, max_new_tokens=24)
        assert [o.tokens for o in out.outputs] == [o.tokens for o in plain.outputs]


def test_the_stock_model_says_the_same(smollm2: LanguageModel) -> None:
    prompt = encode_prompt(smollm2.tokenizer, load_prompts("demo:heldout", limit=1)[0])
    stock = AutoModelForCausalLM.from_pretrained(smollm2.path, dtype=torch.float32)
    expected = stock.generate(torch.tensor([prompt]), max_new_tokens=20, do_sample=False)
    ours = SpeculativeDecoder(smollm2).generate([prompt], max_new_tokens=20).outputs[0].tokens
    assert ours == expected[0, len(prompt) :].tolist()


def test_the_target_accepts_its_own_samples(smollm2: LanguageModel) -> None:
    prompt = encode_prompt(smollm2.tokenizer, load_prompts("demo:heldout", limit=1)[0])
    drafter = ModelDrafter(smollm2, smollm2.vocab_size)
    decoder = SpeculativeDecoder(smollm2, drafter, num_draft_tokens=3)
    rounds = decoder.generate([prompt], max_new_tokens=16, sampling=Sampling(1.0)).outputs[0].rounds
    assert sum(r.accepted for r in rounds) == sum(r.tested for r in rounds)


def test_quickstart_in_small_leaves_a_complete_run(tmp_path: Path) -> None:
    plan = quickstart.Plan(
        answers=44,
        max_new_tokens=6,
        batch_size=44,
        train_seconds=4,
        score_prompts=2,
        score_tokens=8,
        num_draft_tokens=(2,),
        before_prompts=2,
        before_num_draft_tokens=(2,),
    )
    stages: list[str] = []

    def stop_once(stage: str, done: float, total: float, detail: str = "") -> None:
        stages.append(stage if done < total else f"{stage}, done")
        if stage == "distil" and stages.count("distil") == 3:
            raise KeyboardInterrupt

    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        quickstart.quickstart(run, plan=plan, progress=stop_once)
    before, after = quickstart.quickstart(run, plan=plan, progress=stop_once)
    assert stages.count("score, done") == 2, "the score before is not measured again"
    for name in (
        "plan.json",
        "config.yaml",
        "metrics.jsonl",
        "scorecard.json",
        "scorecard_before.json",
        "report.md",
        "report.html",
        "data/manifest.json",
        "draft/config.json",
        "plots/speedup.png",
        "plots/acceptance.png",
        "plots/training.png",
    ):
        assert (run / name).is_file(), name
    assert Scorecard.read(run / "scorecard.json") == after
    assert {r.temperature for r in after.rows} == {0.0, 1.0}
    same, compared = after.lossless.greedy_identical
    ties = sum(tie["within_rounding"] for tie in after.lossless.ties)  # where bfloat16 is decoded
    greedy = [row for row in after.rows if row.temperature == 0]  # γ = 2, and one that stops early
    assert same + ties == compared == 2 * len(greedy)
    assert before.draft.sha256 != after.draft.sha256
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["expected_alpha"] >= rows[0]["expected_alpha"]
    assert load_config(run / "config.yaml").training.batch_tokens == 512
    assert yaml.safe_load((run / "config.yaml").read_text())["target"] == DEMO
    draft = models.load(str(run / "draft"))
    assert draft.vocab_size == plan.vocab_size
    save_draft(at_full_vocabulary(draft), tmp_path / "wide")
    AutoModelForCausalLM.from_pretrained(tmp_path / "wide")

    stamp = (run / "scorecard.json").stat().st_mtime_ns
    time.sleep(0.01)
    with pytest.raises(InputError, match="finished run"):
        quickstart.quickstart(run, quickstart.Task(seed=1))
    assert (run / "scorecard.json").stat().st_mtime_ns == stamp
