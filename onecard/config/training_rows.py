"""Options of training: which rows and which base model, and how rows become token ids."""

import dataclasses

from onecard.config.checks import at_least
from onecard.config.declaration import BITS, TOKENS, Hub, OnResume, Place, execution, learned

SAMPLE_ROWS = "sample/instruct.json"  # comes with OneCard: data.reader finds it from any working folder
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


@dataclasses.dataclass(frozen=True)
class SourceOptions:
    """What a training reads, and where it writes."""

    data_path: str = learned(
        SAMPLE_ROWS,
        ("Training rows", "训练数据"),
        (
            "training rows: files (JSON, JSONL, CSV, Parquet) separated by commas, folders or a hub dataset; "
            "FILE:2 uses the rows of a file twice per epoch",
            "训练数据：JSON、JSONL、CSV 或 Parquet 文件（逗号分隔）、文件夹或 hub 数据集；"
            "文件名后加 :2 表示每轮把该文件的行使用两次",
        ),
        changes_rows=False,  # the files' contents are part of the cache key
        fixed_for_other_rows=False,
        on_resume=OnResume.CONTENT,
        content="rows",
        is_path=True,
        hub=Hub.ROWS,
        place=Place.TOP,
    )
    eval_data_path: str | None = learned(
        None,
        ("Validation rows", "验证数据"),
        (
            "validation rows: files as for --data_path, without weights; --test_size then takes no rows from "
            "the training rows",
            "验证数据：与训练数据相同格式的文件，不带使用次数；填写后不再从训练数据中划分验证行",
        ),
        changes_rows=False,
        fixed_for_other_rows=False,
        on_resume=OnResume.CONTENT,
        content="rows",
        is_path=True,
        hub=Hub.ROWS,
    )
    schema: str | None = learned(
        None,
        ("Schema", "数据格式"),
        (
            "format of the rows; none: each row is recognised by its keys",
            "每行数据的格式；不选则根据每行的键自动识别",
        ),
        choices=SCHEMAS,
        changes_rows=True,
        fixed_for_other_rows=False,
    )
    task: str = learned(
        "auto",
        ("Task", "任务"),
        (
            "sft: fine-tune on instructions and conversations; pretrain: train on raw text in blocks of "
            "--cutoff_len tokens; auto: pretrain if the rows are raw text",
            "sft：指令与对话微调；pretrain：把纯文本切成定长的块继续预训练；auto：数据是纯文本时预训练",
        ),
        choices=("auto", "sft", "pretrain"),
        changes_rows=True,
        fixed_for_other_rows=False,
    )
    model_path: str = learned(
        "demo",
        ("Base model", "基座模型"),
        ("base model: a folder, a hub name, or demo", "基座模型：文件夹、hub 名称，或 demo"),
        changes_rows=False,  # the tokenizer's files are part of the cache key
        fixed_for_other_rows=False,  # its content is compared
        on_resume=OnResume.CONTENT,
        content="base model",
        is_path=True,
        hub=Hub.BASE,
        decides_memory=True,
        place=Place.TOP,
    )
    output_path: str = execution(
        "lora-checkpoints/demo",
        ("Run folder", "训练文件夹"),
        ("folder of the run: log, checkpoints, adapter", "训练文件夹：日志、检查点和适配器"),
        on_resume=OnResume.NAMES_RUN,
        place=Place.NOWHERE,  # the window asks for the name of the run instead
    )
    bits: int = learned(
        8,
        ("Bits of the base model", "基座模型位数"),
        ("bits of each frozen weight of the base model", "冻结的基座权重用几位保存"),
        unit=BITS,
        choices=(16, 8, 4),
        changes_rows=False,
        fixed_for_other_rows=True,
        decides_memory=True,
        saves_memory=True,
        place=Place.COMMON,
    )
    cutoff_len: int = learned(
        256,
        ("Longest row", "每行最大长度"),
        (
            "most tokens of a row; a longer conversation loses its oldest turns, a longer answer is cut",
            "每行最多的词元数；过长的对话先去掉最早的轮次，过长的回答会被截断",
        ),
        unit=TOKENS,
        check=at_least(8),
        changes_rows=True,
        fixed_for_other_rows=False,
        decides_memory=True,
        saves_memory=True,
        place=Place.COMMON,
    )


@dataclasses.dataclass(frozen=True)
class EncodingOptions:
    """How rows become token ids, and which of these are learned."""

    template: str = learned(
        "alpaca",
        ("Prompt template", "提示模板"),
        (
            "prompt template: a name from onecard/data/templates, a .json file, or auto for the tokenizer's "
            "own; with several, separated by commas, each row gets one of them",
            "提示模板：名称、.json 文件，或 auto 使用分词器自带的模板；多个模板用逗号分隔，每行取其中之一",
        ),
        changes_rows=False,  # the text of the templates is part of the cache key
        fixed_for_other_rows=False,
        is_path=True,
        place=Place.COMMON,
    )
    train_on: str = learned(
        "all",
        ("Answers to learn", "学习哪些回答"),
        (
            "which answers of a conversation are learned: all of them, or the last one",
            "对话中哪些回答参与训练：全部（all），或只有最后一个（last）",
        ),
        choices=("all", "last"),
        changes_rows=True,
        fixed_for_other_rows=False,
    )
    train_on_inputs: bool = learned(
        False,
        ("Learn the prompt too", "也学习提问"),
        ("compute the loss on the prompt too, not only on the answer", "损失不只包含回答，也包含提问部分"),
        changes_rows=True,
        fixed_for_other_rows=False,
    )
    marked_rows: str = learned(
        "unwrap",
        ("Rows with markers", "带模板标记的行"),
        (
            "what happens to questions that are a whole prompt of a template already, markers included: "
            "unwrap takes the markers off, keep writes --template around them once more",
            "提问本身已是某个模板的完整提示（含标记）时：unwrap 去掉这些标记；"
            "keep 原样保留，外面再套一层模板",
        ),
        choices=("unwrap", "keep"),
        changes_rows=True,
        fixed_for_other_rows=False,
    )
    long_rows: str = learned(
        "cut",
        ("Rows that are too long", "过长的行"),
        (
            "what happens to conversations longer than --cutoff_len: cut shortens them (a cut answer has no "
            "end token), drop writes them to rejected_rows.jsonl, stop ends the program",
            "对话超过最大长度时：cut 截断（被截断的回答没有结束符）；drop 丢弃并写入 rejected_rows.jsonl；"
            "stop 停止程序",
        ),
        choices=("cut", "drop", "stop"),
        changes_rows=True,
        fixed_for_other_rows=False,
    )
    overlap: int = learned(
        0,
        ("Overlap", "重叠"),
        (
            "raw text only: tokens at the end of a block that are repeated, without being trained again, at "
            "the start of the next block",
            "仅用于纯文本：相邻两块之间重复的词元数（重复部分不参与训练）",
        ),
        unit=TOKENS,
        check=at_least(0),
        changes_rows=True,
        fixed_for_other_rows=False,
    )
