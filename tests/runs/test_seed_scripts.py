"""The two Python scripts of the document that the kit implements: they run as they stand there.

Only `mindformers` becomes `glm3kit`, the paths are filled in, and the device is the CPU. The model is a small one with
the published vocabulary, whose answer is known: it is made so that each token of a chain makes the next one.
"""

import os
import subprocess
import sys
from pathlib import Path

import mindspore as ms
import numpy as np
import pytest
from mindspore import Tensor
from support import FLOAT32, ROOT

from glm3kit import ChatGLM3, ChatGLM3Tokenizer, ModelConfig

ANSWER = "你好👋！我是人工智能助手 ChatGLM3-6B"  # how the document's first answer begins: no token stands twice
SIZES = {"num_layers": 1, "hidden_size": 64, "ffn_hidden_size": 96, "kv_channels": 16, "num_attention_heads": 4,
         "multi_query_group_num": 2, "seq_length": 256}


@pytest.fixture(scope="module")
def scripts(shared) -> list[str]:
    """The document's two scripts that use MindFormers."""
    blocks = (shared / "seed" / "glm3.md").read_text(encoding="utf-8").split("```python\n")[1:]
    found = [block.partition("```")[0] for block in blocks if "from mindformers import" in block.partition("```")[0]]
    assert len(found) == 2 and "process_response" in found[1]
    return found


@pytest.fixture(scope="module")
def tokenizer_path(shared) -> Path:
    return shared / "data" / "tokenizer" / "tokenizer.model"


@pytest.fixture(scope="module")
def checkpoint(tokenizer_path, tmp_path_factory) -> Path:
    """A .ckpt of MindFormers' names: random, but the output layer knows what follows each token of the answer."""
    tokenizer = ChatGLM3Tokenizer(tokenizer_path)
    chain = [tokenizer.role_id("assistant"), *tokenizer.encode("\n", False), *tokenizer.encode(ANSWER, False),
             tokenizer.eos_id]
    assert len(set(chain)) == len(chain)
    net = ChatGLM3(ModelConfig(**FLOAT32, **SIZES))
    words = np.random.default_rng(0).standard_normal((65024, 64)).astype(np.float32)
    output = np.zeros_like(words)
    output[chain[1:]] = words[chain[:-1]]
    net.transformer.embedding.embedding_table.set_data(Tensor(words))
    net.transformer.output_layer.weight.set_data(Tensor(output))
    path = tmp_path_factory.mktemp("weights") / "glm3_6b.ckpt"
    ms.save_checkpoint(net, str(path))
    return path


def run(script: str, config: Path, tokenizer_path: Path) -> str:
    """Run a script of the document with its placeholders filled in; what it prints."""
    filled = script
    for old, new in {"mindformers": "glm3kit", "/path/to/tokenizer.model": str(tokenizer_path),
                     "/path/to/your.yaml": str(config), 'device_target="Ascend"': 'device_target="CPU"'}.items():
        assert old in filled
        filled = filled.replace(old, new)
    path = config.parent / "infer.py"
    path.write_text(filled, encoding="utf-8")
    done = subprocess.run([sys.executable, str(path)], capture_output=True, text=True, timeout=600,
                          env=os.environ | {"PYTHONPATH": str(ROOT), "PYTHONIOENCODING": "utf-8"})
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_the_generate_script_answers_with_a_yaml_of_mindformers(scripts, checkpoint, tokenizer_path, tmp_path):
    sizes = "".join(f"    {key}: {value}\n" for key, value in SIZES.items())
    (tmp_path / "your.yaml").write_text(f"""\
run_mode: 'predict'
model:
  model_config:
    type: ChatGLM2Config
{sizes}    param_init_type: "float32"
    compute_dtype: "float32"
    checkpoint_name_or_path: "{checkpoint}"
  arch:
    type: ChatGLM2ForConditionalGeneration
""", encoding="utf-8")
    assert run(scripts[0], tmp_path / "your.yaml", tokenizer_path) == f"\n {ANSWER}\n" * 2


def test_the_multi_role_script_converses_with_a_yaml_of_the_kit(scripts, checkpoint, tokenizer_path, tmp_path):
    sizes = "".join(f"  {key}: {value}\n" for key, value in SIZES.items())
    (tmp_path / "your.yaml").write_text(f"""\
model:
{sizes}  param_dtype: float32
  compute_dtype: float32
  checkpoint_name_or_path: {checkpoint}
""", encoding="utf-8")
    history = [{"role": "system", "content": "假设你现在是一个导游，请尽可能贴近这个角色回答问题。"},
               {"role": "assistant", "metadata": "", "content": ANSWER}]
    expected = f"\n {ANSWER}\nhistory:\n{history}\n" + f"\n {ANSWER}\n" * 3
    assert run(scripts[1], tmp_path / "your.yaml", tokenizer_path) == expected
