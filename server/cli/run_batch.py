"""`pyllm run-batch`: answers every line of a file in OpenAI's batch format, without a server."""

from __future__ import annotations

import asyncio
import contextlib
import os
import sys
from pathlib import Path
from typing import BinaryIO

from ...engine.client.launch import EngineProcess
from ...engine.config import settings_of
from ...engine.errors import EngineDeadError
from ..api.batches.lines import LineError, answer_row, custom_id_of, error_row, execute, parse_line, read_lines
from ..app import create_app
from ..chat.served_model import ServedModel, load
from ..flags import ConfigError, ModelFlags, RunBatchConfig, ServerConfig
from ..service import Service

STANDARD = "-"  # the name of standard input or output


def run_batch(config: RunBatchConfig, process: EngineProcess) -> int:
    """Write a row for each line, in the order in which they end; return the exit code."""
    with contextlib.ExitStack() as stack:
        source, sink = _open(config, stack)
        flags = {name: getattr(config, name) for name in settings_of(ModelFlags)}
        server = ServerConfig(**flags, served_model_name=config.served_model_name)
        with asyncio.Runner() as runner:
            model = runner.run(load(server, process, names=server.served_model_name))
            try:
                counts = runner.run(_Run(server, model, sink).answer(source))
            finally:
                runner.run(model.engine.shutdown())
    print(f"{sum(counts)} lines: {counts[0]} answered, {counts[1]} failed.", file=sys.stderr)
    return 0


def _open(config: RunBatchConfig, stack: contextlib.ExitStack) -> tuple[BinaryIO, BinaryIO]:
    """Open both files; raise `ConfigError`."""
    for flag, name in (("--input-file", config.input_file), ("--output-file", config.output_file)):
        if not name:
            raise ConfigError(f"{flag} is needed, as in: pyllm run-batch -i requests.jsonl -o answers.jsonl")
    if config.input_file != STANDARD and os.path.realpath(config.input_file) == os.path.realpath(config.output_file):
        raise ConfigError("--input-file and --output-file are the same file: the answers would replace the requests.")
    source: BinaryIO = sys.stdin.buffer
    sink: BinaryIO = sys.stdout.buffer
    try:
        if config.input_file != STANDARD:
            source = stack.enter_context(Path(config.input_file).open("rb"))  # noqa: SIM115 - the stack closes it
        if config.output_file != STANDARD:
            sink = stack.enter_context(Path(config.output_file).open("wb"))  # noqa: SIM115
    except OSError as error:
        raise ConfigError(f"{error.filename} cannot be opened: {error.strerror}.") from None
    return source, sink


class _Run:
    """Answers lines through the application that a server runs."""

    def __init__(self, config: ServerConfig, model: ServedModel, sink: BinaryIO) -> None:
        self._app = create_app(Service(config, model=model))
        self._model = model
        self._sink = sink
        self._counts = [0, 0]  # answered, failed

    async def answer(self, source: BinaryIO) -> list[int]:
        """Answer all lines, at most twice as many at a time as can run; return how many were answered and failed."""
        lines, tasks = (data for _, data in read_lines(source) if data), set[asyncio.Task[None]]()
        most = 2 * self._model.engine.info.config.max_num_seqs
        while (data := await asyncio.to_thread(next, lines, None)) is not None:
            if len(tasks) >= most:
                done, tasks = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
                for task in done:
                    task.result()
            tasks.add(asyncio.create_task(self._answer(data)))
        await asyncio.gather(*tasks)
        return self._counts

    async def _answer(self, data: bytes) -> None:
        try:
            line = parse_line(data)
        except LineError as error:
            self._write(error_row(custom_id_of(data), error, with_response=True), is_answer=False)
            return
        outcome = await execute(self._app, line, "")
        if not self._model.engine.is_alive:
            raise EngineDeadError(self._model.engine.error or "The engine has stopped.")
        self._write(answer_row(line.custom_id, outcome), is_answer=outcome.status < 400)

    def _write(self, row: bytes, *, is_answer: bool) -> None:
        self._sink.write(row)
        self._sink.flush()
        self._counts[not is_answer] += 1
