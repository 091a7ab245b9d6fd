"""The options of the tools that write another model: vocabulary, layout, merge, GGUF and quantisation.

This file knows nothing of torch, so that `--help` answers at once.
"""

import dataclasses

from onecard.config.chat import ChatConfig
from onecard.config.checks import at_least, one_of
from onecard.config.declaration import (
    BITS,
    EXECUTION,
    LEARNED,
    NO_UNIT,
    ROWS,
    THREADS,
    TOKENS,
    Use,
    inherited,
    option,
)
from onecard.config.training import same
from onecard.config.training_rows import SAMPLE_ROWS

GGUF_TYPES = (  # of llama.cpp, from the largest
    *("f32", "f16", "bf16", "q8_0", "q6_k", "q5_k_m", "q5_k_s", "q5_1", "q5_0"),
    *("q4_k_m", "q4_k_s", "q4_1", "q4_0", "q3_k_l", "q3_k_m", "q3_k_s", "q2_k"),
)
PLAIN_TYPES = ("f32", "f16", "bf16")  # the others are made by the quantiser
GPTQ, AWQ, BNB = METHODS = ("gptq", "awq", "bnb")
TO_HF, TO_META = LAYOUTS = ("hf", "meta")  # of a LLaMA folder
CALIBRATING = (GPTQ, AWQ)  # methods that choose weights by calibration rows
OWN_ROWS = "rows"  # of --data_path
PUBLISHED = WIKITEXT2, C4, PTB = ("wikitext2", "c4", "ptb")  # texts that calibrate a model
NOT_TOKENIZER_ONLY = Use(("for weights, not for --tokenizer_only", ""))
REPORT = Use(("for --report", ""))
GPTQ_ONLY = Use(("for --method gptq", ""))
CALIBRATION = Use(("for --method gptq or awq", ""))
PUBLISHED_TEXT = Use((f"for --calibration {WIKITEXT2}, {C4} or {PTB}", ""))


def _is_damp(value: float) -> str | None:
    return None if 0 < value < 1 else "must be above 0 and below 1"


@dataclasses.dataclass(frozen=True)
class VocabConfig:
    """Options of tools/extend_vocab.py."""

    model_path: str = same("model_path")
    pieces: str | None = option(
        None, EXECUTION, "pieces to add: a text file with one per line, or a SentencePiece model"
    )
    characters: str | None = option(
        None, EXECUTION, "running text (UTF-8) whose characters beyond ASCII are added"
    )
    min_count: int = option(
        5,
        EXECUTION,
        "how many times a character must occur in --characters",
        unit=("times", "次"),
        check=at_least(1),
    )
    sample_text: str | None = option(None, EXECUTION, "text (UTF-8) on which the saved tokens are counted")
    output_path: str = option("extended-tokenizer", EXECUTION, "new folder for the tokenizer")


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """Options of tools/prepare_base_model.py."""

    model_path: str = same("model_path")
    tokenizer_path: str | None = option(
        None, EXECUTION, "extended tokenizer that replaces the model's own; none: the model's own"
    )
    add_tokens: str = option(
        "<pad>,<|im_start|>,<|im_end|>",
        EXECUTION,
        "special tokens to add, separated by commas; empty = none",
    )
    multiple: int = option(
        128,
        EXECUTION,
        "the number of rows of the embedding becomes a multiple of this",
        unit=ROWS,
        check=at_least(1),
    )
    output_path: str = option("prepared-model", EXECUTION, "new folder for the model")


@dataclasses.dataclass(frozen=True)
class ConvertConfig:
    """Options of tools/convert_llama.py."""

    input_dir: str = option(
        "", LEARNED, "folder of a LLaMA model, in its original layout or in that of transformers"
    )
    output_dir: str = option("", EXECUTION, "new folder for the converted model")
    to: str = option(
        "hf",
        LEARNED,
        "layout to convert to: hf (transformers), or meta (consolidated.*.pth)",
        choices=LAYOUTS,
        recorded=LAYOUTS,
    )
    num_shards: int | None = option(
        None,
        LEARNED,
        "number of files with --to meta, one for each GPU of the original code; none: 1",
        unit=("files", "文件"),
        check=at_least(1),
        only=(NOT_TOKENIZER_ONLY,),
    )
    tokenizer_only: bool = option(False, LEARNED, "convert the tokenizer alone", recorded=LAYOUTS)


@dataclasses.dataclass(frozen=True)
class MergeConfig:
    """Options of tools/merge_lora.py."""

    model_path: str | None = option(
        None,
        LEARNED,
        "16-bit base model: a folder, a hub name, or demo; none: the one that the adapter was trained on",
    )
    lora_path: str = option("", LEARNED, "adapter: a folder, a run folder or a hub name")
    output_path: str = option("", EXECUTION, "new folder for the merged model")
    checkpoint: str = option(
        "best", LEARNED, "which checkpoint of a run that is not finished", choices=("best", "newest")
    )
    report: bool = option(False, EXECUTION, "then compare the merged model with base model and adapter")
    data_path: str = option(
        SAMPLE_ROWS, EXECUTION, "rows on which --report compares the models", only=(REPORT,)
    )
    report_rows: int = option(
        8, EXECUTION, "how many of these rows --report uses", unit=ROWS, check=at_least(1), only=(REPORT,)
    )
    cutoff_len: int = option(
        256,
        EXECUTION,
        "most tokens of a row that --report uses",
        unit=TOKENS,
        check=at_least(8),
        only=(REPORT,),
        saves_memory=True,
    )


@dataclasses.dataclass(frozen=True)
class ExportConfig:
    """Options of tools/export_gguf.py."""

    model_path: str | None = option(
        None,
        EXECUTION,
        "base model: a folder, a hub name, or demo; none: the one that the adapter names",
    )
    lora_path: str | None = option(
        None, EXECUTION, "adapter that becomes a GGUF adapter: a folder, a run or a hub name"
    )
    output_path: str | None = option(
        None,
        EXECUTION,
        "new folder; none: gguf-TYPE in the adapter's folder, or MODEL-gguf-TYPE in the current one",
    )
    type: str = option("f16", EXECUTION, "GGUF type of the base model's weights", choices=GGUF_TYPES)
    check: bool = option(
        True,
        EXECUTION,
        "compare the files with transformers in fp32 (4 bytes per parameter); files that fail are deleted",
    )
    checkpoint: str = inherited(ChatConfig, "checkpoint")
    template: str | None = option(
        None,
        EXECUTION,
        "prompt template of the Modelfile; none: the one that the adapter was trained with",
    )
    threads: int | None = option(
        None,
        EXECUTION,
        "CPU threads; none: one thread per physical core",
        unit=THREADS,
        check=at_least(1),
    )


@dataclasses.dataclass(frozen=True)
class QuantizeConfig:
    """Options of tools/quantize.py."""

    model_path: str | None = option(None, LEARNED, "16-bit model: a folder, a hub name, or demo")
    output_path: str | None = option(
        None, EXECUTION, "new folder; none: MODEL-METHOD-BITSbit in the current one"
    )
    method: str = option(
        GPTQ,
        LEARNED,
        "gptq and awq use calibration rows, bnb (bitsandbytes) does not",
        choices=METHODS,
        recorded=METHODS,
    )
    bits: int = option(
        4,
        LEARNED,
        "bits of each weight; awq has 4, bnb 4 and 8",
        unit=BITS,
        choices=(2, 3, 4, 8),
        recorded=METHODS,
    )
    group_size: int | str = option(
        "auto",
        LEARNED,
        "number of weights of a row that share a scale: 32, 64, 128 or -1 (the whole row); auto: the most "
        "that fit",
        unit=("weights", "权重"),
        check=one_of("auto", 32, 64, 128, -1),
        only=(CALIBRATION,),
    )
    act_order: bool = option(
        False,
        LEARNED,
        "gptq: quantise weights with large activations first; often better, slower on some GPUs",
        only=(GPTQ_ONLY,),
        recorded=CALIBRATING,
    )
    damp: float = option(
        0.05,
        LEARNED,
        "gptq: share of the mean curvature that is added to the curvature of every weight",
        unit=NO_UNIT,
        check=_is_damp,
        only=(GPTQ_ONLY,),
        recorded=CALIBRATING,
    )
    calibration: str = option(
        OWN_ROWS,
        LEARNED,
        "what calibrates the weights: rows (of --data_path), or windows of a published text (the others)",
        choices=(OWN_ROWS, *PUBLISHED),
        only=(CALIBRATION,),
        recorded=CALIBRATING,
    )
    calibration_path: str | None = option(
        None,
        LEARNED,
        "file or folder with the published text; none: it comes from the Hugging Face Hub",
        only=(CALIBRATION, PUBLISHED_TEXT),
    )
    data_path: str = option(
        SAMPLE_ROWS,
        LEARNED,
        "calibration rows, and those that measure perplexity; rows of your own task give a better model",
    )
    template: str | None = option(
        None,
        LEARNED,
        "prompt template of the calibration rows: a name, a .json file; none: the tokenizer's own, or alpaca",
        recorded=CALIBRATING,
    )
    rows: int = option(
        128,
        LEARNED,
        "how many calibration rows or windows are used, chosen by the seed",
        unit=ROWS,
        check=at_least(1),
        only=(CALIBRATION,),
        recorded=CALIBRATING,
    )
    cutoff_len: int = option(
        512,
        LEARNED,
        "most tokens of a row; each window of a published text has as many",
        unit=TOKENS,
        check=at_least(16),
        saves_memory=True,
        recorded=CALIBRATING,
    )
    seed: int = option(
        42,
        LEARNED,
        "seed of the choice of calibration rows or windows",
        unit=NO_UNIT,
        check=at_least(0),
        recorded=CALIBRATING,
    )
    report_rows: int = option(
        16,
        EXECUTION,
        "other rows, on which perplexity is measured before and after; 0 = none",
        unit=ROWS,
        check=at_least(0),
        recorded=CALIBRATING,
    )
    device: str = option("auto", EXECUTION, "auto, cpu, cuda or cuda:N; one layer at a time is moved to it")
