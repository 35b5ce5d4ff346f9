"""Compute a kept batch again by itself: `python -m capgap.pipeline.train.replay FOLDER [--model FOLDER]`.

The weights are those of the training's newest checkpoint, or those with which it began if there is none. A fault in the
data shows at once. A fault that develops in the weights may need the last steps before it, which are taken again if the
same `capgap` command is repeated.
"""

from __future__ import annotations

import argparse
import contextlib
import dataclasses
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from capgap.pipeline.models.trainable import load_to_train
from capgap.pipeline.train.checkpoints import newest_checkpoint
from capgap.pipeline.train.kept_batches import KeptBatch, load_batches
from capgap.pipeline.train.module import DistillationModule
from capgap.pipeline.train.objective import Objective
from capgap.pipeline.train.saved import read_checkpoint, whole
from capgap.pipeline.train.task import TrainingTask
from capgap.pipeline.tune.lora import Adapters
from capgap.pipeline.tune.template import extend_vocabulary
from capgap.schemas.errors import CapgapError, InputError
from capgap.schemas.run_optimization import OptimizationSettings
from capgap.schemas.run_tune import LoraSettings


def setting_of(task: TrainingTask, model: PreTrainedModel, checkpoints: Path, num_steps: int) -> dict[str, Any]:
    """Return the JSON values that a replay needs.

    Args:
        task: The training.
        model: The student.
        checkpoints: The folder of the training's checkpoints.
        num_steps: Number of optimizer steps in the whole training.
    """
    steps = task.steps
    if task.teacher is not None:
        steps = dataclasses.replace(steps, not_repeated="the loss needs the teacher, which stood beside the student")
    return {
        "model": model.name_or_path,
        "checkpoints": str(checkpoints.resolve()),
        "settings": task.settings.model_dump(mode="json", include=set(OptimizationSettings.model_fields)),
        "objective": dataclasses.asdict(task.objective),
        "alpha": task.alpha,
        "num_steps": num_steps,
        "temperature": task.temperature,
        "vocab_size": task.training.codec.vocab_size,
        "seed": task.seed,
        "steps": dataclasses.asdict(steps) | {"lora": None if steps.lora is None else steps.lora.model_dump()},
    }


def replay(folder: Path, model: str | None = None) -> Iterator[str]:
    """Yield a line about the weights, then one about each micro-batch: its loss, gradient norm and sequences.

    Args:
        folder: The folder that the training's error names.
        model: Folder of a model of the same shape, if the training's model has moved or never had a folder.

    Raises:
        InputError: There is no kept batch or no model, or the training's model was made by a step that is not repeated.
    """
    kept, setting = load_batches(folder)
    if setting["steps"]["not_repeated"]:
        raise InputError(
            "the batch cannot be computed again alone",
            where=folder,
            found=setting["steps"]["not_repeated"],
            expected="a model that its folder gives",
            fix="repeat the training's command, which goes on from its newest checkpoint",
        )
    path = model or setting["model"]
    if not path:
        raise InputError("the model had no folder", where=folder, fix="name a model of the same shape with --model")
    settings = OptimizationSettings.model_validate(setting["settings"])
    objective = Objective(**setting["objective"])
    module = DistillationModule(
        _model(path, setting, torch.bfloat16 if settings.precision == "bf16-true" else torch.float32),
        settings,
        setting["num_steps"],
        setting["alpha"],
        setting["temperature"],
        setting["vocab_size"],
        objective,
    )
    checkpoint = newest_checkpoint(Path(setting["checkpoints"]))
    if checkpoint is not None:
        module.load_state_dict(
            {name: whole(value) for name, value in read_checkpoint(checkpoint)["state_dict"].items()},
            strict=module.strict_loading,
        )
    yield f"step {setting['step']}: the {setting['what']} was {setting['value']}; weights of {checkpoint or path}"
    module.train()
    alpha = objective.alpha(setting["alpha"], setting["step"] - 1, setting["num_steps"])
    for one in kept:
        yield _computed(module, one, alpha, settings.precision == "bf16-mixed")


def _model(path: str, setting: dict[str, Any], dtype: torch.dtype) -> PreTrainedModel:
    """Load the model, and add tokens for roles and adapters as the training did."""
    steps = setting["steps"]
    model = load_to_train(path, dtype, steps["trust_remote_code"])
    extend_vocabulary(model, steps["old_size"], steps["new_size"])
    if steps["lora"] is not None:
        Adapters(model, LoraSettings.model_validate(steps["lora"]), setting["seed"])
    return model


def _computed(module: DistillationModule, one: KeptBatch, alpha: float, is_mixed: bool) -> str:
    module.zero_grad()
    with torch.autocast("cpu", torch.bfloat16) if is_mixed else contextlib.nullcontext():
        loss = module.loss(one.batch, alpha).loss
    torch.autograd.backward(loss)
    norm = torch.nn.utils.get_total_norm([p.grad for p in module.parameters() if p.grad is not None])
    return (
        f"micro-batch {one.number}: loss {float(loss.detach()):g}, gradient's norm {float(norm):g}; "
        f"at fault was {'; '.join(one.at_fault)}"
    )


def main(argv: list[str] | None = None) -> int:
    """Run the command line and return its exit code."""
    parser = argparse.ArgumentParser(prog="replay", description="Compute a kept batch again by itself, on the CPU.")
    parser.add_argument("folder", type=Path, help="the folder that the training's error names")
    parser.add_argument("--model", help="a folder of the model, if the training's folder is gone or it had none")
    flags = parser.parse_args(argv)
    try:
        for line in replay(flags.folder, flags.model):
            print(line)
    except CapgapError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    return 0


if __name__ == "__main__":
    sys.exit(main())
