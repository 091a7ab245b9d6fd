"""Damaged and hostile model files, and what happens to the process that opens them.

`python -m tests.support.hostile_files KIND COUNT SEED` prints what happened to COUNT mutants, and where and
when, as JSON.

A forked process stands for OneCard's own and reads the mutants one after the other. When it dies, another one
continues behind the mutant that killed it. Files that OneCard reads in a child process are read in such a
process too, which may die.

Outcomes: loaded; refused (a UserError); memory (exit 6); escaped (another exception, which would be a
traceback for the user); crash and hang (of OneCard's own process); child crash and child hang (which OneCard
reports). SHOW=1 prints more.
"""

import collections
import contextlib
import importlib.metadata
import json
import os
import random
import shutil
import signal
import struct
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from datetime import date
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "transformers", "peft", "safetensors", "llama-cpp-python", "gguf", "numpy")
SECONDS = 20  # the limit for one mutant; a longer time is a hang
SPACE = 16 << 30  # bytes of address space that a reader may use
EDGES = (1 << 16, 1 << 31, 1 << 32, 1 << 63, 1 << 64)
NUMBERS = (0, 1, 2, 255, *EDGES[:-1], *(edge - 1 for edge in EDGES), 100 << 20, 1 << 40)
HYPERPARAMETERS = (
    "block_count",
    "embedding_length",
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "context_length",
    "feed_forward_length",
    "vocab_size",
    "rope.dimension_count",
)
BAD = ("escaped", "crash", "hang")  # what must not happen


def mutate(data: bytes, header: int, seed: int) -> bytes:
    """The data with one to three changes within its first `header` bytes; some of them cut the file short."""
    rng, mutant = random.Random(seed), bytearray(data)
    for _ in range(rng.choice((1, 1, 2, 3))):
        position, kind = rng.randrange(min(header, len(mutant))), rng.randrange(8)
        if kind <= 2:
            mutant[position] ^= 1 << rng.randrange(8)
        elif kind == 3:
            mutant[position] = rng.choice((0, 0x20, 0x7F, 0x80, 0xFF, rng.randrange(256)))
        elif kind == 4:
            width, code = rng.choice(((4, "<I"), (8, "<Q")))
            mutant[position : position + width] = struct.pack(code, rng.choice(NUMBERS) % (1 << 8 * width))
        elif kind == 5:
            del mutant[position : position + rng.choice((1, 4, 8, 100))]
        elif kind == 6:
            piece = bytes(mutant[position : position + 40])
            mutant[position:position] = rng.choice((b"\0", b"\xff" * 8, piece))
        else:
            del mutant[rng.choice((position, len(mutant) - 1 - position % 1000)) :]
        if not mutant:
            break
    return bytes(mutant)


def survey(
    count: int, write: Callable[[int], Any], read: Callable[[int], None], names: dict[str, str]
) -> dict[int, str]:
    """The outcome of each mutant; names: other words for crash and hang where the process is a child."""
    outcomes: dict[int, str] = {}
    while len(outcomes) < count:
        reader, writer = os.pipe()
        worker = os.fork()
        if not worker:
            os.close(reader)
            _work(range(len(outcomes), count), write, read, writer)
        os.close(writer)
        with os.fdopen(reader) as pipe:
            for line in pipe:
                outcomes[len(outcomes)] = line.strip()
        status = os.waitstatus_to_exitcode(os.waitpid(worker, 0)[1])
        if len(outcomes) < count:
            assert status, "a worker must not stop"
            kind = "hang" if status == -signal.SIGALRM else "crash"
            outcomes[len(outcomes)] = names.get(kind, kind)
    return outcomes


def _work(numbers: range, write: Callable[[int], Any], read: Callable[[int], None], writer: int) -> None:
    import resource

    from onecard.errors import UserError, is_out_of_memory

    quiet = os.open(os.devnull, os.O_WRONLY)
    os.dup2(quiet, 1)
    if not os.environ.get("SHOW"):
        os.dup2(quiet, 2)
    resource.setrlimit(resource.RLIMIT_AS, (SPACE, SPACE))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    with os.fdopen(writer, "w", buffering=1) as answers:
        for number in numbers:
            write(number)
            signal.setitimer(signal.ITIMER_REAL, SECONDS)
            try:
                read(number)
                outcome = "loaded"
            except UserError as error:
                outcome = "refused"
                if os.environ.get("SHOW"):
                    print(number, "refused", error, file=sys.stderr)
            except BaseException as error:  # a panic in Rust is not an Exception
                outcome = f"escaped {type(error).__name__}: {error}".replace("\n", " ")[:300]
                outcome = "memory" if is_out_of_memory(error) else outcome
            signal.setitimer(signal.ITIMER_REAL, 0)
            answers.write(outcome + "\n")
    os._exit(0)


class Gguf:
    """A .gguf file as --model_path: it is tried in a child, then read by engine and tokenizer."""

    def __init__(self, place: Path):
        from gguf import GGUFReader

        from onecard.conversion import gguf as conversion_gguf
        from tests.support import tiny

        self.folder, self.path = tiny.save_model(place / "model"), place / "mutant.gguf"
        with contextlib.redirect_stdout(sys.stderr):
            gguf = conversion_gguf.base(self.folder, place / "whole.gguf", any_tokenizer=True)
        self.whole, self.headers = [gguf.read_bytes()], [GGUFReader(gguf).data_offset]

    def outcomes(self, files: list[tuple[int, str, bytes]]) -> dict[int, str]:
        outcomes = survey(
            len(files),
            lambda n: self.path.write_bytes(files[n][-1]),
            self.trial,
            {"crash": "child crash", "hang": "child hang"},
        )
        passed = [number for number, outcome in outcomes.items() if outcome == "loaded"]
        loaded = survey(len(passed), lambda n: self.path.write_bytes(files[passed[n]][-1]), self.load, {})
        return outcomes | {passed[number]: outcome for number, outcome in loaded.items()}

    def trial(self, _: int) -> None:
        from onecard.errors import UserError
        from onecard.inference import gguf_check

        problem = gguf_check.trial([str(self.path)])
        if problem:
            raise UserError(problem)

    def load(self, _: int) -> None:
        from onecard.data import template as data_template
        from onecard.errors import UserError
        from onecard.inference import gguf_check, llama_cpp_model
        from onecard.inference import llama_cpp as inference_llama_cpp
        from onecard.models import tokenizer as models_tokenizer

        gguf_check.check = lambda *_: None  # the file was tried before
        with contextlib.suppress(UserError):
            tokenizer = inference_llama_cpp.tokenizer_of(self.path)
            tokenizer("red green 1")
            with contextlib.suppress(UserError):
                data_template.load("auto", tokenizer)
        # what the engine's child does, in this process: its end would be reported as a refusal
        model = llama_cpp_model.Model(self.path, 128, {}, threads=1)
        if model.entries < len(models_tokenizer.load_tokenizer(str(self.folder))):
            raise UserError("The engine refuses a vocabulary that is smaller than the tokenizer's.")
        prompt = [2, 3, 4][: model.context - 1]  # inference/chat.py leaves room for an answer
        if prompt:
            model.decode([(0, 0, prompt, 1)])
            model.decode([(0, len(prompt), [5], 1)])
        model.close()

    def targeted(self) -> Iterator[tuple[int, str, bytes]]:
        """Files with wrong counts, lengths, types, alignments and offsets."""
        whole = self.whole[0]
        for value in NUMBERS:
            number = struct.pack("<Q", value)
            yield 0, f"{value} tensors", whole[:8] + number + whole[16:]
            yield 0, f"{value} keys", whole[:16] + number + whole[24:]
            yield 0, f"first key of {value} bytes", whole[:24] + number + whole[32:]
            place = whole.index(b"tokenizer.ggml.tokens") + len("tokenizer.ggml.tokens") + 8
            yield 0, f"{value} tokens", whole[:place] + number + whole[place + 8 :]
            yield 0, f"tokens of type {value}", whole[: place - 4] + number[:4] + whole[place:]
            yield 0, f"first token of {value} bytes", whole[: place + 8] + number + whole[place + 16 :]
            place = whole.index(b"general.architecture") + len("general.architecture") + 4
            yield 0, f"architecture of {value} bytes", whole[:place] + number + whole[place + 8 :]
            place = whole.index(b"token_embd.weight") - 8
            yield 0, f"tensor name of {value} bytes", whole[:place] + number + whole[place + 8 :]
            place = whole.index(b"token_embd.weight") + len("token_embd.weight")
            yield 0, f"{value} dimensions", whole[:place] + number[:4] + whole[place + 4 :]
            yield 0, f"a dimension of {value}", whole[: place + 4] + number + whole[place + 12 :]
            yield 0, f"both dimensions {value}", whole[: place + 4] + number * 2 + whole[place + 20 :]
            yield 0, f"tensor type {value}", whole[: place + 20] + number[:4] + whole[place + 24 :]
            yield 0, f"offset {value}", whole[: place + 24] + number + whole[place + 32 :]
            key = b"general.alignment"
            entry = struct.pack("<Q", len(key)) + key + struct.pack("<I", 4) + number[:4]
            keys = struct.pack("<Q", struct.unpack_from("<Q", whole, 16)[0] + 1)
            yield 0, f"alignment {value}", whole[:16] + keys + entry + whole[24:]
            for name in HYPERPARAMETERS:
                key = b"llama." + name.encode()
                at = whole.find(key)
                if at >= 0:
                    at += len(key) + 4
                    yield 0, f"{name} {value}", whole[:at] + number[:4] + whole[at + 4 :]
        yield 0, "every tensor in one place", whole.replace(b"blk.1.", b"blk.0.")
        yield 0, "magic alone", whole[:4]
        yield 0, "empty", b""
        nested = struct.pack("<Q", 1) + b"x" + struct.pack("<I", 9) + (struct.pack("<IQ", 9, 1) * 20000)
        yield 0, "nested arrays", whole[:24] + nested + whole[24:]
        for version in (0, 1, 2, 4, 0x03000000, (1 << 32) - 1):
            yield 0, f"version {version}", whole[:4] + struct.pack("<I", version) + whole[8:]


def hostile() -> Iterator[tuple[str, str, bytes]]:
    """Headers, and the data behind them, that ask for much or can be read in two ways: (name, header, data).

    Of the kinds that safetensors' own collection of attacks has, and those its checks let through.
    """

    def entry(shape: list[int], first: int, last: int, dtype: str = "F32") -> str:
        return json.dumps({"dtype": dtype, "shape": shape, "data_offsets": [first, last]})

    def of(*entries: str) -> str:
        return "{" + ",".join(f'"w{number}":{each}' for number, each in enumerate(entries)) + "}"

    pair, many, body = entry([2], 0, 8), (20 << 20) // 60, b"\0" * 16
    yield "100,000 tensors on the same bytes", of(*[entry([200, 200], 0, 160000)] * 100000), b"\0" * 160000
    yield "tensors without elements, 20 MB of names", of(*[entry([0], 0, 0)] * many), b""
    yield "20 MB of metadata", f'{{"__metadata__":{{"a":"{"x" * (20 << 20)}"}},"w":{pair}}}', body[:8]
    yield "a name twice, the same bytes", f'{{"w":{pair},"w":{pair}}}', body[:8]
    yield "a name twice, other bytes", f'{{"w":{pair},"w":{entry([2], 8, 16)}}}', body
    yield "a name twice, once escaped", f'{{"w":{pair},"\\u0077":{pair}}}', body[:8]
    yield "two lists of metadata", f'{{"__metadata__":{{}},"__metadata__":{{}},"w":{pair}}}', body[:8]
    yield "two types", f'{{"w":{{"dtype":"F64",{pair[1:]}}}', body[:8]
    yield "overlapping halves", of(entry([3], 0, 12), entry([2], 8, 16)), body
    yield "a hole", of(entry([1], 0, 4), entry([2], 8, 16)), body
    yield "a hole first", of(entry([2], 8, 16)), body
    yield "data that nobody names", of(pair), body
    yield "data that is not there", of(entry([1 << 38], 0, 1 << 40)), body
    yield "offsets the wrong way round", of(entry([2], 16, 8)), body
    yield "sizes that overflow", of(entry([1 << 32, 1 << 32, 4], 0, 16)), body
    yield "sizes that overflow to the right one", of(entry([2, (1 << 63) + 1], 0, 8)), body[:8]
    yield "endless and empty", of(entry([(1 << 63) - 1, 0], 0, 0)), b""
    yield "too long for a tensor and empty", of(entry([(1 << 64) - 1, 0], 0, 0)), b""
    yield "half a byte", of(entry([3], 0, 1, "F4")), b"\0"
    yield "sizes with a point", of(pair.replace("[2]", "[2.0]")), body[:8]
    yield "a true size", of(pair.replace("[2]", "[true]")), body[:8]
    yield "not a number", of(pair.replace("[2]", "[NaN]")), body[:8]
    yield "half a surrogate", f'{{"\\ud800":{pair}}}', body[:8]


class Safetensors:
    """The weights of a model as --model_path, and of an adapter as --lora_path and for llama.cpp."""

    def __init__(self, place: Path):
        from peft import LoraConfig, get_peft_model

        from onecard.models import base_model
        from tests.support import tiny

        self.folder = tiny.save_model(place / "model", num_hidden_layers=1)
        self.adapter = place / "adapter"
        adapted = get_peft_model(
            base_model.load_base(str(self.folder), 16, "fp32", "cpu"),
            LoraConfig(r=4, target_modules=["q_proj"]),
        )
        adapted.save_pretrained(self.adapter)
        self.files = self.folder / "model.safetensors", self.adapter / "adapter_model.safetensors"
        self.whole = [path.read_bytes() for path in self.files]
        self.headers = [8 + struct.unpack_from("<Q", whole)[0] for whole in self.whole]
        self.base = base_model.load_base(str(self.folder), 16, "fp32", "cpu")

    def outcomes(self, files: list[tuple[int, str, bytes]]) -> dict[int, str]:
        which = [each[0] for each in files]

        def write(number: int) -> None:
            self.files[which[number]].write_bytes(files[number][-1])

        return survey(len(files), write, lambda number: self.read(which[number], number), {})

    def read(self, which: int, number: int) -> None:
        from onecard.conversion import gguf as conversion_gguf
        from onecard.errors import UserError
        from onecard.models import adapter as models_adapter
        from onecard.models import base_model, tensor_files
        from onecard.runs import adapters as runs_adapters
        from onecard.system import safetensors as system_safetensors

        if which == 0:
            with contextlib.suppress(UserError):
                system_safetensors.read_tensors(self.files[0])
            with contextlib.suppress(UserError), tensor_files.Files() as files:
                for tensor in tensor_files.of_folder(self.folder).values():
                    for first, last in tensor.blocks():
                        files.read(tensor, first, last)
            base_model.load_base(str(self.folder), 16, "fp32", "cpu")
            return
        with contextlib.suppress(UserError):
            conversion_gguf.check_adapter(self.adapter)
        with tempfile.TemporaryDirectory() as keep:
            source = runs_adapters.find(str(self.adapter), "x", "best", Path(keep))
            models_adapter.attach(self.base, source.folder, f"n{number}")

    def targeted(self) -> Iterator[tuple[int, str, bytes]]:
        """Files with a wrong length of the header, overlapping offsets, double names or negative sizes."""
        for index, whole in enumerate(self.whole):
            length = struct.unpack_from("<Q", whole)[0]
            header, body = json.loads(whole[8 : 8 + length]), whole[8 + length :]
            names = [name for name in header if name != "__metadata__"]

            def with_header(text: str | bytes, body: bytes = body) -> bytes:
                raw = text.encode() if isinstance(text, str) else text
                return struct.pack("<Q", len(raw)) + raw + body

            def changed(
                body: bytes = body, header: dict = header, name: str = names[0], **values: Any
            ) -> bytes:
                return with_header(json.dumps({**header, name: {**header[name], **values}}), body)

            for value in NUMBERS:
                yield index, f"header of {value} bytes", struct.pack("<Q", value) + whole[8:]
                yield index, f"shape {value}", changed(shape=[value, value])
                yield index, f"begins at {value}", changed(data_offsets=[value, value])
                yield index, f"ends at {value}", changed(data_offsets=[0, value])
            yield index, "header of 100 MB", with_header(json.dumps(header) + " " * (101 << 20))
            yield index, "header of 90 MB", with_header(json.dumps(header) + " " * (90 << 20))
            yield index, "below zero", changed(data_offsets=[-8, 0])
            yield index, "no numbers", changed(data_offsets=["0", None])
            yield index, "another type", changed(dtype="F99")
            yield index, "overlap", changed(data_offsets=header[names[-1]]["data_offsets"])
            yield index, "shape of none", changed(shape=[])
            yield index, "shape of zero", changed(shape=[0])
            for name, text, tail in hostile():
                yield index, name, with_header(text, tail)
            yield index, "no object", with_header("[]")
            yield index, "deep", with_header("[" * 200000)
            yield index, "deep objects", with_header('{"a":' * 200000)
            yield index, "no UTF-8", with_header(b'{"\xff\xfe": 1}')
            twice = json.dumps(header)[:-1] + f', "{names[0]}": {json.dumps(header[names[0]])}}}'
            yield index, "a name twice", with_header(twice)
            yield (
                index,
                "metadata of numbers",
                with_header(json.dumps({**header, "__metadata__": {"format": 5}})),
            )
            yield (
                index,
                "metadata of another format",
                with_header(json.dumps({**header, "__metadata__": {"format": "tf"}})),
            )
            yield index, "no metadata", with_header(json.dumps({name: header[name] for name in names}))
            yield index, "renamed", with_header(json.dumps(header).replace("layers.0.", "layers.7."))
            yield index, "one missing", with_header(json.dumps({n: header[n] for n in list(header)[:-1]}))
            yield index, "a body too long", whole + b"\0" * 1000
            yield index, "empty", b""
            yield index, "seven bytes", whole[:7]


class Pth:
    """A pickled adapter, as --lora_path and --resume_from_checkpoint read it."""

    def __init__(self, place: Path):
        import torch

        tensors = {
            f"base_model.model.model.layers.{layer}.self_attn.{name}.lora_{side}.weight": torch.ones(shape)
            for layer in range(2)
            for name in ("q_proj", "v_proj")
            for side, shape in (("A", (4, 96)), ("B", (96, 4)))
        }
        self.folder = place / "adapter"
        self.folder.mkdir()
        torch.save(tensors, self.folder / "adapter_model.bin")
        torch.save({"state": {0: {"exp_avg": torch.ones(3), "step": 1.0}}}, self.folder / "optimizer.pt")
        self.files = self.folder / "adapter_model.bin", self.folder / "optimizer.pt"
        self.whole = [path.read_bytes() for path in self.files]
        self.headers = [len(whole) for whole in self.whole]  # a zip archive's directory comes last
        self.place = place

    def targeted(self) -> list[tuple[int, str, bytes]]:
        return []  # those that would run code: test_pickles.py

    def outcomes(self, files: list[tuple[int, str, bytes]]) -> dict[int, str]:
        which = [each[0] for each in files]
        names = {"crash": "child crash", "hang": "child hang"}
        outcomes = survey(
            len(files),
            lambda n: self.files[which[n]].write_bytes(files[n][-1]),
            lambda n: self.child(which[n]),
            names,
        )
        passed = [number for number, outcome in outcomes.items() if outcome == "loaded"]

        def write(number: int) -> None:
            for path, whole in zip(self.files, self.whole, strict=True):
                path.write_bytes(whole)
            self.files[which[passed[number]]].write_bytes(files[passed[number]][-1])

        return outcomes | {
            passed[n]: outcome for n, outcome in survey(len(passed), write, self.load, {}).items()
        }

    def child(self, which: int) -> None:
        from onecard.errors import UserError
        from onecard.runs import legacy

        if legacy._child(str(self.files[which]), str(self.place / "plain")):
            raise UserError("refused")

    def load(self, _: int) -> None:
        from onecard.runs import adapters as runs_adapters
        from onecard.runs import legacy
        from onecard.system import sandbox

        def convert(module: str, source: Path, output: Path, *_: Any, **__: Any) -> None:
            assert legacy._child(str(source), str(output)) == 0, "it was read before"

        sandbox.convert = convert
        with tempfile.TemporaryDirectory() as keep:
            runs_adapters.find(str(self.folder), "x", "best", Path(keep))


class Original:
    """The consolidated.00.pth of a LLaMA in its original format, damaged at its beginning or its end."""

    def __init__(self, place: Path):
        import torch

        from tests.support import meta_llama_reference

        place.mkdir(exist_ok=True)
        count = meta_llama_reference.sentencepiece(place / "tokenizer.model", 392)
        settings = meta_llama_reference.params(heads=2, kv_heads=2, vocab=count, multiple_of=16)
        weights = meta_llama_reference.weights(settings, count, torch.bfloat16, tied=False)
        self.source, self.target = place / "start", place / "made"
        meta_llama_reference.save(self.source, settings, [weights])
        (place / "tokenizer.model").rename(self.source / "tokenizer.model")
        self.file = self.source / "consolidated.00.pth"
        raw = self.file.read_bytes()
        records = zipfile.ZipFile(self.file).infolist()
        first = next(record.header_offset for record in records if "/data/" in record.filename)
        directory = raw.rindex(records[0].filename.encode()) - 46
        # the parts in front of the weights and behind them
        self.before, self.whole = [b"", raw[:directory]], [raw, raw[directory:]]
        self.headers = [first + 200, len(raw) - directory]

    def targeted(self) -> list[tuple[int, str, bytes]]:
        return []  # those that would run code: test_pickles.py

    def outcomes(self, files: list[tuple[int, str, bytes]]) -> dict[int, str]:
        def write(number: int) -> None:
            shutil.rmtree(self.target, ignore_errors=True)
            self.file.write_bytes(self.before[files[number][0]] + files[number][-1])

        # Parent and child run in one process. The child crashes; the parent only reads what it wrote.
        return survey(len(files), write, self.read, {"crash": "child crash", "hang": "child hang"})

    def read(self, _: int) -> None:
        from onecard.config import options as config_options
        from onecard.config.conversion import ConvertConfig
        from onecard.conversion import meta_llama, meta_weights
        from tests.support import console

        def work(request: dict[str, Any], report_back: Callable[[dict[str, Any]], None], _: int) -> None:
            if request["step"] == meta_llama.WEIGHTS:
                meta_weights.work({**request, "limit": 0}, lambda **report: report_back(report))
            else:
                report_back({"ids": {"bos_token_id": 1, "eos_token_id": 2}})

        options = {"input_dir": str(self.source), "output_dir": str(self.target)}
        with console.heard():
            meta_llama.run(config_options.build(ConvertConfig, options), lambda done, total: None, work)


KINDS = {"gguf": Gguf, "safetensors": Safetensors, "pth": Pth, "original": Original}


def run(kind: str, count: int, seed: int) -> dict[str, Any]:
    """The counts of outcomes of `count` random and all targeted mutants, and those with a bad outcome."""
    with tempfile.TemporaryDirectory(prefix="onecard-mutants-") as folder:
        mutants = KINDS[kind](Path(folder))
        files = []
        for n in range(seed, seed + count):
            index = n % len(mutants.whole)
            files.append((index, f"seed {n}", mutate(mutants.whole[index], mutants.headers[index], n)))
        files += mutants.targeted()
        outcomes = mutants.outcomes(files)
        counts = collections.Counter(
            "escaped" if outcome[:7] == "escaped" else outcome for outcome in outcomes.values()
        )
        wrong = [f"{files[n][:2]}: {outcome}" for n, outcome in outcomes.items() if outcome.startswith(BAD)]
        if os.environ.get("SHOW"):
            for n, outcome in outcomes.items():
                print(*files[n][:2], outcome, file=sys.stderr)
        return {"kind": kind, "files": len(files), "outcomes": dict(sorted(counts.items())), "wrong": wrong}


def where() -> str:
    """The date, the machine, and the versions of those PACKAGES that are installed."""
    from onecard.system import hardware as system_hardware

    descriptions = [date.today().isoformat(), system_hardware.describe_machine()]
    for name in PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            descriptions.append(f"{name} {importlib.metadata.version(name)}")
    return "; ".join(descriptions)


if __name__ == "__main__":
    import torch

    from onecard.runs import legacy  # noqa: F401

    os.environ["GGML_NO_BACKTRACE"] = "1"
    torch.set_num_threads(1)
    result = run(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
    print(json.dumps({**result, "where": where()}))
