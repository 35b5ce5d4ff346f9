from __future__ import annotations

import json
from itertools import permutations
from pathlib import Path

import pytest

from capgap.pipeline.answers.questions import read_questions
from capgap.schemas.errors import InputError
from capgap.schemas.run_judge import MT_BENCH_TEMPERATURES

GOOD = {"question_id": 1, "category": "math", "turns": ["3 times 4?", "And 5?"]}


def write(folder: Path, *lines: object) -> str:
    path = folder / "questions.jsonl"
    path.write_text("".join(line if isinstance(line, str) else json.dumps(line) + "\n" for line in lines))
    return str(path)


def test_capgap_s_own_are_of_all_eight_categories_with_a_reference_where_there_is_one_right_answer() -> None:
    questions = read_questions(None)
    assert len(questions) == 12
    assert {question.category for question in questions} == set(MT_BENCH_TEMPERATURES)
    for question in questions:
        right = question.category in ("math", "coding", "reasoning", "extraction")
        assert bool(question.reference) == right, question.question_id


def test_the_references_of_the_sums_are_right() -> None:
    """Worked out again, by counting."""
    by_first = {question.turns[0]: question.reference for question in read_questions(None)}
    (numbers,) = (right for asked, right in by_first.items() if "three digits" in asked)
    found = [n for n in range(100, 1000) if n % 7 == 0 and n % 5]
    assert numbers[0].startswith(f"{len(found)}:")
    assert numbers[1].startswith(f"{sum(n % 2 for n in found)}:")
    (tank,) = (right for asked, right in by_first.items() if "tank" in asked)
    assert tank[0].startswith(f"{360 / (360 / 12 + 360 / 18):g} minutes")
    assert tank[1].startswith(f"{3 + (360 - 3 * 50) / 30:g} minutes")
    (chairs,) = (right for asked, right in by_first.items() if "chairs" in asked and "Ada" in asked)
    seated = [p for p in permutations(("Ada", "Ben", "Cid", "Dora")) if _allowed(p)]
    assert len(seated) == 2 and all(", ".join(p) in chairs[0] for p in seated)
    together = [p for p in seated if abs(p.index("Cid") - p.index("Ben")) == 1]
    assert chairs[1] == f"One: {', '.join(together[0])}." and len(together) == 1
    (orders,) = (right for asked, right in by_first.items() if "4471" in asked)
    rows = json.loads(orders[0])
    totals: dict[str, float] = {}
    for row in rows:
        totals[row["customer"]] = totals.get(row["customer"], 0) + row["count"] * row["unit_price"]
    best = max(totals, key=lambda name: totals[name])
    assert orders[1].startswith(f"{best}, {totals[best]:g} euros")


def _allowed(people: tuple[str, ...]) -> bool:
    ada, ben, cid, dora = map(people.index, ("Ada", "Ben", "Cid", "Dora"))
    return ada in (1, 2) and ben < cid and dora == ada - 1


def test_what_other_files_say_beside_is_left_alone(tmp_path: Path) -> None:
    (question,) = read_questions(write(tmp_path, GOOD | {"reference": None, "reference_model": "someone"}, "\n"))
    assert question.question_id == 1 and question.reference == ()


def test_a_line_ends_at_a_line_feed_alone_and_a_byte_order_mark_is_no_part_of_it(tmp_path: Path) -> None:
    asked = "one\u2028two\u2029three\x85four"
    lines = [GOOD | {"turns": [asked, "And 5?"]}, GOOD | {"question_id": 2}]
    path = tmp_path / "questions.jsonl"
    text = "\r\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text("\ufeff" + text, encoding="utf-8", newline="")
    first, second = read_questions(str(path))
    assert (first.turns[0], second.question_id) == (asked, 2)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{\n", "Expecting property name"),
        ("[]\n", "found list, no object"),
        ({**GOOD, "turns": ["one"]}, "found turns: found 1, expected 2, none empty"),
        ({**GOOD, "turns": ["one", " "]}, "none empty"),
        ({**GOOD, "reference": ["one"]}, "reference: found 1, expected one for each of 2 turns"),
        ({"question_id": 1, "turns": ["one", "two"]}, "found category: Field required"),
    ],
)
def test_a_line_that_is_no_question_is_named(tmp_path: Path, line: object, said: str) -> None:
    with pytest.raises(InputError) as caught:
        read_questions(write(tmp_path, GOOD | {"question_id": 0}, line))
    assert f"{tmp_path}/questions.jsonl:2: is no question; found" in str(caught.value)
    assert said in str(caught.value)


def test_two_questions_of_one_id_no_question_and_no_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"questions.jsonl:2: two questions have the same question_id; found 1"):
        read_questions(write(tmp_path, GOOD, GOOD))
    with pytest.raises(InputError, match="holds no question"):
        read_questions(write(tmp_path, "\n"))
    with pytest.raises(InputError, match="no such file"):
        read_questions(str(tmp_path / "none.jsonl"))
    (tmp_path / "bytes.jsonl").write_bytes(b"\xff\xfe")
    with pytest.raises(InputError, match="is no text in UTF-8"):
        read_questions(str(tmp_path / "bytes.jsonl"))


def test_a_byte_order_mark_is_no_part_of_the_first_question(tmp_path: Path) -> None:
    path = Path(write(tmp_path, GOOD))
    path.write_bytes(b"\xef\xbb\xbf" + path.read_bytes())
    assert read_questions(str(path))[0].question_id == 1
