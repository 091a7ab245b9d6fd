"""Models that do not fit one card: weights, gradients and optimizer spread over processes.

`accelerate launch` starts the processes and says how (config files: sample/distributed/): FSDP2, done by
torch's fully_shard, or DeepSpeed ZeRO 1 to 3, done by its engine. The step is still the sum over its rows;
but processes must go through the model equally often, so one with fewer micro-batches repeats one without its
targets, and running out of memory is not redone.
"""

import dataclasses
import math
import os
from collections.abc import Callable, Sequence
from typing import Any

import torch

from onecard.data.packing import PackedBatch
from onecard.errors import UserError
from onecard.models import trainable
from onecard.system import processes as system_processes
from onecard.training import distributed
from onecard.training.step import NonFiniteError, StepModel

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"
MARKS = {FSDP: "ACCELERATE_USE_FSDP", DEEPSPEED: "ACCELERATE_USE_DEEPSPEED"}  # set by accelerate launch
TRAINED = ("lora", "full")


def wanted() -> str | None:
    """How `accelerate launch` asked to spread the model; None: every process has all of it."""
    return next((kind for kind, mark in MARKS.items() if os.environ.get(mark, "").lower() == "true"), None)


def check(options: Any, dtype: str) -> None:
    """Raise UserError for options that a spread model cannot have."""
    kind = wanted()
    if kind is None:
        return
    if options.bits != 16:
        problem = f"{kind} cannot spread weights of {options.bits} bits: their scales lie beside them."
        raise UserError(problem, "Add --bits 16, or use torchrun: each card then holds the whole base.")
    if options.train_what not in TRAINED:
        problem = f"--train_what {options.train_what} under {kind} is not possible."
        raise UserError(problem, f"Choose {' or '.join(TRAINED)}, or use torchrun.")
    if options.optimizer != "adamw":
        raise UserError(f"--optimizer {options.optimizer} under {kind} is not possible.", "Use adamw.")
    if kind == DEEPSPEED and dtype == "fp16":
        raise UserError("--dtype fp16 under DeepSpeed is not possible here.", "Use FSDP, bf16 or fp32.")
    if kind == FSDP and os.environ.get("FSDP_VERSION") != "2":
        raise UserError("FSDP 1 is not possible here.", "Write fsdp_version: 2 into the configuration.")


def spread(
    step_model: StepModel, device: torch.device, make_optimizer: Callable, max_grad_norm: float
) -> "Fsdp | Zero":
    """The model, loaded on the CPU, spread over all processes; make_optimizer: parameters -> optimizer."""
    kind = Fsdp if wanted() == FSDP else Zero
    return kind(step_model, device, make_optimizer, max_grad_norm)


class Fsdp:
    """Every layer is a unit whose shards come together while it works; the rest is one unit."""

    def __init__(self, step_model, device, make_optimizer, max_grad_norm):
        from accelerate.utils import FullyShardedDataParallelPlugin
        from torch.distributed.device_mesh import init_device_mesh
        from torch.distributed.fsdp import CPUOffloadPolicy, OffloadPolicy, fully_shard

        asked = FullyShardedDataParallelPlugin()  # what accelerate launch put into the environment
        is_card = device.type == "cuda"
        offload = OffloadPolicy()
        if isinstance(asked.cpu_offload, CPUOffloadPolicy):
            offload = CPUOffloadPolicy(pin_memory=is_card)
        settings = {
            "mesh": init_device_mesh(device.type, (system_processes.world_size(),)),
            "offload_policy": offload,
            "reshard_after_forward": asked.reshard_after_forward is not False,
        }
        for layer in layers_of(trainable.base_of(step_model.model)):
            fully_shard(layer, **settings)
        fully_shard(step_model, **settings)
        self.model, self.max_grad_norm = step_model, max_grad_norm
        self.named = {n: p for n, p in step_model.model.named_parameters() if p.requires_grad}
        self.optimizer = make_optimizer(list(self.named.values()))
        how = "between layers" if settings["reshard_after_forward"] else "until the backward pass"
        where = ", kept in the processor's memory" if isinstance(offload, CPUOffloadPolicy) else ""
        self.said = f"FSDP2, whole layers are let go {how}{where}"

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        loss.backward()

    def drop_gradient(self) -> None:
        self.optimizer.zero_grad(set_to_none=True)

    def update(self, scaler: torch.amp.GradScaler) -> float:
        """Change what is trained by its gradient, unless that is not finite; returns its norm."""
        scaler.unscale_(self.optimizer)
        limit = self.max_grad_norm or math.inf
        norm = torch.nn.utils.clip_grad_norm_(list(self.named.values()), limit).full_tensor().item()
        if math.isfinite(norm) or scaler.is_enabled():
            scaler.step(self.optimizer)
            scaler.update()
        return norm

    def trained(self) -> dict[str, torch.Tensor]:
        """All that is trained, whole, on the CPU of the first process; every process must ask."""
        return {name: _on_main(p.detach().full_tensor()) for name, p in self.named.items()}

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """The optimizer's state of each parameter, in the same way."""
        gathered = {}
        for number, parameter in enumerate(self.named.values()):
            state = self.optimizer.state.get(parameter, {})
            gathered[number] = {key: _on_main(_whole(value)) for key, value in state.items()}
        return {number: state for number, state in gathered.items() if state}

    def set_optimizer_state(self, states: dict[int, dict[str, Any]]) -> None:
        from torch.distributed.tensor import DTensor, distribute_tensor

        for number, parameter in enumerate(self.named.values()):
            placed = {}
            mesh, placements = parameter.device_mesh, parameter.placements
            for key, value in states.get(number, {}).items():
                if isinstance(value, torch.Tensor) and value.shape == parameter.shape:
                    shard = distribute_tensor(value, mesh, placements).to_local()
                    shard = shard.to(parameter.to_local().device)  # which may be the CPU on a mesh of cards
                    shape = {"shape": parameter.shape, "stride": parameter.stride()}
                    value = DTensor.from_local(shard, mesh, placements, run_check=False, **shape)
                placed[key] = value
            if placed:
                self.optimizer.state[parameter] = placed


class Zero:
    """DeepSpeed's engine around the model; its own JSON file says the stage and what is offloaded."""

    def __init__(self, step_model, device, make_optimizer, max_grad_norm):
        import deepspeed
        from accelerate.utils import DeepSpeedPlugin

        asked = DeepSpeedPlugin().deepspeed_config  # what accelerate launch put into the environment
        config = {key: asked[key] for key in asked if key not in ("fp16", "bf16", "optimizer", "scheduler")}
        config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop says itself where a step ends
            "train_batch_size": system_processes.world_size(),
            "gradient_clipping": max_grad_norm,
            "zero_allow_untested_optimizer": True,
            "zero_force_ds_cpu_optimizer": False,
            "steps_per_print": 1 << 60,
        }
        zero = config.get("zero_optimization", {})
        self.stage = zero.get("stage", 0)
        self.named = {n: p for n, p in step_model.model.named_parameters() if p.requires_grad}
        if self.stage not in (1, 2, 3):
            raise UserError(f"DeepSpeed: zero_stage {self.stage} spreads nothing.", "Use torchrun.")
        deepspeed.init_distributed(auto_mpi_discovery=False)  # takes the group that distributed.start made
        if self.stage == 3:  # spread at once: the engine would put all of it on every card first
            deepspeed.zero.Init(module=step_model, config_dict_or_path=config)
            for buffer in step_model.buffers():
                buffer.data = buffer.data.to(device)
            # the loss multiplies by the head's weight without going through its module
            head = trainable.base_of(step_model.model).get_output_embeddings()
            deepspeed.zero.register_external_parameter(step_model, head.weight)
        optimizer = make_optimizer(list(self.named.values()))
        self.model, self.optimizer, _, _ = deepspeed.initialize(
            model=step_model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.has_moments = False  # the engine makes them at its first step
        away = [name.split("_")[1] for name in OFFLOADS if zero.get(name, {}).get("device", "none") != "none"]
        where = f", {' and '.join(away)} in the processor's memory" if away else ""
        self.said = f"DeepSpeed ZeRO-{self.stage}{where}"

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.model.set_gradient_accumulation_boundary(last)
        self.model.backward(loss)

    def drop_gradient(self) -> None:
        self.model.zero_grad()

    def update(self, scaler: torch.amp.GradScaler) -> float:
        """Change what is trained by its gradient; returns its norm before clipping."""
        self.model.step()
        self.has_moments = True
        return float(self.model.get_global_grad_norm())

    def trained(self) -> dict[str, torch.Tensor]:
        from deepspeed.utils import safe_get_full_fp32_param

        return {name: _on_main(safe_get_full_fp32_param(p).detach()) for name, p in self.named.items()}

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.has_moments:
            return {}
        steps = [state["step"] for state in self._flat_states() if "step" in state]
        gathered = {}
        for number, parameter in enumerate(self.named.values()):
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            gathered[number] = {key: _on_main(value.detach()) for key, value in moments.items()}
            gathered[number]["step"] = torch.as_tensor(steps[0]).float().cpu()
        return gathered

    def set_optimizer_state(self, states: dict[int, dict[str, Any]]) -> None:
        from deepspeed.utils import safe_set_full_optimizer_state

        if not states:
            return
        self._make_moments()
        for number, parameter in enumerate(self.named.values()):
            for key in MOMENTS:
                safe_set_full_optimizer_state(parameter, states[number][key], key)
        for state in self._flat_states():
            state["step"] = states[0]["step"].clone()

    def _make_moments(self) -> None:
        """A step with gradient and rate zero, which changes nothing."""
        device = next(self.model.parameters()).device
        one, two = torch.zeros(1, dtype=torch.long), torch.zeros(1, 2, dtype=torch.long)
        packed = PackedBatch(two, torch.arange(2)[None], (2,), one, one, ()).to(device)
        for group in self.optimizer.param_groups:
            group["lr"] = 0.0
        loss_sum, _, _ = self.model(packed)
        self.backward(loss_sum * 0, last=True)
        self.update(None)

    def _flat_states(self) -> list[dict[str, Any]]:
        return list(self.optimizer.optimizer.state.values())


MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
OFFLOADS = ("offload_optimizer", "offload_param")  # of DeepSpeed's configuration


def layers_of(base: torch.nn.Module) -> torch.nn.ModuleList:
    """The decoder's layers: its longest list of modules."""
    lists = [m for m in base.get_decoder().modules() if isinstance(m, torch.nn.ModuleList)]
    return max(lists, key=len)


def _whole(value: Any) -> Any:
    if not isinstance(value, torch.Tensor):
        return value
    value = value.detach()
    return value.full_tensor() if hasattr(value, "full_tensor") else value


def _on_main(value: Any) -> Any:
    """What only the first process keeps, so that the others do not need the memory."""
    if isinstance(value, torch.Tensor):
        return value.cpu() if system_processes.is_main() else None
    return value


class GatheredOptimizer:
    """A spread optimizer as runs/checkpoint.py knows one: its state whole, parameters by their number."""

    def __init__(self, shards: Fsdp | Zero, trained: dict[str, torch.Tensor]):
        self.shards, self.state = shards, shards.optimizer_state()
        self.param_groups = [{"params": list(trained.values())}]

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "param_groups": []}

    def load_state_dict(self, given: dict[str, Any]) -> None:
        self.shards.set_optimizer_state(given["state"])


def level(share: list[PackedBatch], other: PackedBatch) -> list[PackedBatch]:
    """As many micro-batches as the process with most has; those added have no target. other: any one."""
    count = distributed.largest(len(share))
    like = share[0] if share else other
    none = {"predicts": like.predicts[:0], "targets": like.targets[:0], "row_numbers": ()}
    return share + [dataclasses.replace(like, **none)] * (count - len(share))


def gradient(
    shards: Fsdp | Zero,
    micro_batches: Sequence[PackedBatch],
    targets_in_step: int,
    scaler: torch.amp.GradScaler,
    progress: Callable[[int], None] = lambda rows: None,
) -> float:
    """Like step.gradient, of equally many micro-batches in every process; raises NonFiniteError.

    Both kinds average over the processes, hence their number as a factor.
    """
    total, bad_rows, processes = torch.zeros(1), [], system_processes.world_size()
    shards.drop_gradient()
    for place, packed in enumerate(micro_batches):
        loss_sum, _, _ = shards.model(packed)
        last = place == len(micro_batches) - 1
        shards.backward(scaler.scale(loss_sum * (processes / targets_in_step)), last)
        total += loss_sum.detach().cpu()
        if not math.isfinite(loss_sum.item()):
            bad_rows.extend(packed.row_numbers)
        progress(len(packed.row_numbers))
    value = distributed.sum_over_processes(total.to(packed.input_ids.device)).item() / targets_in_step
    if not math.isfinite(value):
        raise NonFiniteError("loss", value, distributed.gather_rows(bad_rows))
    return value


def update(shards: Fsdp | Zero, scaler: torch.amp.GradScaler, rows: Sequence[int]) -> tuple[float, bool]:
    """Like step.update: (gradient norm, whether something was changed)."""
    norm = shards.update(scaler)
    if not math.isfinite(norm) and not scaler.is_enabled():
        raise NonFiniteError("gradient norm", norm, list(rows))
    return norm, math.isfinite(norm)
