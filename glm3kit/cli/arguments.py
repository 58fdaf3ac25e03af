"""How a verb is declared and called: its words (name, arguments, example) stand above the function that does its work.

    @verb("status", JOB, example="status output/tiny")
    def status(args: argparse.Namespace) -> None:
        \"""Show the state of a job.\"""    # is its help

A verb imports what needs other packages when it runs, so that `glm3kit --help` waits for nothing: this is why imports
stand inside the functions of this room.
"""

import argparse
import difflib
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glm3kit.errors import CheckpointError

if TYPE_CHECKING:
    from glm3kit.config.groups import RunConfig

Argument = Callable[[Any], Any]  # adds itself to a parser, or to a group of one
Subjects = dict[str, tuple["Verb", ...]]


@dataclass(frozen=True)
class Verb:
    """A name of one or two words, what may follow it, and what is done; `run` returns the exit status, None for 0."""

    name: str
    help: str
    arguments: tuple[Argument, ...]
    example: str
    run: Callable[[argparse.Namespace], int | None]

    def parse(self, words: Sequence[str]) -> argparse.Namespace:
        """The arguments in the words after the verb; `error` among them ends a wrong call, as this does: status 2."""
        parser = argparse.ArgumentParser(prog=f"glm3kit {self.name}", description=self.help,
                                         epilog=f"example: glm3kit {self.example}")
        _inside(parser, self.arguments)
        parser.set_defaults(error=parser.error)
        return parser.parse_intermixed_args(words)  # overrides may stand after options


def verb(name: str, *arguments: Argument, example: str) -> Callable[[Callable[..., int | None]], Verb]:
    """Declare the function below as a verb, its docstring as the help."""
    return lambda run: Verb(name, run.__doc__ or "", arguments, example, run)


def argument(*names: str, **options: Any) -> Argument:
    """An argument, as argparse's add_argument takes it."""
    return lambda parser: parser.add_argument(*names, **options)


def switch(name: str, help: str) -> Argument:
    """An option without a value."""
    return argument(name, action="store_true", help=help)


def _inside(group: Any, arguments: Sequence[Argument]) -> None:
    for add in arguments:
        add(group)


def either(*arguments: Argument) -> Argument:
    """Arguments of which a call has one at most."""
    return lambda parser: _inside(parser.add_mutually_exclusive_group(), arguments)


def titled(title: str, description: str, *arguments: Argument) -> Argument:
    """Arguments under a heading of their own in the help."""
    return lambda parser: _inside(parser.add_argument_group(title, description), arguments)


def size(text: str) -> int:
    """The type of an argument such as 2GB -> bytes."""
    from glm3kit.weights.hub_files import parse_size

    try:
        return parse_size(text)
    except CheckpointError as err:
        raise argparse.ArgumentTypeError(str(err)) from err


OVERRIDES = argument("overrides", metavar="key=value", nargs="*", help="replace one value of the configuration")
RUN = (argument("config", metavar="CONFIG", help="a configuration file, such as configs/tiny.yaml"), OVERRIDES)


def config_of(args: argparse.Namespace) -> "RunConfig":
    """The configuration that the arguments RUN name, with its overrides."""
    from glm3kit.config.load import load_config

    return load_config(args.config, args.overrides)


def json_text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, indent=2, default=str)


def format_help(subjects: Subjects) -> str:
    """All verbs by subject, each with what it does."""
    lines = ["usage: glm3kit VERB ... | --version", "", "Fine-tune and talk to ChatGLM3-6B with MindSpore."]
    for subject, verbs in subjects.items():
        lines += ["", f"{subject}:"]
        lines += [f"  {verb.name:<18} {verb.help[0].lower()}{verb.help[1:-1]}" for verb in verbs]
    return "\n".join([*lines, "", "Each verb has its own help, with an example: glm3kit launch --help"])


def find_verb(words: Sequence[str], subjects: Subjects) -> tuple[Verb, Sequence[str]]:
    """The verb that a call begins with, of two words or of one, and the words after it.

    Another one ends the call with exit status 2 and what may have been meant.
    """
    wrong = argparse.ArgumentParser("glm3kit", usage="glm3kit VERB ... (glm3kit --help lists the verbs)").error
    verbs = {verb.name: verb for group in subjects.values() for verb in group}
    pair, seconds = " ".join(words[:2]), [name for name in verbs if name.startswith(f"{words[0]} ")]
    if pair in verbs:
        return verbs[pair], words[2:]
    if words[0] in verbs:
        near = difflib.get_close_matches(pair, seconds, 1, cutoff=0.8)
        if near and not Path(words[1]).exists():  # `data tool-alpca`, where a configuration may stand too
            wrong(f"'{pair}' is no verb, and {words[1]} no file; did you mean '{near[0]}'?")
        return verbs[words[0]], words[1:]
    if pair == words[0] and seconds:
        wrong(f"a word is missing after {words[0]}: {', '.join(name.partition(' ')[2] for name in seconds)}")
    name = pair if seconds else words[0]
    near = difflib.get_close_matches(name, seconds or list(verbs), 1)
    wrong(f"'{name}' is no verb" + (f"; did you mean '{near[0]}'?" if near else ""))
