"""Chunks of adversarial texts, against a slow and plain form; what makes a border unreliable; the bytes of tokens."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny_tokenizers import facts_of, pieces_tokenizer
from tokenizers import Tokenizer, decoders, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from capgap.pipeline.align.chunking import Chunks, Longer, border_probabilities, cut, longer_tokens
from capgap.pipeline.align.preflight import require_tokenizer
from capgap.pipeline.align.shard import StudentFormat, align_shard
from capgap.pipeline.align.stream import TeacherStream, read_stream
from capgap.pipeline.align.token_bytes import TextTokenizer
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.store.chunks import left_in_chunk
from capgap.schemas.errors import InputError
from capgap.schemas.records import SampledTargets, Sequences, TopkTargets
from capgap.schemas.run_file import RunFile

TEXTS = [
    "the cat sat on the mat, then the other cat sat there; 1234567 and 12 345\r\n",
    "def f(x):\r\n    return x ** 2  # caf\u00e9 na\u00efve\n\n\n",
    "\U0001f600\U0001f468\u200d\U0001f469\u200d\U0001f467 e\u0301 \u0e2a\u0e27\u0e31 \u4f60\u597d  two  blanks",
]
PIECES = (
    *("the", " cat", "  ", "\r\n", "\n", "\t", " ", "7", "12345", "zz", ".", "<0x41>", "<|endoftext|>"),
    *("e\u0301", "\u0301", "\u00e9", "\u4f60", "\U0001f468\u200d\U0001f469", "\u200d", "\ufeff"),
)
# a tokenizer that writes blanks as this mark takes the mark itself for one
MARK = "\u2581"
ADVERSARIAL = st.lists(
    st.sampled_from(PIECES) | st.text(st.characters(exclude_categories=["Cs"], exclude_characters=MARK), max_size=4),
    max_size=12,
).map("".join)


KINDS: dict[str, Callable[[], PreTrainedTokenizerFast]] = {
    "small": lambda: train_tokenizer(TEXTS, 290),
    "larger": lambda: train_tokenizer(TEXTS * 3, 360),
    "pieces": pieces_tokenizer,
    "blank": lambda: pieces_tokenizer(puts_blank=True),
}


@pytest.fixture(scope="module")
def known() -> dict[str, tuple[TextTokenizer, int]]:
    found = {}
    for name, make in KINDS.items():
        tokenizer = make()
        size = max(tokenizer.get_vocab().values()) + 1
        found[name] = TextTokenizer.of(tokenizer, size, name), int(tokenizer.eos_token_id)
    return found


def plain_chunks(teacher: list[bytes], student: list[bytes]) -> list[tuple[int, int]]:
    """How many tokens of each a chunk has, one byte after the other."""
    found, i, j = [], 0, 0
    while i < len(teacher) or j < len(student):
        first = (i, j)
        left, right = teacher[i], student[j]
        i, j = i + 1, j + 1
        while left != right:
            if len(left) < len(right):
                left, i = left + teacher[i], i + 1
            else:
                right, j = right + student[j], j + 1
        found.append((i - first[0], j - first[1]))
    return found


@pytest.mark.parametrize("one", KINDS)
@pytest.mark.parametrize("other", KINDS)
@settings(max_examples=15)
@given(text=ADVERSARIAL)
def test_chunks_are_the_smallest_spans_on_whose_borders_both_agree(
    known: dict[str, tuple[TextTokenizer, int]], one: str, other: str, text: str
) -> None:
    spelt = []
    for name in (one, other):
        tokenizer = known[name][0]
        ids = tokenizer.encode([text])[0]
        parts = [tokenizer.table.bytes_of(token) for token in ids]
        if tokenizer.puts_blank and parts:
            parts[0] = parts[0][1:]
        assert b"".join(parts) == text.encode()
        spelt.append([part for part in parts if part])
    if not text:
        return
    chunks = cut(*(np.cumsum([len(part) for part in parts]) for parts in spelt))
    counts = [np.bincount(of).tolist() for of in (chunks.of_T, chunks.of_U)]
    assert list(zip(*counts, strict=True)) == plain_chunks(*spelt)


def test_with_one_tokenizer_every_token_is_a_chunk() -> None:
    chunks = cut(np.array([1, 3, 4]), np.array([1, 3, 4]))
    assert chunks.count == 3 and chunks.of_T.tolist() == chunks.of_U.tolist() == [0, 1, 2]


def test_digits_that_are_split_otherwise_make_one_chunk() -> None:
    # 123 456 / 1 2 3 4 5 6, and 12 345 6 / 123 456
    assert cut(np.array([3, 6]), np.arange(1, 7)).count == 2
    assert cut(np.array([2, 5, 6]), np.array([3, 6])).count == 1


def test_a_token_without_bytes_belongs_to_the_token_behind_it() -> None:
    # an end, a blank of which no byte is left, and a digit / an end, and a digit
    chunks = cut(np.array([2, 3, 3, 4]), np.array([2, 3, 4]))
    assert chunks.of_T.tolist() == [0, 1, 2, 2] and chunks.of_U.tolist() == [0, 1, 2]
    chunks = cut(np.array([0, 1]), np.array([0, 0, 1]))
    assert chunks.of_T.tolist() == [0, 0] and chunks.of_U.tolist() == [0, 0, 0]


def test_longer_tokens_are_those_that_begin_with_the_labels_bytes_in_both_recordings(
    known: dict[str, tuple[TextTokenizer, int]],
) -> None:
    table = known["pieces"][0].table
    ids = {table.bytes_of(token): token for token in range(len(table.length_V))}
    row = [ids[b"th"], ids[b"the"], ids[b"t"], ids[b" the"]]
    probs = np.array([0.4, 0.3, 0.2, 0.05])
    topk = TopkTargets(
        np.array([[row]], np.int32), np.log(probs)[None, None].astype(np.float32), np.full((1, 1), 0.05, np.float32),
        np.log(probs[:1])[None].astype(np.float32), np.zeros((1, 1, 0), np.float32),
    )  # fmt: skip
    sampled = SampledTargets(
        np.array([[4]], np.int32), np.array(row, np.int32), np.array([8, 6, 4, 2], np.int32), topk.label_logprobs_BL
    )
    shared_V = np.zeros(len(table.length_V), np.bool_)
    label_N = np.array([ids[b"th"]])
    assert longer_tokens(topk, label_N, 4, table, shared_V).all_N == pytest.approx([0.3])
    assert longer_tokens(sampled, label_N, 20, table, shared_V).all_N == pytest.approx([0.3])
    shared_V[ids[b"the"]] = True
    assert longer_tokens(topk, label_N, 4, table, shared_V).other_N.tolist() == [0]


def test_a_border_is_as_reliable_as_its_token_is_beside_longer_ones() -> None:
    ends = np.array([2, 4])
    longer = Longer(np.array([0.3, 0.0], np.float32), np.array([0.1, 0.0], np.float32))
    logprobs = np.log([0.3, 0.5])
    same = border_probabilities(cut(ends, ends), ends, np.array([2, 2]), ends, np.array([2, 2]), logprobs, longer)
    assert same == pytest.approx([0.75, 1])
    # the student ends the chunk with other bytes, and leaves out other texts
    ends_U, lengths_U = np.array([1, 2, 4]), np.array([1, 1, 2])
    other = border_probabilities(cut(ends, ends_U), ends, np.array([2, 2]), ends_U, lengths_U, logprobs, longer)
    assert other == pytest.approx([0.5, 1])
    unknown = border_probabilities(
        Chunks(np.zeros(1, np.int64), np.zeros(1, np.int64), 1), np.array([1]), np.array([1]), np.array([1]),
        np.array([1]), np.array([np.nan]), Longer(np.zeros(1, np.float32), np.zeros(1, np.float32)),
    )  # fmt: skip
    assert np.isnan(unknown).all()


@pytest.mark.parametrize(
    "change",
    [
        lambda one: setattr(one, "normalizer", normalizers.Lowercase()),
        lambda one: setattr(one, "decoder", decoders.WordPiece()),
        lambda one: setattr(one, "pre_tokenizer", pre_tokenizers.Whitespace()),
    ],
)
def test_a_tokenizer_that_does_not_give_a_text_back_is_refused(change: Callable[[Tokenizer], None]) -> None:
    tokenizer = train_tokenizer(TEXTS, 290)
    change(tokenizer.backend_tokenizer)
    with pytest.raises(InputError, match="not reversible"):
        TextTokenizer.of(tokenizer, 290, "this one")


def test_a_text_that_does_not_decode_to_itself_is_refused(known: dict[str, tuple[TextTokenizer, int]]) -> None:
    (teacher, eos_id), (student, other_eos) = known["small"], known["pieces"]
    stream = stream_of(teacher, eos_id, [f"the {MARK} cat"] * 5, 8, bos=False)
    with pytest.raises(InputError, match="do not spell the text"):
        align_shard(stream, teacher, StudentFormat(student, other_eos, (), 8, 0.0))


def test_a_document_whose_bytes_are_no_text_is_refused(known: dict[str, tuple[TextTokenizer, int]]) -> None:
    teacher, eos_id = known["small"]
    stream = stream_of(teacher, eos_id, ["the cat sat"] * 5, 8, bos=False)
    lone = next(token for token in range(len(teacher.table.length_V)) if teacher.table.bytes_of(token) == b"\xff")
    stream.ids_T[2] = lone
    with pytest.raises(InputError, match="does not decode to itself"):
        align_shard(stream, teacher, StudentFormat(*known["larger"], (), 8, 0.0))


def test_a_run_with_such_a_tokenizer_is_refused_by_its_setting_before_anything_is_made(tmp_path: Path) -> None:
    tokenizer = train_tokenizer(TEXTS, 290)
    tokenizer.backend_tokenizer.normalizer = normalizers.Lowercase()
    tokenizer.save_pretrained(tmp_path / "changes")
    run = RunFile.model_validate(
        {
            "name": "one",
            "out": str(tmp_path),
            "reuse": {"cache": str(tmp_path)},
            "align": {"tokenizer": str(tmp_path / "changes")},
        }
    )
    with pytest.raises(InputError, match=r"align\.tokenizer: .*changes: .*not reversible"):
        require_tokenizer(run)


def test_pieces_of_bytes_are_bytes_by_their_decoder_and_not_by_their_spelling(
    known: dict[str, tuple[TextTokenizer, int]],
) -> None:
    pieces = known["pieces"][0]
    assert pieces.table.bytes_of(3 + 0x41) == b"A"
    tokenizer = train_tokenizer(TEXTS, 290)
    tokenizer.add_tokens(["<0x41>"])
    token = tokenizer.convert_tokens_to_ids("<0x41>")
    assert TextTokenizer.of(tokenizer, len(tokenizer), "bytes").table.bytes_of(token) == b"<0x41>"


def stream_of(
    tokenizer: TextTokenizer, eos_id: int, texts: list[str], seq_len: int, bos: bool, are_equal: bool = True
) -> TeacherStream:
    """A shard of these documents, packed by the corpus's own packer, whose label logprobs are known numbers.

    They are -1, or fall from -1 on by 1.
    """
    from capgap.pipeline.corpus.pack import Encoded, Packer
    from capgap.pipeline.corpus.sources import Document

    bos_ids = (1,) if bos else ()
    packer = Packer(seq_len, eos_id, "split", bos_ids)
    for text, ids in zip(texts, tokenizer.encode(texts), strict=True):
        packer.add(Encoded(Document("one", text), ids))
    sequences: Sequences = packer.take().sequences
    labels_BL = sequences.tokens_BL1[:, 1:]
    fall_BL = np.arange(labels_BL.size).reshape(labels_BL.shape)
    logprobs_BL = (np.full(labels_BL.shape, -1) if are_equal else -1 - fall_BL).astype(np.float32)
    targets = TopkTargets(
        labels_BL[..., None].copy(), logprobs_BL[..., None].copy(), np.zeros(labels_BL.shape, np.float32), logprobs_BL,
        np.zeros((*labels_BL.shape, 0), np.float32),
    )  # fmt: skip
    size = len(tokenizer.table.length_V)
    shared_V = np.zeros(size, np.bool_)
    return read_stream([(sequences, targets)], facts_of(eos_id, size, bos_ids), 1, tokenizer, shared_V)


@pytest.mark.parametrize("pair", ["small larger", "larger pieces", "pieces blank", "blank small"])
@settings(max_examples=10)
@given(texts=st.lists(ADVERSARIAL, min_size=8, max_size=20))
def test_a_shard_keeps_every_byte_and_the_sum_of_each_chunks_logprobs(
    known: dict[str, tuple[TextTokenizer, int]], pair: str, texts: list[str]
) -> None:
    one, other = pair.split()
    teacher, eos_id = known[one]
    student, other_eos = known[other]
    texts = [*texts, "the cat sat on the mat " * 4]
    stream = stream_of(teacher, eos_id, texts, 16, bos=one == "pieces")
    other_bos = (1,) if other == "blank" else ()
    made = StudentFormat(student, other_eos, other_bos, 12, 0.0)
    sequences, targets, counts = align_shard(stream, teacher, made)
    # the student's tokens, without what begins and fills, spell the same documents
    is_text = sequences.tokens_BL1 < len(student.table.length_V)
    ids = sequences.tokens_BL1[is_text]
    spelt = b"".join(b"\0" if token == other_eos else student.table.bytes_of(int(token)) for token in ids)
    expected = b"".join(
        b"\0" if end else teacher.table.bytes_of(int(token))
        for token, end in zip(stream.ids_T, stream.is_end_T, strict=True)
    )
    if not teacher.puts_blank and not student.puts_blank:
        assert spelt.rstrip(b"\0").startswith(expected.rstrip(b"\0")[: len(expected) - 3])
    assert counts.num_chunks >= counts.num_kept_chunks
    # every target of a kept chunk is a label, and each logprob is a whole number of tokens of minus 1 nat
    left_BL = left_in_chunk(targets)
    assert sequences.mask_BL1[:, 1:][left_BL >= 0].all()
    kept = targets.logprobs_BL[targets.kept_BL]
    assert (kept == np.round(kept)).all() and (kept <= -1).all()
    assert counts.known_nats == pytest.approx(-kept.sum())


def test_with_one_tokenizer_a_shard_stays_as_it_is_and_each_target_is_a_chunk(
    known: dict[str, tuple[TextTokenizer, int]],
) -> None:
    tokenizer, eos_id = known["larger"]
    stream = stream_of(tokenizer, eos_id, TEXTS * 4, 16, bos=False)
    made = StudentFormat(tokenizer, eos_id, (), 16, 0.9)
    sequences, targets, counts = align_shard(stream, tokenizer, made)
    # the last document is cut where the shard ends, and its rest may be cut into other tokens
    rows = slice(0, len(sequences) - 2)
    same = stream.ids_T[: sequences.tokens_BL1[rows].size].reshape(-1, 17)
    assert len(same) > 4 and np.array_equal(sequences.tokens_BL1[rows], same)
    assert targets.ends_BL[rows].all() and targets.kept_BL[rows].all()
    assert (targets.logprobs_BL[rows] == -1).all()
    assert counts.num_documents > 5


@pytest.mark.parametrize("pair", ["larger blank", "blank larger", "blank blank"])
def test_the_end_of_a_document_is_a_chunk_of_its_own_before_a_blank_that_stays_by_itself(
    known: dict[str, tuple[TextTokenizer, int]], pair: str
) -> None:
    (teacher, eos_id), (student, other_eos) = (known[name] for name in pair.split())
    # neither a digit nor a line break is one token with the blank before it
    texts = ["1 the cat", "2 cat", "\nthe cat", "the cat", "3"]
    stream = stream_of(teacher, eos_id, texts * 9, 32, bos=teacher.puts_blank, are_equal=False)
    made = StudentFormat(student, other_eos, (1,) if student.puts_blank else (), 32, 0.0)
    sequences, targets, _ = align_shard(stream, teacher, made)
    is_end_BL = (sequences.tokens_BL1[:, 1:] == other_eos) & sequences.mask_BL1[:, 1:]
    kept_N, known_T = targets.kept_BL[is_end_BL], stream.logprobs_T[stream.is_end_T]
    # a sequence of the teacher may begin with an end, which nothing is known of
    assert kept_N.sum() > 8 and (~kept_N).sum() <= np.isnan(known_T).sum()
    assert set(targets.logprobs_BL[is_end_BL][kept_N].tolist()) <= set(known_T.tolist())
    # what stands before an end ends a chunk too, and the blank behind it ends none
    assert targets.ends_BL[:, :-1][is_end_BL[:, 1:]].all()
    blank = next((token for token, text in student.table.tokens.items() if text == MARK), -1)
    is_first_BL = sequences.starts_BL1[:, :-1] & (sequences.tokens_BL1[:, 1:] == blank)
    assert is_first_BL.any() == student.puts_blank and not targets.ends_BL[is_first_BL].any()


def test_a_blank_whose_document_is_in_the_next_shard_is_not_counted_to_the_end_before_it(
    known: dict[str, tuple[TextTokenizer, int]],
) -> None:
    (teacher, eos_id), (student, other_eos) = known["blank"], known["larger"]
    # blank cat end, blank 1 end, blank: and there the shard ends
    stream = stream_of(teacher, eos_id, ["cat", "1", "2 cat"], 5, bos=False, are_equal=False)
    assert stream.ids_T[-1] == stream.ids_T[2] and stream.is_end_T[-2]
    targets = align_shard(stream, teacher, StudentFormat(student, other_eos, (), 5, 0.0))[1]
    # an end, and the blank with the digit behind it
    assert targets.logprobs_BL[targets.kept_BL].tolist() == [-1, -2 - 3]


def test_a_document_that_goes_on_behind_its_end_is_refused(known: dict[str, tuple[TextTokenizer, int]]) -> None:
    teacher, eos_id = known["larger"]
    tokens_BL1 = np.array([[*teacher.encode(["the"])[0], eos_id, *teacher.encode([" cat"])[0], eos_id]], np.int32)
    shape = tokens_BL1.shape[0], tokens_BL1.shape[1] - 1
    sequences = Sequences(tokens_BL1, np.zeros(tokens_BL1.shape, np.bool_), np.ones(tokens_BL1.shape, np.bool_))
    zeros_BL = np.zeros(shape, np.float32)
    targets = TopkTargets(tokens_BL1[:, 1:, None], zeros_BL[..., None], zeros_BL, zeros_BL, np.zeros((*shape, 0)))
    size = len(teacher.table.length_V)
    with pytest.raises(InputError, match="larger: a document of the cache goes on behind its end; found 1 ends"):
        read_stream([(sequences, targets)], facts_of(eos_id, size), 1, teacher, np.zeros(size, np.bool_))
