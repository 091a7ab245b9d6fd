"""Published texts as calibration rows: random windows of them, read from files in the published layouts."""

import gzip
import json
from pathlib import Path

import pyarrow
import pytest
from huggingface_hub import constants
from pyarrow import parquet

from onecard.config.conversion import C4, OWN_ROWS, PTB, PUBLISHED, WIKITEXT2, QuantizeConfig
from onecard.config.options import build
from onecard.conversion import calibration, gptq_awq, quantize
from onecard.errors import DATA, USAGE, UserError
from onecard.hub import locate
from onecard.models import tokenizer as models_tokenizer
from onecard.system import files as system_files
from onecard.system import output_folder
from tests.support import tiny
from tests.support.fake_hub import COMMIT

LINES = [
    "",
    " = Lighthouses = \n",
    "",
    *(f" The keeper of tower {n} writes a letter . \n" for n in range(60)),
]
DOCUMENTS = [f"Document {n}: " + "the tower stands by the sea and waits. " * (n % 5) for n in range(50)]
SENTENCES = [f"the <unk> of tower N sends letter {n} to the coast" for n in range(60)]


def wiki(folder: Path) -> Path:
    """The dataset as the hub has it: one folder for each of its configurations."""
    for name, lines in (("wikitext-103-raw-v1", ["wrong"] * 9), ("wikitext-2-raw-v1", LINES)):
        (folder / name).mkdir(parents=True)
        table = pyarrow.table({"text": lines})
        parquet.write_table(table, folder / name / "train-00000-of-00001.parquet")
    return folder


def c4(folder: Path) -> Path:
    (folder / "en").mkdir(parents=True)
    with gzip.open(folder / "en" / "c4-train.00000-of-01024.json.gz", "wt", encoding="utf-8") as file:
        for text in DOCUMENTS:
            file.write(
                json.dumps({"text": text, "timestamp": "2019-04-25", "url": "https://a.example"}) + "\n"
            )
    return folder


def ptb(folder: Path) -> Path:
    folder.mkdir(parents=True)
    text = "".join(f" {sentence} \n" for sentence in SENTENCES)
    (folder / "ptb.train.txt").write_text(text, encoding="utf-8")
    return folder


MAKE = {WIKITEXT2: wiki, C4: c4, PTB: ptb}
WHOLE = {  # the texts in which every window lies
    WIKITEXT2: ["\n\n".join(LINES)],
    C4: DOCUMENTS,
    PTB: [" ".join(SENTENCES)],
}


@pytest.fixture(scope="module")
def source(tmp_path_factory) -> Path:
    return tiny.save_model(tmp_path_factory.mktemp("calibration") / "model")


@pytest.fixture(scope="module")
def tokenizer(source):
    return models_tokenizer.load_tokenizer(str(source))


@pytest.mark.parametrize("name", PUBLISHED)
def test_rows_are_windows_of_the_text(name, tokenizer, tmp_path):
    """The seed decides which; every window has the length that was named and no BOS token."""
    file = calibration.file_of(name, str(MAKE[name](tmp_path / "data")))
    rows, others = ([*calibration.windows(name, file, tokenizer, 24, 6, seed)] for seed in (1, 2))
    texts = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in WHOLE[name]]
    assert [len(row) for row in [*rows, *others]] == [24] * 12
    for row in [*rows, *others]:
        assert any(row == ids[at : at + 24] for ids in texts for at in range(len(ids) - 24))
    assert rows == calibration.windows(name, file, tokenizer, 24, 6, 1)
    assert rows != others
    assert len({tuple(row) for row in rows}) > 1


def test_of_c4_only_documents_that_are_long_enough_are_used(tokenizer, tmp_path):
    """Each of them once, so there may be fewer rows."""
    file = calibration.file_of(C4, str(c4(tmp_path / "data")))
    lengths = [len(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in DOCUMENTS]
    length = sorted(lengths)[-10] - 1  # a fifth of the documents are longer
    rows = calibration.windows(C4, file, tokenizer, length, 20, 0)
    assert 0 < len(rows) == sum(each > length for each in lengths) < 20


def test_the_raw_file_gives_what_the_parquet_file_gives(tokenizer, tmp_path):
    raw = tmp_path / "wikitext-2-raw" / "wiki.train.raw"
    raw.parent.mkdir()
    raw.write_text("".join(line or " \n" for line in LINES), encoding="utf-8")
    places = (raw, raw.parent, tmp_path, wiki(tmp_path / "hub"), tmp_path / "hub" / "wikitext-2-raw-v1")
    files = [calibration.file_of(WIKITEXT2, str(place)) for place in places]
    rows = [calibration.windows(WIKITEXT2, file, tokenizer, 24, 4, 3) for file in files]
    assert all(each == rows[0] for each in rows)


def test_the_parquet_file_of_the_treebank(tokenizer, tmp_path):
    """The hub keeps the Penn Treebank as a Parquet file with a sentence in each row."""
    place = tmp_path / "penn_treebank" / "train"
    place.mkdir(parents=True)
    parquet.write_table(pyarrow.table({"sentence": SENTENCES}), place / "0000.parquet")
    files = [calibration.file_of(PTB, str(folder)) for folder in (tmp_path, ptb(tmp_path / "plain"))]
    rows = [calibration.windows(PTB, file, tokenizer, 24, 4, 3) for file in files]
    assert rows[0] == rows[1]


def refused(name: str, path: Path, tokenizer, length: int = 24) -> str:
    with pytest.raises(UserError) as caught:
        calibration.windows(name, calibration.file_of(name, str(path)), tokenizer, length, 4, 0)
    assert caught.value.code == DATA
    return str(caught.value)


def test_what_is_not_the_text_is_refused(tokenizer, tmp_path):
    """The message names the file, what is wrong, and which files are expected."""
    (tmp_path / "empty").mkdir()
    for name, expected in ((WIKITEXT2, "wiki.train.raw"), (C4, "c4-train."), (PTB, "ptb.train.txt")):
        assert expected in refused(name, tmp_path / "empty", tokenizer)
        assert "no such file or folder" in refused(name, tmp_path / "missing", tokenizer)
    cut = tmp_path / "c4-train.00000-of-01024.json.gz"
    cut.write_bytes((c4(tmp_path / "data") / "en" / cut.name).read_bytes()[:-40])
    assert f"{cut}: cannot be read as a text of C4" in refused(C4, cut, tokenizer)
    cut.write_bytes(gzip.compress(b'{"text": "a"}\n{"texts": 1}\n'))
    assert f"{cut}:2: there is no 'text'" in refused(C4, cut, tokenizer)
    content = bytearray(gzip.compress(b'{"text": "a"}\n' * 999))
    content[10] ^= 0xFF  # the first byte after the header
    for damage in (bytes(content), gzip.compress(b"[" * 100_000), b"no gzip", gzip.compress(b"\xff\n")):
        cut.write_bytes(damage)
        assert f"{cut}: cannot be read as a text of C4" in refused(C4, cut, tokenizer)
    damaged = tmp_path / "train.parquet"
    damaged.write_bytes(b"PAR1 and nothing more")
    assert str(damaged) in refused(WIKITEXT2, damaged, tokenizer)
    assert "--cutoff_len" in refused(PTB, ptb(tmp_path / "ptb"), tokenizer, length=100_000)
    assert "none of the documents is longer" in refused(C4, tmp_path / "data", tokenizer, length=100_000)


@pytest.mark.parametrize("name", PUBLISHED)
def test_without_a_path_the_text_comes_from_the_hub(name, tmp_path, monkeypatch):
    """Only the files of the training text are fetched."""
    fetched = []

    def fetch_text(repository: str, pattern: str, fix: str) -> str:
        fetched.append((repository, pattern))
        return str(MAKE[name](tmp_path / "snapshot"))

    monkeypatch.setattr(locate, "fetch_text", fetch_text)
    file = calibration.file_of(name, None)
    assert tmp_path / "snapshot" in file.parents
    ((repository, pattern),) = fetched
    assert repository.count("/") >= 1
    assert name == PTB or file.match(pattern)


@pytest.fixture
def hub_cache(tmp_path, monkeypatch) -> Path:
    """The cache of the hub's client, which is empty; the tests are offline."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    return tmp_path / "hub"


def snapshot(hub_cache: Path, repository: str, branch: str) -> Path:
    """Where the cache of the hub's client keeps the files of a dataset that was fetched."""
    place = hub_cache / f"datasets--{repository.replace('/', '--')}"
    reference = place / "refs" / branch
    reference.parent.mkdir(parents=True)
    reference.write_text(COMMIT, encoding="utf-8")
    return place / "snapshots" / COMMIT


def test_offline_the_cache_of_the_hub_is_used(hub_cache, tokenizer):
    wiki(snapshot(hub_cache, "Salesforce/wikitext", "main"))
    c4(snapshot(hub_cache, "allenai/c4", "main"))
    treebank = snapshot(hub_cache, "ptb-text-only/ptb_text_only", "refs/convert/parquet")
    (treebank / "penn_treebank" / "train").mkdir(parents=True)
    table = pyarrow.table({"sentence": SENTENCES})
    parquet.write_table(table, treebank / "penn_treebank" / "train" / "0000.parquet")
    for name in PUBLISHED:
        file = calibration.file_of(name, None)
        assert COMMIT in file.parts
        assert calibration.windows(name, file, tokenizer, 24, 2, 0)


def test_offline_the_message_names_the_option(hub_cache):
    """This holds without a cache, and with one that has other files of the dataset."""
    for name in PUBLISHED:
        with pytest.raises(UserError) as caught:
            calibration.file_of(name, None)
        assert caught.value.code == USAGE
        assert "--calibration_path" in str(caught.value)
        assert calibration.CORPORA[name].repository in str(caught.value)
    other = wiki(snapshot(hub_cache, "Salesforce/wikitext", "main"))
    (other / "wikitext-2-raw-v1" / "train-00000-of-00001.parquet").unlink()
    with pytest.raises(UserError, match=r"no training text of WikiText-2.*--calibration_path"):
        calibration.file_of(WIKITEXT2, None)


def options(source: Path, tmp_path: Path, **changes) -> QuantizeConfig:
    values = {"model_path": str(source), "output_path": str(tmp_path / "out"), "device": "cpu"}
    values |= {"rows": 5, "cutoff_len": 32, "report_rows": 4}
    return build(QuantizeConfig, {**values, **changes})


@pytest.fixture
def without_library(monkeypatch) -> list[list[list[int]]]:
    """Quantising without gptqmodel: the folder is a copy of the model; collects the calibration rows."""
    calls = []

    def copy(source, folder, options, group, calibration_rows, device):
        calls.append(calibration_rows)
        for path in source.iterdir():
            (folder / path.name).write_bytes(path.read_bytes())
        return []

    monkeypatch.setattr(gptq_awq, "write", copy)
    monkeypatch.setattr(quantize.quantized, "require", lambda _: None)
    return calls


def test_a_model_is_calibrated_on_the_text(source, tokenizer, tmp_path, without_library, capsys):
    """It is said, the folder records the text, and another text asks for another folder."""
    place = ptb(tmp_path / "ptb")
    own_rows = str(tiny.save_rows(tmp_path / "rows.json", 24))
    text = {"calibration": PTB, "calibration_path": str(place)}
    settings = options(source, tmp_path, **text, data_path=own_rows, cutoff_len=200)
    quantize.run(settings)
    (rows,) = without_library
    assert rows == calibration.windows(PTB, place / "ptb.train.txt", tokenizer, 200, 5, settings.seed)
    said = capsys.readouterr().out
    assert "5 windows of 200 tokens of Penn Treebank" in said
    assert f"on 4 rows of {own_rows}" in said
    figures = system_files.read_json(tmp_path / "out" / quantize.FIGURES, "")
    assert (figures["calibration"], figures["calibration_rows"]) == (PTB, 5)
    record = system_files.read_json(tmp_path / "out" / output_folder.RECORD, "")
    assert record["settings"]["calibration"] == PTB
    assert str(place / "ptb.train.txt") in record["from"]
    assert not any(path.endswith("rows.json") for path in record["from"])
    quantize.run(settings)
    assert "nothing to do" in capsys.readouterr().out
    other = {"calibration": WIKITEXT2, "calibration_path": str(wiki(tmp_path / "wiki"))}
    with pytest.raises(UserError, match="is there already"):
        quantize.run(options(source, tmp_path, **other))


def test_without_a_report_no_rows_are_read(source, tmp_path, without_library):
    text = {"calibration": PTB, "calibration_path": str(ptb(tmp_path / "ptb"))}
    quantize.run(options(source, tmp_path, **text, data_path="none.json", report_rows=0))
    assert [len(row) for row in without_library[0]] == [32] * 5


def test_folders_of_earlier_versions_are_recognised(source, tmp_path):
    """They record no name of a text, because there were only rows."""
    assert "calibration" not in quantize._settings(options(source, tmp_path), 32)
    assert quantize._settings(options(source, tmp_path, calibration=C4), 32)["calibration"] == C4


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"calibration_path": "x"}, "--calibration_path is for --calibration wikitext2, c4 or ptb"),
        ({"calibration": OWN_ROWS, "calibration_path": "x"}, "--calibration_path is for --calibration"),
        ({"method": "bnb", "bits": 4, "calibration": C4}, "--calibration is for --method gptq or awq"),
    ],
)
def test_options_without_effect_are_refused(source, tmp_path, changes, words):
    settings = {name: value for name, value in changes.items() if name != "rows"}
    values = {"model_path": str(source), "output_path": str(tmp_path / "out"), "device": "cpu"}
    with pytest.raises(UserError, match=words):
        quantize.run(build(QuantizeConfig, {**values, **settings}))


def test_an_unknown_text_is_refused(source, tmp_path):
    with pytest.raises(UserError, match="--calibration"):
        options(source, tmp_path, calibration="pile")
