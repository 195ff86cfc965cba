"""A GPT-J inference engine: continuous batching over a paged KV cache. It knows nothing of Triton.

Importing the package imports nothing heavy, so that the processes which only talk to an engine (`client`) never load
torch.
"""
