"""How other programs are told to use a draft: what they call a target, and the exact command."""

from __future__ import annotations

import json
import shlex
from collections.abc import Mapping
from typing import Any, Literal

from specdistill.demo import DEMO
from specdistill.quoting import block
from specdistill.scoring.served import Served

Engine = Literal["transformers", "vllm", "sglang", "tensorrt-llm"]
NAMES: dict[Engine, str] = {
    "transformers": "Transformers",
    "vllm": "vLLM",
    "sglang": "SGLang",
    "tensorrt-llm": "TensorRT-LLM",
}
IN_PARALLEL: tuple[Engine, ...] = ("vllm", "tensorrt-llm")  # that serve a draft with a mask token
# A name that only SpecDistill understands, and the model it was quantised from.
KNOWN_ELSEWHERE = {DEMO: "HuggingFaceTB/SmolLM2-135M-Instruct"}


RUNNER_VARIABLE = {"V1": "VLLM_USE_V2_MODEL_RUNNER=0", "V2": "VLLM_USE_V2_MODEL_RUNNER=1"}


def draft_config(draft: str, *, parallel: bool) -> dict[str, Any]:
    """vLLM's `speculative_config` of an exported draft, but for its number of draft tokens."""
    config = {"method": "draft_model", "model": draft}
    return {**config, "parallel_drafting": True} if parallel else config


def vllm_command(
    target: str,
    config: Mapping[str, Any],
    num_draft_tokens: int,
    served: Served | None = None,
) -> str:
    """`vllm serve` with what `config` says proposes."""
    served = served or Served()
    most = max([each[2] for each in served.schedule], default=num_draft_tokens)
    speculative = {**config, "num_speculative_tokens": most}
    if served.sampling is not None:
        speculative["draft_sample_method"] = served.sampling
    if served.schedule:
        speculative["num_speculative_tokens_per_batch_size"] = [*served.schedule]
    words = ["vllm", "serve", target, *_flags(served.engine_options)]
    words += ["--speculative-config", json.dumps(speculative)]
    if served.runner is not None:
        words.insert(0, RUNNER_VARIABLE[served.runner])
    return shlex.join(words)


def _flags(options: Mapping[str, Any]) -> list[str]:
    """Arguments of vLLM's `LLM` as its command line has them."""
    words: list[str] = []
    for name, value in options.items():
        flag = name.replace("_", "-")
        if value is None:  # as it is without
            continue
        if isinstance(value, bool):
            words.append(f"--{flag}" if value else f"--no-{flag}")
        else:
            words += [f"--{flag}", value if isinstance(value, str) else json.dumps(value)]
    return words


def name_elsewhere(target: str) -> str:
    """What other programs can load in place of `target`; "TARGET" where nobody knows."""
    return KNOWN_ELSEWHERE.get(target, "TARGET" if target.endswith(".gguf") else target)


def command(
    engine: Engine,
    target: str,
    draft: str,
    num_draft_tokens: int,
    dtype: str = "auto",
    mask_token: int | None = None,
    served: Served | None = None,
) -> str:
    """What to run, or in Python to write, to decode `target` with the exported draft: in parallel
    where it has a mask token and the engine is one of `IN_PARALLEL`. `served` is for vLLM.
    """
    if engine == "vllm":
        config = draft_config(draft, parallel=mask_token is not None)
        return vllm_command(target, config, num_draft_tokens, served)
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
    if engine == "tensorrt-llm":
        kind, options = "DraftTarget", {}
        if mask_token is not None:
            kind, options = "PARD", {"mask_token_id": str(mask_token)}
        options = {"max_draft_len": str(num_draft_tokens), "speculative_model": draft} | options
        arguments = ", ".join(f"{name}={value}" for name, value in options.items())
        alone = "" if mask_token is not None else ", disable_overlap_scheduler=True"
        return f"""\
from tensorrt_llm import LLM
from tensorrt_llm.llmapi import {kind}DecodingConfig

drafting = {kind}DecodingConfig({arguments})
llm = LLM({target}, speculative_config=drafting{alone})
print(llm.generate("Your prompt").outputs[0].text)"""
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
    return block(text, "sh" if engine in ("vllm", "sglang") else "python")
