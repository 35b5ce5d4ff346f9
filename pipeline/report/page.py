"""Renders the HTML page of a run, one file without scripts that loads nothing from elsewhere."""

from __future__ import annotations

import json
from pathlib import Path

from capgap.pipeline.fidelity.text import summary
from capgap.pipeline.pages.templates import page_template
from capgap.pipeline.report.benchmarks import benchmark_cells, benchmark_headings
from capgap.pipeline.report.charts import charts
from capgap.pipeline.report.frontier_charts import frontier_charts, published_chart
from capgap.pipeline.report.judge_tables import judge_line, judge_tables
from capgap.pipeline.report.nearness import DIFFERENCE_HEADINGS, difference_rows
from capgap.pipeline.report.opening import opening_figures, origin
from capgap.pipeline.report.round_staleness import staleness_charts
from capgap.pipeline.report.rounds import HEADINGS as HEADINGS_OF_ROUNDS
from capgap.pipeline.report.rounds import NOTE as ROUNDS_NOTE
from capgap.pipeline.report.rounds import round_charts, round_rows
from capgap.pipeline.report.run_charts import run_charts
from capgap.pipeline.report.samples import shown_samples
from capgap.pipeline.report.stages import STAGE_HEADINGS, stage_row, total_line
from capgap.pipeline.report.summary import Report, StageLine
from capgap.pipeline.report.table import HEADINGS, cells
from capgap.pipeline.report.training_charts import training_charts
from capgap.schemas.facts import RecordingFacts

PUBLISHED_NAME = "published.html"

_TEMPLATE = Path(__file__).parent / "report.html.j2"
_PUBLISHED = Path(__file__).parent / "published.html.j2"


def render_page(report: Report) -> str:
    """Render the page of a run; all texts of the run are escaped."""
    common = _common_versions(report.stages)
    return page_template(_TEMPLATE).render(
        report=report,
        headings=HEADINGS,
        rows=[cells(row) for row in report.table.rows],
        benchmarks=_benchmarks(report),
        figures=opening_figures(report),
        origin=origin(report),
        charts=(
            *charts(report),
            *round_charts(report.rounds, report.results.arms),
            *staleness_charts(report.rounds, report.results.arms),
            *training_charts(report.curves, report.results.arms),
            *frontier_charts(report.frontier, report.results.arms),
            *run_charts(report),
        ),
        published=PUBLISHED_NAME,
        round_headings=HEADINGS_OF_ROUNDS,
        rounds=round_rows(report.rounds),
        round_note=ROUNDS_NOTE,
        difference_headings=DIFFERENCE_HEADINGS,
        differences=difference_rows(report.results),
        judge_tables=() if report.judge is None else judge_tables(report.judge),
        judge_line="" if report.judge is None else judge_line(report.judge),
        samples=shown_samples(report.results),
        stage_headings=STAGE_HEADINGS,
        stages=[stage_row(stage) for stage in report.stages],
        stage_total=total_line(report.stages),
        own_versions=[(one.instance, own) for one in report.stages if (own := _own_versions(one, common))],
        common=_listed(common),
        facts=_facts(report),
        settings=json.dumps(report.settings, indent=2, ensure_ascii=False),
    )


def render_published(report: Report) -> str:
    """Render the page of published models; it shows this run's models too where they were measured alike."""
    chart = published_chart(report.frontier, report.results.arms)
    return page_template(_PUBLISHED).render(report=report, chart=chart)


def _benchmarks(report: Report) -> tuple[tuple[str, ...], list[tuple[str, ...]], tuple[str, ...]] | None:
    """Return the headings, the rows and the notes of the table of benchmarks; None without benchmarks."""
    found = report.table.benchmarks
    return None if found is None else (benchmark_headings(found), benchmark_cells(found), found.notes)


def _facts(report: Report) -> tuple[tuple[str, str], ...]:
    cache, results = report.cache, report.results
    recordings = sorted(cache.facts.recordings.items())
    size = sum(cache.num_bytes.values())
    num_files = cache.num_shards * len(recordings)
    return (
        *(("recording", f"{name}, {_kept(name, facts)}, {_temperature(facts)}") for name, facts in recordings),
        ("tokens", f"{cache.num_tokens:,}"),
        ("size", f"{size / 1e6:,.1f} MB in {num_files} shard{'' if num_files == 1 else 's'}"),
        ("bytes per token", ", ".join(f"{cache.bytes_per_token(name):.1f}" for name, _ in recordings)),
        *(("fidelity", line) for line in (summary(report.fidelity) if report.fidelity else ())),
        ("teacher's loss on the cached text", _nats(cache.facts.mean_label_loss)),
        ("vocabulary", f"{cache.facts.tokenizer.vocab_size:,} ({cache.facts.padded_vocab_size:,} with padding)"),
        ("engine", ", ".join((*cache.facts.engines, *cache.facts.dtypes))),
        ("measured on", f"{results.num_sequences:,} held-out sequences, {results.num_labels:,} tokens"),
        (
            "full distributions on",
            f"{results.num_full_sequences:,} of these sequences, {results.num_full_labels:,} tokens",
        ),
    )


def _nats(loss: float | None) -> str:
    return "unknown" if loss is None else f"{loss:.4f} nats/token"


def _kept(name: str, facts: RecordingFacts) -> str:
    if name == "chunks":
        return "likelihoods of chunks, of a teacher with other tokens"
    return f"{facts.num_ids} {'samples' if name == 'sampled' else 'top-k tokens'} of each distribution"


def _temperature(facts: RecordingFacts) -> str:
    temperatures = ", ".join(f"{one:g}" for one in facts.temperatures)
    return f"temperature{'' if len(facts.temperatures) == 1 else 's'} {temperatures}"


def _common_versions(stages: tuple[StageLine, ...]) -> dict[str, str]:
    shared = set.intersection(*(set(stage.versions.items()) for stage in stages)) if stages else set()
    return dict(sorted(shared))


def _own_versions(stage: StageLine, common: dict[str, str]) -> str:
    return _listed({name: version for name, version in stage.versions.items() if name not in common})


def _listed(versions: dict[str, str]) -> str:
    return ", ".join(f"{name} {version}" for name, version in versions.items())
