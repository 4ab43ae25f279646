"""Options of reading from storage; section speed of a recipe sets them."""

from dataclasses import dataclass

GIB = 1 << 30


@dataclass(frozen=True)
class RemoteOptions:
    """Set how files in storage are read.

    timeout: seconds for which a failed request is repeated; reads: requests in flight per process; cache: GiB of images
    kept on the local disk, in the user's cache folder (0: none).
    """

    timeout: float = 300.0
    reads: int = 16
    cache: float = 4.0
