"""The embedded data: a small shop's advertisements and chats, and the tokenizer trained on them.

Written by `python -m tiny_data.generate_data` in a clone, which makes them again byte for byte.

    rows = [json.loads(line) for line in glm3kit.tiny.TRAIN.read_text("utf-8").splitlines()]
"""

from pathlib import Path

FOLDER = Path(__file__).resolve().parent
TOKENIZER = FOLDER / "tokenizer.model"
TRAIN = FOLDER / "train.json"
DEV = FOLDER / "dev.json"
CONVERSATIONS = FOLDER / "conversations.jsonl"
