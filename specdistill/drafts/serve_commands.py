"""How other programs are told to use a draft: what they call a target, and the exact command."""

from __future__ import annotations

import json
import shlex
from typing import Literal

from specdistill.models.gguf_files import DEMO
from specdistill.quoting import block

Engine = Literal["transformers", "vllm", "sglang"]
# A name that only SpecDistill understands, and the model it was quantised from.
KNOWN_ELSEWHERE = {DEMO: "HuggingFaceTB/SmolLM2-135M-Instruct"}


def name_elsewhere(target: str) -> str:
    """What other programs can load in place of `target`; "TARGET" where nobody knows."""
    return KNOWN_ELSEWHERE.get(target, "TARGET" if target.endswith(".gguf") else target)


def command(
    engine: Engine, target: str, draft: str, num_draft_tokens: int, dtype: str = "auto"
) -> str:
    """What to run, or for Transformers to write, to decode `target` with the exported draft."""
    if engine == "vllm":
        speculative = {
            "method": "draft_model",
            "model": draft,
            "num_speculative_tokens": num_draft_tokens,
        }
        return shlex.join(
            ["vllm", "serve", target, "--speculative-config", json.dumps(speculative)]
        )
    if engine == "sglang":
        # A chain: one token a step, and the verified block holds the last known token too.
        options = {
            "--model-path": target,
            "--speculative-algorithm": "STANDALONE",
            "--speculative-draft-model-path": draft,
            "--speculative-num-steps": str(num_draft_tokens),
            "--speculative-eagle-topk": "1",
            "--speculative-num-draft-tokens": str(num_draft_tokens + 1),
        }
        words = [word for option in options.items() for word in option]
        return shlex.join(["python", "-m", "sglang.launch_server", *words])
    target, draft = json.dumps(target), json.dumps(draft)  # also how Python quotes them
    return f"""\
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({target})
target = AutoModelForCausalLM.from_pretrained({target}, dtype="{dtype}")
draft = AutoModelForCausalLM.from_pretrained({draft}, dtype="{dtype}")
draft.generation_config.num_assistant_tokens = {num_draft_tokens}
inputs = tokenizer("Your prompt", return_tensors="pt")
output = target.generate(**inputs, assistant_model=draft, max_new_tokens=128)
print(tokenizer.decode(output[0], skip_special_tokens=True))"""


def fenced(engine: Engine, text: str) -> str:
    """`command` as a block of Markdown."""
    return block(text, "python" if engine == "transformers" else "sh")
