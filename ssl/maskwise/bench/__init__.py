"""Benchmarks, one per module: `parser(make)` has the options, `run(options)` measures, `text(result)` makes tables."""

BENCHES = {
    "data": "maskwise.bench.data",
    "step": "maskwise.bench.step",
    "train": "maskwise.bench.train",
    "knn": "maskwise.bench.knn",
    "cost": "maskwise.bench.cost",
    "learn": "maskwise.bench.learn",
}
