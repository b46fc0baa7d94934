"""report.md: what a run did and found, written to be forwarded to people who were not there."""

from __future__ import annotations

import json
import math
import shlex
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from specdistill.errors import InputError, StorageError
from specdistill.models import DEMO
from specdistill.plots import read_metrics
from specdistill.scoring.scorecard import ModelCard, Row, Scorecard

# A name that only SpecDistill understands, and the model it was quantised from.
KNOWN_ELSEWHERE = {DEMO: "HuggingFaceTB/SmolLM2-135M-Instruct"}
CAPTIONS = {
    "speedup.png": "Speedup over plain decoding by number of draft tokens γ, with 95% intervals. "
    "What the measurement falls short of the predicted curve is overhead.",
    "acceptance.png": "Left: acceptance rate by γ, before distillation in grey. "
    "Right: acceptance by position within a round.",
    "time.png": "What the time of one emitted token is spent on.",
    "training.png": "The loss during training, and what it bought on held-out prompts.",
}
WORDS = """\
- **T**: sampling temperature, 0 is greedy. **γ**: draft tokens proposed in one round.
- **α**, acceptance rate: accepted / tested draft tokens; tested are those up to and including the \
first rejected one of each round. **Expected α**: mean of Σ min(p, q) over the tested positions, \
p and q being the target's and the draft's probabilities. **Accepted / proposed** is another \
number: it counts tokens that were never tested, as vLLM's counters do.
- **τ**, block efficiency: tokens emitted per target call; plain decoding is 1.
- **c** and **v**: time of one draft step, and of one verify pass, in plain target steps.
- **Speedup**: tokens per second with the draft / tokens per second of the same engine without it. \
**Predicted**: τ / (γc + v), from measured times. **Planned**: the closed form that assumes \
independent acceptance and a free verify pass.
- **MBSU**: τ / (γ · bytes read by the draft / bytes read by the target + 1); no clock in it."""


def write_report(run_dir: Path) -> Path:
    """Write `run_dir/report.md` from the files beside it; returns its path.

    `scorecard.json` must be there; `scorecard_before.json`, `metrics.jsonl`, `config.yaml` and
    `plots/` need not. Raises `InputError` for a file that cannot be read or a card without the row
    its verdict names, `StorageError` if the report cannot be written.
    """
    card = Scorecard.read(run_dir / "scorecard.json")
    before_path, metrics_path = run_dir / "scorecard_before.json", run_dir / "metrics.jsonl"
    before = Scorecard.read(before_path) if before_path.exists() else None
    metrics = read_metrics(metrics_path) if metrics_path.exists() else []
    config, target = _read_config(run_dir / "config.yaml")
    target = target or card.target.name
    best = _best_row(card)
    sections = [
        _verdict(card, best, target),
        _what_was_done(card, best, target, metrics),
        _before_after(card, before),
        _all_settings(card),
        _lossless(card),
        _pictures(run_dir / "plots"),
        _serving(card, best, target, run_dir / "draft"),
        _limits(card, best),
        _how_measured(card),
        f"## Configuration\n\n```yaml\n{config.strip()}\n```" if config else "",
    ]
    path = run_dir / "report.md"
    try:
        path.write_text("\n\n".join(filter(None, sections)) + "\n", encoding="utf-8")
    except OSError as error:
        raise StorageError(f"cannot write {path}: {error.strerror}; is there room?") from error
    return path


def _read_config(path: Path) -> tuple[str, str]:
    """The file's text and the target it names; empty where there is none."""
    if not path.exists():
        return "", ""
    try:
        text = path.read_text(encoding="utf-8")
        config = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise InputError(f"cannot read {path}: {error}") from error
    target = config.get("target") if isinstance(config, dict) else None
    return text, target if isinstance(target, str) else ""


def _best_row(card: Scorecard) -> Row:
    best = card.verdict.best
    for row in card.rows:
        if (row.temperature, row.num_draft_tokens) == (best.temperature, best.num_draft_tokens):
            return row
    raise InputError(
        f"the scorecard's verdict names T = {best.temperature:g}, γ = {best.num_draft_tokens}, "
        "and it has no such row; score the draft again"
    )


def _verdict(card: Scorecard, best: Row, target: str) -> str:
    low, high = (_number(end, 2) for end in best.speedup_ci95)
    speed = (
        f"`{target}` decodes {_number(best.speedup, 2)} times as fast as without it "
        f"(T = {best.temperature:g}, γ = {best.num_draft_tokens}; 95% interval {low} to {high})"
    )
    pays = "The draft pays" if card.verdict.pays else "The draft does not pay"
    proof = "and the output does not change"
    if card.verification.lossy:
        proof = f"but the output is not the target's ({card.verification.label})"
    elif not card.lossless.holds:
        proof = "but that the output does not change was NOT shown"
    break_even = _number(card.verdict.break_even_acceptance, 2)
    return (
        f"# {_labelled(f'A draft for {target}', card)}\n\n"
        f"**{pays}: with it, {speed}, {proof}.**\n\n"
        f"Why: {card.verdict.reason.rstrip('.')}. On this machine the best γ is as fast as plain "
        f"decoding at an acceptance rate of {break_even}; the draft reaches "
        f"{_number(best.acceptance_rate, 2)}."
    )


def _what_was_done(
    card: Scorecard, best: Row, target: str, metrics: Sequence[dict[str, Any]]
) -> str:
    last = metrics[-1] if metrics else {}
    trained = [f"{last['tokens']:,} tokens seen"] if "tokens" in last else []
    trained += [_duration(last["seconds"])] if "seconds" in last else []
    return "\n".join(
        [
            "## What was done\n",
            "A small draft model for one target and one kind of prompts was scored by real "
            "speculative decoding: every round counted and timed, against the target alone.\n",
            f"- Target: `{target}`, {_size(card.target)}",
            f"- Draft: `{card.draft.name}`, {_size(card.draft)}",
            f"- Training: {', '.join(trained) or 'the run folder holds no record of it'}",
            f"- Prompts: {best.prompts} per setting; {best.emitted:,} tokens emitted at the best",
        ]
    )


def _size(model: ModelCard) -> str:
    return (
        f"{model.parameters / 1e6:,.1f} M parameters, {model.weight_bytes / 1e6:,.1f} MB read per "
        f"token, {model.dtype}, vocabulary {model.vocab_size:,}"
    )


def _before_after(card: Scorecard, before: Scorecard | None) -> str:
    head = ["T", "draft", "γ", "expected α", "α", "τ", "tokens/s", "speedup [95% interval]"]
    lines = []
    gains = []
    for temperature in sorted({row.temperature for row in card.rows}):
        t = f"{temperature:g}"
        for base in card.baseline:
            if base.temperature == temperature:
                rate = _number(base.tokens_per_second, 1)
                lines.append([t, "none", "–", "–", "–", "1.00", rate, "1.00"])
        old_rows = [row for row in before.rows if row.temperature == temperature] if before else []
        if before and old_rows:
            name = _labelled("before distillation", before)
            lines.append([t, name, *_headline(before.best_row(temperature))])
        lines.append([t, _labelled("this draft", card), *_headline(card.best_row(temperature))])
        for old in old_rows:
            for new in card.rows:
                if (new.temperature, new.num_draft_tokens) == (temperature, old.num_draft_tokens):
                    expected = (old.acceptance_rate_expected, new.acceptance_rate_expected)
                    change = " to ".join(_number(value, 2) for value in expected)
                    gains.append(f"{change} at T = {t}, γ = {new.num_draft_tokens}")
    note = "Each line shows the γ that was fastest at that temperature."
    if gains and before and before.verification == card.verification:
        note += f" At equal γ, distillation took expected α from {'; from '.join(gains)}."
    if before is None:
        note += " There is no scorecard from before distillation in the run folder."
    title = "Before and after" if before else "Result"
    return f"## {title}\n\n{_table(head, lines)}\n\n{note}"


def _headline(row: Row) -> list[str]:
    low, high = (_number(end, 2) for end in row.speedup_ci95)
    return [
        str(row.num_draft_tokens),
        _number(row.acceptance_rate_expected, 3),
        _number(row.acceptance_rate, 3),
        _number(row.block_efficiency, 2),
        _number(row.tokens_per_second, 1),
        f"{_number(row.speedup, 2)} [{low}, {high}]",
    ]


def _all_settings(card: Scorecard) -> str:
    head = ["T", "γ", "expected α", "α", "τ", "tokens/s", "speedup [95% interval]", "predicted"]
    head += ["planned", "MBSU", "c", "v", "accepted / proposed", "rounds"]
    lines = [
        [
            f"{row.temperature:g}",
            *_headline(row),
            _number(row.predicted_speedup, 2),
            _number(row.planned_speedup, 2),
            _number(row.mbsu, 2),
            _number(row.cost_ratio, 3),
            _number(row.verify_ratio, 2),
            _number(row.acceptance_per_proposal, 3),
            f"{row.rounds:,}",
        ]
        for row in sorted(card.rows, key=lambda row: (row.temperature, row.num_draft_tokens))
    ]
    words = WORDS
    if card.verification.lossy:
        words += (
            f"\n- **{card.verification.label}**: a draft token is kept with probability "
            "min(1, f(p)/q) instead of min(1, p/q), with f(p) = p/ε (lin), p/ε² (sq) or p^ε (exp); "
            "expected α is then the mean of Σ min(f(p), q)."
        )
    elif card.verification.label:
        words += (
            f"\n- **{card.verification.label.capitalize()}**: a round's draft tokens are accepted "
            "as a whole, with the same distribution as one by one; α then says nothing of "
            "Σ min(p, q), so there is no expected α."
        )
    return f"## {_labelled('All settings', card)}\n\n{_table(head, lines)}\n\n{words}"


def _labelled(text: str, card: Scorecard) -> str:
    """With what is unusual about the card's verification."""
    label = card.verification.label
    return f"{text} ({label})" if label else text


def _lossless(card: Scorecard) -> str:
    proof = card.lossless
    if card.verification.lossy:
        return (
            "## Does the output stay the same?\n\n"
            f"**No: {card.verification.label}.** The lenience accepts draft tokens more often than "
            "the target's distribution allows, so the output follows neither the target nor the "
            "draft, and its quality has to be judged on its own. Score without `--lenience` for "
            "the speed of a lossless draft."
        )
    same, compared = proof.greedy_identical
    rounding = sum(1 for tie in proof.ties if tie["within_rounding"])
    faults = compared - same - rounding
    greedy = "no outputs were compared."
    if compared:
        greedy = f"{same} of {compared} outputs are token-identical to plain decoding."
    if rounding:
        greedy += (
            f" Rounding explains {rounding}: where the texts part, the target's two best tokens "
            "are closer than rounding, and one pass over several tokens rounds otherwise than "
            "several passes over one."
        )
    if faults:
        greedy += f" **Nothing explains {faults}: do not serve this before the fault is found.**"
    lines = [
        "## Does the output stay the same?\n",
        "The draft proposes, the target decides: the output follows the target's distribution "
        "whatever the draft is. That was checked on this pair:\n",
        f"- Greedy decoding (T = 0): {greedy}",
        "- The target as its own draft: of the tokens tested, it accepted "
        f"{_number(100 * proof.identity_acceptance, 2)}% (100% but for rounding).",
        "- Sampling: a chi-square test of the tokens drawn against the target's probabilities "
        f"gives p = {_number(proof.distribution_p_value, 3)}; only a p near 0 speaks against it.\n",
        f"In sum, the output is {'' if proof.holds else '**not shown to be** '}lossless.",
    ]
    if proof.ties:
        columns = list(dict.fromkeys(key for tie in proof.ties for key in tie))
        cells = [[_cell(tie.get(column, "")) for column in columns] for tie in proof.ties]
        head = [column.replace("_", " ") for column in columns]
        lines.append(f"\nWhere texts part:\n\n{_table(head, cells)}")
    return "\n".join(lines)


def _pictures(folder: Path) -> str:
    names = [name for name in CAPTIONS if (folder / name).exists()]
    pictures = [f"![{CAPTIONS[name]}](plots/{name})\n\n{CAPTIONS[name]}" for name in names]
    return "\n\n".join(["## Pictures", *pictures]) if pictures else ""


def _serving(card: Scorecard, best: Row, target: str, folder: Path) -> str:
    draft = str(folder) if folder.is_dir() else card.draft.name
    trimmed = card.draft.vocab_size < card.target.vocab_size
    gamma = str(best.num_draft_tokens)
    score = ["specdistill", "score", "--target", target, "--draft", draft]
    score += ["--prompts", "PROMPTS.jsonl", "--out", "CARD.json", "--num-draft-tokens", gamma]
    if card.verification.mode != "token":
        score += ["--verification", card.verification.mode]
    if card.verification.lenience:
        score += ["--temperature", f"{best.temperature:g}"]
        score += ["--lenience", card.verification.lenience]
    parts = ["## How to serve the draft", "Score it on prompts of your own:", _shell(*score)]
    outside = KNOWN_ELSEWHERE.get(target, "TARGET" if target.endswith(".gguf") else target)
    if outside != target:
        parts.append(
            f"Other programs do not know the name `{target}`; below, `{outside}` stands for it. "
            "Where that has other weights (not quantised, say), the output is what the target "
            "served would say by itself, while acceptance and speed need scoring again."
        )
    if trimmed:
        parts.append(
            f"This draft's vocabulary is trimmed to {card.draft.vocab_size:,} of "
            f"{card.target.vocab_size:,} tokens. Other engines need it at full vocabulary: write "
            "it so with `specdistill export` first."
        )
    for engine, name in (("transformers", "Transformers"), ("vllm", "vLLM")):
        parts.append(f"With {name}:")
        exported = f"{draft}-{engine}" if trimmed else draft
        if trimmed:
            export = ["specdistill", "export", "--draft", draft, "--out", exported]
            parts.append(_shell(*export, "--for", engine))
        if engine == "vllm":
            options = {"method": "draft_model", "model": exported}
            speculative = json.dumps(options | {"num_speculative_tokens": best.num_draft_tokens})
            parts.append(_shell("vllm", "serve", outside, "--speculative-config", speculative))
        else:
            parts.append(_transformers_snippet(card, outside, exported, gamma))
    return "\n\n".join(parts)


def _shell(*words: str) -> str:
    return f"```sh\n{shlex.join(words)}\n```"


def _transformers_snippet(card: Scorecard, target: str, draft: str, gamma: str) -> str:
    target, draft = json.dumps(target), json.dumps(draft)  # also how Python quotes them
    return f"""```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({target})
target = AutoModelForCausalLM.from_pretrained({target}, dtype="{card.target.dtype}")
draft = AutoModelForCausalLM.from_pretrained({draft}, dtype="{card.draft.dtype}")
draft.generation_config.num_assistant_tokens = {gamma}
inputs = tokenizer("Your prompt", return_tensors="pt")
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=128)
print(tokenizer.decode(output[0], skip_special_tokens=True))
```"""


def _limits(card: Scorecard, best: Row) -> str:
    device = card.provenance.get("device", "device unknown")
    other = []
    if card.verification.label:
        other = [
            f"- How tokens were accepted: {card.verification.label}. The programs above have their "
            "own ways, so their acceptance and speed differ."
        ]
    still = "" if card.verification.lossy else "the output is still the target's, but "
    return "\n".join(
        [
            "## Limits\n",
            *other,
            f"- Measured on this machine ({device}) with {best.prompts} prompts. Other hardware "
            "and other engines have other costs, and large batches leave less to gain.",
            f"- The 95% intervals are a paired bootstrap over {best.prompts} prompts: they cover "
            "the choice of prompts, not another workload or another machine.",
            "- The best γ was picked on the prompts it is reported for: a little flattering.",
            f"- A draft is made for a workload. On other prompts {still}acceptance and speedup may "
            "be much lower.",
        ]
    )


def _how_measured(card: Scorecard) -> str:
    facts = dict(card.provenance)
    versions = facts.pop("versions", {})
    facts["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    facts["target weights"] = f"sha256 {card.target.sha256}"
    facts["draft weights"] = f"sha256 {card.draft.sha256}"
    return (
        "## How it was measured\n\nRuns with and without the draft took turns, prompt by prompt, "
        "in one process, so that drift of the machine cancels. scorecard.json holds every figure."
        "\n\n" + "\n".join(f"- {name}: {_cell(value)}" for name, value in facts.items())
    )


def _table(head: Sequence[str], lines: Iterable[Sequence[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(line)} |" for line in [head, rule, *lines])


def _number(value: float, digits: int) -> str:
    """Fixed digits; a dash for what could not be measured."""
    return f"{value:.{digits}f}" if math.isfinite(value) else "–"


def _cell(value: object) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, float):
        return f"{value:.3g}" if math.isfinite(value) else "–"
    return "–" if value is None else str(value).replace("|", "\\|").replace("\n", " ")


def _duration(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"
