from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capgap.pipeline.corpus.sources import Document
from capgap.pipeline.corpus.split import SPLITS, split_documents, split_of

FRACTIONS = st.tuples(st.floats(0, 0.6), st.floats(0.01, 0.39))


def _documents(texts: list[str]) -> list[Document]:
    return [Document(f"document {number}", text) for number, text in enumerate(texts)]


@given(texts=st.lists(st.text(max_size=4), max_size=30), fractions=FRACTIONS)
def test_every_text_is_in_one_split_once_in_its_order(texts: list[str], fractions: tuple[float, float]) -> None:
    documents = _documents(texts)
    splits, num_repeated = split_documents(documents, *fractions)
    found = [document for split in SPLITS for document in splits[split]]
    firsts = [document for number, document in enumerate(documents) if document.text not in texts[:number]]
    assert sorted(found, key=documents.index) == firsts
    assert num_repeated == len(documents) - len(firsts)
    for split in SPLITS:
        assert splits[split] == [d for d in firsts if split_of(d.text, *fractions) == split]


@given(text=st.text(), others=st.lists(st.text(max_size=3), max_size=10))
def test_a_document_does_not_move_when_others_come_or_go(text: str, others: list[str]) -> None:
    splits, _ = split_documents(_documents([*others, text]), 0.5, 0.2)
    assert text in [document.text for document in splits[split_of(text, 0.5, 0.2)]]


@pytest.mark.parametrize("teacher", [0.0, 0.3, 0.7])
@pytest.mark.parametrize("heldout", [0.05, 0.25])
def test_the_shares_are_what_was_asked_for(teacher: float, heldout: float) -> None:
    num = 20000
    splits, num_repeated = split_documents(_documents([f"text {number}" for number in range(num)]), teacher, heldout)
    assert num_repeated == 0
    for split, share in (("teacher", teacher), ("heldout", heldout), ("student", 1 - teacher - heldout)):
        # a binomial share of 20000 deviates by at most 0.0035; four deviations
        assert len(splits[split]) / num == pytest.approx(share, abs=0.014)
    assert (len(splits["teacher"]) == 0) is (teacher == 0)


def test_a_larger_share_for_the_teacher_takes_from_the_student_alone() -> None:
    documents = _documents([f"text {number}" for number in range(2000)])
    small, large = split_documents(documents, 0.3, 0.1)[0], split_documents(documents, 0.6, 0.1)[0]
    assert small["heldout"] == large["heldout"]
    assert set(small["teacher"]) < set(large["teacher"])


def test_the_split_of_a_text_is_pinned() -> None:
    """A text that changed sides with a version of capgap could be trained on and then held out."""
    expected = {"": "student", "a": "teacher", "e": "heldout", "text": "student", "\u00fc": "teacher"}
    assert {text: split_of(text, 0.5, 0.2) for text in expected} == expected
