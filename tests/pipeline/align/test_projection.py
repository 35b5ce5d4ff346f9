"""Projected targets: with one tokenizer the top-k tokens themselves; digits, spaces, bytes, special tokens."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import facts_of, pieces_tokenizer
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.pipeline.align.projection import BothTokens
from capgap.pipeline.align.shard import StudentFormat, align_shard
from capgap.pipeline.align.stream import read_stream
from capgap.pipeline.align.token_bytes import TextTokenizer
from capgap.pipeline.corpus.pack import Encoded, Packer
from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.store import Codec, check_alignment
from capgap.pipeline.store.alignment import EXACT
from capgap.pipeline.store.batch import Batch, collate
from capgap.pipeline.store.codec import CHUNKS
from capgap.schemas.records import ChunkTargets, Sequences, TopkTargets

TEXTS = ["the cat sat on 12 mats", "a cat, a mat and 345 cats", "on the mat sat the cat"] * 6
L = 16
BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())
BLANK, END = "\u0120", "<|endoftext|>"


def byte_level(merges: list[tuple[str, str]], splits_digits: bool) -> tuple[TextTokenizer, int]:
    """A byte-level tokenizer of bytes and these merges; its last id ends documents."""
    tokens = [*BYTES, *dict.fromkeys("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    digits = [pre_tokenizers.Split(Regex("[0-9]"), "isolated")] if splits_digits else []
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*digits, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([END])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token=END)
    return TextTokenizer.of(fast, len(tokens) + 1, "made here"), len(tokens)


WORDS = [("t", "h"), ("th", "e"), ("c", "a"), ("ca", "t"), (BLANK, "the"), (BLANK, "cat")]
WHOLE = byte_level([*WORDS, ("1", "2"), ("12", "3"), ("4", "5")], splits_digits=False)
SINGLE = byte_level(WORDS, splits_digits=True)


def cache_of(
    teacher: tuple[TextTokenizer, int], rows: dict[bytes, float] | None = None, texts: list[str] = TEXTS
) -> tuple[Sequences, TopkTargets]:
    """The texts, packed; of each target the label with half of the probability, and these tokens or three at random."""
    tokenizer, eos_id = teacher
    packer = Packer(L, eos_id, "split", ())
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        packer.add(Encoded(Document("one", text), ids))
    sequences = packer.take().sequences
    labels_N = sequences.tokens_BL1[:, 1:].ravel()
    rng = np.random.default_rng(0)
    ids_of = {tokenizer.table.bytes_of(token): token for token in range(len(tokenizer.table.length_V))}
    ids_NK = np.zeros((len(labels_N), 4), np.int32)
    logprobs_NK = np.full(ids_NK.shape, -np.inf, np.float32)
    for row, label in enumerate(labels_N.tolist()):
        if rows is None:
            others = rng.choice([i for i in ids_of.values() if i != label], 3, replace=False).tolist()
            probs = [0.5, 0.2, 0.15, 0.05]
        else:
            others = [ids_of[text] for text in rows if ids_of[text] != label]
            probs = [0.5, *(p for text, p in rows.items() if ids_of[text] != label)]
        ids_NK[row, : len(probs)], logprobs_NK[row, : len(probs)] = [label, *others], np.log(probs)
    shape = (*sequences.tokens_BL1[:, 1:].shape, 4)
    tail_BL = (1 - np.exp(logprobs_NK).sum(axis=1)).astype(np.float32).reshape(shape[:2])
    targets = TopkTargets(
        ids_NK.reshape(shape), logprobs_NK.reshape(shape), tail_BL, logprobs_NK[:, 0].reshape(shape[:2]),
        np.zeros((*shape[:2], 0), np.float32),
    )  # fmt: skip
    return sequences, targets


def aligned(
    teacher: tuple[TextTokenizer, int],
    student: tuple[TextTokenizer, int],
    rows: dict[bytes, float] | None = None,
    texts: list[str] = TEXTS,
) -> tuple[Sequences, ChunkTargets]:
    both = BothTokens.of(*teacher, *student)
    size = len(teacher[0].table.length_V)
    block = cache_of(teacher, rows, texts)
    stream = read_stream([block], facts_of(teacher[1], size), 4, teacher[0], both.student_V >= 0, 4)
    sequences, targets, counts = align_shard(stream, teacher[0], StudentFormat(*student, (), L, 0.5), both)
    assert targets.projected is not None
    assert counts.num_projected == int((targets.projected.num_ids_BL > 0).sum())
    assert counts.num_projected > 0 or texts is not TEXTS
    return sequences, targets


def kept_by_label(
    sequences: Sequences, targets: ChunkTargets, student: TextTokenizer
) -> list[tuple[bytes, dict[bytes, float], float]]:
    """Label, projected tokens with their probabilities, and tail, of each projected target."""
    assert targets.projected is not None
    labels_N, found, first = sequences.tokens_BL1[:, 1:].ravel(), [], 0
    for row, num in enumerate(targets.projected.num_ids_BL.ravel().tolist()):
        part = slice(first, first + num)
        names = [student.table.bytes_of(token) for token in targets.projected.ids_D[part].tolist()]
        probs = dict(zip(names, np.exp(targets.projected.logprobs_D[part]).tolist(), strict=True))
        first = part.stop
        if num:
            found.append(
                (student.table.bytes_of(int(labels_N[row])), probs, float(targets.projected.tail_BL.ravel()[row]))
            )
    return found


def test_with_one_tokenizer_the_loss_is_that_of_the_top_k_tokens() -> None:
    sequences, topk = cache_of(WHOLE)
    others, targets = aligned(WHOLE, WHOLE)
    # the last sequence holds the rest of a document, which may be cut otherwise
    rows = range(len(sequences) - 1)
    assert np.array_equal(sequences.tokens_BL1[rows], others.tokens_BL1[rows])
    one = collate([(sequences, topk, row) for row in rows], 0)
    other = collate([(others, targets, row) for row in rows], 0)
    assert other.weights_NK is not None and (other.weights_NK.amax(dim=1) > 0).all()
    # float32 sums in another order
    assert loss_of(one) == pytest.approx(loss_of(other), rel=1e-6)


def loss_of(batch: Batch) -> float:
    torch.manual_seed(0)
    hidden_NH, weight_VH = torch.randn(batch.num_tokens, 8), torch.randn(WHOLE[1] + 1, 8)
    assert batch.ids_NK is not None and batch.weights_NK is not None
    targets = SparseTargets(batch.ids_NK, batch.weights_NK, batch.tail_N, checked=True)
    return float(linear_sparse_kl(hidden_NH, weight_VH, targets, batch.labels_BL.flatten(), alpha=1.0).loss)


def test_a_digit_is_left_to_the_tail_where_the_teacher_goes_on_with_more_of_them() -> None:
    rows = {b" the": 0.2, b"12": 0.1, b"1": 0.05}
    found = kept_by_label(*aligned(WHOLE, SINGLE, rows), SINGLE[0])
    for label, probs, tail in found:
        # the student has no 12, so the teacher's 1 does not say how likely the student's is
        assert b"12" not in probs and (b"1" not in probs or label == b"1")
        assert tail == pytest.approx(1 - sum(probs.values()), abs=1e-5)
    assert any(probs.get(b" the") == pytest.approx(0.2) for _, probs, _ in found)


def test_a_digit_is_left_to_the_tail_where_the_student_goes_on_with_more_of_them() -> None:
    rows = {b" the": 0.2, b"1": 0.1, b"9": 0.05}
    found = kept_by_label(*aligned(SINGLE, WHOLE, rows), WHOLE[0])
    # to the student a 1 of the text is always part of a 12, and a 9 is never part of more
    assert all(b"1" not in probs for _, probs, _ in found)
    assert any(probs.get(b"9") == pytest.approx(0.05) for _, probs, _ in found)
    assert {label for label, _, _ in found} & {b"1", b"2", b"4", b"5"} == set()


def test_spaces_are_tokens_of_both_by_their_bytes_and_ends_of_documents_by_what_they_are_for() -> None:
    pieces = pieces_tokenizer()
    size = max(pieces.get_vocab().values()) + 1
    teacher = TextTokenizer.of(pieces, size, "pieces"), int(pieces.eos_token_id)
    both = BothTokens.of(*teacher, *WHOLE)
    student, ids = WHOLE[0], {text: token for token, text in enumerate(map(WHOLE[0].table.bytes_of, range(WHOLE[1])))}
    assert both.student_V[teacher[1]] == WHOLE[1]
    assert both.student_V[pieces.convert_tokens_to_ids("\u2581the")] == ids[b" the"]
    # the letter, and not the piece of its byte, is what a text becomes; a byte alone is its piece
    assert both.student_V[pieces.convert_tokens_to_ids("a")] == ids[b"a"]
    assert both.student_V[pieces.convert_tokens_to_ids("<0x61>")] == -1
    assert both.student_V[pieces.convert_tokens_to_ids("<0xE2>")] == ids[b"\xe2"]
    assert both.student_V[pieces.convert_tokens_to_ids("<s>")] == -1
    assert student.table.length_V[WHOLE[1]] < 0


def with_pieces(puts_blank: bool) -> tuple[TextTokenizer, int]:
    made = pieces_tokenizer(puts_blank)
    return TextTokenizer.of(made, max(made.get_vocab().values()) + 1, "pieces"), int(made.eos_token_id)


PAIRS = [(WHOLE, SINGLE), (SINGLE, with_pieces(False)), (with_pieces(False), WHOLE), (with_pieces(True), SINGLE)]
# digits, spaces, combining marks, emoji, line ends, a piece of a byte and an end of a text by their spelling
SPELT = ["12", "123", " 45", "  ", "\r\n", "e\u0301", "\U0001f468\u200d\U0001f469", "<0x41>", END, "the cat", "\u4f60"]


@pytest.mark.parametrize("pair", range(len(PAIRS)))
@settings(max_examples=8, deadline=None)
@given(texts=st.lists(st.lists(st.sampled_from(SPELT), max_size=9).map("".join), min_size=4, max_size=9))
def test_whatever_the_text_projected_targets_are_distributions_that_agree_with_their_labels(
    pair: int, texts: list[str]
) -> None:
    teacher, student = PAIRS[pair]
    sequences, targets = aligned(teacher, student, texts=[*TEXTS[:6], *texts])
    codec = Codec(CHUNKS, L, len(student[0].table.length_V), 4)
    check_alignment(sequences, targets, 0, "here", EXACT)
    read, again = codec.decode(codec.encode(sequences, targets), "here")
    assert isinstance(again, ChunkTargets) and np.array_equal(read.tokens_BL1, sequences.tokens_BL1)


def test_a_part_of_the_sequences_has_their_projected_targets() -> None:
    _, targets = aligned(WHOLE, SINGLE)
    assert targets.projected is not None
    parts = [targets.part(slice(row, row + 1)).projected for row in range(len(targets.ends_BL))]
    joined = [np.concatenate([vars(part)[name] for part in parts]) for name in vars(targets.projected)]
    for one, other in zip(joined, vars(targets.projected).values(), strict=True):
        assert np.array_equal(one, other)
    assert replace(targets, projected=None).part(slice(0, 1)).projected is None
