"""The decoder for Python: texts and messages in, text out."""

from pathlib import Path

import pytest
import torch
from chains import Chain
from conftest import tiny_model
from test_chat import byte_tokenizer

from specdistill.data.decoder import Decoder
from specdistill.errors import InputError, ModelError
from specdistill.models import LanguageModel

ANSWER = " naïve 日本語 😀."
TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}#>"


def reciter(start: str, *, stumbles: tuple[int, ...] = (), template: str = "") -> LanguageModel:
    """A model that says `ANSWER` after `start`, and then ends; it says something else at the tokens
    numbered in `stumbles`.
    """
    tokenizer = byte_tokenizer(template or None)
    ids = tokenizer(start + ANSWER, add_special_tokens=False)["input_ids"]
    ids.append(tokenizer.eos_token_id)
    size = len(tokenizer)
    table = torch.zeros(size, size, size)
    for i, following in enumerate(zip(ids, ids[1:], ids[2:], strict=False)):
        table[following] = 20.0
        if i in stumbles:
            table[(*following[:2], 7)] = 30.0
    return LanguageModel("reciter", Path(), Chain(table), tokenizer)


def test_a_text_is_continued_and_no_character_is_split() -> None:
    target, draft = reciter("and"), reciter("and", stumbles=(6, 17))
    for decoder in (
        Decoder(target),
        Decoder(target, draft),
        Decoder(target, num_draft_tokens=None),
    ):
        answer = decoder.generate("My parcel is late and", max_new_tokens=64)
        assert answer.text == ANSWER
        assert answer.tokens[-1] == target.tokenizer.eos_token_id
        pieces = list(decoder.stream("My parcel is late and", max_new_tokens=64))
        assert "".join(pieces) == ANSWER
        assert len(pieces) > 3
        assert not any("\ufffd" in piece for piece in pieces)


def test_counts_are_those_of_the_draft() -> None:
    target = reciter("and")
    length = len(target.tokenizer(ANSWER, add_special_tokens=False)["input_ids"]) + 1
    plain = Decoder(target).generate("and", max_new_tokens=64)
    assert (plain.rounds, plain.tested, plain.accepted) == (length, 0, 0)
    perfect = Decoder(target, target).generate("and", max_new_tokens=64)
    assert perfect.tokens == plain.tokens
    assert perfect.rounds == -(-length // 5)  # four proposals and the bonus token
    assert perfect.tested == perfect.accepted
    worse = Decoder(target, reciter("and", stumbles=(6, 17))).generate("and", max_new_tokens=64)
    assert worse.tokens == plain.tokens
    assert worse.accepted == worse.tested - 2
    assert worse.rounds > perfect.rounds


def test_messages_and_texts_go_through_the_chat_template() -> None:
    target = reciter("#>", template=TEMPLATE)
    decoder = Decoder(target)
    asked = [{"role": "system", "content": "Be short."}, {"role": "user", "content": "Hi"}]
    assert decoder.generate("Hi", max_new_tokens=64).text == ANSWER
    assert decoder.generate(asked, max_new_tokens=64).text == ANSWER
    assert "".join(decoder.stream(asked, max_new_tokens=64)) == ANSWER
    alone = decoder.generate("Hi", max_new_tokens=4)
    several = decoder.generate(["Hi", asked, "Hi"], max_new_tokens=4)
    assert several == [alone, alone, alone]
    assert decoder.generate([]) == []


def test_settings_reach_the_engine() -> None:
    decoder = Decoder(tiny_model(1), tiny_model(2, layers=1), num_draft_tokens=2)
    greedy = decoder.generate("w7 w8", max_new_tokens=24).tokens
    warm = decoder.generate("w7 w8", max_new_tokens=24, temperature=1.5, seed=3).tokens
    assert warm == decoder.generate("w7 w8", max_new_tokens=24, temperature=1.5, seed=3).tokens
    assert warm != greedy
    assert warm != decoder.generate("w7 w8", max_new_tokens=24, temperature=1.5, seed=4).tokens
    for narrow in ({"top_k": 1}, {"top_p": 1e-6}, {"min_p": 0.999}):
        assert decoder.generate("w7 w8", max_new_tokens=24, temperature=1.5, **narrow).tokens == (
            greedy
        )


@pytest.mark.parametrize(
    ("prompt", "settings", "named"),
    [
        ("", {}, "empty"),
        (5, {}, "must be a list; got int"),
        ({"role": "user", "content": "Hi"}, {}, "must be a list; got dict"),
        ([{"role": "user"}], {}, "'role' and 'content'"),
        (["w7", ["w8"]], {}, "prompt 2"),
        ([{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "w"}], {}, "user's"),
        ("w7", {"temperature": -1}, "temperature"),
        ("w7", {"max_new_tokens": 0}, "max_new_tokens"),
        ("w7", {"max_new_tokens": 4096}, "512 positions"),
        ("w7", {"seed": "x"}, "seed"),
    ],
)
def test_what_cannot_be_served_is_refused(prompt: object, settings: dict, named: str) -> None:
    with pytest.raises(InputError, match=named):
        Decoder(tiny_model(1)).generate(prompt, **settings)


def test_a_pair_that_does_not_fit_is_refused() -> None:
    with pytest.raises(ModelError, match="swapped"):
        Decoder(tiny_model(1, layers=1), tiny_model(2))
    with pytest.raises(InputError, match="num_draft_tokens"):
        Decoder(tiny_model(1), num_draft_tokens=4)
    with pytest.raises(InputError, match="num_draft_tokens"):
        Decoder(tiny_model(1), tiny_model(2), num_draft_tokens=0)
