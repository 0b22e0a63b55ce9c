"""Answers images sent to /v1/object-detection with their detections as JSON, as Flask servers around YOLOv5 do.

    python server.py REPOSITORY WEIGHTS

It prints the port it listens on. The standard library's server stands in for Flask, so that this runs everywhere.
"""

import io
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
from PIL import Image

MODEL = None


class Handler(BaseHTTPRequestHandler):
    def do_POST(self):
        im = Image.open(io.BytesIO(self.rfile.read(int(self.headers["Content-Length"]))))
        results = MODEL(im, size=640)
        body = results.pandas().xyxy[0].to_json(orient="records").encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        pass


if __name__ == "__main__":
    MODEL = torch.hub.load(sys.argv[1], "custom", path=sys.argv[2], source="local", _verbose=False)
    MODEL.conf = 0.4
    MODEL.iou = 0.45
    MODEL.classes = None
    MODEL.cpu().eval()
    server = HTTPServer(("127.0.0.1", 0), Handler)
    print("port", server.server_port, flush=True)
    server.serve_forever()
