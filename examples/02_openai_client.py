"""The unmodified `openai` client (`pip install openai`) against a running server.

make serve                                     # in another terminal
python examples/02_openai_client.py [URL]      # default: http://127.0.0.1:8000
"""

import base64
import sys
from pathlib import Path

from openai import OpenAI

url = sys.argv[1] if len(sys.argv) > 1 else "http://127.0.0.1:8000"
picture = base64.b64encode(Path(__file__).with_name("shapes.png").read_bytes()).decode()

client = OpenAI(base_url=f"{url}/v1", api_key="any")
print("model:", client.models.list().data[0].id)

for question in ("Is there a red circle?", "What shape is green?", "描述一下这张图片。"):
    content = [
        {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{picture}"}},
        {"type": "text", "text": question},
    ]
    completion = client.chat.completions.create(
        model="demo", messages=[{"role": "user", "content": content}], temperature=0
    )
    print(f"{question} {completion.choices[0].message.content}")
