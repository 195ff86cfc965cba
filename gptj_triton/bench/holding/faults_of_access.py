"""What must be closed: shared memory by name, what changes the server, other servers' sockets, other users' eyes."""

from __future__ import annotations

import asyncio
import json
import os
import stat
import subprocess
import sys
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
from tritonclient.grpc import service_pb2

from gptj_triton.bench.holding.processes import regions
from gptj_triton.bench.holding.scene import Fault, Scene, Seen
from gptj_triton.triton.stubs import SHARED_MEMORY

NOBODY = 65534  # the user of that name
CHANGES = {
    "repository index": ("repository/index", {}),
    "load": ("repository/models/ensemble/load", {}),
    "unload": ("repository/models/ensemble/unload", {}),
    "logging": ("logging", {"log_verbose_level": 0}),
    "trace": ("trace/setting", {"trace_rate": "1000"}),
    "cuda region": (
        "cudasharedmemory/region/held/register",
        {"raw_handle": {"b64": ""}, "device_id": 0, "byte_size": 8},
    ),
}


async def grpc_refuses(scene: Scene, method: str, message: Any) -> bool:
    try:
        await getattr(scene.asker.grpc_stub, method)(message, timeout=10)
    except grpc.aio.AioRpcError as error:
        return error.code() is grpc.StatusCode.UNAVAILABLE
    return False


async def admin(scene: Scene) -> Seen:
    """Nothing that changes the server is open, over either protocol."""
    opened = []
    for name, (path, body) in CHANGES.items():
        status = await scene.asker.status(path, "POST", data=json.dumps(body))
        if status != 403:
            opened.append(f"HTTP {name}: {status}")
    calls: dict[str, Any] = {
        "RepositoryModelLoad": service_pb2.RepositoryModelLoadRequest(model_name="ensemble"),
        "RepositoryModelUnload": service_pb2.RepositoryModelUnloadRequest(model_name="none"),
        "LogSettings": service_pb2.LogSettingsRequest(),
        "TraceSetting": service_pb2.TraceSettingRequest(),
        "SystemSharedMemoryStatus": service_pb2.SystemSharedMemoryStatusRequest(),
    }
    opened += [f"gRPC {name}" for name, message in calls.items() if not await grpc_refuses(scene, name, message)]
    scene.strike()
    return Seen(", ".join(opened) or "all refused", not opened)


async def shared_memory(scene: Scene) -> Seen:
    """No region can be registered by its name: neither a stub's own nor another process's."""
    own = SHARED_MEMORY / f"held_{os.getpid()}"
    own.write_bytes(bytes(4096))
    opened = []
    try:
        for region in [own.name, *regions([scene.server.pid])[:1]]:
            body = json.dumps({"key": f"/{region}", "offset": 0, "byte_size": 64})
            status = await scene.asker.status("systemsharedmemory/region/held/register", "POST", data=body)
            if status != 403:
                opened.append(f"HTTP: {status}")
            message = service_pb2.SystemSharedMemoryRegisterRequest(name="held2", key=f"/{region}", byte_size=64)
            if not await grpc_refuses(scene, "SystemSharedMemoryRegister", message):
                opened.append("gRPC")
    finally:
        own.unlink()
    scene.strike()
    return Seen(", ".join(opened) or "all refused", not opened)


async def cancel_handle(scene: Scene) -> Seen:
    """A handle names an engine of this server and nothing else: nobody is connected to."""
    connected = asyncio.Event()
    listener = await asyncio.start_server(lambda reader, writer: connected.set(), "127.0.0.1", 0)
    port = listener.sockets[0].getsockname()[1]
    handle = np.array([[f"tcp://127.0.0.1:{port}\nx".encode()]], np.object_)
    ids, one = np.array([[[5, 6]]], np.uint32), np.array([[1]], np.uint32)
    tensors = {"output_ids": ids, "sequence_length": one, "input_lengths": one, "end_id": one, "cancel_handle": handle}
    scene.strike()
    for leave_after in (None, 0.001, 0.01):
        await scene.asker.grpc_infer("postprocessing", tensors, leave_after)
    try:
        await asyncio.wait_for(connected.wait(), 1.0)
    except asyncio.TimeoutError:
        return Seen("nobody is connected to")
    finally:
        listener.close()
    return Seen("the stub connects to where the handle says", False)


def readable_by_others(paths: list[Path]) -> list[str]:
    """Those whose permissions let other users in."""
    found = []
    for path in paths:
        mode = path.lstat().st_mode
        if not stat.S_ISLNK(mode) and mode & 0o077:
            found.append(f"{path.name} {stat.S_IMODE(mode):04o}")
    return found


READ_AS_NOBODY = """
import os, sys
os.setgroups([]); os.setgid(int(sys.argv[1])); os.setuid(int(sys.argv[1]))
for path in sys.argv[2:]:
    try:
        open(path, "rb").read(1); print(os.path.basename(path))
    except OSError:
        pass
"""


async def other_user(scene: Scene) -> Seen:
    """Another local user can read no region and enter no directory."""
    scene.strike()
    held = [SHARED_MEMORY / name for name in regions([scene.server.pid])]
    tops = [path for path in scene.temporary.iterdir() if path != scene.extra]
    seen = readable_by_others([*held, *tops])
    if os.geteuid() == 0:
        inside = [path for top in tops for path in top.rglob("*") if path.is_file()]
        command = [sys.executable, "-c", READ_AS_NOBODY, str(NOBODY), *map(str, [*held, *inside])]
        seen += [
            f"nobody reads {name}" for name in subprocess.run(command, capture_output=True, text=True).stdout.split()
        ]
    return Seen(", ".join(seen[:6]) or "nothing is open to others", not seen)


FAULTS = [
    Fault("shared-memory", shared_memory, short=True),
    Fault("admin", admin, short=True),
    Fault("cancel-handle", cancel_handle),
    Fault("other-user", other_user, short=True),
]
