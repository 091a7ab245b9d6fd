"""The token dump of the first row of every sample file in every template, with the demo model's tokenizer.

python -m tests.support.golden_tokens writes golden_tokens.json beside this file anew; look at what changed
before committing it.
"""

import json
from itertools import groupby
from pathlib import Path
from typing import Any

from onecard.config import training as training_config
from onecard.data import encode as data_encode
from onecard.data import reader
from onecard.data import template as templates
from onecard.data.conversation import Conversation, Turn
from tests.support.paths import ROOT

FILE = Path(__file__).with_suffix(".json")
SAMPLES = sorted(path for path in (ROOT / "sample").iterdir() if path.suffix in training_config.FORMATS)

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
    """File -> template (raw rows: none) -> ids, lengths of runs that are and are not targets, text."""
    made: dict[str, dict[str, dict[str, Any]]] = {}
    firsts = {path.name: next(iter(reader.read_rows(path))) for path in SAMPLES}
    for file, row in {**firsts, "every role": EVERY_ROLE}.items():
        for name in ["none"] if row.is_raw else templates.names():
            form = templates.load("alpaca" if row.is_raw else name, tokenizer)
            if any(turn.role == "function" for turn in row.turns) and not form.function:
                continue
            own = templates.tokenizer_for(tokenizer, form)
            ids, is_target = data_encode.encode(row, form, own)
            made.setdefault(file, {})[name] = {
                "ids": " ".join(map(str, ids)),
                "runs": [[target, len(list(run))] for target, run in groupby(is_target)],
                "text": data_encode.show(own, ids, is_target),
            }
    return made


def main() -> None:
    from onecard.hub import locate
    from onecard.models import tokenizer as models_tokenizer

    made = dump(models_tokenizer.load_tokenizer(locate.locate("demo")))
    FILE.write_text(json.dumps(made, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
