"""A fake Hub on loopback, with the endpoints for creating, filling and reading a model repository."""

import base64
import contextlib
import hashlib
import json
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote, urlsplit

TOKEN = "hf_of_the_fake_hub"


class Hub:
    """Repositories in memory: name -> {"private", "branches": {branch: {path: bytes}}}.

    requests: method and path of every request.
    """

    def __init__(self):
        self.repositories, self.blobs, self.lfs, self.requests, self.commits = {}, {}, set(), [], []

    def add(self, name, files, branch="main"):
        """Put a public repository's files, path -> bytes, on a branch; weights are stored as LFS objects."""
        repository = self.repositories.setdefault(name, {"private": False, "branches": {}})
        repository["branches"][branch] = files
        for path, value in files.items():
            if path.endswith((".pth", ".tar", ".bin", ".safetensors")):
                self.lfs.add(path)
                self.blobs[hashlib.sha256(value).hexdigest()] = value

    def files(self, name, revision):
        """Return path -> bytes at a branch or commit; None for an unknown one."""
        branches = self.repositories[name]["branches"]
        return next((files for branch, files in branches.items() if revision in (branch, self.sha(name, branch))), None)

    def sha(self, name, branch):
        """Return the commit of a branch."""
        content = sorted(
            (path, hashlib.sha1(value).hexdigest())
            for path, value in self.repositories[name]["branches"][branch].items()
        )
        return hashlib.sha1(f"{name} {content}".encode()).hexdigest()


class Handler(BaseHTTPRequestHandler):
    """Handles one request."""

    protocol_version = "HTTP/1.1"

    def log_message(self, *words):
        """Log nothing."""

    def answer(self, status=200, content=None, body=b"", **headers):
        body = json.dumps(content).encode() if content is not None else body
        self.send_response(status)
        for key, value in headers.items():
            self.send_header(key.replace("_", "-"), str(value))
        self.send_header("Content-Type", "application/json" if content is not None else "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def serve(self):
        hub, path = self.server.hub, unquote(urlsplit(self.path).path)
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0)) if self.command in ("POST", "PUT") else b""
        hub.requests.append((self.command, path))
        authorized = self.headers.get("Authorization") == f"Bearer {TOKEN}"
        parts = path.strip("/").split("/")
        if parts[0] == "storage":
            return self.storage(parts, body)
        if self.command == "POST" and not authorized and parts[:2] != ["api", "validate-yaml"]:
            return self.answer(
                401,
                {"error": "Invalid credentials in Authorization header"},
                X_Error_Message="Invalid credentials in Authorization header",
            )
        if parts[:2] == ["api", "validate-yaml"]:
            return self.answer(content={"errors": [], "warnings": []})
        if parts[:3] == ["api", "repos", "create"]:
            return self.create(json.loads(body))
        name = "/".join(parts[2:4] if parts[0] == "api" else parts[:2]).removesuffix(".git")
        repository = hub.repositories.get(name)
        if repository is None or repository["private"] and not authorized:
            return self.answer(
                404,
                {"error": "Repository not found"},
                X_Error_Code="RepoNotFound",
                X_Error_Message="Repository not found",
            )
        if parts[0] == "api":
            return self.api(name, repository, parts[4] if len(parts) > 4 else "revision", parts[5:] or ["main"], body)
        if parts[2:] == ["info", "lfs", "objects", "batch"]:
            return self.batch(json.loads(body))
        return self.resolve(name, parts[3], "/".join(parts[4:]))

    do_GET = do_POST = do_HEAD = do_PUT = serve

    def create(self, request):
        name = f"{request.get('organization') or 'me'}/{request['name']}"
        exists = name in self.server.hub.repositories
        private = request.get("visibility") == "private" or bool(request.get("private"))
        self.server.hub.repositories.setdefault(
            name, {"private": private, "branches": {"main": {".gitattributes": b""}}}
        )
        self.answer(
            409 if exists else 200,
            {"url": f"{self.server.address}/{name}", "name": name, **({"error": "exists"} if exists else {})},
        )

    def api(self, name, repository, verb, rest, body):
        hub = self.server.hub
        if verb == "branch":
            exists = rest[0] in repository["branches"]
            repository["branches"].setdefault(rest[0], dict(repository["branches"]["main"]))
            return self.answer(409 if exists else 201, {"error": "exists"} if exists else {})
        files = hub.files(name, rest[0])
        if files is None:
            return self.answer(
                404,
                {"error": "Invalid rev id"},
                X_Error_Code="RevisionNotFound",
                X_Error_Message=f"Invalid rev id: {rest[0]}",
            )
        branch = next(branch for branch, content in repository["branches"].items() if content is files)
        if verb == "revision":
            return self.answer(
                content={
                    "id": name,
                    "modelId": name,
                    "sha": hub.sha(name, branch),
                    "private": repository["private"],
                    "tags": [],
                    "siblings": [{"rfilename": path} for path in files],
                }
            )
        if verb == "tree":
            return self.answer(content=[self.entry(path, value) for path, value in files.items()])
        if verb == "preupload":
            wanted = json.loads(body)["files"]
            mode = {
                file["path"]: "lfs" if file["path"].endswith((".safetensors", ".onnx", ".png", ".pt2")) else "regular"
                for file in wanted
            }
            return self.answer(
                content={
                    "files": [{"path": path, "uploadMode": kind, "shouldIgnore": False} for path, kind in mode.items()]
                }
            )
        if verb == "commit":
            lines = [json.loads(line) for line in body.splitlines()]
            for line in lines:
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = hub.blobs[value["oid"]]
                    hub.lfs.add(value["path"])
                elif line["key"] == "deletedFile":
                    del files[value["path"]]
            hub.commits.append((name, branch, [line["key"] for line in lines]))
            return self.answer(
                content={
                    "success": True,
                    "commitOid": hub.sha(name, branch),
                    "commitUrl": f"{self.server.address}/{name}/commit/{hub.sha(name, branch)}",
                }
            )
        return self.answer(404, {"error": f"no endpoint {verb}"})

    def entry(self, path, value):
        lfs = (
            {"lfs": {"oid": hashlib.sha256(value).hexdigest(), "size": len(value), "pointerSize": 130}}
            if path in self.server.hub.lfs
            else {}
        )
        return {"type": "file", "path": path, "size": len(value), "oid": hashlib.sha1(value).hexdigest(), **lfs}

    def batch(self, request):
        href = f"{self.server.address}/storage/"
        objects = [
            {"oid": item["oid"], "size": item["size"], "actions": {"upload": {"href": href + item["oid"]}}}
            for item in request["objects"]
        ]
        self.answer(content={"transfer": "basic", "objects": objects})

    def storage(self, parts, body):
        if self.command == "PUT":
            self.server.hub.blobs[parts[1]] = body
            return self.answer()
        self.answer(body=self.server.hub.blobs[parts[1]], ETag=f'"{parts[1]}"')

    def resolve(self, name, revision, path):
        hub = self.server.hub
        files = hub.files(name, revision)
        if files is None or path not in files:
            code = "RevisionNotFound" if files is None else "EntryNotFound"
            return self.answer(404, {"error": code}, X_Error_Code=code, X_Error_Message=code)
        branch = next(branch for branch, content in hub.repositories[name]["branches"].items() if content is files)
        value, commit = files[path], hub.sha(name, branch)
        if path in hub.lfs:
            oid = hashlib.sha256(value).hexdigest()
            return self.answer(
                302,
                Location=f"{self.server.storage_address}/storage/{oid}",
                X_Repo_Commit=commit,
                X_Linked_ETag=f'"{oid}"',
                X_Linked_Size=len(value),
            )
        return self.answer(body=value, X_Repo_Commit=commit, ETag=f'"{hashlib.sha1(value).hexdigest()}"')


@contextlib.contextmanager
def running_hub():
    """Run a fake Hub; yield it and its address."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    server.hub, server.address = Hub(), f"http://127.0.0.1:{server.server_port}"
    server.storage_address = (
        f"http://localhost:{server.server_port}"  # the real Hub also serves files from another host
    )
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server.hub, server.address
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
