"""Whether a Ray cluster answers at an address and lets this process in, and whether hosts take connections.

Ray itself takes minutes to give up on an address where nothing listens, and says it in notes of its C++ side.
"""

import asyncio
import errno
import os
import socket
from collections.abc import Collection
from typing import Any

import grpc
from ray._private.authentication.authentication_token_setup import maybe_enable_token_auth_if_token_available
from ray._private.grpc_utils import init_grpc_channel
from ray._private.services import canonicalize_bootstrap_address
from ray.core.generated import (
    gcs_service_pb2,
    gcs_service_pb2_grpc,
)
from ray.exceptions import AuthenticationError, RayError

from rlhf_ray.errors import ResourceError

# The classes of these modules are made when they are imported, so that a type checker knows none.
GCS: Any = gcs_service_pb2

CONNECT_TIMEOUT_S = 5.0
ANSWER_TIMEOUT_S = 10.0
# A connection is made within a round trip; the first packet may be lost, and is sent again after a second.
REACH_TIMEOUT_S = 1.5
# What the kernel says of another host; other errors of a connection are this process's own.
UNREACHABLE = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN, errno.ENETDOWN, errno.ETIMEDOUT)
CLIENT_SCHEME = "ray://"  # of Ray Client, whose actors cannot stream what they sample


def check_reachable(address: str, asked: str) -> None:
    """Ask the head at an address for a trifle.

    Args:
        address: as `ray.init` takes it, such as HEAD:6379 or "auto".
        asked: what gave the address, such as `--address`.

    Raises:
        ResourceError: nothing answers there, or something else than a Ray head, or it refuses this process; or the
            address is one of Ray Client.
    """
    try:
        # "auto" is Ray's word for what this variable says, or else for the cluster on this machine.
        found = os.environ.get("RAY_ADDRESS") or address if address == "auto" else address
        if found.startswith(CLIENT_SCHEME):
            raise ResourceError(
                f"{asked}: {found!r} is an address of Ray Client, through which engines cannot stream responses; "
                "submit the run to the cluster (`rlhf-ray submit CONFIG --address http://HEAD:8265`), or start it on "
                "one of its nodes with the address auto"
            )
        target = _target(found)
        if found == "auto":
            # As in `ray.init`: a cluster on this machine asks for this user's token unless it was told otherwise.
            maybe_enable_token_auth_if_token_available(warn_if_disabled=False)
        if target is not None:
            host, _, port = target.rpartition(":")
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_TIMEOUT_S).close()
            _ask(target)
    except (OSError, RayError, RuntimeError, ValueError) as error:
        raise explained(error, address, asked) from None
    except grpc.RpcError as error:
        raise _refused(error, address, asked) from None


def unreachable(addresses: Collection[tuple[str, int]]) -> set[tuple[str, int]]:
    """Those of the addresses whose hosts take no connection within `REACH_TIMEOUT_S`, all tried at the same time.

    The kernel of a host takes connections for a process that is busy or stopped, and refuses those for one that is
    gone, which is an answer, too.
    """

    async def fails(address: tuple[str, int]) -> bool:
        try:
            async with asyncio.timeout(REACH_TIMEOUT_S):
                _, writer = await asyncio.open_connection(*address)
        except TimeoutError:
            return True
        except OSError as error:
            return error.errno in UNREACHABLE
        writer.close()
        return False

    async def all_of_them() -> set[tuple[str, int]]:
        tried = list(addresses)
        failed = await asyncio.gather(*map(fails, tried))
        return {address for address, bad in zip(tried, failed, strict=True) if bad}

    return asyncio.run(all_of_them()) if addresses else set()


def explained(error: Exception, address: str, asked: str) -> ResourceError:
    """What a failure to join a cluster means to a user."""
    reason = " ".join(str(error.__cause__ or error).split())
    if isinstance(error, AuthenticationError):
        return _no_access(reason, address, asked)
    if "ersion mismatch" in reason:
        return ResourceError(
            f"{asked}: the Ray cluster at {address!r} has other versions than this process. {reason}. Install the "
            "same versions of Ray and Python on every node and for the driver"
        )
    return ResourceError(
        f"{asked}: no Ray cluster answers at {address!r} ({reason}). Start one with `ray start --head`, name the "
        "address that it printed (such as HEAD:6379) and let its port through, or give no address to use this machine"
    )


def _no_access(reason: str, address: str, asked: str) -> ResourceError:
    return ResourceError(
        f"{asked}: no access to the Ray cluster at {address!r} ({reason.partition('. ')[0].rstrip('.')}); set "
        "RAY_AUTH_MODE=token and RAY_AUTH_TOKEN (or RAY_AUTH_TOKEN_PATH) to the cluster's token, which "
        "`ray get-auth-token` prints there, or RAY_AUTH_MODE=disabled where it asks for none"
    )


def _refused(error: grpc.RpcError, address: str, asked: str) -> ResourceError:
    """What answers a call with an error, if at all."""
    code, details = error.code(), error.details() or ""
    if code in (grpc.StatusCode.UNAUTHENTICATED, grpc.StatusCode.PERMISSION_DENIED):
        return _no_access(details, address, asked)
    if code == grpc.StatusCode.DEADLINE_EXCEEDED:
        details = f"no answer within {ANSWER_TIMEOUT_S:g} s"
    return ResourceError(
        f"{asked}: what listens at {address!r} does not answer as a Ray head does ({details}); name the address that "
        "`ray start --head` printed, such as HEAD:6379 (not the dashboard's), or see on the head whether Ray is well"
    )


def _target(address: str) -> str | None:
    """Host and port that Ray would connect to; None where it would start a cluster instead.

    Raises:
        OSError: "auto", and there is no cluster on this machine.
        ValueError: this is no address.
    """
    if "://" in address:
        raise ValueError("expected HEAD:PORT or auto")
    # 127.0.0.1 becomes the address that other nodes know this one by.
    target = canonicalize_bootstrap_address(address)
    if target is not None and not target.rpartition(":")[2].isdecimal():
        raise ValueError("expected a port at its end")
    return target


def _ask(target: str) -> None:
    """One small call with a deadline, with the token that this process has.

    Raises:
        AuthenticationError: this process is to have a token and has none.
        grpc.RpcError: no answer, or a refusal.
    """
    # As Ray's own connections, this one goes through no proxy.
    with init_grpc_channel(target, options=[("grpc.enable_http_proxy", 0)]) as channel:
        gcs_service_pb2_grpc.NodeInfoGcsServiceStub(channel).GetClusterId(
            GCS.GetClusterIdRequest(), timeout=ANSWER_TIMEOUT_S
        )
