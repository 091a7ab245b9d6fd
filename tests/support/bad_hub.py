"""A model hub on the loopback address that fails on demand: it cuts, stalls, lies, redirects or refuses.

It answers the requests that onecard/hub/listing.py sends to the hub and to ModelScope, serves ranges, and
records all requests. The same server under the name localhost stands for another host.
"""

import contextlib
import dataclasses
import hashlib
import json
import re
import threading
import time
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from onecard.config.tools import DownloadConfig
from onecard.hub import download as hub_download
from tests.support import console

NAME = "someone/model"


@dataclasses.dataclass
class Hub:
    """The files of the hub, its faults, and the requests that it got."""

    commits: dict[str, dict[str, bytes]]  # commit -> name -> content
    branch: str  # the commit that main is at
    faults: dict[str, list[Any]] = dataclasses.field(default_factory=dict)  # name -> one for each request
    asked: list[tuple[str, str, dict[str, str]]] = dataclasses.field(default_factory=list)
    listed: dict[str, str] = dataclasses.field(default_factory=dict)  # name -> the name that is listed
    lies: dict[str, bytes] = dataclasses.field(default_factory=dict)  # name -> what is sent instead
    address: str = ""
    other: str = ""  # the same server under another host's name

    def files(self, path: str) -> list[tuple[str, str, dict[str, str]]]:
        return [entry for entry in self.asked if path in entry[1]]


def download(served: Hub, folder: Path | None, **options: Any) -> list[str]:
    """Download the model from this hub; returns the lines printed meanwhile."""
    settings = {"model_path": NAME, "to": folder and str(folder), "endpoint": served.address, **options}
    with console.heard() as printed:
        hub_download.run(DownloadConfig(**settings))
    return printed


def commit(number: int) -> str:
    return f"{number:040x}"


def hub_of(files: dict[str, bytes], number: int = 1) -> Hub:
    return Hub({commit(number): files}, commit(number))


@contextlib.contextmanager
def serving(hub: Hub) -> Iterator[Hub]:
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            parts = urlsplit(self.path)
            path, query = unquote(parts.path), parse_qs(parts.query)
            headers = {name.title(): value for name, value in self.headers.items()}
            hub.asked.append((headers["Host"], path, headers))
            fault = next(iter(hub.faults.get("list", [])), None)
            if path.startswith(("/api/models/", "/api/v1/models/")) and not path.endswith("/repo") and fault:
                hub.faults["list"].pop(0)
                status, headers, _, content = (*fault, None, b"{}")[:4]
                self.answer(content, status, headers)
            elif match := re.fullmatch(rf"/api/models/{NAME}/revision/(.+)", path):
                self.listing(match[1])
            elif match := re.fullmatch(rf"/{NAME}/resolve/([0-9a-f]{{40}})/(.+)", path):
                self.file(match[2], hub.commits.get(match[1], {}).get(match[2]))
            elif path == f"/api/v1/models/{NAME}/repo/files":
                self.modelscope(query["Revision"][0])
            elif path == f"/api/v1/models/{NAME}/repo":
                name = query["FilePath"][0]
                self.file(name, hub.commits.get(query["Revision"][0], {}).get(name))
            elif path.startswith("/plain/"):
                name = path.removeprefix("/plain/")
                self.file(name, hub.commits[hub.branch].get(name))
            else:
                self.answer(b'{"error": "Repository not found"}', 404, {"X-Error-Code": "RepoNotFound"})

        def listing(self, revision: str) -> None:
            which = hub.branch if revision == "main" else revision
            if which not in hub.commits:
                self.answer(b'{"error": "no such revision"}', 404, {"X-Error-Code": "RevisionNotFound"})
                return
            siblings = []
            for name, content in hub.commits[which].items():
                entry: dict[str, Any] = {"rfilename": hub.listed.get(name, name), "size": len(content)}
                blob = b"blob %d\0" % len(content) + content
                entry["blobId"] = hashlib.sha1(blob, usedforsecurity=False).hexdigest()
                if name.endswith((".safetensors", ".bin")):
                    digest = hashlib.sha256(content).hexdigest()
                    entry["lfs"] = {"size": len(content), "sha256": digest, "pointerSize": 130}
                siblings.append(entry)
            self.answer(json.dumps({"id": NAME, "sha": which, "siblings": siblings}).encode())

        def modelscope(self, revision: str) -> None:
            which = hub.branch if revision == "master" else revision
            if which not in hub.commits:
                self.answer(b'{"Code": 404, "Message": "no such revision"}', 404)
                return
            files = [
                {
                    "Path": hub.listed.get(name, name),
                    "Name": name.rpartition("/")[2],
                    "Type": "blob",
                    "Size": len(content),
                    "Sha256": hashlib.sha256(content).hexdigest(),
                    "Revision": which,
                }
                for name, content in hub.commits[which].items()
            ]
            self.answer(json.dumps({"Code": 200, "Data": {"Files": files}, "Success": True}).encode())

        def file(self, name: str, content: bytes | None) -> None:
            if content is None:
                self.answer(b"", 404)
                return
            faults = hub.faults.get(name, [])
            fault = faults.pop(0) if faults else None
            if fault == "true again":
                hub.lies.pop(name)
            content = hub.lies.get(name, content)
            if isinstance(fault, tuple):  # (status, headers)
                self.answer(b"", *fault)
                return
            if fault == "elsewhere":
                self.answer(b"", 302, {"Location": f"{hub.other}{self.path}"})
                return
            tag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
            start, status, headers = 0, 200, {"ETag": tag}
            ranged = re.match(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
            same = self.headers.get("If-Range", tag) == tag
            if ranged and same and fault != "no ranges":
                start = int(ranged[1])
                if start >= len(content):
                    self.answer(b"", 416, {"Content-Range": f"bytes */{len(content)}"})
                    return
                end = int(ranged[2]) + 1 if ranged[2] else len(content)
                headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(content)}"
                status, piece = 206, content[start:end]
            else:
                piece = content
            self.answer(piece, status, headers, fault)

        def answer(
            self, content: bytes, status: int = 200, headers: dict[str, str] | None = None, fault: Any = None
        ) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(key, value)
            self.end_headers()
            if isinstance(fault, int):  # cut after so many bytes
                self.wfile.write(content[:fault])
                self.close_connection = True
            elif fault == "stall":
                self.wfile.write(content[: len(content) // 2])
                self.wfile.flush()
                time.sleep(0.6)
                self.close_connection = True
            else:
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        hub.address = f"http://127.0.0.1:{server.server_port}"
        hub.other = f"http://localhost:{server.server_port}"
        try:
            yield hub
        finally:
            server.shutdown()
