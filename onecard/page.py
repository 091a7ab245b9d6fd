"""What all windows share: looks, a growing answer as HTML, a server that is local unless told otherwise."""

import html
import ipaddress
import os
import re
import sys
from typing import Any

os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")  # before gradio is imported: it looks then

import gradio as gr
from starlette.middleware import Middleware

from onecard.answer import Text
from onecard.chat_config import ChatConfig
from onecard.errors import UserError

PORTS = range(7860, 7960)
UPLOAD = "20mb"
POLICY = "img-src 'self' data: blob:; media-src 'self' blob:; connect-src 'self' ws: wss:; frame-src 'none'"
API = "/gradio_api/"
THEME = gr.themes.Soft(
    primary_hue="teal",
    neutral_hue="slate",
    font=["system-ui", "PingFang SC", "Microsoft YaHei", "Noto Sans CJK SC", "sans-serif"],
    font_mono=["ui-monospace", "Menlo", "Consolas", "monospace"],
)
CSS = """
.gradio-container { max-width: 1280px !important; margin: 0 auto !important; }
.answer { white-space: pre-wrap; overflow-wrap: anywhere; min-height: 6em; line-height: 1.5; }
.may-change { opacity: .55; font-style: italic; border-bottom: 1px dotted currentColor; }
.beam { white-space: pre-wrap; overflow-wrap: anywhere; border-left: 3px solid var(--border-color-primary);
  padding: .2em .8em; margin: .4em 0; }
.status { font-size: .85em; opacity: .85; min-height: 1.4em; }
.status .wrong { color: #c2410c; font-weight: 600; }
.dark .status .wrong { color: #fdba74; }
.narrow button { min-width: 0 !important; white-space: nowrap; }
.head { align-items: center; justify-content: space-between; flex-wrap: nowrap !important; }
.head > button { flex: 0 0 auto !important; padding: .3em .9em !important; }
@media (max-width: 640px) {
  .gradio-container { padding: .4em !important; }
  .narrow { gap: .3em !important; }
  .narrow button { padding: .4em .5em !important; font-size: .85em !important; }
}
"""
# of every event: no spinner over the text, and not in the list of endpoints, which gradio shows to anyone
LONG = {"show_progress": "hidden", "api_visibility": "private"}
QUICK = {**LONG, "queue": False}
TOGGLE_DARK = "() => { document.body.classList.toggle('dark'); }"


def escaped(text: str) -> str:
    return html.escape(text, quote=False)


def growing(text: Text) -> str:
    """An answer as HTML; what may still change stands apart."""
    tail = f'<span class="may-change">{escaped(text.open)}</span>' if text.open else ""
    return f'<div class="answer" data-testid="answer">{escaped(text.stable)}{tail}</div>'


def beams(text: Text, lang: str) -> str:
    """All beams, the best first."""
    if len(text.beams) < 2:
        return ""
    return "".join(f'<div class="beam"><b>{n}</b> {escaped(b)}</div>' for n, b in enumerate(text.beams, 1))


def as_markdown(text: Text) -> str:
    """An answer for a chat's Markdown: none of its own HTML is taken for HTML, outside of code or in it."""
    if not text.open:
        return _without_html(text.stable)
    if len(re.findall("^```", text.stable, flags=re.MULTILINE)) % 2:  # inside of code nothing is marked
        return _without_html(text.stable + text.open)
    lines = escaped(text.open).replace("\n", "<br>")
    return f'{_without_html(text.stable)}<span class="may-change">{lines}</span>'


CODE = re.compile(r"(^```.*?(?:^```[^\n]*$|\Z)|(?<!\\)`[^`\n]+(?<!\\)`)", flags=re.DOTALL | re.MULTILINE)


def _without_html(text: str) -> str:
    """Text outside of code without HTML and pictures, which would be fetched from wherever they lie."""
    parts = CODE.split(text)
    return "".join(
        part if number % 2 else part.replace("&", "&amp;").replace("<", "&lt;").replace("![", "!\\[")
        for number, part in enumerate(parts)
    )


def status(text: str, wrong: bool = False) -> str:
    kind = ' class="wrong" role="alert"' if wrong else ""
    return f'<div class="status" data-testid="status"><span{kind}>{escaped(text)}</span></div>'


class Guard:
    """Refuses what another site's page sends, and names that only point here (DNS rebinding).

    With a password it also closes what gradio leaves open to those who did not log in.
    """

    def __init__(self, app: Any, local: bool, login: bool, origin: str):
        """origin: of a proxy that was allowed, or empty."""
        self.app, self.local, self.login, self.origin = app, local, login, origin

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
        elif not self._is_fine(scope):
            await _refuse(receive, send, 403, b"Not from here.")
        elif self.login and not self._may_enter(scope):
            await _refuse(receive, send, 401, b"Log in first.")
        else:
            await self.app(scope, receive, _with_policy(send))

    def _may_enter(self, scope: Any) -> bool:
        if not scope["path"].startswith(API) or scope["path"] == f"{API}startup-events":
            return True  # gradio asks itself for this one when it starts
        cookies = dict(scope["headers"]).get(b"cookie", b"").decode("latin-1")
        held = [part.partition("=")[2] for part in cookies.split("; ") if part.startswith("access-token")]
        return any(token in scope["app"].tokens for token in held)

    def _is_fine(self, scope: Any) -> bool:
        headers = {name.lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get(b"host", ""), headers.get(b"origin")
        if self.origin and self.origin in (origin, f"https://{host}"):
            return True
        if self.local and not is_local(_name(host)):
            return False
        return origin is None or origin.split("://")[-1] == host


def _with_policy(send: Any) -> Any:
    """An answer's picture, or a page that was tampered with, asks no other host for anything."""

    async def sending(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", []), (b"content-security-policy", POLICY.encode())]
        await send(message)

    return sending


async def _refuse(receive: Any, send: Any, status: int, why: bytes) -> None:
    for _ in range(64):  # a connection closed on a body half sent would be reset, and the answer lost
        if not (await receive()).get("more_body"):
            break
    await send({"type": "http.response.start", "status": status, "headers": []})
    await send({"type": "http.response.body", "body": why})


def _name(host: str) -> str:
    """A Host header without its port."""
    return host[1:].split("]")[0] if host.startswith("[") else host.rsplit(":", 1)[0]


def is_local(name: str) -> bool:
    if name == "localhost":
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def check_exposure(options: ChatConfig) -> None:
    """Raise UserError when others could reach the window without a password."""
    if options.auth:
        return
    if options.share:
        problem = "--share makes a public link: anyone with it could use this model."
        raise UserError(problem, "Add --auth user:password.")
    if not is_local(options.server_name):
        problem = f"--server_name {options.server_name}: others in the network could use this model."
        raise UserError(problem, "Add --auth user:password, or leave it at 127.0.0.1.")


def confirm_share(options: ChatConfig) -> None:
    """A public link is only made after its owner typed so."""
    if not options.share:
        return
    warning = "--share sends everything through gradio's servers, and the whole internet can reach the link."
    if not sys.stdin.isatty():
        raise UserError(warning, "It has to be confirmed in a terminal.")
    print(f"{warning} Type share to go on: ", end="", flush=True)
    if sys.stdin.readline().strip() != "share":
        raise UserError("No link was made.", "Leave --share out for a window of this machine alone.")


def launch(window: gr.Blocks, options: ChatConfig, wait: bool = True) -> str:
    """Serve the window; returns its address when it does not wait for Ctrl-C. Raises UserError."""
    check_exposure(options)
    confirm_share(options)
    local = is_local(options.server_name)
    window.queue(max_size=options.queue, default_concurrency_limit=4, api_open=False)
    ports = [options.server_port] if options.server_port else PORTS
    user = tuple(options.auth.split(":", 1)) if options.auth else None
    origin = (options.origin or "").rstrip("/")
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
                app_kwargs={
                    "middleware": [
                        Middleware(Guard, local=local and not options.share, login=bool(user), origin=origin)
                    ]
                },
                max_file_size=UPLOAD,
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
        print(f"Open {url} in a browser. Ctrl-C ends.", flush=True)
        if wait:
            window.block_thread()
        return url
    problem = f"--server_port {options.server_port or f'{PORTS[0]} to {PORTS[-1]}'}: in use, or not allowed."
    raise UserError(problem, "Choose another.")
