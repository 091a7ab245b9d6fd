"""D7: whatever tokens the tokenizer has for padding and the end, the end is learned and answers stop."""

import json

import pytest
from peft import PeftModel
from transformers import AutoModelForCausalLM

from onecard.data import conversation as data_conversation
from onecard.data import encode as data_encode
from onecard.data import template as data_template
from onecard.inference import transformers_engine
from tests.support import tiny
from tests.support.tokenizers import sentencepiece_tokenizer, unigram_tokenizer

LONGEST = 24  # tokens; the trained answers have fewer


def padding(made, token: str | None):
    made.pad_token = token
    return made


def ending_otherwise():
    """Return a tokenizer whose chat template ends turns with another token than its end token."""
    tokenizer = tiny.tokenizer()
    tokenizer.add_special_tokens({"extra_special_tokens": ["<turn>"]})
    tokenizer.chat_template = "{% for m in messages %}{{ m.role }}: {{ m.content }}<turn>{% endfor %}"
    tokenizer.chat_template += "{% if add_generation_prompt %}assistant: {% endif %}"
    return tokenizer


TOKENIZERS = {
    "no padding token": lambda: padding(tiny.tokenizer(), None),
    "padding is the end token": lambda: padding(tiny.tokenizer(), "<end>"),
    "a padding token of its own": lambda: padding(tiny.tokenizer(), "<pad>"),
    "sentencepiece, bos first": sentencepiece_tokenizer,
    "unigram": unigram_tokenizer,
    "turns end otherwise": ending_otherwise,
}


@pytest.mark.parametrize("name", TOKENIZERS)
def test_the_end_is_learned(harness, tmp_path, name):
    """The last target of every row is an end token, and the trained model stops by itself."""
    tokenizer = TOKENIZERS[name]()
    tiny.save_model(tmp_path / "base", tokenizer, vocab_size=400)
    rows = [{"instruction": word, "output": f"{word} {word}"} for word in tiny.WORDS]
    (tmp_path / "rows.json").write_text(json.dumps(rows))
    template_name = "auto" if tokenizer.chat_template else "tigerbot"
    template = data_template.load(template_name, tokenizer)
    ends = data_encode.eos_ids(template, tokenizer)
    for row in rows:
        ids, is_target = data_encode.encode(
            data_conversation.single(row["instruction"], "", row["output"]), template, tokenizer
        )
        last = max(place for place, target in enumerate(is_target) if target)
        assert ids[last] in ends
        assert tokenizer.pad_token_id is None or tokenizer.pad_token_id not in ids[:last]
    options = {"model_path": tmp_path / "base", "data_path": tmp_path / "rows.json"}
    options |= {"output_path": tmp_path / "run", "bits": 16, "dtype": "fp32", "device": "cpu", "test_size": 0}
    options |= {"template": template_name, "batch_size": 17, "num_epochs": 20, "learning_rate": 2e-2}
    options |= {"lora_target_modules": "all-linear", "lora_dropout": 0}
    answer = harness.run("finetune", options)
    assert answer["code"] == 0, answer["said"]
    questions = [
        data_encode.encode(data_conversation.single(row["instruction"]), template, tokenizer)[0]
        for row in rows
    ]
    stopped, model = [], AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    for trained in (False, True):
        model = PeftModel.from_pretrained(model, tmp_path / "run") if trained else model
        answers = transformers_engine.greedy(model, questions, LONGEST, ends)
        stopped.append(sum(len(ids) < LONGEST for ids in answers) / len(answers))
    assert stopped[0] < 0.5
    assert stopped[1] > 0.95
