"""`pyllm chat` and `pyllm generate` with a running server: keys on a real terminal (tmux), and text from a pipe."""

from __future__ import annotations

import contextlib
import json
import os
import shlex
import stat
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from support.serving import PATIENCE, ServerProcess, environment, wait_for

MARKDOWN = """# Title

Some **bold** text, `code` and a List<String>,
on two lines.

1. one

2. two

| a | b |
|---|---|
| 1 | 2 |

```python
x = 1  # **not bold**
```
The \x1b[31mlast."""


class Scripted(ThreadingHTTPServer):
    """A server like OpenAI's that gives the answer `replies` has for the last message, or repeats that message."""

    daemon_threads = True

    def __init__(self) -> None:
        self.bodies: list[dict[str, Any]] = []  # of chats
        self.replies: dict[str, str] = {}
        self.most_messages = 1000  # more are answered with a 400
        self.tokens = 0  # that each answer and its prompt take together, as it says
        self.silent = threading.Event()  # after its first piece an answer to "wait" comes only when this is set
        super().__init__(("127.0.0.1", 0), Handler)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Scripted

    def log_message(self, format: str, *args: Any) -> None: ...

    def answer(self, status: int, body: bytes, kind: str = "application/json") -> None:
        self.send_response(status)
        self.send_header("content-type", kind)
        self.end_headers()
        self.wfile.write(body)

    def do_GET(self) -> None:
        self.answer(200, b'{"data": [{"id": "first", "max_model_len": 100000}, {"id": "second"}]}')

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        self.server.bodies.append(body)
        if len(body["messages"]) > self.server.most_messages:
            self.answer(400, b'{"error": {"message": "Too long.", "code": "context_length_exceeded"}}')
            return
        asked = body["messages"][-1]["content"]
        text = self.server.replies.get(asked, f"You say {asked}")
        self.answer(200, b"", "text/event-stream")
        with contextlib.suppress(ConnectionError):  # the answer was stopped
            for n in range(0, len(text), 7):
                event = {"choices": [{"delta": {"content": text[n : n + 7]}}]}
                self.wfile.write(f"data: {json.dumps(event)}\n\n".encode())
                self.wfile.flush()
                if asked == "wait":
                    self.server.silent.wait(PATIENCE)
            usage = {"choices": [], "usage": {"total_tokens": self.server.tokens}}
            self.wfile.write(f"data: {json.dumps(usage)}\n\ndata: [DONE]\n\n".encode())


@pytest.fixture
def scripted() -> Iterator[Scripted]:
    with Scripted() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.silent.set()
            server.shutdown()
            thread.join()


class Terminal:
    """A terminal of 100 by 40 characters in which `pyllm chat` runs."""

    def __init__(self, folder: Path, *words: str) -> None:
        socket = folder / f"tmux{len(list(folder.iterdir()))}"  # a server that ends keeps its own for a moment
        self._tmux = ["tmux", "-S", str(socket), "-f", "/dev/null"]
        command = shlex.join([sys.executable, "-m", "pyllm", "chat", *words])
        variables = environment() | {"XDG_STATE_HOME": str(folder / "state"), "TERM": "screen", "LANG": "C.UTF-8"}
        subprocess.run(
            [*self._tmux, "new-session", "-d", "-x", "100", "-y", "40", f"{command}; echo CODE $?; cat"],
            check=True, env=variables,
        )  # fmt: skip
        self.wait("Ctrl-D leaves.", "> ")

    def tmux(self, *words: str) -> str:
        return subprocess.run([*self._tmux, *words], check=True, capture_output=True, text=True).stdout

    @property
    def lines(self) -> list[str]:
        """What is on the screen, with long lines whole, without blank ones."""
        return [line.rstrip() for line in self.tmux("capture-pane", "-p", "-J").splitlines() if line.strip()]

    def wait(self, *ends: str) -> None:
        """Wait until the last lines end with these texts; an empty prompt is `> `."""
        wanted = [end.rstrip() for end in ends]

        def shown() -> bool:
            last = self.lines[-len(wanted) :]
            return len(last) == len(wanted) and all(map(str.endswith, last, wanted))

        try:
            wait_for(shown, f"{ends} on the terminal")
        except AssertionError as error:
            raise AssertionError("\n".join([str(error), *self.lines])) from None

    def press(self, *keys: str) -> None:
        """Press keys by tmux's names; other texts are typed."""
        self.tmux("send-keys", *keys)

    def paste(self, text: str) -> None:
        """Paste as a terminal does for a program that has asked for brackets around what is pasted."""
        self.tmux("set-buffer", text)
        self.tmux("paste-buffer", "-p")


@pytest.fixture
def terminal_of(tmp_path: Path, scripted: Scripted) -> Iterator[Callable[..., Terminal]]:
    terminals: list[Terminal] = []

    def terminal_of(*words: str) -> Terminal:
        if terminals:
            terminals.pop().tmux("kill-server")
        terminals.append(Terminal(tmp_path, *(words or ("--base-url", scripted.url))))
        return terminals[0]

    yield terminal_of
    for terminal in terminals:
        terminal.tmux("kill-server")


def asked(scripted: Scripted) -> list[str]:
    return [body["messages"][-1]["content"] for body in scripted.bodies]


def test_pasted_and_typed_lines_are_one_question(scripted: Scripted, terminal_of: Callable[..., Terminal]) -> None:
    terminal = terminal_of()
    terminal.paste("one\ntwo\nthree\n")
    terminal.wait("> one", "  two", "  three")
    terminal.press("Enter")
    terminal.wait("You say one", "two", "three", "> ")
    terminal.press("four", "Escape", "Enter", "five", "M-Enter", "six", "BSpace", "Enter")
    terminal.wait("You say four", "five", "si", "> ")
    assert asked(scripted) == ["one\ntwo\nthree", "four\nfive\nsi"]


def test_lines_pasted_during_an_answer_are_one_question(
    scripted: Scripted, terminal_of: Callable[..., Terminal]
) -> None:
    scripted.replies["wait"] = "Partial answer"
    long = " ".join(["word"] * 1500)
    terminal = terminal_of()
    terminal.press("wait", "Enter")
    terminal.wait("Partial")
    terminal.paste(f"one\n{long}\ntwo\n")
    terminal.press("three")
    scripted.silent.set()
    terminal.wait("  three")
    terminal.press("Enter")
    wait_for(lambda: len(scripted.bodies) == 2, "the second question")
    assert asked(scripted) == ["wait", f"one\n{long}\ntwo\nthree"]


def test_earlier_questions_survive_a_restart(
    scripted: Scripted, terminal_of: Callable[..., Terminal], tmp_path: Path
) -> None:
    terminal = terminal_of()
    terminal.press("The first", "Enter")
    terminal.wait("You say The first", "> ")
    terminal.paste("The\nsecond")
    terminal.press("Enter")
    terminal.wait("You say The", "second", "> ")
    terminal.press("C-d")
    terminal.wait("CODE 0")
    terminal = terminal_of()
    terminal.press("Up")
    terminal.wait("> The", "  second")
    terminal.press("Up", "Up", "Enter")
    terminal.wait("You say The first", "> ")
    assert asked(scripted) == ["The first", "The\nsecond", "The first"]
    history = tmp_path / "state" / "pyllm" / "chat_history"
    assert [stat.S_IMODE(path.stat().st_mode) for path in (history, history.parent)] == [0o600, 0o700]


def test_ctrl_c_stops_an_answer_and_clears_a_line(scripted: Scripted, terminal_of: Callable[..., Terminal]) -> None:
    scripted.replies["wait"] = "Partial answer"
    terminal = terminal_of()
    terminal.press("wait", "Enter")
    terminal.wait("Partial")
    terminal.press("C-c")
    terminal.wait("Partial", "> ")
    terminal.press("half a line", "C-c")
    terminal.wait("> half a line", "> ")
    terminal.press("next", "Enter")
    terminal.wait("You say next", "> ")
    assert [message["content"] for message in scripted.bodies[-1]["messages"]] == ["wait", "Partial", "next"]
    terminal.press("C-d")
    terminal.wait("CODE 0")


def test_an_answer_is_drawn_as_markdown(scripted: Scripted, terminal_of: Callable[..., Terminal]) -> None:
    scripted.replies["?"] = MARKDOWN
    terminal = terminal_of()
    terminal.press("?", "Enter")
    terminal.wait("[31mlast.", "> ")
    shown = terminal.lines
    text = "\n".join(shown)
    for there in ("Some bold text, code and a List<String>,", "on two lines.", " 1 one", " 2 two", "**not bold**"):
        assert there in text
    for gone in ("**bold**", "```", "`code`", "|---", "# Title"):
        assert gone not in text
    assert text.count("Title") == text.count("one") == text.count("x = 1") == 1
    scripted.replies["long"] = "Lines\n\n```\n" + "\n".join(f"line {n}" for n in range(100)) + "\n```\n\nIt ends."
    terminal.press("long", "Enter")
    terminal.wait("line 98", "line 99", "It ends.", "> ")
    whole = [line.strip() for line in terminal.tmux("capture-pane", "-p", "-S", "-1000").splitlines()]
    assert [whole.count(f"line {n}") for n in range(100)] == [1] * 100


def test_commands_change_the_chat(scripted: Scripted, terminal_of: Callable[..., Terminal], tmp_path: Path) -> None:
    terminal = terminal_of("--base-url", scripted.url, "--model", "second", "--system", "Be brief.")
    for line, *says in [
        ("/help", "Ctrl-R searches."),
        ("/sytem x", "did you mean /system? /help lists the commands; to send this text, put a space first."),
        ("/retry", "There is no question to ask again."),
        ("/set temperature 3", "/set temperature must be a number between 0 and 2, but got '3'."),
        ("/set temprature 1", "but not temprature; did you mean temperature?"),
        ("/set temperature 0.5", "temperature 0.5, top_k default, top_p default, repetition_penalty default"),
        ("Hi", "You say Hi"),
        ("/system Be kind.", "System prompt: Be kind."),
        ("/retry", "You say Hi"),
        (f"/save {tmp_path}/chat", "Saved 2 messages to", "/chat."),
        (f"/save {tmp_path}/state", "exists and is not a saved chat: choose another name."),
        ("/clear", "the system prompt and the settings stay."),
        (" /etc/hosts?", "You say /etc/hosts?"),
        (f"/load {tmp_path}/none", "cannot be read: No such file or directory."),
        (f"/load {tmp_path}/chat", "Loaded 2 messages from", "/chat."),
        ("More", "You say More"),
    ]:
        terminal.press("-l", line)
        terminal.press("Enter")
        terminal.wait(says[-1], "> ")
    talks = [[f"{m['role'][0]}: {m['content']}" for m in body["messages"]] for body in scripted.bodies]
    assert talks == [
        ["s: Be brief.", "u: Hi"],
        ["s: Be kind.", "u: Hi"],
        ["s: Be kind.", "u: /etc/hosts?"],
        ["s: Be kind.", "u: Hi", "a: You say Hi", "u: More"],
    ]
    assert {(body["model"], body["temperature"]) for body in scripted.bodies} == {("second", 0.5)}
    assert "top_k" not in scripted.bodies[0]
    assert stat.S_IMODE((tmp_path / "chat").stat().st_mode) == 0o600
    terminal.press("/quit", "Enter")
    terminal.wait("CODE 0")


def chat(typed: str, *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "pyllm", *words], input=typed, capture_output=True, text=True, timeout=PATIENCE,
        env=environment(), check=False,
    )  # fmt: skip


def test_a_long_chat_drops_its_oldest_turns(scripted: Scripted) -> None:
    scripted.most_messages = 4
    done = chat("a\nb\nc\nd\n", "chat", "--base-url", scripted.url, "--system", "S")
    assert done.stdout == "You say a\nYou say b\nYou say c\nYou say d\n"
    assert done.stderr.count("dropping its oldest messages") == 1
    assert [m["content"] for m in scripted.bodies[-1]["messages"]] == ["S", "c", "You say c", "d"]


def test_a_quarter_of_the_context_is_kept_for_an_answer(scripted: Scripted) -> None:
    scripted.tokens = 74_000  # of 100,000
    done = chat("a\nb\n", "chat", "--base-url", scripted.url)
    assert done.stderr.count("dropping its oldest messages") == 1
    assert asked(scripted) == ["a", "b"]
    assert len(scripted.bodies[-1]["messages"]) == 1
    done = chat("a\nb\n", "chat", "--base-url", scripted.url, "--max-tokens", "10")
    assert "dropping" not in done.stderr


def test_a_server_that_does_not_answer_is_named(scripted: Scripted) -> None:
    gone = f"http://127.0.0.1:{scripted.server_address[1]}"
    done = chat("Hi\n", "chat", "--base-url", "http://127.0.0.1:1")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("pyllm: http://127.0.0.1:1 cannot be used (")
    assert "is not a server's URL" in chat("Hi\n", "chat", "--base-url", "localhost").stderr
    scripted.most_messages = 0
    done = chat("Hi\nAgain\n", "chat", "--base-url", gone)
    assert (done.returncode, done.stdout, done.stderr.count("Too long.\n")) == (0, "", 2)


SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"], "additionalProperties": False}


def test_generate_reads_its_prompt_from_a_pipe(server: ServerProcess, tmp_path: Path) -> None:
    words = ("generate", "--base-url", server.url, "--max-tokens", "6", "--temperature", "0")
    expected = chat("", *words, "Hello").stdout
    assert expected.strip()
    assert [chat("Hello\n", *words, *more).stdout for more in ((), ("-",), ("--", "-"))] == [expected] * 3
    assert chat("Hello", *words, "--stop", expected[1:3]).stdout == expected[0] + "\n"
    for text, says in (("", "A prompt is needed"), ("\n", "A prompt is needed")):
        done = chat(text, *words)
        assert (done.returncode, done.stdout) == (2, "")
        assert says in done.stderr
    closed = shlex.join([sys.executable, "-m", "pyllm", *words]) + " <&-"
    done = subprocess.run(["bash", "-c", closed], capture_output=True, text=True, check=False)
    assert done.stderr.startswith("pyllm: A prompt is needed")
    broken = subprocess.run(
        [sys.executable, "-m", "pyllm", *words], input=b"\xff\xfe", capture_output=True, check=False
    )
    assert broken.stderr == b"pyllm: The prompt on standard input is not UTF-8 text (byte 0).\n"


def test_generate_follows_a_schema(server: ServerProcess, tmp_path: Path) -> None:
    words = ("generate", "Hello", "--base-url", server.url, "--max_tokens", "200", "--system", "S", "--json-schema")
    (tmp_path / "schema.json").write_text(json.dumps(SCHEMA))
    for schema in (json.dumps(SCHEMA), str(tmp_path / "schema.json")):
        assert json.loads(chat("", *words, schema).stdout).keys() == {"n"}
    for schema, says in (("{", "is not JSON"), ("[1]", "cannot be read"), (os.devnull, "is not JSON"),
                         ('{"type": "objet"}', "objet")):  # fmt: skip
        done = chat("", *words, schema)
        assert done.returncode == 2
        assert says in done.stderr


@pytest.mark.parametrize("words", ["", "--help", "serve --help", "completion bash", "--version"])
def test_a_reader_that_leaves_ends_the_command_quietly(words: str) -> None:
    command = f"{shlex.quote(sys.executable)} -m pyllm {words}"
    done = subprocess.run(["bash", "-c", f"(sleep 0.2; {command}) | true"], capture_output=True, text=True, check=False)
    assert done.stderr == ""


@pytest.mark.parametrize(
    "shell", ["bash", *(pytest.param(name, marks=pytest.mark.needs(name)) for name in ("fish", "zsh"))]
)
def test_shells_parse_the_completion(shell: str) -> None:
    done = chat("", "completion", shell)
    assert (done.returncode, done.stderr) == (0, "")
    assert "max-model-len" in done.stdout
    assert subprocess.run([shell, "-n"], input=done.stdout, text=True, check=False).returncode == 0


def test_bash_completes_flags() -> None:
    bash = chat("", "completion", "bash").stdout
    ask = "COMP_WORDS=(pyllm serve --max-mod); COMP_CWORD=2; _shtab_pyllm; printf '%s\\n' \"${COMPREPLY[@]}\""
    done = subprocess.run(["bash", "-c", f"{bash}\n{ask}"], capture_output=True, text=True, check=True)
    assert done.stdout == "--max-model-len\n"
