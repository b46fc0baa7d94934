"""What is trained on is the response and its end marker, whatever the chat template."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import NamedTuple

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from specdistill.data.chat import encode_example, encode_prompt
from specdistill.data.prompts import Prompt
from specdistill.data.templates import tells_date
from specdistill.errors import InputError

SPECIALS = [
    "<s>", "</s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>",
    "<|eot_id|>", "<start_of_turn>", "<end_of_turn>", "<|user|>", "<|assistant|>", "<|end|>",
]  # fmt: skip

CHATML = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
CHATML_DEFAULT_SYSTEM = (
    "{% if messages[0].role != 'system' %}{{ '<|im_start|>system\nBe kind.<|im_end|>\n' }}"
    "{% endif %}" + CHATML
)
CHATML_GENERATION = (
    "{% for m in messages %}{% if m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}"
    "{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}{{ '\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
LLAMA3 = (
    "{{ bos_token }}{% for m in messages %}{{ '<|start_header_id|>' + m.role + "
    "'<|end_header_id|>\n\n' + (m.content | trim) + '<|eot_id|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}"
    "{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{ raise_exception('Roles must alternate user/assistant') }}{% endif %}"
    "{% if m.role == 'user' %}{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + "
    "(m.content | trim) + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
# Earlier reasoning is dropped and the last answer always opens with a think block.
THINK = (
    "{% for m in messages %}{% if m.role != 'assistant' %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% else %}"
    "{% set parts = m.content.split('</think>') %}{% set reply = parts[-1].lstrip('\n') %}"
    "{% set thought = parts[0].split('<think>')[-1].strip('\n') if parts | length > 1 else '' %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.last %}{{ '<think>\n' + thought + '\n</think>\n\n' + reply }}"
    "{% else %}{{ reply }}{% endif %}{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
# A second marker closes the whole conversation.
PHI = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}"
)
NO_MARKER = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)
TEXT_MARKER = NO_MARKER.replace("m.content + '\n'", "m.content + ' ###\n'")


CHATML_OPENING = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"


class Case(NamedTuple):
    template: str
    opening: str  # the rendered prompt of one user turn "Hi"
    spoken: str  # what is learned of the response "I am\nwell"
    scaffold: str = ""  # what the template writes before the response, for nobody to learn


CASES = {
    "chatml": Case(CHATML, CHATML_OPENING, "I am\nwell<|im_end|>"),
    "chatml_default_system": Case(
        CHATML_DEFAULT_SYSTEM,
        "<|im_start|>system\nBe kind.<|im_end|>\n" + CHATML_OPENING,
        "I am\nwell<|im_end|>",
    ),
    "chatml_generation": Case(CHATML_GENERATION, CHATML_OPENING, "I am\nwell<|im_end|>"),
    "llama3": Case(
        LLAMA3,
        "<s><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "I am\nwell<|eot_id|>",
    ),
    "mistral": Case(MISTRAL, "<s>[INST] Hi [/INST]", " I am\nwell</s>"),
    "gemma": Case(
        GEMMA,
        "<s><start_of_turn>user\nHi<end_of_turn>\n<start_of_turn>model\n",
        "I am\nwell<end_of_turn>",
    ),
    "think": Case(
        THINK, CHATML_OPENING, "I am\nwell<|im_end|>", scaffold="<think>\n\n</think>\n\n"
    ),
    "phi": Case(PHI, "<|user|>\nHi<|end|>\n<|assistant|>\n", "I am\nwell<|end|>"),
    "no_marker": Case(NO_MARKER, "user: Hi\nassistant: ", "I am\nwell</s>"),
    "text_marker": Case(TEXT_MARKER, "user: Hi ###\nassistant: ", "I am\nwell ###"),
}


def byte_tokenizer(template: str | None = None, **kwargs: str) -> PreTrainedTokenizerFast:
    """Byte-level BPE without a vocabulary file, with merges across spaces and line breaks."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ċ", "Ċ"), ("Ġ", "w"), ("l", "l"), ("a", "m"), ("]", "("), ("Ċ", "Ġ")]
    tokens = letters + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    return wrap(tokenizer, template, **kwargs)


def metaspace_tokenizer(template: str | None = None) -> PreTrainedTokenizerFast:
    """SentencePiece manner: text that stands alone gets a space in front."""
    letters = ["▁", *sorted(set("INST[/]() \nHiIamwelthx"))]
    merges = [("]", "("), ("▁", "w"), ("\n", "\n")]
    tokens = letters + [left + right for left, right in merges]
    tokenizer = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=False)
    tokenizer.decoder = decoders.Metaspace(prepend_scheme="always", split=False)
    return wrap(tokenizer, template)


def wrap(tokenizer: Tokenizer, template: str | None, **kwargs: str) -> PreTrainedTokenizerFast:
    tokenizer.add_special_tokens(SPECIALS)
    names = {"bos_token": "<s>", "eos_token": "</s>"} | kwargs
    wrapped = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names)
    wrapped.chat_template = template
    return wrapped


def ask(*turns: str, system: str | None = None) -> Prompt:
    """User and assistant turns alternate, the last is a user's."""
    spoken = list(zip(itertools.cycle(["user", "assistant"]), turns, strict=False))
    everything = spoken if system is None else [("system", system), *spoken]
    return Prompt("q7", tuple({"role": role, "content": text} for role, text in everything))


def split(tokenizer: PreTrainedTokenizerFast, ids: list[int], mask: list[bool]) -> tuple[str, str]:
    """Decode the tokens masked out and those trained on; the latter must all come last."""
    assert len(ids) == len(mask)
    start = mask.index(True)
    assert not any(mask[:start])
    assert all(mask[start:])
    return tokenizer.decode(ids[:start]), tokenizer.decode(ids[start:])


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("pad_is_eos", [False, True])
def test_mask_covers_response_and_marker(name: str, pad_is_eos: bool) -> None:
    case = CASES[name]
    pad = {"pad_token": "</s>"} if pad_is_eos else {}
    tokenizer = byte_tokenizer(case.template, **pad)
    prompt_ids = encode_prompt(tokenizer, ask("Hi"))
    assert tokenizer.decode(prompt_ids) == case.opening
    ids, mask = encode_example(tokenizer, ask("Hi"), "I am\nwell")
    assert ids[: len(prompt_ids)] == prompt_ids
    assert split(tokenizer, ids, mask) == (case.opening + case.scaffold, case.spoken)


@pytest.mark.parametrize("name", CASES)
def test_prompt_ids_are_those_of_the_template(name: str) -> None:
    tokenizer = byte_tokenizer(CASES[name].template)
    prompt = ask("Hi", "Hello.", "How are you?")
    expected = tokenizer.apply_chat_template(
        list(prompt.messages), add_generation_prompt=True, return_dict=False
    )
    assert encode_prompt(tokenizer, prompt) == expected


@pytest.mark.parametrize("name", ["chatml", "chatml_default_system", "llama3", "phi"])
def test_system_turn_and_earlier_turns_are_masked_out(name: str) -> None:
    tokenizer = byte_tokenizer(CASES[name].template)
    prompt = ask("Hi", "I am\nwell", "Sure?", system="Be brief.")
    ids, mask = encode_example(tokenizer, prompt, "I am\nwell")
    given, spoken = split(tokenizer, ids, mask)
    assert spoken == CASES[name].spoken
    assert all(part in given for part in ("Be brief.", "Hi", "I am\nwell", "Sure?"))
    assert "Be kind." not in given


def test_mask_agrees_with_generation_tags() -> None:
    tokenizer = byte_tokenizer(CHATML_GENERATION)
    prompt = ask("Hi", system="Be brief.")
    turns = [*prompt.messages, {"role": "assistant", "content": "I am\nwell"}]
    theirs = tokenizer.apply_chat_template(
        turns, return_assistant_tokens_mask=True, return_dict=True
    )
    ids, mask = encode_example(tokenizer, prompt, "I am\nwell")
    length = len(ids)  # theirs goes on with the line break after the marker
    assert theirs["input_ids"][:length] == ids
    assert list(map(bool, theirs["assistant_masks"])) == [*mask, False]


def test_reasoning_in_the_response_is_learned_and_earlier_reasoning_gone() -> None:
    tokenizer = byte_tokenizer(THINK)
    response = "<think>\nGreet.\n</think>\n\nHello!"
    ids, mask = encode_example(tokenizer, ask("Hi", response, "Again"), response)
    given, spoken = split(tokenizer, ids, mask)
    assert spoken == response + "<|im_end|>"
    assert "Hello!" in given
    assert "Greet." not in given


@pytest.mark.parametrize("response", ["think", "im_end", "\\n", "<|im_end", "assistant\n"])
def test_a_response_that_resembles_the_template(response: str) -> None:
    tokenizer = byte_tokenizer(THINK)
    ids, mask = encode_example(tokenizer, ask("Hi"), response)
    given, spoken = split(tokenizer, ids, mask)
    assert given.endswith("<think>\n\n</think>\n\n")
    assert spoken == response + "<|im_end|>"


PRINTABLE = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=40).filter(
    lambda text: text.strip() and not any(marker in text for marker in SPECIALS)
)


@settings(deadline=None)
@given(question=PRINTABLE, response=PRINTABLE, bare=st.booleans())
def test_any_text_comes_back_whole(question: str, response: str, bare: bool) -> None:
    tokenizer = byte_tokenizer(None if bare else CHATML)
    ids, mask = encode_example(tokenizer, ask(question), response)
    prompt_ids = encode_prompt(tokenizer, ask(question))
    assert ids[: len(prompt_ids)] == prompt_ids
    assert mask == [False] * len(prompt_ids) + [True] * (len(ids) - len(prompt_ids))
    marker = "</s>" if bare else "<|im_end|>"
    assert split(tokenizer, ids, mask)[1] == response + marker


def test_a_token_across_the_boundary_leaves_the_prompt_ids_alone() -> None:
    tokenizer = byte_tokenizer(CHATML)
    joined = tokenizer.convert_tokens_to_ids("ĊĊ")
    prompt_ids = encode_prompt(tokenizer, ask("Hi"))
    ids, mask = encode_example(tokenizer, ask("Hi"), "\nwell")
    assert joined not in ids
    assert ids[: len(prompt_ids)] == prompt_ids
    assert split(tokenizer, ids, mask)[1] == "\nwell<|im_end|>"


@pytest.mark.parametrize(
    ("response", "lead"), [("well", " "), ("well", ""), ("(a)", ""), ("\nwell", "")]
)
def test_no_space_creeps_in_at_the_boundary(response: str, lead: str) -> None:
    template = MISTRAL.replace("' ' + m.content", f"'{lead}' + m.content")
    tokenizer = metaspace_tokenizer(template)
    prompt_ids = encode_prompt(tokenizer, ask("Hi"))
    ids, _ = encode_example(tokenizer, ask("Hi"), response)
    assert ids[: len(prompt_ids)] == prompt_ids
    pieces = tokenizer.convert_ids_to_tokens(ids[len(prompt_ids) :])
    assert "".join(pieces) == (lead + response + "</s>").replace(" ", "▁")


@pytest.mark.parametrize("adds", ["<s> $A </s>", "<s> $A", "$A </s>", "$A"])
def test_without_a_template_bos_stays_and_eos_comes_once_at_the_end(adds: str) -> None:
    tokenizer = byte_tokenizer()
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(adds, None, ends)
    opening = "<s>Hi" if "<s>" in adds else "Hi"
    assert tokenizer.decode(encode_prompt(tokenizer, ask("Hi"))) == opening
    ids, mask = encode_example(tokenizer, ask("Hi"), " well")
    assert split(tokenizer, ids, mask) == (opening, " well</s>")


def test_with_a_template_the_tokenizer_adds_nothing() -> None:
    tokenizer = byte_tokenizer(LLAMA3)
    bos = tokenizer.bos_token_id
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        "<s> $A", None, [("<s>", bos)]
    )
    assert encode_prompt(tokenizer, ask("Hi")).count(bos) == 1


def refusal(tokenizer: PreTrainedTokenizerFast, prompt: Prompt, response: str) -> str:
    with pytest.raises(InputError) as caught:
        encode_example(tokenizer, prompt, response)
    return str(caught.value)


def test_system_turn_refused_by_the_template() -> None:
    message = refusal(byte_tokenizer(GEMMA), ask("Hi", system="Be brief."), "well")
    assert "'q7'" in message
    assert "System role not supported" in message


def test_several_messages_without_a_template() -> None:
    message = refusal(byte_tokenizer(), ask("Hi", "Hello.", "And?"), "well")
    assert "'q7' has 3 messages" in message
    assert "chat template" in message


def test_template_that_moves_the_system_text_once_an_answer_follows() -> None:
    template = (
        "{% for m in messages if m.role != 'system' %}{{ '[INST]' if m.role == 'user' }}"
        "{% if loop.last and messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"
        "{{ m.content + ('[/INST]' if m.role == 'user' else eos_token) }}{% endfor %}"
    )
    tokenizer = byte_tokenizer(template)
    message = refusal(tokenizer, ask("Hi", system="Be brief."), "well")
    assert "in another way once an answer follows" in message
    assert "'[INST]Be brief.Hi[/INST]' becomes '[INST]Hi[/INST]" in message
    ids, mask = encode_example(tokenizer, ask("Hi"), "well")
    assert split(tokenizer, ids, mask) == ("[INST]Hi[/INST]", "well</s>")


def test_template_without_a_generation_prompt() -> None:
    template = CHATML.partition("{% if add_generation_prompt %}")[0]
    message = refusal(byte_tokenizer(template), ask("Hi"), "well")
    assert "has no generation prompt" in message
    assert "<|im_start|>assistant" in message


def test_template_that_drops_the_reasoning_of_the_response() -> None:
    template = CHATML.replace("m.content", "m.content.split('</think>')[-1]")
    message = refusal(byte_tokenizer(template), ask("Hi"), "<think>Hm.</think>Hello!")
    assert "rewrites the response" in message
    assert "'<think>Hm.</think>Hello!' becomes 'Hello!'" in message


@pytest.mark.parametrize("content", ["m.content | upper", "'?'", "m.content + m.content"])
def test_template_that_does_not_write_the_answer_as_given(content: str) -> None:
    template = CHATML.replace("m.content", f"(m.content if m.role == 'user' else {content})")
    assert "does not write answers as given" in refusal(byte_tokenizer(template), ask("Hi"), "well")


def test_nothing_to_end_the_response() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.eos_token = None
    assert "no EOS token" in refusal(tokenizer, ask("Hi"), "well")


@pytest.mark.parametrize("response", ["", " \n"])
def test_empty_response(response: str) -> None:
    assert "'q7' has an empty response" in refusal(byte_tokenizer(CHATML), ask("Hi"), response)


@pytest.mark.parametrize("response", ["Yes.<|im_end|>", "a <|im_end|> b", "a <|end|> b"])
@pytest.mark.parametrize("template", [CHATML, None])
def test_a_response_that_holds_the_end_of_an_answer(template: str | None, response: str) -> None:
    """Decoding stops there, so nothing behind it is the target's."""
    tokenizer = byte_tokenizer(template, eos_token="<|im_end|>")
    with pytest.raises(InputError, match=r"'7' holds .*which ends an answer wherever it stands"):
        encode_example(
            tokenizer, replace(ask("x"), id="7"), response, ends=ends(tokenizer, "<|end|>")
        )
    encode_example(tokenizer, ask("a <|im_end|> b"), "<|user|>")  # no end, and no answer


@pytest.mark.parametrize(
    ("content", "turns"),
    [
        ("{{ m.content[:5] }}", ["Hello, who are you?"]),
        ("{{ m.content if loop.index != 2 }}", ["Same", "Same", "Other"]),
    ],
    ids=["cut off", "a turn that another repeats"],
)
def test_a_template_that_leaves_out_a_part_of_the_prompt(content: str, turns: list[str]) -> None:
    template = CHATML.replace("+ m.content +", f"}}}}{content}{{{{")
    assert "leaves out message" in asking(byte_tokenizer(template), ask(*turns))


def test_prompt_of_no_tokens() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.backend_tokenizer.normalizer = normalizers.Replace("x", "")
    assert "'q7' encodes to no tokens" in refusal(tokenizer, ask("xx"), "well")


TOOLS = [{"type": "function", "function": {"name": "weather"}}]
CALL = {"function": {"name": "weather", "arguments": {"city": "Oslo"}}}
CHATML_TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' + tools | tojson + '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}{% if m.role == 'assistant' %}"
    "{% if m.reasoning_content %}{{ '<think>' + m.reasoning_content + '</think>' }}"
    "{% else %}{{ '<think></think>' }}{% endif %}{% endif %}{{ m.content }}"
    "{% for c in m.tool_calls or [] %}{{ '<call>' + c.function | tojson + '</call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def test_tools_are_asked_and_calls_and_reasoning_are_trained() -> None:
    tokenizer = byte_tokenizer(CHATML_TOOLS)
    calling = replace(ask("Hi"), variables={"tools": TOOLS}, answer={"tool_calls": [CALL]})
    asked = tokenizer.decode(encode_prompt(tokenizer, calling))
    assert '"name": "weather"' in asked
    call = '<call>{"name": "weather", "arguments": {"city": "Oslo"}}</call>'
    for said in ("Let me look.", ""):
        given, spoken = split(tokenizer, *encode_example(tokenizer, calling, said))
        assert (given, spoken) == (f"{asked}<think></think>", f"{said}{call}<|im_end|>")
    thinking = replace(ask("Hi"), answer={"reasoning_content": "Greet."})
    given, spoken = split(tokenizer, *encode_example(tokenizer, thinking, "Hello."))
    assert (given, spoken) == (CHATML_OPENING, "<think>Greet.</think>Hello.<|im_end|>")
    turns = (*thinking.messages, {"role": "assistant", "content": "", "tool_calls": [CALL]})
    earlier = replace(ask("Hi"), messages=(*turns, {"role": "user", "content": "And?"}))
    assert call in tokenizer.decode(encode_prompt(tokenizer, earlier))


def test_the_template_for_tools_is_taken_where_there_are_several() -> None:
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": CHATML_TOOLS}
    with_tools = replace(ask("Hi"), variables={"tools": TOOLS})
    assert "weather" in tokenizer.decode(encode_prompt(tokenizer, with_tools))
    assert tokenizer.decode(encode_prompt(tokenizer, ask("Hi"))) == CHATML_OPENING
    tokenizer.chat_template = {"tool_use": CHATML_TOOLS, "rag": CHATML}
    assert "templates tool_use, rag, and none of them is 'default'" in asking(tokenizer, ask("Hi"))


def asking(tokenizer: PreTrainedTokenizerFast, prompt: Prompt) -> str:
    with pytest.raises(InputError) as caught:
        encode_prompt(tokenizer, prompt)
    return str(caught.value)


ASSISTANT = {"role": "assistant", "content": "So"}
NO_SYSTEM = CHATML.replace("in messages", "in messages if m.role != 'system'")
LEFT_OUT = {
    "tools": (CHATML, {"variables": {"tools": TOOLS}}, "leaves out 'tools'"),
    "documents": (CHATML_TOOLS, {"variables": {"documents": [{"text": "d"}]}}, "out 'documents'"),
    "a setting": (CHATML, {"variables": {"enable_thinking": False}}, "out 'enable_thinking'"),
    "a field": (
        CHATML + "{{ '/no_think' if not enable_thinking }}",
        {"unread": frozenset({"enable_thinking", "source"})},
        "reads 'enable_thinking', which the row has, but not where",
    ),
    "system": (NO_SYSTEM, {"messages": ask("Hi", system="Be brief.").messages}, "of role 'system'"),
    "calls": (
        CHATML,
        {"messages": (*ask("Hi").messages, ASSISTANT | {"tool_calls": [CALL]}, *ask("x").messages)},
        "leaves out 'tool_calls' of message 2",
    ),
    "reasoning": (
        CHATML,
        {"messages": (*ask("Hi").messages, ASSISTANT | {"thinking": "r"}, *ask("x").messages)},
        "leaves out 'thinking' of message 2",
    ),
}


@pytest.mark.parametrize("name", LEFT_OUT)
def test_nothing_is_left_out_of_a_prompt_in_silence(name: str) -> None:
    template, changes, reason = LEFT_OUT[name]
    prompt = replace(ask("Hi"), **changes)
    message = asking(byte_tokenizer(template), prompt)
    assert "'q7'" in message
    assert reason in message


@pytest.mark.parametrize("answer", [{"tool_calls": [CALL]}, {"reasoning_content": "Greet."}])
def test_nothing_is_left_out_of_an_answer_in_silence(answer: dict) -> None:
    (key,) = answer
    prompt = replace(ask("Hi"), answer=answer)
    message = refusal(byte_tokenizer(CHATML), prompt, "well")
    assert f"'q7': the tokenizer's chat template leaves out the answer's {key!r}" in message
    assert f"'q7' has {key!r}, and the tokenizer has no chat template" in refusal(
        byte_tokenizer(), prompt, "well"
    )


def test_without_a_template_tools_are_refused() -> None:
    prompt = replace(ask("Hi"), variables={"tools": TOOLS})
    assert "'q7' has 'tools', and the tokenizer has no chat template" in asking(
        byte_tokenizer(), prompt
    )


@pytest.mark.parametrize("name", ["tokenize", "continue_final_message", "messages"])
def test_what_transformers_takes_for_itself_no_template_is_told(name: str) -> None:
    prompt = replace(ask("Hi"), variables={name: True, "enable_thinking": False})
    message = asking(byte_tokenizer(CHATML), prompt)
    assert f"'q7': '{name}' among the chat_template_kwargs is Transformers' own argument" in message


def test_a_template_that_tells_the_date_tells_the_same_one_always() -> None:
    tokenizer = byte_tokenizer("{{ strftime_now('%d %b %Y %H:%M:%S.%f') + '\n' }}" + CHATML)
    assert tells_date(tokenizer)
    assert not tells_date(byte_tokenizer(CHATML))
    asked = tokenizer.decode(encode_prompt(tokenizer, ask("Hi")))
    assert asked == "01 Jan 2026 00:00:00.000000\n" + CHATML_OPENING
    ids, mask = encode_example(tokenizer, ask("Hi"), "well")
    assert split(tokenizer, ids, mask) == (asked, "well<|im_end|>")


BROKEN = {
    "raise": ("{{ raise_exception('No.') }}", "refuses these messages: No."),
    "undefined": ("{{ messages[0].x + 'y' }}", "no attribute 'x'"),
    "type": ("{{ 1 + 'y' }}", "TypeError: unsupported operand"),
    "zero": ("{{ 1 / 0 }}", "ZeroDivisionError: division by zero"),
    "recursion": ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "RecursionError"),
    "syntax": ("{% for m in messages %}", "template cannot be read: Unexpected end"),
    "sandbox": ("{{ messages.__class__.__mro__ }}", "unsafe"),
    "chance": ("{{ ['a', 'b'] | random }}", "something by chance"),
    "endless": (
        "{% for i in range(99999) %}{% for j in range(99999) %}x{% endfor %}{% endfor %}",
        "OverflowError: it counts further than 1,000,000",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_template_that_fails_is_named(name: str) -> None:
    template, reason = BROKEN[name]
    tokenizer = byte_tokenizer(template)
    message = asking(tokenizer, ask("Hi"))
    assert reason in message
    assert "chat template" in message
    if name not in ("syntax", "chance"):
        assert "'q7'" in message


GLM = (
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
)


def ends(tokenizer: PreTrainedTokenizerFast, *markers: str) -> list[int]:
    return tokenizer.convert_tokens_to_ids(list(markers))


def test_a_turn_ends_where_decoding_stops() -> None:
    """By the next turn's marker where that ends the model's answers, and by no other one."""
    tokenizer = byte_tokenizer(GLM)

    def end(*markers: str) -> str:
        ids, mask = encode_example(tokenizer, ask("Hi"), "well", ends=ends(tokenizer, *markers))
        return split(tokenizer, ids, mask)[1]

    assert end("</s>", "<|user|>") == "well<|user|>"
    assert end("</s>") == end() == "well</s>"
    assert end("<|end|>") == "well</s>"


@pytest.mark.parametrize(
    ("closing", "spoken"),
    [
        ("<|end|>\n<|end|>", "<|end|>"),  # the first, be they alike
        ("<|end|>\n</s>", "<|end|>"),  # or not
        ("<|eot_id|></s>\n</s>", "<|eot_id|></s>"),  # one that ends nothing belongs to the next
        ("<|eot_id|><|im_end|>", "<|eot_id|>"),
    ],
)
def test_the_first_of_several_end_markers_ends_the_turn(closing: str, spoken: str) -> None:
    tokenizer = byte_tokenizer(CHATML.replace("<|im_end|>\n", closing))
    ids, mask = encode_example(
        tokenizer, ask("Hi"), "well", ends=ends(tokenizer, "</s>", "<|end|>")
    )
    assert split(tokenizer, ids, mask)[1] == "well" + spoken
