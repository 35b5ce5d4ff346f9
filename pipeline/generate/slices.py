"""Makes the units of one slice of a text; each unit is claimed before the writer sees its prompts."""

from __future__ import annotations

from capgap.pipeline.cache.vllm_start import leave_cores_unbound
from capgap.pipeline.generate.stage import prepare as prepare
from capgap.pipeline.generate.unit import TextJob, TextMaker
from capgap.pipeline.stage.claims import Claims
from capgap.pipeline.stage.context import Slice
from capgap.pipeline.stage.progress import progress


def make_slice(job: TextJob, part: Slice) -> None:
    """Make the units of the slice that are neither finished nor claimed by another process.

    The claim of a killed process becomes free, and its unit is made here if it belongs to this slice.

    Raises:
        CapgapError, OSError: a unit cannot be made, for the reasons that `TextMaker.make` names.
    """
    leave_cores_unbound()
    claims, maker = Claims(job.units, part), TextMaker(job)
    wanted = {unit for unit in range(job.units.total) if part.has(unit)}
    try:
        done = job.num_prompts(wanted & job.units.made())
        with progress(f"generate: slice {part}", job.num_prompts(wanted), "prompts", done) as meter:
            for unit in claims.take_each():
                record = maker.make(unit)
                claims.release(unit)
                meter.advance(record.counts.num_prompts, record.counts.num_answer_tokens)
    finally:
        maker.close()
        claims.close()
