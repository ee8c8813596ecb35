"""Writes docs/premise.md: every claim of the project's premise, beside what the model predicts.

    python experiments/premise/make.py

No figure on the page is written by hand but the claims. The same code gives the same bytes.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from viisim.config import Slo, SyntheticWorkload, load_experiment
from viisim.errors import InputError
from viisim.hardware import load_device
from viisim.plan import Candidate, Demand, Planned, Prices, plan_one
from viisim.power import HOURS_PER_YEAR
from viisim.premise import (
    ROUNDS,
    Record,
    Served,
    bound_tokens_per_s,
    configuration,
    record_of,
    serve,
)
from viisim.report import markdown_table

HERE = Path(__file__).resolve().parent
PAGE = HERE.parents[1] / "docs" / "premise.md"

PROMPT = OUTPUT = 256
"""Tokens. The premise states no lengths; these are short chat, kind to the claims' users."""
SLO = Slo(ttft_s=2.0, tpot_s=0.1)
NEAR = 0.25
"""A prediction this close to a claim reproduces it: rooflines are no better."""
HOST_W, SUPPLY = 150.0, 0.9
"""Assumed: a host without cards, and the efficiency of its power supply."""
CHUNK_S = 15.9e-6
"""Measured: what a proxy in Python spends on one streamed token, on one core."""
HOURS_PER_MONTH = HOURS_PER_YEAR / 12
PRICES = Prices()


@dataclass(frozen=True, slots=True, kw_only=True)
class Claim:
    """One line of the page."""

    what: str
    claimed: str
    predicted: str
    bound: str
    verdict: str

    @property
    def cells(self) -> list[str]:
        """The line's columns."""
        return [self.what, self.claimed, self.predicted, self.bound, self.verdict]


@dataclass(frozen=True, slots=True, kw_only=True)
class Headline:
    """A line of the premise's table."""

    name: str
    device: str
    cards: int
    tokens_per_s: float
    users: tuple[int, int]
    power_w: float
    usd: float

    @property
    def candidate(self) -> Candidate:
        """Llama 2 7B in fp16, a replica on each card."""
        return configuration("llama-2-7b", self.device, replicas=self.cards)


HEADLINES = (
    Headline(name="1x Radeon VII", device="radeon_vii", cards=1, tokens_per_s=7.2, users=(1, 2),
             power_w=300, usd=600),
    Headline(name="4x Radeon VII", device="radeon_vii", cards=4, tokens_per_s=28.5, users=(8, 10),
             power_w=1200, usd=2400),
    Headline(name="1x RTX 4090", device="rtx_4090", cards=1, tokens_per_s=18.1, users=(3, 4),
             power_w=450, usd=1800),
    Headline(name="1x A100 40GB", device="a100_40gb", cards=1, tokens_per_s=45.0, users=(15, 20),
             power_w=300, usd=10000),
)  # fmt: skip


def verdict(claimed: float, predicted: float, bound: float, why: str = "") -> str:
    """By distance: near the prediction, above what bandwidth allows, or far below the model."""
    if abs(predicted / claimed - 1) <= NEAR:
        found = "reproduced"
    elif claimed > bound:
        found = f"implausible: {claimed / bound:.1f} times the bound"
    elif claimed < predicted / 2:
        found = f"implausible: {claimed / bound:.0%} of the bound, {predicted / claimed:.1f} times"
        found += " less than the model"
    else:
        found = f"not checkable: {claimed / bound:.0%} of the bound, and the model is uncalibrated"
    return found + (f"; {why}" if why else "")


def of(candidate: Candidate, users: int) -> Served:
    """So many users of short chat."""
    return serve(candidate, users, PROMPT, OUTPUT)


# --------------------------------------------------------------------------------------
# The headline table


@cache
def sustained(line: Headline) -> Planned:
    """The most users within the objectives."""
    workload = SyntheticWorkload.model_validate(
        {"kind": "synthetic", "requests": 1, "rate_per_s": 1.0,
         "prompt_tokens": PROMPT, "output_tokens": OUTPUT}
    )  # fmt: skip
    return plan_one(line.candidate, Demand(workload=workload, slo=SLO), PRICES)


def headline_claims() -> Iterator[Claim]:
    """Four configurations, four figures each."""
    for line in HEADLINES:
        yield from (_rate(line), _users(line), _power(line), _cost(line))


def _rate(line: Headline) -> Claim:
    alone, full = of(line.candidate, line.cards), of(line.candidate, line.users[1])
    bound = line.cards * bound_tokens_per_s("llama-2-7b", line.device)
    measured = line.cards * bound_tokens_per_s("llama-2-7b", line.device, measured=True)
    found = verdict(line.tokens_per_s, full.tokens_per_s, bound)
    return Claim(
        what=f"{line.name}: Llama 2 7B",
        claimed=f"{line.tokens_per_s:g} tok/s",
        predicted=f"{alone.tokens_per_s:.0f} tok/s with one user a card, "
        f"{full.tokens_per_s:.0f} with {line.users[1]} users",
        bound=f"{bound:.0f} tok/s, a sequence a card"
        + (f" ({measured:.0f} at measured bandwidth)" if measured != bound else ""),
        verdict=f"{found} with {line.users[1]} users, {alone.tokens_per_s / line.tokens_per_s:.1f} "
        "times with one a card; the figure of a broken software stack, not of the hardware",
    )


def _users(line: Headline) -> Claim:
    most = sustained(line)
    low, high = line.users
    room = line.candidate.profile.engine
    fit = line.cards * ((room.num_kv_blocks - 1) * room.block_tokens // (PROMPT + OUTPUT))
    rate = line.tokens_per_s / high
    near = low * (1 - NEAR) <= most.users <= high * (1 + NEAR)
    verdict_ = "reproduced" if near else (
        "implausible as a limit of the hardware" if most.users > high
        else "implausible within these objectives"
    )  # fmt: skip
    return Claim(
        what=f"{line.name}: concurrent users",
        claimed=f"{low}-{high}",
        predicted=f"{most.users:.1f} within TTFT 2 s and TPOT 100 ms, "
        f"{most.tokens_per_s:.0f} tok/s in all",
        bound=f"{fit} sequences of {PROMPT + OUTPUT} tokens fit the cards' memory in fp16",
        verdict=f"{verdict_}; the claim's own figures give each of {high} users {rate:.1f} tok/s",
    )


def _power(line: Headline) -> Claim:
    cap = line.cards * load_device(line.device).power_cap_w.value
    mean = of(line.candidate, line.users[1]).power_w
    above = line.power_w > cap
    return Claim(
        what=f"{line.name}: power",
        claimed=f"~{line.power_w:g} W",
        predicted=f"{mean:.0f} W, mean of the cards when busy",
        bound=f"{cap:g} W, default cap",
        verdict=f"implausible at default settings: above the cap of {cap:g} W"
        if above
        else f"reproduced as the cap; the mean is {mean / line.power_w:.0%} of it",
    )


def _cost(line: Headline) -> Claim:
    price = load_device(line.device).used_price_usd
    usd = (price.value or 0.0) * line.cards
    per_token = sustained(line).usd_per_million_tokens
    return Claim(
        what=f"{line.name}: used price",
        claimed=f"${line.usd:,.0f}",
        predicted=f"${usd:,.0f}; ${per_token or 0:.2f} a million tokens fully used",
        bound="-",
        verdict="not checkable: the catalogue's price is "
        + ("this claim itself" if "claim" in price.source else price.source),
    )


def comparisons() -> Iterator[Claim]:
    """What is said of the table's lines against each other."""
    one, four, other, _ = HEADLINES
    many, single = of(four.candidate, 8), of(one.candidate, 2)
    scale = many.tokens_per_s / single.tokens_per_s
    yield Claim(
        what="4 cards give 3.96 times one",
        claimed=f"3.96x (28.5 / 7.2 = {28.5 / 7.2:.2f})",
        predicted=f"{scale:.2f}x, two users a card",
        bound="4x",
        verdict=verdict(3.96, scale, 4, "replicas share nothing in the model but the scheduler"),
    )
    at_once = [(n, of(four.candidate, n).tokens_per_s, of(other.candidate, n).tokens_per_s)
               for n in (4, 8)]  # fmt: skip
    alone = of(four.candidate, 4).tokens_per_s / of(other.candidate, 1).tokens_per_s
    ratios = [a / b for _, a, b in at_once]
    bound = 4 * bound_tokens_per_s("llama-2-7b", "radeon_vii")
    bound /= bound_tokens_per_s("llama-2-7b", "rtx_4090")
    yield Claim(
        what="4x Radeon VII beat one RTX 4090 by 57 %",
        claimed=f"+57 % (28.5 / 18.1 = {28.5 / 18.1:.2f})",
        predicted="; ".join(
            f"{r - 1:+.0%} with {n} users" for r, n in zip(ratios, (4, 8), strict=True)
        )
        + f" on either side; {alone - 1:+.0%} with one user on every card",
        bound=f"{bound - 1:+.0%}, of bandwidths, a sequence a card",
        verdict="implausible: the sign depends on how many users each side has, which the claim "
        "does not say, and both rates that it divides are implausible themselves",
    )


# --------------------------------------------------------------------------------------
# Eight cards, and how many are best


def dozen_claims() -> Iterator[Claim]:
    """Eight cards for a dozen researchers, and the power of a box."""
    small = configuration("llama-2-13b", "radeon_vii", "w4a16", replicas=8)
    whole = configuration("llama-2-13b", "radeon_vii", "fp16", 2, 4)
    each = {name: of(c, 12) for name, c in (("8 x w4a16", small), ("4 x TP2 fp16", whole))}
    yield Claim(
        what="8 cards serve a 13B model to a dozen",
        claimed="12 users",
        predicted="; ".join(f"{name}: {s.tokens_per_s:.0f} tok/s, {s.tokens_per_s / 12:.0f} a "
                            f"user, TTFT {s.ttft_s:.1f} s" for name, s in each.items()),
        bound=f"{8 * bound_tokens_per_s('llama-2-13b', 'radeon_vii', 'w4a16'):.0f} tok/s, "
        "a sequence a card, w4a16",
        verdict="reproduced: faster than people read; fp16 takes two cards a replica",
    )  # fmt: skip
    usd = 8 * (load_device("radeon_vii").used_price_usd.value or 0.0)
    yield Claim(
        what="8 cards for under $5,000",
        claimed="< $5,000",
        predicted=f"${usd:,.0f} of cards; host, risers and supplies are extra",
        bound="-",
        verdict="not checkable: the price of a card is the premise's own",
    )
    watts = (each["8 x w4a16"].power_w + HOST_W) / SUPPLY
    monthly = watts / 1000 * HOURS_PER_MONTH * PRICES.usd_per_kwh
    yield Claim(
        what="in place of more than $5,000 a month of cloud",
        claimed="> $5,000 a month",
        predicted=f"{watts:,.0f} W from the wall when busy, at most ${monthly:.0f} a month; "
        f"the cards are paid back in {usd / (5000 - monthly):.1f} months",
        bound=f"${5000 / HOURS_PER_MONTH:.2f} an hour is what the claim's cloud costs",
        verdict="not checkable: it names no provider, instance or hours of use",
    )
    card = load_device("radeon_vii").power_cap_w.value
    draw = [(4 * cap + HOST_W) / SUPPLY for cap in (card, 300)]
    yield Claim(
        what="a box of 4 cards can draw 1.5 kW",
        claimed="1.5 kW",
        predicted=f"{draw[0]:,.0f} W at the default cap of {card:g} W, {draw[1]:,.0f} W at the "
        "label's 300 W",
        bound=f"assumes a host of {HOST_W:g} W and a supply of {SUPPLY:.0%}",
        verdict=verdict(1500, draw[1], draw[1], "only at the label's power, all cards at the cap"),
    )


@cache
def sweep() -> tuple[tuple[int, float, float, float], ...]:
    """Cards; tok/s of replicas with 2 users a card; proxy's share; tok/s of one group."""
    rows = []
    for cards in (1, 2, 4, 8, 16):
        replicas = of(configuration("llama-2-7b", "radeon_vii", replicas=cards), 2 * cards)
        group = of(configuration("llama-2-7b", "radeon_vii", tensor_parallel=cards), 4)
        rate = replicas.tokens_per_s
        rows.append((cards, rate, rate * CHUNK_S, group.tokens_per_s))
    return tuple(rows)


def sweep_table() -> str:
    """The sweep as a table."""
    rows = sweep()
    one = rows[0]
    return markdown_table(
        ["cards", "replicas: tok/s", "a card", "proxy, of one core", "one TP group: tok/s",
         "a card", "times one card"],
        [
            [str(n), f"{rate:.0f}", f"{rate / n:.1f}", f"{proxy:.1%}", f"{group:.0f}",
             f"{group / n:.1f}", f"{group / one[3]:.1f}"]
            for n, rate, proxy, group in rows
        ],
    )  # fmt: skip


def optimum_claim() -> Claim:
    """Four to eight cards."""
    rows = {n: (rate / n, group) for n, rate, _, group in sweep()}
    gains = [rows[2 * n][1] / rows[n][1] for n in (1, 2, 4, 8)]
    return Claim(
        what="4-8 cards are best; more raise PCIe complexity and scheduling overhead",
        claimed="4-8",
        predicted=f"replicas: {rows[1][0]:.1f} tok/s a card with 1, {rows[16][0]:.1f} with 16. "
        "One tensor-parallel group: each doubling up to 16 gives "
        + ", ".join(f"{gain:.2f}x" for gain in gains),
        bound="replicas: linear; a group: 2x a doubling",
        verdict="implausible for replicas: nothing they share saturates at 8 cards. For one "
        "group there is no best number either, only less and less gain (below); that rests on an "
        "assumed all-reduce latency, and slots, risers and stability are not modelled",
    )


# --------------------------------------------------------------------------------------
# Datacentre cards


def datacentre_claims() -> Iterator[Claim]:
    """Llama 2 70B at batch 128, and Mixtral 8x7B."""
    for name, device, claimed, note in (
        ("8x MI250X, 70B fp16, batch 128 (\"512 GB\": 8 GCDs, 4 cards)", "mi250x_gcd", 2800,
         "every efficiency of this card is assumed, and the model adds arithmetic to memory time"),
        ("8x A100-80G, 70B fp16, batch 128", "a100_80gb", 3100,
         "efficiencies derived from measurements of this model on this card"),
    ):  # fmt: skip
        served = of(configuration("llama-2-70b", device, "fp16", 8), 128)
        bound = bound_tokens_per_s("llama-2-70b", device, "fp16", 8, 128)
        yield Claim(
            what=name,
            claimed=f"~{claimed:,} tok/s",
            predicted=f"{served.tokens_per_s:,.0f} tok/s, {served.tpot_s * 1e3:.0f} ms a token",
            bound=f"{bound:,.0f} tok/s",
            verdict=verdict(claimed, served.tokens_per_s, bound, note),
        )
    for name, device, bits, claimed in (
        ("1x MI300X, Mixtral 8x7B, TGI", "mi300x", "fp16", 150),
        ("1x H100, Mixtral 8x7B, TGI", "h100", "fp8", 175),
    ):
        yield _mixtral(name, device, bits, claimed)
    room = configuration("mixtral-8x7b", "mi300x").profile.engine
    yield Claim(
        what="Mixtral on ROCm first limited to 4,096 tokens",
        claimed="4,096",
        predicted=f"memory of one MI300X holds {(room.num_kv_blocks - 1) * 16:,} tokens",
        bound=f"{room.max_model_len:,} positions of the model",
        verdict="not checkable: a limit of that software, not of memory; 256 + 256 tokens are "
        "within it",
    )


def _mixtral(name: str, device: str, bits: str, claimed: int) -> Claim:
    served = of(configuration("mixtral-8x7b", device, bits), 1)
    bound = bound_tokens_per_s("mixtral-8x7b", device, bits)
    note = "taken as one sequence, which the claim does not say"
    try:
        configuration("mixtral-8x7b", device)
    except InputError:
        note += f"; fp16 weights do not fit one card, so {bits} is taken"
    return Claim(
        what=name,
        claimed=f"~{claimed} tok/s",
        predicted=f"{served.tokens_per_s:.0f} tok/s as {bits}, one user",
        bound=f"{bound:.0f} tok/s, two of eight experts read",
        verdict=verdict(claimed, served.tokens_per_s, bound, note),
    )


# --------------------------------------------------------------------------------------
# The RX 9070 XT record


@cache
def given_back() -> Record:
    """The record, out of the parameters that were solved from it."""
    return record_of(load_experiment(HERE / "rx_9070_xt.yaml"))


RECORD = Record(tokens_per_s=248.12, peak_tokens_per_s=325, tpot_s=0.02294, ttft_s=187.8726,
                active=5.69, most_waiting=190)  # fmt: skip


def record_claims() -> Iterator[Claim]:
    """The record's figures, and what is said beside it."""
    found = given_back()
    bound = bound_tokens_per_s("llama-3.1-8b", "rx_9070_xt", "fp8", 1, 6)
    for name, field, unit, limit in (
        ("throughput", "tokens_per_s", "tok/s", f"{bound:.0f} tok/s, six sequences"),
        ("peak", "peak_tokens_per_s", "tok/s in one second", f"{bound:.0f} tok/s"),
        ("mean TPOT", "tpot_s", "s", f"{6 / bound:.4f} s, weights alone"),
        ("mean TTFT", "ttft_s", "s", "-"),
        ("active requests", "active", "", "throughput x TPOT, by Little's law"),
        ("waiting requests, at most", "most_waiting", "", "-"),
    ):
        claimed, predicted = getattr(RECORD, field), getattr(found, field)
        yield Claim(
            what=f"RX 9070 XT, Llama 3.1 8B FP8, 10 requests/s: {name}",
            claimed=f"{claimed:g} {unit}".strip(),
            predicted=f"{predicted:.5g} {unit} ({predicted / claimed - 1:+.1%})".replace("  ", " "),
            bound=limit,
            verdict="reproduced by parameters tuned to it; validates nothing",
        )
    card = configuration("llama-3.1-8b", "rx_9070_xt", "fp8")
    alone = of(card, 1)
    single = bound_tokens_per_s("llama-3.1-8b", "rx_9070_xt", "fp8")
    yield Claim(
        what="RX 9070 XT: release builds",
        claimed="~32 tok/s",
        predicted=f"{alone.tokens_per_s:.0f} tok/s with one user, untuned roofline; "
        f"{of(card, 6).tokens_per_s:.0f} with six",
        bound=f"{single:.0f} tok/s, one sequence",
        verdict=f"not checkable: {32 / single:.0%} of the bound if it was one sequence, "
        f"{32 / bound:.0%} if six; the claim does not say, so {248.12 / 32:.1f}x is no speed-up",
    )
    yield Claim(
        what="RX 9070 XT: host memory",
        claimed="13.1 GB",
        predicted="-",
        bound="-",
        verdict="not checkable: the model has no host memory",
    )


# --------------------------------------------------------------------------------------
# What VIIWork is said to do


def design_claims() -> Iterator[Claim]:
    """Placement, splitting, priorities."""
    rooms = {m: configuration(m, "radeon_vii").profile.engine for m in
             ("llama-2-7b", "mistral-7b-v0.1")}  # fmt: skip
    yield Claim(
        what="Llama 2 7B and Mistral 7B fit one 16 GB card",
        claimed="yes",
        predicted="; ".join(f"{m} fp16: {e.num_kv_blocks} blocks, {e.max_model_len:,} tokens"
                            for m, e in rooms.items()),
        bound="16,368 MiB",
        verdict="reproduced, with room for a few short sequences only; 4-bit weights are the "
        "usual choice",
    )  # fmt: skip
    try:
        configuration("llama-2-13b", "radeon_vii")
        needs = "fits"
    except InputError as error:
        needs = str(error).rpartition("; ")[2]
    yield Claim(
        what="a model above 16 GB is split over cards",
        claimed="yes",
        predicted=f"llama-2-13b fp16: {needs}",
        bound="16,368 MiB",
        verdict="reproduced",
    )
    yield Claim(
        what="VIIWork places by memory, splits models and has priorities, before vLLM or TGI",
        claimed="yes",
        predicted="-",
        bound="-",
        verdict="not checkable in a simulator; the published program (0.3.4) drives llama.cpp and "
        "has neither a request queue, priorities nor VRAM-aware placement",
    )
    card = load_device("radeon_vii")
    yield Claim(
        what="Radeon VII: 1 TB/s",
        claimed="1 TB/s",
        predicted=f"{card.measured_bandwidth_gb_s.value:g} GB/s measured",
        bound=f"{card.bandwidth_gb_s.value:g} GB/s nominal",
        verdict="reproduced as the nominal figure",
    )


# --------------------------------------------------------------------------------------
# The page


def claims() -> dict[str, list[Claim]]:
    """All claims, by section of the page."""
    return {
        "What VIIWork does": list(design_claims()),
        "The four configurations": [*headline_claims(), *comparisons()],
        "Boxes of cards": [*dozen_claims(), optimum_claim()],
        "Datacentre cards": list(datacentre_claims()),
        "The RX 9070 XT record": list(record_claims()),
    }


HEAD = f"""\
# The premise, checked

This project was created from documents that make claims. Here each has a line: what is claimed,
what the model predicts, what bandwidth (or memory, or a power cap) allows at most, and a verdict:
*reproduced*, *implausible* and why, or *not checkable* and why. This page is written by
`python experiments/premise/make.py`.

**All predictions are uncalibrated**: step times are rooflines of `viisim/catalogue`, with the
efficiencies and prices that it states, none fitted to the model that is claimed about. Nothing was
tuned to meet a claim, except in the lines of the RX 9070 XT record, which say so. The premise gives
no lengths, so users here send {PROMPT} tokens and get {OUTPUT}, {ROUNDS} times without a
pause, through `least_loaded`. *Reproduced* means within {NEAR:.0%}. The bound is the nominal
bandwidth over the bytes of weights that a decode step reads. Costs spread the purchase over
{PRICES.lifetime_years:g} years, at ${PRICES.usd_per_kwh:g}/kWh.
"""

FILES = """\
Each configuration is an experiment in `experiments/premise` (`radeon_vii_x1.yaml`,
`radeon_vii_x4.yaml`, `rtx_4090.yaml`, `a100_40gb.yaml`) that is offered the claimed rate; in the
simulator every request meets the objectives there.
"""

SWEEP = """\
Llama 2 7B in fp16 on 1 to 16 Radeon VII: as replicas with two users a card, and as one
tensor-parallel group with four users. The proxy's share is measured CPU time for a streamed token
(15.9 us in Python), the only work that all replicas share.
"""

RECORD_TEXT = """\
The record gives five figures. `rx_9070_xt.yaml` and `rx_9070_xt_profile.yaml` choose more than
five things to give them back: how many requests came (202), their lengths (1,024 and 512), how many
run at once (6), a decode step's base (15.8 ms), what a prompt token costs (0.41 ms). **That the
simulator then shows the record's figures validates nothing by itself.** With more parameters than
figures a fit is always to be had, and other choices do as well: longer prompts with cheaper
tokens, fewer and longer answers. Two of the five are not even independent: throughput times TPOT
is the number of active requests, by Little's law, and mean TTFT is little more than half the
length of the run, which is tokens over throughput. It would be evidence only if the same
parameters, fixed, predicted a run that they were not solved from: another arrival rate, or other
lengths. None is on record.
"""


def page() -> str:
    """The whole page."""
    parts = [HEAD]
    headings = ["claim", "claimed", "predicted", "bound", "verdict"]
    after = {
        "The four configurations": FILES,
        "Boxes of cards": f"{SWEEP}\n{sweep_table()}\n",
        "The RX 9070 XT record": RECORD_TEXT,
    }
    for title, found in claims().items():
        parts.append(
            f"## {title}\n\n{markdown_table(headings, [claim.cells for claim in found])}\n"
        )
        if title in after:
            parts.append(after[title])
    return "\n".join(parts)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8", newline="\n")
