"""The embedded workload: what the support desk of a small home-goods shop asks a model every day.

A seeded grammar writes customer messages and one of four tasks around each. Names, products, towns
and order numbers of the held-out prompts never occur in a training prompt; the tasks and the kinds
of problem do, as they would in use.
"""

from __future__ import annotations

import random
from typing import Literal

Split = Literal["train", "heldout"]

SIZES: dict[Split, int] = {"train": 1200, "heldout": 120}
_SEED = 20260501

TASKS = {
    "reply": "Write a short, polite email reply from the support team to this customer message:",
    "formal": "Rewrite this customer message as a formal and polite email:",
    "steps": "List three steps that the support team should take to resolve this message:",
    "apology": "Write a short apology to this customer. Thank them and explain the next step.",
}


def _list(text: str) -> list[str]:
    return [item.strip() for item in text.split(",")]


_ENTITIES: dict[Split, dict[str, list[str]]] = {
    "train": {
        "first": _list(
            """Maria, Tom, Anna, Lukas, Sofia, Daniel, Priya, Omar, Hannah, Victor, Elena, Samuel,
            Grace, Mateo, Julia, Henrik, Nadia, Paul, Ingrid, Marco, Leila, Simon, Clara, Ravi,
            Emma, Jonas, Alice, Hugo, Teresa, Felix"""
        ),
        "last": _list(
            """Lopez, Becker, Novak, Rossi, Patel, Haddad, Berger, Moreau, Silva, Larsen, Kovacs,
            Jensen, Costa, Meyer, Ahmed, Dubois, Fischer, Rivera, Olsen, Marino, Weber, Castro,
            Nilsson, Keller, Ortega, Blanc, Horvat, Santos, Vogel, Romano"""
        ),
        "product": _list(
            """kettle, desk lamp, coffee grinder, wall clock, bread knife, bath mat, bookshelf,
            toaster, floor rug, picture frame, laundry basket, frying pan, table cloth,
            garden chair, blender, shower curtain, candle holder, spice rack, pillow,
            water bottle, rice cooker, door mat, salad bowl, storage box, mirror, duvet cover,
            coat stand, cutting board, teapot, fan"""
        ),
        "town": _list(
            """Bristol, Lyon, Hamburg, Porto, Leeds, Turin, Ghent, Malmo, Seville, Graz, Cardiff,
            Nantes, Bremen, Braga, York, Verona, Bruges, Uppsala, Granada, Linz"""
        ),
    },
    "heldout": {
        "first": _list(
            """Walter, Beatrix, Kofi, Yara, Dominic, Astrid, Rohan, Camille, Stefan, Miriam,
            Oscar, Fatima"""
        ),
        "last": _list(
            """Thornton, Eriksen, Mensah, Petrova, Galli, Laurent, Schmid, Abbas, Kowalski,
            Pereira, Quinn, Sato"""
        ),
        "product": _list(
            """waffle iron, side table, soup ladle, bedside lamp, towel rail, wine rack,
            flower pot, egg timer, hall bench, milk frother, shoe cabinet, serving tray"""
        ),
        "town": _list("Dresden, Bilbao, Oxford, Trieste, Odense, Rennes, Salzburg, Faro"),
    },
}
_ORDER_NUMBERS: dict[Split, tuple[int, int]] = {
    "train": (10_000, 79_999),
    "heldout": (80_000, 99_999),
}

_GREETINGS = ["Hello,", "Hi,", "Good morning,", "Dear support team,", "Hi there,"]
_PROBLEMS = [
    "The {product} from order {order} arrived with a crack. I would like a replacement.",
    "I ordered a {product} last week, order {order}, and it has still not arrived in {town}. "
    "Where is it?",
    "You sent me the wrong colour of the {product} I ordered (order {order}). How can I "
    "exchange it?",
    "My new {product} stopped working after two days. The order number is {order}. Please tell "
    "me what to do.",
    "A part was missing from the box with the {product}, order {order}. Could you send it to "
    "{town}?",
    "I was charged twice for the {product} in order {order}. Please refund one of the payments.",
    "I want to cancel order {order}, the {product}, because it will come too late for my move "
    "to {town}.",
    "I need an invoice for the {product}, order {order}. I could not find one in my account.",
    "The {product} I bought (order {order}) is smaller than your website says. I want my money "
    "back.",
    "Your courier left the {product} from order {order} with a neighbour in {town} and nobody "
    "knows where it is now.",
]
_CLOSINGS = [
    "Regards, {name}",
    "Thanks, {name}",
    "Best wishes, {name}",
    "Thank you, {name}",
    "Kind regards, {name}",
]


def workload(split: Split) -> list[dict[str, str]]:
    """All prompts of a split as {"id", "prompt", "category"}; the same on every machine."""
    rng = random.Random(f"{_SEED}-{split}")
    entities = _ENTITIES[split]
    orders = rng.sample(range(*_ORDER_NUMBERS[split]), SIZES[split])
    tasks = list(TASKS)
    rows = []
    for i, order in enumerate(orders):
        filled = {
            "product": rng.choice(entities["product"]),
            "town": rng.choice(entities["town"]),
            "order": str(order),
            "name": f"{rng.choice(entities['first'])} {rng.choice(entities['last'])}",
        }
        parts = (rng.choice(_GREETINGS), rng.choice(_PROBLEMS), rng.choice(_CLOSINGS))
        message = " ".join(part.format(**filled) for part in parts)
        category = tasks[i % len(tasks)]
        prompt = f"{TASKS[category]}\n\n{message}"
        rows.append({"id": f"{split}-{i:04d}", "prompt": prompt, "category": category})
    return rows
