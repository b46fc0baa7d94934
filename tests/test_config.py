"""The configuration file: what is read, and what each mistake is answered with."""

from pathlib import Path

import pytest

from specdistill.config import (
    Decode,
    DistillConfig,
    Hints,
    Lora,
    Parallel,
    Policy,
    Training,
    from_keywords,
    load_config,
)
from specdistill.errors import InputError

GOOD = """\
target: t
draft: d
data: answers
run_dir: run
loss: {fkl: 0.9, ce: 0.1}
training:
  max_steps: 10
"""


def read(tmp_path: Path, text: str, *overrides: str) -> DistillConfig:
    file = tmp_path / "run.yaml"
    file.write_text(text, encoding="utf-8")
    return load_config(file, overrides)


def refusal(tmp_path: Path, text: str, *overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        read(tmp_path, text, *overrides)
    return str(caught.value)


def test_what_is_not_given_has_its_default(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD)
    assert config.loss == {"fkl": 0.9, "ce": 0.1}
    assert config.training == Training(max_steps=10)
    assert (config.temperature, config.signal, config.seed) == (1.0, "kept", 0)


def test_overrides_win_over_the_file(tmp_path: Path) -> None:
    config = read(
        tmp_path, GOOD, "seed=7", "training.max_steps=20", "loss={ce: 2}", "run_dir=a=b", "draft=5e"
    )
    assert (config.seed, config.training.max_steps, config.loss) == (7, 20, {"ce": 2.0})
    assert (config.run_dir, config.draft) == ("a=b", "5e")
    changed = read(tmp_path, GOOD, "training.max_steps=null", "training.max_seconds=1.5")
    assert (changed.training.max_steps, changed.training.max_seconds) == (None, 1.5)
    bare = "target: t\ndraft: d\ndata: a\nrun_dir: r\n"
    assert read(tmp_path, bare, "training.max_steps=3").training.max_steps == 3


@pytest.mark.parametrize(
    ("line", "unknown", "nearest"),
    [
        ("tempratur: 2", "tempratur", "temperature"),
        ("rundir: x", "rundir", "run_dir"),
        ("heldout_: 3", "heldout_", "heldout"),
        ("learning_rate: 1", "learning_rate", "training.learning_rate"),
        ("  lerning_rate: 1", "training.lerning_rate", "training.learning_rate"),
        ("  max_step: 1", "training.max_step", "training.max_steps"),
        ("  seed: 1", "training.seed", "seed"),
        ("  kind: 1", "training.kind", "hints.kind"),
    ],
)
def test_an_unknown_key_is_answered_with_the_nearest(
    tmp_path: Path, line: str, unknown: str, nearest: str
) -> None:
    message = refusal(tmp_path, GOOD + line)
    assert f"unknown key {unknown!r}: did you mean {nearest!r}?" in message
    key, value = line.strip().split(": ")
    section = "training." if line.startswith(" ") else ""
    assert refusal(tmp_path, GOOD, f"{section}{key}={value}") == message


@pytest.mark.parametrize("key", ["hints.weight", "reward.weight", "decode.num_draft_tokens"])
def test_a_key_of_the_same_section_is_nearer_than_others(key: str, tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD, f"{key[:-1]}=1")
    assert f"the unknown key {key[:-1]!r}: did you mean {key!r}?" in message


def test_an_unknown_key_like_no_other_is_answered_with_all(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD + "zzz: 1")
    assert "'zzz': known are" in message
    for section in (DistillConfig, Training, Lora, Hints, Policy):
        assert all(name in message for name in section.model_fields)


def test_a_file_with_a_grid_is_sent_to_sweep(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD + "grid: {seed: [0, 1]}\nscore: {prompts: p.txt}")
    assert message.count("a file with a grid is for `specdistill sweep`") == 2


def test_no_two_sections_share_a_key() -> None:
    names = [n for m in (DistillConfig, Training, Lora, Hints, Policy) for n in m.model_fields]
    assert len(set(names)) == len(names)


def test_every_key_says_what_it_does() -> None:
    for section in (DistillConfig, Training, Lora, Hints, Policy, Decode):
        for name, field in section.model_fields.items():
            assert field.description, f"{section.__name__}.{name}"


def test_a_policy_is_a_name_or_a_section_and_has_its_own_defaults(tmp_path: Path) -> None:
    config = read(tmp_path, GOOD, "policy=skd", "signal=live")
    assert (config.policy.top_k, config.policy.block, config.policy.share) == (25, 4, None)
    again = DistillConfig.model_validate(config.model_dump())
    assert again == config, "what a run folder holds is read again"
    given = read(tmp_path, GOOD, "policy={name: mixed, share: 0.2}", "signal=live").policy
    assert (given.share, given.refresh_every, given.top_k) == (0.2, 100, None)


def test_only_policies_with_proposals_have_a_block(tmp_path: Path) -> None:
    given = "policy={{name: {}, block: 0}}".format
    for name in ("skd", "induced"):
        assert "policy.block" in refusal(tmp_path, GOOD, given(name))
    assert "'draft' has no block" in refusal(tmp_path, GOOD, given("draft"))
    earlier = read(tmp_path, GOOD, given("fresh_target"))
    assert earlier == read(tmp_path, GOOD, "policy=fresh_target"), "as runs before have it"


def test_the_signal_follows_the_policy_where_it_is_left_out(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD).signal == "kept"
    for policy in ("mixed", "fixed", "{name: skd, block: 2}"):
        assert read(tmp_path, GOOD, f"policy={policy}").signal == "live"
    message = refusal(tmp_path, GOOD, "policy=mixed", "signal=kept")
    assert "policy 'mixed'; set signal: live" in message
    assert "Value error" not in message
    assert "{" not in message


def test_a_loss_is_a_name_or_weights_by_name(tmp_path: Path) -> None:
    assert read(tmp_path, GOOD, "loss=tvd").loss == {"tvd": 1.0}
    assert read(tmp_path, GOOD, "loss={ce: 0.1, tvd: 0.9}").loss == {"ce": 0.1, "tvd": 0.9}


@pytest.mark.parametrize("key", ["target", "draft", "data", "run_dir"])
def test_a_missing_key_is_named(tmp_path: Path, key: str) -> None:
    lines = [line for line in GOOD.splitlines() if not line.startswith(f"{key}:")]
    assert f"no value for {key!r}" in refusal(tmp_path, "\n".join(lines))


def test_every_problem_is_told_at_once(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD.replace("target: t\n", "targe: t\n") + "seed: x\n")
    for part in ("no value for 'target'", "did you mean 'target'?", "seed", "'x'"):
        assert part in message


@pytest.mark.parametrize("budgets", [[], ["max_steps=5", "max_seconds=5"]], ids=["neither", "both"])
def test_one_budget_is_given(tmp_path: Path, budgets: list[str]) -> None:
    overrides = ["training.max_steps=null", *(f"training.{budget}" for budget in budgets)]
    message = refusal(tmp_path, GOOD, *overrides)
    assert "exactly one of max_steps and max_seconds" in message
    assert "training" in message


@pytest.mark.parametrize(
    ("override", "parts"),
    [
        ("seed=x", ("seed", "integer", "'x'")),
        ("temperature=0", ("temperature", "greater than or equal to 0.0001", "0")),
        ("training.max_steps=0", ("training.max_steps", "greater than or equal to 1")),
        ("training.max_steps=2.5", ("training.max_steps", "2.5")),
        ("training.learning_rate=fast", ("training.learning_rate", "number", "'fast'")),
        ("training.warmup=1", ("training.warmup", "less than 1")),
        ("training.precision=fp8", ("training.precision", "'bf16'", "'fp8'")),
        ("training=5", ("training", "5")),
        ("training=null", ("training", "None")),
        ("loss=[fkl]", ("loss", "dictionary", "['fkl']")),
        ("policy={name: draft, share: 0.5}", ("policy", "'draft' has no share; it has refresh_")),
        ("policy={name: mixed, share: 2}", ("policy.share", "less than or equal to 1")),
        ("policy={refresh_every: 5}", ("policy", "'target' has no refresh_every")),
        ("policy=best", ("policy.name", "'induced'", "'best'")),
        ("policy={name: [a]}", ("policy.name",)),
        ("policy=3", ("policy", "3")),
        ("hints={kind: l1}", ("hints.kind", "'smooth_l1'", "'l1'")),
        ("parallel.num_draft_tokens=1", ("parallel.num_draft_tokens", "or equal to 2")),
        ("parallel.num_draft_tokens=65", ("parallel.num_draft_tokens", "or equal to 64")),
        ("parallel.keep=0", ("parallel.keep", "greater than 0")),
        ("parallel.keep=1.5", ("parallel.keep", "or equal to 1")),
        ("parallel.least=-1", ("parallel.least", "or equal to 0")),
        ("parallel.mask_token=any", ("parallel.mask_token", "auto, or the id", "'any'")),
        ("parallel.mask_token=-1", ("parallel.mask_token", "auto, or the id", "-1")),
        ("parallel.mask_token=true", ("parallel.mask_token", "auto, or the id", "True")),
        ("parallel.weighting=decay", ("parallel.weighting", "'cat' or 'uniform'", "'decay'")),
        ("parallel=8", ("parallel", "8")),
        ("num_draft_tokens=0", ("num_draft_tokens", "greater than or equal to 1")),
        ("loss.fkl=much", ("loss.fkl", "number", "'much'")),
        ("signal=guessed", ("signal", "'kept', 'live' or 'none'", "'guessed'")),
        ("dtype=int8", ("dtype", "'bfloat16'", "'int8'")),
        ("schema_version=2", ("schema_version", "1", "2")),
        ("target=[a, b]", ("target", "string")),
    ],
)
def test_a_value_of_the_wrong_kind(tmp_path: Path, override: str, parts: tuple[str, ...]) -> None:
    message = refusal(tmp_path, GOOD, override)
    for part in parts:
        assert part in message


@pytest.mark.parametrize("override", ["seed", "=3", ""])
def test_an_override_without_key_or_value(tmp_path: Path, override: str) -> None:
    message = refusal(tmp_path, GOOD, override)
    assert "key=value" in message
    assert repr(override) in message


def test_an_override_below_a_value(tmp_path: Path) -> None:
    assert "'target' is a value, not a section" in refusal(tmp_path, GOOD, "target.x=1")


def test_an_override_that_is_no_yaml(tmp_path: Path) -> None:
    message = refusal(tmp_path, GOOD, "loss={fkl: 1")
    assert "'loss={fkl: 1'" in message
    assert "not valid YAML" in message


PLACES = dict.fromkeys(("target", "draft", "data", "run_dir"), "x")


def test_keywords_say_what_a_file_says() -> None:
    nested = from_keywords(
        **PLACES, policy={"name": "skd", "top_k": 9}, training={"max_steps": 7, "lora": {"rank": 2}}
    )
    flat = from_keywords(**PLACES, policy="skd", top_k=9, max_steps=7, rank=2)
    of_objects = from_keywords(
        **PLACES, policy=Policy(name="skd", top_k=9), training=Training(max_steps=7), rank=2
    )
    assert nested == flat == of_objects
    assert (flat.training.max_steps, flat.policy.top_k) == (7, 9)
    assert flat.training.lora == Lora(rank=2)
    assert from_keywords(**PLACES, max_steps=1, least_reach=0.4).decode == Decode(least_reach=0.4)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"max_step": 7}, "the unknown option 'max_step': did you mean 'max_steps'"),
        ({"qqqqqq": 7}, "known are max_steps,.*"),
        ({"prompts": 4}, "'prompts' is an option of decode or policy: give it in that dictionary"),
        ({"max_steps": 4, "training": {"max_steps": 4}}, "'training.max_steps' is given twice"),
        ({"rank": 4, "training": {"max_steps": 1, "lora": {"rank": 4}}}, "lora.rank' is given tw"),
        ({"max_steps": 4, "decode": None, "least_reach": 0.3}, "'decode' is a value, not a sec"),
        ({"training": {"max_step": 7}}, "unknown key 'training.max_step': did you mean"),
        ({"max_steps": "many"}, "training.max_steps: .*got 'many'"),
    ],
)
def test_keywords_that_say_nothing_or_too_much(options: dict, message: str) -> None:
    with pytest.raises(InputError, match=message):
        from_keywords(**PLACES, **options)


@pytest.mark.parametrize(
    ("overrides", "says"),
    [
        (["signal=none", "loss=ce"], "signal: none does not go with parallel"),
        (["policy=skd"], "policy 'skd' does not go with parallel"),
        (["policy=induced"], "policy 'induced' does not go with parallel"),
        (["hints={}"], "hints does not go with parallel"),
        (["decode.least_reach=0.2"], "decode.least_reach does not go with parallel"),
        (["loss=e2e_tv", "num_draft_tokens=4"], "num_draft_tokens: 4 does not go with parallel"),
        (["loss=e2e_tv", "parallel.weighting=cat"], "parallel.weighting: cat does not go with"),
    ],
)
def test_what_does_not_go_with_parallel(tmp_path: Path, overrides: list[str], says: str) -> None:
    assert says in refusal(tmp_path, GOOD, "parallel={}", *overrides)


def test_what_follows_from_parallel(tmp_path: Path) -> None:
    bare = GOOD.replace("loss: {fkl: 0.9, ce: 0.1}\n", "")
    config = read(tmp_path, bare, "parallel={num_draft_tokens: 6}")
    assert config.loss == {"fkl": 1.0, "ce": 0.1}
    assert config.parallel == Parallel(num_draft_tokens=6)
    assert config.decode == Decode(num_draft_tokens=6)
    assert read(tmp_path, GOOD, "parallel={}").loss == {"fkl": 0.9, "ce": 0.1}
    e2e = read(tmp_path, bare, "parallel={}", "loss=e2e_tv", "decode.num_draft_tokens=3")
    assert e2e.parallel == Parallel(weighting="uniform")
    assert e2e.decode == Decode(num_draft_tokens=3)
    assert read(tmp_path, GOOD, "parallel={}", "decode=null").decode is None
    assert read(tmp_path, GOOD).parallel is None
