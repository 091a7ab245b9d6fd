"""--remote_code: code of a model runs only if its commit was typed and it is that commit's, unchanged.

Every Python file of the model here writes its name into a canary when it is imported.
"""

import contextlib
import io
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from onecard.config import conversion as config_conversion
from onecard.config import declaration
from onecard.config import options as config_options
from onecard.config import tools as config_tools
from onecard.config.chat import ChatConfig, CpuConfig
from onecard.config.conversion import ExportConfig, MergeConfig, QuantizeConfig
from onecard.config.declaration import Place
from onecard.config.generation import Generation
from onecard.config.tools import DownloadConfig, PerplexityConfig
from onecard.config.training import ContinueConfig, FinetuneConfig
from onecard.conversion import export_gguf, merge
from onecard.errors import CHECKPOINT, UNSAFE, USAGE, UserError
from onecard.hub import listing as hub_listing
from onecard.hub import manifest, remote_code, transfer
from onecard.inference import chat, loader, resolve
from onecard.models import base_model
from onecard.models import tokenizer as models_tokenizer
from onecard.runs import adapters as runs_adapters
from onecard.runs import folder as runs_folder
from onecard.training import loop, resume, run_options
from onecard.training.starting_point import StartingPoint
from tests.support import bad_hub
from tests.support.bad_hub import NAME, download
from tests.support.paths import ROOT

COMMIT, OTHER = bad_hub.commit(1), bad_hub.commit(2)
CANARY = """import os
with open(os.environ["CANARY"], "a") as file:
    file.write(__name__.rpartition(".")[2] + "\\n")
"""
CODE = {
    "configuration_odd.py": """from transformers import LlamaConfig
class OddConfig(LlamaConfig):
    model_type = "odd"
""",
    "modeling_odd.py": """from transformers import LlamaForCausalLM
from .configuration_odd import OddConfig
from .parts import scaled
class OddModel(LlamaForCausalLM):
    config_class = OddConfig
    def forward(self, *args, **kwargs):
        made = super().forward(*args, **kwargs)
        made.logits = None if made.logits is None else scaled(made.logits)
        return made
""",
    "parts.py": "def scaled(x):\n    return x * 1.0\n",
    "tokenizer.py": """from transformers import PreTrainedTokenizerFast
class OddTokenizer(PreTrainedTokenizerFast):
    pass
""",
}
AUTO = {"AutoConfig": "configuration_odd.OddConfig", "AutoModelForCausalLM": "modeling_odd.OddModel"}
TOKENIZER = {"AutoTokenizer": [None, "tokenizer.OddTokenizer"]}


@pytest.fixture(autouse=True)
def apart(monkeypatch, tmp_path):
    """Each test has its own caches, canary and copies of code; the network is allowed."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)
    monkeypatch.setattr("huggingface_hub.constants.HF_TOKEN_PATH", str(tmp_path / "no-token"))
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setenv("CANARY", str(tmp_path / "canary"))


def canary(folder: Path) -> set[str]:
    """Return the names of the files that were imported."""
    path = folder / "canary"
    return set(path.read_text().split()) if path.exists() else set()


@pytest.fixture(scope="module")
def files(tiny_model) -> dict[str, bytes]:
    """The files of the tiny model, changed into a stranger's model of a type of its own."""
    contents = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    settings = json.loads(contents["config.json"]) | {"auto_map": AUTO, "model_type": "odd"}
    words = json.loads(contents["tokenizer_config.json"]) | {"auto_map": TOKENIZER}
    words["tokenizer_class"] = "OddTokenizer"
    contents["config.json"] = json.dumps(settings).encode()
    contents["tokenizer_config.json"] = json.dumps(words).encode()
    contents |= {name: (CANARY + text).encode() for name, text in CODE.items()}
    return contents | {"custom_generate/generate.py": CANARY.encode(), "run.sh": b"touch canary"}


@pytest.fixture
def served(files):
    """A hub with the model at two commits."""
    hub = bad_hub.Hub({COMMIT: dict(files), OTHER: dict(files)}, COMMIT)
    with bad_hub.serving(hub):
        yield hub


@pytest.fixture
def fetched(served, tmp_path) -> Path:
    """A folder with the model and its code, as tools/download.py writes it."""
    download(served, tmp_path / "m", remote_code=COMMIT)
    return tmp_path / "m"


def refusal(folder: Path | str, commit: str, code: int = UNSAFE) -> str:
    """Return the reason for refusing the code, which comes before any line about running it."""
    output = io.StringIO()
    with pytest.raises(UserError) as caught, contextlib.redirect_stdout(output):
        remote_code.verify_commit(str(folder), commit)
    assert not output.getvalue()
    assert caught.value.code == code
    return str(caught.value)


def program(*words: object, lines: str = "") -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        input=lines,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )


# fetching


def test_code_is_fetched_when_its_commit_is_named(served, tmp_path):
    """Only Python files of the top folder are fetched; they are recorded, and none is run."""
    lines = download(served, tmp_path / "m", remote_code=COMMIT)
    names = {path.relative_to(tmp_path / "m").as_posix() for path in (tmp_path / "m").rglob("*")}
    assert set(CODE) <= names
    assert not {"custom_generate/generate.py", "run.sh"} & names
    stored = manifest.read(tmp_path / "m")
    assert stored["commit"] == COMMIT
    assert set(CODE) <= set(stored["files"])
    assert any("modeling_odd.py" in line and "Read it" in line for line in lines)
    assert any(f"--remote_code {COMMIT}" in line for line in lines)
    assert not canary(tmp_path)


def test_code_from_elsewhere_is_told_when_it_is_fetched(served, tmp_path):
    auto = {"auto_map": {"AutoConfig": "other/repo--configuration_odd.OddConfig"}}
    served.commits[COMMIT]["config.json"] = json.dumps(auto).encode()
    lines = download(served, tmp_path / "m", remote_code=COMMIT)
    assert any("from elsewhere" in line and "other/repo" in line for line in lines)
    assert not any("To run it" in line for line in lines)


def test_without_the_option_no_code_comes_and_what_came_stays(served, tmp_path):
    lines = download(served, tmp_path / "m")
    assert not list((tmp_path / "m").rglob("*.py"))
    assert any("--remote_code COMMIT" in line for line in lines)
    download(served, tmp_path / "m", remote_code=COMMIT)
    download(served, tmp_path / "m")
    assert remote_code.verified(tmp_path / "m", COMMIT) == sorted(CODE)


def test_another_commit_takes_the_code_of_the_first_away(served, fetched):
    """A file that only the first commit has is removed, and consent to that commit is void."""
    served.commits[OTHER].pop("parts.py")
    download(served, fetched, remote_code=OTHER)
    assert not (fetched / "parts.py").exists()
    assert OTHER in refusal(fetched, COMMIT)


def test_no_network_is_no_way_around(served, tmp_path):
    """A complete folder without code does not pass for the one that was requested."""
    download(served, tmp_path / "m")
    unreachable = {"endpoint": "http://127.0.0.1:9"}
    with pytest.raises(UserError, match="cannot be reached"):
        download(served, tmp_path / "m", remote_code=COMMIT, **unreachable)
    download(served, tmp_path / "m", remote_code=COMMIT)
    assert any(
        "is whole" in line for line in download(served, tmp_path / "m", remote_code=COMMIT, **unreachable)
    )


@pytest.mark.parametrize(
    "options",
    [{"source": "modelscope"}, {"model_path": "demo"}, {"revision": "main"}, {"revision": OTHER}],
    ids=str,
)
def test_what_has_no_commit_or_two_is_refused(served, tmp_path, options):
    with pytest.raises(UserError, match="--remote_code") as caught:
        download(served, tmp_path / "m", remote_code=COMMIT, **options)
    assert caught.value.code == USAGE
    assert not (tmp_path / "m").exists()


def test_a_server_that_answers_with_another_commit(served, tmp_path, monkeypatch):
    list_hub = hub_listing.list_hub
    monkeypatch.setattr(hub_listing, "list_hub", lambda name, _, *rest: list_hub(name, OTHER, *rest))
    with pytest.raises(UserError, match="another commit") as caught:
        download(served, tmp_path / "m", remote_code=COMMIT)
    assert caught.value.code == UNSAFE


# asking


@pytest.mark.parametrize(
    "text", ["main", COMMIT[:12], COMMIT[:-1], COMMIT + "0", "v1.0", "g" * 40, "", "true"]
)
@pytest.mark.parametrize("settings", [FinetuneConfig, ChatConfig, PerplexityConfig, DownloadConfig])
def test_only_a_full_commit_is_a_consent(settings, text):
    """A branch, a tag, a short hash or a plain yes is no consent."""
    with pytest.raises(UserError, match="must be a full commit: 40 characters") as caught:
        config_options.parse(settings, [f"--remote_code={text}"])
    assert caught.value.code == USAGE


def test_a_file_of_options_is_no_consent(tmp_path):
    """The file may have been written by somebody else."""
    path = tmp_path / "options.json"
    path.write_text(json.dumps({"remote_code": COMMIT}))
    with pytest.raises(UserError, match="Give --remote_code on the command line"):
        config_options.parse(FinetuneConfig, ["--config", str(path)])
    path.write_text(json.dumps({"remote_code": None}))
    assert config_options.parse(FinetuneConfig, ["--config", str(path)]).remote_code is None


def test_no_window_offers_it():
    """It is in no form for training and no input of an answer: users of a page have no such rights."""
    assert declaration.declared(FinetuneConfig)["remote_code"].place == Place.NOWHERE
    assert "remote_code" not in declaration.declared(Generation)


def test_code_that_is_not_asked_for_is_not_run(fetched, tmp_path):
    """The refusal names the classes and the option (S6)."""
    for work in (
        base_model.load_config,
        models_tokenizer.load_tokenizer,
        lambda path: base_model.load_base(path, 16, "fp32", "cpu"),
    ):
        with pytest.raises(UserError, match=r"configuration_odd\.OddConfig.*--remote_code COMMIT") as caught:
            work(str(fetched))
        assert caught.value.code == UNSAFE
    assert not canary(tmp_path)


def test_the_commit_that_is_there_is_told(fetched, tmp_path):
    assert f"is at commit {COMMIT}" in refusal(fetched, OTHER)
    assert not canary(tmp_path)


def test_a_folder_that_nobody_downloaded(fetched):
    (fetched / manifest.NAME).unlink()
    assert "tools/download.py OWNER/MODEL --remote_code COMMIT" in refusal(fetched, COMMIT)


def test_code_that_was_not_fetched(served, tmp_path):
    download(served, tmp_path / "m")
    assert "modeling_odd.py" in refusal(tmp_path / "m", COMMIT)


@pytest.mark.parametrize("name", ["modeling_odd.py", "parts.py", "new.py"])
def test_a_file_that_changed_or_came_later(fetched, name):
    """A change is noticed even if the file's time and size stayed the same."""
    path = fetched / name
    before = path.stat() if path.exists() else None
    text = path.read_text() if before else "pass\n"
    path.write_text(text.replace("import os", "import ox") if before else text)
    if before:
        os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))
    assert f"{name} in {fetched} is not what was fetched" in refusal(fetched, COMMIT)


@pytest.mark.parametrize(
    ("file", "value"),
    [
        ("config.json", {"AutoModelForCausalLM": "other/repo--modeling_odd.OddModel"}),
        ("config.json", {"AutoConfig": "../evil.OddConfig"}),
        ("config.json", {"AutoConfig": "sub/evil.OddConfig"}),
        ("tokenizer_config.json", {"AutoTokenizer": [None, "other/repo--tokenizer.OddTokenizer"]}),
        ("tokenizer_config.json", ["other/repo--tokenizer.OddTokenizer", None]),
        ("config.4.0.0.json", {"AutoConfig": "other/repo--configuration_odd.OddConfig"}),
    ],
)
def test_code_from_elsewhere_stays_refused(fetched, file, value):
    """Code of another repository or outside of the top folder is refused, however deep it is named."""
    path = fetched / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps({**values, "text_config": {"auto_map": value}}))
    assert "names code from elsewhere" in refusal(fetched, COMMIT)


def test_a_folder_of_code_that_would_run_too(fetched):
    (fetched / "custom_generate").mkdir()
    assert "custom_generate would run too" in refusal(fetched, COMMIT)


def test_a_model_without_code_needs_no_consent(served, tmp_path, tiny_model):
    served.commits[COMMIT] = {path.name: path.read_bytes() for path in tiny_model.iterdir()}
    lines = download(served, tmp_path / "plain", remote_code=COMMIT)
    assert any("is not needed" in line for line in lines)
    assert "Leave the option out" in refusal(tmp_path / "plain", COMMIT, USAGE)


def test_what_is_accepted_is_said_aloud(fetched, tmp_path, capsys):
    """One line tells of rights, files and commit before anything runs."""
    assert remote_code.verify_commit(str(fetched), None) is None
    capsys.readouterr()
    code = remote_code.verify_commit(str(fetched), COMMIT)
    assert (code.folder, code.commit) == (fetched, COMMIT)
    [line] = capsys.readouterr().out.splitlines()
    assert all(word in line for word in ("with your rights", COMMIT, str(fetched), *CODE))
    assert not canary(tmp_path)


def test_a_consent_ends_when_a_file_changes(fetched, tmp_path):
    code = remote_code.verify_commit(str(fetched), COMMIT)
    (fetched / "modeling_odd.py").write_text(CANARY)
    with pytest.raises(UserError, match="is not what was fetched"):
        base_model.load_config(str(fetched), code)
    assert not canary(tmp_path)


@pytest.fixture
def cached(files, tmp_path, monkeypatch) -> Path:
    """The model's snapshot in the hub's own cache, as other programs fetch it."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    place = tmp_path / "hub" / f"models--{NAME.replace('/', '--')}"
    snapshot = place / "snapshots" / COMMIT
    for folder in (snapshot, place / "blobs", place / "refs"):
        folder.mkdir(parents=True)
    (place / "refs" / "main").write_text(COMMIT)
    for name, content in files.items():
        if "/" not in name:
            (tmp_path / "blob").write_bytes(content)
            digest = transfer.digest(tmp_path / "blob", transfer.GIT)
            (tmp_path / "blob").replace(place / "blobs" / digest)
            (snapshot / name).symlink_to(f"../../blobs/{digest}")
    return snapshot


def test_the_hubs_own_cache(cached, tmp_path):
    """The snapshot's folder is verified by its blobs, named by checksum; a copy elsewhere proves nothing."""
    code = remote_code.verify_commit(NAME, COMMIT)
    assert code.folder == cached
    assert "not on this machine at that commit. Fetch it" in refusal(NAME, OTHER)
    assert f"is at commit {COMMIT}" in refusal(cached, OTHER)
    shutil.copytree(tmp_path / "hub", tmp_path / "elsewhere")
    copy = tmp_path / "elsewhere" / cached.relative_to(tmp_path / "hub")
    assert "no file says which commit" in refusal(copy, COMMIT)
    blob = (cached / "parts.py").resolve()
    blob.write_text(blob.read_text() + "\n")
    assert "parts.py" in refusal(cached, COMMIT)


def test_a_name_that_is_on_no_hub():
    assert "not on this machine" in refusal("gone/../there", COMMIT)


# what a run or a stranger's files say is no consent


def test_a_runs_word_is_no_consent(tmp_path):
    """The option is ignored in a run's file, whatever value it has there."""
    stored = {"options": {"remote_code": COMMIT, "model_path": "x"}}
    assert run_options.options_of(stored, ContinueConfig()).remote_code is None
    options = run_options.options_of({"options": {}}, ContinueConfig(remote_code=OTHER))
    assert options.remote_code == OTHER


@pytest.mark.parametrize(
    ("before", "asked", "code"),
    [(COMMIT, None, UNSAFE), (COMMIT, OTHER, UNSAFE), (None, COMMIT, CHECKPOINT)],
)
def test_a_run_goes_on_with_the_code_it_began_with(before, asked, code):
    prints = {remote_code.PRINT: before} if before else {}
    start = StartingPoint(FinetuneConfig(), None, stored={"fingerprints": prints})
    with pytest.raises(UserError, match="--remote_code") as caught:
        resume._check_code(start, FinetuneConfig(remote_code=asked))
    assert caught.value.code == code


def test_an_adapters_word_is_no_consent(fetched, tmp_path, monkeypatch):
    """Its run used code, but whoever talks with it must type that commit again."""
    adapter = runs_adapters.Adapter("a", tmp_path, fingerprints={remote_code.PRINT: COMMIT})
    monkeypatch.setattr(runs_adapters, "find", lambda *_: adapter)
    paths = {"model_path": str(fetched), "lora_path": "a"}
    for commit in (None, OTHER):
        with pytest.raises(UserError, match=f"{COMMIT}.*--remote_code") as caught:
            loader.prepare(ChatConfig(**paths, remote_code=commit))
        assert caught.value.code == UNSAFE
    for request in (export_gguf.request(ExportConfig(**paths)), merge.request(MergeConfig(**paths))):
        with pytest.raises(UserError, match=f"{COMMIT}.*runs no code of a model") as caught:
            resolve.resolve(request)
        assert caught.value.code == UNSAFE
    plan = loader.prepare(ChatConfig(**paths, remote_code=COMMIT))
    assert plan.model.code.commit == COMMIT


def test_llama_cpp_runs_no_code(fetched):
    with pytest.raises(UserError, match="--remote_code is for the transformers engine"):
        loader.prepare(CpuConfig(model_path=str(fetched), remote_code=COMMIT))


# everything together, in processes of their own


def test_a_training_and_answers_with_code_of_the_model(fetched, tmp_path, tiny_rows):
    """The model is downloaded, trained, continued, measured and talked to, each time with consent."""
    run, consent = tmp_path / "run", f"--remote_code={COMMIT}"
    text = tmp_path / "text.txt"
    text.write_text("red green blue small large")
    training = ["finetune.py", *flags(fetched, tiny_rows, run)]
    longer = ["finetune_continue.py", f"--output_path={run}", "--max_steps=2"]
    measuring = ["tools/perplexity.py", text, f"--model_path={fetched}", "--device=cpu"]
    talking = ["interaction.py", "--terminal", f"--lora_path={run}", "--max_new_tokens=4", "--mode=greedy"]
    for words in (training, longer, measuring, talking):
        process = program(*words, consent, lines="Say red\n")
        assert process.returncode == 0, process.stderr[-3000:]
        assert process.stdout.strip()
        assert "now runs on this machine with your rights" in process.stdout + process.stderr
        assert canary(tmp_path) == {"configuration_odd", "modeling_odd", "parts", "tokenizer"}
        (tmp_path / "canary").unlink()
    stored = json.loads((run / runs_folder.CONFIG).read_text())
    assert stored["options"]["remote_code"] is None
    assert stored["fingerprints"][remote_code.PRINT] == COMMIT
    assert not list(run.rglob("*.py"))

    for commit in (None, OTHER):  # without consent the run starts nothing
        for work in (
            lambda c: begin(config_options.build(FinetuneConfig, {**settings(training), "remote_code": c})),
            lambda c: go_on(ContinueConfig(output_path=str(run), max_steps=3, remote_code=c)),
            lambda c: chat.start(ChatConfig(lora_path=str(run), remote_code=c), None),
        ):
            with pytest.raises(UserError, match="--remote_code") as caught:
                work(commit)
            assert caught.value.code == UNSAFE
    assert not canary(tmp_path)


def flags(base: Path, rows: Path, run: Path) -> list[str]:
    return [
        *("--bits=16", "--dtype=fp32", "--device=cpu", "--batch_size=12", "--max_steps=1", "--test_size=0"),
        *(f"--model_path={base}", f"--data_path={rows}", f"--output_path={run}"),
    ]


def settings(words: list[str]) -> dict[str, str]:
    """Return the options of a command line, for a run in another folder."""
    options = dict(word.removeprefix("--").split("=") for word in words[1:])
    return {**options, "output_path": options["output_path"] + "-2"}


def begin(options: FinetuneConfig) -> None:
    loop.run(options, sample=lambda *_: [], draw=lambda *_: None)


def go_on(wish: ContinueConfig) -> None:
    names = frozenset({"output_path", "max_steps", "remote_code"})
    loop.go_on(wish, names, sample=lambda *_: [], draw=lambda *_: None)


def test_all_weights_are_not_trained(fetched, tmp_path, tiny_rows):
    """The trained model could not be loaded again, because nobody downloaded its code."""
    values = settings(["", *flags(fetched, tiny_rows, tmp_path / "run")])
    with pytest.raises(UserError, match="--train_what lora") as caught:
        begin(config_options.build(FinetuneConfig, {**values, "train_what": "full", "remote_code": COMMIT}))
    assert caught.value.code == USAGE


def test_the_other_programs_have_no_such_option():
    for options in (
        MergeConfig,
        ExportConfig,
        QuantizeConfig,
        config_tools.CheckConfig,
        config_conversion.PrepareConfig,
    ):
        with pytest.raises(UserError, match="unrecognized arguments: --remote_code"):
            config_options.parse(options, [f"--remote_code={COMMIT}"])


@pytest.mark.parametrize(
    "fault", ["import a_package_that_is_missing", "raise RuntimeError('odd')", "len(5)", "1 / 0"]
)
def test_code_that_fails_is_told(served, tmp_path, fault):
    """A missing package, or code for another version of transformers, gives no traceback."""
    served.commits[COMMIT]["parts.py"] = f"{fault}\n{CODE['parts.py']}".encode()
    download(served, tmp_path / "m", remote_code=COMMIT)
    script = "import sys; from onecard import errors\nfrom onecard.hub import remote_code\n"
    script += "from onecard.models import base_model\n"
    script += "def main():\n    code = remote_code.verify_commit(sys.argv[1], sys.argv[2])\n"
    script += "    base_model.load_base(sys.argv[1], 16, 'fp32', 'cpu', code=code)\nerrors.run_program(main)"
    process = program("-c", script, tmp_path / "m", COMMIT)
    assert process.returncode == USAGE, process.stderr
    assert "the model's code fails" in process.stderr
    assert ("a_package_that_is_missing" in process.stderr) == fault.startswith("import")
    assert "Traceback" not in process.stderr
