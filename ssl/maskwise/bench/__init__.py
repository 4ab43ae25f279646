"""Benchmarks, one a module: `parser(make)` tells its options, `run(options)` measures and returns a dict, `text(result)` makes tables of it."""

BENCHES = {
    "data": "maskwise.bench.data", "step": "maskwise.bench.step", "train": "maskwise.bench.train", "knn": "maskwise.bench.knn", "cost": "maskwise.bench.cost",
}  # fmt: skip
