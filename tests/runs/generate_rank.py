"""One rank of a small model that several share: generates in every way and saves what came out.

Started by the tests: python generate_rank.py OUTPUT TENSOR_PARALLEL
"""

import json
import sys
from pathlib import Path

from glm3kit.config.groups import ModelConfig, ParallelConfig
from glm3kit.errors import ConfigError
from glm3kit.jobs.process import rank_process
from glm3kit.model.chatglm3 import ChatGLM3
from glm3kit.parallel import ALONE, Topology, start_processes

CFG = ModelConfig(num_layers=1, padded_vocab_size=512, hidden_size=64, ffn_hidden_size=96, kv_channels=16,
                  num_attention_heads=4, multi_query_group_num=2, seq_length=96, param_dtype="float32",
                  compute_dtype="float32")
PROMPTS = [[3, 1, 4, 1, 5], [9, 2, 6, 5, 3, 5, 8, 9, 7], [9, 3]]


def answers(topology: Topology = ALONE) -> dict[str, list]:
    """What a model of random weights says: greedy, drawn, searched, in two turns."""
    net = ChatGLM3(CFG, topology)
    talk = net.conversation(max_new_tokens=4, eos_token_id=[])
    said = list(talk(PROMPTS[0]))
    found = {
        "greedy": [row.tolist() for row in net.generate(PROMPTS, max_new_tokens=16, eos_token_id=[])],
        "drawn": net.generate(PROMPTS[0], do_sample=True, temperature=1.5, seed=3, max_new_tokens=8)[0].tolist(),
        "searched": net.generate(PROMPTS[0], num_beams=3, max_new_tokens=8)[0].tolist(),
        "turns": [said, list(talk([*PROMPTS[0], *said, 7]))],
    }
    if topology.tensor_parallel > 1:
        try:
            net.generate([1], do_sample=True)
        except ConfigError as err:
            found["without a seed"] = str(err)
    return found


def main(output: Path, tensor_parallel: int) -> None:
    topology = start_processes(ParallelConfig(tensor_parallel=tensor_parallel, device_target="CPU"))
    (output / f"answers_{topology.rank}.json").write_text(json.dumps(answers(topology)))


if __name__ == "__main__":
    job_dir, ranks = sys.argv[1:]
    with rank_process(job_dir):
        main(Path(job_dir), int(ranks))
