"""Runs whose models are tiny real ones with a chat template, and whose other stages are finished folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tiny_models import tiny_vllm_llama
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.load import MODEL_FOLDER, model_facts, save_model
from capgap.pipeline.stage.folder import begin, content_files, finish
from capgap.pipeline.stage.identity import content_of
from capgap.pipeline.workflow.state import states
from capgap.schemas.manifest import Manifest
from capgap.schemas.run_file import RunFile

TEMPLATE = (
    "{% for message in messages %}<{{ message.role }}>{{ message.content }}</{{ message.role }}>{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
QUESTIONS: tuple[dict[str, Any], ...] = (
    {"question_id": 81, "category": "writing", "turns": ["Write a line.", "And one more."]},
    {"question_id": 111, "category": "math", "turns": ["3 times 4?", "And 5?"], "reference": ["12", "15"]},
    {"question_id": "own", "category": "cooking", "turns": ["How is tea made?", "And coffee?"]},
)
MAX_TOKENS = 6
KEY = "sk-0123456789abcdef"


def tokenizer(template: str | None = TEMPLATE) -> PreTrainedTokenizerFast:
    made = train_tokenizer(["<user>how much is 3 times 4?</user><assistant>that is 12</assistant> " * 20], 300)
    made.chat_template = template
    return made


def tiny_model(seed: int, positions: int = 256) -> LlamaForCausalLM:
    return tiny_vllm_llama(seed, positions).eval()


def settings(folder: Path, judge: dict[str, Any], **more: Any) -> dict[str, Any]:
    """A run file's settings; the questions are those above."""
    questions = folder / "questions.jsonl"
    if not questions.exists():
        questions.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    answers = {"engine": "transformers", "max_tokens": MAX_TOKENS, **judge.pop("answers", {})}
    return {
        "name": "judged",
        "out": str(folder / "out"),
        "device": "cpu",
        "corpus": {},
        "teacher": {"model": {}},
        "cache": {},
        "student": {"model": {}},
        "train": {},
        "eval": {},
        "judge": {"model": "tiny-judge", "questions": str(questions), "answers": answers, **judge},
        **more,
    }


def finish_models(run: RunFile, template: str | None = TEMPLATE, positions: int = 256) -> None:
    """Finish all stages that stand before a judge's; each model has other weights."""
    names = [n for n in states(run) if n.split("/")[0] in ("corpus", "teacher", "cache", "student", "train")]
    for number, name in enumerate(names):
        state = states(run)[name]
        state.folder.mkdir(parents=True, exist_ok=True)
        begin(state.folder, state.order)
        (state.folder / "result.txt").write_text("made")
        facts: dict[str, Any] = {}
        if name.startswith(("teacher", "train")):
            model, words = tiny_model(number, positions), tokenizer(template)
            save_model(model, words, state.folder / MODEL_FOLDER)
            facts = model_facts(model, words).model_dump(mode="json")
        files = content_files(state.folder)
        manifest = Manifest(
            **state.order.model_dump(),
            content=content_of(files),
            files=files,
            facts=facts,
            versions={},
            started="2026-01-01T00:00:00+00:00",
            wall_s=0.0,
            command=(),
        )
        finish(state.folder, manifest)
