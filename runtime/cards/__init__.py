"""The machine's AMD cards: who takes which, what they read, and what guards them."""
