"""How to serve the draft: commands to copy."""

from __future__ import annotations

import json
import shlex
from pathlib import Path

from specdistill.models import DEMO
from specdistill.scoring.scorecard import Row, Scorecard

# A name that only SpecDistill understands, and the model it was quantised from.
KNOWN_ELSEWHERE = {DEMO: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def serving(card: Scorecard, best: Row, target: str, folder: Path) -> str:
    """The section with the commands for this draft, in our engine and in others."""
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
