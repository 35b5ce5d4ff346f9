"""A format takes only the settings that mean something to it; a default that is spelt out decides the same."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from capgap.schemas.run_file import RunFile
from capgap.schemas.run_quantize import QuantizeSettings


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        ({"format": "int3"}, "format"),
        ({"format": "int4", "group_size": 48}, "32, 64 or 128"),
        ({"format": "mxfp4", "group_size": 32}, "group_size: found 32 with format mxfp4, expected it with int4"),
        ({"format": "int8", "activations": False}, "activations: found false with format int8, expected int4 or mxfp4"),
        ({"format": "mxfp4", "embedding": True}, "embedding: found true with format mxfp4, expected int8 or int4"),
        ({"format": "int4", "activations": True}, "activations: found true with format int4, expected false"),
    ],
)
def test_what_means_nothing_is_refused(settings: dict[str, object], said: str) -> None:
    with pytest.raises(ValidationError, match=said):
        QuantizeSettings.model_validate(settings)


def test_a_default_that_is_spelt_out_decides_the_same() -> None:
    assert QuantizeSettings(format="int4").decisive() == QuantizeSettings(format="int4", group_size=128).decisive()
    assert QuantizeSettings(format="mxfp4").decisive() == QuantizeSettings(format="mxfp4", activations=True).decisive()
    assert QuantizeSettings(format="mxfp4").decisive() != QuantizeSettings(format="mxfp4", activations=False).decisive()


def test_a_student_of_few_bits_is_not_divided_among_devices() -> None:
    run = {
        "name": "few",
        "out": "somewhere",
        "reuse": {"cache": "somewhere"},
        "student": {"path": "somewhere", "quantize": {"format": "int8"}},
        "train": {"strategy": "fsdp2"},
    }
    with pytest.raises(ValidationError, match=r"arms\.distilled\.strategy: found fsdp2 with student\.quantize"):
        RunFile.model_validate(run)
