"""The network interface that gloo uses."""

import os

import psutil
import ray

VARIABLE = "GLOO_SOCKET_IFNAME"


def choose_interface() -> None:
    """Points gloo in this process at the interface that has this node's Ray address; what the user set stays.

    gloo by itself listens where the host's name resolves to. On many systems that is 127.0.0.1, where no other node
    reaches it. (NCCL looks at the interfaces themselves and needs no such help.)
    """
    if VARIABLE in os.environ:
        return
    here = ray.util.get_node_ip_address()
    for name, addresses in psutil.net_if_addrs().items():
        # An address of IPv6 may have its scope behind a per cent sign.
        if any(address.address.partition("%")[0] == here for address in addresses):
            os.environ[VARIABLE] = name
            return
