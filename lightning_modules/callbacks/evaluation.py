"""FID, CLIP score and GenEval during training, over one set of pictures for all of them."""

from __future__ import annotations

import hashlib
import json
import shutil
from abc import ABC
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info

from emmdit.evaluation.geneval import GenEval, summary, write_results
from emmdit.evaluation.geneval.detectors import Detector
from emmdit.evaluation.image_set import ImageSet
from emmdit.evaluation.measure import gather_rows, labelled, measure, prepare
from emmdit.evaluation.metrics.base import ImageMetric
from emmdit.evaluation.metrics.clip import CLIP
from emmdit.evaluation.metrics.clip_score import CLIPScore
from emmdit.evaluation.metrics.features import FeatureExtractor
from emmdit.evaluation.metrics.fid import FID
from emmdit.evaluation.prompts import PromptSet
from lightning_modules.callbacks.throughput import Throughput
from lightning_modules.commands.counter import counter


class EvaluationCallback(Callback, ABC):
    """Draws a prompt set and measures it, every `every_n_steps` optimizer steps and when training ends.

    Every picture has its own seed, the same at each evaluation, and no random state of the training is touched.
    Pictures are drawn with the average's weights, each process its share, into
    `evaluation/step_0001000/NAME-.../` of the run folder. Callbacks that ask for the same pictures at the same step
    share them. Values go to the loggers as `eval/NAME`, with the variant in the name, and to a JSON file beside the
    pictures.

    Args:
        prompts: what to draw.
        metric: what to measure.
        every_n_steps: 0: only at the end.
        weights: "ema" or "raw"; None: the average if there is one.
        seed: of the pictures.
        batch_size: pictures a process draws, and measures, at a time.
        steps, guidance: in place of the model's own sampling settings.
        keep_images: leave the pictures on disk (False: only those of the last evaluation).
    """

    def __init__(
        self,
        prompts: PromptSet,
        metric: ImageMetric,
        every_n_steps: int = 0,
        weights: str | None = None,
        seed: int = 0,
        batch_size: int = 64,
        steps: int | None = None,
        guidance: float | None = None,
        keep_images: bool = False,
    ) -> None:
        self.prompts, self.metric = prompts, metric
        self.every_n_steps, self.weights, self.seed, self.batch_size = every_n_steps, weights, seed, batch_size
        self.settings = {k: v for k, v in (("steps", steps), ("guidance", guidance)) if v is not None}
        self.keep_images = keep_images
        self.latest: dict[str, float] = {}  # on every rank
        self._last = -1

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """What is missing shows before the first step of the training."""
        if stage == "fit":
            prepare([self.metric], self._image_set(trainer), "cpu")

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.every_n_steps and trainer.global_step % self.every_n_steps == 0:
            self.evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.evaluate(trainer, pl_module)

    def evaluate(self, trainer: Trainer, pl_module: LightningModule) -> None:
        step = trainer.global_step
        if step in (0, self._last):
            return
        self._last = step
        Throughput.exclude(trainer)
        images = self.draw(trainer, pl_module)
        device = pl_module.device
        prepare([self.metric], images, device)
        values = measure([self.metric], images, device, self.batch_size)
        self.latest = labelled([self.metric], values, len(images.all))
        rows = gather_rows([self.metric])
        if trainer.is_global_zero:
            self._write(trainer, images, rows)
        if device.type != "cpu":  # the training needs the memory
            self.metric.prepare("cpu")
        rank_zero_info("  ".join(f"{name} {value:.4g}" for name, value in self.latest.items()))

    def draw(self, trainer: Trainer, pl_module: LightningModule) -> ImageSet:
        """The pictures of this step, made now unless another callback has had them made."""
        images = self._image_set(trainer)
        drawn = shared(trainer)
        if drawn.get("step") != trainer.global_step:
            self._remove_old(trainer, drawn)
            drawn.clear()
            drawn["step"] = trainer.global_step
        if str(images.folder) in drawn:
            return images
        # Pictures of an earlier run in the same folder, or of one that was killed here, are not of these weights.
        if trainer.is_global_zero:
            shutil.rmtree(images.folder, ignore_errors=True)
            images.open()
        trainer.strategy.barrier()

        def sample(prompts: list[str], seeds: list[int]) -> Any:
            with trainer.precision_plugin.forward_context():
                return pl_module.sample(prompts, seeds, weights=self.weights, **self.settings)

        progress = counter(f"pictures of {self.prompts.name} drawn at step {trainer.global_step}")
        images.make(sample, self.batch_size, progress if trainer.is_global_zero else None, together=True)
        trainer.strategy.barrier()
        drawn[str(images.folder)] = self.keep_images
        return images

    def _image_set(self, trainer: Trainer) -> ImageSet:
        made_with = {
            "step": trainer.global_step,
            "weights": self.weights or "default",
            "sampling": self.settings,
        }
        asked = json.dumps([self.prompts.describe(), self.seed, made_with], sort_keys=True)
        name = f"{self.prompts.name}-{hashlib.sha256(asked.encode()).hexdigest()[:8]}"
        folder = Path(trainer.default_root_dir, "evaluation", f"step_{trainer.global_step:07d}", name)
        return ImageSet(folder, self.prompts, self.seed, made_with, trainer.global_rank, trainer.world_size)

    def _remove_old(self, trainer: Trainer, drawn: dict[str, Any]) -> None:
        for folder, keep in drawn.items():
            if folder != "step" and not keep and trainer.is_global_zero:
                for pictures in Path(folder).glob("*/samples"):
                    shutil.rmtree(pictures, ignore_errors=True)

    def _write(self, trainer: Trainer, images: ImageSet, rows: list[dict[str, Any]]) -> None:
        step = trainer.global_step
        for logger in trainer.loggers:
            logger.log_metrics({f"eval/{name}": value for name, value in self.latest.items()}, step=step)
        result = {**images.made_with, "metrics": self.latest, "settings": {self.metric.name: self.metric.settings()}}
        (images.folder / f"{self.metric.name}.json").write_text(json.dumps(result, indent=1) + "\n")
        if rows:
            write_results(images.folder / f"{self.metric.name}_results.jsonl", rows)
            (images.folder / f"{self.metric.name}_summary.txt").write_text(f"{summary(rows)}\n")


class FIDCallback(EvaluationCallback):
    """Frechet distance between features of the pictures and those of real ones (`emmdit reference-stats`)."""

    def __init__(self, prompts: PromptSet, features: FeatureExtractor, reference: str, **kwargs: Any) -> None:
        super().__init__(prompts, FID(features, reference), **kwargs)


class CLIPScoreCallback(EvaluationCallback):
    """CLIP score of the pictures with their prompts."""

    def __init__(self, prompts: PromptSet, clip: CLIP, **kwargs: Any) -> None:
        super().__init__(prompts, CLIPScore(clip), **kwargs)


class GenEvalCallback(EvaluationCallback):
    """GenEval, overall and by task; the judge's reasons lie beside the pictures."""

    def __init__(self, prompts: PromptSet, detector: Detector, **kwargs: Any) -> None:
        super().__init__(prompts, GenEval(detector), **kwargs)


def shared(trainer: Trainer) -> dict[str, Any]:
    """What this trainer's evaluation callbacks have drawn at the current step: {folder: whether to keep it}."""
    if not hasattr(trainer, "_evaluation_pictures"):
        trainer._evaluation_pictures = {}
    return trainer._evaluation_pictures
