"""Scheduling policies: one class, one file, written once, simulated and deployed unchanged."""

from policies.compiled import prefer_newer_sources

prefer_newer_sources()
