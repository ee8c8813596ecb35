"""viisim: simulate, calibrate and compare LLM-serving schedulers, then deploy them unchanged."""

__version__ = "0.1.0"
