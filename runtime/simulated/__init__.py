"""Workers without cards: the engine model in real time behind the HTTP API of vLLM."""
