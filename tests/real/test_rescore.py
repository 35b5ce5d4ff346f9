"""`verify --rescore` on a real model in bfloat16: a teacher that has moved is told apart, other batches are not."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics

import pytest
import torch
from transformers import AutoModelForCausalLM

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.verify import rescore as rescoring
from capgap.pipeline.verify.rescore import rescore
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import MismatchError
from capgap.schemas.run_file import RunFile

RealModel = Callable[[str], Path]
SEQ_LEN, NUM_TARGETS = 128, 4096


@pytest.fixture(scope="module")
def model(real_model: RealModel) -> Path:
    return real_model("SmolLM2-135M-Instruct")


@pytest.fixture(scope="module")
def cache(model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """In bfloat16, two sequences at once."""
    folder = tmp_path_factory.mktemp("rescore")
    (folder / "text").mkdir()
    for number, topic in enumerate(sorted(topics)[:24]):
        (folder / "text" / f"{number:02d}.txt").write_text(topics[topic])
    run = RunFile.model_validate(
        {
            "name": "real",
            "out": str(folder / "out"),
            "device": "cpu",
            "corpus": {
                "sources": [str(folder / "text")],
                "tokenizer": str(model),
                "seq_len": SEQ_LEN,
                "teacher_fraction": 0.0,
                "heldout_fraction": 0.2,
                "shard_sequences": 32,
            },
            "teacher": {"path": str(model)},
            "cache": {
                "engine": "transformers",
                "dtype": "bfloat16",
                "recording": "topk",
                "max_tokens": NUM_TARGETS,
                "num_heldout_sequences": 0,
                "batch_tokens": 2 * (SEQ_LEN + 1),
            },
        }
    )
    for stage in ("corpus", "teacher", "cache"):
        carry_out(run, Instance(stage))
    return folder / "out" / "cache"


@pytest.fixture(scope="module", params=["each by itself", "all together"])
def moved(model: Path, tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> str:
    """The model with the weights of its last layer moved by half a percent."""
    folder = tmp_path_factory.mktemp("moved")
    found = AutoModelForCausalLM.from_pretrained(model, dtype=torch.bfloat16)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for weight in found.model.layers[-1].parameters():
            noise = torch.randn(weight.shape, generator=generator) if request.param == "each by itself" else 1.0
            weight.copy_((weight.float() * (1 + 0.005 * noise)).to(weight.dtype))
    found.save_pretrained(folder)
    return str(folder)


def test_the_same_machine_gives_the_very_same_rows(cache: Path) -> None:
    lines = list(rescore(cache, 0.001))
    assert "4,096 of 4,096 rows are the very same" in lines[1] and lines[-1] == "cache: agrees with its teacher"


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_other_batches_and_another_dtype_are_the_same_teacher(cache: Path, dtype, monkeypatch) -> None:
    _elsewhere(monkeypatch)
    lines = list(rescore(cache, 0.001, dtype=dtype))
    print("\n".join(lines))
    assert lines[-1] == "cache: agrees with its teacher"


@pytest.mark.parametrize("is_elsewhere", [False, True], ids=["here", "elsewhere"])
def test_a_last_layer_moved_by_half_a_percent_is_told_apart(cache, moved, monkeypatch, is_elsewhere) -> None:
    if is_elsewhere:
        _elsewhere(monkeypatch)
    with pytest.raises(MismatchError, match="does not hold what its teacher gives") as refused:
        list(rescore(cache, 0.001, teacher=moved))
    print(refused.value)
    assert ("of the rows as they were" in str(refused.value)) == (not is_elsewhere)


def _elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """Another machine, whose batches are of eight sequences."""
    own = rescoring._job

    def job(*arguments, **named):
        made = own(*arguments, **named)
        settings = made.settings.model_copy(update={"batch_tokens": 8 * (SEQ_LEN + 1)})
        return rescoring.replace(made, settings=settings)

    monkeypatch.setattr(rescoring, "_job", job)
    monkeypatch.setattr(rescoring, "machine_kind", lambda device: "another")
