"""What a parallel draft says of itself, and the token it reads as a mask."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from conftest import tiny_model
from transformers import AddedToken

from specdistill import models
from specdistill.drafts.making import make_draft, save_draft
from specdistill.errors import InputError, ModelError
from specdistill.models import (
    LanguageModel,
    choose_mask_token,
    origin,
    set_origin,
    set_parallel,
    trained_draft_tokens,
)

Tiny = Callable[..., LanguageModel]


def with_special(*contents: str, **config: object) -> LanguageModel:
    """A model whose tokenizer ends with these special tokens and leaves no row over."""
    model = tiny_model(vocab=64 + len(contents), **config)
    model.tokenizer.add_tokens([AddedToken(text, special=True) for text in contents])
    assert len(model.tokenizer) == model.vocab_size
    return model


def test_what_is_written_is_read_again_from_the_folder(tmp_path: Path) -> None:
    draft = tiny_model(vocab=72)
    assert draft.mask_token is None
    assert trained_draft_tokens(draft) is None
    set_parallel(draft, 65, 8)
    set_origin(draft, "a" * 64, 7)
    save_draft(draft, tmp_path / "draft")
    config = json.loads((tmp_path / "draft/config.json").read_text())
    assert (config["pard_token"], config["spd_type"]) == (65, "pard")
    loaded = models.load(str(tmp_path / "draft"), dtype="float32")
    assert (loaded.mask_token, trained_draft_tokens(loaded)) == (65, 8)
    assert origin(loaded) == {"config_sha256": "a" * 64, "step": 7, "num_draft_tokens": 8}
    made = make_draft(loaded, [0])
    assert (made.mask_token, trained_draft_tokens(made), origin(made)) == (None, None, None)


def test_a_model_names_its_mask_in_its_hash(tmp_path: Path) -> None:
    """Another mask is another draft; how far it was trained is a remark."""
    draft = tiny_model(vocab=72)
    hashes = []
    for mask, tokens in ((64, 4), (65, 4), (65, 8)):
        set_parallel(draft, mask, tokens)
        hashes.append(save_draft(draft, tmp_path / "draft").sha256())
    assert hashes[0] != hashes[1] == hashes[2]


@pytest.mark.parametrize("value", [-1, 72, "65", True, 6.5, [65]])
def test_a_mask_that_is_no_id_is_refused(tiny: Tiny, value: object) -> None:
    draft = tiny(vocab=72)
    draft.model.config.pard_token = value
    with pytest.raises(ModelError, match=r"has pard_token: .* must be an id of 0 to 71"):
        _ = draft.mask_token


@pytest.mark.parametrize("value", [-1, 72])
def test_no_mask_beyond_the_embedding_is_written(tiny: Tiny, value: int) -> None:
    draft = tiny(vocab=72)
    with pytest.raises(InputError, match=r"parallel.mask_token is .* reads the ids 0 to 71"):
        set_parallel(draft, value, 4)
    assert draft.mask_token is None


@pytest.mark.parametrize("block", [None, {}, 3, {"num_draft_tokens": "8"}])
def test_a_draft_made_elsewhere_does_not_say_for_how_many_tokens(tiny: Tiny, block: object) -> None:
    draft = tiny()
    draft.model.config.specdistill = block
    assert trained_draft_tokens(draft) is None


def test_a_row_that_pads_the_embedding_is_the_mask() -> None:
    assert choose_mask_token(tiny_model(vocab=72)) == 64, "the tokenizer has 0 to 63"
    model = tiny_model(vocab=72)
    model.tokenizer.add_tokens([AddedToken("<unused0>", special=True)])
    assert choose_mask_token(model) == 65, "a row no text can name goes before a reserved token"


def test_else_a_reserved_token_that_no_conversation_holds() -> None:
    assert choose_mask_token(with_special("<tool_call>", "<unused0>", "<unused1>", "<x>")) == 66
    llama = with_special("<|reserved_special_token_1|>", "<|reserved_special_token_2|>")
    assert choose_mask_token(llama) == 65
    llama.tokenizer.chat_template += "<|reserved_special_token_2|>"
    assert choose_mask_token(llama) == 64, "the template writes the other"
    smol = with_special("<repo_name>", "<reponame>", "<file_sep>")
    assert choose_mask_token(smol) == 66
    ends = with_special("<unused0>", "<unused1>", eos_token_id=[0, 65])
    assert choose_mask_token(ends) == 64, "the other ends an answer"


def test_a_target_without_unused_ids_is_refused() -> None:
    with pytest.raises(InputError, match=r"no unused token .* all of its 65 rows.*mask_token"):
        choose_mask_token(with_special("<tool_call>"))
