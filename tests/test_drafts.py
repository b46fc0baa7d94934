"""Draft birth: which layers, which tokens, and checkpoints that load again."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import random_model
from dispatch import Draws
from safetensors.torch import load_file, save_file
from small_runs import ask
from transformers import AutoModelForCausalLM

from specdistill import models
from specdistill.data.generation import generate
from specdistill.data.token_store import Store, read_examples, read_manifest
from specdistill.drafts.making import (
    at_full_vocabulary,
    listed_layers,
    make_draft,
    parse_layers,
    save_draft,
)
from specdistill.drafts.vocabulary import (
    choose_vocabulary,
    count_tokens,
    expected_usage,
    vocabulary_from,
)
from specdistill.errors import InputError, ModelError, StorageError
from specdistill.models import LanguageModel
from specdistill.models.checkpoint_files import VOCAB_FILE
from specdistill.models.head_only import load_head

Tiny = Callable[..., LanguageModel]


def test_the_listed_layers_are_kept_in_order(tiny: Tiny) -> None:
    target = tiny(0, layers=5)
    draft = make_draft(target, [0, 3, 4])
    for new, old in enumerate([0, 3, 4]):
        ours = draft.model.model.layers[new].state_dict()
        theirs = target.model.model.layers[old].state_dict()
        assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert torch.equal(draft.head.weight, target.head.weight)
    assert draft.head.weight.data_ptr() != target.head.weight.data_ptr()
    same = make_draft(target, [0, 1, 2, 3, 4])
    tokens = torch.randint(5, 60, (2, 9))
    assert not any(p.requires_grad for p in same.model.parameters())  # or nothing packs it
    assert torch.equal(same.logits(same.hidden(tokens)), target.logits(target.hidden(tokens)))


@pytest.mark.parametrize("trimmed", [False, True])
def test_a_draft_from_scratch_has_the_shape_and_nothing_of_the_weights(
    tiny: Tiny, tmp_path: Path, trimmed: bool
) -> None:
    target, ids = tiny(0, layers=4), torch.arange(0, 64, 2) if trimmed else None
    taken = make_draft(target, [0, 2], ids)
    first, again, other = (make_draft(target, [0, 2], ids, random_seed=s) for s in (1, 1, 2))
    weights = [draft.model.state_dict() for draft in (taken, first, again, other)]
    for name, value in weights[0].items():
        assert [w[name].shape for w in weights] == [value.shape] * 4
        assert torch.equal(weights[1][name], weights[2][name])
        if "norm" not in name:
            assert not torch.isclose(weights[1][name], value).all(-1)[1:].any(), name
            assert not torch.isclose(weights[1][name], weights[3][name]).all(-1)[1:].any(), name
    save_draft(first, tmp_path / "scratch")
    assert models.load(str(tmp_path / "scratch")).vocab_size == (32 if trimmed else 64)


def test_settings_by_layer_are_cut_with_the_layers() -> None:
    window = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    target = random_model("qwen2", num_hidden_layers=4, **window)
    kinds = target.config.layer_types
    assert len(set(kinds)) == 2
    draft = make_draft(target, [1, 2])
    assert draft.config.layer_types == [kinds[1], kinds[2]]
    draft.hidden(torch.randint(64, (1, 9)))


def test_an_untrimmed_draft_loads_with_transformers(tiny: Tiny, tmp_path: Path) -> None:
    target = tiny(1, layers=4, tie_word_embeddings=True)
    draft = make_draft(target, [0, 2])
    save_draft(draft, tmp_path / "d")
    tokens = torch.randint(5, 60, (2, 9))
    expected = draft.logits(draft.hidden(tokens))
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "d")
    assert torch.equal(stock(tokens).logits, expected)
    ours = models.load(str(tmp_path / "d"), dtype="float32")
    assert torch.equal(ours.logits(ours.hidden(tokens)), expected)
    assert ours.vocab is None


def test_a_trimmed_draft_loads_again_and_widens(tiny: Tiny, tmp_path: Path) -> None:
    target = tiny(2, layers=4, tie_word_embeddings=True)
    ids = torch.tensor([0, 1, 5, 8, 13, 21, 34, 55])
    draft = make_draft(target, [0, 1], ids)
    save_draft(draft, tmp_path / "d")
    again = models.load(str(tmp_path / "d"), dtype="float32")
    assert again.vocab.tolist() == ids.tolist()
    assert again.vocab_size == 8
    assert again.full_vocab_size == 64
    assert load_file(tmp_path / "d" / "model.safetensors")["lm_head.weight"].shape == (8, 32)
    tokens = torch.randint(5, 60, (2, 9))
    logits = again.logits(again.hidden(tokens))
    assert torch.equal(logits, draft.logits(draft.hidden(tokens)))
    half = make_draft(target, [0, 1])
    assert torch.allclose(logits, half.logits(half.hidden(tokens))[..., ids], atol=1e-6)

    widened = at_full_vocabulary(again)
    assert not any(p.requires_grad for p in widened.model.parameters()), "or nothing packs it"
    save_draft(widened, tmp_path / "wide")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    wide = stock(tokens).logits
    assert wide.shape[-1] == 64
    assert torch.allclose(wide[..., ids], logits, atol=1e-6)
    others = [i for i in range(64) if i not in ids.tolist()]
    assert (wide[..., others] == 0).all(), "these random states share no direction"
    with pytest.raises(ModelError, match="not a target"):
        models.check_pair(again, target)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_widened_draft_never_gets_to_the_tokens_it_lacks(tiny: Tiny, dtype: torch.dtype) -> None:
    target = tiny(2, layers=2, dtype=dtype)
    with torch.no_grad():  # what real models have and random ones lack: a common direction
        target.model.get_input_embeddings().weight.add_(torch.linspace(-2, 2, 32).to(dtype))
    ids = torch.arange(0, 64, 3)
    wide = at_full_vocabulary(make_draft(target, [0, 1], ids))
    others = torch.ones(64, dtype=torch.bool).index_fill(0, ids, False)
    tokens = torch.randint(64, (8, 40), generator=torch.Generator().manual_seed(4))
    logits = wide.logits(wide.hidden(tokens))
    assert logits[..., others].max() < -30
    assert logits.softmax(-1)[..., others].sum(-1).max() < 1e-9
    assert logits[..., others].mean().item() == pytest.approx(-100, rel=0.2)


def test_the_head_of_a_widened_draft_says_it_by_its_bias_where_it_has_one() -> None:
    ids = torch.arange(0, 64, 3)
    draft = make_draft(random_model("phi", tie_word_embeddings=False), [0, 1], ids)
    tokens = torch.randint(64, (2, 9))
    logits = at_full_vocabulary(draft).logits(at_full_vocabulary(draft).hidden(tokens))
    assert torch.allclose(logits[..., ids], draft.logits(draft.hidden(tokens)), atol=1e-6)
    others = torch.ones(64, dtype=torch.bool).index_fill(0, ids, False)
    assert (logits[..., others].detach() == -100).all()


def test_the_most_used_tokens_and_all_special_ones_are_kept(tiny: Tiny) -> None:
    target = tiny(3)
    texts = [[10] * 5 + [11] * 4 + [12] * 3, [13] * 2 + [14]]
    usage = count_tokens(target, texts)
    found = choose_vocabulary(target, usage, 8)
    assert found.ids.tolist() == [0, 1, 2, 3, 4, 10, 11, 12]
    assert found.coverage == pytest.approx(12 / 15)
    roomy = choose_vocabulary(target, usage, 20)
    assert len(roomy.ids.unique()) == 20
    assert roomy.coverage == 1
    assert choose_vocabulary(target, usage, 64).ids.tolist() == list(range(64))
    for size in (0, 65, 3):
        with pytest.raises(InputError, match="vocabulary size"):
            choose_vocabulary(target, usage, size)
    with pytest.raises(InputError, match="empty"):
        choose_vocabulary(target, count_tokens(target, [[]]), 8)


def test_layers_are_parsed() -> None:
    assert listed_layers(parse_layers("2"), 4) == [0, 1]
    assert listed_layers(parse_layers("0,3"), 4) == [0, 3]
    for text in ("3,", "9", "99999999999999", "-1,2", "1,1", "x", "0"):
        with pytest.raises(InputError, match="layers must be"):
            listed_layers(parse_layers(text), 4)


def test_a_vocabulary_is_ranked_by_the_targets_probability_where_states_are_kept(
    tiny: Tiny, tmp_path: Path
) -> None:
    target = tiny(3)
    for name, signal in (("states", "states"), ("none", "none"), ("top-k", "top-k:5")):
        generate(target, ask(12), tmp_path / name, max_new_tokens=6, signal=signal)
    examples = read_examples(tmp_path / "states", signal=True)
    usage = expected_usage(target, torch.cat([e.signal.hidden for e in examples]))
    by_states = choose_vocabulary(target, usage, 20)
    texts = [e.response_tokens for e in examples]
    by_counts = choose_vocabulary(target, count_tokens(target, texts), 20)
    assert not torch.equal(by_states.ids, by_counts.ids)
    for source, expected, unit in (
        (tmp_path / "states", by_states, "the target's probability"),
        (Store(tmp_path / "states", read_manifest(tmp_path / "states")), by_states, "the target's"),
        (str(tmp_path / "none"), by_counts, "tokens"),
        (str(tmp_path / "top-k"), by_counts, "tokens"),
        (texts, by_counts, "tokens"),
    ):
        chosen = vocabulary_from(target, 20, source)
        assert torch.equal(chosen.ids, expected.ids)
        assert chosen.coverage == pytest.approx(expected.coverage)
        assert chosen.unit.startswith(unit)
        draft = make_draft(target, 2, vocab_size=20, vocab_from=source)
        assert torch.equal(draft.vocab, expected.ids)
        assert draft.num_layers == 2
    other = tiny(7)
    assert vocabulary_from(other, 20, tmp_path / "states").unit == "tokens", "they are another's"


def test_a_vocabulary_is_asked_for_in_one_way(tiny: Tiny) -> None:
    target = tiny(3)
    with pytest.raises(InputError, match="go together"):
        make_draft(target, vocab_size=20)
    with pytest.raises(InputError, match="leave one out"):
        make_draft(target, 2, torch.arange(9), vocab_size=20, vocab_from=[[5, 6]])
    with pytest.raises(InputError, match="layers must be a number of first layers"):
        make_draft(target, 99)


def test_expected_usage_sums_the_targets_probabilities(tiny: Tiny) -> None:
    target = tiny(4)
    hidden = target.hidden(torch.randint(5, 60, (2, 300))).flatten(0, 1)
    expected = target.logits(hidden).softmax(-1).sum(0).double()
    assert torch.allclose(expected_usage(target, hidden), expected, rtol=1e-4)


def test_layers_that_are_not_alike_are_refused() -> None:
    """The config tells dense layers from expert ones by number, and kept layers get new ones."""
    experts = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    experts |= {"shared_expert_intermediate_size": 16, "mlp_only_layers": [0]}
    target = random_model("qwen2_moe", num_hidden_layers=3, **experts)
    assert make_draft(target, [0, 2]).num_layers == 2
    with pytest.raises(ModelError, match="not alike"):
        make_draft(target, [1, 2])


def test_a_token_added_without_resizing_is_named(tiny_folder: Path) -> None:
    model = models.load(str(tiny_folder), dtype="float32")
    model.tokenizer.add_tokens(["<|new|>"])
    beyond = model.tokenizer.convert_tokens_to_ids("<|new|>")
    with pytest.raises(InputError, match=rf"holds '<\|new\|>', id {beyond} .* without resizing"):
        count_tokens(model, [[1, 2], [beyond]])


def test_a_draft_takes_the_place_of_all_that_was_one(tiny: Tiny, tmp_path: Path) -> None:
    """A vocabulary or a shard of the draft before would be read with the new weights."""
    target, folder = tiny(5), tmp_path / "d"
    draft = make_draft(target, [0], torch.arange(0, 64, 2))
    saved = save_draft(draft, folder)
    assert (saved.name, saved.path) == (str(folder), folder)
    assert (draft.name, draft.path) == ("draft", Path()), "what is given is left as it was"
    (folder / "model-00001-of-00002.safetensors").touch()
    save_draft(make_draft(target, [0, 1]), folder)
    again = models.load(str(folder), dtype="float32")
    assert (again.vocab, again.vocab_size, again.num_layers) == (None, 64, 2)
    assert [file.name for file in folder.glob("*.safetensors")] == ["model.safetensors"]
    assert [file.name for file in tmp_path.iterdir()] == ["d"]


@pytest.mark.parametrize("what", ["a folder within", "no checkpoint", "a file"])
def test_a_draft_takes_the_place_of_nothing_else(tiny: Tiny, tmp_path: Path, what: str) -> None:
    folder = tmp_path / "d"
    if what == "a folder within":
        save_draft(tiny(5), folder)
        (folder / "runs").mkdir()
    elif what == "no checkpoint":
        folder.mkdir()
        (folder / "thesis.tex").touch()
    else:
        folder.touch()
    before = sorted(folder.rglob("*"))
    with pytest.raises(StorageError, match=r"(name|choose) another"):
        save_draft(tiny(5), folder)
    assert sorted(folder.rglob("*")) == before


@pytest.mark.parametrize(
    "tensors",
    [
        *({"ids": torch.tensor(ids)} for ids in ([1, 0, 2], [0, 1, 1], [-1, 0, 1], [0, 1, 64])),
        *({"ids": torch.tensor(ids)} for ids in ([0, 1], [0, 1, 2, 3], [[0, 1, 2]], [0.0, 1.0])),
        {"ids": torch.tensor([0, 1, 2], dtype=torch.int32)},
        {"ids": torch.tensor([], dtype=torch.int64)},
        {"tokens": torch.tensor([0, 1, 2])},
        None,
    ],
)
@pytest.mark.parametrize("load", [models.load, load_head])
def test_a_vocabulary_that_decodes_lossily_is_refused(
    tiny: Tiny, tmp_path: Path, tensors: dict[str, torch.Tensor] | None, load: Callable
) -> None:
    save_draft(make_draft(tiny(2), [0], torch.tensor([0, 1, 2])), tmp_path / "d")
    load(str(tmp_path / "d"))
    file = tmp_path / "d" / VOCAB_FILE
    if tensors is None:
        file.write_bytes(b"damaged")
    else:
        save_file(tensors, file)
    with pytest.raises(ModelError):
        load(str(tmp_path / "d"))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("trimmed", [False, True])
@pytest.mark.parametrize("size", [96, 62])
def test_a_draft_is_widened_to_the_rows_of_its_target(
    tiny: Tiny, tmp_path: Path, tied: bool, trimmed: bool, size: int
) -> None:
    ids = torch.arange(0, 64, 3) if trimmed else None
    draft = make_draft(tiny(2, tie_word_embeddings=tied), [0], ids)
    save_draft(at_full_vocabulary(draft, size), tmp_path / "wide")
    stock = AutoModelForCausalLM.from_pretrained(tmp_path / "wide")
    assert stock.config.vocab_size == size
    tokens = torch.randint(5, 60, (2, 9))
    wide = stock(tokens).logits
    ours = draft.logits(draft.hidden(tokens))
    kept = torch.arange(64) if ids is None else ids
    kept = kept[kept < size]
    assert wide.shape[-1] == size
    assert torch.allclose(wide[..., kept], ours[..., : len(kept)], atol=1e-5)


def test_a_trimmed_draft_is_loaded_without_drawing(tiny: Tiny, tmp_path: Path) -> None:
    draft = make_draft(tiny(0, layers=4), [0, 2], torch.arange(0, 64, 2))
    save_draft(draft, tmp_path / "draft")
    torch.manual_seed(3)
    state = torch.random.get_rng_state()
    with Draws() as draws:
        loaded = models.load(str(tmp_path / "draft"), dtype="float32")
    assert not draws.names
    assert torch.equal(torch.random.get_rng_state(), state)
    tokens = torch.randint(5, 60, (2, 9))
    assert torch.equal(loaded.logits(loaded.hidden(tokens)), draft.logits(draft.hidden(tokens)))
