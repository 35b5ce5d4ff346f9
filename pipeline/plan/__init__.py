"""What a run will cost, before it is started.

    run file, finished folders --work--> tokens and disk of every stage
    stated, measured or computed --rates--> tokens/s --> device hours
    teacher and student --published, break_even--> the published laws' best teacher; from how many students a cache pays

A figure that nothing supports is left out, with what to give for it: nothing here is guessed.
"""

from capgap.pipeline.plan.plan import make_plan
from capgap.pipeline.plan.rates import Stated

__all__ = ["Stated", "make_plan"]
