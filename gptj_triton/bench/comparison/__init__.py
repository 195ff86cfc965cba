"""The parts of compare.py: prompts, systems, load, cost, results, report, plots. Imports run in the order
systems, prompts, load, cost → results; report → plots; both → compare.py, never back."""
