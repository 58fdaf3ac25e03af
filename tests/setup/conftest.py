"""What the tests of rank tables share."""

import json

import pytest


@pytest.fixture
def table_file(tmp_path):
    def write(content, name="hccl.json"):
        path = tmp_path / name
        path.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")
        return path
    return write
