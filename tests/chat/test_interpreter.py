"""The code interpreter in a shell of IPython: code is offered, the user runs it, its output comes back."""

import subprocess
import sys

from support import ROOT, TOKENIZER

# each block is a cell
CELLS = f"""
from glm3kit import ChatGLM3Tokenizer, ChatSession
tokenizer = ChatGLM3Tokenizer({str(TOKENIZER)!r})
code = "import sys; print('out'); print('err', file=sys.stderr); 6 * 7"
replies = [("interpreter", f"```python\\n{{code}}\\n```"), ("interpreter", "1 / 0"), ("", "42。")]
session = ChatSession(tokenizer, lambda ids: iter(tokenizer.build_single_message("assistant", *replies.pop(0))[1:]))
print(session.ask("算一下"))
---
session.insert_cell()
---
print("another cell, in between")
---
session.observe_cell()
---
1 / 0
---
print(session.observe_cell())
"""

SCRIPT = """
import sys
from IPython.core.interactiveshell import InteractiveShell

shell = InteractiveShell.instance()
offered = []
shell.set_next_input = lambda text, replace=False: offered.append((text, replace))
first, *cells = sys.stdin.read().split("---\\n")
shell.run_cell(first)
shell.run_cell(cells[0])
(code, replace), = offered
assert replace is False, "a new cell, not this one"
before = len(shell.user_ns["session"].history)
assert before == 2, "nothing was run by itself"
shell.run_cell(code)
for cell in cells[1:]:
    shell.run_cell(cell)
out = sys.__stdout__
assert sys.stdout is out, "the streams are the old ones"
for message in shell.user_ns["session"].history:
    print(repr(message["content"]))
""".replace("\\\\n", "\\n")


def test_the_output_of_the_offered_cell_comes_back_as_observation_and_errors_too():
    done = subprocess.run([sys.executable, "-c", SCRIPT], input=CELLS.strip(), capture_output=True, text=True,
                          cwd=ROOT)
    assert done.returncode == 0, done.stderr
    said = done.stdout.splitlines()[-6:]
    assert said[2] == repr("out\nerr\nOut[0]: 42\n"), "a terminal prints the value itself"
    assert "ZeroDivisionError: division by zero\\n" in said[4]
    assert said[5] == repr("42。")
