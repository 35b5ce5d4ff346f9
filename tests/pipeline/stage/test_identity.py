from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from capgap.pipeline.stage.identity import content_of, digest_of, first_difference, identity_of
from capgap.schemas.manifest import FileEntry

# None and a setting that is not there are one to a reader, and to `first_difference`
JSON = st.recursive(
    st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(),
    lambda children: st.lists(children, max_size=3) | st.dictionaries(st.text(max_size=3), children, max_size=3),
    max_leaves=8,
)


@given(values=st.dictionaries(st.text(max_size=3), JSON, max_size=5))
def test_the_order_of_keys_changes_no_digest(values: dict) -> None:
    assert digest_of(dict(reversed(values.items()))) == digest_of(values)


@pytest.mark.parametrize(
    ("one", "other"),
    [({"a": 1}, {"a": "1"}), ({"a": 1}, {"a": True}), ({"a": None}, {}), ([1, 2], [2, 1]), ({"a": 0.1}, {"a": 0.2})],
)
def test_other_values_have_other_digests(one: object, other: object) -> None:
    assert digest_of(one) != digest_of(other)


def test_a_digest_does_not_change_from_version_to_version() -> None:
    """Finished folders are found current by their identity, so an old one must be computed as it was."""
    expected = "e651d2ff8efda11a8fe9a767bd397c40832106beca3ee861dd5c4f6d5448dfcf"
    assert identity_of("cache", {"cache": {"num_samples": 50}}, {"corpus": "c", "teacher": "t"}) == expected


def test_a_value_that_json_cannot_say_has_no_digest() -> None:
    with pytest.raises(ValueError, match="not JSON compliant"):
        digest_of({"a": float("nan")})


def test_stage_settings_and_inputs_each_decide_the_identity() -> None:
    stages, settings = ("train", "eval"), ({}, {"a": 1}, {"a": 2}, {"b": 1})
    inputs = ({}, {"cache": "x"}, {"cache": "y"}, {"corpus": "x"})
    found = {identity_of(*choice) for choice in itertools.product(stages, settings, inputs)}
    assert len(found) == 2 * 4 * 4


def _file(path: str, sha256: str, num_bytes: int = 1) -> FileEntry:
    return FileEntry(path=path, num_bytes=num_bytes, sha256=sha256)


def test_content_is_paths_and_digests_in_any_order() -> None:
    a, b = _file("a", "1"), _file("b", "2")
    assert content_of([a, b]) == content_of([b, a])
    others = [[a], [], [a, _file("b", "3")], [a, _file("c", "2")], [_file("a", "2"), _file("b", "1")]]
    assert len({content_of(files) for files in [[a, b], *others]}) == 6


def test_how_long_things_took_is_no_content() -> None:
    a = _file("model/model.safetensors", "1")
    assert content_of([a, _file("metrics.csv", "2")]) == content_of([a, _file("metrics.csv", "3")]) == content_of([a])
    assert content_of([a, _file("model/metrics.csv", "2")]) != content_of([a])


@pytest.mark.parametrize(
    ("old", "new", "expected"),
    [
        ({"a": 1}, {"a": 1}, None),
        ({"a": 1}, {"a": 2}, ("a", 1, 2)),
        ({"a": {"b": [1], "c": 2}}, {"a": {"b": [1, 2], "c": 3}}, ("a.b", [1], [1, 2])),
        ({"a": {"b": 1}}, {"a": {}}, ("a.b", 1, None)),
        ({"a": {"b": 1}}, {"a": None}, ("a", {"b": 1}, None)),
        ({}, {"z": 1, "m": {"n": 2}}, ("m", None, {"n": 2})),
    ],
)
def test_the_first_difference_is_named_in_full(old: object, new: object, expected: object) -> None:
    assert first_difference(old, new) == expected


@given(old=JSON, new=JSON)
def test_a_difference_is_found_where_there_is_one(old: object, new: object) -> None:
    if first_difference(old, new) is None:
        assert digest_of(old) == digest_of(new) or old == new
    else:
        assert digest_of(old) != digest_of(new)
