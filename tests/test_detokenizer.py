"""Text that comes token by token is the text that comes at once."""

from __future__ import annotations

import pytest
from test_chat import byte_tokenizer, metaspace_tokenizer
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from specdistill.decoding import Detokenizer

TEXTS = ["naïve 日本語 😀👩‍👩‍👧", " well, then", "a  b\n\n c", "\ufffd is a character\ufffd", "é"]


def fallback_tokenizer() -> PreTrainedTokenizerFast:
    """As SentencePiece has it: words with their space, and bytes for what is no word."""
    tokens = ["<unk>", *[f"<0x{i:02X}>" for i in range(256)], "▁", "a", "b", "w", "e", "l", "▁a"]
    vocab = {token: i for i, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab, [("▁", "a")], byte_fallback=True, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    steps = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
    inner.decoder = decoders.Sequence([*steps, decoders.Strip(" ", 1, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=inner)


@pytest.mark.parametrize("kind", [byte_tokenizer, fallback_tokenizer])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("text", TEXTS)
def test_pieces_add_up_to_the_text(kind: type, size: int, text: str) -> None:
    tokenizer = kind()
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = Detokenizer(tokenizer)
    pieces = [stream.add(ids[i : i + size]) for i in range(0, len(ids), size)]
    whole = tokenizer.decode(ids)
    assert "".join([*pieces, stream.end()]) == whole
    if "\ufffd" not in text:
        assert not any("\ufffd" in piece for piece in pieces)
    assert stream.end() == ""


def test_a_text_cut_within_a_character_says_so_at_its_end() -> None:
    tokenizer = byte_tokenizer()
    ids = tokenizer("日", add_special_tokens=False)["input_ids"][:-1]
    stream = Detokenizer(tokenizer)
    assert stream.add(ids) == ""
    assert stream.end() == "\ufffd"


def test_the_space_after_the_prompt_stays() -> None:
    tokenizer = metaspace_tokenizer()
    prompt, answer = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Hi", "well")
    )
    assert Detokenizer(tokenizer).add(answer) == "well"
    assert Detokenizer(tokenizer, after=prompt).add(answer) == " well"
