"""What is printed: words, invented words, letters, numbers, short lines."""

from random import Random

_WORDS = """
able about above account across action active actor address advance advice after again against age
agree ahead air airport album alarm almost alone along already also always amount anchor angle
animal annual answer apart apple april area arm army around arrive art article ask asleep august
author autumn avenue avoid award away baby back bacon bad bag bakery balance ball banana band bank
bar basic basket battle beach bean bear beauty bed beef before begin behind bell below bench best
better between bicycle big bike bird birth bitter black blank blanket blood board boat body bone
book border bottle bottom bowl box boy brain branch brave bread break breakfast bridge bright
bring brother brush budget build burn bus business butter button buy cabin cable cake calm camera
camp canal candle captain car card care carpet carry case castle cat catch cause center century
chain chair chance change chapter charge cheap check cheese cherry chest chicken child choice
church circle citizen city class clean clear clever climb clock close cloth cloud club coach coast
coat coffee cold collect college color come common company cook cool copper copy corn corner
correct cost cotton count country couple course court cover cow cream create credit crew cross
crowd crown cup curtain cut cycle daily damage dance danger dark data daughter day dear december
decide deep degree delay deliver desert design desk detail dinner direct dirty discount dish
distance doctor dog dollar door double down dragon draw dream dress drink drive drop dry duck
during dust duty eagle early earth east easy eat echo edge effect egg eight electric elephant
empty end energy engine enjoy enter equal escape evening event every exact example exit expert
express eye fabric face fact factory fair fall family famous farm fast father february feel fence
fever field fifty fight figure film final find finger fire first fish five flag flame flat flight
floor flour flower fly fog follow food foot force forest fork form forward four fox frame free
fresh friday friend frog front fruit full fun future game garden gate gentle ghost giant gift girl
glass globe glove goal gold good goose grain grand grape grass gray great green ground group grow
guard guest guide guitar hair half hall hammer hand happy harbor hard hat have head health heart
heat heavy help hero hidden high hill history hold holiday home honey hope horse hospital hotel
hour house human hundred hungry hurry ice idea image import inch index indoor inside iron island
item jacket january jazz jelly jewel job join journey judge juice july jump june jungle just keep
kettle key kid kind king kitchen kite knee knife know label lady lake lamp land language large
last late laugh law lazy leader leaf learn leather left lemon length lesson letter level library
life lift light limit line lion list little live loan local lock long look lost loud love low
lucky lunch machine magic mail main major manager map march market match maximum may meal meat
medal media meeting melon member memory menu metal middle midnight milk million mind mine minute
mirror model modern monday money monkey month moon morning mother motor mountain mouse mouth movie
music nail name narrow nation nature near neck needle nest never new news next night nine noble
noise north nose note novel number nurse oak ocean october offer office oil old olive once onion
open orange orbit order other outside oven over owner oxygen page paint pair palace paper parade
parent park party pass past pasta path patient pattern pause peace pear pen pencil pepper perfect
person phone photo piano picnic picture piece pilot pink pizza place plain planet plant plate play
please plenty pocket poem point police pool poor port post potato pound power present press price
print prize profit proud public pull pump purple push puzzle quality quarter queen question quick
quiet quit rabbit race radio rail rain random rapid ready real record red remote rent repair
report rescue rest rice rich ride right ring river road robot rock roof room rose round royal rule
run sad safe sail salad sale salt sand saturday sauce save school science screen sea season seat
second secret self sell sense serve seven shade shadow shape share sharp sheep sheet shelf shell
ship shirt shoe shop short shoulder show sign silence silk silver simple single sister six skin
sky sleep slow small smart smile smoke snake snow soap social soft solid song soon sound soup
south space speed spice spider spoon sport spring square stable stage stairs stamp star start
state station stay steam steel step stone stop store storm story street strong student studio
sugar summer sun sunday supply sweet swim switch table tail tea team ten tennis test thank theater
thick thing third thunder ticket tiger time tiny today tomato tomorrow tower town toy track train
travel treasure tree truck trust truth tunnel turn twelve twenty two umbrella uncle under union
unit upper urgent valley value vanilla velvet video view village violet visit voice vote wagon
wait walk wall warm wash watch water wave way weather wedding week welcome west wheel white wide
wild window winter wise wolf wonder wood word world write yard year yellow yes young zebra zero
zone
"""
_ALL = tuple(_WORDS.split())
HELD_OUT_WORDS = _ALL[7::10]
TRAINING_WORDS = tuple(word for word in _ALL if word not in set(HELD_OUT_WORDS))

UPPER = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"
LOWER = UPPER.lower()
DIGITS = "0123456789"
# Without those that look like others: ` and ', | and l.
MARKS = "!#$%&()*+,-./:;<=>?@[]^_{}~\"'\\"
_SYMBOLS = (
    *("${number}.{cents}", "{number}%", "#{number}", "{number}:{cents}", "{number}.{cents}"),
    *("-{number}", "+{number}", "{number}/{cents}", "{number}*{cents}", "<{number}>", "~{number}"),
    *("{word}!", "{word}?", "({word})", "[{word}]", "{{{word}}}", "<{word}>", '"{word}"'),
    *("'{word}'", "{word}: {number}", '"{word}": {number}', "{{{word}: {number}}}", "{word};"),
    *("{word}_{other}", "{word}/{other}", "{word}@{other}", "{word}.{other}", "{word}, {other}"),
    *("{word} & {other}", "{word}={number}", "@{word}", "#{word}", "{word}\\{other}", "^{word}"),
    *('{{"{word}"}}', '"{word}", "{other}"', "{word}-{other}", "*{word}*", "_{word}_"),
)
# Alone, a lower case one of these looks like its capital.
_SAME_IN_BOTH_CASES = set("ckopsuvwxz")
_ONSETS = (
    *("b", "br", "c", "ch", "d", "dr", "f", "fl", "g", "gr", "h", "j", "k", "l", "m", "n", "p"),
    *("pl", "qu", "r", "s", "sh", "sl", "st", "t", "th", "tr", "v", "w", "z"),
)
_VOWELS = ("a", "e", "i", "o", "u", "ai", "ee", "oa", "ou")
_CODAS = ("", "", "b", "ck", "d", "g", "ll", "m", "n", "nd", "p", "r", "rt", "s", "st", "t", "x")


def sample_word(random: Random, max_letters: int, *, held_out: bool = False) -> str:
    """A word, an invented word or a string of letters, in some case; 1 to `max_letters` long."""
    for _ in range(20):
        word = _cased(_spelt(random, max_letters, held_out), random)
        if len(word) <= max_letters and is_clear(word):
            return word
    return _letters(random, UPPER, min(4, max_letters))


def sample_code(random: Random, max_letters: int) -> str:
    """Letters and digits, such as a plate or a part number has, without look-alikes."""
    upper = "ABCDEFGHJKLMNPQRSTUVWXYZ"
    length = random.randint(min(2, max_letters), min(8, max_letters))
    if length >= 4 and random.random() < 0.5:
        head = random.randint(1, length - 2)
        joint = random.choice(("", "", "-", " ")) if length < max_letters else ""
        return _letters(random, upper, head) + joint + _letters(random, "23456789", length - head)
    return _letters(random, upper + "23456789", length)


def sample_symbols(random: Random, *, held_out: bool = False) -> str:
    """A price, a time, an address, something in brackets: a short text with marks in it."""
    word = _spelt_word(random, 6, held_out)
    word = random.choice((word, word.upper(), word.capitalize()))
    other = _spelt_word(random, 4, held_out)
    number = sample_number(random, 3)
    cents = _letters(random, DIGITS, 2)
    text = random.choice(_SYMBOLS).format(word=word, other=other, number=number, cents=cents)
    if random.random() < 0.3:  # any mark at any place
        place = random.randint(0, len(text))
        text = text[:place] + random.choice(MARKS) + text[place:]
    return text


def sample_number(random: Random, max_digits: int, *, exact: bool = False) -> str:
    """As many digits as `max_digits`, or up to as many; zero leads only when alone."""
    digits = max_digits if exact else random.randint(1, max_digits)
    least = 10 ** (digits - 1) if digits > 1 else 0
    return str(random.randint(least, 10**digits - 1))


def sample_line(random: Random, max_letters: int, *, held_out: bool = False) -> str:
    """One to three words or numbers with a space between; as a whole in one style."""
    num = random.choices((1, 2, 3), (1, 4, 3))[0]
    each = max(3, min(8, max_letters))
    style = random.choice((str.upper, str.lower, str.title, str.capitalize))
    parts = []
    for i in range(num):
        u = random.random()
        if u < 0.15 and i:
            parts.append(sample_number(random, min(4, each)))
        elif u < 0.25:
            parts.append(sample_code(random, min(6, each)).replace(" ", "-"))
        else:
            parts.append(style(_spelt_word(random, each, held_out)))
    line = " ".join(parts)
    if style is str.capitalize:
        line = line[0].upper() + " ".join(parts)[1:]
    return line if all(is_clear(p) for p in parts) else line.upper()


def is_clear(text: str) -> bool:
    """Whether the case of the whole can be seen: `SOW` beside `sow` cannot."""
    return text.isupper() or not text.isalpha() or not set(text.lower()) <= _SAME_IN_BOTH_CASES


def _spelt(random: Random, max_letters: int, held_out: bool) -> str:
    if random.random() < 0.55:
        return _spelt_word(random, max_letters, held_out)
    length = random.randint(1, min(10, max_letters))
    u = random.random()
    if u < 0.4:
        return _letters(random, UPPER, length) if length > 1 else random.choice("ABDEFGHJLMNQRTY")
    if u < 0.7:
        return _letters(random, LOWER if length > 3 else "abdefghijmnqrty", length)
    # Mixed: neither I nor l, and of letters with one look in both cases only the capital.
    return _letters(random, "ABDEFGHJLMNQRTYabdefghijmnqrtyCKOPSUVWXZ", length)


def _spelt_word(random: Random, max_letters: int, held_out: bool) -> str:
    if random.random() < 0.6:
        words = HELD_OUT_WORDS if held_out else TRAINING_WORDS
        for _ in range(8):
            word = random.choice(words)
            if len(word) <= max_letters:
                return word
    return _invented(random)[:max_letters]


def _cased(word: str, random: Random) -> str:
    if not word.islower():
        return word
    return random.choice((word.upper(), word.upper(), word, word, word.capitalize()))


def _invented(random: Random) -> str:
    return "".join(
        random.choice(_ONSETS) + random.choice(_VOWELS) + random.choice(_CODAS)
        for _ in range(random.randint(1, 3))
    )


def _letters(random: Random, alphabet: str, length: int) -> str:
    return "".join(random.choice(alphabet) for _ in range(length))
