"""One update of a draft towards its target. `Distiller.step` is the whole of the training;
accelerate is imported here alone.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from accelerate import Accelerator, PartialState
from accelerate.tracking import get_available_trackers
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from specdistill.config import DistillConfig
from specdistill.data.signal import Signal, States, TopK
from specdistill.drafts.making import decoder_layers
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.models.packing import is_packed, unpacked
from specdistill.models.randomness import seeded
from specdistill.training.batches import Batch
from specdistill.training.fsdp import cut, shard, whole
from specdistill.training.hints import HintLoss
from specdistill.training.lora import adapt, merge
from specdistill.training.losses import Objective, Positions, Target, objective, total_loss
from specdistill_kernels import (
    Head,
    TargetStates,
    TargetTopK,
    draft_columns,
)

if TYPE_CHECKING:
    from transformers import PreTrainedModel

TRACKERS = "trackers"  # in the run folder


@dataclass
class StepMetrics:
    """One update: loss is the mean over `response_tokens` positions, of which the draft lacks the
    token in `missing`; grad_norm is that of its gradient before clipping; `tokens` counts padding
    and prompts too.
    """

    loss: float
    grad_norm: float
    response_tokens: int
    missing: int
    tokens: int


def leave_processes() -> None:
    """At the end of a program that may be one of several processes: with threads of their group
    still running its exit may be aborted.
    """
    PartialState().destroy_process_group()


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


def trainable(draft: LanguageModel) -> LanguageModel:
    """A copy to train, which leaves the draft as it is: in float32 at least, with linear layers
    that have no packed weights.
    """
    model: nn.Module = unpacked(copy.deepcopy(draft.model))
    kind = torch.promote_types(draft.dtype, torch.float32)
    return replace(draft, model=cast("PreTrainedModel", model.to(kind)))


def _check_trainable(draft: LanguageModel) -> None:
    """Raises `InputError` for weights in which small updates would be lost or that are not what the
    draft computes with.
    """
    half = {p.dtype for p in draft.model.parameters()} & {torch.bfloat16, torch.float16}
    if half:
        raise InputError(
            f"the draft {draft.name} has weights in {', '.join(sorted(map(str, half)))}, in which "
            "updates would round to nothing; load it with dtype='float32'"
        )
    if is_packed(draft):
        raise InputError(
            f"the draft {draft.name} is packed for decoding, and packed weights do not follow an "
            "update; load it again"
        )


class Distiller:
    """Trains `draft` in place towards `target`, which is only read: its body too where the signal
    is taken live. Without a target, towards the text of the batches. Raises `InputError` for a
    draft in half precision or packed; `trainable` makes a copy that is neither.
    """

    def __init__(
        self, target: LanguageModel | None, draft: LanguageModel, config: DistillConfig
    ) -> None:
        self.target, self.draft, self.config = target, draft, config
        self.objective = configured_objective(config)
        training, hints = config.training, config.hints
        _check_trainable(draft)
        _check_launch(config)
        self.accelerator = Accelerator(
            mixed_precision="no",  # `loss_of` decides
            cpu=draft.device.type == "cpu",
            log_with=config.trackers or None,
            project_dir=Path(config.run_dir) / TRACKERS,
        )
        self.adapted = None
        draft.model.requires_grad_(True)
        if training.lora is not None:
            self.adapted = adapt(draft, training.lora, config.seed)
        elif not training.train_embeddings:
            embedding = draft.model.get_input_embeddings().weight
            embedding.requires_grad_(embedding is draft.head.weight)
        self.parameters: dict[str, Tensor] = dict(self._trainable())
        self.hints: HintLoss | None = None
        if hints is not None:
            assert target is not None
            with seeded(config.seed, draft.device):  # of the learned maps
                self.hints = HintLoss(hints.kind, hints.layers, hints.weight, draft, target)
            self.parameters |= {f"hints.{n}": p for n, p in self.hints.named_parameters()}
        self.target_head = None if target is None else target.readout()
        width = draft.full_vocab_size if target is None else target.vocab_size
        own = torch.arange(draft.vocab_size, device=draft.device)
        ids = own if draft.vocab is None else draft.vocab
        self.vocab = ids[ids < width]  # without rows that pad the draft's embedding
        same = draft.vocab is None and len(ids) >= width
        self.draft_vocab = None if same else self.vocab
        self._prepare()

    def _prepare(self) -> None:
        """Make the loss and the optimiser, over all processes where there are several. Where each
        of them trains a part of every weight, `draft` and `parameters` are copies, see `gather`.
        """
        training, accelerator, trained = self.config.training, self.accelerator, self
        if training.shard and accelerator.num_processes > 1:
            trained = copy.copy(self)
            trained.draft = replace(self.draft, model=copy.deepcopy(self.draft.model))
            hints = {n: p for n, p in self.parameters.items() if n.startswith("hints.")}
            self.parameters |= {n: p.detach().clone() for n, p in hints.items()}
        loss = _Loss(trained)
        if trained is not self:
            shard(loss, decoder_layers(trained.draft), self.draft.device)
        named = {n.removeprefix("draft."): p for n, p in loss.named_parameters()}
        self.trained = {name: named[name] for name in self.parameters}
        optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(0.9, 0.95),
        )
        self.optimizer = accelerator.prepare(optimizer)
        self.loss = loss if trained is not self else accelerator.prepare(loss)

    def _trainable(self) -> dict[str, nn.Parameter]:
        return {n: p for n, p in self.draft.model.named_parameters() if p.requires_grad}

    @torch.no_grad()
    def gather(self) -> None:
        """Bring `draft` and `parameters` up to date, in all processes together."""
        for name, value in self.trained.items():
            if value is not self.parameters[name]:
                self.parameters[name].data.copy_(whole(value))

    def moments(self) -> dict[str, Tensor]:
        """What the optimiser keeps, by the number of a parameter and its own name for it; called in
        all processes together.
        """
        state = self.optimizer.state_dict()["state"].items()
        return {f"{i}.{name}": whole(v) for i, entry in state for name, v in entry.items()}

    @torch.no_grad()
    def restore(self, moments: dict[str, Tensor]) -> None:
        """Go on from `parameters` as they are now, and these moments. Raises `ValueError` where
        they are another optimiser's; a parameter that never had a gradient has none.
        """
        begun = {key.split(".", 1)[0] for key in moments}
        fitting = {
            f"{i}.{name}": shape
            for i, value in enumerate(self.parameters.values())
            if str(i) in begun
            for name, shape in (("step", ()), ("exp_avg", value.shape), ("exp_avg_sq", value.shape))
        }
        if not begun or fitting != {key: moment.shape for key, moment in moments.items()}:
            raise ValueError("the optimiser's state has other names or shapes than what is trained")
        if not all(m.is_floating_point() and m.isfinite().all() for m in moments.values()):
            raise ValueError("the optimiser's state holds what are no numbers")
        trained = list(self.trained.values())
        for value, now in zip(trained, self.parameters.values(), strict=True):
            if value is not now:
                value.copy_(cut(now, value))
        entries: dict[int, dict[str, Tensor]] = {}
        for key, moment in moments.items():
            index, name = key.split(".", 1)
            entries.setdefault(int(index), {})[name] = cut(moment, trained[int(index)])
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": entries, "param_groups": groups})

    def step(self, batches: list[Batch], learning_rate: float) -> StepMetrics:
        """One update from one or more micro-batches of each process: the loss is a mean over the
        response tokens of them all.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        counts = zip(*(self.counts(batch) for batch in batches), strict=True)
        total, missing, tokens = (int(n) for n in self.over_processes(*map(sum, counts)))
        loss_sum = 0.0
        for number, batch in enumerate(batches, 1):
            signal = self.signal(batch)
            waits = nullcontext() if number == len(batches) else self.accelerator.no_sync(self.loss)
            with (
                waits
            ):  # for the last one's backward pass to share gradients; a cut draft always does
                loss = self.loss(batch, signal)
                # What shares gradients takes their mean over the processes.
                self.accelerator.backward(loss * self.accelerator.num_processes / total)
            loss_sum += loss.item()
        clip = self.config.training.clip_norm
        norm = whole(self.accelerator.clip_grad_norm_(self.trained.values(), clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        (loss_sum,) = self.over_processes(loss_sum)
        return StepMetrics(loss_sum / total, norm.item(), total, missing, tokens)

    def loss_of(self, batch: Batch, signal: Signal | None) -> Tensor:
        """The sum over a batch's response tokens, differentiable in all that is trained. Only the
        draft's body runs in a lower precision where one is asked for.
        """
        training, device = self.config.training, self.draft.device.type
        checkpointing = training.activation_checkpointing
        with (
            recomputed(decoder_layers(self.draft)) if checkpointing else nullcontext(),
            torch.autocast(device, torch.bfloat16, enabled=training.precision == "bf16"),
        ):
            states = self.states(batch)
        loss = total_loss(self.positions(batch, states.hidden, signal), self.objective)
        if self.hints is not None:
            assert isinstance(signal, States)
            loss = loss + self.hints(*self.hinted(states, signal))
        return loss

    def counts(self, batch: Batch) -> tuple[int, int, int]:
        """Response tokens, those of them that the draft lacks, and all tokens with padding."""
        columns = draft_columns(batch.labels, len(self.vocab), self.draft_vocab)
        return len(batch.labels), int((columns < 0).sum()), batch.tokens.numel()

    def finish(self) -> None:
        """Make the draft an ordinary model that nobody trains."""
        if self.adapted is not None:
            merge(self.draft, self.adapted)
        self.draft.model.requires_grad_(False)

    def over_processes(self, *values: float) -> list[float]:
        """Sums over all processes."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.draft.device)
        return self.accelerator.reduce(mine).tolist()

    def states(self, batch: Batch) -> States:
        """The draft's states [N, d] at the response positions, with those the hints need. An id
        that only pads the target's embedding is read as the draft's last one.
        """
        tokens = batch.tokens.clamp(max=self.draft.full_vocab_size - 1)
        wanted = [] if self.hints is None else self.hints.draft_layers
        return _states(self.draft, tokens, batch, wanted)

    @torch.no_grad()
    def signal(self, batch: Batch) -> Signal | None:
        """What the target says: as kept, or its states from a live pass; None without it."""
        if batch.signal is not None or self.target is None:
            return batch.signal
        wanted = [] if self.hints is None else self.hints.target_layers
        return _states(self.target, batch.tokens, batch, wanted)

    def positions(self, batch: Batch, states: Tensor, signal: Signal | None) -> Positions:
        """The response positions as the losses take them."""

        def target(temperature: float) -> Target | None:
            if self.target_head is None or signal is None:
                return None
            if isinstance(signal, TopK):
                return TargetTopK(signal.tokens.long(), signal.log_probs, signal.log_tail)
            kept = signal.logsumexp if temperature == 1 else None  # it belongs to 1
            cut = kept is not None and self.draft_vocab is not None
            head = self.cut_target_head if cut else self.target_head
            hidden = signal.hidden.to(self.target_head.weight.dtype)
            return TargetStates(hidden, head, kept, temperature, cut)

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
        assert self.target_head is not None
        return self.target_head.of(self.vocab)

    def draft_head(self) -> Head:
        head, width = self.draft.readout(), len(self.vocab)
        return head if width == len(head.weight) else head.of(torch.arange(width))

    def hinted(self, states: States, signal: States) -> tuple[list[Tensor], list[Tensor]]:
        """The mapped layers of draft and target."""
        assert self.hints is not None
        assert self.target is not None
        ours = [_after(layer, self.draft, states) for layer in self.hints.draft_layers]
        theirs = [_after(layer, self.target, signal) for layer in self.hints.target_layers]
        return ours, [states.to(ours[0].dtype) for states in theirs]  # kept ones may be narrower


@contextmanager
def recomputed(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Within it the layers keep no activations for the backward pass, but are run again there
    (1604.06174).
    """
    layers = list(layers)
    for layer in layers:
        layer.forward = partial(checkpoint, layer.forward, use_reentrant=False)
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # the class's own again


def _check_launch(config: DistillConfig) -> None:
    """Raises `InputError` for what this machine lacks, or accelerate was told and we do not do."""
    missing = set(config.trackers) - {str(t) for t in get_available_trackers()}
    if missing:
        raise InputError(
            f"trackers: {', '.join(sorted(missing))} cannot be imported; install it or leave it out"
        )
    for variable in (
        "ACCELERATE_USE_FSDP",
        "ACCELERATE_USE_DEEPSPEED",
        "ACCELERATE_USE_MEGATRON_LM",
    ):
        if os.environ.get(variable, "false").lower() in ("true", "1"):
            raise InputError(
                f"{variable} is set, and a draft is cut over processes by training.shard: true; "
                "launch with configs/multi_gpu.yaml"
            )


class _Loss(nn.Module):
    """All that is differentiated in one call: what runs a model in several processes must see it
    whole.
    """

    def __init__(self, distiller: Distiller) -> None:
        super().__init__()
        self.draft, self.hints = distiller.draft.model, distiller.hints
        self.compute = distiller.loss_of

    def forward(self, batch: Batch, signal: Signal | None) -> Tensor:
        return self.compute(batch, signal)


def _states(model: LanguageModel, tokens: Tensor, batch: Batch, layers: list[int]) -> States:
    """[N, d], final and of `layers`. Without a cache, to which a layer that is run again would add
    its keys again.
    """
    how = {"attention_mask": batch.mask, "use_cache": False}
    if not layers:
        return States(model.hidden(tokens, **how)[batch.response])
    wanted = [*layers, model.num_layers]
    found = [states[batch.response] for states in model.hidden_after(tokens, wanted, **how)]
    return States(found[-1], inner=dict(zip(layers, found[:-1], strict=True)))


def _after(layer: int, model: LanguageModel, states: States) -> Tensor:
    return states.hidden if layer == model.num_layers else states.inner[layer]
