"""The tokens of the first row of every sample file in every template, with the demo model's tokenizer.

`python -m tests.support.golden_tokens` writes golden_tokens.json beside this file again. Check what has
changed before you commit it.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from onecard.config import training as config_training
from onecard.data import encode as data_encode
from onecard.data import reader
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn
from tests.support.paths import ROOT

FILE = Path(__file__).with_suffix(".json")
SAMPLES = sorted(path for path in (ROOT / "sample").iterdir() if path.suffix in config_training.FORMATS)

EVERY_ROLE = Conversation(
    (
        Turn("system", "Use the clock."),
        Turn("user", "What time is it?"),
        Turn("assistant", "clock()"),
        Turn("function", "ten past nine"),
        Turn("assistant", "It is ten past nine."),
        Turn("user", "And in Chinese?"),
        Turn("assistant", "九点十分。"),
    )
)


def dump(tokenizer: Any) -> dict[str, dict[str, dict[str, Any]]]:
    """File -> template ("none" for raw rows) -> ids, runs of targets and other tokens, text."""
    result: dict[str, dict[str, dict[str, Any]]] = {}
    firsts = {path.name: next(iter(reader.read_rows(path))) for path in SAMPLES}
    for file, row in {**firsts, "every role": EVERY_ROLE}.items():
        for name in ["none"] if row.is_raw else data_template.names():
            template = data_template.load("alpaca" if row.is_raw else name, tokenizer)
            if any(turn.role == "function" for turn in row.turns) and not template.function:
                continue
            own_tokenizer = data_template.tokenizer_for(tokenizer, template)
            ids, is_target = data_encode.encode(row, template, own_tokenizer)
            result.setdefault(file, {})[name] = {
                "ids": " ".join(map(str, ids)),
                "runs": [[target, len(list(run))] for target, run in groupby(is_target)],
                "text": data_encode.show(own_tokenizer, ids, is_target),
            }
    return result


def main() -> None:
    from onecard.hub import locate
    from onecard.models import tokenizer as models_tokenizer

    tokens = dump(models_tokenizer.load_tokenizer(locate.locate("demo")))
    FILE.write_text(json.dumps(tokens, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
