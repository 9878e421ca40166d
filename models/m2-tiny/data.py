"""The generated instruction set: what is asked how often, stories on demand, and talks of several turns.

Deterministic with a seed. Held-out prompts and combinations (heldout_prompts.json) never come out of item() or story_more().
"""

# fmt: off
# ruff: noqa: SIM905  a split string is a readable list of words

from __future__ import annotations

import json
import random
import re
from collections.abc import Callable
from pathlib import Path

import stories
import tables as t
import tasks
from stories import article
from tasks import Item, ask

HELDOUT = json.loads((Path(__file__).parent / "heldout_prompts.json").read_text())
HELDOUT_TAGS = {p["tag"] for p in HELDOUT if "tag" in p}


def fold(text: str) -> str:
    """Lower case, letters and digits only: how held-out prompts are compared."""
    return re.sub(r"[^a-z0-9]+", " ", text.lower()).strip()


HELDOUT_TEXTS = {fold(p["messages"][-1]["content"]) for p in HELDOUT}
STORY_ASK = (
    "[Tell me a {adj}story about {x}.|Can you tell me a {adj}story about {x}?|Tell a {adj}story about {x}.|Write a {adj}story about {x}.|"
    "I want to hear a {adj}story about {x}.|Please tell me a {adj}story about {x}.|Write me a {adj}story about {x}.|A story about {x}, please.|"
    "Could you tell a {adj}story about {x}?|I would like a {adj}story about {x}.|Make up a {adj}story about {x}.|Do you know a story about {x}?|"
    "Tell me a {adj}tale about {x}.|Story about {x}|tell me a story about {x}|Please write a {adj}story with {x}.|Can you write a {adj}story about {x}?|"
    "Give me a {adj}story about {x}.|I'd like to hear a {adj}story about {x}.|Invent a {adj}story about {x}.|I'd like a story about {x}.|Write a {adj}tale about {x}.|"
    "Would you tell me a {adj}story about {x}?|Can I have a {adj}story about {x}?|Please, a story about {x}!|Let me hear a story about {x}.|"
    "My child wants a story about {x}.|Tell us a {adj}story about {x}.|Think of a {adj}story about {x}.|We want a {adj}story about {x}.|Good evening! Tell me a story about {x}.|"
    "It is late. Tell me a story about {x}.|I am bored. Tell me a story about {x}.|Before I sleep, tell me a story about {x}.|Make a {adj}story about {x} for me.]"
)  # fmt: skip


def story(r: random.Random) -> Item:
    cast = stories.Cast()
    heroes = stories.ANIMALS + list(stories.PEOPLE)
    kind = r.choice("tttthhhaaapPsTnrt")
    tag = ""
    if kind in "htapPs":
        cast.hero = r.choice(heroes)
    shown = cast.hero
    if kind in "ta" and r.random() < (0.35 if kind == "t" else 1):
        cast.trait = r.choice(stories.TRAITS)
        shown = f"{cast.trait} {cast.hero}"
    x = article(shown) if shown else ""
    if kind == "h" and r.random() < 0.25:
        x = t.PLURALS.get(cast.hero, cast.hero + "s")
    if kind == "t":
        cast.thing = r.choice(stories.THINGS)
        th = cast.thing.replace("-", " ")
        poss = {"she": "her", "he": "his"}.get(stories.PEOPLE.get(cast.hero, "it"), "its")
        x += ask(r, f" [and {article(th)}|and {article(th)}|and {article(th)}|who has {article(th)}|who finds {article(th)}|with {article(th)}|and {poss} {th}|and the {th}|who loses {poss} {th}]")
        if "finds" in x:
            cast.plot = "found gift"
        elif "loses" in x:
            cast.plot = "lost"
        tag = f"story:{cast.hero}+{cast.thing}"
    elif kind == "a":
        tag = f"story:{cast.trait} {cast.hero}"
    elif kind == "p":
        cast.friend = r.choice([h for h in heroes if h != cast.hero])
        x += f" and {article(cast.friend)}"
        tag = f"story:{cast.hero}+{cast.friend}"
    elif kind in "Ps":
        place = r.choice(list(stories.PLACES))
        cast.place = stories.PLACES[place]
        cast.plot = "lost learn found night journey trick build gift storm"
        x += f" {cast.place}"
        tag = f"story:{cast.hero}@{place}"
    elif kind == "T":
        x = r.choice(list(stories.THEMES))
        cast.plot = stories.THEME_PLOTS[stories.THEMES[x]]
    elif kind == "n":
        cast.thing = r.choice(stories.THINGS)
        th = cast.thing.replace("-", " ")
        x = article(th)
    elif kind == "r":
        q = ask(r, "[Tell me a story.|Can you tell me a story?|Tell me a short story.|I want a story.|Please tell me a story.|A story, please!|Write a story.|Tell me something.|Can you tell me a bedtime story?|Do you know a story?|I would like to hear a story.|Another story, please.|One more story!|Tell me a fairy tale.|Read me a story.]")
        cast.hero = r.choice(heroes)
        return q, f"The user wants a story. I will tell one about {article(cast.hero)}.", stories.tell(cast, r), ""
    if kind in "ha" and r.random() < 0.35:
        cast.plot = "learn race night share trick journey afraid build storm"
    adj = ask(r, "[||||short |little |nice |funny |bedtime |new |very short |good |happy ]")
    q = ask(r, STORY_ASK.replace("{adj}", adj).replace("{x}", x))
    text = stories.tell(cast, r)
    return q, f"The user wants a story about {x}. I will tell a short one.", text, tag


# How often each task is asked in the three phases: the main mix, the end of the trunk stage (and the frozen stage), the joint
# stage. Stories have most of the tokens and are learned first; tables, then sums and spelling, are asked more often later.
TASKS: dict[Callable[[random.Random], Item], tuple[float, float, float]] = {
    story: (15, 6, 6), tasks.number_tasks: (15, 24, 36), tasks.animal: (8, 10, 8), tasks.words: (9, 15, 26), tasks.greeting: (5, 5, 4),
    tasks.identity: (5, 4, 4), tasks.small_talk: (6, 6, 5), tasks.definition: (6, 6, 6), tasks.listing: (5, 6, 8),
    tasks.calendar: (5, 8, 6), tasks.opposite: (4, 5, 4), tasks.colour: (3.5, 6, 4), tasks.capital: (4, 8, 6), tasks.counting: (4, 8, 5),
    tasks.howto: (4, 3, 3), tasks.sizes: (4, 4, 4), tasks.thanks: (3.5, 4, 3), tasks.unknown: (4, 4, 4), tasks.ability: (2, 2, 2),
}


def untidy(q: str, r: random.Random) -> str:
    """A question as people type it: now and then without capitals or the last mark."""
    x = r.random()
    if x < 0.08:
        q = q.lower()
    if 0.05 < x < 0.12:
        q = q.rstrip("?.!")
    return q.strip()


def item(r: random.Random, phase: int = 0) -> Item:
    """One exchange of any task that is not held out, with the weights of a phase."""
    kinds, weights = list(TASKS), [w[phase] for w in TASKS.values()]
    while True:
        q, think, a, tag = r.choices(kinds, weights)[0](r)
        q = untidy(q[0].upper() + q[1:] if r.random() < 0.7 else q, r)
        if tag not in HELDOUT_TAGS and fold(q) not in HELDOUT_TEXTS:
            return q, think, a, tag


def memory(r: random.Random) -> list[tuple[str, str, str]]:
    """Two or three turns, the last of which asks for something said before."""
    name = r.choice(stories.SHE + stories.HE)
    kind = r.randrange(3)
    if kind == 0:
        q1 = ask(r, f"[My name is {name}.|I am {name}.|Hi, I am {name}.|Hello, my name is {name}.|You can call me {name}.|Hey, I'm {name}!|{name} is my name.|Good morning, my name is {name}.|They call me {name}.]")
        a1 = ask(r, f"[Hello, {name}!|Hi, {name}!|Nice to meet you, {name}!] [How can I help you?|It is nice to meet you.|What can I do for you?]")
        turns = [(q1, f"The user is {name}. I will say hello.", a1)]
        q2 = ask(r, "[What is my name?|Do you know my name?|Who am I?|What's my name?|Do you remember my name?|Can you tell me my name?|How am I called?|Say my name.|Tell me my name.|Have you forgotten my name?|What am I called?|Which name did I tell you?]")
        last = (q2, f"The user told me the name {name}.", ask(r, f"Your name is {name}."))
    elif kind == 1:
        thing, value = r.choice([
            ("favourite colour", r.choice("red blue green yellow orange purple pink black white".split())),
            ("favourite animal", "the " + r.choice(list(t.ANIMALS))), ("favourite season", r.choice(t.SEASONS)),
            ("favourite food", r.choice("pizza soup cake rice bread cheese pasta salad".split())),
            ("favourite number", str(r.randint(1, 30))), ("favourite day", r.choice(t.DAYS)), ("favourite fruit", "the " + r.choice(t.CATEGORIES["fruits"].split())),
        ])  # fmt: skip
        q1 = ask(r, f"[My {thing} is {value}.|I want to tell you that my {thing} is {value}.|Remember: my {thing} is {value}.|Hi! My {thing} is {value}.]")
        turns = [(q1, f"The user tells me their {thing}. It is {value}.", ask(r, f"[That is nice!|I will remember that.|Good to know!] Your {thing} is {value}."))]
        q2 = ask(r, f"[What is my {thing}?|Do you remember my {thing}?|Do you know my {thing}?|Tell me my {thing}.|What was my {thing}?|And what is my {thing}?]")
        last = (q2, f"The user told me that it is {value}.", f"Your {thing} is {value}.")
    else:
        who = r.choice(["dog", "cat", "rabbit", "horse", "parrot", "brother", "sister", "friend"])
        q1 = ask(r, f"[I have a {who} named {name}.|My {who} is called {name}.|My {who}'s name is {name}.|This is my {who}, {name}.|The name of my {who} is {name}.]")
        turns = [(q1, f"The user has a {who}. The name is {name}.", ask(r, f"[How nice!|That is a nice name!] [Say hello to {name} from me.|{name} is a good name for a {who}.|Tell me more about {name}.]") if who in "dog cat rabbit horse parrot" else f"How nice! Say hello to {name} from me.")]
        q2 = ask(r, f"[What is my {who} called?|What is the name of my {who}?|What is my {who}'s name?|Do you remember the name of my {who}?|Who is {name}?|How is my {who} called?]")
        last = (q2, f"The {who} of the user is {name}.", f"Your {who} is called {name}." if not q2.startswith("Who") else f"{name} is your {who}.")
    if r.random() < 0.4:
        q, think, a, _ = item(r)
        turns.append((q, think, a))
    return [*turns, last]


def story_more(r: random.Random) -> list[tuple[str, str, str]]:
    """A story, then a question about who it was about, or another story."""
    while True:
        q, think, a, tag = story(r)
        if tag not in HELDOUT_TAGS and fold(q) not in HELDOUT_TEXTS:
            break
    subject = think.split(" about ")[-1].split(".")[0]
    if r.random() < 0.5:
        q2 = ask(r, "[Who was the story about?|What was the story about?|What was your story about?|Do you remember what the story was about?|Who was in the story?]")
        return [(q, think, a), (q2, f"The story was about {subject}.", f"The story was about {subject}.")]
    hero = r.choice(stories.ANIMALS)
    q2 = ask(r, f"[Now one about {article(hero)}.|And now a story about {article(hero)}.|Another one about {article(hero)}, please.|Nice! Now tell one about {article(hero)}.]")
    return [(q, think, a), (q2, f"The user wants a story about {article(hero)}. I will tell a short one.", stories.tell(stories.Cast(hero=hero), r))]


def long_talk(r: random.Random) -> list[tuple[str, str, str]]:
    """A talk of 1,200 to 3,200 characters; in half of them the last question goes back to the beginning."""
    size = r.randint(1200, 3200)
    *start, last = memory(r)
    turns = start if r.random() < 0.5 else []
    while sum(len(q) + len(a) for q, _, a in turns) < size:
        turns.append(item(r)[:3])
    return [*turns, last] if turns[0] == start[0] else turns


def conversation(r: random.Random, phase: int = 0) -> list[tuple[str, str, str]]:
    """One document: mostly one exchange, sometimes a longer talk that changes the subject."""
    x = r.random()
    if x < 0.06:
        return memory(r)
    if x < 0.09:
        return story_more(r)
    n = 1 if x < 0.87 else r.choice([2, 2, 2, 3, 3, 4, 5, 6])
    return [item(r, phase)[:3] for _ in range(n)]
