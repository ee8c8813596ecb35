"""Closed-loop conversations."""

import pickle
from collections.abc import Iterator
from heapq import heappop, heappush
from itertools import count, islice, pairwise
from typing import Any

import numpy as np
import pytest

from viisim.config import experiment_from
from viisim.errors import InputError
from viisim.experiment import run_seed
from viisim.records import SeedResult
from viisim.workload.arrivals import RateCurve
from viisim.workload.interface import Labels, SharedPrefix
from viisim.workload.prefixes import Prefixes
from viisim.workload.request import Request
from viisim.workload.sessions import Sessions, think_time

S = 10**9
PREFIXES = Prefixes(share=1.0, groups=3, tokens=200)


def sessions(**changes: Any) -> Sessions:
    defaults: dict[str, Any] = {
        "requests": 300,
        "rate_per_s": 2.0,
        "turns": {"geometric": 4},
        "first_tokens": {0: 10, 100: 400},
        "turn_tokens": {0: 5, 100: 90},
        "output_tokens": {"geometric": 80},
        "think_s": {"median": 10.0, "cv": 1.0},
        "model": "m",
    }
    return Sessions(**(defaults | changes))


def conversation(first: Request, answered_ns: int = S) -> list[Request]:
    """All turns of a session, each answered so long after its arrival."""
    turns = [first]
    while turns[-1].next_turn is not None:
        turns.append(turns[-1].next_turn(turns[-1].arrived_ns + answered_ns))
    return turns


def conversations(seed: int = 1, **changes: Any) -> list[list[Request]]:
    return [conversation(first) for first in sessions(**changes).requests(seed)]


def content(requests: list[Request]) -> list[Any]:
    """All of them but the closures."""
    return [(r.view, r.arrived_ns, r.prompt, r.output_tokens, r.output_segment) for r in requests]


def played(workload: Sessions, seed: int = 1) -> Iterator[Request]:
    """All turns in order of arrival on a cluster that answers at once."""
    numbers, waiting = count(), []
    for first in workload.requests(seed):
        heappush(waiting, (first.arrived_ns, next(numbers), first))
    while waiting:
        request = heappop(waiting)[2]
        yield request
        if request.next_turn is not None:
            following = request.next_turn(request.arrived_ns)
            heappush(waiting, (following.arrived_ns, next(numbers), following))


# -- how many and when -----------------------------------------------------------------------


def test_all_turns_together_are_the_number_of_requests():
    assert sum(len(turns) for turns in conversations()) == 300 == sessions().total_requests


def test_equal_seeds_give_equal_sessions():
    assert [content(t) for t in conversations(4)] == [content(t) for t in conversations(4)]


def test_other_seeds_give_other_sessions():
    assert content(conversations(4)[0]) != content(conversations(5)[0])


def test_more_requests_change_no_session_but_the_last():
    few, many = conversations(requests=120), conversations(requests=300)
    assert [content(t) for t in few[:-1]] == [content(t) for t in many[: len(few) - 1]]
    assert content(few[-1])[:-1] == content(many[len(few) - 1])[: len(few[-1]) - 1]


def test_a_session_is_the_same_however_late_it_is_answered():
    first = next(sessions().requests(1))
    fast, slow = conversation(first, 0), conversation(first, 100 * S)
    assert [r.prompt for r in fast] == [r.prompt for r in slow]
    assert [r.output_tokens for r in fast] == [r.output_tokens for r in slow]


def test_a_next_turn_arrives_after_the_answer_and_a_pause_that_does_not_depend_on_it():
    turns = next(turns for turns in conversations() if len(turns) > 1)
    pauses_ns = [turns[0].next_turn(when).arrived_ns - when for when in (3 * S, 50 * S)]
    assert pauses_ns[0] == pauses_ns[1] > 0


def test_the_rate_changes_when_sessions_begin_and_nothing_else():
    slow, fast = conversations(rate_per_s=1.0), conversations(rate_per_s=10.0)
    assert [[r.prompt for r in t] for t in slow] == [[r.prompt for r in t] for t in fast]
    begins = [np.array([t[0].arrived_ns for t in turns]) for turns in (slow, fast)]
    assert np.allclose(begins[0] / begins[1], 10, rtol=1e-6)


def test_a_rate_curve_holds_for_the_beginnings():
    curve = RateCurve({0: 0.0, 100: 1.0}, period_s=200, shape="steps")
    begins_s = [r.view.arrived_s % 200 for r in sessions(rate_curve=curve).requests(1)]
    assert min(begins_s) >= 99.999


def test_turns_have_the_stated_mean():
    turns = [len(t) for t in conversations(requests=20_000)][:-1]
    # Four standard errors of a geometric distribution of mean 4: variance 4 * 3.
    assert abs(np.mean(turns) - 4) <= 4 * np.sqrt(12 / len(turns))


def test_think_times_have_the_stated_median_and_cv():
    draws = think_time({"median": 10.0, "cv": 1.0}).seconds(
        np.random.default_rng(1).standard_normal(100_000)
    )
    # The log has standard deviation 0.833; a median of n scatters by 1.2533 of that.
    assert abs(np.log(np.median(draws) / 10)) <= 4 * 1.2533 * 0.833 / np.sqrt(100_000)
    sigma = np.log(draws).std()
    assert abs(sigma - np.sqrt(np.log(2))) <= 4 * sigma / np.sqrt(2 * 100_000)


def test_exponential_think_times_have_the_stated_mean():
    draws = think_time({"exponential": 7.0}).seconds(
        np.random.default_rng(1).standard_normal(100_000)
    )
    assert abs(draws.mean() / 7 - 1) <= 4 / np.sqrt(100_000)


# -- prompts ---------------------------------------------------------------------------------


def test_a_prompt_holds_the_prompt_before_its_answer_and_something_new():
    for turns in conversations(prefixes=PREFIXES):
        for before, after in pairwise(turns):
            answer = (before.output_segment, before.output_tokens)
            assert after.prompt[:-1] == (*before.prompt, answer)
            assert 5 <= after.prompt[-1][1] <= 90


def test_the_pieces_of_a_prompt_add_up_to_its_length():
    for turns in conversations(prefixes=PREFIXES):
        for request in turns:
            assert sum(tokens for _, tokens in request.prompt) == request.view.prompt_tokens


def test_sessions_share_their_group_s_prefix_and_nothing_else():
    prefixes, others = set(), []
    for turns in conversations(prefixes=PREFIXES):
        prefixes.add(turns[-1].prompt[0])
        others += [segment for segment, _ in turns[-1].prompt[1:]]
    assert prefixes == {(0, 200), (1, 200), (2, 200)}
    assert len(others) == len(set(others))
    assert not set(others) & {0, 1, 2}


def test_a_named_prefix_is_named_by_its_segment():
    named = Prefixes(share=1.0, groups=1, tokens=200, name="system")
    first = next(sessions(prefixes=named).requests(1))
    assert first.prompt[0] == (SharedPrefix("system", 0), 200)
    assert all(block < 0 for block in first.view.prefix_blocks[:3])


def test_the_scheduler_sees_the_full_blocks_of_a_growing_prompt():
    for turns in conversations(prefixes=PREFIXES):
        for request in turns:
            assert len(request.view.prefix_blocks) == request.view.prompt_tokens // 64
        for before, after in pairwise(turns):
            known = before.view.prefix_blocks
            assert after.view.prefix_blocks[: len(known)] == known


def test_blocks_are_equal_only_inside_a_shared_prefix():
    finals = [turns[-1].view.prefix_blocks for turns in conversations(prefixes=PREFIXES)]
    shared = {blocks[:3] for blocks in finals if len(blocks) >= 3}
    assert len(shared) == 3  # 200 tokens have three full blocks of 64
    own = [block for blocks in finals for block in blocks[3:]]
    assert len(own) == len(set(own))


def test_a_session_ends_before_its_prompt_exceeds_the_limit():
    free, limited = conversations(), conversations(max_prompt_tokens=300)
    assert max(r.view.prompt_tokens for turns in limited for r in turns) <= 300
    assert max(r.view.prompt_tokens for turns in free for r in turns) > 300
    ended = [t for t, whole in zip(limited, free, strict=False) if len(t) < len(whole)]
    whole = {turns[0].view.id: turns for turns in free}
    for turns in ended[:20]:
        assert whole[turns[0].view.id][len(turns)].view.prompt_tokens > 300


def test_long_answers_are_cut_to_the_limit_and_counted():
    limited = sessions(max_output_tokens=50)
    cut = [r.output_tokens for first in limited.requests(1) for r in conversation(first)]
    whole = [r.output_tokens for turns in conversations() for r in turns]
    assert cut == [min(tokens, 50) for tokens in whole]
    assert limited.cut_outputs == sum(tokens > 50 for tokens in whole)


def test_all_turns_carry_the_session_and_the_labels():
    labels = Labels(traffic_class="chat", tenant="acme", priority=3, deadline_s=5.0)
    for turns in conversations(labels=labels):
        for request in turns:
            view = request.view
            assert view.session == turns[0].view.session
            assert (view.traffic_class, view.tenant, view.priority) == ("chat", "acme", 3)
            assert view.deadline_s == view.arrived_s + 5.0


def test_ids_differ():
    ids = [request.view.id for turns in conversations() for request in turns]
    assert len(set(ids)) == len(ids)


def test_the_streamed_share_is_as_stated():
    turns = conversations(requests=10_000, streamed=0.8)
    streamed = np.mean([request.view.streamed for session in turns for request in session])
    assert abs(streamed - 0.8) <= 4 * np.sqrt(0.8 * 0.2 / 10_000)


def test_a_workload_survives_pickling():
    workload = sessions(prefixes=PREFIXES)
    copy = pickle.loads(pickle.dumps(workload))
    assert content(list(played(copy))) == content(list(played(workload)))


# -- in a simulation -------------------------------------------------------------------------


def simulated(**changes: Any) -> SeedResult:
    """Sessions so far apart that one is served at a time, on one replica with blocks of 16."""
    experiment = {
        "name": "sessions",
        "policy": {"name": "least_loaded"},
        "cluster": {"replicas": [{"device": "bench", "model": "a100_like"}]},
        "workload": {
            "kind": "sessions", "requests": 12, "rate_per_s": 0.001, "turns": 4,
            "first_tokens": 200, "turn_tokens": 50, "output_tokens": 100,
            "think_s": {"exponential": 1.0}, **changes,
        },
        "seeds": [1],
    }  # fmt: skip
    return run_seed(experiment_from(experiment, "test"), 1)


def test_a_simulation_serves_every_turn():
    result = simulated()
    assert result.requests["prompt_tokens"].tolist() == 3 * [200, 350, 500, 650]
    assert result.unsent_requests == 0


def test_the_engine_finds_prompt_and_answer_of_the_turn_before_in_its_prefix_cache():
    cached = simulated().requests["cached_tokens"].tolist()
    # The last token of an answer is never computed: 299, 449 and 599 tokens in blocks of 16.
    assert cached == 3 * [0, 288, 448, 592]


def test_the_engine_finds_a_prefix_that_sessions_share():
    prefixes = {"share": 1.0, "groups": 1, "tokens": 160}
    cached = simulated(turns=1, prefixes=prefixes).requests["cached_tokens"].tolist()
    assert cached == [0] + 11 * [160]


def test_a_next_turn_arrives_after_the_answer_in_a_simulation():
    rows = simulated().requests
    for session in range(3):
        arrived, finished = (rows[c][4 * session : 4 * session + 4] for c in COLUMNS)
        assert np.all(arrived[1:] > finished[:-1])


COLUMNS = ("arrived_ns", "finished_ns")


# -- mistakes --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"requests": 0}, "requests: 0 is not possible"),
        ({"rate_per_s": 1e-9}, "rate_per_s: 1e-09 spreads 300 sessions over more than"),
        ({"turns": 0}, "turns: 0 is not possible"),
        ({"turn_tokens": {"geometric": 0}}, "turn_tokens.geometric: a mean of 0.0"),
        ({"turns": "azure_conv"}, "turns: preset 'azure_conv' has no such table"),
        ({"think_s": {"mean": 3}}, "think_s: {'mean': 3} is neither"),
        ({"think_s": {"median": 0, "cv": 1}}, "think_s.median: 0 is not possible"),
        ({"think_s": {"exponential": -1}}, "think_s.exponential: -1 is not possible"),
        ({"streamed": 2}, "streamed: 2 is not a share"),
        ({"block_tokens": 1}, "block_tokens: 1 is not possible; use at least 8"),
        (
            {"prefixes": PREFIXES, "max_prompt_tokens": 200},
            "max_prompt_tokens: 200 leaves nothing behind a prefix of 200 tokens",
        ),
    ],
)
def test_an_impossible_parameter_is_named(change: dict[str, Any], complaint: str):
    with pytest.raises(InputError) as error:
        sessions(**change)
    assert complaint in str(error.value)


def test_a_negative_seed_is_refused_at_once():
    with pytest.raises(InputError, match="seed: -1 is negative"):
        sessions().requests(-1)


def test_the_number_of_sessions_prepared_is_as_small_as_needed():
    first = list(islice(sessions(requests=10**6).requests(1), 3))
    assert [request.view.id for request in first] == ["s0-0", "s1-0", "s2-0"]
