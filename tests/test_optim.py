"""Muon and AdamW in one optimizer, which parameters get which, and the learning rate's curve."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from emmdit.networks import EMMDiTTransformer2DModel
from emmdit.optim import MuonAdamW, WarmupDecay, orthogonalize, parameter_groups


def network() -> nn.Module:
    torch.manual_seed(0)
    sizes = dict(sample_size=4, in_channels=4, out_channels=4, num_attention_heads=2, attention_head_dim=16)
    return EMMDiTTransformer2DModel(**sizes, block_groups=(1, 1, 1), caption_channels=12, subregion_pattern=("full",))


def step(net: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
    g = torch.Generator().manual_seed(seed)
    optimizer.zero_grad()
    latents, text = torch.randn(2, 4, 4, 4, generator=g), torch.randn(2, 3, 12, generator=g)
    net(latents, torch.tensor([100.0, 900.0]), text).sample.sub(1).square().mean().backward()
    optimizer.step()


def same(one: nn.Module, other: nn.Module, **tolerance: float) -> None:
    for (name, p), q in zip(one.named_parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, msg=lambda m, name=name: f"{name}: {m}", **tolerance)


# -------------------------------------------------------------------------------- AdamW


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_without_matrices_it_is_adamw(weight_decay: float):
    ours, theirs = network(), network()
    settings = dict(lr=1e-2, betas=(0.8, 0.95), eps=1e-6, weight_decay=weight_decay)
    optimizer, reference = MuonAdamW(ours.parameters(), **settings), torch.optim.AdamW(theirs.parameters(), **settings)
    for i in range(5):
        step(ours, optimizer, i)
        step(theirs, reference, i)
    same(ours, theirs, rtol=1e-6, atol=1e-7)


def test_the_second_group_is_adamw_beside_muon():
    g = torch.Generator().manual_seed(0)
    matrix, plain, idle = (nn.Parameter(torch.randn(shape, generator=g)) for shape in ((3, 4), (5,), (2, 2)))
    twin, still = nn.Parameter(plain.detach().clone()), idle.detach().clone()
    groups = [{"params": [matrix, idle], "matrix": True}, {"params": [plain], "lr": 0.3}]
    optimizer = MuonAdamW(groups, lr=0.1, weight_decay=0.5)
    reference = torch.optim.AdamW([twin], lr=0.3, betas=(0.9, 0.95), eps=1e-8, weight_decay=0.5)
    for _ in range(3):
        matrix.grad = torch.randn(3, 4, generator=g)
        plain.grad = torch.randn(5, generator=g)
        twin.grad = plain.grad.clone()
        optimizer.step()
        reference.step()
    assert torch.equal(plain, twin)
    assert torch.equal(idle, still) and idle not in optimizer.state  # without a gradient it stays


def test_closure_gets_gradients_and_its_loss_comes_back():
    p = nn.Parameter(torch.ones(2))
    optimizer = MuonAdamW([p], lr=0.1)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0 and (p < 1).all()


@pytest.mark.parametrize(
    "settings", [{"lr": -1.0}, {"momentum": 1.0}, {"momentum": -0.1}, {"newton_schulz_dtype": "int8"}]
)
def test_impossible_settings_are_refused(settings: dict):
    with pytest.raises(ValueError, match=r"{}.*{}".format(*next(iter(settings.items())))):
        MuonAdamW([nn.Parameter(torch.ones(1))], **settings)


# -------------------------------------------------------------------------------- Muon


@pytest.mark.parametrize("shape", [(16, 16), (8, 32), (32, 8), (3, 24, 12)])
def test_orthogonalize_keeps_directions_and_levels_sizes(shape: tuple[int, ...]):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    found = orthogonalize(matrices)
    assert found.shape == matrices.shape and found.dtype == matrices.dtype
    sizes = torch.linalg.svdvals(found)
    if shape[-1] != shape[-2]:  # a square random matrix has a singular value near 0, which five steps cannot lift
        assert sizes.min() > 0.65
    assert sizes.max() < 1.25
    u, _, vh = torch.linalg.svd(matrices.double(), full_matrices=False)
    assert torch.nn.functional.cosine_similarity(found.double().flatten(), (u @ vh).flatten(), 0) > 0.95


def test_orthogonalize_is_the_same_for_the_transpose_and_any_scale():
    matrix = torch.randn(6, 10)
    torch.testing.assert_close(orthogonalize(matrix.T), orthogonalize(matrix).T)
    torch.testing.assert_close(orthogonalize(matrix * 1e-4), orthogonalize(matrix), rtol=1e-3, atol=1e-4)
    assert torch.equal(orthogonalize(torch.zeros(4, 5)), torch.zeros(4, 5))


def slow_newton_schulz(matrix: Tensor) -> Tensor:
    """The quintic iteration on each singular value, in float64."""
    u, s, vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    s = s / s.square().sum().sqrt()
    for _ in range(5):
        s = 3.4445 * s - 4.7750 * s**3 + 2.0315 * s**5
    return u @ torch.diag(s) @ vh


@pytest.mark.parametrize("shape", [(4, 9), (9, 4)])
def test_muon_steps_by_hand(shape: tuple[int, int]):
    g = torch.Generator().manual_seed(0)
    p = nn.Parameter(torch.randn(shape, generator=g))
    lr, scale, momentum, decay = 0.1, 0.5, 0.9, 0.2
    optimizer = MuonAdamW(
        [{"params": [p], "matrix": True}], lr=lr, muon_lr_scale=scale, momentum=momentum, weight_decay=decay
    )
    expected, buffer = p.detach().double(), torch.zeros(shape, dtype=torch.float64)
    for _ in range(3):
        p.grad = torch.randn(shape, generator=g)
        optimizer.step()
        gradient = p.grad.double()
        buffer = momentum * buffer + (1 - momentum) * gradient
        nesterov = (1 - momentum) * gradient + momentum * buffer
        rate = lr * scale
        expected = expected * (1 - rate * decay) - rate * 0.2 * 9**0.5 * slow_newton_schulz(nesterov)
        torch.testing.assert_close(p.detach().double(), expected, rtol=1e-4, atol=1e-5)


def test_newton_schulz_in_bfloat16_goes_the_same_way():
    g = torch.Generator().manual_seed(0)
    start, gradient = torch.randn(2, 24, 48, generator=g)
    moved = {}
    for dtype in ("float32", "bfloat16"):
        p = nn.Parameter(start.clone())
        p.grad = gradient.clone()
        MuonAdamW([{"params": [p], "matrix": True}], lr=0.1, newton_schulz_dtype=dtype).step()
        assert p.dtype == torch.float32
        moved[dtype] = (p.detach() - start).flatten()
    assert not torch.equal(moved["float32"], moved["bfloat16"])
    assert torch.nn.functional.cosine_similarity(moved["float32"], moved["bfloat16"], 0) > 0.999
    assert moved["bfloat16"].norm().item() == pytest.approx(moved["float32"].norm().item(), rel=0.02)


def test_matrices_of_one_shape_do_not_mix():
    g = torch.Generator().manual_seed(0)
    together = [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((4, 6), (6, 4), (4, 6))]
    alone = [nn.Parameter(p.detach().clone()) for p in together]
    for p, q in zip(together, alone, strict=True):
        p.grad = torch.randn(p.shape, generator=g)
        q.grad = p.grad.clone()
    for params in (together, *([q] for q in alone)):
        MuonAdamW([{"params": params, "matrix": True}], lr=0.1).step()
    for p, q in zip(together, alone, strict=True):
        torch.testing.assert_close(p, q)


def test_state_round_trip_continues_the_same(tmp_path: Path):
    ours = network()
    optimizer = MuonAdamW(parameter_groups(ours), lr=1e-2, weight_decay=0.01)
    for i in range(2):
        step(ours, optimizer, i)
    torch.save({"net": ours.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "state.pt")

    resumed = network()
    again = MuonAdamW(parameter_groups(resumed), lr=5.0)
    state = torch.load(tmp_path / "state.pt", weights_only=True)
    resumed.load_state_dict(state["net"])
    again.load_state_dict(state["optimizer"])
    assert [group["matrix"] for group in again.param_groups] == [True, False]
    for i in range(2, 4):
        step(ours, optimizer, i)
        step(resumed, again, i)
    same(ours, resumed, rtol=0, atol=0)


def test_sharded_parameters_take_the_same_step(tmp_path: Path):
    """DTensor parameters, as under fully_shard, on a group of one process."""
    from torch.distributed.tensor import DTensor, Shard, distribute_tensor, init_device_mesh

    g = torch.Generator().manual_seed(0)
    plain = [nn.Parameter(torch.randn(shape, generator=g)) for shape in ((4, 6), (4, 6), (5,))]
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    try:
        mesh = init_device_mesh("cpu", (1,))
        sharded = [nn.Parameter(distribute_tensor(p.detach().clone(), mesh, [Shard(0)])) for p in plain]
        optimizers = [
            MuonAdamW([{"params": ps[:2], "matrix": True}, {"params": ps[2:]}], lr=0.1, weight_decay=0.1)
            for ps in (plain, sharded)
        ]
        for _ in range(2):
            for p, q in zip(plain, sharded, strict=True):
                p.grad = torch.randn(p.shape, generator=g)
                q.grad = distribute_tensor(p.grad.clone(), mesh, [Shard(0)])
            for optimizer in optimizers:
                optimizer.step()
        for p, q in zip(plain, sharded, strict=True):
            assert isinstance(q.data, DTensor) and all(
                isinstance(v, DTensor) for k, v in optimizers[1].state[q].items() if k != "step"
            )
            torch.testing.assert_close(q.full_tensor(), p.detach(), rtol=1e-6, atol=1e-7)
    finally:
        dist.destroy_process_group()


# -------------------------------------------------------------------------------- groups


def names_by_group(net: nn.Module) -> dict[bool, set[str]]:
    groups = parameter_groups(net)
    names = {id(p): name for name, p in net.named_parameters()}
    found = {group["matrix"]: {names[id(p)] for p in group["params"]} for group in groups}
    assert sum(len(group["params"]) for group in groups) == sum(len(part) for part in found.values())
    return found


def test_matrices_of_the_blocks_and_all_the_rest():
    net = network()
    found = names_by_group(net)
    assert found[True] | found[False] == {name for name, _ in net.named_parameters()}
    kinds = {name.split(".", 2)[2] for name in found[True] if name.startswith("blocks.0.")}
    assert kinds == {
        *(f"attn.{n}.weight" for n in ("to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj")),
        *("attn.to_out.weight", "attn.to_add_out.weight"),
        *(f"{ff}.{n}.weight" for ff in ("ff", "ff_context") for n in ("proj_in", "proj_out")),
    }
    assert all(name.startswith("blocks.") for name in found[True])
    # matrices by their shape, but not by what they are
    assert {"blocks.0.modulation.bias", "blocks.0.modulation.scale", "proj_out.weight", "patch_embed.weight"} <= found[
        False
    ]


def test_frozen_parameters_are_left_out():
    net = network().requires_grad_(False)
    net.blocks[1].requires_grad_(True)
    found = names_by_group(net)
    assert found[True] and found[False] and all(n.startswith("blocks.1.") for n in found[True] | found[False])
    net.requires_grad_(False).proj_out.requires_grad_(True)
    assert names_by_group(net) == {False: {"proj_out.weight", "proj_out.bias"}}  # no empty group


def test_the_blocks_of_a_diffusers_network():
    from diffusers import SD3Transformer2DModel

    sizes = dict(sample_size=4, patch_size=1, in_channels=4, out_channels=4, num_layers=2, pos_embed_max_size=8)
    sizes |= dict(attention_head_dim=8, num_attention_heads=2, caption_projection_dim=16)
    net = SD3Transformer2DModel(**sizes, joint_attention_dim=12, pooled_projection_dim=10)
    found = names_by_group(net)
    assert found[True] and all(n.startswith("transformer_blocks.") and n.endswith(".weight") for n in found[True])
    assert "transformer_blocks.0.attn.to_q.weight" in found[True]
    assert {"pos_embed.proj.weight", "context_embedder.weight", "proj_out.weight"} <= found[False]


# -------------------------------------------------------------------------------- schedule


def curve(steps: int, **settings) -> list[float]:
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    scheduler = WarmupDecay(optimizer, **settings)
    rates = []
    for _ in range(steps):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


def test_warm_up_then_constant_as_released():
    assert curve(6, warmup=4) == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    assert curve(2, warmup=0) == [2.0, 2.0]


def test_decay_over_the_last_part():
    rates = curve(12, warmup=2, total=10, decay=0.4)
    assert rates == pytest.approx([1.0, *[2.0] * 6, 1.5, 1.0, 0.5, 0.0, 0.0])  # never below zero beyond the end


@pytest.mark.parametrize("settings", [{"decay": 0.5}, {"decay": 1.5, "total": 10}, {"decay": -0.1, "total": 10}])
def test_impossible_schedules_are_refused(settings: dict):
    with pytest.raises(ValueError, match=f"decay.*total.*{settings['decay']}"):
        curve(1, **settings)
