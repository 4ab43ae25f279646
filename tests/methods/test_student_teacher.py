"""Common to DINO and iBOT: the teacher, the centers' timing, keyed draws, the split into ranks."""

import copy

import pytest
import torch
from torch import nn

from maskwise.engine.optim import check_groups, parameter_groups
from maskwise.errors import UserError
from support.temperatures import WARM_UP
from support.tiny_networks import crops, method, part, run_ranks


def forward(made, batch, step=0, epoch=0, **options):
    global_crops, local_crops, ids = batch
    return made(global_crops, local_crops, step=step, epoch=epoch, sample_ids=ids, **options)


def test_the_teacher_is_the_student_without_mask_token_or_gradients():
    from maskwise.methods import IBOT
    from maskwise.methods.masking import MASKINGS

    source = method(drop_path=0.5)
    made = IBOT(copy.deepcopy(source.student.encoder), copy.deepcopy(source.student.head), MASKINGS["block"]())
    student, teacher = (dict(network.named_parameters()) for network in (made.student, made.teacher))
    assert [name for name in student if name not in teacher] == [name for name in student if "mask_token" in name]
    assert all(torch.equal(p, student[name]) and p is not student[name] for name, p in teacher.items())
    assert not any(p.requires_grad for p in teacher.values())
    assert not any("mask_token" in name for name in made.teacher.state_dict())
    assert made.train().teacher.training


def test_the_teacher_drops_no_path_and_the_student_does():
    made = method(drop_path=0.9)
    x, keys = crops()[0], torch.arange(8)
    student, teacher = (
        [network.encoder(x, drop_key=key).pooled for key in (keys, keys + 8)]
        for network in (made.student, made.teacher)
    )
    assert torch.equal(*teacher)
    assert not torch.equal(*student)


def test_forward_changes_no_state():
    made = method()
    before = copy.deepcopy(made.state_dict())
    forward(made, crops())["loss"].backward()
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_the_loss_uses_the_centers_from_before_the_step():
    made, batch = method(), crops()
    with torch.no_grad():
        look = made.teacher.encoder(batch[0])
        means = [made.teacher.head(look.pooled).mean(0), made.teacher.head(look.patches).mean((0, 1))]
    made.center.normal_(std=0.1)
    made.patch_center.normal_(std=0.1)
    old = [made.center.clone(), made.patch_center.clone()]
    first = forward(made, batch)["loss"]
    made.update_teacher(1.0)
    torch.testing.assert_close(made.center, 0.9 * old[0] + 0.1 * means[0], rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(made.patch_center, 0.9 * old[1] + 0.1 * means[1], rtol=1e-12, atol=1e-14)
    assert forward(made, batch)["loss"].item() != pytest.approx(first.item(), rel=1e-9)


def test_the_centers_are_those_of_the_teacher_that_made_the_targets():
    """The mean logits are taken before the teacher moves."""
    made, batch = method(), crops()
    expected = made.teacher.head(made.teacher.encoder(batch[0]).pooled).mean(0) * 0.1
    forward(made, batch)
    made.update_teacher(0.0)
    torch.testing.assert_close(made.center, expected.detach(), rtol=1e-12, atol=1e-14)


def test_micro_batches_of_one_step_share_their_centers():
    whole, halves = method(), method()
    global_crops, local_crops, ids = crops()
    forward(whole, (global_crops, local_crops, ids), step=3)
    for rows in ([0, 1], [2, 3]):
        forward(halves, (part(global_crops, rows, 4), part(local_crops, rows, 4), ids[rows]), step=3)
    for made in (whole, halves):
        made.update_teacher(0.9)
    torch.testing.assert_close(whole.center, halves.center, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(whole.patch_center, halves.patch_center, rtol=1e-12, atol=1e-14)


def test_a_forward_of_another_step_replaces_the_waiting_centers():
    made, other = method(), method()
    forward(made, crops(seed=2), step=0)
    for m in (made, other):
        forward(m, crops(), step=1)
        m.update_teacher(0.9)
    assert torch.equal(made.center, other.center)


def test_the_teacher_follows_the_student_after_the_step():
    made = method(dtype=torch.float32)
    before = {name: p.clone() for name, p in made.teacher.named_parameters()}
    optimizer = torch.optim.SGD(made.student.parameters(), lr=0.1)
    forward(made, crops(dtype=torch.float32))["loss"].backward()
    optimizer.step()
    made.update_teacher(0.9)
    student = dict(made.student.named_parameters())
    for name, p in made.teacher.named_parameters():
        torch.testing.assert_close(p, 0.9 * before[name] + 0.1 * student[name], rtol=0, atol=3e-7)


@pytest.mark.parametrize("bad", [float("nan"), 1.0])
def test_a_step_that_is_not_ok_changes_nothing(bad):
    made, batch = method(), crops()
    before = copy.deepcopy(made.state_dict())
    forward(made, (batch[0] * bad, batch[1], batch[2]))
    made.update_teacher(0.5, torch.tensor(False))
    assert all(torch.equal(value, before[key]) for key, value in made.state_dict().items())


def test_an_ok_step_equals_one_without_guard():
    guarded, plain = method(), method()
    for made, ok in ((guarded, torch.tensor(True)), (plain, None)):
        forward(made, crops())
        made.update_teacher(0.7, ok)
    torch.testing.assert_close(guarded.state_dict(), plain.state_dict(), rtol=1e-14, atol=1e-15)


def test_temperatures_are_constant_in_an_epoch_and_ramp_between():
    made = method(teacher_temp=0.07, warmup_teacher_temp=0.04, warmup_teacher_temp_epochs=30)
    assert {epoch: made.cls_temperature(epoch) for epoch in WARM_UP} == pytest.approx(WARM_UP, abs=5e-7, rel=0)
    still = method(teacher_temp=0.07, warmup_teacher_temp_epochs=30, masking="none")
    assert torch.equal(*(forward(still, crops(), step=step, epoch=5)["loss"] for step in (0, 9)))


ARRANGEMENTS = [
    {"pooling": "cls"},
    {"pooling": "simpool"},
    {"patch_loss": "token"},
    {"targets": "sinkhorn", "patch_loss": "token"},
    {"masking": "block", "head": {"patch_prototypes": 5}},
]


@pytest.mark.parametrize(
    "options", ARRANGEMENTS, ids=lambda o: "-".join(str(v) for v in o.values() if isinstance(v, str))
)
def test_two_ranks_are_one_process(options):
    """Loss, gradients, centers and teacher over three steps, with drop path, float64."""
    steps, batches = 3, [crops(4, 2, seed=s) for s in range(3)]

    def train(rank, all_sum, ranks):
        made = built[rank] if ranks > 1 else method(drop_path=0.5, **options)
        made.all_sum, made.world_size = all_sum, ranks
        rows, losses, masked = list(range(rank * 4 // ranks, (rank + 1) * 4 // ranks)), [], []
        for step in range(steps):
            global_crops, local_crops, ids = batches[step]
            made.zero_grad()
            answer = forward(made, (part(global_crops, rows, 4), part(local_crops, rows, 4), ids[rows]), step=step)
            answer["loss"].backward()
            for p in made.student.parameters():
                if p.requires_grad:
                    p.data.sub_(0.5 * all_sum(p.grad) / ranks)
            made.update_teacher(0.8)
            losses.append(float(all_sum(answer["loss"].detach())) / ranks)
            masked.append(float(all_sum(answer["mask_share"].detach())) / ranks)
        return losses, masked, {key: value.clone() for key, value in made.state_dict().items()}

    built = [method(drop_path=0.5, **options) for _ in range(2)]
    alone = train(0, lambda tensor: tensor.detach(), 1)
    pair = run_ranks(2, lambda rank, all_sum: train(rank, all_sum, 2))
    assert sum(alone[1]) > 0
    for losses, masked, state in pair:
        assert losses == pytest.approx(alone[0], rel=1e-9)
        assert masked == pytest.approx(alone[1], rel=1e-6)
        torch.testing.assert_close(state, alone[2], rtol=1e-9, atol=1e-11)


def test_kept_paths_belong_to_the_sample_not_to_its_place_in_the_batch():
    made = method(drop_path=0.5, masking="none")
    global_crops, local_crops, ids = crops()
    losses = [
        forward(made, (part(global_crops, r, 4), part(local_crops, r, 4), ids[r]), step=7)["loss"].item()
        for r in ([0, 1], [2, 3])
    ]
    assert forward(made, (global_crops, local_crops, ids), step=7)["loss"].item() == pytest.approx(
        sum(losses) / 2, rel=1e-11
    )
    assert forward(made, (global_crops, local_crops, ids), step=8)["loss"].item() != pytest.approx(
        sum(losses) / 2, rel=1e-6
    )


def test_a_global_generator_is_neither_read_nor_moved():
    made, batch = method(drop_path=0.5), crops()
    torch.manual_seed(0)
    state = torch.get_rng_state()
    first = forward(made, batch)["loss"]
    assert torch.equal(torch.get_rng_state(), state)
    torch.manual_seed(1)
    assert torch.equal(first, forward(made, batch)["loss"])


def test_every_trainable_parameter_is_the_students_and_in_a_group():
    made = method(head={"norm_last_layer": True})
    groups = parameter_groups(made)
    check_groups(made.student, groups)
    names = [name for group in groups for name in group["names"]]
    assert all(name.startswith("student.") for name in names)
    assert not any("weight_g" in name for name in names)
    forward(made, crops())["loss"].backward()
    torch.optim.SGD([p for g in groups for p in g["params"]], lr=0.1).step()
    gains = [value for key, value in made.student.state_dict().items() if key.endswith("weight_g")]
    assert gains and all(torch.equal(gain, torch.ones_like(gain)) for gain in gains)


def test_a_vit_of_twelve_blocks_has_the_references_number_of_tensors_in_each_group():
    from maskwise.methods import IBOT
    from maskwise.methods.masking import MASKINGS
    from maskwise.nn import CLS, Backbone, Encoder, ProjectionHead

    backbone = Backbone("vit_small_patch16_224", image_size=32, embed_dim=12, num_heads=3, mask_token=True)
    head = ProjectionHead(12, 8, hidden=4, bottleneck=4, norm_last_layer=False)
    decayed, plain = parameter_groups(IBOT(Encoder(backbone, CLS(12)), head, MASKINGS["block"]()))
    assert (len(decayed["params"]), len(plain["params"])) == (57, 102)
    for part_ in ("cls_token", "pos_embed", "mask_token", "weight_g", "weight_v"):
        assert any(part_ in name for name in decayed["names"])


def test_losses_are_float32_under_autocast():
    made = method(masking="random", dtype=torch.float32)
    with torch.autocast("cpu", torch.bfloat16):
        answer = forward(made, crops(dtype=torch.float32))
    full = forward(method(masking="random", dtype=torch.float32), crops(dtype=torch.float32))
    assert all(value.dtype == torch.float32 for value in answer.values())
    assert answer["loss"].item() == pytest.approx(full["loss"].item(), rel=0.1)
    answer["loss"].backward()


def test_the_health_numbers_are_detached_scalars_of_the_stated_meaning():
    made, (global_crops, local_crops, ids) = method(), crops()
    answer = forward(made, (global_crops, local_crops, ids), statistics=True)
    assert {
        "loss",
        "cls",
        "patch",
        "teacher_entropy",
        "teacher_spread",
        "agreement",
        "mask_share",
        "feature_std",
    } <= set(answer)
    assert all(value.ndim == 0 and value.requires_grad == (key == "loss") for key, value in answer.items())
    with torch.no_grad():
        pooled = made.teacher.encoder(global_crops).pooled
        probs = torch.softmax(made.teacher.head(pooled) / 0.04, -1)
    entropy = -(probs * probs.log()).sum(-1).mean()
    assert answer["teacher_entropy"].item() == pytest.approx(entropy.item(), rel=1e-9)
    spread = -(probs.mean(0) * probs.mean(0).log()).sum()
    assert answer["teacher_spread"].item() == pytest.approx(spread.item(), rel=1e-9)
    unit = nn.functional.normalize(pooled, dim=-1)
    assert answer["feature_std"].item() == pytest.approx(
        (unit.var(0, unbiased=False).sqrt().mean() * 12**0.5).item(), rel=1e-9
    )
    assert 0 <= answer["agreement"].item() <= 1


def test_pieces_that_do_not_fit_are_refused_in_one_line():
    from maskwise.methods import IBOT
    from maskwise.methods.masking import MASKINGS

    made = method("dino", None)
    with pytest.raises(UserError, match="mask_token=True"):
        IBOT(made.student.encoder, made.student.head, MASKINGS["random"]())
    with pytest.raises(UserError, match="centering, sinkhorn"):
        method(targets="softmax")
    blind = method().student.encoder
    blind.pooling.gives_attention = False
    with pytest.raises(UserError, match="attention"):
        IBOT(blind, made.student.head, MASKINGS["attmask_low"]())
    IBOT(blind, made.student.head, MASKINGS["random"]())


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("masking", ["attmask_hint", "block", "random"])
def test_a_step_waits_for_nothing(masking):
    made = method(masking=masking, drop_path=0.1, dtype=torch.float32, patch_loss="token").cuda()
    global_crops, local_crops, ids = crops(dtype=torch.float32)
    batch = (global_crops.cuda(), local_crops.cuda(), ids)
    for step in range(2):
        torch.cuda.set_sync_debug_mode("error" if step else "default")  # the first step may set up libraries
        try:
            answer = forward(made, batch, step=step)
            answer["loss"].backward()
            made.update_teacher(0.9, answer["loss"].detach().isfinite())
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert answer["loss"].isfinite()
