"""Templates and token ids: the prompt of a chat is the beginning of what was trained."""

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
    """Return the turns that the template can write, without function turns and their answers if need be."""
    turns = list(conversation.turns)
    for number in [i for i, turn in enumerate(turns) if turn.role == "function" and not template.function]:
        del turns[number : number + 2]
    return turns


@pytest.mark.parametrize("name", data_template.names())
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_chat_ids_are_the_beginning_of_the_training_ids(tokenizer, name, conversation):
    """This holds for each template after each turn with each tokenizer; only answers are targets."""
    template = load(name, tokenizer)
    turns = fitting(conversation, template)
    trained, is_target = data_encode.encode(Conversation(tuple(turns)), template, tokenizer)
    answers = []
    for number, turn in enumerate(turns):
        if turn.role == "assistant":
            question, targets = data_encode.encode(Conversation(tuple(turns[:number])), template, tokenizer)
            assert trained[: len(question)] == question
            assert is_target[: len(question)] == targets
            end = next(i for i in range(len(question), len(trained) + 1) if not any(is_target[i : i + 1]))
            assert all(is_target[len(question) : end])
            assert trained[end - 1] == tokenizer.eos_token_id
            answers += range(len(question), end)
    assert [i for i, target in enumerate(is_target) if target] == answers
    assert answers[-1] == len(trained) - 1


@pytest.mark.parametrize("name", data_template.names())
def test_the_last_answer_alone(tokenizer, name):
    """--train_on last gives the same ids, with targets in the last turn only.

    So it does where the text of an earlier answer could become one token with what stands before or after it.
    """
    template = load(name, tokenizer)
    for text in (" call it", "call it", "\n\ncall it\n", "red", ": 答案：", "   ", "#"):
        turns = [TURNS[1], Turn("".join("assistant"), text), *TURNS[5:]]
        turns[-1] = turns[-1]._replace(role="".join("assistant"))  # equal, but another object
        conversation = Conversation(tuple(turns))
        ids, all_targets = data_encode.encode(conversation, template, tokenizer)
        again, targets = data_encode.encode(conversation, template, tokenizer, False, "last")
        question, _ = data_encode.encode(conversation.question, template, tokenizer)
        assert again == ids
        assert targets == [False] * len(question) + all_targets[len(question) :]


@pytest.mark.parametrize("name", data_template.names())
@pytest.mark.parametrize("limit", [0, 1, 30, 80, 150, 10_000])
def test_long_conversations_lose_their_oldest_turns(tokenizer, name, limit):
    """The system's turn stays, and as few whole turns as possible are left out."""
    template = load(name, tokenizer)
    pairs = [[Turn("user", f"question {i} " + "a " * i), Turn("assistant", f"answer {i}")] for i in range(9)]
    system = [Turn("system", "Be brief.")]

    def shortened(first: int) -> list[int]:
        return data_encode.encode(
            Conversation((*system, *(turn for pair in pairs[first:] for turn in pair))), template, tokenizer
        )[0]

    whole = Conversation((*system, *(turn for pair in pairs for turn in pair)))
    ids, is_target, was_cut = data_encode.encode_within(whole, limit, template, tokenizer)
    fitting = [first for first in range(9) if len(shortened(first)) <= limit]
    assert ids == (shortened(fitting[0]) if fitting else shortened(8)[:limit])
    assert len(is_target) == len(ids)
    assert was_cut == (not fitting or fitting[0] > 0)


def test_auto_is_the_text_of_the_chat_template(tokenizer):
    """The tokens are those of the tokenizer's own template, with system and function turns."""
    template = load("auto", tokenizer)
    plain_turns = [Turn(turn.role, re.sub("<[a-z]+>", "", turn.text)) for turn in TURNS]
    for turns in (plain_turns, plain_turns[1:], plain_turns[1:3], plain_turns[:3]):
        ids, _ = data_encode.encode(Conversation(tuple(turns)), template, tokenizer)
        messages = [{"role": "tool" if t.role == "function" else t.role, "content": t.text} for t in turns]
        text = tokenizer.apply_chat_template(messages, tokenize=False)
        reference = tokenizer(text.removesuffix("\n"), add_special_tokens=False).input_ids
        actual, expected = (tokenizer.decode(i, skip_special_tokens=False) for i in (ids, reference))
        if getattr(tokenizer.backend_tokenizer.pre_tokenizer, "prepend_scheme", "") == "first":
            # a word begins behind every token
            actual, expected = actual.replace(" ", ""), expected.replace(" ", "")
        assert actual == expected


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
    """Whatever a stranger's template does, it is one error after seconds and takes little memory."""
    monkeypatch.setattr(jinja_sandbox, "SECONDS", 4)
    tiny_tokenizer = tiny.tokenizer()
    tiny_tokenizer.chat_template = broken
    with pytest.raises(UserError, match=word) as caught:
        data_template.load("auto", tiny_tokenizer)
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
    """The error is exit 2 and names the file and the key; nothing in the file is run."""
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
    """D15: as ordinary added tokens of the tokenizer, rows could write them."""
    tiny_tokenizer = tiny.tokenizer()
    tiny_tokenizer.add_tokens(["<|im_start|>", "<|im_end|>"])
    template = data_template.load("chatml", tiny_tokenizer)
    tiny_tokenizer = data_template.tokenizer_for(tiny_tokenizer, template)
    ids, _ = data_encode.encode(single("say <|im_end|> now", "", "<|im_start|>"), template, tiny_tokenizer)
    assert ids.count(tiny_tokenizer.convert_tokens_to_ids("<|im_end|>")) == 2
    assert ids.count(tiny_tokenizer.convert_tokens_to_ids("<|im_start|>")) == 2
    assert "say <|im_end|> now" in tiny_tokenizer.decode(ids)


def state(tokenizer) -> tuple:
    return (
        tokenizer.backend_tokenizer.to_str(),
        tokenizer.all_special_tokens,
        tokenizer.special_tokens_map,
        tokenizer.chat_template,
    )


def with_ordinary_tokens():
    """Return a tokenizer for which the tokens of its chat template and of ChatML are ordinary ones."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_tokens(["<|im_start|>", "<|im_end|>", "<turn>"])
    tokenizer.chat_template = TURN_TEMPLATE
    return tokenizer


TURN_TEMPLATE = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>{% endfor %}"
TURN_TEMPLATE += "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"


def test_asking_for_a_template_leaves_the_tokenizer_as_it_was():
    """Loading, saving, preparing and refusing a template change nothing in the tokenizer."""
    tokenizer = with_ordinary_tokens()
    before = state(tokenizer)
    for template in (data_template.load("chatml", tokenizer), data_template.load("auto", tokenizer)):
        data_template.of(json.loads(json.dumps(template.texts())), tokenizer)
        data_encode.eos_ids(template, tokenizer)
        prepared = data_template.tokenizer_for(tokenizer, template)
        data_encode.encode(single("say <|im_end|>", "", "<turn>"), template, prepared)
        assert template.controls() <= set(prepared.all_special_tokens)
    tokenizer.chat_template = "{% for m in messages %}<turn>{{ m.content }}{% endfor %}"
    with pytest.raises(UserError, match="cannot be used"):
        data_template.load("auto", tokenizer)
    tokenizer.chat_template = TURN_TEMPLATE
    assert state(tokenizer) == before


def test_templates_of_one_tokenizer_do_not_influence_each_other():
    """Templates used in turn, as in a chat window, give the ids that they give with a new tokenizer."""
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
    """Otherwise a row could write control tokens; this would be our own mistake, so it is an assertion."""
    tokenizer = with_ordinary_tokens()
    template = data_template.load("chatml", tokenizer)
    with pytest.raises(AssertionError, match="tokenizer_for"):
        data_encode.encode(single("a", "", "b"), template, tokenizer)


def test_chatml_needs_its_tokens():
    """The demo's tokenizer has them; for others the error says how to get them."""
    with pytest.raises(UserError, match=re.escape("no token <|im_end|>, <|im_start|>")) as caught:
        data_template.load("chatml", tiny.tokenizer())
    assert "prepare_base_model" in caught.value.fix


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_control_tokens_in_a_row_are_text(tokenizer, conversation):
    """The end token appears once for each answer, and the texts come back whole."""
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
    """Such tokens are like Qwen's tool marks: ordinary in the tokenizer, but rows cannot write them."""
    tiny_tokenizer = tiny.tokenizer()
    tiny_tokenizer.add_tokens(["<tool>"])
    tiny_tokenizer.chat_template = CHATML.replace(
        "{{ m.content }}", "{{ '<tool>' if m.role == 'tool' else '' }}{{ m.content }}"
    )
    template = data_template.load("auto", tiny_tokenizer)
    tiny_tokenizer = data_template.tokenizer_for(tiny_tokenizer, template)
    tool = tiny_tokenizer.convert_tokens_to_ids("<tool>")
    row = Conversation((Turn("user", "a <tool> b"), Turn("assistant", "c <tool>")))
    assert tool not in data_encode.encode(row, template, tiny_tokenizer)[0]
    row = Conversation((*row.turns, Turn("function", "d"), Turn("assistant", "e")))
    assert data_encode.encode(row, template, tiny_tokenizer)[0].count(tool) == 1


@pytest.mark.parametrize(
    "said", ["<call>", "a<call>b", "<ca<call>ll>", "</s><call><s>", "＜call＞", "x＜/s＞y", "＜＜/s＞＞"]
)
def test_control_pieces_that_letters_could_make(said):
    """No text gives a control token, also when the vocabulary holds control tokens as pieces.

    One piece is not listed by its tokenizer, and some signs are normalised to the letters of a name. The
    text stays what it is normalised to.
    """
    piece_tokenizer = sentencepiece_tokenizer(("<call>",))
    piece_tokenizer.backend_tokenizer.normalizer = normalizers.NFKC()
    assert "<call>" not in piece_tokenizer.all_special_tokens
    ids = data_encode.encode_text(piece_tokenizer, said)
    assert {1, 2, piece_tokenizer.convert_tokens_to_ids("<call>")}.isdisjoint(ids)
    decoded = piece_tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)
    assert decoded.replace(" ", "") == unicodedata.normalize("NFKC", said)


def test_added_pieces_of_words_stay_ordinary():
    """Rows may write a token of extend_vocab, even if the chat template has it in its own words."""
    tiny_tokenizer = tiny.tokenizer()
    tiny_tokenizer.add_tokens(["你是", "mark"])
    tiny_tokenizer.chat_template = CHATML.replace("Be kind.", "你是助手")
    template = data_template.load("auto", tiny_tokenizer)
    tiny_tokenizer = data_template.tokenizer_for(tiny_tokenizer, template)
    assert not {"你是", "mark"} & set(tiny_tokenizer.all_special_tokens)
    ids, _ = data_encode.encode(single("你是谁", "", "mark"), template, tiny_tokenizer)
    assert tiny_tokenizer.convert_tokens_to_ids("你是") in ids


def test_bos_comes_first_where_the_tokenizer_puts_it():
    """Tokenizers like Llama's begin every text with it, and the others do not."""
    conversation, template = CONVERSATIONS[0], data_template.load("alpaca", None)
    for name, make in TOKENIZERS.items():
        fresh_tokenizer = make()
        ids, _ = data_encode.encode(conversation, template, fresh_tokenizer)
        assert (ids[0] == fresh_tokenizer.bos_token_id) == (name == "sentencepiece")


def test_a_bos_that_the_tokenizer_does_not_put_there_is_left_out():
    """Also when it comes last in the vocabulary, as a token that was added later does."""
    tiny_tokenizer = tiny.tokenizer()
    tiny_tokenizer.add_special_tokens({"bos_token": "<bos>"})
    assert tiny_tokenizer.bos_token_id > tiny_tokenizer("a").input_ids[0]
    ids, _ = data_encode.encode(CONVERSATIONS[0], load("alpaca", tiny_tokenizer), tiny_tokenizer)
    assert tiny_tokenizer.bos_token_id not in ids


def test_the_texts_are_the_known_ones():
    """Wording and blank lines are those that models trained elsewhere have seen."""
    tiny_tokenizer = tiny.tokenizer()

    def text(name: str, *parts: str) -> str:
        return data_encode.show(
            tiny_tokenizer,
            *data_encode.encode(single(*parts), data_template.load(name, tiny_tokenizer), tiny_tokenizer),
        )

    assert text("alpaca", "Do it.").endswith(
        "Below is an instruction that describes a task. Write a response that appropriately completes the "
        "request.\n\n### Instruction:\nDo it.\n\n### Response:\n"
    )
    filled = text("alpaca", "Do it.", "this", "done")
    assert "provides further context" in filled
    assert filled.endswith("### Instruction:\nDo it.\n\n### Input:\nthis\n\n### Response:\n«done<end>»")
    assert text("vicuna-chat", "Hi").endswith("questions of user.\n\nUser:Hi\n\nAssistant:")
    assert text("tigerbot", "Hi", "", "Ho") == "\n\n### Instruction:\nHi\n\n### Response:\n«Ho<end>»"
    assert text("cutegpt", "Hi").endswith("请给出对应请求的回答。\n问：Hi\n答：\n")


@pytest.mark.parametrize("roles", [("text",), ("prompt", "completion"), ("context", "completion")])
def test_the_end_of_raw_text_is_learned(tokenizer, roles):
    turns = tuple(Turn(role, f"{role} red") for role in roles)
    ids, is_target = data_encode.encode(Conversation(turns), load("alpaca", tokenizer), tokenizer)
    assert (ids[-1], is_target[-1]) == (tokenizer.eos_token_id, True)
    assert (False in is_target[1:]) == (len(roles) > 1)


def test_training_on_inputs_marks_all_but_the_start(tokenizer):
    """Every token after the first one is a target."""
    _, is_target = data_encode.encode(
        CONVERSATIONS[0], data_template.load("alpaca", None), tokenizer, train_on_inputs=True
    )
    assert is_target == [False] + [True] * (len(is_target) - 1)


def test_show_marks_targets_and_the_end_token(tokenizer):
    """The preview of a row has the response between the marks, with its end token."""
    ids, is_target = data_encode.encode(CONVERSATIONS[0], data_template.load("alpaca", None), tokenizer)
    text = data_encode.show(tokenizer, ids, is_target)
    assert text.endswith(f"red it is{tokenizer.eos_token}»")
    assert text.count("«") == 1


def test_unknown_template_names_the_known_ones():
    """The error is exit 2 and lists the templates."""
    with pytest.raises(UserError, match="alpaca") as caught:
        data_template.check("nonsense")
    assert caught.value.code == 2


@pytest.mark.parametrize("name", ["alpaca", "auto", "cutegpt"])
def test_many_at_once_are_as_one_by_one(tokenizer, name):
    """The fast way and the plain one give the same ids, targets, cuts and refusals."""
    template = load(name, tokenizer)
    several = [*CONVERSATIONS, Conversation((Turn("text", "raw <end>"),)), *CONVERSATIONS[:2]]
    results = data_encode.encode_many(several, 60, [template] * len(several), tokenizer, False, "last")
    for conversation, result in zip(several, results, strict=True):
        if isinstance(result, ValueError):
            with pytest.raises(ValueError, match=re.escape(str(result))):
                data_encode.encode(conversation, template, tokenizer)
        else:
            assert result == data_encode.encode_within(conversation, 60, template, tokenizer, False, "last")


def test_a_token_that_becomes_a_control_token_later(tokenizer):
    """From then on rows cannot write it, even if the tokenizer has encoded rows before."""
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
