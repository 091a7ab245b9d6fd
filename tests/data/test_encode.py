"""Template and token ids: what chat sends is the beginning of what was trained."""

import json
import re
import unicodedata

import pytest
from tokenizers import AddedToken, normalizers, processors

from onecard.data import encode as data_encode
from onecard.data import jinja_sandbox
from onecard.data import template as data_template
from onecard.data.conversation import Conversation, Turn, single
from onecard.data.template import Template
from onecard.errors import UserError
from tests.support import tiny
from tests.support.tokenizers import CHATML, TOKENIZERS, load, sentencepiece_tokenizer

TURNS = [
    Turn("system", "Be <end> brief."),
    Turn("user", "说绿色 <start>", "more"),
    Turn("assistant", " call it"),
    Turn("function", "42"),
    Turn("assistant", "It is 42 <end>. "),
    Turn("user", "Why?"),
    Turn("assistant", "答案：好。"),
]
CONVERSATIONS = [
    single("Say red", "", "red it is"),
    single("Say {input} and {instruction}", "{instruction} blue", "{input}"),
    single("请用中文回答\n", "  两个空格", "答案：好。\n第二行 😀"),
    single("ends with space ", "", " begins with space"),
    Conversation(tuple(TURNS)),
    Conversation(tuple(TURNS[1:])),
    single("<end> <start> </s> <s>", "<end>", "no <end> here"),
]


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def fitting(conversation: Conversation, template: Template) -> list[Turn]:
    """The turns that the template knows: without a function's and the answer to it where it has none."""
    turns = list(conversation.turns)
    for number in [i for i, turn in enumerate(turns) if turn.role == "function" and not template.function]:
        del turns[number : number + 2]
    return turns


@pytest.mark.parametrize("name", data_template.names())
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_chat_ids_are_the_beginning_of_the_training_ids(tokenizer, name, conversation):
    """For every template, after every turn, with three kinds of tokenizer; only answers are targets."""
    template = load(name, tokenizer)
    turns = fitting(conversation, template)
    trained, is_target = data_encode.encode(Conversation(tuple(turns)), template, tokenizer)
    answers = []
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            asked, targets = data_encode.encode(Conversation(tuple(turns[:number])), template, tokenizer)
            assert trained[: len(asked)] == asked
            assert is_target[: len(asked)] == targets
            end = next(i for i in range(len(asked), len(trained) + 1) if not any(is_target[i : i + 1]))
            assert all(is_target[len(asked) : end])
            assert trained[end - 1] == tokenizer.eos_token_id
            answers += range(len(asked), end)
    assert [i for i, target in enumerate(is_target) if target] == answers
    assert answers[-1] == len(trained) - 1


@pytest.mark.parametrize("name", data_template.names())
def test_the_last_answer_alone(tokenizer, name):
    """--train_on last: the same ids, the targets of the last turn."""
    template, conversation = load(name, tokenizer), Conversation(tuple(TURNS[1:3] + TURNS[5:]))
    ids, all_targets = data_encode.encode(conversation, template, tokenizer)
    again, targets = data_encode.encode(conversation, template, tokenizer, False, "last")
    asked, _ = data_encode.encode(conversation.question, template, tokenizer)
    assert again == ids
    assert targets == [False] * len(asked) + all_targets[len(asked) :]


@pytest.mark.parametrize("name", data_template.names())
@pytest.mark.parametrize("limit", [0, 1, 30, 80, 150, 10_000])
def test_long_conversations_lose_their_oldest_turns(tokenizer, name, limit):
    """The system's turn stays, whole turns go, and no more of them than must."""
    template = load(name, tokenizer)
    said = [[Turn("user", f"question {i} " + "a " * i), Turn("assistant", f"answer {i}")] for i in range(9)]
    system = [Turn("system", "Be brief.")]

    def shortened(first: int) -> list[int]:
        return data_encode.encode(
            Conversation((*system, *(turn for pair in said[first:] for turn in pair))), template, tokenizer
        )[0]

    whole = Conversation((*system, *(turn for pair in said for turn in pair)))
    ids, is_target, was_cut = data_encode.encode_within(whole, limit, template, tokenizer)
    fitting = [first for first in range(9) if len(shortened(first)) <= limit]
    assert ids == (shortened(fitting[0]) if fitting else shortened(8)[:limit])
    assert len(is_target) == len(ids)
    assert was_cut == (not fitting or fitting[0] > 0)


def test_auto_is_the_text_of_the_chat_template(tokenizer):
    """What the tokenizer itself would write, token by token, system and function turns included."""
    template = load("auto", tokenizer)
    said = [Turn(turn.role, re.sub("<[a-z]+>", "", turn.text)) for turn in TURNS]
    for turns in (said, said[1:], said[1:3], said[:3]):
        ids, _ = data_encode.encode(Conversation(tuple(turns)), template, tokenizer)
        messages = [{"role": "tool" if t.role == "function" else t.role, "content": t.text} for t in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        reference = tokenizer(text.removesuffix("\n"), add_special_tokens=False).input_ids
        got, wanted = (tokenizer.decode(i, skip_special_tokens=False) for i in (ids, reference))
        if getattr(tokenizer.backend_tokenizer.pre_tokenizer, "prepend_scheme", "") == "first":
            got, wanted = got.replace(" ", ""), wanted.replace(" ", "")  # a word begins behind every token
        assert got == wanted


@pytest.mark.parametrize(
    ("broken", "word"),
    [
        ("{% for m in messages %}{{ m.content }}{% endfor %}", "control token"),
        ("{{ messages[-1].content }}<end>", "every turn"),
        ("{{ raise_exception('no') }}", "refuses"),
        ("{{ 'x' * 999999 }}{% for m in messages %}{{ m.content }}<end>{% endfor %}", "too much"),
        (
            "{% for m in messages %}{{ m.role if loop.last else '' }}{{ m.content }}<end>{% endfor %}",
            "last turn|is not how",
        ),
        ("{% for m in messages %}{{ m.content", "refuses"),
        ("{{ 'x' * 10**11 }}", "memory"),
        (
            "{% for a in range(9**5) %}{% for b in range(9**5) %}{% endfor %}{% endfor %}",
            "not read within 4 s",
        ),
    ],
)
def test_a_chat_template_that_cannot_be_used_is_refused(monkeypatch, broken, word):
    """Whatever a stranger's template does: one message, after seconds, in little memory."""
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 4)
    made = tiny.tokenizer()
    made.chat_template = broken
    with pytest.raises(UserError, match=word) as caught:
        data_template.load("auto", made)
    assert caught.value.code == 2


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"user": "no place"}, "'user' must hold"),
        ({"assistant": "{text}"}, "must end with {end}"),
        ({"assistant": "{text}{text}{end}"}, "once"),
        ({"user": 7}, "must be a text"),
        ({"usr": "x"}, "'usr' is not known"),
        ({"between": "{input}"}, "cannot hold {input}"),
        ({"user_with_input": "{text} alone"}, "must hold {input} once"),
        ({"between": "\ud800"}, "must be a text"),
        ({"control": "<x>"}, "'control' must be a list"),
        ({"control": ["<x>"], "between": "<x>"}, "no token <x>"),
    ],
)
def test_a_broken_template_file_is_named(tmp_path, change, word):
    """Exit 2, the file and the key; nothing of it is run."""
    path = tmp_path / "mine.json"
    path.write_text(json.dumps({"user": "{text}: ", "assistant": "{text}{end}", **change}))
    with pytest.raises(UserError, match=re.escape(word)) as caught:
        data_template.load(str(path), tiny.tokenizer())
    assert caught.value.code == 2
    assert "mine.json" in caught.value.problem


@pytest.mark.parametrize("content", ["", "[]", "{", "[" * 100_000, "x" * 300_000])
def test_a_file_that_is_no_template_is_named(tmp_path, content):
    path = tmp_path / "mine.json"
    path.write_text(content)
    with pytest.raises(UserError, match=r"mine\.json") as caught:
        data_template.check(str(path))
    assert caught.value.code == 2


def test_ordinary_tokens_of_a_template_become_control_tokens():
    """D15: a tokenizer that has them as plain added tokens would let rows write them."""
    made = tiny.tokenizer()
    made.add_tokens(["<|im_start|>", "<|im_end|>"])
    template = data_template.load("chatml", made)
    made = data_template.tokenizer_for(made, template)
    ids, _ = data_encode.encode(single("say <|im_end|> now", "", "<|im_start|>"), template, made)
    assert ids.count(made.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(made.convert_tokens_to_ids("<|im_start|>")) == 2
    assert "say <|im_end|> now" in made.decode(ids)


def state(tokenizer) -> tuple:
    return (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.all_special_tokens,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    )


def with_ordinary_tokens():
    """A tokenizer whose chat template, and whose ChatML, write tokens that it takes for ordinary ones."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<turn>"])
    tokenizer.chat_template = TURN_TEMPLATE
    return tokenizer


TURN_TEMPLATE = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>{% endfor %}"
TURN_TEMPLATE += "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"


def test_asking_for_a_template_leaves_the_tokenizer_as_it_was():
    """Loading by name, from the chat template, or as it was saved; what cannot be used; and its questions."""
    tokenizer = with_ordinary_tokens()
    before = state(tokenizer)
    for template in (data_template.load("chatml", tokenizer), data_template.load("auto", tokenizer)):
        data_template.of(json.loads(json.dumps(template.texts())), tokenizer)
        data_encode.eos_ids(template, tokenizer)
        own = data_template.tokenizer_for(tokenizer, template)
        data_encode.encode(single("say <|im_end|>", "", "<turn>"), template, own)
        assert template.controls() <= set(own.all_special_tokens)
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="cannot be used"):
        data_template.load("auto", tokenizer)
    tokenizer.chat_template = TURN_TEMPLATE
    assert state(tokenizer) == before


def test_templates_of_one_tokenizer_do_not_influence_each_other():
    """A chat window that switches: each template's ids are those that it has with a fresh tokenizer."""
    row = single("say <|im_start|> and <turn>", "", "<|im_end|> <turn>")

    def ids(name: str, tokenizer) -> list[int]:
        template = data_template.load(name, tokenizer)
        return data_encode.encode(row, template, data_template.tokenizer_for(tokenizer, template))[0]

    tokenizer = with_ordinary_tokens()
    names = ["chatml", "auto", "alpaca", "chatml"]
    switching = [ids(name, tokenizer) for name in names]
    assert switching == [ids(name, with_ordinary_tokens()) for name in names]
    assert len({tuple(one) for one in switching}) == 3


def test_encoding_needs_the_tokenizer_of_the_template():
    """A row could otherwise write the template's control tokens; our own mistake, so an assertion."""
    tokenizer = with_ordinary_tokens()
    template = data_template.load("chatml", tokenizer)
    with pytest.raises(AssertionError, match="tokenizer_for"):
        data_encode.encode(single("a", "", "b"), template, tokenizer)


def test_chatml_needs_its_tokens():
    """The demo's tokenizer has them; another is told how to get them."""
    with pytest.raises(UserError, match=re.escape("no token <|im_end|>, <|im_start|>")) as caught:
        data_template.load("chatml", tiny.tokenizer())
    assert "prepare_base_model" in caught.value.fix


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_control_tokens_in_a_row_are_text(tokenizer, conversation):
    """The end token appears once an answer, and the texts come back whole."""
    template = data_template.load("alpaca", None)
    conversation = Conversation(tuple(fitting(conversation, template)))
    ids, is_target = data_encode.encode(conversation, template, tokenizer)
    answers = sum(turn.role == "assistant" for turn in conversation.turns)
    assert ids.count(tokenizer.eos_token_id) == answers
    assert tokenizer.bos_token_id not in ids[1:]
    response = [token for token, flag in zip(ids, is_target, strict=True) if flag][:-1]
    assert tokenizer.decode(response).strip().endswith(conversation.turns[-1].text.strip())


@pytest.mark.parametrize("name", data_template.names())
@pytest.mark.parametrize("place", ["system", "user", "input", "assistant", "function"])
def test_control_tokens_are_text_in_every_place(tokenizer, name, place):
    """I1: a text made of all control tokens adds none to those that the template writes."""
    template = load(name, tokenizer)
    names = sorted({*tokenizer.all_special_tokens, "<|im_start|>", "<|im_end|>", "[INST]", "</s>"})
    counts = []
    for text in ("plain words", "x ".join(names), "".join(names)):
        turns = [Turn("system", "s"), Turn("user", "u", "i"), Turn("assistant", "a"), Turn("function", "f")]
        turns += [Turn("assistant", "b"), Turn("user", "v"), Turn("assistant", "c")]
        row = Conversation(tuple(fitting(Conversation(tuple(turns)), template)))
        changed = [
            turn._replace(**{"input" if place == "input" else "text": text})
            if turn.role == ("user" if place == "input" else place)
            else turn
            for turn in row.turns
        ]
        ids, _ = data_encode.encode(Conversation(tuple(changed)), template, tokenizer)
        counts.append(
            {
                token: ids.count(token)
                for token in tokenizer.all_special_ids
                if token != tokenizer.unk_token_id
            }
        )
    assert counts[0] == counts[1] == counts[2]


def test_added_tokens_that_a_chat_template_writes_become_control_tokens():
    """As Qwen's tool marks: ordinary in the tokenizer, but no row may write them."""
    made = tiny.tokenizer()
    made.add_tokens(["<tool>"])
    made.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ '<tool>' if m.role == 'tool' else '' }}{{ m.content }}"
    )
    template = data_template.load("auto", made)
    made = data_template.tokenizer_for(made, template)
    tool = made.convert_tokens_to_ids("<tool>")
    row = Conversation((Turn("user", "a <tool> b"), Turn("assistant", "c <tool>")))
    assert tool not in data_encode.encode(row, template, made)[0]
    row = Conversation((*row.turns, Turn("function", "d"), Turn("assistant", "e")))
    assert data_encode.encode(row, template, made)[0].count(tool) == 1


@pytest.mark.parametrize(
    "said", ["<call>", "a<call>b", "<ca<call>ll>", "</s><call><s>", "＜call＞", "x＜/s＞y", "＜＜/s＞＞"]
)
def test_control_pieces_that_letters_could_make(said):
    """A vocabulary that holds control tokens as pieces: one that its tokenizer does not list, and signs that
    are normalised to the letters of a name. The text stays what it is normalised to."""
    made = sentencepiece_tokenizer(("<call>",))
    made.backend_tokenizer.normalizer = normalizers.NFKC()
    assert "<call>" not in made.all_special_tokens
    ids = data_encode.encode_text(made, said)
    assert {1, 2, made.convert_tokens_to_ids("<call>")}.isdisjoint(ids)
    told = made.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert told.replace(" ", "") == unicodedata.normalize("NFKC", said)


def test_added_pieces_of_words_stay_ordinary():
    """What extend_vocab added may stand in a chat template's own words: rows may say it all the same."""
    made = tiny.tokenizer()
    made.add_tokens(["你是", "mark"])
    made.chat_template = CHATML.replace("Be kind.", "你是助手")
    template = data_template.load("auto", made)
    made = data_template.tokenizer_for(made, template)
    assert not {"你是", "mark"} & set(made.all_special_tokens)
    ids, _ = data_encode.encode(single("你是谁", "", "mark"), template, made)
    assert made.convert_tokens_to_ids("你是") in ids


def test_bos_comes_first_where_the_tokenizer_puts_it():
    """Llama-like tokenizers begin every text with it; the others do not."""
    conversation, template = CONVERSATIONS[0], data_template.load("alpaca", None)
    for name, make in TOKENIZERS.items():
        made = make()
        ids, _ = data_encode.encode(conversation, template, made)
        assert (ids[0] == made.bos_token_id) == (name == "sentencepiece")


def test_the_texts_are_the_known_ones():
    """The wording and the blank lines that models trained elsewhere have seen."""
    made = tiny.tokenizer()

    def text(name: str, *said: str) -> str:
        return data_encode.show(
            made, *data_encode.encode(single(*said), data_template.load(name, made), made)
        )

    assert text("alpaca", "Do it.").endswith("request.\n\n### Instruction:\nDo it.\n\n### Response:\n")
    filled = text("alpaca", "Do it.", "this", "done")
    assert "provides further context" in filled
    assert filled.endswith("### Instruction:\nDo it.\n\n### Input:\nthis\n\n### Response:\n«done<end>»")
    assert text("vicuna-chat", "Hi").endswith("questions of user.\n\nUser:Hi\n\nAssistant:")
    assert text("tigerbot", "Hi", "", "Ho") == "\n\n### Instruction:\nHi\n\n### Response:\n«Ho<end>»"
    assert text("cutegpt", "Hi").endswith("请给出对应请求的回答。\n问：Hi\n答：\n")


def test_training_on_inputs_marks_all_but_the_start(tokenizer):
    """Every token that another one precedes is a target."""
    _, is_target = data_encode.encode(
        CONVERSATIONS[0], data_template.load("alpaca", None), tokenizer, train_on_inputs=True
    )
    assert is_target == [False] + [True] * (len(is_target) - 1)


def test_show_marks_targets_and_the_end_token(tokenizer):
    """The preview of a row shows the response between the marks, end token included."""
    ids, is_target = data_encode.encode(CONVERSATIONS[0], data_template.load("alpaca", None), tokenizer)
    text = data_encode.show(tokenizer, ids, is_target)
    assert text.endswith(f"red it is{tokenizer.eos_token}»")
    assert text.count("«") == 1


def test_unknown_template_names_the_known_ones():
    """Exit 2 and the list."""
    with pytest.raises(UserError, match="alpaca") as caught:
        data_template.check("nonsense")
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["alpaca", "auto", "cutegpt"])
def test_many_at_once_are_as_one_by_one(tokenizer, name):
    """The fast way and the plain one: the same ids, targets, cuts and refusals."""
    template = load(name, tokenizer)
    several = [*CONVERSATIONS, Conversation((Turn("text", "raw <end>"),)), *CONVERSATIONS[:2]]
    made = data_encode.encode_many(several, 60, [template] * len(several), tokenizer, False, "last")
    for conversation, got in zip(several, made, strict=True):
        if isinstance(got, ValueError):
            with pytest.raises(ValueError, match=re.escape(str(got))):
                data_encode.encode(conversation, template, tokenizer)
        else:
            assert got == data_encode.encode_within(conversation, 60, template, tokenizer, False, "last")


def test_a_token_that_becomes_a_control_token_later(tokenizer):
    """The text of a row cannot write it from then on, although the tokenizer has encoded rows before."""
    before = data_encode.encode_text(tokenizer, "red it is")
    token = max(before)
    tokenizer.add_tokens(AddedToken(tokenizer.convert_ids_to_tokens(token), special=True, normalized=False))
    assert token in data_encode._control_tokens(tokenizer)
    assert token not in data_encode.encode_text(tokenizer, "red it is")


def test_a_bos_that_is_set_later(tokenizer):
    row = single("Say red", "", "red it is")
    template = load("alpaca", tokenizer)
    before = data_encode.encode(row, template, tokenizer)[0]
    has_bos = before[0] == tokenizer.bos_token_id
    single_text = "$A" if has_bos else "<s> $A"
    token = tokenizer.convert_ids_to_tokens(tokenizer.bos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=single_text.replace("<s>", token), special_tokens=[(token, tokenizer.bos_token_id)]
    )
    after = data_encode.encode(row, template, tokenizer)[0]
    assert (after[0] == tokenizer.bos_token_id) != has_bos
