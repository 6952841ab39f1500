"""Pretrains the shapes world's text model: features from which a linear map reads what a caption asks for.

    python -m benchmarks.train_shapes_text    # two minutes on one thread: emmdit/shapes/text.safetensors

A denoiser is used to text features that a trained language model has put in order: who stands left of whom, which
colour belongs to which shape. A random transformer holds this, too, but only for a reader that undoes its mixing, and
learning to undo it took most of a denoiser's training (docs/shapes_world.md). So the tiny Llama starts from
`shapes_text_model` and learns, over all captions of the world, to let linear readers tell

- at the last word and all after it: how many of each shape there are, the colour of each, and the side on which each
  stands (left, right, above, below of the other);
- at each word: the word itself and the one before it.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from emmdit.shapes import TASKS, ShapesWorld
from emmdit.shapes.text import MAX_LENGTH, WEIGHTS, scale_norm, shapes_text_model, shapes_tokenizer
from emmdit.shapes.world import RELATIONS, Spec

OPPOSITE = dict(zip(RELATIONS, ("right of", "left of", "below", "above"), strict=True))


def answers(spec: Spec, world: ShapesWorld) -> list[int]:
    """For each shape: how many (0..4), its colour (0: none is asked for), its side (0: none)."""
    found = []
    for shape in world.shapes:
        places = [i for i, (name, _) in enumerate(spec.objects) if name == shape]
        color = spec.objects[places[0]][1] if places else None
        side = None
        if spec.relation and places:
            side = spec.relation if places[0] == 0 else OPPOSITE[spec.relation]
        found += [
            len(places),
            0 if color is None else 1 + world.colors.index(color),
            0 if side is None else 1 + RELATIONS.index(side),
        ]
    return found


def train(steps: int = 800, lr: float = 3e-3, seed: int = 0, report: int = 100) -> tuple[nn.Module, dict[str, float]]:
    """The trained model, and the share of right answers of each reader at the last word, and at the last padding."""
    torch.manual_seed(seed)
    world = ShapesWorld()
    specs = [spec for task in TASKS for spec in world.specs(task)]
    tokenizer = shapes_tokenizer(world)
    tokens = tokenizer([s.caption for s in specs], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
    last = mask.sum(1) - 1
    complete = torch.arange(MAX_LENGTH) >= last[:, None]  # positions that have seen the whole caption
    wanted = torch.tensor([answers(spec, world) for spec in specs])  # (N, 12)
    sizes = [5, 1 + len(world.colors), 1 + len(RELATIONS)] * len(world.shapes)

    model = shapes_text_model(world, pretrained=False)
    model.requires_grad_(True).train()
    width = model.config.hidden_size
    readers = nn.Linear(width, sum(sizes))
    words = nn.Linear(width, 2 * len(tokenizer))
    # Each task weighs the same: 360 of the 460 captions are of the last one.
    tags = torch.tensor([TASKS.index(spec.task) for spec in specs])
    weight = (1.0 / torch.bincount(tags).float())[tags]
    weight = weight / weight.sum()

    def read(hidden: Tensor) -> list[Tensor]:
        return list(readers(hidden).split(sizes, dim=-1))

    optimizer = torch.optim.AdamW(
        [*model.parameters(), *readers.parameters(), *words.parameters()], lr, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        hidden = model(**tokens).last_hidden_state
        hidden = F.rms_norm(hidden, (width,))
        share = complete / complete.sum(1, keepdim=True)
        loss = torch.zeros(())
        for logits, answer in zip(read(hidden), wanted.T, strict=True):
            each = F.cross_entropy(logits.flatten(0, 1), answer.repeat_interleave(MAX_LENGTH), reduction="none")
            loss = loss + ((each.view_as(share) * share).sum(1) * weight).sum()
        own, before = words(hidden[:, 1:]).chunk(2, dim=-1)
        inside = mask[:, 1:]
        loss = loss + F.cross_entropy(own[inside], ids[:, 1:][inside])
        loss = loss + F.cross_entropy(before[inside], ids[:, :-1][inside])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()
        if report and (step + 1) % report == 0:
            print(f"step {step + 1}/{steps}  loss {loss.item():.4f}", flush=True)
    model.eval().requires_grad_(False)
    scores = {}
    with torch.no_grad():
        hidden = F.rms_norm(model(**tokens).last_hidden_state, (width,))
        for place, vectors in (("last word", hidden[torch.arange(len(specs)), last]), ("last padding", hidden[:, -1])):
            right = torch.stack([r.argmax(-1) == a for r, a in zip(read(vectors), wanted.T, strict=True)], dim=1)
            for number, name in enumerate(("count", "colour", "side")):
                scores[f"{name} at the {place}"] = right[:, number::3].float().mean().item()
    scale_norm(model, tokens)
    return model, scores


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=WEIGHTS)
    parser.add_argument("--steps", type=int, default=800)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    model, scores = train(args.steps, seed=args.seed)
    for name, value in scores.items():
        print(f"{name}: {value:.1%}")
    args.out.parent.mkdir(parents=True, exist_ok=True)
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, args.out)
    print(f"{args.out.stat().st_size / 1e3:.0f} kB: {args.out}")


if __name__ == "__main__":
    main()
