"""An adapter is merged into its 16-bit base: a new model folder, written without loading the model.

Each tensor of the base is read in blocks of rows. A tensor that the adapter changes is computed in fp32 and
stored in the dtype of the base; every other tensor is copied byte for byte.
"""

import contextlib
import dataclasses
import functools
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers.pytorch_utils import Conv1D

from onecard.config import options as config_options
from onecard.config.conversion import REPORT, MergeConfig
from onecard.conversion import lora_delta, side_files
from onecard.conversion.lora_delta import Change
from onecard.errors import CHECKPOINT, UserError
from onecard.evaluation import eval_rows, merge_fidelity
from onecard.evaluation.eval_rows import EvalRow
from onecard.hub import model_files
from onecard.inference import resolve
from onecard.inference.resolve import ModelRequest, ResolvedModel
from onecard.models import adapter as models_adapter
from onecard.models import base_model, tensor_files
from onecard.models import tokenizer as models_tokenizer
from onecard.models.tensor_files import Behind, Files, StoredTensor
from onecard.runs import adapters as runs_adapters
from onecard.runs.adapters import AdapterPath
from onecard.system import files as system_files
from onecard.system import output_folder
from onecard.system.console import Progress, say

FLAG = "--output_path"
SMALL = 64 << 20  # bytes for tokenizer and settings
MOST_THREADS = 4  # a disk cannot follow more of them


@dataclasses.dataclass
class Base:
    """The tensors of a base model, and what its architecture says about them."""

    folder: Path
    config: dict[str, Any]
    tensors: dict[str, StoredTensor]
    prefix: str  # of the names inside the inner model; some files leave it out
    conv: set[str]  # modules whose weights are [in, out]
    embedding: str  # the name of its tensor
    head: str  # the name of its tensor
    tied: bool
    expected: dict[str, tuple[int, ...]]  # tensors that the adapter has on this base -> shapes

    def find(self, name: str) -> StoredTensor | None:
        """The tensor of a parameter, None without one; for a tied head the tensor of the embedding."""
        short = name.removeprefix(f"{self.prefix}.")
        if name == self.head and self.tied:
            return self.find(self.embedding)
        return self.tensors.get(name) or self.tensors.get(short)


@dataclasses.dataclass
class MergePlan:
    """What the new folder will hold, and where each tensor comes from."""

    files: dict[str, list[StoredTensor]]
    origin: dict[str, StoredTensor]  # name in the files -> the tensor that it is read from
    changes: dict[str, tuple[Change, bool]]  # name in the files -> (change, whether the weight is [in, out])
    biases: dict[str, Change]  # name in the files -> the change that adds to it
    config: dict[str, Any]


def run(options: MergeConfig, progress: Progress) -> None:
    """Merge, and with --report compare the result. progress(done, total) counts bytes.

    The rows of the report are read before the merge begins. Raises UserError: exit 4 with the list of keys
    when the adapter does not fit this base, 3 without rows.
    """
    if not options.report:
        config_options.refuse_unused(options, REPORT)
    target = Path(options.output_path)
    with resolve.resolve(request(options)) as model:
        base, adapter = Path(model.base), model.adapters[0]
        say(f"base        {base}: {model.base_reason}")
        for flag, folder in (("--model_path", base), ("--lora_path", adapter.origin)):
            output_folder.check_apart(folder, target, (flag, FLAG))
        rows = _rows(options, model) if options.report else []
        _make(model, target, progress)
        if options.report:
            merge_fidelity.run(options, rows, base, adapter, target)


def request(options: MergeConfig) -> ModelRequest:
    """What resolve.py is asked for; --lora_path is one path here, without a name or a weight."""
    listed = [AdapterPath(runs_adapters.short_name(options.lora_path), options.lora_path, None)]
    return ModelRequest(
        options.model_path,
        listed,
        resolve.MERGE,
        resolve.find_folder,
        gguf_remedy="Name the folder that it was made from: GGUF files cannot be merged.",
        code_remedy="Merging runs no code of a model; training, chat and perplexity can.",
        checkpoint=options.checkpoint,
    )


def _rows(options: MergeConfig, model: ResolvedModel) -> list[EvalRow]:
    """The rows for the report; raises UserError (exit 3) when there are none."""
    template, tokenizer = model.template, model.tokenizer
    return eval_rows.some(options.data_path, options.cutoff_len, template, tokenizer, options.report_rows)


def _make(model: ResolvedModel, target: Path, progress: Progress) -> None:
    folder, adapter, tokenizer = Path(model.base), model.adapters[0], model.own_tokenizer
    copied = side_files.rest(folder, skip=side_files.TOKENIZER_FILES if tokenizer else ())
    copied += side_files.rest(tokenizer, only=side_files.TOKENIZER_FILES) if tokenizer else []
    files = [*model_files.files_of(folder), *side_files.of_adapter(adapter.origin), *copied]
    made_of = output_folder.record("merge_lora", {}, files, model.versions_by_option)
    if output_folder.is_made(target, made_of, FLAG):
        say(f"{target} is there already, made of the same files (compared by size and time): nothing to do.")
        return
    changes = lora_delta.read(adapter.folder)
    base = _base(folder, adapter.folder)
    plan = _plan(base, changes, adapter.folder)
    needed = sum(tensor.size for tensors in plan.files.values() for tensor in tensors) + SMALL
    with output_folder.making(target, needed, made_of, FLAG) as (place, _):
        for path in copied:
            shutil.copyfile(path, place / path.name)
        if tokenizer:
            say(f"tokenizer   the adapter's, in {tokenizer}")
        _check_tokenizer(place, plan, tokenizer)
        system_files.write_json(place / model_files.MODEL_CONFIG, plan.config)
        written = _write(plan, place, adapter.folder, progress)
    say(f"merged      {len(plan.changes)} tensors changed, {len(changes.whole)} replaced, all others copied")
    say(f"{target} is complete: {written / 2**30:.2f} GiB of weights.")


def _base(folder: Path, adapter_folder: Path) -> Base:
    fix = "Fetch or convert the model again."
    config = system_files.read_json(folder / model_files.MODEL_CONFIG, fix) or {}
    if config.get("quantization_config"):
        problem = f"--model_path {folder}: its weights are quantised, and only 16-bit weights can be merged."
        raise UserError(problem, "Name the 16-bit model that it was made from.")
    settings = base_model.load_config(str(folder))
    bare = base_model.skeleton(str(folder), settings)
    embedding, head = bare.get_input_embeddings(), bare.get_output_embeddings()
    tied = embedding.weight is head.weight
    tensors = tensor_files.of_folder(folder)
    modules = dict(bare.named_modules())
    named = {id(module): name for name, module in modules.items()}
    conv = {name for name, module in modules.items() if isinstance(module, Conv1D)}
    names = [f"{named[id(module)]}.weight" for module in (embedding, head)]
    base = Base(folder, config, tensors, bare.base_model_prefix, conv, *names, tied, {})
    if tied and names[1] in tensors:  # transformers ties only equal tensors
        twin, other = base.find(names[0]), tensors[names[1]]
        if twin is None or _are_equal(twin, other):
            del tensors[names[1]]
        else:
            base.tied = config["tie_word_embeddings"] = settings.tie_word_embeddings = False
            bare = base_model.skeleton(str(folder), settings)
    tensor_files.check_whole(folder, tensors, bare)
    base.expected = models_adapter.expected_shapes(bare, adapter_folder)
    return base


def _are_equal(one: StoredTensor, other: StoredTensor) -> bool:
    """Whether two tensors have the same dtype, shape and values."""
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    with Files() as files:
        return all(
            torch.equal(files.read(one, first, last), files.read(other, first, last))
            for first, last in one.blocks()
        )


def _plan(base: Base, adapter: lora_delta.Adapter, folder: Path) -> MergePlan:
    """What each tensor becomes; raises UserError (exit 4) with the list of keys that do not fit."""
    bad = _misfits(base, adapter)
    origin = dict(base.tensors)
    changes: dict[str, tuple[Change, bool]] = {}
    biases: dict[str, Change] = {}
    untied = _unties(base, adapter)
    if untied:
        origin[base.head] = base.find(base.head)
    for name, tensor in adapter.whole.items():
        replaced = base.find(name)
        if replaced is None:
            bad.append(f"{name} (unknown)")
        elif name != base.head or replaced.name != base.find(base.embedding).name or untied:
            key = name if name == base.head and untied else replaced.name
            origin[key] = tensor
    for module, change in adapter.changes.items():
        name = f"{module}.weight"
        weight = base.find(name)
        key = name if name == base.head and untied else weight.name if weight else name
        if weight is None:
            bad.append(f"{name} (unknown)")
        elif origin[key].shape != change.shape(module in base.conv):
            shape = list(change.shape(module in base.conv))
            bad.append(f"{module} (the adapter is for {shape}, the base has {list(origin[key].shape)})")
        else:
            changes[key] = (change, module in base.conv)
        if change.bias is not None:
            bias = base.find(f"{module}.bias")
            if bias is None:
                bad.append(f"{module}.lora_B.bias (the base has no bias there)")
            else:
                biases[bias.name] = change
    rows = {origin[name].shape[0] for name in _vocabulary(base, untied)}
    if len(rows) > 1:
        bad.append(f"embedding and head (they would have {' and '.join(map(str, sorted(rows)))} rows)")
    if bad:
        raise lora_delta.wrong(folder, bad)
    config = {**base.config, **({"tie_word_embeddings": False} if untied else {})}
    if "vocab_size" in config:
        config["vocab_size"] = rows.pop()
    return MergePlan(_files(base, origin), origin, changes, biases, config)


def _misfits(base: Base, adapter: lora_delta.Adapter) -> list[str]:
    """Tensors that the adapter lacks or should not have on this base, or that have another shape."""
    extra = {lora_delta.PREFIX + name for name in (base.embedding, base.head)}
    shapes = {tensor.name: tensor.shape for change in adapter.changes.values() for tensor in change.tensors()}
    shapes |= {tensor.name: tensor.shape for tensor in adapter.whole.values()}
    actual = {name.replace(".base_layer.", "."): shape for name, shape in shapes.items()}
    expected = {name.replace(".base_layer.", "."): shape for name, shape in base.expected.items()}
    bad = [f"{name} (missing)" for name in expected.keys() - actual.keys()]
    bad += [f"{name} (unknown)" for name in actual.keys() - expected.keys() - extra]
    for name in expected.keys() & actual.keys():
        resized = name in extra and expected[name][1:] == actual[name][1:]
        if expected[name] != actual[name] and not resized:
            bad.append(f"{name} (is {list(actual[name])}, should be {list(expected[name])})")
    return bad


def _unties(base: Base, adapter: lora_delta.Adapter) -> bool:
    """Whether embedding and head are one tensor in the base, and two after the merge."""
    if not base.tied:
        return False
    names = (base.embedding, base.head)
    if any(name.removesuffix(".weight") in adapter.changes for name in names):
        return True
    one, other = (adapter.whole.get(name) for name in names)
    if one is None and other is None:
        return False
    if one is None or other is None:
        return not adapter.config.get("ensure_weight_tying")
    return not _are_equal(one, other)


def _vocabulary(base: Base, untied: bool) -> list[str]:
    """Names, in the new files, of the tensors that have a row for each token."""
    tensors = [base.find(name) for name in (base.embedding, base.head)]
    names = {tensor.name for tensor in tensors if tensor}
    return sorted(names | ({base.head} if untied else set()))


def _files(base: Base, origin: dict[str, StoredTensor]) -> dict[str, list[StoredTensor]]:
    """The base's files and dtypes with the new shapes; a new head goes into the file of the embedding."""
    files: dict[str, list[StoredTensor]] = {}
    for name, tensor in base.tensors.items():
        files.setdefault(tensor.file.name, []).append(StoredTensor(name, tensor.dtype, origin[name].shape))
    embedding = base.find(base.embedding)
    if base.head in origin and base.head not in base.tensors:
        head = StoredTensor(base.head, embedding.dtype, origin[base.head].shape)
        files[embedding.file.name].append(head)
    return files


def _check_tokenizer(place: Path, plan: MergePlan, own: Path | None) -> None:
    """Raise UserError (exit 4) when the adapter's tokenizer has ids without a row in the merged embedding."""
    if own is None:
        return
    highest = max(models_tokenizer.load_tokenizer(str(place)).get_vocab().values())
    rows = plan.config.get("vocab_size")
    if rows is not None and highest >= rows:
        problem = f"{own}: the adapter's tokenizer has ids up to {highest}, but the merged embedding"
        problem += f" has {rows} rows."
        fix = "The adapter was trained on a base with more rows: name that base with --model_path."
        raise UserError(problem, fix, CHECKPOINT)


def _write(plan: MergePlan, place: Path, folder: Path, progress: Progress) -> int:
    """Write the files of weights; returns their bytes."""
    targets = tensor_files.create(place, plan.files)
    total, done = sum(tensor.size for tensor in targets.values()), 0
    threads = min(MOST_THREADS, torch.get_num_threads())
    with Files() as files, Behind(files, threads) as behind, _one_thread_each():
        for name, target in targets.items():
            source, pair, norms = plan.origin[name], None, None
            if name in plan.changes:
                change, transposed = plan.changes[name]
                pair = lora_delta.load(files, change, transposed, folder)
                norms = lora_delta.norms_of(pair, _blocks(files, source))
            bias = plan.biases.get(name)
            make = functools.partial(lora_delta.make_block, files, source, target, pair, norms, bias)
            for first, last in source.blocks():
                behind.do(make, first, last)
                done += (last - first) * target.row_bytes
                progress(done, total)
        behind.finish()
    return total


@contextlib.contextmanager
def _one_thread_each() -> Iterator[None]:
    """torch computes in the calling thread: several blocks run at once, so it needs no threads of its own."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def _blocks(files: Files, source: StoredTensor) -> Iterator[tuple[int, torch.Tensor]]:
    for first, last in source.blocks():
        yield first, files.read(source, first, last)
