"""The demo's task: a sentence about an appointment becomes one line of JSON.

    "Remind me to grab lunch with Maria this Friday at half past two in the afternoon"
    {"do":"lunch","who":"Maria","day":"fri","at":"2:30pm"}

The keys and their order, the names of the actions, and how days and times are written are
conventions that a model cannot guess: it has to learn them. Everything is generated here, from one
seed; train and test share no sentence and no answer.
"""

import itertools
import json
import random

Pair = tuple[str, str]

ACTIONS = {
    "call": ("call", "phone", "ring up"),
    "meet": ("meet", "get together with", "sit down with"),
    "lunch": ("have lunch with", "grab lunch with", "go to lunch with"),
    "dinner": ("have dinner with", "go out for dinner with", "eat dinner with"),
    "email": ("email", "send an email to", "write an email to"),
    "visit": ("visit", "drop in on", "pay a visit to"),
    "train": ("work out with", "go to the gym with", "exercise with"),
    "pay": ("pay", "send money to", "transfer the money to"),
}
PEOPLE = (
    *(
        "Anna",
        "Ben",
        "Carla",
        "David",
        "Emma",
        "Felix",
        "Grace",
        "Henry",
        "Irene",
        "Jack",
        "Karen",
        "Leo",
    ),
    *(
        "Maria",
        "Nina",
        "Oscar",
        "Paul",
        "Rosa",
        "Sam",
        "Tina",
        "Victor",
        "Wendy",
        "Peter",
        "Laura",
        "Simon",
    ),
)
DAYS = {
    "mon": "Monday",
    "tue": "Tuesday",
    "wed": "Wednesday",
    "thu": "Thursday",
    "fri": "Friday",
    "sat": "Saturday",
    "sun": "Sunday",
}
DAY_PHRASES = ("on {}", "on {}", "this {}", "this coming {}")
HOURS = range(8, 21)
MINUTES = (0, 15, 30, 45)
HOUR_WORDS = {
    **{1: "one", 2: "two", 3: "three", 4: "four", 5: "five", 6: "six"},
    **{7: "seven", 8: "eight", 9: "nine", 10: "ten", 11: "eleven", 12: "twelve"},
}
TEMPLATES = (
    "Remind me to {do} {who} {day} at {time}",
    "Please {do} {who} {day} at {time}",
    "I want to {do} {who} {day} at {time}",
    "I have to {do} {who} at {time} {day}",
    "Put it in my calendar: {do} {who} {day}, {time}",
    "Please note that at {time} {day} I need to {do} {who}",
    "Don't let me forget to {do} {who} {day} at {time}",
    "Could you note that I will {do} {who} at {time} {day}?",
    "My plan is to {do} {who} {day} at {time}",
    "Let's {do} {who} {day}, say at {time}",
)


def make_pairs(train: int, test: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Draw a training and a test set.

    Args:
        train: training pairs.
        test: test pairs.
        seed: the same seed gives the same pairs.

    Returns:
        (sentence, answer) pairs of both sets; none is repeated, and no sentence and no answer is
        in both.
    """
    rng = random.Random(seed)
    facts = [*itertools.product(ACTIONS, PEOPLE, DAYS, HOURS, MINUTES)]
    pairs = [_pair(rng, *fact) for fact in rng.sample(facts, train + test)]
    return pairs[:train], pairs[train:]


def _pair(rng: random.Random, action: str, who: str, day: str, hour: int, minute: int) -> Pair:
    sentence = rng.choice(TEMPLATES).format(
        do=rng.choice(ACTIONS[action]),
        who=who,
        day=rng.choice(DAY_PHRASES).format(DAYS[day]),
        time=rng.choice((_digits, _half_spoken, _spoken))(hour, minute),
    )
    at = f"{_on_dial(hour)}:{minute:02}{'am' if hour < 12 else 'pm'}"
    answer = {"do": action, "who": who, "day": day, "at": at}
    return sentence[0].upper() + sentence[1:], json.dumps(answer, separators=(",", ":"))


def _digits(hour: int, minute: int) -> str:
    minutes = f":{minute:02}" if minute else ""
    return f"{_on_dial(hour)}{minutes} {'am' if hour < 12 else 'pm'}"


def _half_spoken(hour: int, minute: int) -> str:
    return f"{_on_dial(hour)}:{minute:02} {_part(hour)}"


def _spoken(hour: int, minute: int) -> str:
    word = HOUR_WORDS[_on_dial(hour)]
    words = {
        0: f"{word} o'clock",
        15: f"a quarter past {word}",
        30: f"half past {word}",
        45: f"{word} forty-five",
    }
    return f"{words[minute]} {_part(hour)}"


def _part(hour: int) -> str:
    return f"in the {'morning' if hour < 12 else 'afternoon' if hour < 18 else 'evening'}"


def _on_dial(hour: int) -> int:
    return (hour - 1) % 12 + 1
