"""Training an adapter, embeddings, both, or all weights; and one after the other."""

import json
import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from onecard.config.options import build
from onecard.config.training import FinetuneConfig
from onecard.data.conversation import single
from onecard.data.packing import pack
from onecard.errors import UserError
from onecard.inference import chat
from onecard.models import adapter as models_adapter
from onecard.models import base_model, lora_shape, trainable
from onecard.training import loop, metrics, step
from onecard.training import plan as training_plan
from tests.support import tiny
from tests.support.resume_cases import differences, flags, outcome, stopped_at

WHAT = ("full", "embeddings", "lora+embeddings")


@pytest.fixture(params=["untied", "tied"])
def base(request, tiny_model, tied_model) -> Path:
    return tiny_model if request.param == "untied" else tied_model


def prepared(folder: Path, what: str, bits: int = 16, dtype: str = "fp32"):
    weights_dtype = "fp32" if what == "full" else dtype
    shape = lora_shape.LoraShape(4, 8.0, 0.0, "q_proj,v_proj", what=what)
    model = trainable.prepare(base_model.load_base(str(folder), bits, weights_dtype, "cpu"), shape, seed=3)
    packs = base_model.prepare_for_packed_training(model, checkpointing=False)
    assert packs
    return step.StepModel(model, base_model.DTYPES[dtype])


def trained_names(made) -> set[str]:
    return {
        models_adapter.portable(name).split(".lora_")[0]
        for name, parameter in made.named_parameters()
        if parameter.requires_grad
    }


@pytest.mark.parametrize("fault", ["another value", "one tensor less"])
def test_weights_that_are_not_those_in_memory_are_not_saved(tiny_model, tmp_path, monkeypatch, fault):
    """The file is read again and compared with the trained tensors: exit code 4 and its name."""
    write = trainable.save_file

    def damaged(tensors: dict[str, torch.Tensor], path: Path, **more) -> None:
        name, *others = sorted(tensors)
        kept = {other: tensors[other] for other in others}
        write(kept if fault == "one tensor less" else {**kept, name: tensors[name] + 1}, path, **more)

    monkeypatch.setattr(trainable, "save_file", damaged)
    with pytest.raises(UserError, match=r"adapter_model\.safetensors does not hold the tensors") as caught:
        trainable.save(prepared(tiny_model, "lora").model, None, tmp_path, was_updated=False)
    assert caught.value.code == 4


@pytest.mark.parametrize("what", WHAT)
def test_the_gradient_is_that_of_the_plain_model(base, what):
    """Packed rows with the loss in chunks give the gradient of full logits, computed row by row."""
    examples = tiny.encoded([single(**row) for row in tiny.rows(5)], tiny.tokenizer())
    ours = prepared(base, what)
    ours(pack(examples, range(5)))[0].backward()
    plain = prepared(base, what).model
    trainable.base_of(plain).set_attn_implementation("eager")
    for row in range(5):
        ids, is_target = (torch.from_numpy(part.copy()) for part in examples[row])
        logits = plain(ids.long()[None], use_cache=False).logits[0, :-1][is_target[1:]]
        torch.nn.functional.cross_entropy(logits, ids.long()[1:][is_target[1:]], reduction="sum").backward()
    pairs = list(zip(trainable.trainable(ours.model), trainable.trainable(plain), strict=True))
    assert all(mine.grad is not None and mine.grad.any() for mine, _ in pairs[:1])
    for mine, other in pairs:
        assert (mine.grad - other.grad).norm() <= 1e-5 * other.grad.norm() + 1e-9


def test_what_is_trained(base, tied_model):
    """Trained are the embedding alone; with LoRA also an untied head; or with `full` all parameters."""
    tied = base == tied_model
    head = set() if tied else {"base_model.model.lm_head"}
    assert trained_names(prepared(base, "embeddings").model) == {"base_model.model.model.embed_tokens"}
    both = trained_names(prepared(base, "lora+embeddings").model)
    assert {name for name in both if "layers" not in name} == {"base_model.model.model.embed_tokens"} | head
    assert {name.rsplit(".", 1)[-1] for name in both if "layers" in name} == {"q_proj", "v_proj"}
    model = prepared(base, "full").model
    assert len(trained_names(model)) == len(list(model.parameters()))


@pytest.mark.parametrize("what", WHAT)
def test_the_plan_knows_how_many_parameters(base, what):
    shape = lora_shape.LoraShape(4, 8.0, 0.0, "q_proj,v_proj", what=what)
    planned = base_model.check_architecture(str(base), base_model.load_config(str(base)), shape)
    assert planned == sum(p.numel() for p in trainable.trainable(prepared(base, what).model))


@pytest.mark.parametrize("bits", [8, 4])
def test_embeddings_of_a_quantised_base_are_trained_in_fp32(base, bits):
    step_model = prepared(base, "lora+embeddings", bits, "bf16")
    assert {p.dtype for p in trainable.trainable(step_model.model)} == {torch.float32}
    examples = tiny.encoded([single(**row) for row in tiny.rows(5)], tiny.tokenizer())
    step_model(pack(examples, range(5)))[0].backward()
    assert step_model.model.get_input_embeddings().weight.grad.any()


@pytest.mark.parametrize("what", WHAT)
def test_a_run_goes_on_bit_for_bit_and_other_tools_load_it(harness, base, tmp_path, what):
    """A continued run ends like a whole one, its loss falls, and peft or transformers get its logged loss."""
    rows, whole = tiny.save_rows(tmp_path / "rows.json", 24), tmp_path / "whole"
    answer = harness.run("finetune", flags(base, rows, whole, train_what=what, learning_rate=3e-3))
    assert answer["code"] == 0, answer["said"]
    run = stopped_at(whole, 5, tmp_path / "run")
    answer = harness.run("finetune_continue", {"output_path": run})
    assert answer["code"] == 0, answer["said"]
    assert differences(outcome(whole), outcome(run)) == []
    losses = [record["eval_loss"] for record in outcome(whole)["log"] if "eval_loss" in record]
    assert min(losses) < 0.95 * losses[0]
    before = AutoModelForCausalLM.from_pretrained(base)
    if what == "full":
        trained = AutoModelForCausalLM.from_pretrained(whole / "model")
        assert AutoTokenizer.from_pretrained(whole / "model").eos_token == "<end>"
        checkpoint = AutoModelForCausalLM.from_pretrained(whole / "checkpoint-5")
        assert all(p.isfinite().all() for p in checkpoint.parameters())
    else:
        trained = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base), whole)
        stored = load_file(whole / "adapter_model.safetensors")
        embedding = trained.get_input_embeddings().weight
        assert torch.equal(embedding, stored["base_model.model.model.embed_tokens.weight"])
    assert validation_loss(trained, rows, whole) == pytest.approx(min(losses), rel=1e-4)
    assert validation_loss(before, rows, whole) == pytest.approx(losses[0], rel=1e-4)


def validation_loss(made, rows: Path, run: Path) -> float:
    """The mean loss over the targets of the run's validation rows, computed from full logits."""
    settings = json.loads((run / "finetune_config.json").read_text())["options"]
    settings |= {"data_path": str(rows), "output_path": str(run.with_name("plan"))}
    plan = training_plan.prepare(build(FinetuneConfig, settings))
    total, count = 0.0, 0
    with torch.no_grad():
        for row in plan.data.validation_rows:
            ids, is_target = (torch.from_numpy(part.copy()) for part in plan.data.examples[row])
            logits = made.eval()(ids.long()[None]).logits[0, :-1][is_target[1:]]
            targets = ids.long()[1:][is_target[1:]]
            total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").item()
            count += len(targets)
    return total / count


@pytest.mark.parametrize("what", ["lora", *WHAT])
def test_bf16_runs_answer_their_questions(tied_model, tmp_path, what):
    """With fp32 trained weights and the compute dtype bf16, a run trains, validates and answers."""
    rows = tiny.save_rows(tmp_path / "rows.json", 24)
    settings = flags(
        tied_model, rows, tmp_path / "run", dtype="bf16", train_what=what, max_steps=2, test_size=3
    )
    options = build(FinetuneConfig, {k: str(v) if isinstance(v, Path) else v for k, v in settings.items()})
    loop.run(options, chat.reply, metrics.loss_curve)
    answers = json.loads((tmp_path / "run" / "finished.json").read_text())["answers"]
    assert len(answers) == 3


def test_all_weights_need_16_bits(harness, tiny_model, tmp_path):
    rows = tiny.save_rows(tmp_path / "rows.json", 24)
    options = flags(tiny_model, rows, tmp_path / "run", train_what="full")
    answer = harness.run("finetune", {**options, "bits": 8})
    assert answer["code"] == 2
    assert "--bits 16" in answer["said"]
    answer = harness.run("finetune", {**options, "lora_path": tmp_path})
    assert answer["code"] == 2
    assert "--lora_path with --train_what full" in answer["said"]


def test_a_folder_named_model_is_not_deleted(harness, tiny_model, tmp_path):
    """A folder in the place of the whole model that no such run wrote stays, even with --overwrite."""
    (tmp_path / "run" / "model").mkdir(parents=True)
    rows = tiny.save_rows(tmp_path / "rows.json", 24)
    options = flags(tiny_model, rows, tmp_path / "run", overwrite=True, max_steps=1)
    answer = harness.run("finetune", {**options, "train_what": "full"})
    assert answer["code"] == 2
    assert "did not come from a run" in answer["said"]
    for _ in range(2):  # a LoRA run neither writes nor deletes anything there
        assert harness.run("finetune", options)["code"] == 0
        assert (tmp_path / "run" / "model").is_dir()
    answer = harness.run("finetune", {**options, "train_what": "full"})
    assert answer["code"] == 2


@pytest.mark.parametrize("what", ["embeddings", "lora+embeddings"])
def test_embeddings_that_learned_nothing_are_not_saved(tiny_model, tmp_path, what):
    model = prepared(tiny_model, what).model
    trainable.save(model, None, tmp_path, was_updated=False)
    with pytest.raises(UserError, match="learned nothing"):
        trainable.save(model, None, tmp_path, was_updated=True)


def test_tied_embeddings_that_peft_cannot_tie_are_refused(tmp_path):
    """BLOOM's embeddings have another name, so they cannot be trained beside LoRA."""
    import transformers

    config = transformers.BloomConfig(vocab_size=300, hidden_size=32, n_layer=1, n_head=4)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    shape = lora_shape.LoraShape(4, 8.0, 0.0, "all-linear", what="lora+embeddings")
    with pytest.raises(UserError, match="tied embeddings of BloomForCausalLM"):
        trainable.prepare(base_model.load_base(str(tmp_path), 16, "fp32", "cpu"), shape, seed=3)


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        ("lora", "lora", 0),
        ("lora", "lora+embeddings", 0),
        ("embeddings", "embeddings", 0),
        ("embeddings", "lora+embeddings", 0),
        ("lora+embeddings", "lora+embeddings", 0),
        ("lora", "embeddings", 4),
        ("lora+embeddings", "embeddings", 4),
        ("lora+embeddings", "lora", 4),
        ("embeddings", "lora", 4),
    ],
)
def test_a_run_may_train_more_than_it_starts_with(harness, base, tmp_path, first, second, code):
    """With --lora_path the adapter's weights are the start; all others start as in any run."""
    rows = tiny.save_rows(tmp_path / "rows.json", 24)
    options = flags(base, rows, tmp_path / "first", train_what=first, max_steps=2, lora_alpha=8.0)
    assert harness.run("finetune", options)["code"] == 0
    options = flags(
        base, rows, tmp_path / "second", train_what=second, max_steps=1, lora_path=tmp_path / "first"
    )
    answer = harness.run("finetune", options)
    assert answer["code"] == code, answer["said"]
    if code:
        assert f"train_what {first} -> {second}" in answer["said"]
        assert not (tmp_path / "second").exists()
        return
    start, beginning = (
        load_file(path / "adapter_model.safetensors")
        for path in (tmp_path / "first", tmp_path / "second" / "checkpoint-0")
    )
    assert all(torch.equal(beginning[name], tensor) for name, tensor in start.items())
    new = beginning.keys() - start.keys()
    assert bool(new) == (first != second)
    plain = prepared(base, "embeddings").model
    for name in new:
        if ".lora_B" in name:
            assert not beginning[name].any()
        elif ".lora_A" not in name:
            whole_model = plain.get_base_model()
            is_head = name.endswith("lm_head.weight")
            layer = whole_model.get_output_embeddings() if is_head else whole_model.get_input_embeddings()
            assert torch.equal(beginning[name], layer.weight)
    saved_options = json.loads((tmp_path / "second" / "finetune_config.json").read_text())["options"]
    if "lora" in first:
        assert saved_options["lora_alpha"] == 8.0


def test_the_kind_of_an_adapter_is_taken_over(harness, tiny_model, tmp_path):
    """A run takes rsLoRA over from the adapter, needs the same --peft_config for DoRA, and refuses others."""
    rows = tiny.save_rows(tmp_path / "rows.json", 24)
    (tmp_path / "dora.json").write_text('{"use_dora": true}')
    for name, changes in {"rs": {"rslora": True}, "dora": {"peft_config": tmp_path / "dora.json"}}.items():
        options = flags(tiny_model, rows, tmp_path / name, max_steps=1, **changes)
        assert harness.run("finetune", options)["code"] == 0
    more = {"max_steps": 1, "lora_path": tmp_path / "rs"}
    answer = harness.run("finetune", flags(tiny_model, rows, tmp_path / "new", **more))
    assert answer["code"] == 0, answer["said"]
    assert json.loads((tmp_path / "new" / "adapter_config.json").read_text())["use_rslora"] is True
    more["lora_path"] = tmp_path / "dora"
    answer = harness.run("finetune", flags(tiny_model, rows, tmp_path / "plain", **more))
    assert answer["code"] == 4
    assert '{"use_dora": true}' in answer["said"]
    more["peft_config"] = tmp_path / "dora.json"
    answer = harness.run("finetune", flags(tiny_model, rows, tmp_path / "plain", **more))
    assert answer["code"] == 0, answer["said"]
    more = {"max_steps": 1, "lora_path": tmp_path / "first", "rslora": True}
    options = flags(tiny_model, rows, tmp_path / "first", max_steps=1, lora_target_modules="all-linear")
    assert harness.run("finetune", options)["code"] == 0
    answer = harness.run("finetune", flags(tiny_model, rows, tmp_path / "third", **more))
    assert answer["code"] == 4
    assert "rslora False -> True" in answer["said"]
    more = {"max_steps": 1, "lora_path": tmp_path / "first", "lora_target_modules": "all-linear"}
    answer = harness.run("finetune", flags(tiny_model, rows, tmp_path / "third", **more))
    assert answer["code"] == 0, answer["said"]
    answer = harness.run("finetune", flags(tiny_model, rows, tmp_path / "third", **more))
    assert "This run is finished" in answer["said"]
    shutil.copy(tmp_path / "third" / "adapter_model.safetensors", tmp_path / "first")
    answer = harness.run("finetune", flags(tiny_model, rows, tmp_path / "third", **more))
    assert answer["code"] == 2
    assert "has changed since" in answer["said"]


def test_a_run_that_went_on_still_knows_what_it_started_from(harness, tiny_model, tmp_path):
    """After a stop and a continuation, the first command reports a finished run, not other weights."""
    rows = tiny.save_rows(tmp_path / "rows.json", 24)
    assert harness.run("finetune", flags(tiny_model, rows, tmp_path / "first", max_steps=1))["code"] == 0
    options = {"max_steps": 3, "lora_path": tmp_path / "first"}
    whole = tmp_path / "whole"
    assert harness.run("finetune", flags(tiny_model, rows, whole, **options))["code"] == 0
    run = stopped_at(whole, 2, tmp_path / "run")
    assert harness.run("finetune_continue", {"output_path": run})["code"] == 0
    assert differences(outcome(whole), outcome(run)) == []
    answer = harness.run("finetune", flags(tiny_model, rows, run, **options))
    assert "This run is finished" in answer["said"]


def test_what_lora_path_cannot_start_from(harness, tiny_model, tmp_path):
    """An unfinished run, a whole model and an older checkpoint are refused, each with what to do instead."""
    rows = tiny.save_rows(tmp_path / "rows.json", 24)
    whole = tmp_path / "whole"
    options = flags(tiny_model, rows, whole, train_what="full", max_steps=1, learning_rate=1e-4)
    assert harness.run("finetune", options)["code"] == 0
    (tmp_path / "unfinished").mkdir()
    shutil.copy(whole / "finetune_config.json", tmp_path / "unfinished")
    (tmp_path / "older").mkdir()
    (tmp_path / "older" / "trainer_state.json").write_text("{}")
    words = {"whole": "--model_path", "unfinished": "not finished", "older": "finetune_continue.py"}
    for name, word in words.items():
        answer = harness.run("finetune", flags(tiny_model, rows, tmp_path / "new", lora_path=tmp_path / name))
        assert answer["code"] in (2, 4)
        assert word in answer["said"]
    answer = harness.run("finetune_continue", {"output_path": whole, "lora_path": whole})
    assert answer["code"] == 2
    assert "--lora_path starts a new run" in answer["said"]


def test_tied_embeddings_of_another_tool(tied_model):
    """The tensor under one of its names is enough; two tensors that differ cannot be tied."""
    model = prepared(tied_model, "embeddings").model
    tensors = {
        name: tensor + 1 for name, tensor in trainable.file_tensors(model).items() if "embed_tokens" in name
    }
    trainable.assign(model, tensors, "an adapter", start=True)
    assert torch.equal(model.get_input_embeddings().weight, next(iter(tensors.values())))
    both = {name: tensor + len(name) for name, tensor in trainable.file_tensors(model).items()}
    with pytest.raises(UserError, match="differ"):
        trainable.assign(model, both, "an adapter")


def stages(copy: Path, model_path: str, folder: Path, *options: str) -> dict[str, float]:
    """Run sample/stages.sh; return for each stage its validation loss afterwards over the one before."""
    environment = {**os.environ, "MODEL_PATH": model_path, "OUTPUT_PATH": str(folder)}
    command = ["bash", "sample/stages.sh", "--batch_size=4", "--test_size=6", "--warmup_steps=0", *options]
    ended = subprocess.run(command, cwd=copy, env=environment, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert ended.stdout.count("Warm start: the weights of") == 2
    falls = {}
    for name in ("embed", "pretrain", "sft"):
        figures = json.loads((folder / name / "finished.json").read_text())
        falls[name] = figures["eval_loss_after"] / figures["eval_loss_before"]
    return falls


def test_the_stages_one_after_the_other(copy, tiny_model, tmp_path):
    """The stages train new embeddings, raw text and answers in turn; an untied head from the second on."""
    options = ("--bits=16", "--dtype=fp32", "--device=cpu", "--learning_rate=1e-2", "--max_steps=12")
    falls = stages(copy, str(tiny_model), tmp_path / "stages", *options)
    assert all(fall < 0.98 for fall in falls.values()), falls
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "stages" / "base")
    assert base.get_input_embeddings().weight.shape[0] % 128 == 0
    model = PeftModel.from_pretrained(base, tmp_path / "stages" / "sft")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "stages" / "base")
    piece = tokenizer("太阳", add_special_tokens=False).input_ids
    assert len(piece) == 1
    rows = [model.get_input_embeddings().weight[piece], base.get_output_embeddings().weight[piece]]
    assert all(row.any() for row in rows)


@pytest.mark.slow
def test_the_stages_with_the_demo_model(copy, tmp_path):
    falls = stages(copy, "demo", tmp_path / "stages", "--max_steps=10", "--learning_rate=5e-4")
    assert all(fall < 1 for fall in falls.values()), falls
