"""Options of the programs in tools/ that carry models from one form or place to another.

Declared once, as in config.py. This file knows nothing of torch, so that `--help` answers at once.
"""

import dataclasses

from onecard.parsing import EXECUTION, LEARNED, at_least, commit_option, option

HUB, MODELSCOPE = "hub", "modelscope"
SAMPLE = "sample/instruct.json"  # in the repository; trial_rows finds it from any working folder


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
