"""Models that do not fit one card: weights, gradients and optimizer spread over processes.

`accelerate launch` starts the processes and says how (config files: sample/distributed/): FSDP2, done by
torch's fully_shard, or DeepSpeed ZeRO 1 to 3, done by its engine. The step is still the sum over its rows;
but processes must go through the model equally often, so one with fewer micro-batches repeats one without its
targets, and running out of memory is not redone.
"""

import abc
import dataclasses
import math
import os
from collections.abc import Callable, Iterable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch

from onecard.config.training import FinetuneConfig
from onecard.data.examples import Examples
from onecard.data.packing import PackedBatch, pack
from onecard.errors import Stopped, UserError
from onecard.models import trainable
from onecard.system import processes as system_processes
from onecard.system import signals
from onecard.system.console import say
from onecard.training import distributed
from onecard.training.step import NonFiniteError, StepModel

FSDP, DEEPSPEED = "FSDP", "DeepSpeed"
MARKS = {FSDP: "ACCELERATE_USE_FSDP", DEEPSPEED: "ACCELERATE_USE_DEEPSPEED"}  # set by accelerate launch
TRAINED = ("lora", "full")
ACTIVATIONS = 2  # the share of free memory that is left to them: gradients, moments and layers come later


def wanted() -> str | None:
    """How `accelerate launch` asked to spread the model; None: every process has all of it."""
    return next((kind for kind, mark in MARKS.items() if os.environ.get(mark, "").lower() == "true"), None)


def check(options: FinetuneConfig, dtype: str) -> None:
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


class Sharded(abc.ABC):
    """What FSDP and ZeRO share, a training/strategy.py Strategy."""

    has_whole_model = False
    redoes_steps = False
    model: torch.nn.Module  # the step model, or what the library put around it
    named: dict[str, torch.nn.Parameter]  # what is trained
    optimizer: torch.optim.Optimizer
    said: str  # how the model is spread

    def __init__(self, max_grad_norm: float):
        self.max_grad_norm = max_grad_norm

    def start(self, device: torch.device) -> None:
        distributed.start(device, alone_too=True)

    def stop(self) -> None:
        distributed.stop()

    def deferring_signals(self) -> AbstractContextManager[None]:
        return signals.later()  # for stop_together

    def loads_on(self, device: str) -> str:
        return "cpu"  # and goes to the cards in parts

    def for_activations(self, free_bytes: int) -> int:
        return free_bytes // ACTIVATIONS

    def take(
        self,
        step_model: StepModel,
        device: torch.device,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        self.spread(step_model, device, make_optimizer)
        say(f"spread      over {system_processes.world_size()} processes: {self.said}")

    @abc.abstractmethod
    def spread(
        self,
        step_model: StepModel,
        device: torch.device,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        """Spread the model, loaded on the CPU, over all processes."""

    @abc.abstractmethod
    def backward(self, loss: torch.Tensor, last: bool) -> None:
        """Add to the gradient; last: of the step's micro-batches."""

    @abc.abstractmethod
    def drop_gradient(self) -> None: ...

    @abc.abstractmethod
    def step(self, scaler: torch.amp.GradScaler) -> float:
        """Change what is trained by its gradient; returns its norm before clipping."""

    @abc.abstractmethod
    def trained(self) -> dict[str, torch.Tensor]:
        """All that is trained, whole, on the CPU of the first process; every process must ask."""

    @abc.abstractmethod
    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        """The optimizer's state of each parameter, in the same way."""

    @abc.abstractmethod
    def set_optimizer_state(self, states: dict[int, dict[str, Any]]) -> None:
        """Take the state that optimizer_state gave."""

    def level(self, share: list[PackedBatch], examples: Examples, row: int) -> list[PackedBatch]:
        """As many micro-batches as the process with most has; those added have no target."""
        count = distributed.largest(len(share))
        like = share[0] if share else pack(examples, [row])
        idle = dataclasses.replace(like, predicts=like.predicts[:0], targets=like.targets[:0], row_numbers=())
        return share + [idle] * (count - len(share))

    def gradient(
        self,
        micro_batches: Iterable[PackedBatch],
        targets_in_step: int,
        scaler: torch.amp.GradScaler,
        progress: Callable[[int], None],
    ) -> float:
        """Like step.gradient, of equally many micro-batches in every process; raises NonFiniteError.

        Both kinds average over the processes, hence their number as a factor.
        """
        total, processes = torch.zeros(1), system_processes.world_size()
        bad_rows: list[int] = []
        batches = list(micro_batches)
        self.drop_gradient()
        for place, packed in enumerate(batches):
            loss_sum, _, _ = self.model(packed)
            last = place == len(batches) - 1
            self.backward(scaler.scale(loss_sum * (processes / targets_in_step)), last)
            total += loss_sum.detach().cpu()
            if not math.isfinite(loss_sum.item()):
                bad_rows.extend(packed.row_numbers)
            progress(len(packed.row_numbers))
        value = distributed.sum_over_processes(total.to(packed.input_ids.device)).item() / targets_in_step
        if not math.isfinite(value):
            raise NonFiniteError("loss", value, distributed.gather_rows(bad_rows))
        return value

    def update(self, scaler: torch.amp.GradScaler, rows: Sequence[int]) -> tuple[float, bool]:
        """Like step.update: (gradient norm, whether something was changed)."""
        norm = self.step(scaler)
        if not math.isfinite(norm) and not scaler.is_enabled():
            raise NonFiniteError("gradient norm", norm, list(rows))
        return norm, math.isfinite(norm)

    def gather(self) -> tuple[dict[str, torch.Tensor], "GatheredOptimizer"]:
        trained = self.trained()
        return trained, GatheredOptimizer(self, trained)

    def optimizer_to_restore(self) -> "GatheredOptimizer":
        return GatheredOptimizer(self, {})

    def in_any(self, is_due: bool) -> bool:
        return bool(distributed.largest(is_due))  # every process has a part of what is saved

    def stop_together(self) -> None:
        if number := distributed.largest(signals.arrived() or 0):
            raise Stopped(number)


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
        return {name: _on_main(_whole(p)) for name, p in self.named.items()}

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        gathered = {}
        for number, parameter in enumerate(self.named.values()):
            state = self.optimizer.state.get(parameter, {})
            gathered[number] = {key: _on_main(_whole(value)) for key, value in state.items()}
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


class Zero(Sharded):
    """DeepSpeed's engine around the model; its own JSON file says the stage and what is offloaded."""

    engine: Any  # DeepSpeed has no types

    def spread(
        self,
        step_model: StepModel,
        device: torch.device,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        import deepspeed
        from accelerate.utils import DeepSpeedPlugin

        asked = DeepSpeedPlugin().deepspeed_config  # what accelerate launch put into the environment
        config = {key: asked[key] for key in asked if key not in ("fp16", "bf16", "optimizer", "scheduler")}
        config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop says itself where a step ends
            "train_batch_size": system_processes.world_size(),
            "gradient_clipping": self.max_grad_norm,
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
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=step_model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.model = self.engine
        self.has_moments = False  # the engine makes them at its first step
        away = [name.split("_")[1] for name in OFFLOADS if zero.get(name, {}).get("device", "none") != "none"]
        where = f", {' and '.join(away)} in the processor's memory" if away else ""
        self.said = f"DeepSpeed ZeRO-{self.stage}{where}"

    def backward(self, loss: torch.Tensor, last: bool) -> None:
        self.engine.set_gradient_accumulation_boundary(last)
        self.engine.backward(loss)

    def drop_gradient(self) -> None:
        self.engine.zero_grad()

    def step(self, scaler: torch.amp.GradScaler) -> float:
        self._step()
        return float(self.engine.get_global_grad_norm())

    def _step(self) -> None:
        self.engine.step()
        self.has_moments = True

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
        self._step()

    def _flat_states(self) -> list[dict[str, Any]]:
        return list(self.engine.optimizer.optimizer.state.values())


MOMENTS = ("exp_avg", "exp_avg_sq")  # AdamW's
OFFLOADS = ("offload_optimizer", "offload_param")  # of DeepSpeed's configuration


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


def _on_main(value: Any) -> Any:
    """What only the first process keeps, so that the others do not need the memory."""
    if isinstance(value, torch.Tensor):
        return value.cpu() if system_processes.is_main() else None
    return value


class GatheredOptimizer:
    """A spread optimizer as runs/checkpoint.py knows one: its state whole, parameters by their number."""

    def __init__(self, shards: Sharded, trained: dict[str, torch.Tensor]):
        self.shards, self.state = shards, shards.optimizer_state()
        self.param_groups = [{"params": list(trained.values())}]

    def state_dict(self) -> dict[str, Any]:
        return {"state": self.state, "param_groups": []}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.shards.set_optimizer_state(state_dict["state"])
