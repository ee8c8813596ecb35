"""One simulated vLLM server: exact scheduling and block accounting, calibrated step times."""
