"""How evenly tenants were served.

Service is what a tenant got, in weighted tokens: prompt + 2 x output tokens, the weights of VTC
(Sheng et al., OSDI 2024). It is counted while requests keep arriving, from the first measured
arrival to the last: afterwards every policy serves whatever is left, and all look alike.

Tenants do not ask for the same, so equal service is not what is fair. What is, is the max-min
fair share: nobody gets more than asked for, and what is left is divided evenly among those who
still want more. As Jain, Chiu and Hawe (1984) define it, the fairness index is taken over the
ratios of service to fair share. It is 1 when everybody got that share, and 1/n when one of n
tenants got everything.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from viisim.records import FINISHED, REFUSED, SHED

OUTPUT_WEIGHT = 2
"""What an output token counts for, a prompt token counting 1."""

Tokens = NDArray[np.float64]


def weighted_tokens(requests: Mapping[str, NDArray[Any]]) -> NDArray[np.int64]:
    """What each request cost or, if it did not finish, would have cost at least."""
    outputs = requests["output_tokens"].astype(np.int64)
    return np.asarray(requests["prompt_tokens"] + OUTPUT_WEIGHT * outputs)


def demand_and_service(
    requests: Mapping[str, NDArray[Any]], tenants: int, first_measured: int
) -> tuple[Tokens, Tokens]:
    """Weighted tokens that each of so many tenants wanted, and got, while requests arrived.

    Wanted: of what was there when request number `first_measured` arrived, or came later; not
    what no replica could ever serve. Got: of what finished from then until the last arrival.
    """
    arrived, finished = requests["arrived_ns"], requests["finished_ns"]
    outcome = requests["outcome"]
    if first_measured >= arrived.size:
        return np.zeros(tenants), np.zeros(tenants)
    before = (outcome == FINISHED) & (finished < arrived[first_measured])
    in_time = (outcome == FINISHED) & ~before & (finished <= arrived[-1])
    shed_before = (outcome == SHED) & (np.arange(arrived.size) < first_measured)
    wanted = ~before & ~shed_before & (outcome != REFUSED)
    tokens = weighted_tokens(requests)

    def of_each(chosen: NDArray[np.bool_]) -> Tokens:
        own = requests["tenant"][chosen]
        return np.bincount(own, tokens[chosen], tenants).astype(np.float64)

    return of_each(wanted), of_each(in_time)


def fair_shares(demand: Tokens, total: float) -> Tokens:
    """The max-min fair division of `total` among tenants who want so much each."""
    shares = np.zeros_like(demand)
    left = min(total, float(demand.sum()))
    order = np.argsort(demand, kind="stable")
    for rank, tenant in enumerate(order):
        shares[tenant] = min(float(demand[tenant]), left / (demand.size - rank))
        left -= shares[tenant]
    return shares


def jain(allocation: Tokens) -> float | None:
    """Jain's index, from 1/n to 1; None for fewer than two, or where nobody got anything."""
    squares = float((allocation**2).sum())
    if allocation.size < 2 or squares == 0:
        return None
    return float(allocation.sum()) ** 2 / (allocation.size * squares)


def fairness(demand: Tokens, service: Tokens) -> dict[str, float | None]:
    """The figures of fairness, as `viisim.definitions` has them; all None for fewer
    than two tenants who wanted anything, or where nobody got anything."""
    wanting = demand > 0
    demand, service = demand[wanting], service[wanting]
    shares = fair_shares(demand, float(service.sum()))
    if demand.size < 2 or not service.any():
        names = ("jain_tenants", "jain_service", "service_min_over_max", "service_gap_tokens")
        return dict.fromkeys(names)
    ratios, beside = service / shares, service - shares
    return {
        "jain_tenants": jain(ratios),
        "jain_service": jain(service),
        "service_min_over_max": float(ratios.min() / ratios.max()),
        "service_gap_tokens": float(beside.max() - beside.min()),
    }
