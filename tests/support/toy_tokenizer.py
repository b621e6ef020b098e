"""A tokenizer of one token a byte, so that ids can be read as text, and chat templates with the traps of real ones."""

from __future__ import annotations

from typing import Any

SPECIAL = ["<|im_start|>", "<|im_end|>"]
WORDS = ["<think>", "</think>"]
"""Added tokens that are not special, as in Qwen3."""

# Like SmolLM2's: a system prompt of its own, any role written as it is called.
CHATML = """
{%- if messages[0].role != 'system' -%}{{- '<|im_start|>system\nBe kind.<|im_end|>\n' -}}{%- endif -%}
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

MARKED = """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.role == 'assistant' -%}
{%- generation -%}{{- message.content + '<|im_end|>' -}}{%- endgeneration -%}{{- '\n' -}}
{%- else -%}{{- message.content + '<|im_end|>\n' -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# Like Qwen3's: a think block, empty if there is no thought, in the last answer alone; earlier thoughts are left out;
# roles it does not know are left out; with thinking off the prompt ends with an empty think block.
THINKING = """
{%- set ns = namespace(asked=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
    {%- set parts = message.content.split('</think>') -%}
    {%- set thought = '' -%}
    {%- if message.reasoning_content -%}{%- set thought = message.reasoning_content -%}
    {%- elif parts|length > 1 -%}{%- set thought = parts[0].split('<think>')[-1].strip('\n') -%}{%- endif -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.asked -%}{{- '<think>\n' + thought + '\n</think>\n\n' -}}{%- endif -%}
    {{- parts[-1].lstrip('\n') + '<|im_end|>\n' -}}
{%- elif message.role in ['user', 'system'] -%}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""

# Like Qwen3's again: tools are printed into the system message, calls behind what the answer says, results as a user's.
TOOLS = """
{%- set ns = namespace(asked=0) -%}
{%- for message in messages -%}
{%- if message.role == 'user' -%}{%- set ns.asked = loop.index0 -%}{%- endif -%}
{%- endfor -%}
{%- if tools or messages[0].role == 'system' -%}
    {{- '<|im_start|>system\n' -}}
    {%- if messages[0].role == 'system' -%}{{- messages[0].content -}}{%- endif -%}
    {%- for tool in tools or [] -%}{{- '\n' + tool|tojson -}}{%- endfor -%}
    {{- '<|im_end|>\n' -}}
{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'assistant' -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if loop.index0 > ns.asked -%}
        {{- '<think>\n' + (message.reasoning_content or '') + '\n</think>\n\n' -}}
    {%- endif -%}
    {{- message.content -}}
    {%- for call in message.tool_calls or [] -%}
        {{- '\n<tool_call>\n' + call.function.name + ' ' + call.function.arguments|tojson + '\n</tool_call>' -}}
    {%- endfor -%}
    {{- '<|im_end|>\n' -}}
{%- elif message.role == 'tool' -%}
    {{- '<|im_start|>user\n<tool_response>\n' + message.content + '\n</tool_response><|im_end|>\n' -}}
{%- elif message.role == 'user' or not loop.first -%}
    {{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|im_start|>assistant\n' -}}
    {%- if enable_thinking is defined and enable_thinking is false -%}{{- '<think>\n\n</think>\n\n' -}}{%- endif -%}
{%- endif -%}"""

# Like Llama 3.1's: beside a call it leaves out what the answer says.
CALLS = """
{%- for message in messages -%}
{%- set call = (message.tool_calls or [none])[0] -%}
{{- '<|im_start|>' + message.role + '\n' + (call.function.name if call else message.content) + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# Like Llama 4's: contents may be parts, which it writes one after the other.
PARTS = """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' -}}
{%- if message.content is string -%}{{- message.content -}}{%- else -%}
    {%- for content in message['content'] -%}{{- content['text'] -}}{%- endfor -%}
{%- endif -%}
{{- '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"""

# Like Phi's: it writes an end of text behind the end of the last turn.
ENDING = """
{%- for message in messages -%}
{{- '<|im_start|>' + message.role + '\n' + message.content + '<|im_end|>\n' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- else -%}{{- '<|im_start|>' -}}{%- endif -%}"""

# Like Llama 3's: contents are trimmed, no newline after the end of a turn. Like Gemma's: no system role.
TRIMMING = """
{%- for message in messages -%}
{%- if message.role == 'system' -%}{{- raise_exception('no system role') -}}{%- endif -%}
{{- '<|im_start|>' + message.role + '\n\n' + message.content|trim + '<|im_end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n\n' -}}{%- endif -%}"""

# Like Llama 3.2's and GPT-OSS's: today's date is in the system prompt. The hour is asked for and not printed.
DATED = (
    "{%- set hour = strftime_now('%H') -%}{%- set day = strftime_now('%d %b %Y') -%}"
    "{{- '<|im_start|>system\n\nToday: ' + day + ' (' + strftime_now('%Y') + ', ' + day + ').<|im_end|>' -}}" + TRIMMING
)

# No special token anywhere, and another header where an answer is to follow.
UNLIKE = """
{%- for message in messages -%}{{- message.role + ': ' + message.content + '\n' -}}{%- endfor -%}
{%- if add_generation_prompt -%}{{- 'AI says: ' -}}{%- endif -%}"""


def toy_tokenizer(template: str | None = CHATML) -> Any:
    """Bytes, the special tokens, and one merge: two newlines are one token, as in most vocabularies."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    newline = "\u010a"  # how byte-level tokenizers write one
    vocabulary = {symbol: token for token, symbol in enumerate([*alphabet, newline * 2])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[(newline, newline)]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(text, special=True, normalized=False) for text in SPECIAL])
    tokenizer.add_tokens([AddedToken(text, normalized=False) for text in WORDS])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    return fast
