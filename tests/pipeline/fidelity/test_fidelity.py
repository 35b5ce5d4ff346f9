"""Planted distributions, of which every figure is known, and a real cache against its teacher.

Legend: V vocabulary.
"""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers import AutoTokenizer

from capgap.jobs.cli import main
from capgap.pipeline.fidelity.fidelity import Teacher, fidelity_of, measure_cache
from capgap.pipeline.fidelity.sample import Sampling
from capgap.pipeline.fidelity.text import shown, summary
from capgap.schemas.errors import CorruptError, InputError, MismatchError
from capgap.schemas.fidelity import AtTemperature, Fidelity, RecordingFidelity

VOCAB_SIZE = 200
RATIO = 0.8
ALL = Sampling(10**9)
WHOLE = np.arange(VOCAB_SIZE)


def _geometric(ratio: float = RATIO, temperature: float = 1.0) -> np.ndarray:
    weights_V = ratio ** (WHOLE / temperature)
    return weights_V / weights_V.sum()


def _mass(num: int, ratio: float = RATIO) -> float:
    """Of the first ids of a geometric distribution over all."""
    return (1 - ratio**num) / (1 - ratio**VOCAB_SIZE)


@pytest.fixture(scope="module")
def planted(tmp_path_factory, make_cache) -> Fidelity:
    """40 sequences of ten targets; the next token is the top-1 token at 3 of 10, and the fifth at 7 of 10."""
    labels = np.where(np.arange(400) % 10 < 3, 0, 4)
    kinds = {"topk": 16, "sampled": 20}
    return fidelity_of(make_cache(tmp_path_factory.mktemp("x") / "c", _geometric(), labels, kinds, (2.0,)), ALL)


def _of(fidelity: Fidelity, name: str) -> RecordingFidelity:
    return next(one for one in fidelity.recordings if one.recording == name)


def test_kept_mass_tail_and_truncation_are_those_of_the_distribution(planted) -> None:
    topk = _of(planted, "topk")
    # labels of the last position are masked
    assert (topk.num_rows, planted.num_sampled) == (360, 40)
    for figures, ratio in zip(topk.by_temperature, (RATIO, RATIO**0.5), strict=True):
        assert [one.num_ids for one in figures.kept] == [1, 2, 5, 10, 16]
        for one in figures.kept:
            # lossless logprobs are float32
            assert one.mass == pytest.approx(_mass(one.num_ids, ratio), rel=1e-5)
            assert one.truncation_kl == pytest.approx(-np.log(_mass(one.num_ids, ratio)), rel=1e-4)
        assert figures.tail is not None
        assert figures.tail.mean == pytest.approx(1 - _mass(16, ratio), rel=1e-4)
        for quantile in (figures.tail.median, figures.tail.p95, figures.tail.p99):
            assert figures.tail.mean <= quantile * (1 + 1e-6) and quantile <= 1.025 * figures.tail.mean


def test_the_entropy_lies_between_its_bounds(planted) -> None:
    for figures, temperature in zip(_of(planted, "topk").by_temperature, (1.0, 2.0), strict=True):
        p_V = _geometric(temperature=temperature)
        coarse_K = np.append(p_V[:16], p_V[16:].sum())
        least = -(coarse_K * np.log(coarse_K)).sum()
        assert figures.least_entropy == pytest.approx(least, rel=1e-5)
        assert figures.most_entropy == pytest.approx(least + coarse_K[-1] * np.log(VOCAB_SIZE - 16), rel=1e-5)
        assert figures.least_entropy < -(p_V * np.log(p_V)).sum() < figures.most_entropy


def test_targets_are_held_against_the_real_next_tokens(planted) -> None:
    p_V = _geometric()
    for one in planted.recordings:
        # at 3 of 9 labelled positions the top-1 token is right
        assert one.ece == pytest.approx(abs(1 / 3 - p_V[0]), abs=0.02 if one.recording == "sampled" else 1e-5)
        assert one.label_kept == 1
        # the label's logprob of sampled targets is stored in steps
        expected = -np.log(p_V[0]) / 3 - 2 * np.log(p_V[4]) / 3
        assert one.label_loss == pytest.approx(expected, abs=0.01 if one.recording == "sampled" else 1e-5)


def test_the_loss_of_labels_is_unknown_where_one_of_them_is(tmp_path, make_cache) -> None:
    labels = np.where(np.arange(400) % 10 < 3, 0, 4)
    made = fidelity_of(make_cache(tmp_path / "c", _geometric(), labels, {"topk": 2}, unknown_labels=True), ALL)
    assert _of(made, "topk").label_loss is None
    assert Fidelity.model_validate_json(made.model_dump_json()) == made
    lines = [line for line in shown(made) if isinstance(line, str)]
    assert any("label loss unknown, top-1 ECE" in line for line in lines)
    assert not any("nan" in line for line in lines)


def test_draws_hold_what_they_must(planted) -> None:
    sampled = _of(planted, "sampled")
    p_V = _geometric()
    (figures,) = sampled.by_temperature
    assert figures.tail is None and figures.most_entropy is None
    assert all(one.truncation_kl is None for one in figures.kept)
    assert figures.kept[-1].mass == pytest.approx(1)
    # each id is sampled at least as often as n p rounded down, and the top five at most once more each
    for one in figures.kept[:3]:
        exact = p_V[: one.num_ids].sum()
        assert exact - one.num_ids / 20 < one.mass < exact + one.num_ids / 20
    assert figures.least_entropy < -(p_V * np.log(p_V)).sum()


def test_the_error_of_draws_is_between_what_theory_says_and_its_bound(planted) -> None:
    p_V = _geometric()
    errors = {one.num_samples: one for one in _of(planted, "sampled").sampling_errors}
    assert list(errors) == [1, 2, 5, 10, 20]
    fraction_V = (20 * p_V) % 1
    systematic = (fraction_V * (1 - fraction_V)).sum() / 400
    assert errors[20].systematic is not None and systematic < errors[20].systematic < 5 * systematic
    independent = (1 - (p_V**2).sum()) / 20
    # frequencies in the place of p: too low by at most the systematic error over n
    assert independent - errors[20].systematic / 20 - 1e-4 <= errors[20].independent <= independent + 1e-4
    assert errors[1].independent == pytest.approx(20 * errors[20].independent)
    assert errors[10].systematic is None


def test_bytes_add_up(planted) -> None:
    topk, sampled = _of(planted, "topk"), _of(planted, "sampled")
    # tokens of one byte, eleven to ten targets; ids of one byte and logprobs of four; tails at two temperatures
    assert topk.num_bytes.parts["ids"] == 16 and topk.num_bytes.parts["weights"] == 64
    assert topk.num_bytes.parts["tail"] == 8 and topk.num_bytes.parts["label"] == 4
    assert topk.num_bytes.parts["text"] == pytest.approx(1.1 + 0.4)
    assert set(sampled.num_bytes.parts) == {"text", "ids", "weights", "label"}
    assert topk.num_bytes.stored > 0


def test_a_flat_and_a_certain_teacher_are_told_apart(tmp_path, make_cache) -> None:
    flat_V = np.full(VOCAB_SIZE, 1 / VOCAB_SIZE)
    certain_V = np.full(VOCAB_SIZE, 1e-12)
    certain_V[7] = 1 - 199e-12
    found: dict[str, AtTemperature] = {}
    for name, p_V in (("flat", flat_V), ("certain", certain_V)):
        cache = make_cache(tmp_path / name, p_V, np.full(80, 7), {"topk": 4})
        (recording,) = fidelity_of(cache, ALL).recordings
        (found[name],) = recording.by_temperature
        # the label is not the top-1 token among equals
        assert recording.ece == pytest.approx(0 if name == "certain" else 1 / VOCAB_SIZE, abs=1e-6)
    assert found["flat"].kept[-1].mass == pytest.approx(4 / VOCAB_SIZE, rel=1e-5)
    assert found["certain"].kept[0].mass == pytest.approx(1)
    tail = found["certain"].tail
    assert tail is not None and tail.p99 < 1e-6


def test_a_sample_is_spread_over_the_shards(tmp_path, make_cache) -> None:
    cache = make_cache(tmp_path / "c", _geometric(), np.zeros(400), {"topk": 4})
    found = fidelity_of(cache, Sampling(12, 2))
    assert (found.num_sequences, found.num_sampled) == (40, 12)
    # 12 sequences of nine labelled targets
    assert found.recordings[0].num_rows == 108
    # whatever is sampled, the teacher says the same
    few, every = (
        fidelity_of(cache, sampling).recordings[0].by_temperature[0].kept for sampling in (Sampling(12, 2), ALL)
    )
    assert [one.mass for one in few] == pytest.approx([one.mass for one in every])
    (tmp_path / "c" / "topk-000000.tar").unlink()
    fidelity_of(cache, Sampling(12, 2))
    with pytest.raises(InputError, match="the shard is missing"):
        fidelity_of(cache, ALL)


def test_what_is_no_cache_is_refused(real, tmp_path) -> None:
    with pytest.raises(InputError, match=r"no finished cache; found no manifest.json"):
        measure_cache(str(tmp_path), ALL)
    with pytest.raises(InputError, match=r"no finished cache; found a finished corpus stage"):
        measure_cache(str(real["corpus"]), ALL)


def test_a_damaged_shard_is_the_readers_error(real, tmp_path) -> None:
    folder = Path(shutil.copytree(real["cache"], tmp_path / "cache"))
    path = next(iter(sorted(folder.glob("topk-*.tar"))))
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(CorruptError, match="checksum mismatch"):
        measure_cache(str(folder), ALL)


def test_the_teacher_itself_confirms_what_the_cache_says(real) -> None:
    found = measure_cache(str(real["cache"]), ALL, Teacher(str(real["teacher"]), "cpu"), 10**6)
    live = found.live
    topk, sampled = _of(found, "topk"), _of(found, "sampled")
    assert live is not None and live.num_rows == topk.num_rows == sampled.num_rows
    figures = topk.by_temperature[0]
    exact = {one.num_ids: one for one in live.kept}
    for one in figures.kept:
        # float32 logits of two batchings
        assert exact[one.num_ids].mass == pytest.approx(one.mass, rel=1e-5)
        assert exact[one.num_ids].truncation_kl == pytest.approx(one.truncation_kl, rel=1e-4)
    assert figures.most_entropy is not None and figures.least_entropy < live.entropy < figures.most_entropy
    assert live.label_loss == pytest.approx(topk.label_loss, rel=1e-5)
    assert live.ece == pytest.approx(topk.ece, abs=1e-5)
    errors = {one.num_samples: one for one in live.sampling_errors}
    cached = {one.num_samples: one for one in sampled.sampling_errors}
    assert errors[30].systematic is not None and cached[30].systematic is not None
    assert errors[30].systematic < cached[30].systematic
    assert errors[30].systematic < errors[30].independent
    assert 0 <= errors[30].independent - cached[30].independent <= cached[30].systematic / 30 + 1e-5


def test_a_teacher_with_special_tokens_that_the_cache_does_not_know_is_asked(real, tmp_path) -> None:
    chat = Path(shutil.copytree(real["given"], tmp_path / "chat"))
    tokenizer = AutoTokenizer.from_pretrained(chat)
    tokenizer.add_special_tokens({"extra_special_tokens": ["<|im_end|>"]})
    tokenizer.save_pretrained(chat)
    found, plain = (
        measure_cache(str(real["cache"]), Sampling(1), Teacher(str(path), "cpu"), 1).live
        for path in (chat, real["given"])
    )
    assert found is not None and found == plain


def test_another_tokenizer_is_refused(real, tmp_path) -> None:
    other = Path(shutil.copytree(real["given"], tmp_path / "other"))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    first, second = list(vocabulary)[:2]
    vocabulary[first], vocabulary[second] = vocabulary[second], vocabulary[first]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(MismatchError, match="its tokenizer differs from that of the cache"):
        measure_cache(str(real["cache"]), ALL, Teacher(str(other), "cpu"))


def test_the_command_prints_tables_or_json(real, capsys: Any) -> None:
    assert main(["fidelity", str(real["cache"])]) == 0
    text = capsys.readouterr().out
    for part in (
        "topk: 40 ids, lossless",
        "sampled: 30 samples",
        "truncation KL",
        "error, systematic",
        "yes  divergence",
    ):
        assert part in text, part
    assert main(["fidelity", str(real["cache"]), "--json", "--teacher", str(real["teacher"]), "--device", "cpu"]) == 0
    found = Fidelity.model_validate_json(capsys.readouterr().out)
    assert found.live is not None and [one.recording for one in found.recordings] == ["sampled", "topk"]
    assert main(["fidelity", str(real["corpus"])]) == 2
    assert main(["fidelity", str(real["cache"]), "--num-shards", "0"]) == 2


def test_a_cache_behind_a_url_is_read(real, s3_server, tmp_path, monkeypatch) -> None:
    import fsspec

    monkeypatch.setenv("CAPGAP_DOWNLOADS", str(tmp_path / "downloads"))
    s3 = fsspec.filesystem("s3")
    s3.mkdir("caches")
    s3.put(str(real["cache"]), "caches/tiny", recursive=True)
    found = measure_cache("s3://caches/tiny", ALL)
    assert found.recordings == measure_cache(str(real["cache"]), ALL).recordings


def test_a_recording_in_a_line_for_the_report(planted) -> None:
    sampled, topk = summary(planted)
    assert topk.startswith(f"topk, temperature 1: {_mass(16):.2%} of the teacher's probability kept, tail ")
    assert re.fullmatch(
        r"sampled, temperature 1: 1\d\.\d distinct ids of 20 samples, ECE against the text 1\d\.\d\d%, next token "
        r"among the ids at 100\.0% of 360 rows",
        sampled,
    )
