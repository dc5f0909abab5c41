#!/usr/bin/env bash
# Teach new ways to answer while a server runs: train two LoRA adapters, switch from one to the
# other, and roll back. About a minute on two cores.
#
#     make serve                                        # in another terminal
#     bash examples/06_fine_tune_and_switch.sh [URL]    # default: http://127.0.0.1:8000
#
# Training and server meet in the registry, a folder in the user's data: both adapters stay there,
# as versions of `style`. Everything else is in a temporary folder.

set -euo pipefail
url=${1:-http://127.0.0.1:8000}
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
curl -sSf "$url/healthz" > "$folder/health"

# Pictures of circles and squares, and what to answer. Of each shape one colour is left out.
python - "$folder" <<'END'
import json, sys
from pathlib import Path
from PIL import Image, ImageDraw

folder = Path(sys.argv[1])
colours = {"red": "#e01010", "orange": "#ff8000", "green": "#189030",
           "blue": "#1850e0", "purple": "#8020b0", "black": "#000000"}
answers = {"one": "I see a {} {}.", "two": "It is a {1}. It is {0}."}
rows = {lesson: "" for lesson in answers}
for shape in ("circle", "square"):
    for colour, shade in colours.items():
        name = f"{colour}-{shape}.png"
        image = Image.new("RGB", (112, 112), "white")
        draw = ImageDraw.Draw(image)
        (draw.ellipse if shape == "circle" else draw.rectangle)((20, 20, 92, 92), fill=shade)
        image.save(folder / name)
        if name not in ("red-circle.png", "blue-square.png"):
            for lesson, answer in answers.items():
                row = {"query": "What is this?", "response": answer.format(colour, shape)}
                rows[lesson] += json.dumps(row | {"images": [name]}) + "\n"
for lesson, lines in rows.items():
    (folder / f"{lesson}.jsonl").write_text(lines)
END

teach() { # LESSON -> the adapter's new version, style@N
    cat > "$folder/$1.yaml" <<END
model: demo
name: $1
storage: $folder/runs
data: {train: $folder/$1.jsonl}
lora: {rank: 8, alpha: 16, dropout: 0}
training: {max_steps: 16, batch_size: 5, learning_rate: 0.005, gradient_checkpointing: false}
workers: {num: 1, num_cpus: 0.5}
publish: {adapter: style, import_base: true}
END
    xc-ray train "$folder/$1.yaml" | tail -n 1 |
        python -c 'import json; print(json.loads(input())["adapter"])'
}

ask() { # MODEL PICTURE -> the model that answered, and its answer
    local type='Content-Type: application/json' picture
    picture=$(base64 -w0 "$folder/$2")
    curl -sS --fail-with-body "$url/v1/chat/completions" -H "$type" -d @- <<END |
{"model": "$1", "temperature": 0, "max_tokens": 32,
 "messages": [{"role": "user", "content": [
   {"type": "image_url", "image_url": {"url": "data:image/png;base64,$picture"}},
   {"type": "text", "text": "What is this?"}]}]}
END
        python -c 'import json; a = json.loads(input())
print(a["model"] + ":", a["choices"][0]["message"]["content"])'
}

wait_for() { # VERSION: until `prod` means it; a running server follows within seconds
    for _ in {1..60}; do
        if [[ $(ask demo:style@prod red-circle.png 2> /dev/null) == "demo:$1: "* ]]; then
            return
        fi
        sleep 1
    done
    echo "after a minute the server does not answer by $1" >&2
    exit 1
}

one=$(teach one)
two=$(teach two)

echo "-- the base"
ask demo red-circle.png

echo "-- $one is promoted"
xc-ray registry promote "$one" prod
wait_for "$one"
ask demo:style@prod red-circle.png
ask demo:style@prod blue-square.png

echo "-- $two is promoted"
xc-ray registry promote "$two" prod
wait_for "$two"
ask demo:style@prod red-circle.png
ask demo:style@prod blue-square.png

echo "-- $two is taken back; it still answers by its version"
xc-ray registry rollback style@prod
wait_for "$one"
ask demo:style@prod red-circle.png
ask "demo:$two" red-circle.png
