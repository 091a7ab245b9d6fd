"""The options of a training, new or continued.

Those of rows and base model are declared in training_rows.py, those of steps and adapter in
training_adapter.py, and all others here. This file knows nothing of torch, so that `--help` answers at once.
"""

import dataclasses
import typing
from typing import Any

from onecard.config.checks import at_least, between, rows_or_fraction
from onecard.config.declaration import (
    EXECUTION,
    NO_UNIT,
    ROWS,
    STEPS,
    Details,
    OnResume,
    Place,
    commit_option,
    execution,
    inherited,
    learned,
    option,
)
from onecard.config.training_adapter import AdapterOptions, StepOptions
from onecard.config.training_rows import EncodingOptions, SourceOptions

FORMATS = (".json", ".jsonl", ".csv", ".tsv", ".parquet", ".pkl")  # of files of rows
MOST_PROMPTS, LONGEST_PROMPT = 16, 500  # of --sample_prompts; characters


def few_prompts(text: str) -> str | None:
    prompts = text.split("|")
    fits = len(prompts) <= MOST_PROMPTS and all(len(prompt) <= LONGEST_PROMPT for prompt in prompts)
    problem = f"must be at most {MOST_PROMPTS} prompts of {LONGEST_PROMPT} characters each, separated by |"
    return None if fits else problem


@dataclasses.dataclass(frozen=True)
class FinetuneConfig(EncodingOptions, AdapterOptions, StepOptions, SourceOptions):
    """Options of finetune.py: those of the last class first, as `--help` shows them, then these.

    The defaults are those that users of LLaMA LoRA recipes know.
    """

    @classmethod
    def run_settings(cls) -> type["FinetuneConfig"]:
        """The class of the options that a run records in its folder."""
        return cls

    test_size: float = learned(
        0.05,
        ("Validation share", "验证比例"),
        (
            "validation rows taken from the training rows: a fraction (at most 200 rows) or a number of "
            "rows; 0 = none",
            "从训练数据中划分的验证行：小于 1 为比例（至多 200 行），否则为行数；0 表示没有",
        ),
        unit=ROWS,
        check=rows_or_fraction,
        changes_rows=False,
        fixed_for_other_rows=False,
    )
    eval_steps: int = learned(
        200,
        ("Steps between validations", "验证间隔步数"),
        ("steps from one validation to the next", "每隔多少步验证一次"),
        unit=STEPS,
        check=at_least(1),
        changes_rows=False,
        fixed_for_other_rows=False,
    )
    save_steps: int = execution(
        200,
        ("Steps between checkpoints", "保存间隔步数"),
        ("steps from one checkpoint to the next", "每隔多少步保存一个检查点"),
        unit=STEPS,
        check=at_least(1),
    )
    save_total_limit: int | None = execution(
        None,
        ("Checkpoints to keep", "保留的检查点数"),
        (
            "how many checkpoints are kept; the best and the newest always are",
            "至多保留几个检查点；最好的和最新的总会保留",
        ),
        unit=("checkpoints", "检查点"),
        check=at_least(1),
    )
    seed: int = learned(
        42,
        ("Seed", "随机种子"),
        (
            "seed of the row order, the validation split, the first adapter weights and dropout",
            "决定行的顺序、验证行的划分、适配器初值和 dropout",
        ),
        unit=NO_UNIT,
        check=between(0, 2**63 - 1),
        changes_rows=False,  # it is part of the cache key where several templates make it matter
        fixed_for_other_rows=False,
    )
    device: str = execution(
        "auto",
        ("Device", "设备"),
        ("device to train on: auto, cpu, cuda or cuda:N", "训练用的设备：auto、cpu、cuda 或 cuda:N"),
        decides_memory=True,
    )
    dtype: str = learned(
        "auto",
        ("Compute dtype", "计算数据类型"),
        (
            "compute dtype of the base model; auto: chosen for the device",
            "基座模型计算所用的浮点类型；auto 按设备选择",
        ),
        choices=("auto", "fp32", "fp16", "bf16"),
        changes_rows=False,
        fixed_for_other_rows=False,
        decides_memory=True,
    )
    gradient_checkpointing: str = execution(
        "auto",
        ("Gradient checkpointing", "梯度检查点"),
        (
            "compute activations again in the backward pass instead of keeping them: slower, less memory",
            "不保留激活值，反向传播时重新计算：更慢，但更省内存",
        ),
        choices=("auto", "on", "off"),
        decides_memory=True,
    )
    optimizer: str = learned(
        "adamw",
        ("Optimizer", "优化器"),
        ("optimizer of the trained weights", "训练权重所用的优化器"),
        choices=("adamw", "adamw_8bit", "paged_adamw_8bit"),
        changes_rows=False,
        fixed_for_other_rows=True,
        decides_memory=True,
    )
    sample_steps: int = execution(
        0,
        ("Steps between samples", "示例回答间隔步数"),
        (
            "steps from one round of answers to fixed prompts to the next; they are written to "
            "samples.jsonl; 0 = none",
            "每隔多少步回答一次固定问题，写入 samples.jsonl；0 表示不回答",
        ),
        unit=STEPS,
        check=at_least(0),
        place=Place.COMMON,
        window_value=50,  # a window has a place to show the answers
    )
    sample_prompts: str | None = execution(
        None,
        ("Your own prompts", "自己的问题"),
        (
            "your own prompts for these rounds, separated by |; they follow the validation prompts",
            "除验证行的问题外还要回答的自己的问题，用 | 分隔",
        ),
        check=few_prompts,
    )
    log_steps: int = execution(
        1,
        ("Steps between lines", "输出间隔步数"),
        (
            "steps from one line of output to the next where there is no progress bar",
            "没有进度条时，每隔多少步输出一行",
        ),
        unit=STEPS,
        check=at_least(1),
        place=Place.NOWHERE,  # a window has no lines
    )
    wandb: bool = execution(
        False,
        ("Weights & Biases", "Weights & Biases"),
        (
            "also log to Weights & Biases; with WANDB_MODE=offline nothing leaves this machine",
            "同时记录到 Weights & Biases；设置 WANDB_MODE=offline 则只留在本机",
        ),
    )
    overwrite: bool = execution(
        False,
        ("Overwrite", "覆盖"),
        ("delete the run in --output_path and start anew", "删除同名训练的内容，重新开始"),
        on_resume=OnResume.BEGINS,
    )
    skip_bad_rows: bool = learned(
        False,
        ("Skip bad rows", "跳过坏行"),
        (
            "leave out rows that cannot be read and write them to rejected_rows.jsonl in the run folder",
            "跳过无法读取的行，并写入训练文件夹中的 rejected_rows.jsonl",
        ),
        changes_rows=True,
        fixed_for_other_rows=False,
    )
    remote_code: str | None = commit_option(
        ("Code of the base model", "模型自带代码"),
        (
            "run the Python code that comes with the base model, with your rights, at this full commit; "
            "none: such a model is refused",
            "以您的权限运行基座模型自带的 Python 代码，须给出完整的提交号；不填则拒绝这样的模型",
        ),
        on_resume=OnResume.CONTENT,
        place=Place.NOWHERE,  # no visitor of a page may ask for it
    )


@dataclasses.dataclass(frozen=True)
class ContinueConfig(FinetuneConfig):
    """Options of finetune_continue.py: those of finetune.py, which stay as the run has them, and these."""

    @classmethod
    def run_settings(cls) -> type[FinetuneConfig]:
        return FinetuneConfig  # the options below are for one command, not for the run

    resume_from_checkpoint: str | None = option(
        None,
        EXECUTION,
        "checkpoint or adapter folder to go on from; none: the newest undamaged checkpoint of the run",
    )
    lora_remote_checkpoint: str | None = option(
        None, EXECUTION, "adapter on the hub (owner/adapter) to go on from; it is downloaded"
    )
    from_data_beginning: bool = learned(
        False,
        ("Begin with the first row", "从第一行重新开始"),
        (
            "begin with the first row again; adapter, optimizer and learning rate go on",
            "从第一行数据重新开始；适配器、优化器和学习率继续",
        ),
        changes_rows=False,
        fixed_for_other_rows=False,
        place=Place.NOWHERE,
    )
    verify: bool = option(
        False, EXECUTION, "read rows and base model again in full, instead of comparing sizes and times"
    )


def same(name: str, default: Any = dataclasses.MISSING, **details: typing.Unpack[Details]) -> Any:
    """An option of another command that is the same as finetune.py's; default and details may differ."""
    return inherited(FinetuneConfig, name, default, **details)
