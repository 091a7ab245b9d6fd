"""Options of training: how many optimizer steps of what size, and what they train."""

import dataclasses

from onecard.config.checks import above, at_least, auto_or_at_least, between, fraction
from onecard.config.declaration import (
    EPOCHS,
    NO_UNIT,
    ROWS,
    STEPS,
    TOKENS,
    OnResume,
    Place,
    Use,
    execution,
    learned,
)

LORA = Use(("only for training with LoRA", "仅用于 LoRA 训练"))


@dataclasses.dataclass(frozen=True)
class StepOptions:
    """The optimizer steps and their learning rate."""

    batch_size: int = learned(
        128,
        ("Rows per step", "每步行数"),
        ("rows per optimizer step, over all processes", "每个优化步的行数（所有进程合计）"),
        unit=ROWS,
        check=at_least(1),
        changes_rows=False,
        fixed_for_other_rows=False,
        decides_memory=True,
        place=Place.COMMON,
    )
    micro_batch_tokens: int | str = execution(
        "auto",
        ("Micro-batch tokens", "微批词元数"),
        (
            "tokens per forward pass; this does not change the gradient; auto: as many as fit into memory",
            "每次前向计算的词元数，不影响梯度；auto 表示内存放得下多少就用多少",
        ),
        unit=TOKENS,
        check=auto_or_at_least(1),
        decides_memory=True,
        saves_memory=True,
    )
    num_epochs: float = learned(
        3.0,
        ("Epochs", "轮数"),
        ("epochs, that is passes over the training rows", "训练的轮数，即遍历训练数据的次数"),
        unit=EPOCHS,
        check=above(0),
        changes_rows=False,
        fixed_for_other_rows=False,
        on_resume=OnResume.LARGER,
        place=Place.COMMON,
    )
    max_steps: int | None = learned(
        None,
        ("Steps", "步数"),
        ("optimizer steps; overrides --num_epochs", "优化步数；填写后不再按轮数计算"),
        unit=STEPS,
        check=at_least(1),
        changes_rows=False,
        fixed_for_other_rows=False,
        on_resume=OnResume.LARGER,
        place=Place.COMMON,
    )
    learning_rate: float = learned(
        3e-4,
        ("Learning rate", "学习率"),
        ("highest learning rate of the optimizer", "优化器的最高学习率"),
        unit=NO_UNIT,
        check=between(0, 100),
        changes_rows=False,
        fixed_for_other_rows=True,
        place=Place.COMMON,
    )
    warmup_steps: int = learned(
        100,
        ("Warm-up steps", "预热步数"),
        (
            "steps until the highest learning rate is reached, at most a fifth of the run",
            "达到最高学习率之前的步数，至多为总步数的五分之一",
        ),
        unit=STEPS,
        check=at_least(0),
        changes_rows=False,
        fixed_for_other_rows=True,
    )
    warmup_ratio: float | None = learned(
        None,
        ("Warm-up ratio", "预热比例"),
        (
            "warm-up as a fraction of all steps; overrides --warmup_steps",
            "预热占总步数的比例；填写后代替预热步数",
        ),
        unit=NO_UNIT,
        check=fraction,
        changes_rows=False,
        fixed_for_other_rows=True,
    )
    lr_scheduler: str = learned(
        "linear",
        ("Learning rate schedule", "学习率计划"),
        ("how the learning rate changes after the warm-up", "预热之后学习率如何变化"),
        choices=("linear", "cosine", "constant"),
        changes_rows=False,
        fixed_for_other_rows=True,
    )
    weight_decay: float = learned(
        0.0,
        ("Weight decay", "权重衰减"),
        ("weight decay of AdamW", "AdamW 的权重衰减系数"),
        unit=NO_UNIT,
        check=at_least(0),
        changes_rows=False,
        fixed_for_other_rows=False,
    )
    max_grad_norm: float = learned(
        1.0,
        ("Gradient clipping", "梯度裁剪"),
        ("clip the gradient to this norm; 0 = never", "梯度范数的上限；0 表示不裁剪"),
        unit=NO_UNIT,
        check=at_least(0),
        changes_rows=False,
        fixed_for_other_rows=False,
    )


@dataclasses.dataclass(frozen=True)
class AdapterOptions:
    """What is trained."""

    train_what: str = learned(
        "lora",
        ("What is trained", "训练哪些权重"),
        (
            "lora: an adapter; full: all weights, which needs --bits 16; embeddings: only the input "
            "embedding; lora+embeddings: an adapter, the input embedding and the output head",
            "lora 训练适配器；full 训练全部权重（需要 16 位）；embeddings 只训练词向量；"
            "lora+embeddings 训练适配器、词向量和输出层",
        ),
        choices=("lora", "full", "embeddings", "lora+embeddings"),
        changes_rows=False,
        fixed_for_other_rows=True,
        decides_memory=True,
    )
    lora_path: str | None = learned(
        None,
        ("Starting adapter", "起始适配器"),
        (
            "adapter whose weights the training starts from: a folder, a run or a hub name",
            "从哪个适配器的权重开始训练：文件夹、已有的训练或 hub 名称",
        ),
        changes_rows=False,
        fixed_for_other_rows=True,
        on_resume=OnResume.BEGINS,
        is_path=True,
    )
    lora_r: int = learned(
        8,
        ("LoRA rank", "LoRA 秩"),
        ("rank of the adapter", "适配器的秩"),
        unit=NO_UNIT,
        check=at_least(1),
        changes_rows=False,
        fixed_for_other_rows=True,
        only=(LORA,),
        decides_memory=True,
        place=Place.COMMON,
    )
    lora_alpha: float = learned(
        16.0,
        ("LoRA alpha", "LoRA alpha"),
        ("alpha of the adapter, whose output is scaled by alpha / rank", "适配器输出的缩放为 alpha / 秩"),
        unit=NO_UNIT,
        check=above(0),
        changes_rows=False,
        fixed_for_other_rows=True,
        only=(LORA,),
    )
    lora_dropout: float = learned(
        0.05,
        ("LoRA dropout", "LoRA dropout"),
        ("probability of dropout before the adapter", "适配器之前的 dropout 概率"),
        unit=NO_UNIT,
        check=fraction,
        changes_rows=False,
        fixed_for_other_rows=False,
        only=(LORA,),
    )
    lora_target_modules: str = learned(
        "q_proj,v_proj",
        ("LoRA modules", "LoRA 模块"),
        (
            "names of the modules that get an adapter, separated by commas; or all-linear",
            "添加适配器的模块名，用逗号分隔；或 all-linear",
        ),
        changes_rows=False,
        fixed_for_other_rows=True,
        only=(LORA,),
        decides_memory=True,
        place=Place.COMMON,
    )
    rslora: bool = learned(
        False,
        ("rsLoRA", "rsLoRA"),
        ("scale the adapter by alpha / sqrt(rank) instead (rsLoRA)", "改用 alpha / sqrt(秩) 缩放适配器"),
        changes_rows=False,
        fixed_for_other_rows=True,
        only=(LORA,),
    )
    peft_config: str | None = learned(
        None,
        ("More LoRA settings", "更多 LoRA 设置"),
        (
            "JSON file with further settings of peft's LoraConfig, such as use_dora",
            "包含 peft 的 LoraConfig 其他设置的 JSON 文件，例如 use_dora",
        ),
        changes_rows=False,
        fixed_for_other_rows=True,
        on_resume=OnResume.CONTENT,
        content="adapter settings",
        is_path=True,
        only=(LORA,),
        decides_memory=True,
    )
