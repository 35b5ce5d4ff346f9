"""Fits the table of runs and writes `law.json`.

table --curves--> TeacherCurve --contrasts--> verdict --best--> CurveFit --global_law--> GlobalLaw
  |              '--regret--> RegretTable ------------------------------------------|
  '--frontier--> Frontier -----------------------------------------------------> LawFit (law.json)
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pydantic import ValidationError

from capgap.pipeline.law.curve_fit import fit_curve
from capgap.pipeline.law.frontier import frontiers
from capgap.pipeline.law.grid import curves, missing_runs
from capgap.pipeline.law.law_axes import laws
from capgap.pipeline.law.regret import regret_tables
from capgap.pipeline.law.shared import joined, read_published, read_submission, score_published
from capgap.pipeline.law.table import check, read_table
from capgap.pipeline.law.verdict import MIN_DELTA
from capgap.pipeline.store.files import sha256_of, write_atomically
from capgap.schemas.errors import InputError
from capgap.schemas.law_curve import Size
from capgap.schemas.law_fit import LAW_NAME, LawFit


def fit_table(
    path: Path,
    size: Size = "total",
    min_delta: float = MIN_DELTA,
    added: Sequence[Path] = (),
    published: Path | None = None,
) -> LawFit:
    """Fit a table: curves, laws, regrets and frontiers.

    Args:
        path: Path of the table.
        size: Which parameters count as size, of teachers and students alike.
        min_delta: Difference below which two teachers count as equally good, nats/token.
        added: Paths of submissions by others, whose rows are added to the table's.
        published: Path of a file of published results, on which the rules are scored too.

    Raises:
        InputError: A file cannot be read, a run is in the table twice, or it has no supervised or no distilled run.
        MismatchError: The rows are not comparable in one grid.
    """
    runs = read_table(path)
    if added:
        runs = joined(runs, [read_submission(one) for one in added])
        check(runs, " + ".join(map(str, (path, *added))))
    results = () if published is None else read_published(published).results
    found = curves(runs)
    fitted = tuple(fit_curve(curve, size, min_delta) for curve in found)
    names = sorted({name for run in runs for name in run.common})
    return LawFit(
        table=str(path),
        table_sha256=sha256_of(path),
        num_runs=sum(run.loss is not None for run in runs),
        size=size,
        kept=next(run.cache.kept for run in runs if run.cache is not None),
        common={name: str(runs[0].common[name]) for name in names},
        missing=missing_runs(runs),
        curves=fitted,
        laws=laws(fitted),
        regrets=regret_tables(found, size),
        frontiers=frontiers(runs),
        added={str(one): sha256_of(one) for one in added},
        published=results,
        published_rules=score_published(results) if results else (),
    )


def write_fit(folder: Path, law: LawFit) -> Path:
    """Write `law.json` and return its path."""
    folder.mkdir(parents=True, exist_ok=True)
    write_atomically(folder / LAW_NAME, law.model_dump_json(indent=2) + "\n")
    return folder / LAW_NAME


def read_fit(path: Path) -> LawFit:
    """Read the fit from a file, or from `law.json` in a folder.

    Raises:
        InputError: There is no fit, or it cannot be read.
    """
    file = path / LAW_NAME if path.is_dir() else path
    try:
        return LawFit.model_validate_json(file.read_bytes())
    except FileNotFoundError:
        raise InputError("there is no fit", where=file, fix="make it with `capgap law fit TABLE`") from None
    except ValidationError as error:
        reason = error.errors()[0]["msg"]
        raise InputError("not a fit", where=file, found=reason, fix="make it with `capgap law fit TABLE`") from None
