"""Reads the fields that requests share: sampling parameters and the answer's format."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from pydantic import BeforeValidator

from ...engine.errors import RequestError
from ...engine.messages import SamplingParams
from ..chat.conversation import AnswerFormat, Sampling
from ..chat.served_model import ServedModel
from ..chat.structured import choice_grammar, json_object_grammar, json_schema_grammar, lark_grammar, regex_grammar
from ..generation.generation import Generation
from ..http.middleware import RequestContext
from . import fields

GiveWay = BeforeValidator(lambda value: value)
"""Lets other threads run while the items of a long list are checked; without any Python code, that is one step."""
LOGPROB_FIELDS = ("logprobs", "top_logprobs", "prompt_logprobs")
# Makes the grammar of each kind of structured output.
GRAMMARS: dict[str, Callable[..., str]] = {
    "json_schema": json_schema_grammar,
    "regex": regex_grammar,
    "choice": choice_grammar,
    "grammar": lark_grammar,
}
SAMPLING_FIELDS = {*SamplingParams.__struct_fields__} - {"max_tokens", "logprobs", "grammar"}


def read_sampling(body: fields.SamplingRequest, model: ServedModel) -> Sampling:
    """Return what a request sets of `SamplingParams`; raises `RequestError`."""
    if getattr(body, "stream_options", None) is not None and not body.stream:
        raise RequestError("stream_options needs stream to be true.", param="stream_options")
    for name in LOGPROB_FIELDS:
        value, most = getattr(body, name, None), model.flags.max_logprobs
        if value is not None and value is not True and value > most:
            raise RequestError(f"{name} must be at most {most} on this server, got {value}.", param=name)
    values = {name: value for name in SAMPLING_FIELDS if (value := getattr(body, name, None)) is not None}
    if isinstance(stop := values.get("stop"), str):
        values["stop"] = [stop]
    if "logit_bias" in values:
        values["logit_bias"] = {int(token_id): bias for token_id, bias in values["logit_bias"].items()}
    if "allowed_token_ids" in values:
        values["allowed_token_ids"] = sorted({*values["allowed_token_ids"]})
    return {name: tuple(value) if isinstance(value, list) else value for name, value in values.items()}


def start_generation(
    context: RequestContext,
    body: fields.SamplingRequest,
    model: ServedModel,
    prompts: list[list[int]],
    params: Sequence[SamplingParams],
    field: str,
) -> Generation:
    """Submit the prompts; an error calls them `field`. Raises as `Generation` does."""
    return Generation(
        model.engine, model.metrics, context, prompts, params, field=field, n=getattr(body, "n", None) or 1,
        priority=body.priority or 0, cache_salt=body.cache_salt, streams=bool(body.stream),
    )  # fmt: skip


def read_format(
    wanted: fields.TextFormat | fields.JsonObjectFormat | fields.JsonSchemaFormat | None,
    outputs: fields.StructuredOutputs | None,
    field: str,
    schema_field: str,
) -> AnswerFormat | None:
    """Return the format that a request asks for in `field` or in structured_outputs; raises `RequestError`."""
    if wanted is None or isinstance(wanted, fields.TextFormat):
        return None if outputs is None else _structured_format(outputs)
    if outputs is not None:
        raise RequestError(f"structured_outputs and {field} cannot both be given.", param="structured_outputs")
    if isinstance(wanted, fields.JsonObjectFormat):
        return AnswerFormat(json_object_grammar(), field, field)
    grammar = json_schema_grammar(wanted.json_schema, wanted.strict is True, schema_field)
    return AnswerFormat(grammar, field, schema_field)


def read_response_format(body: fields.GenerationRequest) -> AnswerFormat | None:
    """Return the format of a chat or completion; raises `RequestError`."""
    form, field = body.response_format, "response_format"
    wanted = form.json_schema if isinstance(form, fields.JsonSchemaResponseFormat) else form
    return read_format(wanted, body.structured_outputs, field, f"{field}.json_schema.schema")


def _structured_format(outputs: fields.StructuredOutputs) -> AnswerFormat:
    ((kind, value),) = ((name, value) for name, value in outputs if value is not None)
    field = f"structured_outputs.{kind}".removesuffix("_schema")
    return AnswerFormat(GRAMMARS[kind](value, param=field), "structured_outputs", field)
