"""The configuration of a run: one YAML file, one run folder. Unknown keys are errors."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationError,
    field_validator,
    model_validator,
)

from specdistill import limits
from specdistill.documents import assign, read_yaml_mapping
from specdistill.errors import InputError
from specdistill.files import at_home
from specdistill.limits import Dtype, shown

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
Name = Annotated[str, StringConstraints(min_length=1, max_length=4096), AfterValidator(_text)]
LocalPath = Annotated[Name, AfterValidator(at_home)]


class _Section(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Lora(_Section):
    """What is trained of the layers' linear maps W: the factors of W + (alpha / rank) B A."""

    rank: Count = Field(16, description="rank of the factors B and A")
    alpha: Count = Field(32, description="scale of their product: alpha / rank")


class Training(_Section):
    """The optimiser and its budget. Give one of max_steps and max_seconds; with seconds, the
    learning rate follows the training time instead of the step.
    """

    max_steps: Count | None = Field(None, description="updates to make")
    max_seconds: Positive | None = Field(
        None, description="seconds to train, sampling included; evaluations do not count"
    )
    batch_tokens: Count = Field(2048, description="tokens in one forward pass, padding included")
    accumulate: Count = Field(
        1, description="forward passes in one update, over all processes together"
    )
    learning_rate: Positive = Field(
        2e-3, description="AdamW's highest learning rate; a cosine lowers it to a tenth"
    )
    warmup: Share = Field(
        0.05, lt=1, description="share of the budget in which the learning rate rises"
    )
    weight_decay: Share = Field(0.0, description="AdamW's weight decay")
    clip_norm: Positive = Field(1.0, description="longest gradient; longer ones are scaled to it")
    train_embeddings: bool = Field(False, description="train the input embeddings too")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32", description="what the draft's layers compute in; weights stay float32"
    )
    chunk: Count = Field(128, description="rows of logits held at a time; fewer take less memory")
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


class Decode(_Section):
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


class Hints(_Section):
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


_SAMPLED = {
    "refresh_every": 100,
    "prompts": 64,
    "max_new_tokens": 64,
    "sample_temperature": 1.0,
}
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


class Policy(_Section):
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

    def own(self) -> dict[str, Any]:
        """The settings that this policy has."""
        return {key: getattr(self, key) for key in POLICY_SETTINGS[self.name]}


class DistillConfig(_Section):
    """`specdistill distill`. draft is a checkpoint folder (see `specdistill init`), data a folder
    of `specdistill generate`. signal: what of the target is learnt from, as kept with the data, of
    a live pass, or none: its text alone, in the draft's own tokens; target is then but a name. Left
    out it is kept for policy target, and live for the others.
    """

    schema_version: Literal[1] = Field(1, description="version of this format")
    target: LocalPath = Field(description="target model: a folder or a Hugging Face name")
    draft: LocalPath = Field(description="draft model to start from, see `specdistill init`")
    data: LocalPath = Field(
        description="answers: a folder of `specdistill generate`, or with policy fixed prompts "
        "with responses (.jsonl)"
    )
    turns: Literal["last", "all"] = Field(
        "last",
        description="of a conversation with responses of its own: each assistant turn is an "
        "answer to learn, or the last one alone",
    )
    chat_template_kwargs: dict[str, Any] = Field(
        {}, description="what the chat template is told for text, as {enable_thinking: false}"
    )
    run_dir: LocalPath = Field(description="folder of the run; the draft comes to run_dir/draft")
    loss: dict[str, Positive] = Field(
        {"fkl": 1.0}, description="name of a loss, or weights by name for a sum of several"
    )
    temperature: Divisor = Field(1.0, description="temperature of the losses of the KL family")
    decoding_temperature: Divisor = Field(
        1.0, description="temperature of the overlap losses: tvd, lk_alpha, lk_hybrid, e2e_tv"
    )
    beta: Share | None = Field(None, description="of jsd: weight of KL(p‖m); 0.5")
    skew: Share | None = Field(
        None, description="of skew_kl and skew_rkl: share of p (of q) in the mixture; 0.1"
    )
    eta: Annotated[float, Interval(ge=0, le=1e30)] | None = Field(
        None, description="of lk_hybrid: how fast fkl gives way to tvd as α grows; 3"
    )
    num_draft_tokens: DraftTokens | None = Field(
        None, description="of e2e_tv, and must be given with it: tokens in a block (γ)"
    )
    hints: Hints | None = Field(
        None, description="hidden-state hints beside the loss; {} takes the defaults"
    )
    policy: Policy = Field(
        Policy(), description="where the training text comes from: a name, or a section"
    )
    signal: Literal["kept", "live", "none"] = Field(
        "kept",
        description="what is learnt from the target: kept with the data, a live pass, or its text "
        "alone; kept for policy target, live for the others",
    )
    heldout: Count = Field(32, description="answers of the data held out of training, for metrics")
    evaluate_every: Count = Field(100, description="steps between evaluations")
    decode: Decode | None = Field(
        Decode(), description="the speculative decode at each evaluation; null leaves it out"
    )
    trackers: list[Tracker] = Field([], description="trackers that also get the metrics")
    checkpoint_every: Count = Field(100, description="steps between checkpoints")
    seed: Seed = Field(0, description="seed of everything random")
    dtype: Dtype = Field("auto", description="dtype of the target; the draft trains in float32")
    device: Name = Field(
        "auto", description="cpu, cuda, cuda:1; auto takes the GPU if there is one"
    )
    training: Training = Field(description="the optimiser and its budget")

    @field_validator("loss", mode="before")
    @classmethod
    def _by_name(cls, loss: object) -> object:
        return {loss: 1.0} if isinstance(loss, str) else loss

    @model_validator(mode="before")
    @classmethod
    def _what_follows_from_the_rest(cls, raw: object) -> object:
        """No decode without a target; a live signal for tokens of which none is kept."""
        if not isinstance(raw, dict):
            return raw
        policy = raw.get("policy", "target")
        name = policy.get("name", "target") if isinstance(policy, dict) else policy
        raw = {"signal": "kept" if name == "target" else "live", **raw}
        return {"decode": None, **raw} if raw["signal"] == "none" else raw

    @model_validator(mode="after")
    def _a_signal_for_its_tokens(self) -> DistillConfig:
        if self.signal == "kept" and self.policy.name != "target":
            raise ValueError(
                f"nothing of the target is kept for the tokens of policy {self.policy.name!r}; set "
                "signal: live"
            )
        if self.signal == "none":
            needs = [f"loss {name!r}" for name in self.loss if name != "ce"]
            needs += [] if self.hints is None else ["hints"]
            needs += [] if self.decode is None else ["decode"]
            if self.policy.name not in ("target", "fixed"):
                needs.append(f"policy {self.policy.name!r}")
            if needs:
                raise ValueError(
                    f"{', '.join(needs)}: wants more of the target than its text, and signal: none "
                    "leaves only that, which is for loss: ce; keep a signal, or set signal: live"
                )
        return self


def load_config(path: Path, overrides: Sequence[str] = ()) -> DistillConfig:
    """Read a YAML file and apply `section.key=value` overrides. Raises `InputError` naming the key
    and the nearest known.
    """
    return parse_config(read_yaml_mapping(path, overrides))


def parse_config(raw: dict[str, Any]) -> DistillConfig:
    """Validate. Raises `InputError`, which says every problem, or the first few of many."""
    try:
        return DistillConfig.model_validate(raw)
    except ValidationError as error:
        problems = error.errors()
        sentences = [_explain(problem) for problem in problems[:8]]
        sentences += [f"and {len(problems) - 8} more"] if len(problems) > 8 else []
        raise InputError("the configuration: " + "; ".join(sentences)) from None
    except RecursionError:
        raise InputError("the configuration is nested too deeply; write it flat") from None


def from_keywords(**options: Any) -> DistillConfig:
    """The configuration of a Python call: the keys of a file, and each key of a section by itself
    where no other section has it (max_steps is training.max_steps). Raises `InputError`."""
    places, raw = _places(), dict[str, Any]()
    for name in sorted(options, key=lambda name: name not in DistillConfig.model_fields):
        value = copy.deepcopy(options[name])
        value = value.model_dump(exclude_unset=True) if isinstance(value, BaseModel) else value
        value = {"name": value} if name == "policy" and isinstance(value, str) else value
        at = places.get(name)
        if at is None:
            hint = _nearest(name, {name: name for name in places})
            raise InputError(f"the unknown option {shown(name)}: {hint}")
        if len(at) > 1:
            sections = " or ".join(place.rpartition(".")[0] for place in at)
            raise InputError(f"{name!r} is an option of {sections}: give it in that dictionary")
        assign(raw, at[0], value, once=True)
    return parse_config(raw)


def _places() -> dict[str, list[str]]:
    """Where each key stands, as section.key; one of the top level stands there alone."""
    sections: dict[str, type[BaseModel]] = {
        "training": Training,
        "training.lora": Lora,
        "decode": Decode,
        "hints": Hints,
        "policy": Policy,
    }
    places: dict[str, list[str]] = {}
    for section, model in sections.items():
        for name in model.model_fields:
            places.setdefault(name, []).append(f"{section}.{name}")
    return places | {name: [name] for name in DistillConfig.model_fields}


def _nearest(name: object, known: dict[str, str]) -> str:
    """`known` says how to write a key, by its name."""
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    return f"did you mean {known[near[0]]!r}?" if near else f"known are {', '.join(known)}"


def _explain(problem: Any) -> str:
    where = ".".join(map(str, problem["loc"]))
    if problem["type"] == "extra_forbidden":
        if problem["loc"] in (("grid",), ("score",)):
            return f"unknown key {where!r}: a file with a grid is for `specdistill sweep`"
        dotted = {name: places[0] for name, places in _places().items()}
        return f"the unknown key {shown(where)}: {_nearest(problem['loc'][-1], dotted)}"
    if problem["type"] == "missing":
        return f"no value for {where!r}"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # our own words
        return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
    return f"{where or 'a section'}: {problem['msg']} (got {shown(problem['input'])})"
