"""ZeRO 1 to 3 by DeepSpeed's engine: what is not offloaded is sharded over the GPUs."""

from collections.abc import Callable
from typing import Any

import torch

from onecard.data.packing import PackedBatch
from onecard.errors import UserError
from onecard.models import trainable
from onecard.system import processes as system_processes
from onecard.training.sharded import Sharded, on_main
from onecard.training.step import StepModel

MOMENTS = ("exp_avg", "exp_avg_sq")  # names of AdamW's two moments
OFFLOADS = ("offload_optimizer", "offload_param")  # keys of DeepSpeed's configuration


class Zero(Sharded):
    """DeepSpeed's engine wraps the model; a JSON file of DeepSpeed sets the stage and what is offloaded."""

    engine: Any  # DeepSpeed has no types

    def shard(
        self,
        step_model: StepModel,
        device: torch.device,
        make_optimizer: Callable[[list[torch.nn.Parameter]], torch.optim.Optimizer],
    ) -> None:
        import deepspeed
        from accelerate.utils import DeepSpeedPlugin

        settings = DeepSpeedPlugin().deepspeed_config  # accelerate launch put them into the environment
        ours = ("fp16", "bf16", "optimizer", "scheduler")  # what OneCard does itself
        config = {key: value for key, value in settings.items() if key not in ours}
        config |= {
            "train_micro_batch_size_per_gpu": 1,
            "gradient_accumulation_steps": 1,  # the loop itself marks the end of a step
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
            raise UserError(
                f"DeepSpeed: zero_stage {self.stage} shards nothing.", "Use stage 1, 2 or 3, or torchrun."
            )
        deepspeed.init_distributed(auto_mpi_discovery=False)  # uses the group that distributed.start made
        if self.stage == 3:  # shard now: the engine would first put the whole model on every GPU
            deepspeed.zero.Init(module=step_model, config_dict_or_path=config)
            for buffer in step_model.buffers():
                buffer.data = buffer.data.to(device)
            # the loss uses the weight of the head without calling its module
            head = trainable.base_of(step_model.model).get_output_embeddings()
            deepspeed.zero.register_external_parameter(step_model, head.weight)
        optimizer = make_optimizer(list(self.named.values()))
        self.engine, self.optimizer, _, _ = deepspeed.initialize(
            model=step_model, optimizer=optimizer, config=config, dist_init_required=False
        )
        self.model = self.engine
        self.has_moments = False  # the engine makes them at its first step
        offloaded = [
            name.split("_")[1] for name in OFFLOADS if zero.get(name, {}).get("device", "none") != "none"
        ]
        where = f", {' and '.join(offloaded)} in CPU memory" if offloaded else ""
        self.description = f"DeepSpeed ZeRO-{self.stage}{where}"

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

        return {name: on_main(safe_get_full_fp32_param(p).detach()) for name, p in self.named.items()}

    def optimizer_state(self) -> dict[int, dict[str, Any]]:
        from deepspeed.utils import safe_get_full_optimizer_state

        if not self.has_moments:
            return {}
        steps = [state["step"] for state in self._flat_states() if "step" in state]
        gathered = {}
        for number, parameter in enumerate(self.named.values()):
            moments = {key: safe_get_full_optimizer_state(parameter, key) for key in MOMENTS}
            gathered[number] = {key: on_main(value.detach()) for key, value in moments.items()}
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
        """Make a step with gradient and learning rate zero: it creates the moments and changes nothing."""
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
