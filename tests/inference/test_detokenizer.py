"""From tokens to the text shown: its parts join to the whole text, none is taken back, phrases stay out."""

import itertools
import random
from collections.abc import Iterator, Sequence

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast
from transformers.convert_slow_tokenizer import bytes_to_unicode

from onecard.config.generation import BEAM, BEAM_SAMPLE, MODES, Generation
from onecard.data.encode import encode_text
from onecard.inference import decoding, detokenizer
from onecard.inference.decoding import BANNED, END, GOES, LENGTH, STOP, STOPS, Step
from onecard.inference.detokenizer import BROKEN, Detokenizer
from tests.support.tokenizers import TOKENIZERS

pytestmark = pytest.mark.usefixtures("one_thread")

PIECES = [
    "red",
    "green",
    " ",
    "  ",
    "\n",
    "\n\n",
    "\t",
    "### ",
    "Response:",
    ".",
    "!",
    "e\u0301",
    "ß",
    "naïve",
]
PIECES += [
    "答案",
    "水在一百度沸腾。",
    "龘靐齉",
    "你好",
    "世界，",
    "한국어",
    "日本語",
    "𠮷",
    "x" * 9,
    "<end>",
    "</s>",
]
PIECES += ["😀", "👨\u200d👩\u200d👧\u200d👦", "🇨🇳", "👍🏽", "\u200d"]


def crossing_tokenizer() -> PreTrainedTokenizerFast:
    """A byte-level BPE with tokens that end inside one character and begin inside another."""
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=330, special_tokens=["<start>", "<end>"], initial_alphabet=alphabet
    )
    core.train_from_iterator(["丠丠丠丠乀乀乀😀😀😀" * 9, *PIECES], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<start>", eos_token="<end>")


MAKERS = {**TOKENIZERS, "crossing bpe": crossing_tokenizer}


@pytest.fixture(scope="module", params=MAKERS)
def tokenizer(request):
    return MAKERS[request.param]()


def decoded(tokenizer, ids: list[int]) -> str:
    return tokenizer.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def written(tokenizer, chance: random.Random, count: int) -> list[int]:
    """Return the tokens of a random text that is cut in odd places."""
    text = "".join(chance.choice(PIECES) for _ in range(count))
    cuts = sorted(chance.randrange(len(text) + 1) for _ in range(count))
    parts = [text[a:b] for a, b in zip([0, *cuts], [*cuts, len(text)], strict=True)]
    return [token for part in parts for token in encode_text(tokenizer, part)]


def thrown(tokenizer, chance: random.Random, count: int) -> list[int]:
    """Return random tokens, with broken characters, control tokens and halves of both."""
    return [chance.randrange(len(tokenizer)) for _ in range(2 * count)]


def single(ids: list[int], finished: str = LENGTH) -> Iterator[Step]:
    for length in range(1, len(ids) + 1):
        yield Step([ids[:length]], length, finished if length == len(ids) else "")


def plainly(tokenizer, ids: list[int]) -> str:
    """Return the text of the tokens; if the vocabulary has bytes, their UTF-8, mended byte by byte.

    (A decoder that falls back on bytes takes a whole character for broken when a broken byte follows it.)
    """
    if "<0x00>" not in tokenizer.get_vocab():
        return decoded(tokenizer, ids)
    names = tokenizer.convert_ids_to_tokens([i for i in ids if i not in tokenizer.all_special_ids])
    parts = [
        bytes([int(name[3:5], 16)]) if name.startswith("<0x") else name.replace("▁", " ").encode()
        for name in names
    ]
    return b"".join(parts).decode("utf-8", "replace").removeprefix(" ")


def test_the_joined_stream_is_the_whole_text(tokenizer):
    """Over 1,000 sequences every text shown is a beginning of the last one, which is the tokens' text.

    So no broken character is shown that does not stay.
    """
    broken = cut = 0
    for number in range(1000):
        chance = random.Random(number)
        make = thrown if number % 3 == 0 else written
        ids = make(tokenizer, chance, chance.randint(1, 8))
        replies = list(detokenizer.grow(tokenizer, single(ids), []))
        expected, stream = plainly(tokenizer, ids).strip(), ""
        whole = detokenizer.final(tokenizer, ids, [])
        # a character that the end has cut off is left out
        assert expected.startswith(whole)
        assert not expected[len(whole) :].replace(BROKEN, "").strip()
        sure = plainly(tokenizer, ids[: -detokenizer.LONGEST]).strip()  # no later token can be a part of it
        assert whole.startswith(sure.rstrip(BROKEN).strip())
        for text in replies:
            assert text.stable.startswith(stream)
            stream += text.stable[len(stream) :]
            assert whole.startswith(text.beams[0])
            assert text.whole == text.stable
        assert stream == whole
        if BROKEN not in decoded(tokenizer, ids):
            assert whole == decoded(tokenizer, ids).strip()
        broken += BROKEN in expected
        cut += whole != expected
    assert 100 < broken < 500
    assert 50 < cut < 500


def test_a_character_that_the_end_cuts_off_is_left_out(tokenizer):
    """This holds wherever an answer is cut; a continued answer has the whole character."""
    text = "在这个示例中 🙂 我将"
    ids = encode_text(tokenizer, text)
    for length in range(1, len(ids) + 1):
        steps = single(ids[:length])
        *_, last = detokenizer.grow(tokenizer, steps, [])
        assert BROKEN not in last.stable
        assert text.startswith(last.stable)
    assert last.stable == text


def test_broken_bytes_are_as_many_as_utf8_says(tokenizer):
    """The 2,000 runs of bytes begin, continue and break characters in every way, beside whole letters."""
    if "<0x00>" in tokenizer.get_vocab():
        names = [f"<0x{byte:02X}>" for byte in range(256)]
    else:
        names = [bytes_to_unicode()[byte] for byte in range(256)]
    tokens = tokenizer.convert_tokens_to_ids(names)
    chance = random.Random(0)
    for _ in range(2000):
        data = bytes(chance.choices(b"A\x80\x8e\x9f\xbf\xc3\xe4\xed\xf0\xf4\xfc", k=chance.randint(1, 14)))
        whole = data.decode("utf-8", "replace")
        window = Detokenizer(tokenizer)
        for number, byte in enumerate(data, 1):
            window.push([tokens[byte]])
            assert whole.startswith(window.with_tail([])), (data, number)
        assert window.text + window.tail([]) == whole, data


def test_text_comes_as_soon_as_its_characters_are_whole(tokenizer):
    """No whole character waits, unless a token is cut through the next one."""
    text = "红色 green 水在一百度沸腾 😀 ok"
    ids = encode_text(tokenizer, text)
    window, complete = Detokenizer(tokenizer), ""
    for length in range(1, len(ids) + 1):
        window.push(ids[length - 1 : length])
        whole = decoded(tokenizer, ids[:length])
        if BROKEN not in whole:
            complete = whole
            assert window.text == whole
        assert window.with_tail([]) == max(complete, whole.rstrip(BROKEN), key=len)
    assert window.text == decoded(tokenizer, ids) == text


class Counting:
    """A tokenizer that counts the tokens it decodes."""

    def __init__(self, tokenizer):
        self.tokenizer, self.count = tokenizer, 0

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def decode(self, ids: Sequence[int], **options) -> str:
        self.count += len(ids)
        return self.tokenizer.decode(ids, **options)


MOST = 32  # times that a token may be decoded, with the texts of the last step
SPELT = 3  # tokens that write one broken byte


@pytest.mark.parametrize("kind", ["written", "thrown", "bytes", "nothing"])
@pytest.mark.parametrize("width", [1, 3])
@pytest.mark.parametrize("stops", [[], ["\n\n\n\n", "never"]])
def test_tokens_are_decoded_a_bounded_number_of_times(tokenizer, kind, width, stops):
    """The cost of an answer is linear, also with broken bytes, control tokens or unsettled beams."""
    chance = random.Random(1)
    per_token = []
    for count in (60, 300):
        if kind == "written":
            ids = written(tokenizer, chance, 2 * count)[:count]
        elif kind == "thrown":
            ids = thrown(tokenizer, chance, count)[:count]
        elif kind == "bytes":
            half = next(i for i in range(len(tokenizer)) if decoded(tokenizer, [i]) == BROKEN)
            ids = [half] * count  # never a whole character
        else:
            ids = [tokenizer.eos_token_id] * count
        counting = Counting(tokenizer)
        watch = detokenizer.watch(counting, stops, [])
        beams = [[*ids[: count - 1], token] for token in ids[:width]] if width > 1 else [ids]

        def steps(beams=beams, count=count, watch=watch):
            for length in range(1, count + 1):
                if watch:
                    for ids in beams:
                        watch(ids[:length])
                settled = length if len(beams) == 1 else 0
                yield Step([ids[:length] for ids in beams], settled, LENGTH if length == count else "")

        list(detokenizer.grow(counting, steps(), stops))
        per_token.append(counting.count / count / width)
    most = MOST * (2 if stops else 1) * (SPELT if "<0x00>" in tokenizer.get_vocab() else 1)
    assert max(per_token) < most
    assert per_token[1] < max(per_token[0], 1) * 1.5, per_token


def phrases(chance: random.Random, text: str, count: int) -> list[str]:
    """Return random pieces of the text, of one to six characters."""
    places = [chance.randrange(len(text)) for _ in range(count)]
    return [text[place : place + chance.randint(1, 6)] for place in places]


def test_stop_words_end_the_answer_and_are_never_shown(tokenizer):
    """The watch sees the token that completes a stop word, and the text ends before the word.

    The stop words are random pieces of 120 texts; nothing behind them was in any stable text.
    """
    stopped = 0
    for number in range(120):
        chance = random.Random(number)
        ids = written(tokenizer, chance, chance.randint(3, 15))
        text = decoded(tokenizer, ids)
        if not text.strip() or BROKEN in text:
            continue
        stops = phrases(chance, text, chance.randint(1, 3))
        watch = detokenizer.watch(tokenizer, stops, [])
        texts = [plainly(tokenizer, ids[:n]).rstrip(BROKEN) for n in range(len(ids) + 1)]
        stop_at = next((n for n, t in enumerate(texts) if any(s in t for s in stops)), None)
        verdicts = [watch(ids[:n]) for n in range(1, (stop_at or len(ids)) + 1)]
        assert verdicts == [GOES] * (len(verdicts) - 1) + [STOPS if stop_at else GOES]
        if not stop_at:
            continue
        stopped += 1
        replies = list(detokenizer.grow(tokenizer, single(ids[:stop_at], STOP), stops))
        last = replies[-1].whole
        place = min(texts[stop_at].find(stop) for stop in stops if stop in texts[stop_at])
        assert last == texts[stop_at][:place].strip()
        assert not any(stop in last for stop in stops)
        for one, later in itertools.pairwise(replies):
            assert later.stable.startswith(one.stable)
    assert stopped > 80


def test_words_in_a_long_run_of_bytes_are_seen():
    """A decoder that falls back on bytes reads a run of them as a whole; a piece of it alone is broken."""
    tokenizer = TOKENIZERS["sentencepiece"]()
    text = "".join(chr(0x9F00 + i) for i in range(60))
    ids = encode_text(tokenizer, text)
    assert len(ids) > 180
    for place in (1, 30, 58):
        watch = detokenizer.watch(tokenizer, [], [text[place]])
        verdicts = [watch(ids[:n]) for n in range(1, 3 * place + 6)]
        assert verdicts.count(BANNED) == 1
        assert detokenizer.watch(tokenizer, [text[place]], [])(ids[: verdicts.index(BANNED) + 1]) == STOPS


class Writer:
    """An engine's stream that prefers the tokens of one text, or continues behind one that is banned."""

    def __init__(self, wanted: list[int], size: int, seed: int):
        self.wanted = wanted
        noise = torch.Generator().manual_seed(seed)
        self.noise = torch.randn(64, size, generator=noise)
        self.rows: list[list[int]] = [[]]

    def first(self) -> torch.Tensor:
        scores = torch.stack([self.noise[(sum(row) + len(row)) % 64] for row in self.rows])
        for number, row in enumerate(self.rows):
            scores[number, self.wanted[len(row) % len(self.wanted)]] += 9
        return scores

    def advance(self, parents: Sequence[int], tokens: Sequence[int]) -> torch.Tensor:
        self.rows = [[*self.rows[p], token] for p, token in zip(parents, tokens, strict=True)]
        return self.first()


@pytest.mark.parametrize("mode", MODES)
def test_banned_phrases_are_never_said(tokenizer, mode):
    """Random pieces of the free answer, with many tokens, CJK and emoji, are in no beam and no text."""
    changed, long = 0, 0
    for number in range(20):
        chance = random.Random(number)
        ids = written(tokenizer, chance, 8)[:20]
        settings = Generation(mode, 1.0, 1.0, 0, 3, 1.0, 0, 0, len(ids), seed=number)

        def write(banned, ids=ids, settings=settings, number=number) -> list[detokenizer.PartialText]:
            stream = Writer(ids, len(tokenizer), number)
            watch = detokenizer.watch(tokenizer, [], banned)
            ends = [tokenizer.eos_token_id]
            steps = decoding.decode(stream, [5], settings, ends, settings.max_new_tokens, watch)
            return list(detokenizer.grow(tokenizer, steps, []))

        free = write([])[-1].whole.replace(BROKEN, "")
        if not free:
            continue
        banned = [phrase for phrase in phrases(chance, free, 3) if phrase.strip()]
        replies = write(banned)
        for text in replies:
            assert not any(phrase in one for phrase in banned for one in (text.stable, *text.beams))
        assert replies[-1].whole
        changed += replies[-1].whole != free
        long += any(len(encode_text(tokenizer, phrase)) > 3 for phrase in banned)
    assert changed > 12
    assert long > 8


@pytest.mark.parametrize("mode", [BEAM, BEAM_SAMPLE])
def test_stop_words_end_beams_too(tokenizer, mode):
    """No beam holds a stop word, and stable text is a beginning of every later one and of the answer."""
    stopped = 0
    for number in range(30):
        chance = random.Random(number)
        ids = written(tokenizer, chance, 8)[:20]
        text = decoded(tokenizer, ids).replace(BROKEN, "")
        if not text.strip():
            continue
        stops = phrases(chance, text, 2)
        settings = Generation(mode, 1.0, 1.0, 0, 3, 1.0, 0, 0, len(ids), seed=number)
        steps = decoding.decode(
            Writer(ids, len(tokenizer), number),
            [5],
            settings,
            [tokenizer.eos_token_id],
            len(ids),
            detokenizer.watch(tokenizer, stops, []),
        )
        replies = list(detokenizer.grow(tokenizer, steps, stops))
        assert not any(stop in one for stop in stops for one in replies[-1].beams)
        for one, later in itertools.pairwise(replies):
            assert later.stable.startswith(one.stable)
            assert one.whole == one.beams[0]
        stopped += replies[-1].finished == STOP
    assert stopped > 15


def test_a_continued_answer_keeps_its_beginning(tokenizer):
    """No stop word cuts the given beginning, but one that crosses its end stops the answer."""
    ids = encode_text(tokenizer, "one STOP two STOP three")
    cut = next(n for n in range(len(ids)) if decoded(tokenizer, ids[:n]) == "one STOP two ST")
    before, rest = ids[:cut], ids[cut:]
    started = detokenizer.beginning(tokenizer, before, ["STOP"])
    assert started.whole == "one STOP two ST"
    replies = list(detokenizer.grow(tokenizer, single(rest, END), ["STOP"], before))
    assert all(text.stable.startswith(started.stable) for text in replies)
    assert replies[-1].whole == "one STOP two"
    watch = detokenizer.watch(tokenizer, ["STOP"], [], before)
    verdicts = [watch(rest[:n]) for n in range(1, len(rest) + 1)]
    texts = [decoded(tokenizer, [*before, *rest[:n]]) for n in range(1, len(rest) + 1)]
    assert verdicts.index(STOPS) == next(n for n, text in enumerate(texts) if "STOP" in text[8:])
    watch = detokenizer.watch(tokenizer, [], ["STOP"], before)
    assert watch(rest[: verdicts.index(STOPS) + 1]) == BANNED
    plain = list(detokenizer.grow(tokenizer, single(rest, END), [], before))
    assert plain[-1].whole == "one STOP two STOP three"


def test_a_cancelled_answer_shows_what_was_held_back(tokenizer):
    """The beams hold the beginning of a stop word that was not completed."""
    ids = encode_text(tokenizer, "well then, no")
    *_, text, _ = detokenizer.grow(tokenizer, single(ids), ["not", "nothing"])
    assert not text.stable.endswith(("n", "no"))
    assert decoded(tokenizer, ids).startswith(text.beams[0])
    assert text.beams[0] == decoded(tokenizer, ids[:-1]).strip()
