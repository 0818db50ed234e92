"""A small Hub on the loopback interface: the endpoints that the genuine `huggingface_hub` client calls to create a
repository, upload a folder in one commit, and download from it."""

import base64
import hashlib
import json
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

import yaml

LFS_SUFFIXES = (".safetensors", ".bin", ".png")


class Hub:
    """What the server stores. `commits` of a repository are dicts of path: content, the last is its head."""

    def __init__(self):
        self.repositories: dict[str, list[dict[str, bytes]]] = {}
        self.large_files: dict[str, bytes] = {}  # uploaded, by SHA-256, whether or not a commit names them
        self.requests: list[tuple[str, str]] = []
        self.fail_on: str | None = None  # a part of the path of requests that fail
        self.url = ""

    def head(self, repo_id: str) -> dict[str, bytes]:
        return self.repositories[repo_id][-1]

    def commit_hash(self, repo_id: str) -> str:
        return hashlib.sha1(f"{repo_id} {len(self.repositories[repo_id])}".encode()).hexdigest()

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and content of the answer to a request."""
        self.requests.append((method, path))
        if self.fail_on is not None and self.fail_on in path:
            return 403, {"X-Error-Message": "refused by the test"}, b"{}"
        if method in ("GET", "HEAD") and (found := re.fullmatch(r"/([^/]+/[^/]+)/resolve/[^/]+/(.+)", path)):
            return self.resolve(*found.groups())
        if method == "PUT" and path.startswith("/upload/"):
            self.large_files[hashlib.sha256(body).hexdigest()] = body
            return 200, {"ETag": '"x"'}, b""
        status, content = self.answer_json(path, body)
        return status, {"Content-Type": "application/json"}, json.dumps(content).encode()

    def resolve(self, repo_id: str, name: str) -> tuple[int, dict[str, str], bytes]:
        if repo_id not in self.repositories:
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        headers = {"X-Repo-Commit": self.commit_hash(repo_id)}
        if name not in self.head(repo_id):
            return 404, headers | {"X-Error-Code": "EntryNotFound"}, b""
        content = self.head(repo_id)[name]
        return 200, headers | {"ETag": f'"{hashlib.sha256(content).hexdigest()}"'}, content

    def answer_json(self, path: str, body: bytes) -> tuple[int, object]:
        if path == "/api/whoami-v2":
            return 200, {"type": "user", "name": "me", "orgs": []}
        if path == "/api/validate-yaml":
            metadata = yaml.safe_load(json.loads(body)["content"].split("---")[1])
            known = metadata.get("license", "other") in ("apache-2.0", "mit", "other")
            errors = [] if known else [{"message": '"license" must be one of a list'}]
            return (400 if errors else 200), {"errors": errors, "warnings": []}
        if path == "/api/repos/create":
            request = json.loads(body)
            repo_id = f"{request.get('organization') or 'me'}/{request['name']}"
            status = 409 if repo_id in self.repositories else 200
            self.repositories.setdefault(repo_id, [{}])
            return status, {"url": f"{self.url}/{repo_id}", "name": repo_id}
        if found := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            wanted = json.loads(body)["objects"]
            return 200, {
                "transfer": "basic",
                "objects": [
                    {**item, "actions": {"upload": {"href": f"{self.url}/upload/{item['oid']}"}}} for item in wanted
                ],
            }
        found = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(?:/(preupload|commit|revision|tree)/[^/]+)?", path)
        if found is None or found[1] not in self.repositories:
            return 404, {"error": "not found"}
        return self.answer_repository(found[1], found[2], body)

    def answer_repository(self, repo_id: str, action: str | None, body: bytes) -> tuple[int, object]:
        if action == "preupload":
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(LFS_SUFFIXES) else "regular",
                    "shouldIgnore": False,
                }
                for file in json.loads(body)["files"]
            ]
            return 200, {"files": files}
        if action == "commit":
            files = dict(self.head(repo_id))
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.large_files[value["oid"]]
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            self.repositories[repo_id].append(files)
            commit = self.commit_hash(repo_id)
            return 200, {"commitUrl": f"{self.url}/{repo_id}/commit/{commit}", "commitOid": commit, "success": True}
        if action == "tree":
            return 200, [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in self.head(repo_id).items()
            ]
        siblings = [{"rfilename": name} for name in self.head(repo_id)]
        return 200, {"id": repo_id, "sha": self.commit_hash(repo_id), "siblings": siblings, "tags": []}


@contextmanager
def running_hub():
    """A `Hub` that listens; its `url` is the endpoint for the client."""
    hub = Hub()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self):
            if self.headers.get("Transfer-Encoding") == "chunked":
                body = b""
                while size := int(self.rfile.readline(), 16):
                    body += self.rfile.read(size)
                    self.rfile.readline()
                self.rfile.readline()
            else:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
            status, headers, content = hub.answer(self.command, unquote(urlsplit(self.path).path), body)
            self.send_response(status)
            for name, value in {**headers, "Content-Length": str(len(content))}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_HEAD = do_POST = do_PUT = do_GET

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    hub.url = f"http://127.0.0.1:{server.server_port}"
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
