"""The demo model's special tokens, and its chat template."""

from __future__ import annotations

EOS, PAD, BOS, ASSISTANT = 0, 1, 2, 6
SPECIAL = ["</s>", "<pad>", "<s>", "<unk>", "<|system|>", "<|user|>", "<|assistant|>", "<|tool|>"]
CALL_TOKENS = ["<tool_call>", "</tool_call>"]  # visible in the text, so not "special"

# Rendered without trim_blocks and lstrip_blocks, so all white space that counts is in the quotes.
TEMPLATE = (
    "{%- set system = '' -%}{%- set turns = messages -%}"
    "{%- if messages and messages[0].role in ['system', 'developer'] -%}"
    "{%- set system = messages[0].content or '' -%}{%- set turns = messages[1:] -%}{%- endif -%}"
    "{%- if tools or system -%}{{ '<|system|>\\n' }}"
    "{%- if tools -%}"
    '{{ \'To call a tool, answer <tool_call>{"name": ..., "arguments": {...}}</tool_call>. Tools:\\n\' }}'
    "{%- for tool in tools -%}{%- set f = tool.function -%}{{ f.name + '(' }}"
    "{%- if f.parameters and f.parameters.properties -%}{{ f.parameters.properties | list | join(', ') }}{%- endif -%}"
    "{{ ')' }}{%- if f.description -%}{{ ': ' + f.description }}{%- endif -%}{{ '\\n' }}{%- endfor -%}{%- endif -%}"
    "{{ system + '</s>\\n' }}{%- endif -%}"
    "{%- for message in turns -%}"
    "{{ '<|' + ('system' if message.role == 'developer' else message.role) + '|>\\n' + (message.content or '') }}"
    "{%- for call in message.tool_calls or [] -%}{%- set f = call.function -%}"
    '{{ \'<tool_call>{"name": "\' + f.name + \'", "arguments": \' }}'
    "{{ f.arguments if f.arguments is string else f.arguments | tojson }}{{ '}</tool_call>' }}{%- endfor -%}"
    "{{ '</s>\\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|assistant|>\\n' }}{%- endif -%}"
)
