"""The options of the tools that read: perplexity, checks of rows, downloads.

This file knows nothing of torch, so that `--help` answers at once.
"""

import dataclasses

from onecard.config.chat import ChatConfig
from onecard.config.checks import at_least
from onecard.config.declaration import EXECUTION, TOKENS, Use, commit_option, inherited, option
from onecard.config.training import same
from onecard.config.training_rows import SAMPLE_ROWS

HUB, MODELSCOPE = "hub", "modelscope"
NAMED_MODEL = Use(("for a model's name, not for --url_list", ""))
HUB_MODEL = Use(("for a hub's model, not for demo", ""))
FOLDER = Use(("for demo with --to", ""))


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Options of tools/perplexity.py."""

    data_path: str | None = option(None, EXECUTION, "text file (UTF-8)", positional=True)
    model_path: str | None = inherited(ChatConfig, "model_path")
    lora_path: str | None = option(
        None,
        EXECUTION,
        "adapter: a folder, a run or a .gguf file; several are written PATH:0.5,PATH:0.5 with their weights",
    )
    checkpoint: str = inherited(ChatConfig, "checkpoint")
    bits: int | str = inherited(ChatConfig, "bits")
    engine: str = inherited(ChatConfig, "engine")
    device: str = inherited(ChatConfig, "device")
    dtype: str = option(
        "auto",
        EXECUTION,
        "compute dtype of 16-bit weights; auto: fp32 on a CPU, so that results can be compared",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    context: int = option(
        1024,
        EXECUTION,
        "tokens that are scored at once, at most the model's limit",
        unit=TOKENS,
        check=at_least(32),
        saves_memory=True,
    )
    max_tokens: int | None = option(
        None, EXECUTION, "use only this many tokens of the text; none: all", unit=TOKENS, check=at_least(2)
    )
    threads: int | None = inherited(ChatConfig, "threads")
    remote_code: str | None = inherited(ChatConfig, "remote_code")


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
    png: str | None = option(
        None, EXECUTION, "also draw the histogram of lengths into this PNG file", is_written=True
    )
    html: str | None = option(
        None,
        EXECUTION,
        "also write a page for a browser with 20 rows, their target tokens marked",
        is_written=True,
    )
    clean: str | None = option(
        None,
        EXECUTION,
        "write the rows that are worth keeping to this JSONL file, and the others beside it with the reason",
    )
    repair: bool = option(False, EXECUTION, "with --clean: repair garbled characters (ftfy)")


@dataclasses.dataclass(frozen=True)
class ParquetConfig:
    """Options of tools/json_to_parquet.py."""

    data_path: str = option(SAMPLE_ROWS, EXECUTION, "files separated by commas, or a folder")
    output_path: str = option("rows.parquet", EXECUTION, "Parquet file to write")


@dataclasses.dataclass(frozen=True)
class DownloadConfig:
    """Options of tools/download.py."""

    model_path: str | None = option(
        None, EXECUTION, "what to fetch: a hub name (owner/model), or demo", positional=True
    )
    to: str | None = option(
        None, EXECUTION, "folder for it; none: the user's cache, where --model_path finds it by its name"
    )
    source: str = option(
        HUB,
        EXECUTION,
        "where the name is looked up",
        choices=(HUB, MODELSCOPE),
        only=(NAMED_MODEL, HUB_MODEL),
    )
    revision: str | None = option(
        None,
        EXECUTION,
        "branch, tag or commit; none: main, or what is there already",
        only=(NAMED_MODEL, HUB_MODEL),
    )
    endpoint: str | None = option(
        None,
        EXECUTION,
        "address of a mirror; none: HF_ENDPOINT or MODELSCOPE_ENDPOINT, or the site itself",
        only=(NAMED_MODEL, HUB_MODEL),
    )
    send_token: bool = option(
        False,
        EXECUTION,
        "send your token to a mirror too; otherwise only the site itself gets it",
        only=(NAMED_MODEL, HUB_MODEL),
    )
    url_list: str | None = option(
        None, EXECUTION, "instead of a name: a file of addresses and checksums (docs/tools.md), - for stdin"
    )
    files: str | None = option(
        None,
        EXECUTION,
        "patterns of file names, separated by commas; none: the files that transformers loads",
        only=(NAMED_MODEL, HUB_MODEL),
    )
    pickles: bool = option(
        False,
        EXECUTION,
        "also fetch pickled files (*.bin, *.pth, *.pt, *.ckpt), which can carry code",
        only=(NAMED_MODEL, HUB_MODEL),
    )
    remote_code: str | None = commit_option(
        None,
        (
            "fetch this full commit with the model's own Python files (*.py), to be read; none: these files "
            "are never fetched",
            "",
        ),
    )
    update: bool = option(
        False, EXECUTION, "move to the newest commit of the branch if there is one", only=(HUB_MODEL,)
    )
    verify: bool = option(
        False, EXECUTION, "read files again in full, instead of comparing sizes and times", only=(FOLDER,)
    )
