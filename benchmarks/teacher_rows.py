"""Make rows of a small teacher over real text, for measurements of the store; they need nothing but this Python.

    Lib/**/*.py --BPE--> tokens --+--> 4-gram model, Witten-Bell ----0.7--+
                                  +--> Llama of two layers, trained here --0.3--+--> p(next token), temperature

One file in sixteen is held out of both models. Sequences from random places of these files give the rows: the top 64
tokens with their tail, systematic samples, and the Llama's own logprobs, which stand for a student that knows less than
the teacher. There are three temperatures: 1, the one that gives an entropy of 2.7 nats, and 0.6.

Legend: T tokens of a text, N rows, S sequences, L targets per sequence, K ids kept, V vocabulary.
"""

from __future__ import annotations

import hashlib
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from capgap.kernels.sampling import offsets, sampled_rows, topk_rows
from capgap.pipeline.corpus.tokenizer import train_tokenizer

SEQ_LEN, NUM_SEQUENCES, NUM_KEPT, NUM_SAMPLES = 512, 64, 64, 50
REGIMES = ("natural", "medium", "sharp")
_MEDIUM_NATS, _SHARP_TEMPERATURE = 2.7, 0.6
_CALIBRATING_SEQUENCES, _CALIBRATING_STEP = 48, 12
_LLAMA_SHARE = 0.3
_TRAINED_SEQUENCES, _TRAINED_LEN, _DRAWN_IDS = 16, 128, 4096
_ORDERS = (2, 3, 4)
_CHUNK_ROWS = 256


def rows_of(folder: Path, vocab_size: int, steps: int) -> dict[str, dict[str, np.ndarray]]:
    """Return the rows by the temperature's name; they are made once and kept in the folder."""
    names = {name: folder / f"rows-{vocab_size}-{steps}-{name}.npz" for name in REGIMES}
    if not all(path.exists() for path in names.values()):
        folder.mkdir(parents=True, exist_ok=True)
        for name, rows in _make(vocab_size, steps).items():
            np.savez(names[name], **rows)
    return {name: dict(np.load(path)) for name, path in names.items()}


def _make(vocab_size: int, steps: int) -> dict[str, dict[str, Any]]:
    train, heldout = _texts()
    tokenizer = train_tokenizer(train, vocab_size)
    size = len(tokenizer)
    train_T, heldout_T = (_packed(tokenizer, texts) for texts in (train, heldout))
    tokens_SL1 = _anywhere(heldout_T)
    llama, ngrams = _llama(train_T, size, steps), _Ngrams(train_T, size)
    calibrating = [
        logprobs_NV[::_CALIBRATING_STEP].clone()
        for tokens_L1 in tokens_SL1[:_CALIBRATING_SEQUENCES]
        for logprobs_NV, _, _ in _scored(tokens_L1, llama, ngrams)
    ]
    temperatures = dict(zip(REGIMES, (1.0, _temperature_of(calibrating), _SHARP_TEMPERATURE), strict=True))
    parts: dict[str, list[dict[str, np.ndarray]]] = {name: [] for name in REGIMES}
    for number, tokens_L1 in enumerate(tokens_SL1):
        for logprobs_NV, llama_NV, rows in _scored(tokens_L1, llama, ngrams):
            for name, temperature in temperatures.items():
                parts[name].append(_record(logprobs_NV, llama_NV, tokens_L1, rows, temperature))
        print(f"rows of {number + 1} of {NUM_SEQUENCES} sequences", end="\r", flush=True)
    print()
    shared = {
        "tokens": tokens_SL1.astype(np.int32),
        "starts": np.roll(tokens_SL1 == tokenizer.eos_token_id, 1, axis=1),
        "train_counts": np.bincount(train_T, minlength=size),
    }
    joined = {name: {key: np.concatenate([p[key] for p in of]) for key in of[0]} for name, of in parts.items()}
    return {name: shared | rows | {"temperature": np.float64(temperatures[name])} for name, rows in joined.items()}


def _anywhere(tokens_T: np.ndarray) -> np.ndarray:
    """Return sequences from all over the text [S, L + 1], because consecutive ones would come from a few files only."""
    whole = len(tokens_T) // (SEQ_LEN + 1)
    chosen = np.random.default_rng(0).choice(whole, NUM_SEQUENCES, replace=False)
    return tokens_T[: whole * (SEQ_LEN + 1)].reshape(whole, SEQ_LEN + 1)[chosen]


def _scored(
    tokens_L1: np.ndarray, llama: LlamaForCausalLM, ngrams: _Ngrams
) -> Iterator[tuple[torch.Tensor, torch.Tensor, slice]]:
    """Yield the logprobs of the mixture and of the Llama, some rows at a time."""
    with torch.inference_mode():
        llama_LV = llama(torch.from_numpy(tokens_L1[None, :-1])).logits[0].float().log_softmax(-1)
    for start in range(0, SEQ_LEN, _CHUNK_ROWS):
        rows = slice(start, start + _CHUNK_ROWS)
        probs_NV = torch.from_numpy(ngrams.probs(tokens_L1, rows)) * (1 - _LLAMA_SHARE)
        yield (probs_NV + _LLAMA_SHARE * llama_LV[rows].exp()).log(), llama_LV[rows], rows


def _temperature_of(calibrating: list[torch.Tensor]) -> float:
    """Return the temperature at which the mean entropy of these rows is `_MEDIUM_NATS`."""
    low, high = 0.3, 1.5
    for _ in range(8):
        middle = (low + high) / 2
        entropy = float(torch.cat([_entropy(logprobs_NV, middle) for logprobs_NV in calibrating]).mean())
        low, high = (middle, high) if entropy < _MEDIUM_NATS else (low, middle)
    return low


def _entropy(logprobs_NV: torch.Tensor, temperature: float) -> torch.Tensor:
    own_NV = (logprobs_NV / temperature).log_softmax(-1)
    return -(own_NV.exp() * own_NV).sum(-1)


def _texts() -> tuple[list[str], list[str]]:
    """Return the standard library's sources, for training and held out, in the order of their digests."""
    lib = Path(sysconfig.get_paths()["stdlib"])
    found = []
    for path in lib.rglob("*.py"):
        data = path.read_bytes()
        if "site-packages" not in path.parts and data:
            found.append((hashlib.sha256(data).digest(), data.decode(errors="replace")))
    found.sort()
    return [text for digest, text in found if digest[0] >= 16], [text for digest, text in found if digest[0] < 16]


def _packed(tokenizer: Any, texts: list[str]) -> np.ndarray:
    encoded = tokenizer.backend_tokenizer.encode_batch(texts)
    end = [tokenizer.eos_token_id]
    return np.concatenate([np.asarray(e.ids + end, dtype=np.int64) for e in encoded])


def _llama(tokens_T: np.ndarray, vocab_size: int, steps: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=384,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=SEQ_LEN,
        tie_word_embeddings=True,
    )
    llama = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(llama.parameters(), lr=2e-3, fused=True)
    rng = np.random.default_rng(0)
    for step in range(steps):
        starts = rng.integers(0, len(tokens_T) - _TRAINED_LEN - 1, _TRAINED_SEQUENCES)
        batch_BL1 = torch.from_numpy(np.stack([tokens_T[s : s + _TRAINED_LEN + 1] for s in starts]))
        loss = _sampled_loss(llama, batch_BL1, rng)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        print(f"step {step + 1} of {steps}: {float(loss.detach()):.2f} nats", end="\r", flush=True)
    print()
    return llama.eval()


def _sampled_loss(llama: LlamaForCausalLM, batch_BL1: torch.Tensor, rng: np.random.Generator) -> torch.Tensor:
    """Return the cross-entropy over the batch's own ids and uniformly sampled other ids, which stand for all others.

    With a full softmax over 120,000 ids, a step would take twenty times as long.
    """
    vocab_size = llama.config.vocab_size
    labels_N = batch_BL1[:, 1:].flatten()
    own = torch.unique(labels_N)
    is_other_V = torch.ones(vocab_size, dtype=torch.bool)
    is_other_V[own] = False
    others = is_other_V.nonzero()[:, 0]
    drawn = others[torch.from_numpy(rng.integers(0, len(others), _DRAWN_IDS))]
    candidates = torch.cat([own, drawn])
    hidden_NH = llama.base_model(input_ids=batch_BL1[:, :-1]).last_hidden_state.flatten(0, 1)
    logits = hidden_NH @ llama.get_output_embeddings().weight[candidates].T
    logits[:, len(own) :] += np.log(len(others) / _DRAWN_IDS)
    return torch.nn.functional.cross_entropy(logits, torch.searchsorted(own, labels_N))


class _Ngrams:
    """An n-gram model with Witten-Bell smoothing.

    P(w | h) = (count(h w) + kinds(h) P(w | shorter h)) / (count(h) + kinds(h)), where kinds(h) is the number of
    distinct tokens after h.
    """

    def __init__(self, tokens_T: np.ndarray, vocab_size: int) -> None:
        counts_V = np.bincount(tokens_T, minlength=vocab_size) + 0.5
        self._unigram_V = (counts_V / counts_V.sum()).astype(np.float32)
        self._tables = [self._table(tokens_T, order) for order in _ORDERS]

    @staticmethod
    def _table(tokens_T: np.ndarray, order: int) -> tuple[np.ndarray, np.ndarray]:
        keys_T = _contexts(tokens_T, order)[:-1] << np.uint64(18) | tokens_T[order - 1 :].astype(np.uint64)
        return np.unique(keys_T, return_counts=True)

    def probs(self, tokens_L1: np.ndarray, rows: slice) -> np.ndarray:
        """Return the probabilities of the token after each token of these rows, float32 [N, V]."""
        probs_NV = np.tile(self._unigram_V, (rows.stop - rows.start, 1))
        for order, (keys, counts) in zip(_ORDERS, self._tables, strict=True):
            contexts_T = _contexts(tokens_L1, order)
            for row in range(max(rows.start, order - 2), rows.stop):
                low = contexts_T[row - order + 2] << np.uint64(18)
                first, last = np.searchsorted(keys, [low, low + np.uint64(1 << 18)])
                if last > first:
                    seen = counts[first:last]
                    total = seen.sum() + len(seen)
                    probs_NV[row - rows.start] *= len(seen) / total
                    ids = (keys[first:last] & np.uint64((1 << 18) - 1)).astype(np.int64)
                    probs_NV[row - rows.start, ids] += (seen / total).astype(np.float32)
        return probs_NV


def _contexts(tokens_T: np.ndarray, order: int) -> np.ndarray:
    """Return 46-bit hashes of the `order` - 1 tokens from each position on."""
    size = len(tokens_T) - order + 2
    hashed_T = np.zeros(size, np.uint64)
    for i in range(order - 1):
        hashed_T = (hashed_T ^ tokens_T[i : i + size].astype(np.uint64)) * np.uint64(0x9E3779B97F4A7C15)
        hashed_T ^= hashed_T >> np.uint64(29)
    return hashed_T >> np.uint64(18)


def _record(
    logprobs_NV: torch.Tensor, student_NV: torch.Tensor, tokens_L1: np.ndarray, rows: slice, temperature: float
) -> dict[str, np.ndarray]:
    labels_N = torch.from_numpy(tokens_L1[1:][rows])
    kept = topk_rows(logprobs_NV, labels_N, NUM_KEPT, temperature)
    digest = hashlib.blake2b(tokens_L1.tobytes(), digest_size=16).digest()
    points_N = torch.from_numpy(offsets(0, digest, rows.start, len(labels_N)))
    drawn = sampled_rows(logprobs_NV, labels_N, points_N, NUM_SAMPLES, temperature)
    return {
        "ids": kept.ids_NK.numpy(),
        "logprobs": kept.logprobs_NK.numpy(),
        "tail": kept.tail_N.numpy(),
        "labels": kept.label_logprobs_N.numpy(),
        "samples": drawn.samples_Nn.numpy(),
        "student": (student_NV / temperature).log_softmax(-1).gather(1, kept.ids_NK.long()).numpy(),
        "entropy": _entropy(logprobs_NV, temperature).numpy(),
    }
