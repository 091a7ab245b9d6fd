"""The two sides of train_speed.py, OneCard and plain transformers + peft, and the preparation for both.

Each function is the work of one process and returns its result as JSON values. Only the standard library is
imported at the top, because train_speed.py reads the constants in a process that has to stay small.
"""

import argparse
import json
import time
from itertools import islice
from pathlib import Path
from typing import Any

MICRO_BATCH = 4  # rows that the plain side pads to one length
LEARNING_RATE, SEED = 3e-4, 42
RANK, ALPHA, DROPOUT, MODULES = 8, 16, 0.05, ("q_proj", "v_proj")
PREPARED, ROWS, ENCODED = "prepared.json", "rows.jsonl", "encoded.json"


def onecard_options(args: argparse.Namespace, folder: Path) -> Any:
    """The options of OneCard's training, which both sides follow."""
    from onecard.config import options as config_options
    from onecard.config import training as config_training

    values = {
        "data_path": str(folder / ROWS),
        "model_path": args.model_path,
        "output_path": str(folder / f"run-{args.micro_batch_tokens}"),
        "bits": args.bits,
        "cutoff_len": args.cutoff_len,
        "batch_size": args.batch_size,
        "micro_batch_tokens": args.micro_batch_tokens,
        "num_epochs": 1,
        "learning_rate": LEARNING_RATE,
        "warmup_steps": 0,
        "lr_scheduler": "linear",
        "lora_r": RANK,
        "lora_alpha": ALPHA,
        "lora_dropout": DROPOUT,
        "lora_target_modules": ",".join(MODULES),
        "test_size": 0,
        "save_steps": 10**9,
        "seed": SEED,
        "device": "cpu",
    }
    return config_options.build(config_training.FinetuneConfig, values)


def prepare_side(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Prepare the rows and measure the machine.

    The rows are written as text for OneCard, and encoded and in OneCard's order for the plain side.
    """
    import importlib.metadata

    import matmul_speed  # beside this file
    import torch

    from onecard.data import dataset
    from onecard.data import examples as data_examples
    from onecard.data import reader as data_reader
    from onecard.data import template as data_template
    from onecard.hub import locate
    from onecard.models import base_model
    from onecard.models import tokenizer as models_tokenizer
    from onecard.system import hardware as system_hardware
    from onecard.system import hashing
    from onecard.training import plan

    base_path = locate.locate(args.model_path)
    values = (value for _, _, value, _ in data_reader.values(Path(args.data_path)))
    lines = [json.dumps(value, ensure_ascii=False) for value in islice(values, args.rows)]
    (folder / ROWS).write_text("\n".join(lines) + "\n", encoding="utf-8")

    options = onecard_options(args, folder)
    tokenizer = models_tokenizer.load_tokenizer(base_path)
    form = data_template.load(options.template, tokenizer)
    tokenizer = data_template.tokenizer_for(tokenizer, form)
    tokenizer_print = hashing.of_folder(base_model.identity_files(base_path)["tokenizer"])
    rows = dataset.encode(
        options, data_reader.locate_files(options.data_path), [form], tokenizer, tokenizer_print
    )
    examples = rows.encoding.examples
    order = [
        int(place)
        for start in range(0, len(examples), args.batch_size)
        for place in data_examples.rows_at(SEED, start, args.batch_size, len(examples))
    ]
    encoded = []
    for place in order:
        ids, is_target = examples[place]
        labels = [token if target else -100 for token, target in zip(ids.tolist(), is_target, strict=True)]
        encoded.append({"input_ids": ids.tolist(), "attention_mask": [1] * len(ids), "labels": labels})
    (folder / ENCODED).write_text(json.dumps(encoded), encoding="utf-8")

    config, dtype = base_model.load_config(base_path), system_hardware.choose_dtype(options.dtype, "cpu")
    skeleton = base_model.skeleton(base_path, config)
    head = skeleton.get_output_embeddings().weight
    linear = [layer for layer in skeleton.modules() if isinstance(layer, torch.nn.Linear)]
    lengths = [len(row["input_ids"]) for row in encoded]
    groups = [lengths[start : start + MICRO_BATCH] for start in range(0, len(lengths), MICRO_BATCH)]
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    return {
        "base_path": base_path,
        "rows": len(encoded),
        "tokens": sum(lengths),
        "padded": sum(len(group) * max(group) for group in groups),
        "targets": int(examples.target_counts.sum()),
        "longest": max(lengths),
        "dtype": dtype.value,
        "dtype_reason": dtype.reason,
        "frozen_weights": sum(layer.weight.numel() for layer in linear if layer.weight is not head),
        "head_weights": head.numel(),
        "matmul": matmul_speed.measure(base_model.DTYPES[dtype.value], config.hidden_size, inner),
        "threads": torch.get_num_threads(),
        "versions": {**plan.versions(), "accelerate": importlib.metadata.version("accelerate")},
        "machine": system_hardware.describe_machine(),
    }


def onecard_side(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train with OneCard, without samples and plots."""
    from onecard.system import hardware as system_hardware
    from onecard.training import loop

    options = onecard_options(args, folder)
    loop.run(options, sample=lambda *_: [], draw=lambda *_: None)
    output = Path(options.output_path)
    finished = json.loads((output / "finished.json").read_text(encoding="utf-8"))
    lines = (output / "log.jsonl").read_text(encoding="utf-8").splitlines()
    steps = [record for record in map(json.loads, lines) if "loss" in record]
    return {
        "seconds": finished["training_seconds"],
        "tokens": finished["tokens"],
        "losses": [record["loss"] for record in steps],
        "first_norm": steps[0]["grad_norm"],
        "peak": system_hardware.peak_memory_bytes("cpu"),
    }


def plain_side(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Train with transformers and peft as they document it. OneCard only reads the peak memory."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import (
        AutoModelForCausalLM,
        AutoTokenizer,
        BitsAndBytesConfig,
        DataCollatorForSeq2Seq,
        Trainer,
        TrainerCallback,
        TrainingArguments,
    )

    from onecard.system.hardware import peak_memory_bytes

    prepared = json.loads((folder / PREPARED).read_text(encoding="utf-8"))
    rows = json.loads((folder / ENCODED).read_text(encoding="utf-8"))
    bf16 = prepared["dtype"] == "bf16"
    dtype = torch.bfloat16 if bf16 else torch.float32
    quantised = {
        16: None,
        8: BitsAndBytesConfig(load_in_8bit=True),
        4: BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=dtype,
        ),
    }
    base = AutoModelForCausalLM.from_pretrained(
        prepared["base_path"],
        trust_remote_code=False,
        dtype=dtype,
        quantization_config=quantised[args.bits],
        device_map={"": "cpu"},
        attn_implementation="sdpa",
    )
    tokenizer = AutoTokenizer.from_pretrained(prepared["base_path"], trust_remote_code=False)
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    adapter = LoraConfig(
        r=RANK,
        lora_alpha=ALPHA,
        lora_dropout=DROPOUT,
        target_modules=list(MODULES),
        task_type="CAUSAL_LM",
    )
    torch.manual_seed(SEED)  # the adapter starts with the same weights as OneCard's
    model = get_peft_model(base, adapter)
    arguments = TrainingArguments(
        output_dir=str(folder / "plain"),
        num_train_epochs=1,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=args.batch_size // MICRO_BATCH,
        learning_rate=LEARNING_RATE,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=True,
        seed=SEED,
        train_sampling_strategy="sequential",  # the rows are already in OneCard's order
        dataloader_pin_memory=False,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )

    class Meter(TrainerCallback):
        started = seconds = 0.0
        loaded = 0

        def on_train_begin(self, args, state, control, **kwargs):
            self.loaded, self.started = peak_memory_bytes("cpu"), time.monotonic()

        def on_log(self, args, state, control, logs=None, **kwargs):
            if "loss" in logs:
                seconds = time.monotonic() - self.started
                place = f"step {state.global_step}/{state.max_steps}"
                print(f"{place}  loss {logs['loss']:.3f}  {seconds:.0f} s", flush=True)

        def on_train_end(self, args, state, control, **kwargs):
            self.seconds = time.monotonic() - self.started

    meter = Meter()
    trainer = Trainer(
        model=model,
        args=arguments,
        train_dataset=rows,
        data_collator=DataCollatorForSeq2Seq(tokenizer),
        callbacks=[meter],
    )
    trainer.train()
    steps = [record for record in trainer.state.log_history if "loss" in record]
    return {
        "seconds": meter.seconds,
        "tokens": sum(len(row["input_ids"]) for row in rows),
        "losses": [record["loss"] for record in steps],
        "first_norm": steps[0]["grad_norm"],
        "peak": peak_memory_bytes("cpu"),
        "loaded": meter.loaded,
    }
