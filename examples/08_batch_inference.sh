#!/usr/bin/env bash
# Answer a data set, many rows at once, and compare with the answers that it has.
#
#     bash examples/08_batch_inference.sh [MODEL]    # default: demo
#
# ROUGE-L leaves out case and punctuation, exact match does not: here one reference is written
# otherwise than the model writes.

set -euo pipefail
model=${1:-demo}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT

python - "$folder" <<'END'
import json, sys
from pathlib import Path
from PIL import Image, ImageDraw, ImageFont

folder = Path(sys.argv[1])
circle = Image.new("RGB", (224, 224), "white")
ImageDraw.Draw(circle).ellipse((52, 52, 172, 172), fill="#e01010")
circle.save(folder / "circle.png")
total = Image.new("RGB", (224, 112), "white")
ImageDraw.Draw(total).text((112, 56), "12 + 30 =", "black", ImageFont.load_default(40), "mm")
total.save(folder / "sum.png")

rows = [
    ("What shape is it?", "A circle.", ["circle.png"]),
    ("What colour is it?", "Red.", ["circle.png"]),
    ("What is it?", "a red circle", ["circle.png"]),
    ("What is the sum?", "12 + 30 = 42", ["sum.png"]),
    ("这是什么？", "红色的圆形。", ["circle.png"]),
    ("What is 2 + 3?", "2 + 3 = 5", []),
]
with (folder / "test.jsonl").open("w") as file:
    for query, response, images in rows:
        file.write(json.dumps({"query": query, "response": response, "images": images}) + "\n")
END

xc-ray infer --model "$model" --dataset "$folder/test.jsonl" --output "$folder/answers.jsonl"

python - "$folder/answers.jsonl" <<'END'
import json, sys

for row in map(json.loads, open(sys.argv[1])):
    print(f"{row['response']}  [{row['reference']}]  ROUGE-L {row['rouge_l']:.1f}")
END
