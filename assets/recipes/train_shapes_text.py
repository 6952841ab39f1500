"""Pretrains the text model of the shapes world, so that linear probes read from it what a caption asks for.

    python -m assets.recipes.train_shapes_text    # three minutes on one thread: writes emmdit/shapes/text.safetensors

A denoiser expects features of a trained language model, which bind words: who is left of whom, which color belongs to
which shape. A random transformer holds this information, too, but not linearly, and learning to decode it took most of
a denoiser's training (docs/shapes_world.md). The tiny Llama starts from `initial_model` and learns features from which
linear probes predict

- at the last word and all positions after it: the answers to `questions`, such as the number of objects, the color of
  the first one, and the side (left of, right of, above, below the other) of each shape;
- at each word: the word itself and the previous one.

It sees the captions of all splits, as a language model has read of more than its images show. Of those of the training
split alone it learns shortcuts (they say only one order of a pair of which the other is held out): see `--split train`.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Mapping
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import LlamaModel

from emmdit.evaluation.geneval.prompts import NUMBERS, RELATIONS, TASKS
from emmdit.shapes import ShapesWorld, Spec
from emmdit.shapes.captions import OPPOSITE
from emmdit.shapes.text import MAX_LENGTH, WEIGHTS, shapes_tokenizer, text_config
from emmdit.shapes.world import SPLITS

LOOK_BACK = (1, 2, 4, 7)  # words; one head each, in every layer
# Chosen by linear probes: sharper heads forget the words in between, blunter ones the order.
CONSTANT = 3.0  # of the direction that queries and keys share, where a word's own channels have variance 1
SHARPNESS, CONTENT = 0.7, 0.3  # of attention by distance, and by word


def questions(spec: Spec, world: ShapesWorld) -> dict[str, tuple[int, int]]:
    """What a caption asks for, as (answer, number of possible answers); 0 is none.

    No answer is the color or number *of a shape*. Each stands for one object in order of naming or one shape, so that
    what a denoiser learns from it holds in compositions that its captions do not have.
    """
    objects = dict.fromkeys(spec.objects)  # those named: three circles are named once
    shapes = [shape for shape, _ in objects]
    found = {"number": (len(spec.objects) - 1, max(NUMBERS))}
    for place, (shape, color) in enumerate([*objects, (None, None)][:2]):
        found[f"shape {place}"] = ((None, *world.shapes).index(shape), 1 + len(world.shapes))
        found[f"color {place}"] = ((None, *world.colors).index(color), 1 + len(world.colors))
    for shape in world.shapes:
        side = None
        if spec.relation and shape in shapes:
            side = spec.relation if shape == shapes[0] else OPPOSITE[spec.relation]
        found[f"presence of {shape}"] = (int(shape in shapes), 2)
        found[f"side of {shape}"] = ((None, *RELATIONS).index(side), 1 + len(RELATIONS))
    return found


def initial_model(seed: int = 0) -> LlamaModel:
    """Random weights, except that queries and keys share one constant direction, by which each head attends a fixed
    number of words back (RoPE turns a constant query and key into a function of their distance)."""
    tokenizer = shapes_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights; these replace them
        model = LlamaModel(text_config(tokenizer)).eval().requires_grad_(False)
    _set_weights(model, torch.Generator().manual_seed(seed))
    captions = Captions(ShapesWorld(split="all"))
    scale_norm(model, {"input_ids": captions.ids[::5], "attention_mask": captions.mask[::5]})
    return model


@torch.no_grad()
def scale_norm(model: LlamaModel, tokens: Mapping[str, Tensor]) -> None:
    """Scale the last norm so that the mean square of each channel is 1 over all positions of `tokens`."""
    model.norm.weight.fill_(1.0)
    features = model(**tokens).last_hidden_state.flatten(0, 1)
    model.norm.weight.copy_(features.square().mean(dim=0).rsqrt().round(decimals=3))


@torch.no_grad()
def _set_weights(model: LlamaModel, generator: torch.Generator) -> None:
    d, head_dim = model.config.hidden_size, model.config.hidden_size // model.config.num_attention_heads

    def normal(*shape: int, gain: float = 1.0) -> Tensor:
        return torch.randn(*shape, generator=generator) * gain / math.sqrt(shape[-1])

    # Channel 0 of the residual stream is the constant that every query and key reads; only the last layer writes there.
    embedding = torch.randn(model.config.vocab_size, d, generator=generator)
    embedding[:, 0] = CONSTANT
    model.embed_tokens.weight.copy_(embedding)
    inverse_frequency = model.rotary_emb.inv_freq.float()
    for layer in model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        query, key = normal(d, d, gain=CONTENT), normal(d, d, gain=CONTENT)
        for head, distance in enumerate(LOOK_BACK):
            # Score of a word n back: sum over frequencies of cos(w (n - distance)), highest at n = distance.
            rows = slice(head * head_dim, (head + 1) * head_dim)
            angle = -distance * inverse_frequency
            query[rows, 0] = torch.cat([angle.cos(), angle.sin()]) * SHARPNESS
            key[rows, 0] = torch.cat([torch.ones_like(angle), torch.zeros_like(angle)]) * SHARPNESS
        attention.q_proj.weight.copy_(query)
        attention.k_proj.weight.copy_(key)
        attention.v_proj.weight.copy_(normal(d, d))
        output, down = normal(d, d), normal(d, 2 * d)
        if layer is not model.layers[-1]:
            output[0], down[0] = 0.0, 0.0
        attention.o_proj.weight.copy_(output)
        mlp.gate_proj.weight.copy_(normal(2 * d, d, gain=2.0))
        mlp.up_proj.weight.copy_(normal(2 * d, d))
        mlp.down_proj.weight.copy_(down)


class Captions:
    """Captions of a split in all phrasings: tokens, what each asks for, and the rows of each task that has any."""

    def __init__(self, world: ShapesWorld) -> None:
        rows = [(spec, caption) for task in TASKS for spec in world.specs(task) for caption in spec.captions]
        texts, options = [caption for _, caption in rows], dict(padding="max_length", max_length=MAX_LENGTH)
        tokens = shapes_tokenizer()(texts, return_tensors="pt", **options)
        self.ids, self.mask = tokens["input_ids"], tokens["attention_mask"]
        self.wanted = torch.tensor([[answer for answer, _ in questions(spec, world).values()] for spec, _ in rows])
        numbers = torch.tensor([TASKS.index(spec.task) for spec, _ in rows])
        self.tasks = {task: (numbers == i).nonzero()[:, 0] for i, task in enumerate(TASKS) if (numbers == i).any()}

    def draw(self, per_task: int, generator: torch.Generator) -> Tensor:
        """Rows of a batch, (tasks * per_task,): each task has the same weight, however many captions it has."""
        drawn = [rows[torch.randint(len(rows), (per_task,), generator=generator)] for rows in self.tasks.values()]
        return torch.cat(drawn)


class Probes(nn.Module):
    """Linear readers of RMS-normalized features: what a caption asks for, and at each word itself and the previous."""

    def __init__(self, width: int, world: ShapesWorld, words: int) -> None:
        super().__init__()
        self.sizes = [number for _, number in questions(world.specs("single_object")[0], world).values()]
        self.of_caption, self.of_words = nn.Linear(width, sum(self.sizes)), nn.Linear(width, 2 * words)

    def loss(self, hidden: Tensor, ids: Tensor, mask: Tensor, wanted: Tensor) -> Tensor:
        """Cross-entropies; those of the answers at the last word and all positions after it, which have seen all."""
        share = (torch.arange(MAX_LENGTH) >= mask.sum(1, keepdim=True) - 1).float()
        share = share / share.sum(1, keepdim=True) / len(share)
        loss = torch.zeros(())
        for logits, answer in zip(self.of_caption(hidden).split(self.sizes, dim=-1), wanted.T, strict=True):
            each = F.cross_entropy(logits.flatten(0, 1), answer.repeat_interleave(MAX_LENGTH), reduction="none")
            loss = loss + (each.view_as(share) * share).sum()
        own, before = self.of_words(hidden[:, 1:]).chunk(2, dim=-1)
        inside = mask[:, 1:].bool()
        for logits, word in ((own, ids[:, 1:]), (before, ids[:, :-1])):
            loss = loss + F.cross_entropy(logits[inside], word[inside])
        return loss

    @torch.no_grad()
    def scores(self, model: LlamaModel, captions: Captions) -> dict[str, float]:
        """Share of captions of each task of which every answer is right, at the last word and the last padding."""
        hidden = normalized(model, captions.ids, captions.mask)
        last = captions.mask.sum(1) - 1
        scores = {}
        for place, vectors in (("last word", hidden[torch.arange(len(last)), last]), ("last padding", hidden[:, -1])):
            read = torch.stack([x.argmax(-1) for x in self.of_caption(vectors).split(self.sizes, dim=-1)], dim=1)
            right = read == captions.wanted
            for task, rows in captions.tasks.items():
                scores[f"{task} at the {place}"] = right[rows].all(1).float().mean().item()
        return scores


def normalized(model: LlamaModel, ids: Tensor, mask: Tensor) -> Tensor:
    """Features (B, T, D) with mean square 1 at each position."""
    return F.rms_norm(model(input_ids=ids, attention_mask=mask).last_hidden_state, (model.config.hidden_size,))


def train(
    steps: int = 1000, lr: float = 3e-3, per_task: int = 64, seed: int = 0, report: int = 100, split: str = "all"
) -> tuple[LlamaModel, dict[str, dict[str, float]]]:
    """The trained model, and the probes' scores on seen and unseen captions, "seen" being those of the train split."""
    torch.manual_seed(seed)
    world = ShapesWorld(split=split)
    captions = Captions(world)
    model = initial_model().requires_grad_(True).train()
    probes = Probes(model.config.hidden_size, world, model.config.vocab_size)
    optimizer = torch.optim.AdamW([*model.parameters(), *probes.parameters()], lr, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    generator = torch.Generator().manual_seed(seed)
    for step in range(steps):
        rows = captions.draw(per_task, generator)
        ids, mask = captions.ids[rows], captions.mask[rows]
        loss = probes.loss(normalized(model, ids, mask), ids, mask, captions.wanted[rows])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if report and (step + 1) % report == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    model.eval().requires_grad_(False)
    sides = {"seen": Captions(ShapesWorld()), "unseen": Captions(ShapesWorld(split="unseen"))}
    scores = {side: probes.scores(model, of_side) for side, of_side in sides.items()}
    scale_norm(model, {"input_ids": captions.ids, "attention_mask": captions.mask})
    return model, scores


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--split", choices=SPLITS, default="all", help="captions to train on")
    args = parser.parse_args(argv)
    model, scores = train(args.steps, seed=args.seed, split=args.split)
    for name, value in scores["seen"].items():
        beside = f", unseen {scores['unseen'][name]:.1%}" if name in scores["unseen"] else ""
        print(f"{name}: {value:.1%}{beside}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, args.out, {"format": "pt"})
    print(f"{args.out.stat().st_size / 1e3:.0f} kB: {args.out}")


if __name__ == "__main__":
    main()
