"""FSDP2 by torch's fully_shard: the shards of a layer are gathered while that layer computes."""

import math
from collections.abc import Callable
from typing import Any

import torch

from onecard.models import trainable
from onecard.system import processes as system_processes
from onecard.training.sharded import Sharded, on_main
from onecard.training.step import StepModel


class Fsdp(Sharded):
    """The shards of a layer are gathered while it computes; the rest of the model is gathered as one unit."""

    def shard(
        self,
        step_model: StepModel,
        device: torch.device,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        from accelerate.utils import FullyShardedDataParallelPlugin
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        settings = FullyShardedDataParallelPlugin()  # accelerate launch put them into the environment
        offload = OffloadPolicy()
        if isinstance(settings.cpu_offload, CPUOffloadPolicy):
            offload = CPUOffloadPolicy(pin_memory=device.type == "cuda")
        reshards = settings.reshard_after_forward is not False
        mesh = init_device_mesh(device.type, (system_processes.world_size(),))
        for unit in (*layers_of(trainable.base_of(step_model.model)), step_model):
            fully_shard(unit, mesh=mesh, offload_policy=offload, reshard_after_forward=reshards)
        self.model = step_model
        self.named = {n: p for n, p in step_model.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(list(self.named.values()))
        freed = "after its forward pass" if reshards else "after its backward pass"
        offloaded = ", the shards are in CPU memory" if isinstance(offload, CPUOffloadPolicy) else ""
        self.description = f"FSDP2, a gathered layer is freed {freed}{offloaded}"

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, scaler: torch.amp.GradScaler) -> float:
        """Update the trained parameters unless the gradient is not finite; returns its norm."""
        scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm or math.inf
        total = torch.nn.utils.clip_grad_norm_(list(self.named.values()), limit)
        norm: float = _whole(total).item()
        if math.isfinite(norm) or scaler.is_enabled():
            scaler.step(self.optimizer)
            scaler.update()
        return norm

    def trained(self) -> dict[str, torch.Tensor]:
        return {name: on_main(_whole(p)) for name, p in self.named.items()}

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        gathered = {}
        for number, parameter in enumerate(self.named.values()):
            state = self.optimizer.state.get(parameter, {})
            gathered[number] = {key: on_main(_whole(value)) for key, value in state.items()}
        return {number: state for number, state in gathered.items() if state}

    def set_optimizer_state(self, states: dict[int, dict[str, Any]]) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        for number, parameter in enumerate(self.named.values()):
            assert isinstance(parameter, DTensor), "fully_shard has made it one"
            sharded_state = {}
            mesh, placements = parameter.device_mesh, parameter.placements
            for key, value in states.get(number, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    shard = distribute_tensor(value, mesh, placements).to_local()
                    shard = shard.to(parameter.to_local().device)  # the CPU, if shards are offloaded
                    shape, stride = parameter.shape, parameter.stride()
                    value = DTensor.from_local(
                        shard, mesh, placements, run_check=False, shape=shape, stride=stride
                    )
                sharded_state[key] = value
            if sharded_state:
                self.optimizer.state[parameter] = sharded_state


def layers_of(base: Any) -> torch.nn.ModuleList:
    """The layers of the decoder: its longest list of modules."""
    lists = [m for m in base.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len)


def _whole(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    from torch.distributed.tensor import DTensor

    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
