"""Where masks fall: closed forms with an encoder that knows, one that does not, and one that knows the contrary."""

from types import SimpleNamespace

import pytest
import torch
from torch import nn

from maskwise.data.shapes import Shapes
from maskwise.evaluation.hiding import hiding
from maskwise.functional.errors import UserError

COUNT, SIZE, PATCH = 24, 48, 8


class Seer(nn.Module):
    """Finds objects by looking them up: attention 1 on object patches (or -1), and a little noise by position."""

    def __init__(self, data, sign=1.0):
        super().__init__()
        self.anchor = nn.Parameter(torch.zeros(()))
        self.known = {data.image(i).float().sum().item(): data.mask(i) for i in range(len(data))}
        self.sign = sign

    def transform(self, image):
        return image.float()

    def uncoloured(self, image):
        return image

    def forward(self, images):
        side = SIZE // PATCH
        covers = [self.known[image.sum().item()].double().unflatten(1, (side, PATCH)).unflatten(0, (side, PATCH)).mean(dim=(1, 3)) for image in images]
        attention = torch.stack(covers).flatten(1).float()
        attention = torch.softmax(8 * self.sign * attention, 1)
        return SimpleNamespace(attention=attention[:, None].expand(-1, 3, -1), grid=(side, side))


@pytest.fixture(scope="module")
def data():
    return Shapes(COUNT, size=SIZE)


def truth(data):
    side = SIZE // PATCH
    return torch.stack([data.mask(i).double().unflatten(1, (side, PATCH)).unflatten(0, (side, PATCH)).mean(dim=(1, 3)).flatten() >= 0.5 for i in range(COUNT)])


def test_closed_forms(data):
    on = truth(data)
    hidden = int(on.shape[1] * 0.3)
    report = hiding(Seer(data), data, maskings=("attmask_high", "attmask_low", "random", "block"), untrained=Seer(data, -1.0))
    numbers = report.numbers
    assert numbers["chance"] == pytest.approx(100 * on.double().mean().item())
    best = 100 * on.sum(1).clamp(max=hidden).sum().item() / (hidden * COUNT)
    assert numbers["attmask_high"] == pytest.approx(best)
    worst = 100 * (hidden - (~on).sum(1)).clamp(min=0).sum().item() / (hidden * COUNT)
    assert numbers["attmask_low"] == pytest.approx(worst) == pytest.approx(numbers["attmask_high_untrained"])
    assert numbers["attmask_low_untrained"] == pytest.approx(best)
    assert abs(numbers["random"] - numbers["chance"]) < 6
    assert numbers["attention"] > 90 > 10 > numbers["attention_untrained"]
    assert "random_untrained" not in numbers
    assert report.protocol["images"] == COUNT and report.protocol["ratio"] == 0.3


def test_mode_and_random_state_are_left_alone(data):
    encoder = Seer(data).train()
    before = torch.random.get_rng_state()
    hiding(encoder, {"test": data}, limit=8)
    assert encoder.training and torch.equal(before, torch.random.get_rng_state())


def test_two_ranks_equal_one(data):
    whole = hiding(Seer(data), data, limit=21).numbers
    sums = []

    def world(rank, all_sum):
        return SimpleNamespace(rank=rank, size=2, all_sum=all_sum)

    for rank in (0, 1):
        hiding(Seer(data), data, world(rank, lambda totals: sums.append(totals) or totals), limit=21)
    together = hiding(Seer(data), data, world(0, lambda totals: sums[0] + sums[1]), limit=21).numbers
    assert together == pytest.approx(whole)


def test_mistakes_end_in_one_line(data):
    with pytest.raises(UserError, match="no object masks"):
        hiding(Seer(data), SimpleNamespace(labels=None))
    with pytest.raises(UserError, match="attmask_hihg"):
        hiding(Seer(data), data, maskings=("attmask_hihg",))
