"""`python -m maskwise.distributed.rendezvous HOST PORT`: is another program listening where ranks are to meet?

torchrun would wait for an answer without end and without a line.
"""

import datetime
import os
import socket
import sys
import threading

from maskwise.process.streams import print_error

SECONDS = 10.0


def answers(host: str, port: int, seconds: float = SECONDS) -> bool | None:
    """Return whether torch's store answers at an address; None if nothing listens there yet."""
    try:
        socket.create_connection((host, port), timeout=min(seconds, SECONDS)).close()
    except OSError:
        return None
    import torch.distributed as dist

    wait, stores = datetime.timedelta(seconds=seconds), []

    def connect():
        try:
            stores.append(dist.TCPStore(host, port, is_master=False, timeout=wait, wait_for_workers=False))
        except RuntimeError:
            return

    connecting = threading.Thread(target=connect, daemon=True)  # another program may never answer, timeout or not
    connecting.start()
    connecting.join(seconds)
    return bool(stores)


def main() -> int:
    """Print one line and return 2 if the port is taken by another program."""
    host, port = sys.argv[1:]
    if answers(host, int(port)) is not False:
        return 0
    print_error(f"maskwise: {taken(port, host)}")
    return 2


def taken(port, host: str = "this machine") -> str:
    """Describe a port in use, with the ways to choose another."""
    return (
        f"port {port} of {host} is in use by another program: choose another (PORT=n for launch/multinode.sh, "
        "--standalone or --master-port=n for torchrun, MASTER_PORT=n for other launchers), the same on all ranks"
    )


if __name__ == "__main__":
    os._exit(main())  # the thread may still wait
