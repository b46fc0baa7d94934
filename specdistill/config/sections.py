"""The sections of a run's configuration, and the kinds of values it holds."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    model_validator,
)

from specdistill import limits
from specdistill.files import at_home

Tracker = Literal[
    "tensorboard", "wandb", "mlflow", "trackio", "comet_ml", "aim", "clearml", "dvclive", "swanlab"
]


def _no_switch(value: Any) -> Any:
    """`yes` is no number, though Python counts it as 1."""
    if isinstance(value, bool):
        raise ValueError("a number is wanted")
    return value


def _text(value: str) -> str:
    try:
        value.encode()
    except UnicodeEncodeError:
        raise ValueError("it holds half of a surrogate pair") from None
    if "\0" in value:
        raise ValueError("no name holds the character NUL")
    return value


def _greedy_or(value: float) -> float:
    if value and not limits.inside(value, limits.TEMPERATURE):
        raise ValueError(f"it must be 0, or {limits.words(limits.TEMPERATURE)}")
    return value


def _auto_or_id(value: Any) -> Any:
    if value == "auto" or (type(value) is int and limits.inside(value + 1, limits.VOCABULARY)):
        return value
    raise ValueError("it must be auto, or the id of a token")


_Number = BeforeValidator(_no_switch)
Count = Annotated[int, limits.COUNT, _Number]
NewTokens = Annotated[int, limits.NEW_TOKENS, _Number]
DraftTokens = Annotated[int, limits.DRAFT_TOKENS, _Number]
Layer = Annotated[int, limits.COUNT]  # from 1
Seed = Annotated[int, limits.SEED, _Number]
Vocabulary = Annotated[int, limits.VOCABULARY, _Number]
Share = Annotated[float, limits.SHARE, _Number]
Positive = Annotated[float, limits.POSITIVE, _Number]
Divisor = Annotated[float, limits.TEMPERATURE, _Number]
Temperature = Annotated[float, AfterValidator(_greedy_or), _Number]  # 0 is greedy
MaskToken = Annotated[int | Literal["auto"], BeforeValidator(_auto_or_id)]
Name = Annotated[str, StringConstraints(min_length=1, max_length=4096), AfterValidator(_text)]
LocalPath = Annotated[Name, AfterValidator(at_home)]


class Section(BaseModel):
    """Unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(Section):
    """What is trained of the layers' linear maps W: the factors of W + (alpha / rank) B A."""

    rank: Count = Field(16, description="rank of the factors B and A")
    alpha: Count = Field(32, description="scale of their product: alpha / rank")


class Training(Section):
    """The optimiser and its budget. Give one of max_steps and max_seconds; with seconds, the
    learning rate follows the training time instead of the step.
    """

    max_steps: Count | None = Field(None, description="updates to make")
    max_seconds: Positive | None = Field(
        None, description="seconds to train, sampling included; evaluations do not count"
    )
    batch_tokens: Count = Field(
        2048,
        description="tokens in one forward pass, padding included; a longer text is passed a "
        "window of so many at a time",
    )
    packing: bool = Field(
        False,
        description="put texts one after the other into rows of batch_tokens, where no text sees "
        "another, instead of padding texts of like length",
    )
    accumulate: Count = Field(
        1, description="forward passes in one update, over all processes together"
    )
    learning_rate: Positive = Field(
        2e-3, description="AdamW's highest learning rate; it falls in a straight line to a fiftieth"
    )
    warmup: Share = Field(
        0.05, lt=1, description="share of the budget in which the learning rate rises"
    )
    weight_decay: Share = Field(0.0, description="AdamW's weight decay")
    clip_norm: Positive = Field(1.0, description="longest gradient; longer ones are scaled to it")
    train_embeddings: bool = Field(False, description="train the input embeddings too")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="what the draft's layers compute in, and on a GPU the heads of the loss; "
        "weights stay float32",
    )
    chunk: Count | None = Field(
        None,
        description="rows of logits held at a time; fewer take less memory; null takes 128 on a "
        "CPU, and 512 on a GPU",
    )
    activation_checkpointing: bool = Field(
        False,
        description="compute activations again in the backward pass: slower, with less memory",
    )
    shard: bool = Field(
        False, description="cut weights, gradients and optimiser state over the processes (FSDP)"
    )
    lora: Lora | None = Field(
        None, description="train low-rank factors (LoRA) instead of the weights"
    )

    @model_validator(mode="after")
    def _one_thing_to_train_and_one_budget(self) -> Training:
        if self.lora is not None and self.train_embeddings:
            raise ValueError("lora trains its factors alone; leave train_embeddings out")
        if (self.max_steps is None) == (self.max_seconds is None):
            raise ValueError("give exactly one of max_steps and max_seconds")
        return self


class Decode(Section):
    """The short speculative decode of held-out prompts at each evaluation. It needs the whole
    target, kept signal or not; null leaves it out.
    """

    prompts: Count = Field(8, description="held-out prompts to decode, at most")
    max_new_tokens: Annotated[int, Interval(ge=2, le=limits.NEW_TOKENS.le), _Number] = Field(
        32, description="tokens of each answer, at most"
    )
    num_draft_tokens: DraftTokens = Field(4, description="tokens the draft proposes a round (γ)")
    temperature: Temperature = Field(0.0, description="sampling temperature; 0 is greedy")
    least_reach: Annotated[float, limits.LEAST_REACH, _Number] = Field(
        0.0,
        description="end a proposal early once the chance that all of it is accepted falls below "
        "this; 0 never does",
    )


class Hints(Section):
    """Hidden-state hints: the draft's layers are drawn towards the target's, beside the loss."""

    layers: dict[Layer, Layer] | None = Field(
        None,
        description="target layer by draft layer, from 1; by default each draft layer goes to the "
        "one at the same relative depth",
    )
    kind: Literal["mse", "smooth_l1", "cosine"] = Field(
        "mse", description="distance between two states"
    )
    weight: Positive = Field(1.0, description="weight of the hints beside the loss")


class Parallel(Section):
    """A draft that proposes its block in one pass, by masks in the places of the tokens it cannot
    know yet. It stays an ordinary draft, too: the rows without masks are always trained.
    """

    num_draft_tokens: Annotated[int, Interval(ge=2, le=limits.MAX_DRAFT_TOKENS), _Number] = Field(
        8, description="tokens of a block (γ): the one after the text, and those after masks"
    )
    keep: Annotated[float, Interval(gt=0, le=1), _Number] = Field(
        0.7,
        description="share of the masks of a place whose successor is trained in an update; 1 "
        "trains all of them",
    )
    least: Share = Field(
        0.2, description="share of the blocks of which every place is trained, at least"
    )
    ordinary: Share = Field(
        0.0,
        description="share of the training in which the draft learns from the rows without masks "
        "alone, in batches without room for masks",
    )
    mask_token: MaskToken = Field(
        "auto", description="id of the mask, which no text holds; auto finds an unused one"
    )
    weighting: Literal["cat", "uniform"] = Field(
        "cat",
        description="of a place: the chance that the target would have written the tokens hidden "
        "before it (cat), or the same for all; uniform with e2e_tv, which weighs them itself",
    )


_SAMPLED = {"refresh_every": 100, "prompts": 64, "max_new_tokens": 64, "sample_temperature": 1.0}
# The settings each policy has, and their defaults.
POLICY_SETTINGS: dict[str, dict[str, Any]] = {
    "target": {},
    "fixed": {},
    "draft": _SAMPLED,
    "mixed": _SAMPLED | {"share": 0.5},
    "skd": _SAMPLED | {"top_k": 25, "block": 4},
    "induced": _SAMPLED | {"block": 4},
    "fresh_target": _SAMPLED,
}


class Policy(Section):
    """Where the training tokens come from, see `policies.py`. A plain name takes its defaults."""

    name: Literal["target", "fixed", "draft", "mixed", "skd", "induced", "fresh_target"] = Field(
        "target", description="who writes the text that is trained on"
    )
    refresh_every: Count | None = Field(
        None, description="steps between new samples; 100 for a policy that samples"
    )
    prompts: Count | None = Field(
        None, description="prompts of the data that are sampled at each refresh; 64"
    )
    max_new_tokens: NewTokens | None = Field(None, description="tokens of each sample, at most; 64")
    sample_temperature: Temperature | None = Field(
        None, description="temperature of the samples, 0 is greedy; 1"
    )
    share: Share | None = Field(
        None, description="of mixed: share of the draft's samples, GKD's λ; 0.5"
    )
    top_k: Vocabulary | None = Field(
        None, description="of skd: a proposal stays if it is among the target's top k; 25"
    )
    block: DraftTokens | None = Field(
        None, description="of skd, induced: tokens proposed a round; 4"
    )

    @model_validator(mode="before")
    @classmethod
    def _settings_of_its_own(cls, raw: object) -> object:
        raw = {"name": raw} if isinstance(raw, str) else raw
        if not isinstance(raw, dict):
            return raw
        name = raw.get("name", "target")
        defaults = POLICY_SETTINGS.get(name, {}) if isinstance(name, str) else {}
        if name == "fresh_target":  # runs of earlier versions have it in their config.yaml
            raw = {key: value for key, value in raw.items() if key != "block"}
        for key in cls.model_fields:
            if key != "name" and key not in defaults and raw.get(key) is not None:
                raise ValueError(f"the policy {name!r} has no {key}; it has {', '.join(defaults)}")
        return {**defaults, **{key: value for key, value in raw.items() if value is not None}}

    def settings(self) -> dict[str, Any]:
        """The settings that this policy has."""
        return {key: getattr(self, key) for key in POLICY_SETTINGS[self.name]}


class Reward(Section):
    """A reward beside the loss, for policy draft or mixed: each prompt is sampled as a group, and
    the samples that are worth more than the others become more probable.
    """

    function: Name = Field(
        description="accepted-length, the tokens a round would accept, or module:function"
    )
    weight: Annotated[float, Interval(ge=0, le=1e30), _Number] = Field(
        0.1, description="weight of the reward beside the loss; 0 is a run without it"
    )
    group: Annotated[int, Interval(ge=1, le=1024), _Number] = Field(
        4, description="samples of a prompt, among which each has its advantage"
    )

    @model_validator(mode="after")
    def _a_group_to_compare_with(self) -> Reward:
        if self.group < 2:
            raise ValueError(
                f"group is {self.group}, and a sample's advantage is over the others of its group; "
                "take 2 or more"
            )
        return self
