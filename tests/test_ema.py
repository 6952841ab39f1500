"""EMA and the resumable loader in a real Trainer, on a toy module."""

from __future__ import annotations

import copy

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from emmdit.ema import ema_decay, ema_update
from lightning_modules.callbacks import EMA
from tests.toy import Toy, trainer


def test_ema_decay():
    assert [ema_decay(n, 0.5) for n in (0, 1, 8, 9)] == [0.1, 2 / 11, 0.5, 0.5]
    assert ema_decay(0, 0.5, warmup=False) == 0.5


def test_ema_update_is_float32_with_bfloat16_parameters():
    ema, params = ([torch.ones(3), torch.zeros(())], [torch.full((3,), 2.0, dtype=torch.bfloat16), torch.ones(())])
    ema_update(ema, params, 0.9999)
    assert torch.allclose(ema[0], torch.full((3,), 1.0001), rtol=0, atol=1e-7) and ema[0].dtype == torch.float32
    assert torch.allclose(ema[1], torch.tensor(1e-4))
    with pytest.raises(ValueError):
        ema_update(ema, params[:1], 0.9)


@pytest.mark.parametrize("accumulate,every", [(1, 1), (2, 1), (1, 2)])
def test_ema_by_hand(tmp_path, accumulate, every):
    model = Toy()
    expected = copy.deepcopy(model.ema_denoiser.state_dict())
    callback = EMA(decay=0.15, every_n_steps=every)
    trainer(tmp_path, [callback], accumulate_grad_batches=accumulate, max_steps=4).fit(model)
    after_steps = model.history[accumulate - 1 :: accumulate]  # 5 batches an epoch: the 5th steps alone
    if accumulate == 2:
        after_steps = [model.history[i] for i in (1, 3, 4, 6)]
    updates = after_steps[every - 1 :: every]
    for n, weights in enumerate(updates):
        decay = min(0.15, (1 + n) / (10 + n))
        for name in expected:
            if "running" in name or "batches" in name:
                expected[name] = weights[name]
            else:
                expected[name] = decay * expected[name] + (1 - decay) * weights[name]
    assert callback.updates == len(updates) == 4 // every
    for name, value in model.ema_denoiser.state_dict().items():
        torch.testing.assert_close(value, expected[name])


def test_ema_and_samples_survive_a_resume(tmp_path):
    def run(folder, steps, **options):
        model, ema = Toy(num_workers=options.pop("num_workers", 0)), EMA(decay=0.9)
        checkpoint = ModelCheckpoint(tmp_path / folder, every_n_train_steps=3, save_last=True)
        trainer(tmp_path, [ema, checkpoint], max_steps=steps, enable_checkpointing=True).fit(model, **options)
        return model, ema

    straight, ema = run("straight", 9)
    run("broken", 3)
    resumed, resumed_ema = run("broken", 9, ckpt_path=str(tmp_path / "broken" / "last.ckpt"))
    assert straight.ids[12:] == resumed.ids and len(resumed.ids) == 24  # 20 samples: over the end of an epoch
    assert ema.updates == resumed_ema.updates == 9
    for name, value in straight.state_dict().items():
        if "running" not in name:  # those come from global randomness here
            assert torch.equal(value, resumed.state_dict()[name]), name


def test_loader_resumes_at_an_epoch_end_counted_in_epochs(tmp_path):
    def run(epochs, **options):
        model = Toy()
        checkpoint = ModelCheckpoint(tmp_path / "c", save_last=True)
        options = {"max_steps": -1, "max_epochs": epochs, "enable_checkpointing": True} | options
        ckpt_path = options.pop("ckpt_path", None)
        trainer(tmp_path, [checkpoint], **options).fit(model, ckpt_path=ckpt_path)
        return model.ids

    first = run(1)
    second = run(2, ckpt_path=str(tmp_path / "c" / "last.ckpt"))
    assert sorted(first) == sorted(second) == list(range(20)) and first != second


def test_lightning_epochs_with_a_tail_and_a_limit(tmp_path):
    model = Toy(global_batch=8)  # 20 samples: 3 batches a pass, the third reaches into the next epoch
    trainer(tmp_path, max_steps=10).fit(model)
    assert len(model.ids) == 80 and all(sorted(model.ids[n : n + 20]) == list(range(20)) for n in range(0, 80, 20))
    limited = Toy(global_batch=8)
    trainer(tmp_path, max_steps=10, limit_train_batches=2).fit(limited)
    assert limited.ids == model.ids


def test_ema_without_a_copy_is_refused(tmp_path):
    model = Toy()
    model.ema_denoiser = None
    with pytest.raises(ValueError, match="ema_denoiser"):
        trainer(tmp_path, [EMA()]).fit(model)
    with pytest.raises(ValueError, match="decay"):
        EMA(decay=1.0)
    with pytest.raises(ValueError, match="bf16-mixed"):
        trainer(tmp_path, [EMA()]).fit(Toy().to(torch.bfloat16))
