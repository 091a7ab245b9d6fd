"""One optimizer step compared with transformers' Trainer, with rows one by one and with two processes."""

import json
import os
import socket
import subprocess
import sys

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments, get_scheduler
from transformers.trainer_utils import SaveStrategy

from onecard.config.training import FinetuneConfig
from onecard.data import examples as data_examples
from onecard.data.packing import micro_batches, pack
from onecard.models import adapter as models_adapter
from onecard.models import packed_attention, trainable
from onecard.training import step
from onecard.training.schedule import learning_rate
from tests.support import two_processes
from tests.support.paths import ROOT
from tests.support.two_processes import NO_DROPOUT, encode_tiny, tiny_step_model


def gradient(step_model: step.StepModel, batches: list, targets: int) -> tuple[float, torch.Tensor]:
    """The loss of the step and the flat gradient of the adapter."""
    step_model.zero_grad()
    total = 0.0
    for packed in batches:
        loss_sum, _, _ = step_model(packed)
        (loss_sum / targets).backward()
        total += loss_sum.item()
    return total / targets, torch.cat([p.grad.flatten().clone() for p in trainable.trainable(step_model)])


def close(a: torch.Tensor, b: torch.Tensor, relative: float) -> bool:
    return bool((a - b).norm() <= relative * b.norm())


def hidden_states(step_model: step.StepModel, packed) -> torch.Tensor:
    return (
        step_model.model.get_base_model()
        .get_decoder()(
            input_ids=packed.input_ids,
            position_ids=packed.position_ids,
            document_lengths=packed.document_lengths,
            use_cache=False,
        )
        .last_hidden_state[0]
    )


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
def test_steps_equal_those_of_transformers_trainer(tiny_model, tmp_path, scheduler):
    """N steps on the same rows in the same order give the Trainer's losses and adapter to 1e-5."""
    examples, batch, epochs = encode_tiny(14), 4, 2
    options = FinetuneConfig(learning_rate=1e-2, lr_scheduler=scheduler, warmup_steps=2, batch_size=batch)
    per_epoch = data_examples.steps_per_epoch(len(examples), batch)
    total = per_epoch * epochs

    ours = tiny_step_model(tiny_model)
    start = {name: p.detach().clone() for name, p in ours.model.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.trainable(ours), lr=options.learning_rate, weight_decay=0)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    steps, losses, seen = [], [], 0
    for number in range(total):
        rows = data_examples.rows_at(options.seed, seen, batch, len(examples))
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(options, number, total, options.warmup_steps)
        targets = int(examples.target_counts[rows].sum())
        batches = micro_batches(examples, rows, 300)
        losses.append(step.gradient(ours, batches, targets, trainable.trainable(ours), scaler))
        step.update(optimizer, scaler, 1.0, rows)
        steps.append(rows)
        seen += len(rows)

    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32, attn_implementation="eager")
    theirs = models_adapter.add_adapter(base, NO_DROPOUT, seed=3)
    theirs.load_state_dict(start, strict=False)
    trainer = PlainTrainer(
        model=theirs,
        args=TrainingArguments(
            output_dir=str(tmp_path),
            max_steps=total,
            per_device_train_batch_size=batch,
            learning_rate=options.learning_rate,
            lr_scheduler_type="constant_with_warmup" if scheduler == "constant" else scheduler,
            warmup_steps=options.warmup_steps,
            max_grad_norm=1.0,
            logging_steps=1,
            save_strategy=SaveStrategy.NO,
            report_to=[],
            use_cpu=True,
            disable_tqdm=True,
        ),
        train_dataset=[padded_batch(examples, rows) for rows in steps],
    )
    trainer.train()
    expected = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    np.testing.assert_allclose(
        losses, [float(loss) for loss in expected], rtol=0, atol=1e-3
    )  # logged to 4 digits
    np.testing.assert_allclose(losses, trainer.raw_losses, rtol=0, atol=1e-5)
    for (name, mine), other in zip(ours.model.named_parameters(), theirs.parameters(), strict=True):
        if mine.requires_grad:
            assert torch.allclose(mine, other, rtol=0, atol=1e-5), name
            assert not torch.equal(mine, start[name]), f"{name} was not trained"


class PlainTrainer(Trainer):
    """A Trainer that gets whole batches already in order and keeps its losses unrounded."""

    raw_losses: list[float]

    def get_train_dataloader(self):
        return self.train_dataset

    def training_step(self, *args, **kwargs):
        loss = super().training_step(*args, **kwargs)
        self.__dict__.setdefault("raw_losses", []).append(loss.item())
        return loss


def padded_batch(examples: data_examples.Examples, rows) -> dict[str, torch.Tensor]:
    parts = [examples[row] for row in rows]
    longest = max(len(ids) for ids, _ in parts)
    ids, labels, mask = (torch.full((len(parts), longest), fill) for fill in (1, -100, 0))
    for place, (row, is_target) in enumerate(parts):
        row = torch.from_numpy(row.astype(np.int64))
        ids[place, : len(row)], mask[place, : len(row)] = row, 1
        labels[place, : len(row)] = torch.where(torch.from_numpy(is_target), row, -100)
    return {"input_ids": ids, "labels": labels, "attention_mask": mask}


@pytest.mark.parametrize("scheduler", ["linear", "cosine", "constant"])
@pytest.mark.parametrize("warmup", [0, 1, 7])
def test_learning_rate_is_the_library_schedule(scheduler, warmup):
    """The rate of every update equals that of transformers.get_scheduler."""
    options = FinetuneConfig(learning_rate=0.3, lr_scheduler=scheduler)
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=0.3)
    name = "constant_with_warmup" if scheduler == "constant" else scheduler
    reference = get_scheduler(name, optimizer, num_warmup_steps=warmup, num_training_steps=20)
    for update in range(20):
        assert learning_rate(options, update, 20, warmup) == pytest.approx(
            optimizer.param_groups[0]["lr"], abs=1e-12
        )
        optimizer.step()
        reference.step()


@pytest.mark.parametrize("bits", [16, 8, 4])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_packed_rows_do_not_see_each_other(tiny_model, bits, checkpointing):
    """Hidden states, loss and gradient of packed rows equal those of the rows one by one."""
    examples = encode_tiny(7)
    step_model = tiny_step_model(tiny_model, bits, checkpointing)
    together, apart = pack(examples, range(7)), [pack(examples, [row]) for row in range(7)]
    targets = len(together.targets)
    assert targets == sum(len(packed.targets) for packed in apart)
    with torch.no_grad():
        packed_hidden = hidden_states(step_model, together)
        single_hidden = torch.cat([hidden_states(step_model, packed) for packed in apart])
    assert torch.allclose(packed_hidden, single_hidden, atol=1e-4)
    loss_together, gradient_together = gradient(step_model, [together], targets)
    loss_apart, gradient_apart = gradient(step_model, apart, targets)
    assert loss_together == pytest.approx(loss_apart, rel=1e-6)
    assert close(gradient_together, gradient_apart, 1e-5)


def test_mixed_documents_are_seen_as_different(tiny_model):
    """The check above can fail: the same rows as one document give other hidden states."""
    examples = encode_tiny(7)
    step_model = tiny_step_model(tiny_model)
    packed = pack(examples, range(7))
    merged = type(packed)(**{**packed.__dict__, "document_lengths": (sum(packed.document_lengths),)})
    with torch.no_grad():
        assert not torch.allclose(
            hidden_states(step_model, packed), hidden_states(step_model, merged), atol=1e-2
        )


def test_packed_hidden_states_equal_the_library_model(tiny_model):
    """They equal those of transformers' eager attention with the same weights, one row at a time."""
    examples = encode_tiny(5)
    step_model = tiny_step_model(tiny_model)
    packed = pack(examples, range(5))
    with torch.no_grad():
        ours = hidden_states(step_model, packed)
        step_model.model.get_base_model().set_attn_implementation("eager")
        decoder = step_model.model.get_base_model().get_decoder()
        documents = packed.input_ids.split(packed.document_lengths, dim=1)
        theirs = [decoder(ids).last_hidden_state[0] for ids in documents]
    assert torch.allclose(ours, torch.cat(theirs), atol=1e-5)
    assert packed_attention.NAME != "eager"


def test_gradient_does_not_depend_on_the_token_budget(tiny_model):
    """Micro-batches of one row, half the rows and all rows give the same gradient to 1e-6."""
    examples = encode_tiny(9)
    step_model = tiny_step_model(tiny_model)
    rows, total = np.arange(9), int(examples.lengths.sum())
    targets = int(examples.target_counts.sum())
    results = {}
    for budget in (1, total // 2 + 1, total):
        batches = micro_batches(examples, rows, budget)
        results[len(batches)] = gradient(step_model, batches, targets)
    assert sorted(results) == [1, 2, 9] or sorted(results) == [1, 3, 9]
    reference_loss, reference = results[1]
    for loss, flat in results.values():
        assert loss == pytest.approx(reference_loss, rel=1e-6)
        assert close(flat, reference, 1e-6)


TWO = ("--standalone", "--nproc_per_node=2")


def torchrun(how: tuple[str, ...], *arguments: object) -> subprocess.Popen:
    """Start tests/support/two_processes.py with these arguments by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", *how, "-m", "tests.support.two_processes"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen([*command, *map(str, arguments)], env=environment, cwd=ROOT)


def test_two_processes_give_the_gradient_of_one(tiny_model, tmp_path):
    """Two gloo processes with unequal shares of a step of 5 rows give the update of one process."""
    one = two_processes.one_step(tiny_model)
    output = tmp_path / "two.json"
    assert torchrun(TWO, tiny_model, output).wait(timeout=300) == 0
    two = json.loads(output.read_text())
    assert one["micro_batches"] != two["micro_batches"]
    assert two["loss"] == pytest.approx(one["loss"], rel=1e-6)
    assert two["grad_norm"] == pytest.approx(one["grad_norm"], rel=1e-5)
    assert close(torch.tensor(two["adapter"]), torch.tensor(one["adapter"]), 1e-6)
    assert close(torch.tensor(two["gradient"]), torch.tensor(one["gradient"]), 1e-5)


def test_out_of_memory_in_one_process_is_redone_by_all(tiny_model, tmp_path):
    """Both drop the partial gradient; the second try gives the gradient of one process."""
    output = tmp_path / "two.json"
    assert torchrun(TWO, tiny_model, output, "no-memory").wait(timeout=300) == 0
    two, one = json.loads(output.read_text()), two_processes.one_step(tiny_model)
    assert two["losses"] == [None, pytest.approx(one["loss"], rel=1e-6)]
    assert two["dropped"] == [True, False]
    assert two["norm"] == pytest.approx(one["grad_norm"], rel=1e-5)


def test_accuracy_counts_the_most_probable_token(tiny_model):
    """evaluate's loss and accuracy equal those from full logits."""
    examples = encode_tiny(6)
    step_model = tiny_step_model(tiny_model)
    loss, accuracy = step.evaluate(step_model, micro_batches(examples, range(6), 200))
    packed = pack(examples, range(6))
    with torch.no_grad():
        logits = step_model.model.get_base_model().lm_head(hidden_states(step_model, packed)[packed.predicts])
    assert loss == pytest.approx(torch.nn.functional.cross_entropy(logits, packed.targets).item(), rel=1e-5)
    assert accuracy == pytest.approx((logits.argmax(-1) == packed.targets).double().mean().item())
    assert step_model.training


def test_two_machines_give_the_gradient_of_one(tiny_model, tmp_path):
    """Two launchers with one process each, joined by torchrun's rendezvous, give that gradient."""
    output = tmp_path / "two.json"
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        meeting = f"127.0.0.1:{free.getsockname()[1]}"
    options = ("--nnodes=2", "--nproc_per_node=1", "--rdzv_backend=c10d", f"--rdzv_endpoint={meeting}")
    machines = [torchrun((*options, "--rdzv_id=test"), tiny_model, output) for _ in "ab"]
    assert [machine.wait(timeout=300) for machine in machines] == [0, 0]
    two, one = json.loads(output.read_text()), two_processes.one_step(tiny_model)
    assert one["micro_batches"] != two["micro_batches"]
    assert close(torch.tensor(two["gradient"]), torch.tensor(one["gradient"]), 1e-5)
