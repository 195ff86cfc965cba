"""The engine on a GPU: kernels in Triton (the language) and the decode step as CUDA graphs. Only this package imports
triton, and it is imported only where the device is a GPU.
"""
