"""What the tests of this room share."""

import json
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def encoded(golden_texts: Path) -> list[dict]:
    """Conversations with tools, and the ids and labels that MindFormers makes of them."""
    return json.loads((golden_texts / "multiturn_encoded.json").read_text(encoding="utf-8"))
