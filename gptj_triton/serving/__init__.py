"""The parts of serve.py: options, home, installation, checkpoint, repository, plain paths, Python environment, run
directory, process. `command` puts them together."""
