"""The report stage, which writes `report.json`, `table.txt`, `report.html` and `published.html`."""

from __future__ import annotations

from capgap.pipeline.report.gather import gather
from capgap.pipeline.report.page import PUBLISHED_NAME, render_page, render_published
from capgap.pipeline.report.summary import REPORT_NAME
from capgap.pipeline.report.table import table_text
from capgap.pipeline.stage.context import StageContext, StageResult
from capgap.pipeline.stage.heartbeat import begin_phase
from capgap.pipeline.store.files import write_atomically

PAGE_NAME = "report.html"
TABLE_NAME = "table.txt"


def run(context: StageContext) -> StageResult:
    """Write the results of the run as JSON for programs, as text for a terminal and as HTML pages for a browser."""
    begin_phase("reads what the other stages wrote")
    report = gather(context)
    begin_phase("draws the charts")
    write_atomically(context.folder / REPORT_NAME, report.model_dump_json(indent=2) + "\n")
    write_atomically(context.folder / TABLE_NAME, table_text(report.table))
    write_atomically(context.folder / PAGE_NAME, render_page(report))
    write_atomically(context.folder / PUBLISHED_NAME, render_published(report))
    return StageResult(totals={"models": len(report.results.models), "verdicts": list(report.table.verdicts)})
