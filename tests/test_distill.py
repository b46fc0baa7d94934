"""Training: the step against a plain computation, kept and live signals, resumable to the bit."""

import json
import random
import shutil
import sys
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Literal
from unittest import mock

import pytest
import torch
from small_runs import ask, digest, interrupted, pair_of, reported, run, settings, untimed
from torch.optim.optimizer import register_optimizer_step_pre_hook

from specdistill import models
from specdistill.config import DistillConfig, Lora, load_config
from specdistill.data.generation import generate
from specdistill.data.token_store import Example, Store, read_examples, read_manifest
from specdistill.decoding import Request, Sampling, SpeculativeDecoder
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import InputError, ModelError, StorageError, TrainingError
from specdistill.models import LanguageModel, origin, set_origin
from specdistill.models.packing import pack
from specdistill.run_folder import config_sha256
from specdistill.training import distiller as distiller_module
from specdistill.training.answers import read_given, split
from specdistill.training.batches import Batch, length_buckets, make_batch, updates
from specdistill.training.distiller import Distiller
from specdistill.training.evaluation import Evaluation, decoded, overlap, with_answers
from specdistill.training.lora import adapt
from specdistill.training.run import distill, rate, train

Tiny = Callable[..., LanguageModel]
LORA = {"rank": 4, "alpha": 8}


def test_a_step_is_the_mean_over_response_tokens_of_the_plain_loss(world: dict[str, str]) -> None:
    """Two micro-batches of unequal size in one update against one plain, unchunked computation."""
    distiller = distiller_of(world, training={"clip_norm": 1e9, "chunk": 7})
    target, draft, twin = distiller.target, distiller.draft, pair_of(world)[1]
    assert target is not None
    examples = read_examples(Path(world["data"]), signal=True)[:7]
    groups = [examples[:5], examples[5:]]

    twin.model.requires_grad_(True)
    total, count = torch.zeros(()), 0
    for example in examples:
        tokens = torch.tensor([example.prompt_tokens + example.response_tokens])
        at = slice(len(example.prompt_tokens) - 1, -1)
        p = target.model(tokens).logits[0, at].softmax(-1)[:, twin.vocab]
        log_q = twin.logits(twin.hidden(tokens)[0, at]).log_softmax(-1)
        mass = p.sum(-1, keepdim=True)
        total = total + (p * ((p / mass).log() - log_q)).sum()
        count += len(example.response_tokens)
    trained = [p for name, p in twin.model.named_parameters() if "embed_tokens" not in name]
    every = torch.autograd.grad(total / count, trained, retain_graph=True)
    norm = sum(grad.square().sum() for grad in every).sqrt().item()
    expected = torch.autograd.grad(total / count, list(twin.model.model.layers.parameters()))

    grads: list[torch.Tensor] = []
    step = distiller.optimizer.step
    distiller.optimizer.step = lambda: (
        grads.extend(p.grad.clone() for p in draft.model.model.layers.parameters()),
        step(),
    )
    metrics = distiller.step([make_batch(g, 0, draft.device) for g in groups], 1e-3)
    assert metrics.response_tokens == count
    assert metrics.grad_norm == pytest.approx(norm, rel=1e-4)
    assert metrics.loss == pytest.approx((total / count).item(), rel=1e-4)
    for got, wanted in zip(grads, expected, strict=True):
        assert torch.allclose(got, wanted, atol=1e-5)
    assert all(p.grad is None for p in target.model.parameters())
    assert draft.model.get_input_embeddings().weight.grad is None


def test_heads_in_bfloat16_give_the_same_update(
    world: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU, where precision bf16 asks for it; metrics and weights stay in float32."""
    wide = one_step(world, 1e-3)
    monkeypatch.setattr(Distiller, "head_dtype", torch.bfloat16)
    narrow = one_step(world, 1e-3)
    assert narrow.target_head is not None
    assert narrow.target_head.weight.dtype == narrow.draft_head().weight.dtype == torch.bfloat16
    with torch.no_grad():
        assert narrow.draft_head().weight.dtype == torch.float32
    before = pair_of(world)[1].model.state_dict()
    for name, value in wide.draft.model.named_parameters():
        got, wanted = narrow.trained.get(name), value - before[name]
        if got is not None:
            assert got.dtype == torch.float32
            change = got - before[name]
            assert (change - wanted).norm() <= 0.2 * wanted.norm(), name  # Adam takes signs


def distiller_of(world: dict[str, str], **more: object) -> Distiller:
    return Distiller(*pair_of(world), settings(world, Path("unused"), **more))


def answers_of(world: dict[str, str], number: int) -> Batch:
    """The first of them, with their signal."""
    examples = read_examples(Path(world["data"]), signal=True)[:number]
    return make_batch(examples, 0, torch.device("cpu"))


def one_step(world: dict[str, str], learning_rate: float, **training: object) -> Distiller:
    distiller = distiller_of(world, training=training)
    distiller.step([answers_of(world, 4)], learning_rate)
    return distiller


def test_the_gradient_is_clipped(world: dict[str, str]) -> None:
    norms = []

    def seen(optimizer: torch.optim.Optimizer, *_: object) -> None:
        grads = [p.grad for group in optimizer.param_groups for p in group["params"]]
        norms.append(sum(g.square().sum() for g in grads).sqrt().item())

    handle = register_optimizer_step_pre_hook(seen)
    try:
        one_step(world, 0.0, clip_norm=0.01)
        one_step(world, 0.0, clip_norm=1e9)
    finally:
        handle.remove()
    assert norms[0] == pytest.approx(0.01, rel=1e-3)
    assert norms[1] > 0.05


def test_weights_decay_beside_the_gradients_update(world: dict[str, str]) -> None:
    _, first = pair_of(world)
    plain = one_step(world, 1e-2).parameters
    decayed = one_step(world, 1e-2, weight_decay=0.5).parameters
    for name, value in first.model.named_parameters():
        if name in plain:
            lost = plain[name] - decayed[name]
            assert torch.allclose(lost, 1e-2 * 0.5 * value, atol=1e-6), name  # AdamW, 1711.05101


def test_embeddings_are_trained_where_asked_for(world: dict[str, str]) -> None:
    first = pair_of(world)[1].model.get_input_embeddings().weight
    for asked in (False, True):
        draft = one_step(world, 1e-2, train_embeddings=asked).draft
        assert torch.equal(draft.model.get_input_embeddings().weight, first) != asked


@pytest.mark.parametrize("recomputed", [False, True])
def test_bf16_is_the_drafts_body_alone(world: dict[str, str], recomputed: bool) -> None:
    losses = {}
    for precision, kind in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        training = {"precision": precision, "activation_checkpointing": recomputed}
        distiller = distiller_of(world, training=training)
        draft, batch, kinds = distiller.draft, answers_of(world, 4), set()
        draft.model.model.layers[0].mlp.down_proj.register_forward_hook(
            lambda module, inputs, out, kinds=kinds: kinds.add(out.dtype)
        )
        loss = distiller.loss_of(replace(batch, signal=distiller.signal(batch)))
        assert (kinds, loss.dtype) == ({kind}, torch.float32)
        losses[precision] = distiller.step([batch], 1e-3).loss
        assert kinds == {kind}, "in the backward pass too"
        assert all(p.dtype == torch.float32 for p in draft.model.parameters())
    assert losses["bf16"] == pytest.approx(losses["fp32"], rel=0.02)
    assert losses["bf16"] != losses["fp32"]


@pytest.mark.parametrize("recomputed", [False, True])
def test_short_texts_attend_by_products_in_bf16(
    world: dict[str, str], monkeypatch: pytest.MonkeyPatch, recomputed: bool
) -> None:
    """On a CPU, and where a layer is run again in the same way; longer ones by PyTorch's own."""
    losses = []
    for most, precision, kind in (
        (512, "bf16", "eager"),
        (4, "bf16", "sdpa"),
        (512, "fp32", "sdpa"),
    ):
        monkeypatch.setattr(distiller_module, "SHORT", most)
        training = {"precision": precision, "activation_checkpointing": recomputed}
        distiller = distiller_of(world, training=training)
        draft, kinds = distiller.draft, list[str]()
        draft.model.model.layers[0].self_attn.register_forward_hook(
            lambda module, *_, kinds=kinds: kinds.append(module.config._attn_implementation)
        )
        losses.append(distiller.step([answers_of(world, 4)], 1e-3).loss)
        assert kinds == [kind] * (1 + recomputed)
        assert draft.config._attn_implementation == "sdpa"
    assert losses == pytest.approx([losses[-1]] * 3, rel=0.02)


@pytest.mark.parametrize("temperature", [1.0, 2.0])
def test_kept_and_live_signals_give_the_same_loss(
    world: dict[str, str], temperature: float
) -> None:
    losses = {}
    for kind in ("kept", "live"):
        distiller = distiller_of(world, signal=kind, temperature=temperature)
        batch = answers_of(world, 6)
        if kind == "live":
            batch.signal = None
        losses[kind] = [distiller.step([batch], 1e-3).loss for _ in range(3)]
    assert losses["kept"] == pytest.approx(losses["live"], rel=1e-4)
    assert losses["kept"][2] < losses["kept"][0]


def test_the_mask_covers_the_response_shifted_by_one() -> None:
    batch = make_batch(
        [Example("a", [5, 6, 7], [8, 9]), Example("b", [5], [6, 7, 8, 9])], 0, torch.device("cpu")
    )
    predicted = [
        batch.tokens[b, i + 1].item() for b in range(2) for i in range(5) if batch.response[b, i]
    ]
    assert predicted == batch.labels.tolist() == [8, 9, 6, 7, 8, 9]
    assert batch.mask.sum(-1).tolist() == [5, 5]


def test_distillation_lowers_the_loss_and_raises_the_overlap(
    world: dict[str, str], tmp_path: Path
) -> None:
    config = settings(world, tmp_path / "run", training={"max_steps": 60})
    rows = run(config)
    assert rows[-1]["expected_alpha"] > rows[0]["expected_alpha"] + 0.01
    losses = [row["loss"] for row in rows if "loss" in row]
    assert sum(losses[-5:]) < 0.5 * sum(losses[:5])
    again = models.load(str(tmp_path / "run" / "draft"), dtype="float32")
    assert again.vocab_size == 32


def test_evaluate_measures_the_full_overlap(world: dict[str, str]) -> None:
    distiller = distiller_of(world)
    target, draft = distiller.target, distiller.draft
    assert target is not None
    examples = read_examples(Path(world["data"]), signal=False)[:5]
    got = overlap(distiller, [with_answers(distiller, target, answers_of(world, 5))])
    overlaps, matches = [], []
    for example in examples:
        tokens = torch.tensor([example.prompt_tokens + example.response_tokens])
        at = slice(len(example.prompt_tokens) - 1, -1)
        p = target.model(tokens).logits[0, at].softmax(-1)
        q = torch.zeros_like(p)
        q[:, draft.vocab] = draft.logits(draft.hidden(tokens)[0, at]).softmax(-1)
        overlaps.append(torch.minimum(p, q).sum(-1))
        matches.append((p.argmax(-1) == q.argmax(-1)).float())
    assert got["expected_alpha"] == pytest.approx(torch.cat(overlaps).mean().item(), abs=1e-5)
    assert got["greedy_match"] == pytest.approx(torch.cat(matches).mean().item(), abs=1e-6)


@pytest.mark.parametrize(
    ("stop_at", "training"),
    [(2, {"accumulate": 2}), (4, {"accumulate": 2}), (9, {"accumulate": 2}), (7, {"lora": LORA})],
)
def test_a_resumed_run_ends_with_the_same_weights(
    world: dict[str, str], tmp_path: Path, stop_at: int, training: dict
) -> None:
    if "lora" in training:
        pytest.importorskip("peft")
    whole = run(settings(world, tmp_path / "whole", training=training))
    config = settings(world, tmp_path / "broken", training=training)
    interrupted(config, stop_at)
    with pytest.raises(InputError, match="--resume"):
        run(config)
    assert untimed(run(config, resume=True)) == untimed(whole)
    assert digest(tmp_path / "broken") == digest(tmp_path / "whole")


def test_a_checkpoint_that_was_being_exchanged_is_found(
    world: dict[str, str], tmp_path: Path
) -> None:
    config = settings(world, tmp_path / "run")
    interrupted(config, 6)
    (tmp_path / "run" / "checkpoints").rename(tmp_path / "run" / "checkpoints.old")
    rows = run(config, resume=True)
    assert [r["step"] for r in rows if "loss" in r] == list(range(1, 13))


def test_an_id_of_the_targets_padding_does_not_stop_the_draft(world: dict[str, str]) -> None:
    distiller = distiller_of(world, signal="live")
    batch = make_batch([Example("a", [5, 6], [7, 8, 9])], 0, torch.device("cpu"))
    expected = distiller.states(batch).hidden
    batch.tokens[0, -1] = 70  # the last token of an answer is read, but predicts nothing
    assert torch.equal(distiller.states(batch).hidden, expected)


def test_a_damaged_checkpoint_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    config = settings(world, tmp_path / "run")
    interrupted(config, 6)
    (tmp_path / "run" / "checkpoints" / "weights.safetensors").write_bytes(b"short")
    with pytest.raises(StorageError, match="checkpoint"):
        run(config, resume=True)


def test_foreign_data_is_refused(world: dict[str, str], tmp_path: Path, tiny: Tiny) -> None:
    save_draft(tiny(77, layers=4), tmp_path / "other")

    def other(**more: object) -> DistillConfig:
        return settings(world | {"target": str(tmp_path / "other")}, tmp_path / "run", **more)

    with pytest.raises(InputError, match="another model"):
        run(other())
    for policy in ("target", {"name": "mixed", "prompts": 4, "max_new_tokens": 4}):
        with pytest.raises(InputError, match=r"holds answers of .*, another model than"):
            run(other(signal="live", policy=policy))
    run(other(signal="live", policy={"name": "fresh_target", "prompts": 4, "max_new_tokens": 4}))


def test_a_writer_smaller_than_the_draft_is_told(world: dict[str, str], tmp_path: Path) -> None:
    data, (target, _) = tmp_path / "data", pair_of(world)
    save_draft(make_draft(target, [0]), tmp_path / "small")
    small = models.load(str(tmp_path / "small"), dtype="float32")
    generate(target, ask(12), data, max_new_tokens=4, writer=small)
    config = settings({**world, "data": str(data)}, tmp_path / "run", heldout=2)
    words = f"written by {small.name}, which is smaller than the draft"
    assert reported(config)[0].endswith(words)


@pytest.mark.parametrize("name", ["draft", "data"])
def test_a_run_is_not_gone_on_with_from_something_else(
    world: dict[str, str], tmp_path: Path, tiny_folder: Path, name: str
) -> None:
    """The paths are those of the first run, and what they hold is not."""
    places = {**world, name: str(tmp_path / name)}
    shutil.copytree(world[name], places[name])
    config = settings(places, tmp_path / "run", signal="live")
    interrupted(config, 6)
    shutil.rmtree(places[name])
    target = models.load(str(tiny_folder), dtype="float32")
    if name == "draft":
        save_draft(make_draft(target, [0, 2], torch.arange(0, 64, 2)), Path(places[name]))
    else:
        generate(target, ask(40), Path(places[name]), max_new_tokens=12, samplings=[Sampling(0.5)])
    with pytest.raises(InputError, match=f"a run with another {name}: .*was changed since"):
        run(config, resume=True)


def test_the_order_of_the_answers_is_nothing_to_a_run(
    world: dict[str, str], tmp_path: Path
) -> None:
    """An interrupted `generate` leaves them in another order than one that was not."""
    run(settings(world, tmp_path / "one"))
    backwards = mock.Mock(side_effect=lambda *read: read_given(*read)[::-1])
    with mock.patch("specdistill.training.answers.read_given", backwards):
        run(settings(world, tmp_path / "other"))
    backwards.assert_called_once()
    assert digest(tmp_path / "one") == digest(tmp_path / "other")


def test_the_held_out_answers_are_of_all_tasks() -> None:
    """A folder has its answers a task at a time."""
    tasks = [Example(f"{t}-{i}", [ord(t), i], [6], t) for t in "abcd" for i in range(30)]
    heldout, training = split(tasks, 32)
    assert Counter(e.category for e in heldout).keys() == set("abcd")
    assert max(Counter(e.category for e in heldout).values()) < 16
    assert {e.id for e in heldout} | {e.id for e in training} == {e.id for e in tasks}
    assert split(tasks[::-1], 32) == (heldout, training)


def test_answers_to_equal_prompts_are_on_one_side() -> None:
    """What is measured was not trained on, however often the prompts name a question."""
    asked = [Example(f"p{i}", [7 + i % 9, 5], [i]) for i in range(90)]
    heldout, training = split(asked, 12)
    assert len(heldout) == 20, "two prompts, ten answers each"
    assert not {e.prompt_tokens[0] for e in heldout} & {e.prompt_tokens[0] for e in training}
    assert split(asked[::-1], 12) == (heldout, training)
    distinct = [Example(f"p{i}", [7 + i], [i]) for i in range(90)]
    by_lot = sorted(distinct, key=lambda e: sha256(e.id.encode()).digest())
    assert split(distinct, 12) == (by_lot[:12], by_lot[12:]), "as ever where none are equal"
    assert [len(part) for part in split(asked[:20], 12)] == [13, 7], "nine prompts"
    few = [Example(f"p{i}", [7 + i % 4, 5], [i]) for i in range(40)]
    assert [len(part) for part in split(few, 32)] == [30, 10], "fewer, where more are all"
    for number, heldout in ((1, 2), (2, 3)):
        same = [Example(f"p{i}", [7 + i % number], [i]) for i in range(40)]
        assert [len(part) for part in split(same, heldout)] == [heldout, 40 - heldout], "cut"


def test_prompts_that_are_cut_are_told(world: dict[str, str], tmp_path: Path) -> None:
    target, _ = pair_of(world)
    alike = [replace(p, messages=ask(1)[0].messages) for p in ask(12)]
    generate(target, alike, tmp_path / "data", max_new_tokens=6, samplings=[Sampling(1.0)])
    config = settings({**world, "data": str(tmp_path / "data")}, tmp_path / "run", heldout=4)
    words = "8 answers to train on, 4 held out, some of a prompt that is trained on, too"
    assert reported(config)[0] == words


def test_the_decoding_in_between_is_of_distinct_prompts(
    world: dict[str, str], tmp_path: Path
) -> None:
    examples = [Example(f"p{i}", [7 + i // 5, 5], [9]) for i in range(20)]
    config = settings(world, tmp_path, decode={"prompts": 3, "max_new_tokens": 4})
    with mock.patch.object(SpeculativeDecoder, "run", autospec=True) as run_:
        run_.side_effect = RuntimeError
        with pytest.raises(RuntimeError):
            decoded(*pair_of(world), examples, config)
    assert [r.tokens for r in run_.call_args.args[1]] == [[7, 5], [8, 5], [9, 5]]


def test_hints_on_inner_layers_need_a_live_target(world: dict[str, str], tmp_path: Path) -> None:
    config = settings(world, tmp_path / "run", hints={})
    with pytest.raises(InputError, match=r"layers \[2, 4\].*'states': the last alone, 4; .*live"):
        run(config)
    for more in ({"hints": {"layers": {2: 4}}}, {"hints": {}, "signal": "live"}):
        rows = run(settings(world, tmp_path / f"{len(more)}", **more, training={"max_steps": 2}))
        assert rows[-1]["step"] == 2


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"seed": 5}, "with seed: 0, and now it is 5"),
        ({"training": {"learning_rate": 1e-3}}, "training.learning_rate: 0.005, .* 0.001"),
        ({"loss": {"fkl": 0.5, "ce": 0.5}}, "with loss.ce: None, and now it is 0.5"),
        ({"hints": {"layers": {2: 4}}}, "with hints"),
    ],
)
def test_a_run_is_resumed_with_its_own_configuration(
    world: dict[str, str], tmp_path: Path, changes: dict, message: str
) -> None:
    interrupted(settings(world, tmp_path / "run"), 5)
    with pytest.raises(InputError, match=message):
        run(settings(world, tmp_path / "run", **changes), resume=True)
    (tmp_path / "run").rename(tmp_path / "moved")
    assert run(settings(world, tmp_path / "moved"), resume=True)[-1]["step"] == 12


def test_a_checkpoint_knows_its_configuration(world: dict[str, str], tmp_path: Path) -> None:
    """Where the file that tells it is gone, too."""
    interrupted(settings(world, tmp_path / "run"), 5)
    (tmp_path / "run" / "config.yaml").unlink()
    with pytest.raises(InputError, match=r"another configuration, and .*config\.yaml.* is missing"):
        run(settings(world, tmp_path / "run", loss="rkl"), resume=True)
    assert run(settings(world, tmp_path / "run"), resume=True)[-1]["step"] == 12


def test_a_later_version_with_more_keys_resumes(world: dict[str, str], tmp_path: Path) -> None:
    """Its hash of the same configuration is another, and config.yaml says that nothing differs."""
    interrupted(settings(world, tmp_path / "run"), 5)
    with mock.patch("specdistill.training.run.config_sha256", return_value="of a later version"):
        assert run(settings(world, tmp_path / "run"), resume=True)[-1]["step"] == 12


def test_a_draft_names_the_run_that_made_it(world: dict[str, str], tmp_path: Path) -> None:
    config = settings(world, tmp_path / "run")
    last = run(config)[-1]
    made = models.load(str(tmp_path / "run/draft"), dtype="float32")
    made_by, step = config_sha256(config), last["kept_step"]
    template = {"target_vocab_size": 64, "chat_template_kwargs": [{}]}
    assert origin(made) == {"config_sha256": made_by, "step": step, **template}
    assert made_by in (tmp_path / "run/config.yaml").read_text()
    other = settings(world, tmp_path / "elsewhere", device="cpu")
    assert config_sha256(other) == made_by, "where it runs does not count"
    assert config_sha256(settings(world, tmp_path, seed=1)) != made_by
    target, draft = pair_of(world)
    assert origin(draft) is None
    whole = make_draft(target, [0, 1])
    set_origin(whole, made_by, step)
    assert origin(make_draft(whole, [0])) is None, "no run has trained this one"


def test_the_temperature_enters_the_loss(world: dict[str, str]) -> None:
    """One step at T = 2 is the step of the loss at 2, not at 1."""
    losses = {}
    for temperature in (1.0, 2.0):
        distiller, batch = distiller_of(world, temperature=temperature), answers_of(world, 4)
        target, draft = distiller.target, distiller.draft
        p = target.logits(batch.signal.hidden)[:, draft.vocab] / temperature
        q = draft.logits(draft.hidden(batch.tokens, attention_mask=batch.mask)[batch.response])
        whole = (target.logits(batch.signal.hidden) / temperature).softmax(-1)
        mass = whole[:, draft.vocab].sum(-1)
        inner = (p.softmax(-1) * (p.log_softmax(-1) - (q / temperature).log_softmax(-1))).sum(-1)
        expected = temperature**2 * (mass * inner).mean()
        losses[temperature] = distiller.step([batch], 0.0).loss
        assert losses[temperature] == pytest.approx(expected.item(), rel=1e-4)
    assert losses[1.0] != pytest.approx(losses[2.0], rel=0.05)


def test_labels_the_draft_lacks_are_counted(world: dict[str, str]) -> None:
    distiller = distiller_of(world, loss="ce", signal="live")
    draft = distiller.draft
    batch = make_batch([Example("a", [5, 6], [7, 8, 9, 11])], 0, draft.device)
    metrics = distiller.step([batch], 0.0)
    assert metrics.missing == 3, "the draft has the even tokens"
    q = draft.logits(draft.hidden(batch.tokens)[batch.response]).log_softmax(-1)
    assert metrics.loss == pytest.approx(-q[1, 4].item() / 4, rel=1e-5)


def test_dropout_stays_off(tiny: Tiny) -> None:
    target = tiny(layers=2)
    draft = make_draft(target, [0, 1])
    draft.model.config.attention_dropout = 0.5
    for layer in draft.model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    config = settings({"target": "t", "draft": "d", "data": "x"}, Path("x"), signal="live")
    distiller = Distiller(target, draft, config)
    batch = make_batch([Example("a", [5, 6], [7, 8, 9])], 0, draft.device)
    assert distiller.step([batch], 0.0).loss == pytest.approx(0, abs=1e-6)  # the target itself


@pytest.mark.parametrize("size", [60, 64, 70])
def test_embeddings_padded_to_other_sizes(tiny: Tiny, size: int) -> None:
    """A family pads its members' vocabularies differently: rows the other lacks take no part."""
    target, draft = tiny(vocab=64), tiny(1, vocab=size)
    config = settings({"target": "t", "draft": "d", "data": "x"}, Path("x"), signal="live")
    distiller = Distiller(target, draft, config)
    batch = make_batch([Example("a", [5, 6], [7, 8, 9])], 0, draft.device)
    shared = min(size, 64)
    p = target.model(batch.tokens).logits[0, 1:-1].softmax(-1)[:, :shared]
    q = draft.model(batch.tokens).logits[0, 1:-1, :shared].log_softmax(-1)
    mass = p.sum(-1, keepdim=True)
    expected = (p * ((p / mass).log() - q)).sum(-1).mean().item()
    assert distiller.step([batch], 0.0).loss == pytest.approx(expected, rel=1e-5)


def test_batches_hold_every_example_once_and_bound_their_tokens() -> None:
    examples = [Example(str(i), [1] * (3 + i % 17), [2] * (1 + i % 5)) for i in range(50)]
    seen = []
    for epoch in range(2):
        groups = length_buckets(examples, 60, seed=3, epoch=epoch)
        assert sorted(e.id for g in groups for e in g) == sorted(e.id for e in examples)
        for group in groups:
            longest = max(len(e.prompt_tokens) + len(e.response_tokens) for e in group)
            assert len(group) == 1 or len(group) * longest <= 60
        seen.append([[e.id for e in g] for g in groups])
        assert groups == length_buckets(examples, 60, seed=3, epoch=epoch)
    assert seen[0] != seen[1]


def test_skipping_updates_goes_on_where_they_ended() -> None:
    examples = [Example(str(i), [1] * 5, [2] * 3) for i in range(20)]
    stream = updates(examples, 24, 2, seed=0)
    first = [next(stream) for _ in range(12)]
    later = updates(examples, 24, 2, seed=0, skip=7)
    assert [next(later) for _ in range(5)] == first[7:]


def test_the_rate_warms_up_and_decays(world: dict[str, str]) -> None:
    config = settings(world, Path("unused"), training={"warmup": 0.1, "learning_rate": 1.0})
    rates = [rate(x / 100, config) for x in range(101)]
    assert rates[0] == pytest.approx(0.01)
    assert max(rates) == pytest.approx(1.0)
    assert rates.index(max(rates)) == 10
    assert rates[55] == pytest.approx(0.5)
    assert rates[-1] == pytest.approx(0.02)
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("hints", [None, {"layers": {1: 2}}])
def test_activation_checkpointing_changes_no_bit(
    world: dict[str, str], monkeypatch: pytest.MonkeyPatch, hints: dict | None
) -> None:
    """The same weights after a step, and every layer run twice: again in the backward pass."""
    passes, weights = [], []
    for on in (False, True):
        training, count = {"activation_checkpointing": on}, []
        distiller = distiller_of(world, signal="live", hints=hints, training=training)
        draft = distiller.draft
        for layer in draft.model.model.layers:
            layer.input_layernorm.register_forward_hook(lambda *_, count=count: count.append(1))
        examples = read_examples(Path(world["data"]), signal=False)[:5]
        distiller.step([make_batch(examples, 0, draft.device)], 1e-3)
        passes.append(len(count))
        weights.append([p.detach().clone() for p in draft.model.parameters()])
        assert not any("forward" in vars(layer) for layer in draft.model.model.layers)
    assert passes == [2, 4]
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_lora_trains_its_factors_alone_and_leaves_an_ordinary_draft(
    world: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    config = settings(world, tmp_path / "run", training={"max_steps": 60, "lora": LORA})
    (target, draft), (_, before) = pair_of(world), pair_of(world)
    names = before.model.state_dict().keys()
    train(config, target, draft)
    metrics = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    rows = [json.loads(line) for line in metrics]
    assert rows[-1]["expected_alpha"] > rows[0]["expected_alpha"] + 0.005

    saved = models.load(str(tmp_path / "run" / "draft"), dtype="float32")
    assert saved.model.state_dict().keys() == names
    for name, value in saved.model.state_dict().items():
        difference = value - before.model.state_dict()[name]
        linear = value.ndim == 2 and "embed" not in name and "lm_head" not in name
        assert (
            (torch.linalg.matrix_rank(difference, rtol=1e-4) == 4)
            if linear
            else not (difference.any())
        ), name

    for one in (draft, saved):  # what was measured with the factors is there without them
        distiller = Distiller(target, one, settings(world, tmp_path / "again"))
        heldout, _ = split(read_examples(Path(world["data"]), signal=True), config.heldout)
        again = Evaluation(distiller, heldout, config).measure()
        for name in ("expected_alpha", "block_efficiency"):
            assert again[name] == pytest.approx(rows[-1][name], abs=1e-4)


def test_a_draft_that_decoded_before_is_adapted_whole(world: dict[str, str]) -> None:
    """Its lean body was made of the layers as they were without the factors."""
    pytest.importorskip("peft")
    draft, _ = pair_of(world)
    assert draft.body is not None
    adapt(draft, Lora(**LORA), seed=0)
    for name, value in draft.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(value)
    request = Request("a", [5, 6, 7], 12)
    (output,) = SpeculativeDecoder(draft).run([request]).outputs
    tokens = list(request.tokens)
    for token in output.tokens:
        with torch.no_grad():
            logits = draft.logits(draft.hidden(torch.tensor([tokens])))[0, -1]
        assert token == logits.argmax()
        tokens.append(token)


def test_lora_without_peft_or_beside_what_it_leaves_alone(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InputError, match="leave train_embeddings out"):
        settings(world, tmp_path / "run", training={"lora": LORA, "train_embeddings": True})
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r'pip install "specdistill\[lora\]"'):
        run(settings(world, tmp_path / "run", training={"lora": LORA}))


@pytest.mark.parametrize(
    ("settings_", "named"),
    [
        ({"max_steps": 12}, "update 2 gave loss = nan, grad_norm = nan"),
        ({"max_steps": 1}, "update 1 gave expected_alpha = nan"),  # what the last one left behind
    ],
)
def test_a_run_that_diverges_stops_and_leaves_no_draft(
    world: dict[str, str], tmp_path: Path, settings_: dict[str, int], named: str
) -> None:
    training = {**settings_, "learning_rate": 1e30, "warmup": 0.0}
    with pytest.raises(TrainingError, match=f"{named}.*below 1e\\+30"):
        run(settings(world, tmp_path / "run", training=training))
    assert not (tmp_path / "run/draft").exists()
    assert "NaN" not in (tmp_path / "run/metrics.jsonl").read_text()


def test_a_draft_that_diverges_between_its_samples_is_named(
    world: dict[str, str], tmp_path: Path
) -> None:
    policy = {"name": "draft", "refresh_every": 1, "prompts": 4, "max_new_tokens": 4}
    training = {"learning_rate": 1e30, "warmup": 0.0}
    config = settings(world, tmp_path / "run", training=training, policy=policy)
    with pytest.raises(TrainingError, match=r"cannot sample after update 1: .*below 1e\+30"):
        run(config)


def test_a_draft_that_is_broken_from_the_start_is_named(
    world: dict[str, str], tmp_path: Path
) -> None:
    """At load; and before any update where it was broken since."""
    config = settings(world, tmp_path / "run", decode=None)
    target, draft = pair_of(world)
    with torch.no_grad():
        for weight in draft.model.parameters():
            weight *= torch.nan
    with pytest.raises(TrainingError, match="expected_alpha = nan before any update"):
        train(config, target, draft)
    save_draft(draft, tmp_path / "draft")
    config = settings({**world, "draft": str(tmp_path / "draft")}, tmp_path / "run", decode=None)
    with pytest.raises(ModelError, match="draft has weights that are NaN or infinite"):
        run(config)


def test_the_trackers_get_the_metrics(world: dict[str, str], tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    rows = run(settings(world, tmp_path / "run", trackers=["tensorboard"]))
    events = EventAccumulator(str(tmp_path / "run" / "trackers" / "distill"))
    events.Reload()
    for name in ("loss", "expected_alpha", "block_efficiency"):
        logged = {e.step: e.value for e in events.Scalars(name)}
        expected = {r["step"]: r[name] for r in rows if name in r and "kept_step" not in r}
        assert logged == pytest.approx(expected)


def test_a_tracker_that_is_not_installed_is_named(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="trackers: clearml cannot be imported"):
        run(settings(world, tmp_path / "run", trackers=["clearml"]))
    assert not (tmp_path / "run").exists()


# What belongs to the caller


@pytest.mark.parametrize("kind", ["float32", "bfloat16", "packed"])
def test_a_draft_in_hand_stays_as_it_was(
    world: dict[str, str], tmp_path: Path, kind: Literal["float32", "bfloat16", "packed"]
) -> None:
    """A copy is trained, in float32 whatever the draft is in."""
    dtype = "bfloat16" if kind == "bfloat16" else "float32"
    target = models.load(world["target"], dtype="float32")
    draft = models.load(world["draft"], dtype=dtype)
    if kind == "packed":
        pack(draft, 8)
    tokens = torch.tensor([[5, 9, 7]])
    modules = [type(module) for module in draft.model.modules()]
    before = draft.logits(draft.hidden(tokens)).clone()
    weights = {name: value.clone() for name, value in draft.model.state_dict().items()}
    more = {"hints": {"layers": {2: 4}}, "signal": "live", "heldout": 8, "max_steps": 3}
    trained = distill(target, draft, world["data"], tmp_path / "run", **more)
    assert torch.equal(draft.logits(draft.hidden(tokens)), before)
    assert [type(module) for module in draft.model.modules()] == modules
    for name, value in draft.model.state_dict().items():
        assert value.dtype == weights[name].dtype
        assert torch.equal(value, weights[name])
    assert not any(p.requires_grad for p in draft.model.parameters())
    assert not torch.equal(trained.logits(trained.hidden(tokens)), before)
    assert (trained.dtype, trained.path) == (draft.dtype, tmp_path / "run" / "draft")
    assert models.stored_dtype(str(tmp_path / "run" / "draft")) == "float32"
    saved = models.load(str(trained.path), dtype=dtype)
    for ours, theirs in zip(trained.model.parameters(), saved.model.parameters(), strict=True):
        assert torch.equal(ours, theirs)
        assert not ours.requires_grad


def test_keywords_are_the_configuration_of_a_file(world: dict[str, str], tmp_path: Path) -> None:
    """With models given by their names or themselves: one run, to the bit."""
    config = settings(world, tmp_path / "file", loss="jsd", decode=None, dtype="float32")
    run(config)
    options = config.training.model_dump(exclude_unset=True) | {"heldout": 8}
    options |= {"loss": "jsd", "decode": None, "evaluate_every": 5, "checkpoint_every": 4}
    names = [world["target"], Path(world["draft"])]
    loaded = pair_of(world)
    for folder, pair, more in (("a", names, {"dtype": "float32"}), ("b", loaded, {})):
        draft = distill(*pair, world["data"], tmp_path / folder, **options, **more)
        assert digest(tmp_path / folder) == digest(tmp_path / "file")
        assert draft.path == tmp_path / folder / "draft"
        with pytest.raises(InputError, match="already holds a run"):
            distill(*pair, world["data"], tmp_path / folder, **options, **more)
    assert config_sha256(load_config(tmp_path / "a" / "config.yaml")) == config_sha256(config)
    with pytest.raises(InputError, match="dtype would say how models are loaded, and both are g"):
        distill(*loaded, world["data"], tmp_path / "c", **options, dtype="float32")


def test_a_draft_made_here_is_trained_before_it_is_saved(
    world: dict[str, str], tmp_path: Path
) -> None:
    target, _ = pair_of(world)
    store = Store(Path(world["data"]), read_manifest(Path(world["data"])))
    options = {"heldout": 8, "max_steps": 2, "decode": None}
    draft = distill(target, make_draft(target, [0]), store, tmp_path / "run", **options)
    assert draft.num_layers == 1
    again = distill(
        target, make_draft(target, [0]), store, tmp_path / "run", resume=True, **options
    )
    assert again.sha256() == draft.sha256()


def test_a_draft_that_cannot_be_trained_is_refused(world: dict[str, str], tmp_path: Path) -> None:
    target, packed = pair_of(world)
    for dtype in ("bfloat16", "float16"):
        half = models.load(world["draft"], dtype=dtype)
        with pytest.raises(InputError, match=rf"weights in torch.{dtype}.* dtype='float32'"):
            Distiller(target, half, settings(world, tmp_path / "run"))
    pack(packed, 8)
    with pytest.raises(InputError, match=r"is packed for decoding.* load it again"):
        train(settings(world, tmp_path / "run"), target, packed)
    assert not (tmp_path / "run" / "draft").exists()


def test_a_run_draws_nothing_from_the_programs_own_generator(
    world: dict[str, str], tmp_path: Path
) -> None:
    pytest.importorskip("peft")
    states = torch.get_rng_state(), random.getstate()
    target, draft = pair_of(world)
    training = {"max_steps": 2, "lora": LORA}
    more = {"hints": {"layers": {2: 4}}, "signal": "live"}
    train(settings(world, tmp_path / "run", training=training, **more), target, draft)
    make_draft(target, [0], random_seed=3)
    assert torch.equal(torch.get_rng_state(), states[0])
    assert random.getstate() == states[1]
