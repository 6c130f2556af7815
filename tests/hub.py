"""A hub on loopback that serves one repository's folder at one commit, as far as transformers' downloads ask of it."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

COMMIT = "c0ffee" + "0" * 34


@contextmanager
def serving(name: str, folder: Path) -> Iterator[tuple[str, list[str]]]:
    """The hub's address, and what is asked of it, while it runs; branch ``main`` is ``COMMIT``."""
    asked: list[str] = []
    files = {p.name: p.read_bytes() for p in folder.iterdir()}

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_: object) -> None:
            pass

        def do_HEAD(self) -> None:
            self.answer(whole=False)

        def do_GET(self) -> None:
            self.answer(whole=True)

        def answer(self, *, whole: bool) -> None:
            asked.append(f"{self.command} {self.path}")
            place = self.path.partition("?")[0]
            known = {f"/api/models/{name}/revision/{r}" for r in ("main", COMMIT)}
            trees = {f"/api/models/{name}/tree/{r}" for r in ("main", COMMIT)}
            file = place.removeprefix(f"/{name}/resolve/{COMMIT}/")
            if place in known:
                siblings = [{"rfilename": n} for n in files]
                self.send(json.dumps({"id": name, "sha": COMMIT, "siblings": siblings}).encode(), whole)
            elif place in trees:
                tree = [
                    {"type": "file", "path": n, "size": len(d), "oid": hashlib.sha1(d).hexdigest()}
                    for n, d in files.items()
                ]
                self.send(json.dumps(tree).encode(), whole)
            elif file in files:
                self.send(files[file], whole)
            else:
                code = "RevisionNotFound" if place.startswith(f"/api/models/{name}/") else "RepoNotFound"
                self.send(b"{}", whole, status=404, error=code)

        def send(self, body: bytes, whole: bool, status: int = 200, error: str = "") -> None:
            self.send_response(status)
            self.send_header("Content-Length", str(len(body)))
            self.send_header("X-Repo-Commit", COMMIT)
            self.send_header("ETag", f'"{hashlib.sha256(body).hexdigest()}"')
            if error:
                self.send_header("X-Error-Code", error)
            self.end_headers()
            if whole:
                self.wfile.write(body)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()
