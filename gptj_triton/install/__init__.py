"""Makes the virtual environment that `make` installs into. It runs before anything is installed, so it needs only the
standard library, and it runs on Python 3.7 and newer. Knows nothing of what is installed afterwards."""
