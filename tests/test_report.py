"""The report says what the card says, in words and numbers a reader can act on."""

from __future__ import annotations

import base64
import json
import math
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import pytest
from cards import simulate
from conftest import tiny_model
from test_packaging import modules_loaded_by
from test_plots import (
    any_figures,  # noqa: F401, a fixture
    make_after,
    make_before,
    make_metrics,
    unmeasured,
    write_run,
)

from specdistill.drafts import model_card
from specdistill.drafts.making import save_draft
from specdistill.errors import InputError, StorageError
from specdistill.report import write_report
from specdistill.report.page import _figures
from specdistill.report.plots import plot_all
from specdistill.report.text import document
from specdistill.scoring.card_evidence import Lossless
from specdistill.scoring.load import Drafted, Latency, Load, Plain
from specdistill.scoring.scorecard import Scorecard, Verification
from specdistill.scoring.slices import by_prompt_length
from specdistill.scoring.verdict import verdict

CONFIG = "target: my/target\nseed: 17\nprompts: {path: a.jsonl}\n"


@pytest.fixture
def run_dir(tmp_path: Path) -> Path:
    """A finished run: both cards, metrics, configuration and a draft folder."""
    write_run(tmp_path)
    (tmp_path / "draft").mkdir()
    (tmp_path / "config.yaml").write_text(CONFIG, encoding="utf-8")
    return tmp_path


def report(run_dir: Path, card: Scorecard | None = None) -> str:
    if card:
        card.write(run_dir / "scorecard.json")
    path = write_report(run_dir)
    assert path == run_dir / "report.md"
    return path.read_text(encoding="utf-8")


def table(text: str, title: str) -> list[dict[str, str]]:
    """The first table under the heading `title`, a dict per line."""
    section = text.split(f"## {title}\n")[1].split("\n## ")[0]
    lines = [line for line in section.splitlines() if line.startswith("|")]
    head, _, *rest = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines]
    return [dict(zip(head, line, strict=True)) for line in rest]


def code(text: str, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)\n```", text, flags=re.DOTALL)


def test_who_reads_cards_alone_loads_no_torch(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    cards = [tmp_path / "run" / "scorecard.json", tmp_path / "other.json"]
    for card, draft in zip(cards, "ab", strict=True):
        simulate({(0.0, 2): 0.8}, draft=draft).write(card)
    named = [str(card) for card in cards]
    calls = [
        ["plot", str(tmp_path / "run")],
        ["plot", *named, "--out", str(tmp_path / "together")],
        ["compare", *named],
    ]
    loaded, _ = modules_loaded_by(
        "from specdistill.cli import app\n"
        f"for words in {calls!r}:\n"
        "    app(words, standalone_mode=False)"
    )
    for file in ("run/report.html", "run/plots/survival.png", "together/survival.png"):
        assert (tmp_path / file).exists()
    assert "matplotlib" in loaded
    assert not loaded & {"torch", "transformers"}


def test_the_verdict_comes_first(run_dir: Path) -> None:
    first, second = report(run_dir).split("\n\n")[:2]
    assert first == "# A draft for my/target"
    verdict = make_after().verdict
    low, high = verdict.speedup_ci95
    assert second == (
        f"**The draft pays: with it, `my/target` decodes {verdict.best.speedup:.2f} times as fast "
        f"as without it (T = 0, γ = 4; 95% interval {low:.2f} to {high:.2f}), and the output does "
        "not change.**"
    )


def test_what_few_prompts_cannot_show_is_not_called_a_loss(run_dir: Path) -> None:
    card = make_after()
    unsure = replace(card, verdict=replace(card.verdict, pays=False, speedup_ci95=(0.9, 4.5)))
    second = report(run_dir, unsure).split("\n\n")[1]
    assert second.startswith("**Whether the draft pays cannot be shown: with it, `my/target` deco")


def test_a_draft_that_does_not_pay_or_is_not_lossless_is_called_so(run_dir: Path) -> None:
    card = make_before()
    second = report(run_dir, card).split("\n\n")[1]
    speed = f"{card.verdict.best.speedup:.2f}"
    assert f"does not pay: with it, `my/target` decodes {speed} times as fast" in second
    faulty = replace(card, lossless=Lossless((47, 48), [], 0.9991, 0.43))
    text = report(run_dir, faulty)
    assert "NOT shown" in text.split("\n\n")[1]
    assert "Nothing explains 1" in text
    assert "**not shown to be** lossless" in text
    assert "does not change.**" not in text


def test_before_and_after(run_dir: Path) -> None:
    text = report(run_dir)
    lines = table(text, "Before and after")
    assert [(line["T"], line["draft"], line["γ"]) for line in lines] == [
        ("0", "none", "–"),
        ("0", "before distillation", "1"),
        ("0", "this draft", "4"),
        ("1", "none", "–"),
        ("1", "before distillation", "1"),
        ("1", "this draft", "3"),
    ]
    best = make_after().best_row(1.0)
    assert lines[-1]["expected α"] == f"{best.acceptance_rate_expected:.3f}"
    assert lines[-1]["α"] == f"{best.acceptance_rate:.3f}"
    assert lines[-1]["τ"] == f"{best.block_efficiency:.2f}"
    for line, row in ((lines[-1], best), (lines[4], make_before().best_row(1.0))):
        low, high = row.speedup_ci95
        assert line["speedup [95% interval]"] == f"{row.speedup:.2f} [{low:.2f}, {high:.2f}]"
    assert "tokens/s" not in lines[3], "of two scorings, on a machine that may have drifted"
    old, new = (card.rows[0].acceptance_rate_expected for card in (make_before(), make_after()))
    assert f"took expected α from {old:.2f} to {new:.2f} at T = 0, γ = 1;" in text


def test_all_settings_holds_every_row(run_dir: Path) -> None:
    rows = make_after().rows
    lines = table(report(run_dir), "All settings")
    assert len(lines) == len(rows) == 10
    for line, row in zip(lines, rows, strict=True):
        assert (line["T"], line["γ"]) == (f"{row.temperature:g}", str(row.num_draft_tokens))
        assert line["α"] == f"{row.acceptance_rate:.3f}"
        assert line["accepted / proposed"] == f"{row.acceptance_per_proposal:.3f}"
        assert line["predicted"] == f"{row.predicted_speedup:.2f}"
        assert line["planned"] == f"{row.planned_speedup:.2f}"
        assert line["MBSU"] == f"{row.mbsu:.2f}"
        assert line["c"] == f"{row.cost_ratio:.3f}"
        assert line["v"] == f"{row.verify_ratio:.2f}"
        assert line["rounds"] == f"{row.rounds:,}"


def test_what_was_done_and_how(run_dir: Path) -> None:
    text = report(run_dir)
    assert "Target: `my/target`, 134.5 M parameters, 269.0 MB read per token" in text
    assert "Training: 134,000 tokens seen, 2 min 0 s" in text
    assert "Prompts: 48 per setting" in text
    for fact in ("device: a processor", "threads: 2", "seed: 17", "git: 0123abc"):
        assert f"- {fact}\n" in text
    assert "- date: 2026-11-22T10:00:00+00:00\n" in text
    assert "- versions: specdistill 0.1.0, torch 2.13.0, transformers 5.23.0\n" in text
    assert code(text, "yaml") == [CONFIG.strip()]
    assert text.endswith("```\n")


def test_the_proof_of_losslessness(run_dir: Path) -> None:
    text = report(run_dir)
    assert "46 of 48 outputs are token-identical" in text
    assert "to plain decoding, each difference a rounding tie. Rounding decides 2" in text
    assert "99.91%" in text
    assert "p = 0.431" in text
    assert table(text, "Does the output stay the same?") == [
        {"prompt id": "p7", "position": "31", "top two gap": "0.0012", "within rounding": "yes"},
        {"prompt id": "p9", "position": "4", "top two gap": "0.0007", "within rounding": "yes"},
    ]
    clean = replace(make_after(), lossless=Lossless((48, 48), [], 1.0, 0.43))
    text = report(run_dir, clean)
    assert "48 of 48" in text
    assert "Rounding" not in text
    unchecked = replace(make_after(), lossless=Lossless((0, 0), [], math.nan, math.nan))
    assert "no outputs were compared" in report(run_dir, unchecked)


def test_the_reason_is_the_verdicts(run_dir: Path) -> None:
    third = report(run_dir).split("\n\n")[2]
    assert third == f"Why: {make_after().verdict.reason}"


def test_a_score_on_prompts_of_training_says_so_first(run_dir: Path) -> None:
    card = make_after()
    trained = {"prompts": 90, "sha256": "ab" * 32, "scored": 3}
    text = report(run_dir, replace(card, provenance=card.provenance | {"trained_prompts": trained}))
    head = text.split("\n## ")[0]
    assert f"**But 3 of {card.rows[0].prompts} prompts were trained on:" in head
    assert "were trained on" in (run_dir / "report.html").read_text(encoding="utf-8")
    trained["scored"] = 0
    text = report(run_dir, replace(card, provenance=card.provenance | {"trained_prompts": trained}))
    assert "trained on" not in text


def test_lengths_are_listed_in_their_order(run_dir: Path) -> None:
    card = simulate({(0.0, 4): 0.7})
    rows = [replace(r, prompt_tokens=60 + 20 * i) for i, r in enumerate(card.per_prompt)]
    card = replace(card, by_prompt_length=by_prompt_length(rows, 0))
    lines = table(report(run_dir, card), "By length of prompts")
    named = [f"{n}–{2 * n - 1:,} tokens" for n in (32, 64, 128, 256, 512)]
    assert [line["length"] for line in lines] == named
    assert sum(int(line["prompts"]) for line in lines) == 24
    alike = replace(card, by_prompt_length=by_prompt_length(rows[1:3], 0))
    assert "By length" not in report(run_dir, alike), "nothing to tell apart"


def test_categories_are_listed_by_speed(run_dir: Path) -> None:
    assert "By category" not in report(run_dir)
    card = simulate({(0.0, 2): 0.5, (0.0, 4): 0.7})
    lines = table(report(run_dir, card), "By category of prompts")
    best = card.verdict.best.num_draft_tokens
    rows = {row.category: row for row in card.by_category if row.num_draft_tokens == best}
    assert {line["category"] for line in lines} == {"reply", "steps"} == rows.keys()
    speeds = [rows[line["category"]].speedup for line in lines]
    assert speeds == sorted(speeds, reverse=True)
    for line in lines:
        row = rows[line["category"]]
        low, high = row.speedup_ci95
        assert line["prompts"] == "12"
        assert line["α"] == f"{row.acceptance_rate:.3f}"
        assert line["τ"] == f"{row.block_efficiency:.2f}"
        assert line["speedup [95% interval]"] == f"{row.speedup:.2f} [{low:.2f}, {high:.2f}]"


# report.html


class Elements(HTMLParser):
    """Tags with their attributes, and the text between them."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words = ""
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words += data


def page(run_dir: Path, card: Scorecard | None = None) -> str:
    report(run_dir, card)
    return (run_dir / "report.html").read_text(encoding="utf-8")


def test_the_page_says_what_the_report_says(run_dir: Path) -> None:
    html = page(run_dir)
    elements = Elements(html)
    assert html.startswith("<!doctype html>")
    assert "<title>A draft for my/target</title>" in html
    text = (run_dir / "report.md").read_text(encoding="utf-8")
    headings = re.findall(r"^## (.+)$", text, flags=re.MULTILINE)
    assert [tag for tag, _ in elements.tags].count("h2") == len(headings) > 5
    assert [tag for tag, _ in elements.tags].count("h1") == 1
    verdict = make_after().verdict
    speed, (low, high) = f"{verdict.best.speedup:.2f}", verdict.speedup_ci95
    for sentence in ("The draft pays: with it, ", f"decodes {speed} times as fast", *headings):
        assert sentence in elements.words
    for line in table(text, "All settings"):
        assert all(cell in elements.words for cell in line.values())
    needed = f"pays above {verdict.break_even_acceptance:.2f}"
    interval = f"95% interval {low:.2f} to {high:.2f}"
    for tile in (f"{speed} ×", interval, needed, "46 of 48 greedy"):
        assert tile in elements.words


def test_the_page_stands_alone(run_dir: Path) -> None:
    """No script, and nothing is fetched: its pictures are the very files, in it."""
    paths = plot_all(run_dir)
    elements = Elements(page(run_dir))
    tags = [tag for tag, _ in elements.tags]
    assert not {"script", "link", "iframe", "object", "embed"} & set(tags)
    pictures = [attributes for tag, attributes in elements.tags if tag == "img"]
    assert all(attributes["alt"] for attributes in pictures)
    contents = set()
    for _, attributes in elements.tags:
        assert not {name for name in attributes if name.startswith("on")}
        assert "href" not in attributes
        if source := attributes.get("src"):
            kind, _, data = source.partition(",")
            assert kind == "data:image/png;base64"
            contents.add(base64.b64decode(data))
    assert contents == {path.read_bytes() for path in paths}
    assert "url(" not in (run_dir / "report.html").read_text(encoding="utf-8")


def test_what_a_report_quotes_is_never_html(run_dir: Path) -> None:
    name = "<script>alert(1)</script><img src=x onerror=alert(1)>"
    usual = make_after()
    found = simulate({(0.0, 4): 0.6}).by_category[0]  # a category stands in no quotes
    categories = [replace(found, category=name)]
    card = replace(usual, draft=replace(usual.draft, name=name), by_category=categories)
    (run_dir / "config.yaml").write_text(f"target: '{name}'\n", encoding="utf-8")
    elements = Elements(page(run_dir, card))
    assert not {"script", "img"} & {tag for tag, _ in elements.tags}
    assert elements.words.count(name) >= 4


def test_a_page_that_does_not_pay_or_is_lossy_says_so(run_dir: Path) -> None:
    assert '<dl class="figures">' in page(run_dir)
    assert '<dl class="figures lost">' in page(run_dir, make_before())
    lossy = replace(make_after(), verification=Verification("token", "sq:0.7"))
    words = Elements(page(run_dir, lossy)).words
    assert re.search(r"output unchanged\s*no", words)
    faulty = replace(make_after(), lossless=Lossless((47, 48), [], 0.9991, 0.43))
    words = Elements(page(run_dir, faulty)).words
    assert re.search(r"output unchanged\s*not shown", words)
    assert re.search(r"speedup\s*FAILED\s*not lossless", words)


BROWSER = shutil.which("chromium") or shutil.which("google-chrome")


@pytest.mark.skipif(BROWSER is None, reason="needs a Chromium, and there is none on this machine")
def test_a_browser_shows_the_page_with_its_pictures(run_dir: Path) -> None:
    """Blue as in the pictures is hardly to be seen where they are missing."""

    def blue(html: str) -> int:
        (run_dir / "shown.html").write_text(html, encoding="utf-8")
        command = [BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars"]
        command += [
            f"--user-data-dir={run_dir / 'profile'}",
            "--host-resolver-rules=MAP * ~NOTFOUND",
        ]
        command += ["--window-size=1000,6000", f"--screenshot={run_dir / 'shot.png'}"]
        subprocess.run(
            [*command, (run_dir / "shown.html").as_uri()],
            check=True,
            capture_output=True,
            timeout=90,
        )
        pixels = matplotlib.image.imread(run_dir / "shot.png")[:, :, :3]
        assert pixels.shape[1] == 1000
        return int((abs(pixels - [0, 0x72 / 255, 0xB2 / 255]) < 0.02).all(-1).sum())

    plot_all(run_dir)
    html = page(run_dir)
    assert blue(html) > 1.5 * blue(re.sub("<img[^>]+>", "", html)) > 100


def test_only_pictures_that_exist_are_linked(run_dir: Path) -> None:
    assert "![" not in report(run_dir)
    paths = plot_all(run_dir)
    linked = re.findall(r"!\[.+?\]\((.+?)\)", report(run_dir))
    assert sorted(linked) == sorted(path.relative_to(run_dir).as_posix() for path in paths)
    paths[0].unlink()
    assert len(re.findall(r"!\[.+?\]\((.+?)\)", report(run_dir))) == len(paths) - 1


def test_up_to_which_load_the_draft_pays_is_in_the_verdict(run_dir: Path) -> None:
    card = Scorecard.read(run_dir / "scorecard.json")
    times = Latency(0.1, 0.2)
    plain = Plain(0.0, 4, [10.0, 11.0], times, times)
    row = Drafted(0.0, 4, 2, 60, 9.0, 0.86, False, times, times, [0.5])
    card = replace(card, load=Load([plain], [row]))
    card.write(run_dir / "scorecard.json")
    assert run_dir / "plots" / "load.png" in plot_all(run_dir)
    text = report(run_dir)
    assert "](plots/load.png)" in text
    (why,) = (line for line in text.splitlines() if line.startswith("Why: "))
    assert "the draft does not pay at 4 at a time" in why
    assert Load([plain]).lines == [], "no draft was measured"


def test_what_is_no_draft_of_ours_is_served_as_it_was_scored(run_dir: Path) -> None:
    """By its speculative config: there is no checkpoint of that name."""
    config = {"method": "ngram", "prompt_lookup_max": 4}
    card = replace(make_after(), draft=replace(make_after().draft, name="ngram", vocab_size=49152))
    facts = card.provenance | {"engine": "vllm", "speculative_config": config}
    text = report(run_dir, replace(card, provenance=facts))
    score, serve = map(shlex.split, code(text, "sh"))
    assert json.loads(score[score.index("--speculative-config") + 1]) == config
    assert "--draft" not in score
    assert json.loads(serve[-1]) == config | {"num_speculative_tokens": 4}
    assert code(text, "python") == []


def test_a_trimmed_draft_is_exported_before_other_engines_load_it(run_dir: Path) -> None:
    text = report(run_dir)
    draft = str(run_dir / "draft")
    score, to_transformers, to_vllm, serve = map(shlex.split, code(text, "sh"))
    assert score[:6] == ["specdistill", "score", "--target", "my/target", "--draft", draft]
    assert score[-2:] == ["--num-draft-tokens", "4"]
    assert to_transformers[-3:] == [f"{draft}-transformers", "--for", "transformers"]
    assert to_vllm[-3:] == [f"{draft}-vllm", "--for", "vllm"]
    assert serve[:4] == ["vllm", "serve", "my/target", "--speculative-config"]
    assert json.loads(serve[4]) == {
        "method": "draft_model",
        "model": f"{draft}-vllm",
        "num_speculative_tokens": 4,
        "draft_sample_method": "probabilistic",  # the card has T = 1, too
    }
    assert "trimmed to 2,048 of 49,152 tokens" in text
    assert f"{draft}-transformers" in code(text, "python")[0]


def test_a_draft_of_full_vocabulary_is_served_as_it_is(run_dir: Path) -> None:
    card = make_after()
    text = report(run_dir, replace(card, draft=replace(card.draft, vocab_size=49152)))
    assert "specdistill export" not in text
    assert json.loads(shlex.split(code(text, "sh")[-1])[-1])["model"] == str(run_dir / "draft")


def test_a_target_only_we_know_by_name_is_named_otherwise(run_dir: Path) -> None:
    (run_dir / "config.yaml").unlink()  # the card names demo:smollm2
    text = report(run_dir)
    assert "--target demo:smollm2" in code(text, "sh")[0]
    assert "vllm serve HuggingFaceTB/SmolLM2-135M-Instruct" in code(text, "sh")[-1]
    assert "demo:smollm2" not in code(text, "python")[0]
    (run_dir / "config.yaml").write_text("target: 'a b.gguf'\n", encoding="utf-8")
    text = report(run_dir)
    assert "--target 'a b.gguf'" in code(text, "sh")[0]
    assert "vllm serve TARGET" in code(text, "sh")[-1]


def test_the_transformers_snippet_runs(run_dir: Path, capsys: pytest.CaptureFixture[str]) -> None:
    target = run_dir / "target"
    for seed, folder in enumerate((target, run_dir / "draft")):
        save_draft(tiny_model(seed), folder)
    (run_dir / "config.yaml").write_text(f"target: {target}\n", encoding="utf-8")
    card = make_after()
    text = report(run_dir, replace(card, draft=replace(card.draft, vocab_size=49152)))
    (snippet,) = code(text, "python")
    names: dict[str, Any] = {}
    exec(snippet.replace("Your prompt", "w7 w8"), names)
    assert capsys.readouterr().out.startswith("w7 w8")
    assert names["draft"].generation_config.num_assistant_tokens == 4


def test_what_is_missing_is_said_or_left_out(tmp_path: Path) -> None:
    make_after().write(tmp_path / "scorecard.json")
    text = report(tmp_path)
    assert "before distillation |" not in text
    assert "no scorecard from before distillation" in text
    assert "Training: the run folder holds no record of it" in text
    assert "```yaml" not in text
    assert "--draft runs/a/draft" in text  # no draft folder here: the name the card gives


def test_what_was_not_measured_is_a_dash(run_dir: Path) -> None:
    card = make_after()
    rows = [
        row if row.temperature == 0 else replace(unmeasured(row), emitted=1) for row in card.rows
    ]
    proof = replace(card.lossless, distribution_p_value=math.nan, identity_acceptance=math.nan)
    baseline = [replace(base, tokens_per_second=math.nan) for base in card.baseline]
    provenance = {**card.provenance, "git": None}
    text = report(
        run_dir,
        replace(card, rows=rows, lossless=proof, baseline=baseline, provenance=provenance),
    )
    assert not re.search(r"\bnan\b", text, flags=re.IGNORECASE)
    assert "None" not in text
    assert "- git: –\n" in text
    assert "| – [–, –] |" in text
    assert "**not shown to be** lossless" in text


def test_bad_files_are_named(run_dir: Path) -> None:
    (run_dir / "config.yaml").write_text("target: [", encoding="utf-8")
    with pytest.raises(InputError, match=r"config\.yaml"):
        write_report(run_dir)
    (run_dir / "config.yaml").unlink()
    card = make_after()
    replace(card, rows=card.rows[:2]).write(run_dir / "scorecard.json")
    with pytest.raises(InputError, match="T = 0, γ = 4"):
        write_report(run_dir)
    card.write(run_dir / "scorecard.json")
    (run_dir / "report.md").mkdir()
    with pytest.raises(StorageError, match=r"report\.md"):
        write_report(run_dir)


def test_metrics_tell_the_training_whatever_the_last_row_is(run_dir: Path) -> None:
    assert "loss" not in make_metrics()[-1]
    (run_dir / "metrics.jsonl").write_text('{"tokens": 500, "seconds": 59.6}\n', encoding="utf-8")
    assert "Training: 500 tokens seen, 1 min 0 s" in report(run_dir)


def test_a_lossy_card_is_lossy_wherever_it_speaks(run_dir: Path) -> None:
    card = replace(make_after(), verification=Verification("token", "lin:0.5"))
    text = report(run_dir, card)
    label = "LOSSY, lenience lin:0.5"
    head, verdict = text.split("\n\n")[:2]
    assert head == f"# A draft for my/target ({label})"
    assert f"but the output is not the target's ({label})" in verdict
    assert f"## All settings ({label})\n" in text
    section = text.split("## Does the output stay the same?\n")[1].split("\n## ")[0]
    assert section.strip().startswith(f"**No: {label}.**")
    assert "min(1, f(p)/q)" in text
    names = [line["draft"] for line in table(text, "Before and after")]
    assert names == [
        *("none", "before distillation", f"this draft ({label})"),
        *("none", "before distillation", f"this draft ({label})"),
    ]
    assert "took expected α" not in text, "α of two rules are not compared"
    for claim in ("does not change.", "the output is lossless", "the output is still the target's"):
        assert claim not in text
    score = shlex.split(code(text, "sh")[0])
    assert score[-4:] == ["--temperature", "0", "--lenience", "lin:0.5"]


def test_block_verification_is_named_and_has_no_expected_acceptance(run_dir: Path) -> None:
    card = make_after()
    rows = [replace(row, acceptance_rate_expected=math.nan) for row in card.rows]
    text = report(run_dir, replace(card, rows=rows, verification=Verification("block")))
    assert text.startswith("# A draft for my/target (block verification)\n")
    assert "## All settings (block verification)\n" in text
    assert "there is no expected α" in text
    assert "and the output does not change.**" in text
    assert "In sum, the output is lossless." in text
    lines = text.split("## All settings")[1].split("\n")
    assert [line.split("|")[3].strip() for line in lines if line.startswith("| 0")] == ["–"] * 5
    assert shlex.split(code(text, "sh")[0])[-2:] == ["--verification", "block"]


def test_the_usual_verification_is_not_mentioned(run_dir: Path) -> None:
    text = report(run_dir)
    for word in ("LOSSY", "lenience", "block verification", "How tokens were accepted"):
        assert word not in text


def test_the_row_that_stops_early_is_named_and_others_serve_the_best_fixed_one(
    tmp_path: Path,
) -> None:
    card = simulate({(0.0, 2): 0.5, (0.0, 4): 0.4, (0.0, 8): 0.9}, seed=1)
    rows = [*card.rows[:2], replace(card.rows[2], least_reach=0.12)]
    card = replace(card, rows=rows, verdict=verdict(rows, per_prompt=card.per_prompt))
    assert card.verdict.best.num_draft_tokens == 8
    assert "at γ ≤ 8 (stops early), temperature 0" in card.verdict.reason
    text = document(card, None, [], "", "my/target", tmp_path)
    assert text.startswith("# A draft for my/target\n")
    assert "(T = 0, γ ≤ 8 (stops early); 95%" in text
    assert "with a chance below 0.12" in text
    assert "--num-draft-tokens 8 --least-reach 0.12" in text
    fixed = max(rows[:2], key=lambda row: row.speedup).num_draft_tokens
    assert f'"num_speculative_tokens": {fixed}' in text
    assert f"num_assistant_tokens = {fixed}" in text
    assert f"in every round, {fixed} below" in text


def test_an_early_stop_is_said_wherever_the_card_is_shown(tmp_path: Path) -> None:
    """In the report and in the command that scores it again; in the exported model card too."""
    after = make_after()
    early = replace(after, rows=[replace(row, least_reach=0.2) for row in after.rows])
    text = document(early, None, [], "", "my/target", tmp_path)
    assert "stops early (least reach 0.2)" in text
    assert "--least-reach 0.2" in text
    assert "| ≤ " in text
    assert "stops early" in model_card._figures(early)
    unknown = replace(early, verdict=replace(early.verdict, break_even_acceptance=math.nan))
    assert "pays above" not in "".join(figure.note for figure in _figures(unknown))
    assert "pays above" in "".join(figure.note for figure in _figures(after))
    assert "--least-reach" not in document(after, None, [], "", "my/target", tmp_path)
