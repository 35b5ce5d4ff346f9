"""A model from a stranger: its code runs only where the run file says so, and nothing pickled is opened."""

from __future__ import annotations

import json
import os
import pickle
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from processes import Zygote, one_line
from safetensors.torch import load_file

from capgap.pipeline.models.load import load_model
from capgap.schemas.errors import InputError

CODE = """
from transformers import LlamaConfig, LlamaForCausalLM
open({marker!r}, "a").close()
class StrangeConfig(LlamaConfig):
    model_type = "strange"
class StrangeForCausalLM(LlamaForCausalLM):
    config_class = StrangeConfig
"""


@pytest.fixture
def strange(settings: dict[str, Any], tmp_path: Path) -> tuple[Path, Path]:
    """The run's teacher under a name that only its own code knows, and the file that stands there once that has run."""
    folder, marker = tmp_path / "strange", tmp_path / "ran"
    shutil.copytree(settings["teacher"]["path"], folder)
    config = json.loads((folder / "config.json").read_text())
    named = {"AutoConfig": "code.StrangeConfig", "AutoModelForCausalLM": "code.StrangeForCausalLM"}
    config |= {"model_type": "strange", "architectures": ["StrangeForCausalLM"], "auto_map": named}
    (folder / "config.json").write_text(json.dumps(config))
    (folder / "code.py").write_text(CODE.format(marker=str(marker)))
    return folder, marker


@pytest.fixture(autouse=True)
def own_modules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where transformers copies code that is trusted, for whatever this process starts."""
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))


@pytest.mark.parametrize("stage", ["teacher", "student"])
def test_code_of_a_model_is_refused_with_the_setting_that_would_run_it(
    zygote: Zygote, copy: Path, run_file: Path, strange: tuple[Path, Path], stage: str
) -> None:
    folder, marker = strange
    given = ("--teacher.path", folder) if stage == "teacher" else ("--student.model", "null", "--student.path", folder)
    code, said = zygote.run(stage, run_file, "--out", copy, *given)
    assert code != 0
    line = one_line(said)
    assert "needs Python code that comes with it, which is not run" in line
    assert f"{stage}.trust_remote_code" in line
    assert not marker.exists()


def test_code_of_a_teacher_runs_where_the_run_file_says_so(
    zygote: Zygote, copy: Path, made: Path, run_file: Path, strange: tuple[Path, Path]
) -> None:
    folder, marker = strange
    trusted = ("--teacher.path", folder, "--teacher.trust_remote_code", "true")
    for stage in ("teacher", "cache"):
        code, said = zygote.run(stage, run_file, "--out", copy, *trusted, "--remake", stage)
        assert code == 0, said
    assert marker.exists()
    # it is the same model
    shards = [path.name for path in (made / "cache").glob("*.tar")]
    assert all((copy / "cache" / name).read_bytes() == (made / "cache" / name).read_bytes() for name in shards)
    # and the cache, from which anyone may start, trusts nobody
    marker.unlink()
    code, said = zygote.run("verify", "--rescore", "0.1", "--device", "cpu", copy / "cache")
    assert code != 0 and "which is not run" in one_line(said)
    assert not marker.exists()
    code, said = zygote.run("verify", "--rescore", "0.1", "--device", "cpu", "--trust-remote-code", copy / "cache")
    assert code == 0 and marker.exists(), said


def test_code_of_a_student_runs_where_the_run_file_says_so(
    zygote: Zygote, copy: Path, run_file: Path, strange: tuple[Path, Path]
) -> None:
    folder, marker = strange
    given = ("--out", copy, "--student.model", "null", "--student.path", folder)
    code, said = zygote.run("student", run_file, *given, "--student.trust_remote_code", "true")
    assert code == 0 and marker.exists(), said
    marker.unlink()
    code, said = zygote.run("train", run_file, *given, "--student.trust_remote_code", "true", "--remake", "train")
    assert code == 0 and marker.exists(), said


class _Payload:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[str]]:
        return os.system, (f"touch {self.marker}",)


@pytest.mark.parametrize("evil", [True, False])
def test_pickled_weights_are_not_opened(settings: dict[str, Any], tmp_path: Path, evil: bool) -> None:
    folder, marker = tmp_path / "pickled", tmp_path / "ran"
    shutil.copytree(settings["teacher"]["path"], folder)
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    if evil:
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps(_Payload(marker)))
    else:
        torch.save(weights, folder / "pytorch_model.bin")
    with pytest.raises(InputError, match=r"no weights as safetensors; found only pytorch_model\.bin, expected"):
        load_model(str(folder), "cpu")
    assert not marker.exists()


def test_the_payload_would_work(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(_Payload(tmp_path / "ran")))
    assert (tmp_path / "ran").exists()
