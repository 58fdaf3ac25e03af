"""What the model can do: evaluate, predict, chat, and demo, all of it on the tiny one."""

import argparse
import json
import os
from typing import TYPE_CHECKING, Any

from glm3kit.cli.arguments import RUN, argument, config_of, json_text, switch, verb
from glm3kit.errors import ConfigError, JobError
from glm3kit.files import atomic_write

if TYPE_CHECKING:
    from glm3kit.config.groups import RunConfig
    from glm3kit.model.chatglm3 import ChatGLM3
    from glm3kit.text.tokenizer import ChatGLM3Tokenizer

WITH_WEIGHTS = "configs/tiny.yaml model.checkpoint_name_or_path=merged.safetensors"


def _model(config: "RunConfig") -> "tuple[ChatGLM3, ChatGLM3Tokenizer, dict[str, Any]]":
    """The model with its weights, the tokenizer, and the options of `generate` and `stream`."""
    missing = [key for key in ("tokenizer_path", "checkpoint_name_or_path") if getattr(config.model, key) is None]
    if missing:
        raise ConfigError("\n".join(f"model.{key} is not set; set it in the configuration, or add model.{key}=PATH"
                                    for key in missing))
    from glm3kit.model.load import AutoModel
    from glm3kit.parallel import choose_device
    from glm3kit.text.tokenizer import ChatGLM3Tokenizer

    choose_device(config.parallel.device_target)
    tokenizer = ChatGLM3Tokenizer(config.model.tokenizer_path)
    options = {"eos_token_id": tokenizer.stop_ids} | config.generate.model_dump()  # its own ids unless others are set
    return AutoModel.from_config(config.model), tokenizer, options


@verb("evaluate", *RUN,
      argument("--answers", metavar="FILE", help="write the rows with their answers, a JSON object a line"),
      example=f"evaluate {WITH_WEIGHTS}")
def evaluate(args: argparse.Namespace) -> None:
    """Measure held-out loss, attribute coverage, Rouge and BLEU."""
    from glm3kit.evaluate import evaluate

    net, _, _ = _model(config := config_of(args))
    result = evaluate(config, net)
    answers = result.pop("answers", [])
    if args.answers:
        atomic_write(args.answers, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in answers))
    print(json_text(result))


@verb("predict", *RUN,
      argument("--prompt", metavar="TEXT", required=True, help="the text to continue, such as 类型#裙*颜色#红色"),
      example=f"predict {WITH_WEIGHTS} --prompt TEXT")
def predict(args: argparse.Namespace) -> None:
    """Continue a prompt, in the form that ADGEN rows are trained in."""
    from glm3kit.chat.terminal import printable
    from glm3kit.evaluate import answer_text

    net, tokenizer, options = _model(config_of(args))
    prompt = tokenizer.encode(args.prompt)
    (output,) = net.generate([prompt], **options)
    print(printable(answer_text(output, prompt, tokenizer)))


@verb("chat", *RUN,
      argument("--system", metavar="TEXT", help="a system turn to open with"),
      switch("--tools", "offer three tools: arithmetic, dates, a shop's catalogue"),
      example=f"chat {WITH_WEIGHTS}")
def chat(args: argparse.Namespace) -> None:
    """Talk to the model in the terminal, in several roles."""
    from glm3kit.chat.session import ChatSession
    from glm3kit.chat.terminal import talk
    from glm3kit.chat.tools import calculate, calendar, find_products

    net, tokenizer, options = _model(config := config_of(args))
    tools = [calculate, calendar, find_products] if args.tools else None
    talk(ChatSession(tokenizer, net.conversation(**options), args.system, tools, seq_length=config.model.seq_length))


@verb("demo", example="demo")
def demo(args: argparse.Namespace) -> None:
    """Run the seven notebooks on the tiny model."""
    try:
        from glm3kit.notebook.demo import run_demo
    except ModuleNotFoundError as err:
        raise JobError(f"the demo needs {err.name}, not installed; use make demo, or pip install '.[demo]'") from err

    index = run_demo()
    print(f"\nDone: open {os.path.relpath(index)}")
    for path in sorted(index.parent.iterdir()):
        if path.is_file() and path.suffix not in (".html", ".ipynb"):
            print(f"  {os.path.relpath(path)}")


VERBS = (evaluate, predict, chat, demo)
