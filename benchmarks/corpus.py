"""The corpus stage: memory for several sizes of text, tokens per second compared with the tokenizer alone and
with other tools, and the time to open a manifest of many shards.

python benchmarks/corpus.py                               10, 100 and 1,000 MB for memory, 30 MB for speed
python benchmarks/corpus.py --peers VENV/bin/python       with datatrove and datasets, which that Python must have
python benchmarks/corpus.py --memory-mb 10 100 --speed-mb 5

Memory is the peak resident size of the one process that makes a corpus of JSON lines. It is measured with a tokenizer
of whole words, because that is fast and a tokenizer's memory does not grow with the text. Speed is measured with a
byte-level BPE tokenizer of 4,096 entries, each run in a process of its own. Imports are left out, and everything else
counts: listing and digesting the sources, starting workers, packing, writing shards and the manifest. The tokenizer
alone has the texts in memory and uses one thread.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from machine import keep
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

import capgap.pipeline.corpus.stage  # noqa: F401 (imports are not measured)
from capgap.pipeline.corpus.sources import read_documents
from capgap.pipeline.corpus.tokenizer import END_OF_TEXT, train_tokenizer
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.stage.identity import seal_of
from capgap.pipeline.stage.manifests import read_manifest, require_seal
from capgap.pipeline.store.codec import SEQUENCES
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.manifest import MANIFEST_NAME, Manifest
from capgap.schemas.run_file import RunFile

PEERS = Path(__file__).parent / "corpus_peers.py"
DOCUMENT_CHARACTERS, NUM_FILES, NUM_PROCESSES = 4000, 4, (1, 2)


def main() -> None:
    """Measure memory, speed and the opening of a manifest, and write the figures to results/."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory-mb", type=int, nargs="*", default=[10, 100, 1000])
    parser.add_argument("--speed-mb", type=int, default=30)
    parser.add_argument("--peers", default=sys.executable, help="a Python that has datatrove and datasets")
    parser.add_argument(
        "--num-shards", type=int, default=100_000, help="number of shards in the manifest that is opened"
    )
    flags = parser.parse_args()
    figures = {
        "memory": list(memory(flags.memory_mb)),
        "speed": list(speed(flags)),
        "manifest": opened(flags.num_shards),
    }
    print(keep("corpus", "cpu", figures))


def memory(sizes_mb: list[int]) -> Iterator[dict[str, Any]]:
    """Yield the peak resident memory for each size of text."""
    for size_mb in sizes_mb:
        with tempfile.TemporaryDirectory(prefix="capgap-corpus-") as name:
            folder = Path(name)
            write_lines(folder / "text", size_mb * 1_000_000)
            word_tokenizer().save_pretrained(folder / "tokenizer")
            made = answer_of(calling("make_corpus", folder / "text", folder / "tokenizer", 1, folder / "out"))
            found = {"text_mb": size_mb, "peak_resident_mb": made["peak_resident_mb"], "seconds": made["seconds"]}
            print(found, flush=True)
            yield found


def speed(flags: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Yield the tokens per second of the tokenizer alone, of the stage, and of other tools."""
    with tempfile.TemporaryDirectory(prefix="capgap-corpus-") as name:
        folder = Path(name)
        write_lines(folder / "text", flags.speed_mb * 1_000_000)
        tokenizer = folder / "tokenizer"
        train_tokenizer(texts_of(2_000_000), 4096).save_pretrained(tokenizer)
        runs = [("tokenizer alone", 1, calling("tokenize_alone", folder / "text", tokenizer))]
        for number in NUM_PROCESSES:
            made = calling("make_corpus", folder / "text", tokenizer, number, folder / f"out-{number}")
            runs.append(("capgap", number, made))
        for peer in ("datatrove", "datasets"):
            for number in NUM_PROCESSES:
                out = folder / f"{peer}-{number}"
                runs.append((peer, number, [flags.peers, PEERS, peer, folder / "text", tokenizer, number, out]))
        for who, number, command in runs:
            found = {"text_mb": flags.speed_mb, "by": who, "num_processes": number, **answer_of(command)}
            print(found, flush=True)
            yield found


def opened(num_shards: int) -> dict[str, Any]:
    """Return the CPU seconds to open a manifest of that many shards, and to check it against its seal."""
    members = {
        "offset": [512, 8192, 16384, 24576],
        "num_bytes": [7000] * 4,
        "num_sequences": [4] * 4,
        "crc32": [1 << 31] * 4,
    }
    shards = [
        {
            "file": {"path": f"student-{number:05d}-000000.tar", "num_bytes": 1 << 20, "sha256": f"{number:064x}"},
            "num_sequences": 16,
            "members": members,
        }
        for number in range(num_shards)
    ]
    one_set = {"codec": SEQUENCES, "codec_settings": {}, "seq_len": 2048, "shards": shards}
    values = {"stage": "corpus", "instance": "corpus", "settings": {}, "inputs": {}, "identity": "0", "content": "0"}
    values |= {"files": [shard["file"] for shard in shards], "shard_sets": {"student": one_set}, "versions": {}}
    values |= {"started": "2026-01-01T00:00:00+00:00", "wall_s": 0.0, "command": []}
    manifest = Manifest.model_validate(values)
    with tempfile.TemporaryDirectory(prefix="capgap-corpus-") as name:
        sealed = manifest.model_copy(update={"seal": seal_of(manifest)})
        (Path(name) / MANIFEST_NAME).write_text(sealed.model_dump_json(indent=1))
        del manifest, sealed, values, shards
        began = time.process_time()
        found = read_manifest(Path(name))
        read = time.process_time()
        assert found is not None
        require_seal(name, found)
        figures = {"num_shards": num_shards, "open_cpu_s": round(read - began, 2)}
        figures["seal_cpu_s"] = round(time.process_time() - read, 2)
    print(figures, flush=True)
    return figures


def make_corpus(text: str, tokenizer: str, num_workers: str, out: str) -> dict[str, Any]:
    """Make a corpus in this process, and return its tokens, seconds and peak memory."""
    corpus = {"sources": [f"{text}/*.jsonl"], "tokenizer": tokenizer, "workers": int(num_workers), "seq_len": 2048}
    # the units are small enough that each of two processes has more than one
    size = sum(path.stat().st_size for path in Path(text).iterdir())
    corpus["unit_bytes"] = min(64 << 20, size // 8 + 1)
    run = RunFile.model_validate({"name": "measured", "out": out, "corpus": corpus})
    began = time.perf_counter()
    manifest = carry_out(run, Instance("corpus"))
    seconds = time.perf_counter() - began
    num_tokens = sum(split["num_text_tokens"] for split in manifest.facts["splits"].values())
    peak = max(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return _figures(num_tokens, seconds) | {"peak_resident_mb": round(peak / 1000, 1)}


def tokenize_alone(text: str, tokenizer: str) -> dict[str, Any]:
    """Tokenize texts in memory, and return tokens and seconds."""
    backend = Tokenizer.from_file(f"{tokenizer}/tokenizer.json")
    texts = [document.text for document in read_documents((f"{text}/*.jsonl",), "text")]
    num_tokens = 0
    began = time.perf_counter()
    for start in range(0, len(texts), 64):
        encoded = backend.encode_batch_fast(texts[start : start + 64], add_special_tokens=False)
        num_tokens += sum(len(one.ids) for one in encoded)
    return _figures(num_tokens, time.perf_counter() - began)


def calling(function: str, *arguments: object) -> list[object]:
    """Return a command that calls a function of this module, which must not run as a script: workers import scripts."""
    code = f"import json, corpus; print(json.dumps(corpus.{function}(*{[str(one) for one in arguments]})))"
    return [sys.executable, "-c", f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); {code}"]


def answer_of(command: list[object]) -> dict[str, Any]:
    """Run a command and return its last line, read as JSON; `failed` holds its last error line if it fails."""
    quiet = {"TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(list(map(str, command)), capture_output=True, text=True, check=False, env=os.environ | quiet)
    if done.returncode:
        return {"failed": done.stderr.strip().splitlines()[-1:]}
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


def write_lines(folder: Path, num_bytes: int) -> None:
    """Write files of JSON lines with `num_bytes` bytes together, in which no text occurs twice."""
    folder.mkdir()
    texts = texts_of(num_bytes)
    for number in range(NUM_FILES):
        written = 0
        with (folder / f"{number}.jsonl").open("w") as file:
            while written < num_bytes // NUM_FILES:
                written += file.write(json.dumps({"text": next(texts)}, ensure_ascii=False) + "\n")


def texts_of(num_bytes: int) -> Iterator[str]:
    """Yield documents of more than `num_bytes` bytes together: pieces of the builtin text, repeated and numbered."""
    pieces = [
        document.text[start : start + DOCUMENT_CHARACTERS]
        for document in read_documents(("builtin:python",), "")
        for start in range(0, len(document.text), DOCUMENT_CHARACTERS)
    ]
    for number in range(len(pieces) + 2 * num_bytes // (DOCUMENT_CHARACTERS // 2)):
        if number * DOCUMENT_CHARACTERS // 4 > num_bytes:
            return
        yield f"{number} {pieces[number % len(pieces)]}"


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few hundred words; it maps every other word to one token."""
    words = {word: None for text, _ in zip(texts_of(100_000), range(20), strict=False) for word in text.split()}
    vocab = {word: number for number, word in enumerate([END_OF_TEXT, "<unk>", *words])}
    backend = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token=END_OF_TEXT, unk_token="<unk>")


def _figures(num_tokens: int, seconds: float) -> dict[str, Any]:
    return {"num_tokens": num_tokens, "seconds": round(seconds, 2), "tokens_per_s": round(num_tokens / seconds)}


if __name__ == "__main__":
    main()
