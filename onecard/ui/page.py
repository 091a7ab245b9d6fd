"""What all windows share: theme, style sheet, scripts for the browser, the head of a page, the server.

The server can be reached from this machine alone unless the options say otherwise (guard.py,
system/http_guard.py).
"""

import os

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before the import of gradio, which reads it

import gradio as gr
from starlette.middleware import Middleware

from onecard.config.chat import ChatConfig
from onecard.errors import UserError
from onecard.system import http_guard
from onecard.ui import forms, guard
from onecard.ui import sessions as ui_sessions

# browsers offer navigator.clipboard only to https pages and to pages of this machine
COPY = """() => {
  const text = document.querySelector('#output .answer')?.innerText ?? '';
  if (navigator.clipboard) { navigator.clipboard.writeText(text); return; }
  const box = document.createElement('textarea');
  box.value = text;
  box.style.cssText = 'position: fixed; opacity: 0';
  document.body.append(box);
  box.select();
  document.execCommand('copy');
  box.remove();
}"""
TOGGLE_DARK = "() => { document.body.classList.toggle('dark'); }"
FOCUS = "() => document.querySelector('#box textarea')?.focus()"
DOWNLOAD = """(line) => {
  if (!line) return;
  const link = document.createElement('a');
  link.href = URL.createObjectURL(new Blob([line], {type: 'application/jsonl'}));
  link.download = 'chat-' + new Date().toISOString().slice(0, 19).replace(/[:T]/g, '-') + '.jsonl';
  link.click();
}"""
# chat: JSON; returns what is shown: nothing, or that the chat is too long (%s)
KEEP_CHAT = """(chat) => {
  try { sessionStorage.setItem('onecard-chat', chat); return ''; } catch (full) { return %s; }
}"""
# not before the stored texts are shown, or a new page would store its empty boxes over them
KEEP_TEXTS = """(...texts) => {
  if (!window.onecardKept) return;
  try { sessionStorage.setItem('onecard-texts', JSON.stringify(texts)); } catch (full) { }
}"""
KEPT_CHAT = "() => [sessionStorage.getItem('onecard-chat') || '[]']"
KEPT_TEXTS = """(...texts) => {
  window.onecardKept = true;
  let kept = null;
  try { kept = JSON.parse(sessionStorage.getItem('onecard-texts')); } catch (broken) { }
  const whole = Array.isArray(kept) && kept.length === texts.length;
  return whole ? kept.map(String) : texts;
}"""

PORTS = range(7860, 7960)
THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
)
CSS = """
/* a long word in an answer would make the page wider than the screen */
.gradio-container { width: 100% !important; max-width: min(1280px, 100vw) !important;
  margin: 0 auto !important; }
/* takes no room while it is empty */
#unkept:not(:has(.status)) { display: none; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 6em; line-height: 1.5; }
.may-change { opacity: .55; font-style: italic; border-bottom: 1px dotted currentColor; }
.beam { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--border-color-primary);
  padding: .2em .8em; margin: .4em 0; }
.status { font-size: .85em; opacity: .85; min-height: 1.4em; }
.status .wrong { color: #c2410c; font-weight: 600; }
.dark .status .wrong { color: #fdba74; }
/* room above the chat: its label and its button would cover the messages */
.bubble-wrap { margin-top: 2.5em; height: calc(100% - 2.5em) !important; }
.narrow button { min-width: 0 !important; white-space: nowrap; }
/* examples on a phone */
thead th { white-space: normal !important; }
/* a long path would make the page wider than a phone */
.info-text { overflow-wrap: anywhere; }
.head { align-items: center; justify-content: space-between; flex-wrap: nowrap !important; }
.head > button { flex: 0 0 auto !important; padding: .3em .9em !important; }
@media (max-width: 640px) {
  .gradio-container { padding: .4em !important; }
  .narrow { gap: .3em !important; flex-wrap: wrap !important; }
  .narrow:not(.head) button { flex: 1 0 auto !important; }
  .narrow button { padding: .4em .5em !important; font-size: .85em !important; }
}
"""
# for every event: no spinner over the text, and not in the list of endpoints, which gradio shows to anyone
LONG = {"show_progress": "hidden", "api_visibility": "private"}
QUICK = {**LONG, "queue": False}


def head(title: str, lang: str) -> None:
    """The first line of a page, with its button for light and dark."""
    with gr.Row(elem_classes=["narrow", "head"]):
        gr.Markdown(f"## OneCard · {title}")
        label = forms.text(lang, "Light / dark", "明 / 暗")
        dark = gr.Button(label, size="sm", scale=0, min_width=90, elem_id="dark")
    dark.click(None, js=TOGGLE_DARK)


def launch(window: gr.Blocks, options: ChatConfig, wait: bool = True) -> str:
    """Serve the window until Ctrl-C; without `wait`, return its address at once. Raises UserError."""
    guard.check_exposure(options)
    guard.confirm_share(options)
    local = http_guard.is_local(options.server_name)
    ui_sessions.STEPS.allow()
    window.queue(max_size=options.queue, default_concurrency_limit=4, api_open=False)
    ports = [options.server_port] if options.server_port else PORTS
    user = tuple(options.auth.split(":", 1)) if options.auth else None
    origin = (options.origin or "").rstrip("/")
    gate = Middleware(http_guard.Guard, local=local and not options.share, login=bool(user), origin=origin)
    for port in ports:
        try:
            _, url, _ = window.launch(
                server_name=options.server_name,
                server_port=port,
                share=options.share,
                auth=user,
                quiet=True,
                show_error=True,
                prevent_thread_lock=True,
                app_kwargs={"middleware": [gate]},
                max_file_size=http_guard.UPLOAD,
                allowed_paths=[os.devnull],  # an empty list would let GRADIO_ALLOWED_PATHS decide
                ssr_mode=False,
                enable_monitoring=False,
                footer_links=[],
                theme=THEME,
                css=CSS,
            )
        except OSError as error:
            if "port" not in str(error).lower() and "address" not in str(error).lower():
                raise
            continue
        print(f"Open {url} in a browser. Press Ctrl-C to end.", flush=True)
        if wait:
            window.block_thread()
            ui_sessions.STEPS.end()
        return url
    problem = f"--server_port {options.server_port or f'{PORTS[0]} to {PORTS[-1]}'}: in use, or not allowed."
    raise UserError(problem, "Choose another --server_port.")
