"""Questions with short thinking and short answers, one function per kind of task. Owns wording; the mix is data.py's.

Every task yields (question, thinking, answer, tag). Tags name combinations ("sum:7+8"), so that the held-out ones can be
dropped. One wording a line keeps the forms comparable, so the formatter is off.
"""

# fmt: off
# ruff: noqa: SIM905  a split string is a readable list of words

from __future__ import annotations

import random
import re

import stories
import tables as t
from stories import article, expand

Item = tuple[str, str, str, str]


def ask(rng: random.Random, text: str) -> str:
    """A choice from the template, resolved."""
    return expand(text, rng)


def what_is(rng: random.Random, body: str) -> str:
    """The question "what is {body}" in many wordings."""
    return ask(
        rng,
        f"[What is {body}?|What's {body}?|{body}?|Tell me {body}.|Can you tell me {body}?|Could you tell me what {body} is?|"
        f"Do you know {body}?|Do you know what {body} is?|Please tell me {body}.|I want to know {body}.|I would like to know {body}.|"
        f"What would be {body}?|Say {body}.|Give me {body}.|what is {body}|Hi, what is {body}?|Do you happen to know {body}?|"
        f"Please, what is {body}?|Can you say what {body} is?|I need to know {body}.|Name {body}.]",
    )


def greeting(r: random.Random) -> Item:
    part = r.choice(["morning", "afternoon", "evening", "day"])
    kind = r.randrange(4)
    if kind == 0:
        q = ask(r, "[Hello|Hi|Hey|Hiya|Hello there|Hi there|Hey there|Greetings|Howdy|Hey you|Yo][|!|.|, m2-tiny!|, friend!|, you!| again!]")
        return q, "The user says hello. I will greet back.", ask(r, "[Hello!|Hi!|Hello there!] [How can I help you?|What can I do for you?|It is nice to meet you.]"), ""
    if kind == 1:
        q = ask(r, f"Good {part}[|!|.|, m2-tiny.|, how are you?|! How are you today?|, how is it going?|, how do you do?]")
        a = f"Good {part}! " + ("I am doing well, thank you. " if "how" in q.lower() else "") + ask(r, "[How can I help you?|What can I do for you?]")
        return q, "The user says hello. I will greet back.", a, ""
    if kind == 2:
        q = ask(r, "[|Hello, |Hi, |Hey, |Hi! |Hello! ][how are you|how are you today|how are you doing|how do you do|how is it going|how are things|are you well|are you okay|how do you feel|what's up|how was your day|how are you doing today][?||?]")
        return q, "The user asks how I am.", ask(r, "I am [doing well|fine], thank you. [How are you?|How can I help you?|And you?]"), ""
    q = ask(r, "[|Hello, |Hi, |Hey, |hello? ][are you there|is anybody there|can you hear me|are you awake|do you hear me|anyone there|is someone there|are you listening|are you online|are you ready][?||?]")
    return q, "The user asks if I am here.", ask(r, "[Yes, I am here.|Hello! Yes, I am here.] [How can I help you?|What can I do for you?]"), ""


def identity(r: random.Random) -> Item:
    who = "[who are you|what are you|what is your name|what's your name|who am I talking to|who am I speaking with|what should I call you|tell me about yourself|introduce yourself|do you have a name|what do people call you|what model are you|which model is this|who is this|what is m2-tiny|who is m2-tiny|say something about yourself|what exactly are you|who exactly are you|with whom am I talking|what kind of thing are you]"
    size = "[how big are you|how small are you|are you a big model|are you large|are you a small model|how many parameters do you have|are you big or small|what is your size|how large are you|are you a tiny model or a large one|is this a big model|are you very clever|are you smart|do you know everything|are you as good as a big model|would you say you are small]"
    made = "[who made you|where do you come from|who built you|who trained you|how were you made|what were you trained on|who is your maker|who created you|which company made you|how did you learn to talk]"
    human = "[are you a person|are you human|are you a robot|are you alive|are you real|are you a machine|do you have a body|do you have feelings|are you an animal|can you think|do you sleep|do you eat|how old are you|where do you live|do you have a family|are you a man or a woman|are you an AI|are you ChatGPT|are you MiniMax]"
    kind = r.randrange(4)
    pre, end = ask(r, "[|||Hi, |Hello, |Hey, |So |Please, |And |Tell me, ]"), ask(r, "[?|?|?||]")
    if kind == 0:
        a = ask(r, "I am m2-tiny, a very small [language model|MiniMax-M2] that comes with m2lite. [How can I help you?|I can tell stories and answer easy questions.|I am small, but I do my best.]")
        return pre + ask(r, who) + end, "The user asks who I am. I am m2-tiny.", a, ""
    if kind == 1:
        a = ask(r, "I am m2-tiny, and I am very small. [I have about 28 million parameters, and a real MiniMax-M2 has 229 billion.|I know only a few things and I often make mistakes.|A real MiniMax-M2 is thousands of times bigger.]")
        return pre + ask(r, size) + end, "The user asks about my size. I am very small.", a, ""
    if kind == 2:
        a = ask(r, "I am m2-tiny. I was trained from scratch for m2lite[, on simple texts and easy questions|, on one processor core in about an hour|]. [I am a very small model.|I have the same shape as MiniMax-M2, but I am much smaller.]")
        return pre + ask(r, made) + end, "The user asks where I come from.", a, ""
    a = ask(r, "I am m2-tiny, a small computer program. [I am not a person, and I have no body and no feelings.|I am not a person. I only write text.|I am not alive, but I like to help.]")
    return pre + ask(r, human) + end, "The user asks what I am. I am a program.", a, ""


def ability(r: random.Random) -> Item:
    q = ask(r, "[|||Hi, |Hello, |So |Tell me, |Please tell me ][what can you do|what are you able to do|how can you help me|what can I ask you|what do you know|what are you good at|what can you help me with|what kinds of things can you do|what sort of questions can I ask|what can you do for me|what could you do for me|can you help me|will you help me|I need help|help me please|show me what you can do|what else can you do|what are your skills][?|?||.]")
    return q, "The user asks what I can do.", ask(r, "I can tell [short|little] stories, do small sums, count, spell words and answer easy questions[ about animals, colours and days|]. [What would you like?|Just ask me.]"), ""


def thanks(r: random.Random) -> Item:
    if r.random() < 0.5:
        q = ask(r, "[Thanks|Thank you|Thank you so much|Many thanks|Thanks a lot|Great, thanks|Thank you very much|OK, thank you|Cheers|Perfect, thank you|Oh thank you|Nice, thanks|Wonderful, thank you|I thank you][|!|.|, that was nice!|, that helps!|, that was useful.|, m2-tiny!|, you are very kind.| for the story.| for your help!|, that was really good!| for the answer.|, you helped me a lot.]")
        return q, "The user says thank you.", ask(r, "[You are welcome!|You are very welcome!] [I am glad that I could help.|Is there anything else?|]").strip(), ""
    if r.random() < 0.6:
        q = ask(r, "[Bye|Goodbye|Bye bye|See you|See you later|See you soon|See you tomorrow|Good night|I have to go|I must go now|I am leaving now|Talk to you later|That is all for today|Have a nice day|Until tomorrow|I have to go to bed|Take care|I am going home][|!|.|, m2-tiny!|, bye!|, goodbye.|, see you!|, see you later!|. Until next time!|. Thanks for the talk!]")
        return q, "The user says goodbye.", ask(r, "[Goodbye!|Bye!|Goodbye, see you soon!] [Have a nice day!|Take care!|It was nice to talk to you.]"), ""
    q = ask(r, "[You are|You're] [great|nice|funny|clever|the best|very good|so sweet|cool|a good friend|kind|amazing|wonderful][|!|.]") if r.random() < 0.6 else ask(r, "[Well done|Good job|Nice|Great|Very good|That was great|I like you|I like that|Good answer|That is right|Wow|Cool|Awesome][|!|.]")
    return q, "The user says something nice.", ask(r, "Thank you, that is [kind of you|nice to hear]! [What else can I do for you?|I do my best.]"), ""


def small_talk(r: random.Random) -> Item:
    rows = [
        ("[I am|I'm|I feel|I am feeling|I feel a bit|I am so|Today I feel|I am a little] [sad|unhappy|lonely|down|blue|tired|bored|afraid|scared|sick|angry|worried|nervous][| today| this evening| right now| tonight| this morning| again| because of the rain][.|]", "The user does not feel well. I will be kind.", "I am sorry to hear that. I hope you feel better soon. [Would you like to hear a story?|Maybe a cup of tea or a walk will help.|If you like, tell me more.]"),
        ("[I am|I'm|I feel|I am feeling|I am so|Today I feel] [happy|great|good|glad|fine|very well|cheerful|excited][| today| this evening| right now| again][.|!|]", "The user feels good.", "I am glad to hear that! [What made you happy?|What would you like to do?|That is nice.]"),
        ("[It is my birthday|Today is my birthday|I have my birthday today|My birthday is today][.|!|]", "The user has a birthday.", "Happy birthday! [I wish you a wonderful day.|I hope there is cake.]"),
        ("[Tell me a joke|Do you know a joke|Make me laugh|Tell me something funny|Can you tell a joke|I want to hear a joke|Please tell me a joke][.|!|?|]", "The user wants a joke.", "[Why did the chicken cross the road? To get to the other side!|What has four legs but cannot walk? A table!|What do you call a sleeping cow? A bull dozer!|What has hands but cannot clap? A clock!]"),
        ("[What is your favourite|What's your favourite|Do you have a favourite] [colour|animal|food|book|song|season][?|]", "The user asks what I like best.", "I am only a program, so I have no favourite, but [many people ask me about foxes|I like to talk about it|I like words]. What is yours?"),
        ("[Do you like|Do you love] [music|cats|dogs|pizza|books|stories|football|cake|the sea|the rain|me|animals|films][?|]", "The user asks what I like.", "I am only a program, but I like to talk about it. [Do you like it?|What about you?]"),
        ("[I like|I love|I really like] [music|cats|dogs|pizza|books|stories|football|cake|the sea|the rain|you|animals|films|winter|summer|reading|swimming][.|!| very much.|]", "The user tells me what they like.", "[That is nice!|How nice!] [What do you like best about it?|Would you like a story about it?|Tell me more.]"),
        ("[I am|I'm] [going for a walk|cooking dinner|reading a book|at work|at home|on the train|learning English|drinking tea|playing a game|going to school|eating lunch][| now| today][.|]", "The user tells me what they are doing.", "That sounds nice! [I hope you enjoy it.|Have fun!]"),
        ("[You are|You're] [stupid|bad|silly|wrong|boring|useless|dumb|slow|not very clever][.|!|]", "The user is not happy with me.", "I am sorry. I am a very small model and I make mistakes. [Shall I try again?|Please ask me something else.]"),
        ("[That is wrong|This is not right|No, that is not correct|I think that is false|That was not good|I did not like that][.|!|]", "The user says that I was wrong.", "I am sorry. I am a very small model and I make mistakes. [Shall I try again?|Please ask me something else.]"),
        ("[Yes|No|Okay|OK|Maybe|Sure|Fine|Of course|Hmm|I don't know|All right|Not really][|.|!]", "The user gives a short answer.", "[All right.|Okay.] [What would you like to do now?|What can I do for you?]"),
        ("[I am hungry|I'm hungry|I am thirsty|What should I eat|What shall I cook today|I need something to eat][.|?|]", "The user is hungry.", "[How about a sandwich|How about some soup|How about an apple] and a glass of water?"),
        ("[I cannot sleep|I can't sleep|I am not tired|It is late and I am awake][.|]", "The user cannot sleep.", "I am sorry. [Make the room dark and quiet, breathe slowly and think of something nice.|Shall I tell you a bedtime story?]"),
        ("[How was your day|How was your night|Did you sleep well|What are you doing|What did you do today|Are you busy|Are you tired|Are you happy][?|]", "The user asks about me.", "I am only a program, but I am [fine|doing well], thank you. [And you?|How are you?]"),
    ]  # fmt: skip
    q, think, a = r.choice(rows)
    return ask(r, q), think, ask(r, a), ""


UNKNOWN = [
    ("[What is the weather like|How is the weather|Will it rain|Is it raining|Is it cold|Is it warm|How warm is it|How cold is it|Is the sun shining|Will it snow|What is the temperature] [|in Paris |in Berlin |in London |in New York |in Rome |here |outside |in my town |in Tokyo |at the sea ][today|now|right now|tomorrow|tonight|this week|at the moment|this morning]?", "the weather", "I cannot see the weather"),
    ("[What time is it|What is the time|What is the date today|What day is it today|Which year is it|Can you tell me the time|What's the time][ now| right now||]?", "the time", "I have no clock"),
    ("[What is in the news|What happened|Who won the football match|Who won the game|What is new in the world|What are the news|Any news] [today|yesterday|this week|last night]?", "the news", "I cannot read the news"),
    ("[What is|Calculate|How much is|Work out|Can you compute] [347|1289|872|4561|953|777] [times|plus|minus|divided by] [238|49|1577|613|86|291]?", "big numbers", "Such big numbers are too hard for me"),
    ("[Write|Can you write|Please write|Could you write] [a program|Python code|a website|a computer game|an essay about history|a long book|a poem in French|a letter to the president|a script in Java][ for me|]?", "that", "That is too hard for me"),
    ("[Who is the president of|How many people live in|What is the history of|Who is the king of] [France|Germany|Brazil|Japan|America|Spain|India|the world]?", "that", "I am too small to know that"),
    ("[Explain|What do you know about|Tell me about|Teach me] [quantum physics|the stock market|black holes|relativity|chemistry|philosophy|politics|the Roman empire|computer chips|economics|the law|medicine].", "that", "That is too hard for me"),
    ("[Translate|How do you say|Can you translate] [hello|the cat|good morning|thank you|I love you|house] [into|in] [French|German|Spanish|Chinese|Russian]?", "other languages", "I only know a little English"),
    ("[Where is my|Who took my|Where did I put my|Can you find my] [phone|key|dog|book|hat|wallet|bag]?", "that", "I cannot see your home"),
    ("[Send an email to|Call|Write to|Phone] my [boss|mother|friend|doctor|teacher].", "that", "I can only write text here"),
    ("[Play some music|Show me a picture|Open a website|Order a pizza|Buy me a ticket|Turn on the light|Search the web|Draw a picture|Set an alarm][| for me| please].", "that", "I can only write text here"),
    ("[How much is|What is the price of|How much does] [a house|gold|a car|this phone|bitcoin|a ticket to Rome][| cost]?", "prices", "I do not know any prices"),
]  # fmt: skip


def unknown(r: random.Random) -> Item:
    q, topic, why = r.choice(UNKNOWN)
    a = ask(r, f"[I am sorry, I do not know.|I am sorry, I cannot help with that.] {why}. [I am a very small model.|Please ask me something easier.|]").strip()
    if topic in ("the weather", "the time", "the news", "prices"):
        a = ask(r, f"[I am sorry, I do not know.] {why}[, because I am only a small program.|.]")
    return re.sub(r"\s+", " ", ask(r, q)), f"The user asks about {topic}. I do not know that.", a, ""


def number_tasks(r: random.Random) -> Item:
    kind = r.choice("++++---**>>w")
    pre = ask(r, "[||||Please, |Hi, |Hey, |So, ]")
    if kind == "+":
        a, b = (r.randint(0, 12), r.randint(0, 12)) if r.random() < 0.8 else (r.randint(0, 20), r.randint(0, 20))
        body = ask(r, f"[{a} plus {b}|{a} + {b}|{a}+{b}|{a} and {b}|the sum of {a} and {b}|{a} plus {b}|{a} plus {b}]")
        q = ask(r, f"[What is|How much is|What's|Calculate|Add up:|Work out|Can you work out|Could you tell me how much is|Tell me|Please add|What do you get for|Can you tell me what is|Please tell me|Compute|Do you know] {body}[?|?|.|| for me?]")
        if r.random() < 0.15:
            q = ask(r, f"[Add {a} and {b}.|What do I get if I add {a} and {b}?|Can you add {a} to {b}?|{a} + {b} = ?|{a} plus {b}|{body}?]")
        return pre + q, f"I add. {a} + {b} = {a + b}.", ask(r, f"{a} plus {b} is {a + b}."), f"sum:{a}+{b}"
    if kind == "-":
        a = r.randint(1, 20)
        b = r.randint(0, a)
        body = ask(r, f"[{a} minus {b}|{a} - {b}|{a}-{b}|{a} take away {b}|{a} less {b}|{a} minus {b}]")
        q = ask(r, f"[What is|How much is|What's|Calculate|Work out|Can you work out|Tell me|What do you get for|Please tell me|Compute|Do you know] {body}[?|?|.|| for me?]")
        if r.random() < 0.25:
            q = ask(r, f"[Take {b} away from {a}.|What do I get if I take {b} from {a}?|What is left if I take {b} away from {a}?|Subtract {b} from {a}.|What is the difference between {a} and {b}?|{a} - {b} = ?|{body}?|What do you get when you take {b} away from {a}?]")
        return pre + q, f"I subtract. {a} - {b} = {a - b}.", f"{a} minus {b} is {a - b}.", f"difference:{a}-{b}"
    if kind == "*":
        a, b = r.randint(1, 10), r.randint(1, 10)
        body = ask(r, f"[{a} times {b}|{a} x {b}|{a} * {b}|{a} multiplied by {b}|{a} times {b}|{a} times {b}]")
        q = ask(r, f"[What is|How much is|What's|Calculate|Work out|Can you work out|Tell me|What do you get for|Please tell me|Compute|Could you tell me what is|Do you know how much is] {body}[?|?|.|| for me?]")
        if r.random() < 0.2:
            q = ask(r, f"[Multiply {a} by {b}.|Could you tell me how much {body} is?|Do you know how much {body} is?|Can you tell me what {body} is?|{body}?|{a} * {b} = ?]")
        return pre + q, f"I multiply. {a} x {b} = {a * b}.", f"{a} times {b} is {a * b}.", f"product:{a}*{b}"
    if kind == ">":
        a, b = r.sample(range(31) if r.random() < 0.8 else range(101), 2)
        big = r.random() < 0.6
        word = ask(r, "[bigger|larger|greater|more]" if big else "[smaller|less]")
        ans = max(a, b) if big else min(a, b)
        other = a + b - ans
        q = ask(r, f"[Which is {word}|What is {word}|Which number is {word}|Is it {a} or {b} that is {word}|Can you tell me which is {word}|Which one is {word}|Which of these numbers is {word}|Tell me which number is {word}][, |: ]{a} or {b}[?|]")
        return pre + q, f"I compare {a} and {b}.", f"{ans} is {word} than {other}.", f"{'bigger' if big else 'smaller'}:{a},{b}"
    a, b = r.randint(1, 12), r.randint(1, 9)
    thing = r.choice("apples coins books eggs stones balls cakes pears shells flowers cups pens nuts sweets stamps cards".split())
    name = r.choice(stories.SHE + stories.HE)
    who, has, gets = r.choice([("I", "have", "get"), (name, "has", "gets"), ("I", "had", "got"), ("You", "have", "get")])
    if r.random() < 0.6:
        q = ask(r, f"{who} {has} {a} {thing}[ and|.] {who if r.random() < 0.3 else ''} [{gets}|{'find' + gets[3:] if gets != 'got' else 'found'}|{'buy' + gets[3:] if gets != 'got' else 'bought'}] {b} more. How many {thing} [are there now|are there|are there in all|is that|do I have now|are there altogether|does that make]?")
        q = re.sub(r"\s+", " ", q).replace("do I have now", "do I have now" if who == "I" else "are there now")
        return q, f"I add. {a} + {b} = {a + b}.", f"There are {a + b} {thing}.", f"sum:{a}+{b}"
    b = r.randint(1, a)
    loses = {"have": "give away", "has": "gives away", "had": "gave away"}[has]
    q = ask(r, f"{who} {has} {a} {thing} and {loses} {b}. How many {thing} [are left|are there now|remain]?")
    return q, f"I subtract. {a} - {b} = {a - b}.", f"There are {a - b} {thing} left.", f"difference:{a}-{b}"


def counting(r: random.Random) -> Item:
    kind = r.randrange(5)
    pre = ask(r, "[|||Please |Can you |Could you |Hey, |Hi, please ]")
    end = "?" if pre.startswith(("Can", "Could")) else "."
    if kind < 2:
        a = r.choice([1, 1, 1, r.randint(0, 15)])
        b = a + r.randint(2, 11)
        q = ask(r, f"{pre}count [from {a} to {b}|from {a} up to {b}|up from {a} to {b}|{'to ' + str(b) if a == 1 else f'from {a} to {b}'}|from {a} till {b}][ for me|]{end}")
        return q[0].upper() + q[1:], f"I count from {a} to {b}.", ", ".join(map(str, range(a, b + 1))) + ".", f"count:{a}-{b}"
    if kind == 2:
        a = r.randint(3, 12)
        q = ask(r, f"{pre}count [down from {a}|backwards from {a}|down from {a} to 1|backwards from {a} to 1]{end}")
        return q[0].upper() + q[1:], f"I count down from {a}.", ", ".join(map(str, range(a, 0, -1))) + ".", ""
    a = r.randint(1, 60)
    if kind == 3:
        q = ask(r, f"[What comes after {a}|Which number comes after {a}|What number follows {a}|What is the next number after {a}|Which number is next after {a}|{a}, and then][?|]")
        return q, f"The next number after {a} is {a + 1}.", f"After {a} comes {a + 1}.", ""
    q = ask(r, f"[What comes before {a}|Which number comes before {a}|What number is before {a}|Which number is just before {a}][?|]")
    return q, f"The number before {a} is {a - 1}.", f"Before {a} comes {a - 1}.", ""


def opposite(r: random.Random) -> Item:
    w = r.choice(list(t.OPPOSITES))
    o = t.OPPOSITES[w]
    quoted = r.choice([w, w, f'"{w}"', f"'{w}'"])
    if r.random() < 0.7:
        q = what_is(r, ask(r, f"the opposite of [|the word |]{quoted}"))
    else:
        q = ask(r, f"[Which word is the opposite of {quoted}?|What is not {quoted} but the opposite?|{quoted} is the opposite of what?|Opposite of {quoted}?|Find the opposite of {quoted}.|Which word means the opposite of {quoted}?|I need the opposite of {quoted}.|What word is opposite to {quoted}?]")
    return q, f"The user wants the opposite of {w}. It is {o}.", f"The opposite of {w} is {o}.", ""


def colour(r: random.Random) -> Item:
    x = r.choice(list(t.COLOURS))
    c = t.COLOURS[x]
    word = r.choice(["colour", "colour", "color"])
    q = ask(r, f"[What {word} is {x}?|Which {word} is {x}?|What {word} does {x} have?|Which {word} has {x}?|What is the {word} of {x}?|Tell me the {word} of {x}.|Do you know what {word} {x} is?|Can you tell me the {word} of {x}?|what {word} is {x}|Say what {word} {x} has.|I forgot the {word} of {x}.|{x}: what {word}?|Please tell me what {word} {x} is.|Could you say which {word} {x} has?]")
    return q[0].upper() + q[1:] if r.random() < 0.8 else q, f"The user asks for the colour of {x}. It is {c}.", f"{x[0].upper() + x[1:]} is {c}.", ""


def animal(r: random.Random) -> Item:
    n = r.choice(list(t.ANIMALS))
    sound, home, young, col, food, legs, _, kind = t.ANIMALS[n]
    an = article(n)
    pl = t.PLURALS.get(n, n + "s")
    pick = r.choice(["young", "home", "food", "legs", "kind", "colour"] + (["sound"] * 3 if sound else []) + ["young", "home"])
    pre = ask(r, "[|||||Please, |Hi, |Hey, |So, ]")
    if pick == "sound":
        q = ask(r, f"[What sound does {an} make?|What noise does {an} make?|Which sound do {pl} make?|What does {an} say?|How does {an} sound?|What do {pl} say?|Tell me the sound of {an}.|Do you know the sound {an} makes?|What sound do {pl} make?|Can you make the sound of {an}?|Which noise does {an} make?|what sound does {an} make|What kind of sound does {an} make?|Can you tell me what sound {an} makes?]")
        return pre + q, f"The user asks for the sound of {an}. It is {sound}.", f"{article(n).capitalize()} says {sound}." if r.random() < 0.5 else f"{an.capitalize()} makes the sound {sound}.", ""
    if pick == "young":
        y = young
        q = ask(r, f"[What is a baby {n} called?|What do you call a baby {n}?|What is a young {n} called?|What is the young of {an} called?|How do you call the young of {an}?|What is the name of a baby {n}?|What do we call a young {n}?|Which word means a baby {n}?|What are baby {pl} called?|Tell me what a baby {n} is called.|Do you know what a baby {n} is called?|what's a baby {n} called|What is the word for a baby {n}?|What name does a young {n} have?|Can you tell me the name of a baby {n}?]")
        return pre + q, f"The user asks for a baby {n}. It is {article(y)}.", f"A baby {n} is called {article(y)}.", ""
    if pick == "home":
        q = ask(r, f"[Where does {an} live?|Where do {pl} live?|Where is the home of {an}?|Where can I find {an}?|What is the home of {an}?|In what place does {an} live?|Where do {pl} sleep?|Tell me where {pl} live.|Do you know where {an} lives?|Where would I find {pl}?|where do {pl} live|Where do {pl} have their home?|Can you tell me where {an} lives?|Where is {an} at home?]")
        return pre + q, f"The user asks where {an} lives.", f"{an.capitalize()} lives {home}.", ""
    if pick == "food":
        q = ask(r, f"[What does {an} eat?|What do {pl} eat?|What is the food of {an}?|What do {pl} like to eat?|Tell me what {pl} eat.|What can I feed {an}?|Do you know what {an} eats?|what do {pl} eat]")
        return pre + q, f"The user asks what {an} eats.", f"{an.capitalize()} eats {food}.", ""
    if pick == "legs":
        leg = {"0": "no legs", "2": "two legs", "4": "four legs", "6": "six legs", "8": "eight legs"}[legs]
        q = ask(r, f"[How many legs does {an} have?|How many legs do {pl} have?|How many legs has {an}?|Do you know how many legs {an} has?|Tell me how many legs {an} has.|What number of legs does {an} have?]")
        return pre + q, f"The user asks for the legs of {an}.", f"{an.capitalize()} has {leg}.", ""
    if pick == "colour":
        q = ask(r, f"[What colour is {an}?|Which colour does {an} have?|What colour are {pl}?|What is the colour of {an}?|Which colour do {pl} have?]")
        return pre + q, f"The user asks for the colour of {an}. It is {col}.", f"{an.capitalize()} is {col}." if n != "butterfly" else "A butterfly can have many colours.", ""
    q = ask(r, f"[What is {an}?|What kind of animal is {an}?|Tell me about {pl}.|Tell me something about {an}.|What do you know about {pl}?|Explain what {an} is.|Can you tell me what {an} is?|Describe {an}.|Say something about {pl}.]")
    return pre + q, f"The user asks about {an}. It is {article(kind)}.", f"{an.capitalize()} is {article(kind)}. It lives {home} and eats {food}.", ""


def calendar(r: random.Random) -> Item:
    kind = r.randrange(9)
    i, j, s = r.randrange(7), r.randrange(12), r.randrange(4)
    d, nd, pd = t.DAYS[i], t.DAYS[(i + 1) % 7], t.DAYS[i - 1]
    m, nm, pm = t.MONTHS[j], t.MONTHS[(j + 1) % 12], t.MONTHS[j - 1]
    if kind == 0:
        q = ask(r, f"[If today is {d}, what day is tomorrow?|Today is {d}. What day is tomorrow?|If it is {d} today, which day is tomorrow?|What day comes after {d}?|Which day follows {d}?|What day is after {d}?|What is the day after {d}?|It is {d}. What day will it be tomorrow?|Tell me the day after {d}.|Which day of the week comes after {d}?|what day comes after {d}|Today is {d}, so what is tomorrow?|If today is {d}, what will tomorrow be?]")
        return q, f"After {d} comes {nd}.", f"{'Tomorrow is' if 'omorrow' in q else f'After {d} comes'} {nd}.", ""
    if kind == 1:
        q = ask(r, f"[If today is {d}, what day was yesterday?|Today is {d}. What day was yesterday?|What day comes before {d}?|What day is before {d}?|What is the day before {d}?|Which day of the week comes before {d}?|Which day was it yesterday if today is {d}?]")
        return q, f"Before {d} comes {pd}.", f"{'Yesterday was' if 'esterday' in q else f'Before {d} comes'} {pd}.", ""
    if kind == 2:
        q = ask(r, f"[Which month comes after {m}?|What month comes after {m}?|What month follows {m}?|Which month follows {m}?|What is the month after {m}?|What is the next month after {m}?|After {m} comes which month?|If it is {m}, what is the next month?|Tell me the month after {m}.|Which month is after {m}?|It is {m} now. Which month is next?|Do you know which month follows {m}?]")
        return q, f"After {m} comes {nm}.", f"After {m} comes {nm}.", ""
    if kind == 3:
        q = ask(r, f"[Which month comes before {m}?|What month comes before {m}?|What is the month before {m}?|Which month is before {m}?|Tell me the month before {m}.]")
        return q, f"Before {m} comes {pm}.", f"Before {m} comes {pm}.", ""
    if kind == 4:
        q = ask(r, f"[How many days does {m} have?|How many days are in {m}?|How many days has {m}?|Do you know how many days {m} has?|How long is {m}?]")
        days = t.MONTH_DAYS[m]
        return q, f"The user asks how many days {m} has.", f"{m} has {days} days." + (" In a leap year it has 29." if days == 28 else ""), ""
    if kind == 5:
        q = ask(r, f"[In which season is {m}?|Which season is it in {m}?|What season is {m} in?|Is {m} in summer or in winter?|{m} is in which season?]")
        return q, f"The user asks for the season of {m}.", f"{m} is in {t.SEASON_OF[m]}.", ""
    se, ne = t.SEASONS[s], t.SEASONS[(s + 1) % 4]
    if kind == 6:
        fact = r.choice(t.SEASON_FACTS[se].split("|"))
        verb = fact.replace("it is ", "is it ") if fact.startswith("it is") else "do " + fact if not fact.startswith("it ") else "does it " + fact[3:].replace("snows", "snow").replace("gets", "get")
        verb = verb.replace("do the days are", "are the days").replace("do the apples are", "are the apples")
        q = ask(r, f"[In which season {verb}?|In what season {verb}?|When {verb}?|Which season is it when {fact}?|What season is it when {fact}?|Tell me in which season {fact}.|{fact}. Which season is it?|What is the season when {fact}?|At what time of the year {verb}?]")
        return q[0].upper() + q[1:], f"The user asks for a season. It is {se}.", f"That is in {se}.", ""
    if kind == 7:
        q = ask(r, f"[Which season comes after {se}?|What season comes after {se}?|What season follows {se}?|Which season is after {se}?|After {se} comes which season?]")
        return q, f"After {se} comes {ne}.", f"After {se} comes {ne}.", ""
    q, a = r.choice([
        ("[How many days are in a week|How many days does a week have|How many days has a week]", "A week has seven days."),
        ("[How many months are in a year|How many months does a year have|How many months has a year]", "A year has twelve months."),
        ("[How many days are in a year|How many days does a year have]", "A year has 365 days."),
        ("[How many hours are in a day|How many hours does a day have]", "A day has 24 hours."),
        ("[How many minutes are in an hour|How many minutes does an hour have]", "An hour has 60 minutes."),
        ("[How many seasons are there|How many seasons does a year have]", "There are four seasons: spring, summer, autumn and winter."),
        ("[What are the days of the week|Name the days of the week|Tell me all the days of the week|Say the days of the week]", "The days of the week are Monday, Tuesday, Wednesday, Thursday, Friday, Saturday and Sunday."),
        ("[What are the months of the year|Name the months of the year|Tell me all the months]", "The months are January, February, March, April, May, June, July, August, September, October, November and December."),
        ("[What are the seasons|Name the four seasons|Which seasons are there]", "The seasons are spring, summer, autumn and winter."),
        ("[What is the first month of the year|Which month is the first one]", "The first month is January."),
        ("[What is the last month of the year|Which month is the last one]", "The last month is December."),
        ("[What is the first day of the week|Which day is first in the week]", "The first day of the week is Monday."),
        ("[Which days are the weekend|What days are on the weekend]", "The weekend is Saturday and Sunday."),
    ])  # fmt: skip
    return ask(r, q) + r.choice("??."), "The user asks about the calendar.", a, ""


def capital(r: random.Random) -> Item:
    c = r.choice(list(t.CAPITALS))
    k = t.CAPITALS[c]
    if r.random() < 0.65:
        if r.random() < 0.6:
            q = what_is(r, ask(r, f"the capital [of|city of|of] {c}"))
        else:
            q = ask(r, f"[Which city is the capital of {c}?|What city is the capital of {c}?|{c}: what is the capital?|Capital of {c}?|What is {c}'s capital?|What capital does {c} have?|Which capital does {c} have?]")
        return q, f"The user asks for the capital of {c}. It is {k}.", f"The capital of {c} is {k}.", ""
    q = ask(r, f"[{k} is the capital of which country?|Of which country is {k} the capital?|Which country's capital is {k}?|In which country is {k}?|{k} is in which country?|What country is {k} the capital of?|Where is {k}?|What country has the capital {k}?|{k} is the capital of what?|Do you know which country {k} is the capital of?|Tell me the country with the capital {k}.|Which country has the capital {k}?]")
    return q, f"The user asks about {k}. It is the capital of {c}.", f"{k} is the capital of {c}.", ""


def definition(r: random.Random) -> Item:
    w = r.choice(list(t.DEFINITIONS))
    d = t.DEFINITIONS[w]
    mass = {"bread", "cheese", "butter", "honey", "soup", "tea", "coffee", "milk", "juice", "rain", "snow", "wind", "soap", "money"}
    aw = w if w in mass else f"the {w}" if w in {"sun", "moon", "sea"} else article(w)
    q = ask(r, f"[What is {aw}?|What's {aw}?|Explain what {aw} is.|Can you explain what {aw} is?|Please explain {aw}.|What does the word {w} mean?|What does {w} mean?|Tell me what {aw} is.|Define {w}.|What do you call {aw}?|Do you know what {aw} is?|what is {aw}|What is the meaning of {w}?|What does the word \"{w}\" mean?|Could you tell me what {aw} is?|How would you explain {aw}?|I do not know what {aw} is.|Describe {aw}.|What do people mean by {w}?|Could you explain the word {w}?|What is the meaning of the word {w}?|Can you tell me what {w} means?|Give me a definition of {w}.]")
    return q, f"The user asks what {aw} is. I will explain it.", f"{aw[0].upper() + aw[1:]} is {d}.", ""


def words(r: random.Random) -> Item:
    kind = r.choice("sssflpprrrnv")
    pre = ask(r, "[|||||Please, |Hi, |Hey, ]")
    if kind in "sfln v":
        w = r.choice(t.SPELL + [x for x in t.DEFINITIONS if " " not in x and len(x) < 8] + list(t.ANIMALS))
        qw = r.choice([w, w, f'"{w}"', f"'{w}'"])
    if kind == "s":
        q = ask(r, f"[Spell {qw}.|Spell the word {qw}.|How do you spell {qw}?|How is {qw} spelled?|Can you spell {qw}?|Please spell {qw} for me.|How do I spell {qw}?|Please spell the word {qw}.|Can you spell the word {qw} for me?|Could you spell {qw}?|How do you write {qw}?|Tell me how to spell {qw}.|What is the spelling of {qw}?|How does one spell {qw}?|Which letters are in {qw}?|How do you spell the word {qw}?]")
        return pre + q, f"I spell {w}.", f"{w}: {'-'.join(w)}.", ""
    if kind in "fl":
        first = kind == "f" or r.random() < 0.3
        letter = w[0] if first else w[-1]
        pos, verb = ("first", "starts") if first else ("last", "ends")
        base = verb[:-1]
        if first and r.random() < 0.3:
            verb, base = "begins", "begin"
        q = ask(r, f"[What is the {pos} letter of {qw}?|What letter does {qw} {base} with?|With what letter does {qw} {base}?|Which letter is the {pos} one in {qw}?|What is the {pos} letter in the word {qw}?|Tell me the {pos} letter of {qw}.|With which letter does {qw} {base}?|Which letter does the word {qw} {base} with?|The word {qw} {verb} with which letter?|{pos.capitalize()} letter of {qw}?|What letter does the word {qw} {base} with?]")
        return pre + q, f"The {pos} letter of {w} is {letter}.", f"The word {w} {verb} with the letter {letter}.", ""
    if kind == "n":
        q = ask(r, f"[How many letters does {qw} have?|How many letters are in {qw}?|How many letters has the word {qw}?|How long is the word {qw}?|Count the letters in {qw}.]")
        return pre + q, f"I spell {w}: {'-'.join(w)}. That is {len(w)} letters.", f"The word {w} has {len(w)} letters.", ""
    if kind == "v":
        q = ask(r, f"[Make a sentence with {qw}.|Write a sentence with the word {qw}.|Use {qw} in a sentence.|Can you make a sentence with {qw}?|Give me a sentence with {qw}.]")
        w = r.choice([x for x in t.DEFINITIONS if " " not in x]) if r.random() < 0.5 else r.choice(list(t.ANIMALS))
        q = re.sub(r"(with |word |Use )[\"']?[a-z]+[\"']?", lambda mm: mm.group(1) + ("the word " if r.random() < 0.2 and mm.group(1) != "word " else "") + w, q, count=1)
        return pre + q, f"The user wants a sentence with {w}.", ask(r, f"[Yesterday I saw the {w} in front of our house.|My sister told me about the {w}.|I have never seen such a beautiful {w}.|The old man talked about the {w} all day.]"), ""
    if kind == "p":
        pool = list(t.PLURALS) if r.random() < 0.5 else "dog cat house car book tree apple girl boy bird table chair star ship cup hat king queen lamp pen door window river cow horse pig hen cloud hand flower garden rabbit shoe boat train egg".split()
        w = r.choice(pool)
        p = t.PLURALS.get(w, w + "s")
        qw = r.choice([w, w, f'"{w}"'])
        q = what_is(r, ask(r, f"the plural of [|the word |]{qw}")) if r.random() < 0.6 else ask(r, f"[One {w}, two what?|What is the plural form of {qw}?|What is more than one {w} called?|What do you call more than one {w}?|What do you call two of {article(w)}?|How do you say {qw} in the plural?|Plural of {qw}?|One {w}, many ...?|What is the word for more than one {w}?|If there is more than one {w}, what do you say?|One {w} and another {w} are two ...?]")
        return q, f"The plural of {w} is {p}.", f"The plural of {w} is {p}." if "plural" in q.lower() or r.random() < 0.3 else f"One {w}, two {p}.", ""
    group = r.choice(t.RHYME_SETS)
    w = r.choice(group)
    others = [x for x in group if x != w]
    n = 1 if r.random() < 0.7 else 2
    rh = r.sample(others, n)
    a_word = "a word" if n == 1 else "two words"
    q = ask(r, f"[What rhymes with {w}?|Give me {a_word} that rhyme{'s' if n == 1 else ''} with {w}.|Which word rhymes with {w}?|Find {a_word} that rhyme{'s' if n == 1 else ''} with {w}.|Tell me {a_word} that rhyme{'s' if n == 1 else ''} with {w}.|Do you know a rhyme for {w}?|I need a rhyme for {w}.|What word rhymes with {w}?|Can you give me a rhyme for {w}?|Name {a_word} that rhyme{'s' if n == 1 else ''} with {w}.|Can you tell me a word that rhymes with {w}?|Say a word that rhymes with {w}.|A rhyme for {w}, please.]")
    got = " and ".join(rh)
    return pre + q, f"The user wants a rhyme with {w}.", f"{got[0].upper() + got[1:]} rhyme{'s' if n == 1 else ''} with {w}.", ""


NUMBER_WORDS = {2: "two", 3: "three", 4: "four", 5: "five"}


def listing(r: random.Random) -> Item:
    c = r.choice(list(t.CATEGORIES))
    pool = [x.replace("-", " ") for x in t.CATEGORIES[c].split()]
    n = min(r.choice([2, 3, 3, 3, 4, 4, 5]), len(pool))
    num = NUMBER_WORDS[n] if r.random() < 0.75 else str(n)
    items = r.sample(pool, n)
    names = {"farm animals": ["farm animals", "animals on a farm", "animals that live on a farm", "animals from a farm", "animals of the farm"],
             "sea animals": ["sea animals", "animals in the sea", "animals that live in the sea"],
             "wild animals": ["wild animals", "animals that live in the wild"], "birds": ["birds", "kinds of birds", "animals that can fly"],
             "colours": ["colours", "colors"], "fruits": ["fruits", "kinds of fruit", "fruits that you can eat"],
             "vegetables": ["vegetables", "kinds of vegetables"]}.get(c, [c])  # fmt: skip
    name = r.choice(names)
    q = ask(r, f"[Name {num} {name}.|List {num} {name}.|Tell me {num} {name}.|Give me {num} {name}.|Can you name {num} {name}?|Can you list {num} {name}?|What are {num} {name}?|Please name {num} {name}.|I need {num} {name}.|Give me a list of {num} {name}.|Make a list of {num} {name}.|Write down {num} {name}.|Could you name {num} {name}?|Do you know {num} {name}?|Could you give me {num} {name}?|name {num} {name}|Say {num} {name}.|Please list {num} {name} for me.|Please give me {num} {name}.|Which {num} {name} do you know?|Think of {num} {name}.|Show me a list of {num} {name}.]")
    if q[0].islower() and r.random() < 0.5:
        q = "Please " + q
    style = r.random()
    joined = ", ".join(items[:-1]) + " and " + items[-1]
    a = f"{NUMBER_WORDS[n].capitalize()} {c} are {joined}." if style < 0.7 else "\n".join(f"{i + 1}. {x}" for i, x in enumerate(items))
    return q, f"The user wants {NUMBER_WORDS[n]} {c}.", a, ""


def howto(r: random.Random) -> Item:
    k = r.choice(list(t.HOWTO))
    you = k.replace("my ", "your ")
    ing = {"make": "making", "boil": "boiling", "plant": "planting", "bake": "baking", "cook": "cooking", "wrap": "wrapping"}.get(k.split()[0])
    obj = k.split(" ", 1)[1] if " " in k else k
    extra = ""
    if k.split()[0] in ("make", "bake", "cook", "boil") and k != "make friends":
        done = {"make": "made", "bake": "baked", "cook": "cooked", "boil": "boiled"}[k.split()[0]]
        verb = {"make": "make", "bake": "bake", "cook": "cook", "boil": "boil"}[k.split()[0]]
        extra = f"|How is {obj} {done}?|I want to {verb} {obj}. How do I do that?|I would like some {obj.removeprefix('a ').removeprefix('an ')}. How do I {verb} it?|How does one {verb} {obj}?|I would like to have {obj}. How can I {verb} it?|Tell me how {obj} is {done}.|I am {ing} {obj}. What do I need to do?"
    q = ask(r, f"[How do I {k}?|How can I {k}?|How do you {you}?|Tell me how to {k}.|Explain how to {k}.|Can you tell me how to {k}?|What is the best way to {k}?|I want to {k}. How does it work?|Please explain how to {k}.|I want to {k}. What do I do?|How to {k}?|how do i {k}|Can you explain how I {k}?|Give me some help to {k}.|I need to {k}. Can you help me?|Show me how to {k}.|What must I do to {k}?|I would like to {k}. How is it done?{extra}]")
    return q, f"The user wants to {k.replace('my ', 'their ')}. I will explain the steps.", t.HOWTO[k], ""


def the_or_a(x: str) -> str:
    """The sun, the moon, but a horse."""
    return f"the {x}" if x in ("sun", "moon") else article(x)


def sizes(r: random.Random) -> Item:
    pool = {n: int(row[6]) for n, row in t.ANIMALS.items()} if r.random() < 0.75 else t.SIZES
    a, b = r.sample(list(pool), 2)
    if abs(pool[a] - pool[b]) < 5:
        return sizes(r)
    big = r.random() < 0.65
    word = ask(r, "[bigger|larger]" if big else "smaller")
    ans, other = (a, b) if (pool[a] > pool[b]) == big else (b, a)
    q = ask(r, f"[Which is {word}, {the_or_a(a)} or {the_or_a(b)}?|What is {word}, {the_or_a(a)} or {the_or_a(b)}?|Is {the_or_a(a)} {word} than {the_or_a(b)}?|Who is {word}, {the_or_a(a)} or {the_or_a(b)}?|Which one is {word}: {the_or_a(a)} or {the_or_a(b)}?|Tell me which is {word}, {the_or_a(a)} or {the_or_a(b)}.|Which is the {word} one, {the_or_a(a)} or {the_or_a(b)}?|{the_or_a(a)} or {the_or_a(b)}, which is {word}?|Is {the_or_a(a)} or {the_or_a(b)} {word}?|Can you tell me what is {word}, {the_or_a(a)} or {the_or_a(b)}?]")
    q = q[0].upper() + q[1:]
    think = f"I compare {the_or_a(a)} and {the_or_a(b)}. {the_or_a(ans)[0].upper() + the_or_a(ans)[1:]} is {word}."
    if q.startswith("Is ") and " than " in q:
        a_text = ("Yes, " if ans == a else "No, ") + f"{the_or_a(ans)} is {word} than {the_or_a(other)}."
    else:
        a_text = f"{the_or_a(ans)[0].upper() + the_or_a(ans)[1:]} is {word} than {the_or_a(other)}."
    return q, think, a_text, f"size:{a},{b}"
