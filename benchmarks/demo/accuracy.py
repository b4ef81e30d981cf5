"""Asks the demo model the held-back questions, and prints how many of each kind and language it answers rightly.

    python benchmarks/demo/accuracy.py                  # the committed weights
    python benchmarks/demo/accuracy.py FOLDER           # others with the same tokens
    python benchmarks/demo/accuracy.py --failures 5     # with up to five wrong answers of each kind and language

Answers are greedy and must end by themselves. At the end: the questions that it could have answered and declined, and
the share of the tokens it read or wrote last that mu sent to another expert than their own.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from pathlib import Path

import torch

from pyllm.benchmarks.demo.checkers import Question, declines, is_right, read_questions
from pyllm.engine.llm import LLM
from pyllm.engine.messages import SamplingParams
from pyllm.server.chat.conversation import Message, Tool
from pyllm.server.chat.template import ChatTemplate
from pyllm.server.flags import DEMO_FOLDER

MAX_TOKENS = 160
SHOWN = 120  # characters of a wrong answer
Answer = tuple[Question, str, bool]
"""(question, answer, whether it is right)."""


def ask(folder: Path, questions: list[Question]) -> tuple[list[Answer], float]:
    """Answer all questions together, and return the share of re-routed choices too."""
    llm = LLM(str(folder), max_num_queued_reqs=len(questions), max_num_seqs=128, quiet=True)
    template = ChatTemplate.from_tokenizer(llm.tokenizer)
    prompts = []
    for question in questions:
        tools = [Tool(**tool["function"]) for tool in question.get("tools", ())]
        prompts.append(template.render([Message("user", question["question"])], tools=tools or None))
    params = SamplingParams(temperature=0.0, max_tokens=MAX_TOKENS, return_dynamics=True)
    answers = []
    rerouted: list[bool] = []
    for question, done in zip(questions, llm.generate(prompts, params), strict=True):
        ended = done.finish_reason == "stop"
        answers.append((question, done.text, ended and is_right(question, done.text)))
        rerouted += [choice for token in done.dynamics for choice in token.rerouted]
    return answers, sum(rerouted) / max(1, len(rerouted))


def table(answers: list[Answer]) -> list[str]:
    """The accuracy of each kind and language as Markdown."""
    groups: dict[str, dict[str, list[bool]]] = defaultdict(lambda: defaultdict(list))
    for question, _, right in answers:
        groups[question["kind"]][question["language"]].append(right)
    lines = ["| kind | English | French |", "|---|---|---|"]
    for kind, languages in groups.items():
        cells = [f"{100 * sum(rights) / len(rights):.0f} % of {len(rights)}" for rights in languages.values()]
        lines.append(f"| {' | '.join([kind, *cells])} |")
    return lines


def report(answers: list[Answer], rerouted: float) -> str:
    """The table, and the two shares below it."""
    known = [declines(text) for question, text, _ in answers if question["check"] != "unknown"]
    lines = table(answers)
    lines.append(f"\nDeclined of what it can know: {100 * sum(known) / max(1, len(known)):.1f} % of {len(known)}.")
    lines.append(f"Choices of an expert that mu changed: {100 * rerouted:.1f} %.")
    return "\n".join(lines)


def failures(answers: list[Answer], most: int) -> list[str]:
    """Up to `most` wrong answers of each kind and language."""
    shown: dict[tuple[str, str], int] = defaultdict(int)
    lines = []
    for question, text, right in answers:
        group = (question["kind"], question["language"])
        shown[group] += not right
        if not right and shown[group] <= most:
            lines.append(f"{group[0]} {group[1]}: {question['question']} -> {text[:SHOWN]}")
    return lines


def main() -> None:
    """Ask and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, nargs="?", default=DEMO_FOLDER)
    parser.add_argument("--failures", type=int, default=0, help="wrong answers to print of each kind and language")
    parser.add_argument("--kinds", nargs="*", help="only these kinds")
    parser.add_argument("--threads", type=int, default=2)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    questions = [q for q in read_questions() if not args.kinds or q["kind"] in args.kinds]
    answers, rerouted = ask(args.folder, questions)
    print(report(answers, rerouted))
    if args.failures:
        print("\nFailures:", *failures(answers, args.failures), sep="\n")


if __name__ == "__main__":
    main()
