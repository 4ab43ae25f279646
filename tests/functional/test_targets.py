import torch

from maskwise.functional import targets


def sinkhorn_by_division(logits, temp, iterations):
    """The textbook form: rows of a K x B matrix and its columns are divided by their sums in turn."""
    q = torch.exp((logits - logits.max()) / temp).T
    k, b = q.shape
    q = q / q.sum()
    for _ in range(iterations):
        q = q / q.sum(1, keepdim=True) / k
        q = q / q.sum(0, keepdim=True) / b
    return (q * b).T


def test_sinkhorn_against_the_textbook():
    logits = torch.randn(24, 10, dtype=torch.float64)
    for iterations in (1, 3, 20):
        probs = targets.sinkhorn(logits, 0.3, iterations)
        assert torch.allclose(probs, sinkhorn_by_division(logits, 0.3, iterations), rtol=1e-10, atol=1e-14)
        assert torch.allclose(probs.sum(1), torch.ones(24, dtype=torch.float64))
    assert torch.allclose(
        targets.sinkhorn(logits, 0.3, 200).sum(0), torch.full((10,), 2.4, dtype=torch.float64), atol=1e-6
    )


def test_sinkhorn_does_not_overflow():
    logits = torch.randn(6, 5) * 50
    probs = targets.sinkhorn(logits, 0.04)
    assert torch.isfinite(probs).all() and torch.allclose(probs.sum(1), torch.ones(6))


def test_sinkhorn_of_parts_is_that_of_the_union():
    """Ranks in lockstep, one of them without any row: each all_sum is the sum of what all hand in."""
    import threading

    logits = torch.randn(10, 7, dtype=torch.float64) * 3
    parts = [logits[:4], logits[4:], logits[:0]]
    barrier, slots, probs = threading.Barrier(3), [None] * 3, [None] * 3

    def rank(r):
        def all_sum(tensor):
            slots[r] = tensor
            barrier.wait()
            total = sum(slots)
            barrier.wait()
            return total

        probs[r] = targets.sinkhorn(parts[r], 0.1, 3, all_sum)

    threads = [threading.Thread(target=rank, args=(r,)) for r in range(3)]
    [thread.start() for thread in threads]
    [thread.join() for thread in threads]
    assert torch.allclose(torch.cat(probs), targets.sinkhorn(logits, 0.1, 3), rtol=1e-9, atol=1e-15)


def test_center_and_sharpen_in_float32():
    logits, center = torch.randn(5, 9).bfloat16(), torch.randn(9)
    probs = targets.center_and_sharpen(logits, center, 0.04)
    assert probs.dtype == torch.float32
    assert torch.allclose(probs, torch.softmax((logits.float() - center) / 0.04, -1))


def test_update_center_is_new_and_leaves_the_old_one():
    old, mean = torch.ones(4), torch.full((4,), 3.0)
    assert torch.allclose(targets.update_center(old, mean), torch.full((4,), 1.2))
    assert torch.equal(old, torch.ones(4))


def test_mean_of_logits_is_the_layer_of_the_mean():
    w, z = torch.randn(40, 16), torch.nn.functional.normalize(torch.randn(500, 16), dim=1)
    assert torch.allclose((z @ w.T).mean(0), w @ z.mean(0), atol=1e-4)
