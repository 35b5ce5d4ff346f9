from __future__ import annotations

from typing import get_args

import pytest

from capgap.kernels.sparse_kl import Divergence, Tail
from capgap.pipeline.train.objective import Objective
from capgap.schemas.run_model import TrainSettings


@pytest.mark.parametrize(("setting", "known"), [("divergence", Divergence), ("tail", Tail)])
def test_settings_name_what_the_loss_has(setting: str, known) -> None:
    annotation = TrainSettings.model_fields[setting].annotation
    names = {name for part in (annotation, *get_args(annotation)) for name in get_args(part) if isinstance(name, str)}
    assert names == set(get_args(known))


def test_no_choice_is_the_default_objective() -> None:
    settings = TrainSettings()
    assert Objective() == Objective(settings.divergence, settings.tail, settings.beta)
