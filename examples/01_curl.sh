#!/usr/bin/env bash
# Chat about a picture with nothing but curl: the picture travels inside the request.
#
#     make serve                        # in another terminal
#     bash examples/01_curl.sh [URL]    # default: http://127.0.0.1:8000

set -euo pipefail
url=${1:-http://127.0.0.1:8000}
picture=$(base64 -w0 "$(dirname "$0")/shapes.png")

curl -sS --fail-with-body "$url/v1/chat/completions" -H 'Content-Type: application/json' -d @- <<END
{"model": "demo", "temperature": 0,
 "messages": [{"role": "user", "content": [
   {"type": "image_url", "image_url": {"url": "data:image/png;base64,$picture"}},
   {"type": "text", "text": "What is in the picture?"}]}]}
END
echo
