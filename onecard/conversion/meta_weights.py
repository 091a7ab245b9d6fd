"""Converts the weights of a LLaMA model from one layout into the other. It runs in a child process.

Before it writes anything it checks all files, names and shapes of the source. Then it processes each tensor
in blocks of rows: it joins the pieces, reorders the rotary rows, and cuts the rows into new pieces.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from onecard.config.conversion import TO_HF, TO_META
from onecard.conversion import meta_layout, meta_tokenizer
from onecard.conversion.meta_files import PARAMS, layout_of, read_settings, weight_files
from onecard.conversion.meta_layout import Shape, Weight
from onecard.errors import CHECKPOINT, UserError
from onecard.hub.model_files import MODEL_CONFIG
from onecard.models import pth_files, tensor_files
from onecard.models.tensor_files import Behind, Files, StoredTensor
from onecard.system import sandbox

LEFT_SPACE = 4 << 30  # bytes of address space beyond the size of the largest file


@dataclasses.dataclass
class Source:
    """The model to convert. pieces: name in the original layout -> its tensor in each file.

    notes: what the user should know about the files.
    """

    layout: str
    shape: Shape
    weights: list[Weight]  # without the head when it is tied to the embedding
    pieces: dict[str, list[StoredTensor]]
    notes: list[str]

    @property
    def is_tied(self) -> bool:
        """Whether the head is the embedding."""
        return self.weights[-1].meta != "output.weight"


def look(folder: Path) -> Source:
    """Read the headers of all files of a model.

    Raises UserError with the file and the shape when a tensor is missing, unknown or of a wrong shape.
    """
    return _look_hf(folder) if layout_of(folder) == TO_HF else _look_meta(folder)


def _look_hf(folder: Path) -> Source:
    config = read_settings(folder / MODEL_CONFIG)
    shape = meta_layout.from_config(config, folder / MODEL_CONFIG)
    expected = meta_layout.weights(shape, 0)
    files = weight_files(folder)
    tensors = tensor_files.of_folder(folder)
    computed = [name for name in tensors if name.endswith("rotary_emb.inv_freq")]
    notes = _left_out(computed)
    tensors = {name: tensor for name, tensor in tensors.items() if name not in computed}
    if config.get("tie_word_embeddings") and "lm_head.weight" not in tensors:
        expected = expected[:-1]
    _check_names(tensors, {weight.hf: weight.shape for weight in expected}, files[0].parent)
    pieces = {weight.meta: [tensors[weight.hf]] for weight in expected}
    return Source(TO_HF, shape, _without_tied_head(expected, pieces, notes), pieces, notes)


def _look_meta(folder: Path) -> Source:
    files = weight_files(folder)
    tables = [pth_files.of_file(path) for path in files]
    for table, path in zip(tables, files, strict=True):
        names = tables[0].keys() ^ table.keys()
        if names:
            problem = f"{sorted(names)[0]} is in only one of the files {path} and {files[0].name}."
            fix = "All files of a model hold the same tensors; check whether they belong together."
            raise UserError(problem, fix, CHECKPOINT)
    embedding = "tok_embeddings.weight"
    if embedding not in tables[0] or len(tables[0][embedding].shape) != 2:
        problem = f"{files[0]}: the file has no {embedding} with two dimensions."
        raise UserError(problem, "Download it again.", CHECKPOINT)
    params = read_settings(folder / PARAMS)
    rows, columns = tables[0][embedding].shape
    # LLaMA 3 cuts the embedding along its tokens, LLaMA 1 and 2 along its width
    cut = 0 if len(files) > 1 and columns == params.get("dim") else 1
    shape = meta_layout.from_params(params, folder / PARAMS, rows * len(files) if cut == 0 else rows)
    expected = meta_layout.weights(shape, cut)
    computed = [name for name in tables[0] if name.endswith(meta_layout.COMPUTED)]
    notes = _left_out(computed)
    if "output.weight" not in tables[0]:
        expected = expected[:-1]
        notes.append("there is no output.weight, so the head is the embedding")
    for table, path in zip(tables, files, strict=True):
        stored = {name: tensor for name, tensor in table.items() if name not in computed}
        _check_names(stored, {weight.meta: _piece(weight, len(files), path) for weight in expected}, path)
    pieces = {weight.meta: [table[weight.meta] for table in tables] for weight in expected}
    for weight in expected:
        kinds = {piece.dtype for piece in pieces[weight.meta]}
        if len(kinds) > 1:
            problem = f"{folder}: the dtype of {weight.meta} is not the same in all files."
            raise UserError(problem, "Check whether the files belong to one model.", CHECKPOINT)
    return Source(TO_META, shape, _without_tied_head(expected, pieces, notes), pieces, notes)


def _left_out(names: list[str]) -> list[str]:
    note = f"{len(names)} tables of rotary frequencies are not copied, because they are computed"
    return [note] if names else []


def _piece(weight: Weight, count: int, path: Path) -> tuple[int, ...]:
    try:
        return meta_layout.part(weight, count)
    except UserError:
        problem = f"{path.parent}: {weight.meta} {list(weight.shape)} cannot lie in {count} equal pieces."
        fix = f"Check whether a file is missing or one too many, and whether {PARAMS} belongs to this model."
        raise UserError(problem, fix, CHECKPOINT) from None


def _check_names(tensors: dict[str, StoredTensor], expected: dict[str, tuple[int, ...]], where: Path) -> None:
    missing, unknown = sorted(expected.keys() - tensors.keys()), sorted(tensors.keys() - expected.keys())
    if missing or unknown:
        names = ", ".join((missing or unknown)[:5])
        problem = f"missing tensors: {len(missing)}, unknown tensors: {len(unknown)} ({names})"
        fix = f"Check whether its {PARAMS} or {MODEL_CONFIG} belongs to this model."
        raise UserError(f"{where}: {problem}.", fix, CHECKPOINT)
    for name, shape in expected.items():
        if tensors[name].shape != shape:
            problem = f"{name} has the shape {list(tensors[name].shape)} instead of {list(shape)}"
            files = f"its {PARAMS} or {MODEL_CONFIG} belongs to this model"
            fix = f"Check whether a file is missing or one too many, and whether {files}."
            raise UserError(f"{tensors[name].file}: {problem}.", fix, CHECKPOINT)
        if not tensors[name].dtype.is_floating_point or tensors[name].dtype.itemsize < 2:
            problem = (
                f"{name} has the dtype {tensors[name].dtype}; only 16-bit and 32-bit weights can be converted"
            )
            raise UserError(f"{tensors[name].file}: {problem}.", "Use the original weights.", CHECKPOINT)


def _without_tied_head(
    expected: list[Weight], pieces: dict[str, list[StoredTensor]], notes: list[str]
) -> list[Weight]:
    """The weights without the head when it equals the embedding bit for bit, so that the model is tied."""
    if expected[-1].meta != "output.weight":
        return expected
    embedding, head = expected[0], expected[-1]
    if pieces[embedding.meta][0].dtype != pieces[head.meta][0].dtype:
        return expected
    with Files() as files:
        for first, last in _blocks(embedding, pieces[embedding.meta], 1):
            rows = [
                _assembled(files, weight, pieces[weight.meta], first, last) for weight in (embedding, head)
            ]
            if not torch.equal(rows[0].view(torch.uint8), rows[1].view(torch.uint8)):
                return expected
    notes.append("the head equals the embedding bit for bit, so they are tied")
    return expected[:-1]


def write(
    source: Source, folder: Path, to: str, count: int, cut: int, tell: Callable[..., None], behind: Behind
) -> int:
    """Write the weights in the layout `to`; returns their number of bytes.

    count: number of files in the original layout; cut: the dimension along which its embedding is cut; tell:
    reports the bytes done; behind: writes in the background.
    """
    copied = {"output.weight": "tok_embeddings.weight"} if to != TO_HF and source.is_tied else {}
    expected = source.weights if to == TO_HF else meta_layout.weights(source.shape, cut)
    placed = (
        _create_hf(source, folder) if to == TO_HF else _create_meta(source, folder, expected, copied, count)
    )
    weights_of_source = {weight.meta: weight for weight in source.weights}
    reorder = None
    if source.layout != to:
        reorder = meta_layout.to_halves if to == TO_HF else meta_layout.to_pairs
    done = 0
    with Files() as files:
        for weight in expected:
            source_weight = weights_of_source[copied.get(weight.meta, weight.meta)]
            pieces, targets = source.pieces[source_weight.meta], placed[weight.meta]
            multiple = source.shape.head_dim if weight.rotary else 1
            for first, last in _blocks(source_weight, pieces, multiple):
                rows = _assembled(files, source_weight, pieces, first, last)
                if reorder and weight.rotary:
                    rows = reorder(rows, source.shape.head_dim)
                _scatter(behind, weight, targets, first, rows)
                done += rows.nbytes
                tell(done=done)
    behind.finish()
    return done


def _blocks(weight: Weight, pieces: list[StoredTensor], multiple: int) -> Any:
    whole = dataclasses.replace(pieces[0], shape=weight.shape)
    return whole.blocks(multiple)


def _assembled(
    files: Files, weight: Weight, pieces: list[StoredTensor], first: int, last: int
) -> torch.Tensor:
    """Rows first..last (exclusive) of a whole tensor that lies in pieces."""
    if weight.cut is None or len(pieces) == 1:
        return files.read(pieces[0], first, last)
    if weight.cut == 1:
        return torch.cat([files.read(piece, first, last) for piece in pieces], dim=1)
    rows, filled = torch.empty(last - first, *weight.shape[1:], dtype=pieces[0].dtype), 0
    for n, a, b in _spans(pieces, first, last):
        files.read_into(pieces[n], a, rows[filled : filled + b - a])
        filled += b - a
    return rows


def _scatter(
    files: Behind, weight: Weight, pieces: list[StoredTensor], first: int, rows: torch.Tensor
) -> None:
    """Write whole rows into the pieces of a tensor; a tensor that is not cut goes into every piece."""
    if weight.cut is None or len(pieces) == 1:
        for piece in pieces:
            files.write(piece, first, rows)
    elif weight.cut == 1:
        for piece, columns in zip(pieces, rows.chunk(len(pieces), dim=1), strict=True):
            files.write(piece, first, columns)
    else:
        done = 0
        for n, a, b in _spans(pieces, first, first + len(rows)):
            files.write(pieces[n], a, rows[done : done + b - a])
            done += b - a


def _spans(pieces: list[StoredTensor], first: int, last: int) -> list[tuple[int, int, int]]:
    """Where rows first..last of a tensor lie that is cut along its rows: (piece, its first row, its last).

    Each last row is exclusive.
    """
    height = pieces[0].rows
    return [
        (n, max(first - n * height, 0), min(last - n * height, height))
        for n in range(first // height, (last - 1) // height + 1)
    ]


def _create_hf(source: Source, folder: Path) -> dict[str, list[StoredTensor]]:
    tensors = [
        StoredTensor(weight.hf, source.pieces[weight.meta][0].dtype, weight.shape)
        for weight in source.weights
    ]
    files = tensor_files.divide(tensors)
    placed = tensor_files.create(folder, dict(zip(tensor_files.names_of(len(files)), files, strict=True)))
    return {weight.meta: [placed[weight.hf]] for weight in source.weights}


def _create_meta(
    source: Source, folder: Path, expected: list[Weight], copied: dict[str, str], count: int
) -> dict[str, list[StoredTensor]]:
    tensors = [
        StoredTensor(w.meta, source.pieces[copied.get(w.meta, w.meta)][0].dtype, meta_layout.part(w, count))
        for w in expected
    ]
    placed = [pth_files.create_file(folder / f"consolidated.{n:02d}.pth", tensors) for n in range(count)]
    return {weight.meta: [table[weight.meta] for table in placed] for weight in expected}


def work(request: dict[str, Any], tell: Callable[..., None]) -> None:
    """The work of the child process: check the source, report what it is, write the weights."""
    with Files() as files, Behind(files) as behind:
        _limit(request)
        folder, to, count = Path(request["source"]), request["to"], request["num_shards"] or 1
        source = look(folder)
        meta_layout.check_shards(source.shape, count)
        path = meta_tokenizer.find(folder, beside=source.layout != TO_HF)
        meta_tokenizer.check_size(path, source.shape.vocab)
        kind = meta_tokenizer.kind(path)
        cut = _embedding_cut(source, kind)
        tell(
            notes=source.notes,
            shape=dataclasses.asdict(source.shape),
            tied=source.is_tied,
            cut=cut,
            size=_size(source, to),
            length_is_said=source.layout == TO_HF or "max_seq_len" in read_settings(folder / PARAMS),
            tokenizer=str(path),
            kind=kind,
            dtype=str(source.pieces["tok_embeddings.weight"][0].dtype).removeprefix("torch."),
        )
        written = write(source, Path(request["folder"]), to, count, cut, tell, behind)
        tell(written=written)


def _embedding_cut(source: Source, kind: str) -> int:
    """The dimension along which the embedding is cut: that of the source, if its embedding is cut.

    Otherwise it is that of the model's generation, which the kind of the tokenizer shows.
    """
    if len(source.pieces["tok_embeddings.weight"]) > 1:
        return source.weights[0].cut
    return 0 if kind == meta_tokenizer.RANKS else 1


def _size(source: Source, to: str) -> int:
    """The number of bytes that will be written."""
    sizes = {weight.meta: sum(p.size for p in source.pieces[weight.meta]) for weight in source.weights}
    twice = sizes["tok_embeddings.weight"] if to != TO_HF and source.is_tied else 0
    return sum(sizes.values()) + twice


def _limit(request: dict[str, Any]) -> None:
    """Forbid further processes, and more address space than the largest file needs, for hostile files."""
    if request.get("limit"):
        import resource

        torch.set_num_threads(1)
        sandbox.limit(resource.RLIMIT_NPROC, 0)
        sandbox.limit(resource.RLIMIT_AS, request["limit"] + LEFT_SPACE)


if __name__ == "__main__":
    sandbox.serve(work)
