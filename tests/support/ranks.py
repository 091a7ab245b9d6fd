"""Two processes of one run in forked children of the harness, as torchrun or accelerate would start them."""

import socket
from pathlib import Path
from typing import Any

from tests.support.harness import Harness

PROCESSES = 2


def run(
    harness: Harness,
    program: str,
    flags: dict[str, Any],
    local: int = PROCESSES,
    environment: dict[str, str] | None = None,
    faults: tuple[dict[str, Any], ...] = ({},) * PROCESSES,
) -> list[dict[str, Any]]:
    """The answers of both processes.

    local: how many of them are on one machine; environment: further variables; faults: those of each process.
    """
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = str(free.getsockname()[1])
    shared = {**(environment or {}), "WORLD_SIZE": str(PROCESSES), "LOCAL_WORLD_SIZE": str(local)}
    shared |= {"MASTER_ADDR": "localhost", "MASTER_PORT": port}

    def process(rank: int) -> dict[str, Any]:
        own = {"RANK": str(rank), "LOCAL_RANK": str(rank % local)}
        return harness.run(program, flags, environment=shared | own, **faults[rank])

    return harness.map(process, range(PROCESSES))


def of_accelerate(file: Path) -> dict[str, str]:
    """The variables that `accelerate launch` sets for a program with this file of sample/distributed/."""
    from accelerate.commands import launch
    from accelerate.utils.launch import prepare_deepspeed_cmd_env, prepare_multi_gpu_env

    arguments = ["--config_file", str(file), "--num_processes", str(PROCESSES), "finetune.py"]
    settings, file_settings, _ = launch._validate_launch_command(
        launch.launch_command_parser().parse_args(arguments)
    )
    if settings.use_deepspeed:
        settings.deepspeed_fields_from_accelerate_config = ",".join(file_settings.deepspeed_config)
        environment = prepare_deepspeed_cmd_env(settings)[1]
    else:
        environment = prepare_multi_gpu_env(settings)
    return {key: text for key, text in environment.items() if key.startswith(("ACCELERATE_", "FSDP_"))}
