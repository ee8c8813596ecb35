"""Scheduling policies: one class, one file, written once, simulated and deployed unchanged."""
