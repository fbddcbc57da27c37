"""Ends with 0 if the server in this container answers. It serves metrics once its jobs are back from disk."""

import os
import sys
import urllib.request

port = os.environ.get("OPTIMD_METRICS_ADDRESS", "0.0.0.0:9464").rpartition(":")[2]
try:
    with urllib.request.urlopen(f"http://127.0.0.1:{port}/metrics", timeout=4) as answer:
        sys.exit(answer.status != 200)
except OSError as error:
    sys.exit(f"no answer: {error}")
