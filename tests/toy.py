"""A small module that keeps the contract the callbacks rely on, its data, and a quiet Trainer."""

from __future__ import annotations

import copy
from pathlib import Path

import lightning.pytorch as pl
import torch

from emmdit.data.loader import ResumableLoader
from emmdit.data.stream import Order
from lightning_modules.callbacks import ProgressBar


class Points(torch.utils.data.Dataset):
    """20 points; point `bad` is not a number."""

    def __init__(self, bad: tuple[int, ...] = ()) -> None:
        self.bad = bad

    def __len__(self) -> int:
        return 20

    def __getitem__(self, index: int) -> dict:
        x = torch.tensor([index / 10, 1.0])
        return {"image": x * float("nan") if index in self.bad else x, "caption": str(index)}


class Unshuffled(Order):
    """The samples as they stand in the dataset, epoch after epoch."""

    def indices(self, positions):
        return positions % self.length


class Toy(pl.LightningModule):
    """The contract that the callbacks rely on: denoiser, ema_denoiser, samples_seen, training_steps."""

    def __init__(self, dataset=None, momentum: float = 0.0, shuffle: bool = True, **loader) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.denoiser = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3, affine=False))
        self.ema_denoiser = copy.deepcopy(self.denoiser).requires_grad_(False)
        self.dataset, self.loader, self.momentum = dataset or Points(), {"global_batch": 4} | loader, momentum
        self.samples_seen = self.training_steps = 0
        self.order = (Order if shuffle else Unshuffled)(len(self.dataset))
        self.history, self.ids = [], []

    def train_dataloader(self):
        return ResumableLoader(self.dataset, self.order, samples_seen=self.samples_seen, **self.loader)

    def training_step(self, batch, batch_idx):
        self.samples_seen += len(batch["sample_id"])
        self.ids += batch["sample_id"].tolist()
        loss = (self.denoiser[0](batch["image"]) ** 2).mean()
        self.denoiser[1](torch.randn(4, 3))  # moves the buffers
        self.log("loss", loss, prog_bar=True)
        return loss

    def optimizer_step(self, *args, **kwargs):
        super().optimizer_step(*args, **kwargs)
        self.training_steps += 1

    def on_train_batch_end(self, *args):
        self.history.append(copy.deepcopy(self.denoiser.state_dict()))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.1, momentum=self.momentum, weight_decay=0.1)

    def on_save_checkpoint(self, checkpoint):
        checkpoint["samples_seen"], checkpoint["training_steps"] = self.samples_seen, self.training_steps

    def on_load_checkpoint(self, checkpoint):
        self.samples_seen, self.training_steps = checkpoint["samples_seen"], checkpoint["training_steps"]


def trainer(folder: Path, callbacks=(), **options) -> pl.Trainer:
    defaults = {
        "max_steps": 6,
        "accelerator": "cpu",
        "logger": False,
        "enable_checkpointing": False,
        "enable_progress_bar": any(isinstance(c, ProgressBar) for c in callbacks),
        "enable_model_summary": False,
        "use_distributed_sampler": False,
        "log_every_n_steps": 1,
        "default_root_dir": folder,
    }
    return pl.Trainer(callbacks=list(callbacks), **(defaults | options))


class Metrics(pl.loggers.logger.Logger):
    """Keeps what it is given."""

    name, version = "", ""

    def __init__(self, folder: Path) -> None:
        super().__init__()
        self.rows, self.params, self.save_dir_ = [], {}, str(folder)

    save_dir = property(lambda self: self.save_dir_)

    def log_metrics(self, metrics, step=None):
        self.rows.append((step, metrics))

    def log_hyperparams(self, params):
        self.params.update(params)

    def values(self, key: str) -> list[float]:
        return [metrics[key] for _, metrics in self.rows if key in metrics]
