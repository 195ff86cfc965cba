"""The model on all of its ranks: this process computes rank 0 and leads one worker process for each other rank.

    python -m gptj_triton.engine.eager.sharded_model --config JSON --rank R --leader-pid PID --port PORT < COMMANDS

A worker runs the commands that arrive on its standard input. It ends when that ends, or when its leader does, in
whatever way. A leader ends when one of its workers does: no rank can go on alone. Knows plans, not sequences.
"""

from __future__ import annotations

import argparse
import logging
import os
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from multiprocessing.connection import Connection
from typing import TypeAlias

import msgspec
import torch
from torch import Tensor, distributed

from gptj_triton.checkpoint.model_config import ModelConfig
from gptj_triton.checkpoint.tensor_table import check_split
from gptj_triton.engine.config import EngineConfig
from gptj_triton.engine.device import choose_device
from gptj_triton.engine.eager.model_rank import ModelRank
from gptj_triton.engine.step_plan import StepPlan
from gptj_triton.errors import ConfigError
from gptj_triton.pidfd import when_ended

LOCAL = "127.0.0.1"
RENDEZVOUS_TIMEOUT = timedelta(minutes=10)  # the last rank may read its weights from a slow disk
SHUT_DOWN_SECONDS = 5.0

log = logging.getLogger("gptj_triton")


class Forward(msgspec.Struct, tag="forward"):
    """Compute a step."""

    plan: StepPlan


class Measure(msgspec.Struct, tag="measure"):
    """Compute a step, and share with the other ranks how much memory is left."""

    plan: StepPlan


class Allocate(msgspec.Struct, tag="allocate"):
    """Make a KV cache of that size."""

    num_pages: int


Command: TypeAlias = Forward | Measure | Allocate


@dataclass(frozen=True)
class Address:
    """The rendezvous of the ranks: a port that no other machine can reach; `listener` is rank 0's socket, which it
    owns.
    """

    port: int
    listener: int | None = None

    @classmethod
    def new(cls) -> Address:
        socket_ = socket.create_server((LOCAL, 0))
        return cls(socket_.getsockname()[1], socket_.detach())


class RankGroup:
    """Collective operations of all ranks, by NCCL between GPUs and by Gloo on a CPU. All ranks make the same calls in
    the same order; each waits for the others.
    """

    def __init__(self, address: Address, rank: int, size: int, device: torch.device) -> None:
        """Returns when all have come."""
        self._size = size
        self._device = device
        on_gpu = device.type == "cuda"
        if on_gpu:
            torch.cuda.set_device(device)
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
        store = distributed.TCPStore(  # type: ignore[attr-defined]  # it is, but not in a way that mypy sees
            LOCAL,
            address.port,
            size,
            is_master=rank == 0,
            timeout=RENDEZVOUS_TIMEOUT,
            wait_for_workers=False,
            master_listen_fd=address.listener,
        )
        distributed.init_process_group("nccl" if on_gpu else "gloo", store=store, rank=rank, world_size=size)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """The sum of all ranks' `tensor`, which may be overwritten.

        On a CPU in the order of the ranks, so that an element's bits do not depend on how many there are.
        """
        if self._device.type == "cuda":
            distributed.all_reduce(tensor)
            return tensor
        gathered = [torch.empty_like(tensor) for _ in range(self._size)]
        distributed.all_gather(gathered, tensor)
        first, *others = gathered
        for other in others:
            first += other
        return first

    def all_reduce_min(self, number: int) -> int:
        """The smallest of all ranks' numbers."""
        tensor = torch.tensor([number], device=self._device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MIN)
        return int(tensor.item())

    def destroy(self) -> None:
        distributed.destroy_process_group()


class ShardedModel:
    """All ranks as if they were one model. With tensor_para_size 1 there are no workers."""

    def __init__(self, config: EngineConfig, model: ModelConfig) -> None:
        """Start the workers and load all weights; ConfigError when that cannot be done."""
        check_split(model, config.tensor_para_size)
        self.device = choose_device(config.device, 0, config.tensor_para_size)
        self._workers: list[Worker] = []
        self._group: RankGroup | None = None
        self._encoder = msgspec.msgpack.Encoder()
        try:
            if config.tensor_para_size > 1:
                self._group = self._start_workers(config)
            self._own = load_rank(config, model, 0, self._group)
        except BaseException:
            self.close()
            raise
        self.page_bytes = self._own.page_bytes

    def forward(self, plan: StepPlan) -> Tensor:
        """Compute a step; returns float32 logits [samples, V] of the plan's `last_rows`."""
        self._broadcast(Forward(plan))
        return self._own.forward(plan)

    def measure(self, plan: StepPlan, use: Callable[[Tensor], object]) -> int:
        """Bytes that are left on the fullest GPU when a step is computed and `use` made of its logits."""
        self._broadcast(Measure(plan))
        left = self._own.measure(plan, use)
        return self._group.all_reduce_min(left) if self._group else left

    def allocate(self, num_pages: int) -> None:
        """Make an empty KV cache of that size."""
        self._broadcast(Allocate(num_pages))
        self._own.allocate(num_pages)

    def close(self) -> None:
        """End the workers."""
        for worker in self._workers:
            worker.shut_down()
        if self._group:
            self._group.destroy()
        for worker in self._workers:
            worker.wait()

    def _start_workers(self, config: EngineConfig) -> RankGroup:
        """Start the workers and wait until all have come."""
        size = config.tensor_para_size
        address = Address.new()
        self._workers += [Worker(config, rank, address.port) for rank in range(1, size)]
        return RankGroup(address, 0, size, self.device)

    def _broadcast(self, command: Command) -> None:
        if self._workers:
            message = self._encoder.encode(command)
            for worker in self._workers:
                worker.send(message)


class Worker:
    """The process of another rank, as its leader sees it."""

    def __init__(self, config: EngineConfig, rank: int, port: int) -> None:
        command = [sys.executable, "-m", "gptj_triton.engine.eager.sharded_model", "--config", config.to_json()]
        command += ["--rank", str(rank), "--leader-pid", str(os.getpid()), "--port", str(port)]
        readable, writable = os.pipe()
        self._process = subprocess.Popen(command, stdin=readable)
        os.close(readable)
        self._commands = Connection(writable, readable=False)
        self._shut_down = False
        self._rank = rank
        when_ended(self._process.pid, self._leader_must_end)

    def send(self, message: bytes) -> None:
        self._commands.send_bytes(message)

    def shut_down(self) -> None:
        """Let it end when it has run its commands."""
        self._shut_down = True
        self._commands.close()

    def wait(self) -> None:
        """Return when it has ended."""
        try:
            self._process.wait(SHUT_DOWN_SECONDS)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()

    def _leader_must_end(self) -> None:
        if not self._shut_down:
            log.error("the process of rank %d ended unexpectedly", self._rank)
            os._exit(1)


def load_rank(config: EngineConfig, model: ModelConfig, rank: int, group: RankGroup | None) -> ModelRank:
    """Load one rank's part; ConfigError on every rank when that fails on one."""
    if group is None:
        return ModelRank(config, model, rank)
    try:
        part = ModelRank(config, model, rank, group.all_reduce)
    except ConfigError:
        group.all_reduce_min(0)
        raise
    if not group.all_reduce_min(1):
        raise ConfigError("the weights could not be loaded on another rank; the log says more")
    return part


def run_commands(commands: Connection, part: ModelRank, group: RankGroup) -> None:
    """Run the commands of the leader until there are no more."""
    decoder = msgspec.msgpack.Decoder(Command)
    while True:
        try:
            command = decoder.decode(commands.recv_bytes())
        except EOFError:
            return
        if isinstance(command, Forward):
            part.forward(command.plan)
        elif isinstance(command, Measure):
            group.all_reduce_min(part.measure(command.plan, lambda _: None))
        else:
            part.allocate(command.num_pages)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", required=True, metavar="JSON", help="an EngineConfig")
    parser.add_argument("--rank", required=True, type=int, help="1 or more")
    parser.add_argument("--leader-pid", required=True, type=int, help="the process of rank 0")
    parser.add_argument("--port", required=True, type=int, help="where the ranks meet")
    arguments = parser.parse_args()
    when_ended(arguments.leader_pid, lambda: os._exit(0))

    config = EngineConfig.from_json(arguments.config)
    model = ModelConfig.read(config.checkpoint, config.context_length)
    device = choose_device(config.device, arguments.rank, config.tensor_para_size)
    group = RankGroup(Address(arguments.port), arguments.rank, config.tensor_para_size, device)
    try:
        part = load_rank(config, model, arguments.rank, group)
    except ConfigError as error:
        print(f"rank {arguments.rank}: {error}", file=sys.stderr)
        return 1
    run_commands(Connection(sys.stdin.fileno(), writable=False), part, group)
    group.destroy()
    return 0


if __name__ == "__main__":
    sys.exit(main())
