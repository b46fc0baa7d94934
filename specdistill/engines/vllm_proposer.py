"""What proposes in vLLM: our draft, or whatever a `speculative_config` names."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import safe_open

from specdistill.drafts.serve_commands import draft_config
from specdistill.errors import InputError, ModelError, first_line
from specdistill.limits import shown
from specdistill.models import LanguageModel, locate
from specdistill.models.checkpoint_files import weight_files
from specdistill.models.hashes import model_sha256
from specdistill.scoring.card_rows import DraftingWay, ModelCard
from specdistill.scoring.measure import model_card

OURS = {  # keys of a speculative_config that are no business of the user's, and why
    "num_speculative_tokens": "--num-draft-tokens sets it",
    "num_speculative_tokens_per_batch_size": "it comes of what --concurrency measures",
}
LOSSLESS = ("standard", "block")  # values of its `rejection_sample_method`
LOOK_UPS = ("ngram", "ngram_gpu", "suffix")  # propose out of the text: no q, and not in every round
ONE_PASS = ("dflash", "dspark", "medusa")  # heads that give a whole round at once


@dataclass(frozen=True)
class Proposer:
    """vLLM's `speculative_config`, but for what a setting adds to it."""

    config: Mapping[str, Any]
    drafting: DraftingWay

    @classmethod
    def of_draft(cls, path: Path, parallel: bool) -> Proposer:
        config = draft_config(str(path.absolute()), parallel=parallel)
        return cls(config, "parallel" if parallel else "autoregressive")

    @classmethod
    def of_config(cls, config: Mapping[str, Any]) -> Proposer:
        """Raises `InputError` for one without a method, with a key that is set here, or whose
        output is not the target's.
        """
        for name in config:
            if name in OURS:
                raise InputError(f"--speculative-config: {name!r} is not for it: {OURS[name]}")
        method = config.get("method")
        if not isinstance(method, str) or not method:
            raise InputError(
                f'--speculative-config must name its method, as \'{{"method": "ngram"}}\'; got '
                f"{shown(method)}"
            )
        rule = config.get("rejection_sample_method", "standard")
        if rule not in LOSSLESS:
            raise InputError(
                f"--speculative-config: rejection_sample_method {shown(rule)} accepts what the "
                f"target would not say; it can be {' or '.join(LOSSLESS)}"
            )
        model = config.get("model")
        if isinstance(model, str) and Path(model).expanduser().exists():  # vLLM runs elsewhere
            config = {**config, "model": str(Path(model).expanduser().resolve())}
        if method in LOOK_UPS:
            return cls(config, "look-up")
        parallel = config.get("parallel_drafting") is True or method in ONE_PASS
        return cls(config, "parallel" if parallel else "autoregressive")

    def settings(self, num_draft_tokens: int, sampled: bool) -> dict[str, Any]:
        """With so many proposals a round; `sampled` where a temperature is above 0, and the
        config does not say itself how proposals are drawn: then as the draft would say them.
        """
        settings = {**self.config, "num_speculative_tokens": num_draft_tokens}
        if sampled and self.drafting != "look-up":
            settings.setdefault("draft_sample_method", "probabilistic")
        return settings

    def sampling(self, sampled: bool) -> str:
        """How proposals are drawn."""
        if self.drafting == "look-up":
            return "none: looked up in the text"
        return str(self.settings(1, sampled).get("draft_sample_method", "greedy"))


def proposer_card(config: Mapping[str, Any], target: LanguageModel) -> ModelCard:
    """What a scorecard says of the model that a `speculative_config` names. A head that has none of
    its own (`mtp`, say) lies in the target's checkpoint, a look-up nowhere, and the hash is that of
    the config. Raises `ModelError` where the model cannot be had.
    """
    name, method, facts = config.get("model"), config["method"], model_card(target)
    if method in LOOK_UPS or not isinstance(name, str):
        sizes = (0, 0) if method in LOOK_UPS else _sizes(target.path, target, inside=True)
        sha256 = hashlib.sha256(json.dumps(config, sort_keys=True).encode()).hexdigest()
        return ModelCard(method, *sizes, facts.dtype, facts.vocab_size, sha256)
    path = locate(name)
    sizes, sha256 = _sizes(path, target), model_sha256(path)
    return ModelCard(name, *sizes, facts.dtype, facts.vocab_size, sha256)


def _sizes(path: Path, target: LanguageModel, *, inside: bool = False) -> tuple[int, int]:
    """Parameters of a head by its files, or of what is beside the layers of the target `inside` its
    own, and bytes read for a token: all but an embedding, and the target's head where it has none.
    """
    parameters, read = 0, 0
    shared = target.head.weight.numel() * target.dtype.itemsize
    try:
        for file in weight_files(path):
            with safe_open(file, framework="pt") as tensors:
                for key in list(tensors.keys()):
                    layer = re.search(r"\blayers\.(\d+)\.", key)
                    of_target = layer is None or int(layer[1]) < target.num_layers
                    if inside and of_target and not key.startswith("mtp."):
                        continue
                    size, itemsize = _size(tensors.get_slice(key))
                    parameters += size
                    read += 0 if "embed_tokens" in key else size * itemsize
                    shared = 0 if "lm_head" in key else shared
    except (OSError, ValueError) as error:
        raise ModelError(f"cannot read the weights of {path}: {first_line(error)}") from error
    return parameters, read + (shared if parameters else 0)


def _size(tensor: Any) -> tuple[int, int]:
    """Elements of a tensor in a file, and bytes of each."""
    size = 1
    for length in tensor.get_shape():
        size *= length
    digits = "".join(c for c in str(tensor.get_dtype()).split("_")[0] if c.isdigit())
    return size, max(int(digits or 8) // 8, 1)
