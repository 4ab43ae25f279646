"""A real S3 interface on loopback (moto) behind a proxy that injects faults, and a web server of files with ranges."""

import contextlib
import http.client
import os
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlsplit

ERROR = b"<?xml version='1.0'?><Error><Code>%s</Code><Message>injected</Message></Error>"
KEYS = {"AWS_ACCESS_KEY_ID": "an-access-key", "AWS_SECRET_ACCESS_KEY": "a-secret-key-of-the-tests"}
SETTINGS = {"AWS_DEFAULT_REGION": "us-east-1", "AWS_EC2_METADATA_DISABLED": "true", "NO_PROXY": "127.0.0.1", **KEYS}


class Proxy(ThreadingHTTPServer):
    """Pass requests on to a server and damage some.

    fault(method, path, number) returns what happens to a request: None, `500` and `403` (that status), `cut` (the
    connection ends without an answer), `short` (half the body, then the end), `late` (answered, but the connection ends
    before the answer: a write has happened). delay: seconds before each answer. `.requests` lists (method, path, range,
    process) of all, `.most` the most that waited for an answer at once.
    """

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, upstream: str):
        super().__init__(("127.0.0.1", 0), Handler)
        self.upstream = urlsplit(upstream).netloc
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.guard = threading.Lock()
        self.reset()

    def reset(self):
        """Pass everything on, and forget the requests."""
        self.fault: Callable = lambda method, path, number: None
        self.delay, self.requests, self.flying, self.most = 0.0, [], 0, 0

    def handle_error(self, request, client_address):
        """Print nothing: clients go away when a test ends."""


class Handler(BaseHTTPRequestHandler):
    """Passes one request on."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *words):
        """Log nothing."""

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        while self.rfile.readline().strip():
            pass
        return b"".join(parts)

    def serve(self):
        server = self.server
        body = self.body()
        with server.guard:
            number = len(server.requests)
            server.requests.append((self.command, self.path, self.headers.get("Range")))
            server.flying += 1
            server.most = max(server.most, server.flying)
        self.waiting = True
        try:
            self.answer(server, server.fault(self.command, self.path, number), body)
        finally:
            self.landed()

    def landed(self):
        """Count the request as over, once: before its answer, since a client may ask again at its last byte."""
        with self.server.guard:
            self.server.flying -= self.waiting
        self.waiting = False

    def answer(self, server, fault, body):
        if server.delay:
            time.sleep(server.delay)
        if fault == "cut":
            self.close_connection = True
            return
        if fault in ("500", "403"):
            code = b"InternalError" if fault == "500" else b"AccessDenied"
            self.reply(int(fault), [("Content-Type", "application/xml")], ERROR % code)
            return
        upstream = http.client.HTTPConnection(server.upstream)
        upstream.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
        for key, value in self.headers.items():
            if key.lower() not in ("transfer-encoding", "content-length", "connection", "expect"):
                upstream.putheader(key, value)
        upstream.putheader("Content-Length", str(len(body)))
        upstream.endheaders(body)
        response = upstream.getresponse()
        data = response.read()
        upstream.close()
        if fault == "late":
            self.close_connection = True
            return
        kept = [
            (key, value) for key, value in response.getheaders() if key.lower() not in ("connection", "date", "server")
        ]
        if fault == "short" and data:
            self.close_connection = True
        self.reply(response.status, kept, data, data[: len(data) // 2] if fault == "short" else data)

    def reply(self, status, headers, data, sent=None):
        self.landed()
        self.send_response(status)
        for key, value in headers:
            if key.lower() not in ("content-length", "transfer-encoding"):
                self.send_header(key, value)
        length = {key.lower(): value for key, value in headers}.get("content-length")
        self.send_header("Content-Length", length if self.command == "HEAD" and length else str(len(data)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data if sent is None else sent)

    do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = serve


@contextlib.contextmanager
def running_store(bucket: str = "images"):
    """Run moto behind a Proxy with one bucket; yields (proxy, boto3 client that avoids the proxy)."""
    import boto3
    from moto.server import ThreadedMotoServer

    before = {name: os.environ.get(name) for name in (*SETTINGS, "AWS_ENDPOINT_URL")}
    moto = ThreadedMotoServer(ip_address="127.0.0.1", port=0, verbose=False)
    moto.start()
    host, port = moto.get_host_and_port()
    proxy = Proxy(f"http://{host}:{port}")
    thread = threading.Thread(target=proxy.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    os.environ.update(SETTINGS)
    try:
        client = boto3.client("s3", endpoint_url=f"http://{host}:{port}")
        client.create_bucket(Bucket=bucket)
        os.environ["AWS_ENDPOINT_URL"] = proxy.url
        yield proxy, client
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
        proxy.shutdown()
        proxy.server_close()
        thread.join()
        moto.stop()


class FileHandler(BaseHTTPRequestHandler):
    """Serves the files of `server.folder`, by ranges unless `server.whole`."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def log_message(self, *words):
        """Log nothing."""

    def serve(self):
        path = Path(self.server.folder) / urlsplit(self.path).path.lstrip("/")
        if not path.is_file():
            self.send_response(404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        data, status, extra = path.read_bytes(), 200, {}
        wanted = self.headers.get("Range")
        size = len(data)
        if wanted and not self.server.whole:
            first, _, last = wanted.removeprefix("bytes=").partition("-")
            data, status = data[int(first) : int(last) + 1 if last else None], 206
            extra = {"Content-Range": f"bytes {first}-{int(first) + len(data) - 1}/{size}"}
        self.send_response(status)
        for key, value in {"ETag": f'"{hash(path.read_bytes())}"', "Content-Length": str(len(data)), **extra}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command == "GET":
            self.wfile.write(data)

    do_GET = do_HEAD = serve


@contextlib.contextmanager
def file_server(folder, whole: bool = False):
    """Serve a folder over HTTP on loopback; yields a Proxy in front of it. whole: ranges are ignored."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), FileHandler)
    server.daemon_threads, server.folder, server.whole = True, folder, whole
    proxy = Proxy(f"http://127.0.0.1:{server.server_port}")
    threads = [
        threading.Thread(target=one.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
        for one in (server, proxy)
    ]
    for thread in threads:
        thread.start()
    try:
        yield proxy
    finally:
        for one in (proxy, server):
            one.shutdown()
            one.server_close()
        for thread in threads:
            thread.join()
