"""What the words of a log mean, and what to do: from the questions of MindFormers' ChatGLM3 document, and from failures
that were provoked here.

    print("\\n".join(diagnose(Path("output/tiny/log/rank_0.log").read_text())))
"""

import re

# What stands in a log -> what it means and the next step. The causes come before what follows from them.
SYMPTOMS = (
    (r"No space left on device|Disk quota exceeded",
     "The disk is full: free some of it, lower train.keep_checkpoints, or set output_dir to a larger disk."),
    (r"out of memory|Memory not enough|memory is not enough|Memory pool not enough|EL0004|bad_alloc|MemoryError",
     "Memory ran out: lower train.batch_size (and raise train.gradient_accumulation_steps as much), shorten the rows, "
     "or share the model among more devices."),
    (r"SIGKILL; the system does that",
     "Nothing in the log tells of it: look at `dmesg` for the out-of-memory killer, and at what else runs here."),
    (r"numpy\.core\.multiarray failed to import|compiled using NumPy 1\.x",
     "MindSpore is compiled against NumPy 1: pip install 'numpy<2'."),
    (r"No module named '?([\w.]+)",
     "A package is missing for this Python: `glm3kit check` lists what is needed."),
    (r"libascend_hal|libge_runner|libascendcl|\bte[._]|\btbe\b|\btvm\b",
     "MindSpore does not find the Ascend software: run its set_env.sh (/usr/local/Ascend/ascend-toolkit/set_env.sh), "
     "then python -c 'import mindspore; mindspore.run_check()'; on ModelArts choose an image with MindSpore."),
    (r"EJ0001|Failed to initialize the HCCP",
     "A card is still held by an earlier process: `npu-smi info` shows it; end it by its id, then launch again."),
    (r"EI0004|RanktableCheck",
     "HCCL refuses the rank table: `glm3kit rank-table check` lists its faults."),
    (r"cannot be divisible by|strategy is .*shape",
     "A size is not divisible among the ranks: max_source_length + max_target_length + 1 must be the seq_length, and "
     "tensor_parallel must divide the sizes of the model."),
    (r"overflow cond: True(?s:.)*overflow cond: True|gradient norm (?:nan|inf)|loss (?:nan|inf)",
     "The numbers overflow: export MS_ASCEND_CHECK_OVERFLOW_MODE=INFNAN_MODE, use train.loss_scale: dynamic with "
     "float16, or lower train.learning_rate."),
    (r"Address already in use",
     "A port is in use: give another with --port, the same on every machine."),
    (r"not successfully spawned|Topology build timed out",
     "Not every rank came: on several machines, was the same command run on each, and does each reach the master's "
     "address and port (a firewall)? On one, the first error in the logs of the other ranks is the cause."),
    (r"timed out node|Launch kernel failed(?:, name)?:\s*\S*(?:AllReduce|AllGather|ReduceScatter|Broadcast)"
     r"|EI0002|EI0006|SIGTERM",
     "The connection between ranks broke: another rank or machine failed first, or its link. Look at the logs and the "
     "jobs of the others; then launch again with --resume."),
    (r"(?i)sync stream failed|exec graph \S* ?failed",
     "The device failed without details: export ASCEND_GLOBAL_LOG_LEVEL=2 and ASCEND_SLOG_PRINT_TO_STDOUT=1, launch "
     "again, read the first error, and unset both (they slow training down)."),
)
MOST = 2  # pieces of advice: the first is the likeliest


def diagnose(text: str) -> list[str]:
    """Advice for what a log, or the reason of a failure, tells of; [] where nothing is known.

    Example: diagnose("OSError: [Errno 28] No space left on device") -> ["The disk is full: ..."]
    """
    return [advice for pattern, advice in SYMPTOMS if re.search(pattern, text)][:MOST]
