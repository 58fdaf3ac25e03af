"""glm3kit: fine-tune and talk to ChatGLM3-6B with MindSpore.

    from glm3kit import ChatGLM3, ChatGLM3Tokenizer, load_config, load_weights

Names are imported when they are first used: `import glm3kit` costs nothing, and the parts that need no MindSpore
do not load it.
"""

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # for editors and type checkers; at run time __getattr__ does it
    from glm3kit.chat import ChatSession
    from glm3kit.config import ModelConfig, RunConfig, load_config
    from glm3kit.conversion import convert_weights
    from glm3kit.data import encode_adgen, encode_conversation
    from glm3kit.metrics import read_metrics
    from glm3kit.mindformers_yaml import AutoConfig
    from glm3kit.model import AutoModel, ChatGLM3
    from glm3kit.prompt import process_response
    from glm3kit.rank_table import merge_rank_tables, read_rank_table
    from glm3kit.tokenizer import ChatGLM3Tokenizer
    from glm3kit.tools import tool
    from glm3kit.weights import load_weights
    from glm3kit.widgets import chat_widget

__version__ = "0.1.0"

__all__ = [
    "AutoConfig", "AutoModel", "ChatGLM3", "ChatGLM3Tokenizer", "ChatSession", "ModelConfig", "RunConfig",
    "chat_widget", "convert_weights", "encode_adgen", "encode_conversation", "load_config", "load_weights",
    "merge_rank_tables", "process_response", "read_metrics", "read_rank_table", "tool",
]

_HOME = {
    "ModelConfig": "config", "RunConfig": "config", "load_config": "config",
    "ChatGLM3Tokenizer": "tokenizer",
    "process_response": "prompt",
    "encode_adgen": "data", "encode_conversation": "data",
    "merge_rank_tables": "rank_table", "read_rank_table": "rank_table",
    "read_metrics": "metrics",
    "AutoConfig": "mindformers_yaml",
    "convert_weights": "conversion", "load_weights": "weights",
    "AutoModel": "model", "ChatGLM3": "model",
    "ChatSession": "chat",
    "tool": "tools",
    "chat_widget": "widgets",
}


def __getattr__(name: str) -> Any:
    """Import a public name, or a module such as `glm3kit.train`, on first use."""
    if name in _HOME:
        value = getattr(importlib.import_module(f"glm3kit.{_HOME[name]}"), name)
        globals()[name] = value  # found directly from now on
        return value
    if not name.startswith("_"):
        module = f"glm3kit.{name}"
        try:
            return importlib.import_module(module)
        except ModuleNotFoundError as err:
            if err.name != module:  # the module is there, something that it imports is not
                raise
    raise AttributeError(f"module 'glm3kit' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
