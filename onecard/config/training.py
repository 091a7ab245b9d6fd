"""The options of a training, new or continued, with their labels, and lists of options others need.

Role `learned` marks what changes the adapter that comes out; `execution` marks what only changes how the work
is carried out. This file knows nothing of torch, so that `--help` answers at once.
"""

import dataclasses
from typing import Any

from onecard.config.options import (
    EXECUTION,
    LEARNED,
    RUNS_CODE,
    above,
    at_least,
    auto_or_at_least,
    between,
    commit_option,
    fraction,
    inherited,
    option,
    rows_or_fraction,
)

FINETUNE = {  # option: (English, Chinese, what it is in Chinese)
    "data_path": ("Rows", "数据", "JSON、JSONL、CSV、Parquet 文件，逗号分隔；file:2 表示每行用两次"),
    "eval_data_path": ("Validation rows", "验证数据", "单独的验证数据文件；填写后不再从训练数据中划分"),
    "schema": ("Schema", "数据格式", "每行的格式；不选则自动识别"),
    "task": ("Task", "任务", "sft 指令微调；pretrain 用纯文本继续预训练；auto 自动判断"),
    "model_path": ("Base model", "基座模型", "文件夹、hub 名称，或 demo"),
    "bits": ("Bits of the base", "基座位数", "冻结的基座权重用几位保存"),
    "cutoff_len": ("Longest row", "最大长度", "每行最多的词元数；过长的对话先去掉最早的轮次"),
    "batch_size": ("Rows per step", "每步行数", "每个优化步的行数，与显存无关"),
    "micro_batch_tokens": ("Micro-batch tokens", "微批词元数", "每次前向的词元数，不影响梯度；auto 自动"),
    "num_epochs": ("Epochs", "轮数", "数据遍历的次数"),
    "max_steps": ("Steps", "步数", "优化步数；填写后代替轮数"),
    "learning_rate": ("Learning rate", "学习率", "优化器的最高学习率"),
    "warmup_steps": ("Warm-up steps", "预热步数", "达到最高学习率前的步数，至多为总步数的五分之一"),
    "warmup_ratio": ("Warm-up ratio", "预热比例", "预热占总步数的比例；填写后代替预热步数"),
    "lr_scheduler": ("Schedule", "学习率计划", "预热之后学习率的变化"),
    "weight_decay": ("Weight decay", "权重衰减", "AdamW 的权重衰减"),
    "max_grad_norm": ("Gradient clipping", "梯度裁剪", "梯度范数的上限；0 表示不裁剪"),
    "train_what": ("What is trained", "训练哪些权重", "lora；full 全部权重；embeddings 只训练词向量"),
    "lora_path": ("Starting adapter", "起始适配器", "从哪个适配器的权重开始：文件夹、训练或 hub 名称"),
    "lora_r": ("LoRA rank", "LoRA 秩", "适配器的秩"),
    "lora_alpha": ("LoRA alpha", "LoRA alpha", "适配器的缩放：alpha / 秩"),
    "lora_dropout": ("LoRA dropout", "LoRA dropout", "适配器之前的 dropout"),
    "lora_target_modules": ("LoRA modules", "LoRA 模块", "模块名，逗号分隔；或 all-linear"),
    "rslora": ("rsLoRA", "rsLoRA", "改用 alpha / sqrt(秩) 缩放"),
    "peft_config": ("More LoRA settings", "更多 LoRA 设置", "peft 的 LoraConfig 的其他设置（JSON 文件）"),
    "template": ("Template", "提示模板", "模板名称、.json 文件，或 auto 用分词器自带的模板"),
    "train_on": ("Answers learned", "学习哪些回答", "对话中哪些回答参与训练"),
    "train_on_inputs": ("Learn the prompt too", "也学习提问", "损失也包含提问部分"),
    "long_rows": ("Rows too long", "过长的行", "截断（被截断的回答没有结束符）、丢弃，或停止"),
    "overlap": ("Overlap", "重叠", "纯文本相邻块之间重复的词元数（不参与训练）"),
    "test_size": ("Validation share", "验证比例", "验证行：比例（至多 200 行）或行数；0 表示没有"),
    "eval_steps": ("Steps between evaluations", "验证间隔", "每隔多少步验证一次"),
    "save_steps": ("Steps between checkpoints", "保存间隔", "每隔多少步保存一次"),
    "save_total_limit": ("Checkpoints kept", "保留的检查点", "至多保留几个（最好的和最新的总会保留）"),
    "seed": ("Seed", "随机种子", "决定行的顺序、划分、适配器初值和 dropout"),
    "device": ("Device", "设备", "auto、cpu、cuda 或 cuda:N"),
    "dtype": ("Arithmetic", "数值类型", "基座运算的浮点类型"),
    "gradient_checkpointing": ("Recompute", "重新计算", "不保留激活值，反向时重新计算"),
    "optimizer": ("Optimizer", "优化器", "适配器的优化器"),
    "sample_steps": ("Steps between answers", "回答间隔", "每隔多少步回答一次固定问题；0 表示不回答"),
    "sample_prompts": ("Prompts of your own", "自己的问题", "除验证行外还要回答的问题，用 | 分隔"),
    "log_steps": ("Steps between lines", "日志间隔", "每隔多少步在屏幕上输出一行"),
    "wandb": ("Weights & Biases", "Weights & Biases", "同时记录到 W&B（WANDB_MODE=offline 只留在本机）"),
    "overwrite": ("Overwrite", "覆盖", "删除同名训练的内容，重新开始"),
    "skip_bad_rows": ("Skip bad rows", "跳过坏行", "跳过读不出的行，写入 rejected_rows.jsonl"),
}
FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".pkl")
LONGER = ("num_epochs", "max_steps")  # a run may be made longer
MOVABLE = (
    "data_path",
    "eval_data_path",
    "model_path",
    "peft_config",
)  # their content is compared, not their name
# what adapter, optimizer and rate depend on: stays when a run goes on with other rows
TIED = (
    "bits",
    "train_what",
    "lora_path",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "rslora",
    "peft_config",
    "optimizer",
    "learning_rate",
    "lr_scheduler",
    "warmup_steps",
    "warmup_ratio",
)
HOW = ("task", "cutoff_len", "train_on", "train_on_inputs", "long_rows", "overlap", "schema", "skip_bad_rows")
PATHS = ("data_path", "eval_data_path", "model_path", "lora_path", "peft_config", "template")
SHAPES = (  # options that decide how much memory a training takes
    "model_path", "bits", "cutoff_len", "batch_size", "micro_batch_tokens", "train_what", "lora_r",
    "lora_target_modules", "peft_config", "device", "dtype", "gradient_checkpointing", "optimizer",
)  # fmt: skip
ADAPTER_OPTIONS = ("lora_r", "lora_alpha", "lora_dropout", "lora_target_modules", "rslora", "peft_config")


MOST_PROMPTS, LONGEST_PROMPT = 16, 500  # of --sample_prompts; characters
SCHEMAS = (  # onecard/data/schemas.py says what each is
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
        "prompt template: a name in onecard/data/templates, a .json file, or auto for the tokenizer's own; "
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
