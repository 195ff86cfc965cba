"""Tokens to text: the model `postprocessing`, whose code is in the package gptj_triton."""

from gptj_triton.triton.postprocessing import TritonPythonModel

__all__ = ["TritonPythonModel"]
