"""What each figure of a summary means, for whoever reads a `summary.json` without the code."""

from __future__ import annotations

DEFINITIONS = {
    "busy_share": "share of their time that replicas spent computing",
    "classes": "by traffic class, where there are several or a named one: the same figures of its "
    "own requests, judged by the class's own SLO where it has one",
    "demand_tokens": "service_tokens that a tenant's requests would have made: of those that were "
    "there when the first measured one arrived or came later, refused ones left out; an answer "
    "that never came to its end counts as far as it came",
    "e2e_s": "finished - arrived; finished requests",
    "energy_j": "joules of all devices of the cluster, spare ones included, over the whole run: "
    "idle draw all the time and, while a replica computes, that of decode or of prefill; figures "
    "and their confidence are the device catalogue's, and power_assumptions lists what nobody "
    "measured; null where a device is not in the catalogue",
    "energy_j_per_million_tokens": "energy_j for each million output tokens of finished requests",
    "engine_steps": "engine steps that computed something, whole run",
    "extrapolated_steps": "engine steps outside the profile's calibrated range, whole run",
    "fair_tokens": "a tenant's max-min fair share of all service_tokens: nobody gets more than "
    "demanded, the rest is divided evenly",
    "goodput_requests_per_s": "requests per second of the window that met every SLO given; a plain "
    "request meets TTFT and TPOT if it ends when a stream that just meets both would have ended",
    "hold_s": "dispatched - arrived, the wait in the central queue; finished requests",
    "interval": "half width of the 95 % Student t interval of the mean over seeds",
    "itl_s": "gaps between consecutive tokens of a sequence, whole run, read from bins of equal "
    "ratio (2.3 % wide)",
    "jain_service": "Jain's index of service_tokens themselves: 1 where all tenants got the same, "
    "whatever they demanded",
    "jain_tenants": "Jain's index of service_tokens / fair_tokens over tenants: 1 where each got "
    "its max-min fair share, 1/n where one of n got everything",
    "kv_use_max": "as kv_use_mean, the largest sample",
    "kv_use_mean": "share of a replica's KV blocks in use; samples of all replicas in the window",
    "percentiles": "numpy 'linear'",
    "preemptions": "sequences that lost their blocks and were recomputed, whole run",
    "power_assumptions": "what stands behind energy_j without having been measured",
    "prefix_hit_rate": "share of the prompt tokens looked up that were cached, whole run",
    "queue_s": "started - dispatched, the wait inside the engine; finished requests",
    "saturated": "over the arrival window: mean number in system in the last quarter above 1.5 x "
    "that of the second, never back at the latter, and grown by over 5 % of the arrivals between",
    "service_gap_tokens": "most less least of service_tokens - fair_tokens over tenants: the "
    "largest lead of one tenant over another that their demand does not explain",
    "service_min_over_max": "least / most of service_tokens / fair_tokens over tenants; 0 where "
    "one got nothing",
    "service_tokens": "prompt + 2 x output tokens of a tenant's requests that finished between the "
    "first measured arrival and the last arrival",
    "slo_attainment": "share of measured requests that met every SLO; shed, refused and "
    "unfinished ones missed it",
    "throughput_output_tokens_per_s": "output tokens of what finished in the window",
    "throughput_requests_per_s": "requests finished in the window",
    "throughput_total_tokens_per_s": "prompt and output tokens of what finished in the window",
    "tpot_s": "(finished - first token) / (output tokens - 1); streamed finished requests of more "
    "than one token",
    "ttft_s": "first token - arrived, holding included; streamed finished requests",
    "uncalibrated": "device/model of every replica whose step times are a roofline's: nobody "
    "measured them, and errors of a factor are possible",
    "unsent_requests": "turns of closed-loop sessions that were never sent, because an earlier "
    "turn failed or the run ended, whole run",
    "warmup": "the first `warmup_fraction` of requests by order of arrival are not measured",
    "window": "from the first measured arrival to the last finish or arrival of a measured request",
}
