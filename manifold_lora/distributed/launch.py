"""The settings that connect the processes of a run, checked without JAX."""

import re

from manifold_lora.errors import shortened

_HOST = r"\[[0-9A-Fa-f:.]+(%\w+)?\]|[A-Za-z0-9._-]+"  # IPv6 addresses in brackets
_ADDRESS = re.compile(rf"({_HOST}):([0-9]{{1,5}})", re.ASCII)


def launch_problems(
    coordinator: str | None, processes: int | None, process_id: int | None
) -> list[str]:
    """One message for each thing that is wrong with these settings.

    Args:
        coordinator: HOST:PORT of process 0.
        processes: the number of processes.
        process_id: the index of this process, from 0.

    Examples:
        >>> launch_problems("[::1]:1234", 2, 1)
        []
        >>> launch_problems(None, 2, 2)
        ['--process-id must be 0 to 1 with --processes 2, got 2']
    """
    problems = []
    if coordinator is not None:
        address = _ADDRESS.fullmatch(coordinator)
        if not address or not 1 <= int(address[3]) <= 65535:
            problems.append(
                "--coordinator must be HOST:PORT with a port from 1 to 65535, as in "
                "10.0.0.1:1234 or [::1]:1234 (IPv6 in brackets), got "
                f"{shortened(coordinator)!r}"
            )
    if process_id is not None and processes is None:
        problems.append(f"--process-id {process_id} needs --processes as well")
    elif process_id is not None and not 0 <= process_id < (processes or 0):
        problems.append(
            f"--process-id must be 0 to {(processes or 1) - 1} with --processes "
            f"{processes}, got {process_id}"
        )
    return problems
