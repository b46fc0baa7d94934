"""The configuration of a run: one YAML file, one run folder. Unknown keys are errors."""

from __future__ import annotations

import copy
import difflib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, Literal

from annotated_types import Interval
from pydantic import BaseModel, Field, ValidationError, field_validator, model_validator

from specdistill.config.sections import (
    POLICY_SETTINGS,
    Count,
    Decode,
    Divisor,
    DraftTokens,
    Hints,
    LocalPath,
    Lora,
    Name,
    Parallel,
    Policy,
    Positive,
    Reward,
    Section,
    Seed,
    Share,
    Tracker,
    Training,
)
from specdistill.documents import assign, read_yaml_mapping
from specdistill.errors import InputError
from specdistill.limits import Dtype, shown

__all__ = [
    "POLICY_SETTINGS",
    "Decode",
    "DistillConfig",
    "Hints",
    "Lora",
    "Parallel",
    "Policy",
    "Reward",
    "Training",
    "from_keywords",
    "load_config",
    "parse_config",
]


class DistillConfig(Section):
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
    parallel: Parallel | None = Field(
        None,
        description="train a draft that proposes its block in one pass; {} takes the defaults. The "
        "loss is then fkl and a tenth of ce, unless one is given",
    )
    reward: Reward | None = Field(None, description="a reward beside the loss; null leaves it out")
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
        """No decode without a target; a live signal for tokens of which none is kept; what a
        parallel draft is trained by, and its block in the decode.
        """
        if not isinstance(raw, dict):
            return raw
        if isinstance(parallel := raw.get("parallel"), dict):
            raw = _parallel_defaults(raw, parallel)
        policy = raw.get("policy", "target")
        name = policy.get("name", "target") if isinstance(policy, dict) else policy
        raw = {"signal": "kept" if name == "target" else "live", **raw}
        return {"decode": None, **raw} if raw["signal"] == "none" else raw

    @model_validator(mode="after")
    def _what_a_parallel_draft_can_be_trained_by(self) -> DistillConfig:
        if self.parallel is None:
            return self
        weighting = self.parallel.weighting
        refused = {
            "signal: none": (
                self.signal == "none",
                "each place learns from the target's distribution; keep a signal, or set "
                "signal: live",
            ),
            f"policy {self.policy.name!r}": (
                self.policy.name in ("skd", "induced"),
                "it trains on what a draft proposes token by token; take another policy",
            ),
            "reward": (self.reward is not None, "its gradient is of single tokens; leave it out"),
            "training.packing": (
                self.training.packing,
                "the masks of a text stand behind it in its row; leave it out",
            ),
            "hints": (self.hints is not None, "masks have no states of the target; leave them out"),
            "decode.least_reach": (
                self.decode is not None and self.decode.least_reach > 0,
                "a whole block costs one pass, so there is nothing to end early; leave it out",
            ),
            f"num_draft_tokens: {self.num_draft_tokens}": (
                self.num_draft_tokens is not None,
                "the block of e2e_tv is parallel.num_draft_tokens; leave it out",
            ),
            f"parallel.weighting: {weighting}": (
                weighting != "uniform" and "e2e_tv" in self.loss,
                "e2e_tv weighs the places of a block by how often they are reached; leave the "
                "weighting out",
            ),
        }
        for setting, (applies, reason) in refused.items():
            if applies:
                raise ValueError(f"{setting} does not go with parallel: {reason}")
        return self

    @model_validator(mode="after")
    def _samples_to_reward(self) -> DistillConfig:
        if self.reward is None:
            return self
        if self.policy.name not in ("draft", "mixed"):
            raise ValueError(
                f"a reward is for samples of the draft, and policy {self.policy.name!r} has none; "
                "take policy draft or mixed"
            )
        if self.policy.sample_temperature != 1:
            raise ValueError(
                "a reward's gradient is that of samples at temperature 1; got "
                f"policy.sample_temperature {self.policy.sample_temperature}"
            )
        return self

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


def _parallel_defaults(raw: dict[str, Any], parallel: dict[str, Any]) -> dict[str, Any]:
    raw = {"loss": {"fkl": 1.0, "ce": 0.1}, **raw}
    loss = raw["loss"]
    weighting = "uniform" if isinstance(loss, str | dict) and "e2e_tv" in loss else "cat"
    parallel = {**Parallel().model_dump(), "weighting": weighting, **parallel}
    raw["parallel"] = parallel
    num, decode = parallel["num_draft_tokens"], raw.get("decode", {})
    if isinstance(num, int) and isinstance(decode, dict) and raw.get("signal") != "none":
        raw["decode"] = {"num_draft_tokens": num, **decode}
    return raw


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


_SECTIONS: dict[str, type[BaseModel]] = {
    "training": Training,
    "training.lora": Lora,
    "decode": Decode,
    "hints": Hints,
    "parallel": Parallel,
    "policy": Policy,
    "reward": Reward,
}


def _places() -> dict[str, list[str]]:
    """Where each key stands, as section.key; one of the top level stands there alone."""
    places: dict[str, list[str]] = {}
    for section, model in _SECTIONS.items():
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
        section = where.rpartition(".")[0]
        if section in _SECTIONS:
            dotted |= {name: f"{section}.{name}" for name in _SECTIONS[section].model_fields}
        return f"the unknown key {shown(where)}: {_nearest(problem['loc'][-1], dotted)}"
    if problem["type"] == "missing":
        return f"no value for {where!r}"
    if problem["type"] == "value_error" and isinstance(problem["input"], dict):  # our own words
        return f"{where}: {problem['ctx']['error']}" if where else str(problem["ctx"]["error"])
    return f"{where or 'a section'}: {problem['msg']} (got {shown(problem['input'])})"
