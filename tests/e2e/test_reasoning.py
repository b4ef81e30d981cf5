"""Models of all three chat forms that reason in real text, asked through all three APIs."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx
from support.dialogues import COUNT, FISH, HELLO, LATE, PLAIN, RED, SUM, WHO, Dialogue, both, weather
from support.reasoning_client import GREEDY, Reasoner, Said, alternate, counts, user
from support.serving import PATIENCE

SCHEMA = {
    "type": "object", "properties": {"name": {"type": "string", "maxLength": 9}, "age": {"type": "integer"}},
    "required": ["name", "age"], "additionalProperties": False,
}  # fmt: skip
PARIS = weather("Paris", 7, "cloudy")
RESULT = json.dumps({"temperature": 7, "sky": "cloudy"})


def said(one: Dialogue) -> Said:
    return Said(one.thought or "", one.answer, [], "stop")


def test_all_apis_tell_reasoning_from_the_answer(reasoner: Reasoner) -> None:
    """All at once, so that the tokens of many streams are interleaved."""

    async def ask(one: Dialogue) -> None:
        answers = await asyncio.gather(
            reasoner.chat([user(one.question)]), reasoner.respond(one.question), reasoner.message([user(one.question)])
        )
        assert answers == [said(one)] * 3
        chat, response, message = map(counts, answers)
        assert chat == response
        assert chat[:2] == message[:2]
        assert chat[2] == (reasoner.tokens_of(one.thought) if one not in (HELLO, COUNT, LATE) else chat[2])

    reasoner.run(*map(ask, PLAIN))


def test_an_answer_that_is_cut_at_any_token(reasoner: Reasoner) -> None:
    """Inside the reasoning, inside a mark, inside a character: what is shown is a beginning of the whole."""
    for one in (SUM, FISH):
        thoughts, answers = [one.thought or ""], [one.answer or ""]
        if reasoner.form.name == "tags":  # what may have become a mark has become text
            thoughts, answers = [f"{one.thought}\n</think>"], [f"{one.answer}\n</final>", "<think>", "<final>"]
        total = counts(reasoner.run(reasoner.chat([user(one.question)]))[0])[1]
        lengths = range(1, total)
        cuts = reasoner.run(*(reasoner.chat([user(one.question)], max_tokens=n) for n in lengths))
        last = 0
        for length, cut in zip(lengths, cuts, strict=True):
            assert cut.finish == "length"
            assert any(text.startswith(cut.reasoning) for text in thoughts)
            assert any(text.startswith(cut.content or "") for text in answers)
            assert cut.content is None or cut.reasoning in ("", one.thought)
            _, completion, reasoning = counts(cut)
            assert completion == length
            assert reasoning is not None
            assert reasoning - last in (0, 1)
            last = reasoning
        assert last == reasoner.tokens_of(one.thought or "")


def test_limits_inside_reasoning_in_the_other_apis(reasoner: Reasoner) -> None:
    length = len("<think>\n2") if reasoner.form.name == "tags" else 3
    response, message = reasoner.run(
        reasoner.respond(SUM.question, max_output_tokens=length),
        reasoner.message([user(SUM.question)], max_tokens=length),
    )
    assert response.finish == message.finish == "length"
    assert response.content is message.content is None
    assert SUM.thought is not None
    assert SUM.thought.startswith(response.reasoning)
    assert response.whole["incomplete_details"] == {"reason": "max_output_tokens"}


def test_stop_strings_end_the_answer_but_not_the_reasoning(reasoner: Reasoner) -> None:
    chat, message = reasoner.run(
        reasoner.chat([user(RED.question)], stop=[" stop"]),
        reasoner.message([user(RED.question)], stop_sequences=[" stop"]),
    )
    assert chat == message == Said(RED.thought or "", "Red, and I", [], "stop")
    assert chat.whole["choices"][0]["stop_reason"] == " stop"
    assert message.whole["stop_sequence"] == " stop"


def test_two_streams_read_in_turns(reasoner: Reasoner) -> None:
    """Neither stream sees any of the other's text."""
    with httpx.Client(base_url=reasoner.server.url, timeout=PATIENCE) as client:

        def ask(one: Dialogue) -> Any:
            body = GREEDY | {"messages": [user(one.question)], "stream": True}
            return client.stream("POST", "/v1/chat/completions", json=body)

        with ask(SUM) as first, ask(FISH) as second:
            read = alternate(first.iter_lines(), second.iter_lines())
    for lines, one in zip(read, (SUM, FISH), strict=True):
        deltas = [json.loads(line[6:])["choices"][0]["delta"] for line in lines if line.startswith("data: {")]
        assert "".join(delta.get("reasoning_content", "") for delta in deltas) == one.thought
        assert "".join(delta.get("content", "") for delta in deltas) == one.answer


OFF = [{"chat_template_kwargs": {"enable_thinking": False}}, {"reasoning_effort": "none"},
       {"thinking": {"type": "disabled"}}, {"reasoning": {"enabled": False}}]  # fmt: skip
ON = [
    {"chat_template_kwargs": {"enable_thinking": True}},
    {"reasoning_effort": "low"},
    {"thinking": {"type": "enabled"}},
]


def test_reasoning_is_switched_off_and_on(reasoner: Reasoner) -> None:
    question = [user(SUM.question)]
    off = reasoner.run(
        *(reasoner.chat(question, **fields) for fields in OFF),
        reasoner.respond(SUM.question, reasoning={"effort": "none"}),
        reasoner.message(question, thinking={"type": "disabled"}),
    )
    assert off == [Said("", SUM.answer, [], "stop")] * 6
    assert [counts(answer)[2] for answer in off] == [0, 0, 0, 0, 0, None]
    on = reasoner.run(
        *(reasoner.chat(question, **fields) for fields in ON),
        reasoner.respond(SUM.question, reasoning={"effort": "high"}),
        reasoner.message(question, thinking={"type": "enabled", "budget_tokens": 1024}),
    )
    assert on == [said(SUM)] * 5


def test_reasoning_can_be_left_out_of_the_answer(reasoner: Reasoner) -> None:
    """Its tokens count all the same."""
    question = [user(SUM.question)]
    hidden = reasoner.run(
        reasoner.chat(question, include_reasoning=False), reasoner.chat(question, reasoning={"exclude": True}),
        reasoner.respond(SUM.question, include_reasoning=False), reasoner.message(question, include_reasoning=False),
    )  # fmt: skip
    assert hidden == [Said("", SUM.answer, [], "stop")] * 4
    assert {counts(answer)[2] for answer in hidden} == {reasoner.tokens_of(SUM.thought or ""), None}
    (cut,) = reasoner.run(reasoner.chat(question, include_reasoning=False, max_tokens=10))
    assert cut.content is None or cut.content in (SUM.answer or "")


def test_structured_output_follows_the_reasoning(reasoner: Reasoner) -> None:
    question, schema = [user(WHO.question)], {"name": "person", "schema": SCHEMA}
    answers = reasoner.run(
        reasoner.chat(question, response_format={"type": "json_schema", "json_schema": schema}),
        reasoner.respond(WHO.question, text={"format": {"type": "json_schema"} | schema}),
        reasoner.message(question, output_config={"format": {"type": "json_schema", "schema": SCHEMA}}),
        reasoner.chat(question, structured_outputs={"regex": r"\{.*\}"}),
    )
    assert answers == [said(WHO)] * 4
    (forced,) = reasoner.run(reasoner.chat([user(SUM.question)], structured_outputs={"choice": ["no", "It is 5."]}))
    assert forced == said(SUM)


def test_two_turns_of_an_agent_in_chats(reasoner: Reasoner) -> None:
    async def both_turns(**fields: Any) -> None:
        question = user(PARIS.question)
        called = await reasoner.chat([question], tools=reasoner.tools(), **fields)
        named = isinstance(fields.get("tool_choice"), dict)
        expected = Said(
            PARIS.thought or "", None, [("get_weather", '{"city": "Paris"}')], "stop" if named else "tool_calls"
        )
        assert called == expected
        message = called.whole["choices"][0]["message"]
        (call,) = message["tool_calls"]
        result = {"role": "tool", "tool_call_id": call["id"], "content": RESULT}
        answer = await reasoner.chat([question, message, result], tools=reasoner.tools())
        assert answer == Said(PARIS.after, PARIS.answer, [], "stop")

    forced = {"type": "function", "function": {"name": "get_weather"}}
    reasoner.run(both_turns(), both_turns(tool_choice="required"), both_turns(tool_choice=forced),
                 both_turns(parallel_tool_calls=False), both_turns(stop=["I look"]))  # fmt: skip


def test_two_turns_of_an_agent_in_responses(reasoner: Reasoner) -> None:
    (called,) = reasoner.run(reasoner.respond(PARIS.question, tools=reasoner.tools("responses")))
    assert called == Said(PARIS.thought or "", None, [("get_weather", '{"city": "Paris"}')], "tool_calls")
    output = called.whole["output"]
    result = {"type": "function_call_output", "call_id": output[-1]["call_id"], "output": RESULT}
    answers = reasoner.run(
        reasoner.respond([user(PARIS.question), *output, result], tools=reasoner.tools("responses")),
        reasoner.respond([result], previous_response_id=called.whole["id"], tools=reasoner.tools("responses")),
    )
    assert answers == [Said(PARIS.after, PARIS.answer, [], "stop")] * 2
    assert len({counts(answer) for answer in answers}) == 1


def test_two_turns_of_an_agent_in_messages(reasoner: Reasoner) -> None:
    question, tools = user(PARIS.question), reasoner.tools("messages")
    choices = [{}, {"tool_choice": {"type": "any"}}, {"tool_choice": {"type": "tool", "name": "get_weather"}}]
    called = reasoner.run(*(reasoner.message([question], tools=tools, **choice) for choice in choices))
    assert called == [Said(PARIS.thought or "", None, [("get_weather", '{"city": "Paris"}')], "tool_calls")] * 3
    content = called[0].whole["content"]
    assert [block["type"] for block in content] == ["thinking", "tool_use"]
    result = {"type": "tool_result", "tool_use_id": content[-1]["id"], "content": RESULT}
    history = [question, {"role": "assistant", "content": content}, user([result])]  # type: ignore[arg-type]
    (answer,) = reasoner.run(reasoner.message(history, tools=tools))
    assert answer == Said(PARIS.after, PARIS.answer, [], "stop")


def test_two_calls_at_once(reasoner: Reasoner) -> None:
    one, calls = both(), [("get_weather", '{"city": "Paris"}'), ("get_weather", '{"city": "Oslo"}')]
    answers = reasoner.run(
        reasoner.chat([user(one.question)], tools=reasoner.tools()),
        reasoner.chat([user(one.question)], tools=reasoner.tools(), tool_choice="required"),
        reasoner.respond(one.question, tools=reasoner.tools("responses")),
        reasoner.message([user(one.question)], tools=reasoner.tools("messages")),
    )
    assert answers == [Said(one.thought or "", None, calls, "tool_calls")] * 4
    message = answers[0].whole["choices"][0]["message"]
    results = [{"role": "tool", "tool_call_id": call["id"], "content": RESULT} for call in message["tool_calls"]]
    (last,) = reasoner.run(reasoner.chat([user(one.question), message, *results], tools=reasoner.tools()))
    assert last == Said(one.after, one.answer, [], "stop")


def test_a_call_that_is_cut_off_is_no_answer(reasoner: Reasoner) -> None:
    question, tools = [user(PARIS.question)], reasoner.tools()
    total = counts(reasoner.run(reasoner.chat(question, tools=tools))[0])[1]
    for cut in reasoner.run(*(reasoner.chat(question, tools=tools, max_tokens=total - n) for n in (6, 9, 12))):
        assert (cut.reasoning, cut.content, cut.finish) == (PARIS.thought, None, "length")


def test_each_of_several_choices_has_its_reasoning(reasoner: Reasoner) -> None:
    choices, drawn = reasoner.run(
        reasoner.choices([user(SUM.question)], n=3), reasoner.choices([user(SUM.question)], n=2, temperature=1, seed=4)
    )
    assert choices == [said(SUM)] * 3
    assert all(choice.reasoning and choice.finish for choice in drawn)
    one, three = (counts(choices[0]), reasoner.tokens_of(SUM.thought or ""))
    assert one[2] == 3 * three


def test_logprobs_are_those_of_the_tokens(reasoner: Reasoner) -> None:
    question, body = [user(FISH.question)], {"logprobs": True, "top_logprobs": 1, "return_token_ids": True}

    async def entries(**fields: Any) -> tuple[list[Any], list[int], str]:
        answers = await reasoner.post("/v1/chat/completions", {"messages": question} | body | fields)
        choices = [choice for answer in answers for choice in answer["choices"]]
        found = [entry for choice in choices if choice["logprobs"] for entry in choice["logprobs"]["content"]]
        ids = [id_ for choice in choices for id_ in choice.get("token_ids") or ()]
        texts = [choice.get("message", choice.get("delta")) for choice in choices]
        return found, ids, "".join(text.get("reasoning", "") + (text.get("content") or "") for text in texts)

    whole, streamed = reasoner.run(entries(), entries(stream=True))
    assert whole == streamed
    found, ids, shown = whole
    assert len(found) == len(ids)
    for entry, id_ in zip(found, ids, strict=True):
        assert entry["logprob"] == entry["top_logprobs"][0]["logprob"]
        if entry["bytes"]:
            assert bytes(entry["bytes"]) == reasoner.tokenizer.token_bytes(id_)
    text = bytes(byte for entry in found for byte in entry["bytes"] or ()).decode()
    for mark in ("<think>\n", "\n</think>\n<final>\n", "\n</final>"):
        text = text.replace(mark, "")
    assert text == shown
    include = {"include": ["message.output_text.logprobs"]}
    (response,) = reasoner.run(reasoner.respond(FISH.question, **include))
    logprobs = response.whole["output"][-1]["content"][0]["logprobs"]
    assert bytes(byte for entry in logprobs for byte in entry["bytes"]).decode() == FISH.answer


def test_earlier_reasoning_is_left_out_of_the_prompt(reasoner: Reasoner) -> None:
    before = [user(SUM.question), {"role": "assistant", "content": SUM.answer}, user(RED.question)]
    thoughts = {"reasoning_content": "secret", "reasoning": "secret"}
    block = {"type": "thinking", "thinking": "secret", "signature": "x"}
    content = [block, {"type": "redacted_thinking", "data": "x"}, {"type": "text", "text": SUM.answer}]
    item = {"type": "reasoning", "id": "rs_1", "summary": [], "content": [{"type": "reasoning_text", "text": "secret"}]}
    answers = reasoner.run(
        reasoner.chat(before), reasoner.chat([before[0], before[1] | thoughts, before[2]]),
        reasoner.chat([before[0], before[1] | {"content": f"<think>\nsecret\n</think>\n{SUM.answer}"}, before[2]]),
        reasoner.respond(before), reasoner.respond([before[0], item, *before[1:]]),
        reasoner.message(before), reasoner.message([before[0], {"role": "assistant", "content": content}, before[2]]),
    )  # fmt: skip
    assert answers == [said(RED)] * 7
    assert len({counts(answer)[0] for answer in answers}) == 1


def test_an_answer_is_continued(reasoner: Reasoner) -> None:
    """In the words after the reasoning; where marks are plain text, in the reasoning too."""
    question = user(SUM.question)
    fields = {"continue_final_message": True}
    if reasoner.form.name == "tags":
        thinking = {"role": "assistant", "content": "<think>\n2 and"}
        inside = reasoner.run(reasoner.chat([question, thinking], **fields), reasoner.message([question, thinking]))
        assert inside == [Said(" 3 make 5.", SUM.answer, [], "stop")] * 2
        final = {"role": "assistant", "content": f"<think>\n{SUM.thought}\n</think>\n<final>\nIt is"}
    else:
        final = {"role": "assistant", "content": "It is"}
    chat, message = reasoner.run(reasoner.chat([question, final], **fields), reasoner.message([question, final]))
    assert chat == message == Said("", " 5.", [], "stop")


def test_a_response_has_a_summary_if_one_is_requested(reasoner: Reasoner) -> None:
    for kind in ("auto", "detailed"):
        (summed,) = reasoner.run(reasoner.respond(SUM.question, reasoning={"summary": kind}))
        assert summed == said(SUM)
        thoughts = summed.whole["output"][0]
        assert thoughts["summary"] == [{"type": "summary_text", "text": SUM.thought}]
        assert thoughts["content"] == []
        assert summed.whole["reasoning"]["summary"] == kind
        assert summed.whole["ignored"] is None
    answer = httpx.post(f"{reasoner.server.url}/v1/responses", json={"input": "Hi", "reasoning": {"summary": "long"}})
    assert answer.status_code == 400
    assert answer.json()["error"]["param"] == "reasoning.summary"
