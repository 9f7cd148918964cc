"""Write the embedded corpus from the phrase banks: python corpus/build.py [--out FOLDER]

Reads corpus/banks/*.json and writes chat_*.jsonl (training; a conversation a line in the OpenAI `messages` form),
text_*.jsonl (training; a plain text a line) and heldout.jsonl (never trained on). The same banks give the same bytes on
every machine.
"""
import argparse
import json
import random
import re
from itertools import chain
from pathlib import Path
from typing import Callable, Iterator, NamedTuple, Optional

HERE = Path(__file__).resolve().parent
LANGUAGES = ("zh", "en")
SKILLS = {"talk": "1 greetings", "facts": "2 facts", "math": "3 sums", "memory": "4 memory", "words": "5 words",
          "stories": "6 stories", "unknown": "7 not knowing"}
# Conversations a file. Chinese comes first; a file stops earlier where its phrasings run out.
SIZES = {"talk": (1770, 1500), "facts": (1715, 1520), "math": (1530, 1295), "memory": (900, 760),
         "words": (1720, 1450), "stories": (265, 225), "unknown": (760, 640), "mixed": (100, 80),
         "text": (240, 165)}
HELD_OUT_EACH = 60  # held-out items a skill and language
OPTIONAL = re.compile(r"(\[[^\[\]]*\]|[\u4e00-\u9fff，“”])\?(?!$)")
CHOICE = re.compile(r"\[([^\[\]]*)\]")
PUNCTUATION = re.compile(r"[\W_]+")

BANKS = {path.stem: json.loads(path.read_text(encoding="utf-8")) for path in sorted((HERE / "banks").glob("*.json"))}


class Turn(NamedTuple):
    """What is asked and answered, and how a reply to it is judged (benchmarks/skills.py says what `match` means)."""
    user: str
    answer: str
    keys: tuple = ()
    match: str = "any"


def normalised(text: str) -> str:
    """Text without case, blanks and punctuation, to tell one phrasing from another. Pure punctuation stays itself."""
    return PUNCTUATION.sub("", text.lower()) or text


# ------------------------------------------------------------------------------------------------------- phrases


def expand(rng: random.Random, template: str, **values: object) -> str:
    """One reading of a template: [a|b] is a choice, a ? behind a Chinese character or a choice makes it optional."""
    template = OPTIONAL.sub(lambda m: m[1] if rng.random() < 0.5 else "", template)
    while CHOICE.search(template):
        template = CHOICE.sub(lambda m: rng.choice(m[1].split("|")), template)
    # A question of the form "A or not A" takes no further question word.
    template = re.sub(r"((.)[不没]\2.*)吗(?=[？?]?$)", r"\1", template)
    for name, value in values.items():
        template = template.replace("{" + name + "}", str(value))
    return template.strip()


def capital(text: str) -> str:
    """The text with a large first letter."""
    return text[:1].upper() + text[1:]


CHAT = BANKS["chat"]
ORDER = re.compile("|".join(CHAT["orders"]))


def spoken(rng: random.Random, text: str, language: str, held: bool = False, opening: bool = True) -> str:
    """A question as people type it: with or without a polite opening, a full stop, large letters."""
    if opening and not held and rng.random() < 0.22:
        # Chinese "may I ask" goes before a question, not before an order.
        openings = [*CHAT["openings"][language], *([] if ORDER.match(text) else CHAT["question_openings"][language])]
        start = rng.choice(openings)
        text = start + (text[:1].lower() + text[1:] if language == "en" and not re.match(r"I\b|I'", text) else text)
    if rng.random() < (0.15 if held else 0.25):
        text = text.rstrip("？。?.！! ") or text
    if language == "zh" and rng.random() < 0.08:
        text = text.replace("？", "?").replace("，", ",")
    if language == "en" and not held and rng.random() < 0.15:
        text = text.lower()
    return text


class Dealer(random.Random):
    """A random generator that also deals: every item of a list once, in a shuffled order, before any comes again."""

    def __init__(self, seed: str):
        super().__init__(seed)
        self.piles: dict[object, list] = {}
        self.hand: list[tuple[list, object]] = []  # what the conversation at hand is about

    def deal(self, items: list, *purpose: str):
        """The next item; `purpose` names the pile, where not the list itself does."""
        pile = self.piles.setdefault(purpose or id(items), [])
        if not pile:
            pile += self.sample(items, len(items))
        if purpose:
            self.hand.append((pile, pile[-1]))
        return pile.pop()

    def keep(self, counts: bool) -> None:
        """Ends a conversation: what one was about that does not count goes back under the piles."""
        for pile, item in [] if counts else self.hand:
            pile.insert(0, item)
        self.hand.clear()

    def pick(self, held: bool, items: list, *purpose: str):
        """What is asked about: for training dealt, so that the corpus tells all there is; held-out items at random."""
        return self.choice(items) if held else self.deal(items, *purpose)


def draw(rng: Dealer, bank: dict, key: str) -> str:
    """A template under `key`, one time in eight of those that people say more seldom."""
    seldom = bank.get(f"seldom_{key}")
    return rng.deal(seldom if seldom and rng.random() < 0.125 else bank[key])


def phrase(rng: Dealer, bank: dict, held: bool) -> str:
    """A template of the bank: one that training sees, or one that it never sees."""
    return draw(rng, bank, "heldout" if held else "train")


# ------------------------------------------------------------------------------------------------- 1 small talk


INTENT_WEIGHTS = {language: [len(intent[language]["train"]) + 3 for intent in BANKS["talk"]["intents"]]
                  for language in LANGUAGES}
INTENTS = {intent["name"]: intent for intent in BANKS["talk"]["intents"]}


def talk(rng: Dealer, language: str, held: bool = False, name: Optional[str] = None) -> Turn:
    """Greetings, thanks, farewells, who the assistant is and what it can do."""
    while True:
        intent = (INTENTS[name] if name else
                  rng.choices(BANKS["talk"]["intents"], INTENT_WEIGHTS[language])[0])[language]
        if intent["heldout"] or not held:
            break
    plain = not held and rng.random() < 0.08
    text = rng.deal(intent["plain"]) if plain else expand(rng, phrase(rng, intent, held))
    if not held:
        if rng.random() < 0.12:
            text = rng.choice(CHAT["callings"][language]).replace("{text}", text)
        if language == "en" and rng.random() < 0.2:
            text = text.lower()
        if rng.random() < 0.2 and len(text) > 2:
            text = text.rstrip("？。?.！!") or text
    return Turn(text, rng.choice(intent["answers"]), tuple(intent["keys"]))


# ------------------------------------------------------------------------------------------------------ 2 facts


COUNTRIES = BANKS["countries"]
COLUMNS = {"capital": 2, "about": 2, "continent": 4, "language": 6, "currency": 8}


def country(rng: Dealer, language: str, held: bool = False, kind: Optional[str] = None,
            follow: bool = False) -> Turn:
    """Capital, continent, language, currency of a country, all of these at once, or whose capital a city is."""
    en = language == "en"
    kind = kind or rng.choices(["capital", "continent", "language", "currency", "country", "about"],
                               [4, 2, 2, 2, 2, 1.5])[0]
    row = rng.pick(held, COUNTRIES["rows"], "country", kind, language)
    while kind == "country" and row[1] == "Singapore":  # the city asks for the country of its own name
        row = rng.pick(held, COUNTRIES["rows"], "country", kind, language)
    called = row[en]
    if not held and rng.random() < 0.3:
        names = [name for name in COUNTRIES["aliases"].get(row[0], []) if name.isascii() == en]
        called = rng.choice(names) if names else called
    value = row[3 if en else 2] if kind == "country" else row[COLUMNS[kind] + en]
    bank = {"train": COUNTRIES["follow"][language]} if follow else COUNTRIES["ask"][kind][language]
    text = expand(rng, phrase(rng, bank, held), c=called, x=value)
    columns = {name: row[column + en] for name, column in COLUMNS.items()}
    columns.update(c=row[en], C=capital(row[en]), v=value, x=value)
    answer = expand(rng, COUNTRIES["answer"][kind][language][0], **columns)
    key = row[en] if kind == "country" else value
    return Turn(spoken(rng, capital(text), language, held, not follow), answer, (re.sub("^the ", "", key),))


def animal(rng: Dealer, language: str, held: bool = False) -> Turn:
    """What an animal eats, its legs, its sound, where it lives."""
    things, kinds = BANKS["things"], ("eats", "legs", "sound", "home")
    while True:
        # What is dealt is dealt for a kind of question; held-out items draw the animal first, then the kind.
        asked = None if held else rng.choice(kinds)
        row = rng.pick(held, things["animals"], "animal", asked, language)
        one, en_one, en_many, eats_zh, eats_en, legs, sound_zh, sound_en, home_zh, home_en = row
        asked = asked or rng.choice(kinds)
        value = {"eats": (eats_zh, eats_en), "legs": (legs, legs), "sound": (sound_zh, sound_en),
                 "home": (home_zh, home_en)}[asked][language == "en"]
        if value is not None:
            break
    bank = things["animal_questions"][asked][language]
    words = {"a": one if language == "zh" else en_one, "as": en_many, "As": capital(en_many)}
    text = expand(rng, phrase(rng, bank, held), **words)
    text = re.sub(r"\b([Aa]) (?=[aeiou])", r"\1n ", text)
    if asked == "legs":
        value = things["legs"][language][str(value)]
    answer = expand(rng, bank["answer"], v=value, **words)
    return Turn(spoken(rng, capital(text), language, held), answer, (str(value).removeprefix("有"),))


def colour(rng: Dealer, language: str, held: bool = False) -> Turn:
    """The colour of a thing."""
    bank = BANKS["things"]["colours"]
    thing, value = rng.pick(held, bank[language])
    text = expand(rng, phrase(rng, bank["ask"][language], held), t=thing)
    answer = expand(rng, bank["ask"][language]["answer"], t=thing, T=capital(thing), v=value)
    return Turn(spoken(rng, capital(text), language, held), answer, (value,))


def opposites(language: str) -> dict[str, str]:
    """Word to opposite, in both directions; where a word has two, the bank's first counts."""
    first = 0 if language == "zh" else 2
    pairs: dict[str, str] = {}
    for row in BANKS["things"]["opposites"]:
        pairs.setdefault(row[first], row[first + 1])
    for row in BANKS["things"]["opposites"]:
        pairs.setdefault(row[first + 1], row[first])
    return pairs


OPPOSITES = {language: opposites(language) for language in LANGUAGES}


def opposite(rng: Dealer, language: str, held: bool = False) -> Turn:
    """The opposite of a word."""
    word, value = rng.pick(held, list(OPPOSITES[language].items()), "opposite", language)
    bank = BANKS["things"]["opposite_questions"][language]
    text = expand(rng, phrase(rng, bank, held), x=word)
    return Turn(spoken(rng, capital(text), language, held), expand(rng, bank["answer"], x=word, y=value), (value,))


def general(rng: Dealer, language: str, held: bool = False) -> Turn:
    """The calendar and a few facts that everybody knows."""
    fact = rng.pick(held, BANKS["things"]["general"], "general", language)
    text = expand(rng, draw(rng, fact, f"held_{language}" if held else language))
    return Turn(spoken(rng, text, language, held), fact[f"a_{language}"], tuple(fact[f"keys_{language}"]))


def facts(rng: Dealer, language: str, held: bool = False) -> Turn:
    """One of the kinds of facts."""
    kind = rng.choices([country, animal, colour, opposite, general], [10, 6, 3, 4, 7])[0]
    return kind(rng, language, held)


# ------------------------------------------------------------------------------------------------------- 3 sums


MATH = BANKS["math"]


def held_pairs() -> dict[str, set[tuple[int, int]]]:
    """The 15 % of pairs that no training text holds: of sums, of differences, of comparisons (both orders).

    Pairs that other sums need as a step, such as 7+5 or 12-5, are always trained on.
    """
    rng = random.Random(15)
    sums = [(a, b) for a in range(1, 100) for b in range(1, a + 1) if a + b <= 100 and a >= 10]
    differences = [(a, b) for a in range(10, 101) for b in range(1, a + 1) if (a > 18 or b > 9) and (a, b) != (10, 10)]
    comparisons = [(a, b) for a in range(10, 101) for b in range(1, a)]
    chosen = {"add": rng.sample(sums, len(sums) * 15 // 100),
              "compare": rng.sample(comparisons, len(comparisons) * 15 // 100)}
    held = {kind: {pair for a, b in pairs for pair in ((a, b), (b, a))} for kind, pairs in chosen.items()}
    return held | {"sub": set(rng.sample(differences, len(differences) * 15 // 100))}


HELD_PAIRS = held_pairs()


def draw_pair(rng: Dealer, kind: str, held: bool) -> tuple[int, int]:
    """Two numbers for an exercise: a held-out pair or one of the others, one-digit pairs more often than chance."""
    if held:
        return rng.choice(sorted(HELD_PAIRS[kind]))
    while True:
        top = 9 if rng.random() < 0.12 else 100
        a, b = rng.randint(0 if rng.random() < 0.05 else 1, top), rng.randint(0 if rng.random() < 0.05 else 1, top)
        if rng.random() < 0.05 and kind != "compare" and a not in (0, 100):  # three digits would be too rare
            b = 100 if kind == "sub" else 100 - a
        if kind == "add" and (a + b > 100 or 100 in (a, b)) or kind == "compare" and a == b:
            continue
        if kind == "sub":
            a, b = max(a, b), min(a, b)
            if b == 0 and a > 9:
                continue
        if kind == "add" and 0 in (a, b) and max(a, b) > 9:
            continue
        if (a, b) not in HELD_PAIRS[kind]:
            return a, b


ONES = {"zh": "零 一 二 三 四 五 六 七 八 九 十".split(),
        "en": "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen "
              "seventeen eighteen nineteen".split()}
TENS = {"zh": [f"{ten}十" for ten in ["", "", *"二三四五六七八九"]],
        "en": ["", "", *"twenty thirty forty fifty sixty seventy eighty ninety".split()]}


def in_words(number: int, language: str) -> str:
    """A number from 0 to 100 as people write it out."""
    if number == 100:
        return {"zh": "一百", "en": "one hundred"}[language]
    ones, tens = ONES[language], TENS[language]
    if number < len(ones):
        return ones[number]
    ten, one = tens[number // 10], ones[number % 10] if number % 10 else ""
    return ten + ("-" if language == "en" and one else "") + one if number > 19 else f"十{one}"


def worked(kind: str, a: int, b: int, language: str) -> str:
    """The answer to a sum or a difference, digit by digit, so that a small model can follow its own steps."""
    sign, result = ("+", a + b) if kind == "add" else ("-", a - b)
    if a <= 9 and b <= 9 or kind == "sub" and a <= 18 and b <= 9:
        return f"{a}{sign}{b}={result}" + ("。" if language == "zh" else ".")
    tens_a, ones_a, tens_b, ones_b = a // 10, a % 10, b // 10, b % 10
    if kind == "add":
        carry = ones_a + ones_b > 9
        ones = f"{ones_a}+{ones_b}={ones_a + ones_b}"
        tens = f"{tens_a}+{tens_b}{'+1' if carry else ''}={tens_a + tens_b + carry}"
    else:
        borrow = ones_a < ones_b
        upper = ones_a + 10 * borrow
        ones = f"{upper}-{ones_b}={upper - ones_b}"
        tens = f"{tens_a}-{tens_b}{'-1' if borrow else ''}={tens_a - tens_b - borrow}"
    if language == "zh":
        return f"{a}{sign}{b}：个位{ones}，十位{tens}，等于{result}。"
    return f"{a}{sign}{b}: ones {ones}, tens {tens}, so it is {result}."


def arithmetic(rng: Dealer, language: str, held: bool = False) -> Turn:
    """An addition or a subtraction within 100."""
    kind = rng.choice(["add", "sub"])
    a, b = draw_pair(rng, kind, held)
    bank = MATH[kind][language]
    # Half of the held-out exercises differ from training in the pair alone.
    template = phrase(rng, bank, held and rng.random() < 0.5)
    if "{t}" in template and min(a, b) < 2:
        template = bank["train"][0]
    thing = rng.choice(MATH["things"][language])
    values = {"m": thing[0], "t": thing[1]} if language == "zh" else {"t": thing}
    written_out = not held and "{t}" not in template and not re.search("[-+=]", template) and rng.random() < 0.15
    x, y = (in_words(a, language), in_words(b, language)) if written_out else (a, b)
    text = expand(rng, template, a=x, b=y, **values)
    result = a + b if kind == "add" else a - b
    return Turn(spoken(rng, text, language, held), worked(kind, a, b, language), (str(result),), "last_number")


def comparison(rng: Dealer, language: str, held: bool = False) -> Turn:
    """Which of two numbers is bigger or smaller, or whether one is."""
    kind = rng.choice(["bigger", "bigger", "smaller", "is_bigger"])
    a, b = draw_pair(rng, "compare", held)
    text = expand(rng, phrase(rng, MATH[kind][language], held and rng.random() < 0.5), a=a, b=b)
    zh, sign = language == "zh", "<" if a < b else ">"
    if max(a, b) <= 9:
        reason = f"{a}{sign}{b}"
    elif a // 10 != b // 10:
        reason = (f"十位{a // 10}{sign}{b // 10}，" if zh else f"Tens {a // 10}{sign}{b // 10}, ") + f"{a}{sign}{b}"
    else:
        reason = (f"个位{a % 10}{sign}{b % 10}，" if zh else f"Ones {a % 10}{sign}{b % 10}, ") + f"{a}{sign}{b}"
    if kind == "is_bigger":
        end = f"{a}比{b}{'小' if a < b else '大'}" if zh else f"{a} is {'smaller' if a < b else 'bigger'} than {b}"
        keys, match = (end,), "any"
    else:
        chosen = max(a, b) if kind == "bigger" else min(a, b)
        word = {"bigger": ("更大", "bigger"), "smaller": ("更小", "smaller")}[kind][not zh]
        # What is asked comes first: found again at the end, in the question, it was often mistaken.
        reason = f"找{word}的：{reason}" if zh else f"The {word} one: {reason[:1].lower()}{reason[1:]}"
        end, keys, match = f"{chosen}{word}" if zh else f"{chosen} is {word}", (str(chosen),), "last_number"
    answer = f"{reason}，所以{end}。" if zh else f"{reason}, so {end}."
    return Turn(spoken(rng, text, language, held), answer, keys, match)


def counting(rng: Dealer, language: str, held: bool = False) -> Turn:
    """The number after or before one, or some numbers in a row."""
    kind = rng.choice(["after", "after", "before", "count"])
    bank = MATH[kind][language]
    if kind == "count":
        template = phrase(rng, bank, held)
        a, b = rng.randint(1, 92), rng.randint(2, 7)
        numbers = range(a + 1, a + b + 1) if "{b}" in template else range(a, a + b + 1)
        answer = ("、" if language == "zh" else ", ").join(map(str, numbers)) + ("。" if language == "zh" else ".")
        text = expand(rng, template, a=a, b=b, c=a + b)
        return Turn(spoken(rng, text, language, held), answer, (str(a + b),), "last_number")
    a = rng.randint(1, 99)
    value = a + 1 if kind == "after" else a - 1
    text = expand(rng, phrase(rng, bank, held), a=a)
    answer = expand(rng, bank["answer"], a=a, v=value)
    return Turn(spoken(rng, text, language, held), answer, (str(value),), "last_number")


DAYS = {"zh": [f"{word}{day}" for word in ("星期", "周") for day in "一二三四五六日"],
        "en": ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]}
MONTHS = {"zh": [f"{number}月" for number in "一 二 三 四 五 六 七 八 九 十 十一 十二".split()],
          "en": ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
                 "November", "December"]}


def calendar(rng: Dealer, language: str, held: bool = False) -> Turn:
    """The day or the month some steps after or before one."""
    kind = rng.choice(["day", "day", "month"])
    step = rng.choice(sorted(MATH[kind][language]))
    bank, names = MATH[kind][language][step], (DAYS if kind == "day" else MONTHS)[language]
    length = 7 if kind == "day" else 12
    index = rng.randrange(len(names))
    value = names[index // length * length + (index + int(step)) % length]
    text = expand(rng, phrase(rng, bank, held), d=names[index])
    return Turn(spoken(rng, text, language, held), expand(rng, bank["answer"], d=names[index], v=value), (value,))


def too_hard(rng: Dealer, language: str, held: bool = False) -> Turn:
    """Sums beyond addition and subtraction within 100, which the assistant declines."""
    bank = MATH["too_hard"][language]
    text = expand(rng, phrase(rng, bank, False), a=rng.randint(2, 99), b=rng.randint(2, 12), x=rng.randint(101, 999),
                  y=rng.randint(101, 999))
    return Turn(spoken(rng, text, language), bank["answer"])


def math(rng: Dealer, language: str, held: bool = False) -> Turn:
    """One of the kinds of exercises."""
    kinds, weights = [arithmetic, comparison, counting, calendar, too_hard], [19, 7, 5, 4, 0.7]
    return rng.choices(kinds[:4] if held else kinds, weights[:4] if held else weights)[0](rng, language, held)


# ----------------------------------------------------------------------------------------------------- 4 memory


NAMES = BANKS["names"]
GIVEN = sorted(set(NAMES["given"]))


def some_name(rng: Dealer, language: str) -> str:
    """A name: Chinese ones are composed of characters, English ones listed or composed of syllables."""
    if language == "en":
        if rng.random() < 0.25:
            return rng.choice(NAMES["english"].split())
        name = capital("".join(rng.sample(NAMES["syllables"], rng.choice([2, 2, 3]))))
        return f"{name} {capital(''.join(rng.sample(NAMES['syllables'], 2)))}" if rng.random() < 0.08 else name
    form = rng.random()
    if form < 0.03:
        return rng.choice(NAMES["compound_surnames"].split()) + "".join(rng.sample(GIVEN, rng.choice([1, 2])))
    if form < 0.72:
        return rng.choice(NAMES["surnames"]) + "".join(rng.sample(GIVEN, 1 if rng.random() < 0.25 else 2))
    if form < 0.8:
        return rng.choice("小阿") + rng.choice(GIVEN)
    if form < 0.84:
        return rng.choice(GIVEN) * 2
    if form < 0.9:
        return rng.choice("小老") + rng.choice(NAMES["surnames"])
    return some_name(rng, "en").split()[0]


def held_names() -> dict[str, list[str]]:
    """Names that training never holds, although it holds their characters and syllables."""
    rng = random.Random(4)
    zh = [rng.choice(NAMES["surnames"]) + "".join(rng.sample(GIVEN, 2)) for _ in range(70)]
    en = NAMES["heldout_english"].split() + [capital("".join(rng.sample(NAMES["syllables"], 3))) for _ in range(30)]
    return {"zh": list(dict.fromkeys(zh)), "en": list(dict.fromkeys(en))}


HELD_NAMES = held_names()
HELD_NAME_PARTS = [name[1:] for name in HELD_NAMES["zh"]] + [name.lower() for name in HELD_NAMES["en"]]
MEMORY = BANKS["memory"]
KINDS = (*["name"] * 5, "age", "live", *MEMORY["liked"])
KINDS_TOGETHER = (*["name"] * 4, *["age"] * 3, *["live"] * 3, *MEMORY["liked"])  # as people introduce themselves


class Fact(NamedTuple):
    """Something that the user tells: its bank, the words that fill the templates, and how its kind is called."""
    bank: dict
    words: dict
    kind: str


def draw_fact(rng: Dealer, language: str, kind: str, held: bool) -> Fact:
    """A fact of a kind about the user, drawn at random."""
    en, words = language == "en", {}
    if kind == "name":
        value = rng.choice(HELD_NAMES[language]) if held else some_name(rng, language)
        while not held and any(part in value.lower() for part in HELD_NAME_PARTS):
            value = some_name(rng, language)
        bank = MEMORY["kinds"]["name"]
    elif kind == "age":
        value, bank = str(rng.randint(1, 99)), MEMORY["kinds"]["age"]
    elif kind == "live":
        value, bank = rng.pick(held, MEMORY["liked"]["city"]["values"], "live", language)[en], MEMORY["live"]
    else:
        liked = MEMORY["liked"][kind]
        value = rng.pick(held, liked["values"], kind, language)[en]
        bank, words = MEMORY["like"], {"k": liked[language]}
    return Fact(bank[language], {"v": value, "V": capital(value), **words}, kind)


def noted(rng: Dealer, language: str, told: list[Fact]) -> str:
    """The assistant's word that it has taken note of several facts."""
    shorts = [expand(rng, fact.bank["short"], **fact.words) for fact in told if fact.kind != "name"]
    name = next((fact.words["v"] for fact in told if fact.kind == "name"), None)
    if language == "zh":
        return (f"{name}，你好！" if name else "好的，") + "我记住了，" + "，".join(shorts) + "。"
    return (f"Hello, {name}! " if name else "All right. ") + "I will remember that " + " and ".join(shorts) + "."


def plainly(rng: Dealer, language: str, told: list[Fact]) -> str:
    """Several facts in one sentence, each in the plain words that most people choose."""
    parts = [expand(rng, rng.choice(fact.bank["plain"]), **fact.words) for fact in told]
    if parts[0][0] in "我I" and rng.random() < 0.5:  # "I am Ann and live in Rome"
        parts[1:] = [re.sub("^(我(?!家)|I )", "", part.replace("I'm ", "I am ")) for part in parts[1:]]
    if language == "zh":
        opening, text = rng.choice(["", "", "", "你好，", "大家好，"]), rng.choice("，，，， ").join(parts)
        return opening + text + rng.choice(["。", "。", ""])
    opening, last = rng.choice(["", "", "", "Hi, ", "Hello, "]), rng.choice([" and ", " and ", ", and ", ", "])
    return capital(opening + ", ".join(parts[:-1]) + last + parts[-1]) + rng.choice([".", ".", ""])


def tell(rng: Dealer, language: str, told: list[Fact], held: bool) -> tuple[str, str]:
    """What the user says to tell one fact or several at once, and the assistant's word that it has taken note."""
    texts = [expand(rng, draw(rng, fact.bank, "heldout_tell" if held else "tell"), **fact.words) for fact in told]
    if told[0].kind == "name" and len(told) == 1 and not held and rng.random() < 0.15:
        bank, words = told[0].bank, told[0].words
        return expand(rng, rng.choice(bank["tell_and_ask"]), **words), expand(rng, bank["said_back"], **words)
    if len(told) == 1:
        hasty = language == "en" and not held and told[0].kind != "name" and rng.random() < 0.06
        return texts[0].lower() if hasty else texts[0], expand(rng, told[0].bank["said"][0], **told[0].words)
    if not held and rng.random() < 0.5:
        return plainly(rng, language, told), noted(rng, language, told)
    mark, stop = ("，", "。") if language == "zh" else (". ", ".")
    opening = re.compile("记住，|你好，|嗨，|您好，|Remember that |Hello, |Hi, |hi |hello, ")
    later = [opening.sub("", part, count=1) for part in texts[1:]]
    text = mark.join(capital(part).rstrip("。.！!，,") for part in [texts[0], *later]) + stop
    return text, noted(rng, language, told)


def recall(rng: Dealer, language: str, fact: Fact, held: bool, known: bool = True) -> Turn:
    """The question for a fact, and its answer: the fact, or that it has not been told."""
    text = expand(rng, draw(rng, fact.bank, "heldout_ask" if held else "ask"), **fact.words)
    text = spoken(rng, text, language, held, rng.random() < 0.4)
    answer = expand(rng, fact.bank["answer" if known else "unknown"][0], **fact.words)
    key = fact.words["v"] if known else {"zh": "还没有告诉我", "en": "not told me"}[language]
    return Turn(text, answer, (key,))


def memory(rng: Dealer, language: str, held: bool = False) -> tuple[list[Turn], Turn]:
    """The turns before the last, and the last: things told, other talk between, one of the things asked for."""
    nothing_told = not held and rng.random() < 0.06
    count = 0 if nothing_told else rng.choice([1, 1, 2, 2, 3])
    kinds = list(dict.fromkeys(rng.choice(KINDS if held or count == 1 else KINDS_TOGETHER) for _ in range(count)))
    told = [draw_fact(rng, language, kind, held) for kind in kinds]
    new_words = held and rng.random() < 0.5
    turns: list[Turn] = []
    if rng.random() < 0.15:
        turns.append(talk(rng, language, name="hello"))
    if len(told) > 1 and rng.random() < (0.4 if held else 0.6):
        turns.append(Turn(*tell(rng, language, told, new_words)))
    else:
        for fact in told:
            turns.append(Turn(*tell(rng, language, [fact], new_words)))
            if rng.random() < 0.1:
                turns.append(any_turn(rng, language))
    if "name" in kinds and not held and rng.random() < 0.1:
        told[kinds.index("name")] = fact = draw_fact(rng, language, "name", False)
        text = expand(rng, rng.choice(MEMORY["correct"][language]), **fact.words)
        turns.append(Turn(text, f"好的，我记住了，你叫{fact.words['v']}。" if language == "zh"
                          else f"All right, I will remember that your name is {fact.words['v']}."))
    turns += [any_turn(rng, language) for _ in range(rng.choice([0, 0, 0, 1, 1]))]
    asked = rng.sample(told, len(told))
    if not told or rng.random() < (0.15 if held else 0.22):
        others = [kind for kind in dict.fromkeys(KINDS) if kind not in kinds]
        return turns, recall(rng, language, draw_fact(rng, language, rng.choice(others), held), held, known=False)
    turns += [recall(rng, language, fact, False) for fact in asked[1:] if rng.random() < 0.5]
    return turns, recall(rng, language, asked[0], held)


# ------------------------------------------------------------------------------------------------------ 5 words


WORDS = BANKS["words"]
PAIRS = [tuple(pair.split(" ")) for pair in WORDS["pairs"].split("|")]
SPELLED = list(dict.fromkeys([e for _, e in PAIRS] + WORDS["spell_only"].split()))
CHARACTERS = sorted({character for zh_word, _ in PAIRS for character in zh_word} | set(GIVEN))


def translation(rng: Dealer, language: str, held: bool = False) -> Turn:
    """A small word from Chinese to English or back."""
    held_pair = rng.choice(PAIRS) if held else None
    direction = rng.choice(["to_en", "to_zh"])
    zh_word, en_word = held_pair or rng.deal(PAIRS, "translation", direction, language)
    bank = WORDS["translate"][direction][language]
    text = expand(rng, phrase(rng, bank, held), z=zh_word, e=en_word)
    return Turn(spoken(rng, capital(text) if language == "en" else text, language, held),
                expand(rng, bank["answer"], z=zh_word, e=en_word), (en_word if direction == "to_en" else zh_word,))


def spelling(rng: Dealer, language: str, held: bool = False) -> Turn:
    """An English word letter by letter."""
    word = rng.pick(held, SPELLED, "spelling", language)
    bank = WORDS["spell"][language]
    text = expand(rng, phrase(rng, bank, held), e=word)
    spelled = "-".join(word)
    return Turn(spoken(rng, text, language, held), expand(rng, bank["answer"], e=word, s=spelled), (spelled,))


HELD_SENTENCES = {language: WORDS["held_sentences"][language].split("|") for language in LANGUAGES}


def sentence(rng: Dealer, language: str) -> str:
    """A plain sentence of words drawn from the bank, none of those held out."""
    bank = WORDS["parts"][language]
    while True:
        text = expand(rng, rng.choice(bank["forms"]))
        while "{" in text:
            text = re.sub(r"\{(\w+)\}", lambda m: rng.choice(
                [pair[language == "en"] for pair in PAIRS] if m[1] == "noun" else bank[m[1]].split("|")), text, count=1)
        if text not in HELD_SENTENCES[language]:
            return re.sub(r"\ba (?=[aeiou])", "an ", text)


def repeating(rng: Dealer, language: str, held: bool = False) -> Turn:
    """A text to be said again, to the letter: a sentence, some words, a name, or numbers."""
    form, zh = rng.random(), language == "zh"
    if held:
        text = rng.choice(HELD_SENTENCES[language])
    elif form < 0.2:
        text = rng.choice(WORDS["sentences"][language].split("|"))
    elif form < 0.5:
        text = sentence(rng, language)
    elif form < 0.75:
        pool = [pair[not zh] for pair in PAIRS] + ([] if zh else SPELLED)
        text = (rng.choice(["", "、", "，", " "]) if zh else rng.choice([" ", " ", ", "])).join(
            rng.choices(pool, k=rng.randint(1, 5)))
    elif zh and form < 0.86:
        text = "".join(rng.choices(CHARACTERS, k=rng.randint(2, 6)))
    elif form < 0.93:
        names = [draw_fact(rng, language, "name", False).words["v"] for _ in range(rng.choice([1, 1, 2]))]
        text = ("、" if zh else ", ").join(names)
    else:
        text = " ".join(str(rng.randint(0, 99)) for _ in range(rng.randint(1, 5)))
    ask = expand(rng, phrase(rng, WORDS["repeat"][language], held and rng.random() < 0.6), t=text)
    if ask.count("“") > ask.count("”"):
        ask += "”"
    return Turn(ask, text, (text,), "exact")


def words(rng: Dealer, language: str, held: bool = False) -> Turn:
    """One of the kinds of exercises with words."""
    return rng.choices([translation, spelling, repeating], [14, 6, 10])[0](rng, language, held)


# ---------------------------------------------------------------------------------------------------- 6 stories


STORIES = BANKS["stories"]


def subject(rng: Dealer, language: str, held: bool) -> tuple[str, str, str, bool]:
    """How the request names a subject, its first mention, its name afterwards, and whether it is alive."""
    alive = rng.random() < 0.6
    pool = "who" if alive else "what"
    name = rng.pick(held, STORIES[f"held_{pool}" if held else pool][language].split("|"), "subject", pool, language)
    if not alive:
        return name, name, name, False
    if language == "zh":
        one, short = name.split(" ")
        return rng.choice([short, short, one]), one, short, True
    return name, name, re.sub("^an? ", "the ", name), True


def tale(rng: Dealer, language: str, held: bool = False) -> tuple[Turn, str, str]:
    """A very short story or a verse on a subject; which of the two; the subject."""
    asked, one, name, alive = subject(rng, language, held and rng.random() < 0.5)
    words = {"one": one, "s": name, "S": capital(name)}
    kind = rng.choice(["story", "story", "verse"])
    pool = STORIES["verses" if kind == "verse" else "stories" if alive else "what_stories"][language]
    answer = expand(rng, rng.pick(held, pool), **words)
    if language == "en" and kind == "verse" and alive:
        answer = expand(rng, rng.choice(pool), **(words | {"s": name}))
    if not held and rng.random() < 0.08:
        text = expand(rng, rng.choice(STORIES[f"ask_any_{kind}"][language]))
    else:
        text = expand(rng, phrase(rng, STORIES[f"ask_{kind}"][language], held), s=asked)
    key = re.sub("^(the|a|an|my) ", "", name)
    turn = Turn(spoken(rng, text, language, held), answer, (key,), "story")
    return turn, kind, name if language == "zh" else asked


def stories(rng: Dealer, language: str, held: bool = False) -> Turn:
    """A very short story or a verse on a subject."""
    return tale(rng, language, held)[0]


def tale_and_subject(rng: Dealer, language: str) -> list[Turn]:
    """A story or a verse, and often the question what it is about."""
    turn, kind, name = tale(rng, language)
    if rng.random() < 0.5:
        return [turn]
    text = expand(rng, rng.deal(STORIES["ask_subject"][language][kind]))
    return [turn, Turn(spoken(rng, text, language), STORIES["tell_subject"][language][kind].replace("{s}", name))]


# ------------------------------------------------------------------------------------------------ 7 not knowing


UNKNOWN = BANKS["unknown"]
DO_NOT_KNOW = {"zh": ("不知道", "不清楚", "不了解"), "en": ("do not know", "don't know")}


def unknown(rng: Dealer, language: str, held: bool = False) -> Turn:
    """A question outside all that, and the plain word that the assistant does not know."""
    groups, fixed = [group[language] for group in UNKNOWN["groups"]], UNKNOWN["fixed"][language]
    if rng.random() < 0.2:
        text = expand(rng, phrase(rng, fixed, held))
    else:
        group = rng.choices(groups, [len(group["nouns"].split("|")) + 15 for group in groups])[0]
        # A held-out question has a new noun, a new phrasing, or both.
        new_noun, new_words = rng.choice([(True, True), (True, False), (False, True)]) if held else (False, False)
        nouns = group["held" if new_noun else "nouns"]
        noun = rng.pick(held, nouns.split("|"), "unknown", nouns)
        text = expand(rng, phrase(rng, group, new_words), x=noun)
    answer = UNKNOWN["answer"][language]
    return Turn(spoken(rng, capital(text), language, held), answer, DO_NOT_KNOW[language])


# -------------------------------------------------------------------------------------------------- conversations


SINGLE: dict[str, Callable[..., Turn]] = {"talk": talk, "facts": facts, "math": math, "words": words,
                                          "stories": stories, "unknown": unknown}


def any_turn(rng: Dealer, language: str) -> Turn:
    """A turn of any skill that needs no memory, small talk and facts most."""
    kind = rng.choices(list(SINGLE), [4, 5, 6, 4, 0.5, 2])[0]
    return SINGLE[kind](rng, language)


def mixed(rng: Dealer, language: str) -> list[Turn]:
    """Two to five turns about different things, as people chat."""
    turns = [talk(rng, language, name=rng.choice(["hello", "hello", "hello", "may_i_ask", "morning", "evening"]))] \
        if rng.random() < 0.45 else []
    length = rng.randint(2, 4)
    while len(turns) < length:
        other = ("en" if language == "zh" else "zh") if rng.random() < 0.05 else language
        if rng.random() < 0.3:
            kind = rng.choice(["capital", "capital", "continent", "language", "currency"])
            turns.append(country(rng, other, kind=kind))
            for _ in range(rng.choice([1, 1, 2])):
                turn = country(rng, other, kind=kind, follow=True)
                turns += [turn] if turn.answer not in [earlier.answer for earlier in turns] else []
        else:
            turns.append(any_turn(rng, other))
        if rng.random() < 0.05:
            turns.append(Turn(rng.choice(CHAT["again"][other]), turns[-1].answer))
    if rng.random() < 0.3:
        last = rng.choice(["thanks", "thanks", "bye", "ok", "praise", "laugh", "nothing_else"])
        turns.append(talk(rng, language, name=last))
    return turns


def page(rng: Dealer, language: str) -> list[str]:
    """A plain text, as lines: a story, or a question or two with their answers, as somebody asks a stranger."""
    if rng.random() < 0.25:
        return [stories(rng, language).answer]
    kinds = rng.choices(["talk", "facts", "math", "words", "unknown"], [4, 5, 6, 4, 2], k=rng.choice([1, 1, 2]))
    turns = [SINGLE[kind](rng, language) for kind in kinds]
    lines = [line for turn in turns for line in (turn.user, turn.answer)]
    if language == "zh" and kinds[0] in ("facts", "math", "unknown") and not ORDER.match(lines[0]):
        lines[0] = rng.choice(["", "你好，请问"]) + lines[0]
    return lines


def messages(turns: list[Turn], system: Optional[str] = None) -> list[dict]:
    """The OpenAI form of a conversation."""
    said = [{"role": role, "content": text} for turn in turns
            for role, text in (("user", turn.user), ("assistant", turn.answer))]
    return ([{"role": "system", "content": system}] if system else []) + said


def held_out(rng: Dealer) -> Iterator[tuple[dict, str]]:
    """The held-out items, and the last user message of each."""
    for name, skill in SKILLS.items():
        for language in LANGUAGES:
            seen: set[str] = set()
            while len(seen) < HELD_OUT_EACH:
                if name == "memory":
                    before, last = memory(rng, language, True)
                    identity = "\n".join(turn.user for turn in [*before, last])
                else:
                    before = [any_turn(rng, language)] if rng.random() < 0.2 else []
                    last = SINGLE[name](rng, language, True)
                    identity = normalised(last.user)
                if identity in seen or sum(len(turn.user + turn.answer) for turn in before) > 350:
                    continue
                seen.add(identity)
                asked = messages([*before, last])[:-1]
                yield {"skill": skill, "language": language, "messages": asked, "keys": list(last.keys),
                       "match": last.match}, last.user


def plain_talk(language: str) -> Iterator[list[Turn]]:
    """The plainest small talk, such as a bare hello: what everybody types first, and no draw may miss."""
    for intent in (intent[language] for intent in BANKS["talk"]["intents"]):
        for text in intent["plain"]:
            yield [Turn(text, intent["answers"][0])]


def conversation(rng: Dealer, language: str, topic: str) -> list[Turn]:
    """The turns of a conversation about a topic. In a third of them something else was spoken of before."""
    if topic == "memory":
        before, last = memory(rng, language)
        return [*before, last]
    if topic == "mixed":
        return mixed(rng, language)
    before = [any_turn(rng, rng.choices([language, *LANGUAGES], [0.88, 0.06, 0.06])[0])
              for _ in range(rng.choices([0, 1, 2], [66, 24, 10])[0])]
    return [*before, *(tale_and_subject(rng, language) if topic == "stories" else [SINGLE[topic](rng, language)])]


def training(held_texts: set[str]) -> Iterator[tuple[str, dict]]:
    """File name and record, one after the other; no exact duplicates, no held-out question, none too long."""
    seen: set[str] = set()
    dealers = {language: Dealer(language) for language in LANGUAGES}
    for topic, sizes in SIZES.items():
        for language, size in zip(LANGUAGES, sizes, strict=True):
            rng = dealers[language]
            done = tries = 0
            plain = plain_talk(language) if topic == "talk" else iter(())
            while done < size and tries < size * 12:
                tries += 1
                turns = [] if topic == "text" else next(plain, None) or conversation(rng, language, topic)
                lines = [turn.user for turn in turns] or page(rng, language)
                identity = "\n".join(lines)
                new = identity not in seen and not any(normalised(line) in held_texts for line in lines)
                length = sum(len(turn.user + turn.answer) * (2 if turn.user.isascii() else 5) for turn in turns)
                fits = new and length <= 1800
                rng.keep(fits)
                if not fits:
                    continue
                seen.add(identity)
                done += 1
                if topic == "text":
                    yield f"text_{language}.jsonl", {"text": identity}
                else:
                    system = rng.choice(CHAT["system"][language]) if topic == "mixed" and rng.random() < 0.06 else None
                    yield f"chat_{language}_{topic}.jsonl", {"messages": messages(turns, system)}


def build(out: Path) -> dict[str, int]:
    """Write all files into a folder; the number of lines of each."""
    items = list(held_out(Dealer("heldout")))
    files: dict[str, list[str]] = {}
    held = (("heldout.jsonl", item) for item, _ in items)
    for name, record in chain(held, training({normalised(user) for _, user in items})):
        files.setdefault(name, []).append(json.dumps(record, ensure_ascii=False, separators=(",", ":")))
    out.mkdir(parents=True, exist_ok=True)
    for name, lines in files.items():
        (out / name).write_bytes(("\n".join(lines) + "\n").encode())
    return {name: len(lines) for name, lines in files.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description="Write the embedded corpus from the phrase banks.")
    parser.add_argument("--out", type=Path, default=HERE, help="folder to write to (default: corpus/)")
    out = parser.parse_args().out
    for name, count in build(out).items():
        print(f"{name:24} {count:6,} lines {(out / name).stat().st_size:10,} bytes")


if __name__ == "__main__":
    main()
