"""Which checkpoint a training goes on from."""

from __future__ import annotations

from capgap.pipeline.train.checkpoints import newest_checkpoint


def test_a_checkpoint_that_was_being_saved_does_not_count(tmp_path) -> None:
    assert newest_checkpoint(tmp_path) is None
    for name in ("step-00000010.ckpt", "step-00000009.ckpt", "step-00000020.saving"):
        (tmp_path / name).touch()
    assert newest_checkpoint(tmp_path) == tmp_path / "step-00000010.ckpt"
