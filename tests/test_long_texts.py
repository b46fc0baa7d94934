"""Texts in rows and in windows: the loss and gradient of plain passes, and what they hold."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from conftest import tiny_model
from small_runs import run, settings
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from specdistill import models
from specdistill.data.signal import read_states
from specdistill.data.token_store import Example
from specdistill.decoding import ModelDrafter, Sampling, SpeculativeDecoder
from specdistill.drafts.making import make_draft
from specdistill.errors import InputError
from specdistill.models import LanguageModel
from specdistill.scoring.acceptance import acceptance_chances
from specdistill.training.attention import block_mask, boolean_mask
from specdistill.training.batches import make_batch, packed_rows
from specdistill.training.distiller import Distiller
from specdistill.training.evaluation import Evaluation
from specdistill.training.parallel import depths_of
from specdistill.training.passes import positions_in, same_text, states_of
from specdistill.training.reward import Sample
from specdistill.training.windows import spans

CPU = torch.device("cpu")


def text(name: str, prompt: int, response: int, seed: int = 0) -> Example:
    drawn = torch.Generator().manual_seed(seed + prompt * 100 + response)
    tokens = torch.randint(5, 64, (prompt + response,), generator=drawn).tolist()
    return Example(name, tokens[:prompt], tokens[prompt:])


def learnt(
    pair: tuple[LanguageModel, LanguageModel],
    examples: list[list[Example]],
    *,
    packed: bool = False,
    passes: int = 1,
    **more: Any,
) -> tuple[float, dict[str, Tensor], int]:
    """Loss and gradients of one batch after another, and the passes they took: of each at least
    `passes`.
    """
    world = {"target": "t", "data": "a", "draft": "d"}
    distiller = Distiller(*pair, settings(world, Path("x"), signal="live", **more))
    total, taken = 0.0, 0
    for group in examples:
        depths = depths_of(distiller.config.parallel, "a key")
        batch = distiller.weighted(make_batch(group, 0, CPU, depths, packed=packed))
        for part in distiller.pieces(batch, passes):
            assert len(group) > 1 or part.shape[1] <= distiller.config.training.batch_tokens
            loss, debt = distiller.loss(part)
            (loss if debt is None else loss + debt).backward()
            total, taken = total + loss.item(), taken + 1
    grads = {n: torch.zeros(()) if p.grad is None else p.grad for n, p in distiller.trained.items()}
    return total, grads, taken


def doubles(**config: object) -> tuple[LanguageModel, LanguageModel]:
    """The same pair whenever it is asked for."""
    target = tiny_model(layers=4, dtype=torch.float64, **config)
    return target, make_draft(target, [0, 2], torch.arange(0, 64, 2))


def of_family(
    family: str, how: str = "sdpa", **config: object
) -> tuple[LanguageModel, LanguageModel]:
    from transformers import AutoConfig, AutoModelForCausalLM

    base = tiny_model()
    made = []
    for seed, layers in enumerate((4, 2)):
        torch.manual_seed(seed)
        kinds = ["sliding_attention", "full_attention"] * (layers // 2)
        chosen = AutoConfig.for_model(
            family,
            vocab_size=64,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=layers,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            **{k: kinds if v == "kinds" else v for k, v in config.items()},
        )
        model = (
            AutoModelForCausalLM.from_config(chosen, attn_implementation=how)
            .double()
            .eval()
            .requires_grad_(False)
        )
        made.append(LanguageModel(family, Path(), model, base.tokenizer))
    return made[0], made[1]


def agree(one: dict[str, Tensor], other: dict[str, Tensor], tolerance: float = 1e-9) -> None:
    assert one.keys() == other.keys()
    for name, grad in one.items():
        assert torch.allclose(grad, other[name], rtol=1e-7, atol=tolerance), name
    assert any(grad.abs().max() > 1e-3 for grad in one.values())


LOSSES: dict[str, dict[str, Any]] = {
    "fkl": {},
    "every kind": {"loss": {"ce": 0.2, "rkl": 0.3, "tvd": 0.5, "jsd": 0.4}, "beta": 0.3},
    "e2e_tv": {"loss": "e2e_tv", "num_draft_tokens": 3},
    "hints": {"hints": {"layers": {1: 2, 2: 4}, "weight": 0.5}},
    "checkpointing": {"training": {"activation_checkpointing": True}},
    "embeddings": {"training": {"train_embeddings": True}},
    "lora": {"training": {"lora": {"rank": 4, "alpha": 8}}},
}
BLOCKS: dict[str, dict[str, Any]] = {
    name: {"parallel": {"num_draft_tokens": 4, "keep": 0.7, "mask_token": 3} | how, **more}
    for name, how, more in (
        ("masks", {}, {}),
        ("masks weighed alike", {"weighting": "uniform"}, {}),
        ("masks, e2e_tv", {}, {"loss": "e2e_tv"}),
        ("masks, checkpointing", {}, LOSSES["checkpointing"]),
        ("masks, embeddings", {}, LOSSES["embeddings"]),
    )
}


def with_training(more: dict[str, Any], **training: object) -> dict[str, Any]:
    return {**more, "training": {**more.get("training", {}), **training}}


# Windows


@pytest.mark.parametrize("more", [*LOSSES.values(), *BLOCKS.values()], ids=[*LOSSES, *BLOCKS])
@pytest.mark.parametrize("window", [7, 16])
def test_windows_give_the_loss_and_gradient_of_the_whole_text(
    more: dict[str, Any], window: int
) -> None:
    """Their borders fall into the prompt, between prompt and answer, and into the answer."""
    examples = [[text("long", 18, 31)], [text("short", 1, 3)]]
    whole = learnt(doubles(), examples, **with_training(more, batch_tokens=500))
    cut = learnt(doubles(), examples, **with_training(more, batch_tokens=window))
    assert whole[2] == 2
    assert cut[2] > 49 // window
    padded = learnt(doubles(), examples, passes=12, **with_training(more, batch_tokens=window))
    assert padded[2] >= 24
    agree(padded[1], cut[1])
    assert cut[0] == pytest.approx(whole[0], rel=1e-9)
    agree(whole[1], cut[1])


@pytest.mark.parametrize(
    "pair",
    [
        lambda: of_family("mistral", sliding_window=5),
        lambda: of_family("qwen3", layer_types="kinds", use_sliding_window=True, sliding_window=5),
        lambda: of_family("gemma2", "eager", sliding_window=5),
        lambda: doubles(rope_parameters={"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}),
    ],
    ids=["mistral", "qwen3", "gemma2", "yarn"],
)
def test_windows_and_rows_of_other_families(
    pair: Callable[[], tuple[LanguageModel, LanguageModel]],
) -> None:
    examples = [text("long", 18, 31), text("a", 4, 9), text("b", 2, 12)]
    alone = [[example] for example in examples]
    whole = learnt(pair(), alone, training={"batch_tokens": 500})
    tolerance = 1e-5 if pair()[0].config.model_type == "gemma2" else 1e-9  # norms in float32
    agree(whole[1], learnt(pair(), alone, training={"batch_tokens": 8})[1], tolerance)
    packed = learnt(pair(), [examples], packed=True, training={"batch_tokens": 500})
    agree(whole[1], packed[1], tolerance)


def test_a_reward_is_the_same_in_windows() -> None:
    plain = text("s", 6, 20)
    drawn = torch.randn(20, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    sample = Sample(**vars(plain), advantage=0.7, log_probs=(-4 + drawn).tolist())
    more = {
        "policy": {"name": "draft", "refresh_every": 1},
        "reward": {"function": "accepted-length", "weight": 0.5},
    }
    whole = learnt(doubles(), [[sample]], **more, training={"batch_tokens": 500})
    cut = learnt(doubles(), [[sample]], **more, training={"batch_tokens": 8})
    assert cut[0] == pytest.approx(whole[0], rel=1e-6)
    agree(whole[1], cut[1], 1e-6)  # log-probabilities are kept in single precision


def test_no_token_is_learnt_twice_or_lost() -> None:
    for prompt, response, window, block in ((1, 30, 7, 1), (18, 5, 7, 3), (9, 40, 3, 5)):
        batch = make_batch([text("t", prompt, response)], 0, CPU)
        cuts = spans(batch, window, block)
        assert [cut.start for cut in cuts] == [0, *(cut.stop for cut in cuts[:-1])]
        assert cuts[-1].stop == prompt + response
        assert all(cut.stop - cut.start <= max(window, block) for cut in cuts)
        inside = [cut.start - (prompt - 1) for cut in cuts if cut.start >= prompt - 1]
        assert all(start % block == 0 for start in inside)


def test_a_step_in_windows_is_the_step(world: dict[str, str]) -> None:
    """One update of a long and some short texts, through the optimiser."""
    groups = [[text("long", 18, 31)], [text("a", 3, 4), text("b", 2, 6)]]
    ends = []
    for batch_tokens in (500, 20):
        config = settings(world, Path("x"), signal="live", training={"batch_tokens": batch_tokens})
        pair = [models.load(world[name], dtype="float64") for name in ("target", "draft")]
        distiller = Distiller(*pair, config)
        metrics = distiller.step([make_batch(group, 0, CPU) for group in groups], 1e-2)
        ends.append((metrics, distiller.parameters))
    assert ends[0][0].loss == pytest.approx(ends[1][0].loss, rel=1e-9)
    assert ends[0][0].grad_norm == pytest.approx(ends[1][0].grad_norm, rel=1e-9)
    assert ends[0][0].tokens == ends[1][0].tokens
    for name, value in ends[0][1].items():
        assert torch.allclose(value, ends[1][1][name], atol=1e-7), name


@pytest.mark.parametrize("more", [{}, BLOCKS["masks"]], ids=["ordinary", "masks"])
def test_a_long_text_is_measured_in_windows(more: dict[str, Any]) -> None:
    measures = []
    for batch_tokens in (500, 9):
        world = {"target": "t", "data": "a", "draft": "d"}
        how = with_training(more, batch_tokens=batch_tokens)
        config = settings(world, Path("x"), signal="live", decode=None, **how)
        distiller = Distiller(*doubles(), config)
        measures.append(Evaluation(distiller, [text("long", 18, 31)], config).measure())
    whole, cut = measures
    assert whole.keys() == cut.keys()
    for name, value in whole.items():
        assert cut[name] == pytest.approx(value, rel=1e-9), name


# Packed rows


@pytest.mark.parametrize("more", LOSSES.values(), ids=LOSSES)
def test_a_packed_row_gives_the_loss_and_gradient_of_its_texts(more: dict[str, Any]) -> None:
    examples = [text("a", 18, 31), text("b", 1, 7), text("c", 9, 1), text("d", 3, 14)]
    more = with_training(more, batch_tokens=500)
    padded = learnt(doubles(), [examples], **more)
    packed = learnt(doubles(), [examples], packed=True, **more)
    assert packed[0] == pytest.approx(padded[0], rel=1e-9)
    agree(padded[1], packed[1])


def test_no_text_of_a_row_sees_another() -> None:
    """The gradient of one text's states is nothing at every other's tokens."""
    target, _ = doubles()
    examples = [text("a", 4, 5), text("b", 2, 7), text("c", 3, 3)]
    batch = make_batch(examples, 0, CPU, packed=True)
    assert batch.tokens.shape == (1, 24)
    embedding = target.model.get_input_embeddings()
    seen: list[Tensor] = []

    def watch(module: torch.nn.Module, args: object, out: Tensor) -> Tensor:
        seen.append(out.detach().requires_grad_())
        return seen[-1]

    handle = embedding.register_forward_hook(watch)
    states = states_of(target, batch, []).hidden
    handle.remove()
    ends = batch.lengths.cumsum(0).tolist()
    for number, (first, last) in enumerate(zip([0, *ends], ends, strict=False)):
        (grad,) = torch.autograd.grad(states[first:last].sum(), seen[0], retain_graph=True)
        touched = grad[0].abs().sum(-1) > 0
        assert batch.texts is not None
        assert not touched[batch.texts[0] != number].any()
        assert touched[batch.texts[0] == number][:-1].all()  # all but the last, which is only said


def test_positions_begin_anew_with_each_text_and_padding_sees_itself() -> None:
    texts = torch.tensor([[0, 0, 0, 1, 2, 2, -1, -1]])
    assert positions_in(texts).tolist() == [[0, 1, 2, 0, 0, 1, 0, 1]]
    dense = boolean_mask(same_text(texts, None), texts.shape, CPU)[0, 0]
    assert dense.sum(-1).tolist() == [1, 2, 3, 1, 1, 2, 1, 2]
    assert boolean_mask(same_text(texts, 2), texts.shape, CPU)[0, 0].sum(-1).max() == 2
    from torch.nn.attention.flex_attention import create_mask

    for window in (None, 2):
        made = block_mask(same_text(texts, window), texts.shape, CPU)
        same = create_mask(made.mask_mod, 1, None, 8, 8, "cpu")[0, 0]
        assert torch.equal(same, boolean_mask(same_text(texts, window), texts.shape, CPU)[0, 0])


def test_rows_hold_every_text_once_within_their_tokens() -> None:
    examples = [text(str(i), 3 + i % 17, 1 + i % 5) for i in range(80)] + [text("long", 50, 20)]
    orders = []
    for epoch in range(2):
        rows = packed_rows(examples, 60, seed=3, epoch=epoch)
        assert sorted(e.id for row in rows for e in row) == sorted(e.id for e in examples)
        sizes = [sum(len(e.prompt_tokens + e.response_tokens) for e in row) for row in rows]
        assert all(size <= 60 or len(row) == 1 for size, row in zip(sizes, rows, strict=True))
        assert sum(sizes) > 0.9 * 60 * (len(rows) - 1)
        assert rows == packed_rows(examples, 60, seed=3, epoch=epoch)
        orders.append([[e.id for e in row] for row in rows])
    assert orders[0] != orders[1]


def test_a_packed_run_resumes_to_the_bit(world: dict[str, str], tmp_path: Path) -> None:
    for name, stop_at in (("whole", None), ("broken", 7)):
        config = settings(world, tmp_path / name, training={"packing": True})
        if stop_at:
            with pytest.raises(KeyboardInterrupt):
                run(config, stop_at=stop_at)
        rows = run(config, resume=bool(stop_at))
        assert rows[-1]["expected_alpha"] > rows[0]["expected_alpha"]
        assert all(row.get("tokens", 0) >= 0 for row in rows)
    files = [tmp_path / name / "draft" / "model.safetensors" for name in ("whole", "broken")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_a_parallel_draft_is_not_packed(world: dict[str, str], tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"training\.packing does not go with parallel: the masks"):
        settings(world, tmp_path, parallel={}, training={"packing": True})


# FlexAttention


@contextmanager
def by_flex() -> Iterator[list[tuple[int, int]]]:
    """Passes as on a GPU: filled up to whole tiles, of 8 rows here, and by FlexAttention, not
    compiled, with gradients, which PyTorch refuses on a CPU though its reference has them. Yields
    the queries and the keys of each call.
    """
    from torch.nn.attention.flex_attention import BlockMask, flex_attention

    calls: list[tuple[int, int]] = []

    def uncompiled(
        query: Tensor, key: Tensor, value: Tensor, block_mask: BlockMask, **how: Any
    ) -> Tensor:
        calls.append((query.shape[2], key.shape[2]))
        assert block_mask.shape[-2:] == calls[-1]
        how = {name: how[name] for name in ("enable_gqa", "scale")}
        return flex_attention(query, key, value, block_mask=block_mask, **how)

    def filled(rows: int, device: torch.device) -> int:
        return -(-rows // 8) * 8

    with (
        mock.patch("specdistill.training.attention._by_flex", return_value=True),
        mock.patch(
            "transformers.integrations.flex_attention.compile_friendly_flex_attention", uncompiled
        ),
        mock.patch("torch.nn.attention.flex_attention._validate_device"),
        mock.patch("specdistill.training.parallel.whole_tiles", filled),
    ):
        yield calls


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("name", ["masks", "masks, e2e_tv", "masks, checkpointing"])
def test_flex_attention_behind_a_prefix_gives_the_loss_and_gradient(name: str) -> None:
    """Of windows whose rows see those before them, against one pass by the mask of every pair."""
    examples = [[text("long", 18, 31)], [text("short", 1, 3)]]
    whole = learnt(doubles(), examples, **with_training(BLOCKS[name], batch_tokens=500))
    with by_flex() as calls:
        cut = learnt(doubles(), examples, **with_training(BLOCKS[name], batch_tokens=16))
    assert cut[2] > 4
    assert any(queries < keys for queries, keys in calls), "a window behind its prefix"
    assert all(queries % 8 == 0 for queries, _ in calls)
    assert cut[0] == pytest.approx(whole[0], rel=1e-9)
    agree(whole[1], cut[1])


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_flex_attention_over_a_packed_row_gives_the_loss_and_gradient() -> None:
    """Of several texts, in layers that slide and in others, against each text alone."""

    def pair() -> tuple[LanguageModel, LanguageModel]:
        return of_family("qwen3", layer_types="kinds", use_sliding_window=True, sliding_window=5)

    examples = [text("long", 18, 31), text("a", 4, 9), text("b", 2, 12)]
    alone = learnt(pair(), [[e] for e in examples], training={"batch_tokens": 500})
    with by_flex() as calls:
        packed = learnt(pair(), [examples], packed=True, training={"batch_tokens": 500})
    assert calls
    agree(alone[1], packed[1])


# Memory

VOCABULARY = 1024
LENGTHS = [4096, pytest.param(16_384, marks=pytest.mark.slow)]


class Largest(TorchDispatchMode):
    """The most values of any tensor that is made within it."""

    values = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        for made in tree_leaves(out):
            if isinstance(made, Tensor):
                self.values = max(self.values, made.numel())
        return out


def long_pair() -> tuple[LanguageModel, LanguageModel]:
    target = tiny_model(vocab=VOCABULARY, layers=2, max_position_embeddings=32_768)
    return target, make_draft(target, [0], None)


@pytest.mark.parametrize(
    ("length", "masks"),
    [(4096, {}), (2048, BLOCKS["masks"]), pytest.param(16_384, {}, marks=pytest.mark.slow)],
    ids=["ordinary", "parallel", "ordinary, 16k"],
)
def test_a_long_text_is_learnt_within_a_windows_memory(length: int, masks: dict[str, Any]) -> None:
    """Trained with a live target and measured: neither a value for each two tokens, nor one for
    each token and each of the vocabulary.
    """
    target, draft = long_pair()
    training = {"batch_tokens": 512, "chunk": 128}
    world = {"target": "t", "data": "a", "draft": "d"}
    config = settings(world, Path("x"), signal="live", decode=None, training=training, **masks)
    depths = depths_of(config.parallel, "a key")
    distiller = Distiller(target, draft, config)
    example = text("long", 64, length - 64)
    with Largest() as largest:
        distiller.step([make_batch([example], 0, CPU, depths)], 1e-3)
        Evaluation(distiller, [example], config).measure()
    most = 512 * (length + 512)  # a window's rows by those of the text and its masks
    assert 0 < largest.values <= most < length * VOCABULARY < length * length
    with Largest() as largest:
        read_states(target, example.prompt_tokens, example.response_tokens)
    assert 0 < largest.values < length * VOCABULARY


@pytest.mark.parametrize("length", LENGTHS)
def test_a_long_prompt_is_scored_within_a_passes_memory(length: int) -> None:
    target, draft = long_pair()
    prompt = text("long", length, 1).prompt_tokens
    decoder = SpeculativeDecoder(target, ModelDrafter(draft, VOCABULARY), num_draft_tokens=3)
    with Largest() as largest:
        (output,) = decoder.generate(
            [prompt], max_new_tokens=6, sampling=Sampling(1.0), seed=1
        ).outputs
        chances = acceptance_chances(target, draft, prompt, output, 1.0)
    assert len(chances) == sum(r.tested for r in output.rounds)
    # The mask of 512 queries, repeated for the two heads that share keys.
    assert 0 < largest.values <= 2 * 512 * (length + 64)
