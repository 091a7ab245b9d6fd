"""Who may reach a window: others only with a password, and a public link only after it was confirmed."""

import sys

from onecard.config.chat import ChatConfig
from onecard.errors import UserError
from onecard.system import http_guard


def check_exposure(options: ChatConfig) -> None:
    """Raise UserError when others could reach the window without a password."""
    if options.auth:
        return
    if options.share:
        problem = "--share makes a public link: anyone with it could use this model."
        raise UserError(problem, "Add --auth user:password.")
    if not http_guard.is_local(options.server_name):
        problem = f"--server_name {options.server_name}: others in the network could use this model."
        raise UserError(problem, "Add --auth user:password, or leave it at 127.0.0.1.")


def confirm_share(options: ChatConfig) -> None:
    """Ask in the terminal before a public link is made; raises UserError when it is not confirmed."""
    if not options.share:
        return
    warning = "--share sends everything through gradio's servers, and the whole internet can reach the link."
    if not sys.stdin.isatty():
        raise UserError(warning, "It has to be confirmed in a terminal.")
    print(f"{warning} Type share to go on: ", end="", flush=True)
    if sys.stdin.readline().strip() != "share":
        raise UserError(
            "No link was made.", "Leave out --share for a window that only this machine can reach."
        )
