"""Tokenize JSON lines with other tools; benchmarks/corpus.py starts this script in a Python that has them.

python benchmarks/corpus_peers.py datatrove TEXT TOKENIZER NUM_PROCESSES OUT
python benchmarks/corpus_peers.py datasets TEXT TOKENIZER NUM_PROCESSES OUT

Unlike the corpus stage, neither tool splits the text, drops repeated texts, packs, or digests what it writes.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path


def main() -> None:
    """Tokenize the text with one tool, and print the number of tokens and the seconds as JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("peer", choices=["datatrove", "datasets"])
    parser.add_argument("text", type=Path)
    parser.add_argument("tokenizer", type=Path)
    parser.add_argument("num_processes", type=int)
    parser.add_argument("out", type=Path)
    flags = parser.parse_args()
    tokenize = through_datatrove if flags.peer == "datatrove" else through_datasets
    seconds, num_tokens = tokenize(flags.text, flags.tokenizer, flags.num_processes, flags.out)
    print()
    print(json.dumps({"num_tokens": num_tokens, "seconds": seconds, "tokens_per_s": round(num_tokens / seconds)}))


def through_datatrove(text: Path, tokenizer: Path, num_processes: int, out: Path) -> tuple[float, int]:
    """Tokenize with datatrove's reader and tokenizer, which write ids to files; return seconds and tokens."""
    from datatrove.executor import LocalPipelineExecutor
    from datatrove.pipeline.readers import JsonlReader
    from datatrove.pipeline.tokens import DocumentTokenizer

    steps = [
        JsonlReader(str(text), glob_pattern="*.jsonl"),
        DocumentTokenizer(
            str(out),
            tokenizer_name_or_path=str(tokenizer / "tokenizer.json"),
            eos_token="<|endoftext|>",
            shuffle_documents=False,
        ),
    ]
    executor = LocalPipelineExecutor(
        pipeline=steps, tasks=num_processes, workers=num_processes, logging_dir=str(out / "logs")
    )
    began = time.perf_counter()
    executor.run()
    seconds = round(time.perf_counter() - began, 2)
    # datatrove writes two bytes per id
    return seconds, sum(path.stat().st_size for path in out.rglob("*.ds")) // 2


def through_datasets(text: Path, tokenizer: Path, num_processes: int, out: Path) -> tuple[float, int]:
    """Tokenize with `map` of datasets and a tokenizer of transformers, as documented; return seconds and tokens."""
    from datasets import disable_progress_bars, load_dataset
    from transformers import AutoTokenizer

    disable_progress_bars()
    loaded = AutoTokenizer.from_pretrained(str(tokenizer))
    began = time.perf_counter()
    files = sorted(map(str, text.glob("*.jsonl")))
    found = load_dataset("json", data_files=files, split="train", cache_dir=str(out))
    made = found.map(
        lambda batch: {"input_ids": loaded(batch["text"], add_special_tokens=False, verbose=False)["input_ids"]},
        batched=True,
        num_proc=num_processes if num_processes > 1 else None,
        remove_columns=found.column_names,
    )
    seconds = round(time.perf_counter() - began, 2)
    column = made.data.column("input_ids")
    return seconds, sum(len(chunk.values) for chunk in column.chunks)


if __name__ == "__main__":
    sys.exit(main())
