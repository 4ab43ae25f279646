"""The teacher temperature that warms up from .04 to .07 over 30 epochs, in closed form at six digits."""

WARM_UP = {
    0: 0.04,
    1: 0.041034,
    10: 0.050345,
    14: 0.054483,
    15: 0.055517,
    20: 0.060690,
    28: 0.068966,
    29: 0.07,
    30: 0.07,
    99: 0.07,
}
