# ruff: noqa: RUF001 -- Chinese has commas and marks of its own
"""How each kind of question may be put, in English and in Chinese, as data.

`{things}` stands for what is counted (`red circles`), `{thing}` for one object (`red circle`),
`{property}` for `red` or `circles`, `{which}` for one of the scene (`the biggest shape`), `{one}`
and `{other}` for two of it, `{a}` and `{b}` for numbers, `{ordinal}` for `first`.
"""

from collections.abc import Mapping

from xc_ray.demo.drawn.answers import Language

_EN: Mapping[str, str] = {  # kind of question: its phrasings, one a line
    "count": """How many {things} are there?
        How many {things} are in the picture?
        How many {things} do you see?
        How many {things} can you see in this image?
        Count the {things}.
        What is the number of {things}?
        How many {things}?
        Tell me how many {things} there are.
        Can you count the {things}?
        How many {things} does the picture show?
        Number of {things}?""",
    "and_count": """And {things}?
        And how many {things}?
        How about {things}?
        What about {things}?
        And how many {things} are there?
        How many {things} then?
        And the {things}?
        Now count the {things}.""",
    "of_them": """How many of them are {property}?
        And how many of them are {property}?
        How many of those are {property}?
        How many of these are {property}?
        Of them, how many are {property}?
        And how many are {property}?
        How many are {property}?
        Count those that are {property}.""",
    "shape": """What shape is it?
        What shape is this?
        Which shape is it?
        What is the shape?
        Name the shape.
        What kind of shape is in the picture?
        Which shape do you see?
        What shape does the picture show?
        What figure is this?
        Tell me the shape.""",
    "colour": """What colour is it?
        What color is it?
        Which colour is it?
        What is its colour?
        What is its color?
        Name the colour.
        What colour does it have?
        What's the color?
        Which color is this?
        Tell me its colour.""",
    "what": """What is it?
        What is this?
        What do you see?
        What is in the picture?
        What shape is it, and which colour?
        What shape and colour is it?
        Name the object.
        What does the picture show?
        What is shown here?
        What can you see in the image?
        Name the shape and its color.""",
    "which_what": """What is {which}?
        What do you see as {which}?
        Name {which}.
        What shape and colour is {which}?
        Tell me what {which} is.
        Which object is {which}?
        Name the shape and colour of {which}.
        Say what {which} is.
        What is {which} in the picture?""",
    "which_shape": """What shape is {which}?
        Which shape is {which}?
        What shape does {which} have?
        Name the shape of {which}.
        Tell me the shape of {which}.
        What is the shape of {which}?
        What kind of shape is {which}?
        Name the shape that {which} has.""",
    "which_colour": """What colour is {which}?
        What color is {which}?
        Which colour is {which}?
        What colour does {which} have?
        Name the colour of {which}.
        Tell me the color of {which}.
        What is the colour of {which}?
        What's the color of {which}?""",
    "they_colour": """What colour are they?
        What color are they?
        Which colours do they have?
        Which colors are they?
        What are their colours?
        And what colour are they?
        And their color?
        What colour do they have?
        Name their colours.""",
    "they_shape": """What shape are they?
        What shapes are they?
        Which shapes are they?
        What are their shapes?
        And what shape are they?
        And their shape?
        What kind of shapes are they?
        Name their shapes.
        What are they?""",
    "exists": """Is there a {thing}?
        Is there a {thing} in the picture?
        Do you see a {thing}?
        Can you see a {thing}?
        Does the picture show a {thing}?
        Does the image have a {thing}?
        Is a {thing} in the image?
        Are there any {things}?
        Do you see any {things}?""",
    "bigger": """Which is bigger, the {one} or the {other}?
        Which is larger, the {one} or the {other}?
        What is bigger, the {one} or the {other}?
        Which one is bigger: the {one} or the {other}?
        Which one is larger, the {one} or the {other}?
        Is the {one} or the {other} bigger?
        Is the {one} or the {other} larger?
        Of the {one} and the {other}, which is bigger?""",
    "background": """What colour is the background?
        What color is the background?
        Which colour is the background?
        What is the background colour?
        What is the background color?
        Name the background colour.
        Tell me the colour of the background.
        What is behind the objects, which colour?
        What's the background color?""",
    "describe": """Describe the picture.
        Describe the image.
        Describe the picture briefly.
        Describe this image in one sentence.
        What is on the picture?
        What can be seen in this picture?
        Tell me what the picture shows.
        Give a short description of the picture.
        Briefly describe what you see.
        Caption this image.""",
    "read": """What does it say?
        What does the picture say?
        What is written here?
        Read the text.
        Read it.
        What text is in the picture?
        What is the text?
        Which word is printed?
        What is written in the image?
        Can you read the text?
        What does the text say?
        Transcribe the text.
        OCR this image.""",
    "read_number": """What number is it?
        Which number is this?
        Read the number.
        What number is in the picture?
        What is the number?
        Which number is printed here?
        What number do you see?
        What does it say?
        What number is written in the image?
        Tell me the number.""",
    "text_colour": """What colour is the text?
        What color is the text?
        Which colour is the text?
        What is the colour of the text?
        What is the text color?
        Name the colour of the print.
        Which color are the letters?
        In what colour is it printed?
        Tell me the colour of the text.""",
    "letters": """How many letters is that?
        How many letters does it have?
        How many letters are in it?
        How many letters are there in the word?
        And how many letters is that?
        Count its letters.
        How long is the word?
        How many letters?
        What is the number of letters?""",
    "digits": """How many digits is that?
        How many digits does it have?
        How many digits are in it?
        How many digits are there in the number?
        And how many digits is that?
        Count its digits.
        How many digits?
        What is the number of digits?""",
    "first_letter": """What is its first letter?
        What is the first letter?
        Which letter is the first?
        And the first letter?
        Which letter does it start with?
        What letter does it begin with?
        Tell me its first letter.
        What's the first letter of the word?""",
    "last_letter": """What is its last letter?
        What is the last letter?
        Which letter is the last?
        And the last letter?
        Which letter does it end with?
        What letter does it end in?
        Tell me its last letter.
        What's the last letter of the word?""",
    "first_digit": """What is its first digit?
        What is the first digit?
        Which digit is the first?
        And the first digit?
        Which digit does it start with?
        What digit does it begin with?
        Tell me its first digit.
        What's the first digit of the number?""",
    "last_digit": """What is its last digit?
        What is the last digit?
        Which digit is the last?
        And the last digit?
        Which digit does it end with?
        What digit does it end in?
        Tell me its last digit.
        What's the last digit of the number?""",
    "add": """What is the sum?
        What is the sum of the two numbers?
        Add the numbers.
        Add the two numbers.
        Compute the sum.
        Calculate it.
        What is the result?
        Solve it.
        How much is it?
        What does it add up to?
        Work out the sum in the picture.
        What's the answer?""",
    "first_number": """What is the first number?
        Which number comes first?
        And the first number?
        Tell me the first number.
        What was the first number?
        Read the first number.
        Which is the first number?
        Give me the first number.""",
    "second_number": """What is the second number?
        Which number comes second?
        And the second number?
        Tell me the second number.
        What was the second number?
        Read the second number.
        Which is the second number?
        Give me the second number.""",
    "add_text": """{a} + {b} =
        {a}+{b}=
        {a} + {b} = ?
        What is {a} + {b}?
        What is {a} plus {b}?
        {a} plus {b}?
        Add {a} and {b}.
        How much is {a} + {b}?
        Compute {a} + {b}.
        Calculate {a}+{b}.
        What is the sum of {a} and {b}?
        {a} + {b}""",
    "compare": """Which picture has more {things}?
        Which image has more {things}?
        Which of the two pictures has more {things}?
        In which picture are there more {things}?
        Which picture shows more {things}?
        Where are more {things}, in the first or the second picture?
        Which one has more {things}?
        Are there more {things} in the first or in the second picture?
        Which of the images contains more {things}?""",
    "count_in": """How many are in the {ordinal} picture?
        How many are there in the {ordinal} picture?
        And how many are in the {ordinal} one?
        How many does the {ordinal} picture have?
        How many has the {ordinal} image?
        Count those in the {ordinal} picture.
        How many are in the {ordinal} image?
        And in the {ordinal} picture, how many?""",
}
_ZH: Mapping[str, str] = {
    "count": """图中有几个{things}？
        有多少个{things}？
        图片里有几个{things}？
        一共有几个{things}？
        数一数有几个{things}。
        {things}有几个？
        你看到几个{things}？""",
    "and_count": """那{things}呢？
        {things}呢？
        那么{things}有几个？
        还有几个{things}？
        {things}有多少个呢？
        那{things}有几个？""",
    "of_them": """其中有几个是{property}？
        其中{property}的有几个？
        里面有几个是{property}？
        它们当中有几个是{property}？
        有几个是{property}？""",
    "shape": """这是什么图形？
        这是什么形状？
        它是什么形状？
        图中是什么图形？
        图片里是什么形状？
        说出它的形状。""",
    "colour": """它是什么颜色？
        是什么颜色？
        这是什么颜色？
        它的颜色是什么？
        什么颜色？
        说出它的颜色。""",
    "what": """这是什么？
        图中有什么？
        图片里是什么？
        你看到了什么？
        这是什么颜色的什么图形？
        说出图形和颜色。""",
    "which_what": """{which}是什么？
        说出{which}是什么。
        {which}是什么颜色的什么图形？
        图中{which}是什么？
        请说{which}是什么。""",
    "which_shape": """{which}是什么形状？
        {which}是什么图形？
        {which}的形状是什么？
        说出{which}的形状。
        图中{which}是什么形状？""",
    "which_colour": """{which}是什么颜色？
        {which}的颜色是什么？
        说出{which}的颜色。
        图中{which}是什么颜色？
        {which}是哪种颜色？""",
    "they_colour": """它们是什么颜色？
        它们的颜色是什么？
        是什么颜色的？
        它们都是什么颜色？
        说出它们的颜色。""",
    "they_shape": """它们是什么形状？
        它们是什么图形？
        它们的形状是什么？
        它们都是什么形状？
        说出它们的形状。""",
    "exists": """有{thing}吗？
        图中有{thing}吗？
        图片里有没有{thing}？
        你看到{thing}了吗？
        有没有{thing}？""",
    "bigger": """{one}和{other}，哪个更大？
        哪个更大，{one}还是{other}？
        {one}大还是{other}大？
        {one}和{other}哪个大？
        {one}跟{other}比，哪个更大？""",
    "background": """背景是什么颜色？
        背景颜色是什么？
        背景的颜色是什么？
        图片的背景是什么颜色？
        说出背景的颜色。""",
    "describe": """描述一下这张图片。
        描述这张图。
        简单描述一下图片。
        用一句话描述这张图片。
        说说图片的内容。
        这张图片里画了什么？""",
    "read": """上面写了什么？
        图中写着什么？
        读出文字。
        图片里的文字是什么？
        写的是什么？
        识别图中的文字。
        这是什么字？""",
    "read_number": """这是什么数字？
        图中的数字是什么？
        读出数字。
        这个数是多少？
        图片里是什么数？
        数字是多少？""",
    "text_colour": """文字是什么颜色？
        字是什么颜色的？
        文字的颜色是什么？
        字的颜色是什么？
        图中的文字是什么颜色？""",
    "letters": """有几个字母？
        一共有几个字母？
        这个词有几个字母？
        它有多少个字母？
        数一数有几个字母。""",
    "digits": """有几位数字？
        一共有几位数字？
        这个数有几位？
        它有多少位数字？
        数一数有几位数字。""",
    "first_letter": """第一个字母是什么？
        它的第一个字母是什么？
        首字母是什么？
        开头是什么字母？
        第一个字母呢？""",
    "last_letter": """最后一个字母是什么？
        它的最后一个字母是什么？
        末尾的字母是什么？
        结尾是什么字母？
        最后一个字母呢？""",
    "first_digit": """第一位数字是什么？
        它的第一位是什么？
        首位数字是什么？
        开头是什么数字？
        第一位数字呢？""",
    "last_digit": """最后一位数字是什么？
        它的最后一位是什么？
        末位数字是什么？
        结尾是什么数字？
        最后一位数字呢？""",
    "add": """和是多少？
        结果是多少？
        两个数的和是多少？
        算一算。
        计算图中的加法。
        等于多少？
        答案是什么？""",
    "first_number": """第一个数是多少？
        第一个数是什么？
        第一个数字是多少？
        第一个数呢？
        读出第一个数。""",
    "second_number": """第二个数是多少？
        第二个数是什么？
        第二个数字是多少？
        第二个数呢？
        读出第二个数。""",
    "add_text": """{a}加{b}等于多少？
        {a}加{b}是多少？
        {a} + {b} 等于几？
        计算{a}+{b}。
        {a}和{b}的和是多少？
        {a}+{b}等于多少？""",
    "compare": """哪张图片里的{things}更多？
        哪张图的{things}更多？
        两张图片中哪张有更多的{things}？
        哪一张有更多{things}？
        第一张图和第二张图，哪张的{things}多？""",
    "count_in": """第{ordinal}张图里有几个？
        第{ordinal}张有几个？
        第{ordinal}张图片有多少个？
        那第{ordinal}张图有几个？
        第{ordinal}张图中有几个？""",
}


def lists(phrasings: Mapping[str, str]) -> dict[str, tuple[str, ...]]:
    """Kind of question -> its phrasings, from text with one a line."""
    return {
        kind: tuple(line.strip() for line in lines.split("\n")) for kind, lines in phrasings.items()
    }


QUESTIONS: Mapping[Language, Mapping[str, tuple[str, ...]]] = {
    "en": lists(_EN),
    "zh": lists(_ZH),
}
