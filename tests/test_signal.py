"""What is kept of the target: exact or with a known loss, and enough to train without its body."""

import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from small_runs import untimed

from specdistill import models
from specdistill.config import DistillConfig, parse_config
from specdistill.data.generation import generate, signal_bytes
from specdistill.data.prompts import Prompt
from specdistill.data.signal import (
    States,
    TopK,
    alpha_cost,
    bytes_per_token,
    from_tensors,
    keep,
)
from specdistill.data.token_store import Store, read_examples, read_manifest
from specdistill.decoding import Sampling
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import InputError, ModelError, StorageError
from specdistill.models import LanguageModel
from specdistill.models.head_only import load_head
from specdistill.training.answers import check_examples
from specdistill.training.batches import make_batch
from specdistill.training.distiller import Distiller
from specdistill.training.run import train

Tiny = Callable[..., LanguageModel]
K = 12
PROMPTS = [
    Prompt(str(i), ({"role": "user", "content": f"w{5 + i % 50} w{7 + i % 31}"},))
    for i in range(24)
]


@pytest.fixture(scope="module")
def target(tiny_folder: Path) -> LanguageModel:
    return models.load(str(tiny_folder), dtype="float32")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory, target: LanguageModel) -> dict[str, Path]:
    """The same answers with each kind of signal, and a draft with half of the vocabulary."""
    folder = tmp_path_factory.mktemp("signal")
    for name, signal in (("states", "states"), ("top-k", f"top-k:{K}")):
        settings = {"max_new_tokens": 10, "samplings": [Sampling(1.0)], "batch_size": 8}
        generate(target, PROMPTS, folder / name, signal=signal, **settings)
    save_draft(make_draft(target, [0, 1], torch.arange(0, 64, 2)), folder / "draft")
    return {name: folder / name for name in ("states", "top-k", "draft")}


def settings(
    world: dict[str, Path], target: LanguageModel, run: Path, kind: str, **more: object
) -> DistillConfig:
    raw = {"target": str(target.path), "draft": str(world["draft"]), "data": str(world[kind])}
    training = {"max_steps": 8, "batch_tokens": 120, "learning_rate": 2e-3}
    raw |= {"run_dir": str(run), "heldout": 8, "evaluate_every": 4, "training": training}
    return parse_config({**raw, **more})


def metrics(config: DistillConfig, target: LanguageModel) -> list[dict]:
    train(config, target, models.load(config.draft, dtype="float32"))
    lines = (Path(config.run_dir) / "metrics.jsonl").read_text().splitlines()
    return untimed([json.loads(line) for line in lines])


def test_the_cost_of_an_even_tail_in_closed_form() -> None:
    """p = (.5, .3, .15, .05), one kept: the others .5 / 3 each. The draft that does so loses it."""
    p = torch.tensor([[0.5, 0.3, 0.15, 0.05]])
    got = alpha_cost(p.log(), torch.tensor([[0]]))
    q = torch.tensor([[0.5, 0.5 / 3, 0.5 / 3, 0.5 / 3]])
    assert got.item() == pytest.approx(1 - torch.minimum(p, q).sum().item(), abs=1e-6)
    assert got.item() == pytest.approx(0.3 - 0.5 / 3, abs=1e-6)
    assert alpha_cost(p.log(), torch.tensor([[0, 1, 2]])).item() == pytest.approx(0, abs=1e-6)


def test_what_is_kept_takes_the_bytes_announced(target: LanguageModel) -> None:
    hidden = target.hidden(torch.randint(5, 60, (1, 9)))[0]
    logsumexp = target.logits(hidden).logsumexp(-1)
    for signal in ("states", "top-k:5", "top-k:63"):
        kept, _ = keep(target, States(hidden, logsumexp), signal)
        size = sum(t.nbytes for t in kept.tensors().values())
        assert size == 9 * bytes_per_token(target, signal) == signal_bytes(target, 3, 3, signal)
    assert signal_bytes(target, 3, 3, "none") == 0
    log_p = target.logits(hidden).log_softmax(-1)
    kept, cost = keep(target, States(hidden, logsumexp), "top-k:5")
    assert isinstance(kept, TopK)
    tokens, log_probs = kept.tokens.long(), kept.log_probs.float()
    assert cost == pytest.approx(alpha_cost(target.logits(hidden), tokens).sum().item())
    assert torch.allclose(log_p.gather(1, tokens), log_probs, atol=4e-3)
    rest = log_p.scatter(1, tokens, -torch.inf).logsumexp(-1)
    assert torch.allclose(kept.log_tail, rest, atol=1e-5)


@pytest.mark.parametrize("signal", ["top-k", "top-k:0", "top_k:3", "all", ""])
def test_no_such_signal(target: LanguageModel, tmp_path: Path, signal: str) -> None:
    with pytest.raises(InputError, match="'states', 'top-k:64' or 'none'"):
        generate(target, PROMPTS, tmp_path / "data", max_new_tokens=3, signal=signal)
    assert not (tmp_path / "data").exists()


def test_more_tokens_than_there_are(target: LanguageModel, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="keeps 64 tokens of a target that has 64"):
        generate(target, PROMPTS, tmp_path / "data", max_new_tokens=3, signal="top-k:64")


def test_the_manifest_counts_and_tells_what_top_k_costs(
    world: dict[str, Path], target: LanguageModel
) -> None:
    manifest = read_manifest(world["top-k"])
    examples = read_examples(world["states"], signal=True)
    assert manifest.signal == f"top-k:{K}"
    tokens = sum(len(e.response_tokens) for e in examples)
    assert sum(part["tokens"] for part in manifest.parts) == tokens
    p = target.logits(torch.cat([e.signal.hidden for e in examples])).softmax(-1)
    tail = p.sort(-1).values[:, :-K]
    expected = (tail - tail.mean(-1, keepdim=True)).clamp(min=0).sum(-1)
    told = Store(world["top-k"], manifest).tail()
    assert told["tail_mass"] == pytest.approx(tail.sum(-1).mean().item(), rel=1e-4)
    assert told["alpha_cost"] == pytest.approx(expected.mean().item(), rel=1e-4)
    assert 0 < told["alpha_cost"] < told["tail_mass"]
    assert Store(world["states"], read_manifest(world["states"])).tail() is None
    kept = read_examples(world["top-k"], signal=True)
    assert isinstance(kept[0].signal, TopK)
    assert [e.response_tokens for e in kept] == [e.response_tokens for e in examples]


def test_a_foreign_shard_is_refused_by_name(world: dict[str, Path], tmp_path: Path) -> None:
    folder = shutil.copytree(world["top-k"], tmp_path / "data")
    shard = folder / "part-00000.safetensors"
    shutil.copy(world["states"] / shard.name, shard)
    with pytest.raises(StorageError, match=r"part-00000.safetensors is truncated, changed or from"):
        read_examples(folder, signal=True)


# Training


def test_top_k_trains_and_bounds_the_expected_alpha(
    world: dict[str, Path], target: LanguageModel, tmp_path: Path
) -> None:
    exact = metrics(settings(world, target, tmp_path / "a", "states", loss="tvd"), target)
    lumped = metrics(settings(world, target, tmp_path / "b", "top-k", loss="tvd"), target)
    assert lumped[-1]["expected_alpha"] > lumped[0]["expected_alpha"] + 0.005
    a, b = exact[0], lumped[0]  # the same untrained draft
    assert a["expected_alpha"] < b["expected_alpha"] <= a["expected_alpha"] + b["tail_mass"]
    assert a["greedy_match"] == b["greedy_match"]
    assert "tail_mass" not in a


@pytest.mark.parametrize("kind", ["states", "top-k"])
def test_training_does_without_the_targets_body(
    world: dict[str, Path], target: LanguageModel, tmp_path: Path, kind: str
) -> None:
    """To the bit as with it; and a body that is not there cannot have run."""
    bare = load_head(str(target.path), dtype="float32")
    assert all(p.is_meta for p in bare.model.base_model.layers.parameters())
    config = settings(world, target, tmp_path / "bare", kind, decode=None)
    got = metrics(config, bare)
    assert got == metrics(settings(world, target, tmp_path / "whole", kind, decode=None), target)
    assert got[-1]["expected_alpha"] > got[0]["expected_alpha"]


def test_a_live_signal_needs_the_body(world: dict[str, Path], target: LanguageModel) -> None:
    bare = load_head(str(target.path), dtype="float32")
    config = settings(world, target, Path("x"), "states", signal="live")
    distiller = Distiller(bare, models.load(config.draft, dtype="float32"), config)
    batch = make_batch(read_examples(world["states"], signal=False)[:2], 0, bare.device)
    with pytest.raises((RuntimeError, NotImplementedError)):
        distiller.signal(batch)


@pytest.mark.parametrize("tied", [False, True])
def test_the_head_alone_is_the_models(tiny: Tiny, tmp_path: Path, tied: bool) -> None:
    save_draft(tiny(3, tie_word_embeddings=tied), tmp_path / "model")
    whole = models.load(str(tmp_path / "model"), dtype="float32")
    bare = load_head(str(tmp_path / "model"), dtype="float32")
    hidden = torch.randn(5, 32)
    assert torch.equal(bare.logits(hidden), whole.logits(hidden))
    assert bare.sha256() == whole.sha256()
    assert (bare.vocab_size, bare.full_vocab_size, bare.num_layers, bare.device) == (
        (whole.vocab_size, whole.full_vocab_size, whole.num_layers, whole.device)
    )
    models.check_pair(bare, whole)


def test_the_head_of_a_trimmed_model_is_no_targets(tiny: Tiny, tmp_path: Path) -> None:
    save_draft(make_draft(tiny(3), [0, 1], torch.arange(0, 64, 2)), tmp_path / "trimmed")
    bare = load_head(str(tmp_path / "trimmed"), dtype="float32")
    with pytest.raises(ModelError, match="trimmed output vocabulary"):
        models.check_pair(bare, models.load(str(tmp_path / "trimmed"), dtype="float32"))


def test_a_head_under_another_name_is_still_found(
    tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_draft(tiny(3), tmp_path / "model")
    whole = models.load(str(tmp_path / "model"), dtype="float32")
    monkeypatch.setattr("specdistill.models.head_only._names", lambda model, part: ["elsewhere"])
    with pytest.warns(UserWarning, match="the whole model is read"):
        bare = load_head(str(tmp_path / "model"), dtype="float32")
    assert torch.equal(bare.head.weight, whole.head.weight)
    assert all(p.is_meta for p in bare.model.base_model.layers.parameters())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"temperature": 2.0}, "temperature is 2.0, .*'top-k:12' .*at temperature 1"),
        ({"loss": "tvd", "decoding_temperature": 0.7}, "decoding_temperature is 0.7"),
        ({"hints": {"layers": {2: 4}}}, "layers \\[4\\], .*'top-k:12': no layer"),
    ],
)
def test_what_top_k_cannot_serve(
    world: dict[str, Path], target: LanguageModel, tmp_path: Path, changes: dict, message: str
) -> None:
    config = settings(world, target, tmp_path / "run", "top-k", **changes)
    with pytest.raises(InputError, match=message):
        metrics(config, target)


@pytest.mark.parametrize("kind", ["states", "top-k"])
def test_a_kept_signal_that_is_no_number_is_named(
    world: dict[str, Path], target: LanguageModel, kind: str
) -> None:
    first, second, *_ = read_examples(world[kind], signal=True)
    assert first.signal is not None
    for name, values in first.signal.tensors().items():
        if not values.is_floating_point():
            continue
        for number in (torch.nan, torch.inf):
            broken = values.clone()
            broken[-1] = number
            signal = from_tensors(first.signal.tensors() | {name: broken})
            with pytest.raises(StorageError, match=rf"keeps {name} of {first.id!r} that are no n"):
                check_examples([second, replace(first, signal=signal)], target, "data", "no")
    if isinstance(first.signal, TopK):  # nothing is left for the tail
        tail = torch.full_like(first.signal.log_tail, -torch.inf)
        sure = replace(first, signal=replace(first.signal, log_tail=tail))
        check_examples([sure], target, "data", "no")
