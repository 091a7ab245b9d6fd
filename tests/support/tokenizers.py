"""Three kinds of tokenizer, each trained in a moment, and the templates for them."""

import io
import json

import sentencepiece
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from onecard.data import template as data_template
from onecard.data.template import Template
from tests.support import tiny

CHATML = (
    "{% if messages[0].role != 'system' %}<start>system\nBe kind.<end>\n{% endif %}"
    "{% for m in messages %}<start>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<start>assistant\n{% endif %}"
)

TEXTS = [*tiny.WORDS, "Below is an instruction", "答案：水在一百度沸腾。", "### Response:"] * 4


def sentencepiece_tokenizer(control: tuple[str, ...] = ()):
    """A Unigram tokenizer made from a SentencePiece model; control: further control pieces."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS), model_writer=model, vocab_size=320, byte_fallback=True,
        hard_vocab_limit=False, minloglevel=2, control_symbols=list(control),
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
    core.add_special_tokens(list(control))
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


def load(name: str, tokenizer) -> Template:
    """The template of this name, with the tokenizer's own control tokens in place of those that it lacks."""
    start, end = tokenizer.bos_token, tokenizer.eos_token
    if name == "chatml":
        text = (data_template.FOLDER / "chatml.json").read_text()
        content = json.loads(text.replace("<|im_start|>", start).replace("<|im_end|>", end))
        control = content.pop("control")
        content.pop("description")
        return Template(name, **{key: data_template.parts(text, control) for key, text in content.items()})
    tokenizer.chat_template = CHATML.replace("<start>", start).replace("<end>", end)
    return data_template.load(name, tokenizer)


TURNS = "{% for m in messages %}<turn>{{ m.role }}\n{{ m.content }}<end>\n{% endfor %}"
TURNS += "{% if add_generation_prompt %}<turn>assistant\n{% endif %}"


def chatty():
    """The tiny tokenizer with a chat template and the tokens that it needs."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tokenizer.chat_template = TURNS
    return tokenizer
