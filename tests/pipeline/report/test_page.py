from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from capgap.pipeline.report import stage
from capgap.pipeline.report.gather import gather
from capgap.pipeline.report.opening import opening_figures
from capgap.pipeline.report.stages import duration
from capgap.pipeline.report.summary import RoundLine
from capgap.schemas.results import RESULTS_NAME, EvalResults, ReliabilityBin

ARMS = ("cross_entropy", "distilled", "mixed")
VOID = {"meta", "br", "hr", "img", "input", "link", "wbr"}


class Page(HTMLParser):
    """Collects what the tests ask for and fails on tags that do not nest."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert not self.open

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.texts.append(data)

    def attributes(self, name):
        return [attrs[name] for _, attrs in self.tags if name in attrs]


@pytest.fixture(scope="module")
def html(tmp_path_factory, make_context) -> str:
    losses = {"cross_entropy": [3.53, 3.56], "distilled": [3.50, 3.52], "mixed": [3.51, 3.52]}
    sources = ["/data/<img src=x onerror=alert(1)>.txt"]
    context = make_context(tmp_path_factory.mktemp("run"), losses, corpus={"sources": sources})
    stage.run(context)
    return (context.folder / "report.html").read_text()


@pytest.fixture(scope="module")
def page(html) -> Page:
    return Page(html)


def test_nothing_is_loaded_from_elsewhere_and_nothing_runs(html, page):
    assert not re.search(r"https?:|url\((?!#)|@import|<script|<link|<img|<iframe", html)
    assert not page.attributes("src")
    ids = page.attributes("id")
    targets = [value.removeprefix("#") for value in page.attributes("href")]
    assert targets and all(target in ids for target in targets)
    assert not [name for _, attrs in page.tags for name in attrs if name.startswith("on")]


def test_ids_are_unique(page):
    ids = page.attributes("id")
    assert len(ids) == len(set(ids))


def test_every_chart_is_named_and_has_its_numbers_as_a_table(page):
    charts = [attrs for tag, attrs in page.tags if tag == "svg"]
    assert len(charts) == 10
    assert all(attrs["role"] == "img" for attrs in charts)
    labels = " ".join(attrs["aria-label"] for attrs in charts)
    assert "distilled on cross_entropy, seed 1 +0.0400" in labels
    assert "teacher 2.9000" in labels
    assert [tag for tag, _ in page.tags].count("details") == 11
    for title in ("Gain of distillation", "Held-out loss", "Students in training", "Teacher in training"):
        assert title in page.texts


def test_the_figures_are_those_of_the_table(page):
    cells = " ".join(page.texts)
    assert "3.5100 \u00b1 0.0141" in cells
    assert "61.0" in cells
    # two seeds leave one degree of freedom: 0.035 +- 12.7 x 0.005
    claim = "distilled and cross_entropy cannot be told apart: distilled is ahead by 0.0350"
    assert any(text.startswith(claim) for text in page.texts)


def test_stages_are_listed_with_identity_time_and_their_own_versions(page):
    texts = page.texts
    assert "train/distilled/seed-1" in texts
    last = len(texts) - 1 - texts[::-1].index("train/distilled/seed-1")
    row = [text for text in texts[last:] if text.strip()][:8]
    # 2 million tokens in 75 s on one device
    assert row[1:6] == ["1 min 15 s", "2,000,000", "26,667", "1,500", "0.0208"]
    assert all(re.fullmatch(r"[0-9a-f]{12}", digest) for digest in row[6:])
    # all but corpus and eval's report hold a device: teacher, cache, two students, six trainings and eval
    assert any(text.startswith("all stages: 15 min 0 s, with 0.2292 device hours") for text in texts)
    assert any(text.endswith("All stages: python 3.11.2, torch 2.13.0.") for text in texts)


def test_the_time_of_a_stage_is_said_to_be_that_of_all_its_processes(html, page):
    text = " ".join(" ".join(page.texts).split())
    assert "Time is that of all processes of a stage together" in text
    assert "shows fewer than one process made" in text and "too high" not in text
    assert "Tokens a second over the time of all processes of the stage together" in html
    assert "The time of all processes of a stage together, including starts" in text
    assert "seconds of all processes together" in text and "last process" not in html


def test_samples_stand_side_by_side(page):
    texts = page.texts
    names = ["the text itself", "teacher", *ARMS]
    assert [text for text in texts[len(texts) - 1 - texts[::-1].index("Beginning 2") :] if text in names][:5] == names
    # of each arm the first seed; the others stand in the results
    assert "  return train/mixed/seed-0 <1>" in texts and "  return train/mixed/seed-1 <1>" not in texts


def test_text_of_the_run_is_escaped(html, page):
    assert "&lt;script&gt;alert(1)&lt;/script&gt;" in html
    assert "vllm <script>alert(1)</script>" in page.texts
    assert any("<img src=x onerror=alert(1)>" in text for text in page.texts)
    assert any("<b>vllm</b> 0.30.1" in text for text in page.texts)


def test_colours_follow_the_reader(html):
    assert "prefers-color-scheme: dark" in html
    assert "@media print" in html
    assert "#0a0a" not in html
    assert "stroke: var(--series-2)" in html


def test_the_page_is_the_same_every_time(tmp_path, make_context):
    pages = []
    for name in ("a", "b"):
        context = make_context(tmp_path / name, {"distilled": [3.5]})
        stage.run(context)
        pages.append((context.folder / "report.html").read_text())
    assert pages[0] == pages[1]


@pytest.mark.parametrize(
    ("seconds", "text"), [(3.21, "3.2 s"), (59.96, "1 min 0 s"), (125, "2 min 5 s"), (7380, "2 h 3 min")]
)
def test_durations_are_readable(seconds, text):
    assert duration(seconds) == text


def test_the_page_opens_with_figures_a_list_of_contents_and_where_it_was_made(html, page):
    texts = [text.strip() for text in page.texts]
    # 7.61M parameters to 1.24M; the mean losses 3.545, 3.51 and the teacher's 2.9
    assert texts[texts.index("smaller than the teacher") + 1] == "6.14 x"
    assert texts[texts.index("of the gap to the teacher closed") + 1] == "5 %"
    assert "1.05M" in texts and "tokens read by the teacher" in texts
    contents = html[html.index('<nav class="contents"') : html.index("</nav>")]
    for part in ("result", "gains", "losses", "stage-times", "document-lengths", "samples", "stages", "settings"):
        assert f'href="#{part}"' in contents
    assert "Documents by length in tokens: 8 to 15: 2; 16 to 31: 0; 32 to 63: 7" in html
    assert 'title="Share of drafts that the teacher would accept' in html


def test_a_run_with_rounds_opens_without_the_tokens_of_its_first_cache(tmp_path, make_context):
    report = gather(make_context(tmp_path / "run", {"distilled": [3.5]}))
    line = RoundLine(
        arm="distilled",
        seed=0,
        round=0,
        is_trained=True,
        writer="teacher",
        num_answers=1,
        mean_tokens=1.0,
        cut_off=0.0,
        repetition=0.0,
        entropy=1.0,
        writer_kl=None,
        right=None,
        teacher_tokens_before=0,
        teacher_tokens=1,
        learnt=None,
        staleness=None,
    )
    in_rounds = report.model_copy(update={"rounds": (line,)})
    assert any(figure.name == "tokens read by the teacher" for figure in opening_figures(report))
    assert not any(figure.name == "tokens read by the teacher" for figure in opening_figures(in_rounds))


def test_what_others_published_is_on_a_page_of_its_own(html, tmp_path, make_context):
    context = make_context(tmp_path, {"distilled": [3.5]})
    stage.run(context)
    other = (context.folder / "published.html").read_text()
    assert "What others published" in other and "MiniMA" in other
    assert "MiniMA" not in html and "published.html" in html


def test_confidence_is_drawn_against_how_often_it_is_right(tmp_path, make_context):
    context = make_context(tmp_path, {"distilled": [3.5]})
    path = context.input("eval").path / RESULTS_NAME
    results = EvalResults.model_validate_json(path.read_bytes())
    bins = tuple(ReliabilityBin(num_tokens=100, confidence=sure, right=sure - 0.05) for sure in (0.1, 0.5, 0.9))
    models = tuple(one.model_copy(update={"ece": 0.05, "reliability": bins}) for one in results.models)
    path.write_text(results.model_copy(update={"models": models}).model_dump_json())
    stage.run(context)
    shown = Page((context.folder / "report.html").read_text())
    labels = " ".join(shown.attributes("aria-label"))
    assert "Reliability of the models' top-1 tokens: teacher ECE 5.0 %; distilled ECE 5.0 %" in labels
    assert "85.0 %" in shown.texts
