"""Four small question kinds that need the passage in front of them, generated without end and without data files.

Each kind has the shape of a public benchmark: `yes-no` of BoolQ, `multiple-choice` of MMLU, `arithmetic` of GSM8K; `sorting` stands
for answers of many tokens. A response first quotes or works out the deciding fact, then ends in `Answer: X`: what a model has to
learn is to copy by binding and to compare, so that damage to either shows. Pure Python: no model, no tokenizer, no tensors here.
"""

import hashlib
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

NAMES = (
    *("Ann", "Ben", "Carl", "Dora", "Eve", "Fred", "Gina", "Hugo", "Ida", "Jack"),
    *("Kate", "Leo", "Mia", "Nick", "Olga", "Paul", "Rosa", "Sue", "Tom", "Vera"),
)
LETTERS = ("A", "B", "C", "D")


@dataclass(frozen=True)
class TaskItem:
    """One question and the response that a model should give to it."""

    task: str
    """Kind of the item, a key of `TASKS`."""
    prompt: str
    """What the user says: the passage and the question."""
    response: str
    """What the assistant should say: the deciding fact or the working, then `Answer: X`."""
    answer: str
    """The `X` alone: `yes` or `no`, a letter, a number, or a sorted list."""


@dataclass(frozen=True)
class Relation:
    """A way in which a person and a value can belong together, and how it is headed and asked."""

    heading: str
    is_it_so: str
    which_one: str
    values: tuple[str, ...]


RELATIONS = (
    Relation(
        heading="Food",
        is_it_so="Does {name} like {value}?",
        which_one="What does {name} like?",
        values=(
            *("bread", "cake", "cheese", "fish", "honey", "melon"),
            *("milk", "pears", "plums", "rice", "soup", "tea"),
        ),
    ),
    Relation(
        heading="Colours",
        is_it_so="Does {name} wear {value}?",
        which_one="What does {name} wear?",
        values=(
            *("black", "blue", "brown", "gold", "green", "grey"),
            *("orange", "pink", "red", "silver", "white", "yellow"),
        ),
    ),
    Relation(
        heading="Cities",
        is_it_so="Does {name} visit {value}?",
        which_one="What does {name} visit?",
        values=(
            *("Athens", "Berlin", "Cairo", "Dublin", "Lima", "London"),
            *("Madrid", "Oslo", "Paris", "Rome", "Tokyo", "Vienna"),
        ),
    ),
    Relation(
        heading="Games",
        is_it_so="Does {name} play {value}?",
        which_one="What does {name} play?",
        values=(
            *("cards", "cello", "chess", "darts", "drums", "flute"),
            *("golf", "guitar", "hockey", "piano", "rugby", "tennis"),
        ),
    ),
)


@dataclass(frozen=True)
class Passage:
    """A few people, each bound to a value of its own by one relation."""

    relation: Relation
    facts: tuple[tuple[str, str], ...]
    """(name, value), in the order of the text; no name and no value occurs twice."""

    @property
    def text(self) -> str:
        """The passage as the prompt shows it."""
        return f"{self.relation.heading}: " + ", ".join(f"{name} {value}" for name, value in self.facts) + "."


def draw_passage(rng: random.Random, *, num_facts: int) -> Passage:
    """A passage of `num_facts` sentences."""
    relation = rng.choice(RELATIONS)
    names = rng.sample(NAMES, num_facts)
    values = rng.sample(relation.values, num_facts)
    return Passage(relation=relation, facts=tuple(zip(names, values, strict=True)))


def ask_yes_no(rng: random.Random, passage: Passage) -> TaskItem:
    """A question whose `no` is a value of somebody else in the passage: seeing the value there says nothing."""
    name, value = rng.choice(passage.facts)
    answer = rng.choice(("yes", "no"))
    others = [other for _, other in passage.facts if other != value]
    asked = value if answer == "yes" else rng.choice(others)
    return TaskItem(
        task="yes-no",
        prompt=f"Question: {passage.relation.is_it_so.format(name=name, value=asked)}",
        response=f"Fact: {name} {value} {answer}. Answer: {answer}",
        answer=answer,
    )


def ask_multiple_choice(rng: random.Random, passage: Passage) -> TaskItem:
    """A question whose wrong options are the values of other people, as far as the passage has enough of them."""
    name, value = rng.choice(passage.facts)
    others = [other for _, other in passage.facts if other != value]
    if len(others) < 3:
        others += rng.sample([v for v in passage.relation.values if v != value and v not in others], 3 - len(others))
    options = rng.sample(others, 3)
    position = rng.randrange(len(LETTERS))
    options.insert(position, value)
    listed = ", ".join(f"{option} {letter}" for letter, option in zip(LETTERS, options, strict=True))
    answer = LETTERS[position]
    return TaskItem(
        task="multiple-choice",
        prompt=f"Question: {passage.relation.which_one.format(name=name)} {listed}.",
        response=f"Fact: {name} {value} {answer}. Answer: {answer}",
        answer=answer,
    )


def _after_passage(passage: Passage, question: TaskItem) -> TaskItem:
    return TaskItem(
        task=question.task,
        prompt=f"{passage.text}\n{question.prompt}",
        response=question.response,
        answer=question.answer,
    )


def draw_yes_no(rng: random.Random) -> TaskItem:
    """A passage of three to five facts and a question about one of them."""
    passage = draw_passage(rng, num_facts=rng.randint(3, 5))
    return _after_passage(passage, ask_yes_no(rng, passage))


def draw_multiple_choice(rng: random.Random) -> TaskItem:
    """A passage of four or five facts, so that all four options come from it."""
    passage = draw_passage(rng, num_facts=rng.randint(4, 5))
    return _after_passage(passage, ask_multiple_choice(rng, passage))


THINGS = ("apples", "beads", "coins", "eggs", "nuts", "shells", "stamps", "stones")
GAINS = ("buys", "finds", "gets")
LOSSES = ("gives away", "loses", "sells")


def draw_arithmetic(rng: random.Random, *, max_steps: int = 3) -> TaskItem:
    """Two or three additions and subtractions, all results from 1 to 99."""
    name, thing = rng.choice(NAMES), rng.choice(THINGS)
    total = rng.randint(10, 70)
    sentences, working = [f"{name} has {total} {thing}."], []
    for _ in range(rng.randint(2, max_steps)):
        gain = rng.random() < 0.5 if 4 < total < 95 else total <= 4
        change = rng.randint(2, min(40, 99 - total)) if gain else rng.randint(2, min(40, total - 1))
        sentences.append(
            f"{name} {rng.choice(GAINS)} {change} more." if gain else f"{name} {rng.choice(LOSSES)} {change}."
        )
        result = total + change if gain else total - change
        working.append(f"{total} {'+' if gain else '-'} {change} = {result}.")
        total = result
    return TaskItem(
        task="arithmetic",
        prompt=f"{' '.join(sentences)}\nQuestion: How many {thing} does {name} have now?",
        response=f"{' '.join(working)} Answer: {total}",
        answer=str(total),
    )


def draw_sorting(rng: random.Random, *, min_length: int = 4, max_length: int = 6) -> TaskItem:
    """Four to six different numbers of two digits, to be written in rising or falling order."""
    numbers = rng.sample(range(10, 100), rng.randint(min_length, max_length))
    rising = rng.random() < 0.5
    answer = ", ".join(str(number) for number in sorted(numbers, reverse=not rising))
    order = "smallest to largest" if rising else "largest to smallest"
    return TaskItem(
        task="sorting",
        prompt=f"Sort from {order}: {', '.join(str(number) for number in numbers)}",
        response=f"Answer: {answer}",
        answer=answer,
    )


TASKS: dict[str, Callable[[random.Random], TaskItem]] = {
    "yes-no": draw_yes_no,
    "multiple-choice": draw_multiple_choice,
    "arithmetic": draw_arithmetic,
    "sorting": draw_sorting,
}

SPLITS = ("training", "calibration", "validation", "evaluation")
_HELD_OUT = SPLITS[1:]


def split_of(prompt: str) -> str:
    """The split that a prompt belongs to: five eighths of all prompts are for training, an eighth for each of the others.

    A function of the SHA-256 of the text alone, so that no seed, and no order of generation, can move an item from one to another.
    """
    bucket = hashlib.sha256(prompt.encode()).digest()[0] % 8
    return _HELD_OUT[bucket] if bucket < len(_HELD_OUT) else "training"


def make_items(task: str, *, split: str, num_items: int, seed: int = 0) -> list[TaskItem]:
    """`num_items` different items of one kind and one split; the same arguments give the same items on every machine.

    Raises:
        ValueError: if there is no such task or split, or `num_items` is negative.
    """
    if task not in TASKS:
        raise ValueError(f"unknown task {task!r}; choose one of {', '.join(TASKS)}")
    if split not in SPLITS:
        raise ValueError(f"unknown split {split!r}; choose one of {', '.join(SPLITS)}")
    if num_items < 0:
        raise ValueError(f"num_items must not be negative, got {num_items}")
    rng = random.Random(f"{task}/{split}/{seed}")
    items: dict[str, TaskItem] = {}
    while len(items) < num_items:
        item = TASKS[task](rng)
        if split_of(item.prompt) == split:
            items.setdefault(item.prompt, item)
    return list(items.values())


def extract_answer(text: str) -> str | None:
    """What follows the last `Answer:`, up to the end of its line; None if there is no answer."""
    found = re.findall(r"Answer:[ \t]*([^\n]*)", text)
    return found[-1].strip() or None if found else None
