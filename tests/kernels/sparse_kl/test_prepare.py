"""What stands between a cache's rows and a rows kernel: what is known of them is not looked for on a device."""

from __future__ import annotations

import pytest
import torch
from sparse_kl_cases import make, run
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from capgap.kernels.sparse_kl import SparseTargets, linear_sparse_kl
from capgap.kernels.sparse_kl.prepare import live_rows, prepare

# operations that make another view of memory, or none at all
_NO_LAUNCH = ("view", "slice", "select", "unsqueeze", "expand", "detach", "alias", "empty", "t", "as_strided", "split")


class Launches(TorchDispatchMode):
    """The operations that would each be a kernel on a GPU."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.removeprefix("aten::")
        if func.namespace == "aten" and name.removeprefix("new_").removesuffix("_like") not in _NO_LAUNCH:
            self.names.append(name)
        return func(*args, **(kwargs or {}))


def _launches(num_counted: int | None, checked: bool, tail: str, with_targets: bool = True) -> list[str]:
    """Of shapes alone, as on a device whose values cannot be looked at: whatever must be waited for is an error."""
    hidden_NH, labels_N = torch.empty(64, 8, device="meta"), torch.empty(64, dtype=torch.int64, device="meta")
    ids_NK, p_NK = torch.empty(64, 5, dtype=torch.int64, device="meta"), torch.empty(64, 5, device="meta")
    targets = (ids_NK, p_NK, torch.empty(64, device="meta")) if with_targets else (None, None, None)
    with Launches() as launches:
        live_rows(hidden_NH, *targets, labels_N, None, 0.5, 1.0, tail, 1000, checked, num_counted)
    return launches.names


def test_known_rows_of_checked_targets_take_few_kernels() -> None:
    # weights, two factors of them, and ids and tail brought into their ranges
    assert len(_launches(64, True, "ghost")) == 6
    # some rows are left out: three comparisons find them, and five tensors are gathered
    assert len(_launches(40, True, "ghost")) <= 16
    assert len(_launches(64, False, "ghost")) > 25, "repeats are looked for and added up"


@pytest.mark.parametrize("tail", ["drop", "renorm", "ghost", "label"])
def test_known_rows_are_not_waited_for(tail: str) -> None:
    for num_counted, checked in ((40, True), (64, True), (40, False)):
        assert _launches(num_counted, checked, tail)
    with pytest.raises(NotImplementedError, match="nonzero"):
        _launches(None, True, tail)


@pytest.mark.parametrize("masked", ["none", "some", "all"])
@pytest.mark.parametrize("tail", ["drop", "renorm", "ghost", "label"])
def test_what_is_known_changes_no_result(masked: str, tail: str) -> None:
    case = make(5, masked=masked, alpha=0.5, temperature=2.0, tail=tail)
    num_counted = int((case.labels_N >= 0).sum())
    known = SparseTargets(case.targets.ids_NK, case.targets.weights_NK, case.targets.tail_N, checked=True)
    looked_at, grads = run(linear_sparse_kl, case)
    case.targets = known
    found, found_grads = run(linear_sparse_kl, case, num_counted=num_counted)
    # the tail under `label` is added in another place
    torch.testing.assert_close(tuple(found), tuple(looked_at), rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found_grads, grads, rtol=1e-12, atol=1e-12)


def test_the_tail_goes_to_the_label_once_whether_it_is_kept_or_not() -> None:
    ids_NK, p_NK = torch.tensor([[4, 7], [4, 7]]), torch.tensor([[0.5, 0.25], [0.5, 0.25]])
    ids, p, left = prepare(ids_NK, p_NK, torch.tensor([0.25, 0.25]), torch.tensor([7, 1]), "label", 9, checked=True)
    assert _mass(ids, p) == [{4: 0.5, 7: 0.5}, {4: 0.5, 7: 0.25, 1: 0.25}]
    assert left.tolist() == [0.0, 0.0]


def test_ids_outside_the_vocabulary_reach_no_other_memory_whatever_is_said_of_them() -> None:
    ids_NK = torch.tensor([[-5, 2**40]])
    ids, *_ = prepare(ids_NK, torch.full((1, 2), 0.5), None, torch.tensor([0]), "drop", 9, checked=True)
    assert ids.tolist() == [[0, 9]]


def _mass(ids_NK: Tensor, p_NK: Tensor) -> list[dict[int, float]]:
    rows = zip(ids_NK.tolist(), p_NK.tolist(), strict=True)
    return [{id_: p for id_, p in zip(ids, ps, strict=True) if p} for ids, ps in rows]
