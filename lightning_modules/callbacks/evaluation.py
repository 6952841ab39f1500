"""Evaluation during training: FID, CLIP score, GenEval or any other metric of one image set."""

from __future__ import annotations

import hashlib
import json
import math
import shutil
from contextlib import suppress
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info
from torch import Tensor

from emmdit.evaluation.geneval import GenEval
from emmdit.evaluation.geneval.detectors import Detector
from emmdit.evaluation.image_set import ImageSet
from emmdit.evaluation.measure import Scores, measure, prepare
from emmdit.evaluation.metrics.base import ImageMetric
from emmdit.evaluation.metrics.clip import CLIP
from emmdit.evaluation.metrics.clip_score import CLIPScore
from emmdit.evaluation.metrics.features import FeatureExtractor
from emmdit.evaluation.metrics.fid import FID
from emmdit.evaluation.prompts import PromptSet
from lightning_modules.callbacks.image_grid import check_sampling
from lightning_modules.callbacks.stop import check_signals
from lightning_modules.callbacks.survive import Failed, survives, together
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.commands.progress import counter


class Evaluation(Callback):
    """Generates a prompt set and measures it, every `every_n_steps` training steps and when training ends.

    Every image has its own seed, the same at each evaluation, and no random state of the training is touched. Each
    process generates its share, into `evaluation/step_0001000/NAME-.../` of the run folder. Values go to the loggers
    as `eval/NAME`, with the variant in the name, and to `evaluation.json` beside the images; with them the samples,
    seconds and core-seconds of training until then (see `Throughput`). What a resume finds missing is made up for.

    Args:
        prompts: prompt set to generate.
        metrics: what to measure on these images.
        every_n_steps: interval in training steps; 0: only at the end.
        weights: "ema" or "raw"; None: EMA if available.
        seed: of the image set.
        batch_size: images that a process generates, and measures, at a time.
        steps, guidance: sampling settings in place of the model's own.
        keep_images: leave all images on disk (False: only those of the last evaluation).
        stop_at: end the training once a metric, named as in the ledger, is this high: {"geneval_overall": 0.95}.
    """

    after_checkpoint = True  # of the same step: the command line orders callbacks by it

    def __init__(
        self,
        prompts: PromptSet,
        metrics: list[ImageMetric],
        every_n_steps: int = 0,
        weights: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        steps: int | None = None,
        guidance: float | None = None,
        keep_images: bool = False,
        stop_at: dict[str, float] | None = None,
    ) -> None:
        self.prompts, self.metrics = prompts, metrics
        self.every_n_steps, self.weights, self.seed, self.batch_size = every_n_steps, weights, seed, batch_size
        self.settings = {k: v for k, v in (("steps", steps), ("guidance", guidance)) if v is not None}
        self.keep_images, self.stop_at = keep_images, stop_at or {}
        self.latest: dict[str, float] = {}  # on every rank
        self._last: tuple[int, Path] | None = None  # step and folder of the last evaluation

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Missing models and files show before the first step of the training."""
        if stage == "fit":
            prepare(self.metrics, self._image_set(trainer, 0), "cpu")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The run was killed between a checkpoint and the end of the evaluation of its step."""
        if self._lacks(trainer, pl_module.training_steps):
            self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        step = pl_module.training_steps
        if self.every_n_steps and step % self.every_n_steps == 0:
            self.evaluate(trainer, pl_module, step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluate(trainer, pl_module, pl_module.training_steps)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The same as at the start, where a resume has no step left to train."""
        if self._lacks(trainer, pl_module.training_steps):
            self.on_train_end(trainer, pl_module)

    def _lacks(self, trainer: Trainer, step: int) -> bool:
        written = self._image_set(trainer, step).folder / "evaluation.json"
        return step > 0 and not trainer.strategy.broadcast(written.is_file())  # rank zero looks for all

    def check(self, pl_module: LightningModule) -> None:
        """Raise a ValueError for prompts and settings that the module cannot sample, before anything is allocated."""
        check_sampling(pl_module, [line["prompt"] for line in self.prompts.lines], [self.weights], self.settings)

    def evaluate(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        """Generate, measure and log, unless that was done at this step. A failure costs a warning."""
        if step not in (0, (self._last or (0, None))[0]) and not trainer.fast_dev_run:
            with Throughput.paused(trainer), suppress(Failed):
                self._evaluate(trainer, pl_module, step)

    def _evaluate(self, trainer: Trainer, pl_module: LightningModule, step: int) -> None:
        what = f"The evaluation {self.prompts.name} of step {step}"
        last_folder = self._last[1] if self._last else None
        if trainer.is_global_zero and last_folder is not None and not self.keep_images:
            for samples in last_folder.glob("*/samples"):
                shutil.rmtree(samples, ignore_errors=True)
        images = self._image_set(trainer, step)
        self._last = step, images.folder
        device = pl_module.device
        together(trainer, what, lambda: self._generate(trainer, pl_module, images, step))
        together(trainer, what, lambda: prepare(self.metrics, images, device))
        scores = together(trainer, what, lambda: measure(self.metrics, images, device, self.batch_size))
        self.latest = scores.metrics
        if any(scores.families.get(name, -math.inf) >= value for name, value in self.stop_at.items()):
            trainer.should_stop = True
        if trainer.is_global_zero:
            with survives(what):
                self._write(trainer, pl_module, images, scores, step)
        if device.type != "cpu":  # the training needs the memory
            for metric in self.metrics:
                metric.prepare("cpu")
        rank_zero_info("  ".join(f"{name} {value:.4g}" for name, value in self.latest.items()))

    def _generate(self, trainer: Trainer, pl_module: LightningModule, images: ImageSet, step: int) -> None:
        # Images of an earlier run in the same folder, or of one that was killed here, are not of these weights.
        if trainer.is_global_zero:
            shutil.rmtree(images.folder, ignore_errors=True)
        images.open()

        def sample(prompts: list[str], seeds: list[int]) -> Tensor:
            check_signals(trainer, pl_module)
            with trainer.precision_plugin.forward_context():
                return pl_module.sample(prompts, seeds, weights=self.weights, **self.settings)

        progress = counter(f"images of {self.prompts.name} at step {step}") if trainer.is_global_zero else None
        images.make(sample, self.batch_size, progress, together=True)

    def _image_set(self, trainer: Trainer, step: int) -> ImageSet:
        made_with = {"step": step, "weights": self.weights or "default", "sampling": self.settings}
        asked = [self.prompts.describe(), self.seed, made_with, [metric.name for metric in self.metrics]]
        digest = hashlib.sha256(json.dumps(asked, sort_keys=True).encode()).hexdigest()[:8]
        folder = Path(trainer.default_root_dir, "evaluation", f"step_{step:07d}", f"{self.prompts.name}-{digest}")
        return ImageSet(folder, self.prompts, self.seed, made_with, trainer.global_rank, trainer.world_size)

    def _write(self, trainer: Trainer, pl_module: LightningModule, images: ImageSet, scores: Scores, step: int) -> None:
        training = {key: value for meter in Throughput.of(trainer) for key, value in meter.totals.items()}
        values = {f"eval/{name}": value for name, value in scores.metrics.items()}
        values |= {f"throughput/training_{name}": value for name, value in training.items()}
        for logger in trainer.loggers:
            logger.log_metrics(values, step=step)
        result = {"metrics": scores.metrics, "ledger_metrics": scores.families}
        result |= {"settings": {metric.name: metric.settings() for metric in self.metrics}}
        result |= {"prompts": self.prompts.describe(), "training": {"samples": pl_module.samples_seen, **training}}
        scores.write(images.folder, {**images.made_with, **result})


class FIDCallback(Evaluation):
    """`Evaluation` with FID alone and its default settings."""

    def __init__(self, prompts: PromptSet, features: FeatureExtractor, reference: str, every_n_steps: int = 0) -> None:
        super().__init__(prompts, [FID(features, reference)], every_n_steps)


class CLIPScoreCallback(Evaluation):
    """`Evaluation` with the CLIP score alone and its default settings."""

    def __init__(self, prompts: PromptSet, clip: CLIP, every_n_steps: int = 0) -> None:
        super().__init__(prompts, [CLIPScore(clip)], every_n_steps)


class GenEvalCallback(Evaluation):
    """`Evaluation` with GenEval alone and its default settings."""

    def __init__(self, prompts: PromptSet, detector: Detector, every_n_steps: int = 0) -> None:
        super().__init__(prompts, [GenEval(detector)], every_n_steps)
