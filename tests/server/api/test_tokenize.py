"""`POST /tokenize` and `POST /detokenize`, in vLLM's shapes."""

from __future__ import annotations

import json

import pytest
from tokenizers import Regex, pre_tokenizers

from pyllm.server.api.tokenize import DetokenizeAnswer, TokenizeAnswer

CONTEXT = 200
HI = [{"role": "user", "content": "Hi"}]


def tokenize(harness, **fields):
    response = harness.post("/tokenize", fields)
    assert response.status_code == 200, response.text
    return TokenizeAnswer.model_validate_json(response.content)


def detokenize(harness, tokens):
    response = harness.post("/detokenize", {"tokens": tokens})
    assert response.status_code == 200, response.text
    return DetokenizeAnswer.model_validate_json(response.content).prompt


def test_a_prompt_has_the_tokens_that_completions_read(harness):
    answer = tokenize(harness, model="alias", prompt="né")
    assert answer.tokens == harness.tokenizer.encode("né")
    assert (answer.count, answer.max_model_len, answer.token_strs) == (3, CONTEXT, None)
    for special in (True, False, None):
        read = harness.complete(prompt="né", add_special_tokens=special, return_token_ids=True).json()["choices"][0]
        assert tokenize(harness, prompt="né", add_special_tokens=special).tokens == read["prompt_token_ids"]


def test_the_text_of_each_token_is_given_if_asked_for(harness):
    assert tokenize(harness, prompt="ab", return_token_strs=True, add_special_tokens=True).token_strs == [
        "<s>",
        "a",
        "b",
    ]


@pytest.mark.parametrize(
    "fields", [{}, {"add_generation_prompt": False}, {"messages": [{"role": "user", "content": "a" * 50}]}]
)
def test_messages_have_the_tokens_that_chat_completions_read(harness, fields):
    answer = tokenize(harness, **({"messages": HI} | fields))
    read = harness.chat(**fields, return_token_ids=True).json()["prompt_token_ids"]
    assert answer.tokens == read
    assert answer.count == len(read)


def test_texts_longer_than_the_context_are_counted(harness):
    assert tokenize(harness, prompt="x" * 100_000, return_token_strs=True).count == 100_000
    assert tokenize(harness, messages=[{"role": "user", "content": "x" * 9000}]).count > 9000
    assert tokenize(harness, prompt="").tokens == []


def test_tools_and_the_end_of_messages_count_as_in_a_chat(harness):
    tools = [{"type": "function", "function": {"name": "f"}}]
    talk = [*HI, {"role": "assistant", "content": "And"}]
    cases = [{"tools": tools}, {"messages": talk, "continue_final_message": True}]
    for fields in cases:
        read = harness.chat(**fields, return_token_ids=True).json()["prompt_token_ids"]
        assert tokenize(harness, **({"messages": HI} | fields)).tokens == read
    assert tokenize(harness, messages=HI, tools=tools).count > tokenize(harness, messages=HI).count


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({}, "prompt"),
        ({"prompt": None}, "prompt"),
        ({"prompt": "a", "messages": HI}, "messages"),
        ({"prompt": "a", "tools": []}, "tools"),
        ({"prompt": "a", "add_generation_prompt": True}, "add_generation_prompt"),
        ({"prompt": "a", "chat_template_kwargs": {}}, "chat_template_kwargs"),
        ({"messages": HI, "add_special_tokens": True}, "add_special_tokens"),
        ({"messages": []}, "messages"),
        ({"messages": [{"role": "user"}]}, "messages[0].content"),
        ({"prompt": ["a"]}, "prompt"),
        ({"prompt": "a", "other": 1}, "other"),
    ],
)
def test_a_refusal_names_the_field(harness, fields, param):
    response = harness.post("/tokenize", fields)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param


def test_ids_go_back_to_their_text(harness):
    text = "Grüße <s>🎉"
    assert detokenize(harness, harness.tokenizer.encode(text)) == text
    assert detokenize(harness, [2, *harness.tokenizer.encode("a"), 0]) == "<s>a</s>", "special tokens are shown"
    assert detokenize(harness, []) == ""
    assert detokenize(harness, harness.tokenizer.encode("x" * 9000)) == "x" * 9000


@pytest.mark.parametrize("tokens", [[-1], [259], [2**31], ["a"], [1.5], "a", None])
def test_ids_outside_the_vocabulary_are_refused(harness, tokens):
    response = harness.post("/detokenize", {"tokens": tokens})
    assert response.status_code == 400
    assert response.json()["error"]["param"].startswith("tokens")


@pytest.mark.parametrize(("path", "fields"), [("/tokenize", {"prompt": "a"}), ("/detokenize", {"tokens": [5]})])
def test_an_unknown_model_is_a_404(harness, path, fields):
    response = harness.post(path, {"model": "other"} | fields)
    assert (response.status_code, response.json()["error"]["code"]) == (404, "model_not_found")


def test_a_key_is_needed(make_harness):
    harness = make_harness(api_key=("secret",))
    assert harness.post("/tokenize", {"prompt": "a"}).status_code == 401
    assert harness.post("/detokenize", {"tokens": [5]}).status_code == 401


@pytest.mark.parametrize(
    ("path", "fields", "param"),
    [
        ("/tokenize", {"prompt": "HARD"}, "prompt"),
        ("/tokenize", {"messages": [{"role": "user", "content": "HARD"}]}, "messages"),
        ("/v1/completions", {"prompt": "HARD"}, "prompt"),
        ("/v1/completions", {"prompt": "HARD", "truncate_prompt_tokens": 9}, "prompt"),
        ("/v1/embeddings", {"input": "HARD"}, "input"),
        ("/v1/embeddings", {"input": ["a", "HARD"], "truncate_prompt_tokens": 9}, "input"),
        ("/v1/responses", {"input": "HARD"}, "input"),
        ("/v1/completions", {"prompt": "a", "bad_words": ["HARD"]}, "bad_words"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "HARD"}]}, "messages"),
    ],
)
def test_a_text_that_the_tokenizer_gives_up_on_is_refused(harness, path, fields, param):
    expression = pre_tokenizers.Split(Regex("(a+)+$"), "isolated")
    harness.tokenizer._library.pre_tokenizer = pre_tokenizers.Sequence([expression, pre_tokenizers.ByteLevel()])
    body = json.loads(json.dumps(fields).replace("HARD", "a" * 40 + "!"))
    response = harness.post(path, body)
    assert response.status_code == 400
    assert response.json()["error"]["param"] == param
    assert "takes too many steps" in response.json()["error"]["message"]
