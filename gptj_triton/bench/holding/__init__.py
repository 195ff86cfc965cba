"""Whether the server holds: `soak.py` under load for long, `faults.py` when parts of it are broken, `fuzz.py` for any
input. `load.py` and `asking.py` send requests, `outcomes.py` counts what became of each; `processes.py` and
`readings.py` look at the server."""
