"""Time of a training step for each row of the shapes world's ablations, the rows taking turns in one process.

    python -m benchmarks.shapes_step_time --json benchmarks/results/shapes_step_time.json

The runs of the ablation are days and neighbours apart, so their times do not compare. Here each row's step is timed in
turn, round by round, so that what slows the machine down falls on all alike: read the ratios. A step is what training
does on one batch: codec, text, forward and backward pass, clipping, optimizer, and the average of the weights.
"""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.common import ROOT, argument_parser, interleaved, markdown_table, progress, show, write_json
from benchmarks.shapes_ablation import FULL, ROWS, Task
from emmdit.provenance import machine
from lightning_modules.callbacks.ema import update
from lightning_modules.commands.fit import SuiteCLI
from lightning_modules.commands.main import quiet

COLUMNS = {
    "experiment": "row",
    "parameters": "parameters",
    "ms": "ms a step",
    "ms_low": "fastest round",
    "ms_high": "slowest",
    "ratio": f"ratio to shapes/{FULL}",
}


def training_step(name: str, device: torch.device, extra: list[str]) -> tuple[Callable[[], None], int]:
    """One step of the row `name` on a batch of its own data, and its number of parameters (as exported)."""
    task = Task(name, 0, Path("runs"))
    files = [part for file in task.files for part in ("-c", str(ROOT / file))]
    with TemporaryDirectory() as folder:
        run = SuiteCLI(args=[*files, f"--trainer.default_root_dir={folder}", *extra], run=False, exit_on_error=False)
    module, trainer = run.model, run.trainer
    module.trainer = run.datamodule.trainer = trainer
    trainer.strategy.connect(module)
    module.configure_model()
    module.to(device)
    module._move_frozen()
    configured = module.configure_optimizers()
    optimizer, scheduler = configured["optimizer"], configured["lr_scheduler"]["scheduler"]
    batch = next(iter(run.datamodule.train_dataloader()))
    batch = {key: value.to(device) if isinstance(value, torch.Tensor) else value for key, value in batch.items()}
    parameters = [p for p in module.denoiser.parameters() if p.requires_grad]

    def step() -> None:
        with trainer.precision_plugin.forward_context():
            done = module.forward_step(batch)
            loss = (done.prediction - done.target).square().mean()
            for component in module.components:
                loss = loss + component.weight * component(done)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, trainer.gradient_clip_val or float("inf"))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad(set_to_none=True)
        update(module.ema_denoiser, module.denoiser, 0.999)

    projector = sum(p.numel() for name, p in module.denoiser.named_parameters() if name.startswith("repa_projector."))
    return step, sum(p.numel() for p in parameters) - projector


def measure(names: list[str], device: torch.device, rounds: int, extra: list[str]) -> list[dict[str, Any]]:
    steps, parameters = {}, {}
    for name in names:
        steps[name], parameters[name] = training_step(name, device, extra)
        progress(f"  {name} built")
    timings = interleaved(steps, device, rounds, min_seconds=1.0)
    return [
        {
            "experiment": f"shapes/{name}",
            "parameters": parameters[name],
            "ms": timing.median * 1e3,
            "ms_low": timing.low * 1e3,
            "ms_high": timing.high * 1e3,
            "ratio": timing.median / timings[FULL].median if FULL in timings else None,
        }
        for name, timing in timings.items()
    ]


def main(argv: list[str] | None = None) -> None:
    parser = argument_parser(__doc__.splitlines()[0])
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=list(ROWS), metavar="ROW", help=", ".join(ROWS))
    parser.add_argument("--rounds", type=int, help="turns of each row; default 11, --quick 3")
    parser.add_argument("--precision", help="bf16-mixed or 32-true; default: the base's own")
    args = parser.parse_args(argv)
    device, rounds = torch.device(args.device), args.rounds or (3 if args.quick else 11)
    accelerator = "gpu" if device.type == "cuda" else device.type
    extra = [f"--trainer.accelerator={accelerator}", "--trainer.devices=1"]
    extra += [f"--trainer.precision={args.precision}"] if args.precision else []
    quiet()
    for logger in ("lightning.pytorch", "lightning.fabric"):
        logging.getLogger(logger).setLevel(logging.WARNING)
    found = machine(device)
    rows = measure(args.rows, device, rounds, extra)
    show("Shapes world: time of a training step", found, [markdown_table(rows, COLUMNS)])
    if args.json is not None:
        settings = {"rounds": rounds, "precision": args.precision or "the base's"}
        write_json(args.json, {"benchmark": "shapes_step_time", "machine": found, "settings": settings, "rows": rows})


if __name__ == "__main__":
    main()
