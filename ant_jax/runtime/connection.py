"""How the processes of a run connect."""

import errno
import ipaddress
import os
import socket
import threading

import jax
from absl import logging

from ant_jax.runtime import signals

_CONNECT_SECONDS = 300  # within which all processes must connect
_HEARTBEAT_SECONDS = 30  # without a heartbeat, after which a process counts as dead


def initialize(
    coordinator: str | None = None, num_processes: int | None = None, process_id: int | None = None
) -> None:
    """Connects this process to the other processes of the run.

    Call it before anything asks JAX for devices. On a Cloud TPU slice and under SLURM leave all
    arguments out: JAX finds them itself. If the processes have not connected within 5 minutes,
    prints a message and ends this process.

    Args:
      coordinator: HOST:PORT of process 0, an address that all processes reach.
      num_processes: number of processes.
      process_id: number of this process, from 0.

    Raises:
      ValueError: if an argument is missing or impossible, or if the processes can't connect.
    """
    told = {
        "--coordinator": coordinator,
        "--num_processes": num_processes,
        "--process_id": process_id,
    }
    missing = [name for name, value in told.items() if value is None]
    if 0 < len(missing) < len(told):
        raise ValueError(
            f"several processes without --distributed need {', '.join(missing)} too: give "
            "each the same --coordinator and --num_processes, and its own --process_id, from 0"
        )
    by_hand = not missing
    bind = None
    if coordinator is not None and num_processes is not None and process_id is not None:
        host, port = _host_and_port(coordinator)
        if not 0 <= process_id < num_processes:
            raise ValueError(
                f"--process_id={process_id} must be from 0 to --num_processes={num_processes} - 1"
            )
        if process_id == 0:
            bind = _bind_address(host, port)
    # JAX's service would catch SIGTERM, which this package handles itself.
    jax.config.update("jax_enable_preemption_service", False)
    # After its own timeout JAX would abort the process and print pages of C++.
    late = threading.Timer(_CONNECT_SECONDS, _give_up, [coordinator])
    late.daemon = True
    late.start()
    try:
        jax.distributed.initialize(
            coordinator,
            num_processes,
            process_id,
            local_device_ids=None if by_hand else _gpus_of_the_node(),
            cluster_detection_method="deactivate" if by_hand else None,
            initialization_timeout=2 * _CONNECT_SECONDS,
            coordinator_bind_address=bind,
            heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
        )
    except (ValueError, RuntimeError) as error:
        if "coordinator_address" in str(error):
            raise ValueError(
                "--distributed finds no other processes, because this is neither a Cloud TPU slice "
                "nor a SLURM job: give --coordinator, --num_processes and --process_id instead"
            ) from error
        raise ValueError(f"the processes can't connect: {error}") from error
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
    """The address at which process 0 listens.

    It is the coordinator's address if that is an address of this machine. Behind a router that
    translates addresses it is not. A name with several addresses, or one that means a loopback
    address here, may mean another address on other machines. In these cases process 0 listens on
    all addresses.

    Raises:
      ValueError: if the name is unknown or the port is taken; JAX would end with a segmentation
        fault.
    """
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except OSError as error:
        raise ValueError(f"--coordinator: {host}: {error.strerror}") from error
    addresses = list(dict.fromkeys(str(entry[4][0]) for entry in found))
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
    """Whether an address belongs to this machine.

    Raises:
      ValueError: if its port is taken or needs other rights.
    """
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
        f"error: the processes have not come together at {where} within {_CONNECT_SECONDS} s: "
        "is every one of them running, with the same number of processes, and can it reach that "
        "address?"
    )
    os._exit(1)


def _gpus_of_the_node():
    """All GPUs of the node for a process that is alone on it; None for JAX's default.

    Under SLURM that default is one GPU for each process.
    """
    tasks, nodes, gpus = map(
        os.environ.get, ("SLURM_NTASKS", "SLURM_STEP_NUM_NODES", "SLURM_GPUS_ON_NODE")
    )
    return list(range(int(gpus))) if gpus and tasks == nodes else None
