"""Grammars of llama.cpp's kind: what they let be written."""

from __future__ import annotations

import contextlib
import time

import pytest
from support.grammars import accepts

from pyllm.engine.errors import RequestError
from pyllm.server.chat.structured_output import choice_grammar, lark_grammar, regex_grammar

JSON = r"""
# The grammar that llama.cpp ships, with all that it needs.
root   ::= object
value  ::= object | array | string | number | ("true" | "false" | "null") ws

object ::=
  "{" ws (
            string ":" ws value
    ("," ws string ":" ws value)*
  )? "}" ws

array  ::= "[" ws ( value ("," ws value)* )? "]" ws

string ::=
  "\"" (
    [^"\\\x7F\x00-\x1F] |
    "\\" (["\\bfnrt] | "u" [0-9a-fA-F]{4}) # escapes
  )* "\"" ws

number ::= ("-"? ([0-9] | [1-9] [0-9]{0,15})) ("." [0-9]+)? ([eE] [-+]? [0-9] [1-9]{0,15})? ws
ws ::= | " " | "\n" [ \t]{0,20}
"""
CASES: dict[str, tuple[list[str], list[str]]] = {
    JSON: (['{"a": [1,2.5e3, {"b":null}]}', "{}", '{ "x\\n":"\\u00e9"}'], ['{"a":}', "[1]", "{,}"]),
    'root ::= "ab" "c" | "a" "bd" | [^a-z]{2,3} .?': (["abc", "abd", "ABCx", "AB"], ["A", "ab"]),
    'root ::= ("x" | y){2,} "\\u00e9\\x21\\"\\\\"\ny ::= [\\]a-c\\-]': (['xxé!"\\', 'x]b-é!"\\'], ['xé!"\\', "xx"]),
    'root ::= item+\nitem ::= "- " [^\\n]+ "\\n"': (["- a\n- b\n"], ["- \n", ""]),
    'root ::= expr\nexpr ::= term ("+" term)*\nterm ::= [0-9]+ | "(" expr ")"': (["1+(2+33)"], ["1+", "(1"]),
    'root ::= "yes" |\n "no"': (["yes", "no"], ["y"]),
    'root ::= a-b | "/"\na-b ::= "" "x"?': (["", "x", "/"], ["xx"]),
    'root ::= "a" root | "b"': (["aab", "b"], ["a"]),
    'start: "Lark"\n// x ::= "y"': (["Lark"], ["y"]),
}


@pytest.mark.parametrize("grammar", CASES)
def test_a_gbnf_grammar_means_what_llama_cpp_means(grammar: str) -> None:
    right, wrong = CASES[grammar]
    translated = lark_grammar(grammar)
    assert {text: accepts(translated, text) for text in right + wrong} == {
        text: text in right for text in right + wrong
    }


@pytest.mark.parametrize(
    ("grammar", "words"),
    [
        ("root ::= x", "no rule named x"),
        ('x ::= "a"', "no rule named root"),
        ('root ::= ("a"', "unclosed '('"),
        ('root ::= "a")', "line 1 has a ')'"),
        ('root ::= "a"\n  <think>', "line 2 has '<'"),
        ("root ::= [z-a]", "range z-a"),
        ("root ::= *", "repeats nothing"),
        ('root ::= "a"\nroot ::= "b"', "defines root again"),
        ('root ::= "\\ud800"', "not a character"),
        ("root ::= " + "(" * 1000, "too deep"),
    ],
)
def test_a_wrong_gbnf_grammar_is_refused_with_its_line(grammar: str, words: str) -> None:
    with pytest.raises(RequestError, match="GBNF") as caught:
        lark_grammar(grammar, "structured_outputs.grammar")
    assert words in str(caught.value)
    assert caught.value.param == "structured_outputs.grammar"


def test_a_long_chain_of_rules_is_translated_at_once() -> None:
    chain = "root ::= r0\n" + "".join(f"r{n} ::= r{n + 1}\n" for n in range(3000)) + 'r3000 ::= "x"'
    started = time.process_time()
    lark_grammar(chain)
    assert time.process_time() - started < 2


@pytest.mark.parametrize(
    "text",
    ['root ::= "a"{1,' + " " * 50_000 + "x", "root ::= [" + "ab" * 30_000 + "]", "root ::= [" + "a-b" * 20_000 + "]",
     "root ::= a" + " " * 50_000, "root ::= " + "a\n" * 30_000, 'root ::= "' + "\\n" * 30_000,
     "root ::= [" + "\\" * 50_000],
    ids=["repeat", "set", "ranges", "spaces", "names", "text", "escapes"],
)  # fmt: skip
def test_translating_takes_linear_time(text: str) -> None:
    started = time.process_time()
    with contextlib.suppress(RequestError):
        lark_grammar(text)
    assert time.process_time() - started < 5, "the first of them took minutes"


def test_choices_and_expressions_are_not_gbnf() -> None:
    assert accepts(choice_grammar(["root ::= x", "b"]), "root ::= x")
    assert accepts(regex_grammar("a\nroot ::= x"), "a\nroot ::= x")
