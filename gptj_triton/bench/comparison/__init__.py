"""The parts of compare.py. Imports run in the order systems, prompts, load, cost → measurement → comparison; report →
plots; both → command."""
