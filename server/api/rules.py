"""The table of request fields that have no effect here: an entry for each field that clients of OpenAI, Anthropic, vLLM
or SGLang may send and no wire model uses.

Null never has an effect. Bookkeeping never changes an answer, on any server, and is accepted silently. A hint would
change the answer of a model or server that can follow it; it is accepted, and the response names it in the header
`x-pyllm-ignored`. Refused fields would change the answer: only values without effect are accepted.
"""

from __future__ import annotations

from typing import Any

from ..http.tolerance import Rule, Rules

Table = dict[str, Rule]

BOOKKEEPING = Rule("bookkeeping")
HINT = Rule("hint")
REFUSED = Rule("refused")
OFF = Rule("refused", nothing=(False,))
ANY_FLAG = Rule("refused", nothing=(False, True))  # both values mean the same here


def hint(*nothing: Any) -> Rule:
    """Return the rule of a hint with values that need no mention."""
    return Rule("hint", nothing)


def switch(*names: str) -> Rule:
    """Return the rule of a field that sets the variables for reasoning, on models that reason."""
    return Rule("hint", variables=lambda value: dict.fromkeys(names, value))


def openrouter(value: Any) -> dict[str, Any]:
    """Return the variables that OpenRouter's object `reasoning` sets."""
    found: dict[str, Any] = {}
    if isinstance(value, dict):
        if isinstance(effort := value.get("effort"), str):
            found |= {"reasoning_effort": effort, "enable_thinking": effort != "none"}
        if isinstance(value.get("enabled"), bool):
            found["enable_thinking"] = value["enabled"]
        if isinstance(value.get("exclude"), bool):
            found["include_reasoning"] = not value["exclude"]
    return found


def refused(*nothing: Any, use: str = "") -> Rule:
    """Return the rule of a field that is refused, unless its value has no effect; `use` is what to use instead."""
    return Rule("refused", nothing, advice=f"Use {use}." if use else "")


def all_of(names: str, rule: Rule) -> Table:
    """Return the same rule for several places."""
    return dict.fromkeys(names.split(), rule)


def below(prefix: str, table: Table) -> Table:
    """Return the table for a place further down."""
    return {f"{prefix}.{place}": rule for place, rule in table.items()}


# Tools that OpenAI's or Anthropic's servers run, or whose format only their models know.
HOSTED = ("web_search*", "web_fetch*", "file_search", "code_interpreter", "code_execution*", "computer*", "mcp*",
          "image_generation", "local_shell", "shell", "apply_patch", "custom", "namespace", "tool_search*",
          "programmatic_tool_calling", "bash_*", "text_editor_*", "memory_*", "advisor_*")  # fmt: skip
HOSTED_TOOLS = Rule("hint", items=HOSTED, needs_others=True)

# Reasoning, if the model reasons or its chat template has a variable for it.
SWITCHES: Table = {
    f"chat_template_kwargs.{name}": switch(name)
    for name in ("enable_thinking", "preserve_thinking", "thinking_budget", "reasoning_effort")
}
SWITCHES["chat_template_kwargs.thinking"] = switch("thinking", "enable_thinking")
EFFORT = Rule("hint", ("none",), variables=lambda word: {"reasoning_effort": word, "enable_thinking": word != "none"})
NO_THINKING = {"type": "disabled"}
SHOWN = Rule("refused", nothing=(False, True), variables=lambda value: {"include_reasoning": value})
THINKING = Rule("hint", (NO_THINKING,), variables=lambda value: {"enable_thinking": value != NO_THINKING})

REQUEST_IDS = all_of("request_id rid session_id custom_labels", BOOKKEEPING)
PROMPT_CACHE = all_of("prompt_cache_retention prompt_cache_options client_metadata", BOOKKEEPING)
MEDIA = all_of("media_io_kwargs mm_processor_kwargs images_config video_config", hint({}))
MEDIA |= all_of("max_dynamic_patch min_dynamic_patch", HINT)
MEDIA |= {"mm_payload": hint("tensors"), "use_audio_in_video": hint(False)}
TRANSFER = all_of("kv_transfer_params ec_transfer_params bootstrap_host bootstrap_port bootstrap_room", refused({}))
TRANSFER |= all_of("data_parallel_rank routed_dp_rank disagg_prefill_dp_rank", REFUSED)

# vLLM's and SGLang's fields for the generation of text.
OTHER_SERVERS: Table = {
    **REQUEST_IDS,
    **MEDIA,
    **TRANSFER,
    **all_of("watermark watermarking use_beam_search return_hidden_states return_routed_experts", OFF),
    **all_of("return_weight_versions return_token_offsets return_mm_kwargs return_prompt_text return_meta_info", OFF),
    **all_of("return_cached_tokens_details return_spec_tokens_details return_tokens_as_token_ids", OFF),
    **all_of("return_sampling_mask return_flat_raw_output_top_logprobs", OFF),
    **all_of("spaces_between_special_tokens return_flat_raw_top_logprobs_b64", ANY_FLAG),
    **all_of("separate_reasoning stream_reasoning", ANY_FLAG),
    "include_reasoning": SHOWN,
    **all_of("routed_experts_start_len routed_experts_prompt_start", refused(0)),
    **all_of("custom_params vllm_xargs repetition_detection session_params", refused({})),
    **all_of("custom_logit_processor stop_regex lora_path", refused("", [])),
    **all_of("sampling_logprobs_mode logprob_token_ids extra_key", refused([])),
    **all_of("regex ebnf json_schema guided_json guided_regex guided_choice guided_grammar guided_json_object "
             "guided_decoding_backend guided_whitespace_pattern", refused("", [], {}, False, use="structured_outputs")),
    **all_of("structured_outputs.disable_any_whitespace structured_outputs.disable_additional_properties", OFF),
    **all_of("structured_outputs.whitespace_pattern structured_outputs.structural_tag", REFUSED),
    "structured_outputs.json_object": refused(False, use="response_format"),
    **all_of("early_stopping skip_reading_prefix_cache", OFF),
    "logits_processors": refused([]),
    "no_stop_trim": refused(False, use="include_stop_str_in_output"),
    "length_penalty": refused(1),
    "truncation_side": refused("left"),
    "stream_interval": hint(1),
    "thinking_token_budget": HINT,
    "enable_thinking": switch("enable_thinking"),
}  # fmt: skip
STREAM_OPTIONS: Table = {"stream_options.include_obfuscation": OFF}
BOTH: Table = OTHER_SERVERS | PROMPT_CACHE | STREAM_OPTIONS
BOTH |= all_of("user metadata store service_tier safety_identifier prompt_cache_key", BOOKKEEPING)
BOTH |= {"reasoning_effort": EFFORT, "verbosity": hint("medium"), "modalities": refused(["text"], [])}

CHAT_MESSAGES: Table = {
    **all_of("cache_control id phase provider_specific_fields annotations parsed", BOOKKEEPING),
    **all_of("reasoning reasoning_content reasoning_details thinking_blocks", hint("", [])),
    **all_of("audio refusal function_call", refused("")),
    **all_of("tool_calls tool_call_id tools images", refused([], "")),
    "prefix": refused(False, use="continue_final_message"),
    **all_of("content[].cache_control content[].prompt_cache_breakpoint content[].annotations", BOOKKEEPING),
    **all_of("tool_calls[].index tool_calls[].function.parsed_arguments", BOOKKEEPING),
}
CHAT_TOOLS: Table = {
    "tools[]": HOSTED_TOOLS,
    **all_of("tools[].cache_control tools[].function.cache_control", BOOKKEEPING),
    **all_of("tools[].defer_loading tools[].function.defer_loading", OFF),
}
SCHEMA_NAMES = all_of("name description strict", BOOKKEEPING)  # a schema is enforced, strict or not
CHAT: Table = {
    **BOTH,
    **below("messages[]", CHAT_MESSAGES),
    **below("response_format.json_schema", SCHEMA_NAMES),
    **CHAT_TOOLS,
    "chat_template": REFUSED,
    "documents": refused([]),
    "add_special_tokens": OFF,
    **SWITCHES,
    **all_of("audio web_search_options moderation task", REFUSED),
    "input_ids": refused([]),
    "best_of": refused(1, use="n"),
    "suffix": refused(""),
    **all_of("echo return_prompt_token_ids return_input_ids_in_sglext return_output_ids_in_sglext", OFF),
    "prediction": HINT,
    "functions": refused([], use="tools"),
    "function_call": refused("none", "auto", use="tool_choice"),
    "thinking": THINKING,
    "reasoning": Rule("hint", variables=openrouter),
}
COMPLETIONS: Table = {
    **BOTH,
    **below("response_format.json_schema", SCHEMA_NAMES),
    "best_of": refused(1, use="n"),
    "suffix": refused(""),
    "prompt_embeds": refused([]),
    "continue_final_message": OFF,
    "add_generation_prompt": ANY_FLAG,
    "logprobs": refused(False),
}

RESPONSES: Table = {
    **OTHER_SERVERS,
    **PROMPT_CACHE,
    **STREAM_OPTIONS,
    "tools[]": HOSTED_TOOLS,
    **all_of("tools[].defer_loading tools[].async", OFF),
    "tools[].allowed_callers": refused(["direct"], []),
    "tools[].output_schema": HINT,
    "include[]": Rule("hint", items=("reasoning.*", "file_search_call.*", "web_search_call.*", "message.input_image.*",
                                     "computer_call_output.*", "code_interpreter_call.*")),
    "input[]": Rule("hint", items=("reasoning",), needs_others=True),
    **below("text.format", SCHEMA_NAMES),
    **all_of("input[].name input[].id input[].status input[].phase input[].parsed_arguments "
             "input[].output[].prompt_cache_breakpoint", BOOKKEEPING),
    **below("input[].content[]", all_of("annotations logprobs parsed prompt_cache_breakpoint", BOOKKEEPING)),
    "input[].caller": refused({"type": "direct"}),
    "input[].async": OFF,
    "input[].namespace": refused(""),
    **all_of("reasoning.summary reasoning.generate_summary", switch("reasoning_summary")),
    **all_of("reasoning.context reasoning.mode", HINT),
    "reasoning.effort": EFFORT,
    **SWITCHES,
    "text.verbosity": hint("medium"),
    "max_tool_calls": REFUSED,
    "n": refused(1),
    **all_of("user metadata service_tier safety_identifier prompt_cache_key access_programs", BOOKKEEPING),
    **all_of("background enable_response_messages", OFF),
    **all_of("background_options conversation moderation prompt image", REFUSED),
    **all_of("context_management previous_input_messages", refused([])),
}  # fmt: skip

MARKS = "cache_control system[].cache_control tools[].cache_control messages[].content[].cache_control "
MARKS += "messages[].content[].content[].cache_control"

# The prefix cache needs no marks, and another model's thinking is left out of the prompt.
COUNT: Table = {
    **all_of(MARKS, BOOKKEEPING),
    **all_of(MARKS.replace("control", "control.scope"), BOOKKEEPING),
    **all_of("messages[].content[].thinking messages[].content[].signature messages[].content[].data", BOOKKEEPING),
    "tools[]": HOSTED_TOOLS,
    "thinking": THINKING,
    "output_config.effort": EFFORT,
    "messages[].output_config": HINT,
    **SWITCHES,
    "output_config.task_budget": HINT,
    "context_management": REFUSED,
    "context_management.edits[]": Rule("hint", items=("clear_thinking_*",)),
    "speed": hint("standard"),
    "inference_geo": hint("global"),
    **all_of("user_profile_id workspace_id betas metadata diagnostics billing_policy", BOOKKEEPING),
    **all_of("system[].citations messages[].content[].citations messages[].content[].content[].citations", BOOKKEEPING),
    "messages[].content[].parsed_output": BOOKKEEPING,
    "messages[].content[].caller": refused({"type": "direct"}),
    "messages[].content[].toolset_name": REFUSED,
    "tools[].allowed_callers": refused(["direct"], []),
    "tools[].defer_loading": OFF,
    "tools[].eager_input_streaming": ANY_FLAG,
    **all_of("tools[].input_examples mcp_servers fallbacks", refused([])),
    **all_of("messages[].clear_at compaction thread container", refused({})),
}  # fmt: skip
MESSAGES: Table = {
    **OTHER_SERVERS,
    **COUNT,
    **all_of("service_tier fallback_credit_token", BOOKKEEPING),
    "n": refused(1),
}

EMBEDDINGS: Table = {
    **REQUEST_IDS,
    **MEDIA,
    **TRANSFER,
    "embed_dtype": refused("float32"),
    "endianness": refused("native", "little"),
    "padding": refused("do_not_pad"),
    "truncation_side": refused("left"),
    "use_activation": refused(True),
    "user": BOOKKEEPING,
    "lora_path": refused("", []),
    **all_of("embed_override_token_id embed_overrides messages", refused([])),
    **all_of("add_generation_prompt continue_final_message", OFF),
    "chat_template": REFUSED,
    "chat_template_kwargs": refused({}),
}
TOKENIZE: Table = {
    **below("messages[]", CHAT_MESSAGES),
    **CHAT_TOOLS,
    **MEDIA,
    "chat_template": REFUSED,
    "documents": refused([]),
    **SWITCHES,
    "reasoning_effort": EFFORT,
    "tool_choice": hint("auto", "none"),
}

RULES: dict[str, Rules] = {
    path: Rules(table)
    for path, table in {
        "/v1/chat/completions": CHAT,
        "/v1/completions": COMPLETIONS,
        "/v1/responses": RESPONSES,
        "/v1/messages": MESSAGES,
        "/v1/messages/count_tokens": COUNT,
        "/v1/embeddings": EMBEDDINGS,
        "/tokenize": TOKENIZE,
        "/detokenize": {},
    }.items()
}
"""The rules of each endpoint."""
