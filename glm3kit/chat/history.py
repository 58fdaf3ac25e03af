"""Which turns of a conversation the model is shown when they do not all fit into its window.

The system turn at the beginning and the newest message always stay. The oldest turns leave first, and a question leaves
together with its tool calls, observations and answers: a prompt begins where somebody asks.

    ids, left_out = fit_prompt(tokenizer, history, {"role": "user", "content": "你好"}, seq_length=2048, reserve=256)
"""

from bisect import bisect_left
from typing import Any

from glm3kit.errors import PromptError
from glm3kit.text.tokenizer import ChatGLM3Tokenizer


def fit_prompt(tokenizer: ChatGLM3Tokenizer, history: list[dict[str, Any]], message: dict[str, Any],
               seq_length: int | None, reserve: int) -> tuple[list[int], int]:
    """Ids of a prompt of at most seq_length - reserve tokens, and how many messages of the history it leaves out.

    message: what is said to the model now, a dict with role and content.
    seq_length: the window in tokens, prompt and reply together; None: no limit.
    reserve: tokens of it that are kept free for the reply.
    Raises PromptError if the shortest prompt there is does not fit.
    """
    role = message["role"]

    def prompt(told: list[dict[str, Any]]) -> list[int]:
        return tokenizer.build_chat_input(message["content"], history=told, role=role)["input_ids"][0].tolist()

    ids = prompt(history)
    room = len(ids) if seq_length is None else seq_length - reserve
    if len(ids) <= room:
        return ids, 0

    opening = 1 if history and history[0]["role"] == "system" else 0
    starts = [i for i in range(opening, len(history)) if i == opening or history[i]["role"] in ("user", "system")]
    if role != "observation" or not starts:  # an observation means nothing without its tool call
        starts.append(len(history))
    # what fits still fits with less; if nothing fits, the shortest is left to be reported
    shortest = len(starts) - 1
    first = bisect_left(
        starts, True, hi=shortest, key=lambda start: len(prompt(history[:opening] + history[start:])) <= room
    )
    ids = prompt(history[:opening] + history[starts[first] :])
    if len(ids) > room:
        company = " together with the system turn" * opening
        company += " and the tool call that it answers" * (role == "observation")
        raise PromptError(
            f"the newest message ({role}) takes {len(ids)} tokens as a prompt{company}, but at most {room} fit "
            f"(seq_length {seq_length}, {reserve} of it kept free for the reply); shorten the message "
            "or the system turn, or use a larger seq_length"
        )
    return ids, starts[first] - opening
