"""Kernels that begin before the one before them has ended: programmatic dependent launch, NVIDIA's from Hopper on.

A kernel of such a chain lets the next one begin as soon as all of its own programs run, and waits for the one before it
before it touches what that one computes; until then it may read weights and what the host wrote. Every kernel of the
chain waits, so that what is older is complete as well.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from triton.language.extra.cuda import gdc_launch_dependents, gdc_wait

FIRST_GPU = (9, 0)  # compute capability: Hopper


@functools.cache
def overlap(device: torch.device) -> dict[str, bool]:
    """Keyword arguments of a launch on `device`: the kernel's own OVERLAPS, and Triton's."""
    if device.type == "cuda" and torch.cuda.get_device_capability(device) >= FIRST_GPU:
        return {"OVERLAPS": True, "launch_pdl": True}
    return {"OVERLAPS": False}


@triton.jit
def let_next_begin(OVERLAPS: tl.constexpr):
    if OVERLAPS:
        gdc_launch_dependents()


@triton.jit
def wait_for_last(OVERLAPS: tl.constexpr):
    if OVERLAPS:
        gdc_wait()


@triton.jit
def prefetch(pointers, OVERLAPS: tl.constexpr):
    """Begin to load the cache lines that a tensor of pointers leads to into the L2 cache; nothing waits for them."""
    if OVERLAPS:
        tl.inline_asm_elementwise(
            "prefetch.global.L2 [$1]; mov.u32 $0, 0;",
            "=r,l",
            [pointers],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )
