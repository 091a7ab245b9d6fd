"""Template and token ids: what chat sends is the beginning of what was trained."""

import io

import pytest
import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from onecard import prompt
from onecard.errors import UserError
from onecard.prompt import Conversation
from tests import tiny

TEXTS = [*tiny.WORDS, "Below is an instruction", "答案：水在一百度沸腾。", "### Response:"] * 4
CONVERSATIONS = [
    Conversation("Say red", "", "red it is"),
    Conversation("Say {input} and {instruction}", "{instruction} blue", "{input}"),
    Conversation("请用中文回答\n", "  两个空格", "答案：好。\n第二行 😀"),
    Conversation("ends with space ", "", " begins with space"),
    Conversation("<end> <start> </s> <s>", "<end>", "no <end> here"),
]


def sentencepiece_tokenizer():
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=320, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2,
    )  # fmt: skip
    processor = sentencepiece.SentencePieceProcessor(model_proto=model.getvalue())
    vocab = {processor.id_to_piece(i): i for i in range(processor.get_piece_size())}
    core = Tokenizer(
        models.Unigram(
            [(piece, processor.get_score(i)) for piece, i in vocab.items()], unk_id=0, byte_fallback=True
        )
    )
    core.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    core.decoder = decoders.Sequence([decoders.ByteFallback(), decoders.Metaspace()])
    bos = processor.bos_id()
    core.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", bos)])
    return PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def unigram_tokenizer():
    core = Tokenizer(models.Unigram())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    trainer = trainers.UnigramTrainer(
        vocab_size=320,
        special_tokens=["<start>", "<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    core.train_from_iterator(TEXTS, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<start>", eos_token="<end>")


TOKENIZERS = {"bpe": tiny.tokenizer, "sentencepiece": sentencepiece_tokenizer, "unigram": unigram_tokenizer}


@pytest.fixture(params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


@pytest.mark.parametrize("name", prompt.template_names())
@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_chat_ids_are_the_beginning_of_the_training_ids(tokenizer, name, conversation):
    """For every template and three kinds of tokenizer; and only the rest are targets."""
    template = prompt.load_template(name)
    trained, is_target = prompt.encode(conversation, template, tokenizer)
    asked, no_target = prompt.encode(
        Conversation(conversation.instruction, conversation.input), template, tokenizer
    )
    assert trained[: len(asked)] == asked
    assert is_target == [False] * len(asked) + [True] * (len(trained) - len(asked))
    assert not any(no_target)
    assert trained[-1] == tokenizer.eos_token_id
    assert is_target[-1]


@pytest.mark.parametrize("conversation", CONVERSATIONS)
def test_control_tokens_in_a_row_are_text(tokenizer, conversation):
    """The end token appears once, at the end, and the texts come back whole."""
    template = prompt.load_template("alpaca")
    ids, is_target = prompt.encode(conversation, template, tokenizer)
    assert ids.count(tokenizer.eos_token_id) == 1
    assert tokenizer.bos_token_id not in ids[1:]
    response = [token for token, flag in zip(ids, is_target, strict=True) if flag][:-1]
    assert tokenizer.decode(response).strip() == conversation.output.strip()


def test_bos_comes_first_where_the_tokenizer_puts_it():
    """Llama-like tokenizers begin every text with it; the others do not."""
    conversation, template = CONVERSATIONS[0], prompt.load_template("alpaca")
    for name, make in TOKENIZERS.items():
        made = make()
        ids, _ = prompt.encode(conversation, template, made)
        assert (ids[0] == made.bos_token_id) == (name == "sentencepiece")


def test_alpaca_text_is_the_known_one():
    """The wording and the blank lines that models trained elsewhere have seen."""
    template = prompt.load_template("alpaca")
    assert template.fill(Conversation("Do it.")).endswith(
        "request.\n\n### Instruction:\nDo it.\n\n### Response:\n"
    )
    filled = template.fill(Conversation("Do it.", "this"))
    assert "provides further context" in filled
    assert filled.endswith("### Instruction:\nDo it.\n\n### Input:\nthis\n\n### Response:\n")


def test_training_on_inputs_marks_all_but_the_start(tokenizer):
    """Every token that another one precedes is a target."""
    _, is_target = prompt.encode(
        CONVERSATIONS[0], prompt.load_template("alpaca"), tokenizer, train_on_inputs=True
    )
    assert is_target == [False] + [True] * (len(is_target) - 1)


def test_show_marks_targets_and_the_end_token(tokenizer):
    """The preview of a row shows the response between the marks, end token included."""
    ids, is_target = prompt.encode(CONVERSATIONS[0], prompt.load_template("alpaca"), tokenizer)
    text = prompt.show(tokenizer, ids, is_target)
    assert text.endswith(f"red it is{tokenizer.eos_token}»")
    assert text.count("«") == 1


def test_unknown_template_names_the_known_ones():
    """Exit 2 and the list."""
    with pytest.raises(UserError, match="alpaca") as caught:
        prompt.load_template("nonsense")
    assert caught.value.code == 2
