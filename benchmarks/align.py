"""How fast `align` turns a cache into one for another tokenizer: tokens of the cache per second, on one core.

python benchmarks/align.py             two byte-level BPEs, top-64 and samples, medians of three runs; kept in results/
python benchmarks/align.py --quick     a tenth of the text

The text is the Python standard library's, and the distributions are made up. The whole stage is measured: members are
read and decoded, text is tokenized again, chunks are cut, shards are written. The tokenizer is also timed alone. Rates
use CPU seconds, which other processes on the machine hardly change; wall seconds are kept too.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
import sysconfig
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))
# the tokenizers library would otherwise use every core
os.environ["RAYON_NUM_THREADS"] = "1"

import numpy as np
from machine import keep

from capgap.pipeline.align.units import AlignJob, ChunkAligner
from capgap.pipeline.corpus.pack import Encoded, Packer
from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.tokenizers import tokenizer_facts
from capgap.pipeline.store import Block, Codec, ShardWriter, split_blocks
from capgap.pipeline.store.codec import SAMPLED, TOPK
from capgap.schemas.facts import CacheFacts, RecordingFacts
from capgap.schemas.records import SampledTargets, Sequences, Targets, TopkTargets

GOAL_TOKENS_PER_S = 200_000
NUM_IDS = {"topk": 64, "sampled": 50}
PROJECTED_TOP_K = 16
SEQ_LEN, NUM_TOKENS = 1024, 2_000_000


def main() -> None:
    """Measure both recordings, print whether the goal is met, and write the figures to results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a tenth of the text, one run, nothing is kept")
    parser.add_argument("--runs", type=int, default=3)
    flags = parser.parse_args()
    num_tokens, runs = (NUM_TOKENS // 10, 1) if flags.quick else (NUM_TOKENS, flags.runs)
    figures: dict[str, Any] = {"goal_tokens_per_s": GOAL_TOKENS_PER_S, "seq_len": SEQ_LEN, "num_tokens": num_tokens}
    with tempfile.TemporaryDirectory() as folder:
        texts = _texts(num_tokens * 5)
        teacher, student = train_tokenizer(texts[:200], 8000), train_tokenizer(texts[200:300], 4000)
        teacher.save_pretrained(f"{folder}/teacher")
        student.save_pretrained(f"{folder}/align/tokenizer")
        sequences = _packed(teacher, texts, num_tokens)
        begin = time.process_time()
        student.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False)
        spent_s = time.process_time() - begin
        share = len(sequences) * SEQ_LEN / _count(teacher, texts)
        figures["tokenizer_alone_s"] = round(spent_s * share, 3)
        for recording in NUM_IDS:
            job = _job(Path(folder), recording, sequences, teacher, student)
            jobs = {recording: job}
            if recording == "topk":
                jobs["projected"] = replace(job, projected_top_k=PROJECTED_TOP_K, folder=Path(folder) / "projected")
                shutil.copytree(job.folder, jobs["projected"].folder)
            for name, one in jobs.items():
                seconds = [_timed(one, name, number) for number in range(runs)]
                rate = len(sequences) * SEQ_LEN / statistics.median(cpu_s for cpu_s, _ in seconds)
                figures[name] = {"cpu_s": [cpu_s for cpu_s, _ in seconds], "wall_s": [wall_s for _, wall_s in seconds]}
                figures[name]["tokens_per_s"] = round(rate)
                met = "met" if rate >= GOAL_TOKENS_PER_S else "MISSED"
                print(f"{name}: {rate:,.0f} tokens/s a core (goal {GOAL_TOKENS_PER_S:,}: {met})", flush=True)
    print(f"the tokenizer alone takes {figures['tokenizer_alone_s']} s of each")
    if not flags.quick:
        print(f"kept in {keep('align', 'cpu', figures)}")


def _texts(num_bytes: int) -> list[str]:
    """Return modules of the standard library with `num_bytes` characters or more, sorted by path and repeated."""
    paths = sorted(Path(sysconfig.get_paths()["stdlib"]).glob("*.py")) * 50
    texts: list[str] = []
    total = 0
    for path in paths:
        texts.append(path.read_text(errors="replace"))
        total += len(texts[-1])
        if total >= num_bytes and len(texts) >= 300:
            break
    return texts


def _count(tokenizer: Any, texts: list[str]) -> int:
    return sum(len(one.ids) for one in tokenizer.backend_tokenizer.encode_batch_fast(texts, add_special_tokens=False))


def _packed(tokenizer: Any, texts: list[str], num_tokens: int) -> Sequences:
    packer = Packer(SEQ_LEN, tokenizer_facts(tokenizer).eos_id, "split")
    for text, one in zip(texts, tokenizer.backend_tokenizer.encode_batch_fast(texts), strict=True):
        packer.add(Encoded(Document("", text), one.ids))
    return packer.take().sequences.part(slice(num_tokens // SEQ_LEN))


def _job(folder: Path, recording: str, sequences: Sequences, teacher: Any, student: Any) -> AlignJob:
    facts, cache = tokenizer_facts(teacher), folder / recording
    cache.mkdir()
    kept = NUM_IDS[recording]
    codec = Codec(SAMPLED if recording == "sampled" else TOPK, SEQ_LEN, facts.vocab_size, kept)
    writer = ShardWriter(cache, cache / "work", recording, codec)
    rng = np.random.default_rng(0)
    blocks = (Block(part, _targets(recording, part, kept, facts.vocab_size, rng)) for part in split_blocks(sequences))
    shards = writer.shard_set([writer.write(0, blocks)])
    known = CacheFacts(
        tokenizer=facts, context="packed", splits={}, text_sources=(), whole_conversations=False, temperature=1.0,
        recordings={"topk": RecordingFacts(num_ids=kept, temperatures=(1.0,))}, padded_vocab_size=facts.vocab_size,
        num_teacher_parameters=None, engines=(), dtypes=(), mean_label_loss=None,
    )  # fmt: skip
    return AlignJob(
        location=cache, source=shards, num_training=1, recording="topk", facts=known, teacher=folder / "teacher",
        folder=folder / "align", work=folder / "work", tokenizer=tokenizer_facts(student), bos_ids=(),
        seq_len=SEQ_LEN, min_border_probability=0.9,
    )  # fmt: skip


def _targets(recording: str, part: Sequences, kept: int, vocab_size: int, rng: np.random.Generator) -> Targets:
    """Return targets that give the label a third of the probability, and other ids the rest."""
    labels_BL = part.tokens_BL1[:, 1:]
    label_BL = np.full(labels_BL.shape, np.log(1 / 3), np.float32)
    if recording == "topk":
        # each id has its own distance from the label, so that no id occurs twice
        width = vocab_size // kept
        steps_BLK = rng.integers(0, width, (*labels_BL.shape, kept)) + width * np.arange(kept)
        ids_BLK = ((labels_BL[..., None] + steps_BLK) % vocab_size).astype(np.int32)
        ids_BLK[..., 0] = labels_BL
        logprobs_BLK = np.full(ids_BLK.shape, np.log(1 / 3 / kept), np.float32)
        logprobs_BLK[..., 0] = label_BL
        return TopkTargets(
            ids_BLK, logprobs_BLK, np.full(labels_BL.shape, 1 / 3, np.float32), label_BL,
            np.zeros((*labels_BL.shape, 0), np.float32),
        )  # fmt: skip
    own, others = kept // 3, kept - kept // 3
    first_D = (labels_BL.ravel()[:, None] + np.arange(others + 1)) % vocab_size
    counts_D = np.ones(first_D.shape, np.int32)
    counts_D[:, 0] = own
    num_ids_BL = np.full(labels_BL.shape, others + 1, np.int32)
    return SampledTargets(num_ids_BL, first_D.ravel().astype(np.int32), counts_D.ravel(), label_BL)


def _timed(job: AlignJob, name: str, number: int) -> tuple[float, float]:
    """Return the CPU and wall seconds of one unit, without the tokenizers' tables, which a process makes only once."""
    maker = ChunkAligner(replace(job, work=job.work / name / str(number)))
    maker.warm_up()
    cpu, wall = time.process_time(), time.perf_counter()
    maker.make(0)
    return round(time.process_time() - cpu, 3), round(time.perf_counter() - wall, 3)


if __name__ == "__main__":
    main()
