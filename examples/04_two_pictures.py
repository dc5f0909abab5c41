"""Two pictures in one question, in both orders.

    python examples/04_two_pictures.py [MODEL]

MODEL is `demo` (the default), a folder or a hub id.
"""

import io
import sys

from PIL import Image, ImageDraw

from xc_ray.pipeline import Pipeline


def circles(*places: tuple[int, int], radius: int) -> bytes:
    """A PNG file with a red circle around each of `places`."""
    image = Image.new("RGB", (224, 224), "white")
    for x, y in places:
        box = (x - radius, y - radius, x + radius, y + radius)
        ImageDraw.Draw(image).ellipse(box, fill="#e01010")
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


one = circles((112, 112), radius=60)
five = circles((50, 50), (174, 50), (112, 112), (50, 174), (174, 174), radius=34)

pipe = Pipeline.load(sys.argv[1] if len(sys.argv) > 1 else "demo")

# Each mark stands for the next of the pictures. They may be paths, URLs or the bytes of files.
question = "<ImageHere><ImageHere>Which picture has more circles?"
for name, pictures in {"one, five": (one, five), "five, one": (five, one)}.items():
    answer, _ = pipe.chat(question, images=pictures, temperature=0)
    print(f"{name}: {answer}")
