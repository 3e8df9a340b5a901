"""A stand-in for the model hub: takes what `push_to_hub` sends and writes it into a folder. Nothing leaves the machine."""

import base64
import contextlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path


COMMIT = "0" * 40


@contextlib.contextmanager
def local_hub(folder: Path) -> Iterator[str]:
    """Serve the few calls that an upload needs; files of `me/model` land in `folder / "me" / "model"`. Yields the URL."""

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *_):
            pass

        def answer(self, content, code=200):
            body = json.dumps(content).encode()
            self.send_response(code)
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(body)

        def repo(self):
            return "/".join(self.path.split("/")[3:5])

        def do_GET(self):
            self.answer({"error": "not here"}, 404)

        do_HEAD = do_GET

        def do_POST(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            if self.path == "/api/repos/create":
                asked = json.loads(body)
                name = "/".join(filter(None, (asked.get("organization", "me"), asked["name"])))
                self.answer({"url": f"{url}/{name}", "name": name, "id": name})
            elif self.path == "/api/validate-yaml":
                self.answer({"errors": [], "warnings": []})
            elif "/preupload/" in self.path:
                files = [
                    {"path": f["path"], "uploadMode": "regular", "shouldIgnore": False}
                    for f in json.loads(body)["files"]
                ]
                self.answer({"files": files, "commitOid": COMMIT})
            elif "/commit/" in self.path:
                for line in map(json.loads, body.splitlines()):
                    if line["key"] == "file":
                        place = folder / self.repo() / line["value"]["path"]
                        place.parent.mkdir(parents=True, exist_ok=True)
                        place.write_bytes(base64.b64decode(line["value"]["content"]))
                self.answer(
                    {"commitUrl": f"{url}/{self.repo()}/commit/{COMMIT}", "commitOid": COMMIT, "success": True}
                )
            else:
                self.answer({"error": f"no such call: {self.path}"}, 404)

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    try:
        yield url
    finally:
        server.shutdown()
        server.server_close()
