"""Five kinds of work on which drafts are compared. Texts only; none of them is in m2-tiny's training set."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Workload:
    """Questions of one kind, and how they are answered.

    `replies` are answers that are said whatever the model would say: for what a small model cannot write. The model
    computes every token of them, and drafts are verified against them.
    """

    name: str
    questions: tuple[str, ...]
    temperature: float = 1.0
    replies: tuple[str, ...] = ()


_CODE = '''class Ledger:
    """Accounts and what is on them."""

    def __init__(self, currency):
        self.currency = currency
        self.accounts = {}

    def deposit(self, name, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        balance = self.accounts.get(name, 0)
        self.accounts[name] = balance + amount
        return self.accounts[name]

    def withdraw(self, name, amount):
        if amount <= 0:
            raise ValueError("amount must be positive")
        balance = self.accounts.get(name, 0)
        if balance < amount:
            raise ValueError("not enough money")
        self.accounts[name] = balance - amount
        return self.accounts[name]

    def total(self):
        return sum(self.accounts.values())
'''
_EDITED = _CODE.replace("balance", "before").replace(
    'class Ledger:\n    """Accounts and what is on them."""',
    'class Ledger:\n    """Accounts, and the amount of money on each of them."""',
)
_PEOPLE = (
    ("Anna Berg", 31, "Oslo", "pilot"),
    ("Ben Carter", 27, "Rome", "cook"),
    ("Cara Diaz", 45, "Paris", "teacher"),
    ("Dan Evans", 38, "Bern", "nurse"),
    ("Eva Fischer", 52, "Wien", "baker"),
    ("Finn Gray", 19, "Cork", "student"),
)
_TABLE = "\n".join(f"{name}; {age}; {town}; {work}" for name, age, town, work in _PEOPLE)
_RECORDS = "[\n" + ",\n".join(
    f'  {{\n    "name": "{name}",\n    "age": {age},\n    "city": "{town}",\n    "profession": "{work}"\n  }}'
    for name, age, town, work in _PEOPLE
) + "\n]\n"  # fmt: skip

WORKLOADS = (
    Workload(
        "chat",
        (
            "Good evening, how are you doing today?",
            "Who exactly am I talking to?",
            "Can you work out 7 plus 8 for me?",
            "Can you count from 3 up to 9?",
            "Could you explain to me what a lighthouse is?",
            "Could you list four animals that live on a farm?",
            "I would like to drink tea. How is it made?",
            "I feel a bit sad this evening.",
        ),
    ),
    Workload(
        "story",
        (
            "Tell me a short story about a fox and a lantern.",
            "Can you make up a story about a brave mouse?",
            "I'd love to hear a story about a girl and her kite.",
            "It is bedtime. Tell me a story about a bear in the forest.",
        ),
    ),
    Workload("code edit", (f"Call the variable before, and write a longer docstring.\n{_CODE}",), replies=(_EDITED,)),
    Workload("JSON", (f"Write these as JSON: name, age, city, profession.\n{_TABLE}",), replies=(_RECORDS,)),
    Workload(
        "high temperature",
        (
            "Please write a little tale about an owl and a hedgehog.",
            "Tell me, what sort of things could you do for me?",
            "What is meant by the word bakery?",
        ),
        temperature=1.5,
    ),
)
