"""FSDP2, done by torch's fully_shard: every layer is a unit whose shards come together while it works."""

import math
from collections.abc import Callable
from typing import Any

import torch

from onecard.models import trainable
from onecard.system import processes as system_processes
from onecard.training.sharded import Sharded, on_main
from onecard.training.step import StepModel


class Fsdp(Sharded):
    """Every layer is a unit whose shards come together while it works; the rest is one unit."""

    def spread(
        self,
        step_model: StepModel,
        device: torch.device,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        from accelerate.utils import FullyShardedDataParallelPlugin
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        asked = FullyShardedDataParallelPlugin()  # what accelerate launch put into the environment
        is_card = device.type == "cuda"
        offload = OffloadPolicy()
        if isinstance(asked.cpu_offload, CPUOffloadPolicy):
            offload = CPUOffloadPolicy(pin_memory=is_card)
        lets_go = asked.reshard_after_forward is not False
        mesh = init_device_mesh(device.type, (system_processes.world_size(),))
        for unit in (*layers_of(trainable.base_of(step_model.model)), step_model):
            fully_shard(unit, mesh=mesh, offload_policy=offload, reshard_after_forward=lets_go)
        self.model = step_model
        self.named = {n: p for n, p in step_model.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(list(self.named.values()))
        how = "between layers" if lets_go else "until the backward pass"
        where = ", kept in the processor's memory" if isinstance(offload, CPUOffloadPolicy) else ""
        self.said = f"FSDP2, whole layers are let go {how}{where}"

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()  # type: ignore[no-untyped-call]  # torch gives it no types

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def step(self, scaler: torch.amp.GradScaler) -> float:
        """Change what is trained by its gradient, unless that is not finite; returns its norm."""
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
            assert isinstance(parameter, DTensor), "fully_shard has spread it"
            placed = {}
            mesh, placements = parameter.device_mesh, parameter.placements
            for key, value in states.get(number, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    shard = distribute_tensor(value, mesh, placements).to_local()
                    shard = shard.to(parameter.to_local().device)  # which may be the CPU on a mesh of cards
                    shape, stride = parameter.shape, parameter.stride()
                    value = DTensor.from_local(
                        shard, mesh, placements, run_check=False, shape=shape, stride=stride
                    )
                placed[key] = value
            if placed:
                self.optimizer.state[parameter] = placed


def layers_of(base: Any) -> torch.nn.ModuleList:
    """The decoder's layers: its longest list of modules."""
    lists = [m for m in base.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len)


def _whole(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    from torch.distributed.tensor import DTensor

    value = value.detach()
    return value.full_tensor() if isinstance(value, DTensor) else value
