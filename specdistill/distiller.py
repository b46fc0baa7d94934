"""One update of a draft towards its target. `Distiller.step` is the whole of the training;
accelerate lives here alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import torch
from accelerate import Accelerator
from torch import Tensor

from specdistill.batches import Batch
from specdistill.config import DistillConfig
from specdistill.divergences import Objective, Positions, Target, objective, total_loss
from specdistill.hints import HintLoss
from specdistill.models import LanguageModel
from specdistill_kernels import (
    Head,
    TargetStates,
    TargetTopK,
    draft_columns,
)


@dataclass
class StepMetrics:
    """One update: loss is the mean over `response_tokens` positions, of which the draft lacks the
    token in `missing`; `tokens` counts padding and prompts too.
    """

    loss: float
    response_tokens: int
    missing: int
    tokens: int


def configured_objective(config: DistillConfig) -> Objective:
    """The loss a configuration asks for. Raises `InputError`."""
    return objective(
        config.loss,
        temperature=config.temperature,
        decoding_temperature=config.decoding_temperature,
        num_draft_tokens=config.num_draft_tokens,
        beta=config.beta,
        skew=config.skew,
        eta=config.eta,
    )


class Distiller:
    """Trains `draft` in place towards `target`, which is only read: its body too where the signal
    is taken live.
    """

    def __init__(self, target: LanguageModel, draft: LanguageModel, config: DistillConfig) -> None:
        self.target, self.draft, self.config = target, draft, config
        self.objective = configured_objective(config)
        training, hints = config.training, config.hints
        self.accelerator = Accelerator(
            mixed_precision=training.precision, cpu=draft.device.type == "cpu"
        )
        draft.model.requires_grad_(True)
        if not training.train_embeddings:
            embedding = draft.model.get_input_embeddings().weight
            embedding.requires_grad_(embedding is draft.head.weight)
        self.parameters = {n: p for n, p in draft.model.named_parameters() if p.requires_grad}
        self.hints: HintLoss | None = None
        if hints is not None:
            torch.manual_seed(config.seed)  # of the learned maps
            self.hints = HintLoss(hints.kind, hints.layers, hints.weight, draft, target)
            self.parameters |= {f"hints.{n}": p for n, p in self.hints.named_parameters()}
        self.optimizer = torch.optim.AdamW(
            self.parameters.values(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(0.9, 0.95),
        )
        draft.model, self.optimizer = self.accelerator.prepare(draft.model, self.optimizer)
        self.target_head = target.readout()
        own = torch.arange(draft.vocab_size, device=draft.device)
        ids = own if draft.vocab is None else draft.vocab
        self.vocab = ids[ids < target.vocab_size]  # without rows that pad the draft's embedding
        same = draft.vocab is None and len(ids) >= target.vocab_size
        self.draft_vocab = None if same else self.vocab

    def step(self, batches: list[Batch], learning_rate: float) -> StepMetrics:
        """One update from one or more micro-batches: the loss is a mean over all their response
        tokens.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        total = sum(len(batch.labels) for batch in batches)
        loss_sum, missing = 0.0, 0
        for batch in batches:
            signal = self.signal(batch)
            with self.accelerator.autocast():
                states = self.states(batch)
            positions = self.positions(batch, states["hidden"], signal)
            loss = total_loss(positions, self.objective)
            if self.hints is not None:
                loss = loss + self.hints(*self.hinted(states, signal))
            self.accelerator.backward(loss / total)
            loss_sum += loss.item()
            missing += int(
                (draft_columns(batch.labels, len(self.vocab), self.draft_vocab) < 0).sum()
            )
        self.accelerator.clip_grad_norm_(self.parameters.values(), self.config.training.clip_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        tokens = sum(batch.tokens.numel() for batch in batches)
        return StepMetrics(loss_sum / total, total, missing, tokens)

    def states(self, batch: Batch) -> dict[str, Tensor]:
        """The draft's states [N, d] at the response positions: "hidden", the final ones, and those
        the hints need. An id that only pads the target's embedding is read as the draft's last one.
        """
        tokens = batch.tokens.clamp(max=self.draft.full_vocab_size - 1)
        wanted = [] if self.hints is None else self.hints.draft_layers
        return _states(self.draft, tokens, batch, wanted)

    @torch.no_grad()
    def signal(self, batch: Batch) -> dict[str, Tensor]:
        """What the target says: as kept, or its states from a live pass."""
        if batch.signal is not None:
            return batch.signal
        wanted = [] if self.hints is None else self.hints.target_layers
        return _states(self.target, batch.tokens, batch, wanted)

    def positions(self, batch: Batch, states: Tensor, signal: dict[str, Tensor]) -> Positions:
        """The response positions as the losses take them."""
        kind = self.target_head.weight.dtype

        def target(temperature: float) -> Target:
            if "log_tail" in signal:
                return TargetTopK(signal["tokens"].long(), signal["log_probs"], signal["log_tail"])
            kept = signal.get("logsumexp") if temperature == 1 else None  # it belongs to 1
            cut = kept is not None and self.draft_vocab is not None
            head = self.cut_target_head if cut else self.target_head
            return TargetStates(signal["hidden"].to(kind), head, kept, temperature, cut)

        return Positions(
            states.to(torch.promote_types(states.dtype, torch.float32)),
            self.draft_head(),
            target,
            batch.labels,
            batch.response.sum(1),
            self.draft_vocab,
            self.config.training.chunk,
        )

    @cached_property
    def cut_target_head(self) -> Head:
        """The target's head for the draft's tokens alone, in their order."""
        return self.target_head.of(self.vocab)

    def draft_head(self) -> Head:
        head, width = self.draft.readout(), len(self.vocab)
        return head if width == len(head.weight) else head.of(torch.arange(width))

    def hinted(
        self, states: dict[str, Tensor], signal: dict[str, Tensor]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """The mapped layers of draft and target."""
        assert self.hints is not None
        ours = [states[_name(self.draft, layer)] for layer in self.hints.draft_layers]
        return ours, [signal[_name(self.target, layer)] for layer in self.hints.target_layers]


def _states(
    model: LanguageModel, tokens: Tensor, batch: Batch, layers: list[int]
) -> dict[str, Tensor]:
    """[N, d] by name: "hidden", and one for each other layer of `layers`."""
    if not layers:
        return {"hidden": model.hidden(tokens, attention_mask=batch.mask)[batch.response]}
    wanted = [*layers, model.num_layers]
    found = model.hidden_after(tokens, wanted, attention_mask=batch.mask)
    names = [_name(model, layer) for layer in wanted]
    return {n: states[batch.response] for n, states in zip(names, found, strict=True)}


def _name(model: LanguageModel, layer: int) -> str:
    return "hidden" if layer == model.num_layers else f"layer {layer}"
