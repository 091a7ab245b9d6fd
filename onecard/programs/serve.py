"""Serve a model and its adapters over HTTP: the calls of OpenAI and of TigerBot, on this machine.

python serve/app.py --lora_path lora-checkpoints/demo
"""

from __future__ import annotations

import dataclasses
import socket
import typing

from onecard.config import declaration, generation
from onecard.config import options as config_options
from onecard.config import serving as config_serving
from onecard.errors import UserError
from onecard.system import console as system_console
from onecard.system import http_guard

if typing.TYPE_CHECKING:
    from fastapi import FastAPI

    from onecard.config.serving import ServeConfig
    from onecard.inference.chat import Chat
    from onecard.serving.store import Store

SETTINGS = config_serving.ServeConfig  # the class of its options
# options whose smaller values need less memory
LESS_MEMORY = declaration.memory_savers(SETTINGS)
YOUR_KEY = "YOUR_KEY"  # in the lines to copy, where the key is not shown
ONCE = "This is the only time that this key is shown. It may do everything:"


def main(arguments: list[str]) -> None:
    options = config_options.parse(SETTINGS, arguments, description=__doc__)
    config_serving.check_served(options)
    check_exposure(options)
    from onecard.conversion import gguf_cache  # imported late, because --help loads no other room
    from onecard.inference import chat
    from onecard.serving import server
    from onecard.serving import store as serving_store

    folder = serving_store.folder_of(options.data_dir)
    with listening(options) as address, serving_store.served(folder) as store:
        session = chat.start(options, gguf_cache.for_llama, sequences=options.at_once)
        app = application(options, session, store)
        system_console.say(welcome(options, session, store))
        server.run(app, address, options.drain_seconds)


def check_exposure(options: ServeConfig) -> None:
    """Raise UserError when other machines could reach the service and nobody said so."""
    if options.allow_remote or http_guard.is_local(options.host):
        return
    problem = (
        f"--host {options.host}: other machines could reach /docs, /health and /ready without a key, and "
        "the models with one. The connection is not encrypted."
    )
    raise UserError(problem, "Add --allow_remote, or leave it at 127.0.0.1.")


def listening(options: ServeConfig) -> socket.socket:
    """A socket at the address; raises UserError when it cannot be had."""
    family = socket.AF_INET6 if ":" in options.host else socket.AF_INET
    try:
        return socket.create_server((options.host, options.port), family=family, backlog=128)
    except OSError as error:
        problem = f"{options.host}:{options.port} cannot be listened at: {error.strerror or error}."
        raise UserError(problem, "End what listens there, or choose another --port.") from None


def application(options: ServeConfig, session: Chat, store: Store) -> FastAPI:
    """The HTTP application on a chat and the keys of a store."""
    from onecard.inference import chat
    from onecard.serving import app as serving_app
    from onecard.serving.models import Models
    from onecard.serving.rate_limits import RateLimits
    from onecard.serving.service import Limits

    limits = RateLimits()
    doors = serving_app.Doors(store.keys.find, limits.wait_of, limits.wait_after_failure)
    of_answers = chat.with_its_mode(session, options, frozenset())
    fields = [field.name for field in dataclasses.fields(generation.Generation)]
    names = {options.host} if options.host not in ("0.0.0.0", "::") else {socket.gethostname()}
    settings = serving_app.Settings(
        local=not options.allow_remote,
        names=names,
        origins=[options.origin] if options.origin else [],
        limits=Limits(at_once=options.at_once, most_waiting=options.max_queue),
        log_prompts=options.log_prompts,
        tigerbot=generation.Generation(**{name: getattr(of_answers, name) for name in fields}),
        system=options.system,
    )
    return serving_app.create_app(Models(session), doors, settings)


def welcome(options: ServeConfig, session: Chat, store: Store) -> str:
    """Where the service is and how it is called, with the first key if it has just been made."""
    host = options.host if options.host not in ("0.0.0.0", "::") else socket.gethostname()
    place = f"http://{f'[{host}]' if ':' in host else host}:{options.port}"
    model = next(iter(session.engine.adapters), generation.BASE)
    first = store.keys.first_admin_key()
    key = first[1] if first else YOUR_KEY
    lines = [f"key         {ONCE}\n{key}"] if first else []
    message = '[{"role": "user", "content": "Name three ways to save water."}]'
    lines += [
        f"serving     {place}/v1 (page of the calls: {place}/docs); Ctrl-C stops",
        f"curl -s {place}/v1/chat/completions -H 'Authorization: Bearer {key}' "
        f'-H \'Content-Type: application/json\' -d \'{{"model": "{model}", "messages": {message}}}\'',
        f'python3 -c \'import openai; print(openai.OpenAI(base_url="{place}/v1", api_key="{key}")'
        f'.chat.completions.create(model="{model}", messages={message}).choices[0].message.content)\'',
        f'python3 -c \'import requests; print(requests.post("{place}/bot-service/ai_service/gpt", '
        f'headers={{"Authorization": "Bearer {key}"}}, '
        f'json={{"text": "Name three ways to save water.", "modelVersion": "{model}"}}).json())\'',
    ]
    return "\n".join(lines)
