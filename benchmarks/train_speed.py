#!/usr/bin/env python3
"""Speed and memory of OneCard's training on this CPU against plain transformers Trainer + peft.

    .venv/bin/python benchmarks/train_speed.py [--rows 128] [--batch_size 16] [--output FILE.md]

Both sides train the same rows in the same order, one epoch, with the same model, bits, arithmetic, prompt,
adapter shape and start, rate and seed; the plain side pads micro-batches of 4 rows and accumulates gradients,
the way most LoRA scripts do. OneCard is measured with its own micro-batch size and once more with at most
1024 tokens at a time, and no more than the plain side's largest padded micro-batch. Each side is a process of
its own, started the same way, so its peak is that of the whole process, imports and model loading included;
its time is that of the training steps alone. A further process prepares the rows and measures how fast this
machine multiplies matrices. The program that starts them imports only the standard library, because a process
on Linux begins with its parent's peak. The result is a Markdown table; a timing is not an assertion, so the
exit code is 0 whenever all sides ran. On a busy machine the figures mean nothing.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from itertools import islice
from pathlib import Path
from typing import Any

import speed_report  # beside this file; it imports the standard library only

ROOT = Path(__file__).resolve().parent.parent
MICRO_BATCH = 4  # rows that the plain side pads to one length
RATE, SEED = 3e-4, 42
RANK, ALPHA, DROPOUT, MODULES = 8, 16, 0.05, ("q_proj", "v_proj")
SMALL = 1024  # tokens of the small micro-batch, at most: half of the automatic one
PREPARED, ROWS, ENCODED = "prepared.json", "rows.jsonl", "encoded.json"


def main() -> None:
    args = parse()
    if args.side:
        from onecard.errors import run_program

        run_program(lambda: one_side(args))  # ends the process
    load = os.getloadavg()[0]
    with tempfile.TemporaryDirectory(prefix="onecard-speed-") as name:
        folder = Path(name)
        prepared = run_side("prepare", args, folder, "rows, model, and how fast this machine multiplies")
        if prepared["rows"] < args.rows:
            print(f"  {args.data_path} gives only {prepared['rows']} usable rows", flush=True)
        same = min(MICRO_BATCH * prepared["longest"], SMALL)
        auto = run_side("onecard", args, folder, "OneCard, micro-batch auto")
        small = run_side("onecard", args, folder, f"OneCard, micro-batch {same} tokens", same)
        plain = run_side("plain", args, folder, f"plain Trainer + peft, {MICRO_BATCH} rows padded")
    names = [
        "OneCard, micro-batch auto",
        f"OneCard, micro-batch {same} tokens",
        f"plain Trainer + peft, {MICRO_BATCH} rows padded",
    ]
    text = speed_report.report(args, prepared, dict(zip(names, (auto, small, plain), strict=True)), load)
    print(f"\n{text}", end="", flush=True)
    if args.output:
        Path(args.output).write_text(text, encoding="utf-8")
        print(f"\nWritten to {args.output}")


def one_side(args: argparse.Namespace) -> None:
    """What this program does when it was started by itself: one measurement, its result in a file."""
    sides = {"prepare": prepare_side, "onecard": onecard_side, "plain": plain_side}
    folder = Path(args.folder)
    (folder / args.result).write_text(json.dumps(sides[args.side](args, folder)), encoding="utf-8")


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("--data_path", default=str(ROOT / "sample" / "instruct.json"), help="rows")
    parser.add_argument("--model_path", default="demo", help="base model: a folder, a hub name, or demo")
    parser.add_argument("--bits", type=int, default=8, choices=(16, 8, 4), help="bits of a base weight")
    parser.add_argument("--cutoff_len", type=int, default=512, help="longest row, in tokens")
    parser.add_argument("--rows", type=int, default=128, help="rows to train on: the first of the file")
    parser.add_argument(
        "--batch_size", type=int, default=16, help=f"rows per step, a multiple of {MICRO_BATCH}"
    )
    parser.add_argument("--output", metavar="FILE.md", help="also write the report here")
    for hidden in ("--side", "--folder", "--result", "--micro_batch_tokens"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.batch_size < 1 or args.batch_size % MICRO_BATCH:
        parser.error(f"--batch_size {args.batch_size}: must be a multiple of {MICRO_BATCH}")
    if args.rows < 1:
        parser.error(f"--rows {args.rows}: must be 1 or more")
    if args.output and not Path(args.output).absolute().parent.is_dir():
        parser.error(f"--output {args.output}: no such folder")
    return args


def run_side(side: str, args: argparse.Namespace, folder: Path, title: str, tokens: int = 0) -> dict:
    """Run this program again as one side; returns its result, or ends the program with its last words."""
    print(f"{title} ...", flush=True)
    started = time.monotonic()
    result = PREPARED if side == "prepare" else f"{side}-{tokens}.json"
    command = [sys.executable, __file__, "--side", side, "--folder", str(folder), "--result", result]
    command += ["--micro_batch_tokens", str(tokens or "auto")]
    for name in ("data_path", "model_path", "bits", "cutoff_len", "rows", "batch_size"):
        command += [f"--{name}", str(getattr(args, name))]
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, "PYTHONUNBUFFERED": "1", "PYTHONUTF8": "1"}
    if side == "plain":
        environment["THP_MEM_ALLOC_ENABLE"] = "0"  # what importing onecard would switch on
    said = []
    with subprocess.Popen(
        command,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        encoding="utf-8",
        errors="replace",
    ) as process:
        for line in process.stdout:
            said.append(line)
            if line.startswith(("step ", "Fetching ", "matmul ")):
                print(f"  {line.rstrip()}", flush=True)
    if process.returncode:
        code = process.returncode
        print("".join(said[-40:]), end="", file=sys.stderr)
        print(f"error: this side ended with exit code {code}; its last words are above.", file=sys.stderr)
        sys.exit(code if code > 0 else 1)
    print(f"  done in {time.monotonic() - started:.0f} s, loading included", flush=True)
    return json.loads((folder / result).read_text(encoding="utf-8"))


def onecard_options(args: argparse.Namespace, folder: Path) -> Any:
    from onecard.config import options as config_options
    from onecard.config import training as training_config

    values = {
        "data_path": str(folder / ROWS),
        "model_path": args.model_path,
        "output_path": str(folder / f"run-{args.micro_batch_tokens}"),
        "bits": args.bits,
        "cutoff_len": args.cutoff_len,
        "batch_size": args.batch_size,
        "micro_batch_tokens": args.micro_batch_tokens,
        "num_epochs": 1,
        "learning_rate": RATE,
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
    return config_options.build(training_config.FinetuneConfig, values)


def prepare_side(args: argparse.Namespace, folder: Path) -> dict[str, Any]:
    """Write the rows as text for OneCard and encoded, in OneCard's order, for the plain side; measure."""
    import importlib.metadata

    import matmul_speed  # beside this file
    import torch

    from onecard.data import dataset
    from onecard.data import examples as data_examples
    from onecard.data import reader as data_reader
    from onecard.data import template as templates
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
    form = templates.load(options.template, tokenizer)
    tokenizer = templates.tokenizer_for(tokenizer, form)
    tokenizer_print = hashing.of_folder(base_model.identity_files(base_path)["tokenizer"])
    found = dataset.encode(
        options, data_reader.locate_files(options.data_path), [form], tokenizer, tokenizer_print
    )
    examples = found.encoding.examples
    order = [
        int(place)
        for start in range(0, len(examples), args.batch_size)
        for place in data_examples.rows_at(SEED, start, args.batch_size, len(examples))
    ]
    encoded = []
    for place in order:
        ids, is_target = examples[place]
        labels = [token if wanted else -100 for token, wanted in zip(ids.tolist(), is_target, strict=True)]
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
    """transformers and peft as their own documentation uses them; nothing of OneCard but the peak's meter."""
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
    torch.manual_seed(SEED)  # the adapter starts where OneCard's does
    model = get_peft_model(base, adapter)
    arguments = TrainingArguments(
        output_dir=str(folder / "plain"),
        num_train_epochs=1,
        per_device_train_batch_size=MICRO_BATCH,
        gradient_accumulation_steps=args.batch_size // MICRO_BATCH,
        learning_rate=RATE,
        lr_scheduler_type="linear",
        warmup_steps=0,
        weight_decay=0.0,
        max_grad_norm=1.0,
        bf16=bf16,
        use_cpu=True,
        seed=SEED,
        train_sampling_strategy="sequential",  # the rows are in order already
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


if __name__ == "__main__":
    main()
