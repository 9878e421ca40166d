"""A story grammar: short stories with one plot, on one subject, that end. Owns plots; ignores questions and markup.

Text in square brackets is a choice, [one|two|three], and may be nested; {name} is filled from the cast.
"""

# fmt: off
# ruff: noqa: SIM905  a split string is a readable list of words

from __future__ import annotations

import random
import re
from dataclasses import dataclass

CHOICE = re.compile(r"\[([^\[\]]*)\]")


def expand(text: str, rng: random.Random) -> str:
    """Resolve every [a|b|c], innermost first."""
    while True:
        text, n = CHOICE.subn(lambda m: rng.choice(m.group(1).split("|")), text)
        if not n:
            return text


ANIMALS = (
    "fox bear mouse rabbit owl cat dog duck hen horse cow sheep goat pig frog turtle squirrel hedgehog deer wolf lion "
    "elephant monkey penguin whale dolphin crab snail bee ant butterfly spider sparrow crow swan goose donkey camel tiger "
    "giraffe seal otter badger mole beaver parrot dragon kitten puppy lamb bird fish robin"
).split()
PEOPLE = {
    "girl": "she", "boy": "he", "princess": "she", "prince": "he", "king": "he", "queen": "she", "farmer": "he",
    "baker": "he", "sailor": "he", "fisherman": "he", "knight": "he", "wizard": "he", "grandmother": "she",
    "grandfather": "he", "teacher": "she", "gardener": "she", "painter": "she", "shepherd": "he", "clockmaker": "he",
    "witch": "she", "giant": "he", "pirate": "he", "robot": "it", "woodcutter": "he", "shoemaker": "he", "snowman": "he",
}
TRAITS = "little brave clever kind shy lonely curious old young sleepy hungry gentle cheerful tiny quiet lazy happy".split()
THINGS = (
    "lantern kite ball key bell book boat drum hat red-scarf blue-cup music-box map feather flower stone shell button "
    "umbrella basket balloon whistle ribbon golden-ring wooden-horse blanket bicycle star letter clock mirror candle "
    "ladder spoon coin broom teapot pumpkin apple pie cake acorn nut seed tree cart train bridge lamp pencil shoe mitten"
).split()
PLACES = {
    "forest": "in the forest", "sea": "by the sea", "river": "by the river", "mountain": "on the mountain",
    "village": "in the village", "garden": "in the garden", "farm": "on the farm", "castle": "in the castle",
    "island": "on the island", "meadow": "in the meadow", "lake": "by the lake", "desert": "in the desert",
    "hill": "on the hill", "town": "in the town", "beach": "on the beach", "cave": "in the cave",
    "lighthouse": "in the lighthouse", "jungle": "in the jungle", "pond": "by the pond", "market": "at the market",
}
THEMES = {
    "friendship": "friends", "sharing": "share", "courage": "afraid", "kindness": "help", "the rain": "storm",
    "winter": "snow", "the moon": "moon", "bedtime": "moon", "a birthday": "birthday", "a storm": "storm",
    "snow": "snow", "helping others": "help", "being brave": "afraid", "a long journey": "journey", "a race": "race",
}
SHE = "Anna Mia Lily Rosa Clara Nina Ella Tess Molly Ruby Hazel Ivy Pearl Dora Lena".split()
HE = "Tom Ben Max Leo Finn Oscar Sam Hugo Theo Jack Otto Felix Toby Milo Pip".split()


def article(noun: str) -> str:
    """a or an, with the noun."""
    return f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"


@dataclass
class Cast:
    """Who and what a story is about; empty strings are filled at random."""

    hero: str = ""
    trait: str = ""
    friend: str = ""
    thing: str = ""
    place: str = ""
    plot: str = ""


# Each plot: sentences in order. {a_hero} "a brave fox", {h} "the fox" or its name, {s} he/she/it, {p} his/her/its, {o} him/her.
PLOTS: dict[str, str] = {
    "lost": """[Once upon a time|One day|Long ago], {a_hero}{named} lived {place}. {H} had {a_thing} and loved it [very much|more than anything].
[One morning|One windy day|One evening], the {thing} was gone. {H} looked [under the bed|behind the door|in every corner] and [all along the path|under every stone|in the tall grass], but {s} could not find it.
"[Why are you sad?|What is the matter?|What are you looking for?]" asked {a_friend}. "I have lost my {thing}," said {h}.
"[Do not worry|Do not cry|Cheer up]. [I will help you|We will look together]," said the {friend}. They looked [until the sun was low|all afternoon|high and low].
[At last|Then] the {friend} saw something [in the bushes|near the old well|under a big leaf]. It was the {thing}!
{H} [was so happy that {s} danced|jumped for joy|laughed with joy]. "Thank you," {s} said. [From that day on, they were good friends.|And the two of them were friends from that day on.|That night {h} slept well, with the {thing} close by.]""",
    "learn": """[Once there was|There once was|Once upon a time there was] {a_hero}{named} who wanted to [sing|swim|dance|paint|climb the tall tree|bake bread|whistle a tune]. [But|At first] it was [very hard|not easy at all].
{S} tried on Monday, and it went wrong. {S} tried on Tuesday, and it went wrong again. [The others laughed.|Everyone else could do it.|"I will never learn," {s} said.]
Then {a_friend} [came by|sat down next to {o}] and said, "[Go slowly|Try once more|Do a little every day], and you will see."
So {h} tried [every morning|a little every day] {place}. {Thingline}[A week went by.|Many days went by.|Spring turned to summer.]
[One day|And then, one fine morning], it worked! {H} was [so proud|so happy]. The {friend} [clapped|cheered] and said, "[I knew you could do it|Well done, my friend]."
[And {h} never gave up again.|After that, {h} was never afraid to try new things.|Since then {h} has helped others to learn, too.]""",
    "found": """{A_hero}{named} was walking {place} [one morning|one day|on a sunny day]. There, [in the grass|on the path|under a tree], lay {a_thing}.
"[Who has lost this?|Whose can this be?|How pretty it is!]" said {h}. {S} wanted to keep the {thing}, but {s} knew that [someone must miss it|it was not {p} own].
So {h} asked everyone {s} met. "Is this yours?" "No," said [the crow|the old goat|the baker|the miller]. "Not mine," said [the toad|the postman|the grey goose].
At last {s} met {a_friend} who was crying. "I have lost my {thing}," said the {friend}. "[Here it is|Is this the one]!" said {h}.
The {friend} [was so glad|smiled from ear to ear|could not believe it]. "[You are honest and kind|How good you are]. [Come and eat with me|Will you be my friend]?"
[They ate soup and bread together and laughed until night.|And so {h} found more than {a_thing}. {S} found a friend.|From then on they played together every day.]""",
    "afraid": """[Once upon a time|Once], {a_hero}{named} lived {place}. {H} was afraid of the dark. [Every night {s} hid under the blanket.|Every night {s} shook with fear.]
One night {s} heard a small voice outside. "Help! I am lost!" It was {a_friend}.
{H} [took a deep breath|was very scared]. But {s} [took {a_thing}|held {a_thing} tight] and went out into the night.
"[Where are you?|I am coming!]" {s} called. [Step by step|Slowly] {s} walked through the dark until {s} found the {friend}.
"[You came!|Thank you!]" said the {friend}. "Were you not afraid?" "[I was|A little]," said {h}, "but you needed me."
They walked home together under the stars. [After that night, the dark was not so bad any more.|And {h} knew that {s} was brave after all.|Since that night {h} was not afraid of the dark.]""",
    "share": """[It was a cold winter.|It was a long, dry summer.|One day there was little to eat.] {A_hero}{named} had only one [piece of bread|bowl of soup|apple|pie] left.
[Just then|As {s} sat down to eat], {a_friend} came by. "I am so hungry," said the {friend}. "[I have walked all day|I have eaten nothing since yesterday]."
{H} looked at the food. There was [not much|only a little]. But {s} [cut it|broke it|split it] in two and said, "[Sit down and eat with me|Half is for you]."
They ate together and [told stories|talked until late|sang songs]. {Thingline}The next day the {friend} was gone.
[In spring|Some days later], the {friend} came back with a [big basket|full sack|cart]. "You shared with me when you had little," said the {friend}. "Now I share with you."
[There was enough for everyone.|They had a feast {place}, and all were happy.|And {h} was never hungry again.]""",
    "race": """[Once|One day] {a_hero}{named} and {a_friend} [had a race|wanted to know who was faster]. They would run from the [old oak|big stone|gate] to [the river|the hill|the bridge].
"[I will win|I am the fastest]," said the {friend}. "[We will see|Maybe]," said {h}. {Thingline}[One, two, three, and off they went!|Off they went!]
The {friend} ran fast and was [soon far ahead|out of sight]. But on the way the {friend} [fell into a ditch|hurt a foot|got stuck in the mud]. "[Help|Ouch]!" called the {friend}.
{H} could have run on and won. But {s} stopped. "[Give me your hand|Hold on to me]," said {h}, and pulled the {friend} out.
They walked the rest of the way side by side and came in at the same time. [Everyone clapped.|"Who won?" asked the crow.]
"[We both won|Nobody lost]," said the {friend}, "[because I have found a true friend|and you have the biggest heart]." """,
    "night": """The moon was up, and all was quiet {place}. Only {a_hero}{named} could not sleep.
{S} turned to the left. {S} turned to the right. {S} counted [sheep|stars|clouds], but {s} was still awake.
So {s} went outside. {A_friend} was sitting [there|by the door|under a tree]. "Can you not sleep?" asked the {friend}. "No," said {h}. "[My head is full of thoughts|It is too quiet]."
"[Then look at the stars with me|Sit with me and listen to the wind]," said the {friend}. {Thingline}They sat close together [and said nothing|and looked at the sky].
[Soon|Little by little] {h} grew sleepy. {P} eyes closed. The {friend} [covered {o} with leaves|sang a soft song|smiled].
"Good night," said the moon. And {h} slept until the morning.""",
    "journey": """{A_hero}{named} had always lived {place}. One day {s} wanted to see [the sea|the great mountain|the big world|the end of the rainbow].
{S} packed [some bread|a warm coat|a little bag] and {a_thing} and set out. [The road was long.|The way was long, and the sun was hot.]
On the second day {s} met {a_friend}. "[Where are you going?|May I come with you?]" asked the {friend}. "[Far away|Come along]," said {h}. So they went on together.
They crossed [a river|a dark wood|a wide field] and climbed [a hill|a steep rock]. When [it rained|it grew dark], the {thing} helped them on their way.
At last they were there. [It was more beautiful than {h} had dreamed.|"How big it is!" said {h}.|They stood still and looked for a long time.]
[Then they went home again and told everyone about it.|"The best part was not to be alone," said {h}, and they turned back home.|That evening they looked at the stars and were happy.]""",
    "trick": """{A_hero}{named} was on the way home {place}. Suddenly [a big wolf|a hungry bear|a mean old troll] stood on the path. "I will eat you up!" [it growled|it said].
{H} was afraid, but {s} thought fast. "[Eat me later|Wait]," {s} said. "[First you must see what I have here|I have something better for you]." And {s} showed {a_thing}.
"What is that?" "[It is magic|It is a great treasure]," said {h}. "[Close your eyes and count to ten|Look at it for as long as you can], and you will be [rich|the strongest of all]."
The [beast|silly beast] did as it was told. [One, two, three...|It stood there for a long time.] {H} ran and ran, all the way to the house of {a_friend}.
"[That was clever|You are the cleverest of all]," said the {friend}, and they laughed together.
[And the beast? It is still waiting.|Since then nobody has tried to eat {h}.|They locked the door and drank hot tea.]""",
    "build": """[There was once|Once there was] {a_hero}{named} who wanted to build [a house|a boat|a bridge|a swing]. {S} worked alone {place}, but [the wood was too heavy|it fell down again and again].
{A_friend} [came along|watched for a while]. "[May I help?|Two can do more than one.]" "I can do it alone," said {h}.
But [the wind blew|the rain came], and everything fell down. {H} sat down and [cried|sighed]. {Thingline}
"[Please help me|I was wrong]," {s} said [at last|in a small voice]. The {friend} [smiled and took a hammer|held one end, and {h} held the other].
They worked together for three days. [When it was done, it was strong and beautiful.|And look, this time it did not fall down.]
"[Together it was easy|We made it]," said {h}. [And they had a party with cake.|And they sat there side by side until the stars came out.]""",
    "gift": """It was the birthday of {a_friend}, and {a_hero}{named} had no present. {S} had [no money|nothing to give].
"[What can I give?|What shall I do?]" {s} thought. {S} walked {place} and looked around. There was {a_thing}, [old and dusty|all alone|lying on the ground].
{H} [cleaned|washed] the {thing} and [tied a ribbon around it|wrapped it in green leaves]. It was not much, but it was made with love.
At the party there were many big presents. {H} was [shy|ashamed] and gave the {thing} [last of all|with a red face].
The {friend} [opened it and smiled|looked at it for a long time]. "[This is the best present of all|I have always wanted one]," said the {friend}. "[You thought of me|You made it yourself]."
[They ate cake and danced all night.|And {h} was the happiest guest of all.]""",
    "storm": """[Dark clouds came over the land.|One night there was a great storm.] {A_hero}{named} sat {place} and heard the thunder.
[Boom! went the thunder.|The wind blew and the rain fell.] Then there was a knock at the door. Outside stood {a_friend}, wet and cold.
"[May I come in?|My home is under water.]" "[Of course|Come in quickly]," said {h}. {S} made [hot tea|a fire|warm soup] and gave the {friend} a dry blanket.
{Thingline}All night the storm went on. But inside it was warm, and they [told each other stories|played games|sang so loud that they did not hear the thunder].
In the morning the sun came out. [There was a rainbow in the sky.|The birds sang.] They [repaired the home of the {friend} together|went out and jumped in the puddles].
[And whenever it rained after that, they sat together.|"Storms are not so bad when you have a friend," said {h}.]""",
}
THINGLINES = (
    "{H} kept {a_thing} close by. ",
    "{H} had {a_thing} with {o}, and it [brought good luck|gave {o} hope]. ",
    "There was also {a_thing}, and it shone in the [sun|light]. ",
)
THEME_PLOTS = {
    "friends": "lost found build storm", "share": "share", "afraid": "afraid", "help": "afraid storm lost share",
    "storm": "storm", "snow": "share storm", "moon": "night", "birthday": "gift", "journey": "journey", "race": "race",
}


def tell(cast: Cast, rng: random.Random) -> str:
    """One story about the cast, 60 to 150 words."""
    hero = cast.hero or rng.choice(ANIMALS if rng.random() < 0.7 else list(PEOPLE))
    friend = cast.friend or rng.choice([a for a in ANIMALS if a != hero])
    thing = (cast.thing or rng.choice(THINGS)).replace("-", " ")
    place = cast.place or rng.choice(list(PLACES.values()))
    trait = cast.trait if cast.trait else rng.choice(TRAITS)
    s = PEOPLE.get(hero) or rng.choice(["he", "she"])
    p, o = {"he": ("his", "him"), "she": ("her", "her"), "it": ("its", "it")}[s]
    named = rng.random() < 0.4
    name = rng.choice(SHE if s == "she" else HE)
    h = name if named else f"the {hero}"
    if cast.plot:
        plots = cast.plot.split()
    elif cast.thing:
        plots = ["lost", "found", "gift", "journey", "trick", "afraid"]
    else:
        plots = list(PLOTS)
    text = " ".join(PLOTS[rng.choice(plots)].split("\n")).strip()
    line = rng.choice(THINGLINES) if cast.thing else ""
    text = expand(text.replace("{Thingline}", line), rng)
    fields = {
        "a_hero": article(f"{trait} {hero}"), "named": f" named {name}" if named else "", "h": h, "s": s, "p": p, "o": o,
        "a_friend": article(friend), "friend": friend, "thing": thing, "a_thing": article(thing), "place": place,
    }
    fields |= {k[0].upper() + k[1:]: v[0].upper() + v[1:] for k, v in fields.items() if v}
    out = text.format(**fields)
    return re.sub(r"\s+", " ", out).strip()
