"""What is left of a target and what proposes for it once vLLM is to load them itself."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch

from specdistill.data.chat import EncodedPrompt
from specdistill.decoding.parallel import Drafting, Way
from specdistill.engines.base import Measured, explained_differences
from specdistill.engines.vllm_proposer import Proposer, proposer_card
from specdistill.errors import InputError, SpecDistillError, first_line
from specdistill.limits import Dtype
from specdistill.models import LanguageModel, check_positions, check_sizes, load
from specdistill.models.checkpoint_files import weight_files
from specdistill.provenance import device_name
from specdistill.scoring.card_rows import ModelCard
from specdistill.scoring.measure import model_card, provenance


@dataclass(frozen=True)
class Pair:
    """Facts alone: no weights are held."""

    target: ModelCard
    target_path: Path
    draft: ModelCard
    proposer: Proposer
    weight_bytes: int  # of both, as vLLM keeps them
    eos_ids: list[int]
    facts: dict[str, Any]  # the provenance

    @classmethod
    def of(
        cls,
        target: LanguageModel,
        draft: LanguageModel,
        prompts: Sequence[EncodedPrompt],
        max_new_tokens: int,
        seed: int,
        drafting: Way = "auto",
    ) -> Pair:
        """A draft of ours. Raises `InputError` for one with a trimmed vocabulary, or one that
        cannot draft in parallel and is asked to.
        """
        if draft.vocab is not None:
            raise InputError(
                f"{draft.name} has a trimmed vocabulary, which vLLM cannot read; write it at full "
                "vocabulary with `specdistill export --for vllm`, and score that"
            )
        check_sizes(target, draft)
        check_positions([draft], ((p.named, len(p.tokens) + max_new_tokens) for p in prompts))
        proposer = Proposer.of_draft(draft.path, Drafting(drafting).in_parallel(draft))
        facts = provenance(target, draft, seed, max_new_tokens, prompts)
        return cls._of(target, model_card(draft), proposer, prompts, max_new_tokens, facts)

    @classmethod
    def proposed_by(
        cls,
        target: LanguageModel,
        config: Mapping[str, Any],
        prompts: Sequence[EncodedPrompt],
        max_new_tokens: int,
        seed: int,
    ) -> Pair:
        """Whatever vLLM's `speculative_config` names in the place of a draft. What needs a draft's
        checkpoint is not checked: its tokenizer, its positions, what it was trained on.
        """
        proposer = Proposer.of_config(config)
        draft = proposer_card(proposer.config, target)
        facts = provenance(target, None, seed, max_new_tokens, prompts)
        facts["speculative_config"] = dict(proposer.config)
        return cls._of(target, draft, proposer, prompts, max_new_tokens, facts)

    @classmethod
    def _of(
        cls,
        target: LanguageModel,
        draft: ModelCard,
        proposer: Proposer,
        prompts: Sequence[EncodedPrompt],
        max_new_tokens: int,
        facts: dict[str, Any],
    ) -> Pair:
        check_positions([target], ((p.named, len(p.tokens) + max_new_tokens) for p in prompts))
        if target.device.type == "meta":
            facts["device"] = device_name(torch.device("cpu"))
        path, itemsize = target.path.absolute(), target.dtype.itemsize
        weights = target.parameters() * itemsize
        if getattr(target.config, "quantization_config", None) is not None:
            weights = sum(file.stat().st_size for file in weight_files(path))
        weights += draft.parameters * itemsize
        ends = sorted(target.eos_ids)
        return cls(model_card(target), path, draft, proposer, weights, ends, facts)

    def explained(
        self, prompts: Sequence[EncodedPrompt], measured: Measured
    ) -> tuple[list[dict[str, Any]], dict[str, str]]:
        """`explained_differences` by the target, which is loaded where there are any; and what a
        card says where it cannot be, as it is too large for this process: the measurement stays.
        """

        def load_target() -> LanguageModel:
            return load(str(self.target_path), dtype=cast("Dtype", self.target.dtype))

        try:
            return explained_differences(load_target, prompts, measured), {}
        except (SpecDistillError, RuntimeError, MemoryError) as error:
            words = f"not explained by a pass of our own: {first_line(error)}"
            return [], {"differences": words}
