"""A tuning whose loss is not finite, computed again alone with the marks of roles and the adapters that it had."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from capgap.pipeline.stage.context import Instance
from capgap.pipeline.train.replay import replay
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import InputError
from capgap.schemas.run_file import RunFile


@pytest.mark.parametrize("checkpoint_every_steps", [1, 100])
@pytest.mark.parametrize("lora", [None, {"r": 4, "alpha": 8}], ids=["all weights", "adapters"])
def test_a_tuning_with_marks_of_roles_or_adapters_is_computed_again_alone(
    make_run: Callable[..., RunFile], tmp_path: Path, lora: dict[str, Any] | None, checkpoint_every_steps: int
) -> None:
    settings = {"learning_rate": 1e30, "warmup_fraction": 0.0, "checkpoint_every_steps": checkpoint_every_steps}
    with pytest.raises(InputError, match="is not finite") as caught:
        carry_out(make_run(tmp_path, lora=lora, **settings), Instance("tune", seed=0))
    command = re.search(r"capgap.pipeline.train.replay (\S+)$", str(caught.value))
    assert command is not None
    weights, computed, *_ = replay(Path(command[1]))
    assert ("step-0000000" in weights) == (checkpoint_every_steps == 1)
    found = re.match(r"micro-batch \d+: loss (\S+), gradient's norm (\S+);", computed)
    assert found is not None
    if checkpoint_every_steps == 1:
        assert {found[1], found[2]} & {"nan", "inf"}, "the weights of the checkpoint are at 1e30"
    else:
        assert 4 < float(found[1]) < 7, "about the logarithm of the vocabulary, as the weights are the first ones"
