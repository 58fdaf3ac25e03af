"""What the tests of the command line share: a call in this process."""

from collections.abc import Callable

import pytest

from glm3kit.__main__ import main


@pytest.fixture(scope="session")
def status_of() -> Callable[..., int]:
    """The exit status of a call: status_of("check", "run.yaml")."""
    def call(*words: str) -> int:
        try:
            return main(words)
        except SystemExit as end:  # argparse's, for help and wrong calls
            return end.code

    return call
