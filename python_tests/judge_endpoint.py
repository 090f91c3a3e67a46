"""A local OpenAI-compatible endpoint for judged tasks."""

from __future__ import annotations

import json
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import SimpleNamespace


def completion(text):
    return 200, {"choices": [{"message": {"role": "assistant", "content": text}}]}


@contextmanager
def endpoint(replies):
    """An endpoint that gives `replies` in turn, the last one for ever; yields (url, requests)."""
    requests = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            requests.append(
                SimpleNamespace(path=self.path, body=body, key=self.headers["Authorization"], at=time.time())
            )
            status, reply, *headers = replies[min(len(requests), len(replies)) - 1]
            if status == "hang":
                time.sleep(0.5)
                return
            self.send_response(status)
            for name, value in headers:
                self.send_header(name, value)
            data = reply if isinstance(reply, bytes) else json.dumps(reply).encode()
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args):
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", requests
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
