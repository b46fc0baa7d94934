"""Chat templates in the manner of the usual models', in our own words, with `{% generation %}` tags
around what the model writes.
"""

from __future__ import annotations

# The date, a system turn always, one call at a time, results of role ipython.
LLAMA3 = """{{ bos_token }}
{%- if date_string is not defined %}{% set date_string = strftime_now('%d %b %Y') %}{% endif %}
{%- set head = '<|start_header_id|>' %}{% set tail = '<|end_header_id|>\n\n' %}
{{- head + 'system' + tail + 'Today: ' + date_string + '\n\n' }}
{%- if tools %}{{ 'Functions: ' + tools | tojson + '\n\n' }}{% endif %}
{%- if messages[0].role == 'system' %}{{ messages[0].content | trim }}
{%- set messages = messages[1:] %}{% endif %}{{ '<|eot_id|>' }}
{%- for m in messages %}
{%- if m.role == 'tool' %}{{ head + 'ipython' + tail + m.content | tojson + '<|eot_id|>' }}
{%- elif m.role != 'assistant' %}{{ head + m.role + tail + m.content | trim + '<|eot_id|>' }}
{%- else %}{{ head + 'assistant' + tail }}{% generation %}
{%- if m.tool_calls %}{% if m.tool_calls | length > 1 %}
{{- raise_exception('This model calls one function at a time.') }}{% endif %}
{%- set call = m.tool_calls[0].function %}
{{- '{"name": "' + call.name + '", "parameters": ' + call.arguments | tojson + '}' }}
{%- else %}{{ m.content | trim }}{% endif %}{{ '<|eot_id|>' }}{% endgeneration %}
{%- endif %}{% endfor %}
{%- if add_generation_prompt %}{{ head + 'assistant' + tail }}{% endif %}"""

_CHATML_TOOLS = """{%- if tools %}{{ '\n\n# Tools\n' + tools | tojson }}{% endif %}"""
_CHATML_CALLS = """{%- for c in m.tool_calls or [] %}
{{- '\n' if not loop.first or m.content }}
{{- '<tool_call>\n{"name": "' + c.function.name + '", "arguments": ' + c.function.arguments | tojson
    + '}\n</tool_call>' }}{% endfor %}"""
# Results of several calls share a turn of the user's.
_CHATML_RESULTS = """{%- if loop.first or messages[loop.index0 - 1].role != 'tool' %}
{{- '<|im_start|>user' }}{% endif %}
{{- '\n<tool_response>\n' + m.content + '\n</tool_response>' }}
{%- if loop.last or messages[loop.index0 + 1].role != 'tool' %}{{ '<|im_end|>\n' }}{% endif %}"""

# A system turn of its own where none is given.
QWEN25 = (
    """{{- '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% set messages = messages[1:] %}
{%- else %}{{ 'You help.' }}{% endif %}"""
    + _CHATML_TOOLS
    + """{{- '<|im_end|>\n' }}
{%- for m in messages %}{% if m.role == 'tool' %}"""
    + _CHATML_RESULTS
    + """{%- elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' }}
{%- generation %}{{ m.content }}"""
    + _CHATML_CALLS
    + """{{- '<|im_end|>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""
)

# Reasoning stays behind the last question alone; without thinking, the block is there and empty.
QWEN3 = (
    """{%- if tools or messages[0].role == 'system' %}{{ '<|im_start|>system\n' }}
{%- if messages[0].role == 'system' %}{{ messages[0].content }}{% endif %}"""
    + _CHATML_TOOLS
    + """{{- '<|im_end|>\n' }}{% endif %}
{%- set at = namespace(question=0) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set at.question = loop.index0 %}{% endif %}
{%- endfor %}
{%- for m in messages %}{% if m.role == 'tool' %}"""
    + _CHATML_RESULTS
    + """{%- elif m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}
{%- elif m.role == 'assistant' %}
{%- set thought = m.reasoning_content or '' %}{% set content = m.content %}
{%- if not thought and '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}{% endif %}
{{- '<|im_start|>assistant\n' }}{% generation %}
{%- if loop.index0 > at.question and (loop.last or thought) %}
{{- '<think>\n' + thought + '\n</think>\n\n' }}{% endif %}{{ content }}"""
    + _CHATML_CALLS
    + """{{- '<|im_end|>' }}{% endgeneration %}{{ '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}
{%- if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}
{%- endif %}{% endif %}"""
)

# Turns alternate; the tools stand with the last question, so that an earlier one loses them.
MISTRAL = """{{ bos_token }}{%- set at = namespace(last=0, user=true) %}
{%- for m in messages %}{% if m.role == 'user' %}{% set at.last = loop.index0 %}{% endif %}
{%- if m.role == 'user' or (m.role == 'assistant' and not m.tool_calls) %}
{%- if (m.role == 'user') != at.user %}{{ raise_exception('Roles must alternate.') }}{% endif %}
{%- set at.user = not at.user %}{% endif %}{% endfor %}
{%- for m in messages %}
{%- if m.role == 'user' %}{% if tools and loop.index0 == at.last %}
{{- '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}
{{- '[INST] ' + m.content + '[/INST]' }}
{%- elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content | tojson + '[/TOOL_RESULTS]' }}
{%- elif m.role == 'assistant' %}{% generation %}{% if m.tool_calls %}{{ '[TOOL_CALLS] [' }}
{%- for c in m.tool_calls %}{% if c.id is not defined or c.id | length != 9 %}
{{- raise_exception('Ids of calls have nine letters.') }}{% endif %}
{{- c.function | tojson + (']' if loop.last else ', ') }}{% endfor %}
{%- else %}{{ ' ' + m.content }}{% endif %}{{ eos_token }}{% endgeneration %}
{%- else %}{{ raise_exception('There is no role ' + m.role + '.') }}{% endif %}{% endfor %}"""

# What the system says begins the first question.
GEMMA3 = """{{ bos_token }}{% set first = '' %}
{%- if messages[0].role == 'system' %}{% set first = messages[0].content | trim + '\n\n' %}
{%- set messages = messages[1:] %}{% endif %}
{%- for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Roles must alternate.') }}{% endif %}
{%- if m.role == 'assistant' %}{{ '<start_of_turn>model\n' }}
{%- generation %}{{ m.content | trim }}{{ '<end_of_turn>' }}{% endgeneration %}{{ '\n' }}
{%- else %}{{ '<start_of_turn>user\n' + (first if loop.first else '') + m.content | trim }}
{{- '<end_of_turn>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"""

SMOLLM2 = """{% for m in messages %}{% if loop.first and m.role != 'system' %}
{{- '<|im_start|>system\nYou are small.<|im_end|>\n' }}{% endif %}
{{- '<|im_start|>' + m.role + '\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""

# A second marker closes the conversation.
PHI = """{% for m in messages %}{{ '<|' + m.role + '|>\n' }}
{%- if m.role == 'assistant' %}{% generation %}{{ m.content + '<|end|>' }}{% endgeneration %}
{%- else %}{{ m.content + '<|end|>' }}{% endif %}{{ '\n' }}{% endfor %}
{{- '<|assistant|>\n' if add_generation_prompt else eos_token }}"""

NO_SYSTEM = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'system' %}{{ raise_exception('There is no system turn.') }}{% endif %}
{%- if m.role == 'assistant' %}{{ 'Bot: ' }}
{%- generation %}{{ m.content + eos_token }}{% endgeneration %}
{%- else %}{{ 'User: ' + m.content + '\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ 'Bot: ' }}{% endif %}"""

# Always thinks, and shows no answer's reasoning, not even the last one's.
DROPS_REASONING = """{{ bos_token }}{% for m in messages %}
{%- if m.role == 'assistant' %}{{ '<|assistant|>' }}{% generation %}
{{- m.content.split('</think>')[-1] + eos_token }}{% endgeneration %}
{%- else %}{{ '<|' + m.role + '|>' + m.content }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|><think>\n' }}{% endif %}"""

TEMPLATES = {
    "llama3": LLAMA3,
    "qwen25": QWEN25,
    "qwen3": QWEN3,
    "mistral": MISTRAL,
    "gemma3": GEMMA3,
    "smollm2": SMOLLM2,
    "phi": PHI,
    "no_system": NO_SYSTEM,
}
END = {  # what the model writes after its words
    "llama3": "<|eot_id|>",
    "mistral": "</s>",
    "gemma3": "<end_of_turn>",
    "phi": "<|end|>",
    "no_system": "</s>",
}
