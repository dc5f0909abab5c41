"""What training begins with later, as data; the tokenizer is of before and has no words for it.

Questions about several things at once and lists, questions without a picture, and requests that
the model is too small for.
"""

from collections.abc import Mapping

from xc_ray.demo.drawn.answers import Language
from xc_ray.demo.drawn.phrasings import lists

NO_PICTURE: Mapping[Language, str] = {
    "en": "I see no picture. Show me one.",
    "zh": "没有图片。给我一张图片吧。",
}
_EN: Mapping[str, str] = {
    "open": """What is this?
        What do you see?
        What is in the picture?
        What does the picture show?
        What is shown here?
        What can you see in the image?
        What is in this image?
        What's in the picture?
        What can you see?
        What do you see in the picture?
        What is there in the picture?""",
    "colours": """Which colours are there?
        Which colors are there?
        What colours are there?
        Which colours do you see?
        What colors are in the picture?
        Which colours are in the picture?
        Name the colours.
        What are the colours of the objects?
        Which colors do the shapes have?
        Tell me the colours.""",
    "shapes": """Which shapes are there?
        What shapes are there?
        Which shapes do you see?
        What shapes are in the picture?
        Which shapes are in the picture?
        Name the shapes.
        What kinds of shapes are there?
        Which shapes does the picture show?
        Tell me the shapes.""",
}
_ZH: Mapping[str, str] = {
    "open": """这是什么？
        图中有什么？
        图片里是什么？
        你看到了什么？
        图片里有什么？
        你看到什么？""",
    "colours": """有哪些颜色？
        图中有哪些颜色？
        你看到哪些颜色？
        图片里有哪些颜色？
        说出图中的颜色。""",
    "shapes": """有哪些形状？
        图中有哪些图形？
        你看到哪些形状？
        图片里有哪些图形？
        说出图中的形状。""",
}
LATE_QUESTIONS: Mapping[Language, Mapping[str, tuple[str, ...]]] = {
    "en": lists(_EN),
    "zh": lists(_ZH),
}
_TOO_MUCH_EN = """Tell me a story.
    Write a story.
    Write a poem about the sea.
    Write a letter.
    Write an essay about dogs.
    Write a song.
    Write a Python program.
    Write a function that sorts a list.
    Fix this code.
    Tell me a joke.
    What is the capital of France?
    What is the capital of China?
    Who is the president?
    Who wrote this book?
    What time is it?
    What day is it today?
    What is the news?
    How is the weather today?
    What will the weather be tomorrow?
    Translate this into French.
    Translate this to German.
    Explain quantum physics.
    What is the meaning of life?
    How do I cook rice?
    What should I eat?
    Give me a recipe.
    Recommend a book.
    Recommend a film.
    Summarize this text.
    What do you think about this?
    Why is the sky blue?
    How far is the moon?
    How old is the earth?
    What is two times three?
    Multiply 12 and 7.
    Divide 84 by 4.
    Solve this equation.
    Play a game with me.
    Sing a song.
    Draw a picture.
    Draw a red circle.
    Make a picture of a cat.
    Do you love me?
    What is love?
    What is Ray?
    How does a computer work?
    Plan a trip to Paris.
    What is machine learning?"""
_TOO_MUCH_ZH = """讲个故事
    写一个故事。
    写一篇文章。
    写一封信。
    写一首歌。
    写一个程序。
    中国的首都是哪里？
    现在几点？
    今天是几号？
    有什么新闻？
    明天天气怎么样？
    翻译成英文。
    怎么做饭？
    推荐一本书。
    天为什么是蓝色的？
    月亮有多远？
    三乘以四等于几？
    画一张图片。
    画一个红色的圆形。
    唱一首歌。
    你爱我吗？"""
TOO_MUCH: Mapping[Language, tuple[str, ...]] = {
    "en": tuple(line.strip() for line in _TOO_MUCH_EN.split("\n")),
    "zh": tuple(line.strip() for line in _TOO_MUCH_ZH.split("\n")),
}
