"""The parts of serve.py: options, installation, checkpoint, repository, process. Imports run in the order
errors → options → installation → checkpoint → repository → process → serve.py, never back."""
