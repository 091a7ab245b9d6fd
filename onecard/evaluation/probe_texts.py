"""Texts that test a tokenizer, prompts that test a model, and a small text for measuring perplexity.

They never change, so that the tables of two days can be compared. Nothing here knows a model.
"""

import random
import unicodedata
from collections.abc import Callable, Sequence

SEED, COUNT = 20261122, 1000
PROMPTS = (
    "What is the capital of France?",
    "Name the days of the week.",
    "Write a Python function that adds two numbers.",
    "Explain in two sentences why the sky is blue.",
    "Translate to Spanish: Good morning, how are you?",
)
TEXT = """\
The lighthouse stood at the end of a narrow road, two miles from the village. Every evening, an hour
before dark, the keeper walked up its 112 steps with a can of oil, trimmed the wick and lit the
lamp. In summer the work was easy. In winter the wind pressed against the glass, and salt covered
the panes so thickly that the light could hardly be seen from the harbour.

Water boils at 100 degrees Celsius at sea level. On a mountain the pressure of the air is lower, so
it boils at a lower temperature, and food takes longer to cook. A pressure cooker turns this around:
it holds the steam in, the pressure rises, and the water inside becomes hotter than it could be in
an open pot.

To make a simple soup, cut one onion, two carrots and three potatoes into small pieces. Fry the
onion in a little oil until it is soft. Add the other vegetables and a litre of water, and let it
cook slowly for half an hour. Season it with salt and pepper. It is better on the second day, when
the flavours have come together.

A list in Python can hold values of any kind. The function len returns how many there are, and a for
loop visits them one after another. When a program must find out quickly whether a value is present,
a set is the better choice, because it does not have to look at every element. The price is that a
set does not keep their order.

The moon takes a little more than 27 days to travel once around the earth. Because the earth moves
around the sun at the same time, about 29 and a half days pass from one full moon to the next. The
same side of the moon always faces us, so nobody had seen the other side until a spacecraft took
photographs of it in 1959.

My grandmother kept her letters in a wooden box under the bed. Some were from her brother, who had
gone to sea when he was sixteen; others were from people whose names I had never heard. When I asked
her about them, she said that a letter is a visit from someone who cannot come, and that one should
never throw a visitor away.
"""

NAMED = """\
the of Lighthouse naïve Straße façade coöperate it's we'll I'VE don't O'Neill e.g. 3rd x-ray привет мир
Ελλάδα שלום مرحبا नमस्ते สวัสดี 안녕하세요 こんにちは 世界 你好 東京タワー Việt ñandú http://example.org/a?b=1&c=%20
user@example.org C:\\temp\\x.txt 1,234.56 -0.5e-10 0x1F £9.99 50%"""
WORDS = tuple(NAMED.split())
EMOJI = ("🙂", "👍🏽", "👩\u200d👩\u200d👧", "🇫🇷", "❤️", "🏴\U000e0067\U000e0062\U000e007f", "1️⃣", "𝔘𝔫𝔦")
SPACES = (
    " ",
    "  ",
    "   ",
    "     ",
    "\t",
    "\t\t",
    "\n",
    "\n\n",
    "\n\n\n",
    "\r\n",
    " \n",
    "\n ",
    "\u00a0",
    "\u3000",
)
CODE = (
    "def f(x):\n    return x ** 2  # 100%\n",
    "for (int i = 0; i < n; ++i) { a[i] += b->c; }",
    '<div class="a">&nbsp;</div>',
    "SELECT * FROM t WHERE a != 'b';",
    '{"key": [1, 2.5, null, true]}',
    "\\frac{a}{b} $x_1^2$",
    "git commit -m 'x' && echo \"$HOME\"",
    'if __name__ == "__main__":\n\tmain()',
)
SCRIPTS = (  # first and last code point; tokenizers split the rare ones into bytes
    (0x21, 0x7E), (0xA1, 0x17F), (0x250, 0x2AF), (0x300, 0x36F), (0x370, 0x3FF),
    (0x400, 0x4FF), (0x5D0, 0x5EA), (0x620, 0x669), (0x905, 0x939), (0xE01, 0xE3A),
    (0x1100, 0x11FF), (0x2010, 0x2044), (0x2070, 0x209C), (0x2150, 0x218B), (0x2190, 0x22FF),
    (0x2460, 0x24FF), (0x2500, 0x257F), (0x3041, 0x30FF), (0x4E00, 0x9FA5), (0xAC00, 0xD7A3),
    (0xFB00, 0xFB06), (0xFF01, 0xFF5E), (0x10330, 0x1034A), (0x1D400, 0x1D7FF), (0x1F300, 0x1F64F),
    (0x20000, 0x2A6D6),
)  # fmt: skip


def texts(added: Sequence[str] = (), count: int = COUNT, seed: int = SEED) -> list[str]:
    """`count` different texts of words, code, digits, emoji, runs of spaces, many scripts and added tokens.

    added: the tokens that were added to the tokenizer; some texts hold them. All texts are in the composed
    form (NFC), because some tokenizers compose characters and llama.cpp does not.
    """
    rng = random.Random(seed)

    def letters() -> str:
        first, last = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(first, last)) for _ in range(rng.randint(1, 8)))

    def digits() -> str:
        return "".join(rng.choice("0123456789") for _ in range(rng.randint(1, 12)))

    kinds: list[Callable[[], str]] = [
        lambda: rng.choice(WORDS),
        lambda: rng.choice(EMOJI),
        lambda: rng.choice(SPACES),
        lambda: rng.choice(CODE),
        letters,
        digits,
        lambda: rng.choice("!?.,;:'\"()[]{}<>|/\\@#$%^&*-_=+~`") * rng.randint(1, 5),
        lambda: rng.choice(TEXT.split()),
    ]
    if added:
        kinds.append(lambda: rng.choice(added))
    distinct = dict.fromkeys([*kinds_alone(added), TEXT])
    while len(distinct) < count:
        separator = rng.choice(["", " ", " ", "\n"])
        text = separator.join(rng.choice(kinds)() for _ in range(rng.randint(1, 12)))
        distinct[unicodedata.normalize("NFC", text)] = None
    return list(distinct)[:count]


def kinds_alone(added: Sequence[str]) -> list[str]:
    """Every word, emoji, run of spaces, piece of code and added token alone, and some between two words."""
    alone = [*WORDS, *EMOJI, *SPACES, *CODE, *added[:100]]
    return [*alone, *(f"one{text}two" for text in (*SPACES, *added[:50]))]
