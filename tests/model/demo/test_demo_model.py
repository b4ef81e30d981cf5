"""The model that comes with the package answers, in English and French, and ends its turns."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from minijinja import Environment
from tokenizers import Tokenizer

from pyllm.model import DeepForCausalLM

DEMO = Path(__file__).resolve().parents[3] / "model" / "demo"
EOS = 0
WEATHER = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "Get the current weather in a city",
        "parameters": {"type": "object", "properties": {"city": {"type": "string"}}},
    },
}


@pytest.fixture(scope="module")
def model() -> DeepForCausalLM:
    return DeepForCausalLM.from_pretrained(DEMO)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(DEMO / "tokenizer.json"))


def render(messages: list[dict[str, Any]], **values: Any) -> str:
    template = json.loads((DEMO / "tokenizer_config.json").read_text(encoding="utf-8"))["chat_template"]
    return Environment().render_str(template, messages=messages, **values)


def answer(model: DeepForCausalLM, tokenizer: Tokenizer, messages: list[dict[str, Any]], **values: Any) -> str:
    """The greedy answer, which must end by itself."""
    prompt = tokenizer.encode(render(messages, add_generation_prompt=True, **values)).ids
    ids: list[int] = model.generate(torch.tensor(prompt), max_new_tokens=80, temperature=0.0)[len(prompt) :].tolist()
    assert ids[-1] == EOS
    return tokenizer.decode(ids)


@pytest.mark.parametrize(
    ("question", "expected"),
    [
        ("Hello!", "Hello"),
        ("What is 7+5?", "12"),
        ("How do I stream a response?", "stream=True"),
        ("Bonjour !", "Bonjour"),
        ("Combien font 7+5 ?", "12"),
        ("Comment diffuser une réponse ?", "Mettez stream=True"),
        ("Comment recevoir la réponse en streaming ?", "Mettez stream=True"),
        ("Who are you?", "demo model"),
    ],
)
def test_the_first_questions_of_a_newcomer_are_answered(
    model: DeepForCausalLM, tokenizer: Tokenizer, question: str, expected: str
) -> None:
    assert expected in answer(model, tokenizer, [{"role": "user", "content": question}])


def test_a_later_turn_is_answered_like_a_first_one(model: DeepForCausalLM, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "Hello!"}]
    messages.append({"role": "assistant", "content": answer(model, tokenizer, messages)})
    messages.append({"role": "user", "content": "What is 7+5?"})
    assert "12" in answer(model, tokenizer, messages)


def test_an_offered_tool_is_called_with_arguments_that_parse(model: DeepForCausalLM, tokenizer: Tokenizer) -> None:
    messages = [{"role": "user", "content": "What is the weather in Paris?"}]
    text = answer(model, tokenizer, messages, tools=[WEATHER])
    call = json.loads(text.removeprefix("<tool_call>").removesuffix("</tool_call>"))
    assert call == {"name": "get_weather", "arguments": {"city": "Paris"}}


def test_template_writes_each_turn_with_its_role_and_end() -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Hello!"},
        {"role": "user", "content": "Bye"},
    ]
    text = "<|system|>\nBe brief.</s>\n<|user|>\nHi</s>\n<|assistant|>\nHello!</s>\n<|user|>\nBye</s>\n"
    assert render(messages) == text
    assert render(messages, add_generation_prompt=True) == text + "<|assistant|>\n"


@pytest.mark.parametrize("arguments", [{"city": "Paris"}, '{"city": "Paris"}'])
def test_template_shows_tools_their_calls_and_their_results(arguments: Any) -> None:
    call = {"id": "a", "type": "function", "function": {"name": "get_weather", "arguments": arguments}}
    messages = [
        {"role": "user", "content": "Weather?"},
        {"role": "assistant", "content": None, "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "a", "content": "sunny"},
    ]
    text = render(messages, tools=[WEATHER])
    assert text.startswith("<|system|>\n")
    assert "get_weather(city): Get the current weather in a city\n" in text
    assert text.endswith(
        '<|user|>\nWeather?</s>\n<|assistant|>\n<tool_call>{"name": "get_weather", "arguments": {"city": "Paris"}}'
        "</tool_call></s>\n<|tool|>\nsunny</s>\n"
    )


def test_tokenizer_adds_nothing_and_splits_numbers_into_digits(tokenizer: Tokenizer) -> None:
    assert tokenizer.encode("2026").tokens == ["2", "0", "2", "6"]
    text = "Où est « l'été » ? 🙂 <tool_call>{}</tool_call>"
    assert tokenizer.decode(tokenizer.encode(text).ids) == text
    assert tokenizer.token_to_id("</s>") == EOS


def test_the_bundled_files_stay_small() -> None:
    shipped = [file for file in DEMO.iterdir() if file.suffix in (".json", ".safetensors")]
    assert sum(file.stat().st_size for file in shipped) < 25_000_000
