"""Trains the demo model from nothing to a Hugging Face folder: tokenizer, weights, evaluation, model card.

Plain training: next-token loss on what the assistant says, every layer in every step, no layer dropout. Only the start is
unusual: two layers learn to recall, the others are put around them, and then all are trained together. `README.md` beside this
file says when and how to run it.
"""

import argparse
import json
import math
import random
import shutil
import textwrap
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch.utils.data import DataLoader, IterableDataset
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from voidprune.demo import tasks

SPECIAL_TOKENS = ("<pad>", "<s>", "<|user|>", "<|assistant|>", "<|end|>")
PAD, BOS, USER, ASSISTANT, END = range(len(SPECIAL_TOKENS))
IGNORED = -100

NUM_LAYERS = 12
ROWS, ROW_LENGTH = 16, 256
"""Shape of every training batch: one shape, so that one compiled graph serves all steps."""
RECALL_LENGTH = 85
"""Length of a recall exercise, in tokens: three to a row."""
CONVERSATION_LENGTH = 232
"""Longest conversation, in tokens; longer ones are cut at the end of a turn."""

CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message['role'] not in ['user', 'assistant'] -%}
        {{- raise_exception('This model was trained on user and assistant messages only.') -}}
    {%- endif -%}
    {{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' -}}
{%- endfor -%}
{%- if add_generation_prompt -%}
    {{- '<|assistant|>' -}}
{%- endif -%}
"""


# ---------------------------------------------------------------------------------------------------------------- tokenizer


def build_tokenizer() -> Tokenizer:
    """Byte-level BPE on text of the generator: any text can be encoded, its words are one token each, digits stand alone."""
    tokenizer = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s"), behavior="isolated")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=1024,
        min_frequency=20,
        special_tokens=[AddedToken(token, special=True, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    items = [item for task in tasks.TASKS for item in tasks.make_items(task, split="training", num_items=5000)]
    tokenizer.train_from_iterator((text for item in items for text in (item.prompt, item.response)), trainer)
    return tokenizer


def save_tokenizer(tokenizer: Tokenizer, folder: Path) -> None:
    """Writes the tokenizer files by hand: what transformers 5 saves names a class that transformers 4 does not have."""
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL_TOKENS[BOS],
        "eos_token": SPECIAL_TOKENS[END],
        "pad_token": SPECIAL_TOKENS[PAD],
        "padding_side": "left",
        "model_max_length": 512,
        "clean_up_tokenization_spaces": False,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE)


# --------------------------------------------------------------------------------------------------------------------- data


@dataclass(frozen=True)
class Tokens:
    """One conversation in tokens."""

    input_ids: list[int]
    labels: list[int]
    """`input_ids` where the assistant speaks, else `IGNORED`; not shifted."""


def encode_conversation(tokenizer: Tokenizer, turns: list[tuple[str, str]]) -> Tokens:
    """The chat template, applied to (prompt, response) pairs; turns that would not fit are left out, the first always stays."""
    encodings = tokenizer.encode_batch([text for turn in turns for text in turn])
    input_ids, labels = [BOS], [IGNORED]
    for prompt, response in zip(encodings[::2], encodings[1::2], strict=True):
        asked = [USER, *prompt.ids, END, ASSISTANT]
        said = [*response.ids, END]
        if len(input_ids) > 1 and len(input_ids) + len(asked) + len(said) > CONVERSATION_LENGTH:
            break
        input_ids += asked + said
        labels += [IGNORED] * len(asked) + said
    return Tokens(input_ids=input_ids, labels=labels)


def draw_recall(rng: random.Random, tokenizer: Tokenizer) -> Tokens:
    """Facts of a passage over and over in random order, learnt on every value whose name has come before.

    Binding in its barest and densest form: a model that starts on whole questions stays at chance for a long time.
    """
    passage = tasks.draw_passage(rng, num_facts=rng.randint(3, 8))
    encodings = tokenizer.encode_batch([f" {word}" for fact in passage.facts for word in fact])
    names, values = ([encoding.ids[0] for encoding in encodings[start::2]] for start in (0, 1))
    input_ids, labels = [BOS], [IGNORED]
    seen: set[int] = set()
    while len(input_ids) < RECALL_LENGTH:
        fact = rng.randrange(len(names))
        input_ids += [names[fact], values[fact]]
        labels += [IGNORED, values[fact] if fact in seen else IGNORED]
        seen.add(fact)
    return Tokens(input_ids=input_ids, labels=labels)


def draw_passage_turns(rng: random.Random, *, progress: float) -> list[tuple[str, str]]:
    """One to three questions about one passage; the smallest passages are for the first half of the training only."""
    passage = tasks.draw_passage(rng, num_facts=rng.randint(2 if progress < 0.5 else 3, 5))
    askers = (tasks.ask_yes_no, tasks.ask_multiple_choice)
    turns: list[tuple[str, str]] = []
    num_turns = rng.choice((1, 1, 1, 2, 2, 3))
    while len(turns) < num_turns:
        item = rng.choice(askers)(rng, passage)
        if tasks.split_of(f"{passage.text}\n{item.prompt}") != "training":
            continue
        turns.append((item.prompt if turns else f"{passage.text}\n{item.prompt}", item.response))
    return turns


def draw_item_turns(rng: random.Random, task: str, *, num_turns: int) -> list[tuple[str, str]]:
    """Questions that stand alone, one after the other."""
    turns: list[tuple[str, str]] = []
    while len(turns) < num_turns:
        item = tasks.TASKS[task](rng)
        if tasks.split_of(item.prompt) == "training":
            turns.append((item.prompt, item.response))
    return turns


def draw_conversation(rng: random.Random, tokenizer: Tokenizer, *, progress: float) -> Tokens:
    """One training conversation of the mix at `progress` (0 to 1 over the whole training)."""
    if rng.random() < 0.3 - progress:
        return draw_recall(rng, tokenizer)
    kinds = rng.choices(("passage", "arithmetic", "sorting"), weights=(5, 2, 2), k=2)
    turns: list[tuple[str, str]] = []
    for kind in dict.fromkeys(kinds) if rng.random() < 0.2 else kinds[:1]:
        if kind == "passage":
            turns += draw_passage_turns(rng, progress=progress)
        else:
            turns += draw_item_turns(rng, kind, num_turns=rng.randint(1, 3))
    return encode_conversation(tokenizer, turns)


@dataclass(frozen=True)
class Batch:
    """Conversations packed into rows; a conversation sees itself only."""

    input_ids: torch.Tensor
    """[rows, length], int64"""
    labels: torch.Tensor
    """[rows, length], int64, not shifted"""
    position_ids: torch.Tensor
    """[rows, length], int64, from 0 in every conversation"""
    document_ids: torch.Tensor
    """[rows, length], int64, which conversation of its row a token belongs to"""

    def attention_mask(self) -> torch.Tensor:
        """[rows, 1, length, length], float32, to be added to the scores: causal, and blind to other conversations."""
        length = self.input_ids.shape[1]
        same = self.document_ids[:, None, :, None] == self.document_ids[:, None, None, :]
        seen = same & torch.ones(length, length, dtype=torch.bool).tril()
        return torch.zeros(seen.shape).masked_fill_(~seen, -1e9)


def pack(conversations: list[Tokens], *, rows: int = ROWS) -> tuple[Batch, list[Tokens]]:
    """Fills the rows first-fit; returns the batch and the conversations that found no room."""
    shape = (rows, ROW_LENGTH)
    input_ids, labels = torch.full(shape, PAD), torch.full(shape, IGNORED)
    position_ids, document_ids = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    used, count, left = [0] * rows, [0] * rows, []
    for conversation in conversations:
        length = len(conversation.input_ids)
        row = next((row for row in range(rows) if used[row] + length <= ROW_LENGTH), None)
        if row is None:
            left.append(conversation)
            continue
        span = slice(used[row], used[row] + length)
        used[row] += length
        count[row] += 1
        input_ids[row, span] = torch.tensor(conversation.input_ids)
        labels[row, span] = torch.tensor(conversation.labels)
        position_ids[row, span] = torch.arange(length)
        document_ids[row, span] = count[row]
    return Batch(input_ids, labels, position_ids, document_ids), left


class Stream(IterableDataset[Batch]):
    """Batches of the steps from `start` on; what a step sees is a function of the seed and its number, so a run can be resumed."""

    def __init__(self, tokenizer_file: Path, *, seed: int, start: int, steps: int) -> None:
        self.tokenizer_file, self.seed, self.start, self.steps = tokenizer_file, seed, start, steps

    def __iter__(self) -> Iterator[Batch]:
        tokenizer = Tokenizer.from_file(str(self.tokenizer_file))
        for step in range(self.start, self.steps):
            rng = random.Random(f"{self.seed}/{step}")
            conversations: list[Tokens] = []
            tokens = 0
            while tokens < 1.1 * ROWS * ROW_LENGTH:
                conversations.append(draw_conversation(rng, tokenizer, progress=step / self.steps))
                tokens += len(conversations[-1].input_ids)
            conversations.sort(key=lambda c: len(c.input_ids), reverse=True)
            yield pack(conversations)[0]


# ----------------------------------------------------------------------------------------------------------------- training


def build_model(vocab_size: int, *, num_layers: int) -> LlamaForCausalLM:
    """A model with random weights.

    Three things about the start shorten the time at chance: rotary frequencies that stay readable over a whole conversation, a
    direction that all embeddings share (what an attention head needs to look at a place, whatever token is there), and sublayers
    that say little at first.
    """
    config = LlamaConfig(
        vocab_size=vocab_size,
        hidden_size=128,
        intermediate_size=256,
        num_hidden_layers=num_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=32,
        max_position_embeddings=512,
        rope_parameters={"rope_type": "default", "rope_theta": 1e6},
        tie_word_embeddings=True,
        initializer_range=0.04,
        bos_token_id=BOS,
        eos_token_id=END,
        pad_token_id=PAD,
        dtype="float32",
    )
    model = LlamaForCausalLM(config)
    model.set_attn_implementation("eager")
    model.generation_config = GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=BOS, eos_token_id=END, pad_token_id=PAD, do_sample=False
    )
    with torch.no_grad():
        model.model.embed_tokens.weight.mul_(2.5).add_(0.1 * torch.randn(config.hidden_size))
        for layer in model.model.layers:
            layer.self_attn.q_proj.weight.mul_(2)
            layer.self_attn.k_proj.weight.mul_(2)
            layer.self_attn.o_proj.weight.mul_(0.6 / num_layers)
            layer.mlp.down_proj.weight.mul_(0.6 / num_layers)
    return model


def warm_up(tokenizer: Tokenizer) -> LlamaForCausalLM:
    """Two layers that have learnt to recall: the circuit that a deep model takes far longer to find from nothing."""
    model = build_model(tokenizer.get_vocab_size(), num_layers=2)
    optimizers = build_optimizers(model)
    loss_average = math.inf
    for step in range(1500):
        rng = random.Random(f"warm-up/{step}")
        batch, _ = pack([draw_recall(rng, tokenizer) for _ in range(3 * 8)], rows=8)
        loss = batch_loss(model, batch, batch.attention_mask())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        loss_average = loss.item() if step == 0 else 0.95 * loss_average + 0.05 * loss.item()
        if step % 50 == 49:
            print(f"warm-up step {step + 1}  loss {loss_average:.3f}", flush=True)
        if loss_average < 0.05:
            return model
    raise SystemExit(f"the warm-up did not learn to recall (loss {loss_average:.2f}); try another --seed")


def grow(small: LlamaForCausalLM, *, num_layers: int) -> LlamaForCausalLM:
    """A model of `num_layers` layers, two of which, and the embedding, are those of `small`."""
    model = build_model(small.config.vocab_size, num_layers=num_layers)
    model.model.embed_tokens.load_state_dict(small.model.embed_tokens.state_dict())
    model.model.norm.load_state_dict(small.model.norm.state_dict())
    for source, target in enumerate((num_layers // 4, num_layers // 2)):
        model.model.layers[target].load_state_dict(small.model.layers[source].state_dict())
    return model


def build_optimizers(model: LlamaForCausalLM) -> list[torch.optim.Optimizer]:
    """Muon (scaled to the step size of AdamW) for the matrices of the layers, AdamW for the embedding and the norms."""
    matrices = [parameter for parameter in model.model.layers.parameters() if parameter.ndim == 2]
    chosen = {id(parameter) for parameter in matrices}
    others = [parameter for parameter in model.parameters() if id(parameter) not in chosen]
    return [
        torch.optim.Muon(matrices, lr=0.004, weight_decay=0.01, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(others, lr=0.003, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
    ]


def decay(step: int, *, steps: int, share_of_time: float) -> float:
    """Learning-rate factor: linear warm-up over 100 steps, level, then linear to zero over the last quarter of the run."""
    done = max(step / steps, share_of_time)
    return max(0.0, min(1.0, (step + 1) / 100, (1 - done) / 0.25))


def batch_loss(model: LlamaForCausalLM, batch: Batch, mask: torch.Tensor) -> torch.Tensor:
    """Mean cross-entropy of the assistant's tokens."""
    with torch.autocast("cpu", torch.bfloat16):
        logits = model(
            input_ids=batch.input_ids, attention_mask=mask, position_ids=batch.position_ids, use_cache=False
        ).logits
    return torch.nn.functional.cross_entropy(
        logits[:, :-1].flatten(0, 1).float(), batch.labels[:, 1:].flatten(), ignore_index=IGNORED
    )


@torch.no_grad()
def teacher_forced_accuracy(model: LlamaForCausalLM, tokenizer: Tokenizer, *, num_items: int) -> dict[str, float]:
    """Share of validation items whose every response token is the likeliest: those that greedy decoding gets right."""
    shares = {}
    for task in tasks.TASKS:
        items = tasks.make_items(task, split="validation", num_items=num_items)
        left = [encode_conversation(tokenizer, [(item.prompt, item.response)]) for item in items]
        right = 0
        while left:
            batch, left = pack(left)
            logits = model(
                input_ids=batch.input_ids,
                attention_mask=batch.attention_mask(),
                position_ids=batch.position_ids,
                use_cache=False,
            ).logits
            labels = batch.labels[:, 1:]
            wrong = (logits[:, :-1].argmax(-1) != labels) & (labels != IGNORED)
            for row, documents in enumerate(batch.document_ids[:, 1:]):
                right += int(documents.max()) - len(documents[wrong[row]].unique())
        shares[task] = right / num_items
    return shares


@dataclass
class Progress:
    """How far a run is."""

    step: int = 0
    tokens: int = 0
    seconds: float = 0.0


def train(tokenizer: Tokenizer, scratch: Path, *, steps: int, minutes: float, seed: int) -> Progress:
    """Trains for `steps` steps or `minutes`, whichever ends first; goes on from the last checkpoint in `scratch`, if any."""
    torch.manual_seed(seed)
    checkpoint = scratch / "checkpoint.pt"
    if checkpoint.exists():
        model = build_model(tokenizer.get_vocab_size(), num_layers=NUM_LAYERS)
    else:
        model = grow(warm_up(tokenizer), num_layers=NUM_LAYERS)
    optimizers = build_optimizers(model)
    peaks = [optimizer.param_groups[0]["lr"] for optimizer in optimizers]
    progress = Progress()
    if checkpoint.exists():
        state = torch.load(checkpoint)
        model.load_state_dict(state["model"])
        for optimizer, optimizer_state in zip(optimizers, state["optimizers"], strict=True):
            optimizer.load_state_dict(optimizer_state)
        progress = Progress(**state["progress"])
        print(f"resumed at step {progress.step}", flush=True)

    tokenizer.save(str(scratch / "tokenizer.json"))
    stream = Stream(scratch / "tokenizer.json", seed=seed, start=progress.step, steps=steps)
    compiled_loss = torch.compile(batch_loss, dynamic=False)
    losses: list[float] = []
    started = time.monotonic() - progress.seconds
    for batch in DataLoader(stream, batch_size=None, num_workers=1, prefetch_factor=8):
        factor = decay(progress.step, steps=steps, share_of_time=progress.seconds / (60 * minutes))
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * factor
        loss = compiled_loss(model, batch, batch.attention_mask())
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        losses.append(loss.item())
        progress.step += 1
        progress.tokens += int((batch.document_ids > 0).sum())
        progress.seconds = time.monotonic() - started
        last = progress.step == steps or progress.seconds > 60 * minutes
        if last or progress.step % 200 == 0:
            shares = teacher_forced_accuracy(model, tokenizer, num_items=100)
            print(
                f"step {progress.step}  {progress.seconds / 60:.1f} min  {progress.tokens / 1e6:.2f}M tokens  "
                f"lr x {factor:.2f}  loss {sum(losses) / len(losses):.4f}  "
                + "  ".join(f"{task} {share:.2f}" for task, share in shares.items()),
                flush=True,
            )
            losses.clear()
            state = {
                "model": model.state_dict(),
                "optimizers": [optimizer.state_dict() for optimizer in optimizers],
                "progress": asdict(progress),
            }
            torch.save(state, checkpoint.with_suffix(".new"))
            checkpoint.with_suffix(".new").replace(checkpoint)
            save_model(model, tokenizer, scratch / "model")
        if last:
            break
    return progress


def save_model(model: LlamaForCausalLM, tokenizer: Tokenizer, folder: Path) -> None:
    """Writes a folder that stock transformers loads, 4 and 5 alike."""
    folder.mkdir(parents=True, exist_ok=True)
    model.save_pretrained(folder)
    # transformers 4 looks for the rotary base here, and takes 1e4 without a word if it is not.
    config = json.loads((folder / "config.json").read_text())
    config["rope_theta"] = config["rope_parameters"]["rope_theta"]
    (folder / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
    save_tokenizer(tokenizer, folder)


# --------------------------------------------------------------------------------------------------------------- evaluation


@torch.no_grad()
def greedy_accuracy(folder: Path, *, num_items: int) -> dict[str, float]:
    """Exact match of the extracted answer on `evaluation` items, generated greedily from the folder as a user would load it."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    shares = {}
    for task in tasks.TASKS:
        items = tasks.make_items(task, split="evaluation", num_items=num_items)
        right = 0
        for start in range(0, num_items, 100):
            chunk = items[start : start + 100]
            prompts = tokenizer.apply_chat_template(
                [[{"role": "user", "content": item.prompt}] for item in chunk],
                add_generation_prompt=True,
                tokenize=False,
            )
            inputs = tokenizer(prompts, return_tensors="pt", padding=True, return_token_type_ids=False)
            output = model.generate(**inputs, max_new_tokens=64)
            texts = tokenizer.batch_decode(output[:, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
            right += sum(tasks.extract_answer(text) == item.answer for text, item in zip(texts, chunk, strict=True))
        shares[task] = right / num_items
        print(f"{task}: {right} of {num_items}", flush=True)
    return shares


MODEL_CARD = """\
---
license: mit
language: en
library_name: transformers
pipeline_tag: text-generation
---

# The demo model of voidprune

A stock Llama of {num_layers} layers (width {width}, {num_heads} heads, {num_kv_heads} key/value heads, {vocab_size} tokens, \
{num_parameters:.2f} million parameters, float32), small enough to ship with the package and trained well enough that leaving out \
the wrong layers shows. It answers four kinds of questions, each about what the prompt says, and nothing else.

| task | shape of | exact match, greedy | items |
|---|---|---|---|
{table}

Items are the first {num_items} of `make_items(task, split="evaluation")` in `voidprune/demo/tasks.py`: generated, and different \
in content from everything that the model was trained on. The response first states the deciding fact or the working, then \
`Answer: X`; only X is compared.

## Training

    {command}

{steps} steps, {tokens:.1f} million tokens (padding not counted), {minutes:.0f} minutes on 2 CPU cores, float32 weights under \
bfloat16 autocast. Next-token loss on the assistant's tokens, Muon for the matrices of the layers, AdamW for the rest. Two of \
the layers, and the embedding, start from a short training (some 250 steps) on recall alone (facts repeated in random order). \
The others start from random weights with small output projections, so close to passing on what comes in, and all of them are \
trained together from there on. No layer dropout and no distillation; but a start like this may leave some layers easier to spare \
than in a model that was trained whole.

## Prompt format

    <s><|user|>PROMPT<|end|><|assistant|>RESPONSE<|end|>

One example of each kind:

{examples}

Further turns follow without another `<s>`. There is no system role: the chat template says so when it is given one. \
Conversations in training have up to {conversation_length} tokens. A word outside the small vocabulary of the tasks is spelled \
out in bytes or short pieces, so any text can be encoded, but only the tasks above are understood.
"""


def write_card(folder: Path, *, accuracies: dict[str, float], num_items: int, progress: Progress, command: str) -> None:
    """Writes the model card, numbers and all."""
    shapes = {"yes-no": "BoolQ", "multiple-choice": "MMLU", "arithmetic": "GSM8K", "sorting": "long answers"}
    config = json.loads((folder / "config.json").read_text())
    with safe_open(folder / "model.safetensors", framework="np") as weights:
        num_parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 (a file, not a dict)
    card = MODEL_CARD.format(
        num_layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        num_heads=config["num_attention_heads"],
        num_kv_heads=config["num_key_value_heads"],
        vocab_size=config["vocab_size"],
        num_parameters=num_parameters / 1e6,
        table="\n".join(
            f"| {task} | {shapes[task]} | {100 * accuracy:.1f} % | {num_items} |"
            for task, accuracy in accuracies.items()
        ),
        num_items=num_items,
        examples="\n\n".join(
            textwrap.indent(f"{item.prompt}\n-> {item.response}", "    ")
            for task in tasks.TASKS
            for item in tasks.make_items(task, split="evaluation", num_items=1)
        ),
        command=command,
        steps=progress.step,
        tokens=progress.tokens / 1e6,
        minutes=progress.seconds / 60,
        conversation_length=CONVERSATION_LENGTH,
    )
    (folder / "README.md").write_text(card)


def main() -> None:
    """Trains, evaluates, and only then puts the finished folder in its place."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, required=True, help="folder of the finished model")
    parser.add_argument(
        "--scratch", type=Path, required=True, help="folder for checkpoints; a run goes on from what is there"
    )
    parser.add_argument("--steps", type=int, default=4000, help="length of the run")
    parser.add_argument(
        "--minutes", type=float, default=math.inf, help="end earlier, after this time, with the decay fitted in"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--num-items", type=int, default=500, help="evaluation items per task")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    arguments.scratch.mkdir(parents=True, exist_ok=True)

    tokenizer = build_tokenizer()
    progress = train(
        tokenizer, arguments.scratch, steps=arguments.steps, minutes=arguments.minutes, seed=arguments.seed
    )
    finished = arguments.scratch / "model"
    accuracies = greedy_accuracy(finished, num_items=arguments.num_items)
    minutes = "" if math.isinf(arguments.minutes) else f" --minutes {arguments.minutes:g}"
    write_card(
        finished,
        accuracies=accuracies,
        num_items=arguments.num_items,
        progress=progress,
        command=f"python recipes/demo/train.py --output {arguments.output} --scratch SCRATCH "
        f"--steps {arguments.steps}{minutes} --seed {arguments.seed}",
    )
    shutil.copytree(finished, arguments.output, dirs_exist_ok=True)


if __name__ == "__main__":
    main()
