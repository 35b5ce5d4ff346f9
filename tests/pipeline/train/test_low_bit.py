"""Students of few bits through the stages: what they begin with and leave, and that a killed training ends alike."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny_runs import NEEDED, SEQ_LEN, TRAIN

from capgap.pipeline.models.load import load_model
from capgap.pipeline.models.trainable import load_to_train
from capgap.pipeline.report.summary import REPORT_NAME, Report
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import CapgapError, CorruptError
from capgap.schemas.results import RESULTS_NAME, EvalResults
from capgap.schemas.run_file import RunFile

PTQ = Instance("train", "ptq", 1)
STEP = 4 * SEQ_LEN
INT4 = {"format": "int4", "group_size": 32, "head": True, "embedding": True}


@pytest.fixture(scope="module")
def low_bit(made, tmp_path_factory) -> dict[str, Any]:
    """A run of students in MXFP4 from a cache that is made."""
    given = made["number"]
    return given | {
        "out": str(tmp_path_factory.mktemp("low-bit")),
        "reuse": {stage: f"{given['out']}/{stage}" for stage in ("corpus", "teacher", "cache")},
        "student": given["student"] | {"quantize": {"format": "mxfp4"}},
        "train": given["train"] | {"max_tokens": 6 * STEP, "checkpoint_every_steps": 2},
        "arms": {"distilled": {}, "ptq": {"alpha": 0.0, "max_tokens": 0}},
        "eval": {"num_sequences": 4, "num_full_sequences": 2, "num_text_samples": 0},
    }


def _weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def test_a_student_of_few_bits_is_trained_packed_and_measured(low_bit: dict[str, Any]) -> None:
    run = RunFile.model_validate(low_bit)
    student = carry_out(run, NEEDED[3])
    trained, untrained = carry_out(run, TRAIN), carry_out(run, PTQ)
    out = Path(run.out)
    assert {file.path.split("/")[0] for file in trained.files if "/" in file.path} == {"model", "high_precision"}
    begun, before = (_weights(out / name / "model") for name in (NEEDED[3].name, PTQ.name))
    assert all(torch.equal(begun[name], before[name]) for name in begun), "what is not trained is what was rounded"
    assert any(name.endswith("weight_packed") for name in begun)
    assert untrained.totals["num_steps"] == 0 and trained.totals["num_steps"] == 6
    after = _weights(out / TRAIN.name / "high_precision")
    assert after.keys() == _weights(out / NEEDED[3].name / "high_precision").keys()
    assert trained.facts["num_parameters"] == student.facts["num_parameters"] == sum(w.numel() for w in after.values())
    assert "in mxfp4" in (out / TRAIN.name / "model" / "README.md").read_text()
    # what eval loads computes what was trained, but for the bfloat16 of embedding and norms: activations at the end of
    # a step, of which MXFP4 has few, then fall to either side
    ids_BL = torch.arange(20).reshape(2, 10)
    path = str(out / TRAIN.name / "model")
    with torch.no_grad():
        served, learnt = (m(ids_BL).logits for m in (load_model(path, "cpu", torch.float32), load_to_train(path, None)))
    assert (served - learnt).abs().mean() < 0.1 * learnt.std()
    results_folder = out / "eval"
    carry_out(run, Instance("eval"))
    results = EvalResults.model_validate_json((results_folder / RESULTS_NAME).read_bytes())
    losses = {model.arm: model.loss for model in results.models}
    apart = {model.arm: model.against_teacher.kl for model in results.models if model.against_teacher}
    assert apart["distilled"] < apart["ptq"] - 0.01
    # its loss before the first step is that of the student that was rounded
    assert abs(trained.totals["first_validation_loss"] - losses["ptq"]) < 0.05


def test_weights_beside_a_student_that_were_damaged_are_found(low_bit: dict[str, Any], tmp_path: Path) -> None:
    run = RunFile.model_validate(low_bit | {"out": str(tmp_path)})
    carry_out(run, NEEDED[3])
    file = tmp_path / NEEDED[3].name / "high_precision" / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[-1] ^= 1
    file.write_bytes(damaged)
    with pytest.raises(CorruptError, match="the model's file is not what it was"):
        carry_out(run, TRAIN)


@pytest.mark.parametrize("quantize", [{"format": "mxfp4"}, {"format": "nvfp4"}, INT4])
def test_a_training_that_was_killed_ends_in_the_very_bits(
    low_bit: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize: dict[str, Any]
) -> None:
    from capgap.pipeline.train import module as training

    student = low_bit["student"] | {"quantize": quantize}
    runs = [RunFile.model_validate(low_bit | {"out": str(tmp_path / n), "student": student}) for n in ("a", "b")]
    for run in runs:
        carry_out(run, NEEDED[3])
    whole = carry_out(runs[0], TRAIN)
    taken = training.DistillationModule.training_step

    def dies(self: Any, batch: Any, batch_idx: int) -> Any:
        if self.global_step == 4:
            raise KeyboardInterrupt
        return taken(self, batch, batch_idx)

    with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
        patched.setattr(training.DistillationModule, "training_step", dies)
        carry_out(runs[1], TRAIN)
    assert list((tmp_path / "b" / TRAIN.name / "work" / "checkpoints").glob("step-*.ckpt"))
    resumed = carry_out(runs[1], TRAIN)
    digests = [{f.path: f.sha256 for f in m.files if f.path.endswith(".safetensors")} for m in (whole, resumed)]
    assert len(digests[0]) == 2 and digests[0] == digests[1]


def test_a_pruned_student_is_quantised_and_healed_by_the_same_path(low_bit: dict[str, Any], tmp_path: Path) -> None:
    teacher = load_model(low_bit["teacher"]["path"], "cpu").config
    prune = {"intermediate_size": 32, "num_layers": 1}
    assert teacher.hidden_size % 32 == 0
    student = {"prune": prune, "quantize": {"format": "int4", "group_size": 32, "head": True}}
    run = RunFile.model_validate(low_bit | {"out": str(tmp_path), "student": student})
    made = carry_out(run, NEEDED[3])
    assert made.totals["kl_of_student"] >= 0
    for instance in (TRAIN, PTQ, Instance("eval"), Instance("report")):
        carry_out(run, instance)
    weights = tmp_path / TRAIN.name / "model" / "model.safetensors"
    assert "lm_head.weight_packed" in load_file(weights)
    report = Report.model_validate_json((tmp_path / "report" / REPORT_NAME).read_bytes())
    assert report.low_bit is not None and report.low_bit.num_bytes == weights.stat().st_size
    assert [one.arm for one in report.low_bit.won_back] == ["distilled"] and report.low_bit.won_back[0].kl


def test_what_cannot_be_quantised_is_named_before_the_first_stage(low_bit: dict[str, Any], tmp_path: Path) -> None:
    from capgap.pipeline.student.preflight import require_student

    def refused(**student: Any) -> str:
        with pytest.raises(CapgapError) as error:
            require_student(RunFile.model_validate(low_bit | {"student": student}))
        assert error.value.exit_code == 2
        return str(error.value)

    shape = low_bit["student"]["model"]
    assert "32 inputs in model.layers.0" in refused(model=shape, quantize={"format": "int4"})
    narrow = {"prune": {"hidden_size": 24, "num_heads": 1, "num_key_value_heads": 1}}
    del low_bit["reuse"]["teacher"]
    assert "24 inputs" in refused(**narrow, quantize={"format": "mxfp4"})
    low_bit["reuse"]["teacher"] = str(Path(low_bit["reuse"]["corpus"]).parent / "teacher")
    run = RunFile.model_validate(low_bit | {"out": str(tmp_path)})
    carry_out(run, NEEDED[3])
    folder = str(tmp_path / NEEDED[3].name / "model")
    said = refused(path=folder)
    assert "the model is quantised already" in said and "high_precision" in said
    assert "quantised already" in refused(path=folder, quantize={"format": "int8"})


def test_a_student_goes_on_from_a_cache_alone(low_bit: dict[str, Any], tmp_path: Path) -> None:
    """NVFP4's scale of activations is then measured on the cache's sequences."""
    alone = {key: value for key, value in low_bit.items() if key not in ("corpus", "teacher")}
    student = low_bit["student"] | {"quantize": {"format": "nvfp4", "num_sequences": 6}}
    reuse = {"cache": low_bit["reuse"]["cache"]}
    run = RunFile.model_validate(alone | {"out": str(tmp_path), "reuse": reuse, "student": student})
    carry_out(run, NEEDED[3])
    names = _weights(tmp_path / NEEDED[3].name / "model")
    assert any(name.endswith("input_global_scale") for name in names)
