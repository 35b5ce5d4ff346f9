from __future__ import annotations

import json
from pathlib import Path

import pytest

from capgap.pipeline.corpus import prepare
from capgap.pipeline.corpus.split import split_of
from capgap.pipeline.corpus.tokenizer import train_tokenizer
from capgap.pipeline.models.tokenizers import load_tokenizer
from capgap.pipeline.stage.context import Instance, StageContext
from capgap.pipeline.workflow.carry_out import carry_out
from capgap.schemas.errors import BadRecordError
from capgap.schemas.run_file import RunFile

CORPUS = Instance("corpus")
TEMPLATE = (
    "{% for m in messages %}[{{ m.role }}] {% if m.role == 'assistant' %}"
    "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


def _new_pieces(folder: Path, **corpus: object) -> list[str]:
    """Pieces that the corpus's tokenizer has and the given one has not."""
    settings = {"tokenizer": str(folder / "tokenizer"), "seq_len": 16, "extend_vocabulary": {"num_pieces": 12}}
    run = {"name": "pieces", "out": str(folder / "out"), "corpus": settings | corpus}
    carry_out(RunFile.model_validate(run), CORPUS)
    old, new = load_tokenizer(folder / "tokenizer"), load_tokenizer(folder / "out" / "corpus" / "tokenizer")
    return [new.decode([number]) for piece, number in new.get_vocab().items() if piece not in old.get_vocab()]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tokenizer = train_tokenizer(["how much is 3 times 4? that is 12. " * 20], 290)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    return tmp_path


def test_new_pieces_of_conversations_are_of_what_is_said_and_not_of_the_json_around_it(folder: Path) -> None:
    talks = [
        [{"role": "user", "content": f"zebra {i}?", "id": f"id-{i}"}, {"role": "assistant", "content": f"quokka {i}!"}]
        for i in range(120)
    ]
    (folder / "chat.jsonl").write_text("".join(json.dumps({"messages": talk}) + "\n" for talk in talks))
    pieces = _new_pieces(folder, sources=[str(folder / "chat.jsonl")], messages_field="auto")
    assert {"zebra", "quokka"} <= set(pieces)
    said = " ".join(message["content"] for talk in talks for message in talk)
    assert all(piece.strip() in said for piece in pieces)


def test_text_for_new_pieces_is_read_like_the_corpus_and_its_errors_name_its_setting(folder: Path) -> None:
    talks = [{"messages": [{"role": "user", "content": f"zebra {i}?"}, {"role": "assistant", "content": "quokka!"}]}
             for i in range(150)]  # fmt: skip
    (folder / "chat.jsonl").write_text("".join(json.dumps(talk) + "\n" for talk in talks) + '{"text": "a"}\n')
    settings = {"sources": [str(folder / "chat.jsonl")], "messages_field": "auto"}
    settings["extend_vocabulary"] = {"num_pieces": 12, "sources": [str(folder / "chat.jsonl")]}
    place = r"corpus.extend_vocabulary.sources: .*chat.jsonl:151"
    with pytest.raises(BadRecordError, match=place + r".*set corpus.messages_field"):
        _new_pieces(folder, **settings)
    assert {"zebra", "quokka"} <= set(_new_pieces(folder, **settings, on_bad_record="skip"))


def test_a_tokenizer_of_a_mixture_is_learnt_from_by_the_weights_of_its_sources(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, number in (("rare", 1900), ("often", 100)):
        lines = (json.dumps({"text": f"{name} {i} " + "of the same length " * 2}) + "\n" for i in range(number))
        (folder / f"{name}.jsonl").write_text("".join(lines))
    mixture = {name: {"paths": [str(folder / f"{name}.jsonl")], "weight": 1} for name in ("rare", "often")}
    settings = {"tokenizer": str(folder / "tokenizer"), "mixture": mixture, "unit_bytes": 2000}
    run = RunFile.model_validate({"name": "weighed", "out": str(folder), "corpus": settings})
    (folder / "corpus").mkdir()
    job = prepare.prepare(StageContext(run, CORPUS, folder / "corpus", {}, "cpu"))
    # all of the text, and beginnings of its units
    for most in (1 << 20, 20000):
        monkeypatch.setattr(prepare, "SAMPLE_BYTES", most)
        found = list(prepare._sampled_texts(job))
        num_bytes = {name: sum(len(text) for text in found if text.startswith(name)) for name in mixture}
        # about 100 of 1900 texts are drawn, give or take ten, and of a beginning the last text is cut
        assert num_bytes["rare"] == pytest.approx(num_bytes["often"], rel=0.4)


def test_nothing_that_is_held_out_is_learnt_from_where_the_text_is_sampled(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    # of each unit so little is taken that it ends within a text, whose beginning alone might not be held out
    monkeypatch.setattr(prepare, "SAMPLE_BYTES", 1000)
    texts = [f"{number} " + chr(ord("a") + number % 26) * 40 for number in range(400)]
    (folder / "a.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    settings = {"tokenizer": str(folder / "tokenizer"), "sources": [str(folder / "a.jsonl")], "unit_bytes": 2000}
    shares = {"teacher_fraction": 0.0, "heldout_fraction": 0.5}
    run = RunFile.model_validate({"name": "pieces", "out": str(folder), "corpus": settings | shares})
    (folder / "corpus").mkdir()
    job = prepare.prepare(StageContext(run, CORPUS, folder / "corpus", {}, "cpu"))
    found = list(prepare._sampled_texts(job))
    learnt = [text for text in texts if split_of(text, 0.0, 0.5) != "heldout"]
    assert len(found) >= len(job.listing.units) > 5
    assert all(any(text.startswith(one) for text in learnt) for one in found)
