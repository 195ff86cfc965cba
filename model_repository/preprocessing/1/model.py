"""Text to tokens: the model `preprocessing`, whose code is in the package gptj_triton."""

from gptj_triton.triton.preprocessing import TritonPythonModel

__all__ = ["TritonPythonModel"]
