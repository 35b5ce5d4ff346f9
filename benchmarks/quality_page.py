"""Tables and a picture of the results of benchmarks/quality.py: shares of the gain, paired by seed.

python benchmarks/quality_page.py docs/quality.md README.md    fill in the tables whose marks are in the pages
python benchmarks/quality_page.py --picture docs/quality.svg   draw the shares over the bytes per token

Legend: S seeds.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

# added here because Python with -P or PYTHONSAFEPATH does not search the folder of this script
sys.path.insert(0, str(Path(__file__).parent))

from machine import RESULTS, every_kept
from matplotlib.figure import Figure
from page_tables import Row, mark, with_tables
from quality_arms import CROSS_ENTROPY, ONLINE, RUNS, TAILS, TOP_KS, arms
from result_lines import Line, Results, one_measurement
from standalone_svg import standalone

from capgap.pipeline.pages.charts import legend
from capgap.pipeline.pages.svg import INK, SERIES, draw

_HEAD = (
    "targets",
    "bytes/token",
    "ids/token",
    "held-out loss, nats",
    "share of the gain, %",
    "KL to the teacher, nats",
    "share of that gain, %",
    "seeds",
)
_SAMPLED = "sampled, n = {}, systematic"
# columns and rows of README's table
_IN_SHORT = (0, 1, 3, 5, 6, 7)
_ARMS_IN_SHORT = [
    CROSS_ENTROPY,
    ONLINE,
    *(_SAMPLED.format(number) for number in (50, 25, 12)),
    *(f"sampled, n = 50, alpha {alpha}" for alpha in (0.9, 0.5)),
    *(f"top-64, {tail}" for tail in ("renorm", "ghost", "label")),
]
_SHORT_HEAD = {"share of that gain, %": "share of online's fall in KL, %"}
_NUM_SAMPLES = (6, 12, 25, 50, 100)
_MARKERS = "D^vP"


def main() -> None:
    """Write the pages with their tables filled in, and the picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("pages", nargs="*", type=Path, help="Markdown with marks of tables")
    parser.add_argument("--picture", type=Path, help="an SVG file to write")
    parser.add_argument("--run", choices=list(RUNS), default="smol", help="run of the picture")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of what benchmarks/quality.py kept")
    flags = parser.parse_args()
    for page in flags.pages:
        page.write_text(filled(page.read_text(), flags.results))
    if flags.picture:
        flags.picture.write_text(picture(kept(flags.results, flags.run)))


def filled(page: str, results: Path) -> str:
    """Return the page with the tables filled in whose marks it has."""
    tables: dict[str, Sequence[Row]] = {}
    for run in RUNS:
        lines = kept(results, run)
        whole, short = run, f"{run}, in short"
        if mark("quality_page.py", whole) in page:
            tables[whole] = table(lines)
        if mark("quality_page.py", short) in page:
            rows = [[row[column] for column in _IN_SHORT] for row in table(lines, _ARMS_IN_SHORT)]
            tables[short] = [[_SHORT_HEAD.get(name, name) for name in rows[0]], *rows[1:]]
        for others in ("peers", "estimators"):
            if mark("quality_page.py", f"{run}, {others}") in page:
                beside = Results(results / f"{others}-{run}.jsonl").lines
                tables[f"{run}, {others}"] = table(lines + beside, list(dict.fromkeys(one["arm"] for one in beside)))
        if mark("quality_page.py", f"{run}, losses") in page:
            tables[f"{run}, losses"] = losses_table(every_kept(f"peer-losses-{run}", results))
    return with_tables(page, "quality_page.py", tables)


def kept(results: Path, run: str) -> list[Line]:
    """Return the lines of a run's largest measurement."""
    return one_measurement(Results(results / f"quality-{run}.jsonl").lines)


def table(lines: list[Line], names: list[str] | None = None) -> list[Row]:
    """Return one row per arm of these names (by default, of `arms`); after +- follows the standard error over seeds."""
    rows: list[Row] = [_HEAD, ("---", *["---:"] * (len(_HEAD) - 1))]
    for name in names or [arm.name for arm in arms()]:
        own = [one for one in lines if one["arm"] == name]
        if own:
            rows.append(
                (
                    name,
                    _measured(own[0]["bytes_per_token"]),
                    _measured(own[0]["ids_per_token"]),
                    _mean([_loss(one) for one in own], 4),
                    _mean(shares(lines, name, _loss), 1, 100),
                    _mean([kl_of(one) for one in own], 4),
                    _mean(shares(lines, name, kl_of), 1, 100),
                    str(len(own)),
                )
            )
    return rows


def losses_table(kept_losses: Iterable[tuple[str, Any]]) -> list[Row]:
    """Return one row per machine and loss of benchmarks/peer_losses.py, with the capgap loss of nearest gradient."""
    head = ("loss", "nearest of capgap's", "gradient differs by", "CPU s", "machine")
    rows: list[Row] = [head, ("---", "---", "---:", "---:", "---")]
    for device, content in kept_losses:
        for one in content["figures"]["losses"]:
            nearest, away = min(one["gradient_from"].items(), key=lambda pair: pair[1], default=("", None))
            tail = f"`tail: {nearest.partition(', ')[2]}`" if nearest else ""
            rows.append((one["loss"], tail, "" if away is None else f"{away:.2g}", f"{one['cpu_s']:.2f}", device))
    return rows


def shares(lines: list[Line], arm: str, value: Callable[[Line], float]) -> list[float]:
    """Return the arm's share of the fall from cross-entropy to online, for each seed that has all three arms."""
    by = {(one["arm"], one["seed"]): value(one) for one in lines}
    found = []
    for seed in sorted({seed for _, seed in by}):
        most, least, own = (by.get((name, seed)) for name in (CROSS_ENTROPY, ONLINE, arm))
        if most is not None and least is not None and own is not None:
            found.append((most - own) / (most - least))
    return found


def kl_of(line: Line) -> float:
    """Return the KL to the teacher after a training, in nats/token."""
    return float(line["against_teacher"]["kl"])


def picture(lines: list[Line]) -> str:
    """Return an SVG file: each recording's share of the fall in KL over its bytes per token, if it has all seeds."""
    num_seeds = len(shares(lines, ONLINE, kl_of))
    points = {
        arm.name: (own[0]["bytes_per_token"], 100 * statistics.fmean(shares(lines, arm.name, kl_of)))
        for arm in arms()
        if (own := [one for one in lines if one["arm"] == arm.name])
        and own[0]["bytes_per_token"] is not None
        and len(shares(lines, arm.name, kl_of)) == num_seeds
    }
    series = {"samples": [_SAMPLED.format(n) for n in _NUM_SAMPLES]}
    series |= {f"top-k, {tail}": [f"top-{k}, {tail}" for k in TOP_KS] for tail in TAILS}

    def paint(figure: Figure) -> None:
        axes = figure.subplots()
        axes.axhline(100, color=INK, linewidth=0.8, linestyle=":")
        for index, (label, names) in enumerate(series.items()):
            found = sorted(points[name] for name in names if name in points)
            if not found:
                continue
            axes.plot(
                [size for size, _ in found],
                [share for _, share in found],
                marker="o" if index == 0 else _MARKERS[index - 1],
                color=SERIES[index],
                linewidth=1.6 if index == 0 else 1.0,
                markersize=4,
                label=label,
            )
        for number in _NUM_SAMPLES:
            if (point := points.get(_SAMPLED.format(number))) is not None:
                # the last label stands to the right of its point, where no other label is
                place = (6, -3) if number == _NUM_SAMPLES[-1] else (5, -9)
                axes.annotate(f"n = {number}", point, place, textcoords="offset points", color=INK)
        for k in TOP_KS:
            found = [points[name] for tail in TAILS if (name := f"top-{k}, {tail}") in points]
            if found:
                highest = max(found, key=lambda point: point[1])
                axes.annotate(f"k = {k}", highest, (0, 6), textcoords="offset points", color=INK, ha="center")
        top = axes.get_xlim()[1]
        axes.annotate("online distillation", (top, 100), (-4, 3), textcoords="offset points", ha="right")
        axes.set_ylim(top=107)  # room for these words above all points
        axes.set_xlabel("bytes per token of the cache")
        axes.set_ylabel("share of the fall in KL, %")
        legend(figure, axes)

    said = "; ".join(f"{name}: {share:.0f} % at {size:.0f} bytes" for name, (size, share) in points.items())
    return standalone(
        str(draw("quality", f"Share of online distillation's fall in KL by recording. {said}", 3.5, paint))
    )


def _loss(line: Line) -> float:
    return float(line["heldout_loss"])


def _measured(value: float | None) -> str:
    return "" if value is None else f"{value:.1f}"


def _mean(values_S: list[float], digits: int, scale: float = 1.0) -> str:
    if not values_S:
        return ""
    mean = f"{scale * statistics.mean(values_S):.{digits}f}"
    if len(values_S) < 2:
        return mean
    return f"{mean} +- {scale * statistics.stdev(values_S) / math.sqrt(len(values_S)):.{digits}f}"


if __name__ == "__main__":
    main()
