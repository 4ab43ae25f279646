"""Bytes of the collectives of a step: by hand, and counted in 2 and 4 gloo ranks against the formula."""

import sys
from pathlib import Path

import pytest
import torch

from launch.reproduce.growth import traffic
from support import pair

IMAGES = 4  # of a rank
CLASSES = 5
METHODS = {  # each with every head size and kind of shards
    "DINO": ("method=dino", "masking=none"),
    "DINO, Sinkhorn-Knopp": ("method=dino", "masking=none", "method.targets=sinkhorn"),
    "iBOT": (),
}
KOLEO = ("method.koleo=0.1", "train.accumulate=2", "speed.checkpointing=blocks", "backbone.depth=3")
PATCHES = (
    "head.patch_prototypes=37",
    "method.patch_loss=token",
    "method.visible_weight=0.5",
    "method.targets=sinkhorn",
)
OTHERS = {
    "none: iBOT, patch head, loss per token, visible patches, Sinkhorn-Knopp": PATCHES,
    "none: iBOT, KoLeo": ("method.koleo=0.1",),
    "none: iBOT, several buckets": ("head.hidden=2048", "head.bottleneck=256", "head.prototypes=512"),
    "fsdp: DINO, global crops only": ("method=dino", "masking=none", "crops.local_number=0"),
    "fsdp: MST, LARS": ("method=mst", "masking=attmask_low", "optimizer=lars"),
    "fsdp: iBOT, KoLeo": ("method.koleo=0.1",),
    "fsdp: iBOT, KoLeo, micro-batches, recomputed blocks": KOLEO,
    "fsdp: DINO, Sinkhorn-Knopp, micro-batches": ("method=dino", "method.targets=sinkhorn", "train.accumulate=4"),
    "hsdp: iBOT, KoLeo, micro-batches, recomputed blocks": KOLEO,
}
TINY = ("debug/tiny", "optimizer.freeze_last_layer=0")
NETWORK = ("backbone.patch_size=8", "backbone.embed_dim=48", "backbone.depth=2", "backbone.num_heads=3")
DISTILL = (
    *("distill/vitt16", *NETWORK, "crops.global_size=32", "crops.local_number=2", "crops.local_size=16"),
    *("method.model=support.tiny_teacher:TinyTeacher", "train.precision=fp32"),
)
WHOLE = {  # methods that are not sharded
    "distill": DISTILL,
    "distill without average, micro-batches": (*DISTILL, "teacher.momentum=null", "train.accumulate=2"),
    "supervised": ("debug/tiny_supervised",),
}
HEADS = {2: ("head.prototypes=64", "head.prototypes=97"), 4: ("head.prototypes=97",)}
SHARDS = {2: ("none", "fsdp"), 4: ("none", "fsdp", "hsdp")}
RANKS = tuple(SHARDS)
NODES = 2  # of hsdp


def cases(ranks):
    """Case: recipe and overrides."""
    made = {
        f"{shard}: {name}, {head}": (*TINY, f"speed.shard={shard}", *words, head)
        for shard in SHARDS[ranks]
        for name, words in METHODS.items()
        for head in HEADS[ranks]
    }
    others = {name: words for name, words in OTHERS.items() if (ranks == 4) == name.startswith("hsdp")}
    made |= {name: (*TINY, f"speed.shard={name.partition(':')[0]}", *words) for name, words in others.items()}
    return made | ({f"none: {name}": words for name, words in WHOLE.items()} if ranks == 2 else {})


def read(words, ranks):
    from maskwise.recipe.reading import read_recipe

    return read_recipe(*words, f"train.batch_size={IMAGES * ranks}", try_model=False)


def inputs(recipe):
    """Return random inputs of this rank's step."""
    if recipe.learns_labels:
        size = recipe.augment.size
        return torch.randn(IMAGES, 3, size, size), torch.full((IMAGES, CLASSES), 1 / CLASSES)
    crops = recipe.crops
    locals_ = torch.randn(crops.local_number * IMAGES, 3, crops.local_size, crops.local_size)
    return torch.randn(2 * IMAGES, 3, crops.global_size, crops.global_size), locals_


def counted(world, words):
    """Return (counted, by formula) of the third step of a trainer."""
    from launch.reproduce.growth.collectives import CollectiveCounter
    from maskwise import build

    recipe = read(words, world.size)
    trainer = build.trainer(recipe, world, images=1000, classes=CLASSES if recipe.learns_labels else None)
    batch = inputs(recipe)
    for _ in range(2):  # DDP rebuilds its buckets after the first
        trainer.step(*batch)
    with CollectiveCounter() as counter:
        trainer.step(*batch)
    return plain(counter.traffic()), plain(traffic.step_traffic(recipe, trainer.method, world.size, nodes=NODES))


def counted_in_a_run(world, folder):
    """Return the traffic of each step of a run, up to the next one's, and that of the formula."""
    from launch.reproduce.growth.collectives import CollectiveCounter
    from maskwise import build
    from maskwise.build.running import run
    from maskwise.engine.trainer import Trainer

    rare = ("train.steps=6", "train.log_every=6", "train.save_every=6", "evaluate.knn_every=0", "train.loggers=null")
    recipe = read((*TINY, *rare), world.size)
    starts, methods, step = [], [], Trainer.step

    def marked(trainer, *arguments, **options):
        starts.append(len(counter.calls))
        methods.append(trainer.method)
        return step(trainer, *arguments, **options)

    with pytest.MonkeyPatch.context() as patch, CollectiveCounter() as counter:
        patch.setattr(Trainer, "step", marked)
        patch.setattr(run, "start_process", lambda recipe: world)
        assert build.train(recipe, folder / "run", quiet=True)["status"] == "complete"
    steps = [plain(traffic.summed(counter.calls[start:end])) for start, end in zip(starts, starts[1:])]
    return steps, plain(traffic.step_traffic(recipe, methods[0], world.size, loop=True))


def plain(made):
    return [(*collective, *volume) for collective, volume in made.items()]


def run_rank():
    from maskwise.distributed.world import World

    world, folder = World.start("cpu"), Path(sys.argv[1])
    chosen = sys.argv[2:] or [*cases(world.size), "run"]
    result = {name: counted(world, words) for name, words in cases(world.size).items() if name in chosen}
    if "run" in chosen:
        result["run"] = counted_in_a_run(world, folder)
    torch.save(result, folder / f"{world.rank}.pt")
    world.close()


@pytest.fixture(scope="module")
def recordings(tmp_path_factory):
    """Counts and formulas of all cases, of rank 0 and of the last."""
    made = {}
    for ranks in RANKS:
        folder = tmp_path_factory.mktemp(f"ranks{ranks}")
        nodes = {"LOCAL_WORLD_SIZE": str(ranks // NODES)} if "hsdp" in SHARDS[ranks] else {}
        pair.end(pair.start(__file__, folder, ranks=ranks, **nodes), seconds=1800)
        made[ranks] = [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in (0, ranks - 1)]
    return made


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_counted_bytes_equal_the_formula(recordings, ranks):
    for recording in recordings[ranks]:
        assert set(cases(ranks)) < set(recording)
        wrong = {name: result for name, result in recording.items() if name != "run" and result[0] != result[1]}
        assert not wrong


@pytest.mark.slow
@pytest.mark.parametrize("ranks", RANKS)
def test_each_step_of_a_run_equals_the_formula(recordings, ranks):
    for recording in recordings[ranks]:
        steps, formula = recording["run"]
        assert len(steps) == 5 and steps[2:] == [formula] * 3
        assert formula[-1] == ("stop signal", "all_reduce", ranks, 1, 8)


if __name__ == "__main__":
    run_rank()
