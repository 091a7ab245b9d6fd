#!/usr/bin/env python3
"""Count the answers that have the form of sample/instruct.json: three labelled lines and nothing else.

python sample/check_form.py lora-checkpoints/demo      # the folder of a finished run
"""

import json
import sys
from pathlib import Path

LABELS = (("Answer: ", "Why: ", "Try: "), ("答案：", "原因：", "试试："))


def follows(answer: str) -> bool:
    """Whether the answer is three lines that begin with the labels in order, with something after each."""
    lines = answer.split("\n")
    return any(
        len(lines) == 3
        and all(
            line.startswith(label) and line[len(label) :].strip()
            for line, label in zip(lines, labels, strict=True)
        )
        for labels in LABELS
    )


def main() -> None:
    if len(sys.argv) != 2 or not (Path(sys.argv[1]) / "finished.json").is_file():
        sys.exit("usage: python sample/check_form.py RUN   (the folder of a finished run)")
    answers = json.loads((Path(sys.argv[1]) / "finished.json").read_text(encoding="utf-8"))["answers"]
    for when in ("before", "after"):
        right = sum(follows(answer[when]) for answer in answers)
        print(f"{when} training: {right} of {len(answers)} answers have the form")


if __name__ == "__main__":
    main()
