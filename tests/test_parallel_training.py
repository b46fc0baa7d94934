"""Parallel drafts: the flat, masked pass against the layout that is served, block by block."""

from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import tiny_model
from hypothesis import given
from hypothesis import settings as limits
from hypothesis import strategies as st
from safetensors.torch import load_file
from small_runs import ask, make_world, never_writes, padded_target, run, settings
from torch import Tensor

from specdistill import models
from specdistill.config import Parallel, load_config
from specdistill.data.generation import generate
from specdistill.data.signal import States, TopK
from specdistill.data.token_store import Example, read_examples
from specdistill.decoding import Sampling
from specdistill.drafts.export import export
from specdistill.drafts.making import save_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel, origin, trained_draft_tokens
from specdistill.training import parallel
from specdistill.training.attention import block_mask, boolean_mask
from specdistill.training.batches import Batch, make_batch
from specdistill.training.distiller import Distiller, StepMetrics
from specdistill.training.evaluation import Evaluation
from specdistill.training.parallel import (
    Blocks,
    block_rule,
    dropped,
    lay_out,
    pass_rows,
    refuse_mask,
    undropped,
)
from specdistill.training.policies import standalone
from specdistill_kernels import divergence

BLOCK = Parallel(num_draft_tokens=4, keep=0.7, least=0.3)
MASK = 64  # the first row that pads the target's embedding


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A target of 64 tokens and 8 rows of padding, 40 of its answers, and a draft of 32 tokens."""
    folder = tmp_path_factory.mktemp("parallel")
    return make_world(folder, padded_target(folder / "target"))


def double(world: dict[str, str], **more: Any) -> tuple[Distiller, LanguageModel]:
    """A distiller in float64 with a live signal, and a twin of its draft to compute the same by
    hand.
    """
    more = {"parallel": BLOCK.model_dump(), "decode": None, "signal": "live"} | more
    config = settings(world, Path("unused"), **more)
    target = models.load(config.target, dtype="float64")
    draft, twin = (models.load(config.draft, dtype="float64") for _ in range(2))
    distiller = Distiller(target, draft, config)
    parallel.begin(twin, target, BLOCK)
    twin.model.requires_grad_(True)
    return distiller, twin


def examples_of(world: dict[str, str], num: int = 5) -> list[Example]:
    """Answers without their signal, one of a single token among them."""
    first, *others = read_examples(Path(world["data"]), signal=False)[:num]
    return [replace(first, response_tokens=first.response_tokens[:1]), *others]


def served(twin: LanguageModel, example: Example, depths: Tensor) -> Iterator[tuple[int, Tensor]]:
    """As vLLM asks a parallel draft: for each visible prefix a pass over it and the masks, at
    consecutive positions. Of each block the answer position it begins at, and its final states.
    """
    text = example.prompt_tokens + example.response_tokens
    for i, depth in enumerate(depths.tolist()):
        prefix = text[: len(example.prompt_tokens) + i]
        tokens = torch.tensor([prefix + [MASK] * depth])
        yield i, twin.hidden(tokens)[0, len(prefix) - 1 :]


def close(ours: Tensor, theirs: Tensor) -> bool:
    """But for rounding: a Llama's norms are taken in float32 whatever its dtype."""
    return bool((ours - theirs).norm() <= 1e-6 * theirs.norm())


def by_hand(
    distiller: Distiller, twin: LanguageModel, examples: list[Example], depths: parallel.Depths
) -> tuple[Tensor, float]:
    """The weighted sum of the losses, row by row from the served layout, and the weights' sum."""
    config, target = distiller.config, distiller.target
    assert config.parallel is not None
    assert target is not None
    total, weights = torch.zeros((), dtype=torch.float64), 0.0
    for example in examples:
        tokens = torch.tensor([example.prompt_tokens + example.response_tokens])
        start = len(example.prompt_tokens) - 1
        p = target.model(tokens).logits[0, start:-1].softmax(-1)
        labels = torch.tensor(example.response_tokens)
        for i, states in served(twin, example, depths(example)):
            weight = 1.0
            for b, logits in enumerate(twin.logits(states)):
                n = i + b
                row = {"labels": labels[n, None], "draft_vocab": distiller.draft_vocab}
                loss = divergence(logits[None], p[n, None].log(), loss=dict(config.loss), **row)
                total = total + weight * loss.sum()
                weights += weight
                if config.parallel.weighting == "cat":
                    weight *= p[n, labels[n]].item()
    return total, weights


DEPTHS = {"all": partial(undropped, BLOCK), "dropped": partial(dropped, BLOCK, "a key")}


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
@pytest.mark.parametrize("weighting", ["cat", "uniform"])
@pytest.mark.parametrize("embeddings", ["frozen", "trained"])
def test_a_step_is_that_of_the_served_layout(
    world: dict[str, str], depths: parallel.Depths, weighting: str, embeddings: str
) -> None:
    """Loss and every gradient, the mask's own included, of two micro-batches in one update."""
    settings_ = BLOCK.model_dump() | {"weighting": weighting}
    how = {"clip_norm": 1e9, "chunk": 7, "train_embeddings": embeddings == "trained"}
    distiller, twin = double(world, parallel=settings_, training=how)
    examples = examples_of(world)
    total, weights = by_hand(distiller, twin, examples, depths)
    (total / weights).backward()
    expected = {n: p.grad for n, p in twin.model.named_parameters() if p.grad is not None}
    rows = expected["model.embed_tokens.weight"]
    if embeddings == "frozen":
        del expected["model.embed_tokens.weight"]
        expected["mask.row.weight"] = rows[MASK, None]

    grads: dict[str, Tensor] = {}
    step = distiller.optimizer.step

    def note() -> None:
        grads.update({n: p.grad.clone() for n, p in distiller.trained.items()})
        step()

    distiller.optimizer.step = note
    groups = [examples[:3], examples[3:]]
    metrics = distiller.step([make_batch(g, 0, twin.device, depths) for g in groups], 1e-3)
    assert metrics.loss == pytest.approx((total / weights).item(), rel=1e-9)
    assert metrics.response_tokens == sum(len(e.response_tokens) for e in examples)
    assert grads.keys() == expected.keys()
    for name, grad in grads.items():
        assert close(grad, expected[name]), name
    assert rows[MASK].abs().sum() > 0


@pytest.mark.parametrize("depths", DEPTHS.values(), ids=DEPTHS)
def test_e2e_tv_is_over_the_places_of_a_block(
    world: dict[str, str], depths: parallel.Depths
) -> None:
    """Of each block its length less Σ_b Π α, with α from the served layout."""
    distiller, twin = double(world, loss="e2e_tv", parallel={"num_draft_tokens": 4})
    examples = examples_of(world)
    target = distiller.target
    assert target is not None
    total, rows = torch.zeros((), dtype=torch.float64), 0
    for example in examples:
        tokens = torch.tensor([example.prompt_tokens + example.response_tokens])
        p = target.model(tokens).logits[0, len(example.prompt_tokens) - 1 :].softmax(-1)
        for i, states in served(twin, example, depths(example)):
            q = torch.zeros(len(states), 72, dtype=torch.float64)
            q = q.index_add(1, twin.vocab, twin.logits(states).softmax(-1))
            alpha = torch.minimum(p[i : i + len(q)], q).sum(-1)
            total = total + len(q) - alpha.cumprod(0).sum()
            rows += len(q)
    expected = torch.autograd.grad(total, [*twin.model.model.layers.parameters()])
    batch = make_batch(examples, 0, twin.device, depths)
    assert distiller.weighted(batch) is batch, "the loss itself weighs them"
    assert distiller.counts(batch)[0] == rows
    loss = distiller.loss_of(replace(batch, signal=distiller.signal(batch)))
    assert loss.item() == pytest.approx(total.item(), rel=1e-9)
    got = torch.autograd.grad(loss, [*distiller.draft.model.model.layers.parameters()])
    for ours, plain in zip(got, expected, strict=True):
        assert close(ours, plain)


@pytest.mark.parametrize("signal", ["states", "top-k"])
def test_a_weight_is_the_product_of_the_targets_probabilities_of_the_hidden_tokens(
    world: dict[str, str], signal: str
) -> None:
    distiller, _ = double(world, signal="kept")
    target = distiller.target
    assert target is not None
    examples = read_examples(Path(world["data"]), signal=True)[:3]
    shares = []
    for e in examples:
        assert isinstance(e.signal, States)
        p = target.logits(e.signal.hidden.double()).softmax(-1)
        top = p.topk(20)
        if signal == "top-k":
            tail = 1 - top.values.sum(-1)
            e.signal = TopK(top.indices, top.values.log(), tail.log())
            even = (tail / (72 - 20))[:, None].expand_as(p)
            p = even.scatter(-1, top.indices, top.values)
        shares.append(p[torch.arange(len(p)), torch.tensor(e.response_tokens)])
    batch = distiller.weighted(make_batch(examples, 0, target.device, DEPTHS["dropped"]))
    assert batch.weights is not None
    expected = []
    for e, p in zip(examples, shares, strict=True):
        for i, depth in enumerate(DEPTHS["dropped"](e).tolist()):
            expected += [p[i : i + b].prod().item() for b in range(depth + 1)]
    assert batch.weights.tolist() == pytest.approx(expected, rel=1e-5)


# What a training gets wrong in silence: each of these must move the loss.


def seen_by_later_text(q_b: Tensor, q_n: Tensor, k_b: Tensor, k_n: Tensor) -> Tensor:
    return parallel_sees(q_b, q_n, k_b, k_n) | ((q_b == 0) & (k_b >= 1) & (k_n < q_n))


def seeing_one_token_more(q_b: Tensor, q_n: Tensor, k_b: Tensor, k_n: Tensor) -> Tensor:
    return parallel_sees(q_b, q_n, k_b, k_n) | ((k_b == 0) & (k_n == q_n - q_b + 1))


def seeing_no_other_mask(q_b: Tensor, q_n: Tensor, k_b: Tensor, k_n: Tensor) -> Tensor:
    return parallel_sees(q_b, q_n, k_b, k_n) & ((k_b == 0) | (k_b == q_b))


parallel_sees = parallel.sees


def shifted(what: str, by: int) -> Any:
    """The layout with one part of each mask's row changed."""

    def lay_out_wrong(*arguments: Any) -> Blocks:
        blocks = lay_out(*arguments)
        values = getattr(blocks, what)
        masked = (
            blocks.places > 0 if what == "positions" else blocks.places.flatten()[blocks.rows] > 0
        )
        most = len(blocks.lengths) - 1
        moved = values + by if what == "positions" else (values + by).clamp(0, most)
        return replace(blocks, **{what: torch.where(masked, moved, values)})

    return lay_out_wrong


BUGS = {
    "masks seen by later text": ("parallel.sees", seen_by_later_text),
    "a hidden token seen": ("parallel.sees", seeing_one_token_more),
    "masks do not see each other": ("parallel.sees", seeing_no_other_mask),
    "positions off by one": ("batches.lay_out", shifted("positions", 1)),
    "teacher of the place before": ("batches.lay_out", shifted("answer", -1)),
    "teacher of the next place": ("batches.lay_out", shifted("answer", 1)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_a_planted_bug_moves_the_loss(world: dict[str, str], bug: str) -> None:
    distiller, twin = double(world)
    examples = examples_of(world)
    total, _ = by_hand(distiller, twin, examples, DEPTHS["all"])
    where, wrong = BUGS[bug]

    def loss() -> float:
        batch = distiller.weighted(make_batch(examples, 0, twin.device, DEPTHS["all"]))
        return distiller.loss_of(batch).item()

    assert loss() == pytest.approx(total.item(), rel=1e-9)
    with mock.patch(f"specdistill.training.{where}", wrong):
        assert abs(loss() / total.item() - 1) > 1e-6


# Which rows are trained


answers = st.builds(
    lambda prompt, response, name: Example(name, [7] * prompt, [9] * response),
    st.integers(1, 9),
    st.integers(1, 40),
    st.sampled_from(["a", "b", "c", "d"]),
)
blocks_of = st.builds(
    Parallel,
    num_draft_tokens=st.integers(2, 9),
    keep=st.floats(0.05, 1),
    least=st.floats(0, 1),
)


@given(answers, blocks_of, st.integers(0, 99))
@limits(deadline=None, max_examples=60)
def test_the_drop_keeps_its_share_of_each_place(
    example: Example, settings_: Parallel, step: int
) -> None:
    num = len(example.response_tokens)
    depths = dropped(settings_, f"0-{step}", example)
    assert torch.equal(depths, dropped(settings_, f"0-{step}", example)), "the same each time"
    whole = undropped(settings_, example)
    assert whole.tolist() == [min(settings_.num_draft_tokens, num - i) - 1 for i in range(num)]
    assert (depths >= 0).all()
    assert (depths <= whole).all()
    for place in range(1, settings_.num_draft_tokens):
        share = max(settings_.keep**place, settings_.least)
        most = sum(rank < share * num for rank in range(num))
        having = int((depths >= place).sum())
        ended = int((whole < place).sum())  # blocks that the answer's end cuts off
        assert most - ended <= having <= most
    rows = len(example.prompt_tokens) + num + int(depths.sum())
    assert rows <= pass_rows(settings_, example)
    if settings_.keep == 1:
        assert torch.equal(depths, whole)


def test_the_lot_is_another_in_each_update_and_for_each_answer() -> None:
    examples = [Example(name, [5], [9] * 40) for name in "ab"]
    lots = {tuple(dropped(BLOCK, f"0-{step}", e).tolist()) for e in examples for step in range(4)}
    assert len(lots) == 8


@given(st.lists(answers, min_size=1, max_size=4), blocks_of)
@limits(deadline=None, max_examples=40)
def test_every_row_has_its_teacher_its_masks_and_its_prompt(
    examples: list[Example], settings_: Parallel
) -> None:
    examples = [replace(e, id=str(i)) for i, e in enumerate(examples)]
    longest = max(len(e.prompt_tokens) + len(e.response_tokens) for e in examples)
    depths = partial(dropped, settings_, "key")
    blocks = lay_out(examples, longest, depths, torch.device("cpu"))
    width = blocks.places.shape[1]
    places, positions = blocks.places.flatten(), blocks.positions.flatten()
    number = 0
    answered = 0
    for i, example in enumerate(examples):
        start = len(example.prompt_tokens) - 1
        own = {
            (int(b), int(n))
            for b, n in zip(blocks.places[i, longest:], blocks.positions[i, longest:], strict=True)
        }
        for first, depth in enumerate(depths(example).tolist()):
            for b in range(depth + 1):
                row, n = int(blocks.rows[number]), start + first + b
                assert row // width == i
                assert (int(places[row]), int(positions[row])) == (b, n)
                assert n - b >= start, "the visible prefix holds the prompt"
                assert int(blocks.answer[number]) == answered + first + b
                assert all((before, n - b + before) in own for before in range(1, b))
                number += 1
        answered += len(example.response_tokens)
    assert number == len(blocks.rows) == int(blocks.lengths.sum())
    first = blocks.starts()
    assert (places[blocks.rows] == 0).tolist() == first.tolist()


def test_the_end_of_an_answer_is_learnt_at_every_place() -> None:
    """EOS is a token like any other, also behind masks."""
    example = Example("a", [5, 6], [9, 9, 9, 9, 9, 0])
    batch = make_batch([example], 0, torch.device("cpu"), DEPTHS["all"])
    assert batch.blocks is not None
    ends = batch.labels[batch.blocks.answer] == 0
    places = batch.blocks.places.flatten()[batch.blocks.rows]
    assert places[ends].tolist() == [3, 2, 1, 0]


# Masks


@pytest.mark.parametrize("window", [None, 3])
def test_both_masks_are_what_serving_sees(window: int | None) -> None:
    examples = [Example("a", [5, 6], [9] * 5), Example("b", [5], [9] * 9)]
    blocks = lay_out(examples, 10, DEPTHS["all"], torch.device("cpu"))
    rule, device = block_rule(blocks, 0, window), torch.device("cpu")
    dense = boolean_mask(rule, blocks.places.shape, device)
    assert dense.dtype == torch.bool
    num, rows = blocks.places.shape
    assert dense.shape == (num, 1, rows, rows)
    from torch.nn.attention.flex_attention import create_mask

    made = block_mask(rule, blocks.places.shape, device)
    same = create_mask(made.mask_mod, num, None, rows, rows, "cpu")
    assert torch.equal(same, dense)
    assert dense.any(-1).all(), "a row that sees nothing gives NaN"
    for i, (row, b, n) in enumerate(
        (r, int(blocks.places[i, r]), int(blocks.positions[i, r]))
        for i in range(num)
        for r in range(rows)
    ):
        example = i // rows
        if b > 3:
            continue  # padding
        seen = dense[example, 0, row].nonzero()[:, 0]
        got = sorted(
            (int(blocks.positions[example, s]), int(blocks.places[example, s])) for s in seen
        )
        wanted = [(t, 0) for t in range(n - b + 1)] + [(n - b + s, s) for s in range(1, b + 1)]
        assert got == [pair for pair in wanted if window is None or n - pair[0] < window]


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_a_pass_by_flex_attention_gives_the_same_states(world: dict[str, str]) -> None:
    """Uncompiled, as a compiled one wants a GPU: that a draft's layers take the block mask."""
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    distiller, _ = double(world)
    draft, masks = distiller.draft, []
    batch = make_batch(examples_of(world), 0, draft.device, DEPTHS["dropped"])
    assert batch.blocks is not None

    def plain(q: Tensor, k: Tensor, v: Tensor, block_mask: BlockMask, **how: Any) -> Tensor:
        masks.append(block_mask)
        how = {name: how[name] for name in ("enable_gqa", "scale")}
        return flex_attention(q, k, v, block_mask=block_mask, **how)

    compiled = "transformers.integrations.flex_attention.compile_friendly_flex_attention"
    with torch.no_grad(), mock.patch(compiled, plain):
        expected = parallel.states_of_blocks(draft, batch.tokens, batch.blocks)
        assert not masks
        with mock.patch("specdistill.training.attention._by_flex", return_value=True):
            states = parallel.states_of_blocks(draft, batch.tokens, batch.blocks)
    assert len(masks) == draft.num_layers
    assert all(isinstance(mask, BlockMask) for mask in masks)
    assert torch.allclose(states, expected, atol=1e-9)
    assert draft.config._attn_implementation == "sdpa", "as before"


def test_layers_that_slide_get_a_mask_of_their_own(world: dict[str, str]) -> None:
    """By the family's dictionary of kinds; the pass is that of the served layout again."""
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=72,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        initializer_range=0.3,
        use_sliding_window=True,
        sliding_window=4,
        max_window_layers=1,
        pad_token_id=None,
    )
    assert config.layer_types == ["full_attention", "sliding_attention"]
    model = Qwen3ForCausalLM(config).double().eval().requires_grad_(False)
    draft = LanguageModel("slides", Path(), model, tiny_model().tokenizer)
    models.set_parallel(draft, MASK, 4)
    examples = examples_of(world)
    batch = make_batch(examples, 0, draft.device, DEPTHS["dropped"])
    assert batch.blocks is not None
    states = parallel.states_of_blocks(draft, batch.tokens, batch.blocks)
    plain = [s for e in examples for _, s in served(draft, e, DEPTHS["dropped"](e))]
    assert torch.allclose(states, torch.cat(plain), atol=1e-12)


# The mask token and its embedding


def test_the_mask_begins_as_the_mean_and_stays_where_it_was_trained(tiny: Any) -> None:
    target, draft = tiny(vocab=72), tiny(1, vocab=72)
    mean = draft.model.get_input_embeddings().weight.mean(0).clone()
    parallel.begin(draft, target, BLOCK)
    row = draft.model.get_input_embeddings().weight[MASK]
    assert draft.mask_token == MASK
    assert torch.equal(row, mean)
    with torch.no_grad():
        row.fill_(7)
    parallel.begin(draft, target, BLOCK)
    assert (draft.model.get_input_embeddings().weight[MASK] == 7).all(), "trained before"
    parallel.begin(draft, target, BLOCK.model_copy(update={"mask_token": 70}))
    assert draft.mask_token == 70


@pytest.mark.parametrize(
    ("mask", "says"),
    [(0, "the padding token"), (72, "has the ids 0 to 71"), (71, None)],
)
def test_a_mask_that_cannot_be_trained_is_refused(tiny: Any, mask: int, says: str | None) -> None:
    settings_ = BLOCK.model_copy(update={"mask_token": mask})
    if says is None:
        parallel.begin(tiny(1, vocab=72), tiny(vocab=72), settings_)
        return
    with pytest.raises(InputError, match=rf"parallel.mask_token is {mask}.*{says}"):
        parallel.begin(tiny(1, vocab=72), tiny(vocab=72), settings_)


def test_a_draft_without_pytorchs_attention_is_refused(tiny: Any) -> None:
    draft = tiny(1, vocab=72)
    draft.model.set_attn_implementation("eager")
    with pytest.raises(InputError, match="computes attention in the way 'eager'"):
        parallel.begin(draft, tiny(vocab=72), BLOCK)


def test_a_text_that_holds_the_mask_is_refused_by_its_id(tiny: Any) -> None:
    draft = tiny(vocab=72)
    models.set_parallel(draft, 9, 4)
    refuse_mask([Example("good", [5, 6], [7])], draft, "data")
    for prompt, response in (([5, 9], [7]), ([5], [7, 9])):
        with pytest.raises(InputError, match=r"data: the answer 'bad' holds the token 9 \('w9'\)"):
            refuse_mask([Example("bad", prompt, response)], draft, "data")


def test_the_draft_never_writes_the_mask_by_itself(tiny: Any) -> None:
    draft = tiny(vocab=72)
    models.set_parallel(draft, MASK, 4)
    alone = standalone(draft, tiny(vocab=72))
    logits = alone.logits(alone.hidden(torch.tensor([[5, 6]])))
    assert (logits[..., MASK] == -torch.inf).all()
    assert logits[..., :MASK].isfinite().all()


# Runs


def settled(world: dict[str, str], folder: Path, **more: Any) -> Any:
    block = {"num_draft_tokens": 3, "keep": 0.5, "least": 0.1}
    return settings(world, folder, **{"parallel": block, **more})


def test_a_parallel_draft_that_is_to_stop_early_is_refused_before_any_update(
    world: dict[str, str], tmp_path: Path
) -> None:
    draft = models.load(world["draft"], dtype="float32")
    models.set_parallel(draft, MASK, 3)
    save_draft(draft, tmp_path / "draft")
    more = {"draft": str(tmp_path / "draft"), "decode": {"least_reach": 0.2}, "parallel": None}
    with pytest.raises(InputError, match=r"least_reach 0\.2 .* drafts in parallel"):
        run(settings(world | more, tmp_path / "run", **more))
    assert not (tmp_path / "run" / "metrics.jsonl").exists()


def test_half_of_a_run_may_be_an_ordinary_drafts(
    world: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The masks begin with the second half. Before, a step is one of an ordinary draft, and its
    batches leave no room for masks.
    """
    stepped: list[list[Batch]] = []

    def step(distiller: Distiller, batches: list[Batch], learning_rate: float) -> StepMetrics:
        stepped.append(batches)
        return plain_step(distiller, batches, learning_rate)

    plain_step = Distiller.step
    monkeypatch.setattr(Distiller, "step", step)
    block = BLOCK.model_copy(update={"ordinary": 0.5}).model_dump()
    half = {"parallel": block, "decode": None, "evaluate_every": 99}
    rows = run(settled(world, tmp_path / "run", **half))
    assert len(stepped) == 12
    assert all(batch.blocks is None for update in stepped[:6] for batch in update)
    assert all(batch.blocks is not None for update in stepped[6:] for batch in update)

    with pytest.raises(KeyboardInterrupt):
        run(settled(world, tmp_path / "broken", **half), stop_at=9)
    assert strip(run(settled(world, tmp_path / "broken", **half), resume=True)) == strip(rows)

    ordinary = {**half, "parallel": None}
    plain = run(settled(world, tmp_path / "plain", **ordinary, training={"max_steps": 6}))
    tokens = [[row["response_tokens"] for row in r if "loss" in row][:6] for r in (rows, plain)]
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("kind", ["frozen", "trained", "lora", "tied", "draft"])
def test_a_run_resumes_to_the_bit(world: dict[str, str], tmp_path: Path, kind: str) -> None:
    """After a break between evaluation and checkpoint, with all that is random drawn again."""
    more: dict[str, Any] = {"training": {"max_steps": 7}, "evaluate_every": 3}
    more |= {"decode": {"prompts": 2, "max_new_tokens": 6}}
    if kind == "trained":
        more["training"] |= {"train_embeddings": True}
    if kind == "lora":
        pytest.importorskip("peft")
        more["training"] |= {"lora": {"rank": 2, "alpha": 4}}
    if kind in ("tied", "lora"):
        tied = tiny_model(3, vocab=72, tie_word_embeddings=True)
        world = world | {"draft": str(tmp_path / "tied")}
        save_draft(tied, tmp_path / "tied")
    if kind == "draft":
        policy = {"name": "draft", "refresh_every": 3, "prompts": 6, "max_new_tokens": 8}
        more |= {"policy": policy, "signal": "live"}
    before = models.load(world["draft"], dtype="float32").model.get_input_embeddings().weight
    rows = run(settled(world, tmp_path / "whole", **more))
    with pytest.raises(KeyboardInterrupt):
        run(settled(world, tmp_path / "broken", **more), stop_at=5)
    assert strip(run(settled(world, tmp_path / "broken", **more), resume=True)) == strip(rows)
    whole, broken = (
        load_file(tmp_path / name / "draft/model.safetensors") for name in ("whole", "broken")
    )
    assert whole.keys() == broken.keys()
    assert all(torch.equal(whole[name], broken[name]) for name in whole)
    draft = models.load(str(tmp_path / "whole/draft"), dtype="float32")
    assert (draft.mask_token, trained_draft_tokens(draft)) == (MASK, 3)
    assert origin(draft)["step"] == rows[-1]["kept_step"]  # type: ignore[index]
    moved = (draft.model.get_input_embeddings().weight != before).any(-1).nonzero()[:, 0].tolist()
    assert MASK in moved
    assert (moved == [MASK]) == (kind in ("frozen", "lora", "draft"))
    if rows[-1]["kept_step"]:
        mean = before.mean(0)
        assert not torch.equal(draft.model.get_input_embeddings().weight[MASK], mean)


def strip(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in r.items() if k not in ("seconds", "tokens_per_second")} for r in rows]


def test_metrics_are_by_place_and_the_best_weights_those_of_the_blocks(
    world: dict[str, str], tmp_path: Path
) -> None:
    """Without a decode by what a block is expected to give; the places against plain ones."""
    config = settled(world, tmp_path / "run", decode=None, training={"max_steps": 6})
    rows = [r for r in run(config) if "expected_alpha" in r]
    best = max(rows[:-1], key=lambda r: (r["expected_block_efficiency"], r["step"]))
    assert rows[-1]["kept_step"] == best["step"]
    for row in rows:
        for name in ("expected_alpha", "greedy_match"):
            assert len(row[f"{name}_by_place"]) == 3
            assert row[f"{name}_by_place"][0] == row[name]
        assert 1 < row["expected_block_efficiency"] < 4
    distiller, twin = double(world, decode=None, signal="kept")
    examples = read_examples(Path(world["data"]), signal=True)[:4]
    row = Evaluation(distiller, examples, distiller.config).measure()
    alphas: list[list[float]] = [[], [], [], []]
    lengths = []
    target = distiller.target
    assert target is not None
    for e in examples:
        tokens = torch.tensor([e.prompt_tokens + e.response_tokens])
        p = target.model(tokens).logits[0, len(e.prompt_tokens) - 1 :].softmax(-1)
        for i, states in served(twin, e, undropped(BLOCK, e)):
            q = torch.zeros(len(states), 72, dtype=torch.float64)
            q = q.index_add(1, twin.vocab, twin.logits(states).softmax(-1))
            alpha = torch.minimum(p[i : i + len(q)], q).sum(-1)
            lengths.append(1 + alpha.cumprod(0).sum().item())
            for place, value in enumerate(alpha.tolist()):
                alphas[place].append(value)
    expected = [sum(place) / len(place) for place in alphas]
    assert row["expected_alpha_by_place"] == pytest.approx(expected, rel=1e-5)
    assert row["expected_block_efficiency"] == pytest.approx(sum(lengths) / len(lengths), rel=1e-5)


def test_the_mask_that_is_kept_is_that_of_the_best_evaluation(
    world: dict[str, str], tmp_path: Path
) -> None:
    """Here the first one, before any update: the mean."""
    config = settled(world, tmp_path / "run", decode=None, training={"max_steps": 3})
    falling = [{"expected_block_efficiency": float(value)} for value in range(9, 0, -1)]
    with mock.patch.object(Evaluation, "measure", side_effect=falling):
        assert run(config)[-1]["kept_step"] == 0
    before = models.load(world["draft"], dtype="float32").model.get_input_embeddings().weight
    kept = models.load(str(tmp_path / "run/draft"), dtype="float32")
    assert torch.equal(kept.model.get_input_embeddings().weight[MASK], before.mean(0))


def test_a_short_training_raises_every_place(world: dict[str, str], tmp_path: Path) -> None:
    training_ = {"max_steps": 40, "batch_tokens": 600, "learning_rate": 1e-2}
    rows = run(settled(world, tmp_path / "run", evaluate_every=40, training=training_))
    first, last = rows[0], rows[-2]
    pairs = zip(first["expected_alpha_by_place"], last["expected_alpha_by_place"], strict=True)
    assert all(before + 0.02 < after for before, after in pairs)
    assert last["block_efficiency"] > first["block_efficiency"]
    assert first["num_draft_tokens"] == 3, "the decode proposes the block that is trained"


def test_samples_with_the_mask_are_refused(world: dict[str, str], tmp_path: Path) -> None:
    policy = {"name": "fresh_target", "refresh_every": 3, "prompts": 4, "max_new_tokens": 4}
    config = settled(world, tmp_path / "run", policy=policy, signal="live", decode=None)
    sample = [Example("sampled", [5], [MASK])]
    with (
        mock.patch("specdistill.training.run.examples_at", return_value=sample),
        pytest.raises(InputError, match="the answer 'sampled' holds the token 64"),
    ):
        run(config)


def test_a_pass_takes_no_more_rows_than_it_may(world: dict[str, str]) -> None:
    """batch_tokens counts masks, too."""
    from specdistill.training.batches import length_buckets

    examples = read_examples(Path(world["data"]), signal=False)
    for group in length_buckets(examples, 150, 0, 0, BLOCK):
        batch = make_batch(group, 0, torch.device("cpu"), DEPTHS["dropped"])
        assert batch.blocks is not None
        assert len(group) == 1 or batch.blocks.places.numel() <= 150
    assert max(map(len, length_buckets(examples, 150, 0, 0, BLOCK))) > 1


EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_the_examples_train_models_of_their_shapes(family: str, tmp_path: Path) -> None:
    """As they are but for sizes and folders: a target with a head of its own, a draft that ties its
    head to its embedding, and unused tokens as these families have them. The export stands.
    """
    from transformers import AddedToken, AutoModelForCausalLM

    folders = {name: tmp_path / name for name in ("target", "draft", "data", "run")}
    for name, layers in (("target", 4), ("draft", 2)):
        model = never_writes(tiny_model(layers, layers=layers, vocab=72), 64)
        if family == "qwen3":
            model = qwen3(layers)
        else:
            reserved = [f"<|reserved_special_token_{i}|>" for i in range(8)]
            model.tokenizer.add_tokens([AddedToken(text, special=True) for text in reserved])
        if name == "draft":
            model.model.config.tie_word_embeddings = True
            model.model.tie_weights()
            model = LanguageModel(model.name, model.path, model.model, model.tokenizer)
            assert model.head.weight is model.model.get_input_embeddings().weight
        save_draft(model, folders[name])
    target = models.load(str(folders["target"]), dtype="float32")
    generate(target, ask(12), folders["data"], max_new_tokens=8, samplings=[Sampling(1.0)])
    changes = {**{k: str(v) for k, v in folders.items() if k != "run"}, "heldout": 4}
    changes |= {"run_dir": str(folders["run"]), "training.max_steps": 2}
    changes |= {"training.batch_tokens": 300, "training.accumulate": 1}
    changes |= {"decode": "{prompts: 2, max_new_tokens: 8, num_draft_tokens: 8}"}
    config = load_config(
        EXAMPLES / f"{family}_parallel.yaml", [f"{k}={v}" for k, v in changes.items()]
    )
    last = run(config)[-1]
    assert last["num_draft_tokens"] == 8
    draft = models.load(str(folders["run"] / "draft"), dtype="float32")
    mask = 64 if family == "qwen3" else 71
    assert (draft.mask_token, trained_draft_tokens(draft)) == (mask, 8)
    export(str(folders["run"] / "draft"), tmp_path / "out", "vllm")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert stock.config.pard_token == mask
    assert stock.get_input_embeddings().weight.shape[0] == 72
    read = torch.equal(
        stock.get_input_embeddings().weight[mask], draft.model.get_input_embeddings().weight[mask]
    )
    assert read, "the mask is read as it was trained"


def qwen3(layers: int) -> LanguageModel:
    from transformers import Qwen3Config, Qwen3ForCausalLM

    torch.manual_seed(layers)
    config = Qwen3Config(
        vocab_size=72,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
        initializer_range=0.3,
        eos_token_id=0,
        pad_token_id=0,
    )
    model = Qwen3ForCausalLM(config).eval().requires_grad_(False)
    model.generation_config.eos_token_id = 0
    named = LanguageModel("qwen3", Path(), model, tiny_model().tokenizer)
    return never_writes(named, 64)
