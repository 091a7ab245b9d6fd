"""Every option of every command, declared once: flag, JSON key, default, unit, help and role.

Role `learned` marks what changes the adapter that comes out; `execution` marks what only changes how the
work is carried out. This file knows nothing of torch, so that `--help` answers at once.
"""

import dataclasses
from typing import Any

from onecard.parsing import (
    EXECUTION,
    LEARNED,
    RUNS_CODE,
    above,
    at_least,
    auto_or_at_least,
    between,
    build,
    commit_option,
    fraction,
    inherited,
    option,
    parse,
    parse_given,
    roles,
    rows_or_fraction,
)

__all__ = ["EXECUTION", "LEARNED", "build", "parse", "parse_given", "roles"]

MOST_PROMPTS, LONGEST_PROMPT = 16, 500  # of --sample_prompts; characters
SCHEMAS = (  # onecard/schemas.py says what each is
    "alpaca",
    "chat",
    "chitchat",
    "content",
    "context_completion",
    "dialogue",
    "openai",
    "prompt_completion",
    "sharegpt",
    "text",
)


def few_prompts(text: str) -> str | None:
    found = text.split("|")
    fits = len(found) <= MOST_PROMPTS and all(len(part) <= LONGEST_PROMPT for part in found)
    return None if fits else f"at most {MOST_PROMPTS} prompts of {LONGEST_PROMPT} characters"


@dataclasses.dataclass(frozen=True)
class FinetuneConfig:
    """Options of finetune.py. Defaults are those users of LLaMA LoRA recipes know."""

    data_path: str = option(
        "sample/instruct.json",
        LEARNED,
        "rows: files (JSON, JSONL, CSV, Parquet) with commas between, folders or a hub dataset; "
        "file:2 takes its rows twice",
    )
    eval_data_path: str | None = option(
        None,
        LEARNED,
        "validation rows, files like --data_path without weights; then --test_size takes none of the others",
    )
    schema: str | None = option(
        None, LEARNED, "shape of a row; none: each row is recognised by its keys", choices=SCHEMAS
    )
    task: str = option(
        "auto",
        LEARNED,
        "sft, or pretrain on raw text in whole blocks of cutoff_len; auto: pretrain for raw text",
        choices=("auto", "sft", "pretrain"),
    )
    model_path: str = option("demo", LEARNED, "base model: a folder, a hub name, or demo")
    output_path: str = option(
        "lora-checkpoints/demo", EXECUTION, "folder of this run: log, checkpoints, adapter"
    )
    bits: int = option(8, LEARNED, "bits of a frozen base weight", choices=(16, 8, 4))
    cutoff_len: int = option(
        256,
        LEARNED,
        "longest row, in tokens; longer conversations lose their oldest turns, longer answers are cut",
        check=at_least(8),
    )
    batch_size: int = option(128, LEARNED, "rows per optimizer step, over all processes", check=at_least(1))
    micro_batch_tokens: int | str = option(
        "auto", EXECUTION, "tokens per forward pass; does not change the gradient", check=auto_or_at_least(1)
    )
    num_epochs: float = option(3.0, LEARNED, "passes over the rows", check=above(0))
    max_steps: int | None = option(None, LEARNED, "optimizer steps; overrides num_epochs", check=at_least(1))
    learning_rate: float = option(3e-4, LEARNED, "peak rate of the optimizer", check=between(0, 100))
    warmup_steps: int = option(
        100, LEARNED, "steps until the peak rate, at most a fifth of the run", check=at_least(0)
    )
    warmup_ratio: float | None = option(
        None, LEARNED, "warm-up as a fraction of all steps; overrides warmup_steps", check=fraction
    )
    lr_scheduler: str = option(
        "linear", LEARNED, "rate after the warm-up", choices=("linear", "cosine", "constant")
    )
    weight_decay: float = option(0.0, LEARNED, "AdamW weight decay", check=at_least(0))
    max_grad_norm: float = option(
        1.0, LEARNED, "clip the gradient to this norm; 0 = never", check=at_least(0)
    )
    train_what: str = option(
        "lora",
        LEARNED,
        "lora; full (all weights, needs --bits 16); embeddings (the input embedding alone); "
        "lora+embeddings (and the head)",
        choices=("lora", "full", "embeddings", "lora+embeddings"),
    )
    lora_path: str | None = option(
        None, LEARNED, "adapter to start from, its weights alone: a folder, a run or a hub name"
    )
    lora_r: int = option(8, LEARNED, "rank of the adapter", check=at_least(1))
    lora_alpha: float = option(16.0, LEARNED, "scale of the adapter: alpha / rank", check=above(0))
    lora_dropout: float = option(0.05, LEARNED, "dropout before the adapter", check=fraction)
    lora_target_modules: str = option(
        "q_proj,v_proj", LEARNED, "module names with commas between, or all-linear"
    )
    rslora: bool = option(False, LEARNED, "scale the adapter by alpha / sqrt(rank) instead (rsLoRA)")
    peft_config: str | None = option(
        None, LEARNED, "JSON file of further settings of peft's LoraConfig, such as use_dora"
    )
    template: str = option(
        "alpaca",
        LEARNED,
        "prompt template: a name in onecard/templates, a .json file, or auto for the tokenizer's own; "
        "of several with commas between each row has one",
    )
    train_on: str = option(
        "all", LEARNED, "answers of a conversation that are learned", choices=("all", "last")
    )
    train_on_inputs: bool = option(False, LEARNED, "loss on the prompt too, not only on the response")
    long_rows: str = option(
        "cut",
        LEARNED,
        "conversations longer than cutoff_len: cut them (an answer cut short has no end token), "
        "drop them (into rejected_rows.jsonl), or stop",
        choices=("cut", "drop", "stop"),
    )
    overlap: int = option(
        0,
        LEARNED,
        "tokens that a document repeats, untrained, at the start of its next block",
        check=at_least(0),
    )
    test_size: float = option(
        0.05,
        LEARNED,
        "validation rows: a fraction (at most 200 rows then) or a number of rows; 0 = none",
        check=rows_or_fraction,
    )
    eval_steps: int = option(200, LEARNED, "steps between two evaluations", check=at_least(1))
    save_steps: int = option(200, EXECUTION, "steps between two checkpoints", check=at_least(1))
    save_total_limit: int | None = option(
        None, EXECUTION, "checkpoints kept (the best and the newest always are)", check=at_least(1)
    )
    seed: int = option(
        42, LEARNED, "seed of row order, split, adapter start and dropout", check=between(0, 2**63 - 1)
    )
    device: str = option("auto", EXECUTION, "auto, cpu, cuda or cuda:N")
    dtype: str = option(
        "auto",
        LEARNED,
        "floating point type of the base's arithmetic",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    gradient_checkpointing: str = option(
        "auto", EXECUTION, "recompute instead of keeping activations", choices=("auto", "on", "off")
    )
    optimizer: str = option(
        "adamw", LEARNED, "optimizer of the adapter", choices=("adamw", "adamw_8bit", "paged_adamw_8bit")
    )
    sample_steps: int = option(
        0,
        EXECUTION,
        "steps between two rounds of answers to fixed prompts, written to samples.jsonl; 0 = none",
        check=at_least(0),
    )
    sample_prompts: str | None = option(
        None,
        EXECUTION,
        "prompts of your own for these rounds, with | between, behind the held-out ones",
        check=few_prompts,
    )
    log_steps: int = option(
        1, EXECUTION, "steps between two lines on a screen without a progress bar", check=at_least(1)
    )
    wandb: bool = option(
        False, EXECUTION, "also log to Weights & Biases (WANDB_MODE=offline stays on this machine)"
    )
    overwrite: bool = option(False, EXECUTION, "delete what --output_path holds and start anew")
    skip_bad_rows: bool = option(
        False, LEARNED, "leave out unreadable rows, writing them to rejected_rows.jsonl in the output folder"
    )
    remote_code: str | None = commit_option(RUNS_CODE)


@dataclasses.dataclass(frozen=True)
class ContinueConfig(FinetuneConfig):
    """Options of finetune_continue.py: those of finetune.py, which stay as the run has them unless given."""

    resume_from_checkpoint: str | None = option(
        None, EXECUTION, "checkpoint or adapter folder to go on from; none: the newest whole one of the run"
    )
    lora_remote_checkpoint: str | None = option(
        None, EXECUTION, "the same, fetched from the hub: name/of-adapter"
    )
    from_data_beginning: bool = option(
        False, LEARNED, "start the rows anew; adapter, optimizer and rate go on"
    )
    verify: bool = option(
        False, EXECUTION, "read rows and base model again in full, not only their size and times"
    )


def same(name: str, default: Any = dataclasses.MISSING) -> Any:
    """An option of another command that is the same as finetune.py's; its default may differ."""
    return inherited(FinetuneConfig, name, default)


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Options of tools/check_data.py."""

    data_path: str = same("data_path")
    schema: str | None = same("schema")
    model_path: str = same("model_path")
    template: str = option("alpaca", EXECUTION, "prompt template: a name, a .json file, or auto")
    cutoff_len: int = same("cutoff_len")
    train_on: str = same("train_on")
    train_on_inputs: bool = same("train_on_inputs")
    png: str | None = option(None, EXECUTION, "also draw the histogram of lengths into this PNG file")
    html: str | None = option(
        None, EXECUTION, "also write a page for a browser, 20 rows with their targets marked"
    )
    clean: str | None = option(
        None,
        EXECUTION,
        "write rows worth keeping to this JSONL file, the others beside it, with the reason",
    )
    repair: bool = option(False, EXECUTION, "with --clean: mend mojibake (ftfy)")


@dataclasses.dataclass(frozen=True)
class ParquetConfig:
    """Options of tools/json_to_parquet.py."""

    data_path: str = option("sample/instruct.json", EXECUTION, "files with commas between, or a folder")
    output_path: str = option("rows.parquet", EXECUTION, "the Parquet file to write")


@dataclasses.dataclass(frozen=True)
class VocabConfig:
    """Options of tools/extend_vocab.py."""

    model_path: str = same("model_path")
    pieces: str | None = option(
        None, EXECUTION, "pieces to add: a text file with one a line, or a SentencePiece model"
    )
    characters: str | None = option(
        None, EXECUTION, "running text (UTF-8) whose characters beyond ASCII are added"
    )
    min_count: int = option(5, EXECUTION, "times that --characters must hold a character", check=at_least(1))
    sample_text: str | None = option(None, EXECUTION, "text (UTF-8) on which the saving is measured")
    output_path: str = option("extended-tokenizer", EXECUTION, "folder for the tokenizer")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Options of tools/prepare_base_model.py."""

    model_path: str = same("model_path")
    tokenizer_path: str | None = option(None, EXECUTION, "tokenizer to take instead, from extend_vocab.py")
    add_tokens: str = option(
        "<pad>,<|im_start|>,<|im_end|>", EXECUTION, "special tokens to add, commas between; empty = none"
    )
    multiple: int = option(
        128, EXECUTION, "rows of the embedding become a multiple of this", check=at_least(1)
    )
    output_path: str = option("prepared-model", EXECUTION, "folder for the model")
