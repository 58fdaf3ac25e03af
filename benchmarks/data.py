"""How fast rows become a token file and a token file becomes batches, and what memory that takes.

The yardstick is SentencePiece itself, encoding the same texts in one call with the same threads; the budget is twice
its time. Rows are repeated to the size of the whole of ADGEN. Ratios are of medians over runs in turn.

    python benchmarks/data.py --tokenizer models/chatglm3-6b/tokenizer.model --data data/AdvertiseGen/dev.json
"""

import argparse
import json
import os
import re
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import cycle, islice
from pathlib import Path

import numpy as np
import sentencepiece

from glm3kit import tiny
from glm3kit.config.groups import DataConfig
from glm3kit.data.batches import Batches
from glm3kit.data.encode import encode_files
from glm3kit.data.token_file import TokenFile
from glm3kit.text.tokenizer import ChatGLM3Tokenizer

ADGEN_ROWS = 114_599
STEP_S = 0.05  # a training step, for the wait: less than any measured one


def timed(work: Callable[[], object]) -> float:
    """Seconds that `work` takes."""
    started = time.perf_counter()
    work()
    return time.perf_counter() - started


def repeat_rows(source: Path, destination: Path, rows: int) -> list[str]:
    """Write the lines of a file again and again; return all of their texts."""
    lines = list(islice(cycle(source.read_text(encoding="utf-8").splitlines()), rows))
    destination.write_text("\n".join(lines), encoding="utf-8")
    return [text for row in map(json.loads, lines) for text in (row["content"], row["summary"])]


def encode(path: Path, tokenizer: ChatGLM3Tokenizer, destination: Path) -> TokenFile:
    return encode_files([path], tokenizer, DataConfig(), 192, destination, progress=False)


def peak_mb(path: Path, tokenizer: Path, destination: Path) -> float:
    """Peak memory of a process that does nothing but encode a file."""
    call = [sys.executable, __file__, "--tokenizer", tokenizer, "--encode", path, destination]
    return float(subprocess.run(call, check=True, capture_output=True, text=True).stdout)


def compare_encoding(source: Path, tokenizer_path: Path, rows: int, runs: int, folder: Path) -> TokenFile:
    """Print the time of both and their ratio; return the token file."""
    tokenizer = ChatGLM3Tokenizer(tokenizer_path)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tokenizer.path))
    texts = repeat_rows(source, folder / "rows.json", rows)
    form = {"out_type": "numpy"} if hasattr(pieces, "EncodeAsNumpy") else {}  # the faster form where there is one
    works = {"theirs": lambda folder: pieces.encode(texts, num_threads=-1, **form),
             "ours": lambda folder: encode(folder.parent / "rows.json", tokenizer, folder)}
    wall, processors = {"theirs": [], "ours": []}, {"theirs": [], "ours": []}
    for run in range(runs):
        for name, work in works.items():
            busy = time.process_time()
            wall[name].append(timed(lambda work=work, run=run: work(folder / f"tokens{run}")))
            processors[name].append(time.process_time() - busy)
    first, second = statistics.median(wall["theirs"]), statistics.median(wall["ours"])
    busy = statistics.median(processors["ours"]) / statistics.median(processors["theirs"])
    print(f"{rows:,} rows, {os.cpu_count()} CPUs, {runs} runs")
    print(f"SentencePiece, the texts in one call    {first:6.2f} s  {rows / first:>10,.0f} rows/s")
    print(f"JSON lines to a token file              {second:6.2f} s  {rows / second:>10,.0f} rows/s")
    print(f"ratio                                   {second / first:6.2f}    (budget 2.0)")
    print(f"ratio of processor time                 {busy:6.2f}    (what other work on the machine changes less)")
    again = timed(lambda: encode(folder / "rows.json", tokenizer, folder / "tokens0"))
    print(f"the same again, found by its digest     {again:6.2f} s")
    return TokenFile.open(folder / "tokens0")


def compare_memory(tokenizer: Path, rows: int, folder: Path) -> None:
    """Print the peak memory of encoding all rows, as lines and as an array, and a tenth of them."""
    lines = (folder / "rows.json").read_text(encoding="utf-8").splitlines()
    (folder / "tenth.json").write_text("\n".join(lines[: rows // 10]), encoding="utf-8")
    (folder / "array.json").write_text("[" + ",\n".join(lines) + "]", encoding="utf-8")
    del lines
    for name, count in (("tenth", rows // 10), ("rows", rows), ("array", rows)):
        peak = peak_mb(folder / f"{name}.json", tokenizer, folder / f"peak-{name}")
        print(f"peak memory, {count:>7,} rows{' as an array' if name == 'array' else '            '}   {peak:6.0f} MB")


def compare_drawing(tokens: TokenFile) -> None:
    """Print the time to draw a batch, and how long a training step of 50 ms waits for one."""
    for batch_size, length in ((8, 192), (8, 2048)):
        batches = Batches(tokens, batch_size, length)
        draw = statistics.median(timed(lambda step=step, batches=batches: batches.batch(step)) for step in range(200))
        waits, source = [], iter(batches)
        for _ in range(40):
            waits.append(timed(lambda source=source: next(source)))
            time.sleep(STEP_S)
        source.close()
        print(f"a batch of {batch_size} x {length:<5} drawn in {draw * 1e3:6.2f} ms; "
              f"waited for, a step of {STEP_S * 1e3:.0f} ms apart: {np.median(waits) * 1e3:.3f} ms")


def main() -> None:
    """Read the arguments and print every comparison."""
    parser = argparse.ArgumentParser(description="Compare encoding with SentencePiece alone.")
    parser.add_argument("--tokenizer", type=Path, default=tiny.TOKENIZER, help="a tokenizer.model (default: the tiny)")
    parser.add_argument("--data", type=Path, default=tiny.TRAIN, help="ADGEN rows as JSON lines (default: the tiny)")
    parser.add_argument("--rows", type=int, default=ADGEN_ROWS, help="repeated to so many rows")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--encode", type=Path, nargs=2, metavar=("SRC", "DST"), help="encode alone; print peak MB")
    args = parser.parse_args()
    if args.encode:
        encode(args.encode[0], ChatGLM3Tokenizer(args.tokenizer), args.encode[1])
        status = Path("/proc/self/status").read_text()  # ru_maxrss would count what the parent held at the fork
        print(int(re.search(r"VmHWM:\s+(\d+) kB", status)[1]) / 1000)
        return
    with tempfile.TemporaryDirectory() as name:
        tokens = compare_encoding(args.data, args.tokenizer, args.rows, args.runs, Path(name))
        compare_memory(args.tokenizer, args.rows, Path(name))
        compare_drawing(tokens)


if __name__ == "__main__":
    main()
