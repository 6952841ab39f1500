"""Pretrains the text model of the shapes world, so that linear probes read from it what a caption asks for.

    python -m assets.recipes.train_shapes_text    # two minutes on one thread: writes emmdit/shapes/text.safetensors

A denoiser expects features of a trained language model, which bind words: who is left of whom, which color belongs to
which shape. A random transformer holds this information, too, but not linearly, and learning to decode it took most of
a denoiser's training (docs/shapes_world.md). The tiny Llama starts from `initial_model` and learns, over all captions
of the world, features from which linear probes predict

- at the last word and all positions after it: the count of each shape, its color, and its side (left of, right of,
  above, below the other);
- at each word: the word itself and the previous one.
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

from assets.recipes.shapes_truth import OPPOSITE
from emmdit.evaluation.geneval.prompts import RELATIONS, TASKS
from emmdit.shapes import ShapesWorld, Spec
from emmdit.shapes.text import MAX_LENGTH, WEIGHTS, shapes_tokenizer, text_config

LOOK_BACK = (1, 2, 4, 7)  # words; one head each, in every layer
# Chosen by linear probes: sharper heads forget the words in between, blunter ones the order.
CONSTANT = 3.0  # of the direction that queries and keys share, where a word's own channels have variance 1
SHARPNESS, CONTENT = 0.7, 0.3  # of attention by distance, and by word


def answers(spec: Spec, world: ShapesWorld) -> list[int]:
    """For each shape: its count (0..4), its color (0: none is asked for), its side (0: none)."""
    found = []
    for shape in world.shapes:
        places = [i for i, (name, _) in enumerate(spec.objects) if name == shape]
        color = spec.objects[places[0]][1] if places else None
        side = None
        if spec.relation and places:
            side = spec.relation if places[0] == 0 else OPPOSITE[spec.relation]
        found += [len(places), (None, *world.colors).index(color), (None, *RELATIONS).index(side)]
    return found


def initial_model(seed: int = 0) -> LlamaModel:
    """Random weights, except that queries and keys share one constant direction, by which each head attends a fixed
    number of words back (RoPE turns a constant query and key into a function of their distance)."""
    tokenizer = shapes_tokenizer()
    with torch.random.fork_rng(devices=[]):  # the constructor draws weights; these replace them
        model = LlamaModel(text_config(tokenizer)).eval().requires_grad_(False)
    _set_weights(model, torch.Generator().manual_seed(seed))
    captions = [spec.caption for task in TASKS for spec in ShapesWorld().specs(task)]
    scale_norm(model, tokenizer(captions, padding="max_length", max_length=MAX_LENGTH, return_tensors="pt"))
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


def train(steps: int = 800, lr: float = 3e-3, seed: int = 0, report: int = 100) -> tuple[nn.Module, dict[str, float]]:
    """The trained model, and the accuracy of each probe at the last word and at the last padding."""
    torch.manual_seed(seed)
    world = ShapesWorld()
    specs = [spec for task in TASKS for spec in world.specs(task)]
    tokenizer = shapes_tokenizer()
    tokens = tokenizer([s.caption for s in specs], padding="max_length", max_length=MAX_LENGTH, return_tensors="pt")
    ids, mask = tokens["input_ids"], tokens["attention_mask"].bool()
    last = mask.sum(1) - 1
    complete = torch.arange(MAX_LENGTH) >= last[:, None]  # positions that have seen the whole caption
    wanted = torch.tensor([answers(spec, world) for spec in specs])  # (N, 12)
    sizes = [5, 1 + len(world.colors), 1 + len(RELATIONS)] * len(world.shapes)

    model = initial_model().requires_grad_(True).train()
    width = model.config.hidden_size
    probes = nn.Linear(width, sum(sizes))
    words = nn.Linear(width, 2 * len(tokenizer))
    # Each task has the same weight: 360 of the 460 captions belong to the last one.
    tags = torch.tensor([TASKS.index(spec.task) for spec in specs])
    weight = (1.0 / torch.bincount(tags).float())[tags]
    weight = weight / weight.sum()

    def read(hidden: Tensor) -> list[Tensor]:
        return list(probes(hidden).split(sizes, dim=-1))

    optimizer = torch.optim.AdamW(
        [*model.parameters(), *probes.parameters(), *words.parameters()], lr, weight_decay=0.01
    )
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, lr, total_steps=steps)
    for step in range(steps):
        hidden = F.rms_norm(model(**tokens).last_hidden_state, (width,))
        share = complete / complete.sum(1, keepdim=True)
        loss = torch.zeros(())
        for logits, answer in zip(read(hidden), wanted.T, strict=True):
            each = F.cross_entropy(logits.flatten(0, 1), answer.repeat_interleave(MAX_LENGTH), reduction="none")
            loss = loss + ((each.view_as(share) * share).sum(1) * weight).sum()
        own, before = words(hidden[:, 1:]).chunk(2, dim=-1)
        inside = mask[:, 1:]
        for logits, word in ((own, ids[:, 1:]), (before, ids[:, :-1])):
            loss = loss + F.cross_entropy(logits[inside], word[inside])
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
            for number, name in enumerate(("count", "color", "side")):
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
    save_file({name: tensor.contiguous() for name, tensor in model.state_dict().items()}, args.out, {"format": "pt"})
    print(f"{args.out.stat().st_size / 1e3:.0f} kB: {args.out}")


if __name__ == "__main__":
    main()
