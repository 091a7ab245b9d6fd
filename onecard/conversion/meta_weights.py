"""A LLaMA's weights from one layout into the other, block by block. Runs in a child process.

Sources are looked at whole before anything is written: every file, name and shape. Then each tensor goes by
in blocks of rows: pieces put together, rotary rows brought into order, cut again.
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from onecard.conversion import meta_layout, meta_tokenizer
from onecard.conversion.meta_layout import (
    PARAMS,
    TO_HF,
    TO_META,
    Shape,
    Weight,
    layout_of,
    read_json,
    weight_files,
)
from onecard.errors import CHECKPOINT, UserError
from onecard.hub.model_files import MODEL_CONFIG
from onecard.models import pth_files, tensor_files
from onecard.models.tensor_files import Behind, Files, StoredTensor
from onecard.system import sandbox

LEFT_SPACE = 4 << 30  # bytes of address space beyond the largest file


@dataclasses.dataclass
class Source:
    """A model as it lies there. pieces: name in the original layout -> its tensor in each file."""

    layout: str
    shape: Shape
    weights: list[Weight]  # without the head when it is the embedding
    pieces: dict[str, list[StoredTensor]]
    said: list[str]

    @property
    def is_tied(self) -> bool:
        return self.weights[-1].meta != "output.weight"


def look(folder: Path) -> Source:
    """Read every header; raises UserError naming file and shape when something is missing or does not fit."""
    return _look_hf(folder) if layout_of(folder) == TO_HF else _look_meta(folder)


def _look_hf(folder: Path) -> Source:
    config = read_json(folder / MODEL_CONFIG)
    shape = meta_layout.from_config(config, folder / MODEL_CONFIG)
    wanted = meta_layout.weights(shape, 0)
    files = weight_files(folder)
    found = tensor_files.of_folder(folder)
    computed = [name for name in found if name.endswith("rotary_emb.inv_freq")]
    said = _left_out(computed)
    found = {name: tensor for name, tensor in found.items() if name not in computed}
    if config.get("tie_word_embeddings") and "lm_head.weight" not in found:
        wanted = wanted[:-1]
    _check_names(found, {weight.hf: weight.shape for weight in wanted}, files[0].parent)
    pieces = {weight.meta: [found[weight.hf]] for weight in wanted}
    return Source(TO_HF, shape, _untwinned(wanted, pieces, said), pieces, said)


def _look_meta(folder: Path) -> Source:
    files = weight_files(folder)
    tables = [pth_files.of_file(path) for path in files]
    for table, path in zip(tables, files, strict=True):
        names = tables[0].keys() ^ table.keys()
        if names:
            problem = f"{path}: {sorted(names)[0]} is not in both this file and {files[0].name}."
            raise UserError(problem, "Shards of one model have the same tensors.", CHECKPOINT)
    embedding = "tok_embeddings.weight"
    if embedding not in tables[0] or len(tables[0][embedding].shape) != 2:
        raise UserError(f"{files[0]}: has no {embedding} with two dimensions.", "Fetch it again.", CHECKPOINT)
    params = read_json(folder / PARAMS)
    rows, columns = tables[0][embedding].shape
    # LLaMA 3 cuts the embedding along its tokens, LLaMA 1 and 2 along its width
    cut = 0 if len(files) > 1 and columns == params.get("dim") else 1
    shape = meta_layout.from_params(params, folder / PARAMS, rows * len(files) if cut == 0 else rows)
    wanted = meta_layout.weights(shape, cut)
    computed = [name for name in tables[0] if name.endswith(meta_layout.COMPUTED)]
    said = _left_out(computed)
    if "output.weight" not in tables[0]:
        wanted = wanted[:-1]
        said.append("no output.weight: the head is the embedding")
    for table, path in zip(tables, files, strict=True):
        kept = {name: tensor for name, tensor in table.items() if name not in computed}
        _check_names(kept, {weight.meta: _piece(weight, len(files), path) for weight in wanted}, path)
    pieces = {weight.meta: [table[weight.meta] for table in tables] for weight in wanted}
    for weight in wanted:
        kinds = {piece.dtype for piece in pieces[weight.meta]}
        if len(kinds) > 1:
            raise UserError(f"{folder}: {weight.meta} has another dtype in each shard.", "", CHECKPOINT)
    return Source(TO_META, shape, _untwinned(wanted, pieces, said), pieces, said)


def _left_out(names: list[str]) -> list[str]:
    return [f"{len(names)} tables of rotary frequencies are left out: they are computed"] if names else []


def _piece(weight: Weight, count: int, path: Path) -> tuple[int, ...]:
    try:
        return meta_layout.part(weight, count)
    except UserError:
        problem = f"{path.parent}: {weight.meta} {list(weight.shape)} cannot lie in {count} shards."
        raise UserError(
            problem, f"Is a file missing, or one too many, or {PARAMS} another's?", CHECKPOINT
        ) from None


def _check_names(found: dict[str, StoredTensor], wanted: dict[str, tuple[int, ...]], where: Path) -> None:
    missing, unknown = sorted(wanted.keys() - found.keys()), sorted(found.keys() - wanted.keys())
    if missing or unknown:
        names = ", ".join((missing or unknown)[:5])
        problem = f"{len(missing)} tensors missing, {len(unknown)} unknown ({names})"
        raise UserError(
            f"{where}: {problem}.", f"Is its {PARAMS} or {MODEL_CONFIG} another model's?", CHECKPOINT
        )
    for name, shape in wanted.items():
        if found[name].shape != shape:
            problem = f"{name} is {list(found[name].shape)}, and should be {list(shape)}"
            fix = f"Is a shard missing, or one too many, or its {PARAMS} or {MODEL_CONFIG} another model's?"
            raise UserError(f"{found[name].file}: {problem}.", fix, CHECKPOINT)
        if not found[name].dtype.is_floating_point or found[name].dtype.itemsize < 2:
            problem = f"{name} is {found[name].dtype}, no 16 or 32 bit weights"
            raise UserError(f"{found[name].file}: {problem}.", "Convert the original weights.", CHECKPOINT)


def _untwinned(wanted: list[Weight], pieces: dict[str, list[StoredTensor]], said: list[str]) -> list[Weight]:
    """Without the head when it is the embedding once more, bit for bit: then the model is tied."""
    if wanted[-1].meta != "output.weight":
        return wanted
    one, other = wanted[0], wanted[-1]
    if pieces[one.meta][0].dtype != pieces[other.meta][0].dtype:
        return wanted
    with Files() as files:
        for first, last in _blocks(one, pieces[one.meta], 1):
            rows = [_assembled(files, weight, pieces[weight.meta], first, last) for weight in (one, other)]
            if not torch.equal(rows[0].view(torch.uint8), rows[1].view(torch.uint8)):
                return wanted
    said.append("the head is the embedding bit for bit: they are tied")
    return wanted[:-1]


def write(
    source: Source, folder: Path, to: str, count: int, cut: int, tell: Callable[..., None], behind: Behind
) -> int:
    """Write the weights in a layout, in `count` shards of the original one; returns their bytes.

    cut: the dimension along which the embedding is cut.
    """
    copied = {"output.weight": "tok_embeddings.weight"} if to != TO_HF and source.is_tied else {}
    wanted = source.weights if to == TO_HF else meta_layout.weights(source.shape, cut)
    place = _create_hf(source, folder) if to == TO_HF else _create_meta(source, folder, wanted, copied, count)
    known = {weight.meta: weight for weight in source.weights}
    turn = None
    if source.layout != to:
        turn = meta_layout.to_halves if to == TO_HF else meta_layout.to_pairs
    done = 0
    with Files() as files:
        for weight in wanted:
            came = known[copied.get(weight.meta, weight.meta)]
            pieces, targets = source.pieces[came.meta], place[weight.meta]
            multiple = source.shape.head_dim if weight.rotary else 1
            for first, last in _blocks(came, pieces, multiple):
                rows = _assembled(files, came, pieces, first, last)
                if turn and weight.rotary:
                    rows = turn(rows, source.shape.head_dim)
                _scatter(behind, weight, targets, first, rows)
                done += rows.nbytes
                tell(done=done)
    behind.sync()
    return done


def _blocks(weight: Weight, pieces: list[StoredTensor], multiple: int) -> Any:
    whole = dataclasses.replace(pieces[0], shape=weight.shape)
    return whole.blocks(multiple)


def _assembled(
    files: Files, weight: Weight, pieces: list[StoredTensor], first: int, last: int
) -> torch.Tensor:
    """Rows first..last of a whole tensor that lies in pieces."""
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
    """Put whole rows into the pieces of a tensor; what is not cut goes into each."""
    if weight.cut is None or len(pieces) == 1:
        for piece in pieces:
            files.write(piece, first, rows)
    elif weight.cut == 1:
        for piece, columns in zip(pieces, rows.chunk(len(pieces), dim=1), strict=True):
            files.write(piece, first, columns)
    else:
        behind = 0
        for n, a, b in _spans(pieces, first, first + len(rows)):
            files.write(pieces[n], a, rows[behind : behind + b - a])
            behind += b - a


def _spans(pieces: list[StoredTensor], first: int, last: int) -> list[tuple[int, int, int]]:
    """Rows first..last of pieces that lie behind each other: (piece, its first row, behind its last)."""
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
    source: Source, folder: Path, wanted: list[Weight], copied: dict[str, str], count: int
) -> dict[str, list[StoredTensor]]:
    tensors = [
        StoredTensor(w.meta, source.pieces[copied.get(w.meta, w.meta)][0].dtype, meta_layout.part(w, count))
        for w in wanted
    ]
    placed = [pth_files.create_file(folder / f"consolidated.{n:02d}.pth", tensors) for n in range(count)]
    return {weight.meta: [table[weight.meta] for table in placed] for weight in wanted}


def work(request: dict[str, Any], tell: Callable[..., None]) -> None:
    """What the child does: look at everything, tell what was found, write the weights."""
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
            said=source.said,
            shape=dataclasses.asdict(source.shape),
            tied=source.is_tied,
            cut=cut,
            size=_size(source, to),
            length_is_said=source.layout == TO_HF or "max_seq_len" in read_json(folder / PARAMS),
            tokenizer=str(path),
            kind=kind,
            dtype=str(source.pieces["tok_embeddings.weight"][0].dtype).removeprefix("torch."),
        )
        written = write(source, Path(request["folder"]), to, count, cut, tell, behind)
        tell(written=written)


def _embedding_cut(source: Source, kind: str) -> int:
    """As it was; of one that was not cut, as the model's generation has it, which its tokenizer tells."""
    if len(source.pieces["tok_embeddings.weight"]) > 1:
        return source.weights[0].cut
    return 0 if kind == meta_tokenizer.RANKS else 1


def _size(source: Source, to: str) -> int:
    """Bytes that will go by."""
    sizes = {weight.meta: sum(p.size for p in source.pieces[weight.meta]) for weight in source.weights}
    twice = sizes["tok_embeddings.weight"] if to != TO_HF and source.is_tied else 0
    return sum(sizes.values()) + twice


def _limit(request: dict[str, Any]) -> None:
    """A hostile file gets no other process and no more address space than the largest file needs."""
    if request.get("limit"):
        import resource

        torch.set_num_threads(1)
        sandbox.limit(resource.RLIMIT_NPROC, 0)
        sandbox.limit(resource.RLIMIT_AS, request["limit"] + LEFT_SPACE)


if __name__ == "__main__":
    sandbox.serve(work)
