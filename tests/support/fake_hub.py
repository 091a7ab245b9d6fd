"""A stand-in for the model hub on the loopback address, with one repository.

The repository is a folder, or several commits between which its branch moves. The server answers the requests
of huggingface_hub's snapshot_download: the revision, the list of files, and the files.
"""

import contextlib
import dataclasses
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclasses.dataclass
class Repository:
    """Commits with their files, the commit of the branch main, the faults, and the requested paths."""

    commits: dict[str, Path]
    branch: str
    fails: dict[str, int] = dataclasses.field(default_factory=dict)  # a word of a path -> status
    asked: list[str] = dataclasses.field(default_factory=list)
    silent: bool = False  # accepts connections and never answers


@contextlib.contextmanager
def serving(name: str, folder: Path | Repository, kind: str = "models") -> Iterator[str]:
    """The address of a hub that holds `folder` under `name` (owner/repository) while the block runs."""
    repository = folder if isinstance(folder, Repository) else Repository({COMMIT: folder}, COMMIT)
    prefix = "" if kind == "models" else f"/{kind}"
    stopped = threading.Event()

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.do_GET()

        def do_GET(self) -> None:
            path = urlsplit(self.path).path
            if name in path:
                repository.asked.append(path)
            if repository.silent:
                stopped.wait()
                return
            status = next((status for word, status in repository.fails.items() if word in path), None)
            if status:
                self.answer(b'{"error": "not now"}', status)
                return
            requested = re.search(r"/(?:resolve|tree|revision)/([^/]+)", path)
            commit = requested[1] if requested and requested[1] != "main" else repository.branch
            if commit not in repository.commits:
                unknown = {"X-Error-Code": "RevisionNotFound"}
                self.answer(b'{"error": "Invalid rev id"}', 404, **unknown)
                return
            folder = repository.commits[commit]
            file = folder / path.removeprefix(f"{prefix}/{name}/resolve/{commit}/")
            files = [item for item in sorted(folder.iterdir()) if item.is_file()]
            if path.startswith(f"/api/{kind}/{name}/tree/"):
                entries = [
                    {"type": "file", "path": item.name, "size": item.stat().st_size, "oid": digest(item)}
                    for item in files
                ]
                self.answer(json.dumps(entries).encode())
            elif path.startswith(f"/api/{kind}/{name}"):
                siblings = [{"rfilename": item.name} for item in files]
                self.answer(json.dumps({"id": name, "sha": commit, "siblings": siblings}).encode())
            elif path.startswith(f"{prefix}/{name}/resolve/{commit}/") and file in files:
                self.answer(file.read_bytes(), ETag=f'"{digest(file)}"', **{"X-Repo-Commit": commit})
            else:
                self.answer(b'{"error": "Repository not found"}', 404, **{"X-Error-Code": "RepoNotFound"})

        def answer(self, content: bytes, status: int = 200, **headers: str) -> None:
            self.send_response(status)
            for key, value in {"Content-Length": str(len(content)), **headers}.items():
                self.send_header(key, value)
            self.end_headers()
            if self.command == "GET":
                self.wfile.write(content)

        def log_message(self, *_: object) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            stopped.set()
            server.shutdown()


def fetch(address: str, home: Path, function: str, name: str) -> str:
    """The result or the error of a function of onecard.hub.locate, with the hub at this address."""
    code = (
        "import sys; from onecard import errors; from onecard.hub import locate\n"
        f"try: print(locate.{function}(sys.argv[1]))\n"
        "except errors.UserError as error: print(error.problem)"
    )
    environment = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_OFFLINE": "0"}
    command = [sys.executable, "-c", code, name]
    ended = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return ended.stdout.strip()


def digest(path: Path) -> str:
    return hashlib.sha1(path.read_bytes(), usedforsecurity=False).hexdigest()
