"""A conversation in a terminal, in several roles, a line at a time.

    talk(ChatSession(tokenizer, lambda ids: net.stream(ids)))
"""

from collections.abc import Callable

from glm3kit.chat import ROLES, ChatSession
from glm3kit.errors import Glm3KitError
from glm3kit.files import atomic_write

HELP = "A line is said in the current role. /role user|system|observation, /clear, /save FILE, /quit"


def printable(text: str) -> str:
    """Text of a model without control characters, which could write anywhere on a terminal."""
    return "".join(letter for letter in text if letter.isprintable() or letter in "\n\t")


def talk(session: ChatSession, read: Callable[[str], str] = input) -> None:
    """Converse until /quit or the end of the input; Ctrl-C ends a reply and keeps what was said.

    read: shows a prompt and returns a line, as `input`.
    """
    role = "user"
    print(HELP)
    while True:
        try:
            line = read(f"\n{role}> ").strip()
        except EOFError:
            return
        command, _, argument = line.partition(" ")
        try:
            if command == "/quit":
                return
            if command == "/clear":
                session.clear()
            elif command == "/role" and argument in ROLES:
                role = argument
            elif command == "/save" and argument:
                atomic_write(argument, session.transcript())
            elif command.startswith("/"):
                print(HELP)
            elif line:
                for text in session.stream(line, role=role):
                    print(printable(text), end="", flush=True)
                print()
        except KeyboardInterrupt:
            print(" [stopped]")
        except (Glm3KitError, OSError) as err:  # the conversation goes on
            print(err)
