"""Muon against torch's own, and runs that change the optimizer in the middle."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from latentpipe.train import checkpoint
from latentpipe.train.config import Optimization
from latentpipe.train.optimizer import MuonAdamW, new_optimizer, orthogonal

RATE, DECAY = 1e-2, 0.1


class Net(nn.Module):
    """A table, a first convolution, two matrices (one of them a convolution) and a norm."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(5, 4)
        self.conv_in = nn.Conv2d(3, 4, 3)
        self.middle = nn.Conv2d(4, 6, 3, bias=False)
        self.out = nn.Linear(6, 4)
        self.norm = nn.LayerNorm(4)

    def loss(self, seed: int) -> torch.Tensor:
        generator = torch.Generator().manual_seed(seed)
        images = torch.randn(2, 3, 7, 7, generator=generator)
        rows = self.table(torch.randint(0, 5, (2,), generator=generator))
        return (self.norm(self.out(self.middle(self.conv_in(images)).mean((2, 3)))) - rows).square().mean()


def new(name: str) -> tuple[Net, torch.optim.Optimizer]:
    torch.manual_seed(0)
    net = Net()
    return net, new_optimizer(net, Optimization(steps=9, learning_rate=RATE, weight_decay=DECAY, optimizer=name))  # type: ignore[arg-type]


def steps(net: Net, optimizer: torch.optim.Optimizer, first: int, last: int) -> None:
    for step in range(first, last):
        net.loss(step).backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)


def test_singular_values_become_near_one_and_directions_stay() -> None:
    for shape in ((6, 40), (40, 6)):
        matrix = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        u, values, v = torch.linalg.svd(orthogonal(matrix), full_matrices=False)
        assert values.min() > 0.6
        assert values.max() < 1.25
        wanted = torch.linalg.svd(matrix, full_matrices=False)
        assert torch.linalg.norm(u @ v - wanted.U @ wanted.Vh) < 1e-3


def test_matrices_move_as_by_torchs_muon_and_the_rest_as_by_adamw() -> None:
    net, optimizer = new("muon")
    torch.manual_seed(0)
    twin = Net()
    flat = {
        "middle.weight": nn.Parameter(twin.middle.weight.detach().flatten(1)),
        "out.weight": nn.Parameter(twin.out.weight.detach().clone()),
    }
    muon = torch.optim.Muon(list(flat.values()), lr=RATE, weight_decay=DECAY, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    rest = [parameter for name, parameter in twin.named_parameters() if name not in flat]
    adamw = torch.optim.AdamW(rest, lr=RATE, weight_decay=DECAY)
    assert isinstance(optimizer, MuonAdamW)
    optimizer.dtype = torch.bfloat16  # torch's has no other
    for step in range(4):
        steps(net, optimizer, step, step + 1)
        twin.loss(step).backward()
        named = dict(twin.named_parameters())
        for name, parameter in flat.items():
            gradient = named[name].grad
            assert gradient is not None
            parameter.grad = gradient.flatten(1)
        muon.step()
        adamw.step()
        twin.zero_grad()
        with torch.no_grad():
            for name, parameter in flat.items():
                named[name].copy_(parameter.view_as(named[name]))
    for (name, ours), theirs in zip(net.named_parameters(), twin.parameters(), strict=True):
        # bf16 products in another order of rounding (their division is in place) turn a direction by 1 part in 100
        assert torch.allclose(ours, theirs, atol=RATE / 50 if name in flat else 1e-7), name


@pytest.mark.parametrize(("before", "after"), [("muon", "muon"), ("adamw", "muon"), ("muon", "adamw")])
def test_a_run_resumes_exactly_and_may_change_its_optimizer(tmp_path: Path, before: str, after: str) -> None:
    net, optimizer = new(before)
    steps(net, optimizer, 0, 3)
    checkpoint.save(tmp_path, 3, checkpoint.optimizer_tensors(optimizer), {})
    again, other = new(after)
    again.load_state_dict(net.state_dict())
    found = checkpoint.newest(tmp_path)
    assert found is not None
    checkpoint.restore_optimizer(other, found[0])
    steps(again, other, 3, 6)
    steps(net, optimizer, 3, 6)
    equal = [bool(torch.equal(a, b)) for a, b in zip(net.parameters(), again.parameters(), strict=True)]
    assert all(equal) is (before == after)
    assert all(torch.isfinite(parameter).all() for parameter in again.parameters())
