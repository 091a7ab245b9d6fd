#!/usr/bin/env python3
"""What the model tools cost: GB/s beside a plain copy of the same bytes, and peak memory.

    .venv/bin/python benchmarks/tools.py weights [FOLDER]

weights: a model with the layers of LLaMA 7B, but fewer of them (as FOLDER's disk allows), in many shards, is
copied, converted both ways and merged with an adapter on all linear layers. Each copies or writes the same
bytes to the same disk, synced, after the source has been read once. Peak memory is VmHWM of the largest
process; the share of a whole 7B is that peak over 13.5 GB: the peak does not grow with the layers, as the run
with a third of them shows.
"""

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch

from onecard import hardware, llama, plan, pth, shards
from onecard.shards import Files, Tensor

ROOT = Path(__file__).resolve().parent.parent
LAYERS, VOCAB, WHOLE = 18, 32000, 13_476_831_232  # bytes of a whole 7B in 16 bits
FILE = 500 << 20  # bytes of a file in transformers' layout
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
REPEATS = 3
# runs a program and writes the peak memory of its largest process (KiB) into a file; its own start counts, so
# it imports nothing large
WITH_PEAK = """import resource, subprocess, sys
ended = subprocess.run(sys.argv[2:])
open(sys.argv[1], "w").write(str(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss))
sys.exit(ended.returncode)"""


def main() -> None:
    sections = {"weights": weights}
    if len(sys.argv) < 2 or sys.argv[1] not in sections:
        sys.exit(f"usage: benchmarks/tools.py {'|'.join(sections)} [FOLDER]")
    versions = ", ".join(f"{name} {version}" for name, version in plan.versions().items())
    print(f"{date.today().isoformat()}; {hardware.describe_machine()}; {versions}.\n")
    sections[sys.argv[1]](*sys.argv[2:])


def weights(folder: str = ".") -> None:
    """Conversion and merge beside a plain copy."""
    print("| work | layers | size | plain copy | tool | ratio | peak memory | of a whole 7B |")
    print("|---|---:|---:|---:|---:|---:|---:|---:|")
    taken = []
    for layers in (LAYERS // 3, LAYERS):
        with tempfile.TemporaryDirectory(prefix="onecard-tools-", dir=folder) as place:
            taken.append(measure(Path(place), layers))
    print("\nWithout start-up, by the difference of the two sizes:\n")
    print("| work | plain copy | tool | ratio |")
    print("|---|---:|---:|---:|")
    for name, (size, plain, tool) in taken[0].items():
        larger = taken[1][name]
        more = (larger[0] - size) / 1e9
        speeds = more / (larger[1] - plain), more / (larger[2] - tool)
        print(f"| {name} | {speeds[0]:.2f} GB/s | {speeds[1]:.2f} GB/s | {speeds[1] / speeds[0]:.2f} |")


def measure(place: Path, layers: int) -> dict[str, tuple[int, float, float]]:
    """(bytes, seconds of a plain copy, of the tool) for each kind of work; the best of some tries."""
    taken = {}
    meta, hf, adapter = place / "meta", place / "hf", place / "adapter"
    shape = llama.Shape(4096, layers, 32, 32, 11008, VOCAB, 1e-5, length=4096)
    make_meta(meta, shape)
    make_hf(hf, shape)
    make_adapter(adapter, shape)
    convert = [ROOT / "tools/convert_llama.py", "--input_dir"]
    merge = [ROOT / "tools/merge_lora.py", "--model_path", hf, "--lora_path", adapter, "--output_path"]
    rows = {
        "original -> transformers": (meta, [*convert, meta, "--output_dir"], []),
        "transformers -> original, 2 shards": (
            hf,
            [*convert, hf, "--output_dir"],
            ["--to", "meta", "--num_shards", "2"],
        ),
        "merge, r 16 on all linear layers": (hf, merge, []),
    }
    for name, (source, before, after) in rows.items():
        size = sum(path.stat().st_size for path in source.iterdir())
        plain, tool, peaks = [], [], []
        for _ in range(REPEATS):  # in turns, so that both meet the same disk
            plain.append(copied(source, place / "out"))
            seconds, peak = ran([*before, place / "out", *after], place)
            tool.append(seconds)
            peaks.append(peak)
        taken[name] = size, min(plain), min(tool)
        speeds = size / min(plain) / 1e9, size / min(tool) / 1e9
        print(
            f"| {name} | {layers} | {size / 1e9:.2f} GB | {speeds[0]:.2f} GB/s | {speeds[1]:.2f} GB/s "
            f"| {speeds[1] / speeds[0]:.2f} | {max(peaks) / 2**20:.0f} MiB | {max(peaks) / WHOLE:.3f} |",
            flush=True,
        )
    return taken


def copied(source: Path, target: Path) -> float:
    """Seconds of a plain copy with sync."""
    started = time.monotonic()
    target.mkdir()
    for path in source.iterdir():
        shutil.copyfile(path, target / path.name)
        with open(target / path.name, "rb") as file:
            os.fsync(file.fileno())
    seconds = time.monotonic() - started
    shutil.rmtree(target)
    return seconds


def ran(command: list, place: Path) -> tuple[float, int]:
    """(seconds, peak bytes of the largest process) of a tool; start-up is counted too."""
    started = time.monotonic()
    asked = [sys.executable, "-c", WITH_PEAK, place / "peak", sys.executable, *command]
    subprocess.run(list(map(str, asked)), check=True, stdout=subprocess.DEVNULL)
    seconds = time.monotonic() - started
    shutil.rmtree(place / "out")
    return seconds, 1024 * int((place / "peak").read_text())


def fill(placed: dict[str, Tensor]) -> None:
    draw = torch.Generator().manual_seed(0)
    with Files() as files:
        for tensor in placed.values():
            for first, last in tensor.blocks():
                rows = torch.empty(last - first, *tensor.shape[1:], dtype=tensor.dtype)
                files.write(tensor, first, rows.uniform_(-0.1, 0.1, generator=draw))
        files.sync()


def make_meta(folder: Path, shape: llama.Shape) -> None:
    folder.mkdir()
    for number in range(2):
        tensors = [Tensor(w.meta, torch.bfloat16, llama.part(w, 2)) for w in llama.weights(shape, 1)]
        fill(pth.create_file(folder / f"consolidated.{number:02d}.pth", tensors))
    (folder / "params.json").write_text(json.dumps(llama.to_params(shape)))
    make_tokenizer(folder)


def make_hf(folder: Path, shape: llama.Shape) -> None:
    folder.mkdir()
    tensors = [Tensor(w.hf, torch.bfloat16, w.shape) for w in llama.weights(shape, 1)]
    files = shards.divide(tensors, FILE)
    fill(shards.create(folder, dict(zip(shards.names_of(len(files)), files, strict=True))))
    ids = {"bos_token_id": 1, "eos_token_id": 2}
    (folder / "config.json").write_text(json.dumps(llama.to_config(shape, "bfloat16", False, ids)))
    make_tokenizer(folder)


def make_adapter(folder: Path, shape: llama.Shape) -> None:
    from peft import LoraConfig

    folder.mkdir()
    LoraConfig(r=16, lora_alpha=16, target_modules=TARGETS, task_type="CAUSAL_LM").save_pretrained(folder)
    pairs = []
    for weight in llama.weights(shape, 1):
        module = weight.hf.removesuffix(".weight")
        if module.rsplit(".", 1)[-1] in TARGETS:
            name, (out, inside) = f"base_model.model.{module}", weight.shape
            pairs.append(Tensor(f"{name}.lora_A.weight", torch.float32, (16, inside)))
            pairs.append(Tensor(f"{name}.lora_B.weight", torch.float32, (out, 16)))
    fill(shards.create_file(folder / "adapter_model.safetensors", pairs))


def make_tokenizer(folder: Path) -> None:
    """A tokenizer with as many tokens as the model has rows, most of them single characters."""
    import sentencepiece

    letters = [chr(n) for n in range(0x4E00, 0x9FA5)] + [chr(n) for n in range(0xAC00, 0xD7A4)]
    letters = letters[:31_000]
    with tempfile.TemporaryDirectory() as place:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter("".join(letters[i : i + 50]) for i in range(0, len(letters), 50)),
            model_prefix=f"{place}/tokenizer",
            model_type="bpe",
            vocab_size=VOCAB,
            character_coverage=1.0,
            byte_fallback=True,
            normalization_rule_name="identity",
            remove_extra_whitespaces=False,
            minloglevel=2,
        )
        shutil.copy(f"{place}/tokenizer.model", folder)


if __name__ == "__main__":
    main()
