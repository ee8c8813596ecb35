"""An experiment of less than a second, and policies with every kind of fault."""

from pathlib import Path

SMALL = """\
name: small
policy: {name: least_loaded}
cluster:
  replicas:
    - {count: 2, device: radeon_vii, model: qwen3-vl-8b-awq, engine: {max_num_seqs: 16}}
workload: {kind: synthetic, preset: azure_conv, rate_per_s: 0.5, requests: 40, streamed: 0.8}
slo: {ttft_s: 5.0, tpot_s: 0.1}
seeds: [1, 2]
"""

FAULTY = """\
from policies.interface import Dispatch, Hold, Policy

class Nonsense(Policy):
    def place(self, request, view):
        return 42

class Elsewhere(Policy):
    def place(self, request, view):
        return Dispatch(request.id, "r77")

class Raises(Policy):
    def place(self, request, view):
        raise ValueError("first line\\nsecond line")

class Exits(Policy):
    def place(self, request, view):
        raise SystemExit(0)

class TickInWords(Policy):
    tick_s = "soon"

    def place(self, request, view):
        return Hold()

class MixedRanks(Policy):
    def rank(self, request):
        return "a" if request.prompt_tokens % 2 else 1

    def place(self, request, view):
        return Hold() if view.now_s < 30 else Dispatch(request.id, "r0")
"""
FAULTS = {
    "Nonsense": "place answered 42: answer Dispatch, Hold, Shed or Preempt",
    "Elsewhere": "unknown replica 'r77'",
    "Raises": "ValueError: first line second line",
    "Exits": "SystemExit: 0",
    "TickInWords": "TickInWords.tick_s is 'soon': give a positive number",
    "MixedRanks": "TypeError: '<' not supported",
}
"""What is said of each."""


def small_file(folder: Path) -> Path:
    """The experiment, and `faulty.py` beside it."""
    (folder / "faulty.py").write_text(FAULTY)
    path = folder / "small.yaml"
    path.write_text(SMALL)
    return path


def small_trace(folder: Path, rows: int = 5) -> Path:
    """An Azure trace with a request every ten seconds."""
    lines = ["TIMESTAMP,ContextTokens,GeneratedTokens"]
    lines += [f"2023-11-16 18:15:{10 * row:02d}.0000000,{100 + row},20" for row in range(rows)]
    path = folder / "trace.csv"
    path.write_text("\n".join(lines) + "\n")
    return path
