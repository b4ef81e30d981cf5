"""`pyllm generate` and `pyllm chat`: one engine, one user, text as it is generated."""

from __future__ import annotations

import asyncio
import contextlib
import sys
from itertools import count

from ...engine.client.launch import EngineProcess
from ...engine.errors import EngineDeadError, RequestError
from ...engine.messages import SamplingParams
from ..chat.conversation import Message
from ..chat.served_model import ServedModel, load
from ..chat.template import ChatTemplateError
from ..flags import GenerateConfig, TerminalConfig

_serial = count()


def generate(config: GenerateConfig, process: EngineProcess) -> int:
    """Continue one prompt; return the exit code. Ctrl-C raises `KeyboardInterrupt`."""
    with asyncio.Runner() as runner:
        model = runner.run(load(config, process))
        try:
            text = config.prompt
            prompt = model.template.render([Message("user", text)]) if config.chat else model.tokenizer.encode(text)
            runner.run(_answer(model, prompt, _params(config, model, chat=config.chat), []))
        finally:
            runner.run(model.engine.shutdown())
    return 0


def chat(config: TerminalConfig, process: EngineProcess) -> int:
    """Chat until the end of input; Ctrl-C stops an answer, whose text so far stays in the conversation."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401 - gives input() a line editor
    # The runner is entered once per answer, so that Ctrl-C stops that answer and input() can block in between.
    with asyncio.Runner() as runner:
        model = runner.run(load(config, process))
        params = _params(config, model, chat=True)
        limit = model.engine.info.config.max_model_len
        room, truncated = config.max_tokens or limit // 4, False
        print(f"Chatting with {model.names[0]}. Ctrl-C stops an answer, Ctrl-D exits.", file=sys.stderr)
        messages: list[Message] = []
        try:
            while model.engine.is_alive and (question := _ask()) is not None:
                talk = [*messages, Message("user", question)]
                pieces: list[str] = []
                try:
                    while len(prompt := model.template.render(talk)) + room > limit and len(talk) > 1:
                        del talk[:2]
                        if not truncated:
                            print("The chat is too long for the model: dropping its oldest messages.", file=sys.stderr)
                        truncated = True
                    runner.run(_answer(model, prompt, params, pieces))
                except KeyboardInterrupt:
                    print()
                except (RequestError, ChatTemplateError) as error:
                    print(error, file=sys.stderr)
                    continue
                messages = [*talk, Message("assistant", "".join(pieces))]
        finally:
            runner.run(model.engine.shutdown())
    return 0


def _ask() -> str | None:
    """Read the next message; return None at the end of input."""
    while True:
        try:
            if words := input("> " if sys.stdin.isatty() else "").strip():
                return words
        except KeyboardInterrupt:
            print()
        except EOFError:
            return None


def _params(config: TerminalConfig, model: ServedModel, *, chat: bool) -> SamplingParams:
    asked = {name: getattr(config, name) for name in ("temperature", "top_k", "top_p", "repetition_penalty")}
    values = model.defaults | {name: value for name, value in asked.items() if value is not None}
    values |= {"max_tokens": config.max_tokens, "stop": model.template.stop_strings if chat else ()}
    return SamplingParams(**values)


async def _answer(model: ServedModel, prompt: list[int], params: SamplingParams, pieces: list[str]) -> None:
    """Print an answer as it arrives, and add its text to `pieces`; raises `RequestError` or `EngineDeadError`."""
    stream = model.engine.submit(f"terminal-{next(_serial)}", prompt, params)
    try:
        async for output in stream:
            if output.finish_reason == "error":
                raise EngineDeadError(output.error or "The engine failed.")
            pieces.append(output.text)
            print(output.text, end="", flush=True)
    finally:
        stream.abort()
    print()
