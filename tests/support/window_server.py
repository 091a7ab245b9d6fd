"""A window on a tiny model that answers slowly enough to be watched, in a process of its own.

Arguments of python -m tests.support.window_server: the kind of window (single, turns, broken or training), a
folder for the files that it writes, then options of the window. A random Llama with two adapters answers.
With --answers FILE, the answers are taken from a JSON list instead, one for each question. For every token
there is one line in FOLDER/tokens, so that a test can see whether an answer is still being generated.
"""

import json
import sys
import time
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from transformers import LlamaForCausalLM

from onecard.config import options as config_options
from onecard.config.chat import ChatConfig, SingleConfig
from onecard.data import template as data_template
from onecard.inference import chat, transformers_engine
from onecard.inference.detokenizer import PartialText
from onecard.models import adapter as models_adapter
from onecard.ui import chat_inputs, chat_window, page, single_window, training_window
from tests.support import tiny

PAUSE = 0.03  # seconds per token


class SlowEngine(transformers_engine.Engine):
    """An engine that is slow, counts its tokens, and writes letters only.

    The bytes that a random model writes are seldom characters.
    """

    folder: Path
    unreadable: list[int]

    @torch.inference_mode()
    def scores(self, *arguments):
        time.sleep(PAUSE)
        with open(self.folder / "tokens", "a", encoding="utf-8") as file:
            file.write(".\n")
        scores = super().scores(*arguments)
        scores[:, self.unreadable] = float("-inf")
        return scores


class Recorded(chat.Chat):
    """A chat that gives recorded answers, whatever the question is."""

    texts: list[str]

    def stream(self, conversation, settings, active_adapters=None, cancelled=lambda: False, template_name=""):
        text = self.texts.pop(0)
        for end in range(1, len(text) + 1, 7):
            yield chat.Reply(PartialText(text[:end], tokens=end), 5, 5, 0, 0, 0.1, 0.1)
            time.sleep(0.01)
        yield chat.Reply(PartialText(text, "", (text,), len(text), "end"), 5, 5, 0, 0, 0.1, 0.1)


def make_chat(folder: Path) -> chat.Chat:
    path = tiny.save_model(folder / "model")
    for number in (1, 2):
        torch.manual_seed(number)
        model = get_peft_model(
            LlamaForCausalLM.from_pretrained(path), LoraConfig(r=4, target_modules=["q_proj"])
        )
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                torch.nn.init.normal_(parameter, std=0.5)
        model.save_pretrained(folder / f"adapter{number}")
    tokenizer = tiny.tokenizer()
    model = LlamaForCausalLM.from_pretrained(path).eval()
    for number in (1, 2):
        model = models_adapter.attach(model, folder / f"adapter{number}", f"adapter{number}")
    engine = SlowEngine(model, tokenizer, 512, ["adapter1", "adapter2"])
    engine.folder = folder
    texts = {token: tokenizer.decode([token]) for token in range(len(tokenizer))}
    engine.unreadable = [token for token, text in texts.items() if not (text.isascii() and text.isalnum())]
    return chat.Chat(engine, tokenizer, data_template.load("alpaca", tokenizer), (("adapter1", 1.0),))


def break_once() -> None:
    """Let the first question raise an exception that no code expects."""
    original = chat_inputs.read

    def read(layout, values):
        chat_inputs.read = original
        raise ArithmeticError("planted")

    chat_inputs.read = read


def main() -> None:
    kind, folder, *argv = sys.argv[1:]
    texts = None
    if kind == "broken":
        break_once()
    if "--answers" in argv:
        index = argv.index("--answers")
        texts = json.loads(Path(argv[index + 1]).read_text(encoding="utf-8"))
        argv = argv[:index] + argv[index + 2 :]
    torch.set_num_threads(1)
    options = config_options.parse(SingleConfig if kind == "single" else ChatConfig, argv)
    if kind == "training":
        page.launch(training_window.build_page(options.lang, Path(folder) / "runs"), options)
        return
    session = make_chat(Path(folder))
    if texts is not None:
        session = Recorded(session.engine, session.tokenizer, session.template, session.active_adapters)
        session.texts = texts
    window = single_window if kind == "single" else chat_window
    page.launch(window.build_page(session, options), options)


if __name__ == "__main__":
    main()
