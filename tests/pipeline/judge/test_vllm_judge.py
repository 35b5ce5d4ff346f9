"""A real server of vLLM as the judge: a tiny model of random weights, whose nonsense is counted as such."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest
from judge_runs import QUESTIONS, tiny_model, tokenizer
from vllm_server import vllm_server

from capgap.pipeline.models.load import save_model
from capgap.pipeline.stage.context import Instance
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.judge_results import JudgeResults, Verdict

NUM_VERDICTS = (3 + 2 * 3) * len(QUESTIONS) * 2

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    """Base URL and folder of the model behind it."""
    folder = tmp_path_factory.mktemp("judge-model")
    save_model(tiny_model(9, positions=4096), tokenizer(), folder)
    with vllm_server(folder, "tiny-judge", tmp_path_factory.mktemp("log") / "vllm.log") as url:
        yield url, folder


def test_a_random_model_s_nonsense_is_kept_and_counted_and_rates_nothing(make_run, served) -> None:
    url, folder = served
    run = make_run(base_url=url, mode="both", max_tokens=24, num_asks=2, timeout_s=300)
    carry_out(run, Instance("judge"))
    out = Path(run.out) / "judge"
    found = JudgeResults.model_validate_json((out / "judge.json").read_bytes())
    assert found.num_verdicts == found.num_invalid == NUM_VERDICTS
    assert found.judge.served == {"id": "tiny-judge", "owned_by": "vllm", "root": str(folder)}
    assert found.answered_by == {"tiny-judge": 2 * NUM_VERDICTS}
    assert all(model.average is None for model in found.models)
    verdicts = [Verdict.model_validate_json(line) for line in (out / "verdicts.jsonl").read_text().splitlines()]
    assert all(len(verdict.asks) == 2 and verdict.asks[0].reply for verdict in verdicts)
