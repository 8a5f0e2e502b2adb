"""How the processes of a run connect."""

import errno
import ipaddress
import os
import socket
import threading

import jax
from absl import logging

from ant_jax.runtime import signals

_MEETING_SECONDS = 300  # until all processes must be there
_HEARTBEAT_SECONDS = 30  # of silence, after which a process counts as dead


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Makes this process one of several; must come before anything asks JAX for devices.

    Args:
      coordinator: HOST:PORT of process 0, as all processes reach it. None, and the others too,
        where a Cloud TPU slice or SLURM says it.
      num_processes: how many there are.
      process_id: which one this is, from 0.

    Raises:
      ValueError: if nothing says who the others are, or what says it makes no sense.

    Where the processes have not come together within 5 minutes, this one ends with a message.
    """
    told = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in told.items() if value is None]
    if 0 < len(missing) < len(told):
        raise ValueError(
            f"several processes without --distributed need {', '.join(missing)} too: each gets the "
            "same --coordinator and --num_processes, and a --process_id of its own"
        )
    by_hand = not missing
    bind = None
    if by_hand:
        host, port = _host_and_port(coordinator)
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id} must be from 0 to --num_processes={num_processes} - 1"
            )
        if process_id == 0:
            bind = _bind_address(host, port)
    # It would take SIGTERM, and nothing here asks it whether one has come.
    jax.config.update("jax_enable_preemption_service", False)
    # JAX would end the process too, by a signal and with pages of C++.
    late = threading.Timer(_MEETING_SECONDS, _give_up, [coordinator])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=None if by_hand else _gpus_of_the_node(),
            cluster_detection_method="deactivate" if by_hand else None,
            initialization_timeout=2 * _MEETING_SECONDS,
            coordinator_bind_address=bind,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        hint = "" if by_hand else " (neither a Cloud TPU slice nor SLURM? see --coordinator)"
        raise ValueError(f"the processes can't connect: {error}{hint}") from error
    finally:
        late.cancel()


def _host_and_port(coordinator):
    host, _, port = coordinator.rpartition(":")
    bare = host.removeprefix("[").removesuffix("]")
    if not bare or (":" in bare) == (bare == host) or not _is_port(port):
        raise ValueError(
            f"--coordinator={coordinator!r} must be HOST:PORT of process 0, of IPv6 [HOST]:PORT"
        )
    return bare, int(port)


def _is_port(text):
    return text.isascii() and text.isdigit() and 0 < int(text) < 65536


def _bind_address(host: str, port: int) -> str:
    """Where process 0 listens: at the address that all are told, if that is one of this machine's.

    Behind a router that translates addresses it is not; and a name that means several addresses, or
    that of the machine itself alone, may mean another one elsewhere. Then it is all addresses.

    Raises:
      ValueError: if the name is unknown or the port taken, where JAX ends by a segmentation fault.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--coordinator: {host}: {error.strerror}") from error
    addresses = list(dict.fromkeys(entry[4][0] for entry in found))
    local = [address for address in addresses if _can_listen(address, port)]
    loopback = [address for address in local if ipaddress.ip_address(address).is_loopback]
    if local and (host == "localhost" or addresses == [host]):
        address = local[0]
    elif len(local) == 1 and not loopback:
        (address,) = local
    else:
        logging.warning(
            "--coordinator: %s is not one address of this machine; listening on all of them", host
        )
        address = "::" if _can_listen("::", port) else "0.0.0.0"
        _can_listen(address, port)
    return f"[{address}]:{port}" if ":" in address else f"{address}:{port}"


def _can_listen(address, port):
    """Whether an address is this machine's."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        socket.create_server((address, port), family=family).close()
    except OSError as error:
        if error.errno in (errno.EADDRINUSE, errno.EACCES):
            raise ValueError(f"--coordinator: port {port} of this machine: {error}") from error
        return False
    return True


def _give_up(coordinator):
    where = coordinator or "process 0"
    signals.say(
        f"the processes have not come together at {where} within {_MEETING_SECONDS} s: does every "
        "one of them run, with the same number of processes, and reach that address?"
    )
    os._exit(1)


def _gpus_of_the_node():
    """Under SLURM JAX takes one GPU a process; a process that is alone on its node has them all."""
    tasks, nodes, gpus = map(
        os.environ.get, ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "SLURM_GPUS_ON_NODE")
    )
    return list(range(int(gpus))) if gpus and tasks == nodes else None
