"""DDP sends buckets of gradients while the backward pass still computes others: order of events in two gloo ranks."""

import sys
from pathlib import Path

import pytest
import torch

from launch.reproduce.growth.traffic import BUCKET_LIMITS, bucket_sizes
from support import pair

IMAGES = 2  # of a rank
NETWORK = (  # 12 million weights: three buckets
    *("backbone.embed_dim=512", "backbone.depth=3", "backbone.num_heads=8"),
    *("head.hidden=1024", "head.bottleneck=256", "head.prototypes=4096"),
)


def events(world, *words):
    """Return the events of the third step in order: ("ready", bytes) of a gradient, ("sent", bytes) of a bucket."""
    from launch.reproduce.growth.collectives import CollectiveCounter
    from maskwise import build
    from maskwise.recipe.reading import read_recipe

    recipe = read_recipe("debug/tiny", *NETWORK, *words, f"train.batch_size={IMAGES * world.size}")
    trainer = build.trainer(recipe, world, images=1000)
    crops = torch.randn(2 * IMAGES, 3, 32, 32), torch.randn(2 * IMAGES, 3, 16, 16)
    for _ in range(2):  # DDP rebuilds its buckets after the first
        trainer.step(*crops)
    counter = CollectiveCounter()
    for parameter in trainer.method.parameters():
        if parameter.requires_grad:
            parameter.register_post_accumulate_grad_hook(
                lambda ready: counter.calls.append(("ready", "", 0, ready.nbytes))
            )
    with counter:
        trainer.step(*crops)
    names = {"ready": "ready", "gradients": "sent"}
    return [(names[purpose], size) for purpose, _, _, size in counter.calls if purpose in names]


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    pair.end(pair.start(__file__, folder), seconds=900)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.slow
def test_buckets_are_sent_before_the_last_gradient_is_ready(recordings):
    for recording in recordings:
        kinds = [kind for kind, _ in recording["step"]]
        sent = [place for place, kind in enumerate(kinds) if kind == "sent"]
        last_gradient = len(kinds) - 1 - kinds[::-1].index("ready")
        assert sent[0] < last_gradient, "the first bucket waits for the end of the backward pass"
        assert [place < last_gradient for place in sent] == [True] * (len(sent) - 1) + [False]
        early = sum(size for kind, size in recording["step"][:last_gradient] if kind == "sent")
        assert early > sum(size for kind, size in recording["step"] if kind == "sent") / 2


@pytest.mark.slow
def test_buckets_are_those_of_the_formula(recordings):
    for recording in recordings:
        ready = [size for kind, size in recording["step"] if kind == "ready"]
        sent = [size for kind, size in recording["step"] if kind == "sent"]
        assert sent == bucket_sizes(ready) and len(sent) == 3
        assert sent[0] >= BUCKET_LIMITS[0] and sent[1] >= BUCKET_LIMITS[1]
    assert recordings[0]["step"] == recordings[1]["step"]


@pytest.mark.slow
def test_micro_batches_send_their_sum_once(recordings):
    for recording in recordings:
        kinds = [kind for kind, _ in recording["micro-batches"]]
        count = kinds.count("ready") // 2
        assert set(kinds[:count]) == {"ready"} and kinds.count("sent") == 3
        assert recording["micro-batches"][count:] == recording["step"]


def run_rank():
    from maskwise.distributed.world import World

    world = World.start("cpu")
    made = {"step": events(world), "micro-batches": events(world, "train.accumulate=2")}
    torch.save(made, Path(sys.argv[1]) / f"{world.rank}.pt")
    world.close()


if __name__ == "__main__":
    run_rank()
