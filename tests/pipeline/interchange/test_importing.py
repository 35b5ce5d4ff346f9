"""Captures become a corpus and a cache, or are refused."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from capgap.pipeline.interchange.importing import import_captures
from capgap.pipeline.store import ShardReader, read_blocks
from capgap.pipeline.verify.verify import verify
from capgap.schemas.errors import CapgapError, InputError, MismatchError
from capgap.schemas.facts import CacheFacts, CorpusFacts
from capgap.schemas.records import TopkTargets

MINIMAL = ("input_ids", "ids", "logprobs")


def blocks_of(at: Any, name: str) -> list[tuple[Any, Any]]:
    return list(read_blocks(at.path, at.manifest.shard_sets[name]))


def rows_of(cache: Any, split: str = "topk") -> dict[tuple[int, ...], tuple[np.ndarray, ...]]:
    """Every row of a cache by its tokens: ids, logprobs, tail and labels' logprobs of its targets."""
    found = {}
    for sequences, targets in blocks_of(cache, split):
        assert isinstance(targets, TopkTargets)
        for b in range(len(sequences)):
            firsts = np.flatnonzero(sequences.starts_BL1[b]).tolist()
            for first, end in zip(firsts, [*firsts[1:], sequences.tokens_BL1.shape[1]], strict=True):
                tokens = tuple(sequences.tokens_BL1[b, first:end].tolist())
                part = slice(first, end - 1)
                arrays = (targets.ids_BLK, targets.logprobs_BLK, targets.tail_BL, targets.label_logprobs_BL)
                found[tokens] = tuple(array[b, part] for array in arrays)
    return found


@pytest.mark.parametrize("context", ["document", "packed"])
@pytest.mark.parametrize("profile", ["lossless", "near-lossless"])
def test_every_row_stands_in_the_cache_with_its_targets(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], context: str, profile: str
) -> None:
    made = import_captures(settings_for(write(teacher.rows, columns=MINIMAL), context=context, profile=profile))
    found = rows_of(made.cache) | rows_of(made.cache, "heldout-topk")
    error = 0 if profile == "lossless" else 1 / 128
    for row in teacher.rows:
        ids_TK, logprobs_TK, tail_T, labels_T = found[tuple(row["input_ids"])]
        assert ids_TK.tolist() == row["ids"]
        # float32 rounding of a logprob, beside the profile's error
        assert np.abs(logprobs_TK - row["logprobs"]).max() <= error + 1e-6
        # of a sum near 1, and of the profile: relative
        assert tail_T == pytest.approx(1 - np.exp(row["logprobs"]).sum(axis=1), rel=error + 1e-4, abs=1e-6)
        is_kept_T = (ids_TK == np.array(row["input_ids"])[1:, None]).any(axis=1)
        assert np.isnan(labels_T).tolist() == (~is_kept_T).tolist()
        assert np.abs(labels_T - row["label_logprobs"])[is_kept_T].max() <= error + 1e-6
    assert not is_kept_T.all(), "some next tokens are among no kept ids"


def test_what_was_imported_is_verified_and_says_where_it_came_from(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    captures = write(teacher.rows, columns=MINIMAL)
    made = import_captures(settings_for(captures))
    assert len(list(verify(made.cache.path.parent))) == 2
    for at in (made.corpus, made.cache):
        (source,) = at.manifest.sources
        assert source.path == str(captures)
    facts = CacheFacts.model_validate(made.cache.manifest.facts)
    assert facts.engines == ("imported",) and facts.mean_label_loss is None
    assert made.cache.manifest.inputs["corpus"].identity == made.corpus.manifest.identity
    heldout = CorpusFacts.model_validate(made.corpus.manifest.facts).splits["heldout"]
    assert heldout.num_documents == len(
        rows_of(made.cache, "heldout-topk").keys() & {tuple(r["input_ids"]) for r in teacher.rows}
    )


def test_only_labels_that_a_row_has_count(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    made = import_captures(settings_for(write(teacher.rows, columns=MINIMAL)))
    num_labels = 0
    for name in ("topk", "heldout-topk"):
        for sequences, targets in blocks_of(made.cache, name):
            counts_BL = sequences.mask_BL1[:, 1:]
            num_labels += int(counts_BL.sum())
            # where nothing counts, nobody said anything: the uniform distribution
            logprobs_NK = targets.logprobs_BLK[~counts_BL]
            assert logprobs_NK == pytest.approx(-np.log(teacher.vocab_size), abs=1 / 128)
    assert num_labels == sum(len(row["ids"]) for row in teacher.rows)


def test_known_labels_give_the_teacher_s_loss(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    made = import_captures(settings_for(write(teacher.rows)))
    known = rows_of(made.cache)
    losses = [-p for row in teacher.rows if tuple(row["input_ids"]) in known for p in row["label_logprobs"]]
    assert made.cache.manifest.facts["mean_label_loss"] == pytest.approx(np.mean(losses), abs=1e-5)
    assert made.cache.manifest.totals["num_unknown_labels"] == 0


def shifted(rows: list[dict[str, Any]], by: int) -> list[dict[str, Any]]:
    """The rows, each target one token too early or too late."""
    return [
        row
        | {
            name: (row[name][1:] + row[name][-1:] if by > 0 else row[name][:1] + row[name][:-1])
            for name in ("ids", "logprobs")
        }
        for row in rows
    ]


@pytest.mark.parametrize("by, said", [(1, "the token behind the next one"), (-1, "the token before the next one")])
def test_shifted_rows_are_refused(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], by: int, said: str
) -> None:
    captures = write(shifted(teacher.rows, by), columns=MINIMAL)
    with pytest.raises(MismatchError, match=f"{said}.*found mean logprobs.*expected the highest at \\+0"):
        import_captures(settings_for(captures))


def test_lists_as_vllm_has_them_need_an_offset(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    rows = [row | {name: [None, *row[name]] for name in ("ids", "logprobs")} for row in teacher.rows]
    captures = write(rows, columns=MINIMAL)
    with pytest.raises(CapgapError, match="--offset -1"):
        import_captures(settings_for(captures))
    made = import_captures(settings_for(captures, offset=-1), force=True)
    plain = import_captures(settings_for(write(teacher.rows, "plain.parquet", MINIMAL), out=str(captures.parent / "b")))
    there, here = rows_of(made.cache), rows_of(plain.cache)
    assert there.keys() == here.keys()
    assert all(np.array_equal(a, b, equal_nan=True) for row in here for a, b in zip(here[row], there[row], strict=True))


def _same(here: dict[Any, Any], there: dict[Any, Any]) -> bool:
    return there.keys() == here.keys() and all(
        np.array_equal(a, b, equal_nan=True) for row in here for a, b in zip(here[row], there[row], strict=True)
    )


PADDINGS = {
    "as the model went on": ([7] * 3, [[1, 2]] * 3, [[-1.0, -2.0]] * 3),
    "nothing": ([0] * 3, [[]] * 3, [[]] * 3),
    "zeros": ([0] * 3, [[0] * 8] * 3, [[0.0] * 8] * 3),
    "not a number": ([-100] * 3, [[0] * 8] * 3, [[float("nan")] * 8] * 3),
    "an id of no vocabulary": ([999_999] * 3, [[999_999] * 8] * 3, [[-1.0] * 8] * 3),
    "nulls": ([0] * 3, [None] * 3, [None] * 3),
}


@pytest.mark.parametrize("offset", [0, -1])
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", PADDINGS)
def test_whatever_stands_in_padding_is_not_looked_at(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], name: str, side: str, offset: int
) -> None:
    tokens, ids, logprobs = PADDINGS[name]

    def padded(row: dict[str, Any]) -> dict[str, Any]:
        # a target for each token: the last one has one of padding, or in vLLM's order the first one has none
        kept = [[None, *row[one]] if offset else [*row[one], None] for one in ("ids", "logprobs")]
        own = (row["input_ids"], *kept, [1] * len(row["input_ids"]))
        parts = zip(own, (tokens, ids, logprobs, [0] * 3), strict=True)
        made = [[*pad, *one] if side == "left" else [*one, *pad] for one, pad in parts]
        return dict(zip(("input_ids", "ids", "logprobs", "attention_mask"), made, strict=True))

    captures = write([padded(row) for row in teacher.rows])
    made = import_captures(settings_for(captures, seq_len=40, offset=offset))
    plain = write(teacher.rows, "plain.parquet", MINIMAL)
    expected = import_captures(settings_for(plain, seq_len=40, out=str(captures.parent / "b")))
    assert _same(rows_of(expected.cache), rows_of(made.cache))


@pytest.mark.parametrize("stand_in", [-9999.0, -1e9, -1e30, -3.4028234e38, -65504.0, float("-inf")])
def test_a_stand_in_for_minus_infinity_is_a_probability_of_0(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], stand_in: float
) -> None:
    """The least likely id of each target has none; training and measuring subtract what is stored."""
    rows = [row | {"logprobs": [[*one[:-1], stand_in] for one in row["logprobs"]]} for row in teacher.rows]
    made = import_captures(settings_for(write(rows, columns=MINIMAL), profile="lossless"))
    recording = made.cache.manifest.facts["recordings"]["topk"]
    assert recording["num_ids"] == len(teacher.rows[0]["ids"][0]), "no target has fewer ids for it"
    for _, targets in blocks_of(made.cache, "topk"):
        assert np.isfinite(targets.logprobs_BLK).all()
        assert (targets.logprobs_BLK >= -101).all()


@pytest.mark.parametrize("filling", [0, -1, None])
def test_ids_that_only_fill_up_a_list_are_dropped(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], filling: int | None
) -> None:
    """Arrays of one width have an id, any, with no probability behind a target's last."""
    none = None if filling is None else -9999.0
    rows = [
        row
        | {
            "ids": [[filling] * 2 + one for one in row["ids"]],
            "logprobs": [[none] * 2 + one for one in row["logprobs"]],
        }
        for row in teacher.rows
    ]
    captures = write(rows, columns=MINIMAL)
    made = import_captures(settings_for(captures, top_k=8))
    plain = write(teacher.rows, "plain.parquet", MINIMAL)
    expected = import_captures(settings_for(plain, top_k=8, out=str(captures.parent / "b")))
    assert _same(rows_of(expected.cache), rows_of(made.cache))


def test_a_label_with_a_stand_in_is_unknown(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    def unknown(row: dict[str, Any]) -> dict[str, Any]:
        kept = zip(row["label_logprobs"], row["ids"], row["input_ids"][1:], strict=True)
        return row | {"label_logprobs": [own if label in ids else -9999.0 for own, ids, label in kept]}

    made = import_captures(settings_for(write([unknown(row) for row in teacher.rows])))
    assert made.cache.manifest.totals["num_unknown_labels"] > 0
    assert made.cache.manifest.facts["mean_label_loss"] is None


def test_rows_that_tell_nothing_are_refused(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    rows = [row | {"input_ids": [7] * len(row["input_ids"])} for row in teacher.rows]
    with pytest.raises(InputError, match="it cannot be told which token a target predicts"):
        import_captures(settings_for(write(rows, columns=MINIMAL), heldout=(str(write(rows, "b.parquet", MINIMAL)),)))


def change(row: dict[str, Any], name: str, change_it: Callable[[Any], Any]) -> dict[str, Any]:
    changed = copy.deepcopy(row)
    changed[name] = change_it(changed[name])
    return changed


def with_first(name: str, value: Any) -> Callable[[dict[str, Any]], dict[str, Any]]:
    """The first value of the first target of a row is another."""
    return lambda row: change(row, name, lambda lists: [[value, *lists[0][1:]], *lists[1:]])


BROKEN: dict[str, tuple[Callable[[dict[str, Any]], dict[str, Any]], str]] = {
    "an id outside the vocabulary": (with_first("ids", 5000), "an id outside the vocabulary.*found 5000"),
    "an id below 0": (with_first("ids", -4), "an id below 0; found -4"),
    "an id twice": (lambda row: change(row, "ids", lambda ids: [[ids[0][1], *ids[0][1:]], *ids[1:]]), "an id twice"),
    "a token outside the vocabulary": (
        lambda row: change(row, "input_ids", lambda ids: [4000, *ids[1:]]),
        "a token outside the vocabulary",
    ),
    "a logit": (with_first("logprobs", 3.5), "not a logprob.*found 3.5"),
    "not a number": (with_first("logprobs", float("nan")), "not a logprob.*found nan"),
    "too much probability": (
        lambda row: change(row, "logprobs", lambda logprobs: [[-0.1] * len(logprobs[0]), *logprobs[1:]]),
        "probabilities that do not form one distribution.*found a sum of 7.2387",
    ),
    "a target too few": (
        lambda row: row | {"ids": row["ids"][1:], "logprobs": row["logprobs"][1:]},
        "not a target for each token",
    ),
    "a logprob too few": (
        lambda row: change(row, "logprobs", lambda logprobs: [logprobs[0][1:], *logprobs[1:]]),
        "not as many logprobs as ids",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_row_is_refused_by_its_number(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], name: str
) -> None:
    broken, said = BROKEN[name]
    rows = [*teacher.rows[:20], broken(teacher.rows[20]), *teacher.rows[21:]]
    with pytest.raises(InputError, match=said) as refused:
        import_captures(settings_for(write(rows, columns=MINIMAL)))
    assert ", row 20" in str(refused.value)


def test_a_missing_column_is_named_with_those_that_are_there(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    with pytest.raises(InputError, match=r"no column 'logprobs'; found input_ids, ids; .*--columns"):
        import_captures(settings_for(write(teacher.rows, columns=("input_ids", "ids"))))


def test_columns_go_by_any_names(teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]) -> None:
    rows = [{"tokens": r["input_ids"], "token_ids": r["ids"], "top_values": r["logprobs"]} for r in teacher.rows]
    columns = {"input_ids": "tokens", "ids": "token_ids", "logprobs": "top_values"}
    made = import_captures(settings_for(write(rows), columns=columns))
    assert len(rows_of(made.cache)) > 20


def test_a_file_that_is_no_parquet_is_refused(tmp_path: Path, settings_for: Callable[..., Any]) -> None:
    (tmp_path / "captures.parquet").write_bytes(b"PAR1 and nothing else")
    with pytest.raises(InputError, match="not a Parquet file"):
        import_captures(settings_for(tmp_path / "captures.parquet"))


def test_a_damaged_file_is_refused(teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]) -> None:
    path = write(teacher.rows, columns=MINIMAL)
    data = bytearray(path.read_bytes())
    data[200:4000] = bytes(3800)
    path.write_bytes(data)
    with pytest.raises(InputError, match=r"the file is damaged"):
        import_captures(settings_for(path))


def test_no_rows_are_refused(teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]) -> None:
    empty = write([teacher.rows[0]], columns=MINIMAL)
    import pyarrow.parquet as parquet

    parquet.write_table(parquet.read_table(empty).slice(0, 0), empty)
    with pytest.raises(InputError, match="no row is long enough"):
        import_captures(settings_for(empty))
    with pytest.raises(InputError, match="no captures found"):
        import_captures(settings_for(empty.parent / "elsewhere.parquet"))


def test_the_same_command_again_does_nothing_and_another_is_refused(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any]
) -> None:
    captures = write(teacher.rows, columns=MINIMAL)
    first = import_captures(settings_for(captures))
    again = import_captures(settings_for(captures))
    assert again.cache.manifest == first.cache.manifest and again.corpus.manifest == first.corpus.manifest
    with pytest.raises(MismatchError, match=r"the folder holds another cache.*profile was 'near-lossless', is 'small'"):
        import_captures(settings_for(captures, profile="small"))
    other = import_captures(settings_for(captures, profile="small"), force=True)
    assert other.corpus.manifest.identity == first.corpus.manifest.identity
    assert ShardReader(other.cache.path, other.cache.manifest.shard_sets["topk"]).codec.name == "topk-small-1"


def test_a_killed_import_goes_on_and_comes_out_the_same(
    teacher: Any, write: Callable[..., Path], settings_for: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    captures = write(teacher.rows, columns=MINIMAL)
    undisturbed = import_captures(settings_for(captures, out=str(captures.parent / "undisturbed")))
    from capgap.pipeline.store import ShardWriter

    write_shard, written = ShardWriter.write, []
    alive = [False]

    def killed(self: Any, index: int, blocks: Any) -> Any:
        if self._name == "topk" and index == 1 and not alive[0]:
            raise KeyboardInterrupt
        written.append((self._name, index))
        return write_shard(self, index, blocks)

    monkeypatch.setattr(ShardWriter, "write", killed)
    with pytest.raises(KeyboardInterrupt):
        import_captures(settings_for(captures))
    assert not (captures.parent / "imported" / "cache" / "manifest.json").exists()
    written.clear()
    alive[0] = True
    made = import_captures(settings_for(captures))
    assert written[0] == ("topk", 1), "the corpus and the first shard were finished"
    assert made.cache.manifest.content == undisturbed.cache.manifest.content
