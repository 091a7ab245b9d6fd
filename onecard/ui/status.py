"""The status line of an answer: speed, context, device, and why it ended."""

from typing import NamedTuple

from onecard.inference.chat import Chat, Reply
from onecard.inference.decoding import CANCELLED, END, LENGTH, NO_MEMORY, STOP
from onecard.inference.detokenizer import PartialText
from onecard.inference.engine import Placement


class AnswerUpdate(NamedTuple):
    """An answer as far as it has grown, and what the status line says about it."""

    text: PartialText
    message: str
    is_error: bool


BY_ITSELF = (END, STOP, LENGTH)  # the ways in which an answer ends without anybody's doing
WHY = {
    LENGTH: ("ended at the limit of new tokens", "已达最多新词元"),
    STOP: ("ended at a stop word", "遇到停止词"),
    CANCELLED: ("stopped", "已停止"),
    NO_MEMORY: (
        "out of memory before the end of the answer. "
        "Fewer beams, a shorter chat or fewer bits need less memory",
        "回答结束前内存不足；可减少束宽、缩短对话或降低位数",
    ),
}


def describe(reply: Reply, chat: Chat, lang: str) -> str:
    """The message about a reply: speed, tokens of the context, device, and why the answer ended."""
    zh = lang == "zh"
    if reply.loading:
        trainings = ", ".join(chat.engine.placement.beside)
        message = "正在载入模型 ..." if zh else "loading the model ..."
        beside = f"（{trainings} 正在同一设备上训练）" if zh else f" ({trainings} trains on the same device)"
        return message + (beside if trainings else "") + (f" {reply.ended}" if reply.ended else "")
    if not reply.finished and not reply.text.tokens:
        word = "读取" if zh else "reading"
        return f"{word} {reply.read} / {reply.prompt_tokens} {'词元' if zh else 'tokens'}"
    used = reply.prompt_tokens + reply.text.tokens
    parts = [
        f"{reply.speed:.1f} {'词元/秒' if zh else 'tokens/s'}",
        f"上下文 {used} / {chat.engine.context} 词元"
        if zh
        else f"{used} / {chat.engine.context} context tokens",
        f"{chat.engine.name}, {where(chat.engine.placement)[zh]}",
    ]
    if reply.first is not None:
        seconds = f"{reply.first:.1f}"
        parts.insert(1, f"首词元用时 {seconds} 秒" if zh else f"first token after {seconds} s")
    if reply.finished and reply.seed is not None:
        parts.append(f"{'种子' if zh else 'seed'} {reply.seed}")
    if reply.left_out:
        number = reply.left_out
        turns = "turn" if number == 1 else "turns"
        parts.append(f"{number} 轮较早对话未包含" if zh else f"{number} oldest {turns} left out")
    if reply.ended:
        parts.append(f"已重新载入模型：{reply.ended}" if zh else f"the model was loaded again: {reply.ended}")
    if reply.finished in WHY:
        parts.append(WHY[reply.finished][zh])
    return " · ".join(parts)


def where(placement: Placement) -> tuple[str, str]:
    """Where a model runs and which trainings share the device, in English and in Chinese."""
    english = chinese = placement.device
    if placement.threads is not None:
        english, chinese = f"{english}, {placement.threads} threads", f"{chinese}，{placement.threads} 线程"
    if placement.gpu_layers:
        number = placement.gpu_layers
        layers = ("all", "全部") if number < 0 else (str(number), f"{number} 个")
        english = f"{english}, {layers[0]} layers on the GPU"
        chinese = f"{chinese}，{layers[1]}层在 GPU 上"
    for name in placement.beside:
        english, chinese = f"{english}, beside the training {name}", f"{chinese}，与训练 {name} 同时运行"
    return english, chinese


def combined(updates: dict[str, AnswerUpdate], names: dict[str, str], note: str = "") -> tuple[str, bool]:
    """The message about one answer, or about two side by side, and whether it is an error.

    names: of the sides, put before messages that differ; note: is put at the end.
    """
    errors = {side: update.message for side, update in updates.items() if update.is_error}
    messages = errors or {side: update.message for side, update in updates.items()}
    lines = list(dict.fromkeys(messages.values()))
    if len(updates) > 1 and (len(lines) > 1 or len(messages) < len(updates)):
        lines = [f"{names[side]}: {message}" for side, message in messages.items()]
    return " | ".join([*lines, *filter(None, [note])]), bool(errors)


def is_nothing(updates: dict[str, AnswerUpdate]) -> bool:
    """Whether no side has text and none ended by itself."""
    return not any(update.text.whole or update.text.finished in BY_ITSELF for update in updates.values())
