"""The parts of serve.py: options, home, installation, checkpoint, repository, run directory, process. `command` puts
them together."""
