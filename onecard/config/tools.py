"""The options of the tools: perplexity, rows, vocabularies, download, conversion, merge, export, GPTQ.

Declared once, as in training.py. This file knows nothing of torch, so that `--help` answers at once.
"""

import dataclasses

from onecard.config import training as training_config
from onecard.config.chat import ChatConfig
from onecard.config.options import EXECUTION, LEARNED, at_least, commit_option, inherited, option


@dataclasses.dataclass(frozen=True)
class PerplexityConfig:
    """Options of tools/perplexity.py."""

    data_path: str | None = option(None, EXECUTION, "text file (UTF-8)", positional=True)
    model_path: str | None = option(
        None, EXECUTION, "base model: a folder, a hub name, a .gguf file, demo; none: what the adapter names"
    )
    lora_path: str | None = option(
        None, EXECUTION, "adapter: a folder, a run, a .gguf file; several with weights as PATH:0.5,PATH:0.5"
    )
    checkpoint: str = inherited(ChatConfig, "checkpoint")
    bits: int | str = inherited(ChatConfig, "bits")
    engine: str = inherited(ChatConfig, "engine")
    device: str = inherited(ChatConfig, "device")
    dtype: str = option(
        "auto",
        EXECUTION,
        "floating point type of 16 bits; auto: fp32 on a processor, so that results can be compared",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    context: int = option(1024, EXECUTION, "tokens of a window, at most the model's", check=at_least(32))
    max_tokens: int | None = option(
        None, EXECUTION, "only this many tokens of the text; none: all", check=at_least(2)
    )
    threads: int | None = inherited(ChatConfig, "threads")
    remote_code: str | None = inherited(ChatConfig, "remote_code")


@dataclasses.dataclass(frozen=True)
class CheckConfig:
    """Options of tools/check_data.py."""

    data_path: str = training_config.same("data_path")
    schema: str | None = training_config.same("schema")
    model_path: str = training_config.same("model_path")
    template: str = option("alpaca", EXECUTION, "prompt template: a name, a .json file, or auto")
    cutoff_len: int = training_config.same("cutoff_len")
    train_on: str = training_config.same("train_on")
    train_on_inputs: bool = training_config.same("train_on_inputs")
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

    model_path: str = training_config.same("model_path")
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

    model_path: str = training_config.same("model_path")
    tokenizer_path: str | None = option(None, EXECUTION, "extended tokenizer to take instead")
    add_tokens: str = option(
        "<pad>,<|im_start|>,<|im_end|>", EXECUTION, "special tokens to add, commas between; empty = none"
    )
    multiple: int = option(
        128, EXECUTION, "rows of the embedding become a multiple of this", check=at_least(1)
    )
    output_path: str = option("prepared-model", EXECUTION, "folder for the model")


HUB, MODELSCOPE = "hub", "modelscope"
SAMPLE = "sample/instruct.json"  # which OneCard brings: data.reader finds it from any working folder


@dataclasses.dataclass(frozen=True)
class DownloadConfig:
    """Options of tools/download.py."""

    model_path: str | None = option(
        None, EXECUTION, "what to fetch: a hub name (owner/model), or demo", positional=True
    )
    to: str | None = option(
        None, EXECUTION, "folder for it; none: the user's cache, where --model_path finds it by its name"
    )
    source: str = option(HUB, EXECUTION, "where the name is looked up", choices=(HUB, MODELSCOPE))
    revision: str | None = option(
        None, EXECUTION, "branch, tag or commit; none: main, or what is there already"
    )
    endpoint: str | None = option(
        None, EXECUTION, "address of a mirror; none: HF_ENDPOINT or MODELSCOPE_ENDPOINT, or the site itself"
    )
    send_token: bool = option(
        False, EXECUTION, "send your token to a mirror too; otherwise only the site itself gets it"
    )
    url_list: str | None = option(
        None, EXECUTION, "instead of a name: a file of addresses and checksums (docs/tools.md), - for stdin"
    )
    files: str | None = option(
        None, EXECUTION, "patterns of file names with commas between, instead of what transformers loads"
    )
    pickles: bool = option(
        False, EXECUTION, "also pickled files (*.bin, *.pth, *.pt, *.ckpt), which can carry code"
    )
    remote_code: str | None = commit_option(
        "fetch this full commit with the model's own Python files (*.py), to be read; none: they never come"
    )
    update: bool = option(False, EXECUTION, "move to the branch's newest commit when it has moved")
    verify: bool = option(False, EXECUTION, "read files again in full, not only their size and times")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Options of tools/convert_llama.py."""

    input_dir: str = option(
        "", LEARNED, "folder of a LLaMA model, in its original or in transformers' layout"
    )
    output_dir: str = option("", EXECUTION, "new folder for the converted model")
    to: str = option(
        "hf", LEARNED, "layout: hf (transformers), or meta (consolidated.*.pth)", choices=("hf", "meta")
    )
    num_shards: int | None = option(
        None,
        LEARNED,
        "files of --to meta, one for each card of the original code; none: 1",
        check=at_least(1),
    )
    tokenizer_only: bool = option(False, LEARNED, "convert the tokenizer alone")


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Options of tools/merge_lora.py."""

    model_path: str | None = option(
        None,
        LEARNED,
        "16-bit base model: a folder, a hub name, or demo; none: what the adapter was made with",
    )
    lora_path: str = option("", LEARNED, "adapter: a folder, a run folder or a hub name")
    output_path: str = option("", EXECUTION, "new folder for the merged model")
    checkpoint: str = option(
        "best",
        LEARNED,
        "of a run that is not finished: its best or newest checkpoint",
        choices=("best", "newest"),
    )
    report: bool = option(False, EXECUTION, "then compare the merged model with base + adapter on rows")
    data_path: str = option(SAMPLE, EXECUTION, "rows for --report")
    report_rows: int = option(8, EXECUTION, "rows that --report takes", check=at_least(1))
    cutoff_len: int = option(256, EXECUTION, "longest row of --report, in tokens", check=at_least(8))


GGUF_TYPES = (  # of llama.cpp, from the largest
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
PLAIN_TYPES = ("f32", "f16", "bf16")  # the others are made by the quantiser


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of tools/export_gguf.py."""

    model_path: str | None = option(
        None, EXECUTION, "base model: a folder, a hub name, demo; none: what the adapter names"
    )
    lora_path: str | None = option(
        None, EXECUTION, "adapter that becomes a GGUF adapter: a folder, a run, a hub name"
    )
    output_path: str | None = option(
        None, EXECUTION, "new folder; none: gguf-TYPE in the adapter's, or MODEL-gguf-TYPE here"
    )
    type: str = option("f16", EXECUTION, "type of the base's weights", choices=GGUF_TYPES)
    check: bool = option(
        True, EXECUTION, "compare with transformers in fp32 (4 bytes a parameter); what fails is not kept"
    )
    checkpoint: str = option(
        "best", EXECUTION, "which checkpoint of a run that is not finished", choices=("best", "newest")
    )
    template: str | None = option(
        None, EXECUTION, "prompt template of the Modelfile; none: the one it was trained with"
    )
    threads: int | None = option(
        None, EXECUTION, "processor threads; none: one a physical core", check=at_least(1)
    )


def _is_damp(value: float) -> str | None:
    return None if 0 < value < 1 else "must be above 0 and below 1"


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Options of tools/quantize.py."""

    model_path: str | None = option(None, LEARNED, "16-bit model: a folder, a hub name, or demo")
    output_path: str | None = option(
        None, EXECUTION, "new folder; none: MODEL-METHOD-BITSbit in the current one"
    )
    method: str = option(
        "gptq",
        LEARNED,
        "gptq and awq look at rows, bnb (bitsandbytes) does not",
        choices=("gptq", "awq", "bnb"),
    )
    bits: int = option(4, LEARNED, "bits of a weight; awq has 4, bnb 4 and 8", choices=(2, 3, 4, 8))
    group_size: int | str = option(
        "auto",
        LEARNED,
        "weights of a row that share a scale: 32, 64, 128, -1 (the whole row); auto: the most that fit",
        check=lambda value: (
            None if value in ("auto", 32, 64, 128, -1) else "choose from auto, 32, 64, 128, -1"
        ),
    )
    act_order: bool = option(
        False, LEARNED, "gptq: weights of large activations first; often better, slower on some cards"
    )
    damp: float = option(
        0.05, LEARNED, "gptq: share of the mean curvature that is added to every weight's", check=_is_damp
    )
    data_path: str = option(SAMPLE, LEARNED, "rows to look at; your own fit your model better")
    template: str | None = option(
        None, LEARNED, "their prompt template: a name, a .json file; none: the tokenizer's own, else alpaca"
    )
    rows: int = option(128, LEARNED, "how many rows are looked at, chosen by the seed", check=at_least(1))
    cutoff_len: int = option(512, LEARNED, "longest row, in tokens", check=at_least(16))
    seed: int = option(42, LEARNED, "of the choice of rows", check=at_least(0))
    report_rows: int = option(
        16, EXECUTION, "other rows whose perplexity is told before and after; 0 = none", check=at_least(0)
    )
    device: str = option("auto", EXECUTION, "auto, cpu, cuda or cuda:N; one layer at a time is on it")
