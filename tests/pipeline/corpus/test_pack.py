from __future__ import annotations

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from capgap.pipeline.corpus.pack import Encoded, Packer
from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.corpus.whole import say_left_out
from capgap.schemas.errors import InputError
from capgap.schemas.records import Sequences

EOS = 0
LENGTHS = st.lists(st.integers(0, 40), max_size=20)


def _documents(lengths: list[int]) -> list[Encoded]:
    """Documents of that many tokens, no token twice; their text has two bytes a token."""
    ids = itertools.count(1)
    return [
        Encoded(Document(f"document {number}", "\u00fc" * length), list(itertools.islice(ids, length)))
        for number, length in enumerate(lengths)
    ]


@dataclass
class Packed:
    """What came out of a packer that was asked once at the end, and of one that was asked again and again."""

    sequences: Sequences
    num_documents: int
    num_dropped: int
    num_text_bytes: int
    num_text_tokens: int
    num_cut_tokens: int


def pack(
    documents: list[Encoded], seq_len: int, eos_id: int, long_documents: Any, bos_ids: tuple[int, ...] = ()
) -> Packed:
    whole, piecewise = (Packer(seq_len, eos_id, long_documents, bos_ids) for _ in "ab")
    taken = [whole.add(document) for document in documents]
    sequences, begun = whole.take()
    kept = [document for document, num_tokens in zip(documents, taken, strict=True) if num_tokens]
    assert [number for numbers in begun for number in numbers] == list(range(int(sequences.starts_BL1.sum())))
    for tokens_L1, starts_L1, numbers in zip(sequences.tokens_BL1, sequences.starts_BL1, begun, strict=True):
        before = [() if kept[number].mask else bos_ids for number in numbers]
        firsts = [[*bos, *kept[number].ids, eos_id][0] for number, bos in zip(numbers, before, strict=True)]
        assert tokens_L1[starts_L1].tolist() == firsts
    parts, begun_in_parts = [], []
    for document in documents:
        piecewise.add(document)
        part = piecewise.take()
        parts.append(part.sequences)
        begun_in_parts += part.begun
        assert piecewise.num_waiting <= seq_len, "what makes a sequence does not wait"
    assert begun_in_parts == begun
    if parts:
        again = Sequences.joined(parts)
        for name in ("tokens_BL1", "starts_BL1", "mask_BL1"):
            assert np.array_equal(getattr(again, name), getattr(sequences, name)), name
    assert whole.num_waiting == (piecewise.num_waiting if parts else 0)
    return Packed(
        sequences,
        num_documents=int(sequences.starts_BL1.sum()),
        num_dropped=taken.count(0),
        num_text_bytes=sum(len(d.document.text.encode()) for d, n in zip(documents, taken, strict=True) if n),
        num_text_tokens=sum(taken),
        num_cut_tokens=whole.num_waiting,
    )


def _joined(documents: list[Encoded]) -> list[int]:
    return [token for _, ids, _ in documents for token in [*ids, EOS]]


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_sequences_are_the_documents_one_after_the_other_with_an_end_token_each(lengths: list[int], seq_len: int):
    documents = _documents(lengths)
    packed = pack(documents, seq_len, EOS, "split")
    tokens = packed.sequences.tokens_BL1
    assert tokens.dtype == np.int32 and tokens.shape[1] == seq_len + 1
    expected = _joined(documents)
    assert tokens.ravel().tolist() == expected[: tokens.size]
    assert packed.num_text_tokens == len(expected)
    assert packed.num_cut_tokens == len(expected) - tokens.size
    assert packed.num_cut_tokens <= seq_len, "what is cut off would not have filled a sequence"


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_starts_are_the_first_tokens_of_documents(lengths: list[int], seq_len: int) -> None:
    documents = _documents(lengths)
    packed = pack(documents, seq_len, EOS, "split")
    starts = packed.sequences.starts_BL1
    # the token after an end token begins a document, and so does the very first
    expected = [True, *(token == EOS for token in _joined(documents))]
    assert starts.ravel().tolist() == expected[: starts.size]
    assert packed.num_documents == int(starts.sum())
    assert packed.sequences.mask_BL1.all() and packed.sequences.mask_BL1.shape == starts.shape


@given(lengths=LENGTHS, seq_len=st.integers(1, 30))
def test_documents_that_are_too_long_are_dropped_and_the_others_packed_as_if_they_had_not_been(
    lengths: list[int], seq_len: int
) -> None:
    documents = _documents(lengths)
    short = [document for document in documents if len(document.ids) + 1 <= seq_len + 1]
    dropped, expected = pack(documents, seq_len, EOS, "drop"), pack(short, seq_len, EOS, "split")
    assert dropped.num_dropped == len(documents) - len(short)
    for name in ("tokens_BL1", "starts_BL1", "mask_BL1"):
        assert np.array_equal(getattr(dropped.sequences, name), getattr(expected.sequences, name))
    assert dropped.num_text_bytes == expected.num_text_bytes == sum(2 * len(document.ids) for document in short)
    assert (dropped.num_documents, dropped.num_cut_tokens) == (expected.num_documents, expected.num_cut_tokens)


@pytest.mark.parametrize(("length", "fits"), [(7, True), (8, True), (9, False)])
def test_a_document_fits_if_a_sequence_holds_it_and_its_end_token(length: int, fits: bool) -> None:
    documents = _documents([3, length, 2])
    if fits:
        assert pack(documents, 8, EOS, "refuse").num_dropped == 0
        return
    with pytest.raises(
        InputError, match=r"document 1: .* longer than a sequence; found 9 tokens and an end token, exp"
    ):
        pack(documents, 8, EOS, "refuse")


def test_too_little_text_makes_no_sequence() -> None:
    packed = pack(_documents([5, 1]), 8, EOS, "split")
    assert packed.sequences.tokens_BL1.shape == (0, 9)
    assert (packed.num_documents, packed.num_text_tokens, packed.num_cut_tokens) == (0, 8, 8)


@given(lengths=LENGTHS, seq_len=st.integers(1, 30), seed=st.integers(0, 99))
def test_of_a_conversation_the_masked_tokens_count_and_the_added_end_does_not(
    lengths: list[int], seq_len: int, seed: int
) -> None:
    rng = np.random.default_rng(seed)
    documents, expected = [], []
    for number, (document, ids, _) in enumerate(_documents(lengths)):
        mask = [bool(m) for m in rng.random(len(ids)) < 0.5]
        ended = ids and number % 3 == 0
        # one that brings its own end token keeps the mask on it, and gets no second one
        own = ([*ids, EOS], [*mask, True]) if ended else (ids, mask)
        documents.append(Encoded(document, *own) if number % 3 < 2 else Encoded(document, ids))
        expected += [*zip(ids, mask if number % 3 < 2 else [True] * len(ids), strict=True)]
        expected.append((EOS, bool(ended) or number % 3 == 2))
    packed = pack(documents, seq_len, EOS, "split").sequences
    found = list(zip(packed.tokens_BL1.ravel().tolist(), packed.mask_BL1.ravel().tolist(), strict=True))
    assert found == expected[: len(found)]
    assert len(expected) - len(found) <= seq_len


BOS = (9001,)


@given(lengths=LENGTHS, seq_len=st.integers(3, 30), bos=st.sampled_from([BOS, (9001, 9002)]))
def test_every_document_and_every_rest_of_one_begins_with_bos(
    lengths: list[int], seq_len: int, bos: tuple[int, ...]
) -> None:
    packed = pack(_documents(lengths), seq_len, EOS, "split", bos)
    tokens, starts, mask = (getattr(packed.sequences, name) for name in ("tokens_BL1", "starts_BL1", "mask_BL1"))
    assert tokens.shape[1] == seq_len + 1
    assert packed.num_text_tokens == len(_joined(_documents(lengths))), "what is put before a text is none"
    assert not mask[np.isin(tokens, bos)].any(), "no beginning is a label"
    # without them the text is the same, and nothing of it is lost but what fills no sequence at the end
    text = tokens[~np.isin(tokens, bos)]
    assert text.tolist() == _joined(_documents(lengths))[: len(text)]
    assert packed.num_cut_tokens <= seq_len
    for row, start in zip(tokens, starts, strict=True):
        assert row[0] == bos[0], "a sequence begins with it, whether a document does there or not"
        for place in np.flatnonzero(start):
            assert tuple(row[place : place + len(bos)]) == bos[: len(row) - place]


def test_the_first_token_of_a_rest_is_no_label_and_that_of_a_document_is() -> None:
    packed = pack(_documents([6, 12]), 8, EOS, "split", BOS).sequences
    assert packed.tokens_BL1.tolist() == [[9001, 1, 2, 3, 4, 5, 6, 0, 9001], [9001, 7, 8, 9, 10, 11, 12, 13, 14]]
    assert packed.starts_BL1.astype(int).tolist() == [[1, 0, 0, 0, 0, 0, 0, 0, 1], [0] * 9]
    assert packed.mask_BL1.astype(int).tolist() == [[0, 1, 1, 1, 1, 1, 1, 1, 0], [0, 1, 1, 1, 1, 1, 1, 1, 1]]
    rest = pack(_documents([20]), 8, EOS, "split", BOS).sequences
    assert rest.tokens_BL1[1].tolist() == [9001, *range(9, 17)]
    assert rest.mask_BL1[1].astype(int).tolist() == [0, 0, 1, 1, 1, 1, 1, 1, 1], "9 can be told from nothing"


def test_a_conversation_begins_as_its_template_says() -> None:
    document = Document("talk", "text")
    begun = Encoded(document, [9001, 5, 6], [False, True, True])
    bare = Encoded(document, [5, 6, 7, 8, 10, 11], [False, True, True, True, True, True])
    packed = pack([begun, bare], 4, EOS, "split", BOS).sequences
    assert packed.tokens_BL1.tolist() == [[9001, 5, 6, 0, 5], [6, 7, 8, 10, 11]]
    assert packed.mask_BL1.astype(int).tolist() == [[0, 1, 1, 0, 0], [1, 1, 1, 1, 1]]


def test_what_stands_before_a_text_counts_in_its_length() -> None:
    assert pack(_documents([7]), 8, EOS, "refuse", BOS).num_dropped == 0
    with pytest.raises(InputError, match="found 9 tokens and an end token, expected at most 9 in all"):
        pack(_documents([8]), 8, EOS, "refuse", BOS)


def test_a_row_of_one_length_is_named_by_its_tokens_where_answers_are_left_out(caplog) -> None:
    with caplog.at_level("WARNING", "capgap"):
        say_left_out("tune", 0, 0, 16)
        say_left_out("tune", 3, 1, 16)
    assert caplog.messages == [
        "tune: left out 3 answers that do not end within a row of 17 tokens, among them all of 1 conversations"
    ]
