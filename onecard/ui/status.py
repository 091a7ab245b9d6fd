"""The line that says how an answer went: speed, context, device, and why it ended."""

from onecard.inference.chat import Chat, Reply
from onecard.inference.decoding import CANCELLED, END, LENGTH, NO_MEMORY, STOP
from onecard.inference.detokenizer import Text
from onecard.inference.engine import Placement
from onecard.ui import html as ui_html


def status(text: str, wrong: bool = False) -> str:
    kind = ' class="wrong" role="alert"' if wrong else ""
    return f'<div class="status" data-testid="status"><span{kind}>{ui_html.escaped(text)}</span></div>'


BY_ITSELF = (END, STOP, LENGTH)
Said = tuple[Text, str, bool]  # an answer, what the status line says, is it an error
WHY = {
    LENGTH: ("cut at the most new tokens", "已达最多新词元"),
    STOP: ("stop word", "遇到停止词"),
    CANCELLED: ("stopped", "已停止"),
    NO_MEMORY: (
        "out of memory: this much was written. Fewer beams, a shorter chat or fewer bits need less",
        "内存不足，以上为已生成部分；可减少束宽、缩短对话或降低位数",
    ),
}


def describe(reply: Reply, chat: Chat, lang: str) -> str:
    """The status line: speed, tokens of the context, device, and why it ended."""
    zh = lang == "zh"
    if reply.loading:
        others = ", ".join(chat.engine.placement.beside)
        told = "正在载入模型 ..." if zh else "loading the model ..."
        shared = f"（{others} 正在同一设备上训练）" if zh else f" ({others} is trained on the same device)"
        return told + (shared if others else "")
    if not reply.finished and not reply.text.tokens:
        word = "读取" if zh else "reading"
        return f"{word} {reply.read} / {reply.prompt_tokens} {'词元' if zh else 'tokens'}"
    used = reply.prompt_tokens + reply.text.tokens
    parts = [
        f"{reply.speed:.1f} {'词元/秒' if zh else 'tokens/s'}",
        f"{used} / {chat.engine.context} {'词元（上下文）' if zh else 'tokens of the context'}",
        f"{chat.engine.name}, {where(chat.engine.placement)[zh]}",
    ]
    if reply.first is not None:
        parts.insert(1, f"{'首词元' if zh else 'first after'} {reply.first:.1f} s")
    if reply.finished and reply.seed is not None:
        parts.append(f"{'种子' if zh else 'seed'} {reply.seed}")
    if reply.left_out:
        left = reply.left_out
        turns = "turn" if left == 1 else "turns"
        parts.append(f"{left} 轮较早对话未包含" if zh else f"{left} oldest {turns} left out")
    if reply.finished in WHY:
        parts.append(WHY[reply.finished][zh])
    return " · ".join(parts)


def where(placement: Placement) -> tuple[str, str]:
    """Where a model runs and beside which trainings, English and Chinese."""
    english = chinese = placement.device
    if placement.threads is not None:
        english, chinese = f"{english}, {placement.threads} threads", f"{chinese}，{placement.threads} 线程"
    if placement.gpu_layers:
        number = placement.gpu_layers
        layers = ("all", "全部") if number < 0 else (str(number), f"{number} 个")
        english = f"{english}, {layers[0]} layers on the card"
        chinese = f"{chinese}，{layers[1]}层在显卡上"
    for name in placement.beside:
        english, chinese = f"{english}, beside the training {name}", f"{chinese}，与训练 {name} 同时运行"
    return english, chinese


def together(sides: dict[str, Said], names: dict[str, str], note: str = "") -> tuple[str, bool]:
    """The status line of one answer, or of two side by side, and whether it is an error.

    names: of the sides, said when there are two that say something else; note: goes behind it.
    """
    problems = {key: told for key, (_, told, wrong) in sides.items() if wrong}
    shown = problems or {key: told for key, (_, told, _) in sides.items()}
    lines = list(dict.fromkeys(shown.values()))
    if len(sides) > 1 and (len(lines) > 1 or len(shown) < len(sides)):
        lines = [f"{names[key]}: {told}" for key, told in shown.items()]
    return " | ".join([*lines, *filter(None, [note])]), bool(problems)


def came_to_nothing(sides: dict[str, Said]) -> bool:
    """Whether no side has text, and none ended by itself."""
    return not any(text.whole or text.finished in BY_ITSELF for text, _, _ in sides.values())
