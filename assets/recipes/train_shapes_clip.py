"""Trains the CLIP of the shapes world (`assets/shapes_clip`) from scratch, scores it and writes its folder and card.

    OMP_NUM_THREADS=1 python -m assets.recipes.train_shapes_clip --out assets/shapes_clip

The loss is contrastive with known truth: a caption is true of many images and an image has several true captions, so
the truth of every (image, caption) pair follows from the scene, and each image is compared with all 460 requests of the
world (those held out of other models' training, too: it is a judge), each in a phrasing drawn at every step; hence with
every near miss: another color, another number, the opposite relation, swapped colors. Captions that are true of only a
part of the image ("a circle" where there are two) are ignored. Auxiliary linear heads help and are
dropped afterwards: one on the patch tokens predicts what each patch shows and on which side of the other object it is,
which makes these tokens worth aligning with; one on the embeddings of images and captions predicts on which side of the
other each shape is. Without the latter neither tower learns which shape is on the left before the other has: the
accuracy against the opposite relation stayed at 50% for 600 steps.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel

from assets.recipes.shapes_truth import Captions, near_misses, patch_targets, sides, stated_sides
from emmdit.evaluation.geneval.prompts import RELATIONS, TASKS
from emmdit.evaluation.metrics.clip import CLIP
from emmdit.optim import MuonAdamW, WarmupDecay
from emmdit.provenance import machine
from emmdit.shapes import PALETTE, SHAPES, Scene, ShapesWorld, render_scene
from emmdit.shapes.text import shapes_tokenizer

IMAGE, PATCH, MAX_LENGTH = 32, 4, 16
VISION = dict(hidden_size=128, intermediate_size=256, num_hidden_layers=4, num_attention_heads=4)
TEXT = dict(hidden_size=64, intermediate_size=192, num_hidden_layers=3, num_attention_heads=4)
DIM = 64
TRAINING_STREAM, HELD_OUT_STREAM = 1_000_000, 2_000_000  # plus --seed; used by no training or evaluation of a model
TASK_WEIGHTS = (0.5, 1.0, 1.5, 0.5, 2.0, 1.0)  # relations and counts are learned last

# -- the model ---------------------------------------------------------------------------------------


def make_model(tokenizer: Any) -> nn.Module:
    """A `CLIPModel` with the weights transformers draws for it from torch's generator."""
    ids = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "bos", "eos")}
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=MAX_LENGTH, projection_dim=DIM, **ids, **TEXT)
    vision = dict(image_size=IMAGE, patch_size=PATCH, projection_dim=DIM, **VISION)
    return CLIPModel(CLIPConfig(text_config=text, vision_config=vision, projection_dim=DIM))


def parameter_groups(model: nn.Module, *heads: nn.Module) -> list[dict[str, Any]]:
    """Muon for the matrices of both towers' layers, AdamW for the rest."""
    groups: dict[bool, list[nn.Parameter]] = {True: [], False: []}
    for name, p in [*model.named_parameters(), *(pair for head in heads for pair in head.named_parameters())]:
        groups[".layers." in name and p.ndim == 2].append(p)
    return [{"params": params, "matrix": matrix} for matrix, params in groups.items()]


def contrast(logits: Tensor, truth: Tensor) -> Tensor:
    """Each true entry of a row against all its false ones; true ones do not compete with each other.

    -log(e^t / (e^t + sum of e^f)), mean over the true ones of a row and then over the rows that have any.
    """
    true, false = truth == 1, truth == 0
    against = logits.masked_fill(~false, -torch.inf).logsumexp(1, keepdim=True)
    losses = F.softplus(against - logits).masked_fill(~true, 0.0)
    counts = true.sum(1)
    return (losses.sum(1) / counts.clamp_min(1))[counts > 0].mean()


def batch_of(scenes: list[Scene], captions: Captions) -> tuple[Tensor, ...]:
    """Pixels (B,3,32,32) in -1..1, truth (B,captions), sides (B,shapes,4), patch targets (B,64), (B,64,4)."""
    pixels = np.stack([render_scene(scene) for scene in scenes]).transpose(0, 3, 1, 2) / np.float32(127.5) - 1
    classes, related = zip(*(patch_targets(scene, PATCH) for scene in scenes), strict=True)
    rows = [[captions.truth(scene) for scene in scenes], [sides(scene) for scene in scenes], classes, related]
    return torch.from_numpy(np.ascontiguousarray(pixels)), *(torch.from_numpy(np.stack(row)) for row in rows)


def known_loss(logits: Tensor, known: Tensor) -> Tensor:
    """Mean binary cross-entropy where `known` is not nan; 0 if it is nan everywhere."""
    given = ~known.isnan()
    return F.binary_cross_entropy_with_logits(logits[given], known[given], reduction="sum") / given.sum().clamp_min(1)


def train(world: ShapesWorld, steps: int, batch_size: int, lr: float, seed: int) -> tuple[nn.Module, Any, list[dict]]:
    """The trained model, its tokenizer, and the rows of the loss curve."""
    # <eos> has id 3: with id 2 CLIP would pool at the highest id
    tokenizer, captions = shapes_tokenizer(MAX_LENGTH, eos=True), Captions(world)
    phrasings = torch.Generator().manual_seed(seed)
    stated = torch.from_numpy(np.stack([stated_sides(spec) for spec in captions.specs])).flatten(1)
    model = make_model(tokenizer).train()
    model.set_attn_implementation("eager")  # twice as fast on a CPU as the fused one, whose backward is slow
    of_patches = nn.Linear(VISION["hidden_size"], 1 + len(SHAPES) * len(PALETTE) + len(RELATIONS))
    of_vectors = nn.Linear(DIM, len(SHAPES) * len(RELATIONS))
    groups = parameter_groups(model, of_patches, of_vectors)
    optimizer = MuonAdamW(groups, lr=lr, newton_schulz_dtype="bfloat16")
    schedule = WarmupDecay(optimizer, warmup=min(50, steps // 4), total=steps, decay=0.6)
    curve, start = [], time.perf_counter()
    for step in range(steps):
        scenes = [world.sample(TRAINING_STREAM + seed, step * batch_size + i) for i in range(batch_size)]
        pixels, truth, known, classes, related = batch_of(scenes, captions)
        tokens = tokenizer(captions.draw(phrasings), padding=True, return_tensors="pt")
        with torch.autocast("cpu", torch.bfloat16):
            seen = model.get_image_features(pixel_values=pixels)
            said = model.get_text_features(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask)
            shown = of_patches(seen.last_hidden_state[:, 1:]).float()
        images, texts = (F.normalize(out.pooler_output.float(), dim=-1) for out in (seen, said))
        logits = model.logit_scale.exp().clamp(max=100) * images @ texts.T
        losses = {
            "contrast": (contrast(logits, truth) + contrast(logits.T, truth.T)) / 2,
            "classes": F.cross_entropy(shown[..., : -len(RELATIONS)].flatten(0, 1), classes.flatten()),
            "relations": known_loss(shown[..., -len(RELATIONS) :], related),
            "image_sides": known_loss(of_vectors(images * DIM**0.5), known.flatten(1)),
            "text_sides": known_loss(of_vectors(texts * DIM**0.5), stated),
        }
        optimizer.zero_grad()
        sum(losses.values()).backward()
        optimizer.step()
        schedule.step()
        if (step + 1) % 50 == 0 or step + 1 == steps:
            row = {"step": step + 1, **{name: loss.item() for name, loss in losses.items()}}
            row["seconds"] = round(time.perf_counter() - start, 1)
            print(", ".join(f"{k} {v:.3g}" for k, v in row.items()), flush=True)
            curve.append(row)
    model.set_attn_implementation("sdpa")
    return model.eval(), tokenizer, curve


# -- scores ------------------------------------------------------------------------------------------


@torch.no_grad()
def scores(clip: CLIP, world: ShapesWorld, scenes_per_task: int, seed: int) -> list[dict[str, Any]]:
    """For each task and kind of near miss, how often the true caption is nearer, on held-out scenes.

    Kind "all false": how often it is nearer than every caption of the world that is false for the scene.
    """
    captions, phrasings = Captions(world), torch.Generator().manual_seed(seed)
    rows = []
    for number, task in enumerate(TASKS):
        only = ShapesWorld(task_weights=tuple(float(i == number) for i in range(len(TASKS))), split="all")
        scenes = [only.sample(HELD_OUT_STREAM + seed, i) for i in range(scenes_per_task)]
        images = torch.from_numpy(np.stack([render_scene(s) for s in scenes])).permute(0, 3, 1, 2)
        cosines = [clip.images(part) @ clip.texts(captions.draw(phrasings)).T for part in images.split(50)]
        found: dict[str, list[float]] = {}
        true_cosines, false_cosines = [], []
        for scene, row in zip(scenes, torch.cat(cosines).cpu().numpy(), strict=True):
            own, truth = row[captions.index[scene.spec.caption]], captions.truth(scene)
            for kind, misses in near_misses(scene.spec, world).items():
                false = [captions.index[m] for m in misses if truth[captions.index[m]] == 0]
                found.setdefault(kind, []).extend((own > row[false]).astype(float).tolist())
            found.setdefault("all false", []).append(float(own > row[truth == 0].max()))
            true_cosines.append(float(own))
            false_cosines.append(float(row[truth == 0].mean()))
        for kind, hits in found.items():
            rows.append({"task": task, "against": kind, "accuracy": statistics.mean(hits), "choices": len(hits)})
        rows[-1] |= {"true": statistics.mean(true_cosines), "false": statistics.mean(false_cosines)}
    return rows


def table(rows: list[dict]) -> str:
    """The scores as Markdown."""
    lines = ["| task | true caption against | accuracy | choices | cosine, true | cosine, false |"]
    lines += ["|---|---|---:|---:|---:|---:|"]
    for row in rows:
        cosines = [f"{row[key]:.3g}" if key in row else "" for key in ("true", "false")]
        cells = [row["task"], row["against"], f"{row['accuracy']:.3g}", str(row["choices"]), *cosines]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def card(clip: CLIP, rows: list[dict], args: argparse.Namespace, curve: list[dict]) -> str:
    """The README of the folder."""
    found, out = machine("cpu"), args.out.name if args.out.is_absolute() else args.out
    parameters = sum(p.numel() for p in clip.model.parameters())
    requests = len(Captions(ShapesWorld(split="all")).specs)
    megabytes = (args.out / "model.safetensors").stat().st_size / 1e6
    command = f"OMP_NUM_THREADS=1 python -m assets.recipes.train_shapes_clip --out {out}"
    command += f" --steps {args.steps} --batch-size {args.batch_size} --seed {args.seed}"
    return f"""# A CLIP of the shapes world

A `CLIPModel` of transformers ({parameters:,} parameters, float16, {megabytes:.1f} MB), trained from scratch on renders
and captions of the shapes world. It scores images of that world and gives patch features for REPA (8 x 8 of
{VISION["hidden_size"]} numbers for an image of {IMAGE} px); other images and words mean nothing to it.

```bash
{command}
```

{args.steps} steps of {args.batch_size} images, seed {args.seed}, {curve[-1]["seconds"]:.0f} s on
{torch.get_num_threads()} of {found["cpu_threads"]} threads of a shared {found["cpu"]}; last contrastive loss
{curve[-1]["contrast"]:.3f}. Other machines and thread counts round differently: a rerun gives a similar model, not the
same bits.

The loss is contrastive with known truth: each image against all {requests} requests of the world, each in one of its
phrasings, every true one a positive; auxiliary linear heads, dropped afterwards, predict what each patch shows, on
which side of the other object it is, and (from the embeddings of images and captions) on which side each shape is. So
this CLIP was supervised with shapes, colors and places, and REPA on it passes these on. Details:
`assets/recipes/train_shapes_clip.py`.

## Scores

How often the true caption is nearer than a false one, on {args.scenes} held-out scenes of each task, with the weights
of this folder, each caption in a phrasing drawn at random. The scenes are new, the captions are not: training sees all
of them, also those that other models do not see. "all false": nearer than every
caption of the world that is false for the image.

{table(rows)}
"""


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True, help="the folder to write")
    parser.add_argument("--steps", type=int, default=900)
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--scenes", type=int, default=500, help="held-out scenes of each task")
    args = parser.parse_args(argv)
    world = ShapesWorld(task_weights=TASK_WEIGHTS, split="all")
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(args.seed)
        model, tokenizer, curve = train(world, args.steps, args.batch_size, args.lr, args.seed)
    half, side = [0.5] * 3, dict(height=IMAGE, width=IMAGE)
    processor = CLIPImageProcessor(size={"shortest_edge": IMAGE}, crop_size=side, image_mean=half, image_std=half)
    for part in (model.half(), tokenizer, processor):
        part.save_pretrained(args.out)
    clip = CLIP(str(args.out))
    rows = scores(clip, world, args.scenes, args.seed)
    (args.out / "README.md").write_text(card(clip, rows, args, curve), encoding="utf-8")
    print(table(rows))


if __name__ == "__main__":
    main()
