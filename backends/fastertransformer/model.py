"""The Triton backend `fastertransformer`, as Triton loads it; its code is in the package gptj_triton."""

from gptj_triton.triton.backend import TritonPythonModel

__all__ = ["TritonPythonModel"]
