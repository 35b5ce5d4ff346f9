"""Files of a given model: those in its folder, and weights that its index names in folders below."""

from __future__ import annotations

import json
from pathlib import Path, PurePath

import pytest

from capgap.pipeline.stage.sources import model_files, place_below

INDEX = "model.safetensors.index.json"


def test_weights_in_folders_below_are_files_of_the_model_where_the_index_names_them(tmp_path: Path) -> None:
    for name in ("config.json", "parts/a.safetensors", "parts/stray.safetensors", "notes.md"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    names = {"x": "parts/a.safetensors", "y": "parts/gone.safetensors", "z": "../../etc/passwd", "w": "/etc/passwd"}
    (tmp_path / INDEX).write_text(json.dumps({"weight_map": names}))
    found = model_files(str(tmp_path))
    assert [file.relative_to(tmp_path).as_posix() for file in found] == ["config.json", INDEX, "parts/a.safetensors"]
    paths = [str(file) for file in found]
    assert [place_below(path, paths) for path in paths] == [file.relative_to(tmp_path) for file in found]
    assert place_below("m/config.json", ["m/config.json", "m/parts/a.safetensors"]) == PurePath("config.json")


@pytest.mark.parametrize("index", ["", "[]", "{}", '{"weight_map": 3}', '{"weight_map": {"x": 3}}', "[" * 100_000])
def test_an_index_that_is_none_names_nothing(tmp_path: Path, index: str) -> None:
    (tmp_path / INDEX).write_text(index)
    assert model_files(str(tmp_path)) == [tmp_path / INDEX]
