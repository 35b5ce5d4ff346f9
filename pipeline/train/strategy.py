"""How the ranks of a training share a model: each has all of it (DDP), or each a part of every parameter (FSDP2).

The fused loss takes the head whole. Under FSDP2 every layer is a unit of its own, gathered for its forward and its
backward; what is left - embedding, last norm, head, tied or not - is the root's, which FSDP2 gathers when the loss is
called and keeps until backward has its gradients. So `DistillationModule.loss` is registered as the root's forward.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch.plugins.environments import TorchElasticEnvironment
from lightning.pytorch.strategies import DDPStrategy, ModelParallelStrategy, Strategy
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.optim import Optimizer
from transformers import PreTrainedModel

from capgap.pipeline.stage.ranks import Ranks
from capgap.pipeline.train.faster import layers_of
from capgap.pipeline.train.saved import CheckpointFiles, read_checkpoint, whole, write_part
from capgap.schemas.run_optimization import OptimizationSettings


def trainer_arguments(settings: OptimizationSettings, ranks: Ranks, device: str) -> dict[str, Any]:
    """Lightning's arguments for the devices that a training has."""
    arguments: dict[str, Any] = {"accelerator": "cpu" if device == "cpu" else "gpu", "use_distributed_sampler": False}
    if ranks.world_size == 1:
        return arguments | {"devices": 1, "plugins": [CheckpointFiles()]}
    nodes = ranks.world_size // ranks.local_size
    # its variables are what `Ranks` was read from, whoever set them
    arguments |= {"devices": ranks.local_size, "num_nodes": nodes, "plugins": [TorchElasticEnvironment()]}
    if is_sharded(settings, ranks):
        return arguments | {"strategy": ShardedStrategy(ranks.world_size)}
    # no buffer of a language model changes while it is trained
    strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, checkpoint_io=CheckpointFiles())
    return arguments | {"strategy": strategy}


def is_sharded(settings: OptimizationSettings, ranks: Ranks) -> bool:
    """Whether the ranks hold parts of parameters; one rank alone holds all there is."""
    return settings.strategy == "fsdp2" and ranks.world_size > 1


def shard(module: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, precision: str) -> None:
    """Divide the parameters of `module`, which holds `model`, among the ranks; `module.loss` gathers them.

    In bf16-mixed, parameters are gathered in bfloat16, and gradients summed and kept in float32.
    """
    low = torch.bfloat16 if precision == "bf16-mixed" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for layer in layers_of(model, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(module, "loss")


@torch.no_grad()
def gather_into(model: PreTrainedModel | None, sharded: PreTrainedModel) -> None:
    """Copy the weights of a sharded model into a whole one of the same architecture; all ranks call it.

    Args:
        model: the whole one, on the first rank; None on the others, which only give their parts.
        sharded: the same model, whose parameters are divided among the ranks.
    """
    target = {} if model is None else model.state_dict()
    for name, value in sharded.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if model is not None:
            target[name].copy_(full)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks, with checkpoints of which each rank writes its part; any number of ranks reads them.

    Lightning's own would do so too, but their index is a pickle.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Through `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """The parameters, this rank's part of each."""
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """The optimizer's state, this rank's part of each tensor; by number, as with whole parameters."""
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write this rank's part into the folder `filepath`."""
        folder = Path(filepath)
        folder.mkdir(exist_ok=True)
        write_part(checkpoint, folder / f"rank-{self.global_rank:05d}.pt", self.world_size)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """What was written, with tensors that are put together when they are asked for."""
        return read_checkpoint(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Take this rank's part of each parameter."""
        assert self.lightning_module is not None
        own, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        parts = {name: _part(value, own.get(name)) for name, value in saved.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Take this rank's part of each moment."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: _part(value, parameters[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _part(value: Any, like: Any) -> Any:
    """This rank's part of a saved tensor, where it goes with a parameter that is divided; the whole of any other."""
    full = whole(value)
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    # the same file is read by every rank, so that nothing need be sent
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
