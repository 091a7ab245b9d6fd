"""Rows with a template's own markers give the ids of plain rows, and nothing is done in silence."""

import json

import pytest

from onecard.data import check, dataset, findings, markers, preview, reader, run_data
from onecard.data import encode as data_encode
from onecard.data import template as data_template
from onecard.data.conversation import ASSISTANT, Conversation, Turn, single
from onecard.evaluation import eval_rows
from onecard.runs import folder as runs_folder
from onecard.training import plan
from tests.support import tiny
from tests.support.encoded_rows import encode, options
from tests.support.resume_cases import flags
from tests.support.tokenizers import CHATML

BUILT_IN = data_template.names()[1:]
MEDICAL = {  # as TigerBot publishes medical_qa
    "instruction": "\n\n### Instruction:\n感冒了怎么办？\n\n### Response:\n",
    "input": "",
    "output": "多喝水，注意休息。",
}
PLAIN = {"instruction": "感冒了怎么办？", "input": "", "output": "多喝水，注意休息。"}
QUESTIONS = [
    "Name a colour",
    "  white space around, and a line\n\nin between \n",
    "1. 一加一等于几？\n2. 答案：二。",
    "# A heading\n## Another\n### Instructions for use\nread them",
    "Ends with a colon:",
    "Quote <b>this</b> | and {text} {input} {end}",
    "Pretty\r\nWindows lines",
]
HISTORY = (Turn("user", "Name a colour"), Turn(ASSISTANT, "Red."), Turn("user", "Another one"))
CONVERSATIONS = {
    **{f"question {number}": single(text, output="an answer") for number, text in enumerate(QUESTIONS)},
    "with an input": single("Translate", "Guten Tag\n\nauf Wiedersehen", "Good day"),
    "several turns": Conversation((*HISTORY, Turn(ASSISTANT, "Blue."))),
    "a system's turn": Conversation((Turn("system", "Be brief."), *single("Why?", output="So.").turns)),
}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("ONECARD_CACHE", str(tmp_path / "cache"))


def loaded(name: str):
    """A built-in template with a tokenizer that has its control tokens; `auto` has a chat template."""
    tokenizer = tiny.tokenizer()
    if name == "auto":
        tokenizer.chat_template = CHATML
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    template = data_template.load(name, tokenizer)
    return template, data_template.tokenizer_for(tokenizer, template)


def wrapped(conversation: Conversation, template, with_end: bool = False) -> Conversation:
    """The row as a data set writes it that has put its prompts into a template: prompt, answer."""
    prompt, answer = Conversation(conversation.turns[:-1]), conversation.turns[-1].text

    def plain(parts, turn=None):
        values = {"{text}": turn and turn.text, "{input}": turn and turn.input, "{end}": ""}
        return "".join(values.get(what, text) for what, text in parts)

    text = "" if prompt.turns[0].role == "system" else plain(
        template.opening_with_input
        if prompt.turns[0].input and template.opening_with_input is not None
        else template.opening
    )  # fmt: skip
    for number, turn in enumerate(prompt.turns):
        if number and prompt.turns[number - 1].role == ASSISTANT:
            text += plain(template.between)
        parts = template.user_with_input if turn.input and template.user_with_input else None
        if parts is None and turn.input:
            turn = turn._replace(text=f"{turn.text}\n{turn.input}", input="")
        text += plain(parts or getattr(template, turn.role), turn)
    end = plain(template.assistant[1:]) + "<end>" if with_end else ""
    return single(text, output=answer + end)


@pytest.mark.parametrize("name", [*BUILT_IN, "auto"])
@pytest.mark.parametrize("case", CONVERSATIONS)
@pytest.mark.parametrize("with_end", [False, True])
def test_wrapped_rows_give_the_ids_of_plain_rows(name, case, with_end):
    """For every template and every form of a row, the last bit of white space included."""
    template, tokenizer = loaded(name)
    row = CONVERSATIONS[case]
    text = wrapped(row, template, with_end)
    unwrapped, marked = markers.Markers([template], tokenizer).unwrap(text)
    if (row.turns[0].role == "system" or len(row.turns) > 2) and name not in ("chatml", "auto"):
        # nothing marks for certain where a system's text or an answer ends: it could be an honest question
        assert (unwrapped, marked.kind) == (text, markers.PART)
        return
    kind = markers.TURNS if case == "several turns" else markers.WHOLE
    assert marked == markers.Marked("the model's own template" if name == "auto" else name, kind)
    expected = data_encode.encode(row, template, tokenizer)
    assert data_encode.encode(unwrapped, template, tokenizer) == expected


@pytest.mark.parametrize("own", BUILT_IN)
@pytest.mark.parametrize("name", BUILT_IN)
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_markers_of_another_template_are_taken_off_too(own, name, question):
    template, tokenizer = loaded(own)
    row = single(question, output="an answer")
    unwrapped, marked = markers.Markers([template], tokenizer).unwrap(wrapped(row, loaded(name)[0]))
    expected = row if name == own else single(question.strip(), output="an answer")
    assert (unwrapped, marked.kind) == (expected, markers.WHOLE)


BELOW = "Below is an instruction that describes a task. Write a response that completes the request.\n\n"
ALPACA = json.loads((data_template.FOLDER / "alpaca.json").read_text(encoding="utf-8"))["opening"]
PUBLISHED = {  # what stands in a row's instruction -> the plain text
    "TigerBot": (MEDICAL["instruction"], "感冒了怎么办？"),
    "no white space at the ends": ("### Instruction:\nWhy?\n\n### Response:", "Why?"),
    "Windows lines": ("\r\n\r\n### Instruction:\r\nWhy?\r\n\r\n### Response:\r\n", "Why?"),
    "one line break": ("### Instruction:\nWhy?\n### Response:\n", "Why?"),
    "a preamble in other words": (BELOW + "### Instruction:\nWhy?\n\n### Response:", "Why?"),
    "a Chinese preamble": (
        "以下是描述任务的指令，请写出恰当完成该请求的回应。\n\n### Instruction:\n为什么？\n\n### Response:",
        "为什么？",
    ),
    "BOS first": (
        "<s><|im_start|>user\nWhy?<|im_end|>\n<|im_start|>assistant\n",
        "Why?",
    ),
    "Llama 2": ("<s>[INST] Why? [/INST]", "Why?"),
    "question and answer": ("问：为什么？\n答：", "为什么？"),
    "a space after the marker": ("User: Why?\n\nAssistant:", "Why?"),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_forms(name):
    text, plain = PUBLISHED[name]
    template, tokenizer = loaded("alpaca")
    unwrapped, marked = markers.Markers([template], tokenizer).unwrap(single(text, output="So."))
    assert (unwrapped, marked.kind) == (single(plain, output="So."), markers.WHOLE)


def test_prompts_of_several_turns():
    """Each question of a row may be wrapped; Llama 2 has its system's text inside the first one."""
    template, tokenizer = loaded("alpaca")
    own = markers.Markers([template], tokenizer)
    turns = [Turn("user", f"### Instruction:\n{n}?\n\n### Response:") for n in "ab"]
    answers = [Turn(ASSISTANT, "So.</s>"), Turn(ASSISTANT, "Thus.")]
    row = Conversation((turns[0], answers[0], turns[1], answers[1]))
    expected = (Turn("user", "a?"), Turn(ASSISTANT, "So."), Turn("user", "b?"), Turn(ASSISTANT, "Thus."))
    assert own.unwrap(row)[0].turns == expected
    llama = "[INST] <<SYS>>\nBe brief.\n<</SYS>>\n\na? [/INST] So. </s><s>[INST] b? [/INST]"
    plain, marked = own.unwrap(single(llama, output="Thus."))
    assert plain.turns == (Turn("system", "Be brief."), *expected)
    assert marked == markers.Marked("llama-2", markers.TURNS)


def test_answers_of_a_prompt_that_are_learned_are_not_learned_in_silence():
    rows = markers.MarkedRows(markers.Marked("llama-2", markers.TURNS), 2, 1)
    said = {
        train_on: " ".join(plan.describe_marked([(rows, "row 1")], options("x", train_on=train_on)))
        for train_on in ("all", "last")
    }
    assert "every answer of a conversation is learned" in said["all"]
    assert "the markers were taken off" in said["last"] and "every answer" not in said["last"]  # noqa: PT018


@pytest.mark.parametrize("kind", [markers.WHOLE, markers.TURNS])
def test_only_prompts_of_several_turns_become_conversations(kind):
    rows = markers.MarkedRows(markers.Marked("llama-2", kind), 2, 1)
    said = " ".join(plan.describe_marked([(rows, "row 1")], options("x", train_on="all")))
    assert "the markers were taken off" in said
    assert ("they became conversations" in said) == (kind == markers.TURNS)


HONEST = [
    "What does `### Instruction:` mean in a prompt?",
    "Explain this file:\n\n### Instruction:\nSay hello\n\n### Response:\nHello!\n\nWhy is it written so?",
    "Write a prompt that ends in\n\n### Response:\n",
    "Repeat:\n\n### Instruction:\nSay hello\n\n### Response:\n",
    "### Instruction:\nfirst\n### Instruction:\nsecond\n\n### Response:\n",
    "Mark up with <|im_start|> and <|im_end|>",
    "User: hello\n\nAssistant: hello\n\nHow polite is this?",
    "他问：你好吗？\n我答：好。",
    "### Response:\n",
    "",
    # an instruction of the row's own before the first marker is no preamble
    "Below is an instruction that describes a task. Answer only in French and never mention prices.\n\n"
    "### Instruction:\nName a fruit\n\n### Response:\n",
    ALPACA + "Answer only in French.\n\n### Instruction:\nName a fruit\n\n### Response:\n",
    ALPACA.rstrip() + "\nAnswer only in French.\n\n### Instruction:\nName a fruit\n\n### Response:\n",
    "以下是描述任务的指令，请用法语回答，不要提价格。\n\n### Instruction:\n水果？\n\n### Response:",
    "下面是任务。请用法语回答。\n\n### Instruction:\n水果？\n\n### Response:",
    "Answer in French.\n[INST] Name a fruit [/INST]",
    # a question with examples is one question
    "问：1+1=?\n答：2\n\n问：2+2=?\n答：",
    "User: hi\n\nAssistant: Hello\n\nUser: how are you\n\nAssistant:",
    "### Instruction:\n1+1\n\n### Response:\n2\n\n### Instruction:\n2+2\n\n### Response:\n",
]


@pytest.mark.parametrize("text", HONEST)
@pytest.mark.parametrize("name", BUILT_IN)
def test_a_question_that_quotes_markers_stays(text, name):
    """Only the whole form is unwrapped: an honest question about prompts is trained as it stands."""
    template, tokenizer = loaded(name)
    row = single(text, output="<s>an answer</s>")
    unwrapped, marked = markers.Markers([template], tokenizer).unwrap(row)
    assert unwrapped == row
    assert marked is None or marked.kind == markers.PART


@pytest.mark.parametrize(
    ("row", "kind"),
    [
        ({**MEDICAL, "input": "an input outside"}, markers.PART),
        ({"instruction": HONEST[1], "output": "So."}, markers.PART),
        ({**MEDICAL, "system": "Be brief."}, markers.WHOLE),
        ({"instruction": wrapped(CONVERSATIONS["several turns"], loaded("alpaca")[0]).turns[0].text,
          "history": [["a", "b"]], "output": "x"}, markers.PART),
        ({"text": MEDICAL["instruction"] + MEDICAL["output"]}, markers.TEXT),
        ({"prompt": MEDICAL["instruction"], "completion": MEDICAL["output"]}, None),
        ({"messages": [{"role": "user", "content": MEDICAL["instruction"]},
                       {"role": "assistant", "content": "So."}]}, markers.WHOLE),
    ],
)  # fmt: skip
def test_every_kind_is_named(tmp_path, row, kind):
    """The check names it with its place, and so does the plan; a completion's prompt is as intended."""
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "x"} if "text" in row else PLAIN) + "\n" + json.dumps(row) + "\n")
    template, tokenizer = loaded("alpaca")
    result = findings.Findings()
    list(check.examine(result, [path], None, template, tokenizer, 400))
    problems = [problem for problem in result.problems if "markers of" in problem]
    encoded = encode(path)
    rows = encoded.marked
    if kind is None:
        assert (problems, rows) == ([], [])
        return
    assert problems == [check.MARKERS[kind].format(rows[0].marked.template)]
    assert result.examples[problems[0]] == f"{path}:2:1"
    assert problems[0] in findings.report(result, 400)
    assert (rows[0].marked.kind, rows[0].rows, rows[0].first) == (kind, 1, 2)
    location = encoded.location(rows[0].first)
    assert location == f"{path}: row 2"
    said = "".join(plan.describe_marked([(rows[0], location)], options(path)))
    assert rows[0].marked.template in said and str(path) in said  # noqa: PT018


def prepared(path, **changes) -> run_data.RunData:
    template, tokenizer = loaded("alpaca")
    files = reader.locate_files(str(path))
    return run_data.prepare(options(path, **changes), files, [template], tokenizer, "print")


def test_a_run_on_wrapped_rows_is_the_run_on_plain_rows(tmp_path):
    """Ids, validation prompts, the preview and the rows of an evaluation; a second time from the cache."""
    plain, marked = tmp_path / "plain.json", tmp_path / "marked.json"
    words = [f"{word}?" for word in tiny.WORDS]
    plain.write_text(json.dumps([{**PLAIN, "instruction": word} for word in words]))
    instructions = [f"\n\n### Instruction:\n{word}\n\n### Response:\n" for word in words]
    marked.write_text(json.dumps([{**MEDICAL, "instruction": text} for text in instructions]))
    expected = prepared(plain, test_size=4)
    for _ in range(2):
        data = prepared(marked, test_size=4)
        assert data.encoding.sha256 == expected.encoding.sha256
        assert data.validation_prompts == expected.validation_prompts
        [(rows, location)] = data.marked
        assert (rows.marked.template, rows.rows) == ("tigerbot", len(words))
        assert location == f"{marked}: row 1"
        marked = marked.rename(tmp_path / "renamed.json")  # the cache knows the contents alone
    template, tokenizer = loaded("alpaca")
    kept_rows = prepared(marked, marked_rows="keep", test_size=4)
    assert kept_rows.encoding.sha256 != expected.encoding.sha256
    assert [row.turns[0].text in instructions for row in kept_rows.validation_prompts] == [True] * 4
    kept_preview = preview.first_rows(
        options(marked, model_path="x", marked_rows="keep"), lambda *_: (tokenizer, template), 1
    )
    assert "".join(text for text, _ in kept_preview[0][1]).count("### Instruction:") == 2
    shown = {
        path: preview.first_rows(options(path, model_path="x"), lambda *_: (tokenizer, template), 3)
        for path in (plain, marked)
    }
    assert [runs for _, runs in shown[marked]] == [runs for _, runs in shown[plain]]
    assert "the markers of tigerbot were taken off" in shown[marked][0][0]
    assert eval_rows.some(str(marked), 400, template, tokenizer) == eval_rows.some(
        str(plain), 400, template, tokenizer
    )


def test_one_recogniser_for_all_validation_prompts(tmp_path, monkeypatch):
    path, calls = tmp_path / "rows.json", []
    path.write_text(json.dumps([{**MEDICAL, "instruction": f"{word}?"} for word in tiny.WORDS]))
    monkeypatch.setattr(
        run_data, "Markers", lambda *arguments: calls.append(1) or markers.Markers(*arguments)
    )
    assert len(prepared(path, test_size=4).validation_prompts) == 4
    assert len(calls) == 1


def test_the_cache_tells_both_treatments_apart():
    keys = {
        dataset.cache_key(options("x", marked_rows=treatment), [], [], "print", "sft", "content")
        for treatment in (markers.UNWRAP, markers.KEEP)
    }
    assert len(keys) == 2


def test_a_run_goes_on_with_its_rows_as_they_were(harness, tmp_path, tiny_model):
    """A run that began before markers were taken off keeps them, and says so; a new run has a choice."""
    rows = tmp_path / "rows.json"
    texts = [f"\n\n### Instruction:\n{word}?\n\n### Response:\n" for word in tiny.WORDS]
    rows.write_text(json.dumps([{"instruction": text, "output": "x y z"} for text in texts]))
    run = tmp_path / "run"
    settings = {**flags(tiny_model, rows, run), "max_steps": 2, "test_size": 2, "batch_size": 4}
    unwrapped = harness.run("finetune", settings)
    assert unwrapped["code"] == 0, unwrapped["said"]
    assert f"17 rows (the first is {rows}: row 1) carried the markers of tigerbot" in unwrapped["said"]
    went_on = harness.run("finetune_continue", {"output_path": run, "max_steps": 3})
    assert (went_on["code"], "carried the markers of tigerbot" in went_on["said"]) == (0, True), went_on[
        "said"
    ]
    refused = harness.run("finetune_continue", {"output_path": run, "max_steps": 3, "marked_rows": "keep"})
    assert (refused["code"], "marked_rows unwrap -> keep" in refused["said"]) == (4, True), refused["said"]
    kept_rows = harness.run("finetune", {**settings, "marked_rows": "keep", "overwrite": True})
    assert kept_rows["code"] == 0, kept_rows["said"]
    assert "so these questions are wrapped twice" in " ".join(kept_rows["said"].split())
    finished = harness.run("finetune", {**settings, "marked_rows": "keep"})
    assert (finished["code"], "This run is finished" in finished["said"]) == (0, True), finished["said"]
    path = run / "finetune_config.json"
    stored = json.loads(path.read_text())
    assert runs_folder.options_of(stored)["marked_rows"] == stored["resolved"].pop("marked_rows") == "keep"
    path.write_text(json.dumps(stored))  # as earlier versions write it
    went_on = harness.run("finetune_continue", {"output_path": run, "max_steps": 3})
    assert went_on["code"] == 0, went_on["said"]
    assert "so these questions are wrapped twice" in " ".join(went_on["said"].split())
    assert "marked_rows" not in json.loads(path.read_text())["options"]
