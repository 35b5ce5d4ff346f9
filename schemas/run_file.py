"""The run file: the YAML file that names every stage of a run, and the only place where settings are defined.

    run file --> stage instances --> one folder each under `out`, with a manifest

**The sections decide which stages run.** A section that is written requests its stage; without the section, the stage
does not run. `corpus`, `teacher` and `cache` alone make shards; `reuse: {cache: ...}`, `student` and `train` train from
shards that exist already. In Python every section has its defaults; `has` says whether a run has the stage.

Flags of the command line are derived from these models (`--train.learning_rate 1e-3`) and win over the YAML.
"""

from __future__ import annotations

from typing import Self

from pydantic import model_validator

from capgap.schemas.results import TEACHER
from capgap.schemas.run_needs import require_needs
from capgap.schemas.run_sections import RunSections


class RunFile(RunSections):
    """Every setting of a run, with checks that settings of different sections fit together."""

    @model_validator(mode="after")
    def _check(self) -> Self:
        if not self.seeds or len(set(self.seeds)) != len(self.seeds) or min(self.seeds) < 0:
            raise ValueError(f"seeds: found {list(self.seeds)}, expected at least one, none twice, none negative")
        if not self.arms:
            raise ValueError("arms: found none, expected at least one; leave the setting out for `distilled` alone")
        for name in (self.name, *self.arms):
            _require_folder_name(name)
        for arm in self.arms:
            self.train_settings(arm)
        if self.judge is not None:
            self.judge.require_no_key("judge")
        self.cache.server.require_no_key("cache.server")
        for measured in ("benchmarks", "judge"):
            if self.asks_teacher(measured) and TEACHER in self.arms:
                raise ValueError(
                    f"arms: found {TEACHER!r}, expected another name where {measured} names the teacher so too"
                )
        require_needs(self)
        return self


def _require_folder_name(value: str) -> None:
    if not value or value.startswith(".") or any(not (c.isalnum() or c in "-_.") for c in value):
        raise ValueError(f"name, arms: found {value!r}, expected a folder's name: letters, digits, '-', '_' and '.'")
