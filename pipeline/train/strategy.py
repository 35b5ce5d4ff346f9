"""How the ranks of a training share a model: each has all of it (DDP), or a part of every parameter (FSDP2).

The fused loss needs the whole head. Under FSDP2 every layer is a unit that is gathered for its forward and its backward
pass. The other parameters (embedding, last norm and head, tied or not) belong to the root unit, which FSDP2 gathers for
the root's forward and keeps until it has their gradients. So `DistillationModule.loss` is registered as a forward
method of the root.
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
    """Return the arguments of Lightning's Trainer for the devices of a training.

    Args:
        settings: The settings of the optimization.
        ranks: The ranks of the training.
        device: The device of this rank, `cpu` or such as `cuda:0`.
    """
    arguments: dict[str, Any] = {"accelerator": "cpu" if device == "cpu" else "gpu", "use_distributed_sampler": False}
    if ranks.world_size == 1:
        return arguments | {"devices": 1, "plugins": [CheckpointFiles()]}
    nodes = ranks.world_size // ranks.local_size
    # It reads the same environment variables as `Ranks`, whatever launcher has set them.
    arguments |= {"devices": ranks.local_size, "num_nodes": nodes, "plugins": [TorchElasticEnvironment()]}
    if is_sharded(settings, ranks):
        return arguments | {"strategy": ShardedStrategy(ranks.world_size)}
    # Buffers are not broadcast, because those of a language model do not change in training.
    strategy = DDPStrategy(broadcast_buffers=False, gradient_as_bucket_view=True, checkpoint_io=CheckpointFiles())
    return arguments | {"strategy": strategy}


def is_sharded(settings: OptimizationSettings, ranks: Ranks) -> bool:
    """Return whether each rank holds only a part of the parameters; a single rank always holds all of them."""
    return settings.strategy == "fsdp2" and ranks.world_size > 1


def shard(module: nn.Module, model: PreTrainedModel, mesh: DeviceMesh, precision: str) -> None:
    """Divide the parameters of `module`, which contains `model`, among the ranks; `module.loss` gathers them.

    In bf16-mixed, parameters are gathered in bfloat16, and gradients are summed and stored in float32.
    """
    low = torch.bfloat16 if precision == "bf16-mixed" else None
    policy = MixedPrecisionPolicy(param_dtype=low, reduce_dtype=torch.float32)
    for layer in layers_of(model, model):
        fully_shard(layer, mesh=mesh, mp_policy=policy)
    fully_shard(module, mesh=mesh, mp_policy=policy)
    register_fsdp_forward_method(module, "loss")


@torch.no_grad()
def gather_into(model: PreTrainedModel | None, sharded: PreTrainedModel) -> None:
    """Copy the weights of a sharded model into a whole one of the same architecture; all ranks must call it.

    Args:
        model: The whole model on rank 0; None on the other ranks, which only contribute their parts.
        sharded: The model whose parameters are divided among the ranks.
    """
    target = {} if model is None else model.state_dict()
    for name, value in sharded.state_dict().items():
        full = value.full_tensor() if isinstance(value, DTensor) else value
        if model is not None:
            target[name].copy_(full)


class ShardedStrategy(ModelParallelStrategy):
    """FSDP2 over all ranks. Each rank writes its part of a checkpoint, which any number of ranks can read.

    Lightning's own sharded checkpoints could do this too, but their index is a pickle.
    """

    def __init__(self, world_size: int) -> None:
        super().__init__(data_parallel_size=world_size, tensor_parallel_size=1)

    @property
    def lightning_restore_optimizer(self) -> bool:
        """Whether Lightning restores the optimizer, which it does through `load_optimizer_state_dict`."""
        return True

    def lightning_module_state_dict(self) -> dict[str, Any]:
        """Return this rank's part of each parameter."""
        assert self.lightning_module is not None
        state: dict[str, Any] = self.lightning_module.state_dict()
        return state

    def optimizer_state(self, optimizer: Optimizer) -> dict[str, Any]:
        """Return this rank's part of the optimizer's state, by parameter number as for undivided parameters."""
        state: dict[str, Any] = Strategy.optimizer_state(self, optimizer)
        return state

    def save_checkpoint(self, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Write this rank's part into the folder `filepath`."""
        folder = Path(filepath)
        folder.mkdir(exist_ok=True)
        write_part(checkpoint, folder / f"rank-{self.global_rank:05d}.pt", self.world_size)

    def load_checkpoint(self, checkpoint_path: Any, weights_only: bool | None = True) -> dict[str, Any]:
        """Read a checkpoint, with divided tensors as `Pieces`."""
        return read_checkpoint(Path(checkpoint_path))

    def load_model_state_dict(self, checkpoint: Mapping[str, Any], strict: bool = True) -> None:
        """Load this rank's part of each parameter."""
        assert self.lightning_module is not None
        own, saved = self.lightning_module.state_dict(), checkpoint["state_dict"]
        parts = {name: _part(value, own.get(name)) for name, value in saved.items()}
        self.lightning_module.load_state_dict(parts, strict=strict)

    def load_optimizer_state_dict(self, checkpoint: Mapping[str, Any]) -> None:
        """Load this rank's part of each of the optimizer's moments."""
        for optimizer, saved in zip(self.optimizers, checkpoint["optimizer_states"], strict=True):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            state = {
                number: {name: _part(value, parameters[number]) for name, value in values.items()}
                for number, values in saved["state"].items()
            }
            optimizer.load_state_dict({**saved, "state": state})


def _part(value: Any, like: Any) -> Any:
    """Return this rank's part of a saved tensor if `like` is a divided tensor of its shape, else the whole tensor."""
    full = whole(value)
    if not isinstance(like, DTensor) or full.shape != like.shape:
        return full
    # Every rank reads the same files, so nothing has to be sent between ranks.
    return distribute_tensor(full.to(like.device), like.device_mesh, like.placements, src_data_rank=None)
