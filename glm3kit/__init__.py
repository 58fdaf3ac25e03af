"""glm3kit: fine-tune and talk to ChatGLM3-6B with MindSpore.

    from glm3kit import ChatGLM3, ChatGLM3Tokenizer, load_config, load_weights

Names are imported when they are first used: `import glm3kit` costs nothing, and the parts that need no MindSpore
do not load it.
"""

import importlib.util
from typing import TYPE_CHECKING, Any

# ruff: noqa: F401 (these are for editors and type checkers; at run time __getattr__ imports what _HOME names)
if TYPE_CHECKING:
    from glm3kit.chat.session import ChatSession
    from glm3kit.chat.tools import tool
    from glm3kit.config.groups import ModelConfig, RunConfig
    from glm3kit.config.load import load_config
    from glm3kit.config.mindformers import AutoConfig
    from glm3kit.data.encode import encode_adgen, encode_conversation
    from glm3kit.jobs.metrics import read_metrics
    from glm3kit.model.chatglm3 import ChatGLM3
    from glm3kit.model.load import AutoModel, load_weights
    from glm3kit.notebook.chat_widget import chat_widget
    from glm3kit.setup.rank_table import merge_rank_tables, read_rank_table
    from glm3kit.text.answers import process_response
    from glm3kit.text.tokenizer import ChatGLM3Tokenizer
    from glm3kit.weights.convert import convert_weights

__version__ = "0.1.0"

_HOME = {
    "AutoConfig": "config.mindformers", "AutoModel": "model.load", "ChatGLM3": "model.chatglm3",
    "ChatGLM3Tokenizer": "text.tokenizer", "ChatSession": "chat.session", "ModelConfig": "config.groups",
    "RunConfig": "config.groups", "chat_widget": "notebook.chat_widget", "convert_weights": "weights.convert",
    "encode_adgen": "data.encode", "encode_conversation": "data.encode", "load_config": "config.load",
    "load_weights": "model.load", "merge_rank_tables": "setup.rank_table", "process_response": "text.answers",
    "read_metrics": "jobs.metrics", "read_rank_table": "setup.rank_table", "tool": "chat.tools",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name, or a module such as `glm3kit.train.run`, on first use."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"glm3kit.{_HOME[name]}"), name)
        globals()[name] = value  # found directly from now on
        return value
    if not name.startswith("_") and importlib.util.find_spec(f"glm3kit.{name}"):
        return importlib.import_module(f"glm3kit.{name}")
    raise AttributeError(f"module 'glm3kit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
