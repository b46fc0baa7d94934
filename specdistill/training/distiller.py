"""One update of a draft towards its target. `Distiller.step` is the whole of the training."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

import torch
from accelerate import Accelerator
from torch import Tensor

from specdistill.config import DistillConfig
from specdistill.data.signal import Signal, States, TopK, positions_of
from specdistill.drafts.making import decoder_layers
from specdistill.models import LanguageModel
from specdistill.models.randomness import seeded
from specdistill.run_folder import RunFolder
from specdistill.training.attention import SHORT, attention_by
from specdistill.training.batches import Batch
from specdistill.training.fsdp import cut, shard, whole
from specdistill.training.hints import HintLoss
from specdistill.training.lora import adapt, merge
from specdistill.training.losses import Positions, Target, configured_objective, total_loss
from specdistill.training.pair import check_trainable
from specdistill.training.parallel import (
    MaskEmbedding,
    begin,
    hidden_token_weights,
    write_mask_row,
)
from specdistill.training.passes import after, recomputed, states_of
from specdistill.training.processes import WholeLoss, check_launch, most
from specdistill.training.reward import policy_loss
from specdistill.training.windows import pieces, spans
from specdistill_kernels import Head, TargetStates, TargetTopK, draft_columns


@dataclass
class StepMetrics:
    """One update: loss is the mean over `response_tokens` positions, of which the draft lacks the
    token in `missing`, or of a parallel draft over the rows of its blocks by weight; grad_norm is
    that of its gradient before clipping; `tokens` counts padding, prompts and masks too.
    """

    loss: float
    grad_norm: float
    response_tokens: int
    missing: int
    tokens: int


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
        check_trainable(draft)
        check_launch(config)
        self.accelerator = Accelerator(
            mixed_precision="no",  # `loss_of` decides
            cpu=draft.device.type == "cpu",
            log_with=config.trackers or None,
            project_dir=RunFolder(Path(config.run_dir)).trackers,
        )
        self.adapted = None
        if config.parallel is not None:
            assert target is not None
            begin(draft, target, config.parallel)
        draft.model.requires_grad_(True)
        embedding = draft.model.get_input_embeddings().weight
        if training.lora is not None:
            self.adapted = adapt(draft, training.lora, config.seed)
        elif not training.train_embeddings:
            embedding.requires_grad_(embedding is draft.head.weight)
        self.parameters: dict[str, Tensor] = {
            name: value for name, value in draft.model.named_parameters() if value.requires_grad
        }
        self.mask: MaskEmbedding | None = None
        if config.parallel is not None and not embedding.requires_grad:
            self.mask = MaskEmbedding(draft)
            self.parameters |= {f"mask.{n}": p for n, p in self.mask.named_parameters()}
        self.hints: HintLoss | None = None
        if hints is not None:
            assert target is not None
            with seeded(config.seed, draft.device):  # of the learned maps
                self.hints = HintLoss(hints.kind, hints.layers, hints.weight, draft, target)
            self.parameters |= {f"hints.{n}": p for n, p in self.hints.named_parameters()}
        self.target_head = None if target is None else self._readout(target, self.head_dtype)
        width = draft.full_vocab_size if target is None else target.vocab_size
        columns = torch.arange(draft.vocab_size, device=draft.device)
        ids = columns if draft.vocab is None else draft.vocab
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
            beside = {n: p for n, p in self.parameters.items() if n.startswith(("hints.", "mask."))}
            self.parameters |= {n: p.detach().clone() for n, p in beside.items()}
        modules = (trained.draft.model, trained.hints, trained.mask)
        loss = WholeLoss(*modules, trained.loss_of, trained.computed)
        if trained is not self:
            shard(loss, decoder_layers(trained.draft), self.draft.device)
        named = {n.removeprefix("draft."): p for n, p in loss.named_parameters()}
        self.trained = {name: named[name] for name in self.parameters}
        optimizer = torch.optim.AdamW(
            self.trained.values(),
            lr=training.learning_rate,
            weight_decay=training.weight_decay,
            betas=(0.9, 0.95),
            # In one pass over the weights, where the plain loop takes a sixth of a small update.
            fused=self.draft.device.type == "cpu" and trained is self,
        )
        self.optimizer = accelerator.prepare(optimizer)
        self.read = loss.read
        self.loss = loss if trained is not self else accelerator.prepare(loss)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring `draft` and `parameters` up to date, in all processes together."""
        for name, value in self.trained.items():
            if value is not self.parameters[name]:
                self.parameters[name].data.copy_(whole(value))
        self.write_mask()

    def write_mask(self) -> None:
        """Put the mask's row, where it is trained by itself, into the draft's embedding."""
        if self.mask is not None:
            (row,) = (p for name, p in self.parameters.items() if name.startswith("mask."))
            write_mask_row(self.draft, row)

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
        response tokens of them all, or over the rows of their blocks by their weights.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = learning_rate
        batches = [self.weighted(batch) for batch in batches]
        counts = zip(*(self.counts(batch) for batch in batches), strict=True)
        total, *numbers = self.over_processes(*map(sum, counts))
        passes = self.passes(batches)
        loss_sum, left = 0.0, sum(passes)
        dealt = zip(batches, passes, strict=True)
        for part in (part for each in dealt for part in self.pieces(*each)):
            left -= 1
            # The last one's backward pass shares gradients; that of a cut draft always does.
            with self.accelerator.no_sync(self.loss) if left else nullcontext():
                loss, debt = self.loss(part)
                # What shares gradients takes their mean over the processes.
                share = loss * self.accelerator.num_processes / total
                self.accelerator.backward(share if debt is None else share + debt)
            loss_sum += loss.item()
        clip = self.config.training.clip_norm
        norm = whole(self.accelerator.clip_grad_norm_(self.trained.values(), clip))
        self.optimizer.step()
        self.optimizer.zero_grad()
        (loss_sum,) = self.over_processes(loss_sum)
        return StepMetrics(loss_sum / total, norm.item(), *map(int, numbers))

    def passes(self, batches: list[Batch]) -> list[int]:
        """Of each micro-batch. All processes make as many where the draft is cut over them."""
        numbers = [len(self.spans(batch)) for batch in batches]
        return most(self.accelerator, numbers) if self.config.training.shard else numbers

    def pieces(self, batch: Batch, passes: int = 1) -> Iterator[Batch]:
        """The batch with the target's signal, or the windows of one long text, see `pieces`."""
        signalled = replace(batch, signal=self.signal(batch))
        return pieces(signalled, self.spans(batch), self.read, passes)

    def spans(self, batch: Batch) -> list[slice]:
        """The windows of a batch."""
        block = self.objective.num_draft_tokens or 1
        return spans(batch, self.config.training.batch_tokens, block)

    @contextmanager
    def computing(self, batch: Batch) -> Iterator[None]:
        """How the draft's body computes: in a lower precision where one is asked for."""
        training, device = self.config.training, self.draft.device.type
        narrow, on_cpu = training.precision == "bf16", device == "cpu"
        short = batch.prefix is None and batch.shape[1] <= SHORT
        with (
            recomputed(self.draft) if training.activation_checkpointing else nullcontext(),
            torch.autocast(device, torch.bfloat16, enabled=narrow),
            attention_by(self.draft, "eager") if narrow and short and on_cpu else nullcontext(),
            nullcontext() if self.mask is None else self.mask.read_by(self.draft),
        ):
            yield

    def loss_of(self, batch: Batch) -> Tensor:
        """The sum over the response tokens of a batch with its signal, differentiable in all that
        is trained. Where a lower precision is asked for, the draft's body runs in it, and on a GPU
        the heads too.
        """
        states = self.computed(batch)
        at = self.positions(batch, states.hidden, batch.signal)
        loss = total_loss(at, self.objective)
        if batch.credit is not None and self.config.reward is not None:
            loss = loss + self.config.reward.weight * policy_loss(at, batch.credit)
        if self.hints is not None:
            assert isinstance(batch.signal, States)
            loss = loss + self.hints(*self.hinted(states, batch.signal))
        return loss

    def computed(self, batch: Batch) -> States:
        """The draft's, in the precision of the training."""
        with self.computing(batch):
            return self.states(batch)

    @torch.no_grad()
    def weighted(self, batch: Batch) -> Batch:
        """With the weights of its rows, where they differ: they are of the target's signal, and a
        mean wants their sum before any pass.
        """
        parallel = self.config.parallel
        if batch.blocks is None or parallel is None or parallel.weighting == "uniform":
            return batch
        signal = self.signal(batch)
        assert signal is not None
        assert self.target is not None
        blocks = batch.blocks
        weights = hidden_token_weights(self.target, signal, batch.labels, blocks, self.chunk)
        return replace(batch, signal=signal, weights=weights)

    def counts(self, batch: Batch) -> tuple[float, int, int, int]:
        """What the rows weigh, response tokens, those of them that the draft lacks, and all tokens
        with padding.
        """
        columns = draft_columns(batch.labels, len(self.vocab), self.draft_vocab)
        rows = len(batch.labels) if batch.blocks is None else len(batch.blocks.rows)
        weight = rows if batch.weights is None else batch.weights.double().sum().item()
        return weight, len(batch.labels), int((columns < 0).sum()), batch.shape.numel()

    def finish(self) -> None:
        """Make the draft an ordinary model that nobody trains."""
        self.write_mask()
        if self.adapted is not None:
            merge(self.draft, self.adapted)
        self.draft.model.requires_grad_(False)

    def over_processes(self, *values: float) -> list[float]:
        """Sums over all processes."""
        mine = torch.tensor(values, dtype=torch.float64, device=self.draft.device)
        return self.accelerator.reduce(mine).tolist()

    def states(self, batch: Batch) -> States:
        """The draft's states [N, d] at the response positions, with those the hints need, or [R, d]
        at the rows of blocks. An id that only pads the target's embedding is read as the draft's
        last one.
        """
        known = replace(batch, tokens=batch.tokens.clamp(max=self.draft.full_vocab_size - 1))
        wanted = [] if self.hints is None else self.hints.draft_layers
        return states_of(self.draft, known, wanted, self.config.training.batch_tokens)

    @torch.no_grad()
    def signal(self, batch: Batch) -> Signal | None:
        """What the target says: as kept, or its states from a live pass; None without it."""
        if batch.signal is not None or self.target is None:
            return batch.signal
        wanted = [] if self.hints is None else self.hints.target_layers
        texts = replace(batch, blocks=None, weights=None)
        return states_of(self.target, texts, wanted, self.config.training.batch_tokens)

    def positions(self, batch: Batch, states: Tensor, signal: Signal | None) -> Positions:
        """The response positions as the losses take them; of a parallel draft the rows of its
        blocks, block after block.
        """
        labels, lengths, blocks = batch.labels, batch.lengths, batch.blocks
        if blocks is not None:
            labels, lengths = labels[blocks.answer], blocks.lengths
            signal = None if signal is None else positions_of(signal, blocks.answer)

        def target(temperature: float) -> Target | None:
            if self.target_head is None or signal is None:
                return None
            if isinstance(signal, TopK):
                return TargetTopK(signal.tokens.long(), signal.log_probs, signal.log_tail)
            logsumexp = signal.logsumexp if temperature == 1 else None  # it belongs to 1
            cut = logsumexp is not None and self.draft_vocab is not None
            head = self.cut_target_head if cut else self.target_head
            hidden = signal.hidden.to(self.target_head.weight.dtype)
            return TargetStates(hidden, head, logsumexp, temperature, cut)

        head = self.draft_head()
        return Positions(
            states.to(head.weight.dtype),
            head,
            target,
            labels,
            lengths,
            self.draft_vocab,
            self.chunk,
            batch.weights,
        )

    @cached_property
    def cut_target_head(self) -> Head:
        """The target's head for the draft's tokens alone, in their order."""
        assert self.target_head is not None
        return self.target_head.of(self.vocab)

    def draft_head(self) -> Head:
        dtype = self.head_dtype if torch.is_grad_enabled() else None  # metrics are in float32
        head, width = self._readout(self.draft, dtype), len(self.vocab)
        return head if width == len(head.weight) else head.of(torch.arange(width))

    def _readout(self, model: LanguageModel, dtype: torch.dtype | None) -> Head:
        if dtype is None:
            return model.readout()
        layer = model.head
        bias = None if layer.bias is None else layer.bias.to(dtype)
        return Head(layer.weight.to(dtype), bias, model.logit_scale, model.logit_softcap)

    @property
    def head_dtype(self) -> torch.dtype | None:
        """In what an update multiplies the heads where that is not float32: a GPU's products of
        bfloat16 take a tenth of the time, and are added up in float32.
        """
        narrow = self.config.training.precision == "bf16" and self.draft.device.type == "cuda"
        return torch.bfloat16 if narrow else None

    @property
    def chunk(self) -> int:
        """Rows of logits held at a time: on a CPU as many as its caches hold."""
        return self.config.training.chunk or (128 if self.draft.device.type == "cpu" else 512)

    def hinted(self, states: States, signal: States) -> tuple[list[Tensor], list[Tensor]]:
        """The mapped layers of draft and target."""
        assert self.hints is not None
        assert self.target is not None
        ours = [after(layer, self.draft, states) for layer in self.hints.draft_layers]
        theirs = [after(layer, self.target, signal) for layer in self.hints.target_layers]
        return ours, [states.to(ours[0].dtype) for states in theirs]  # kept ones may be narrower
