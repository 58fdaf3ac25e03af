"""A conversation in a terminal, in several roles, a line at a time; lines may come from a pipe.

    talk(ChatSession(tokenizer, net.conversation()))
"""

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

from glm3kit.chat.session import SPEAKERS, ChatSession
from glm3kit.errors import Glm3KitError
from glm3kit.files import atomic_write

HELP = """A line is said in the current role; \\n in it is a line break. Commands:
  /role user|system|observation   who speaks         /again   another answer to the same message
  /system TEXT   another system turn                 /undo    take back the last message and its answer
  /tools         the tools there are                 /auto    run tools without asking; /ask: ask first
  /save FILE     as JSON, or as Markdown (.md)       /open FILE, /clear, /quit"""


def printable(text: str) -> str:
    """Text of a model without control characters, which could write anywhere on a terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def _show(deltas: Iterable[str]) -> None:
    for text in deltas:
        print(printable(text), end="", flush=True)
    print()


def _answer(session: ChatSession, deltas: Iterable[str], read: Callable[[str], str]) -> None:
    """Show a reply, run the tools that it calls, show what the model says to that, and say what is left to do."""
    def approve(call: Mapping[str, Any]) -> bool:
        arguments = json.dumps(call.get("parameters", call.get("reason")), ensure_ascii=False)
        print(f"[call of {printable(call['name'])}: {printable(arguments)}]")
        return not session.ask_first or read("run it? [y/N] ").strip().lower() in ("y", "yes")

    _show(deltas)
    if session.pending_call is not None and session.can_run(session.pending_call):
        _show(session.stream_tools(approve))
    if session.pending_code is not None:
        print("[code: it is not run; run it yourself and say its output as /role observation]")
    elif call := session.pending_call:
        print(f"[call of {printable(call['name'])}: say its result as /role observation]")
    if session.left_out:
        print(f"[the {session.left_out} oldest messages no longer fit: the model does not see them]")


def talk(session: ChatSession, read: Callable[[str], str] = input) -> None:
    """Converse until /quit or the end of the input; Ctrl-C ends a reply and keeps what was said.

    read: shows a prompt and returns a line, as `input`.
    """
    role = "user"
    session.ask_first = True
    print(HELP)
    while True:
        try:
            line = read(f"\n{role}> ").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        argument = argument.strip()
        try:
            if command == "/quit":
                return
            if command == "/clear":
                session.clear()
            elif command == "/role" and argument in SPEAKERS:
                role = argument
            elif command == "/system":
                session.set_system(argument)
            elif command == "/undo":
                print(f"[taken back: {printable(str(session.undo()['content']))}]")
            elif command == "/again":
                _answer(session, session.stream_again(), read)
            elif command == "/tools":
                for item in session.tools:
                    print(f"{item['name']}: {item['description']} {json.dumps(item['parameters'], ensure_ascii=False)}")
                if not session.tools:
                    print("no tools; start with --tools")
            elif command in ("/auto", "/ask"):
                session.ask_first = command == "/ask"
            elif command == "/save" and argument:
                atomic_write(argument, session.transcript("md" if argument.endswith(".md") else "json"))
            elif command == "/open" and argument:
                session.load(Path(argument).read_text(encoding="utf-8"))
            elif command.startswith("/"):
                print(HELP)
            elif line:
                _answer(session, session.stream(line.replace("\\n", "\n"), role=role), read)
        except KeyboardInterrupt:
            print(" [stopped]")
        except EOFError:  # instead of an answer to a question
            return
        except (Glm3KitError, OSError, UnicodeDecodeError) as err:  # the conversation goes on
            print(err)
