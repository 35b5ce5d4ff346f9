"""What recording a teacher's distributions costs on top of running the teacher, for each way to record them.

python benchmarks/capture.py                                    a tiny Llama, on this machine's CPU
python benchmarks/capture.py --device cuda:0 --model FOLDER     a real teacher on a GPU

On a CPU, set OMP_NUM_THREADS=1 OMP_WAIT_POLICY=PASSIVE, or the time of waiting threads is counted. All ways share one
engine and take turns. Figures are medians, of CPU time on a CPU and of wall time on a GPU. The tax of a way compares it
with the floor, the prefill and the head's product for every row, which every way needs:

    tax = (prefill + capture + encode + write) / (prefill + head on all rows)

`both` keeps 50 samples and the top 64 tokens side by side, from one softmax. For comparison, vLLM's public logprobs are
measured, also unpacked entry by entry in Python as DistillKit does it, but without DistillKit's compression.

Legend: N rows, S sequences, L targets per sequence, K ids, V vocabulary.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

import numpy as np
import torch
from machine import keep
from transformers import LlamaConfig, LlamaForCausalLM

from capgap.pipeline.cache.convert import to_targets
from capgap.pipeline.cache.scoring import Recording, Request, Scored
from capgap.pipeline.cache.vllm_captured import CapturedRequests
from capgap.pipeline.cache.vllm_engine import VllmEngine
from capgap.pipeline.cache.vllm_public import PublicRequests
from capgap.pipeline.cache.vllm_worker import Capture, LogitsOf, RequestKey
from capgap.pipeline.store import Block, Ranking, ShardWriter, split_blocks
from capgap.pipeline.store.codec import SAMPLED, TOPK_CODECS, Codec
from capgap.schemas.records import Sequences
from capgap.schemas.run_cache import RecordingName

CHUNK_ROWS = 1024
GOALS = {"sampled 50": 1.12, "topk 64": 1.25}


@dataclass
class Clock:
    """Sums up the seconds of each part of the work, by the clock `now`: CPU time on a CPU, wall time on a GPU."""

    now: Callable[[], float]
    taken_s: dict[str, float] = field(default_factory=dict)

    def add(self, part: str, since: float) -> None:
        """Add the time since `since` to this part."""
        self.taken_s[part] = self.taken_s.get(part, 0.0) + self.now() - since


class HeadOnly(Capture):
    """The floor: computes the head's product for every row, and keeps nothing of it."""

    def step(self, hidden_NH: torch.Tensor, logits_of: LogitsOf, spans: list[Any]) -> dict[str, Any]:
        """Compute the logits of a step's rows, and return nothing (see `Capture.step`)."""
        for start in range(0, len(hidden_NH), CHUNK_ROWS):
            logits_of(hidden_NH[start : start + CHUNK_ROWS])
        return {}


class Bench:
    """One engine, one submission of sequences, and every way to record their rows."""

    def __init__(self, flags: argparse.Namespace) -> None:
        self.device = flags.device
        path = flags.model or _tiny_llama(flags.folder, flags.vocab_size, flags.seq_len)
        self.recordings = {
            "sampled 50": Recording(50, 0, 1.0, 0, flags.vocab_size, CHUNK_ROWS),
            "topk 64": Recording(0, 64, 1.0, 0, flags.vocab_size, CHUNK_ROWS),
            "both": Recording(50, 64, 1.0, 0, flags.vocab_size, CHUNK_ROWS),
        }
        started = time.perf_counter()
        self.engine = VllmEngine(
            path, self.recordings["topk 64"], flags.seq_len, "auto", flags.batch_tokens, 0.8, flags.device
        )
        self.start_s = time.perf_counter() - started
        rng = np.random.default_rng(0)
        tokens_SL1 = rng.integers(0, flags.vocab_size, (flags.num_sequences, flags.seq_len + 1), dtype=np.int32)
        # the last label is made one of the top-k tokens, as it usually is in text; a random token almost never is
        first = self.engine.score([Request(tokens_L1) for tokens_L1 in tokens_SL1])
        tokens_SL1[:, -1] = [scored.ids_LK[-1, 1] for scored in first]
        self.requests = [Request(tokens_L1) for tokens_L1 in tokens_SL1]
        self.sequences = Sequences(
            tokens_SL1, np.zeros(tokens_SL1.shape, np.bool_), np.ones(tokens_SL1.shape, np.bool_)
        )
        self.num_tokens = flags.num_sequences * flags.seq_len
        self.ranking = Ranking(np.arange(flags.vocab_size, dtype=np.int32))
        self.clock = Clock(time.process_time if flags.device == "cpu" else time.perf_counter)
        self._core = self.engine._llm.llm_engine.engine_core
        self._get_output = self._core.get_output
        self._core.get_output = self._timed_output

    def ways(self) -> dict[str, Callable[[], object]]:
        """Return the ways by name; each is called once per repeat."""
        return {
            "prefill": self._prefill,
            "floor": self._floor,
            "sampled 50": lambda: self._captured("sampled 50"),
            "topk 64": lambda: self._captured("topk 64"),
            "both": lambda: self._captured("both"),
            "public topk 64": self._public,
            "public topk 64, unpacked in Python": self._unpacked,
        }

    def _timed_output(self) -> Any:
        since = self.clock.now()
        try:
            return self._get_output()
        finally:
            self.clock.add("engine", since)

    def _submit(self, params: Any, with_output: Callable[[int, Any], None]) -> None:
        submission = [
            (RequestKey(index, 0, b"").encode(), request.tokens_L1[:-1].tolist(), params)
            for index, request in enumerate(self.requests)
        ]
        for index, output in self.engine._run(submission):
            with_output(index, output)

    def _prefill(self) -> None:
        import vllm

        self._worker("capgap_remove")
        self._submit(vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False), lambda index, output: None)

    def _floor(self) -> None:
        import vllm

        self._worker("capgap_hook", HeadOnly(self.recordings["topk 64"]))
        params = vllm.SamplingParams(max_tokens=1, temperature=0.0, detokenize=False, prompt_logprobs=0)
        self._submit(params, lambda index, output: None)

    def _captured(self, name: str) -> None:
        self.engine.record(self.recordings[name])
        self.engine._way = CapturedRequests(self.recordings[name])
        self._write(self._score(), self.recordings[name])

    def _public(self) -> None:
        self._worker("capgap_remove")
        self.engine._way = PublicRequests(self.recordings["topk 64"])
        self._write(self._score(), self.recordings["topk 64"])

    def _unpacked(self) -> None:
        self._worker("capgap_remove")
        params = PublicRequests(self.recordings["topk 64"])._params
        self._submit(params, lambda index, output: unpack_entries(output.prompt_logprobs, 64))

    def _score(self) -> list[Scored]:
        since, engine_s = self.clock.now(), self.clock.taken_s.get("engine", 0.0)
        scored = self.engine.score(self.requests)
        self.clock.add("front end", since + self.clock.taken_s["engine"] - engine_s)
        return scored

    def _write(self, scored: Sequence[Scored], recording: Recording) -> None:
        if recording.num_samples:
            self._write_one(scored, "sampled", recording.num_samples, SAMPLED)
        if recording.top_k:
            self._write_one(scored, "topk", recording.top_k, TOPK_CODECS["near-lossless"])

    def _write_one(self, scored: Sequence[Scored], name: RecordingName, num_ids: int, stored_as: str) -> None:
        length = self.sequences.tokens_BL1.shape[1] - 1
        codec = Codec(stored_as, length, len(self.ranking.ids_V), num_ids, self.ranking)
        blocks, start, since = [], 0, self.clock.now()
        for part in split_blocks(self.sequences):
            blocks.append(Block(part, to_targets(scored[start : start + len(part)], name)))
            start += len(part)
        self.clock.add("convert", since)
        since = self.clock.now()
        with tempfile.TemporaryDirectory() as folder:
            ShardWriter(Path(folder), Path(folder) / "sidecars", name, codec).write(0, blocks)
        self.clock.add("encode and write", since)

    def _worker(self, method: str, *args: object) -> None:
        self.engine._llm.collective_rpc(method, args=args)


def unpack_entries(flat: Any, num_ids: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Turn vLLM's flat logprobs into ids and logprobs [L, K], with one Python step per entry."""
    rows, ranks, ids, logprobs = [], [], [], []
    for position in range(1, len(flat)):
        for entry in range(flat.start_indices[position], flat.end_indices[position]):
            rank = flat.ranks[entry]
            if rank is None or rank > num_ids:
                continue
            rows.append(position - 1)
            ranks.append(rank - 1)
            ids.append(flat.token_ids[entry])
            logprobs.append(flat.logprobs[entry])
    ids_LK = torch.zeros((len(flat) - 1, num_ids), dtype=torch.long)
    logprobs_LK = torch.full((len(flat) - 1, num_ids), -torch.inf)
    ids_LK[torch.tensor(rows), torch.tensor(ranks)] = torch.tensor(ids)
    logprobs_LK[torch.tensor(rows), torch.tensor(ranks)] = torch.tensor(logprobs)
    return ids_LK, logprobs_LK


def measure(bench: Bench, repeats: int) -> dict[str, Any]:
    """Return each way's tax and microseconds per token by part: medians over the repeats, without the first one."""
    us: dict[str, dict[str, list[float]]] = {}
    ratios: dict[str, list[float]] = {}
    for repeat in range(repeats + 1):
        totals = {}
        for name, way in bench.ways().items():
            bench.clock.taken_s.clear()
            since = bench.clock.now()
            way()
            totals[name] = (bench.clock.now() - since) / bench.num_tokens * 1e6
            if repeat:
                for part, taken_s in {**bench.clock.taken_s, "total": totals[name] * bench.num_tokens / 1e6}.items():
                    us.setdefault(name, {}).setdefault(part, []).append(taken_s / bench.num_tokens * 1e6)
        if repeat:
            for name, total in totals.items():
                ratios.setdefault(name, []).append(total / totals["floor"])
    return {
        name: {
            "tax": round(statistics.median(ratios[name]), 3),
            "us_per_token": {part: round(statistics.median(values), 2) for part, values in parts.items()},
        }
        for name, parts in us.items()
    }


def held_bytes_per_token(bench: Bench) -> dict[str, float]:
    """Return the bytes per token that the answers to a submission hold: captured arrays, or vLLM's flat logprobs."""
    bench.engine.record(bench.recordings["topk 64"])
    arrays = bench.engine.score(bench.requests)
    held = sum(array.nbytes for scored in arrays for array in vars(scored).values() if isinstance(array, np.ndarray))
    del arrays
    bench._worker("capgap_remove")
    outputs: list[Any] = []
    tracemalloc.start()
    params = PublicRequests(bench.recordings["topk 64"])._params
    bench._submit(params, lambda index, output: outputs.append(output))
    flat, _ = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    return {"captured": round(held / bench.num_tokens, 1), "public": round(flat / bench.num_tokens, 1)}


def main() -> None:
    """Measure every way in turn, print a table, and write the figures to results/."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--model", help="folder or id of the teacher; default: a tiny Llama is made")
    parser.add_argument("--folder", type=Path, default=Path("runs/capture-llama"))
    parser.add_argument("--vocab-size", type=int, default=4096, help="the teacher's real vocabulary")
    parser.add_argument("--seq-len", type=int, default=512)
    parser.add_argument("--num-sequences", type=int, default=32)
    parser.add_argument("--batch-tokens", type=int, default=8192)
    parser.add_argument("--repeats", type=int, default=7)
    flags = parser.parse_args()
    bench = Bench(flags)
    figures = {
        **{name: getattr(flags, name) for name in ("vocab_size", "seq_len", "num_sequences", "batch_tokens")},
        "model": flags.model or "Llama of 4 layers, width 256",
        "engine": bench.engine.name,
        "runner": bench.engine.runner,
        "start_s": round(bench.start_s, 1),
        "ways": measure(bench, flags.repeats),
        "held_bytes_per_token": held_bytes_per_token(bench),
    }
    for name, way in figures["ways"].items():
        goal = f" (goal {GOALS[name]})" if name in GOALS else ""
        print(f"{name:36} tax {way['tax']:.3f}{goal}; us a token: {way['us_per_token']}")
    print(f"held a token, bytes: {figures['held_bytes_per_token']}; engine up in {figures['start_s']} s")
    print(f"kept in {keep('capture', flags.device, figures)}", file=sys.stderr)


def _tiny_llama(folder: Path, vocab_size: int, seq_len: int) -> str:
    """Write a Llama with random weights whose head is scaled so that a row's entropy is about 3 nats."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=4,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=seq_len,
    )
    model = LlamaForCausalLM(config)
    model.lm_head.weight.data *= 12
    model.save_pretrained(folder)
    return str(folder)


if __name__ == "__main__":
    main()
