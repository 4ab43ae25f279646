"""The section speed and train.accumulate, from the recipe to the objects."""

import pytest
import torch

from maskwise import build
from maskwise.distributed.world import World
from maskwise.functional.errors import UserError
from maskwise.recipe import check_run, read_recipe


def made(*words, **options):
    return build.trainer(read_recipe("debug/tiny", *words), World(), images=64, **options)


def test_a_cpu_run_is_lean_unless_told_otherwise():
    assert made().method.student.encoder.backbone.checkpointing == "elementwise"
    trainer = made("speed.checkpointing=blocks", "train.accumulate=2")
    assert trainer.method.student.encoder.backbone.checkpointing == "blocks" and trainer.accumulate == 2
    assert not trainer.method.student.encoder.backbone.compiled


def test_rows_are_rounded_where_new_shapes_cost():
    assert made().method.pad_rows == 1
    assert made(precision="bf16").method.pad_rows == 2 * 8 * 16 // 16
    assert made("train.accumulate=4", precision="bf16").method.pad_rows == 2 * 8 * 16 // 16 // 4
    assert made("method.pad_rows=5", precision="bf16").method.pad_rows == 5


def test_compilation_without_a_compiler_is_refused_in_one_line(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="C\\+\\+ compiler") as caught:
        made("speed.compile=true")
    assert "\n" not in str(caught.value)


def test_micro_batches_must_divide_the_batch():
    with pytest.raises(UserError, match="train.accumulate=3"):
        check_run(read_recipe("debug/tiny", "train.accumulate=3"), 64, 1)
    with pytest.raises(UserError, match="2 ranks"):
        check_run(read_recipe("debug/tiny", "train.accumulate=8"), 64, 2)
    check_run(read_recipe("debug/tiny", "train.accumulate=4"), 64, 2)


def test_speed_stays_out_of_the_hash_and_accumulate_does_not():
    plain = read_recipe("debug/tiny")
    assert read_recipe("debug/tiny", "speed.checkpointing=blocks", "speed.compile=true").hash() == plain.hash()
    assert read_recipe("debug/tiny", "train.accumulate=2").hash() != plain.hash()


def heap() -> tuple[int, int]:
    """Begin and end of this process's heap."""
    lines = [line.split()[0].split("-") for line in open("/proc/self/maps") if line.rstrip().endswith("[heap]")]
    return min(int(begin, 16) for begin, _ in lines), max(int(end, 16) for _, end in lines)


def test_freed_memory_stays_in_the_heap():
    from maskwise.engine.memory import keep_freed_memory

    if not keep_freed_memory():
        pytest.skip("not glibc")
    tensor = torch.ones(1 << 24)  # 64 MiB: mapped on its own otherwise, and given back at once
    begin, end = heap()
    assert begin <= tensor.data_ptr() < end
    del tensor
    assert heap()[1] >= end
