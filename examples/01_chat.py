"""Chat about a picture from Python, no server: two turns, then one answer as it comes.

    python examples/01_chat.py [MODEL]

MODEL is `demo` (default: random weights, so the answers are noise), a folder or a hub id.
"""

import sys
from pathlib import Path

from xc_ray.pipeline import Pipeline

PICTURE = Path(__file__).with_name("shapes.png")

pipe = Pipeline.load(sys.argv[1] if len(sys.argv) > 1 else "demo")

question = f"<img>{PICTURE}</img>What is in the picture?"
answer, history = pipe.chat(question, max_tokens=32, seed=1)
print("1:", answer)

answer, history = pipe.chat("Which colours are there?", history, max_tokens=32, seed=1)
print("2:", answer)

print("3: ", end="")
for piece, after in pipe.stream("And how many shapes?", history, max_tokens=32, seed=1):
    print(piece, end="", flush=True)
    last = after
print(f"\n({len(last)} turns)")
