"""What leaves for other programs: whole, checked, with a model card of its own figures."""

import json
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from cards import simulate
from conftest import tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

from specdistill import models
from specdistill.data.likeness import read_trained, write_trained
from specdistill.drafts import making
from specdistill.drafts.export import Exported, check_written, export
from specdistill.drafts.making import make_draft, save_draft
from specdistill.drafts.serve_commands import Engine
from specdistill.errors import InputError, ModelError
from specdistill.models.checkpoint_files import VOCAB_FILE
from specdistill.models.parallel import set_parallel, trained_draft_tokens
from specdistill.scoring.card_rows import DraftingWay, ModelCard
from specdistill.scoring.load import Drafted, Latency, Load, Plain
from specdistill.scoring.scorecard import Scorecard
from specdistill.scoring.slices import by_prompt_length

IDS = torch.arange(0, 64, 3)


def leaning(seed: int = 2, **config: object) -> models.LanguageModel:
    """A target whose states share a direction, as real ones do."""
    target = tiny_model(seed, layers=3, **config)
    with torch.no_grad():
        target.model.get_input_embeddings().weight.add_(torch.linspace(-2, 2, 32))
    return target


def scored(folder: Path, file: Path, drafting: DraftingWay = "autoregressive") -> None:
    rates = {(0.0, 2): 0.8, (0.0, 5): 0.7, (1.0, 2): 0.6}
    card = simulate(rates, prompts=6, drafting=drafting)
    sha256 = models.load(str(folder)).sha256()
    mine = ModelCard(str(folder), 1, 400_000, "float32", len(IDS), sha256)
    replace(card, draft=mine).write(file)


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    save_draft(make_draft(leaning(), [0, 1], IDS), tmp_path / "run" / "draft")
    scored(tmp_path / "run" / "draft", tmp_path / "run" / "scorecard.json")
    return tmp_path / "run"


def exported(draft: Path, out: Path, engine: Engine = "vllm") -> tuple[Exported, str]:
    """What was done, and the model card."""
    done = export(str(draft), out, engine)
    return done, (out / "README.md").read_text(encoding="utf-8")


def front_matter(text: str) -> dict[str, object]:
    _, head, _ = text.split("---", 2)
    return yaml.safe_load(head)


def test_the_checkpoint_is_the_draft_logit_by_logit(run_dir: Path, tmp_path: Path) -> None:
    done = export(str(run_dir / "draft"), tmp_path / "out", "vllm")
    assert done.largest_difference < 1e-4
    assert 0 <= done.leaked < 1e-9
    draft = models.load(str(run_dir / "draft"), dtype="float32")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.dtype == torch.float32, "whatever this machine likes to decode in"
    tokens = torch.randint(64, (2, 9))
    expected = draft.logits(draft.hidden(tokens))
    assert torch.allclose(stock(tokens).logits[..., IDS], expected, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.chat_template == draft.tokenizer.chat_template
    assert GenerationConfig.from_pretrained(tmp_path / "out").eos_token_id == 0
    assert not (tmp_path / "out" / VOCAB_FILE).exists()


def test_what_it_was_trained_on_goes_along(run_dir: Path, tmp_path: Path) -> None:
    write_trained(run_dir / "draft", ["how are you"])
    export(str(run_dir / "draft"), tmp_path / "out", "transformers")
    assert read_trained(tmp_path / "out") == read_trained(run_dir / "draft") != frozenset()


def test_the_card_has_the_figures_of_this_draft(run_dir: Path, tmp_path: Path) -> None:
    done, text = exported(run_dir / "draft", tmp_path / "out")
    assert done.scorecard == str(run_dir / "scorecard.json")
    assert done.notes == []
    card = Scorecard.read(run_dir / "scorecard.json")
    for temperature in (0.0, 1.0):
        row = card.best_row(temperature)
        line = f"| {temperature:g} | {row.num_draft_tokens} | {row.acceptance_rate:.3f} | "
        assert f"{line}{row.block_efficiency:.2f} | {row.speedup:.2f} [" in text
    assert f'"num_speculative_tokens": {card.verdict.best.num_draft_tokens}' in done.serve
    assert front_matter(text)["base_model"] == "my/target"
    assert "license" not in front_matter(text)
    assert "put the target's licence beside this file" in text
    assert f"```sh\n{done.serve}\n```" in text
    assert done.serve.startswith("vllm serve my/target --speculative-config ")
    assert "of which it proposes 22" in text


def test_every_fact_of_the_card_is_in_the_readme(run_dir: Path, tmp_path: Path) -> None:
    file = run_dir / "scorecard.json"
    card = Scorecard.read(file)
    latency = Latency(0.1, 0.2)
    plain = Plain(0.0, 2, [10.0, 11.0], latency, latency)
    drafted = Drafted(0.0, 2, 4, 60, 13.0, 1.24, True, latency, Latency(0.0123, 0.02), [0.5])
    facts = {"runner": "V1", "draft_sampling": "greedy", "schedule": [[1, 1, 4], [2, 2, 2]]}
    row = {"temperature": 0.0, "num_draft_tokens": 4, "plain_tokens_per_second": 9.0}
    rates = {"V1": 12.5, "V2": 11.5}
    facts["runners"] = [row | {"runner": n, "tokens_per_second": rate} for n, rate in rates.items()]
    lengths = {f"p{i}": 8 << i % 2 for i in range(6)}
    prompts = [replace(row, prompt_tokens=lengths[row.prompt_id]) for row in card.per_prompt]
    told = replace(
        card,
        load=Load([plain], [drafted]),
        provenance={**card.provenance, **facts},
        per_prompt=prompts,
        by_prompt_length=by_prompt_length(prompts, 0),
    )
    told.write(file)
    done, text = exported(run_dir / "draft", tmp_path / "out")
    serve = done.serve
    assert serve.startswith("VLLM_USE_V2_MODEL_RUNNER=0 vllm serve my/target ")
    speculative = json.loads(shlex.split(serve)[-1])
    assert speculative["num_speculative_tokens_per_batch_size"] == facts["schedule"]
    assert "draft_sample_method" not in speculative, "it was measured by vLLM's own default"
    assert serve in text
    plainly = {base.temperature: base.tokens_per_second for base in card.baseline}
    for row in card.rows:
        start = f"| {row.temperature:g} | {row.num_draft_tokens} | {row.acceptance_rate:.3f} | "
        lines = [line for line in text.splitlines() if line.startswith(start)]
        (line,) = (line for line in lines if line.count("|") == 13)
        assert f"| {row.tokens_per_second:.1f} | {plainly[row.temperature]:.1f} |" in line
        assert f"| {row.acceptance_rate_expected:.3f} |" in line
        assert line.endswith(f"| {row.mbsu:.2f} |")
    assert "| 0 | 2 | 4 | 13.0 | 1.24 | 100.0 (200.0) | 12.3 (20.0) | 0.50 |" in text
    assert "## By category of prompts, T = " in text
    assert "## By length of prompts, T = " in text
    for row in (*told.slices("by_category"), *told.slices("by_prompt_length")):
        figures = f"{row.acceptance_rate:.3f} | {row.block_efficiency:.2f} | {row.speedup:.2f} ["
        assert f"| {row.category} | {row.prompts} | {figures}" in text
    assert f"as its own draft: {card.lossless.identity_acceptance:.3g}\n" in text
    assert f"sampled tokens: {card.lossless.distribution_p_value:.3g}\n" in text + "\n"
    assert "pays up to 2 at a time" in text
    assert "model runner V1 is the faster one" in text
    elsewhere = {"runners", "schedule", "versions", "draft_origin", "trained_prompts"}
    for name in told.provenance.keys() - elsewhere:
        assert f"- {name.replace('_', chr(92) + '_')}: " in text, name
    for name, version in card.provenance["versions"].items():
        assert f"{name} " in text
        assert str(version).split("+")[0] in text.replace(chr(92), "")
    for model in (card.target, card.draft):
        assert model.sha256 in text
    assert card.verdict.reason.split(":")[0] in text


def test_a_card_of_another_draft_is_refused_or_left_out(run_dir: Path, tmp_path: Path) -> None:
    save_draft(make_draft(leaning(3), [0, 1], IDS), tmp_path / "other")
    with pytest.raises(InputError, match="is of another draft"):
        export(str(tmp_path / "other"), tmp_path / "out", "vllm", run_dir / "scorecard.json")
    assert not (tmp_path / "out").exists()
    save_draft(make_draft(leaning(3), [0, 1], IDS), run_dir / "draft")
    done, text = exported(run_dir / "draft", tmp_path / "out", "sglang")
    assert done.scorecard is None
    assert "holds another draft" in done.notes[0]
    assert "It has not been scored" in text
    assert "--speculative-num-steps 4 --speculative-eagle-topk 1" in done.serve
    assert "--speculative-num-draft-tokens 5" in done.serve


def test_the_embedded_target_has_a_licence_and_a_name_elsewhere(
    run_dir: Path, tmp_path: Path
) -> None:
    (run_dir / "scorecard.json").unlink()
    (run_dir / "config.yaml").write_text("target: demo:smollm2\n", encoding="utf-8")
    done, text = exported(run_dir / "draft", tmp_path / "out", "transformers")
    head = front_matter(text)
    assert head["license"] == "apache-2.0"
    assert head["base_model"] == "HuggingFaceTB/SmolLM2-135M-Instruct"
    assert 'from_pretrained("HuggingFaceTB/SmolLM2-135M-Instruct"' in done.serve
    assert "name a scorecard" in done.notes[0]


@pytest.mark.parametrize("damage", ["head", "body", "template"])
def test_a_checkpoint_that_is_not_the_draft_is_found(
    run_dir: Path, tmp_path: Path, damage: str
) -> None:
    draft, copy = (models.load(str(run_dir / "draft"), dtype="float32") for _ in range(2))
    wide = making.at_full_vocabulary(copy)
    if damage == "template":
        wide.tokenizer.chat_template = "{{ messages }}"
    else:
        layer = wide.head if damage == "head" else wide.model.model.layers[0].mlp.up_proj
        layer.weight[3] += 0.1
    save_draft(wide, tmp_path / "out")
    with pytest.raises(ModelError, match=r"would not (compute|be)"):
        check_written(draft, tmp_path / "out")


def test_what_leaks_to_lacking_tokens_is_told(tmp_path: Path) -> None:
    """Random states share no direction, so the rows are zeros and take their part."""
    save_draft(make_draft(tiny_model(2, layers=3), [0, 1], IDS), tmp_path / "draft")
    done, text = exported(tmp_path / "draft", tmp_path / "out")
    assert 0.001 < done.leaked < 1
    assert f"lacks take {done.leaked:.0%} of its probability" in done.notes[-1]
    assert f"take {done.leaked:.1e}" in text


def test_figures_that_are_not_to_be_trusted_do_not_go_along(run_dir: Path, tmp_path: Path) -> None:
    file = run_dir / "scorecard.json"
    card = Scorecard.read(file)
    replace(card, lossless=replace(card.lossless, identity_acceptance=0.5)).write(file)
    done, text = exported(run_dir / "draft", tmp_path / "out")
    assert "FAILED, not lossless" in done.notes[0]
    assert "It has not been scored" in text
    with pytest.raises(InputError, match=r"figures of .* cannot go along: FAILED, not lossless"):
        export(str(run_dir / "draft"), tmp_path / "named", "vllm", file)


def test_a_draft_that_is_not_trimmed_goes_with_its_figures(tmp_path: Path) -> None:
    draft = tmp_path / "run" / "draft"
    save_draft(make_draft(leaning(), [0, 1]), draft)
    scored(draft, tmp_path / "run" / "scorecard.json")
    (tmp_path / "out.part").mkdir()
    (tmp_path / "out.part" / "thesis.tex").touch()
    done = export(str(draft), tmp_path / "out", "vllm")
    assert done.scorecard == str(tmp_path / "run" / "scorecard.json")
    assert (done.leaked, done.notes) == (0, [])
    assert (tmp_path / "out.part" / "thesis.tex").exists()
    assert {file.name for file in tmp_path.iterdir()} == {"run", "out", "out.part"}


def test_the_draft_gets_as_many_rows_for_tokens_as_its_target(tmp_path: Path) -> None:
    """As vLLM demands, padding included; rows that only pad are out of reach."""
    save_draft(tiny_model(1, layers=3, vocab=72), tmp_path / "target")
    save_draft(make_draft(leaning(), [0, 1]), tmp_path / "draft")
    out = tmp_path / "out"
    done = export(str(tmp_path / "draft"), out, "vllm", target_name=str(tmp_path / "target"))
    assert json.loads((out / "config.json").read_text())["vocab_size"] == done.vocab_size == 72
    target, draft = (models.load(str(folder)) for folder in (tmp_path / "target", out))
    models.check_sizes(target, draft)
    logits = draft.logits(draft.hidden(making.random_texts(draft, rows=4) % 64))
    assert (logits.softmax(-1)[..., 64:] < 1e-9).all()


# Parallel drafts

MASK = 62  # not among IDS


def parallel_run(folder: Path, vocabulary: torch.Tensor | None, tied: bool = False) -> Path:
    """A run whose parallel draft was scored in parallel."""
    draft = make_draft(leaning(tie_word_embeddings=tied), [0, 1], vocabulary)
    set_parallel(draft, MASK, 6)
    draft.model.config.mask_token_id = 3  # of the target's config, say
    save_draft(draft, folder / "draft")
    scored(folder / "draft", folder / "scorecard.json", "parallel")
    return folder / "draft"


@pytest.mark.parametrize(
    ("vocabulary", "tied"),
    [(None, False), (None, True), (IDS, False)],
    ids=["whole", "tied", "trimmed"],
)
def test_a_parallel_draft_is_written_as_engines_look_for_it(
    tmp_path: Path, vocabulary: torch.Tensor | None, tied: bool
) -> None:
    draft = parallel_run(tmp_path, vocabulary, tied)
    done = export(str(draft), tmp_path / "out", "vllm")
    assert not done.notes
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["pard_token"], config["spd_type"]) == (MASK, "pard")
    assert "mask_token_id" not in config
    assert config["vocab_size"] == done.vocab_size == 64
    before, after = (models.load(str(folder)) for folder in (draft, tmp_path / "out"))
    rows = [m.model.get_input_embeddings().weight[MASK] for m in (before, after)]
    assert torch.equal(*rows)
    tokens = making.random_texts(after, rows=4)
    logits = after.logits(after.hidden(tokens))
    assert (logits.softmax(-1)[..., MASK] < 1e-9).all(), "the mask token is out of reach"
    assert done.leaked < 1e-9
    assert trained_draft_tokens(after) == 6


def test_a_parallel_drafts_card_says_both_ways_of_serving(tmp_path: Path) -> None:
    draft = parallel_run(tmp_path, None)
    done, text = exported(draft, tmp_path / "out")
    speculative = json.loads(shlex.split(done.serve)[-1])
    assert speculative == {
        "method": "draft_model",
        "model": str(tmp_path / "out"),
        "num_speculative_tokens": 5,
        "parallel_drafting": True,
        "draft_sample_method": "probabilistic",  # the card has T = 1, too
    }
    assert "one pass gives a whole round, from mask tokens (id 62, `pard_token`" in text
    assert "One token a pass, with Transformers:" in text
    assert "num_assistant_tokens = 4" in text, "the card's γ is that of the other way"
    assert "## Measured (parallel draft)" in text

    done, text = exported(draft, tmp_path / "sglang", "sglang")
    assert "STANDALONE" in done.serve
    assert "In parallel, with vLLM:" in text
    assert '"parallel_drafting": true' in text


def test_tensorrt_llm_is_given_the_mask_or_drafts_token_by_token(
    run_dir: Path, tmp_path: Path
) -> None:
    draft = parallel_run(tmp_path / "parallel", None)
    serve = export(str(draft), tmp_path / "out", "tensorrt-llm").serve
    place = json.dumps(str(tmp_path / "out"))
    arguments = f"max_draft_len=5, speculative_model={place}, mask_token_id=62"
    assert f"PARDDecodingConfig({arguments})" in serve
    compile(serve, "serve", "exec")
    serve = export(str(run_dir / "draft"), tmp_path / "other", "tensorrt-llm").serve
    assert "DraftTargetDecodingConfig(max_draft_len=" in serve
    assert "mask_token_id" not in serve
    compile(serve, "serve", "exec")


def test_an_unscored_parallel_draft_is_served_at_the_block_it_was_trained_for(
    tmp_path: Path,
) -> None:
    draft = parallel_run(tmp_path, None)
    (tmp_path / "scorecard.json").unlink()
    assert '"num_speculative_tokens": 6' in export(str(draft), tmp_path / "out", "vllm").serve
