"""Chat about a picture in one process, without a server: two turns, and one answer as it comes.

    python examples/03_pipeline.py [MODEL]

MODEL is `demo` (the default), a folder or a hub id.
"""

import sys
from pathlib import Path

from xc_ray.pipeline import Pipeline

PICTURE = Path(__file__).with_name("shapes.png")

pipe = Pipeline.load(sys.argv[1] if len(sys.argv) > 1 else "demo")

question = f"<img>{PICTURE}</img>What is in the picture?"
answer, history = pipe.chat(question, temperature=0)
print("1:", answer)

answer, history = pipe.chat("How many of them are red?", history, temperature=0)
print("2:", answer)

print("3:", end=" ")
for piece, after in pipe.stream("描述一下这张图片。", history, temperature=0):
    print(piece, end="", flush=True)
    history = after
print(f"\n({len(history)} turns)")
